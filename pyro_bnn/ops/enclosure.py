# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Two maps between which the inverse of a matrix lies, from products that have been made.

Let P be positive definite and M another such matrix that it is known to exceed: :math:`M \preceq P`, such as the precision of a
Gaussian prior. For directions Q, one per row, and their images :math:`W = QP`, with :math:`QPQ^\top = 1`,

.. math::

   Q^\top Q \;\preceq\; P^{-1} \;\preceq\; M^{-1} - H^\top N^{-1} H, \qquad H = W M^{-1} - Q,\quad N = W M^{-1} W^\top - 1.

For any d with residual :math:`r = g - Pd` one has :math:`g^\top P^{-1} g = g^\top d + d^\top r + r^\top P^{-1} r`, so that
:math:`h(d) = g^\top d + d^\top r + r^\top M^{-1} r` is an upper bound. Its minimum over d in the span of Q, at
:math:`d = Q^\top N^{-1} H g`, is :math:`g^\top` times the right-hand side times :math:`g`, which proves it; for the Krylov space of
one vector and :math:`M = \tau` it is the Gauss-Radau rule with a node at :math:`\tau`, as the maximum of
:math:`g^\top d + d^\top r`, on the left, is the Gauss rule. Neither asks for a Krylov space: blocks, directions of
earlier solves and any preconditioner serve as well. What is computed is h(d): it holds for every d, so that the rounding of N and
H, which differences of large numbers make large, costs width only; the errors of images enter it by :attr:`Enclosure.gap`.

Source: Golub and Meurant (1994), "Matrices, moments and quadrature", for one vector; the argument above for any span.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bnn.ops.inner import inner
from pyro_bnn.ops.jacobian import LinearMap

#: From what a process contributes to inner products of rows to these products: a sum over processes, where rows are sharded.
Total = Callable[[Tensor], Tensor]


def whole(products: Tensor) -> Tensor:
    """Inner products of rows that are not sharded."""
    return products


#: A length of vectors that are checked.
_OTHER = 0.7
#: Numbers in the vectors that are checked at once.
_TOGETHER = 2**24


class Bracket(NamedTuple):
    """
    A lower and an upper bound, tensors of one shape.

    Example::

        >>> Bracket(torch.tensor(0.5), torch.tensor(0.75)).width
        tensor(0.2500)
    """

    lower: Tensor
    upper: Tensor

    @property
    def width(self) -> Tensor:
        """The upper bound less the lower one."""
        return self.upper - self.lower


class Enclosure:
    r"""
    Bounds of :math:`R P^{-1} R^\top` for rows R.

    :param metric: the map :math:`r \mapsto M^{-1} r`, of shape (S, p) both.
    :param total: makes inner products of the parts of rows that processes have; for whole rows the identity.
    :ivar directions: Q, shape ``(k, p)``; none at first.
    :ivar images: :math:`QP`, shape ``(k, p)``.
    :ivar is_recursive: whether directions follow a recursion, :meth:`follow`, and are orthogonal in N rather than in P.
    :ivar gap: how far images are from the true ones at most, in the norm of :math:`M^{-1}`, for a combination of directions whose
        coefficients, times their P-norms, have unit length; ``None`` before it is measured: rounding of unit roundoffs then.

    Example::

        >>> P = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> enclosure = Enclosure(lambda r: r)  # P exceeds the identity
        >>> q = torch.tensor([[1.0, 0.0]]) / 2**0.5
        >>> enclosure.extend(q, q @ P)
        >>> g = torch.tensor([[0.0, 1.0]])
        >>> (enclosure.solve(g)[0] @ g.mT).item() <= 0.4 <= enclosure.above(g).item()  # the inverse has 2 / 5 there
        True
    """

    def __init__(self, metric: LinearMap, total: Total = whole) -> None:
        self.metric = metric
        self.total = total
        self.directions = self.images = torch.empty(0, 0)
        self._gram = torch.empty(0, 0)  # N
        self._size = torch.empty(0)  # Q P Q', the diagonal; zero where it is not positive
        self._unit = torch.empty(0)  # what makes it 1
        self._factor: Tensor | None = None  # R with R R' close to N^-1
        self.is_recursive = False
        self.gap: float | None = None
        self._largest = 0.0  # what is known of the largest eigenvalue of M^-1 P, from below

    def extend(self, directions: Tensor, images: Tensor) -> None:
        """
        :param directions: those there are already, and more after them, shape ``(k, p)``.
        :param images: their products with P, shape ``(k, p)``.
        """
        old, self.directions, self.images = len(self._gram), directions, images
        if old == len(directions):
            return
        self.gap = None
        rows = self._products(directions[old:], images[old:])
        gram = rows.new_empty(len(directions), len(directions))
        gram[:old, :old] = self._gram
        gram[old:], gram[:, old:] = rows, rows.mT
        gram[old:, old:] = 0.5 * (rows[:, old:] + rows[:, old:].mT)
        self._gram, self._factor = gram, None
        size = self.total((directions * images).sum(-1))
        # without curvature, by rounding, they are of no use
        self._size = torch.where(size > torch.finfo(gram.dtype).eps ** 2, size, 0.0)
        self._unit = torch.where(self._size > 0, self._size.rsqrt(), 0.0)
        self._largest = max(self._largest, float((1 + gram.diagonal() * self._unit.square()).max()))

    def follow(self, directions: Tensor, images: Tensor) -> None:
        """
        Keeps of all directions so far and a new block only what is orthogonal, in N, to all but the new block.

        If these come from conjugate gradients preconditioned by M, N couples neighbouring blocks only, so that nothing that
        matters to the residuals of these solves is lost.
        """
        if len(self._gram):
            root = self._root()
            steps = self._products(directions, images) @ root @ root.mT
            # one after the other: vectors may be so long that each of them matters
            directions = self.directions = torch.addmm(directions, steps, self.directions, alpha=-1)
            images = self.images = torch.addmm(images, steps, self.images, alpha=-1)
            # directions of unit P-norm of which a difference is that long come from rounding
            size = self.total((directions * images).sum(-1))
            sound = (size > 0) & (size < torch.finfo(images.dtype).eps ** -0.5)
            directions, images = directions[sound], images[sound]
        self._gram, self.is_recursive = torch.empty(0, 0), True
        self.directions = self.images = directions[:0]
        self.extend(directions, images)

    def last(self, size: int) -> None:
        """Keeps the last directions, made orthogonal in N to those before; all, if there are no last ones."""
        if not size:
            return
        tail = self.directions[-size:].clone(), self.images[-size:].clone()
        self._gram, self._size, self._factor = self._gram[:-size, :-size], self._size[:-size], None
        self.directions, self.images = self.directions[:-size], self.images[:-size]
        self.follow(*tail)

    def solve(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        r"""
        The best solutions in the span of Q, whose :math:`x^\top r` is the lower bound: :math:`x = R\,Q^\top Q`.

        :param rows: R, shape ``(m, p)``.
        :return: x and what it leaves over, :math:`R - xP`, of that shape; zero where only the recursion is known, whose solves
            leave nothing in the span.
        """
        if self.is_recursive or not len(self._gram):
            return torch.zeros_like(rows), rows
        coefficients = self.total(inner(rows, self.directions))
        return coefficients @ self.directions, torch.addmm(rows, coefficients, self.images, alpha=-1)

    def measure(self, operator: LinearMap, number: int) -> int:
        """
        Finds the gap, where it is not known, by products of so many combinations of directions at most.

        :return: how many products it took.
        """
        if self.gap is not None or not len(self.directions):
            return 0
        number = min(number, len(self.directions))
        self._factor = None
        error = residual_error(
            operator,
            self.metric,
            self.directions,
            lambda w: w @ self.images,
            self._unit,
            number,
            self.total,
        )
        self.gap = len(self.directions) ** 0.5 * error if math.isfinite(error) else math.inf
        return number

    def above(self, rows: Tensor, *, diagonal: bool = False) -> Tensor:
        r"""
        :param rows: R, shape ``(m, p)``.
        :param diagonal: whether the diagonal is enough.
        :return: the upper bound of :math:`R P^{-1} R^\top`, shape ``(m, m)``, or its diagonal; that of M where it is less.
        """
        scaled = self.metric(rows)
        crude = self.total(_even(inner(rows, scaled)) if not diagonal else (rows * scaled).sum(-1))
        if not len(self._gram) or not math.isfinite(self._known_gap()):
            return crude
        root = self._root()
        weights = self.total(inner(scaled, self.images) - inner(rows, self.directions)) @ root @ root.mT
        del scaled  # rows may be so long that each of them matters
        if diagonal:
            return torch.minimum(self._bound(rows, crude, weights), crude)
        variances = crude.diagonal()
        gains = self._bound(rows, variances, weights) < variances
        return _even(self._bound(rows, crude, weights * gains[:, None]))

    def _bound(self, rows: Tensor, crude: Tensor, weights: Tensor) -> Tensor:
        r"""
        h(d) at :math:`d = XQ`, shape ``(m, m)`` or its diagonal as the crude one, what an error e of its residual r adds,
        :math:`|d^\top e| + 2 |r| |e| + |e|^2`, where :math:`|e|` is at most the gap times the length of X, and rounding.
        """
        diagonal = crude.dim() == 1

        def product(left: Tensor, right: Tensor) -> Tensor:
            return self.total((left * right).sum(-1) if diagonal else inner(left, right))

        gap, size = self._known_gap(), weights * self._size.sqrt()
        length = size.square().sum(-1) if diagonal else inner(size, size)
        left = torch.addmm(rows, weights, self.images, alpha=-1)
        rest = product(left, self.metric(left))
        steps = weights @ self.directions
        before, after = product(steps, rows), product(steps, left)
        found = (1 + gap) * rest + before + after + gap * (0.5 * (before - after) + (1.5 + gap) * length)
        return (found + _rounding(found, length, crude + rest, rest)).nan_to_num(torch.inf)

    def _known_gap(self) -> float:
        """The gap, or before it is measured that of images which were rounded once in the worst of directions."""
        noise = 8 * torch.finfo(self._gram.dtype).eps * self._largest
        return noise if self.gap is None else max(self.gap, torch.finfo(self._gram.dtype).eps)

    def _products(self, directions: Tensor, images: Tensor) -> Tensor:
        """Rows of N: of some directions with all of them."""
        return self.total(inner(self.metric(images), self.images) - inner(directions, self.images))

    def _root(self) -> Tensor:
        r"""R with :math:`R R^\top` close to the inverse of N, shape (k, k)."""
        if self._factor is None:
            gram, k = self._gram.double(), len(self._gram)
            # entries of N are differences of W M^-1 W' and Q W', where W is rounded
            size, diagonal, gap = self._size.double(), gram.diagonal().clamp(min=0), self._known_gap()
            noise = gap * (size.clamp(min=1) * (diagonal + size)).sqrt()
            scale = torch.where(self._size > 0, (diagonal + noise).rsqrt(), 0.0)
            unit = _even(gram * scale * scale[:, None]) + torch.diag(noise * scale * scale + (scale == 0))
            lower, failed = torch.linalg.cholesky_ex(unit)
            if int(failed):
                values, vectors = torch.linalg.eigh(unit)
                root = vectors * values.clamp(min=gap).rsqrt()
            else:
                eye = torch.eye(k, dtype=unit.dtype, device=unit.device)
                root = torch.linalg.solve_triangular(lower, eye, upper=False).mT
            self._factor = (scale[:, None] * root).to(self._gram.dtype)
        return self._factor


def random_weights(number: int, scale: Tensor) -> Tensor:
    """Combinations of rows of some scale (m,), shape (number, m): none is left out, and alike ones do not cancel."""
    generator = torch.Generator(device=scale.device).manual_seed(0)
    drawn = torch.randn(number, len(scale), generator=generator, device=scale.device).to(scale.dtype)
    return torch.where(drawn < 0, drawn - 1, drawn + 1) * scale


def residual_error(
    operator: LinearMap,
    metric: LinearMap,
    rows: Tensor,
    images: LinearMap,
    scale: Tensor,
    number: int,
    total: Total = whole,
) -> float:
    r"""
    The largest difference of images from products that are made again, in the norm of the metric, doubled; of random combinations
    where there are fewer products than rows: the square of one is, in the mean, more than the sum of the squares of all.

    :param operator: the map :math:`v \mapsto P v`, of shape (S, p) both.
    :param metric: the map :math:`r \mapsto M^{-1} r`, of that shape.
    :param rows: shape (m, p).
    :param images: from weights, shape (S, m), to what products of P with these combinations of rows are said to be, shape (S, p).
    :param scale: of rows, shape (m,).
    :param number: of products.

    Example::

        >>> residual_error(lambda v: 2 * v, lambda r: r, torch.eye(2), lambda w: 2.5 * w, torch.ones(2), number=2)
        1.0
    """
    if not len(rows):
        return 0.0
    exact = number == len(rows)
    weights = torch.diag(scale) if exact else random_weights(number, scale)
    squares = []
    for part in weights.split(max(1, _TOGETHER // max(1, rows.shape[-1]))):
        # other numbers than those of the products so far, which would be rounded in the same way
        error = images(part) - operator(_OTHER * part @ rows) / _OTHER
        squares.append(total((error * metric(error)).sum(-1)).clamp(min=0))
    found = torch.cat(squares)
    return 2 * float((found.max() if exact else found.mean()).sqrt())


def _rounding(found: Tensor, length: Tensor, size: Tensor, rest: Tensor) -> Tensor:
    r"""
    A bound of the rounding of h(d), of the shape of ``found``, from the squared lengths of d, of g and r together, and of r: its entries
    are off by :math:`\epsilon` times the lengths of what they are products of, d with g and r, r with r, and their sum; a matrix of such errors is below a diagonal one that has the sums of its rows, in
    units of the variances.
    """
    eps = 4 * torch.finfo(found.dtype).eps
    if found.dim() == 1:
        return eps * (2 * (length * size).clamp(min=0).sqrt() + rest + found.abs())
    d, t, r, v = (m.diagonal().clamp(min=0).sqrt() for m in (length, size, rest, found))
    r = torch.maximum(r, v)
    unit = v.clamp(min=torch.finfo(v.dtype).tiny ** 0.5)
    errors = d[:, None] * t + t[:, None] * d + r[:, None] * r
    return torch.diag(eps * (errors @ unit) / unit)


def conjugate_rows(
    directions: Tensor, images: Tensor, *, floor: float = 0.0, total: Total = whole
) -> tuple[Tensor, Tensor]:
    r"""
    Directions with :math:`QPQ^\top = 1` of the span of others, and their images.

    :param directions: shape ``(k, p)``; those that depend on others, or have no length, are left out.
    :param images: their products with P, shape ``(k, p)``.
    :param floor: the relative error of images; what depends on others up to it is left out.
    :param total: see :class:`Enclosure`.
    :return: both of shape ``(r, p)`` with r ≤ k.

    Example::

        >>> P, rows = torch.tensor([[2.0, 0.0], [0.0, 8.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]])
        >>> Q, images = conjugate_rows(rows, rows @ P)
        >>> (Q @ images.mT).round(decimals=5)
        tensor([[1.]])
    """
    scale = total((directions * images).sum(-1)).clamp(min=0).rsqrt()
    scale = torch.where(scale.isfinite(), scale, 0.0)
    directions, images = directions * scale[:, None], images * scale[:, None]
    values, vectors = torch.linalg.eigh(_even(total(inner(directions, images)).double()))
    floor = max(floor, 1e3 * torch.finfo(images.dtype).eps)
    keep = values > floor * values.clamp(min=0).max() if len(values) else values > 0
    root = (vectors[:, keep] / values[keep].sqrt()).mT.to(images.dtype)
    return root @ directions, root @ images


def gaining(rows: Tensor, steps: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    r"""
    The steps that raise lower bounds. The others, along directions that rounding has made dependent, are not taken: they would
    leave more than upper bounds of what was left before.

    :param rows: residuals R, shape ``(m, p)``.
    :param steps: D, shape ``(m, p)``.
    :param left: :math:`R - DP`, shape ``(m, p)``.
    :return: the steps, zero where they do not gain, and what is left then.

    Example::

        >>> R, D = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.5], [3.0]])
        >>> gaining(R, D, R - 2 * D)[1]  # the second goes too far
        tensor([[0.],
                [1.]])
    """
    gains = ((steps * (rows + left)).sum(-1) > 0)[:, None]
    if bool(gains.all()):
        return steps, left
    return steps * gains, torch.where(gains, left, rows)


def _even(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)
