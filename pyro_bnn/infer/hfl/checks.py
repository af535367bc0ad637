# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What a Hessian-free Laplace computation refuses before it starts."""

import torch
from torch import Tensor

from pyro_bnn.infer.hfl.functionals import Functionals
from pyro_bnn.ops.options import require_count, require_number

_DRAWS = (
    "take draws of functions, guide.functional_samples(1000, x) or posterior_draws(guide, 1000), compute the functional of "
    "each, and look at their distribution."
)


def check_accuracy(epsilon: float | None, tolerance: float | None) -> None:
    """Refuses values that are not positive, and tolerances from 1 on, where no iteration is made and all variances are 0."""
    if epsilon is not None:
        require_number("epsilon", epsilon, above=0)
    if tolerance is not None:
        require_number("tolerance", tolerance, above=0, below=1)


def check_sizes(**sizes: int | None) -> None:
    """Refuses all but whole numbers of at least 1, by name; ``None`` is left to a default."""
    for name, value in sizes.items():
        if value is not None:
            require_count(name, value)


@torch.no_grad()
def require_slopes(functionals: Functionals, *, by_direction: bool = False) -> None:
    """
    Raises where functionals move with the latents but have no gradient: their linearised variance is zero, and wrong.
    ``by_direction`` looks at slopes along a random direction, without forming all gradients.
    """
    latent = functionals.latent
    generator = torch.Generator(device=latent.device).manual_seed(0)

    def random() -> Tensor:
        return torch.randn(latent.shape, generator=generator, dtype=latent.dtype, device=latent.device)

    if not len(functionals):
        return
    if not functionals.has_graph:
        flat = torch.ones_like(functionals.values, dtype=torch.bool)
    elif by_direction:
        flat = functionals.responses(random()[None])[0] == 0
    else:
        flat = (functionals.gradients == 0).all(-1)
    if not bool(flat.any()):
        return
    moved = torch.zeros_like(flat)
    for scale in (0.1, 1.0, 3.0):
        for _ in range(8):
            values = functionals.evaluate(latent + scale * (1 + latent.abs()) * random())
            moved |= flat & (values != functionals.values)
    moves = bool(moved.any())
    if functionals.has_graph and not moves:
        return  # constants, such as outputs of a linear model at zero
    which = (moved if moves else flat).nonzero().flatten().tolist()
    what = "change with the latents but have a zero gradient" if moves else "do not depend on the latents"
    raise ValueError(
        f"{len(which)} of {len(functionals)} elements of the functional (the first: {which[0]}) {what} at the point estimate, "
        "so that their variance would be 0. Something like an argmax, a comparison, rounding, detach() or numpy has no slope: "
        + _DRAWS
    )


@torch.no_grad()
def require_derivatives(functionals: Functionals) -> None:
    """
    Raises where functionals have another slope than their gradients say, because a part of the computation is detached.

    Differences along a random direction are compared with the derivative: two evaluations, and more only where they
    disagree. Where they do not tell, nothing is said: at kinks, between which and the derivative of either side every
    choice of autograd lies, in rounding errors, and where steps of several lengths find several slopes.
    """
    if not len(functionals) or not functionals.has_graph:
        return
    latent = functionals.latent
    generator = torch.Generator(device=latent.device).manual_seed(1)
    step = torch.finfo(latent.dtype).eps ** (1 / 3)
    wrong = torch.ones_like(functionals.values, dtype=torch.bool)
    for _ in range(2):
        direction = torch.randn(latent.shape, generator=generator, dtype=latent.dtype, device=latent.device)
        direction *= (1 + latent.abs()) / direction.norm()
        expected = functionals.responses(direction[None])[0]
        slope, error = _slope(functionals, direction, step)
        gap = (slope - expected).abs()
        wrong &= gap > 2 * error + 1e-2 * torch.maximum(slope.abs(), expected.abs())
        for factor in (2.0, 0.5):
            if not bool(wrong.any()):
                return
            other, error = _slope(functionals, direction, factor * step)
            wrong &= (gap > 2 * error) & ((slope - other).abs() < 0.05 * gap)
    if not bool(wrong.any()):
        return
    which = wrong.nonzero().flatten().tolist()
    raise ValueError(
        f"{len(which)} of {len(functionals)} elements of the functional (the first: {which[0]}) have another derivative than "
        f"automatic differentiation says: along a random direction it is {float(slope[which[0]]):.4g} by differences, and "
        f"{float(expected[which[0]]):.4g} by autograd, so that their variance would be wrong. Something like detach(), .data, "
        "torch.no_grad() or numpy cuts off a part of the computation: write it by torch operations, or "
        + _DRAWS
    )


def _slope(functionals: Functionals, direction: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """
    Central differences along a direction, and half of how much those of either side differ; infinite where the numbers do
    not resolve the step. Each of shape (m,).
    """
    left, right = functionals.differences(step * direction)
    rounding = 8 * torch.finfo(direction.dtype).eps * functionals.values.abs()
    error = ((right - left).abs() + rounding) / (2 * step)
    return (left + right) / (2 * step), error.masked_fill((left == 0) | (right == 0), torch.inf)
