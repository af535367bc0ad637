# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
What warm-up finds for each mode from its chains together: step sizes, spreads, momentum lengths.

Everything is a dataclass of tensors and numbers, so that ``vars`` is its state in a checkpoint. C chains belong to K modes, those
of a mode one after the other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from pyro.ops.stats import effective_sample_size
from torch import Tensor

#: Steps that the estimate of a step size remembers at most (Robnik et al., 2023, appendix), and the share of all so far: what the way
#: from a start far outside asked for is soon forgotten.
MEMORY, RECENT = 150, 0.25
#: Factors by which a step, and the limit that a refused step has left, grow at most from one step to the next: beyond the limit of
#: stability energies explode, and a chain thrown far out is long in coming back.
GROWTH, RELAXATION = 1.2, 1.02
#: Standard deviation, in factors of e of the step size, of the weights of what other step sizes say about the right one.
TRUST = 1.5
#: Momentum length in units of the autocorrelation length (Robnik et al., 2023).
LENGTH_FACTOR = 0.4
#: Coordinates whose autocorrelation is measured.
MOST_COORDINATES = 100
#: Steps below which no autocorrelation is measured.
FEWEST_STEPS = 20


def pooled(values: Tensor, num_modes: int) -> Tensor:
    """The means over the chains of each mode, of shape ``(K, ...)``, of values ``(C, ...)``."""
    return values.reshape(num_modes, -1, *values.shape[1:]).mean(1)


def spread(values: Tensor, num_chains: int) -> Tensor:
    """Values of modes, ``(K, ...)``, for each of their chains, ``(C, ...)``."""
    return values.repeat_interleave(num_chains // len(values), 0)


@dataclass
class EnergyTuner:
    r"""
    Step sizes at which the variance of the energy error is ``target`` per dimension: it grows with the sixth power of the step, so
    that every error predicts the right one, :math:`h (\Delta E^2 / (p\,\tau))^{-1/6}`; predictions are averaged with weights that
    fall with the distance and with age (Robnik et al., 2023).

    :ivar step: step sizes ``(K,)``, float64.
    :ivar limit: below those that left the finite numbers; it relaxes.
    :ivar weight: of the average.
    :ivar average: of the ratio to the target over the sixth power of the step, times ``weight``.
    :ivar count: updates so far.
    """

    step: Tensor
    limit: Tensor
    weight: Tensor
    average: Tensor
    target: float
    count: int = 0

    @classmethod
    def start(cls, step: Tensor, target: float) -> Self:
        """A tuner that knows nothing beside first steps ``(K,)``."""
        step = step.double()
        return cls(
            step, torch.full_like(step, math.inf), torch.zeros_like(step), torch.zeros_like(step), target
        )

    def update(self, errors: Tensor, refused: Tensor, dim: int) -> None:
        """Takes the energy errors ``(C,)`` of a step, and whether it was refused."""
        self.count += 1
        memory = min(MEMORY, 2 + RECENT * self.count)
        num_modes, decay = len(self.step), (memory - 1) / (memory + 1)
        ratio = errors.double().square() / (dim * self.target) + 1e-8
        weight = (-0.5 * (ratio.log() / (6 * TRUST)).square()).exp() * ~refused
        self.weight = decay * self.weight + pooled(weight, num_modes)
        self.average = decay * self.average + pooled(weight * ratio, num_modes) / self.step**6
        bad = pooled(refused.double(), num_modes) > 0
        self.limit = torch.where(bad, torch.minimum(self.limit, 0.8 * self.step), RELAXATION * self.limit)
        found = (self.average / self.weight).pow(-1 / 6)
        found = torch.where(found.isfinite(), found, self.step)
        self.step = torch.minimum(torch.minimum(found, GROWTH * self.step), self.limit)


@dataclass
class AcceptanceTuner:
    """
    Step sizes ``(K,)`` with a given mean acceptance probability, by dual averaging (Hoffman and Gelman, 2014, algorithm 5).

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
        """A search from first steps ``(K,)``."""
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
        """The averaged step sizes ``(K,)``."""
        return self.smooth.exp() if self.count else self.step


@dataclass
class Moments:
    """
    Variances of positions, each step weighted with its length.

    :ivar centre: ``(C, p)``, near which positions are.
    :ivar weight: ``(K,)``.
    :ivar first: sums of weighted distances to the centre of the mode, ``(K, p)``.
    :ivar second: sums of their squares.
    :ivar count: positions of a mode so far.
    """

    centre: Tensor
    weight: Tensor
    first: Tensor
    second: Tensor
    count: int = 0

    @classmethod
    def start(cls, position: Tensor, num_modes: int) -> Self:
        """No position yet; those to come are near these, ``(C, p)``."""
        centre = pooled(position.double(), num_modes)
        return cls(centre, centre.new_zeros(num_modes), torch.zeros_like(centre), torch.zeros_like(centre))

    def update(self, position: Tensor, step: Tensor) -> None:
        """Takes positions ``(C, p)`` and the steps ``(K,)`` that led to them."""
        num_modes = len(self.weight)
        distance = position.double() - spread(self.centre, len(position))
        self.weight = self.weight + step
        self.first = self.first + step.unsqueeze(-1) * pooled(distance, num_modes)
        self.second = self.second + step.unsqueeze(-1) * pooled(distance.square(), num_modes)
        self.count += len(position) // num_modes

    def variance(self) -> Tensor:
        """The variances ``(K, p)``."""
        weight = self.weight.unsqueeze(-1)
        return (self.second / weight - (self.first / weight).square()).clamp(min=0)


@dataclass
class Path:
    """
    Some coordinates of the positions of all steps of a phase.

    :ivar values: ``(C, n, k)``, filled up to ``count``.
    :ivar travelled: the sum of the steps of each mode, ``(K,)``.
    """

    values: Tensor
    travelled: Tensor
    count: int = 0

    @classmethod
    def start(cls, position: Tensor, num_modes: int, num_steps: int) -> Self:
        """Room for so many positions like these, ``(C, p)``."""
        size = min(position.shape[-1], MOST_COORDINATES)
        values = position.new_empty(len(position), num_steps, size)
        return cls(values, position.new_zeros(num_modes, dtype=torch.float64))

    def update(self, position: Tensor, step: Tensor) -> None:
        """Takes positions ``(C, p)`` and the steps ``(K,)`` that led to them."""
        size = self.values.shape[-1]
        chosen = torch.arange(size, device=position.device) * position.shape[-1] // size
        self.values[:, self.count] = position[:, chosen]
        self.travelled = self.travelled + step
        self.count += 1

    def autocorrelation_time(self) -> Tensor:
        """Steps between two independent draws in the mean over coordinates and chains, ``(K,)``; NaN where that cannot be told."""
        num_modes = len(self.travelled)
        if self.count < FEWEST_STEPS:
            return torch.full_like(self.travelled, math.nan)
        values = self.values[:, : self.count].double()
        size = effective_sample_size(values.unsqueeze(0), chain_dim=0, sample_dim=2)
        times = (self.count / size).clamp(1, self.count)
        return times.reshape(num_modes, -1).nanmean(-1)

    def length(self) -> Tensor:
        """Momentum lengths ``(K,)`` from the autocorrelation; NaN where it is not known."""
        return LENGTH_FACTOR * self.autocorrelation_time() * self.travelled / max(self.count, 1)


def first_steps(
    errors_at: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor, target: float, dim: int
) -> Tensor:
    """
    Step sizes ``(K,)``, below ``start``, whose first energy errors are no larger than the target: ``errors_at`` gives the mean
    squares ``(K,)`` of the errors of single steps of given sizes and whether all were finite. Half of the sizes found is returned: what
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
