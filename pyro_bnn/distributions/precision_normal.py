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
from typing_extensions import override

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

    def condition_number(self, *, to_prior: bool = False) -> float:
        """
        An estimate of the condition number of P, at least 1, in units of the scales of its coordinates: for a dense matrix the
        largest ratio of a variance's reciprocal given all earlier coordinates to that given nothing, for the other structures
        that of the eigenvalues relative to the prior; for low rank, if ``to_prior``, the ratio to the prior itself, of which a
        posterior variance is a difference.
        """
        return 1.0

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
        shape = torch.Size(sample_shape) + self.loc.shape
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device, generator=generator)
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

    def partial_form(self, rows: Tensor, places: Tensor) -> Tensor | None:
        """
        :meth:`quadratic_form` of functionals, shape ``(..., C, q)``, of the coordinates ``places``, shape ``(q,)``, alone;
        ``None`` where these are not independent of all others.
        """
        return None

    def map_covariance(self, g: Sequence[Tensor], x: Tensor, places: Tensor, alone: bool) -> Tensor | None:
        r"""
        Covariances, shape ``(B, K, K)``, of functionals of a linear map's weight, which has the coordinates ``places``, shape
        ``(out, in)``, by their gradients :math:`\sum_t g_t x_t^\top`: K of shape ``(B, T, out)`` in the map's outputs, and inputs
        ``(B, T, in)``. They depend on no other coordinate if ``alone``. ``None`` where the weight's gradients have to be formed.
        """
        return None


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
    @override
    def rank(self) -> int:
        return sum(len(index) for index, _ in self.parts)

    def _each(self, x: Tensor, method: str) -> Tensor:
        total = torch.zeros_like(x)
        for index, part in self.parts:
            total[..., index] = getattr(part, method)(x[..., index])
        return total

    @override
    def half_solve(self, x: Tensor) -> Tensor:
        return self._each(x, "half_solve")

    @override
    def half_solve_transposed(self, x: Tensor) -> Tensor:
        return self._each(x, "half_solve_transposed")

    @override
    def multiply(self, x: Tensor) -> Tensor:
        return self._each(x, "multiply")

    @property
    @override
    def log_det_precision(self) -> Tensor:  # over the covered coordinates
        return sum((part.log_det_precision for _, part in self.parts), self.loc.new_zeros(()))

    @property
    @override
    def smallest_precision(self) -> Tensor:
        return torch.stack([part.smallest_precision for _, part in self.parts]).min()

    @override
    def condition_number(self, *, to_prior: bool = False) -> float:
        return max((part.condition_number(to_prior=to_prior) for _, part in self.parts), default=1.0)

    @property
    @override
    def variance(self) -> Tensor:  # zero where fixed
        total = torch.zeros_like(self.loc)
        for index, part in self.parts:
            total[index] = part.variance
        return total
