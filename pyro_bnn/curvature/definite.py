# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Whether a point is a minimum whose curvature can be trusted, and which sites are to blame if not."""

from typing import Any

import torch
from torch import Tensor

from pyro_bnn.curvature.dense import DensePart, FullNormal
from pyro_bnn.curvature.diagonal import DiagonalPart
from pyro_bnn.curvature.parts import NotAMinimumError, Part
from pyro_bnn.model.latent_space import LatentSpace
from pyro_bnn.ops.jacobian import LinearMap
from pyro_bnn.ops.krylov import ritz_pairs

#: Unconstrained values beyond which a constrained site has run off: exp(-25) is 1e-11.
_FAR = 25.0

#: Relative curvatures below so many times the precision of the numbers are rounding errors.
_ROUNDING = 64
#: The same for what is refused in single precision, where large data sets beside a wide prior come close to it.
_ROUNDING_SINGLE = 8

REMEDIES = (
    "If the prior is a hierarchy, write it non-centred (pyro.infer.reparam.LocScaleReparam), give the scale a prior that "
    "vanishes at zero (LogNormal, Gamma), or fit a guide that needs no mode: AutoNormal, AutoMixture."
)


def main_sites(space: LatentSpace, direction: Tensor, *, share: float = 0.1, most: int = 3) -> list[str]:
    """
    The sites that a direction moves most.

    :param space: the packed latents.
    :param direction: shape ``(p,)``.
    :param share: least share of the squared length.
    :param most: how many sites at most.
    :return: names, the largest share first.
    """
    total = float(direction.square().sum())
    parts = {name: float(direction[place].square().sum()) for name, place in space.slices.items()}
    ordered = sorted((name for name in parts if parts[name] >= share * total), key=parts.__getitem__)
    return ordered[::-1][:most]


def blame(space: LatentSpace, parts: list[Part], size: int) -> str:
    """
    :param space: the packed latents.
    :param parts: the parts of a curvature that is not positive definite.
    :param size: p.
    :return: a clause that names the sites along which it is not, or nothing.
    """
    for part in parts:
        found = _lowest(part)
        if found is not None:
            value, direction = found
            full = direction.new_zeros(size)
            full[part.index] = direction
            flat = abs(value) <= _ROUNDING * torch.finfo(full.dtype).eps
            what = "The joint density is flat, up to rounding," if flat else "The curvature is lowest"
            return f" {what} along a direction of the sites {main_sites(space, full)}."
    return ""


def _lowest(part: Part) -> tuple[float, Tensor] | None:
    """The lowest curvature of a part, relative to its diagonal, and its direction, if that is not positive."""
    if isinstance(part, DensePart):
        matrix = part.matrix().detach()
        if not bool(torch.isfinite(matrix).all()):
            return float("-inf"), (~torch.isfinite(matrix)).any(-1).to(matrix)
        return _lowest_pair(matrix)
    prior = part.prior
    if isinstance(part, DiagonalPart):
        prior = prior + part.tensors["curvature"]
    wrong = ~(prior > 0) if prior.dim() == 1 else torch.zeros_like(prior[0], dtype=torch.bool)
    return (float(prior.min()), wrong.to(prior)) if bool(wrong.any()) else None


def _lowest_pair(matrix: Tensor) -> tuple[float, Tensor] | None:
    scale = matrix.diagonal().abs().clamp(min=torch.finfo(matrix.dtype).tiny).rsqrt()
    values, vectors = torch.linalg.eigh(matrix * scale * scale.unsqueeze(-1))
    if float(values[0]) > _ROUNDING * torch.finfo(matrix.dtype).eps:
        return None
    return float(values[0]), vectors[:, 0]


def require_resolved(
    posterior: Any, index: Tensor, space: LatentSpace, size: int, sums: torch.dtype | None = None
) -> None:
    """
    Raises where a dense precision is positive definite by rounding only: the variance of an entry given the others is
    below the rounding error of its precision.

    :param posterior: the Gaussian of one part.
    :param index: its positions.
    :param space: the packed latents.
    :param size: p.
    :param sums: the precision that it was summed and factored in; by default its own.
    :raises NotAMinimumError: naming the sites.
    """
    if not isinstance(posterior, FullNormal) or not len(index):
        return
    diagonal = posterior.precision.detach().diagonal()
    ratio = posterior.cholesky.detach().diagonal().square() / diagonal
    dtype = ratio.dtype if sums is None else sums
    limit = _ROUNDING if dtype == torch.float64 else _ROUNDING_SINGLE
    if bool((ratio > limit * torch.finfo(dtype).eps).all()):
        return
    lowest = _lowest_pair(posterior.precision.detach())
    full = diagonal.new_zeros(size)
    full[index] = ratio.eq(ratio.min()).to(full) if lowest is None else lowest[1]
    raise NotAMinimumError(
        f"the joint density is flat along a direction of the sites {main_sites(space, full)}: neither their priors nor the "
        f"data determine it beyond the rounding errors of {dtype} (smallest relative pivot "
        f"{float(ratio.min()):.2g}). Give them proper or narrower priors, drop what is redundant, scale inputs alike"
        f"{'' if ratio.dtype == torch.float64 else ', or use float64'}."
    )


def require_minimum(
    operator: LinearMap, scale: Tensor, index: Tensor, space: LatentSpace, size: int, *, steps: int = 64
) -> None:
    """
    Raises at a saddle that a structure does not see, as a diagonal does not see what couples its entries.

    :param operator: products with the whole precision on the entries, from ``(S, q)`` to ``(S, q)``.
    :param scale: standard deviations in which curvatures are compared, shape ``(q,)``.
    :param index: the entries, shape ``(q,)``.
    :param space: the packed latents.
    :param size: p.
    :param steps: products; with fewer than q a saddle may be missed.
    :raises NotAMinimumError: naming the sites along which the curvature is negative.
    """
    values, vectors = ritz_pairs(lambda v: scale * operator(scale * v), scale, steps=steps)
    if float(values[0]) >= -1e3 * torch.finfo(scale.dtype).eps * float(values.abs().max()):
        return
    full = scale.new_zeros(size)
    full[index] = vectors[0]
    raise NotAMinimumError(
        f"the point estimate is a saddle: along a direction of the sites {main_sites(space, full)} the curvature is "
        f"{float(values[0]):.3g} times what the structure has for it, which it does not see. Call guide.polish(data), which "
        "leaves saddles, or use curvature='ggn'."
    )


def require_finite_mode(space: LatentSpace, start: Tensor, point: Tensor) -> None:
    """
    Raises if a search for the maximum has run off to the edge of a site's support.

    :param space: the packed latents.
    :param start: where the search began, shape ``(p,)``.
    :param point: where it ended.
    :raises NotAMinimumError: naming the site.
    """
    for name, place in space.slices.items():
        value = point[place]
        if not bool(torch.isfinite(value).all()):
            raise NotAMinimumError(f"site {name!r} ran off to values that are not finite. {REMEDIES}")
        far = (value.abs() > _FAR) & (value.abs() > 2 * start[place].abs())
        if space.is_constrained(name) and bool(far.any()):
            unconstrained = value[far].reshape(-1)[0]
            constrained = space.unpack(point)[name].reshape(-1)
            raise NotAMinimumError(
                f"the joint density has no maximum: site {name!r} runs off to the edge of its support (unconstrained value "
                f"{float(unconstrained):.3g}, smallest value {float(constrained.min()):.3g}, largest "
                f"{float(constrained.max()):.3g}), where the density of other sites grows without bound. {REMEDIES}"
            )
