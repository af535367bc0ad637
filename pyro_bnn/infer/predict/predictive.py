# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Posterior predictive draws, moments and pointwise log likelihoods, from any posterior."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from pyro_bnn.infer.predict.draws import Draws, Posterior
from pyro_bnn.infer.predict.pieces import Pieces
from pyro_bnn.infer.predict.runs import MAX_MEMORY
from pyro_bnn.infer.predict.sites import FIELDS, BySite, SitePrediction, join_sites
from pyro_bnn.infer.predict.stream import predictions

if TYPE_CHECKING:
    import xarray as xr


class PosteriorPredictive(BySite[SitePrediction]):
    """
    What :func:`posterior_predictive` returns: a mapping from observed sites to :class:`SitePrediction`.

    With one observed site its fields are attributes of this object too: ``prediction.mean``.

    :param sites: the predictions by site.
    :param draws: the posterior draws that were used, by latent site.
    :param bool vectorized: whether the model was run under many draws at once.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> prediction = posterior_predictive(model, {"w": torch.zeros(4)}, (x,))
        >>> list(prediction), prediction["obs"].mean.shape
        (['obs'], torch.Size([4, 3]))
    """

    def __init__(self, sites: dict[str, SitePrediction], draws: Draws, vectorized: bool) -> None:
        super().__init__(sites)
        self.draws = draws
        self.vectorized = vectorized

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        title, rows = super().described()
        number = len(next(iter(self.draws.values()))) if self.draws else 0
        return f"{title}: {number} draws, {'together' if self.vectorized else 'one by one'}", rows

    def _only(self) -> SitePrediction:
        if len(self.sites) != 1:
            raise AttributeError(
                f"There are several observed sites; choose one of {list(self.sites)} by [name]."
            )
        return next(iter(self.sites.values()))

    @property
    def samples(self) -> Tensor | None:
        """Draws of the observation at the only observed site."""
        return self._only().samples

    @property
    def mean(self) -> Tensor | None:
        """The mean of the observation under each draw at the only observed site."""
        return self._only().mean

    @property
    def variance(self) -> Tensor | None:
        """The variance of the observation under each draw at the only observed site."""
        return self._only().variance

    @property
    def observed(self) -> Tensor | None:
        """The observations at the only observed site."""
        return self._only().observed

    @property
    def log_likelihood(self) -> Tensor | None:
        """The pointwise log likelihood of each draw at the only observed site."""
        return self._only().log_likelihood

    def to_dataset(self) -> "xr.Dataset":
        """
        The predictions with named dims: ``<site>`` (samples), ``<site>_mean``, ``<site>_variance``,
        ``<site>_log_likelihood`` and ``<site>_observed``.

        :return: a dataset with dims ``draw`` and those of the sites.
        """
        import xarray as xr

        fields = {"": "samples", **{f"_{n}": n for n in ("mean", "variance", "log_likelihood", "observed")}}
        coords = {
            "draw": np.arange(next((len(s.mean) for s in self.sites.values() if s.mean is not None), 0))
        }
        return xr.Dataset(self._arrays(fields, draws=True), coords=coords)


@torch.no_grad()
def posterior_predictive(
    model: Callable[..., Any],
    posterior: Posterior,
    data: Any,
    *,
    num_samples: int | None = None,
    batch_size: int | None = None,
    vectorize: bool | None = None,
    max_memory: float = MAX_MEMORY,
    draws: Draws | None = None,
    generator: torch.Generator | None = None,
) -> PosteriorPredictive:
    r"""
    Predicts the observed sites of a model under posterior draws :math:`z_1, \dots, z_S`.

    Per observed site y and input x it returns draws :math:`y_s \sim p(y \mid x, z_s)`, the mean and variance of
    :math:`p(y \mid x, z_s)` and, if the data hold observations, :math:`\log p(y \mid x, z_s)`.

    All draws run through the model at once where the model broadcasts (checked once, on the first batch), in
    chunks within a memory budget; other models run in a loop. A guide with a method ``observed_distributions``
    (the linearised predictives of Laplace guides) is asked for :math:`p(y \mid x, z_s)` instead of the model.
    All modules that the model calls run in evaluation mode.

    :param callable model: a Pyro model.
    :param posterior: a guide, an :class:`~pyro.infer.MCMC` run, or a mapping from latent sites to draws with
        the draws in the first dimension.
    :param data: one batch, with or without observations, or an iterable of batches; see
        :mod:`pyro_bnn.model.data`. Results are joined along the plate of the data; sites outside it count once.
    :param int num_samples: the number of draws S; 100 for guides and all for given draws by default.
    :param int batch_size: splits one batch into pieces of this many rows, where the model treats its rows separately.
    :param bool vectorize: ``None`` to check whether the model broadcasts; ``False`` to loop; ``True`` to fail
        with the reason if it does not.
    :param float max_memory: bytes for the intermediate values of one run, by an upper bound; 24 MiB by default. More is not faster: draws
        that run together should stay near the processor's caches.
    :param draws: posterior draws to use instead of fresh ones (e.g. ``prediction.draws`` of another call).
    :param generator: source of all random numbers; the global state then stays as it is.
    :return: a mapping from observed sites to predictions.

    :raises ValueError: if the data are not finite, if ``batch_size`` is given and the rows cannot be taken apart, if the
        batches do not tell along which dimension to join them, or if the model chooses some of the rows itself.

    Where the model is called with observations, sites that depend on other observed sites are predicted given
    those (one step ahead); call it without observations for draws of the joint predictive.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> prediction = posterior_predictive(model, {"w": torch.arange(4.0)}, (x, x))
        >>> prediction.mean[:, 0], prediction.log_likelihood.shape, prediction.vectorized
        (tensor([0., 1., 2., 3.]), torch.Size([4, 3]), True)
        >>> prediction.to_dataset()["obs_mean"].dims
        ('draw', 'data')
    """
    pieces = Pieces(
        model, posterior, data, num_samples=num_samples, batch_size=batch_size, vectorize=vectorize,
        max_memory=max_memory, draws=draws,
    )  # fmt: skip
    with seeded_by(generator):
        parts = [found.sites for found in predictions(pieces)]
    vectorized = hasattr(posterior, "observed_distributions") or pieces.runner.vectorized
    return PosteriorPredictive(join_sites(pieces.join, parts, FIELDS), pieces.draws, vectorized)


@contextmanager
def seeded_by(generator: torch.Generator | None) -> Iterator[None]:
    """Draws inside come from a generator, which moves on by one, and the global state stays; ``None`` changes nothing."""
    if generator is None:
        yield
        return
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    with torch.random.fork_rng():
        torch.manual_seed(int(seed))
        yield
