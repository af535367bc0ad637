# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Convergence diagnostics of predictions, which are identified, instead of weights, which are not."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_bnn.diagnostics.axes import diagonal, new_axes
from pyro_bnn.diagnostics.chains import Chains
from pyro_bnn.infer.predict.draws import Posterior
from pyro_bnn.infer.predict.predictive import posterior_predictive
from pyro_bnn.model.data import as_batches

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes


@torch.no_grad()
def prediction_draws(
    model: Callable[..., Any],
    posterior: Posterior | Sequence[Callable[..., Any]],
    data: Any,
    *,
    num_samples: int | None = None,
    num_chains: int = 1,
    batch_size: int | None = None,
    vectorize: bool | None = None,
) -> "xr.Dataset":
    """
    The mean of each observation under each posterior draw, with dims ``(chain, draw)``.

    Components of a mixture guide, guides of a list and MCMC chains are chains, so that ArviZ's R-hat, ESS and rank
    plots of this dataset compare their *functions*: two networks with permuted hidden units agree here and
    disagree in every weight.

    :param callable model: a Pyro model.
    :param posterior: see :func:`~pyro_bnn.diagnostics.to_datatree`.
    :param data: where to predict; observations are not needed.
    :param int num_samples: the number of draws in all chains together.
    :param int num_chains: chains in a mapping of draws.
    :param int batch_size: splits one batch of tensors into pieces of this many rows.
    :param vectorize: see :func:`~pyro_bnn.infer.posterior_predictive`.
    :return: by observed site, the means (class probabilities for labels).
    :raises ValueError: if no observed site has a mean.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> found = prediction_draws(model, {"w": torch.randn(100)}, torch.ones(3), num_chains=4)
        >>> dict(found.sizes)
        {'chain': 4, 'draw': 25, 'data': 3}
    """
    import xarray as xr

    data = as_batches(data)
    chains = Chains(posterior, num_samples, num_chains, data.first)
    draws = chains.draws()
    found = posterior_predictive(
        model,
        chains.predicting_guide() or draws,
        data,
        draws=draws,
        batch_size=batch_size,
        vectorize=vectorize,
    )
    variables = {}
    for name, site in found.items():
        if site.mean is not None and bool(site.mean.isfinite().any()):  # a Cauchy distribution has none
            value = site.mean.cpu().numpy()
            dims = [*site.dims, f"{name}_class"][: value.ndim - 1]
            variables[name] = (["chain", "draw", *dims], value.reshape(*chains.shape, *value.shape[1:]))
    if not variables:
        raise ValueError(
            f"prediction_draws: the distributions of the observed sites {list(found)} have no mean. Export a function of the "
            "latents with pyro.deterministic in its place."
        )
    coords = {"chain": np.arange(chains.shape[0]), "draw": np.arange(chains.shape[1])}
    return xr.Dataset(variables, coords=coords)


def prediction_diagnostics(predictions: "xr.Dataset") -> "xr.Dataset":
    """
    R-hat and effective sample sizes of predictions, by ArviZ.

    :param predictions: what :func:`prediction_draws` returns.
    :return: ``<site>_r_hat``, ``<site>_ess_bulk`` and ``<site>_ess_tail`` per observation. With one chain R-hat is
        nan.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> draws = prediction_draws(model, {"w": torch.randn(200)}, x, num_chains=4)
        >>> sorted(prediction_diagnostics(draws))
        ['obs_ess_bulk', 'obs_ess_tail', 'obs_r_hat']
    """
    import arviz
    import xarray as xr

    found = {}
    with np.errstate(divide="ignore", invalid="ignore"):  # predictions that all draws share give nan
        # ArviZ warns about a single chain, whose R-hat is nan here
        several = predictions.sizes["chain"] > 1
        one = predictions.isel(chain=0, draw=0, drop=True)
        found["r_hat"] = arviz.rhat(predictions) if several else one * np.nan
        for kind in ("bulk", "tail"):
            found[f"ess_{kind}"] = arviz.ess(predictions, method=kind)
    return xr.Dataset({f"{n}_{what}": part[n] for n in predictions.data_vars for what, part in found.items()})


def plot_diversity(predictions: "xr.Dataset", *, site: str | None = None, ax: "Axes | None" = None) -> "Axes":
    """
    How far apart components are: for every observation the spread between the chains' mean predictions over the
    spread within chains.

    Values near zero mean that all components predict the same; a collapsed mixture lies there entirely.

    :param predictions: what :func:`prediction_draws` returns.
    :param str site: the observed site, if there are several.
    :param ax: matplotlib axes to draw in.
    :return: the axes.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> draws = prediction_draws(model, {"w": torch.randn(40)}, x, num_chains=2)
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_diversity(draws, ax=ax) is ax
        True
    """
    ax = new_axes(ax)
    variable = predictions[site or next(iter(predictions.data_vars))]
    between = variable.mean("draw").std("chain").values.reshape(-1)
    within = variable.std("draw").mean("chain").values.reshape(-1)
    ax.plot(within, between, ".", markersize=4)
    diagonal(ax, max(float(within.max()), float(between.max())) * 1.05)
    ax.set_xlabel("spread within components")
    ax.set_ylabel("spread between components")
    return ax


def plot_prediction_ranks(
    predictions: "xr.Dataset",
    index: int = 0,
    *,
    site: str | None = None,
    bins: int = 20,
    ax: "Axes | None" = None,
) -> "Axes":
    """
    Histograms, one per chain, of the ranks of a prediction among those of all chains; flat if the chains agree.

    :param predictions: what :func:`prediction_draws` returns.
    :param int index: which observation.
    :param str site: the observed site, if there are several.
    :param int bins: the number of bins.
    :param ax: matplotlib axes to draw in.
    :return: the axes.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> draws = prediction_draws(model, {"w": torch.randn(40)}, x, num_chains=2)
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_prediction_ranks(draws, index=1, ax=ax) is ax
        True
    """
    ax = new_axes(ax)
    variable = predictions[site or next(iter(predictions.data_vars))].values
    chains, draws = variable.shape[:2]
    values = variable.reshape(chains * draws, -1)[:, index]
    ranks = values.argsort(kind="stable").argsort(kind="stable").reshape(chains, draws)
    for chain, row in enumerate(ranks):
        counts, edges = np.histogram(row, bins=bins, range=(0, chains * draws))
        ax.stairs(counts, edges, label=f"chain {chain}")
    ax.axhline(draws / bins, color="0.6", linestyle="--", linewidth=1)
    ax.set_xlabel("rank among all chains")
    return ax
