# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""One computation: a method, its solver, what it found, and the bounds of that."""

from collections.abc import Callable
from typing import Any, Literal

import torch

from pyro_bnn.infer.hfl.bound import prior_bound
from pyro_bnn.infer.hfl.certify import certify
from pyro_bnn.infer.hfl.diagnostics import HFLWarning
from pyro_bnn.infer.hfl.direct import cg
from pyro_bnn.infer.hfl.functionals import Functionals
from pyro_bnn.infer.hfl.loss import Problem
from pyro_bnn.infer.hfl.nystrom import probe
from pyro_bnn.infer.hfl.paired import paired
from pyro_bnn.infer.hfl.perturbation import central, one_sided
from pyro_bnn.infer.hfl.result import HFLResult
from pyro_bnn.infer.hfl.sandwich import sandwich
from pyro_bnn.infer.hfl.setup import set_proximal
from pyro_bnn.infer.hfl.solver import Preconditioner, Solver
from pyro_bnn.infer.hfl.task import Found, Task
from pyro_bnn.ops.block_cg import ConjugateBasis
from pyro_bnn.ops.notice import warn_user

Method = Literal["cg", "one_sided", "central", "paired", "probe"]

#: A method is a function in a file of its own.
METHODS: dict[str, Callable[[Task], Found]] = {
    "cg": cg,
    "one_sided": one_sided,
    "central": central,
    "paired": paired,
    "probe": probe,
}


def solve_for(
    problem: Problem,
    functionals: Functionals,
    *,
    method: str = "cg",
    epsilon: float | None = None,
    tolerance: float | None = None,
    max_iter: int | None = None,
    proximal: float | Literal["auto"] = 0.0,
    preconditioner: Preconditioner | None = None,
    rank: int = 64,
    block_size: int = 64,
    robust: bool = False,
    check: bool = True,
    num_probes: int = 32,
    num_epochs: int = 200,
    map_tolerance: float = 0.1,
    basis: ConjugateBasis | None = None,
) -> HFLResult:
    """The covariance of functionals; see :func:`~pyro_bnn.infer.hfl.solve`. ``basis`` holds directions of earlier solves."""
    double = problem.latent.dtype == torch.float64
    epsilon = epsilon if epsilon is not None else (1e-3 if double else 3e-3)
    notes = [*_resolution(method, epsilon, double=double), *set_proximal(problem, proximal)]
    for text in notes:  # now, because what follows may raise
        warn_user(text, HFLWarning)
    bound = prior_bound(problem)
    width = None if bound.precision is None else tolerance
    residual = tolerance if tolerance is not None else (1e-6 if double else 1e-4)
    solver = Solver(
        problem, tolerance=residual, max_iter=max_iter, preconditioner=preconditioner, rank=rank,
        block_size=block_size, bound=bound, width=width, basis=basis,
    )  # fmt: skip
    task = Task(problem, functionals, solver, epsilon, num_epochs, num_probes, check)
    found = METHODS[method](task)
    options: dict[str, Any] = {
        "sandwich": sandwich(problem.model, problem.latent, problem.data, found.displacements)
        if robust
        else None,
        "certificate": certify(task, found),
        "uncertified": bound.reason,
        "warnings": notes,
    }
    result = _result(task, found, method, **options)
    limits = {"largest_curvature": solver.largest_curvature, "map_tolerance": map_tolerance}
    result.warn(tolerance=residual, width=width, **limits)
    return result


def _resolution(method: str, epsilon: float, *, double: bool) -> list[str]:
    """What to say of perturbations that the precision of the numbers does not resolve."""
    if double or method not in ("one_sided", "central") or 1e-3 <= epsilon <= 3e-2:
        return []
    return [
        f"float32 resolves perturbations of 1e-3 to 3e-2 standard deviations, not {epsilon:.2g}: use "
        "epsilon=3e-3, float64, or method='cg'"
    ]


def _result(task: Task, found: Found, method: str, **options: Any) -> HFLResult:
    """What has been found, and what it took."""
    problem, solver = task.problem, task.solver
    known = {name: value for name, value in vars(found).items() if name not in ("remainders", "rest")}
    return HFLResult(
        **known,
        **options,
        method=method,
        curvature=problem.curvature,
        shape=task.functionals.shape,
        mean=task.functionals.values,
        epsilon=task.epsilon if method in ("one_sided", "central", "paired") else None,
        proximal=problem.proximal,
        smallest_curvature=solver.smallest_curvature,
        iterations=solver.iterations,
        products=solver.products,
        gradient_evaluations=problem.gradient_evaluations,
    )
