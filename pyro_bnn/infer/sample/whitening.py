# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Square roots R of covariances by which chains are whitened: scales, or the Gaussians of guides."""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
import torch.distributions as td
from pyro.infer.autoguide import AutoContinuous, AutoNormal
from torch import Tensor
from torch.distributions import biject_to

from pyro_bnn.model.data import Batch
from pyro_bnn.model.flat import is_flat
from pyro_bnn.model.handlers import Site, base_distribution, run_model
from pyro_bnn.model.latent_space import LatentSpace

#: Draws from a prior without a variance, or with constraints, that tell its scale.
_DRAWS = 1000


class Scales:
    """
    A diagonal R.

    :param scale: shape ``(p,)``, or ``(K, p)`` for each mode its own; the chains of a mode follow one another.
    """

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def forward(self, direction: Tensor) -> Tensor:
        """R applied to the rows, shape ``(C, p)``."""
        modes = self.scale.shape[0] if self.scale.dim() > 1 else 1
        rows = direction.reshape(modes, -1, direction.shape[-1])
        return (rows * self.scale.reshape(modes, 1, -1)).reshape(direction.shape)

    transposed = forward


class Gaussians:
    """
    The square roots of the covariances of one Gaussian for each mode, as their ``half_solve`` gives them.

    :param parts: a Gaussian for each mode; the chains of a mode follow one another.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)

    def _each(self, rows: Tensor, method: str) -> Tensor:
        blocks = rows.chunk(len(self.parts))
        return torch.cat([getattr(g, method)(b) for g, b in zip(self.parts, blocks, strict=True)])

    def forward(self, direction: Tensor) -> Tensor:
        """R applied to the rows, shape ``(C, p)``."""
        return self._each(direction, "half_solve")

    def transposed(self, gradient: Tensor) -> Tensor:
        """R^T applied to the rows, shape ``(C, p)``."""
        return self._each(gradient, "half_solve_transposed")


def fingerprint(whitener: Any, points: Tensor) -> str:
    """A few digits by which the Gaussians of guides are told apart, for chains at points ``(C, p)``."""
    if not isinstance(whitener, Gaussians):
        return "not used"
    rows = torch.linspace(-1, 1, points.shape[1], dtype=points.dtype, device=points.device)
    return f"{float(whitener.forward(rows.expand_as(points).contiguous()).norm()):.6g}"


class Dense:
    """A Gaussian by the triangular square root of its covariance, shape ``(p, p)``."""

    def __init__(self, root: Tensor) -> None:
        self.root = root

    def half_solve(self, x: Tensor) -> Tensor:
        """R x for rows ``(..., p)``."""
        return x @ self.root.mT

    def half_solve_transposed(self, x: Tensor) -> Tensor:
        """R^T x for rows ``(..., p)``."""
        return x @ self.root


class Independent:
    """A Gaussian by its standard deviations, shape ``(p,)``."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def half_solve(self, x: Tensor) -> Tensor:
        """R x for rows ``(..., p)``."""
        return x * self.scale

    half_solve_transposed = half_solve


def gaussian_of(guide: Any, space: LatentSpace, batch: Batch) -> Any:
    """
    The Gaussian of a guide over the packed vector, with ``half_solve`` and ``half_solve_transposed``.

    :raises ValueError: if the guide is none, or leaves latents at a point.
    """
    if isinstance(guide, AutoNormal):
        parts = [attrgetter(name)(guide.scales).detach().reshape(-1) for name in space.slices]
        return Independent(torch.cat(parts))
    if not isinstance(guide, AutoContinuous):
        raise _no_gaussian(guide, "is none")
    prototype: Any = guide.prototype_trace
    if LatentSpace(prototype).slices != space.slices:
        raise _no_gaussian(guide, "has its latents in another order than the model")
    posterior: Any = guide.get_posterior(*batch[0], **batch[1])
    return _with_root(posterior, guide, space.dim)


def _with_root(posterior: Any, guide: Any, dim: int) -> Any:
    rank = getattr(posterior, "rank", dim)
    if hasattr(posterior, "half_solve"):
        if rank != dim:
            raise _no_gaussian(guide, f"leaves {dim - rank} of {dim} latents at a point")
        return posterior
    if isinstance(posterior, (td.MultivariateNormal, td.LowRankMultivariateNormal)):
        return Dense(posterior.scale_tril.detach())
    base = base_distribution(posterior)
    if isinstance(base, td.Normal):
        return Independent(base.scale.detach())
    raise _no_gaussian(
        guide,
        f"has the posterior {type(base).__name__}, which has no square root of a covariance of full rank",
    )


def _no_gaussian(guide: Any, what: str) -> ValueError:
    return ValueError(
        f"whiten='guide' needs a Gaussian over all latents, and {type(guide).__name__} {what}. Whiten by "
        "'prior', or pass a guide such as AutoLaplace after laplace_approximation(data)."
    )


def component_gaussians(guide: Any, space: LatentSpace) -> list[Independent]:
    """The components of a mixture guide, one Gaussian each; raises where some are point masses or share a covariance."""
    found = guide.component_distributions()
    lacking = [name for name in space.slices if name not in found]
    if lacking:
        raise _no_gaussian(guide, f"has no independent components at site {lacking[0]!r}")
    rows = []
    for name in space.slices:
        base = base_distribution(found[name])
        inner = base_distribution(base.base_dist) if isinstance(base, td.TransformedDistribution) else base
        if not hasattr(inner, "scale"):
            raise _no_gaussian(guide, f"has point masses at site {name!r}")
        rows.append(inner.scale.detach().reshape(guide.num_components, -1))
    return [Independent(row) for row in torch.cat(rows, -1)]


def prior_scales(model: Callable[..., Any], batch: Batch, space: LatentSpace, points: Tensor) -> Tensor:
    """The spreads of :func:`prior_units` alone, ``(K, p)``."""
    return prior_units(model, batch, space, points)[1]


@torch.no_grad()
def prior_units(
    model: Callable[..., Any], batch: Batch, space: LatentSpace, points: Tensor
) -> tuple[Tensor, Tensor]:
    """
    The centre and the spread of each latent under its prior given those that it depends on, at points ``(K, p)``, in unconstrained
    space, ``(K, p)`` each: mean and standard deviation; where there are none, or the latent is constrained, the median and half the
    distance between the quantiles 0.16 and 0.84 of draws with a fixed seed; 0 and 1 for flat priors.
    """
    centres, scales = [], []
    for point in points:
        sites = run_model(model, batch, space.unpack(point))
        found = [_unit(sites[name], space.is_constrained(name)) for name in space.slices]
        centres.append(torch.cat([centre for centre, _ in found]))
        scales.append(torch.cat([scale for _, scale in found]))
    return torch.stack(centres).to(points), torch.stack(scales).to(points)


def _unit(site: Site, is_constrained: bool) -> tuple[Tensor, Tensor]:
    fn, value = site["fn"], site["value"]
    if is_flat(site):
        raw = biject_to(fn.support).inv(value).reshape(-1)
        return torch.zeros_like(raw), torch.ones_like(raw)
    if not is_constrained:
        try:
            centre, scale = (m.expand(value.shape).reshape(-1) for m in (fn.mean, fn.variance.sqrt()))
        except NotImplementedError:
            centre = scale = value.new_zeros(1)
        if bool((centre.isfinite() & scale.isfinite() & (scale > 0)).all()):
            return centre, scale
    with torch.random.fork_rng(devices=[] if value.device.type == "cpu" else [value.device]):
        torch.manual_seed(0)
        draws = biject_to(fn.support).inv(fn.sample((_DRAWS,))).reshape(_DRAWS, -1).double()
    low, middle, high = draws.quantile(draws.new_tensor([0.16, 0.5, 0.84]), 0)
    scale = 0.5 * (high - low)
    scale = torch.where(scale.isfinite() & (scale > 0), scale, torch.ones_like(scale))
    return middle.to(value), scale.to(value)
