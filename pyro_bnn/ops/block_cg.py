# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Block conjugate gradients: many right-hand sides share one Krylov space."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bnn.ops.conjugate_basis import ConjugateBasis
from pyro_bnn.ops.jacobian import LinearMap
from pyro_bnn.ops.krylov import conjugate_gradient


@dataclass
class BlockCGResult:
    r"""
    The outcome of :func:`block_conjugate_gradient` for S right-hand sides.

    :ivar solution: shape ``(S, p)``.
    :ivar residual: final relative residuals :math:`|b - Px|/|b|`, shape ``(S,)``.
    :ivar iterations: block iterations.
    :ivar products: vectors multiplied by P, summed over iterations.
    :ivar smallest_curvature: the smallest Ritz value met, an upper bound of the smallest eigenvalue of P.
    :ivar largest_curvature: the largest Ritz value met, a lower bound of the largest eigenvalue of P.
    :ivar indefinite: whether a direction of negative curvature was met; the solutions are then those of the
        iteration before.
    """

    solution: Tensor
    residual: Tensor
    iterations: int
    products: int
    smallest_curvature: float
    largest_curvature: float
    indefinite: bool


def block_conjugate_gradient(
    operator: LinearMap,
    rhs: Tensor,
    *,
    tolerance: float = 1e-6,
    max_iter: int | None = None,
    preconditioner: LinearMap | None = None,
    basis: ConjugateBasis | None = None,
) -> BlockCGResult:
    r"""
    Solves :math:`P x_s = b_s` for S right-hand sides, each in the block Krylov space of all of them.

    The block of search directions is orthonormalised in every iteration and directions that have become linearly
    dependent are dropped, so that dependent right-hand sides (targets that are close to each other) do no harm
    and need fewer products. Directions are conjugate to all earlier ones as far as these are kept, so that p products are
    enough for any number of right-hand sides. What rounding leaves over is finished one by one. In exact arithmetic :math:`b_s^\top x_s` increases monotonically to
    :math:`b_s^\top P^{-1} b_s`: an early stop gives a lower bound.

    :param operator: the map :math:`v \mapsto P v` from ``(S, p)`` to ``(S, p)``, for any S.
    :param rhs: shape ``(S, p)``.
    :param tolerance: relative residual at which all right-hand sides are finished.
    :param max_iter: largest number of block iterations; default ``10 p + 20``.
    :param preconditioner: the map :math:`r \mapsto M^{-1} r`, symmetric positive definite.
    :param basis: directions from earlier solves with the same map, where this one starts and to which it adds.
    :return: a :class:`BlockCGResult`.
    :raises ValueError: if a product is not finite.

    Source: O'Leary (1980); the treatment of dependent directions follows Ji and Li (2017), "A breakdown-free block
    conjugate gradient method".

    Example::

        >>> P = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> result = block_conjugate_gradient(lambda v: v @ P, torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
        >>> result.solution
        tensor([[ 0.6000, -0.2000],
                [ 1.2000, -0.4000]])
        >>> result.products  # one direction serves both
        2
    """
    p = rhs.shape[1]
    max_iter = 10 * p + 20 if max_iter is None else max_iter
    eps = torch.finfo(rhs.dtype).eps
    norm = rhs.norm(dim=-1, keepdim=True)
    norm = torch.where(norm > 0, norm, torch.ones_like(norm))
    basis = ConjugateBasis(p) if basis is None else basis
    b = rhs / norm
    x, r = basis.solve(b)
    smallest, largest, indefinite, iterations, products = torch.inf, 0.0, False, 0, 0
    residual = r.norm(dim=-1)
    for attempt in range(3):
        left = residual > tolerance
        if not left.any() or indefinite or iterations >= max_iter:
            break
        if attempt:  # rounding has separated r from the residual: start again from the latter
            change, r[left] = basis.solve(b[left] - operator(x[left]))
            x[left] += change
            products += int(left.sum())
            residual = r.norm(dim=-1)
        best, stalled = torch.inf, 0
        q = orthonormal_rows(basis.conjugate(r if preconditioner is None else preconditioner(r)))
        while q.shape[0] and iterations < max_iter and residual.max() > tolerance:
            image = operator(q)
            # comparisons with NaN would end the loop as if it had converged
            if not torch.isfinite(image).all():
                raise ValueError("a product with the operator is not finite")
            iterations += 1
            products += q.shape[0]
            values, vectors = torch.linalg.eigh(_symmetric(q @ image.mT))
            # Ritz values below the rounding error of the products say nothing, not even their sign
            largest = max(largest, float(values[-1]))
            noise = 10 * eps * values.abs().max()
            if values[0] < -noise:
                smallest, indefinite = min(smallest, float(values[0])), True
                break
            keep = values > noise
            if not keep.any():
                break
            smallest = min(smallest, float(values[keep][0]))
            scaled = vectors[:, keep] / values[keep].sqrt()
            q, image = scaled.mT @ q, scaled.mT @ image  # now q P q' = 1
            basis.append(q, image)
            step = r @ q.mT
            x = torch.addmm(x, step, q)
            r = torch.addmm(r, step, image, alpha=-1)
            residual = r.norm(dim=-1)
            worst = float(residual.max())
            stalled = 0 if worst < 0.9 * best else stalled + 1
            best = min(best, worst)
            if stalled > 20:
                break
            q = orthonormal_rows(basis.conjugate(r if preconditioner is None else preconditioner(r)))
    left = residual > tolerance
    if left.any() and not indefinite and iterations < max_iter:
        # a block mixes large and small curvatures and so feels rounding earlier than single vectors do
        single = conjugate_gradient(
            operator,
            rhs[left],
            tolerance=tolerance,
            max_iter=max_iter - iterations,
            preconditioner=preconditioner,
            start=(x * norm)[left],
        )
        solution = x * norm
        solution[left] = single.solution
        residual[left] = single.residual
        iterations += int(single.iterations.max())
        products += int(single.iterations.sum()) + int(left.sum())
        smallest = min(smallest, float(single.smallest_curvature.min()))
        return BlockCGResult(
            solution, residual, iterations, products, smallest, largest, bool(single.indefinite.any())
        )
    return BlockCGResult(x * norm, residual, iterations, products, smallest, largest, indefinite)


def orthonormal_rows(rows: Tensor) -> Tensor:
    """
    An orthonormal basis of the numerical row space, with every row scaled to unit length first.

    :param rows: shape ``(S, p)``.
    :return: shape ``(r, p)`` with r ≤ S.
    """
    norm = rows.norm(dim=-1, keepdim=True)
    unit = rows / torch.where(norm > 0, norm, torch.ones_like(norm))
    if unit.shape[0] == 1:
        return unit[norm.squeeze(-1) > 0]
    values, vectors = torch.linalg.eigh(unit @ unit.mT)
    keep = values > 100 * torch.finfo(rows.dtype).eps * values[-1].clamp(min=1)
    return (vectors[:, keep] / values[keep].sqrt()).mT @ unit


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)
