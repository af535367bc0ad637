# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A diagonal precision: its sum over data, damped, and the normal distribution it gives."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from pyro_bnn.curvature.jacobian import DenseBlock, ExampleJacobian, LinearBlock
from pyro_bnn.curvature.linear_maps import squared_rows
from pyro_bnn.curvature.parts import NotAMinimumError, Part, indefinite
from pyro_bnn.curvature.stream import SiteExamples
from pyro_bnn.curvature.sums import CurvatureSum
from pyro_bnn.distributions.precision_normal import PrecisionNormal
from pyro_bnn.ops.jacobian import LinearMap


class DiagonalNormal(PrecisionNormal):
    r"""
    A Gaussian with a diagonal precision.

    :param Tensor loc: mean, shape ``(p,)``.
    :param Tensor precision: positive, shape ``(p,)``.
    """

    def __init__(self, loc: Tensor, precision: Tensor) -> None:
        super().__init__(loc)
        self.precision = precision

    def half_solve(self, x: Tensor) -> Tensor:
        """See :meth:`PrecisionNormal.half_solve`."""
        return x * self.precision.rsqrt()

    def half_solve_transposed(self, x: Tensor) -> Tensor:
        """See :meth:`PrecisionNormal.half_solve_transposed`."""
        return self.half_solve(x)

    def multiply(self, x: Tensor) -> Tensor:
        """See :meth:`PrecisionNormal.multiply`."""
        return x * self.precision

    @property
    def log_det_precision(self) -> Tensor:
        """See :attr:`PrecisionNormal.log_det_precision`."""
        return self.precision.log().sum(dtype=torch.float64)

    @property
    def smallest_precision(self) -> Tensor:
        """The smallest entry."""
        return self.precision.min()

    @property
    def variance(self) -> Tensor:
        """Marginal variances, shape ``(p,)``."""
        return self.precision.reciprocal()


class DiagonalPart(Part):
    """A diagonal ``curvature`` of shape ``(q,)``."""

    kind = "diagonal"

    def posterior(self, loc: Tensor, tau: Tensor | None = None) -> PrecisionNormal:
        """See :meth:`Part.posterior`."""
        precision = self.tensors["curvature"] + (self.prior if tau is None else tau * self.prior)
        if not torch.isfinite(precision).all():
            raise NotAMinimumError(
                "the curvature has non-finite entries: check the data and the point estimate"
            )
        if not bool((precision > 0).all()):
            raise indefinite(precision.detach(), "diagonal entries")
        return DiagonalNormal(loc[self.index], precision.to(loc.dtype))

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """See :meth:`Part.spectrum`."""
        self._check_positive("a decomposition relative to the prior")
        return self.tensors["curvature"] / self.prior, self.prior.log().sum()


class DiagonalSum(CurvatureSum):
    """The diagonal."""

    def __init__(self, index: Tensor, latent: Tensor) -> None:
        super().__init__(index, latent)
        self.diagonal = torch.zeros_like(latent)

    def tensors(self) -> list[Tensor]:
        """The diagonal."""
        return [self.diagonal]

    def add(self, examples: SiteExamples, cotangents: Iterable[Tensor]) -> None:
        """See :meth:`CurvatureSum.add`."""
        add_diagonal(self.diagonal, examples.jacobian, cotangents)

    def add_operator(self, operator: LinearMap, chunk_size: int) -> None:
        """See :meth:`CurvatureSum.add_operator`."""
        for rows, images in self._columns(operator, chunk_size):
            self.diagonal[self.index[rows]] += images[:, rows].diagonal()

    def resume(self, parts: Sequence[Part]) -> None:
        """See :meth:`CurvatureSum.resume`."""
        (part,) = parts
        self.diagonal[part.index] += part.tensors["curvature"]

    def parts(self, prior: Callable[[Tensor], Tensor]) -> list[Part]:
        """See :meth:`CurvatureSum.parts`."""
        value = prior(self.index)
        value = value if value.dim() == 1 else value.diagonal()
        return [DiagonalPart(index=self.index, prior=value, curvature=self.diagonal[self.index])]


def add_diagonal(total: Tensor, jac: ExampleJacobian, cotangents: Iterable[Tensor]) -> None:
    """
    Adds the diagonal of a site's curvature.

    :param total: shape ``(p,)``, changed in place.
    :param jac: the site's Jacobian.
    :param cotangents: chunks of shape ``(K, B, M)``.
    """
    for chunk in cotangents:
        passes = [jac.gradients(c) for c in chunk]
        done: set[int] = set()
        for block in jac.blocks:
            if isinstance(block, LinearBlock):
                squares, offset_squares = squared_rows([block.gradients(gs) for gs in passes], block.inputs())
                total[block.index] += squares
                offset = jac.offsets.get(id(block))
                if offset is not None and offset_squares is not None:
                    total[offset.index] += offset_squares
                    done.add(id(offset))
        for block in jac.blocks:
            if isinstance(block, DenseBlock) and id(block) not in done:
                for gs in passes:
                    total[block.index] += block.rows(gs).square().sum(0)
        if len(jac.generic):
            rows = torch.einsum("qbm,kbm->kbq", jac.columns, chunk)
            total[jac.generic] += rows.square().sum((0, 1))
