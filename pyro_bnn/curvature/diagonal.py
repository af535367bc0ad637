# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A diagonal precision: its sum over data, damped, and the normal distribution it gives."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bnn.curvature.blocks import DenseBlock, LinearBlock
from pyro_bnn.curvature.jacobian import Pulled
from pyro_bnn.curvature.linear_maps import independent_covariance, squared_rows
from pyro_bnn.curvature.parts import Part, Prior, indefinite, lowest_entry, require_finite
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

    @override
    def half_solve(self, x: Tensor) -> Tensor:
        return x * self.precision.rsqrt()

    @override
    def half_solve_transposed(self, x: Tensor) -> Tensor:
        return self.half_solve(x)

    @override
    def multiply(self, x: Tensor) -> Tensor:
        return x * self.precision

    @property
    @override
    def log_det_precision(self) -> Tensor:
        return self.precision.log().sum(dtype=torch.float64)

    @property
    @override
    def smallest_precision(self) -> Tensor:
        return self.precision.min()

    @property
    @override
    def variance(self) -> Tensor:
        return self.precision.reciprocal()

    @override
    def map_covariance(self, g: Sequence[Tensor], x: Tensor, places: Tensor, alone: bool) -> Tensor:
        return independent_covariance(g, x, self.variance[places])

    @override
    def partial_form(self, rows: Tensor, places: Tensor) -> Tensor:
        return (rows * self.variance[places]) @ rows.mT


class DiagonalPart(Part):
    """A diagonal ``curvature`` of shape ``(q,)``; while data are summed, of all p entries."""

    kind = "diagonal"
    curvature: Tensor

    @staticmethod
    @override
    def _zeros(q: int, latent: Tensor) -> Tensor:
        return torch.zeros_like(latent)

    @override
    def add(self, pulled: Pulled) -> None:
        jac, total = pulled.jacobian, self.curvature
        done: set[int] = set()
        for block in jac.blocks:
            if isinstance(block, LinearBlock):
                squares, offset_squares = squared_rows(pulled.outputs(block), block.inputs())
                total[block.index] += squares
                offset = jac.offsets.get(id(block))
                if offset is not None and offset_squares is not None:
                    total[offset.index] += offset_squares
                    done.add(id(offset))
        for block in jac.blocks:
            if isinstance(block, DenseBlock) and id(block) not in done:
                for gradients in pulled.gradients:
                    total[block.index] += block.rows(gradients).square().sum(0)
        if len(jac.generic):
            total[jac.generic] += pulled.generic_rows().square().sum((0, 1))

    @override
    def add_rows(self, rows: Tensor) -> None:
        self.curvature[self.index] += rows.square().sum(0)

    @override
    def add_operator(self, operator: LinearMap, chunk_size: int) -> None:
        for rows, images in self._images(operator, chunk_size):
            self.curvature[self.index[rows]] += images[:, rows].diagonal()

    @override
    def resume(self, earlier: Any) -> None:
        self.curvature[earlier.index] += earlier.curvature

    @override
    def finish(self, prior: Prior) -> "DiagonalPart":
        value = prior(self.index)
        value = value if value.dim() == 1 else value.diagonal()
        return DiagonalPart(index=self.index, prior=value, curvature=self.curvature[self.index])

    @override
    def posterior(self, loc: Tensor, tau: Tensor | None = None) -> PrecisionNormal:
        precision = self.curvature + (self.prior if tau is None else tau * self.prior)
        require_finite(precision)
        if not bool((precision > 0).all()):
            raise indefinite(precision.detach(), "diagonal entries")
        return DiagonalNormal(loc[self.index], precision.to(loc.dtype))

    @override
    def spectrum(self) -> tuple[Tensor, Tensor]:
        self._check_positive("a decomposition relative to the prior")
        return self.curvature / self.prior, self.prior.log().sum()

    @override
    def lowest(self) -> tuple[float, Tensor] | None:
        return lowest_entry(self.prior + self.curvature)
