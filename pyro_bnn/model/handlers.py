# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Effect handlers and readings of traces that the guides and exporters share."""

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_bnn.model.data import Batch
from pyro_bnn.ops.families import was_given

#: A node of a trace, or a message of Pyro's effect handlers: a dictionary whose keys depend on its type.
Site = Any

_WRAPPERS = (torch.distributions.Independent, dist.MaskedDistribution)


class SubstituteMessenger(Messenger):
    """
    Gives sample sites fixed values without marking them as observed.

    Unlike :func:`pyro.poutine.condition` the sites stay latent, and unlike :func:`pyro.poutine.replay`
    no trace is needed and observed sites and subsample indices may be set as well. No random number is
    drawn at a site that has a value, so a substituted model can be differentiated by :mod:`torch.func`.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> with SubstituteMessenger({"z": torch.tensor(2.0)}):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> z
        tensor(2.)
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


class RowsMessenger(Messenger):
    """
    Gives subsampled plates the first rows, however many the model asks for: a prediction takes what the arguments hold,
    whatever number of rows the plate stands for.
    """

    def __init__(self, shift: int = 0, *, more: bool = False) -> None:
        super().__init__()
        self.shift, self.more = shift, more

    def _pyro_sample(self, msg: Site) -> None:
        fn = msg["fn"]
        if site_is_subsample(msg) and msg["value"] is None:
            size = fn.size if fn.subsample_size is None else fn.subsample_size
            if self.more and size <= fn.size:
                return
            msg["value"] = (torch.arange(size, device=fn.device) + self.shift) % max(fn.size, size)
            msg["done"] = True


class CollectMessenger(SubstituteMessenger):
    """
    Gives sample sites fixed values and keeps what the model says at each site: what a trace of a replayed model holds,
    without the copies that a trace makes.

    :ivar sites: the sample sites by name, subsample sites left out.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.sites: dict[str, Site] = {}

    def _pyro_post_sample(self, msg: Site) -> None:
        if not site_is_subsample(msg):
            self.sites[msg["name"]] = msg


def sample_sites(trace: Trace) -> dict[str, Site]:
    """The sample sites of a trace by name, without subsample sites."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


def run_model(
    model: Callable[..., Any], batch: Batch, values: Mapping[str, Any] | None = None, *, shift: int = 0
) -> dict[str, Site]:
    """The sample sites of a run of a model, given values of some; its subsampled plates take the first rows, or shifted ones."""
    args, kwargs = batch
    with RowsMessenger(shift):
        return sample_sites(
            poutine.trace(SubstituteMessenger(values or {})(model)).get_trace(*args, **kwargs)
        )


def is_deterministic(site: Site) -> bool:
    """
    Whether a trace node was made by :func:`pyro.deterministic`, or by a reparametrisation, which puts an observed Delta
    without weight in the place of the latent site.
    """
    if site["infer"].get("_deterministic", False):
        return True
    base, mask, _ = unwrap(site["fn"])
    return bool(site["is_observed"]) and mask is False and isinstance(base, dist.Delta)


def is_factor(site: Site) -> bool:
    """Whether a trace node was made by :func:`pyro.factor`."""
    return isinstance(site["fn"], dist.Unit)


def deterministic_names(sites: Mapping[str, Site]) -> list[str]:
    """
    The names of deterministic sites, without those that :func:`pyro.sample` with ``obs_mask`` makes, whose values hold data.
    """
    return [
        name
        for name, site in sites.items()
        if is_deterministic(site) and f"{name}_observed" not in sites and f"{name}_unobserved" not in sites
    ]


def observed_names(trace: Trace) -> list[str]:
    """The names of the observed sites: those with data, without factors, deterministic or subsample sites."""
    sites = sample_sites(trace).items()
    return [n for n, s in sites if s["is_observed"] and not is_deterministic(s) and not is_factor(s)]


def latent_names(trace: Trace) -> list[str]:
    """The names of the latent sample sites, without subsample sites."""
    return [name for name, site in sample_sites(trace).items() if not site["is_observed"]]


def subsample_scale(site: Site) -> float:
    r"""The factor :math:`\prod N/B` by which subsampled plates scale the log density of a site."""
    scale = 1.0
    for frame in site["cond_indep_stack"]:
        if frame.full_size is not None and frame.size:
            scale *= frame.full_size / frame.size
    return scale


def log_prob_of(site: Site) -> Tensor:
    """
    What the distribution of a site says of its value, shape of the batch; raises, naming the site, for values of a type that
    it does not take.
    """
    try:
        log_prob: Tensor = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    except ValueError as error:
        raise ValueError(f"Site {site.get('name')!r}: {error}") from error
    except RuntimeError as error:
        value = site["value"]
        if site["is_observed"] and isinstance(value, Tensor) and not value.is_floating_point():
            raise ValueError(
                f"site {site['name']!r}: {type(base_distribution(site['fn'])).__name__} takes no observations of type "
                f"{value.dtype} ({error}): pass them as floating point, e.g. y.float()."
            ) from error
        raise
    return log_prob


def unscaled_log_prob(site: Site) -> Tensor:
    """
    The pointwise log density of a site, shape of the batch, without the factor of subsampled plates or
    :func:`pyro.poutine.scale`; masked entries are zero.
    """
    log_prob = log_prob_of(site)
    mask = site["mask"]
    if mask is not None:
        log_prob = log_prob * mask if isinstance(mask, bool) else log_prob.where(mask, log_prob.new_zeros(()))
    return log_prob


def unwrap(d: Any) -> tuple[Any, Tensor | bool, int]:
    """
    A distribution without ``Independent`` and mask wrappers, the product of the masks (broadcastable to its batch shape), and
    the number of its batch dimensions that ``Independent`` counted as event dimensions.
    """
    masks: list[tuple[Tensor | bool, int]] = []
    event_dim = 0
    while isinstance(d, _WRAPPERS):
        if isinstance(d, torch.distributions.Independent):
            event_dim += d.reinterpreted_batch_ndims
        else:
            masks.append((d._mask, event_dim))  # Pyro shows a mask nowhere else
        d = d.base_dist
    mask: Tensor | bool = True
    for inner, outside in masks:
        if isinstance(inner, Tensor):  # a mask covers the event dimensions that were declared below it
            inner = inner.reshape(inner.shape + (1,) * (event_dim - outside))
        mask = inner if mask is True else inner & mask
    return d, mask, event_dim


def masked_like(fn: Any, other: Any) -> Any:
    """A distribution without masks under those of another of the same batch and event shape."""
    mask = unwrap(other)[1]
    if mask is True:
        return fn
    base, _, event_dim = unwrap(fn)
    masked = dist.MaskedDistribution(base, mask)
    return dist.Independent(masked, event_dim) if event_dim else masked


def mask_of(site: Site) -> Tensor | None:
    """
    Which elements of a site count by the masks of its distribution and of :func:`poutine.mask`: bool, the batch shape of the
    site, or with its event shape where a mask lies inside of the event dimensions; ``None`` if the site has no mask.
    """
    fn, own = site["fn"], False
    inside = False  # whether elements of an event are masked one by one
    while isinstance(fn, _WRAPPERS):
        if isinstance(fn, dist.MaskedDistribution):
            own, inside = True, inside or fn.event_shape != site["fn"].event_shape
        fn = fn.base_dist
    if not own and site["mask"] is None:
        return None
    base, mask, event_dim = unwrap(site["fn"])
    whole, outside = torch.as_tensor(mask), torch.as_tensor(True if site["mask"] is None else site["mask"])
    whole = whole.bool() & outside.reshape(outside.shape + (1,) * event_dim).to(whole.device).bool()
    whole = whole.expand(base.batch_shape)
    return whole if inside or not event_dim else whole.flatten(whole.dim() - event_dim)[..., 0]


def base_distribution(fn: Any) -> Any:
    """A distribution without the wrappers that change its shape or mask it."""
    return unwrap(fn)[0]


def class_probabilities(base: Any) -> Tensor:
    """The probabilities of a Categorical distribution, shape ``batch_shape + (C,)``."""
    if not was_given(base, "probs"):
        # its logits are normalised; the softmax that it would take normalises again, at twenty times the cost
        base.probs = base.logits.exp()
    return base.probs


def categorical_draw(fn: Any) -> Tensor | None:
    """
    Labels from a Categorical distribution, wrapped or not, by inversion of its distribution function: one random number per
    draw, where its own method takes one per class; ``None`` for other families.
    """
    base = base_distribution(fn)
    if type(base) not in (dist.Categorical, torch.distributions.Categorical):
        return None
    cumulative = class_probabilities(base).cumsum(-1)
    # a class of probability zero is never drawn: cumulative[k - 1] <= level < cumulative[k]
    level = torch.rand_like(cumulative[..., :1]) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, level, right=True).squeeze(-1).clamp_(max=cumulative.shape[-1] - 1)


def observation_draw(site: Site) -> Tensor:
    """A draw of an observed site, the batch and event shape of its distribution."""
    value = categorical_draw(site["fn"])
    return site["fn"].sample() if value is None else value


def check_broadcast(name: str, shape: torch.Size, ndim: int, what: str) -> None:
    """
    Raises if a model whose latents have a leading dimension, of ``what``, let the batch shape of an observed site grow into
    more than ``ndim`` dimensions.
    """
    if len(shape) > ndim:
        raise ValueError(
            f"observed site {name!r} has batch shape {tuple(shape)}, of more than {ndim} dimensions: the model does not "
            f"broadcast over {what}. Latents have them to the left of the plates, as in (K, 1, *event) under one plate of "
            "data: write products so that leading dimensions stay in place, e.g. (x.unsqueeze(-2) @ weight).squeeze(-2), "
            "or use the layers of pyro_bnn.nn."
        )
