# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Covariances :math:`J P^{-1} J^\top` of a linearised model, without the Jacobian where the posterior's parts are the
weights of linear maps.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.curvature.dense import FullNormal
from pyro_bnn.curvature.diagonal import DiagonalNormal
from pyro_bnn.curvature.jacobian import DenseBlock, ExampleJacobian, Gradients, LinearBlock
from pyro_bnn.curvature.kronecker import KroneckerNormal
from pyro_bnn.curvature.linear_maps import independent_covariance, kronecker_covariance
from pyro_bnn.distributions.precision_normal import BlockNormal, PrecisionNormal

#: The owner of entries that are fixed, and of those that several parts share.
_FIXED, _SEVERAL = -1, -2


class LinearCovariance:
    r"""
    Covariances of the outputs of a linearised model under one posterior.

    :param posterior: a Gaussian over the packed vector; one that is no :class:`PrecisionNormal` needs a method
        ``quadratic_form``.
    """

    def __init__(self, posterior: Any) -> None:
        self.posterior = posterior
        if not isinstance(posterior, PrecisionNormal):
            return
        everything = torch.arange(posterior.loc.shape[0], device=posterior.loc.device)
        #: independent parts: positions, and the Gaussian over them
        self.parts = posterior.parts if isinstance(posterior, BlockNormal) else [(everything, posterior)]
        #: by entry, the number of its part and its place there
        self.owner, self.place = torch.full_like(everything, _FIXED), torch.zeros_like(everything)
        for i, (index, _) in enumerate(self.parts):
            self.owner[index], self.place[index] = i, everything[: len(index)]
        self._variances = cache(lambda i: self.parts[i][1].variance)

    def elements(self, jacobian: ExampleJacobian, elements: int, *, limit: int = 64) -> Tensor:
        """
        Covariances of the parameters of each element of a site, elements of one example apart.

        :param jacobian: of the outputs, ``elements`` times C per example.
        :param elements: how many elements an example has.
        :param limit: outputs per example up to which all of their covariances are formed at once.
        :return: shape ``(B, elements, C, C)``.
        """
        B, M = jacobian.B, jacobian.M
        C = M // elements
        basis = jacobian.basis()
        if limit >= M:
            joint = self.combinations(jacobian, basis).reshape(B, elements, C, elements, C)
            return joint.diagonal(dim1=1, dim2=3).movedim(-1, 1)
        parts = [self.combinations(jacobian, basis[r * C : (r + 1) * C]) for r in range(elements)]
        return torch.stack(parts, 1)

    def combinations(self, jacobian: ExampleJacobian, cotangents: Tensor) -> Tensor:
        """
        Covariances of linear combinations of each example's outputs.

        :param jacobian: of the outputs.
        :param cotangents: the combinations, shape ``(K, B, M)``.
        :return: shape ``(B, K, K)``.
        """
        K, B, _ = cotangents.shape
        if not isinstance(self.posterior, PrecisionNormal):
            return self.posterior.quadratic_form(jacobian.dense(cotangents).movedim(0, 1))
        passes = [jacobian.gradients(c) for c in cotangents]
        total = cotangents.new_zeros(B, K, K)
        rows: dict[int, Tensor] = {}  # by part, shape (B, K, q)
        done: set[int] = set()
        for block in jacobian.blocks:
            owner = self._owner(block.index)
            if id(block) in done or owner == _FIXED:
                continue
            found = None
            if isinstance(block, LinearBlock) and owner != _SEVERAL:
                found = self._of_map(block, owner, passes)
                if found is None and (offset := self._dense_offset(jacobian, block, owner, K)) is not None:
                    found = self._of_dense_map(block, owner, offset, passes)
                    done.update(map(id, offset))
            if found is None:
                values = torch.stack([block.rows(gs) for gs in passes], 1)
                if owner != _SEVERAL and isinstance(self.parts[owner][1], DiagonalNormal):
                    variances = self._variances(owner)[self.place[block.index.reshape(-1)]]
                    found = (values * variances) @ values.mT
                else:
                    self._add_rows(rows, block.index.reshape(-1), values)
            if found is not None:
                total += found
        if len(jacobian.generic):
            values = torch.einsum("qbm,kbm->bkq", jacobian.columns, cotangents)
            self._add_rows(rows, jacobian.generic, values)
        for i, values in rows.items():
            total += self.parts[i][1].quadratic_form(values)
        return total

    def _owner(self, index: Tensor) -> int:
        """The part that all of some entries belong to."""
        owners = self.owner[index]
        first = int(owners.reshape(-1)[0])
        return first if bool((owners == first).all()) else _SEVERAL

    def _of_map(self, block: LinearBlock, owner: int, passes: list[Gradients]) -> Tensor | None:
        """The covariance that the weight of a linear map gives, where it is formed without the weight's Jacobian."""
        positions, part = self.parts[owner]
        if isinstance(part, DiagonalNormal):
            g = [block.gradients(gs) for gs in passes]
            return independent_covariance(g, block.inputs(), self._variances(owner)[self.place[block.index]])
        if isinstance(part, KroneckerNormal) and torch.equal(positions, block.index.reshape(-1)):
            g = [block.gradients(gs) for gs in passes]
            return kronecker_covariance(g, block.inputs(), part.rotations, part.eigenvalues.reciprocal())
        return None

    def _dense_offset(
        self, jacobian: ExampleJacobian, block: LinearBlock, owner: int, K: int
    ) -> list[DenseBlock] | None:
        """For a map with one row per example that with its offset, if any, is all that uses a dense part, the offset."""
        if not isinstance(self.parts[owner][1], FullNormal) or K <= 2 or not _one_row(block):
            return None
        offset = [jacobian.offsets[id(block)]] if id(block) in jacobian.offsets else []
        if any(self._owner(b.index) != owner for b in offset):
            return None
        others = [b.index for b in jacobian.blocks if all(b is not mine for mine in (block, *offset))]
        shared = any(bool((self.owner[index] == owner).any()) for index in (*others, jacobian.generic))
        return None if shared else offset

    def _of_dense_map(
        self, block: LinearBlock, owner: int, offset: list[DenseBlock], passes: list[Gradients]
    ) -> Tensor:
        r"""
        The covariance of one linear map with one row per example under a dense posterior,
        :math:`\sum_{op} g_{co} g_{kp}\, x^\top \Sigma_{op} x`, shape ``(B, K, K)``.
        """
        x, index = block.inputs()[:, 0], block.index
        for other in offset:
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
            index = torch.cat([index, other.index.unsqueeze(-1)], 1)
        places = self.place[index]
        part: Any = self.parts[owner][1]
        out = index.shape[0]
        inner = x.new_empty(x.shape[0], out, out)
        for o in range(out):
            # symmetric in the pair of outputs
            rows = part.covariance_matrix.index_select(0, places[o])
            images = x @ rows.index_select(1, places[o:].reshape(-1))
            values = images.unflatten(-1, (out - o, -1)).mul_(x.unsqueeze(1)).sum(-1)
            inner[:, o, o:] = values
            inner[:, o:, o] = values
        g = torch.stack([block.gradients(gs)[:, 0] for gs in passes], 1)
        return g @ inner @ g.mT

    def _add_rows(self, rows: dict[int, Tensor], index: Tensor, values: Tensor) -> None:
        """Adds the Jacobian of some entries, shape (B, K, q), to those of the parts that they belong to."""
        owners = self.owner[index]
        for i in owners.unique().tolist():
            positions = self.parts[i][0]
            if i == _FIXED:
                continue
            if i not in rows and torch.equal(index, positions):
                rows[i] = values
                continue
            if i not in rows:
                rows[i] = values.new_zeros(values.shape[:2] + positions.shape)
            mine = owners == i
            rows[i][..., self.place[index[mine]]] += values[..., mine]


def _one_row(block: LinearBlock) -> bool:
    """Whether a weight is used once, with one row per example; recurrent networks use it at every step."""
    (use, *others) = block.uses
    return not others and use.rows_per_example == 1 and len(use.inputs(block.B)[0]) == 1
