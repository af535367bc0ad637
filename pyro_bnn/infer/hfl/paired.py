# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""Perturbed minima by minibatches, each with a twin at :math:`\lambda = 0` on the same batches."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_bnn.curvature.accumulate import NotAMinimumError
from pyro_bnn.infer.hfl.functionals import Functionals
from pyro_bnn.infer.hfl.loss import Problem
from pyro_bnn.infer.hfl.perturbation import Perturbation, slopes
from pyro_bnn.infer.hfl.solver import Solver
from pyro_bnn.model.data import Batch, iter_batches
from pyro_bnn.ops.krylov import largest_eigenvalue


def fine_tune(
    problem: Problem,
    solver: Solver,
    num_runs: int,
    push: Callable[[Tensor, Batch], Tensor],
    *,
    num_epochs: int,
    momentum: float = 0.9,
    rounds: int = 1,
) -> Tensor:
    r"""
    Momentum SGD from the point estimate, in several runs that see the same batches in the same order.

    A run ends in the average of the last quarter of its iterates, which is off by the covariance of iterates and
    batch curvatures, and by slow convergence. Further rounds start there, at :math:`\theta_a`, and replace batch gradients
    by :math:`\nabla L_b(\theta) - \nabla L_b(\theta_a) + \nabla L(\theta_a)`, whose noise vanishes with the step that is
    left: each divides the error by about the factor that the first gained.

    :param problem: the loss.
    :param solver: its preconditioner scales the steps.
    :param num_runs: S.
    :param push: the gradient of what is added to the loss of each run, from offsets of shape ``(S, p)`` and a batch.
    :param num_epochs: passes over the data, in all rounds together.
    :param momentum: of the SGD.
    :param rounds: how many rounds.
    :return: averaged offsets from the point estimate, shape ``(S, p)``.
    :raises NotAMinimumError: if a run diverges.

    Source: Johnson and Zhang (2013), "Accelerating stochastic gradient descent using predictive variance reduction",
    for the later rounds.
    """

    def scaled(r: Tensor) -> Tensor:
        return r if solver.preconditioner is None else solver.preconditioner(r)

    rate = 0.3 / float(largest_eigenvalue(lambda v: scaled(problem.operator(v)), problem.latent))
    limit = 10 * (1 + float(problem.latent.norm()))
    scale = sum(1 for _ in iter_batches(problem.data))
    epochs = max(1, num_epochs // rounds)
    anchors, anchor_gradients = problem.latent.new_zeros(num_runs, problem.latent.shape[0]), None
    for _ in range(rounds):
        for _ in range(10):
            offsets = anchors
            velocity, average, averaged = torch.zeros_like(offsets), torch.zeros_like(offsets), 0
            for epoch in range(epochs):
                for batch in iter_batches(problem.data):
                    gradients = problem.batch_gradients(offsets, batch, scale) + push(offsets, batch)
                    if anchor_gradients is not None:
                        gradients += anchor_gradients - problem.batch_gradients(anchors, batch, scale)
                    velocity = momentum * velocity - rate * scaled(gradients)
                    offsets = offsets + velocity
                    if epoch >= epochs - max(1, epochs // 4):
                        average, averaged = average + offsets, averaged + 1
                problem.gradient_evaluations += num_runs * (1 if anchor_gradients is None else 2)
                if not float(offsets.norm(dim=-1).max()) < limit:
                    break
            else:
                break
            rate /= 2  # a single batch is more curved than all the data
        else:
            raise NotAMinimumError(
                "the stochastic minimisation diverges at every step size: the point estimate is not a minimum. Use "
                "method='cg', which tells where."
            )
        anchors = average / averaged
        anchor_gradients = problem.gradients(anchors) if rounds > 1 else None
    return anchors


def paired(
    problem: Problem,
    functionals: Functionals,
    solver: Solver,
    pilot_variance: Tensor,
    epsilon: float,
    *,
    num_epochs: int,
) -> Perturbation:
    r"""
    Differences between stochastic minimisations of :math:`L - \lambda_j f_j` and of L on the same batches.

    The noise of the batches moves a run and its twin alike and cancels in their difference. What is left is slow
    convergence along flat directions, so that the estimate is too small rather than too large; a preconditioner
    makes it faster. With :math:`r_j` the gradient that is left, :math:`\sqrt{r_j^\top P^{-1} r_j}/\epsilon` bounds the
    relative error of the variance to first order (Cauchy and Schwarz); the largest is returned as ``residual``.

    :param problem: the loss.
    :param functionals: the functionals.
    :param solver: its preconditioner scales the steps.
    :param pilot_variance: rough variances that set λ, shape ``(m,)``.
    :param epsilon: ε.
    :param num_epochs: passes over the data.
    :return: a :class:`~pyro_bnn.infer.hfl.perturbation.Perturbation`.
    """
    shift = epsilon / pilot_variance.clamp(min=torch.finfo(pilot_variance.dtype).tiny).sqrt()
    index = torch.arange(len(functionals), device=shift.device)

    def pull(offsets: Tensor) -> Tensor:
        return -shift[:, None] * slopes(functionals, problem, offsets, index)

    def push(offsets: Tensor, batch: Batch) -> Tensor:
        twin = torch.zeros_like(offsets[:1])
        return torch.cat([pull(offsets[:-1]), twin])

    rounds = min(4, max(1, num_epochs // 10))
    offsets = fine_tune(problem, solver, len(shift) + 1, push, num_epochs=num_epochs, rounds=rounds)
    values = torch.stack([functionals.at(problem.latent + offset).detach() for offset in offsets])
    difference = offsets[:-1] - offsets[-1]
    left = problem.gradients(difference) + pull(difference)
    decrement = (left * solver(left, tolerance=1e-1)).sum(-1).clamp(min=0).sqrt().max() / epsilon
    return Perturbation(
        difference / shift[:, None], (values[:-1] - values[-1]) / shift[:, None], float(decrement)
    )
