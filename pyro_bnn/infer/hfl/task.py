# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What every method of Hessian-free Laplace is given, and what it hands back."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from pyro_bnn.curvature.accumulate import NotAMinimumError
from pyro_bnn.infer.hfl.functionals import Functionals
from pyro_bnn.infer.hfl.loss import Problem
from pyro_bnn.infer.hfl.low_rank import low_rank_factor, unit_scale
from pyro_bnn.infer.hfl.solver import Solver


@dataclass
class Task:
    """The loss, m functionals, the solver of linear systems, and the options of :func:`~pyro_bnn.infer.hfl.solve`."""

    problem: Problem
    functionals: Functionals
    solver: Solver
    epsilon: float = 1e-3
    num_epochs: int = 200
    num_probes: int = 32
    check: bool = True

    def solve(self, rows: Tensor, *, tolerance: float | None = None) -> tuple[float, Tensor]:
        """The Newton decrement of the point estimate, and displacements of shape (S, p), from one block of solves."""
        gradient, solver = self.problem.gradient, self.solver
        rhs = torch.cat([gradient[None], rows])
        if tolerance is not None or solver.width is None or solver.metric is None:
            solved = solver(rhs, tolerance=tolerance)
        else:
            widths = torch.full_like(rhs[:, 0], solver.width)
            # a decrement is wanted within a factor, and not at all where it is known to be below 1e-3
            widths[0] = torch.inf if float(gradient @ solver.metric(gradient[None])[0]) < 1e-6 else 0.5
            solved = solver.enclosed(rhs, widths)
        return float((solved[0] @ gradient).clamp(min=0).sqrt()), solved[1:]

    @property
    def left_over(self) -> tuple[Tensor | None, Tensor | None]:
        """What the displacements that were solved for last leave over, and its bounds; see :class:`Found`."""
        remainder, rest = self.solver.remainder, self.solver.rest
        return None if remainder is None else remainder[1:], None if rest is None else rest[1:]


@dataclass
class Found:
    """
    Displacements, the covariance they give, and how good they are; see :class:`~pyro_bnn.infer.hfl.HFLResult`.

    :ivar remainders: what solves of displacements left over, shape (m, p), where they are known.
    :ivar rest: bounds of what these are to the variances, shape (m,), where solves had them.
    """

    gradients: Tensor
    displacements: Tensor
    variances: Tensor
    factor: Tensor
    half: Tensor
    residual: float = 0.0
    antisymmetry: float = 0.0
    newton_decrement: float = 0.0
    agreement: float | None = None
    captured: float | None = None
    captured_error: float | None = None
    remainders: Tensor | None = None
    rest: Tensor | None = None

    @classmethod
    def from_responses(cls, J: Tensor, D: Tensor, responses: Tensor, **diagnostics: Any) -> Self:
        """From gradients and displacements, shape (m, p), and the responses of all functionals to them, shape (m, m)."""
        variances = responses.diagonal().clone()
        if (variances < 0).any():
            raise NotAMinimumError(
                f"{int((variances < 0).sum())} of {len(variances)} variances are negative (smallest "
                f"{float(variances.min()):.3g}). A minimum pulled towards a functional cannot lower it, so this proves that "
                "the point estimate is not a minimum or that a minimisation failed (as it does in float32 for an epsilon "
                "below 1e-3). Call guide.polish(data) in float64, or use curvature='ggn'."
            )
        sd = unit_scale(variances)
        correlation = responses / sd[:, None] / sd
        skew, even = 0.5 * (correlation - correlation.mT), 0.5 * (correlation + correlation.mT)
        antisymmetry = float(skew.abs().max()) if len(sd) else 0.0
        factor = low_rank_factor(J / sd[:, None], D / sd[:, None], even, antisymmetry)
        return cls(J, D, variances, factor, J @ factor, antisymmetry=antisymmetry, **diagnostics)
