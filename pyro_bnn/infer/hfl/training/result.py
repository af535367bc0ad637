# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""From what the runs of a training loop span to a result, with bounds where the loss is convex."""

from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.infer.hfl.certificate import Certificate, covariance_bounds, variance_bounds
from pyro_bnn.infer.hfl.result import HFLResult
from pyro_bnn.infer.hfl.ritz import RayleighRitz
from pyro_bnn.ops.enclosure import Enclosure, random_weights

#: P times a step, by runs that are yielded.
Image = Callable[[Tensor], Generator[Any, None, Tensor]]


def result_of(
    owner: Any, ritz: RayleighRitz, gradient: Tensor, image: Image
) -> Generator[Any, None, HFLResult]:
    """The result of a :class:`~pyro_bnn.infer.hfl.FirstOrder`."""
    certificate, reason = None, ""
    if owner.curvature == "hessian":
        reason = (
            "the Hessian of a loss has no bound that is known beforehand; curvature='ggn' says that the loss is convex in its "
            "weights, which the prior's precision then bounds"
        )
    else:
        precision = precision_of(owner, ritz)
        if precision is None:
            reason = "the prior's precision is not known for every weight, or zero: pass prior_precision"
        else:
            certificate = yield from certificate_of(owner, ritz, precision, image)
    C, total = ritz.coefficients.double(), ritz.total
    _left, values, right = torch.linalg.svd(C, full_matrices=False)
    keep = values > 1e-9 * values.max() if len(values) else values > 0
    basis = right[keep].mT.to(ritz.directions.dtype)
    sizes = ritz.squares(ritz.directions).reciprocal()
    decrement = total(ritz.directions @ gradient.to(ritz.directions.dtype)).norm()
    share = ritz.missing if certificate is None else certificate.width
    found = HFLResult(
        method="first_order",
        curvature=owner.curvature,
        variances=ritz.variances,
        antisymmetry=ritz.noise,
        newton_decrement=float(decrement),
        smallest_curvature=float(sizes.min()) if len(sizes) else float("inf"),
        residual=share**0.5,
        agreement=owner.agreement,
        epsilon=owner.epsilon,
        proximal=owner.proximal,
        certificate=certificate,
        uncertified=reason,
        gradient_evaluations=owner.passes,
        shape=owner.functional.shape,
        mean=owner.functional.values,
        gradients=ritz.gradients,
        displacements=ritz.displacements,
        factor=ritz.directions.mT @ basis,
        half=ritz.coefficients @ basis,
        num_latents=owner.weights.count,
    )
    largest = float(sizes.max()) if len(sizes) else 0.0
    found.warn(tolerance=float("inf"), largest_curvature=largest, map_tolerance=0.1)
    return found


def precision_of(owner: Any, ritz: RayleighRitz) -> Tensor | None:
    """
    T of every weight, shape (p,), or ``None`` where it is not known.

    :raises ValueError: where the loss is less curved than that.
    """
    parts = owner.precisions
    if any(part is None or not part + owner.proximal > 0 for part in parts):
        return None
    point = ritz.gradients
    precision = torch.cat(
        [
            point.new_full((n,), part + owner.proximal)
            for n, part in zip(owner.weights.sizes, parts, strict=True)
        ]
    )
    Q = ritz.directions
    share = torch.linalg.eigvalsh(ritz.total((Q * precision) @ Q.mT))
    if len(share) and float(share.max()) > 1 + 10 * ritz.noise + 1e-3:
        raise ValueError(
            f"along a direction the loss is curved by {1 / float(share.max()):.3g} of what the prior's precision alone says: scale or "
            "prior_precision is wrong, or the loss is not convex in its weights (curvature='hessian')"
        )
    return precision


def certificate_of(
    owner: Any, ritz: RayleighRitz, precision: Tensor, image: Image
) -> Generator[Any, None, Certificate]:
    """Bounds of the variances, widened by the error of the images, which one more direction each measures."""
    enclosure = Enclosure(lambda r: r / precision, ritz.total)
    enclosure.extend(ritz.directions, ritz.images)
    G, D, R = ritz.gradients, ritz.displacements, ritz.remainders
    scale = ritz.variances.clamp(min=torch.finfo(G.dtype).tiny).rsqrt()[:, None]
    scale = torch.where(ritz.variances[:, None] > 0, scale, 0.0)
    gap = yield from _gap(owner, ritz, scale * D, scale * (G - R), precision, image)
    others = yield from _gap(owner, ritz, ritz.directions, ritz.images, precision, image)
    enclosure.gap = len(ritz.directions) ** 0.5 * others
    diagonal = variance_bounds(enclosure, G, D, R, gap)
    joint = covariance_bounds(enclosure, G, D, R, gap)
    return Certificate(*diagonal, joint, max(gap, enclosure.gap), enclosure, R, precision)


def _gap(
    owner: Any, ritz: RayleighRitz, D: Tensor, images: Tensor, precision: Tensor, image: Image
) -> Generator[Any, None, float]:
    """
    How far images are from the true ones in the norm of the bound, three times: of a random combination, whose square is in the mean more
    than the sum of all squares, at half the step, where differences of gradients are wrong by a half or a quarter.
    """
    if not len(D):
        return 0.0
    (weights,) = random_weights(1, D.new_ones(len(D)))
    direction, expected = weights @ D, weights @ images
    size = float(ritz.total(direction @ expected))
    if not size > 0:
        return 0.0
    step = 0.5 * owner.epsilon / size**0.5
    found = yield from image(step * direction)
    error = found / step - expected
    return 3 * float(ritz.total((error.square() / precision).sum()).clamp(min=0).sqrt())
