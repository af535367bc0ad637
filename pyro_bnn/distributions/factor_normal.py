# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A Gaussian over a packed latent vector with a low-rank covariance."""

from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.types import _size


class FactorNormal(TorchDistribution):
    r"""
    The degenerate Gaussian :math:`\mu + W z,\ z\sim N(0, I_r)`, with covariance :math:`W W^\top` of rank r < p.

    It has no density with respect to Lebesgue measure. :meth:`log_prob` raises.

    :param Tensor loc: mean, shape ``(p,)``.
    :param Tensor factor: shape ``(p, r)``.

    Example::

        >>> d = FactorNormal(torch.zeros(3), torch.tensor([[1.0], [2.0], [0.0]]))
        >>> d.variance
        tensor([1., 4., 0.])
    """

    support = constraints.real_vector
    has_rsample = True
    arg_constraints: dict[str, constraints.Constraint] = {"loc": constraints.real_vector}  # noqa: RUF012

    def __init__(self, loc: Tensor, factor: Tensor) -> None:
        if factor.dim() != 2 or factor.shape[0] != loc.shape[0]:
            raise ValueError(
                f"factor has shape {tuple(factor.shape)}, expected (p, r) with p = {loc.shape[0]}, the length of loc"
            )
        self.loc = loc
        self.factor = factor
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
        return self.factor.square().sum(-1)

    def rsample(self, sample_shape: _size = ()) -> Tensor:
        """
        :param sample_shape: leading shape of the draws.
        :return: draws, shape ``sample_shape + (p,)``.
        """
        shape = torch.Size(sample_shape) + self.factor.shape[1:]
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + noise @ self.factor.mT

    def log_prob(self, value: Tensor) -> Tensor:
        """
        :param value: shape ``(..., p)``.
        :raises ValueError: always: the distribution is concentrated on a subspace and has no density.
        """
        raise ValueError(
            f"a Gaussian of rank {self.factor.shape[1]} over {self.loc.shape[0]} dimensions has no density. Use "
            "this guide to predict, or give it a remainder that makes the density proper."
        )

    def quadratic_form(self, rows: Tensor) -> Tensor:
        r"""
        Covariances of linear functionals: :math:`J W W^\top J^\top`.

        :param rows: the functionals, shape ``(..., C, p)``.
        :return: shape ``(..., C, C)``.
        """
        half = rows @ self.factor
        return half @ half.mT
