# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""From what a method has found to its certificate."""

import torch
from torch import Tensor

from pyro_bnn.infer.hfl.certificate import Certificate, covariance_bounds, variance_bounds
from pyro_bnn.infer.hfl.solver import Solver
from pyro_bnn.infer.hfl.task import Found, Task
from pyro_bnn.ops.enclosure import gaining, residual_error


def certify(task: Task, found: Found) -> Certificate | None:
    """The bounds of what a method has found; ``None`` where no bound of the curvature is known."""
    solver, G, D, R = task.solver, found.gradients, found.displacements, found.remainders
    if solver.precision is None:
        return None
    if R is None:
        R = G - task.problem.operator(D)
        solver.products += len(D)
    enclosure, remainders = solver.enclosing(D, G - R), R
    if not enclosure.is_recursive:
        steps, R = gaining(R, *enclosure.solve(R))
        D = steps.add_(D)  # of large models every vector matters
    gap = residual_gap(task, G, D, R)
    solver.products += enclosure.measure(task.problem.operator, _affordable(solver))
    others = gap if enclosure.is_recursive else max(gap, enclosure.gap or 0.0)
    if found.captured is None:
        joint = covariance_bounds(enclosure, G, D, R, gap)
        diagonal = variance_bounds(enclosure, G, D, R, gap, rest=found.rest)
        return Certificate(*diagonal, joint, others, enclosure, remainders, solver.precision)
    parts = [variance_bounds(enclosure, g, *enclosure.solve(g), others) for g in task.functionals.rows()]
    lower, upper = (torch.cat(side) for side in zip(*parts, strict=True))
    return Certificate(lower, upper, None, others, enclosure, remainders, solver.precision)


def residual_gap(task: Task, G: Tensor, D: Tensor, R: Tensor) -> float:
    r"""How far residuals R are from :math:`G - DP`, in the norm of the bound and in posterior standard deviations, doubled."""
    solver = task.solver
    assert solver.metric is not None
    scale = (D * (G + R)).sum(-1).clamp(min=0).rsqrt()
    scale = torch.where(scale.isfinite(), scale, 0.0)
    number = min(len(D), _affordable(solver))
    solver.products += number
    return residual_error(task.problem.operator, solver.metric, D, lambda w: w @ G - w @ R, scale, number)


def _affordable(solver: Solver) -> int:
    """How many products may check the others: a twentieth of them, and three for what one combination may miss by chance."""
    return max(3, solver.products // 20)
