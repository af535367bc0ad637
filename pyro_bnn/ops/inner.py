# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Inner products of long vectors, whose sums single precision would lose."""

import torch
from torch import Tensor

_STRETCH = 2**16  # entries that are summed in the precision of the numbers


def inner(left: Tensor, right: Tensor, *, double: bool = False) -> Tensor:
    r"""
    :math:`A B^\top`, summed a stretch of entries at a time, the stretches in float64: the rounding of a sum in float32 grows
    with its length.

    :param left: A, shape ``(m, p)``.
    :param right: B, shape ``(n, p)``.
    :param double: whether the stretches, too, and the result are float64, for small singular values of the product.
    :return: shape ``(m, n)``, of the type of A, or float64.

    Example::

        >>> inner(torch.ones(1, 3), torch.ones(2, 3))
        tensor([[3., 3.]])
    """
    if left.dtype == torch.float64 or (left.shape[-1] <= _STRETCH and not double):
        return left @ right.mT
    total = left.new_zeros(len(left), len(right), dtype=torch.float64)
    for a, b in zip(left.split(_STRETCH, -1), right.split(_STRETCH, -1), strict=True):
        total += a.double() @ b.double().mT if double else a @ b.mT
    return total if double else total.to(left.dtype)
