# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Predictions at one site: what they are made of, the names of their dims, and how those of batches are joined."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bnn.model.handlers import base_distribution, class_probabilities
from pyro_bnn.model.join import Join
from pyro_bnn.ops.described import Described, first_of, shape_of, span_of
from pyro_bnn.ops.families import has_own, of_family

Said = TypeVar("Said")


@dataclass(repr=False)
class SitePrediction(Described):
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

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> from pyro_bnn import posterior_predictive
        >>> found = posterior_predictive(model, {"w": torch.zeros(4)}, (x, x))["obs"]
        >>> found.mean.shape, found.log_likelihood.shape, found.kind
        (torch.Size([4, 3]), torch.Size([4, 3]), 'numeric')
    """

    samples: Tensor | None
    mean: Tensor | None
    variance: Tensor | None
    observed: Tensor | None
    log_likelihood: Tensor | None
    dims: tuple[str, ...]
    kind: str = "numeric"
    mask: Tensor | None = None

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        given = {name: getattr(self, name) for name in FIELDS}
        rows = {
            name: f"{shape_of(value)}: {span_of(value)}" for name, value in given.items() if value is not None
        }
        return f"predictions of {self.kind} observations, dims {self.dims}", rows


class BySite(Described, Mapping[str, Said]):
    """A mapping from observed sites to what is said of them."""

    def __init__(self, sites: dict[str, Said]) -> None:
        self.sites = sites

    @override
    def __getitem__(self, name: str) -> Said:
        return self.sites[name]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    @override
    def __len__(self) -> int:
        return len(self.sites)

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        site: Any
        rows = {}
        for name, site in self.sites.items():
            for field, text in site.described()[1].items():
                rows[f"{name}: {field}"] = text
        return f"{type(self).__name__} of {first_of(map(repr, self.sites))}", rows

    def _arrays(self, fields: Mapping[str, str], *, draws: bool) -> dict[str, tuple[tuple[str, ...], Any]]:
        """Some fields, by the ends of their names, as arrays with the names of their dims."""
        variables: dict[str, tuple[tuple[str, ...], Any]] = {}
        site: Any
        for name, site in self.sites.items():
            for end, field in fields.items():
                value = getattr(site, field)
                if value is None:
                    continue
                lead = ("draw",) if draws and FIELDS[field] else ()
                taken = [name + end] if name + end in variables else []
                taken += ["draw"] if draws and "draw" in (name, *site.dims) else []
                if taken:
                    raise ValueError(
                        f"site {name!r}: there is more than one variable or dimension {taken[0]!r}: rename the site or plate."
                    )
                dims = (*lead, *site.dims, f"{name}_class")[: value.dim()]
                variables[name + end] = dims, value.detach().cpu().numpy()
        return variables


#: For each field of a prediction and of its moments, the number of dimensions left of the site's own.
FIELDS = {"samples": 1, "mean": 1, "variance": 1, "observed": 0, "log_likelihood": 1, "mask": 0}
MOMENT_FIELDS = {"mean": 0, "aleatoric": 0, "epistemic": 0, "log_density": 0, "observed": 0, "mask": 0}


def observation_kind(fn: Any) -> str:
    """``"classes"``, ``"binary"`` or ``"numeric"``: what the mean of an observation is, see :class:`SitePrediction`."""
    base = base_distribution(fn)
    if of_family(base, torch.distributions.Categorical, torch.distributions.OneHotCategorical):
        return "classes"
    return "binary" if of_family(base, torch.distributions.Bernoulli) else "numeric"


def observation_moments(fn: Any) -> list[Tensor | None]:
    """
    Mean and variance of an observation; for a Categorical the class probabilities p and p (1 - p), classes last. ``None``
    where the distribution has none, or has a density of its own and inherits them.

    Example::

        >>> import pyro.distributions as dist
        >>> observation_moments(dist.Categorical(torch.tensor([0.25, 0.75])))[0]
        tensor([0.2500, 0.7500])
    """
    base = base_distribution(fn)
    if of_family(base, torch.distributions.Categorical):
        probs = class_probabilities(base)
        probs = probs.expand(fn.batch_shape + fn.event_shape + probs.shape[-1:])
        return [probs, probs * (1 - probs)]
    moments: list[Tensor | None] = []
    for name in ("mean", "variance"):
        try:
            moments.append(getattr(fn, name) if has_own(base, name) else None)
        except (NotImplementedError, AttributeError):
            moments.append(None)
    return moments


def site_dims(site: Any, ndim: int) -> tuple[str, ...]:
    """
    Names of the dims of one value of a site, with ``ndim`` batch dimensions in a single run: plates for the batch,
    ``<site>_dim_k`` elsewhere.
    """
    plates = {ndim + frame.dim: frame.name for frame in site["cond_indep_stack"] if frame.vectorized}
    size = ndim + len(site["fn"].event_shape)
    return tuple(plates.get(i, f"{site['name']}_dim_{i}") for i in range(size))


def value_dims(site: Any) -> tuple[str, ...]:
    """
    Names of the dims of a deterministic site: those of plates where their sizes are at their places, ``<site>_dim_k`` elsewhere.

    The distribution of the site does not tell: a plate expands it whether the value has the plate's dimension or not, and
    :func:`pyro.deterministic` takes every dimension for an event's unless it is told their number.
    """
    shape = site["value"].shape
    event = len(site["fn"].event_shape)
    batch = len(shape) - event if event < len(shape) else len(shape)
    plates = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized}

    def name(i: int) -> str:
        plate = plates.get(i - batch) if i < batch else None
        return plate.name if plate and plate.size == shape[i] else f"{site['name']}_dim_{i}"

    return tuple(name(i) for i in range(len(shape)))


def join_sites(join: Join, parts: list[dict[str, Any]], fields: Mapping[str, int]) -> dict[str, Any]:
    """By site, what the batches say of it as a whole; a site need not be there in every batch."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {n: _join_fields(join, n, [part[n] for part in parts if n in part], fields) for n in names}


def _join_fields(join: Join, name: str, parts: list[Any], fields: Mapping[str, int]) -> Any:
    """Joins dataclasses with tensors, one per batch, given the number of dimensions left of the site's own in each field."""
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


def _complete_masks(masks: list[Tensor | None], parts: list[Any]) -> list[Tensor | None]:
    """Masks of batches without one, where others have one; those of elements and of whole events as those of elements."""
    present = [mask for mask in masks if mask is not None]
    ndim = max((mask.dim() for mask in present), default=0)
    whole: list[Tensor | None] = []
    for mask, part in zip(masks, parts, strict=True) if present else ():
        value = part.observed
        if value is None:
            value = part.samples[0] if hasattr(part, "samples") else part.mean
        mine = torch.ones((), dtype=torch.bool, device=value.device) if mask is None else mask
        mine = mine.reshape(mine.shape + (1,) * (ndim - mine.dim() if mine.dim() else 0))
        whole.append(mine.expand(value.shape[:ndim]))
    return whole or masks
