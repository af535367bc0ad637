# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""Perturbed minima :math:`\arg\min L - \lambda f_j` of many functionals at once, over all the data."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bnn.curvature.accumulate import NotAMinimumError
from pyro_bnn.infer.hfl.functionals import Functionals
from pyro_bnn.infer.hfl.loss import Problem
from pyro_bnn.infer.hfl.task import Found, Task
from pyro_bnn.model.data import is_single_batch
from pyro_bnn.ops.newton import newton_cg


class Perturbation(NamedTuple):
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


def one_sided(task: Task) -> Found:
    """Differences from the point estimate, with an error of O(ε)."""
    return _differences(task, central=False)


def central(task: Task) -> Found:
    """Differences of perturbations in both directions, with an error of O(ε²)."""
    return _differences(task, central=True)


def _differences(task: Task, *, central: bool) -> Found:
    J = task.functionals.gradients
    decrement, pilot = task.solve(J, tolerance=1e-2)
    D, responses, residual = perturb(task, pilot, central=central)
    agreement = None
    if task.check and len(J):
        agreement = agree(task, pilot, responses.diagonal(), central=central)
    return Found.from_responses(
        J, D, responses, residual=residual, newton_decrement=decrement, agreement=agreement
    )


def agree(task: Task, pilot: Tensor, variances: Tensor, *, central: bool) -> float:
    """The largest relative difference between variances at ε, shape (m,), and at ε/3, on at most 8 functionals."""
    m = len(task.functionals)
    chosen = torch.linspace(0, m - 1, min(m, 8), device=pilot.device).round().long().unique()
    some = replace(task, functionals=task.functionals.subset(chosen), epsilon=task.epsilon / 3)
    theirs = perturb(some, pilot[chosen], central=central).responses.diagonal()
    ours, tiny = variances[chosen], torch.finfo(variances.dtype).tiny
    return float(((ours - theirs).abs() / torch.maximum(ours.abs(), theirs.abs()).clamp(min=tiny)).max())


def perturb(task: Task, pilot: Tensor, *, central: bool) -> Perturbation:
    r"""
    Minimises :math:`L - \lambda_j f_j`, and :math:`L + \lambda_j f_j` for central differences, with
    :math:`\lambda_j = \epsilon/\text{sd}_j`, from rough displacements :math:`P^{-1}g_j` of shape ``(m, p)``.

    :raises NotAMinimumError: if a perturbed loss has no minimum near the point estimate.
    """
    problem, functionals, m = task.problem, task.functionals, len(task.functionals)
    variance = (functionals.gradients * pilot).sum(-1).clamp(min=torch.finfo(pilot.dtype).tiny)
    shift = task.epsilon / variance.sqrt()
    index = torch.arange(m, device=shift.device)
    if central:
        shift, index = torch.cat([shift, -shift]), index.repeat(2)
    goal, accept = (1e-7, 1e-4) if pilot.dtype == torch.float64 else (1e-3, 5e-2)
    offsets, remaining = _contract(task, pilot[index], shift, index, goal)
    failed = ~(remaining <= accept)
    # in float32 what is left is rounding, which Newton's method cannot mend either
    if problem.curvature == "hessian" and pilot.dtype == torch.float64:
        for row in failed.nonzero().squeeze(-1).tolist():
            offsets[row], decrement = _newton(task, int(index[row]), float(shift[row]), accept)
            remaining[row] = decrement / task.epsilon
    values = torch.stack([functionals.at(problem.latent + offset).detach() for offset in offsets])
    if central:
        shift = 2 * shift[:m]
        values, offsets = values[:m] - values[m:], offsets[:m] - offsets[m:]
    else:
        values = values - functionals.values
    return Perturbation(offsets / shift[:, None], values / shift[:, None], float(remaining.max()))


def _contract(task: Task, pilot: Tensor, shift: Tensor, index: Tensor, goal: float) -> tuple[Tensor, Tensor]:
    """
    The minima of all perturbed losses together, shape (S, p), and the decrements that are left, shape (S,).

    They start from the first-order displacements; each iteration computes all gradients and solves for all steps in one block
    with the curvature at the point estimate, which contracts at the rate ε.
    """
    problem, offsets = task.problem, shift[:, None] * pilot
    remaining, previous = torch.full_like(shift, torch.inf), float("inf")
    for _ in range(20):
        slope = slopes(task.functionals, problem, offsets, index)
        gradients = problem.gradients(offsets) - shift[:, None] * slope
        step = task.solver(gradients, tolerance=1e-3)
        remaining = (gradients * step).sum(-1).clamp(min=0).sqrt() / task.epsilon
        worst = float(remaining.max())
        if not worst < 0.5 * previous:
            break  # at the level of rounding, or not contracting
        offsets, previous = offsets - step, worst
        if worst <= goal:
            break
    return offsets, remaining


def _newton(task: Task, j: int, shift: float, accept: float) -> tuple[Tensor, float]:
    """One minimum by Newton's method in a trust region, where the contraction has failed, and its decrement."""
    problem = task.problem
    result = newton_cg(
        problem.perturbed(lambda u: task.functionals.at(u)[j], shift),
        torch.zeros_like(problem.latent),
        tolerance=accept * task.epsilon,
        max_steps=100,
        keep_graphs=is_single_batch(problem.data),
    )
    problem.gradient_evaluations += result.evaluations
    if result.indefinite:
        raise NotAMinimumError(
            f"the minimisation perturbed by functional {j} met a direction of non-positive curvature: the "
            "point estimate is not a minimum, or epsilon is too large for its basin. Call "
            "guide.polish(data) in float64 or lower epsilon."
        )
    return result.point, result.decrement


def slopes(functionals: Functionals, problem: Problem, offsets: Tensor, index: Tensor) -> Tensor:
    """Gradients of functional ``index[s]`` at the point estimate plus ``offsets[s]``, shape (S, p)."""
    if functionals.linearized:
        return functionals.gradients[index]
    rows = []
    for offset, j in zip(offsets, index.tolist(), strict=True):
        leaf = (problem.latent + offset).requires_grad_(True)
        rows.append(torch.autograd.grad(functionals.at(leaf)[j], leaf, materialize_grads=True)[0])
    return torch.stack(rows)
