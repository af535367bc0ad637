# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Have chains mixed? R-hat and effective sample sizes of what they predict."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from pyro_bnn.diagnostics.functional import prediction_diagnostics, prediction_draws
from pyro_bnn.infer.predict.weighted import WeightedChains
from pyro_bnn.ops.described import Described

if TYPE_CHECKING:
    import xarray as xr

#: R-hat of chains that have mixed (Vehtari et al., 2021).
GOOD = 1.01


@dataclass(repr=False)
class MixingReport(Described):
    """
    R-hat and effective sample sizes of predictions.

    :param values: ``<site>_r_hat``, ``<site>_ess_bulk`` and ``<site>_ess_tail`` of every observation, and of each group of chains
        with the dim ``group``; nan where a group is one chain.
    :param predictions: the means of the observations that they are of, with dims ``(chain, draw)``.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> _ = torch.manual_seed(0)
        >>> report = mixing(model, {"w": torch.randn(400)}, torch.ones(3), num_chains=4)
        >>> report.largest_r_hat < 1.05, dict(report.values["obs_r_hat"].sizes)
        (True, {'data': 3})
    """

    values: "xr.Dataset"
    predictions: "xr.Dataset"

    @property
    def largest_r_hat(self) -> float:
        """The largest R-hat of a prediction, of all sites and groups; nan if all chains are alone."""
        return max((float(v.max()) for v in self._of("r_hat").values()), default=np.nan)

    @property
    def smallest_ess(self) -> float:
        """The smallest effective sample size, in the bulk or in the tails, of a prediction."""
        found = [float(v.min()) for kind in ("ess_bulk", "ess_tail") for v in self._of(kind).values()]
        return min(found, default=np.nan)

    def _of(self, kind: str) -> dict[str, np.ndarray]:
        """By site the numbers of one kind that are numbers."""
        found = {str(n): self.values[f"{n}_{kind}"].values.reshape(-1) for n in self.predictions.data_vars}
        return {name: v[np.isfinite(v)] for name, v in found.items() if np.isfinite(v).any()}

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        sizes = self.predictions.sizes
        rows = {}
        for name, v in self._of("r_hat").items():
            share = f"{100 * (v < GOOD).mean():.0f} % below {GOOD}"
            rows[f"R-hat of {name!r}"] = f"largest {v.max():.3f}, median {np.median(v):.3f}, {share}"
        for kind, words in (("ess_bulk", "bulk"), ("ess_tail", "tail")):
            for name, v in self._of(kind).items():
                rows[f"ESS of {name!r}, {words}"] = f"smallest {v.min():.0f}, median {np.median(v):.0f}"
        if not self._of("r_hat"):
            rows["R-hat needs chains to compare: run several, or several of a mode."] = ""
        elif self.largest_r_hat >= GOOD:
            rows[
                "Some predictions differ between chains: they are not mixed, or explore different modes."
            ] = ""
        groups = f" in {self.values.sizes['group']} groups" if "group" in self.values.dims else ""
        return f"mixing of {sizes['chain']} chains of {sizes['draw']} draws{groups}", rows


def mixing(
    model: Callable[..., Any],
    posterior: Any,
    data: Any,
    *,
    groups: Sequence[Any] | str | None = None,
    num_samples: int | None = None,
    num_chains: int = 1,
    batch_size: int | None = None,
    vectorize: bool | None = None,
) -> MixingReport:
    r"""
    Split, rank-normalised R-hat and effective sample sizes of the predictions of chains, by ArviZ.

    Predictions are compared, since weights of networks are not identified: two chains whose hidden units are permuted have the
    same predictions and different weights.

    Weights of chains do not enter: R-hat asks whether chains say the same, not how much they count. Between chains of *different
    modes* it is large where the modes predict differently, however well each chain has explored its own; the draws are then a
    mixture of modes, whose weights come from elsewhere (evidence, stacking), and not from how often a chain would visit them.
    ``groups`` names the mode of each chain, so that chains are compared within modes alone. Small R-hat between modes says that the
    weights hardly matter for these predictions. Chains of weight zero are left out.

    :param callable model: a Pyro model.
    :param posterior: a :class:`~pyro_bnn.infer.ChainResult`, an :class:`~pyro.infer.MCMC` run, a mapping of draws, or any other
        posterior, see :func:`~pyro_bnn.diagnostics.to_datatree`.
    :param data: where to predict; observations are not needed.
    :param groups: a label for each chain, such as the number of its mode; chains of one label are compared. Or the name of a
        statistic that is the same for all draws of a chain: ``groups="mode"``.
    :param int num_samples: the number of draws in all chains together.
    :param int num_chains: chains in a mapping of draws.
    :param int batch_size: splits one batch of tensors into pieces of this many rows.
    :param vectorize: see :func:`~pyro_bnn.infer.posterior_predictive`.
    :return: a report that prints itself.
    :raises ValueError: if there is not one label for each chain, or draws have weights of their own, with which they are no chain.

    **References**

    Vehtari, Gelman, Simpson, Carpenter, Bürkner, *Rank-normalization, folding, and localization: an improved R-hat for assessing
    convergence of MCMC*, Bayesian Analysis 2021.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_bnn.infer import ChainResult
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> _ = torch.manual_seed(0)
        >>> modes = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]])  # two chains around each of two modes
        >>> run = ChainResult({"w": modes + 0.1 * torch.randn(4, 200)}, weights=[0.4, 0.4, 0.1, 0.1])
        >>> mixing(model, run, torch.ones(3)).largest_r_hat > 1.5
        True
        >>> mixing(model, run, torch.ones(3), groups=[0, 0, 1, 1]).largest_r_hat < 1.05
        True
    """
    if isinstance(posterior, WeightedChains):
        kept = _counted(posterior)
        groups = _labels(posterior, groups)
        _check_groups(groups, posterior.num_chains)
        groups = None if groups is None else [groups[k] for k in kept]
        num_chains = len(kept)
        posterior = {name: value[kept].flatten(0, 1) for name, value in posterior.samples.items()}
    predictions = prediction_draws(
        model,
        posterior,
        data,
        num_samples=num_samples,
        num_chains=num_chains,
        batch_size=batch_size,
        vectorize=vectorize,
    )
    if groups is None:
        return MixingReport(prediction_diagnostics(predictions), predictions)
    if isinstance(groups, str):
        raise ValueError(
            f"groups={groups!r} is a statistic of a result of a sampler; pass a label for each chain."
        )
    _check_groups(groups, predictions.sizes["chain"])
    return MixingReport(_of_groups(predictions, list(groups)), predictions)


def _counted(posterior: WeightedChains) -> list[int]:
    """The numbers of the chains with a weight."""
    weights = posterior.draw_weights.unflatten(0, (posterior.num_chains, -1))
    if not bool((weights == weights[:, :1]).all()):
        raise ValueError("mixing compares chains, but the draws of a chain have weights of their own.")
    found: list[int] = weights[:, 0].nonzero().squeeze(-1).tolist()
    return found


def _labels(posterior: Any, groups: Sequence[Any] | str | None) -> Sequence[Any] | None:
    """A label for each chain, which a statistic may be."""
    if not isinstance(groups, str):
        return groups
    stats = posterior.sample_stats
    if groups not in stats:
        raise ValueError(f"groups={groups!r} is no statistic of the chains, which are {sorted(stats)}.")
    if not bool((stats[groups] == stats[groups][:, :1]).all()):
        raise ValueError(f"groups={groups!r}: the statistic changes within chains.")
    labels: list[Any] = stats[groups][:, 0].tolist()
    return labels


def _check_groups(groups: Sequence[Any] | None, chains: int) -> None:
    if groups is not None and len(groups) != chains:
        raise ValueError(f"groups: {len(groups)} labels for {chains} chains; expected one for each.")


def _of_groups(predictions: "xr.Dataset", groups: list[Any]) -> "xr.Dataset":
    import xarray as xr

    labels = list(dict.fromkeys(groups))
    parts = [
        prediction_diagnostics(predictions.isel(chain=[k for k, g in enumerate(groups) if g == label]))
        for label in labels
    ]
    return xr.concat(parts, xr.DataArray(labels, dims="group", name="group"))
