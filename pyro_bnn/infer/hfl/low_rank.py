# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A low-rank Gaussian in latent space with a given covariance of functionals."""

import torch
from torch import Tensor


def low_rank_factor(J: Tensor, D: Tensor, correlation: Tensor, antisymmetry: float) -> Tensor:
    r"""
    A factor W of a covariance in latent space with a given covariance of the functionals.

    With the singular value decomposition :math:`J D^\top = Q\Sigma Z^\top`, truncated at
    :math:`\max(|A|, 10^{-9})`, and :math:`Q^\top C Q = X X^\top`, set :math:`W = D^\top Z\Sigma^{-1} X`. Then
    :math:`J W W^\top J^\top = Q Q^\top C Q Q^\top` holds exactly, also when the displacements are not, because W is
    built from the responses that the linearised model will give. All inputs are scaled to unit variances first:
    truncating covariances instead would lose the functionals whose variance is small.

    :param J: gradients of the functionals over their standard deviations, shape ``(m, p)``.
    :param D: displacements over the standard deviations, shape ``(m, p)``.
    :param correlation: the correlation matrix C that is wanted, shape ``(m, m)``.
    :param antisymmetry: largest antisymmetric entry |A| of the responses that C came from: their noise.
    :return: shape ``(p, r)`` with r ≤ min(m, p).
    """
    dtype, floor = J.dtype, max(antisymmetry, 1e-9 if J.dtype == torch.float64 else 1e-5)
    # in float32 the rounding of this product alone has singular values above the floor where m is large
    J, D, correlation = J.double(), D.double(), correlation.double()
    Q, singular, Zt = torch.linalg.svd(J @ D.mT)
    keep = singular > floor
    keep[J.shape[1] :] = False  # the rank is p at most
    Q = Q[:, keep]
    values, vectors = torch.linalg.eigh(Q.mT @ correlation @ Q)
    root = vectors * values.clamp(min=0).sqrt()
    return (D.mT @ (Zt[keep].mT / singular[keep]) @ root).to(dtype)


def unit_scale(variances: Tensor) -> Tensor:
    """
    :param variances: shape ``(m,)``.
    :return: standard deviations, with 1 where a variance is zero.
    """
    return torch.where(variances > 0, variances, torch.ones_like(variances)).sqrt()
