# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
What warm-up finds for groups of chains together: step sizes, scales, momentum lengths.

Everything is a dataclass of tensors and numbers, so that ``vars`` is its state in a checkpoint. C chains belong to G groups (all
chains to one, or those of a mode to one), those of a group one after the other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from pyro.ops.stats import effective_sample_size
from torch import Tensor

#: Mean logarithm of a squared standard normal variable.
LOG_CHI_SQUARE = -1.2704
#: The largest logarithm of the factor by which one error may say that a step is too long or too short.
CUT = 0.5
#: Momentum length in units of the distance from the centre of the prior, where the autocorrelation is not known.
RADII = 3.0
#: Momentum length in units of the autocorrelation length (Robnik et al., 2023).
LENGTH_FACTOR = 0.4
#: Coordinates whose autocorrelation is measured.
MOST_COORDINATES = 100
#: Steps below which no autocorrelation is measured, and autocorrelation times in a path below which it is not believed.
FEWEST_STEPS, FEWEST_TIMES = 20, 10


def pooled(values: Tensor, num_groups: int) -> Tensor:
    """The means over the chains of each group, of shape ``(G, ...)``, of values ``(C, ...)``."""
    return values.reshape(num_groups, -1, *values.shape[1:]).mean(1)


def spread(values: Tensor, num_chains: int) -> Tensor:
    """Values of groups, ``(G, ...)``, for each of their chains, ``(C, ...)``."""
    return values.repeat_interleave(num_chains // len(values), 0)


@dataclass
class EnergyTuner:
    r"""
    Step sizes at which the variance of the energy error is ``target`` per dimension, by the stochastic approximation of Robbins and
    Monro: the variance grows with the sixth power of the step (Robnik et al., 2023), so that every error says by what factor the step
    is too large. Logarithms are averaged, and cut: beyond the limit of stability errors explode, and one chain there would otherwise
    speak louder than all others.

    :ivar log: logarithms of the present steps ``(G,)``, float64.
    :ivar smooth: their averages, which weigh late ones more.
    :ivar count: updates so far.
    """

    log: Tensor
    smooth: Tensor
    target: float
    count: int = 0

    @classmethod
    def start(cls, step: Tensor, target: float) -> Self:
        """A tuner that knows nothing beside first steps ``(G,)``."""
        log = step.double().log()
        return cls(log, log.clone(), target)

    @property
    def step(self) -> Tensor:
        """The present steps ``(G,)``."""
        return self.log.exp()

    def update(self, errors: Tensor, refused: Tensor, dim: int) -> None:
        """Takes the energy errors ``(C,)`` of a step, and whether it was refused."""
        ratio = errors.double().square() / (dim * self.target)
        too_long = ((ratio.log() - LOG_CHI_SQUARE) / 6).clamp(-CUT, CUT)
        too_long = torch.where(refused, torch.full_like(too_long, CUT), too_long)
        rate = 0.3 / (1 + self.count / 50) ** 0.6
        self.log = self.log - rate * pooled(too_long, len(self.log))
        self.count += 1
        share = 3 / (self.count + 2)
        self.smooth = (1 - share) * self.smooth + share * self.log

    def finish(self) -> Tensor:
        """The averaged steps ``(G,)``."""
        return self.smooth.exp()


@dataclass
class AcceptanceTuner:
    """
    Step sizes ``(G,)`` with a given mean acceptance probability, by dual averaging (Hoffman and Gelman, 2014, algorithm 5).

    :ivar step: the present step sizes, float64.
    :ivar centre: the logarithms that the search is drawn to.
    :ivar error: the mean of target minus acceptance.
    :ivar smooth: the averaged logarithms.
    :ivar count: updates so far.
    """

    step: Tensor
    centre: Tensor
    error: Tensor
    smooth: Tensor
    target: float
    count: int = 0

    @classmethod
    def start(cls, step: Tensor, target: float) -> Self:
        """A search from first steps ``(G,)``."""
        log = step.double().log()
        return cls(step.double(), log, torch.zeros_like(log), log.clone(), target)

    def update(self, acceptance: Tensor) -> None:
        """Takes the acceptance probabilities ``(C,)`` of a transition."""
        self.count += 1
        rate = 1 / (self.count + 10)
        gap = self.target - pooled(acceptance.double(), len(self.step))
        self.error = (1 - rate) * self.error + rate * gap
        log = self.centre - math.sqrt(self.count) / 0.05 * self.error
        rate = self.count**-0.75
        self.smooth = rate * log + (1 - rate) * self.smooth
        self.step = log.exp()

    def finish(self) -> Tensor:
        """The averaged step sizes ``(G,)``."""
        return self.smooth.exp() if self.count else self.step


@dataclass
class Moments:
    r"""
    Second moments of positions x and of gradients g of the log density, both in units of the prior, over all chains, by site.

    :ivar positions: sums of :math:`|x|^2` over the latents of each site, ``(S,)``, float64.
    :ivar gradients: sums of :math:`|g|^2`.
    :ivar count: steps so far.
    """

    positions: Tensor
    gradients: Tensor
    count: int = 0

    @classmethod
    def start(cls, num_sites: int, device: torch.device) -> Self:
        """No step yet."""
        empty = torch.zeros(num_sites, dtype=torch.float64, device=device)
        return cls(empty, empty.clone())

    def update(self, position: Tensor, gradient: Tensor, site: Tensor) -> None:
        """Takes positions and gradients ``(C, p)`` of a step, and the index of the site of each latent ``(p,)``."""
        squares = (value.double().square().mean(0) for value in (position, gradient))
        self.positions, self.gradients = (
            total.index_add(0, site, value)
            for total, value in zip((self.positions, self.gradients), squares, strict=True)
        )
        self.count += 1

    def factors(self) -> Tensor:
        r"""
        For each site ``(S,)`` :math:`(E|x|^2 / E|g|^2)^{1/4}`, the geometric mean of how far its latents go and how narrow they are given
        the others: :math:`E g g^\top` is the mean curvature of a posterior.
        """
        found = (self.positions / self.gradients).pow(0.25)
        return torch.where(found.isfinite(), found, torch.ones_like(found)).clamp(1e-4, 1e4)

    def length(self, factors: Tensor) -> float:
        """
        A momentum length: so many times the root mean square distance from the centre of the prior, in units of the prior times factors of
        the sites ``(S,)``.
        """
        return RADII * math.sqrt(float((self.positions / factors.square()).sum()) / self.count)


@dataclass
class Path:
    """
    Some coordinates of positions, in units, of all steps of a phase.

    :ivar values: ``(C, n, k)``, filled up to ``count``.
    :ivar travelled: the sum of the steps of each group, ``(G,)``.
    """

    values: Tensor
    travelled: Tensor
    count: int = 0

    @classmethod
    def start(cls, position: Tensor, num_groups: int, num_steps: int) -> Self:
        """Room for so many positions like these, ``(C, p)``."""
        size = min(position.shape[-1], MOST_COORDINATES)
        values = position.new_empty(len(position), num_steps, size)
        return cls(values, position.new_zeros(num_groups, dtype=torch.float64))

    def update(self, position: Tensor, step: Tensor) -> None:
        """Takes positions ``(C, p)`` and the steps ``(G,)`` that led to them."""
        size = self.values.shape[-1]
        chosen = torch.arange(size, device=position.device) * position.shape[-1] // size
        self.values[:, self.count] = position[:, chosen]
        self.travelled = self.travelled + step
        self.count += 1

    def spread(self, dim: int) -> Tensor:
        """The root of the summed variances of all ``dim`` coordinates, taken from those noted, in the mean over chains, ``(G,)``."""
        values = self.values[:, : self.count].double()
        variance = values.var(1, correction=0).sum(-1) * dim / values.shape[-1]
        return pooled(variance, len(self.travelled)).sqrt()

    def autocorrelation_time(self) -> Tensor:
        """Steps between two independent draws in the mean over coordinates and chains, ``(G,)``; NaN where that cannot be told."""
        num_groups = len(self.travelled)
        if self.count < FEWEST_STEPS:
            return torch.full_like(self.travelled, math.nan)
        values = self.values[:, : self.count].double()
        size = effective_sample_size(values.unsqueeze(0), chain_dim=0, sample_dim=2)
        times = (self.count / size).clamp(1, self.count)
        return times.reshape(num_groups, -1).nanmean(-1)

    def length(self) -> Tensor:
        """Momentum lengths ``(G,)`` from the autocorrelation; NaN where the path is too short to tell."""
        times = self.autocorrelation_time()
        found = LENGTH_FACTOR * times * self.travelled / max(self.count, 1)
        return torch.where(times * FEWEST_TIMES <= self.count, found, torch.full_like(found, math.nan))


def first_steps(
    errors_at: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor, target: float, dim: int
) -> Tensor:
    """
    Step sizes ``(G,)``, below ``start``, whose first energy errors are no larger than the target: ``errors_at`` gives the mean
    squares ``(G,)`` of the errors of single steps of given sizes and whether all were finite. Half of the sizes found is returned: what
    one step bears, many may not.
    """
    step = start.double()
    for _ in range(60):
        squares, sound = errors_at(step)
        ratio = (squares.double() / (dim * target)).clamp(min=1e-30)
        wrong = ~sound | (ratio > 1)
        if not bool(wrong.any()):
            return 0.5 * step
        factor = torch.where(sound, (0.9 * ratio.pow(-1 / 6)).clamp(0.05, 0.9), torch.full_like(ratio, 0.25))
        step = torch.where(wrong, step * factor, step)
    raise ArithmeticError(
        f"mclmc: no step size down to {float(step.min()):.3g} keeps the energy of a first step finite, so the log density or its "
        "gradient is not finite around a starting point. Start at other points, or check the model there."
    )
