# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What multipliers of the prior precision add to the loss around a point estimate."""

from typing import Any

from torch import Tensor

from pyro_bnn.curvature.prior import diagonal_of_diagonal, prior_curvature
from pyro_bnn.model.data import iter_batches
from pyro_bnn.model.packed import PackedModel


def prior_shift(model: PackedModel, latent: Tensor, data: Any, tau: Tensor) -> tuple[Tensor, Tensor]:
    r"""
    The diagonal :math:`(\tau - 1) D` and the gradient :math:`(\tau - 1) g` that multipliers add to the Hessian and the gradient of
    the negative log prior, shape ``(p,)`` both: exact for Gaussian priors; others are replaced by the Gaussian with the same
    gradient and curvature at the point estimate.

    :raises ValueError: if the prior couples latents.
    """
    leaf = latent.detach().clone().requires_grad_(True)
    trace = model.trace(leaf, next(iter_batches(data)))
    prior = prior_curvature(-model.log_prior(leaf, trace), leaf)
    diagonal = diagonal_of_diagonal(prior.operator, prior.latent, prior.eps, by_row=True)
    if diagonal is None:
        raise ValueError(
            "multipliers of the prior precision are in use, and the prior couples latents with each other, for which they mean "
            "nothing without its matrix: make scales parameters of the model, or call laplace_approximation again."
        )
    change = (tau - 1).to(diagonal)
    return (change * diagonal).to(latent.dtype), (change * prior.gradient).to(latent.dtype)
