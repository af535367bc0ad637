# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Gaussians over a packed latent vector whose precision is Kronecker-factored, low-rank plus diagonal, or in blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_bnn.distributions.precision_normal import PrecisionNormal


class KroneckerNormal(PrecisionNormal):
    r"""
    A Gaussian over an (out, in) matrix, flattened row by row, with the precision

    .. math:: P = S\,(Q_G \otimes Q_A)\,\operatorname{diag}(\Lambda)\,(Q_G \otimes Q_A)^\top S,
              \qquad S = \operatorname{diag}(s_{out} \otimes s_{in}).

    With :math:`\Lambda_{oi} = l_{G,o} l_{A,i} + \tau` this is a Kronecker product plus :math:`\tau S^2`, exactly.

    :param Tensor loc: mean, shape ``(out * in,)``.
    :param tuple scales: ``(s_out, s_in)``, shapes ``(out,)`` and ``(in,)``.
    :param tuple vectors: orthogonal ``(Q_G, Q_A)``, shapes ``(out, out)`` and ``(in, in)``.
    :param Tensor eigenvalues: :math:`\Lambda > 0`, shape ``(out, in)``.

    Example::

        >>> d = KroneckerNormal(torch.zeros(2), (torch.ones(1), torch.ones(2)),
        ...                     (torch.eye(1), torch.eye(2)), torch.tensor([[4.0, 2.0]]))
        >>> d.variance
        tensor([0.2500, 0.5000])
    """

    def __init__(
        self,
        loc: Tensor,
        scales: tuple[Tensor, Tensor],
        vectors: tuple[Tensor, Tensor],
        eigenvalues: Tensor,
    ) -> None:
        super().__init__(loc)
        self.scales = scales
        self.vectors = vectors
        self.eigenvalues = eigenvalues

    @property
    def rotations(self) -> tuple[Tensor, Tensor]:
        r""":math:`S^{-1} Q` for outputs and inputs: gradients and inputs times these have independent coordinates."""
        (so, si), (qo, qi) = self.scales, self.vectors
        return qo / so.unsqueeze(-1), qi / si.unsqueeze(-1)

    def _matrix(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, self.eigenvalues.shape)

    def half_solve(self, x: Tensor) -> Tensor:
        """See :meth:`PrecisionNormal.half_solve`."""
        ro, ri = self.rotations
        return (ro @ (self._matrix(x) * self.eigenvalues.rsqrt()) @ ri.mT).flatten(-2)

    def half_solve_transposed(self, x: Tensor) -> Tensor:
        """See :meth:`PrecisionNormal.half_solve_transposed`."""
        ro, ri = self.rotations
        return ((ro.mT @ self._matrix(x) @ ri) * self.eigenvalues.rsqrt()).flatten(-2)

    def multiply(self, x: Tensor) -> Tensor:
        """See :meth:`PrecisionNormal.multiply`."""
        (so, si), (qo, qi) = self.scales, self.vectors
        wo, wi = qo * so.unsqueeze(-1), qi * si.unsqueeze(-1)
        return (wo @ ((wo.mT @ self._matrix(x) @ wi) * self.eigenvalues) @ wi.mT).flatten(-2)

    @property
    def log_det_precision(self) -> Tensor:
        """See :attr:`PrecisionNormal.log_det_precision`."""
        out, into = self.eigenvalues.shape
        so, si = self.scales
        wide = torch.float64
        scales = into * so.log().sum(dtype=wide) + out * si.log().sum(dtype=wide)
        return self.eigenvalues.log().sum(dtype=wide) + 2 * scales

    @property
    def smallest_precision(self) -> Tensor:
        """See :attr:`PrecisionNormal.smallest_precision`; known where the scales are constant."""
        so, si = self.scales
        if bool((so == so[0]).all()) and bool((si == si[0]).all()):
            return self.eigenvalues.min() * (so[0] * si[0]).square()
        return super().smallest_precision

    @property
    def variance(self) -> Tensor:
        """Marginal variances, shape ``(out * in,)``."""
        ro, ri = self.rotations
        return (ro.square() @ self.eigenvalues.reciprocal() @ ri.square().mT).flatten()


class LowRankNormal(PrecisionNormal):
    r"""
    A Gaussian with the precision :math:`P = S(I + Q\operatorname{diag}(e)Q^\top)S`, S diagonal, Q orthonormal:
    a prior plus a curvature of rank r. Nothing of size p × p is formed.

    :param Tensor loc: mean, shape ``(p,)``.
    :param Tensor scale: the diagonal of S, positive, shape ``(p,)``.
    :param Tensor vectors: Q, shape ``(p, r)``, orthonormal columns. Where e is large, :math:`I - QQ^\top` needs more digits
        than ``loc`` may have: products are formed in the precision of Q.
    :param Tensor eigenvalues: e > -1, shape ``(r,)``, in the same precision.
    """

    def __init__(self, loc: Tensor, scale: Tensor, vectors: Tensor, eigenvalues: Tensor) -> None:
        super().__init__(loc)
        self.scale = scale
        self.vectors = vectors
        self.eigenvalues = eigenvalues

    def _apply(self, x: Tensor, power: float) -> Tensor:
        factor = (1 + self.eigenvalues).pow(power) - 1
        wide = x.to(self.vectors.dtype)
        return (wide + ((wide @ self.vectors) * factor) @ self.vectors.mT).to(x.dtype)

    def half_solve(self, x: Tensor) -> Tensor:
        """See :meth:`PrecisionNormal.half_solve`."""
        return self._apply(x, -0.5) / self.scale

    def half_solve_transposed(self, x: Tensor) -> Tensor:
        """See :meth:`PrecisionNormal.half_solve_transposed`."""
        return self._apply(x / self.scale, -0.5)

    def multiply(self, x: Tensor) -> Tensor:
        """See :meth:`PrecisionNormal.multiply`."""
        return self._apply(x * self.scale, 1.0) * self.scale

    @property
    def log_det_precision(self) -> Tensor:
        """See :attr:`PrecisionNormal.log_det_precision`."""
        terms = torch.log1p(self.eigenvalues), 2 * self.scale.log()
        return terms[0].sum(dtype=torch.float64) + terms[1].sum(dtype=torch.float64)

    @property
    def variance(self) -> Tensor:
        """Marginal variances, shape ``(p,)``."""
        shrink = self.eigenvalues / (1 + self.eigenvalues)
        return (1 - self.vectors.square() @ shrink).to(self.scale.dtype) / self.scale.square()


class BlockNormal(PrecisionNormal):
    """
    Independent Gaussians over parts of a vector; what no part covers is fixed at its mean.

    Densities are with respect to the covered coordinates: :meth:`log_prob` ignores the others.

    :param Tensor loc: mean, shape ``(p,)``.
    :param parts: pairs of disjoint positions, shape ``(q,)``, and the Gaussian over them.
    """

    def __init__(self, loc: Tensor, parts: Sequence[tuple[Tensor, PrecisionNormal]]) -> None:
        super().__init__(loc)
        self.parts = list(parts)

    @property
    def rank(self) -> int:
        """How many coordinates are random."""
        return sum(len(index) for index, _ in self.parts)

    def _each(self, x: Tensor, method: str) -> Tensor:
        total = torch.zeros_like(x)
        for index, part in self.parts:
            total[..., index] = getattr(part, method)(x[..., index])
        return total

    def half_solve(self, x: Tensor) -> Tensor:
        """See :meth:`PrecisionNormal.half_solve`."""
        return self._each(x, "half_solve")

    def half_solve_transposed(self, x: Tensor) -> Tensor:
        """See :meth:`PrecisionNormal.half_solve_transposed`."""
        return self._each(x, "half_solve_transposed")

    def multiply(self, x: Tensor) -> Tensor:
        """See :meth:`PrecisionNormal.multiply`."""
        return self._each(x, "multiply")

    @property
    def log_det_precision(self) -> Tensor:
        """See :attr:`PrecisionNormal.log_det_precision`; over the covered coordinates."""
        return sum((part.log_det_precision for _, part in self.parts), self.loc.new_zeros(()))

    @property
    def smallest_precision(self) -> Tensor:
        """The smallest of the parts'."""
        return torch.stack([part.smallest_precision for _, part in self.parts]).min()

    @property
    def variance(self) -> Tensor:
        """Marginal variances, shape ``(p,)``; zero where fixed."""
        total = torch.zeros_like(self.loc)
        for index, part in self.parts:
            total[index] = part.variance
        return total
