# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""The limit of vanishing perturbations: :math:`P d_j = g_j` by block conjugate gradients."""

from pyro_bnn.infer.hfl.task import Found, Task
from pyro_bnn.ops.inner import inner


def cg(task: Task) -> Found:
    """One linear solve per functional."""
    J = task.functionals.gradients
    decrement, D = task.solve(J)
    remainders, rest = task.left_over
    responses = inner(J, D)
    if remainders is not None:  # orthogonal to D in one Krylov space, but for rounding
        responses = responses + inner(D, remainders)
    return Found.from_responses(
        J,
        D,
        responses,
        newton_decrement=decrement,
        residual=task.solver.residual,
        remainders=remainders,
        rest=rest,
    )
