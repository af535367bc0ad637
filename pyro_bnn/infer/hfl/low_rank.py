# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A low-rank Gaussian in latent space with a given covariance of functionals."""

import torch
from torch import Tensor

from pyro_bnn.ops.inner import inner

_STRETCH = 2**20  # columns that are made float64 at once


def low_rank_factor(J: Tensor, D: Tensor, correlation: Tensor, antisymmetry: float) -> Tensor:
    r"""
    A factor W, shape ``(p, r)`` with r ≤ min(m, p), of a covariance in latent space with a given covariance C of the
    functionals, from gradients J and displacements D of shape ``(m, p)``, all over the standard deviations.

    With the singular value decomposition :math:`J D^\top = Q\Sigma Z^\top`, truncated at
    :math:`\max(|A|, 10^{-9})`, and :math:`Q^\top C Q = X X^\top`, set :math:`W = D^\top Z\Sigma^{-1} X`. Then
    :math:`J W W^\top J^\top = Q Q^\top C Q Q^\top` holds exactly, also when the displacements are not, because W is
    built from the responses that the linearised model will give. All inputs are scaled to unit variances first:
    truncating covariances instead would lose the functionals whose variance is small.
    |A| is the largest antisymmetric entry of the responses that C came from: their noise.
    """
    floor = max(antisymmetry, 1e-9 if J.dtype == torch.float64 else 1e-5)
    # in float32 the rounding of this product alone has singular values above the floor where m is large
    if len(J) > J.shape[1]:  # the rank is p at most
        (left, J_), (right, D_) = torch.linalg.qr(J.double()), torch.linalg.qr(D.double())
        Q, singular, Zt = torch.linalg.svd(J_ @ D_.mT)
        Q, Zt = left @ Q, Zt @ right.mT
    else:
        Q, singular, Zt = torch.linalg.svd(inner(J, D, double=True))
    keep = singular > floor
    Q = Q[:, keep]
    values, vectors = torch.linalg.eigh(Q.mT @ correlation.double() @ Q)
    weights = (Zt[keep].mT / singular[keep]) @ (vectors * values.clamp(min=0).sqrt())
    factor = D.new_empty(D.shape[1], weights.shape[1])
    for rows, part in zip(factor.split(_STRETCH), D.split(_STRETCH, -1), strict=True):
        rows.copy_(part.mT.double() @ weights)
    return factor


def unit_scale(variances: Tensor) -> Tensor:
    """Standard deviations, with 1 where a variance is zero, shape ``(m,)``."""
    return torch.where(variances > 0, variances, torch.ones_like(variances)).sqrt()
