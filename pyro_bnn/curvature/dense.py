# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Dense blocks of a precision: their sum over data, damped, and the normal distribution they give."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.curvature.jacobian import ExampleJacobian, LinearBlock
from pyro_bnn.curvature.linear_maps import MapBlock, pair_block
from pyro_bnn.curvature.parts import NotAMinimumError, Part, indefinite
from pyro_bnn.curvature.stream import SiteExamples
from pyro_bnn.curvature.sums import CurvatureSum
from pyro_bnn.distributions.precision_normal import PrecisionNormal
from pyro_bnn.ops.jacobian import LinearMap


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

    def half_solve(self, x: Tensor) -> Tensor:
        """See :meth:`PrecisionNormal.half_solve`; here R = L⁻ᵀ."""
        flat = x.reshape(-1, x.shape[-1])
        solved = torch.linalg.solve_triangular(self.cholesky, flat, upper=False, left=False)
        return solved.reshape(x.shape)

    def half_solve_transposed(self, x: Tensor) -> Tensor:
        """See :meth:`PrecisionNormal.half_solve_transposed`."""
        flat = x.reshape(-1, x.shape[-1])
        solved = torch.linalg.solve_triangular(self.cholesky, flat.mT, upper=False)
        return solved.mT.reshape(x.shape)

    def multiply(self, x: Tensor) -> Tensor:
        """See :meth:`PrecisionNormal.multiply`."""
        return x @ self.precision

    @property
    def smallest_precision(self) -> Tensor:
        """See :attr:`PrecisionNormal.smallest_precision`; exact where p is small."""
        if self.loc.shape[0] <= 256:
            return torch.linalg.eigvalsh(self.precision.detach())[0]
        return super().smallest_precision

    @property
    def log_det_precision(self) -> Tensor:
        """See :attr:`PrecisionNormal.log_det_precision`."""
        return 2 * self.cholesky.diagonal().log().sum(dtype=torch.float64)

    @property
    def variance(self) -> Tensor:
        """Marginal variances, shape ``(p,)``."""
        return torch.cholesky_inverse(self.cholesky).diagonal()

    @property
    def covariance_matrix(self) -> Tensor:
        """The covariance, shape ``(p, p)``; kept after the first call."""
        if self._covariance is None:
            self._covariance = torch.cholesky_inverse(self.cholesky)
        return self._covariance


def _whiten(matrix: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    if prior.dim() == 1:
        scale = prior.rsqrt()
        return matrix * scale * scale.unsqueeze(-1), prior.log().sum()
    factor = torch.linalg.cholesky(prior)
    half = torch.linalg.solve_triangular(factor, matrix, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    return whitened, 2 * factor.diagonal().log().sum()


class DensePart(Part):
    """A dense matrix ``curvature`` of shape ``(q, q)``."""

    kind = "dense"

    def matrix(self, tau: Tensor | None = None) -> Tensor:
        """
        :param tau: see :meth:`Part.posterior`.
        :return: the precision, shape ``(q, q)``.
        """
        prior = self.prior
        if prior.dim() == 1:
            return self.tensors["curvature"] + torch.diag(prior if tau is None else tau * prior)
        if tau is not None:
            root = tau.sqrt()
            prior = prior * (tau if tau.dim() == 0 else root * root.unsqueeze(-1))
        return self.tensors["curvature"] + prior

    def posterior(self, loc: Tensor, tau: Tensor | None = None) -> PrecisionNormal:
        """See :meth:`Part.posterior`."""
        matrix = self.matrix(tau)
        if not torch.isfinite(matrix).all():
            raise NotAMinimumError(
                "the curvature has non-finite entries: check the data and the point estimate"
            )
        factor, info = torch.linalg.cholesky_ex(matrix)
        if info != 0:
            raise indefinite(torch.linalg.eigvalsh(matrix.detach()), "eigenvalues")
        return FullNormal(loc[self.index], matrix.to(loc.dtype), cholesky=factor.to(loc.dtype))

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """See :meth:`Part.spectrum`."""
        self._check_positive("a decomposition relative to the prior")
        whitened, log_det = _whiten(self.tensors["curvature"], self.prior)
        return torch.linalg.eigvalsh(whitened), log_det


class DenseSum(CurvatureSum):
    """A dense matrix over all the entries."""

    def __init__(self, index: Tensor, latent: Tensor) -> None:
        super().__init__(index, latent)
        self.matrix = latent.new_zeros(len(index), len(index))
        self._maps: dict[Any, tuple[Tensor, MapBlock]] = {}

    def tensors(self) -> list[Tensor]:
        """The matrix."""
        for key in list(self._maps):
            self._settle(key)
        return [self.matrix]

    def add(self, examples: SiteExamples, cotangents: Iterable[Tensor]) -> None:
        """See :meth:`CurvatureSum.add`."""
        jac = examples.jacobian
        for chunk in cotangents:
            if len(chunk) > 2 and self._add_pairs(jac, chunk):
                continue
            # rows are formed for a few cotangents at a time
            step = max(1, 2**25 // max(1, jac.B * len(self.index)))
            for some in chunk.split(step):
                rows = self.latent.new_zeros(len(some) * jac.B, len(self.index))
                for index, part in jac.rows(some):
                    place = self.place[index]
                    keep = place >= 0
                    rows[:, place[keep]] = part.reshape(len(rows), -1)[:, keep].to(rows.dtype)
                self.matrix.addmm_(rows.mT, rows)

    def _add_pairs(self, jac: ExampleJacobian, cotangents: Tensor) -> bool:
        """Pairs of maps with one row per example: K times fewer operations than a product of Jacobians."""
        maps: list[tuple[Tensor, Tensor, Tensor]] = []
        passes = [jac.gradients(c) for c in cotangents]
        joined = {id(offset) for offset in jac.offsets.values()}
        for block in jac.blocks:
            if isinstance(block, LinearBlock):
                x, index = block.inputs(), block.index
                if x.shape[1] != 1:
                    return False
                x = x[:, 0]
                if (offset := jac.offsets.get(id(block))) is not None:
                    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
                    index = torch.cat([index, offset.index.unsqueeze(-1)], 1)
                g = torch.stack([block.gradients(gs)[:, 0] for gs in passes])
                maps.append((index, g, x))
            elif id(block) not in joined:
                g = torch.stack([block.rows(gs) for gs in passes])
                maps.append((block.index.unsqueeze(-1), g, g.new_ones(jac.B, 1)))
        if len(jac.generic):
            g = torch.einsum("qbm,kbm->kbq", jac.columns, cotangents)
            maps.append((jac.generic.unsqueeze(-1), g, g.new_ones(jac.B, 1)))
        if any(bool((self.place[index] < 0).any()) for index, _, _ in maps):
            return False
        maps = [(index, g.to(self.matrix.dtype), x.to(self.matrix.dtype)) for index, g, x in maps]
        for i, (iu, gu, xu) in enumerate(maps):
            self._map_block(iu).add(gu, xu)
            for iv, gv, xv in maps[i + 1 :]:
                block_ = pair_block(gu, xu, gv, xv).reshape(iu.numel(), iv.numel())
                rows, columns = self.place[iu].reshape(-1), self.place[iv].reshape(-1)
                self.matrix[rows.unsqueeze(-1), columns] += block_
                self.matrix[columns.unsqueeze(-1), rows] += block_.mT
        return True

    def _map_block(self, index: Tensor) -> MapBlock:
        key = (*index.shape, int(index[0, 0]), int(index[0, -1]), int(index[-1, -1]))
        found = self._maps.get(key)
        if found is None or not torch.equal(found[0], index):
            self._settle(key)
            found = self._maps[key] = (index, MapBlock(index.shape[0], index.shape[1], self.latent))
        return found[1]

    def _settle(self, key: Any) -> None:
        """Adds a map's block, which was summed in a form of its own, to the matrix."""
        if key in self._maps:
            index, block = self._maps.pop(key)
            place = self.place[index].reshape(-1)
            self.matrix[place.unsqueeze(-1), place] += block.matrix().reshape(len(place), -1)

    def add_operator(self, operator: LinearMap, chunk_size: int) -> None:
        """See :meth:`CurvatureSum.add_operator`."""
        for rows, images in self._columns(operator, chunk_size):
            self.matrix[rows] += images.to(self.matrix.dtype)

    def resume(self, parts: Sequence[Part]) -> None:
        """See :meth:`CurvatureSum.resume`."""
        (part,) = parts
        self.matrix += part.tensors["curvature"]

    def parts(self, prior: Callable[[Tensor], Tensor]) -> list[Part]:
        """See :meth:`CurvatureSum.parts`."""
        (matrix,) = self.tensors()
        matrix = 0.5 * (matrix + matrix.mT)
        return [DensePart(index=self.index, prior=prior(self.index), curvature=matrix)]


#: Entries up to which a part that has no Kronecker form is dense rather than diagonal.
DENSE_LIMIT = 1024


class BlockSum(CurvatureSum):
    """
    A dense matrix over each of several disjoint groups of entries.

    :param groups: positions of each group.
    :param latent: the packed vector.
    """

    def __init__(self, groups: list[Tensor], latent: Tensor) -> None:
        super().__init__(torch.cat(groups), latent)
        self.sums = [DenseSum(index, latent) for index in groups]

    def tensors(self) -> list[Tensor]:
        """The blocks."""
        return [part.matrix for part in self.sums]

    def add(self, examples: SiteExamples, cotangents: Iterable[Tensor]) -> None:
        """See :meth:`CurvatureSum.add`."""
        jac = examples.jacobian
        for chunk in cotangents:
            step = max(1, 2**25 // max(1, jac.B * len(self.index)))
            for some in chunk.split(step):
                rows = self.latent.new_zeros(len(some) * jac.B, len(self.latent))
                for index, part in jac.rows(some):
                    rows[:, index] = part.reshape(len(rows), -1).to(rows.dtype)
                for block in self.sums:
                    mine = rows[:, block.index]
                    block.matrix.addmm_(mine.mT, mine)

    def add_operator(self, operator: LinearMap, chunk_size: int) -> None:
        """See :meth:`CurvatureSum.add_operator`."""
        for block in self.sums:
            block.add_operator(operator, chunk_size)

    def resume(self, parts: Sequence[Part]) -> None:
        """See :meth:`CurvatureSum.resume`."""
        for block, part in zip(self.sums, parts, strict=True):
            block.resume([part])

    def parts(self, prior: Callable[[Tensor], Tensor]) -> list[Part]:
        """See :meth:`CurvatureSum.parts`."""
        return [part for block in self.sums for part in block.parts(prior)]
