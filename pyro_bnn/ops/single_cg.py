# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Conjugate gradients for a batch of right-hand sides, each by itself."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bnn.ops.jacobian import LinearMap


@dataclass
class CGResult:
    r"""
    The outcome of :func:`conjugate_gradient` for S right-hand sides.

    :ivar solution: shape ``(S, p)``.
    :ivar remainder: :math:`b - Px`, shape ``(S, p)``, as the recursion has it.
    :ivar residual: final relative residuals :math:`|b - Px|/|b|`, shape ``(S,)``.
    :ivar iterations: products used by each right-hand side, shape ``(S,)``.
    :ivar smallest_curvature: the smallest :math:`q^\top P q / q^\top q` met by each, shape ``(S,)``: an upper
        bound of the smallest eigenvalue of P.
    :ivar indefinite: where a direction of non-positive curvature was met, shape ``(S,)``, bool: P is not
        positive definite, and the solution there is that of the iteration before.
    """

    solution: Tensor
    remainder: Tensor
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
    return CGResult(x, r, r.norm(dim=-1) / safe_norm, iterations, smallest, indefinite)
