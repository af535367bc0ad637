# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""Perturbed minima by minibatches, each with a twin at :math:`\lambda = 0` on the same batches."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_bnn.curvature.accumulate import NotAMinimumError
from pyro_bnn.infer.hfl.loss import Problem
from pyro_bnn.infer.hfl.perturbation import slopes
from pyro_bnn.infer.hfl.ritz import RayleighRitz
from pyro_bnn.infer.hfl.solver import Solver
from pyro_bnn.infer.hfl.task import Found, Task
from pyro_bnn.model.data import Batch, iter_batches
from pyro_bnn.ops.krylov import largest_eigenvalue

MOMENTUM = 0.9
#: What is added to the gradients of each run, from offsets of shape ``(S, p)`` and a batch.
Push = Callable[[Tensor, Batch], Tensor]


def fine_tune(
    problem: Problem, solver: Solver, num_runs: int, push: Push, *, num_epochs: int, rounds: int = 1
) -> Tensor:
    r"""
    Averaged offsets from the point estimate, shape ``(S, p)``, of momentum SGD in S runs that see the same batches.

    A run ends in the average of the last quarter of its iterates, which is off by the covariance of iterates and
    batch curvatures, and by slow convergence. Further rounds start there, at :math:`\theta_a`, and replace batch gradients
    by :math:`\nabla L_b(\theta) - \nabla L_b(\theta_a) + \nabla L(\theta_a)`, whose noise vanishes with the step that is
    left: each divides the error by about the factor that the first gained.

    :raises NotAMinimumError: if a run diverges.

    Source: Johnson and Zhang (2013), "Accelerating stochastic gradient descent using predictive variance reduction",
    for the later rounds.
    """
    rate = 0.3 / float(largest_eigenvalue(lambda v: solver.scaled(problem.operator(v)), problem.latent))
    epochs = max(1, num_epochs // rounds)
    anchors, at_anchors = problem.latent.new_zeros(num_runs, problem.latent.shape[0]), None
    for _ in range(rounds):
        for _ in range(10):
            found = _descend(problem, solver, rate, anchors, at_anchors, push, epochs)
            if found is not None:
                break
            rate /= 2  # a single batch is more curved than all the data
        else:
            raise NotAMinimumError(
                "the stochastic minimisation diverges at every step size: the point estimate is not a minimum. Use "
                "method='cg', which tells where."
            )
        anchors = found
        at_anchors = problem.gradients(anchors) if rounds > 1 else None
    return anchors


def _descend(
    problem: Problem,
    solver: Solver,
    rate: float,
    anchors: Tensor,
    at_anchors: Tensor | None,
    push: Push,
    epochs: int,
) -> Tensor | None:
    """One round from the anchors, with variance reduction where their full gradients are given; ``None`` if it diverges."""
    limit = 10 * (1 + float(problem.latent.norm()))
    scale = sum(1 for _ in iter_batches(problem.data))
    offsets, velocity, iterates, count = anchors, torch.zeros_like(anchors), torch.zeros_like(anchors), 0
    for epoch in range(epochs):
        for batch in iter_batches(problem.data):
            gradients = problem.batch_gradients(offsets, batch, scale) + push(offsets, batch)
            if at_anchors is not None:
                gradients += at_anchors - problem.batch_gradients(anchors, batch, scale)
            velocity = MOMENTUM * velocity - rate * solver.scaled(gradients)
            offsets = offsets + velocity
            if epoch >= epochs - max(1, epochs // 4):
                iterates, count = iterates + offsets, count + 1
        problem.gradient_evaluations += len(anchors) * (1 if at_anchors is None else 2)
        if not float(offsets.norm(dim=-1).max()) < limit:
            return None
    return iterates / count


def paired(task: Task) -> Found:
    r"""
    Differences between stochastic minimisations of :math:`L - \lambda_j f_j` and of L on the same batches, and what they span.

    The noise of the batches moves a run and its twin alike and cancels in their difference. What is left is slow
    convergence along flat directions. A quarter of the epochs goes into these runs; the others into full gradients at points
    to both sides of the point estimate, along what was found and then along what it leaves over: :class:`RayleighRitz`
    takes the best of all that. With :math:`r_j` the gradient that is left, the variance is too small by
    :math:`r_j^\top P^{-1} r_j`; the residual is the root of the largest share, the distance from the minimum over ε.
    """
    problem, solver, functionals = task.problem, task.solver, task.functionals
    J = functionals.gradients
    decrement, pilot = task.solve(J, tolerance=1e-2)
    variance = (J * pilot).sum(-1).clamp(min=torch.finfo(pilot.dtype).tiny)
    shift = task.epsilon / variance.sqrt()[:, None]
    index = torch.arange(len(J), device=shift.device)

    def push(offsets: Tensor, batch: Batch) -> Tensor:
        pull = -shift * slopes(functionals, problem, offsets[:-1], index)
        return torch.cat([pull, torch.zeros_like(offsets[:1])])  # the last run is the twin

    epochs = max(1, task.num_epochs // 4)
    rounds = min(4, max(1, epochs // 10))
    offsets = fine_tune(problem, solver, len(J) + 1, push, num_epochs=epochs, rounds=rounds)
    difference = (offsets[:-1] - offsets[-1]) / shift
    ritz = RayleighRitz(J)
    apart = (difference != 0).any(-1)  # a functional without a slope has the run of its twin
    if bool(apart.any()):
        curvatures = (difference * J).sum(-1)[apart]
        measure(problem, ritz, ritz.steps(difference[apart], task.epsilon, curvatures))
    refine(problem, solver, ritz, task.epsilon, (task.num_epochs - epochs) // 2)
    left = ritz.remainders
    share = (left * task.solver(left, tolerance=1e-1)).sum(-1).clamp(min=0) / ritz.variances.clamp(
        min=torch.finfo(left.dtype).tiny
    )
    return Found.from_responses(
        J,
        ritz.displacements,
        ritz.covariance,
        residual=float(share.max().sqrt()),
        newton_decrement=decrement,
        remainders=left,
    )


def refine(problem: Problem, solver: Solver, ritz: RayleighRitz, epsilon: float, sweeps: int) -> None:
    """Adds directions of what is left, until two sweeps raise no variance by a thousandth."""
    for _ in range(sweeps):
        if ritz.has_settled(1e-3):
            break
        measure(problem, ritz, ritz.steps(ritz.rest(solver.scaled), epsilon))


def measure(problem: Problem, ritz: RayleighRitz, steps: Tensor) -> None:
    """Adds directions of shape (S, p), as long as the point estimate is moved, by differences of full gradients."""
    gradients = problem.gradients(torch.cat([steps, -steps]))
    ritz.add(steps, 0.5 * (gradients[: len(steps)] - gradients[len(steps) :]))
