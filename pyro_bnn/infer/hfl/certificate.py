# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Bounds from both sides of the variances and covariances of a Hessian-free Laplace computation.

For any displacements D with residuals :math:`R = G - DP`, one per row,

.. math::

   G D^\top + D R^\top \;\preceq\; G P^{-1} G^\top \;\preceq\; G D^\top + D R^\top + R B R^\top,

with B any upper bound of :math:`P^{-1}`: the inverse of the prior's precision, sharpened by all products that have been made
(:mod:`pyro_bnn.ops.enclosure`). The residuals of recursions differ from the true ones because numbers are rounded; by how much
is measured, and widens the bounds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bnn.ops.enclosure import Bracket, Enclosure
from pyro_bnn.ops.inner import inner


@dataclass(repr=False)
class Certificate:
    r"""
    Bounds of :math:`g^\top P^{-1} g` for m functionals, and for any other.

    :ivar lower: of the variances, shape ``(m,)``.
    :ivar upper: of the variances, shape ``(m,)``.
    :ivar joint: of their covariance, in the order of positive semi-definite matrices, shape ``(m, m)`` each; ``None`` for
        probes, which know no covariances but their own.
    :ivar gap: how far residuals may be from the true ones, in posterior standard deviations.
    :ivar enclosure: what encloses the inverse of the precision.
    :ivar remainders: what the displacements of the result leave over, :math:`G - DP`, shape ``(m, p)``.
    :ivar precision: T, the curvature of the prior, which P exceeds, shape ``(p,)``.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)
        >>> x, y = torch.eye(2), torch.tensor([1.0, -1.0])
        >>> from pyro_bnn import AutoLaplace, hfl
        >>> guide = AutoLaplace(model).initialize(x, y).polish((x, y))
        >>> found = hfl.solve(guide, (x, y), (x,), curvature="ggn", tolerance=0.01).certificate
        >>> found.width < 0.01
        True
    """

    lower: Tensor
    upper: Tensor
    joint: Bracket | None
    gap: float
    enclosure: Enclosure
    remainders: Tensor
    precision: Tensor

    @property
    def widths(self) -> Tensor:
        """Upper less lower bounds over the lower ones, shape ``(m,)``; 0 for functionals that do not move."""
        widths = (self.upper - self.lower) / self.lower.clamp(min=0)
        return torch.where(self.upper > 0, widths, torch.zeros_like(widths))

    @property
    def width(self) -> float:
        """The largest of them."""
        return float(self.widths.max()) if len(self.lower) else 0.0

    def bounds(self, rows: Tensor) -> Bracket:
        r"""Of :math:`g^\top P^{-1} g` for further gradients of shape ``(m, p)``, shape ``(m,)`` each."""
        return variance_bounds(self.enclosure, rows, *self.enclosure.solve(rows), self.gap)


def variance_bounds(
    enclosure: Enclosure,
    G: Tensor,
    D: Tensor,
    R: Tensor,
    gap: float,
    *,
    rest: Tensor | None = None,
) -> Bracket:
    """
    Of the variances of functionals, shape (m,), from their gradients, displacements and residuals, shape (m, p) each; ``rest``
    is another upper bound of what residuals leave over.
    """
    value = enclosure.total((D * (G + R)).sum(-1)).clamp(min=0)
    left = enclosure.above(R, diagonal=True)
    left = left if rest is None else torch.minimum(left, rest)
    # with e the error of a residual, of length gap * sd: v = value + d'e + |r + e|^2 in the norm of the inverse
    error = gap * value.sqrt()
    upper = value * (1 + gap) + (left.sqrt() + error).square()
    return Bracket((value * (1 - gap)).nan_to_num().clamp(min=0), upper.nan_to_num(torch.inf))


def covariance_bounds(enclosure: Enclosure, G: Tensor, D: Tensor, R: Tensor, gap: float) -> Bracket:
    """Of the covariance of functionals, shape (m, m), in the order of positive semi-definite matrices; see above."""
    value = enclosure.total(inner(G, D) + inner(D, R))
    value = 0.5 * (value + value.mT)
    # errors of m residuals in one combination a: (sum |a_j| gap sd_j)^2 <= m gap^2 sum a_j^2 sd_j^2
    spread = len(G) * gap * torch.diag(value.diagonal().clamp(min=0))
    lower = (1 - gap / 2) * value - spread / 2
    upper = (1 + gap / 2) * value + (1 + gap) * enclosure.above(R) + (1.5 + gap) * spread
    return Bracket(lower, upper)
