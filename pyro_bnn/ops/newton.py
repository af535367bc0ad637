# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Minimisation of a sum of terms, each with a graph of its own: L-BFGS, and Newton's method with CG."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bnn.ops.jacobian import LinearMap, hvp_operator
from pyro_bnn.ops.krylov import conjugate_gradient

#: A function of a vector of shape ``(p,)`` as an iterable of scalars to be summed.
Terms = Callable[[Tensor], Iterable[Tensor]]


@dataclass
class NewtonResult:
    r"""
    The outcome of :func:`newton_cg`.

    :ivar point: shape ``(p,)``.
    :ivar decrement: :math:`\sqrt{g^\top H^{-1} g}` at the last but one point.
    :ivar indefinite: whether a direction of non-positive curvature was met at the last point.
    """

    point: Tensor
    decrement: float
    indefinite: bool


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
        return lambda v: sum_images(kept, v)
    return lambda v: sum_images((hvp_operator(term, leaf) for term in terms(leaf)), v)


def lbfgs(terms: Terms, start: Tensor, *, max_iter: int, round_length: int = 50) -> Tensor:
    """
    Minimises a sum of terms by L-BFGS with a strong Wolfe line search, until a round brings no progress.

    :param terms: the function.
    :param start: shape ``(p,)``.
    :param max_iter: largest number of iterations.
    :param round_length: iterations between two looks at the progress.
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
        if progress <= 1e-6 * value.abs():
            break
    return best


def newton_cg(
    terms: Terms,
    start: Tensor,
    *,
    tolerance: float,
    max_steps: int = 50,
    cg_tolerance: float = 1e-3,
    keep_graphs: bool = True,
) -> NewtonResult:
    r"""
    Minimises a sum of terms by Newton's method; each step is solved by conjugate gradients and halved until the
    function does not increase.

    :param terms: the function.
    :param start: shape ``(p,)``.
    :param tolerance: the decrement :math:`\sqrt{g^\top H^{-1} g}` at which to stop.
    :param max_steps: largest number of Newton steps.
    :param cg_tolerance: relative residual of each solve.
    :param keep_graphs: see :func:`hessian_operator`.
    :return: a :class:`NewtonResult`.

    Example::

        >>> result = newton_cg(lambda u: [(u**4).sum() / 4, -u.sum()], torch.tensor([2.0]), tolerance=1e-4)
        >>> bool((result.point - 1.0).abs() < 1e-4)
        True
    """
    point = start.detach().clone()
    value, gradient = value_and_gradient(terms, point)
    decrement, indefinite = float("inf"), False
    for _ in range(max_steps):
        solve = conjugate_gradient(
            hessian_operator(terms, point, keep_graphs=keep_graphs),
            gradient.unsqueeze(0),
            tolerance=cg_tolerance,
            max_iter=4 * point.shape[0],
        )
        step, indefinite = solve.solution[0], bool(solve.indefinite.any())
        decrement = float((step @ gradient).clamp(min=0).sqrt())
        if decrement == 0.0:
            break
        scale = 1.0
        while scale > 1e-4:
            candidate = point - scale * step
            new_value, new_gradient = value_and_gradient(terms, candidate)
            # close to the minimum the value no longer changes in floating point: accept what does not increase it
            if new_value <= value + 4 * torch.finfo(value.dtype).eps * value.abs():
                break
            scale /= 2
        else:
            break
        point, value, gradient = candidate, new_value, new_gradient
        if decrement <= tolerance and not indefinite:
            break
    return NewtonResult(point, decrement, indefinite)
