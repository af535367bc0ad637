# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Bounds of :math:`b^\top f(P) b` from the coefficients of k steps of Lanczos.

With the starting vector :math:`b/|b|` and orthonormal Lanczos vectors V, :math:`V^\top P V = T` is tridiagonal, with diagonal
:math:`\alpha_1 \dots \alpha_k` and off-diagonal :math:`\beta_1 \dots \beta_{k-1}`; :math:`\beta_k` leads out of their span.
Then :math:`|b|^2 e_1^\top f(T) e_1` is a Gauss rule for the spectral measure of b, and with one more row that gives T the
eigenvalue :math:`\tau` it is a Gauss-Radau rule with a node at :math:`\tau`. Their errors have the signs of the derivatives
:math:`f^{(2k)}` and :math:`f^{(2k+1)}` if :math:`0 < \tau \le \lambda_{\min}(P)`: for :math:`1/x` the Gauss rule is the lower
bound and the Radau rule the upper one, for :math:`\log x` the other way round.

Source: Golub and Meurant (1994), "Matrices, moments and quadrature".
"""

from typing import Literal

import torch
from torch import Tensor

from pyro_bnn.ops.enclosure import Bracket
from pyro_bnn.ops.options import require_choice

Function = Literal["inverse", "log"]


def bracket(
    alpha: Tensor,
    beta: Tensor,
    function: Function,
    node: Tensor | float,
    *,
    error: Tensor | float | None = None,
) -> Bracket:
    r"""
    Bounds of :math:`\hat b^\top f(P) \hat b` with :math:`\hat b = b/|b|`, from both rules.

    Products are rounded, so that T is that of a matrix :math:`P' = P + E` with :math:`|E| \le \nu`. The Gauss rule is applied to
    :math:`P' + \nu \ge P` and the Radau rule to :math:`P' - \nu \le P`, with its node at :math:`\tau - 2\nu`, so that
    both bounds hold for P.

    :param alpha: the diagonal of T, shape ``(..., k)``.
    :param beta: its off-diagonal and the coefficient that leads out of the space, which is zero where that is invariant;
        shape ``(..., k)``.
    :param function: ``"inverse"`` or ``"log"``.
    :param node: :math:`\tau`, positive and at most the smallest eigenvalue of P, of a shape that expands to ``(...)``.
    :param error: :math:`\nu`, of such a shape; by default four roundings of the largest row of T, in the precision of ``alpha``.
    :return: bounds in double precision, shape ``(...)``. That of the Radau rule is infinite where :math:`\tau \le 2\nu`.
    :raises ValueError: if T has an eigenvalue below the node, which then is no bound of P's.

    Example::

        >>> P, b = torch.tensor([1.0, 2.0, 4.0]).double(), torch.ones(3).double() / 3**0.5
        >>> alpha = b @ (P * b)  # one step
        >>> beta = (P * b - alpha * b).norm()
        >>> low, high = bracket(alpha[None], beta[None], "inverse", node=0.9)
        >>> bool(low < (b * b / P).sum() < high)
        True
    """
    if error is None:
        error = 4 * torch.finfo(alpha.dtype).eps * (alpha.abs() + 2 * beta.abs()).amax(-1).double()
    node, error = (torch.as_tensor(x, dtype=torch.float64, device=alpha.device) for x in (node, error))
    _require_positive(node)
    alpha, resolved = alpha.double(), node > 2 * error
    inner = gauss(alpha + error[..., None], beta, function)
    error = torch.where(resolved, error, 0.0)
    outer = gauss_radau(alpha - error[..., None], beta, function, node - 2 * error)
    if function == "inverse":
        return Bracket(inner, torch.where(resolved, outer, torch.inf))
    return Bracket(torch.where(resolved, outer, -torch.inf), inner)


def gauss(alpha: Tensor, beta: Tensor, function: Function) -> Tensor:
    r"""
    :math:`e_1^\top f(T) e_1`, of shape ``(...)`` in double precision; see :func:`bracket` for the arguments.

    Example::

        >>> float(gauss(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 0.0]), "inverse"))  # cofactor 2, determinant 3
        0.6666666666666666
    """
    require_choice("function", function, "inverse", "log")
    alpha, beta = alpha.double(), beta.double()
    if function == "inverse":
        return _pivots(alpha.flip(-1), beta[..., :-1].flip(-1))[..., -1].reciprocal()
    values, vectors = torch.linalg.eigh(_tridiagonal(alpha, beta))
    return (vectors[..., 0, :].square() * values.log()).sum(-1)


def gauss_radau(alpha: Tensor, beta: Tensor, function: Function, node: Tensor | float) -> Tensor:
    r"""
    The rule with one more node, at :math:`\tau`, of shape ``(...)`` in double precision; see :func:`bracket`, which allows for
    rounding.

    Example::

        >>> # the uniform measure on [1, 3]: nodes 1 and 7/3 with weights 1/4 and 3/4
        >>> round(float(gauss_radau(torch.tensor([2.0]), torch.tensor([1 / 3]).sqrt(), "inverse", 1.0)), 4)
        0.5714
    """
    alpha, beta = alpha.double(), beta.double()
    node = torch.as_tensor(node, dtype=torch.float64, device=alpha.device)
    _require_positive(node)
    pivots = _pivots(alpha - node[..., None], beta[..., :-1])
    if not bool((pivots > 0).all()):
        smallest = torch.linalg.eigvalsh(_tridiagonal(alpha, beta))[..., 0]
        raise ValueError(
            f"the node is {float(node.max()):.6g}, and the matrix has an eigenvalue of at most {float(smallest.min()):.6g}: "
            "expected a bound below all of them."
        )
    last = node + beta[..., -1].square() / pivots[..., -1]
    return gauss(torch.cat([alpha, last[..., None]], -1), torch.nn.functional.pad(beta, (0, 1)), function)


def _require_positive(node: Tensor) -> None:
    if not bool((node > 0).all()):
        raise ValueError(f"the node must be positive, found {float(node.min()):.3g}.")


def _pivots(alpha: Tensor, beta: Tensor) -> Tensor:
    """Those of the Cholesky factors of tridiagonal matrices from diagonals (..., k) and off-diagonals (..., k - 1)."""
    found = [alpha[..., 0]]
    for a, b in zip(alpha[..., 1:].unbind(-1), beta.unbind(-1), strict=True):
        found.append(a - b.square() / found[-1])
    return torch.stack(found, -1)


def _tridiagonal(alpha: Tensor, beta: Tensor) -> Tensor:
    """Matrices of shape (..., k, k) from diagonals (..., k) and off-diagonals, the last of which is left out."""
    off = torch.diag_embed(beta[..., :-1], 1)
    return torch.diag_embed(alpha) + off + off.mT
