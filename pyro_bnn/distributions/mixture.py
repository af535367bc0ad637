# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A mixture over several variables at once that share the component index."""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributions as td
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.types import _size
from typing_extensions import override

from pyro_bnn.distributions.precision_normal import BlockNormal


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

    @override
    def expand(self, batch_shape: Any, _instance: Any = None) -> "SharedIndexMixture":
        # draws of different batch entries have their own indices
        new: Any = type(self).__new__(type(self)) if _instance is None else _instance
        new.blocks, new.sizes, new.num_components = self.blocks, self.sizes, self.num_components
        TorchDistribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @override
    def rsample(self, sample_shape: Any = ()) -> Tensor:
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
        shape = value.shape[:-1]
        each = zip(self.blocks, value.split(self.sizes, -1), strict=True)
        terms = [block.log_prob(piece.reshape(*shape, 1, *block.event_shape)) for block, piece in each]
        return reduce(torch.add, terms)

    @override
    def log_prob(self, value: Tensor) -> Tensor:
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


def marginal_quantile(components: Any, q: float, weights: Tensor | None = None) -> Tensor:
    """
    The quantile of a mixture over the first batch dimension, elementwise.

    :param components: a location-scale distribution of batch shape ``(K,) + shape``.
    :param float q: the level, between 0 and 1.
    :param weights: shape ``(K,)``; equal if ``None``.
    :return: shape ``shape``.
    """
    each = components.icdf(torch.full_like(components.loc, q))
    if len(each) == 1:
        return each[0]
    if weights is None:
        weights = each.new_full((len(each),), 1 / len(each))
    weights = weights.reshape(-1, *[1] * (each.dim() - 1))
    return mixture_quantile(lambda v: (weights * components.cdf(v)).sum(0), each.amin(0), each.amax(0), q)


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
    @override
    def support(self) -> Any:
        return self.components.support

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        at = value.dim() - len(self.batch_shape) - len(self.event_shape)
        each = self.components.log_prob(value.unsqueeze(at))
        return each.logsumexp(at) - math.log(self.components.batch_shape[0])

    @override
    def sample(self, sample_shape: _size = ()) -> Tensor:
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
    @override
    def mean(self) -> Tensor:
        return self.components.mean.mean(0)

    @property
    @override
    def variance(self) -> Tensor:
        return self.components.variance.mean(0) + self.components.mean.var(0, correction=0)

    @property
    def probs(self) -> Tensor:
        """The probabilities of labels, of each element of an event by itself; other families have none."""
        base: Any = self.components
        while isinstance(base, td.Independent):
            base = base.base_dist
        if not isinstance(base, td.Categorical | td.Bernoulli | td.OneHotCategorical):
            raise AttributeError(
                f"EqualMixture of {type(base).__name__} has no attribute 'probs': labels have"
            )
        each: Tensor = base.probs
        return each.mean(0)


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
    @override
    def support(self) -> Any:
        return self.components[0].support

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        each = torch.stack([part.log_prob(value) for part in self.components], -1)
        return (each + self.log_weights).logsumexp(-1)

    @override
    def sample(self, sample_shape: _size = ()) -> Tensor:
        shape = torch.Size(sample_shape)
        draws = torch.stack([part.sample(shape) for part in self.components], -1)
        size = (shape + self.batch_shape).numel()
        index = torch.multinomial(self.log_weights.exp(), size, replacement=True)
        index = index.reshape(shape + self.batch_shape + (1,) * (len(self.event_shape) + 1))
        return draws.gather(-1, index.expand(draws.shape[:-1] + (1,))).squeeze(-1)

    def _average(self, values: list[Tensor]) -> Tensor:
        return (torch.stack(values, -1) * self.log_weights.exp()).sum(-1)

    @property
    @override
    def mean(self) -> Tensor:
        return self._average([part.mean for part in self.components])

    @property
    @override
    def variance(self) -> Tensor:
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

        >>> from pyro_bnn.curvature.diagonal import DiagonalNormal
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

    @override
    def expand(self, batch_shape: _size, _instance: Any = None) -> TorchDistribution:
        return super().expand(torch.Size(batch_shape))  # lazily

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

    @override
    def rsample(self, sample_shape: _size = (), generator: torch.Generator | None = None) -> Tensor:
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

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        return (self.component_log_prob(value) + self.log_weights).logsumexp(-1)

    @property
    @override
    def mean(self) -> Tensor:
        means = torch.stack([part.loc for part in self.components], -1)
        return (means * self.log_weights.exp()).sum(-1)

    @property
    @override
    def variance(self) -> Tensor:
        mean, weights = self.mean, self.log_weights.exp()
        each = [part.variance + (part.loc - mean).square() for part in self.components]
        return (torch.stack(each, -1) * weights).sum(-1)
