# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A mixture over several variables at once that share the component index."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints


class SharedIndexMixture(TorchDistribution):
    r"""
    The joint distribution of several independent blocks given a shared, uniform component index,

    .. math:: q(v) = \frac1K \sum_{k=1}^K \prod_i q_{ik}(v_i),

    over the concatenation :math:`v` of the flattened blocks. This is not a product of mixtures: one index
    selects the component of every block. Draws are reparameterised given their index; since the weights are
    uniform constants, the pathwise gradient is unbiased.

    :param blocks: one distribution per block, each with batch shape ``(K,)``.
    :param validate_args: as for every distribution.

    Example::

        >>> import pyro.distributions as dist
        >>> loc = torch.tensor([-5.0, 5.0])
        >>> q = SharedIndexMixture([dist.Normal(loc, 1.0), dist.Normal(loc, 1.0)])
        >>> draws = q.sample((1000,))
        >>> draws.shape, bool((draws[:, 0].sign() == draws[:, 1].sign()).all())
        (torch.Size([1000, 2]), True)
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        blocks: Sequence[Distribution],
        *,
        batch_shape: torch.Size | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.blocks = list(blocks)
        self.num_components = self.blocks[0].batch_shape[0]
        for i, block in enumerate(self.blocks):
            if tuple(block.batch_shape) != (self.num_components,):
                raise ValueError(
                    f"block {i} has batch shape {tuple(block.batch_shape)}; expected ({self.num_components},), one "
                    "entry per component."
                )
        self.sizes = [block.event_shape.numel() for block in self.blocks]
        super().__init__(
            torch.Size() if batch_shape is None else batch_shape,
            torch.Size([sum(self.sizes)]),
            validate_args=validate_args,
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> "SharedIndexMixture":
        """
        :param batch_shape: the new batch shape; draws of different batch entries have their own indices.
        :return: a mixture over the same blocks.
        """
        new: Any = type(self).__new__(type(self)) if _instance is None else _instance
        new.blocks, new.sizes, new.num_components = self.blocks, self.sizes, self.num_components
        TorchDistribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """
        :param sample_shape: shape of the draws.
        :return: draws, shape ``sample_shape + batch_shape + (D,)``.
        """
        shape = torch.Size(sample_shape) + self.batch_shape
        drawn = [block.rsample(shape).reshape((*shape, self.num_components, -1)) for block in self.blocks]
        value = torch.cat(drawn, -1)
        index = torch.randint(self.num_components, (*shape, 1, 1), device=value.device)
        return value.gather(-2, index.expand(*shape, 1, value.shape[-1])).squeeze(-2)

    def component_log_prob(self, value: Tensor) -> Tensor:
        """
        :param value: points, shape ``(*batch, D)``.
        :return: the log density of each component, shape ``(*batch, K)``.
        """
        pieces = value.split(self.sizes, -1)
        shape = value.shape[:-1]
        terms: list[Tensor] = [
            block.log_prob(piece.reshape(*shape, 1, *block.event_shape))
            for block, piece in zip(self.blocks, pieces, strict=True)
        ]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def log_prob(self, value: Tensor) -> Tensor:
        """
        :param value: points, shape ``(*batch, D)``.
        :return: the log density of the mixture, shape ``batch``.
        """
        if self._validate_args:
            self._validate_sample(value)
        return self.component_log_prob(value).logsumexp(-1) - math.log(self.num_components)


def mixture_quantile(
    cdf: Callable[[Tensor], Tensor], lower: Tensor, upper: Tensor, q: float, steps: int = 80
) -> Tensor:
    r"""
    The quantile :math:`\inf\{v : F(v) \ge q\}` of a mixture by bisection.

    :param callable cdf: the distribution function :math:`F`, elementwise.
    :param lower: the smallest quantile of a component, elementwise.
    :param upper: the largest one; the quantile of the mixture lies between the two.
    :param float q: the level, between 0 and 1.
    :param int steps: number of halvings.
    :return: the quantile.
    """
    for _ in range(steps):
        middle = (lower + upper) / 2
        below = cdf(middle) < q
        lower, upper = torch.where(below, middle, lower), torch.where(below, upper, middle)
    return upper
