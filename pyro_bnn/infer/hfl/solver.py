# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Linear solves with the curvature at a point estimate, in blocks, with an account of what they met."""

from typing import Any, Literal

import torch
from torch import Tensor

from pyro_bnn.curvature.accumulate import CurvatureAccumulator, NotAMinimumError
from pyro_bnn.curvature.definite import hierarchy_hint
from pyro_bnn.infer.hfl.bound import Bound, prior_of
from pyro_bnn.infer.hfl.loss import Problem
from pyro_bnn.ops.block_cg import BlockCGResult, ConjugateBasis, block_conjugate_gradient
from pyro_bnn.ops.enclosure import Enclosure, conjugate_rows, gaining
from pyro_bnn.ops.jacobian import LinearMap
from pyro_bnn.ops.krylov import nystrom_below, nystrom_preconditioner

#: ``"nystrom"``, ``"prior"``, ``"diagonal"``, a fitted Laplace guide, or a map r -> M^-1 r.
Preconditioner = Literal["nystrom", "prior", "diagonal"] | LinearMap | Any


class Solver:
    r"""
    Solves :math:`P d = g` for blocks of right-hand sides. Directions are kept, for all that is solved later.

    :param tolerance: relative residual.
    :param max_iter: largest number of iterations per block; default ``10 p``.
    :param preconditioner: ``None``, ``"nystrom"``, ``"prior"`` (the diagonal of its curvature), ``"diagonal"`` (of the
        GGN), a Laplace guide after ``laplace_approximation`` (its covariance is the preconditioner), or a map of
        shape ``(S, p)`` tensors.
    :param block_size: how many right-hand sides share a Krylov space; memory is about 6 blocks and the directions
        that are kept (:class:`~pyro_bnn.ops.block_cg.ConjugateBasis`).
    :param rank: directions of the ``"nystrom"`` preconditioner.
    :param bound: what P is known to exceed; the bounds of solutions follow from it.
    :param width: the relative width of the bounds of :math:`g^\top P^{-1} g` at which solves stop, in place of the
        residual; the preconditioner is then the bound, if there is no other.
    :param basis: directions of earlier solves with the same P, to which this solver adds its own.
    :ivar precision: what P is known to exceed, shape ``(p,)``, or ``None``.
    :ivar metric: the map :math:`r \mapsto M^{-1} r` of an M that P is known to exceed, or ``None``.
    :ivar remainder: what the latest solutions leave over, shape ``(S, p)``, where there is a bound.
    :ivar rest: bounds of what these leave of :math:`g^\top P^{-1} g`, shape ``(S,)``, where solves stopped by the width.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        tolerance: float,
        max_iter: int | None = None,
        preconditioner: Preconditioner | None = None,
        block_size: int = 64,
        rank: int = 64,
        bound: Bound | None = None,
        width: float | None = None,
        basis: ConjugateBasis | None = None,
    ) -> None:
        self.problem = problem
        self.tolerance = tolerance
        self.max_iter = max_iter
        self.block_size = block_size
        self.iterations = 0
        self.products = 0
        self.smallest_curvature = float("inf")
        self.largest_curvature = 0.0
        self.residual = 0.0
        self.width = width
        self.metric: LinearMap | None = None
        self.remainder: Tensor | None = None
        self.rest: Tensor | None = None
        self.precision = precision = None if bound is None else bound.precision
        if precision is not None:
            self.metric = lambda r: r / precision
            preconditioner = "prior" if preconditioner is None and width is not None else preconditioner
        self.preconditioner = self.resolve(preconditioner, rank, precision)
        if precision is not None and preconditioner == "nystrom":
            self.metric = self.preconditioner
        self._basis = basis
        self._enclosure: Enclosure | None = None
        self._several = False  # blocks in the latest solve

    def __call__(self, rhs: Tensor, *, tolerance: float | Tensor | None = None) -> Tensor:
        """
        Solutions of shape ``(S, p)`` for right-hand sides of shape ``(S, p)``; those to another relative residual than the
        solver's do not count in ``residual``.

        :raises NotAMinimumError: if a direction of negative curvature is met.
        """
        if not torch.isfinite(rhs).all():
            rows = (~torch.isfinite(rhs)).any(-1).nonzero().flatten().tolist()
            raise ValueError(
                f"{len(rows)} of {len(rhs)} gradients to solve for are not finite: check that the functionals can be "
                "differentiated at the point estimate"
            )
        goal = self.tolerance if tolerance is None else tolerance
        results = [self._block(block, goal) for block in rhs.split(self.block_size)]
        if tolerance is None:
            self.residual = max([self.residual, *(float(result.residual.max()) for result in results)])
        self.remainder = None if self.metric is None else _joined([result.remainder for result in results])
        self.rest = None
        return _joined([result.solution for result in results])

    def enclosed(self, rhs: Tensor, widths: Tensor) -> Tensor:
        """Solutions, with bounds of the variances that are as narrow as widths of shape ``(S,)``; see :meth:`__call__`."""
        parts, results = [], []
        blocks = rhs.split(self.block_size)
        for block, width in zip(blocks, widths.split(self.block_size), strict=True):
            enclosure = self._grown_enclosure()
            results.append(self._block(block, width, enclosure))
            rest = torch.full_like(width, torch.inf)
            if enclosure.is_recursive:  # it knows the latest directions alone, and is about to be lost
                self.products += enclosure.measure(self.problem.operator, 3)
                rest = enclosure.above(results[-1].remainder, diagonal=True)
            parts.append(rest)
        self.residual = max([self.residual, *(float(result.residual.max()) for result in results)])
        solutions, remainder = _joined([r.solution for r in results]), _joined([r.remainder for r in results])
        if self._basis is not None and self._basis.keeps_all and len(blocks) > 1:
            # by the directions of later blocks
            steps, remainder = gaining(remainder, *self._basis.solve(remainder))
            solutions += steps
        self._several = len(blocks) > 1
        self.remainder, self.rest = remainder, torch.cat(parts)
        return solutions

    def enclosing(self, displacements: Tensor, images: Tensor) -> Enclosure:
        """
        What is known of the inverse of P: from the directions that are kept, from the recursion of one block, or else from
        displacements of shape (m, p) and their products with P.
        """
        basis, latest = self._basis, self._enclosure
        if basis is None or basis.keeps_all:
            enclosure = self._grown_enclosure()
            if basis is not None:
                enclosure.extend(basis.directions, basis.images)
            return enclosure
        if latest is not None and latest.is_recursive and not self._several:
            return latest
        enclosure = self._grown_enclosure()
        enclosure.extend(*conjugate_rows(displacements, images))
        return enclosure

    def _grown_enclosure(self) -> Enclosure:
        """The one that grows with the directions, or a new one where not all of them are kept."""
        assert self.metric is not None
        if self._enclosure is None or (self._basis is not None and not self._basis.keeps_all):
            self._enclosure = Enclosure(self.metric)
        return self._enclosure

    def _block(
        self, block: Tensor, tolerance: float | Tensor, enclosure: Enclosure | None = None
    ) -> BlockCGResult:
        """One block of solves, and the account of it."""
        if self._basis is None:
            self._basis = ConjugateBasis(block.shape[-1])
        result = block_conjugate_gradient(
            self.problem.operator,
            block,
            tolerance=tolerance,
            max_iter=self.max_iter,
            preconditioner=self.preconditioner,
            basis=self._basis,
            enclosure=enclosure,
        )
        self.iterations += result.iterations
        self.products += result.products
        self.smallest_curvature = min(self.smallest_curvature, result.smallest_curvature)
        self.largest_curvature = max(self.largest_curvature, result.largest_curvature)
        if result.indefinite:
            raise NotAMinimumError(
                f"the {self.problem.curvature} has a direction of curvature {result.smallest_curvature:.3g}: the "
                "point estimate is not a minimum and has no Laplace approximation. Call guide.polish(data) in "
                "float64, train longer, use curvature='ggn', or set proximal='auto' and report its delta."
                f"{hierarchy_hint(self.problem.model.space, self.problem.model.space.slices)}"
            )
        return result

    def scaled(self, r: Tensor) -> Tensor:
        """The preconditioner's image of tensors of shape ``(S, p)``."""
        return r if self.preconditioner is None else self.preconditioner(r)

    def resolve(
        self, preconditioner: Preconditioner | None, rank: int, precision: Tensor | None = None
    ) -> LinearMap | None:
        r"""The map :math:`r \mapsto M^{-1} r` that a preconditioner stands for; P exceeds a ``precision`` that is given."""
        problem = self.problem
        if preconditioner == "nystrom":
            self.products += 2 * min(rank, problem.latent.shape[0])
            if precision is not None:
                return nystrom_below(problem.operator, precision, rank)
            diagonal = self._prior_diagonal()
            return nystrom_preconditioner(problem.operator, problem.latent, rank, diagonal=diagonal)
        if preconditioner == "prior":
            diagonal = self._prior_diagonal() if precision is None else precision
            return lambda r: r / diagonal
        if preconditioner == "diagonal":
            accumulator = CurvatureAccumulator(problem.model, problem.latent, "ggn")
            diagonal = accumulator.diagonal(problem.data) + problem.ridge
            return lambda r: r / diagonal
        if isinstance(preconditioner, str):
            raise ValueError(
                f"unknown preconditioner {preconditioner!r}, expected 'nystrom', 'prior', 'diagonal', a fitted Laplace "
                "guide or a map of tensors of shape (S, p)"
            )
        posterior: Any = getattr(preconditioner, "posterior", None)
        if posterior is None:
            return preconditioner
        if posterior.event_shape != problem.latent.shape:
            raise ValueError(
                f"the preconditioning guide has {posterior.event_shape[0]} latents, expected "
                f"{problem.latent.shape[0]}: it must be a guide of the same model over all of its sites"
            )
        return lambda r: posterior.half_solve(posterior.half_solve_transposed(r))

    def _prior_diagonal(self) -> Tensor:
        """The diagonal of the prior's curvature, kept positive where the prior is flat or not log-concave."""
        problem = self.problem
        index = torch.arange(len(problem.latent), device=problem.latent.device)
        diagonal = prior_of(problem).diagonal(index) + problem.ridge
        largest = diagonal.max()
        if not largest > 0:
            return torch.ones_like(diagonal)
        return diagonal.clamp(min=1e-4 * largest)


def _joined(parts: list[Tensor]) -> Tensor:
    """Blocks below each other; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
