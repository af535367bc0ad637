# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Tails of importance ratios: the shape of a generalised Pareto distribution, and weights smoothed by it."""

import math

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor


def tail_size(size: int) -> int:
    """How many of so many draws are the tail: Vehtari et al. (2024), section 3.2."""
    return math.ceil(min(size / 5, 3 * math.sqrt(size)))


def reliable_shape(size: int) -> float:
    """
    The shape below which estimates from so many draws are reliable, min(1 - 1 / log10 S, 0.7): Vehtari et al. (2024), section 3.

    Example::

        >>> reliable_shape(100), round(reliable_shape(10000), 2)
        (0.5, 0.7)
    """
    return min(1 - 1 / math.log10(size), 0.7) if size > 10 else 0.0


def tail_shape(values: Tensor) -> float:
    """
    The shape of the upper tail of positive numbers, shape ``(S,)``; minus infinity where all of the tail is the same, infinity
    where there are too few numbers for a tail.
    """
    tail = tail_size(len(values))
    if tail < 5:
        return math.inf
    ordered = values.sort().values
    excess = ordered[-tail:] - ordered[-tail - 1]
    if not bool((excess > 0).all()):
        excess = excess[excess > 0]
        if len(excess) < 5:
            return -math.inf if len(excess) == 0 else math.inf
    shape, _ = fit_generalized_pareto(excess)
    return float(shape)


def smoothed(log_ratios: Tensor) -> tuple[Tensor, float]:
    r"""
    Pareto-smoothed importance weights: the largest ratios are replaced by the quantiles of a generalised Pareto distribution
    fitted to them, none larger than the largest, and the weights are normalised (Vehtari et al., 2024, algorithm 1).

    :param log_ratios: shape ``(S,)``, finite or minus infinity.
    :return: log weights, shape ``(S,)``, of sum one, and the shape of the tail.
    """
    log_w = (log_ratios - log_ratios.max()).double()
    shape = tail_shape(log_w.exp())
    if not math.isfinite(shape):
        return log_w.log_softmax(0), shape
    order = log_w.argsort()
    cut = log_w[order[-tail_size(len(log_w)) - 1]].exp()
    tail = order[log_w[order].exp() > cut]
    shape, scale = fit_generalized_pareto(log_w[tail].exp() - cut)
    levels = (torch.arange(len(tail), dtype=log_w.dtype, device=log_w.device) + 0.5) / len(tail)
    quantiles = scale * torch.expm1(-shape * torch.log1p(-levels)) / shape
    return log_w.scatter(0, tail, (cut + quantiles).log().clamp(max=0)).log_softmax(0), float(shape)
