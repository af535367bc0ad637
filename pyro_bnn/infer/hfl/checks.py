# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What a Hessian-free Laplace computation refuses before it starts, and what it warns of at the end."""

import torch
from torch import Tensor

from pyro_bnn.infer.hfl.functionals import Functionals
from pyro_bnn.infer.hfl.result import HFLResult, HFLWarning
from pyro_bnn.ops.notice import warn_user
from pyro_bnn.ops.options import require_count, require_number


def check_accuracy(epsilon: float | None, tolerance: float | None) -> None:
    """
    :param epsilon: posterior standard deviations by which functionals are moved, or ``None``.
    :param tolerance: relative residual of the solves, or ``None``. From 1 on no iteration is made, and all variances are 0.
    :raises ValueError: for values that are not positive, or too large.
    """
    if epsilon is not None:
        require_number("epsilon", epsilon, above=0)
    if tolerance is not None:
        require_number("tolerance", tolerance, above=0, below=1)


def check_sizes(**sizes: int | None) -> None:
    """
    :param sizes: numbers by name; ``None`` is left to a default.
    :raises ValueError: if one is no whole number of at least 1.
    """
    for name, value in sizes.items():
        if value is not None:
            require_count(name, value)


@torch.no_grad()
def require_slopes(functionals: Functionals, *, by_direction: bool = False) -> None:
    """
    Raises where functionals move with the latents but have no gradient: their linearised variance is zero, and wrong.

    :param functionals: a user's functions of the latents.
    :param by_direction: whether to look at slopes along a random direction, without forming all gradients.
    :raises ValueError: naming the elements, and the way to their distribution.
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
    if functionals.has_graph and not bool(moved.any()):
        return  # constants, such as outputs of a linear model at zero
    which = (moved if bool(moved.any()) else flat).nonzero().flatten().tolist()
    raise ValueError(
        f"{len(which)} of {len(functionals)} elements of the functional (the first: {which[0]}) "
        + (
            "change with the latents but have a zero gradient"
            if bool(moved.any())
            else "do not depend on the latents"
        )
        + " at the point estimate, so that their variance would be 0. Something like an argmax, a comparison, rounding, detach() "
        "or numpy has no slope: take draws of functions, guide.functional_samples(1000, x) or posterior_draws(guide, 1000), "
        "compute the functional of each, and look at their distribution."
    )


@torch.no_grad()
def require_derivatives(functionals: Functionals) -> None:
    """
    Raises where functionals have another slope than their gradients say, because a part of the computation is detached.

    Differences along a random direction are compared with the derivative: two evaluations, and more only where they
    disagree. Where they do not tell, nothing is said: at kinks, between which and the derivative of either side every
    choice of autograd lies, in rounding errors, and where steps of several lengths find several slopes.

    :param functionals: a user's functions of the latents.
    :raises ValueError: naming the elements, the derivative and what was found.
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
        "torch.no_grad() or numpy cuts off a part of the computation: write it by torch operations, or take draws of functions, "
        "guide.functional_samples(1000, x) or posterior_draws(guide, 1000), compute the functional of each, and look at their "
        "distribution."
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


def warn_of(result: HFLResult, tolerance: float, largest_curvature: float, map_tolerance: float) -> None:
    """
    Warns of all that makes a result inaccurate, and notes it there.

    :param result: what was found.
    :param tolerance: relative residual that was asked for.
    :param largest_curvature: met by the solves.
    :param map_tolerance: see :func:`pyro_bnn.infer.hfl.solve`.
    """
    notes: list[str] = []
    if not result.newton_decrement <= map_tolerance:
        notes.append(
            f"the point estimate is {result.newton_decrement:.3g} posterior standard deviations away from the minimum "
            "(Newton decrement). Variances are those of the Laplace approximation at the point it is at: train longer "
            "or call guide.polish(data) first"
        )
    eps = torch.finfo(result.variances.dtype).eps
    if eps * largest_curvature > 1e-2 * result.smallest_curvature:
        notes.append(
            f"curvatures range from {result.smallest_curvature:.2g} to {largest_curvature:.2g}, more than "
            f"{str(result.variances.dtype).removeprefix('torch.')} resolves to 1 %: use float64"
        )
    if result.method in ("cg", "probe"):
        if result.residual > 10 * tolerance:
            notes.append(
                f"the solves stopped at a relative residual of {result.residual:.2g}, not {tolerance:.2g}: variances are "
                "lower bounds. Use a preconditioner, a larger max_iter, or float64"
            )
    elif result.residual > (0.02 if result.method == "paired" else 0.1):
        notes.append(
            f"the perturbed minimisations stopped {result.residual:.2g} epsilon short of their minima, so that variances "
            "may be wrong by as large a fraction: use method='cg', float64, a preconditioner, or more epochs"
        )
    if result.agreement is not None and result.agreement > 0.01:
        notes.append(
            f"variances at epsilon and epsilon / 3 differ by {result.agreement:.2g}: epsilon is too large for the basin of "
            "the point estimate, or too small for the precision. Use method='cg', or float64"
        )
    if result.antisymmetry > 0.05:
        notes.append(
            f"the responses are antisymmetric by {result.antisymmetry:.2g} standard deviations, which at a minimum they "
            "cannot be: covariances are inaccurate"
        )
    for text in notes:
        warn_user(text, HFLWarning)
    result.warnings += notes
