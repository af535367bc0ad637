# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Mixtures of a few distributions with given weights: over a packed vector, and elementwise for predictions."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributions as td
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.types import _size

from pyro_bnn.distributions.structured_normal import BlockNormal


class WeightedMixture(TorchDistribution):
    r"""
    :math:`p(y) = \sum_k \pi_k p_k(y)`, independently for each element of the batch.

    :param components: K distributions of the same batch and event shape.
    :param Tensor log_weights: :math:`\log\pi`, shape ``(K,)``.

    Example::

        >>> parts = [td.Normal(torch.zeros(1), 1.0), td.Normal(torch.full((1,), 4.0), 1.0)]
        >>> d = WeightedMixture(parts, torch.tensor([0.75, 0.25]).log())
        >>> d.mean, d.variance
        (tensor([1.]), tensor([4.]))
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012

    def __init__(self, components: Sequence[td.Distribution], log_weights: Tensor) -> None:
        self.components = list(components)
        self.log_weights = log_weights
        first = self.components[0]
        super().__init__(first.batch_shape, first.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """The support of the components."""
        return self.components[0].support

    def log_prob(self, value: Tensor) -> Tensor:
        """
        :param value: shape ``sample_shape + batch_shape + event_shape``.
        :return: log densities, shape ``sample_shape + batch_shape``.
        """
        each = torch.stack([part.log_prob(value) for part in self.components], -1)
        return (each + self.log_weights).logsumexp(-1)

    def sample(self, sample_shape: _size = ()) -> Tensor:
        """
        :param sample_shape: leading shape of the draws.
        :return: draws, shape ``sample_shape + batch_shape + event_shape``.
        """
        shape = torch.Size(sample_shape)
        draws = torch.stack([part.sample(shape) for part in self.components], -1)
        size = (shape + self.batch_shape).numel()
        index = torch.multinomial(self.log_weights.exp(), size, replacement=True)
        index = index.reshape(shape + self.batch_shape + (1,) * (len(self.event_shape) + 1))
        return draws.gather(-1, index.expand(draws.shape[:-1] + (1,))).squeeze(-1)

    def _average(self, values: list[Tensor]) -> Tensor:
        return (torch.stack(values, -1) * self.log_weights.exp()).sum(-1)

    @property
    def mean(self) -> Tensor:
        """The mean, shape ``batch_shape + event_shape``."""
        return self._average([part.mean for part in self.components])

    @property
    def variance(self) -> Tensor:
        """By the law of total variance, shape ``batch_shape + event_shape``."""
        mean = self.mean
        return self._average([part.variance + (part.mean - mean).square() for part in self.components])


class PackedMixture(TorchDistribution):
    r"""
    :math:`q(u) = \sum_k \pi_k N(u; \mu_k, P_k^{-1})` over a packed vector.

    Where components hold some coordinates fixed, each lives on a subspace of its own: its density is with respect to
    the other coordinates, and zero at points whose fixed coordinates are not its own (up to rounding).

    :param components: K Gaussians over vectors of the same length.
    :param Tensor log_weights: :math:`\log\pi`, shape ``(K,)``.

    Example::

        >>> from pyro_bnn.distributions.precision_normal import DiagonalNormal
        >>> parts = [DiagonalNormal(torch.full((2,), m), torch.ones(2)) for m in (-1.0, 1.0)]
        >>> PackedMixture(parts, torch.tensor([0.5, 0.5]).log()).variance
        tensor([2., 2.])
    """

    support = constraints.real_vector
    has_rsample = True  # the weights are constants
    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012

    def __init__(self, components: Sequence[Any], log_weights: Tensor) -> None:
        self.components = list(components)
        self.log_weights = log_weights
        super().__init__(torch.Size(), self.components[0].loc.shape, validate_args=False)

    def expand(self, batch_shape: _size, _instance: Any = None) -> TorchDistribution:
        """
        :param batch_shape: the new batch shape.
        :return: a lazily expanded distribution.
        """
        return super().expand(torch.Size(batch_shape))

    def rsample_with_index(
        self, sample_shape: _size = (), generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        :param sample_shape: leading shape of the draws.
        :param generator: source of random numbers; torch's default if ``None``.
        :return: draws, shape ``sample_shape + (p,)``, and the component of each, shape ``sample_shape``.
        """
        shape = torch.Size(sample_shape)
        index = torch.multinomial(
            self.log_weights.exp(), shape.numel(), replacement=True, generator=generator
        )
        loc = self.components[0].loc
        draws = torch.zeros(shape.numel(), loc.shape[0], dtype=loc.dtype, device=loc.device)
        for k, part in enumerate(self.components):
            (mine,) = (index == k).nonzero(as_tuple=True)
            if len(mine):
                draws = draws.index_copy(0, mine, part.rsample((len(mine),), generator=generator))
        return draws.reshape(shape + loc.shape), index.reshape(shape)

    def rsample(self, sample_shape: _size = (), generator: torch.Generator | None = None) -> Tensor:
        """
        :param sample_shape: leading shape of the draws.
        :param generator: source of random numbers; torch's default if ``None``.
        :return: draws, shape ``sample_shape + (p,)``.
        """
        return self.rsample_with_index(sample_shape, generator)[0]

    def component_log_prob(self, value: Tensor) -> Tensor:
        """
        :param value: packed vectors, shape ``(..., p)``.
        :return: the log density of each component, shape ``(..., K)``.
        """
        return torch.stack([self._one(part, value) for part in self.components], -1)

    def _one(self, part: Any, value: Tensor) -> Tensor:
        log_prob = part.log_prob(value)
        if not isinstance(part, BlockNormal) or part.rank == value.shape[-1]:
            return log_prob
        fixed = torch.ones_like(part.loc, dtype=torch.bool)
        for index, _ in part.parts:
            fixed[index] = False
        tolerance = 1e4 * torch.finfo(value.dtype).eps * (1 + part.loc[fixed].abs())
        inside = ((value[..., fixed] - part.loc[fixed]).abs() <= tolerance).all(-1)
        return log_prob.masked_fill(~inside, -torch.inf)

    def log_prob(self, value: Tensor) -> Tensor:
        """
        :param value: packed vectors, shape ``(..., p)``.
        :return: log densities, shape ``(...)``.
        """
        return (self.component_log_prob(value) + self.log_weights).logsumexp(-1)

    @property
    def mean(self) -> Tensor:
        """The mean, shape ``(p,)``."""
        means = torch.stack([part.loc for part in self.components], -1)
        return (means * self.log_weights.exp()).sum(-1)

    @property
    def variance(self) -> Tensor:
        """Marginal variances, shape ``(p,)``."""
        mean, weights = self.mean, self.log_weights.exp()
        each = [part.variance + (part.loc - mean).square() for part in self.components]
        return (torch.stack(each, -1) * weights).sum(-1)
