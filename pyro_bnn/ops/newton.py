# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Minimisation of a sum of terms, each with a graph of its own: L-BFGS, and Newton's method with CG.

Where :mod:`torch.distributed` is initialised the sum goes over the terms of all processes, which then take the same
steps.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bnn.ops.distributed import all_reduce_sum
from pyro_bnn.ops.jacobian import LinearMap, hvp_operator

#: A function of a vector of shape ``(p,)`` as an iterable of scalars to be summed.
Terms = Callable[[Tensor], Iterable[Tensor]]

#: Steps in a row within the rounding errors of the value, none smaller than the smallest before, that end a search.
_UNCONFIRMED = 3


@dataclass
class NewtonResult:
    r"""
    The outcome of :func:`newton_cg`.

    :ivar point: shape ``(p,)``.
    :ivar decrement: :math:`\sqrt{g^\top H^{-1} g}` at the last but one point.
    :ivar indefinite: whether a direction of non-positive curvature was met at the last point.
    :ivar converged: whether the decrement is below the tolerance at a point without such directions. Where it is not, the
        search ended at the limit of steps or at the precision of the numbers.
    :ivar evaluations: of the value and the gradient.
    :ivar value: of the function at the point.
    :ivar gradient_norm: there.
    """

    point: Tensor
    decrement: float
    indefinite: bool
    converged: bool
    evaluations: int = 0
    value: float = float("nan")
    gradient_norm: float = float("nan")


def value_and_gradient(terms: Terms, point: Tensor) -> tuple[Tensor, Tensor]:
    """
    :param terms: the function.
    :param point: shape ``(p,)``.
    :return: its value, a scalar, and its gradient, shape ``(p,)``; one term's graph is alive at a time.
    """
    leaf = point.detach().clone().requires_grad_(True)
    value, gradient = leaf.new_zeros(()), torch.zeros_like(leaf)
    for term in terms(leaf):
        value = value + term.detach()
        if term.requires_grad:
            gradient = gradient + torch.autograd.grad(term, leaf, materialize_grads=True)[0]
    all_reduce_sum([value, gradient])
    return value, gradient


def sum_images(operators: Iterable[LinearMap], v: Tensor) -> Tensor:
    """
    :param operators: linear maps from ``(S, p)`` to ``(S, p)``.
    :param v: shape ``(S, p)``.
    :return: the sum of their images of ``v``.
    """
    total = torch.zeros_like(v)
    for operator in operators:
        total += operator(v)
    return total


def hessian_operator(terms: Terms, point: Tensor, *, keep_graphs: bool) -> LinearMap:
    """
    Hessian-vector products of a sum of terms.

    :param terms: the function.
    :param point: shape ``(p,)``.
    :param keep_graphs: whether to evaluate the terms once and keep their graphs, or again in every product.
    :return: a map from ``(S, p)`` to ``(S, p)``.
    """
    leaf = point.detach().clone().requires_grad_(True)
    if keep_graphs:
        kept = [hvp_operator(term, leaf) for term in terms(leaf)]
        return lambda v: _over_processes(sum_images(kept, v))
    return lambda v: _over_processes(sum_images((hvp_operator(term, leaf) for term in terms(leaf)), v))


def _over_processes(image: Tensor) -> Tensor:
    all_reduce_sum([image])
    return image


def lbfgs(
    terms: Terms, start: Tensor, *, max_iter: int, round_length: int = 50, least_progress: float = 0.0
) -> Tensor:
    """
    Minimises a sum of terms by L-BFGS with a strong Wolfe line search, until a round brings no progress.

    :param terms: the function.
    :param start: shape ``(p,)``.
    :param max_iter: largest number of iterations.
    :param round_length: iterations between two looks at the progress.
    :param least_progress: the decrease per round that is worth another one, beside the millionth part of the value.
    :return: the best point, shape ``(p,)``; never worse than ``start``.
    """
    point = start.detach().clone().requires_grad_(True)

    def evaluate() -> Tensor:
        value, point.grad = value_and_gradient(terms, point)
        return value

    # torch's absolute stopping tolerances would end the search long before the posterior scale is resolved
    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=round_length,
        max_eval=2 * round_length,
        history_size=50,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    best_value, best = evaluate(), point.detach().clone()
    for _ in range(max(1, max_iter // round_length)):
        optimizer.step(evaluate)
        value = evaluate()
        if not (torch.isfinite(point).all() and value <= best_value):
            break
        progress = best_value - value
        best_value, best = value, point.detach().clone()
        if progress <= max(least_progress, 1e-6 * float(value.abs())):
            break
    return best


def newton_cg(
    terms: Terms,
    start: Tensor,
    *,
    tolerance: float,
    max_steps: int = 1000,
    cg_tolerance: float = 1e-3,
    keep_graphs: bool = True,
    dense_limit: int = 0,
) -> NewtonResult:
    r"""
    Minimises a sum of terms by Newton's method in a trust region; steps are solved by conjugate gradients, which
    leave saddle points along the directions of negative curvature that they meet.

    Conjugate gradients do not resolve small curvatures, negative ones among them, beside curvatures that are many
    orders of magnitude larger. Functions of at most ``dense_limit`` arguments therefore get a dense matrix and exact steps
    from its eigendecomposition once the products have cost more than one, and before a minimum is accepted.

    :param terms: the function.
    :param start: shape ``(p,)``.
    :param tolerance: the decrement :math:`\sqrt{g^\top H^{-1} g}` at which to stop.
    :param max_steps: largest number of Newton steps.
    :param cg_tolerance: relative residual of each solve.
    :param keep_graphs: see :func:`hessian_operator`.
    :param dense_limit: largest number of arguments with a dense matrix.
    :return: a :class:`NewtonResult`.

    Source: Steihaug (1983), "The conjugate gradient method and trust regions in large scale optimization"; Moré and
    Sorensen (1983), "Computing a trust region step".

    Example::

        >>> result = newton_cg(lambda u: [(u**4).sum() / 4, -u.sum()], torch.tensor([2.0]), tolerance=1e-4)
        >>> bool((result.point - 1.0).abs() < 1e-4)
        True
    """
    search = _TrustRegion(terms, start, tolerance, cg_tolerance, keep_graphs, dense_limit)
    for _ in range(max_steps):
        if search.advance():
            break
    converged = search.decrement <= tolerance and not search.indefinite
    return NewtonResult(
        search.point, search.decrement, search.indefinite, converged, search.evaluations, float(search.value),
        float(search.gradient.norm()),
    )  # fmt: skip


class _TrustRegion:
    """Where a search is, and how far it trusts the quadratic model there."""

    def __init__(
        self,
        terms: Terms,
        start: Tensor,
        tolerance: float,
        cg_tolerance: float,
        keep_graphs: bool,
        dense_limit: int,
    ) -> None:
        self.terms, self.keep_graphs = terms, keep_graphs
        self.tolerance, self.cg_tolerance, self.dense_limit = tolerance, cg_tolerance, dense_limit
        self.point = start.detach().clone()
        self.evaluations = 0
        self.value, self.gradient = self.evaluate(self.point)
        self.radius = max(1.0, 0.1 * float(self.point.norm()))
        self.decrement, self.indefinite = float("inf"), False
        self.products, self.exact = 0, False
        self.best, self.unconfirmed = float("inf"), 0
        self.eps = torch.finfo(self.point.dtype).eps
        #: of the dense matrix at the point, kept while steps are rejected
        self.spectrum: tuple[Tensor, Tensor] | None = None

    def evaluate(self, point: Tensor) -> tuple[Tensor, Tensor]:
        self.evaluations += 1
        return value_and_gradient(self.terms, point)

    def advance(self) -> bool:
        """Tries one step; whether the search is over."""
        step, image = self.propose()
        slope, bend = float(self.gradient @ step), float(step @ image)
        # along the step: that of the full Newton step where it is one, and no smaller where the radius cuts it short
        self.decrement = -slope / bend**0.5 if bend > 0 else max(-slope, 0.0) ** 0.5
        done = not step.any() or self.move(step, -(slope + 0.5 * bend))
        if done and not self.exact and len(self.point) <= self.dense_limit:
            # what conjugate gradients take for a minimum
            self.exact, self.radius = True, max(self.radius, 1e-3 * float(self.point.norm()))
            self.best, self.unconfirmed = float("inf"), 0
            return False
        return done

    def propose(self) -> tuple[Tensor, Tensor]:
        """The step that minimises the quadratic model in the trust region, and its image."""
        self.exact = self.exact or self.products > len(self.point) <= self.dense_limit
        if self.exact:
            if self.spectrum is None:
                self.spectrum = _spectrum(self.operator(), self.point)
            step, image, self.indefinite = _exact_step(*self.spectrum, self.gradient, self.radius)
            return step, image
        step, image, self.indefinite, count = _steihaug(
            self.operator(), self.gradient, self.radius, self.cg_tolerance
        )
        self.products += count
        return step, image

    def operator(self) -> LinearMap:
        return hessian_operator(self.terms, self.point, keep_graphs=self.keep_graphs)

    def move(self, step: Tensor, predicted: float) -> bool:
        """Takes a step that gains enough, or trusts the model less far; whether nothing more is to be gained."""
        value, gradient = self.evaluate(self.point + step)
        length = float(step.norm())
        # close to the minimum the value no longer changes in floating point: accept what does not increase it
        rounding = 4 * self.eps * float(self.value.abs())
        if (
            predicted + rounding == 0
        ):  # at a value of zero, where squares of the gradient are too small for numbers
            return True
        ratio = float(self.value - value + rounding) / (predicted + rounding)
        if not ratio > 0.1:  # also where the value is not a number
            self.radius = 0.25 * length
            return self.radius <= self.eps * float(self.point.norm())
        if ratio > 0.75 and length > 0.9 * self.radius:
            self.radius *= 2.5
        self.point, self.value, self.gradient, self.spectrum = self.point + step, value, gradient, None
        # steps that the value cannot confirm and that do not shrink either are noise
        noisy = predicted <= rounding and self.decrement > 0.5 * self.best
        self.unconfirmed = self.unconfirmed + 1 if noisy else 0
        self.best = min(self.best, self.decrement)
        reached = self.decrement <= self.tolerance and not self.indefinite
        return reached or self.unconfirmed >= _UNCONFIRMED


def _steihaug(
    operator: LinearMap, gradient: Tensor, radius: float, tolerance: float
) -> tuple[Tensor, Tensor, bool, int]:
    """
    A step, its image, whether it follows negative curvature to the edge of the trust region, and the number of products.
    """
    step, image = torch.zeros_like(gradient), torch.zeros_like(gradient)
    residual = -gradient
    direction = residual.clone()
    square = float(residual @ residual)
    goal = tolerance**2 * square
    products = 0
    while products < 4 * gradient.shape[0] and square > goal:
        products += 1
        product = operator(direction.unsqueeze(0))[0]
        curvature = float(direction @ product)
        scale = square / curvature if curvature > 0 else float("inf")
        if curvature <= 0 or float((step + scale * direction).norm()) >= radius:
            a, b = float(direction @ direction), float(step @ direction)
            room = max(radius**2 - float(step @ step), 0.0)
            scale = (-b + (b * b + a * room) ** 0.5) / a
            return step + scale * direction, image + scale * product, curvature <= 0, products
        step, image = step + scale * direction, image + scale * product
        residual = residual - scale * product
        new_square = float(residual @ residual)
        direction = residual + (new_square / square) * direction
        square = new_square
    return step, image, False, products


def _spectrum(operator: LinearMap, like: Tensor, chunk: int = 128) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric operator."""
    identity = torch.eye(len(like), dtype=like.dtype, device=like.device)
    matrix = torch.cat([operator(rows) for rows in identity.split(chunk)])
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values, vectors


def _exact_step(
    values: Tensor, vectors: Tensor, gradient: Tensor, radius: float
) -> tuple[Tensor, Tensor, bool]:
    """
    The minimum of the quadratic model in the trust region, its image, and whether the model is indefinite.

    It solves (H + shift) step = -gradient with the smallest shift that makes H + shift positive semidefinite and the step
    no longer than the radius; the length falls with the shift, which bisection finds.
    """
    slopes = vectors.mT @ gradient
    lowest, scale = float(values[0]), float(values.abs().max())
    indefinite = lowest <= 0
    floor = torch.finfo(values.dtype).eps * scale

    def coordinates(shift: float) -> Tensor:
        return -slopes / (values + shift).clamp(min=floor)

    low = max(0.0, -lowest)
    if float(coordinates(low).norm()) > radius:
        high = low + float(gradient.norm()) / radius
        for _ in range(200):
            middle = 0.5 * (low + high)
            if not low < middle < high:
                break
            low, high = (low, middle) if float(coordinates(middle).norm()) < radius else (middle, high)
        step = coordinates(high)
    else:
        step = coordinates(low)
        if indefinite:  # the gradient is blind to the lowest curvature: go along it to the edge
            room = max(radius**2 - float(step[1:].square().sum()), 0.0)
            step[0] = room**0.5 * (-1.0 if float(slopes[0]) > 0 else 1.0)
    return vectors @ step, vectors @ (values * step), indefinite
