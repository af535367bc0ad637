# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Perturbed minima :math:`\arg\min L - \lambda f_j` of many functionals at once, over all the data.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bnn.curvature.accumulate import NotAMinimumError
from pyro_bnn.infer.hfl.functionals import Functionals
from pyro_bnn.infer.hfl.loss import PerturbedLoss, Problem
from pyro_bnn.infer.hfl.solver import Solver
from pyro_bnn.ops.newton import minimize_newton


@dataclass
class Perturbation:
    r"""
    Differences of perturbed minima.

    :ivar displacements: per unit of λ, shape ``(m, p)``.
    :ivar responses: of functional k to the perturbation by functional j, per unit of λ, at ``[j, k]``; shape
        ``(m, m)``.
    :ivar residual: largest Newton decrement that is left, relative to ε.
    """

    displacements: Tensor
    responses: Tensor
    residual: float


def perturb(
    problem: Problem,
    functionals: Functionals,
    solver: Solver,
    pilot: Tensor,
    epsilon: float,
    *,
    central: bool,
) -> Perturbation:
    r"""
    Minimises :math:`L - \lambda_j f_j`, and :math:`L + \lambda_j f_j` for central differences, with
    :math:`\lambda_j = \epsilon/\text{sd}_j`.

    All minimisations start from the first-order displacement and run together: each iteration computes their
    gradients and solves for all steps in one block with the curvature at the point estimate, which contracts at
    the rate ε. Where that fails, Newton's method in a trust region takes over.

    :param problem: the loss.
    :param functionals: the functionals.
    :param solver: solves with the curvature at the point estimate.
    :param pilot: displacements :math:`P^{-1}g_j`, which need not be accurate, shape ``(m, p)``.
    :param epsilon: ε.
    :param central: whether to perturb in both directions.
    :return: a :class:`Perturbation`.
    :raises NotAMinimumError: if a perturbed loss has no minimum near the point estimate.
    """
    m = len(functionals)
    variance = (functionals.gradients * pilot).sum(-1).clamp(min=torch.finfo(pilot.dtype).tiny)
    shift = epsilon / variance.sqrt()
    if central:
        shift = torch.cat([shift, -shift])
    index = torch.arange(m, device=shift.device).repeat(2 if central else 1)
    offsets = shift[:, None] * pilot[index]
    double = pilot.dtype == torch.float64
    goal, accept = (1e-7, 1e-4) if double else (1e-3, 5e-2)
    remaining = torch.full_like(shift, torch.inf)
    previous = float("inf")
    for _ in range(20):
        gradients = problem.gradients(offsets) - shift[:, None] * slopes(functionals, problem, offsets, index)
        step = solver(gradients, tolerance=1e-3)
        remaining = (gradients * step).sum(-1).clamp(min=0).sqrt() / epsilon
        worst = float(remaining.max())
        if not worst < 0.5 * previous:
            break  # at the level of rounding, or not contracting
        offsets = offsets - step
        previous = worst
        if worst <= goal:
            break
    failed = ~(remaining <= accept)
    # in float32 what is left is rounding, which Newton's method cannot mend either
    if failed.any() and problem.curvature == "hessian" and double:
        for row in failed.nonzero().squeeze(-1).tolist():
            j = int(index[row])
            loss = PerturbedLoss(problem, functionals.element(j), float(shift[row]))
            result = minimize_newton(
                loss, torch.zeros_like(offsets[row]), tolerance=accept * epsilon, max_steps=100
            )
            if result.indefinite:
                raise NotAMinimumError(
                    f"the minimisation perturbed by functional {j} met a direction of non-positive curvature: the "
                    "point estimate is not a minimum, or epsilon is too large for its basin. Call "
                    "guide.polish(data) in float64 or lower epsilon."
                )
            offsets[row] = result.point
            remaining[row] = result.decrement / epsilon
    values = torch.stack([functionals.at(problem.latent + offset).detach() for offset in offsets])
    if central:
        moved = (values[:m] - values[m:]) / (2 * shift[:m, None])
        D = (offsets[:m] - offsets[m:]) / (2 * shift[:m, None])
    else:
        moved, D = (values - functionals.values) / shift[:, None], offsets / shift[:, None]
    return Perturbation(D, moved, float(remaining.max()))


def slopes(functionals: Functionals, problem: Problem, offsets: Tensor, index: Tensor) -> Tensor:
    """
    Gradients of functional ``index[s]`` at the point estimate plus ``offsets[s]``.

    :param functionals: the functionals.
    :param problem: holds the point estimate.
    :param offsets: shape ``(S, p)``.
    :param index: shape ``(S,)``.
    :return: shape ``(S, p)``.
    """
    if functionals.linearized:
        return functionals.gradients[index]
    rows = []
    for offset, j in zip(offsets, index.tolist(), strict=True):
        leaf = (problem.latent + offset).requires_grad_(True)
        rows.append(torch.autograd.grad(functionals.at(leaf)[j], leaf, materialize_grads=True)[0])
    return torch.stack(rows)
