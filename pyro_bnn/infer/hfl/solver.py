# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Linear solves with the curvature at a point estimate, in blocks, with an account of what they met."""

from typing import Any, Literal

import torch
from torch import Tensor

from pyro_bnn.curvature.accumulate import CurvatureAccumulator, NotAMinimumError
from pyro_bnn.curvature.definite import hierarchy_hint
from pyro_bnn.curvature.prior import prior_curvature
from pyro_bnn.infer.hfl.loss import Problem
from pyro_bnn.model.data import iter_batches
from pyro_bnn.ops.block_cg import ConjugateBasis, block_conjugate_gradient
from pyro_bnn.ops.jacobian import LinearMap
from pyro_bnn.ops.krylov import nystrom_preconditioner

#: ``"nystrom"``, ``"prior"``, ``"diagonal"``, a fitted Laplace guide, or a map r -> M^-1 r.
Preconditioner = Literal["nystrom", "prior", "diagonal"] | LinearMap | Any


class Solver:
    r"""
    Solves :math:`P d = g` for blocks of right-hand sides.

    :param tolerance: relative residual.
    :param max_iter: largest number of iterations per block; default ``10 p``.
    :param preconditioner: ``None``, ``"nystrom"``, ``"prior"`` (the diagonal of its curvature), ``"diagonal"`` (of the
        GGN), a Laplace guide after ``laplace_approximation`` (its covariance is the preconditioner), or a map of
        shape ``(S, p)`` tensors.
    :param block_size: how many right-hand sides share a Krylov space; memory is about 6 blocks and the directions
        that are kept (:class:`~pyro_bnn.ops.block_cg.ConjugateBasis`).
    :param rank: directions of the ``"nystrom"`` preconditioner.
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
        self.preconditioner = self.resolve(preconditioner, rank)

    def __call__(self, rhs: Tensor, *, tolerance: float | None = None) -> Tensor:
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
        parts = []
        basis = ConjugateBasis(rhs.shape[-1])
        for block in rhs.split(self.block_size):
            result = block_conjugate_gradient(
                self.problem.operator,
                block,
                tolerance=self.tolerance if tolerance is None else tolerance,
                max_iter=self.max_iter,
                preconditioner=self.preconditioner,
                basis=basis,
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
            if tolerance is None:
                self.residual = max(self.residual, float(result.residual.max()))
            parts.append(result.solution)
        return torch.cat(parts)

    def scaled(self, r: Tensor) -> Tensor:
        """The preconditioner's image of tensors of shape ``(S, p)``."""
        return r if self.preconditioner is None else self.preconditioner(r)

    def resolve(self, preconditioner: Preconditioner | None, rank: int) -> LinearMap | None:
        r"""The map :math:`r \mapsto M^{-1} r` that a preconditioner stands for."""
        problem = self.problem
        if preconditioner == "nystrom":
            self.products += 2 * min(rank, problem.latent.shape[0])
            diagonal = self._prior_diagonal()
            return nystrom_preconditioner(problem.operator, problem.latent, rank, diagonal=diagonal)
        if preconditioner == "prior":
            diagonal = self._prior_diagonal()
            return lambda r: r / diagonal
        if preconditioner == "diagonal":
            accumulator = CurvatureAccumulator(problem.model, problem.latent, "ggn")
            diagonal = accumulator.diagonal(problem.data) + problem.proximal
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
        leaf = problem.latent.clone().requires_grad_(True)
        trace = problem.model.trace(leaf, next(iter_batches(problem.data)))
        value = -problem.model.log_prior(leaf, trace)
        prior = prior_curvature(value, leaf, chunk_size=problem.chunk_size)
        diagonal = prior.diagonal(torch.arange(len(leaf), device=leaf.device)) + problem.proximal
        largest = diagonal.max()
        if not largest > 0:
            return torch.ones_like(diagonal)
        return diagonal.clamp(min=1e-4 * largest)
