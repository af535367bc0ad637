# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Dense blocks of a precision: their sum over data, damped, and the normal distribution they give."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bnn.curvature.blocks import Block, LinearBlock
from pyro_bnn.curvature.jacobian import Pulled
from pyro_bnn.curvature.linear_maps import MapBlock, dense_covariance, pair_block
from pyro_bnn.curvature.parts import Part, Prior, indefinite, lowest_pair, require_finite
from pyro_bnn.distributions.precision_normal import PrecisionNormal
from pyro_bnn.ops.jacobian import LinearMap

#: Entries up to which a part that has no Kronecker form is dense rather than diagonal.
DENSE_LIMIT = 1024

#: Positions (out, in) of a linear map with one row per example, gradients (K, B, out) and inputs (B, in).
_Map = tuple[Tensor, Tensor, Tensor]


class FullNormal(PrecisionNormal):
    r"""
    A Gaussian with a dense precision matrix.

    :param Tensor loc: mean, shape ``(p,)``.
    :param Tensor precision: symmetric positive definite, shape ``(p, p)``.
    :param Tensor cholesky: its lower Cholesky factor, where known.
    :raises torch.linalg.LinAlgError: if ``precision`` is not positive definite.

    Example::

        >>> d = FullNormal(torch.zeros(2), torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> d.variance
        tensor([0.6667, 0.6667])
    """

    def __init__(self, loc: Tensor, precision: Tensor, *, cholesky: Tensor | None = None) -> None:
        super().__init__(loc)
        self.precision = precision
        self.cholesky = torch.linalg.cholesky(precision) if cholesky is None else cholesky
        self._covariance: Tensor | None = None

    @override
    def half_solve(self, x: Tensor) -> Tensor:  # R = L⁻ᵀ
        flat = x.reshape(-1, x.shape[-1])
        solved = torch.linalg.solve_triangular(self.cholesky, flat, upper=False, left=False)
        return solved.reshape(x.shape)

    @override
    def half_solve_transposed(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return torch.linalg.solve_triangular(self.cholesky, flat.mT, upper=False).mT.reshape(x.shape)

    @override
    def multiply(self, x: Tensor) -> Tensor:
        return x @ self.precision

    @property
    @override
    def smallest_precision(self) -> Tensor:
        if self.loc.shape[0] <= 256:
            return torch.linalg.eigvalsh(self.precision.detach())[0]
        return super().smallest_precision

    @property
    @override
    def log_det_precision(self) -> Tensor:
        return 2 * self.cholesky.diagonal().log().sum(dtype=torch.float64)

    @property
    @override
    def variance(self) -> Tensor:
        return torch.cholesky_inverse(self.cholesky).diagonal()

    @property
    def covariance_matrix(self) -> Tensor:
        """The covariance, shape ``(p, p)``; kept after the first call."""
        if self._covariance is None:
            self._covariance = torch.cholesky_inverse(self.cholesky)
        return self._covariance

    @override
    def map_covariance(self, g: Sequence[Tensor], x: Tensor, places: Tensor, alone: bool) -> Tensor | None:
        if not alone or x.shape[1] != 1 or len(g) <= 2:
            return None
        return dense_covariance(g, x, self.covariance_matrix, places)

    def pivots(self) -> Tensor:
        """The reciprocal variance of each entry given those before it, relative to that given all, shape ``(p,)``."""
        return self.cholesky.detach().diagonal().square() / self.precision.detach().diagonal()

    @override
    def condition_number(self, *, to_prior: bool = False) -> float:
        return float(self.pivots().reciprocal().max())


class DensePart(Part):
    """A dense matrix ``curvature`` of shape ``(q, q)``."""

    kind = "dense"
    curvature: Tensor

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__(**tensors)
        self._maps: dict[Any, tuple[Tensor, MapBlock]] = {}

    # ------------------------------------------------------------------ sum

    @staticmethod
    @override
    def _zeros(q: int, latent: Tensor) -> Tensor:
        return latent.new_zeros(q, q)

    @override
    def add(self, pulled: Pulled) -> None:
        maps = self._find_maps(pulled) if len(pulled) > 2 else None
        if maps is not None:
            self._add_maps(maps)
            return
        # rows are formed for a few cotangents at a time
        for some in pulled.split(max(1, 2**25 // max(1, pulled.jacobian.B * len(self.index)))):
            self.add_rows(some.placed_rows(self.place, len(self.index)))

    @override
    def add_rows(self, rows: Tensor) -> None:
        rows = rows.to(self.curvature.dtype)
        self.curvature.addmm_(rows.mT, rows)

    def _find_maps(self, pulled: Pulled) -> list[_Map] | None:
        """All that uses the part as maps with one row per example, if it is that."""
        jac, found = pulled.jacobian, []
        inside = {id(block): self._covers(block) for block in jac.blocks}
        if None in inside.values():
            return None
        offsets = {key: block for key, block in jac.offsets.items() if inside[key] and inside[id(block)]}
        joined = {id(offset) for offset in offsets.values()}
        for block in jac.blocks:
            if not inside[id(block)] or id(block) in joined:
                continue
            if isinstance(block, LinearBlock):
                index, x = block.with_offset(offsets.get(id(block)))
                if x.shape[1] != 1:
                    return None
                found.append((index, torch.stack(pulled.outputs(block)).squeeze(2), x.squeeze(1)))
            else:
                found.append(_as_map(block.index, pulled.rows(block)))
        mine = self.place[jac.generic] >= 0
        if bool(mine.any()):
            found.append(_as_map(jac.generic[mine], pulled.generic_rows()[..., mine]))
        return [(i, g.to(self.curvature.dtype), x.to(self.curvature.dtype)) for i, g, x in found]

    def _covers(self, block: Block) -> bool | None:
        """Whether all entries of a block belong to the part; ``None`` if only some do."""
        inside = self.place[block.index] >= 0
        return True if bool(inside.all()) else None if bool(inside.any()) else False

    def _add_maps(self, maps: list[_Map]) -> None:
        """Pairs of maps with one row per example: K times fewer operations than a product of Jacobians."""
        for i, (iu, gu, xu) in enumerate(maps):
            self._map_block(iu).add(gu, xu)
            for iv, gv, xv in maps[i + 1 :]:
                block = pair_block(gu, xu, gv, xv).reshape(iu.numel(), iv.numel())
                rows, columns = self.place[iu].reshape(-1), self.place[iv].reshape(-1)
                self.curvature[rows.unsqueeze(-1), columns] += block
                self.curvature[columns.unsqueeze(-1), rows] += block.mT

    def _map_block(self, index: Tensor) -> MapBlock:
        key = (*index.shape, int(index[0, 0]), int(index[0, -1]), int(index[-1, -1]))
        found = self._maps.get(key)
        if found is None or not torch.equal(found[0], index):
            self._settle(key)
            found = self._maps[key] = (index, MapBlock(index.shape[0], index.shape[1], self.curvature))
        return found[1]

    def _settle(self, key: Any) -> None:
        """Adds a map's block, which was summed in a form of its own, to the matrix."""
        if key in self._maps:
            index, block = self._maps.pop(key)
            place = self.place[index].reshape(-1)
            self.curvature[place.unsqueeze(-1), place] += block.matrix().reshape(len(place), -1)

    @override
    def add_operator(self, operator: LinearMap, chunk_size: int) -> None:
        for rows, images in self._images(operator, chunk_size):
            self.curvature[rows] += images.to(self.curvature.dtype)

    @override
    def sums(self) -> list[Tensor]:
        for key in list(self._maps):
            self._settle(key)
        return [self.curvature]

    @override
    def resume(self, earlier: Any) -> None:
        self.curvature += earlier.curvature

    @override
    def finish(self, prior: Prior) -> "DensePart":
        (matrix,) = self.sums()
        return DensePart(index=self.index, prior=prior(self.index), curvature=0.5 * (matrix + matrix.mT))

    # ------------------------------------------------------------------ damp

    def matrix(self, tau: Tensor | None = None) -> Tensor:
        """The precision, shape ``(q, q)``; see :meth:`Part.posterior`."""
        prior = self.prior
        if prior.dim() == 1:
            return self.curvature + torch.diag(prior if tau is None else tau * prior)
        if tau is not None:
            root = tau.sqrt()
            prior = prior * (tau if tau.dim() == 0 else root * root.unsqueeze(-1))
        return self.curvature + prior

    @override
    def posterior(self, loc: Tensor, tau: Tensor | None = None) -> PrecisionNormal:
        matrix = self.matrix(tau)
        require_finite(matrix)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if info != 0:
            raise indefinite(torch.linalg.eigvalsh(matrix.detach()), "eigenvalues")
        return FullNormal(loc[self.index], matrix.to(loc.dtype), cholesky=factor.to(loc.dtype))

    @override
    def spectrum(self) -> tuple[Tensor, Tensor]:
        self._check_positive("a decomposition relative to the prior")
        whitened, log_det = _whiten(self.curvature, self.prior)
        return torch.linalg.eigvalsh(whitened), log_det

    @override
    def lowest(self) -> tuple[float, Tensor] | None:
        matrix = self.matrix().detach()
        wrong = ~torch.isfinite(matrix)
        return (float("-inf"), wrong.any(-1).to(matrix)) if bool(wrong.any()) else lowest_pair(matrix)


def _as_map(index: Tensor, rows: Tensor) -> _Map:
    """Entries ``(q,)`` with their Jacobian ``(K, B, q)`` as a map whose only input is 1."""
    return index.unsqueeze(-1), rows, rows.new_ones(rows.shape[1], 1)


def _whiten(matrix: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    if prior.dim() == 1:
        scale = prior.rsqrt()
        return matrix * scale * scale.unsqueeze(-1), prior.log().sum()
    factor = torch.linalg.cholesky(prior)
    half = torch.linalg.solve_triangular(factor, matrix, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    return whitened, 2 * factor.diagonal().log().sum()
