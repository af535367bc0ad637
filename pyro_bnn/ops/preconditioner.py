# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Preconditioners for conjugate gradients that need nothing but products."""

import torch
from torch import Tensor

from pyro_bnn.ops.block_cg import orthonormal_rows
from pyro_bnn.ops.jacobian import LinearMap


def nystrom_preconditioner(
    operator: LinearMap, like: Tensor, rank: int, *, passes: int = 2, diagonal: Tensor | None = None
) -> LinearMap:
    r"""
    The randomised Nyström preconditioner of a positive definite map whose spectrum decays.

    Ritz pairs :math:`(\mu_i, u_i)` of P on a random subspace, sharpened by power iteration, give

    .. math:: M^{-1} = I - U (I - \mu_{\min}\,\mathrm{diag}(\mu)^{-1}) U^\top,

    which maps the largest eigenvalues of P to about the smallest of those that were captured. It costs
    ``rank * passes`` products once, for any number of right-hand sides. With a diagonal S, such as the prior precision
    of weights of different scales, the same is done for :math:`S^{-1/2} P S^{-1/2}`.

    :param operator: the map :math:`v \mapsto P v` from ``(S, p)`` to ``(S, p)``.
    :param like: a vector of shape ``(p,)`` that gives size, dtype and device.
    :param rank: how many directions; memory is ``rank * p``.
    :param passes: products per direction; 2 sharpens the subspace by one power iteration.
    :param diagonal: S, positive, shape ``(p,)``; the identity by default.
    :return: the map :math:`r \mapsto M^{-1} r`.

    Source: Frangella, Tropp and Udell (2023), "Randomized Nyström preconditioning", with Ritz values in place of
    the shifted Nyström values because here the damping is part of P.
    """
    scale = torch.ones_like(like) if diagonal is None else diagonal.rsqrt()
    generator = torch.Generator(device=like.device).manual_seed(0)
    shape = (min(rank, like.shape[0]), like.shape[0])
    basis = torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
    basis = orthonormal_rows(basis)
    for _ in range(passes - 1):
        basis = orthonormal_rows(operator(basis * scale) * scale)
    image = operator(basis * scale) * scale
    values, vectors = torch.linalg.eigh(0.5 * (basis @ image.mT + image @ basis.mT))
    keep = values > 0
    directions = vectors[:, keep].mT @ basis
    shrink = 1 - values[keep].min() / values[keep]

    def solve(r: Tensor) -> Tensor:
        white = r * scale
        return (white - ((white @ directions.mT) * shrink) @ directions) * scale

    return solve
