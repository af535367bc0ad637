# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Schedules of the factor in front of the KL divergence."""

import math

from typing_extensions import override


class LinearAnnealing:
    r"""
    The factor :math:`\beta_t = \beta\, \min(1, (t + 1) / T)`, the schedule of Dusenberry et al. (ICML 2020), who
    anneal over 200 of 250 epochs.

    :param int num_steps: :math:`T`.
    :param float final: :math:`\beta`.

    Example::

        >>> schedule = LinearAnnealing(4)
        >>> [schedule(step) for step in (0, 1, 3, 10)]
        [0.25, 0.5, 1.0, 1.0]
    """

    def __init__(self, num_steps: int, final: float = 1.0) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, found {num_steps!r}.")
        self.num_steps, self.final = int(num_steps), float(final)

    def __call__(self, step: int) -> float:
        """
        :param int step: the number of the step, from 0.
        :return: the factor.
        """
        return self.final * min(1.0, (step + 1) / self.num_steps)


class CosineAnnealing(LinearAnnealing):
    r"""
    The factor :math:`\beta_t = \frac\beta2 (1 - \cos(\pi \min(1, (t + 1)/T)))`, which starts and ends gently.

    :param int num_steps: :math:`T`.
    :param float final: :math:`\beta`.

    Example::

        >>> round(CosineAnnealing(4)(1), 3)
        0.5
    """

    @override
    def __call__(self, step: int) -> float:
        return self.final * 0.5 * (1 - math.cos(math.pi * min(1.0, (step + 1) / self.num_steps)))


class CyclicalAnnealing(LinearAnnealing):
    r"""
    Linear annealing that starts again ``num_cycles`` times within :math:`T` steps and stays at :math:`\beta`
    afterwards; each cycle rises during its first half (Fu et al., NAACL 2019).

    :param int num_steps: :math:`T`, all cycles together.
    :param float final: :math:`\beta`.
    :param int num_cycles: number of cycles.

    Example::

        >>> schedule = CyclicalAnnealing(8, num_cycles=2)
        >>> [schedule(step) for step in range(9)]
        [0.5, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, num_steps: int, final: float = 1.0, num_cycles: int = 4) -> None:
        super().__init__(num_steps, final)
        self.num_cycles = num_cycles

    @override
    def __call__(self, step: int) -> float:
        if step >= self.num_steps:
            return self.final
        length = self.num_steps / self.num_cycles
        return self.final * min(1.0, 2 * (step % length + 1) / length)
