# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""From a guide, data and targets to a loss around the point estimate and functionals of it."""

from typing import Any, Literal

from pyro import poutine
from torch import Tensor

from pyro_bnn.curvature.accumulate import Curvature
from pyro_bnn.infer.hfl.functionals import Functional, Functionals, output_functionals, user_functionals
from pyro_bnn.infer.hfl.loss import Problem
from pyro_bnn.model.arguments import as_data
from pyro_bnn.model.data import iter_batches, repeatable_batches
from pyro_bnn.model.handlers import SubstituteMessenger
from pyro_bnn.model.packed import PackedModel
from pyro_bnn.ops.krylov import smallest_eigenvalue
from pyro_bnn.ops.options import require_number


def set_up(
    guide: Any,
    data: Any,
    targets: Any,
    functional: Functional | None,
    curvature: Curvature,
    *,
    correct_gradient: bool = True,
    chunk_size: int,
) -> tuple[Problem, Functionals]:
    """The loss around a point estimate, and the functionals at the targets; see :func:`pyro_bnn.infer.hfl.solve`."""
    data = repeatable_batches(data)
    if targets is None and functional is None:
        raise ValueError(
            "nothing to compute a variance of: pass targets=(x_test,) for the outputs at test inputs, or "
            "functional=lambda latents: ... for a function of the latents"
        )
    if targets is not None and functional is None:  # arguments of the model
        seen = getattr(guide, "argument_kinds", None)
        targets = as_data(getattr(guide, "model", guide), (targets,), {}, "targets", seen=seen)
    batches = [] if targets is None else list(iter_batches(targets))
    if targets is not None and len(batches) != 1:
        raise ValueError(
            f"targets hold {len(batches)} batches, expected one: concatenate the inputs, or solve for one batch at a "
            "time (AutoHessianFreeLaplace.add_targets keeps them together)"
        )
    batch = batches[0] if batches else None
    model, latent = point_estimate(guide, data)
    problem = Problem(
        model, latent, data, curvature, correct_gradient=correct_gradient, chunk_size=chunk_size,
        tau=getattr(guide, "tau", None),
    )  # fmt: skip
    options: dict[str, Any] = {"linearized": curvature == "ggn", "chunk_size": chunk_size}
    if functional is not None:
        return problem, user_functionals(model, latent, functional, batch, **options)
    assert batch is not None
    return problem, output_functionals(model, latent, batch, **options)


def point_estimate(guide: Any, data: Any) -> tuple[PackedModel, Tensor]:
    """The packed model of a guide, and its point estimate, shape ``(p,)``."""
    if isinstance(getattr(guide, "packed", None), PackedModel):
        return guide.packed, guide.loc.detach()
    args, kwargs = next(iter_batches(data))
    values = guide.median(*args, **kwargs)
    with poutine.block(), SubstituteMessenger(values):
        model = PackedModel(guide.model, poutine.trace(guide.model).get_trace(*args, **kwargs))
    return model, model.space.pack(values).detach()


def set_proximal(problem: Problem, proximal: float | Literal["auto"]) -> list[str]:
    """Adds the proximal term to the loss; returns what the user should know of it."""
    if proximal != "auto":
        require_number("proximal", proximal, least=0)
        problem.proximal = float(proximal)
        return []
    smallest = smallest_eigenvalue(problem.operator, problem.latent)
    if smallest > 0:
        return []
    problem.proximal = 2 * abs(smallest)
    return [
        f"the curvature at the point estimate is as low as {smallest:.3g}: it is not a minimum. A proximal term "
        f"with delta = {problem.proximal:.3g} was added, which biases variances down"
    ]
