# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""Perturbed minima by minibatches, each with a twin at :math:`\lambda = 0` on the same batches."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_bnn.infer.curvature import NotAMinimumError
from pyro_bnn.infer.data import Batch, iter_batches
from pyro_bnn.infer.hfl.functionals import Functionals
from pyro_bnn.infer.hfl.perturbation import Perturbation, slopes
from pyro_bnn.infer.hfl.problem import Problem
from pyro_bnn.infer.hfl.solver import Solver
from pyro_bnn.ops.krylov import largest_eigenvalue


def fine_tune(
    problem: Problem,
    solver: Solver,
    num_runs: int,
    push: Callable[[Tensor, Batch], Tensor],
    *,
    num_epochs: int,
    momentum: float = 0.9,
) -> Tensor:
    """
    Momentum SGD from the point estimate, in several runs that see the same batches in the same order.

    :param problem: the loss.
    :param solver: its preconditioner scales the steps.
    :param num_runs: S.
    :param push: the gradient of what is added to the loss of each run, from offsets of shape ``(S, p)`` and a batch.
    :param num_epochs: passes over the data; the iterates of the last quarter are averaged.
    :param momentum: of the SGD.
    :return: averaged offsets from the point estimate, shape ``(S, p)``.
    :raises NotAMinimumError: if a run diverges.
    """

    def scaled(r: Tensor) -> Tensor:
        return r if solver.preconditioner is None else solver.preconditioner(r)

    rate = 0.3 / float(largest_eigenvalue(lambda v: scaled(problem.operator(v)), problem.latent))
    limit = 10 * (1 + float(problem.latent.norm()))
    scale = sum(1 for _ in iter_batches(problem.data))
    for _ in range(10):
        offsets = problem.latent.new_zeros(num_runs, problem.latent.shape[0])
        velocity, average, averaged = torch.zeros_like(offsets), torch.zeros_like(offsets), 0
        for epoch in range(num_epochs):
            for batch in iter_batches(problem.data):
                gradients = problem.batch_gradients(offsets, batch, scale) + push(offsets, batch)
                velocity = momentum * velocity - rate * scaled(gradients)
                offsets = offsets + velocity
                if epoch >= num_epochs - max(1, num_epochs // 4):
                    average, averaged = average + offsets, averaged + 1
            problem.gradient_evaluations += num_runs
            if not float(offsets.norm(dim=-1).max()) < limit:
                break
        else:
            return average / averaged
        rate /= 2  # a single batch is more curved than all the data
    raise NotAMinimumError(
        "the stochastic minimisation diverges at every step size: the point estimate is not a minimum. Use "
        "method='cg', which tells where."
    )


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
    makes it faster.

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

    offsets = fine_tune(problem, solver, len(shift) + 1, push, num_epochs=num_epochs)
    values = torch.stack([functionals.at(problem.latent + offset).detach() for offset in offsets])
    difference = offsets[:-1] - offsets[-1]
    left = problem.gradients(difference) + pull(difference)
    decrement = (left * solver(left, tolerance=1e-1)).sum(-1).clamp(min=0).sqrt().max() / epsilon
    return Perturbation(
        difference / shift[:, None], (values[:-1] - values[-1]) / shift[:, None], float(decrement)
    )
