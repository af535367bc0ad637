# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""From what a method has found to its certificate."""

import torch
from torch import Tensor

from pyro_bnn.infer.hfl.certificate import Certificate, covariance_bounds, variance_bounds
from pyro_bnn.infer.hfl.task import Found, Task
from pyro_bnn.ops.enclosure import Enclosure, gaining


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
        D = D + steps
    gap = residual_gap(task, G, D, R)
    others = max(gap, image_gap(task, enclosure))
    if found.captured is None:
        joint = covariance_bounds(enclosure, G, D, R, gap, images=others)
        diagonal = variance_bounds(enclosure, G, D, R, gap, rest=found.rest, images=others)
        return Certificate(*diagonal, joint, others, enclosure, remainders, solver.precision)
    parts = [variance_bounds(enclosure, g, *enclosure.solve(g), others) for g in task.functionals.rows()]
    lower, upper = (torch.cat(side) for side in zip(*parts, strict=True))
    return Certificate(lower, upper, None, others, enclosure, remainders, solver.precision)


def image_gap(task: Task, enclosure: Enclosure) -> float:
    """
    How far the residual of any solution in the span of the directions may be from the true one, as :func:`residual_gap`.

    It is the error of the images in the combination, whose coefficients have the length of the standard deviation.
    """
    if enclosure.is_recursive or not len(enclosure.directions):
        return 0.0
    directions, images = enclosure.directions, enclosure.images
    return len(directions) ** 0.5 * residual_gap(task, images, directions, torch.zeros_like(images))


def residual_gap(task: Task, G: Tensor, D: Tensor, R: Tensor) -> float:
    r"""
    How far residuals R are from :math:`G - DP`, in the norm of the bound and in posterior standard deviations, doubled.

    All are computed again if that takes a twentieth of the products so far, and random combinations of them otherwise, of which
    one is the least: the expected square of one of signs is the sum of the squares of all.
    """
    solver = task.solver
    assert solver.metric is not None
    scale = (D * (G + R)).sum(-1).clamp(min=0).rsqrt()
    weights = torch.diag(torch.where(scale.isfinite(), scale, 0.0))
    number = max(1, min(len(D), solver.products // 20))
    exact = number == len(D)
    if not exact:
        generator = torch.Generator(device=D.device).manual_seed(0)
        signs = torch.randint(0, 2, (number, len(D)), generator=generator, device=D.device)
        weights = (signs.to(D.dtype) * 2 - 1) @ weights
    error = weights @ G - weights @ R - task.problem.operator(weights @ D)
    solver.products += number
    squares = (error * solver.metric(error)).sum(-1).clamp(min=0)
    return 2 * float((squares.max() if exact else squares.mean()).sqrt()) if len(D) else 0.0
