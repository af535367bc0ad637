# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
The best displacements in the span of directions whose images under the curvature came from differences of gradients.

Whatever has found directions D, runs of an optimiser or residuals, with
:math:`DP = (\nabla L(\hat\theta + hD) - \nabla L(\hat\theta - hD)) / 2h + O(h^2)`,

.. math::

   v_j = g_j^\top P^{-1} g_j \;\ge\; g_j^\top D^\top (D P D^\top)^{-1} D g_j,

and the difference is the square of the distance of :math:`P^{-1} g_j` from the span, in the norm of P: an error of 20 % in a
displacement is one of 4 % in the variance at most. With the residuals as further directions it is a Krylov method that
asks for gradients only.

Source: the Rayleigh-Ritz (Galerkin) projection; Golub and Meurant (1994), "Matrices, moments and quadrature".
"""

import torch
from torch import Tensor

from pyro_bnn.curvature.accumulate import NotAMinimumError
from pyro_bnn.ops.enclosure import Total, conjugate_rows, whole
from pyro_bnn.ops.inner import inner
from pyro_bnn.ops.jacobian import LinearMap


class RayleighRitz:
    r"""
    Displacements of m functionals in a span that grows.

    :param gradients: :math:`g_j`, shape ``(m, p)``.
    :param total: makes inner products of the parts of rows that processes have; for whole rows the identity.
    :ivar directions: Q with :math:`QPQ^\top = 1`, shape ``(k, p)``.
    :ivar images: :math:`QP`, shape ``(k, p)``.
    :ivar coefficients: :math:`g_j^\top q_i`, shape ``(m, k)``.
    :ivar remainders: what the displacements leave over, :math:`g_j - P d_j`, shape ``(m, p)``.
    :ivar noise: the largest antisymmetric entry of :math:`DPD^\top` so far, of directions with :math:`d^\top P d = 1`.
    :ivar gains: by which share of itself each addition raised a variance, the largest.
    :ivar quotient: :math:`d^\top P d / d^\top d`, the geometric mean of the latest directions; ``None`` before the first.
    """

    def __init__(self, gradients: Tensor, total: Total = whole) -> None:
        self.gradients, self.total = gradients, total
        self.directions = self.images = gradients[:0]
        self.coefficients = gradients.new_zeros(len(gradients), 0)
        self.remainders = gradients
        self.noise = 0.0
        self.gains: list[float] = []
        self.quotient: float | None = None

    @property
    def displacements(self) -> Tensor:
        """The best :math:`d_j`, shape ``(m, p)``."""
        return self.coefficients @ self.directions

    @property
    def covariance(self) -> Tensor:
        """Of the functionals, a lower bound in the order of positive semi-definite matrices, shape ``(m, m)``."""
        return self.coefficients @ self.coefficients.mT

    @property
    def variances(self) -> Tensor:
        """Its diagonal, shape ``(m,)``."""
        return self.coefficients.square().sum(-1)

    def squares(self, rows: Tensor) -> Tensor:
        """Squared lengths of rows, shape ``(S,)``."""
        return self.total(rows.square().sum(-1))

    def fresh(self, rows: Tensor) -> Tensor:
        """A basis of what is new in rows of shape ``(S, p)``: conjugate to the span, of orthonormal rows, as few as there are."""
        rows = rows * self.squares(rows).clamp(min=torch.finfo(rows.dtype).tiny).rsqrt()[:, None]
        floor = (1e3 * torch.finfo(rows.dtype).eps) ** 2
        for _ in range(2):  # the second time for what rounding left
            rows = rows - self.total(inner(rows, self.images)) @ self.directions
            squares = self.squares(rows)
            rows = rows[squares > floor] * squares[squares > floor].rsqrt()[:, None]
        if len(rows) < 2:
            return rows
        values, vectors = torch.linalg.eigh(self.total(inner(rows, rows)).double())
        keep = values > 1e3 * torch.finfo(rows.dtype).eps * values.max()
        return (vectors[:, keep] / values[keep].sqrt()).mT.to(rows.dtype) @ rows

    def rest(self, scaled: LinearMap = whole) -> Tensor:
        """What is new in the remainders that are more than the error of images, after a preconditioner, shape ``(S, p)``."""
        floor = max(1e3 * torch.finfo(self.gradients.dtype).eps, self.noise)
        left = self.remainders[self.squares(self.remainders) > floor**2 * self.squares(self.gradients)]
        return self.fresh(scaled(left))

    def steps(self, rows: Tensor, epsilon: float, curvatures: Tensor | None = None) -> Tensor:
        r"""
        Rows of shape ``(S, p)``, as long as ``epsilon`` standard deviations along them: exactly, where :math:`d^\top P d` is
        given and positive, and else as far as they are like the latest directions.
        """
        guess = self.squares(rows) * (self.quotient or 1.0)
        if curvatures is not None:
            guess = torch.where(curvatures > 0, curvatures, guess)
        return rows * (epsilon * guess.clamp(min=torch.finfo(rows.dtype).tiny).rsqrt())[:, None]

    def add(self, directions: Tensor, images: Tensor) -> None:
        """
        Directions of shape ``(S, p)`` and their products with the curvature.

        :raises NotAMinimumError: where one is not curved upwards.
        """
        curvatures = self.total((directions * images).sum(-1))
        # of any length of the direction
        self._require_minimum(curvatures * (self.squares(directions) * self.squares(images)).rsqrt())
        directions, images = directions[curvatures > 0], images[curvatures > 0]
        curvatures = curvatures[curvatures > 0]
        self.quotient = float((curvatures / self.squares(directions)).log().mean().exp())
        scale = curvatures.rsqrt()[:, None]
        directions, images = directions * scale, images * scale
        # what the images say of older directions should be what the older images say of these
        old = self.total(inner(directions, self.images))
        gram = self.total(inner(directions, images))
        noise = [gram - gram.mT, old - self.total(inner(images, self.directions))]
        self.noise = max([self.noise, *(0.5 * float(part.abs().max()) for part in noise if part.numel())])
        directions = torch.addmm(directions, old, self.directions, alpha=-1)
        images = torch.addmm(images, old, self.images, alpha=-1)
        gram = self.total(inner(directions, images))
        self._require_minimum(torch.linalg.eigvalsh(0.5 * (gram + gram.mT)))
        keep = gram.diagonal() > 10 * self.noise
        before = self.variances
        Q, W = conjugate_rows(directions[keep], images[keep], floor=10 * self.noise, total=self.total)
        self.directions, self.images = torch.cat([self.directions, Q]), torch.cat([self.images, W])
        more = self.total(inner(self.gradients, Q))
        self.coefficients = torch.cat([self.coefficients, more], -1)
        self.remainders = torch.addmm(self.remainders, more, W, alpha=-1)
        now = self.variances
        self.gains.append(float(((now - before) / now.clamp(min=torch.finfo(now.dtype).tiny)).max()))

    def has_settled(self, tolerance: float) -> bool:
        """Whether the last two additions raised no variance by more than a share of it, or nothing is left."""
        return not len(self.rest()) or (len(self.gains) > 2 and max(self.gains[-2:]) < tolerance)

    @property
    def missing(self) -> float:
        """The share of a variance that the last addition brought, the largest; the error of images where no more is left."""
        return self.gains[-1] if self.gains and len(self.rest()) else self.noise

    def _require_minimum(self, curvatures: Tensor) -> None:
        if not bool((curvatures > -10 * self.noise).all()):  # nor where there is none, 0 / 0
            raise NotAMinimumError(
                "differences of gradients show a direction in which the loss is not curved upwards: the point estimate is not a "
                "minimum and has no Laplace approximation. Train longer, or add a proximal term"
            )
