# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Whether a point is a minimum whose curvature can be trusted, which sites are to blame if not, and whether the precision is known
well enough for its inverse.

Sums in a precision :math:`\varepsilon` leave an error of about :math:`\kappa\varepsilon` in variances, with :math:`\kappa` the
condition number in units of the latents' own scales. Where that is too much in float32, the same Jacobians are summed and
factored in float64; what remains is the rounding of the Jacobians and of the factor, about
:math:`\sqrt\kappa\,\varepsilon`.
"""

from collections.abc import Iterable
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.curvature.dense import FullNormal
from pyro_bnn.curvature.parts import ROUNDING, NotAMinimumError, Part, lowest_pair
from pyro_bnn.model.latent_space import LatentSpace
from pyro_bnn.ops.jacobian import LinearMap
from pyro_bnn.ops.krylov import ritz_pairs

#: Unconstrained values beyond which a constrained site has run off: exp(-25) is 1e-11.
_FAR = 25.0
#: As :data:`ROUNDING`, of what is refused in single precision, where large data sets beside a wide prior come close to it.
_ROUNDING_SINGLE = 8
#: Relative errors of variances above which sums in float32 are repeated in float64, and above which a warning is given.
TOLERANCE = 0.01
#: The condition number is estimated from below, and sums have many terms.
_SAFETY = 10.0

REMEDIES = (
    "If the prior is a hierarchy, write it non-centred (pyro.infer.reparam.LocScaleReparam), give the scale a prior that "
    "vanishes at zero (LogNormal, Gamma), or fit a guide that needs no mode: AutoNormal, AutoMixture."
)


def expected_error(posterior: Any, sums: torch.dtype) -> float:
    """The relative error of variances to be expected from sums and decompositions in a precision."""
    of_sums = _SAFETY * posterior.condition_number(to_prior=True) * torch.finfo(sums).eps
    return max(of_sums, posterior.condition_number() ** 0.5 * torch.finfo(posterior.loc.dtype).eps)


def describe(posterior: Any, error: float) -> str:
    """A message about an :func:`expected_error`."""
    return (
        f"the precision has condition number {posterior.condition_number():.2g}, so that {posterior.loc.dtype} knows variances "
        f"to about {100 * error:.2g} %: scale inputs alike, give latents proper priors of their size, or use float64."
    )


def main_sites(space: LatentSpace, direction: Tensor, *, share: float = 0.1, most: int = 3) -> list[str]:
    """The sites that a direction, shape ``(p,)``, moves most, and by at least a share of its squared length."""
    total = float(direction.square().sum())
    parts = {name: float(direction[place].square().sum()) for name, place in space.slices.items()}
    ordered = sorted((name for name in parts if parts[name] >= share * total), key=parts.__getitem__)
    return ordered[::-1][:most]


def _spread(direction: Tensor, index: Tensor, size: int) -> Tensor:
    full = direction.new_zeros(size)
    full[index] = direction
    return full


def blame(space: LatentSpace, parts: list[Part], size: int) -> str:
    """A clause that names the sites along which a curvature over p latents is not positive definite, or nothing."""
    for part in parts:
        found = part.lowest()
        if found is not None:
            value, direction = found
            if not isfinite(value):
                continue
            flat = abs(value) <= ROUNDING * torch.finfo(direction.dtype).eps
            what = "The joint density is flat, up to rounding," if flat else "The curvature is lowest"
            sites = main_sites(space, _spread(direction, part.index, size))
            return f" {what} along a direction of the sites {sites}.{hierarchy_hint(space, sites)}"
    return ""


def hierarchy_hint(space: LatentSpace, sites: Iterable[str]) -> str:
    """What to try where one of the sites has bounds, as scales have, to which a search may run off; or nothing."""
    bounded = [name for name in sites if space.is_constrained(name)]
    if not bounded:
        return ""
    return (
        f" If {bounded[0]!r} is the scale of other sites, the joint density may have no maximum, and training drives the scale to "
        f"zero. {REMEDIES}"
    )


def require_resolved(
    posterior: Any, index: Tensor, space: LatentSpace, size: int, sums: torch.dtype | None = None
) -> None:
    """
    Raises where a dense precision, summed and factored in ``sums``, is positive definite by rounding only: the variance of an
    entry given the others is below the rounding error of its precision.
    """
    if not isinstance(posterior, FullNormal) or not len(index):
        return
    ratio = posterior.pivots()
    dtype = ratio.dtype if sums is None else sums
    limit = ROUNDING if dtype == torch.float64 else _ROUNDING_SINGLE
    if bool((ratio > limit * torch.finfo(dtype).eps).all()):
        return
    lowest = lowest_pair(posterior.precision.detach())
    direction = ratio.eq(ratio.min()).to(ratio) if lowest is None else lowest[1]
    raise NotAMinimumError(
        f"the joint density is flat along a direction of the sites {main_sites(space, _spread(direction, index, size))}: neither "
        f"their priors nor the data determine it beyond the rounding errors of {dtype} (smallest relative pivot "
        f"{float(ratio.min()):.2g}). Give them proper or narrower priors, drop what is redundant, scale inputs alike"
        f"{'' if ratio.dtype == torch.float64 else ', or use float64'}."
    )


def require_minimum(
    operator: LinearMap, scale: Tensor, index: Tensor, space: LatentSpace, size: int, *, steps: int = 64
) -> None:
    """
    Raises at a saddle that a structure does not see, as a diagonal does not see what couples its entries: by ``steps`` products
    with the whole precision on the entries, from ``(S, q)`` to ``(S, q)``, in units of standard deviations, shape ``(q,)``.
    With fewer than q of them a saddle may be missed.
    """
    values, vectors = ritz_pairs(lambda v: scale * operator(scale * v), scale, steps=steps)
    if float(values[0]) >= -1e3 * torch.finfo(scale.dtype).eps * float(values.abs().max()):
        return
    sites = main_sites(space, _spread(vectors[0], index, size))
    raise NotAMinimumError(
        f"the point estimate is a saddle: along a direction of the sites {sites} the curvature is "
        f"{float(values[0]):.3g} times what the structure has for it, which it does not see. Call guide.polish(data), which "
        "leaves saddles, or use curvature='ggn'."
    )


def require_finite_mode(space: LatentSpace, start: Tensor, point: Tensor) -> None:
    """Raises if a search for the maximum has run off from its start to the edge of a site's support, naming the site."""
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
