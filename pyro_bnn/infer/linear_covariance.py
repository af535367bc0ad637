# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Covariances :math:`J P^{-1} J^\top` of a linearised model, without the Jacobian where the posterior's parts are the
weights of linear maps.
"""

from typing import Any

import torch
from torch import Tensor

from pyro_bnn.distributions.precision_normal import DiagonalNormal, FullNormal, PrecisionNormal
from pyro_bnn.distributions.structured_normal import BlockNormal, KroneckerNormal
from pyro_bnn.ops.examples import Block, DenseBlock, ExampleJacobian, LinearBlock
from pyro_bnn.ops.kronecker import independent_covariance, kronecker_covariance


def posterior_parts(posterior: PrecisionNormal) -> list[tuple[Tensor, PrecisionNormal]]:
    """
    :param posterior: a Gaussian over the packed vector.
    :return: its independent parts: positions, and the Gaussian over them.
    """
    if isinstance(posterior, BlockNormal):
        return posterior.parts
    return [(torch.arange(posterior.loc.shape[0], device=posterior.loc.device), posterior)]


def output_covariance(posterior: Any, jacobian: ExampleJacobian, cotangents: Tensor) -> Tensor:
    r"""
    Covariances of linear combinations of each example's outputs.

    :param posterior: a Gaussian over the packed vector; one that is no :class:`PrecisionNormal` needs a method
        ``quadratic_form``.
    :param jacobian: of the outputs.
    :param cotangents: the combinations, shape ``(K, B, M)``.
    :return: shape ``(B, K, K)``.
    """
    K, B, _ = cotangents.shape
    total = cotangents.new_zeros(B, K, K)
    if not isinstance(posterior, PrecisionNormal):
        return posterior.quadratic_form(jacobian.dense(cotangents).movedim(0, 1))
    parts = posterior_parts(posterior)
    owner = torch.full_like(posterior.loc, -1, dtype=torch.long)
    for i, (index, _) in enumerate(parts):
        owner[index] = i
    passes = [jacobian.gradients(c) for c in cotangents]
    rows: dict[int, Tensor] = {}

    def scatter(index: Tensor, values: Tensor) -> None:
        for i in owner[index].unique().tolist():
            if i < 0:
                continue
            positions = parts[i][0]
            if i not in rows:
                rows[i] = values.new_zeros(K, B, len(positions))
            place = torch.full_like(owner, -1)
            place[positions] = torch.arange(len(positions), device=place.device)
            keep = place[index] >= 0
            rows[i][..., place[index][keep]] += values[..., keep]

    done: set[int] = set()
    for block in jacobian.blocks:
        if id(block) in done:
            continue
        first = int(owner[block.index.reshape(-1)[0]])
        part = parts[first][1] if first >= 0 else None
        if isinstance(block, LinearBlock) and bool((owner[block.index] == first).all()):
            if part is None:
                continue
            if isinstance(part, DiagonalNormal):
                g = [block.gradients(gs) for gs in passes]
                variances = (
                    posterior.variance[block.index] if len(parts) == 1 else _at(part, parts[first][0], block)
                )
                total += independent_covariance(g, block.inputs(), variances)
                continue
            if isinstance(part, KroneckerNormal) and torch.equal(parts[first][0], block.index.reshape(-1)):
                g = [block.gradients(gs) for gs in passes]
                variances = part.eigenvalues.reciprocal()
                total += kronecker_covariance(g, block.inputs(), part.rotations, variances)
                continue
        part_is_plain = isinstance(part, FullNormal) and bool((owner[block.index] == first).all())
        offset = jacobian.offsets.get(id(block))
        if isinstance(block, LinearBlock) and part_is_plain and K > 2 and _one_row(block):
            mine = [b for b in jacobian.blocks if bool((owner[b.index] == first).any())]
            whole = not bool((owner[jacobian.generic] == first).any()) and (
                offset is None or bool((owner[offset.index] == first).all())
            )
            if whole and len(mine) == 1 + (offset is not None):
                single = torch.stack([block.gradients(gs)[:, 0] for gs in passes])
                total += _dense_map(part, parts[first][0], block, offset, single)
                done.add(id(offset))
                continue
        rows_here = torch.stack([block.rows(gs) for gs in passes])
        if isinstance(part, DiagonalNormal) and bool((owner[block.index] == first).all()):
            variances = _at(part, parts[first][0], block)
            scaled = (rows_here * variances.reshape(-1)).movedim(0, 1)
            total += scaled @ rows_here.movedim(0, 1).mT
            continue
        scatter(block.index.reshape(-1), rows_here)
    if len(jacobian.generic):
        scatter(jacobian.generic, torch.einsum("qbm,kbm->kbq", jacobian.columns, cotangents))
    for i, values in rows.items():
        total += parts[i][1].quadratic_form(values.movedim(0, 1))
    return total


def _one_row(block: LinearBlock) -> bool:
    """Whether a weight is used once, with one row per example; recurrent networks use it at every step."""
    (use, *others) = block.uses
    return not others and use.rows_per_example == 1 and len(use.inputs(block.B)[0]) == 1


def _places(positions: Tensor, index: Tensor) -> Tensor:
    """Where the entries of ``index`` are in ``positions``, which holds all of them."""
    order = positions.argsort()
    return order[torch.searchsorted(positions[order], index.reshape(-1))].reshape(index.shape)


def _at(part: DiagonalNormal, positions: Tensor, block: Block) -> Tensor:
    """Variances of a block's entries within a larger diagonal part."""
    return part.variance[_places(positions, block.index)]


def _dense_map(
    part: Any, positions: Tensor, block: LinearBlock, offset: DenseBlock | None, g: Tensor
) -> Tensor:
    r"""
    The covariance of one linear map with one row per example under a dense posterior,
    :math:`\sum_{op} g_{co} g_{kp}\, x^\top \Sigma_{op} x`.

    :param part: the Gaussian.
    :param positions: of its entries.
    :param block: the map.
    :param offset: its offset.
    :param g: gradients in its outputs, shape ``(K, B, out)``.
    :return: shape ``(B, K, K)``.
    """
    x, index = block.inputs()[:, 0], block.index
    if offset is not None:
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        index = torch.cat([index, offset.index.unsqueeze(-1)], 1)
    places = _places(positions, index)
    covariance = part.covariance_matrix
    out = index.shape[0]
    inner = x.new_empty(x.shape[0], out, out)
    for o in range(out):
        # symmetric in the pair of outputs
        block_ = covariance[places[o]][:, places[o:].reshape(-1)]
        images = (x @ block_).unflatten(-1, (out - o, -1))
        values = (images @ x.unsqueeze(-1)).squeeze(-1)
        inner[:, o, o:] = values
        inner[:, o:, o] = values
    g = g.movedim(0, 1)
    return g @ inner @ g.mT


def element_covariance(
    posterior: Any,
    jacobian: ExampleJacobian,
    elements: int,
    *,
    limit: int = 64,
) -> Tensor:
    """
    Covariances of the parameters of each element of a site, elements of one example apart.

    :param posterior: a Gaussian over the packed vector.
    :param jacobian: of the outputs, ``elements`` times C per example.
    :param elements: how many elements an example has.
    :param limit: outputs per example up to which all of their covariances are formed at once.
    :return: shape ``(B, elements, C, C)``.
    """
    B, M = jacobian.B, jacobian.M
    C = M // elements
    basis = jacobian.basis()
    if limit >= M:
        joint = output_covariance(posterior, jacobian, basis)
        joint = joint.reshape(B, elements, C, elements, C)
        return joint.diagonal(dim1=1, dim2=3).movedim(-1, 1)
    parts = [output_covariance(posterior, jacobian, basis[r * C : (r + 1) * C]) for r in range(elements)]
    return torch.stack(parts, 1)
