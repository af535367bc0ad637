# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A Gaussian over a packed latent vector with a low-rank covariance."""

import math
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.types import _size


class FactorNormal(TorchDistribution):
    r"""
    The Gaussian :math:`\mu + W z,\ z\sim N(0, I_r)`, with covariance :math:`W W^\top` of rank r ≤ p, and optionally a
    remainder in the other p − r dimensions.

    Without a remainder it is concentrated on a subspace, has no density with respect to Lebesgue measure, and
    :meth:`log_prob` raises. The remainder is :math:`e\sim N(0, \Lambda^{-1})` conditioned on :math:`B e = 0`, so that
    linear functionals in the row space of B keep exactly the variances that W gives them. Where B spans all p dimensions
    nothing remains, whatever Λ is.

    :param Tensor loc: mean μ, shape ``(p,)``.
    :param Tensor factor: W, shape ``(p, r)``.
    :param Tensor basis: B, orthonormal rows, shape ``(r, p)``, with :math:`B W` invertible; needed for a density.
    :param Tensor remainder_precision: the diagonal of Λ, shape ``(p,)``.

    Example::

        >>> d = FactorNormal(torch.zeros(3), torch.tensor([[1.0], [2.0], [0.0]]))
        >>> d.variance
        tensor([1., 4., 0.])
        >>> basis = torch.tensor([[1.0, 0.0, 0.0]])
        >>> d = FactorNormal(torch.zeros(3), torch.tensor([[2.0], [0.0], [0.0]]), basis, torch.ones(3))
        >>> d.variance
        tensor([4., 1., 1.])
    """

    support = constraints.real_vector
    has_rsample = True
    arg_constraints: dict[str, constraints.Constraint] = {"loc": constraints.real_vector}  # noqa: RUF012

    def __init__(
        self,
        loc: Tensor,
        factor: Tensor,
        basis: Tensor | None = None,
        remainder_precision: Tensor | None = None,
    ) -> None:
        p = loc.shape[0]
        if factor.dim() != 2 or factor.shape[0] != p:
            raise ValueError(
                f"factor has shape {tuple(factor.shape)}, expected (p, r) with p = {p}, the length of loc"
            )
        if (basis is None) != (remainder_precision is None):
            raise ValueError("basis and remainder_precision go together: give both or neither")
        if basis is not None and basis.shape != (factor.shape[1], p):
            raise ValueError(
                f"basis has shape {tuple(basis.shape)}, expected {(factor.shape[1], p)}, the transpose of factor's"
            )
        self.loc = loc
        self.factor = factor
        self.basis = basis
        self.remainder_precision = remainder_precision
        self._remains = basis is not None and basis.shape[0] < p
        if basis is not None and remainder_precision is not None:
            self._mixing = basis @ factor
            if self._remains:
                self._gain = basis / remainder_precision  # B Λ⁻¹
                self._cholesky = torch.linalg.cholesky(self._gain @ basis.mT)
                # orthonormal rows: what the condition B e = 0 takes from e, in units of its standard deviations
                scaled = basis * remainder_precision.rsqrt()
                self._explained = torch.linalg.solve_triangular(self._cholesky, scaled, upper=False)
        super().__init__(torch.Size(), loc.shape, validate_args=False)

    def expand(self, batch_shape: _size, _instance: Any = None) -> TorchDistribution:
        """
        :param batch_shape: the new batch shape.
        :return: a lazily expanded distribution.
        """
        return super().expand(torch.Size(batch_shape))

    @property
    def mean(self) -> Tensor:
        """The mean, shape ``(p,)``."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Marginal variances, shape ``(p,)``."""
        variance = self.factor.square().sum(-1)
        if self.remainder_precision is None or not self._remains:
            return variance
        free = (1 - self._explained.square().sum(0)).clamp(min=0)
        return variance + free / self.remainder_precision

    def rsample(self, sample_shape: _size = (), generator: torch.Generator | None = None) -> Tensor:
        """
        :param sample_shape: leading shape of the draws.
        :param generator: source of random numbers; torch's default if ``None``.
        :return: draws, shape ``sample_shape + (p,)``.
        """
        shape = torch.Size(sample_shape) + self.factor.shape[1:]
        options: Any = {"dtype": self.loc.dtype, "device": self.loc.device, "generator": generator}
        noise = torch.randn(shape, **options)
        draws = self.loc + noise @ self.factor.mT
        if self.remainder_precision is None or not self._remains:
            return draws
        free = torch.randn(draws.shape, **options)
        return draws + self._condition(free * self.remainder_precision.rsqrt())

    def log_prob(self, value: Tensor) -> Tensor:
        """
        :param value: shape ``(..., p)``.
        :return: log densities, shape ``(...)``.
        :raises ValueError: without a remainder: the distribution is concentrated on a subspace and has no density.
        """
        if self.basis is None or self.remainder_precision is None:
            raise ValueError(
                f"a Gaussian of rank {self.factor.shape[1]} over {self.loc.shape[0]} dimensions has no density. Use "
                "this guide to predict, or give it a remainder that makes the density proper "
                "(remainder='isotropic' or 'diagonal')."
            )
        difference = value - self.loc
        coordinates = difference @ self.basis.mT
        z = torch.linalg.solve(self._mixing, coordinates.unsqueeze(-1)).squeeze(-1)
        volume = torch.linalg.slogdet(self._mixing).logabsdet
        quadratic = z.square().sum(-1) + self.loc.shape[0] * math.log(2 * math.pi)
        if not self._remains:
            return -volume - 0.5 * quadratic
        e = difference - z @ self.factor.mT
        # in coordinates (B x, N x) with [B; N] orthogonal; det(N Λ N') = det(Λ) det(B Λ⁻¹ B')
        half_log_det = 0.5 * self.remainder_precision.log().sum() + self._cholesky.diagonal().log().sum()
        return half_log_det - volume - 0.5 * (quadratic + (e.square() * self.remainder_precision).sum(-1))

    def half_solve_transposed(self, x: Tensor) -> Tensor:
        r"""
        Applies :math:`R^\top` with :math:`R R^\top = \Sigma`, so that :math:`|R^\top g|^2` is the variance of a functional g.

        :param x: shape ``(..., p)``.
        :return: shape ``(..., r)``, or ``(..., r + p)`` where there is a remainder.
        """
        half = x @ self.factor
        if self.remainder_precision is None or not self._remains:
            return half
        scaled = x * self.remainder_precision.rsqrt()
        return torch.cat([half, scaled - scaled @ self._explained.mT @ self._explained], -1)

    def quadratic_form(self, rows: Tensor) -> Tensor:
        r"""
        Covariances of linear functionals: :math:`J \Sigma J^\top`.

        :param rows: the functionals, shape ``(..., C, p)``.
        :return: shape ``(..., C, C)``.
        """
        half = self.half_solve_transposed(rows)
        return half @ half.mT

    def _condition(self, e: Tensor) -> Tensor:
        """Turns draws of N(0, Λ⁻¹) into draws given B e = 0 (Matheron's rule)."""
        assert self.basis is not None
        return (
            e
            - torch.cholesky_solve((e @ self.basis.mT).unsqueeze(-1), self._cholesky).squeeze(-1) @ self._gain
        )
