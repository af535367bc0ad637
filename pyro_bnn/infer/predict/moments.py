# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Moments of predictions: the aleatoric and the epistemic part of their uncertainty."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bnn.infer.predict.draws import Draws, Posterior
from pyro_bnn.infer.predict.pieces import Pieces
from pyro_bnn.infer.predict.runs import MAX_MEMORY
from pyro_bnn.infer.predict.sites import MOMENT_FIELDS, BySite, SitePrediction, join_sites
from pyro_bnn.infer.predict.stream import predictions
from pyro_bnn.ops.described import Described, shape_of, span_of

if TYPE_CHECKING:
    import xarray as xr


@dataclass(repr=False)
class SiteMoments(Described):
    r"""
    Predictive moments at one observed site, with the S posterior draws averaged out.

    For real observations the variance is split by the law of total variance,

    .. math:: \mathrm{Var}[y] = \underbrace{E_z \mathrm{Var}[y \mid z]}_{\text{aleatoric}}
        + \underbrace{\mathrm{Var}_z E[y \mid z]}_{\text{epistemic}},

    (units of y squared) and for class labels the entropy,

    .. math:: H[E_z p(y \mid z)] = \underbrace{E_z H[p(y \mid z)]}_{\text{aleatoric}}
        + \underbrace{I(y; z)}_{\text{epistemic}}

    (nats). Both are estimates from S draws, the epistemic parts biased downwards by O(1/S).

    :param mean: the predictive mean, or mean class probabilities with the classes in the last dimension.
    :param aleatoric: the part that remains when z is known.
    :param epistemic: the part that knowing z would remove.
    :param log_density: the log predictive density of each observation, if there are any; nats.
    :param observed: the observations, if there are any.
    :param dims: names of the dims of the observations.
    :param mask: which observations count, bool; ``None`` if all do. The log density of the others is zero.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> found = predictive_moments(model, {"w": torch.tensor([0.0, 2.0])}, (x, x))["obs"]
        >>> found.mean, found.epistemic.shape, found.log_density.shape
        (tensor([1., 1., 1.]), torch.Size([3]), torch.Size([3]))

    **References**

    Depeweg et al., *Decomposition of uncertainty in Bayesian deep learning*, ICML 2018.
    """

    mean: Tensor | None
    aleatoric: Tensor | None
    epistemic: Tensor | None
    log_density: Tensor | None
    observed: Tensor | None
    dims: tuple[str, ...]
    mask: Tensor | None = None

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        given = {name: getattr(self, name) for name in MOMENT_FIELDS}
        rows = {
            name: f"{shape_of(value)}: {span_of(value)}" for name, value in given.items() if value is not None
        }
        return f"predictive moments, dims {self.dims}", rows

    @property
    def total(self) -> Tensor | None:
        """The predictive variance or entropy."""
        return None if self.aleatoric is None or self.epistemic is None else self.aleatoric + self.epistemic


def site_moments(prediction: SitePrediction) -> SiteMoments:
    """
    Averages the posterior draws of a prediction out.

    :param prediction: predictions under S draws.
    :return: their moments.

    Example::

        >>> p = SitePrediction(None, torch.tensor([[1.0], [3.0]]), torch.tensor([[0.5], [1.5]]), None, None, ("n",))
        >>> found = site_moments(p)
        >>> found.mean.item(), found.aleatoric.item(), found.epistemic.item()
        (2.0, 1.0, 1.0)
    """
    mean = aleatoric = epistemic = log_density = None
    if prediction.mean is not None:
        mean = prediction.mean.mean(0)
        if prediction.kind == "classes":
            aleatoric = torch.special.entr(prediction.mean).sum(-1).mean(0)
            epistemic = torch.special.entr(mean).sum(-1) - aleatoric
        elif prediction.kind == "binary":
            aleatoric = _binary_entropy(prediction.mean).mean(0)
            epistemic = _binary_entropy(mean) - aleatoric
        elif prediction.variance is not None:
            aleatoric = prediction.variance.mean(0)
            epistemic = prediction.mean.var(0, correction=0)
    if prediction.log_likelihood is not None:
        value = prediction.log_likelihood
        log_density = torch.logsumexp(value, 0) - math.log(len(value))
    return SiteMoments(
        mean, aleatoric, epistemic, log_density, prediction.observed, prediction.dims, prediction.mask
    )


class PredictiveMoments(BySite[SiteMoments]):
    """
    What :func:`predictive_moments` returns: a mapping from observed sites to :class:`SiteMoments`.

    :param sites: the moments by site.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> moments = predictive_moments(model, {"w": torch.zeros(4)}, (x, x))
        >>> list(moments)
        ['obs']
    """

    def to_dataset(self) -> "xr.Dataset":
        """
        The moments with named dims: ``<site>_mean``, ``<site>_aleatoric``, ``<site>_epistemic``,
        ``<site>_log_density`` and ``<site>_observed``.

        :return: a dataset.
        """
        import xarray as xr

        fields = ("mean", "aleatoric", "epistemic", "log_density", "observed")
        return xr.Dataset(self._arrays({f"_{name}": name for name in fields}, draws=False))


def _binary_entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p) + torch.special.entr(1 - p)


@torch.no_grad()
def predictive_moments(
    model: Callable[..., Any],
    posterior: Posterior,
    data: Any,
    *,
    num_samples: int | None = None,
    batch_size: int | None = None,
    vectorize: bool | None = None,
    max_memory: float = MAX_MEMORY,
    draws: Draws | None = None,
) -> PredictiveMoments:
    """
    Predictive moments of test sets of any size: the predictions under the single draws are dropped batch by batch.

    :param callable model: a Pyro model.
    :param posterior: see :func:`~pyro_bnn.infer.posterior_predictive`.
    :param data: see :func:`~pyro_bnn.infer.posterior_predictive`; a loader is read once.
    :param int num_samples: the number of posterior draws.
    :param int batch_size: splits one batch of tensors into pieces of this many rows.
    :param vectorize: see :func:`~pyro_bnn.infer.posterior_predictive`.
    :param float max_memory: see :func:`~pyro_bnn.infer.posterior_predictive`.
    :param draws: posterior draws to use instead of fresh ones.
    :return: a mapping from observed sites to moments, one value per observation.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> found = predictive_moments(model, {"w": torch.tensor([1.0, 3.0])}, torch.ones(4), batch_size=2)
        >>> found["obs"].mean, found["obs"].epistemic
        (tensor([2., 2., 2., 2.]), tensor([1., 1., 1., 1.]))
    """
    pieces = Pieces(
        model, posterior, data, num_samples=num_samples, batch_size=batch_size, vectorize=vectorize,
        max_memory=max_memory, draws=draws,
    )  # fmt: skip
    parts = [{n: site_moments(site) for n, site in found.sites.items()} for found in predictions(pieces)]
    return PredictiveMoments(join_sites(pieces.join, parts, MOMENT_FIELDS))
