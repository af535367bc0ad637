# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Posterior predictive draws, moments and pointwise log likelihoods, from any posterior."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_bnn.infer.predict.draws import Draws, Posterior
from pyro_bnn.infer.predict.pieces import Pieces
from pyro_bnn.infer.predict.runs import MAX_MEMORY, ModelRunner, Reading, Sites, predicted_names
from pyro_bnn.model.data import Batch
from pyro_bnn.model.evaluation import evaluation_mode as evaluation_mode
from pyro_bnn.model.handlers import (
    base_distribution,
    class_probabilities,
    mask_of,
    masked_like,
    observation_draw,
    unscaled_log_prob,
)
from pyro_bnn.model.join import Join
from pyro_bnn.model.observations import check_labels, check_run
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.ops.families import has_own, of_family

if TYPE_CHECKING:
    import xarray as xr


@dataclass
class SitePrediction:
    """
    Predictions at one observed site; S is the number of posterior draws.

    :param samples: draws of the observation, one per posterior draw, shape ``(S, *batch, *event)``.
    :param mean: the mean of the observation's distribution under each draw, shape ``(S, *batch, *event)``;
        class probabilities ``(S, *batch, C)`` for categorical observations.
    :param variance: its variance, in the same shape (for class probabilities p: p (1 - p)).
    :param observed: the observations, shape ``(*batch, *event)``, if the data held any.
    :param log_likelihood: the log density of each observation under each draw, shape ``(S, *batch)``, without
        the factor of subsampled plates; nats.
    :param dims: names of the dims of ``samples`` after the draws.
    :param kind: ``"classes"`` where ``mean`` holds class probabilities, ``"binary"`` where it holds the probability
        of one, ``"numeric"`` elsewhere.
    :param mask: which observations count, bool, shape ``(*batch,)``, or ``(*batch, *event)`` where elements of an event are
        masked one by one; ``None`` if all do. The log likelihood of the others is zero.
    """

    samples: Tensor | None
    mean: Tensor | None
    variance: Tensor | None
    observed: Tensor | None
    log_likelihood: Tensor | None
    dims: tuple[str, ...]
    kind: str = "numeric"
    mask: Tensor | None = None


class PosteriorPredictive(Mapping[str, SitePrediction]):
    """
    What :func:`posterior_predictive` returns: a mapping from observed sites to :class:`SitePrediction`.

    With one observed site its fields are attributes of this object too: ``prediction.mean``.

    :param sites: the predictions by site.
    :param draws: the posterior draws that were used, by latent site.
    :param bool vectorized: whether the model was run under many draws at once.
    """

    def __init__(self, sites: dict[str, SitePrediction], draws: Draws, vectorized: bool) -> None:
        self.sites = sites
        self.draws = draws
        self.vectorized = vectorized

    def __getitem__(self, name: str) -> SitePrediction:
        return self.sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __repr__(self) -> str:
        shapes = {n: tuple(s.mean.shape) if s.mean is not None else None for n, s in self.sites.items()}
        return f"PosteriorPredictive(mean shapes {shapes}, vectorized={self.vectorized})"

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

        variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
        for name, site in self.sites.items():
            for suffix, value, lead in (
                ("", site.samples, ("draw",)),
                ("_mean", site.mean, ("draw",)),
                ("_variance", site.variance, ("draw",)),
                ("_log_likelihood", site.log_likelihood, ("draw",)),
                ("_observed", site.observed, ()),
            ):
                if value is not None:
                    dims = list(lead) + list(site.dims)
                    if value.dim() > len(dims):
                        dims += [f"{name}_class"]
                    if name + suffix in variables or "draw" in (name, *site.dims):
                        clash = name + suffix if name + suffix in variables else "draw"
                        raise ValueError(
                            f"site {name!r}: there is more than one variable or dimension {clash!r}: rename the site or plate."
                        )
                    variables[name + suffix] = (tuple(dims[: value.dim()]), value.detach().cpu().numpy())
        coords = {
            "draw": np.arange(next((len(s.mean) for s in self.sites.values() if s.mean is not None), 0))
        }
        return xr.Dataset(variables, coords=coords)


def observation_kind(fn: Any) -> str:
    """
    What the mean of an observation is.

    :param fn: the distribution of an observation.
    :return: ``"classes"``, ``"binary"`` or ``"numeric"``; see :class:`SitePrediction`.
    """
    base = base_distribution(fn)
    if of_family(base, torch.distributions.Categorical, torch.distributions.OneHotCategorical):
        return "classes"
    return "binary" if of_family(base, torch.distributions.Bernoulli) else "numeric"


def observation_moments(fn: Any) -> tuple[Tensor | None, Tensor | None]:
    """
    The mean and variance of an observation's distribution.

    For :class:`~pyro.distributions.Categorical` these are the class probabilities p and p (1 - p), with the
    classes in a new last dimension.

    :param fn: a distribution.
    :return: mean and variance, ``None`` where the distribution has none, or has a density of its own and inherits them.

    Example::

        >>> import pyro.distributions as dist
        >>> observation_moments(dist.Categorical(torch.tensor([0.25, 0.75])))[0]
        tensor([0.2500, 0.7500])
    """
    base = base_distribution(fn)
    if of_family(base, torch.distributions.Categorical):
        probs = class_probabilities(base)
        probs = probs.expand(fn.batch_shape + fn.event_shape + probs.shape[-1:])
        return probs, probs * (1 - probs)
    moments = []
    for name in ("mean", "variance"):
        try:
            moments.append(getattr(fn, name) if has_own(base, name) else None)
        except (NotImplementedError, AttributeError):
            moments.append(None)
    return moments[0], moments[1]


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
        parts = list(predict_batches(pieces))
    sites = join_sites(pieces.join, parts, FIELDS)
    vectorized = hasattr(posterior, "observed_distributions") or bool(pieces.runner.vectorize)
    return PosteriorPredictive(sites, pieces.draws, vectorized)


@contextmanager
def seeded_by(generator: torch.Generator | None) -> Iterator[None]:
    """
    Draws inside come from a generator, and the global state is as it was afterwards.

    :param generator: the generator, which moves on by one draw; ``None`` leaves everything as it is.
    """
    if generator is None:
        yield
        return
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    with torch.random.fork_rng():
        torch.manual_seed(int(seed))
        yield


def predict_batches(pieces: Pieces) -> Iterator[dict[str, SitePrediction]]:
    """
    Predictions piece by piece.

    :param pieces: the data and the posterior.
    :return: an iterator over predictions by site.
    """
    posterior = pieces.posterior
    for batch in pieces:
        with evaluation_mode(pieces.model), evaluation_mode(posterior), local_parameters():
            if predicts_itself(posterior, batch):
                predictions, model_sites = predict_by_guide(posterior, pieces.runner, batch)
                pieces.join.add(model_sites)
                yield predictions
            else:
                yield predict_by_model(pieces, batch)


def predict_by_model(pieces: Pieces, batch: Batch) -> dict[str, SitePrediction]:
    """What the model says of its observed sites under all draws."""
    runner = pieces.runner
    facts: dict[str, dict[str, Any]] = {}

    def read(sites: Sites) -> dict[tuple[str, str], Reading]:
        readings: dict[tuple[str, str], Reading] = {}
        first = not facts
        if first:
            pieces.join.add(sites, runner.ndims)
        for name in predicted_names(sites, runner.draws):
            site = sites[name]
            lead = len(site["fn"].batch_shape)
            if site["is_observed"]:
                if first:
                    check_labels(name, site, name in runner.validated)
                readings[name, "log_likelihood"] = name, unscaled_log_prob(site), 0
                samples = observation_draw(site)
            else:
                samples = site["value"]
            if first:
                facts[name] = {
                    "dims": site_dims(site, runner.ndims[name]),
                    "kind": observation_kind(site["fn"]),
                    "observed": site["value"] if site["is_observed"] else None,
                }
            mask = mask_of(site)
            mean, variance = observation_moments(site["fn"])
            for key, value in (("samples", samples), ("mean", mean), ("variance", variance), ("mask", mask)):
                if value is not None:
                    readings[name, key] = name, value, value.dim() - lead
        return readings

    found = runner.run(batch, read)
    masks = {name: found.get((name, "mask")) for name in facts}
    return {
        name: SitePrediction(
            found.get((name, "samples")),
            found.get((name, "mean")),
            found.get((name, "variance")),
            log_likelihood=found.get((name, "log_likelihood")),
            mask=None if (mask := masks[name]) is None else mask.all(0),
            **fact,
        )
        for name, fact in facts.items()
    }


def predicts_itself(posterior: Any, batch: Batch) -> bool:
    """
    :param posterior: a guide, or draws.
    :param batch: the arguments of the model.
    :return: whether observations are predicted by the guide, through its linearised model.
    """
    if not hasattr(posterior, "observed_distributions"):
        return False
    linearizes = getattr(posterior, "can_linearize", None)
    return linearizes is None or getattr(posterior, "curvature", None) != "hessian" or linearizes(batch)


def predict_by_guide(
    guide: Any, runner: ModelRunner, batch: Batch
) -> tuple[dict[str, SitePrediction], Sites]:
    """
    The predictions of a guide that has them itself.

    :param guide: a guide with a method ``observed_distributions``.
    :param runner: runs the model under draws.
    :param batch: the arguments of the model.
    :return: predictions by site, and the sites of a run of the model.
    """
    args, kwargs = batch
    model_sites = runner.single(batch, 0)
    check_run(model_sites, batch, runner.validated)
    sites = {}
    for name, fn in guide.observed_distributions(runner.draws, *args, **kwargs).items():
        site = model_sites[name]
        mean, variance = observation_moments(fn)
        log_likelihood = None
        if site["is_observed"]:
            log_likelihood = unscaled_log_prob({**site, "fn": masked_like(fn, site["fn"])})
        sites[name] = SitePrediction(
            fn.sample(),
            mean,
            variance,
            site["value"] if site["is_observed"] else None,
            log_likelihood,
            site_dims(site, len(site["fn"].batch_shape)),
            observation_kind(fn),
            mask_of(site),
        )
    return sites, model_sites


def site_dims(site: Any, ndim: int) -> tuple[str, ...]:
    """
    Names of the dims of one value of a site: plates for the batch, ``<site>_dim_k`` elsewhere.

    :param site: a trace node.
    :param int ndim: the number of batch dimensions of the site in a single run.
    :return: one name per dimension of the batch and event shape.
    """
    plates = {frame.dim: frame.name for frame in site["cond_indep_stack"] if frame.vectorized}
    event = len(site["fn"].event_shape)
    names = [plates.get(i - ndim, f"{site['name']}_dim_{i}") for i in range(ndim)]
    return (*names, *(f"{site['name']}_dim_{ndim + i}" for i in range(event)))


def value_dims(site: Any) -> tuple[str, ...]:
    """
    Names of the dims of a deterministic site: those of plates where their sizes are at their places, ``<site>_dim_k`` elsewhere.

    The distribution of the site does not tell: a plate expands it whether the value has the plate's dimension or not, and
    :func:`pyro.deterministic` takes every dimension for an event's unless it is told their number.

    :param site: a trace node of a single run.
    :return: one name per dimension of the value.
    """
    shape = site["value"].shape
    event = len(site["fn"].event_shape)
    batch = len(shape) - event if event < len(shape) else len(shape)
    plates = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized}

    def name(i: int) -> str:
        plate = plates.get(i - batch) if i < batch else None
        return plate.name if plate and plate.size == shape[i] else f"{site['name']}_dim_{i}"

    return tuple(name(i) for i in range(len(shape)))


#: For each field of a prediction, the number of dimensions left of the site's own.
FIELDS = {"samples": 1, "mean": 1, "variance": 1, "observed": 0, "log_likelihood": 1, "mask": 0}


def _complete_masks(masks: list[Tensor | None], parts: list[Any]) -> list[Tensor | None]:
    """Masks of batches without one, where others have one; those of elements and of whole events as those of elements."""
    present = [mask for mask in masks if mask is not None]
    if not present:
        return masks
    ndim = max(mask.dim() for mask in present)
    whole: list[Tensor | None] = []
    for mask, part in zip(masks, parts, strict=True):
        value = part.observed
        if value is None:
            value = part.samples[0] if hasattr(part, "samples") else part.mean
        shape = value.shape[:ndim]
        mine = torch.ones((), dtype=torch.bool, device=value.device) if mask is None else mask
        whole.append(mine.reshape(mine.shape + (1,) * (ndim - mine.dim() if mine.dim() else 0)).expand(shape))
    return whole


def join_sites(join: Join, parts: list[dict[str, Any]], fields: Mapping[str, int]) -> dict[str, Any]:
    """
    :param join: how the batches fit together.
    :param parts: for each batch, by site what was said of it; a site need not be there in every batch.
    :param fields: see :func:`join_fields`.
    :return: by site what was said of it in all the data.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    return {n: join_fields(join, n, [part[n] for part in parts if n in part], fields) for n in names}


def join_fields(join: Join, name: str, parts: list[Any], fields: Mapping[str, int]) -> Any:
    """
    Joins what was said of a site in the batches.

    :param join: how the batches fit together.
    :param name: the site.
    :param parts: one object per batch, a dataclass with ``fields`` among its own.
    :param fields: for each tensor the number of dimensions left of the site's own.
    :return: an object of the same type for all the data.
    """
    if len(parts) == 1:
        return parts[0]
    whole: dict[str, Tensor | None] = {}
    for field, lead in fields.items():
        values = [getattr(part, field) for part in parts]
        values = _complete_masks(values, parts) if field == "mask" else values
        present = [v for v in values if v is not None]
        if len(present) < len(values):
            whole[field] = None
        elif field in ("log_likelihood", "log_density"):
            whole[field] = join.densities(name, present, lead)
        else:
            whole[field] = join.cat(name, present, lead, random=field == "samples")
    return replace(parts[0], **whole)
