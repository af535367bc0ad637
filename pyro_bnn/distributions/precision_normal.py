# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Gaussians over a packed latent vector, parameterised by their precision."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.types import _size

from pyro_bnn.ops.krylov import largest_eigenvalue


class PrecisionNormal(TorchDistribution):
    r"""
    A Gaussian :math:`N(\mu, P^{-1})` over a vector, in one of several representations of :math:`P`.

    Subclasses say how to apply :math:`P^{-1/2}` and :math:`P^{1/2}`; everything else follows:
    ``rsample``, ``log_prob``, ``entropy``, ``variance`` and quadratic forms :math:`J P^{-1} J^\top`.

    :param Tensor loc: mean, shape ``(p,)``.
    """

    support = constraints.real_vector
    has_rsample = True
    arg_constraints: dict[str, constraints.Constraint] = {"loc": constraints.real_vector}  # noqa: RUF012

    def __init__(self, loc: Tensor) -> None:
        self.loc = loc
        super().__init__(torch.Size(), loc.shape, validate_args=False)

    def expand(self, batch_shape: _size, _instance: Any = None) -> TorchDistribution:
        """
        :param batch_shape: the new batch shape.
        :return: a lazily expanded distribution.
        """
        return super().expand(torch.Size(batch_shape))

    def half_solve(self, x: Tensor) -> Tensor:
        r"""
        Applies :math:`R` with :math:`R R^\top = P^{-1}`.

        :param x: shape ``(..., p)``.
        :return: :math:`R x`, shape ``(..., p)``.
        """
        raise NotImplementedError

    def half_solve_transposed(self, x: Tensor) -> Tensor:
        r"""
        Applies :math:`R^\top`, so that :math:`|R^\top g|^2 = g^\top P^{-1} g`.

        :param x: shape ``(..., p)``.
        :return: :math:`R^\top x`, shape ``(..., p)``.
        """
        raise NotImplementedError

    def multiply(self, x: Tensor) -> Tensor:
        """
        :param x: shape ``(..., p)``.
        :return: :math:`P x`, shape ``(..., p)``.
        """
        raise NotImplementedError

    @property
    def log_det_precision(self) -> Tensor:
        r""":math:`\log\det P`, a scalar, summed in float64."""
        raise NotImplementedError

    @property
    def smallest_precision(self) -> Tensor:
        """The smallest eigenvalue of P, by power iteration where it is not known."""
        inverse = largest_eigenvalue(
            lambda v: self.half_solve(self.half_solve_transposed(v)), self.loc, tolerance=1e-4
        )
        return inverse.reciprocal()

    @property
    def rank(self) -> int:
        """How many coordinates are random; p unless some are fixed."""
        return self.loc.shape[0]

    @property
    def mean(self) -> Tensor:
        """The mean, shape ``(p,)``."""
        return self.loc

    def rsample(self, sample_shape: _size = (), generator: torch.Generator | None = None) -> Tensor:
        """
        :param sample_shape: leading shape of the draws.
        :param generator: source of random numbers; torch's default if ``None``.
        :return: draws, shape ``sample_shape + (p,)``.
        """
        noise = torch.randn(
            torch.Size(sample_shape) + self.loc.shape,
            dtype=self.loc.dtype,
            device=self.loc.device,
            generator=generator,
        )
        return self.loc + self.half_solve(noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """
        :param value: shape ``(..., p)``.
        :return: log densities, shape ``(...)``.
        """
        difference = value - self.loc
        quadratic = (difference * self.multiply(difference)).sum(-1)
        return 0.5 * (self.log_det_precision.to(quadratic) - quadratic - self.rank * math.log(2 * math.pi))

    def entropy(self) -> Tensor:
        r""":math:`\frac p2 (1 + \log 2\pi) - \frac12\log\det P`, a scalar."""
        return 0.5 * (self.rank * (1 + math.log(2 * math.pi)) - self.log_det_precision)

    def quadratic_form(self, rows: Tensor) -> Tensor:
        r"""
        Covariances of linear functionals: :math:`J P^{-1} J^\top`.

        :param rows: the functionals, shape ``(..., C, p)``.
        :return: their covariance within each batch entry, shape ``(..., C, C)``.
        """
        half = self.half_solve_transposed(rows)
        return half @ half.mT


class BlockNormal(PrecisionNormal):
    """
    Independent Gaussians over parts of a vector; what no part covers is fixed at its mean.

    Densities are with respect to the covered coordinates: :meth:`log_prob` ignores the others.

    :param Tensor loc: mean, shape ``(p,)``.
    :param parts: pairs of disjoint positions, shape ``(q,)``, and the Gaussian over them.
    """

    def __init__(self, loc: Tensor, parts: Sequence[tuple[Tensor, PrecisionNormal]]) -> None:
        super().__init__(loc)
        self.parts = list(parts)

    @property
    def rank(self) -> int:
        """How many coordinates are random."""
        return sum(len(index) for index, _ in self.parts)

    def _each(self, x: Tensor, method: str) -> Tensor:
        total = torch.zeros_like(x)
        for index, part in self.parts:
            total[..., index] = getattr(part, method)(x[..., index])
        return total

    def half_solve(self, x: Tensor) -> Tensor:
        """See :meth:`PrecisionNormal.half_solve`."""
        return self._each(x, "half_solve")

    def half_solve_transposed(self, x: Tensor) -> Tensor:
        """See :meth:`PrecisionNormal.half_solve_transposed`."""
        return self._each(x, "half_solve_transposed")

    def multiply(self, x: Tensor) -> Tensor:
        """See :meth:`PrecisionNormal.multiply`."""
        return self._each(x, "multiply")

    @property
    def log_det_precision(self) -> Tensor:
        """See :attr:`PrecisionNormal.log_det_precision`; over the covered coordinates."""
        return sum((part.log_det_precision for _, part in self.parts), self.loc.new_zeros(()))

    @property
    def smallest_precision(self) -> Tensor:
        """The smallest of the parts'."""
        return torch.stack([part.smallest_precision for _, part in self.parts]).min()

    @property
    def variance(self) -> Tensor:
        """Marginal variances, shape ``(p,)``; zero where fixed."""
        total = torch.zeros_like(self.loc)
        for index, part in self.parts:
            total[index] = part.variance
        return total
