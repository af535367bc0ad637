# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
What is known of the curvature from below: :math:`P \succeq T`, with T the curvature of the prior.

The generalised Gauss-Newton matrix is positive semi-definite, so that the precision is at least what the prior (and the
proximal term and multipliers) add to it. That is a number for every latent where the prior's Hessian at the point estimate is diagonal.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bnn.curvature.prior import PriorCurvature, diagonal_of_diagonal, prior_curvature
from pyro_bnn.infer.hfl.loss import Problem
from pyro_bnn.model.data import iter_batches


@dataclass
class Bound:
    """
    :ivar precision: T, positive, shape ``(p,)``; ``None`` where no bound is known.
    :ivar reason: why there is none.
    """

    precision: Tensor | None = None
    reason: str = ""


def prior_of(problem: Problem) -> PriorCurvature:
    """The curvature of the prior at the point estimate."""
    leaf = problem.latent.clone().requires_grad_(True)
    trace = problem.model.trace(leaf, next(iter_batches(problem.data)))
    return prior_curvature(-problem.model.log_prior(leaf, trace), leaf, chunk_size=problem.chunk_size)


def prior_bound(problem: Problem) -> Bound:
    """T of a problem, or why there is none."""
    if problem.curvature == "hessian":
        return Bound(
            reason="the exact Hessian has no bound that is known beforehand; that of curvature='ggn' is the prior's curvature"
        )
    prior = prior_of(problem)
    diagonal = diagonal_of_diagonal(
        prior.operator, prior.latent, torch.finfo(problem.latent.dtype).eps, by_row=True
    )
    if diagonal is None:
        return Bound(reason="the prior couples latents, so that its curvature is no number for each")
    diagonal = diagonal + problem.ridge
    flat = ~(diagonal > 0)
    if not bool(flat.any()):
        return Bound(diagonal.to(problem.latent.dtype))
    names = [name for name, where in problem.model.space.slices.items() if bool(flat[where].any())]
    return Bound(
        reason=f"the prior of {', '.join(map(repr, names[:3]))}{' and others' if len(names) > 3 else ''} has no positive "
        "curvature at the point estimate (it is improper, flat, or not strongly log-concave there)"
    )
