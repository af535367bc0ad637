# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Gaussians over a packed latent vector, parameterised by their precision."""

import math
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
