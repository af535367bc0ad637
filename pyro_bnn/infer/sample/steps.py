# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Schedules of the step size of minibatch samplers."""

import math
from collections.abc import Callable
from typing import Any

from typing_extensions import override

from pyro_bnn.ops.options import require_count, require_number


class StepSchedule:
    """
    The step size of every step; all of them sample.

    :param step_size: a number, or a function of the number of the step, from 0.

    Example::

        >>> StepSchedule(0.1)(7), StepSchedule(lambda t: 0.1 / (1 + t))(1)
        (0.1, 0.05)
    """

    def __init__(self, step_size: float | Callable[[int], float]) -> None:
        if not callable(step_size):
            require_number("step_size", step_size, above=0)
        self.step_size = step_size

    def __call__(self, step: int) -> float:
        """
        :param int step: the number of the step, from 0, those of the warm-up included.
        :return: the step size.
        """
        return float(self.step_size(step) if callable(self.step_size) else self.step_size)

    def cycle(self, step: int) -> int:
        """
        :param int step: the number of the step.
        :return: the number of its cycle, from 0.
        """
        return 0

    def is_sampling(self, step: int) -> bool:
        """
        :param int step: the number of the step.
        :return: whether it samples; otherwise it explores, without noise, and its draws are not kept.
        """
        return True


class PolynomialSteps(StepSchedule):
    r"""
    Decreasing steps :math:`h_t = h_0 (1 + t / b)^{-\gamma/2}`, so that :math:`h_t^2`, the step of Welling and Teh (2011), is their
    :math:`a (b + t)^{-\gamma}`.

    The bias of a scheme goes to zero with the step, for :math:`\gamma` of at most 1. Draws count alike, although later ones are
    closer to each other; their averages weighted by :math:`h_t^2` can be taken with ``sample_stats["step_size"]``.

    :param float step_size: :math:`h_0`.
    :param float scale: :math:`b`, in steps.
    :param float power: :math:`\gamma`, above 0 and at most 1; 1/3 has the smallest mean squared error in the long run (Teh,
        Thiery and Vollmer, 2016).
    :raises ValueError: for numbers outside of their ranges.

    Example::

        >>> steps = PolynomialSteps(0.2, scale=100, power=1.0)
        >>> steps(0), steps(300)
        (0.2, 0.1)
    """

    def __init__(self, step_size: float, *, scale: float = 1000.0, power: float = 1 / 3) -> None:
        require_number("step_size", step_size, above=0)
        require_number("scale", scale, above=0)
        require_number("power", power, above=0, below=math.nextafter(1, 2))
        super().__init__(step_size)
        self.start, self.scale, self.power = float(step_size), float(scale), float(power)

    @override
    def __call__(self, step: int) -> float:
        return self.start * (1 + step / self.scale) ** (-self.power / 2)


class CyclicalSteps(StepSchedule):
    r"""
    Cycles of steps that start large, to leave a mode, and end small, to sample another (Zhang et al., 2020):
    :math:`h_t = h_0 \sqrt{\tfrac12 (1 + \cos \pi r_t)}` with :math:`r_t = (t \bmod L) / L`, so that :math:`h_t^2` is their cosine schedule.

    While :math:`r_t < \beta` a cycle explores: steps without noise, whose draws are not kept. From then on it samples, at temperature
    one. Cycles begin with the first step, also of the warm-up. The draws of all cycles count alike, whatever the mass of the
    modes they are in: the weights of modes that are far apart are **not** those of the posterior.

    :param float step_size: :math:`h_0`.
    :param int cycle_length: :math:`L`, in steps.
    :param float exploration: :math:`\beta`, from 0 to below 1.
    :raises ValueError: for numbers outside of their ranges, or if no step of a cycle samples.

    Example::

        >>> steps = CyclicalSteps(0.2, cycle_length=4, exploration=0.5)
        >>> [round(steps(t), 3) for t in range(5)], [steps.is_sampling(t) for t in range(4)], steps.cycle(4)
        ([0.2, 0.185, 0.141, 0.077, 0.2], [False, False, True, True], 1)
    """

    def __init__(self, step_size: float, *, cycle_length: int, exploration: float = 0.5) -> None:
        require_number("step_size", step_size, above=0)
        require_count("cycle_length", cycle_length)
        require_number("exploration", exploration, least=0, below=1)
        super().__init__(step_size)
        self.start, self.cycle_length, self.exploration = (
            float(step_size),
            int(cycle_length),
            float(exploration),
        )
        if not any(map(self.is_sampling, range(self.cycle_length))):
            raise ValueError(
                f"no step of a cycle of {cycle_length} steps samples with exploration={exploration:g}: make cycle_length larger "
                "or exploration smaller."
            )

    def _phase(self, step: int) -> float:
        return (step % self.cycle_length) / self.cycle_length

    @override
    def __call__(self, step: int) -> float:
        return self.start * math.sqrt(0.5 * (1 + math.cos(math.pi * self._phase(step))))

    @override
    def cycle(self, step: int) -> int:
        return step // self.cycle_length

    @override
    def is_sampling(self, step: int) -> bool:
        return self._phase(step) >= self.exploration


def as_schedule(step_size: Any) -> StepSchedule:
    """A schedule, whatever a user passes as step size."""
    return step_size if isinstance(step_size, StepSchedule) else StepSchedule(step_size)


def step_at(schedule: StepSchedule, step: int) -> float:
    """The size of a step; raises if a schedule gives no positive number."""
    size = schedule(step)
    if not (math.isfinite(size) and size > 0):
        raise ValueError(
            f"step_size: the schedule gives {size!r} at step {step}; step sizes are positive numbers."
        )
    return size
