# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Draws that a guide is given: read from where they come, held against the sites of a model, sorted by weight."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_bnn.infer.predict.weighted import WeightedChains
from pyro_bnn.model.handlers import Site, is_deterministic, latent_names, sample_sites
from pyro_bnn.model.plates import plates_of
from pyro_bnn.ops.options import require_count

#: How many numbers are sorted at once.
_AT_ONCE = 2**22
#: How far levels may be from sums of weights that they are equal to.
_ROUNDING = 1e-12


def by_chain(draws: Any, num_chains: int) -> dict[str, Tensor]:
    """Draws by site, shape ``(chains, draws) + site shape``."""
    if isinstance(draws, WeightedChains):
        found = {name: value.detach() for name, value in draws.samples.items()}
    elif hasattr(draws, "get_samples"):
        found = {name: _tensor(value) for name, value in draws.get_samples(group_by_chain=True).items()}
    elif isinstance(draws, Mapping):
        require_count("num_chains", num_chains)
        found = {name: _tensor(value) for name, value in draws.items()}
        sizes = {name: value.shape[0] if value.dim() else 0 for name, value in found.items()}
        if len(set(sizes.values())) != 1 or 0 in sizes.values() or next(iter(sizes.values())) % num_chains:
            raise ValueError(
                f"draws: the sites have {sizes} draws in their first dimension, expected the same number, which {num_chains} chains "
                "share equally."
            )
        found = {name: value.unflatten(0, (num_chains, -1)) for name, value in found.items()}
    else:
        raise TypeError(
            f"draws of type {type(draws).__name__}: expected a result of a sampler, an MCMC run, or a mapping from sites to draws; "
            "of a guide pass posterior_draws(guide, 1000)."
        )
    for name, value in found.items():
        if bad := int((~value.isfinite()).sum()):
            raise ValueError(f"draws: {bad} numbers of site {name!r} are not finite.")
    return found


def _tensor(value: Any) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.array(value))


def in_order(samples: dict[str, Tensor], trace: Any) -> dict[str, Tensor]:
    """The draws in the order of the model's sites, without deterministic ones; refused where they are not those of the model."""
    sites = sample_sites(trace)
    # over sites that are enumerated samplers sum
    latents = [n for n in latent_names(trace) if n in samples or not sites[n]["infer"].get("enumerate")]
    missing = [name for name in latents if name not in samples]
    extra = [n for n in samples if n not in latents and not (n in sites and is_deterministic(sites[n]))]
    if missing or extra:
        raise ValueError(
            f"draws: of the sites {missing} of the model there are none, and {extra} are no latent sites of it, which are {latents}. "
            "What is an observation among them has to be passed."
        )
    return {name: _fitted(name, samples[name], sites[name]) for name in latents}


def _fitted(name: str, value: Tensor, site: Site) -> Tensor:
    """The draws of a site, without plates of size one that Pyro's Predictive puts in front; refused if they are not its own."""
    shape, support = site["value"].shape, site["fn"].support
    for plate in plates_of(site).values():
        if plate.size != plate.full_size:
            raise ValueError(
                f"draws: site {name!r} is in the plate {plate.name!r}, of which the model was run on {plate.size} of {plate.full_size} "
                "rows: initialize with all of them."
            )
    own = value.shape[2:]
    if own[max(0, len(own) - len(shape)) :] != shape or own.numel() != shape.numel():
        raise ValueError(f"draws: those of site {name!r} have shape {tuple(own)}, the site {tuple(shape)}.")
    if not _is_inside(value, support):
        raise ValueError(
            f"draws: those of site {name!r} are not all in its support, {support}: pass values of the site itself, not of "
            "unconstrained space."
        )
    return value.reshape(value.shape[:2] + shape)


def base_support(support: Any) -> Any:
    """The support of an element, without the events that elements make together."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def _is_inside(value: Tensor, support: Any) -> bool:
    """Whether elements are in a support, to within rounding; where it may change from run to run, or binds elements, yes."""
    base = base_support(support)
    if base.event_dim or any(isinstance(bound, Tensor) for bound in vars(base).values()):
        return True
    inside = base.check(value)
    if value.is_floating_point() and not inside.all():
        for end in (-torch.inf, torch.inf):
            inside = inside | base.check(value.nextafter(value.new_tensor(end)))
    return bool(inside.all())


def weighted_quantiles(value: Tensor, weights: Tensor | None, levels: Sequence[float]) -> Tensor:
    """Of each element over the draws, with weights ``(S,)`` or equal ones, shape ``(S,) + shape`` to ``(Q,) + shape``."""
    flat = value.reshape(len(value), -1)
    columns = max(1, _AT_ONCE // len(value))
    # numpy sorts rows several times as fast as torch
    parts = [part.mT.contiguous().numpy(force=True) for part in flat.split(columns, 1)]
    found = [_equal(part, levels) if weights is None else _weighted(part, weights, levels) for part in parts]
    return torch.as_tensor(np.concatenate(found, 1), device=value.device).reshape(-1, *value.shape[1:])


def _equal(rows: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """Of rows ``(p, S)``, shape ``(Q, p)``; products of levels with numbers of draws carry rounding errors."""
    size = rows.shape[1]
    index = [min(size, max(1, math.ceil((q - _ROUNDING) * size))) - 1 for q in levels]
    return np.sort(rows, -1)[:, index].T


def _weighted(rows: np.ndarray, weights: Tensor, levels: Sequence[float]) -> np.ndarray:
    """The same with weights, of which a draw that has none is no quantile."""
    own = weights.numpy()
    order = np.argsort(rows[:, own > 0], -1)
    cumulative = own[own > 0][order].cumsum(-1)
    index = [(cumulative < q - _ROUNDING).sum(-1).clip(max=order.shape[1] - 1) for q in levels]
    ordered = np.take_along_axis(rows[:, own > 0], order, -1)
    return np.stack([np.take_along_axis(ordered, i[:, None], -1)[:, 0] for i in index])
