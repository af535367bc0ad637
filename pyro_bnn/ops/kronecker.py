# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Curvature of linear maps: diagonals, Kronecker factors and dense blocks from inputs and output gradients alone.

A linear map with inputs :math:`x_{nt}` (T of them per example, one unless weights are shared) has the GGN
:math:`\sum_n\sum_k \operatorname{vec}(\sum_t g_{knt}x_{nt}^\top)\operatorname{vec}(\cdot)^\top`, with k over the
columns of a root of the Fisher information. Its Kronecker approximation is :math:`G \otimes A`.
"""

from typing import Literal

import torch
from torch import Tensor

#: How the Kronecker approximation treats weight sharing: Eschenhagen et al. (2023), equations (11) and (13).
Sharing = Literal["expand", "reduce"]


def _chunks(B: int, floats: int, limit: int = 2**25) -> list[slice]:
    """Slices of B examples that need ``floats`` numbers each, at most ``limit`` together."""
    step = max(1, limit // max(1, floats))
    return [slice(i, min(i + step, B)) for i in range(0, B, step)]


def gram(rows: Tensor, *, block: int = 256) -> Tensor:
    r"""
    :math:`R^\top R`, computed for one triangle of blocks where that saves work.

    :param rows: shape ``(n, d)``.
    :param block: size of a block.
    :return: shape ``(d, d)``.
    """
    d = rows.shape[1]
    if d < 2 * block:
        return rows.mT @ rows
    result = rows.new_empty(d, d)
    for start in range(0, d, block):
        part = slice(start, min(start + block, d))
        strip = rows[:, part].mT @ rows[:, start:]
        result[part, start:] = strip
        result[start:, part] = strip.mT
    return result


def squared_rows(g: Tensor, x: Tensor) -> Tensor:
    r"""
    The diagonal of the curvature of a linear map: :math:`\sum_{kn} (\sum_t g_{knt} x_{nt}^\top)^2`.

    :param g: gradients in the outputs, shape ``(K, B, T, out)``.
    :param x: inputs, shape ``(B, T, in)``.
    :return: shape ``(out, in)``.
    """
    _, B, T, out = g.shape
    if T == 1:
        return g.square().sum(0).squeeze(1).mT @ x.squeeze(1).square()
    total = g.new_zeros(out, x.shape[-1])
    for part in _chunks(B, out * x.shape[-1]):
        for gk in g:
            total += (gk[part].mT @ x[part]).square().sum(0)
    return total


def kronecker_inputs(x: Tensor, sharing: Sharing) -> tuple[Tensor, int]:
    r"""
    The sum behind the input factor A.

    :param x: inputs, shape ``(B, T, in)``.
    :param sharing: ``"expand"`` (every row counts) or ``"reduce"`` (rows are averaged within an example).
    :return: :math:`\sum x x^\top`, shape ``(in, in)``, and the number of terms that A is to be divided by.
    """
    rows = x.mean(1) if sharing == "reduce" else x.reshape(-1, x.shape[-1])
    return gram(rows), rows.shape[0]


def kronecker_outputs(g: Tensor, sharing: Sharing) -> Tensor:
    r"""
    The output factor G.

    :param g: gradients in the outputs, shape ``(B, T, out)``.
    :param sharing: ``"expand"`` or ``"reduce"`` (rows are summed within an example).
    :return: :math:`\sum g g^\top`, shape ``(out, out)``.
    """
    rows = g.sum(1) if sharing == "reduce" else g.reshape(-1, g.shape[-1])
    return gram(rows)


def rank_one(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """
    Writes a positive matrix as an outer product, if it is one.

    :param matrix: positive, shape ``(out, in)``.
    :return: vectors a and b with ``matrix == a[:, None] * b``, or ``None``.
    """
    a, b = matrix[:, 0] / matrix[0, 0].sqrt(), matrix[0] / matrix[0, 0].sqrt()
    if torch.allclose(a.unsqueeze(-1) * b, matrix, rtol=1e3 * torch.finfo(matrix.dtype).eps, atol=0.0):
        return a, b
    return None


def eigh_factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """
    Eigendecomposition of a factor that is positive semi-definite up to rounding.

    :param matrix: symmetric, shape ``(d, d)``.
    :return: eigenvalues clamped at zero, and eigenvectors.
    """
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
    return values.clamp(min=0), vectors


def kronecker_covariance(g: Tensor, x: Tensor, rotations: tuple[Tensor, Tensor], variances: Tensor) -> Tensor:
    r"""
    :math:`J P^{-1} J^\top` of a linear map without its Jacobian: with gradients and inputs rotated to independent
    coordinates, :math:`\operatorname{Cov}_{ck} = \sum_o g_{co} g_{ko} \sum_i x_i^2 v_{oi}` where T = 1.

    :param g: gradients in the outputs, shape ``(M, B, T, out)``.
    :param x: inputs, shape ``(B, T, in)``.
    :param rotations: matrices that take gradients and inputs there, shapes ``(out, out)`` and ``(in, in)``.
    :param variances: of the coordinates, shape ``(out, in)``.
    :return: shape ``(B, M, M)``.
    """
    return independent_covariance(g @ rotations[0], x @ rotations[1], variances)


def independent_covariance(g: Tensor, x: Tensor, variances: Tensor) -> Tensor:
    """
    :func:`kronecker_covariance` in coordinates that are independent already.

    :param g: shape ``(M, B, T, out)``.
    :param x: shape ``(B, T, in)``.
    :param variances: shape ``(out, in)``.
    :return: shape ``(B, M, M)``.
    """
    M, B, T, _ = g.shape
    if T == 1:
        scales = x.squeeze(1).square() @ variances.mT
        g = g.squeeze(2).movedim(0, 1)
        return (g * scales.unsqueeze(1)) @ g.mT
    deviations = variances.sqrt()
    parts = []
    for part in _chunks(B, M * deviations.numel()):
        rows = (g[:, part].mT @ x[part]) * deviations
        rows = rows.movedim(0, 1).flatten(2)
        parts.append(rows @ rows.mT)
    return torch.cat(parts)


def pair_block(gu: Tensor, xu: Tensor, gv: Tensor, xv: Tensor, *, symmetric: bool) -> Tensor:
    r"""
    The dense curvature block of two linear maps with one row per example,
    :math:`\sum_n (\sum_k g^u_{kn} {g^v_{kn}}^\top) \otimes x^u_n {x^v_n}^\top`: fewer operations than the product of
    Jacobians by the number K of columns.

    :param gu: shape ``(K, B, out_u)``.
    :param xu: shape ``(B, in_u)``.
    :param gv: shape ``(K, B, out_v)``.
    :param xv: shape ``(B, in_v)``.
    :param symmetric: whether u and v are the same map, so that one half is computed.
    :return: shape ``(out_u, in_u, out_v, in_v)``.
    """
    _, B, out_u = gu.shape
    out_v = gv.shape[-1]
    weights = gu.permute(1, 2, 0) @ gv.movedim(1, 0)  # (B, out_u, out_v)
    result = xu.new_empty(out_u, xu.shape[-1], out_v, xv.shape[-1])
    for o in range(out_u):
        first = o if symmetric else 0
        weighted = (weights[:, o, first:].unsqueeze(-1) * xv.unsqueeze(1)).reshape(B, -1)
        result[o, :, first:] = (xu.mT @ weighted).reshape(xu.shape[-1], out_v - first, xv.shape[-1])
        if symmetric:
            result[o + 1 :, :, o] = result[o, :, o + 1 :].permute(1, 2, 0)
    return result
