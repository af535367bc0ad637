# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Matrix-free linear algebra: conjugate gradients for many right-hand sides, extreme eigenvalues."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bnn.ops.jacobian import LinearMap


@dataclass
class CGResult:
    r"""
    The outcome of :func:`conjugate_gradient` for S right-hand sides.

    :ivar solution: shape ``(S, p)``.
    :ivar residual: final relative residuals :math:`|b - Px|/|b|`, shape ``(S,)``.
    :ivar iterations: products used by each right-hand side, shape ``(S,)``.
    :ivar smallest_curvature: the smallest :math:`q^\top P q / q^\top q` met by each, shape ``(S,)``: an upper
        bound of the smallest eigenvalue of P.
    :ivar indefinite: where a direction of non-positive curvature was met, shape ``(S,)``, bool: P is not
        positive definite, and the solution there is that of the iteration before.
    """

    solution: Tensor
    residual: Tensor
    iterations: Tensor
    smallest_curvature: Tensor
    indefinite: Tensor

    @property
    def converged(self) -> Tensor:
        """Not :attr:`indefinite`; compare :attr:`residual` with your tolerance for the rest. Shape ``(S,)``."""
        return ~self.indefinite


def conjugate_gradient(
    operator: LinearMap,
    rhs: Tensor,
    *,
    tolerance: float = 1e-6,
    max_iter: int | None = None,
    preconditioner: LinearMap | None = None,
    start: Tensor | None = None,
) -> CGResult:
    r"""
    Solves :math:`P x_s = b_s` for a batch of right-hand sides by (preconditioned) conjugate gradients.

    Each iteration makes one batched product. From the zero start, :math:`b^\top x_k` increases monotonically to
    :math:`b^\top P^{-1} b` in exact arithmetic, so that an early stop gives a lower bound. A right-hand side
    whose search direction has :math:`q^\top P q \le 0` stops there and is reported as indefinite.

    :param operator: the map :math:`v \mapsto P v` from ``(S, p)`` to ``(S, p)``.
    :param rhs: shape ``(S, p)``.
    :param tolerance: relative residual at which a right-hand side is finished.
    :param max_iter: largest number of products; default ``10 * p``.
    :param preconditioner: the map :math:`r \mapsto M^{-1} r`, symmetric positive definite.
    :param start: where to start, shape ``(S, p)``; zero by default.
    :return: a :class:`CGResult`.

    Example::

        >>> P = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> conjugate_gradient(lambda v: v @ P, torch.tensor([[1.0, 0.0]])).solution
        tensor([[ 0.6000, -0.2000]])
    """
    S, p = rhs.shape
    max_iter = 10 * p if max_iter is None else max_iter
    norm = rhs.norm(dim=-1)
    safe_norm = torch.where(norm > 0, norm, torch.ones_like(norm))
    x = torch.zeros_like(rhs) if start is None else start.clone()
    r = rhs.clone() if start is None else rhs - operator(start)
    z = r if preconditioner is None else preconditioner(r)
    q = z.clone()
    rz = (r * z).sum(-1)
    smallest = torch.full_like(norm, torch.inf)
    indefinite = torch.zeros(S, dtype=torch.bool, device=rhs.device)
    iterations = torch.zeros(S, dtype=torch.long, device=rhs.device)
    active = r.norm(dim=-1) > tolerance * norm
    for _ in range(max_iter):
        if not active.any():
            break
        # a slice costs no copies while all are active
        index = slice(None) if active.all() else active.nonzero().squeeze(-1)
        q_a = q[index]
        Pq = operator(q_a)
        curvature = (q_a * Pq).sum(-1)
        iterations[index] += 1
        smallest[index] = torch.minimum(smallest[index], curvature / q_a.square().sum(-1))
        bad = curvature <= 0
        indefinite[index] = bad
        step = torch.where(bad, torch.zeros_like(curvature), rz[index] / curvature)
        x[index] += step[:, None] * q_a
        r[index] -= step[:, None] * Pq
        r_a = r[index]
        z_a = r_a if preconditioner is None else preconditioner(r_a)
        new_rz = (r_a * z_a).sum(-1)
        q[index] = z_a + (new_rz / rz[index])[:, None] * q_a
        rz[index] = new_rz
        active[index] = (r_a.norm(dim=-1) > tolerance * safe_norm[index]) & ~bad
    return CGResult(x, r.norm(dim=-1) / safe_norm, iterations, smallest, indefinite)


def largest_eigenvalue(
    operator: LinearMap, like: Tensor, *, tolerance: float = 1e-3, max_iter: int = 200
) -> Tensor:
    """
    The largest eigenvalue of a symmetric positive semi-definite map by power iteration.

    :param operator: a map from ``(1, p)`` to ``(1, p)``.
    :param like: a vector of shape ``(p,)`` that gives size, dtype and device.
    :param tolerance: relative change at which to stop.
    :param max_iter: largest number of products.
    :return: a scalar, a lower bound that is tight when the iteration has converged.
    """
    generator = torch.Generator(device=like.device).manual_seed(0)
    v = torch.randn(1, like.shape[0], dtype=like.dtype, device=like.device, generator=generator)
    v = v / v.norm()
    value = v.new_zeros(())
    for _ in range(max_iter):
        image = operator(v)
        new_value = (v * image).sum()
        norm = image.norm()
        if norm == 0:
            return norm
        v = image / norm
        if (new_value - value).abs() <= tolerance * new_value.abs():
            return new_value
        value = new_value
    return value


def smallest_eigenvalue(operator: LinearMap, like: Tensor, *, steps: int = 100) -> float:
    """
    An upper bound of the smallest eigenvalue of a symmetric map by Lanczos with full reorthogonalisation.

    :param operator: a map from ``(1, p)`` to ``(1, p)``.
    :param like: a vector of shape ``(p,)`` that gives size, dtype and device.
    :param steps: largest number of products; memory is ``steps * p``.
    :return: the smallest Ritz value.

    Example::

        >>> round(smallest_eigenvalue(lambda v: v * torch.tensor([3.0, -1.0, 2.0]), torch.zeros(3)), 4)
        -1.0
    """
    return float(ritz_pairs(operator, like, steps=steps)[0][0])


def ritz_pairs(operator: LinearMap, like: Tensor, *, steps: int = 100) -> tuple[Tensor, Tensor]:
    """
    Ritz values and vectors of a symmetric map by Lanczos with full reorthogonalisation: eigenpairs where p is at most
    ``steps``, approximations of the extreme ones from within otherwise.

    :param operator: a map from ``(1, p)`` to ``(1, p)``.
    :param like: a vector of shape ``(p,)`` that gives size, dtype and device.
    :param steps: largest number of products; memory is ``steps * p``.
    :return: n values, ascending, and unit vectors of shape ``(n, p)``.
    """
    generator = torch.Generator(device=like.device).manual_seed(0)
    p = like.shape[0]
    q = torch.randn(p, dtype=like.dtype, device=like.device, generator=generator)
    basis = (q / q.norm()).unsqueeze(0)
    diagonal: list[Tensor] = []
    off_diagonal: list[Tensor] = []
    for step in range(min(steps, p)):
        image = operator(basis[-1:])[0]
        diagonal.append(image @ basis[-1])
        for _ in range(2):
            image = image - (basis @ image) @ basis
        norm = image.norm()
        # what rounding leaves of the image is no direction
        nothing = max(1e-10, 100 * len(basis) * torch.finfo(like.dtype).eps)
        if step + 1 == min(steps, p) or norm <= nothing * torch.stack(diagonal).abs().max():
            break
        off_diagonal.append(norm)
        basis = torch.cat([basis, (image / norm).unsqueeze(0)])
    tridiagonal = torch.diag(torch.stack(diagonal))
    if off_diagonal:
        beta = torch.diag(torch.stack(off_diagonal), 1)
        tridiagonal = tridiagonal + beta + beta.mT
    values, vectors = torch.linalg.eigh(tridiagonal)
    return values, vectors.mT @ basis[: len(values)]
