# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""An equal mixture over the leading dimension of any distribution: a predictive from draws."""

import math
from typing import Any

import torch
import torch.distributions as td
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.types import _size


class EqualMixture(TorchDistribution):
    r"""
    :math:`p(y) = \frac1S\sum_s p_s(y)`, independently for each element of the remaining batch.

    :param components: a distribution of batch shape ``(S,) + batch_shape``.

    Example::

        >>> d = EqualMixture(td.Normal(torch.tensor([[0.0], [2.0]]), 1.0))
        >>> d.mean, d.variance
        (tensor([1.]), tensor([2.]))
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012

    def __init__(self, components: td.Distribution) -> None:
        self.components = components
        super().__init__(components.batch_shape[1:], components.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """The support of the components."""
        return self.components.support

    def log_prob(self, value: Tensor) -> Tensor:
        """
        :param value: shape ``sample_shape + batch_shape + event_shape``.
        :return: log densities, shape ``sample_shape + batch_shape``.
        """
        at = value.dim() - len(self.batch_shape) - len(self.event_shape)
        each = self.components.log_prob(value.unsqueeze(at))
        return each.logsumexp(at) - math.log(self.components.batch_shape[0])

    def sample(self, sample_shape: _size = ()) -> Tensor:
        """
        :param sample_shape: leading shape of the draws.
        :return: draws, shape ``sample_shape + batch_shape + event_shape``.
        """
        shape = torch.Size(sample_shape)
        draws = self.components.sample(shape)
        at = len(shape)
        index = torch.randint(self.components.batch_shape[0], shape + self.batch_shape, device=draws.device)
        index = index.unsqueeze(at).reshape(
            index.shape[:at] + (1,) + index.shape[at:] + (1,) * len(self.event_shape)
        )
        index = index.expand(shape + (1,) + self.batch_shape + self.event_shape)
        return draws.gather(at, index).squeeze(at)

    @property
    def mean(self) -> Tensor:
        """The mean of the components' means, shape ``batch_shape + event_shape``."""
        return self.components.mean.mean(0)

    @property
    def variance(self) -> Tensor:
        """The law of total variance, shape ``batch_shape + event_shape``."""
        return self.components.variance.mean(0) + self.components.mean.var(0, correction=0)
