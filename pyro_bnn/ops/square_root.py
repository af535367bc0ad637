# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The symmetric square root of a positive semi-definite matrix, with its derivative where eigenvalues agree."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _SymmetricRoot(torch.autograd.Function):
    r"""
    :math:`R = A^{1/2}`. Its differential solves :math:`dR\,R + R\,dR = dA`, which divides by sums of the roots of eigenvalues,
    where the derivative of an eigendecomposition divides by their differences.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        roots = values.clamp(min=0).sqrt()
        ctx.save_for_backward(roots, vectors)
        return (vectors * roots.unsqueeze(-2)) @ vectors.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        roots, vectors = ctx.saved_tensors
        sums = roots.unsqueeze(-1) + roots.unsqueeze(-2)
        inside = vectors.mT @ (0.5 * (gradient + gradient.mT)) @ vectors
        # what has no variance stays without
        smallest = 10 * torch.finfo(sums.dtype).eps ** 0.5 * sums.amax((-2, -1), keepdim=True)
        return vectors @ torch.where(sums > smallest, inside / sums, 0.0) @ vectors.mT


def symmetric_root(matrix: Tensor) -> Tensor:
    """
    The symmetric square root, a smooth function of the matrix where that is positive definite; it can be differentiated once,
    and where there is no variance has a derivative of zero.

    :param matrix: symmetric, positive semi-definite up to rounding, shape ``(..., C, C)``.
    :return: symmetric R with ``R @ R == matrix``, shape ``(..., C, C)``.

    Example::

        >>> symmetric_root(torch.tensor([[4.0, 0.0], [0.0, 9.0]]))
        tensor([[2., 0.],
                [0., 3.]])
    """
    if matrix.shape[-1] > 1:
        return _SymmetricRoot.apply(matrix)
    nothing = matrix <= 0
    return torch.where(nothing, 1.0, matrix).sqrt().masked_fill(nothing, 0.0)
