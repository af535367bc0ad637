# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Sums over the examples of a linear map's inputs and output gradients."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pyro_bnn.curvature.patches import gram

#: How the Kronecker approximation treats weight sharing: Eschenhagen et al. (2023), equations (11) and (13).
Sharing = Literal["expand", "reduce"]


def _chunks(B: int, floats: int, limit: int = 2**25) -> list[slice]:
    """Slices of B examples that need ``floats`` numbers each, at most ``limit`` together."""
    step = max(1, limit // max(1, floats))
    return [slice(i, min(i + step, B)) for i in range(0, B, step)]


def weight_gradients(g: Sequence[Tensor], x: Tensor) -> Tensor:
    r"""
    The gradients of a linear map's weight, example by example: :math:`\sum_t g_{knt} x_{nt}^\top`.

    :param g: gradients in the outputs, K of shape ``(B, T, out)``.
    :param x: inputs, shape ``(B, T, in)``.
    :return: shape ``(B, K, out, in)``.
    """
    columns = g[0].mT if len(g) == 1 else torch.cat([gk.mT for gk in g], 1)
    return torch.bmm(columns, x).unflatten(1, (len(g), -1))


def squared_rows(g: Sequence[Tensor], x: Tensor) -> tuple[Tensor, Tensor | None]:
    r"""
    The diagonal of the curvature of a linear map: :math:`\sum_{kn} (\sum_t g_{knt} x_{nt}^\top)^2`.

    :param g: gradients in the outputs, K of shape ``(B, T, out)``.
    :param x: inputs, shape ``(B, T, in)``.
    :return: shape ``(out, in)``; and where T = 1 the same for an offset of the outputs, shape ``(out,)``.
    """
    B, T, out = g[0].shape
    if T == 1:
        squares = g[0].square()
        for gk in g[1:]:
            squares.addcmul_(gk, gk)
        squares = squares.squeeze(1)
        return squares.mT @ x.squeeze(1).square(), squares.sum(0)
    total = x.new_zeros(out, x.shape[-1])
    # a few examples at a time, whose gradients stay in the cache
    for part in _chunks(B, len(g) * out * max(T, x.shape[-1]), 2**20):
        total += weight_gradients([gk[part] for gk in g], x[part]).square_().sum((0, 1))
    return total, None


def kronecker_inputs(x: Tensor, sharing: Sharing, present: Tensor | None = None) -> tuple[Tensor, int]:
    r"""
    The sum behind the input factor A.

    :param x: inputs, shape ``(B, T, in)``.
    :param sharing: ``"expand"`` (every row counts) or ``"reduce"`` (rows are averaged within an example).
    :param present: which rows are not zero, bool, shape ``(B, T)``; all by default. The others have no gradient and do
        not count.
    :return: :math:`\sum x x^\top`, shape ``(in, in)``, and the number of terms that A is to be divided by.
    """
    if present is None:
        rows = x.mean(1) if sharing == "reduce" else x.reshape(-1, x.shape[-1])
        return gram(rows), rows.shape[0]
    if sharing == "expand":
        return gram(x.reshape(-1, x.shape[-1])), int(present.sum())
    number = present.sum(1, keepdim=True)
    return gram(x.sum(1) / number.clamp(min=1)), int((number > 0).sum())


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
    matrix = 0.5 * (matrix + matrix.mT)
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # float32 does not always converge where most eigenvalues are zero
        if matrix.dtype == torch.float64:
            raise
        values, vectors = (x.to(matrix.dtype) for x in torch.linalg.eigh(matrix.double()))
    return values.clamp(min=0), vectors


def kronecker_covariance(
    g: Sequence[Tensor], x: Tensor, rotations: tuple[Tensor, Tensor], variances: Tensor
) -> Tensor:
    r"""
    :math:`J P^{-1} J^\top` of a linear map without its Jacobian: with gradients and inputs rotated to independent
    coordinates, :math:`\operatorname{Cov}_{ck} = \sum_o g_{co} g_{ko} \sum_i x_i^2 v_{oi}` where T = 1.

    :param g: gradients in the outputs, M of shape ``(B, T, out)``.
    :param x: inputs, shape ``(B, T, in)``.
    :param rotations: matrices that take gradients and inputs there, shapes ``(out, out)`` and ``(in, in)``.
    :param variances: of the coordinates, shape ``(out, in)``.
    :return: shape ``(B, M, M)``.
    """
    _, T, out = g[0].shape
    if len(g) * out < T:  # fewer products are rotated than inputs
        return _covariance_of_rows(g, x, variances, rotations)
    return independent_covariance([gm @ rotations[0] for gm in g], x @ rotations[1], variances)


def independent_covariance(g: Sequence[Tensor], x: Tensor, variances: Tensor) -> Tensor:
    """
    :func:`kronecker_covariance` in coordinates that are independent already.

    :param g: M of shape ``(B, T, out)``.
    :param x: shape ``(B, T, in)``.
    :param variances: shape ``(out, in)``.
    :return: shape ``(B, M, M)``.
    """
    if x.shape[1] == 1:
        scales = x.squeeze(1).square() @ variances.mT
        rows = torch.cat(tuple(g), 1)
        return torch.bmm(rows * scales.unsqueeze(1), rows.mT)
    return _covariance_of_rows(g, x, variances, None)


def _covariance_of_rows(
    g: Sequence[Tensor], x: Tensor, variances: Tensor, rotations: tuple[Tensor, Tensor] | None
) -> Tensor:
    deviations = variances.sqrt()
    parts = []
    for part in _chunks(x.shape[0], len(g) * max(deviations.numel(), g[0][0].numel()), 2**20):
        rows = weight_gradients([gm[part] for gm in g], x[part])
        if rotations is not None:
            rows = rotations[0].mT @ (rows @ rotations[1])
        rows = (rows * deviations).flatten(2)
        parts.append(torch.bmm(rows, rows.mT))
    return torch.cat(parts)


def dense_covariance(g: Sequence[Tensor], x: Tensor, covariance: Tensor, places: Tensor) -> Tensor:
    r"""
    :func:`kronecker_covariance` of a weight with any covariance, where T = 1:
    :math:`\sum_{op} g_{co} g_{kp}\, x^\top \Sigma_{op} x`.

    :param g: gradients in the outputs, K of shape ``(B, 1, out)``.
    :param x: inputs, shape ``(B, 1, in)``.
    :param covariance: shape ``(q, q)``.
    :param places: where the entries of the weight are in it, shape ``(out, in)``.
    :return: shape ``(B, K, K)``.
    """
    x = x.squeeze(1)
    out = len(places)
    inner = x.new_empty(x.shape[0], out, out)
    for o in range(out):
        # symmetric in the pair of outputs
        rows = covariance.index_select(0, places[o])
        images = x @ rows.index_select(1, places[o:].reshape(-1))
        values = images.unflatten(-1, (out - o, -1)).mul_(x.unsqueeze(1)).sum(-1)
        inner[:, o, o:] = values
        inner[:, o:, o] = values
    stacked = torch.cat(tuple(g), 1)
    return stacked @ inner @ stacked.mT


class MapBlock:
    r"""
    The dense curvature block of one linear map with one row per example, summed over data:
    :math:`\sum_n (\sum_k g_{kn} g_{kn}^\top) \otimes x_n x_n^\top`.

    Both factors are symmetric, so that one triangle of each is enough: a quarter of the operations of a product of
    Jacobians, divided by the number K of columns.

    :param out: how many outputs the map has.
    :param into: how many inputs.
    :param like: gives dtype and device.
    """

    #: inputs whose products with all later inputs are formed together
    WIDTH = 8

    def __init__(self, out: int, into: int, like: Tensor) -> None:
        self.out, self.into = out, into
        self.pairs = torch.triu_indices(out, out, device=like.device)
        self.starts = range(0, into, self.WIDTH)
        self.strips = [
            like.new_zeros(self.pairs.shape[1], (min(i + self.WIDTH, into) - i) * (into - i))
            for i in self.starts
        ]

    def add(self, g: Tensor, x: Tensor) -> None:
        """
        :param g: gradients in the outputs, shape ``(K, B, out)``.
        :param x: inputs, shape ``(B, in)``.
        """
        for part in _chunks(x.shape[0], self.WIDTH * self.into + self.pairs.shape[1], 2**19):
            gp, xp = g[:, part].permute(1, 2, 0), x[part]
            weights = (gp @ gp.mT)[:, self.pairs[0], self.pairs[1]].mT.contiguous()
            for i, strip in zip(self.starts, self.strips, strict=True):
                products = xp[:, i : i + self.WIDTH, None] * xp[:, None, i:]
                strip.addmm_(weights, products.flatten(1))

    def matrix(self) -> Tensor:
        """:return: shape ``(out, in, out, in)``."""
        inner = self.strips[0].new_empty(self.pairs.shape[1], self.into, self.into)
        for i, strip in zip(self.starts, self.strips, strict=True):
            rows = slice(i, min(i + self.WIDTH, self.into))
            strip = strip.unflatten(1, (-1, self.into - i))
            inner[:, rows, i:] = strip
            inner[:, i:, rows] = strip.mT
        result = inner.new_empty(self.out, self.into, self.out, self.into)
        for (o, p), block in zip(self.pairs.mT.tolist(), inner, strict=True):
            result[o, :, p] = block
            result[p, :, o] = block
        return result


def pair_block(gu: Tensor, xu: Tensor, gv: Tensor, xv: Tensor) -> Tensor:
    r"""
    The dense curvature block of two linear maps with one row per example,
    :math:`\sum_n (\sum_k g^u_{kn} {g^v_{kn}}^\top) \otimes x^u_n {x^v_n}^\top`: fewer operations than the product of
    Jacobians by the number K of columns.

    :param gu: shape ``(K, B, out_u)``.
    :param xu: shape ``(B, in_u)``.
    :param gv: shape ``(K, B, out_v)``.
    :param xv: shape ``(B, in_v)``.
    :return: shape ``(out_u, in_u, out_v, in_v)``.
    """
    _, B, out_u = gu.shape
    out_v = gv.shape[-1]
    weights = gu.permute(1, 2, 0) @ gv.movedim(1, 0)  # (B, out_u, out_v)
    result = xu.new_empty(out_u, xu.shape[-1], out_v, xv.shape[-1])
    for o in range(out_u):
        weighted = (weights[:, o].unsqueeze(-1) * xv.unsqueeze(1)).reshape(B, -1)
        result[o] = (xu.mT @ weighted).reshape(result.shape[1:])
    return result
