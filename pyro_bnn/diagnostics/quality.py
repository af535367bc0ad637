# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""How good is an approximate posterior: importance weights, calibration by simulation, agreement with NUTS."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro.poutine as poutine
import torch
from pyro.ops.stats import split_gelman_rubin
from torch import Tensor
from typing_extensions import override

from pyro_bnn.diagnostics.axes import new_axes
from pyro_bnn.diagnostics.export import Contents, Exporter
from pyro_bnn.diagnostics.labels import in_tree
from pyro_bnn.diagnostics.scored import check_numbers
from pyro_bnn.infer.predict.draws import Draws, posterior_draws
from pyro_bnn.infer.predict.predictive import posterior_predictive
from pyro_bnn.infer.predict.weighted import WeightedChains
from pyro_bnn.infer.sample.nuts import nuts
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.model.handlers import is_deterministic, sample_sites
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.ops.described import Described
from pyro_bnn.ops.pareto import tail_shape

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes


def log_weights(
    model: Callable[..., Any], guide: Any, data: Any, num_samples: int | None = None
) -> tuple[Draws, Tensor]:
    r"""
    Draws of a guide and their log importance weights :math:`\log p(y, z_s) - \log q(z_s)`.

    :param callable model: a Pyro model.
    :param guide: a guide with a density (no point masses).
    :param data: the data with observations, in any form.
    :param int num_samples: the number of draws S; see :func:`to_datatree`.
    :return: draws by site, and weights of shape ``(S,)``; nats.
    :raises ValueError: if the guide has no density.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> from pyro_bnn import AutoLaplace
        >>> guide = AutoLaplace(model).initialize(x, x).polish((x, x)).laplace_approximation((x, x))
        >>> draws, log_w = log_weights(model, guide, (x, x), num_samples=50)
        >>> log_w.shape, bool(log_w.std() < 1e-6)  # a linear model: the guide is the posterior
        (torch.Size([50]), True)
    """
    contents = Contents(weights=True, predictions=False, unpack=False)
    with torch.no_grad(), evaluation_mode(model), local_parameters():
        exporter = Exporter(model, guide, data, contents, num_samples)
        (groups,) = exporter.blocks()
    stats = exporter.rest["sample_stats"]
    if exporter.missing:
        raise ValueError(
            f"{type(guide).__name__} has no density of the sites {exporter.missing}, which the model samples: weights need a "
            "guide of all latent sites."
        )
    if "log_q" not in stats:
        raise ValueError(
            f"{type(guide).__name__} has no density that could be evaluated (point masses or auxiliary variables)."
        )
    weights = torch.as_tensor((stats["lp"] - stats["log_q"]).values).flatten()
    values = {name: groups["posterior"][in_tree(name)].values for name in exporter.names}
    return {name: torch.as_tensor(np.array(v)).flatten(0, 1) for name, v in values.items()}, weights


def pareto_k(log_ratios: Any) -> float:
    r"""
    The shape :math:`\hat k` of a generalised Pareto distribution fitted to the largest importance ratios.

    Below 0.7 importance sampling with this many draws is reliable. In the space of a network's weights it is
    above that for practically every approximation: look at :func:`functional_k` of predictions.

    :param log_ratios: log importance ratios ``(S,)``.
    :return: the shape; ``inf`` if there are too few draws for a tail.
    :raises ValueError: for no draws, NaN, or infinite weights.

    **References**

    Vehtari, Simpson, Gelman, Yao, Gabry, *Pareto smoothed importance sampling*, JMLR 2024.

    Example::

        >>> _ = torch.manual_seed(0)
        >>> exponential = torch.distributions.Exponential(1.0).sample((20000,))
        >>> abs(pareto_k(0.5 * exponential) - 0.5) < 0.1
        True
    """
    ratios = _ratios(log_ratios)
    return tail_shape(torch.exp(ratios - ratios.max()))


def _ratios(log_ratios: Any) -> Tensor:
    """Log importance ratios as a vector; minus infinity is a weight of zero, anything else must be finite."""
    ratios = check_numbers(torch.as_tensor(log_ratios).double(), "log_ratios", infinite=True).flatten()
    if not bool(ratios.max().isfinite()):
        raise ValueError(
            f"log_ratios: the largest is {float(ratios.max())}, expected finite numbers (or minus infinity for weights of "
            "zero, but not for all): look at the draws whose density is not finite."
        )
    return ratios


def functional_k(log_ratios: Any, values: Any) -> np.ndarray:
    r"""
    :math:`\hat k` of importance-sampling estimates of expectations :math:`E[h(z)]`: the largest shape among the
    tails of the ratios r and of h r.

    :param log_ratios: log importance ratios ``(S,)``.
    :param values: functionals under each draw ``(S, ...)``, e.g. the means of predictions.
    :return: one shape per functional.

    Example::

        >>> _ = torch.manual_seed(0)
        >>> found = functional_k(torch.zeros(4000), torch.randn(4000, 2))
        >>> found.shape, bool((found < 0.3).all())
        ((2,), True)
    """
    ratios = _ratios(log_ratios)
    weights = torch.exp(ratios - ratios.max())
    functions = check_numbers(torch.as_tensor(values).double(), "values")
    if functions.shape[:1] != ratios.shape:
        raise ValueError(
            f"values has shape {tuple(functions.shape)}, expected (S, ...) with S = {len(ratios)}, the number of log_ratios."
        )
    shape = functions.shape[1:]
    base = tail_shape(weights)
    found = []
    for column in functions.reshape(len(ratios), -1).T:
        product = column * weights
        found.append(max(base, tail_shape(product - product.min()), tail_shape(product.max() - product)))
    return np.asarray(found).reshape(shape)


def elbo_gap(log_ratios: Any) -> dict[str, float]:
    r"""
    The ELBO, the importance-weighted bound of S draws and their gap, a lower bound on
    :math:`\mathrm{KL}(q \| p(z \mid y))` in expectation.

    .. math:: \mathrm{ELBO} = \frac1S \sum_s \log w_s \le \log \frac1S \sum_s w_s \to \log p(y).

    :param log_ratios: log importance ratios ``(S,)``.
    :return: ``elbo``, ``bound``, ``gap`` and ``elbo_error`` (the standard error of the ELBO); nats.

    **References**

    Burda, Grosse, Salakhutdinov, *Importance weighted autoencoders*, ICLR 2016.

    Example::

        >>> elbo_gap(torch.full((10,), -3.0))["gap"]
        0.0
    """
    ratios = _ratios(log_ratios)
    elbo = float(ratios.mean())
    bound = float(torch.logsumexp(ratios, 0)) - math.log(len(ratios))
    error = float(ratios.std()) / math.sqrt(len(ratios))
    return {"elbo": elbo, "bound": bound, "gap": bound - elbo, "elbo_error": error}


@dataclass(repr=False)
class CalibrationRanks(Described):
    """
    Ranks of simulation-based calibration.

    :param ranks: by quantity, the ranks of the true values among the draws, shape ``(simulations, size)``.
    :param num_draws: the number of draws L; ranks lie between 0 and L.
    """

    ranks: dict[str, np.ndarray]
    num_draws: int

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        runs = len(next(iter(self.ranks.values()))) if self.ranks else 0
        rows = {
            name: f"mean rank {ranks.mean() / self.num_draws:.3f} of 0.5, {ranks[0].size} elements"
            for name, ranks in self.ranks.items()
        }
        return f"simulation-based calibration: {runs} simulations, {self.num_draws} draws each", rows

    def counts(self, name: str, bins: int = 10) -> np.ndarray:
        """
        Histogram of the ranks of one quantity, all of its elements together.

        :param str name: the quantity.
        :param int bins: the number of bins.
        :return: counts.
        """
        return np.histogram(self.ranks[name], bins=bins, range=(-0.5, self.num_draws + 0.5))[0]

    def p_values(self, bins: int = 10) -> dict[str, float]:
        """
        Chi-squared tests of uniform ranks; elements of a quantity are correlated, so that the test of a vector is too
        strict.

        :param int bins: the number of bins; it should divide L + 1.
        :return: by quantity, the p value.
        """
        from scipy.stats import chi2

        found = {}
        for name in self.ranks:
            counts = self.counts(name, bins)
            expected = counts.sum() / bins
            found[name] = float(chi2.sf(((counts - expected) ** 2 / expected).sum(), bins - 1))
        return found

    def plot(self, name: str, bins: int = 10, ax: "Axes | None" = None) -> "Axes":
        """
        The histogram of the ranks with a band of two binomial standard deviations.

        :param str name: the quantity.
        :param int bins: the number of bins.
        :param ax: matplotlib axes to draw in.
        :return: the axes.
        """
        ax = new_axes(ax)
        counts = self.counts(name, bins)
        total = counts.sum()
        spread = 2 * math.sqrt(total / bins * (1 - 1 / bins))
        ax.axhspan(total / bins - spread, total / bins + spread, color="0.6", alpha=0.3)
        ax.bar(np.arange(bins), counts, width=0.9)
        ax.set_xlabel(f"rank of {name}")
        return ax


def simulation_based_calibration(
    model: Callable[..., Any],
    recipe: Callable[[Callable[..., Any]], Any],
    args: tuple[Any, ...] = (),
    *,
    num_simulations: int = 100,
    num_draws: int = 99,
    quantities: Callable[[Draws], dict[str, Tensor]] | None = None,
    observed: Sequence[str] | None = None,
) -> CalibrationRanks:
    r"""
    Checks a model and a way of fitting it on data that the model itself makes.

    Repeats: draw :math:`z^* \sim p(z)` and :math:`y^* \sim p(y \mid z^*)`; fit :math:`p(z \mid y^*)`; take the rank
    of :math:`z^*` among L draws of the fit. With exact posteriors the ranks are uniform on 0..L; a U shape shows
    posteriors that are too narrow, a hump too wide ones.

    :param callable model: a Pyro model; called with ``args`` it must not observe anything.
    :param callable recipe: takes a model that observes the simulated data (called with the same ``args``) and
        returns a guide fitted to it, draws, or an MCMC run.
    :param args: arguments of the model, without observations.
    :param int num_simulations: the number of repetitions.
    :param int num_draws: the number of draws L.
    :param callable quantities: a function of draws by site (shape ``(S,) + site shape``) returning the
        quantities to rank, each with the draws first; the sites themselves by default. For networks
        choose predictions: weights are not identified.
    :param observed: the sites that stand for data; by default the last site and those in the same plates.
    :return: the ranks.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> from pyro_bnn import AutoLaplace
        >>> def recipe(observing):
        ...     return AutoLaplace(observing).initialize(x).polish((x,)).laplace_approximation((x,))
        >>> found = simulation_based_calibration(model, recipe, (x,), num_simulations=2, num_draws=9)
        >>> found.ranks["w"].shape
        (2, 1)

    **References**

    Talts, Betancourt, Simpson, Vehtari, Gelman, *Validating Bayesian inference algorithms with simulation-based
    calibration*, 2018.
    """
    quantities = quantities or (lambda draws: draws)
    ranks: dict[str, list[np.ndarray]] = {}
    for _ in range(num_simulations):
        with poutine.block(), local_parameters(), torch.no_grad():
            sites = sample_sites(poutine.trace(model).get_trace(*args))
        values = {n: s["value"] for n, s in sites.items() if not (s["is_observed"] or is_deterministic(s))}
        simulated = {name: values[name] for name in (observed or observation_names(sites))}
        fitted = recipe(poutine.condition(model, data=simulated))
        draws = posterior_draws(fitted, num_draws, (args, {}))
        truth = quantities({n: values[n][None] for n in draws})
        for name, found in quantities(draws).items():
            check_numbers(found, f"draws of {name!r}", infinite=True)
            below = (found < truth[name]).sum(0)
            ranks.setdefault(name, []).append(below.reshape(-1).cpu().numpy())
    return CalibrationRanks({name: np.stack(rows) for name, rows in ranks.items()}, num_draws)


def observation_names(sites: dict[str, Any]) -> list[str]:
    """
    The sites that stand for data in a model called without observations: those that no other site follows in
    their plate, which are the last ones, all in the plates of the last site.
    """
    latent = [n for n, s in sites.items() if not is_deterministic(s)]
    plates = {n: {frame.name for frame in sites[n]["cond_indep_stack"]} for n in latent}
    last = latent[-1]
    return [n for n in latent if n == last or (plates[last] and plates[n] == plates[last])]


def compare_with_nuts(
    model: Callable[..., Any],
    guide: Any,
    data: Any,
    *,
    num_samples: int = 500,
    warmup_steps: int = 500,
    num_chains: int = 4,
    progress_bar: bool = False,
) -> "xr.Dataset":
    r"""
    Runs NUTS from a fitted guide and compares both posteriors, site by site and in their predictions.

    Dims ``quantity`` (latent sites, and ``<site>_mean`` for the predictions at observed sites) with variables

    - ``shift``: root mean square over elements of :math:`(\mu_q - \mu_p) / \sigma_p`;
    - ``scale_ratio``: geometric mean over elements of :math:`\sigma_q / \sigma_p`;
    - ``r_hat``: the largest split R-hat of the chains, without which the comparison says nothing.

    In networks compare the predictions: weights have several modes. NUTS is slow there, up to 1023 gradients per
    transition, and needs many transitions before ``r_hat`` of the predictions is near one.

    :param callable model: a Pyro model.
    :param guide: a fitted guide.
    :param data: one batch with the full data.
    :param int num_samples: draws per chain.
    :param int warmup_steps: steps of adaptation per chain.
    :param int num_chains: the number of chains.
    :param bool progress_bar: whether to show the progress of NUTS.
    :return: the comparison.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> from pyro_bnn import AutoLaplace
        >>> guide = AutoLaplace(model).initialize(x, x).polish((x, x)).laplace_approximation((x, x))
        >>> found = compare_with_nuts(model, guide, (x, x), num_samples=4, warmup_steps=4, num_chains=2)
        >>> sorted(found)
        ['r_hat', 'scale_ratio', 'shift']
    """
    import xarray as xr

    run = nuts(
        model, data, guide=guide, num_samples=num_samples, warmup_steps=warmup_steps,
        num_chains=num_chains, progress_bar=progress_bar,
    )  # fmt: skip
    exact = posterior_predictive(model, run, data)
    number = None if isinstance(guide, WeightedChains) else num_samples * num_chains  # of stored draws all
    approximate = posterior_predictive(model, guide, data, num_samples=number)
    pairs = {
        name: (approximate.draws[name], exact.draws[name])
        for name in exact.draws
        if name in approximate.draws
    }
    for name, site in exact.items():
        other = approximate[name].mean
        if site.mean is not None and other is not None:
            pairs[f"{name}_mean"] = other, site.mean
    rows: dict[str, list[float]] = {"shift": [], "scale_ratio": [], "r_hat": []}
    for q, p in pairs.values():
        sd = p.std(0)
        rows["shift"].append(float(((q.mean(0) - p.mean(0)) / sd).square().mean().sqrt()))
        rows["scale_ratio"].append(float((q.std(0) / sd).log().mean().exp()))
        rows["r_hat"].append(float(split_gelman_rubin(p.unflatten(0, (num_chains, num_samples))).max()))
    return xr.Dataset({k: ("quantity", v) for k, v in rows.items()}, coords={"quantity": list(pairs)})
