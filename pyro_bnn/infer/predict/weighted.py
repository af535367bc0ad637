# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Stored draws of chains that need not be equally likely, and the draws that stand for them with equal weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.ops.options import require_count

#: How far the sum of given weights may be from one.
_SLACK = 1e-6


def as_weights(weights: Tensor | Sequence[float] | None, *sizes: int, what: str) -> Tensor | None:
    """
    Weights as a probability vector in double precision on the CPU, of one of some lengths; ``None`` for equal ones.

    :raises ValueError: if they have another length, do not sum to one, or if one is negative or no number.
    """
    if weights is None:
        return None
    value = torch.as_tensor(weights).detach().to("cpu", torch.float64)
    if value.dim() != 1 or len(value) not in sizes:
        expected = " or ".join(f"({size},)" for size in dict.fromkeys(sizes))
        raise ValueError(f"weights of shape {tuple(value.shape)}: expected {expected}, one of each {what}.")
    if not bool((value >= 0).all()):
        raise ValueError(f"weights must be numbers of at least 0, found {float(value.min()):.4g} among them.")
    total = float(value.sum())
    if not abs(total - 1) <= _SLACK:
        raise ValueError(
            f"weights must sum to 1, but these sum to {total:.6g}: pass weights / weights.sum()."
        )
    return value / value.sum()


def systematic_index(weights: Tensor, size: int) -> Tensor:
    r"""
    Draws that stand with equal weights for weighted ones: the quantiles of the index at :math:`(i + 1/2)/S`.

    Draw j comes :math:`\lfloor S w_j\rfloor` or :math:`\lceil S w_j\rceil` times, and any draws in a row less than one time more or
    less than S times their weight; nothing is random.

    :param weights: :math:`w`, which sum to one, shape ``(N,)``.
    :param size: S.
    :return: indices in ascending order, shape ``(S,)``.
    """
    points = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    index = torch.searchsorted(weights.double().cumsum(0), points, right=True)
    last = int(weights.nonzero().max())  # the sum may be smaller than one by rounding
    return index.clamp(max=last)


class WeightedChains:
    """
    What stored draws have in common that need not be equally likely: results of samplers and guides of draws.

    Who derives from it has :attr:`samples`, by site of shape ``(chains, draws) + site shape``, and :attr:`weights`, of the chains
    or of all draws, ``None`` if they are equal.
    """

    samples: Any
    weights: Any

    @property
    def num_chains(self) -> int:
        """The number of chains."""
        return len(next(iter(self.samples.values())))

    @property
    def num_draws(self) -> int:
        """The number of draws in each chain."""
        return int(next(iter(self.samples.values())).shape[1])

    @property
    def equal_weights(self) -> bool:
        """Whether all draws are equally likely."""
        return self.weights is None or bool((self.weights == self.weights[0]).all())

    @property
    def draw_weights(self) -> Tensor:
        """The weight of each draw, chain after chain, double precision on the CPU, shape ``(chains * draws,)``."""
        chains, draws = self.num_chains, self.num_draws
        if self.weights is None:
            return torch.full((chains * draws,), 1 / (chains * draws), dtype=torch.float64)
        weights: Tensor = self.weights.detach().to("cpu", torch.float64)
        return weights if len(weights) == chains * draws else weights.repeat_interleave(draws) / draws

    def draw_index(self, num_samples: int | None = None) -> Tensor:
        """
        Which draws stand for all of them with equal weights.

        Of equally likely draws, an evenly spaced subset, from the first to the last. Of others, by :func:`systematic_index`:
        a chain of weight w comes :math:`S w` times, to within less than one draw, and draws evenly spaced along it.

        :param int num_samples: S, at most the number of stored draws, which is the default.
        :return: indices of draws, chain after chain, shape ``(S,)``.
        :raises ValueError: if more draws are asked for than there are.
        """
        stored = self.num_chains * self.num_draws
        size = stored if num_samples is None else num_samples
        require_count("num_samples", size)
        if size > stored:
            raise ValueError(f"num_samples={size}, but there are {stored} draws only.")
        if not self.equal_weights:
            return systematic_index(self.draw_weights, size)
        return torch.linspace(0, stored - 1, size, dtype=torch.float64).long()

    def resample(self, num_samples: int | None = None) -> dict[str, Tensor]:
        """
        Draws that stand for all with equal weights, see :meth:`draw_index`.

        :param int num_samples: S; as many as are stored by default.
        :return: by site, shape ``(S,) + site shape``.
        """
        flat = {name: value.flatten(0, 1) for name, value in self.samples.items()}
        if num_samples is None and self.equal_weights:
            return flat
        index = self.draw_index(num_samples)
        return {name: value[index.to(value.device)] for name, value in flat.items()}

    def get_samples(self, group_by_chain: bool = False) -> dict[str, Tensor]:
        """
        The draws, as :meth:`pyro.infer.MCMC.get_samples` returns them.

        All that takes draws counts them equally. Where the weights are not equal, as many draws are returned as are stored, each
        as often as its weight says (:meth:`draw_index`), some more than once.

        :param bool group_by_chain: whether the chains keep their own dimension.
        :return: draws by site.
        :raises ValueError: for chains by themselves whose weights are not equal, since a dictionary has no place for weights.
        """
        if not group_by_chain:
            return self.resample()
        if not self.equal_weights:
            raise ValueError(
                "get_samples(group_by_chain=True): the draws do not have equal weights, which draws by chain would lose. Take "
                "samples and weights, get_samples() for draws that stand for all with equal weights, or reweighted(None)."
            )
        return dict(self.samples)
