# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Lanczos from many vectors at once, and what it tells of functions of a positive semi-definite map along them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_bnn.ops.jacobian import LinearMap

#: A function of real numbers, element by element.
Function = Callable[[Tensor], Tensor]


@dataclass
class Krylov:
    r"""
    What k steps of Lanczos tell of a positive semi-definite map N and S vectors z.

    :ivar squares: :math:`|z|^2`, shape ``(S,)``.
    :ivar alpha: diagonals of the tridiagonal matrices, shape ``(S, k)``, float64.
    :ivar beta: what stands beside them, shape ``(S, k)``, float64; the last leads out of the space.
    :ivar basis: the Lanczos vectors, shape ``(S, k, p)``.
    """

    squares: Tensor
    alpha: Tensor
    beta: Tensor
    basis: Tensor

    @cached_property
    def rule(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values, shape ``(S, k)``, their weights, shape ``(S, k)``, and eigenvectors, shape ``(S, k, k)``."""
        values, vectors = torch.linalg.eigh(_tridiagonal(self.alpha, self.beta[:, :-1]))
        return values.clamp(min=0.0), vectors[:, 0].square() * self.squares[:, None], vectors

    def gauss(self, function: Function) -> Tensor:
        r""":math:`z^\top f(N) z` by the Gauss rule, shape ``(S,)``."""
        values, weights, _ = self.rule
        return (function(values) * weights).sum(-1)

    @property
    def upper(self) -> Tensor:
        r""":math:`z^\top \log(1 + N) z` from above, since even derivatives are negative: the Gauss rule. Shape ``(S,)``."""
        return self.gauss(torch.log1p) + self._rounding

    @property
    def lower(self) -> Tensor:
        r"""
        The same from below, since odd derivatives are positive: the Gauss-Radau rule with a node at zero, where the function
        vanishes. The other nodes are those of the Gauss rule for the measure :math:`x\,d\mu(x)`, the eigenvalues of
        :math:`B^\top B` with the Cholesky factor B of the tridiagonal matrix, whose last pivot vanishes.
        """
        floor = 10 * self._eps * self.rule[0][:, -1] * self.alpha.shape[1]
        pivots = [self.alpha[:, 0]]
        for a, b in zip(self.alpha.mT[1:], self.beta.mT, strict=False):
            last = pivots[-1]
            found = a - b.square() / torch.where(last > 0, last, 1.0)
            # fewer steps bound as well where rounding leaves nothing of a pivot
            pivots.append(torch.where((last > 0) & (found > floor), found, 0.0))
        d = torch.stack(pivots, 1)
        safe = torch.where(d > 0, d, 1.0)
        diagonal = torch.where(d > 0, d + self.beta.square() / safe, 0.0)
        beside = self.beta[:, :-1] * (d[:, 1:] / safe[:, :-1]).sqrt()
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        values = values.clamp(min=torch.finfo(values.dtype).tiny)
        mean = (vectors[:, 0].square() * torch.log1p(values) / values).sum(-1)
        return self.squares * d[:, 0].clamp(min=0) * mean - self._rounding

    @property
    def _eps(self) -> float:
        return torch.finfo(self.basis.dtype).eps

    @property
    def _rounding(self) -> Tensor:
        """About what the rounding of products, of independent signs, changes, shape ``(S,)``."""
        values, weights, _ = self.rule
        return 8 * self._eps * values[:, -1] * (weights / (1 + values).square()).sum(-1).sqrt()

    def apply(self, function: Function) -> Tensor:
        """:math:`f(N) z` in the Krylov space, shape ``(S, p)``."""
        values, _, vectors = self.rule
        inner = (vectors * (function(values) * vectors[:, 0])[:, None]).sum(-1) * self.squares.sqrt()[:, None]
        return (inner[:, None].to(self.basis) @ self.basis)[:, 0]


def _tridiagonal(diagonal: Tensor, beside: Tensor) -> Tensor:
    return torch.diag_embed(diagonal) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)


def lanczos(
    operator: LinearMap, start: Tensor, *, max_steps: int, enough: Callable[[Krylov], bool] | None = None
) -> Krylov:
    """
    Lanczos with full reorthogonalisation from S vectors at once, each in a space of its own.

    :param operator: a map from ``(S, p)`` to ``(S, p)``, positive semi-definite.
    :param start: shape ``(S, p)``.
    :param max_steps: largest number of products with each.
    :param enough: whether to stop, asked after each step.
    :return: what was found.
    """
    S, p = start.shape
    squares = start.double().square().sum(-1)
    q = start / start.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(start.dtype).tiny)
    alphas, betas = squares.new_zeros(S, 0), squares.new_zeros(S, 0)
    basis = start.new_empty(S, min(max_steps, p, 8), p)
    for step in range(min(max_steps, p)):
        if step == basis.shape[1]:
            basis = torch.cat([basis, basis.new_empty(S, 8, p)], 1)
        basis[:, step] = q
        image, known = operator(q), basis[:, : step + 1]
        size = image.norm(dim=-1)
        alphas = torch.cat([alphas, (image * q).sum(-1, keepdim=True).double()], 1)
        for _ in range(2):
            image = image - ((image[:, None] @ known.mT) @ known)[:, 0]
        beta = image.norm(dim=-1)
        # what rounding leaves of an image is no direction
        beta = torch.where(beta > 100 * torch.finfo(q.dtype).eps * size, beta, 0.0)
        betas = torch.cat([betas, beta[:, None].double()], 1)
        q = torch.where(beta > 0, 1 / beta, 0.0)[:, None] * image
        found = Krylov(squares, alphas, betas, known)
        if not bool((beta > 0).any()) or (enough is not None and enough(found)):
            break
    return found
