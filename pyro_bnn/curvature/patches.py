# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Convolutions as linear maps: the patches of their inputs, and sums of outer products of patches without the patches.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def sizes(value: Any, d: int) -> tuple[int, ...]:
    """A size, or one per spatial dimension, as torch's convolutions take it, as one for each of d dimensions."""
    return (value,) * d if isinstance(value, int) else tuple(value) * (d if len(value) == 1 else 1)


def patches(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """
    The inputs, shape ``(B, c, *spatial)``, that each output position of a convolution sees, shape ``(B, T, c * prod(kernel))``;
    ``kernel`` is its size, the rest as in :func:`torch.nn.functional.conv2d`.
    """
    d = x.dim() - 2
    kernel, stride, padding, dilation = (sizes(v, d) for v in (tuple(kernel), stride, padding, dilation))
    x = F.pad(x, [width for p in reversed(padding) for width in (p, p)])
    for i in range(d):
        x = x.unfold(2 + i, dilation[i] * (kernel[i] - 1) + 1, stride[i])[..., :: dilation[i]]
    x = x.permute(0, 1, *range(2 + d, 2 + 2 * d), *range(2, 2 + d))
    return x.flatten(2 + d).flatten(1, 1 + d).mT


def convolved(x: Tensor, v: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """Inner products, shape ``(B, T)``, of :func:`patches` with a vector: a convolution with one channel."""
    convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    return convolve(x, v.reshape(1, x.shape[1], *kernel), None, stride, padding, dilation).flatten(1)


def gram(rows: Tensor, *, block: int = 128) -> Tensor:
    r""":math:`R^\top R` of rows ``(n, d)``, computed for one triangle of blocks where that saves work."""
    d = rows.shape[1]
    if d < 2 * block:
        return rows.mT @ rows
    result = rows.new_empty(d, d)
    for start in range(0, d, block):
        part = slice(start, min(start + block, d))
        strip = rows[:, part].mT @ rows[:, start:]
        result[part, start:] = strip
        result[start:, part] = strip.mT
    return result


def column_gram(columns: Tensor) -> Tensor:
    r""":math:`\sum_n C_n C_n^\top`, shape ``(d, d)``, of columns ``(B, d, T)``."""
    if columns.shape[1] <= columns.shape[2]:
        return torch.bmm(columns, columns.mT).sum(0)
    return gram(columns.mT.reshape(-1, columns.shape[1]))


def patch_gram(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> tuple[Tensor, int]:
    r"""
    The sum of outer products of :func:`patches`, :math:`\sum_{nt} x_{nt}x_{nt}^\top`, and the number of terms.

    Two taps in rows i and i' of the kernel see input rows at the distance i' - i at every output position. So the
    products of input rows (unfolded along the width only) at each of the distances are formed once and added up for
    every pair of kernel rows: a kernel with k rows costs about k instead of k² of their products, and no patches.
    """
    d = x.dim() - 2
    if d == 1:  # the only dimension takes the part of the rows
        x = x.unsqueeze(-1)
        kernel, stride, padding, dilation = (
            sizes(v, 1) + (fill,)
            for v, fill in ((tuple(kernel), 1), (stride, 1), (padding, 0), (dilation, 1))
        )
    if d <= 2:
        B, C, H, W = x.shape
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = (
            sizes(v, 2) for v in (tuple(kernel), stride, padding, dilation)
        )
        height, width = H + 2 * ph, (W + 2 * pw - dw * (kw - 1) - 1) // sw + 1
        out = (height - dh * (kh - 1) - 1) // sh + 1
        # fewer operations, and no more memory, than with the patches
        if height < kh * out and height * C * kw <= B * out * width * kh:
            rows = F.pad(x, (pw, pw, ph, ph)).permute(2, 0, 1, 3).contiguous()
            rows = rows.unfold(3, dw * (kw - 1) + 1, sw)[..., ::dw]
            rows = rows.permute(0, 1, 3, 2, 4).reshape(height, B * width, C * kw)
            result = x.new_empty(C, kh, kw, C, kh, kw)
            for lag in range(kh):
                products = torch.bmm(rows[: height - lag * dh].mT, rows[lag * dh :])
                for i in range(kh - lag):
                    last = i * dh + sh * (out - 1)
                    block = products[i * dh : last + 1 : sh].sum(0).reshape(C, kw, C, kw)
                    result[:, i, :, :, i + lag] = block
                    result[:, i + lag, :, :, i] = block.permute(2, 3, 0, 1)
            return result.reshape(C * kh * kw, -1), B * out * width
    columns = patches(x, kernel, stride, padding, dilation)
    return column_gram(columns.mT), columns.shape[0] * columns.shape[1]


class PatchInputs:
    """
    The patches of a convolution's input, formed when asked for: they are much larger than the input. The geometry is kernel,
    stride, padding and dilation.
    """

    def __init__(self, x: Tensor, geometry: Any) -> None:
        self.x, self.geometry = x, geometry

    def __call__(self) -> Tensor:
        """The patches, shape ``(B, T, in)``."""
        return patches(self.x, *self.geometry)

    def numel(self) -> int:
        """How many numbers the patches are."""
        return patches(self.x[:1], *self.geometry).numel() * self.x.shape[0]

    def project(self, v: Tensor) -> Tensor:
        """Inner products of the patches with a vector, shape ``(B, T)``."""
        return convolved(self.x, v, *self.geometry)

    def present(self) -> Tensor:
        """Which patches hold an entry other than zero, bool, shape ``(B, T)``."""
        channels = (self.x != 0).any(1, keepdim=True).to(self.x)
        return convolved(channels, self.x.new_ones(math.prod(self.geometry[0])), *self.geometry) > 0.5

    def gram(self, dtype: torch.dtype) -> tuple[Tensor, int]:
        """:func:`patch_gram` in a precision."""
        return patch_gram(self.x.to(dtype), *self.geometry)


class ChannelRows:
    """Rows, shape ``(B, T, channels / groups)``, of the gradient in a convolution's output, for one group of channels."""

    def __init__(self, group: int, groups: int) -> None:
        self.group, self.groups = group, groups

    def _columns(self, g: Tensor) -> Tensor:
        return g.chunk(self.groups, 1)[self.group].flatten(2)

    def __call__(self, g: Tensor) -> Tensor:
        """The rows of a gradient ``(B, channels, *spatial)``."""
        return self._columns(g).mT

    def project(self, g: Tensor, u: Tensor) -> Tensor:
        """Inner products of the rows with a vector, shape ``(B, T)``."""
        return torch.matmul(u, self._columns(g))  # many times faster than with the rows

    def gram(self, g: Tensor) -> Tensor:
        """The sum of outer products of the rows."""
        return column_gram(self._columns(g))


class OutputPatches:
    """
    Rows, shape ``(B, T, channels / groups * prod(kernel))``, of the gradient in a transposed convolution's output: its
    ``length`` first patches, since an output padding can add some that no input reaches.
    """

    def __init__(self, group: int, groups: int, geometry: Any, length: int) -> None:
        self.group, self.groups, self.geometry, self.length = group, groups, geometry, length

    def __call__(self, g: Tensor) -> Tensor:
        """The rows of a gradient ``(B, channels, *spatial)``."""
        return patches(g.chunk(self.groups, 1)[self.group], *self.geometry)[:, : self.length]

    def project(self, g: Tensor, u: Tensor) -> Tensor:
        """Inner products of the rows with a vector, shape ``(B, T)``."""
        return convolved(g.chunk(self.groups, 1)[self.group], u, *self.geometry)[:, : self.length]
