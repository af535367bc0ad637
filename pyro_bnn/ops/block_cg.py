# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Conjugate gradients for many right-hand sides that share one Krylov space, and one by one; directions are kept, so that no
product with a matrix is spent twice on the same one.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bnn.ops.enclosure import Enclosure
from pyro_bnn.ops.inner import inner
from pyro_bnn.ops.jacobian import LinearMap
from pyro_bnn.ops.single_cg import conjugate_gradient

#: Share of a vector that another pass need not follow: what rounding leaves behind of so little is rounding of the rest.
_LITTLE = 0.1


class _Directions(NamedTuple):
    """
    Directions q of unit P-norm, conjugate to each other.

    :param directions: shape (n, p).
    :param images: their products with P, shape (n, p).
    :param norms: their lengths, shape (n,).
    """

    directions: Tensor
    images: Tensor
    norms: Tensor

    def remove(self, vectors: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (S, p) without their parts along the directions, and ``size`` (S,) with the lengths of these parts added."""
        if not len(self.norms):
            return vectors, size
        coefficients = inner(vectors, self.images)
        found = torch.addmm(vectors, coefficients, self.directions, alpha=-1)
        return found, size + coefficients.abs() @ self.norms


class ConjugateBasis:
    r"""
    Directions Q with :math:`Q P Q^\top = 1`, for a positive definite P of shape (p, p), and their images :math:`QP`.

    The Galerkin solution in their span is :math:`x = Q^\top Q b`. New directions are made conjugate to all that are
    kept, again where much was removed, so that p of them are a basis whatever the condition of P, and further right-hand sides need no more
    products; the three-term recursion of conjugate gradients keeps the last block only and loses conjugacy to
    rounding.

    :param int p: the number of unknowns.
    :param int limit: largest number of elements of Q. Blocks beyond it are conjugate to what is kept and to the block
        before.
    :ivar count: the number of directions kept.

    Source: conjugate directions of Hestenes and Stiefel (1952), "Methods of conjugate gradients for solving linear
    systems", section 4, kept for further right-hand sides.

    Example::

        >>> P = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> Q = torch.tensor([[1.0, 0.0]]) / 2**0.5  # of unit P-norm
        >>> basis = ConjugateBasis(2)
        >>> basis.append(Q, Q @ P)
        True
        >>> (basis.conjugate(torch.tensor([[0.0, 1.0]])) @ P @ Q.mT).abs().item() < 1e-6  # conjugate to Q
        True
    """

    def __init__(self, p: int, limit: int = 2**23) -> None:
        self.capacity = min(p, limit // p)
        self.count = 0
        self._directions = self._images = self._norms = torch.empty(0)
        self._latest: _Directions | None = None

    @property
    def keeps_all(self) -> bool:
        """Whether all directions so far are kept."""
        return self._latest is None

    @property
    def directions(self) -> Tensor:
        """What is kept, shape (count, p)."""
        return self._directions[: self.count]

    @property
    def images(self) -> Tensor:
        """Its products with P, shape (count, p)."""
        return self._images[: self.count]

    def append(self, directions: Tensor, images: Tensor) -> bool:
        """
        Keeps a block, or remembers it as the latest if there is no room.

        :param directions: conjugate to what is kept and to each other, of unit P-norm, shape (S, p).
        :param images: their products with P, shape (S, p).
        :return: whether it is kept.
        """
        norms = directions.norm(dim=-1)
        end = self.count + len(directions)
        if end > self.capacity:
            self._latest = _Directions(directions, images, norms)
            return False
        if end > len(self._norms):
            room = min(max(2 * end, 64), self.capacity)
            self._directions = _grown(self.directions, directions, room)
            self._images = _grown(self.images, images, room)
            self._norms = _grown(self._norms[: self.count], norms, room)
        self._directions[self.count : end] = directions
        self._images[self.count : end] = images
        self._norms[self.count : end] = norms
        self.count = end
        return True

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """
        The solution in the span of what is kept.

        :param rhs: shape (S, p).
        :return: the solution and the residual, of shape (S, p) both.
        """
        if not self.count:
            return torch.zeros_like(rhs), rhs.clone()
        coefficients = inner(rhs, self.directions)
        return coefficients @ self.directions, torch.addmm(rhs, coefficients, self.images, alpha=-1)

    def conjugate(self, vectors: Tensor) -> Tensor:
        """
        The parts of vectors that are conjugate to what is kept and to the latest block.

        :param vectors: shape (S, p).
        :return: shape (S, p); zero where nothing but rounding is left.
        """
        everything = _Directions(self.directions, self.images, self._norms[: self.count])
        last = self._latest or _Directions(*(kept[-len(vectors) :] for kept in everything))
        # in exact arithmetic a residual has parts along the last block alone: without them the others are small
        found, size = last.remove(vectors, vectors.norm(dim=-1))
        for _ in range(2):
            found, after = everything.remove(found, size)
            if self._latest:
                found, after = self._latest.remove(found, after)
            removed, size = after - size, after
            if bool((removed <= _LITTLE * found.norm(dim=-1)).all()):
                break
        noise = 10 * torch.finfo(found.dtype).eps * size
        heard = found.norm(dim=-1) > noise
        return found if bool(heard.all()) else found * heard[:, None]


def _grown(kept: Tensor, like: Tensor, rows: int) -> Tensor:
    """A buffer of more rows that begins with those that are kept."""
    buffer = like.new_empty(rows, *like.shape[1:])
    if len(kept):
        buffer[: len(kept)] = kept
    return buffer


@dataclass
class BlockCGResult:
    r"""
    The outcome of :func:`block_conjugate_gradient` for S right-hand sides.

    :ivar solution: shape ``(S, p)``.
    :ivar remainder: :math:`b - Px`, shape ``(S, p)``, as the recursion has it: up to rounding.
    :ivar residual: final relative residuals :math:`|b - Px|/|b|`, shape ``(S,)``.
    :ivar iterations: block iterations.
    :ivar products: vectors multiplied by P, summed over iterations.
    :ivar smallest_curvature: the smallest Ritz value met, an upper bound of the smallest eigenvalue of P.
    :ivar largest_curvature: the largest Ritz value met, a lower bound of the largest eigenvalue of P.
    :ivar indefinite: whether a direction of negative curvature was met; the solutions are then those of the
        iteration before.
    """

    solution: Tensor
    remainder: Tensor
    residual: Tensor
    iterations: int
    products: int
    smallest_curvature: float
    largest_curvature: float
    indefinite: bool


def block_conjugate_gradient(
    operator: LinearMap,
    rhs: Tensor,
    *,
    tolerance: float | Tensor = 1e-6,
    max_iter: int | None = None,
    preconditioner: LinearMap | None = None,
    basis: ConjugateBasis | None = None,
    enclosure: Enclosure | None = None,
) -> BlockCGResult:
    r"""
    Solves :math:`P x_s = b_s` for S right-hand sides, each in the block Krylov space of all of them.

    The block of search directions is orthonormalised in every iteration and directions that have become linearly
    dependent are dropped, so that dependent right-hand sides (targets that are close to each other) do no harm
    and need fewer products. Directions are conjugate to all earlier ones as far as these are kept, so that p products are
    enough for any number of right-hand sides. What rounding leaves over is finished one by one. In exact arithmetic :math:`b_s^\top x_s` increases monotonically to
    :math:`b_s^\top P^{-1} b_s`: an early stop gives a lower bound.

    :param operator: the map :math:`v \mapsto P v` from ``(S, p)`` to ``(S, p)``, for any S.
    :param rhs: shape ``(S, p)``.
    :param tolerance: relative residual at which all right-hand sides are finished, or, with ``enclosure``, the relative width
        of the bounds of :math:`b_s^\top P^{-1} b_s`; then it may be one for each, shape ``(S,)``.
    :param max_iter: largest number of block iterations; default ``10 p + 20``.
    :param preconditioner: the map :math:`r \mapsto M^{-1} r`, symmetric positive definite.
    :param basis: directions from earlier solves with the same map, where this one starts and to which it adds.
    :param enclosure: bounds from the directions of this solve, to which it adds them.
    :return: a :class:`BlockCGResult`.
    :raises ValueError: if a product is not finite.

    Source: O'Leary (1980); the treatment of dependent directions follows Ji and Li (2017), "A breakdown-free block
    conjugate gradient method".

    Example::

        >>> P = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> result = block_conjugate_gradient(lambda v: v @ P, torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
        >>> result.solution
        tensor([[ 0.6000, -0.2000],
                [ 1.2000, -0.4000]])
        >>> result.products  # one direction serves both
        2
    """
    p = rhs.shape[1]
    basis = ConjugateBasis(p) if basis is None else basis
    norm = rhs.norm(dim=-1, keepdim=True)
    norm = torch.where(norm > 0, norm, torch.ones_like(norm))
    limit = 10 * p + 20 if max_iter is None else max_iter
    solve = _BlockSolve(operator, rhs / norm, basis, preconditioner, tolerance, limit, enclosure)
    for attempt in range(3):
        if solve.is_over():
            break
        if attempt:  # rounding has separated r from the residual: start again from the latter
            solve.restart()
        solve.iterate()
    if not solve.is_over():
        # a block mixes large and small curvatures and so feels rounding earlier than single vectors do
        solve.finish_one_by_one()
    return BlockCGResult(
        solve.x.mul_(norm),
        solve.r.mul_(norm),
        solve.residual,
        solve.iterations,
        solve.products,
        solve.smallest,
        solve.largest,
        solve.indefinite,
    )


class _BlockSolve:
    """The state of a solve for right-hand sides of unit length, and its account of what it did."""

    def __init__(
        self,
        operator: LinearMap,
        rhs: Tensor,
        basis: ConjugateBasis,
        preconditioner: LinearMap | None,
        tolerance: float | Tensor,
        max_iter: int,
        enclosure: Enclosure | None = None,
    ) -> None:
        self.operator, self.rhs, self.basis, self.preconditioner = operator, rhs, basis, preconditioner
        self.tolerance, self.max_iter, self.enclosure = tolerance, max_iter, enclosure
        self.iterations = self.products = 0
        self.smallest, self.largest, self.indefinite = torch.inf, 0.0, False
        # directions in the latest block, and whether bounds see no more than it
        self.block, self.recursive = 0, False
        self.x, self.r = basis.solve(rhs)
        self.value = torch.zeros_like(rhs[:, 0])
        self.judge(sharp=True)

    def judge(self, *, sharp: bool = False) -> None:
        """Notes what is left over, and which right-hand sides are not solved yet; ``sharp`` spares no bound."""
        self.residual = self.r.norm(dim=-1)
        if self.enclosure is None:
            self.left = self.residual > self.tolerance
        else:
            self.value = (self.x * (self.rhs + self.r)).sum(-1)
            self.left = ~(self.excess(self.enclosure, sharp=sharp) <= self.tolerance * self.value)

    def excess(self, enclosure: Enclosure, *, sharp: bool) -> Tensor:
        """The upper bounds of b'x less the lower ones, shape (S,); where all are kept, sharp for a tenth more directions."""
        crude = (self.r * enclosure.metric(self.r)).sum(-1)
        if bool((crude <= self.tolerance * self.value).all()):
            return crude
        if self.basis.keeps_all:
            if not sharp and self.basis.count < 1.1 * len(enclosure.directions):
                return crude
            enclosure.extend(self.basis.directions, self.basis.images)
        return enclosure.above(self.r, diagonal=True)

    def is_over(self) -> bool:
        """Whether all are solved, or nothing more can be done."""
        return self.indefinite or self.iterations >= self.max_iter or not self.left.any()

    def restart(self) -> None:
        """Starts again from what is left by the solutions, which costs a product each."""
        left = self.left
        change, self.r[left] = self.basis.solve(self.rhs[left] - self.operator(self.x[left]))
        self.x[left] += change
        self.products += int(left.sum())
        self.judge(sharp=True)

    def iterate(self) -> None:
        """Iterations until the solve is over, or does not get on any more."""
        best, stalled = torch.inf, 0
        while stalled <= 20 and not self.is_over():
            before = self.value
            if not self.advance():
                break
            worst = float(self.residual.max())
            grows = self.enclosure is not None and bool(
                (self.value - before > 1e-2 * self.tolerance * self.value).any()
            )
            stalled = 0 if worst < 0.9 * best or grows else stalled + 1
            best = min(best, worst)

    def directions(self) -> Tensor:
        """Orthonormal directions of search, conjugate to those before."""
        r = self.r if self.preconditioner is None else self.preconditioner(self.r)
        return orthonormal_rows(self.basis.conjugate(r))

    def advance(self) -> bool:
        """One iteration along a block of directions; whether there was anything to gain."""
        q = self.directions()
        if not len(q):
            return False
        image = self.operator(q)
        # comparisons with NaN would end the loop as if it had converged
        if not math.isfinite(image.sum()):
            raise ValueError("a product with the operator is not finite")
        self.iterations += 1
        self.products += q.shape[0]
        values, vectors = _eigenpairs(inner(q, image))
        least, largest = float(values[0]), float(values[-1])
        self.largest = max(self.largest, largest)
        # Ritz values below the rounding error of the products say nothing, not even their sign
        noise = 10 * torch.finfo(q.dtype).eps * max(abs(least), abs(largest))
        self.indefinite = least < -noise
        if self.indefinite or not largest > noise:
            self.smallest = min(self.smallest, least) if self.indefinite else self.smallest
            return False
        if not least > noise:
            keep = values > noise
            values, vectors = values[keep], vectors[:, keep]
            least = float(values[0])
        self.smallest = min(self.smallest, least)
        scaled = (vectors / values.sqrt()).mT
        q, image = scaled @ q, scaled @ image  # now q P q' = 1
        self.append(q, image)
        step = inner(self.r, q)
        self.x.addmm_(step, q)
        self.r.addmm_(step, image, alpha=-1)
        self.judge()
        return True

    def append(self, q: Tensor, image: Tensor) -> None:
        """Keeps directions for later ones; bounds follow the recursion from where not all are kept."""
        if not self.basis.append(q, image) and self.enclosure is not None:
            if not self.recursive:
                self.enclosure.extend(self.basis.directions, self.basis.images)
                self.enclosure.last(self.block)
            self.recursive = True
            self.enclosure.follow(q, image)
        self.block = len(q)

    def finish_one_by_one(self) -> None:
        """Single solves from where the block has come to."""
        left = self.left
        single = conjugate_gradient(
            self.operator,
            self.rhs[left],
            tolerance=torch.finfo(self.x.dtype).eps ** 0.5 if self.enclosure else float(self.tolerance),
            max_iter=self.max_iter - self.iterations,
            preconditioner=self.preconditioner,
            start=self.x[left],
        )
        self.x[left], self.r[left] = single.solution, single.remainder
        self.residual[left] = single.residual
        self.iterations += int(single.iterations.max())
        self.products += int(single.iterations.sum()) + int(left.sum())
        self.smallest = min(self.smallest, float(single.smallest_curvature.min()))
        self.indefinite = bool(single.indefinite.any())


def orthonormal_rows(rows: Tensor) -> Tensor:
    """
    An orthonormal basis of the numerical row space, with every row scaled to unit length first.

    :param rows: shape ``(S, p)``.
    :return: shape ``(r, p)`` with r ≤ S.
    """
    norm = rows.norm(dim=-1, keepdim=True)
    if len(rows) == 1:
        return rows / norm if bool(norm > 0) else rows[:0]
    unit = rows / torch.where(norm > 0, norm, torch.ones_like(norm))
    values, vectors = torch.linalg.eigh(inner(unit, unit))
    keep = values > 100 * torch.finfo(rows.dtype).eps * values[-1].clamp(min=1)
    return (vectors[:, keep] / values[keep].sqrt()).mT @ unit


def _eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Of the symmetric part of a matrix, in ascending order."""
    if len(matrix) == 1:
        return matrix[0], torch.ones_like(matrix)
    return torch.linalg.eigh(0.5 * (matrix + matrix.mT))
