# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What a Hessian-free Laplace computation refuses before it starts, and what it warns of at the end."""

import torch
from torch import Tensor

from pyro_bnn.infer.hfl.functionals import Functionals
from pyro_bnn.infer.hfl.result import HFLResult, HFLWarning
from pyro_bnn.infer.notice import warn_user
from pyro_bnn.infer.options import require_count, require_number


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
