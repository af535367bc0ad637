# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Rank-1 convolutions: one factor per channel, shared by all positions and all taps of the kernel."""

from typing import Any

from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_bnn.nn.rank1 import Rank1Mixin
from pyro_bnn.nn.sites import module_path

_Conv1d: Any = PyroModule[nn.Conv1d]
_Conv2d: Any = PyroModule[nn.Conv2d]
_Conv3d: Any = PyroModule[nn.Conv3d]
_ConvTranspose1d: Any = PyroModule[nn.ConvTranspose1d]
_ConvTranspose2d: Any = PyroModule[nn.ConvTranspose2d]
_ConvTranspose3d: Any = PyroModule[nn.ConvTranspose3d]


class _Rank1Conv(Rank1Mixin):
    r"""
    A convolution with rank-1 random factors, :math:`y = (\mathrm{conv}_W(x \circ s)) \circ r + b`: ``s`` has one
    entry per input channel and ``r`` one per output channel, section 3.1 of Dusenberry et al., ICML 2020.

    The arguments are those of the torch layer (``groups``, ``dilation`` and all padding modes included), and by
    keyword those of :class:`~pyro_bnn.nn.Rank1Options`. Factors of shape ``(*samples, 1, channels)`` align with the
    batch dimension.
    """

    takes_shared_input = True

    def _groups(self) -> dict[str, tuple[str, int, int]]:
        return {"": ("weight", self.out_channels, self.in_channels)}

    def _activations(self, x: Tensor) -> int:
        positions = x.numel() // self.in_channels
        for stride in self.stride:
            positions = positions * stride if self.transposed else positions // stride
        return x.numel() + positions * self.out_channels

    def _check_input(self, x: Tensor) -> None:
        if x.dim() < self._post + 1 or x.shape[-self._post - 1] != self.in_channels:
            raise ValueError(
                f"{module_path(self) or type(self).__name__} takes inputs of shape (..., {self.in_channels}, "
                f"{'*' * self._post}), found {tuple(x.shape)}."
            )

    def _column_factor(self, s: Tensor) -> Tensor:
        if self.groups == 1:
            return s.unsqueeze(-2)
        per_group = s.unflatten(-1, (self.groups, -1))
        return per_group.repeat_interleave(self.out_channels // self.groups, -2)


class _Rank1ConvTranspose(_Rank1Conv):
    def _row_factor(self, r: Tensor) -> Tensor:
        if self.groups == 1:
            return r.unsqueeze(-2)
        per_group = r.unflatten(-1, (self.groups, -1))
        return per_group.repeat_interleave(self.in_channels // self.groups, -2)

    def _column_factor(self, s: Tensor) -> Tensor:
        return s.unsqueeze(-1)


class Rank1Conv1d(_Rank1Conv, _Conv1d):
    """
    :class:`torch.nn.Conv1d` with one random factor per input and output channel and :class:`Rank1Options`.

    Example::

        >>> import torch
        >>> layer = Rank1Conv1d(3, 4, kernel_size=3)
        >>> layer(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 4, 6])
    """

    _post = 1


class Rank1Conv2d(_Rank1Conv, _Conv2d):
    """
    :class:`torch.nn.Conv2d` with one random factor per input and output channel and :class:`Rank1Options`.

    Example::

        >>> import torch
        >>> layer = Rank1Conv2d(3, 4, kernel_size=3)
        >>> layer(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 4, 6, 6])
    """

    _post = 2


class Rank1Conv3d(_Rank1Conv, _Conv3d):
    """
    :class:`torch.nn.Conv3d` with one random factor per input and output channel and :class:`Rank1Options`.

    Example::

        >>> import torch
        >>> layer = Rank1Conv3d(3, 4, kernel_size=3)
        >>> layer(torch.zeros(2, 3, 8, 8, 8)).shape
        torch.Size([2, 4, 6, 6, 6])
    """

    _post = 3


class Rank1ConvTranspose1d(_Rank1ConvTranspose, _ConvTranspose1d):
    """
    :class:`torch.nn.ConvTranspose1d` with one random factor per input and output channel and :class:`Rank1Options`.

    Example::

        >>> import torch
        >>> layer = Rank1ConvTranspose1d(3, 4, kernel_size=3)
        >>> layer(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 4, 10])
    """

    _post = 1


class Rank1ConvTranspose2d(_Rank1ConvTranspose, _ConvTranspose2d):
    """
    :class:`torch.nn.ConvTranspose2d` with one random factor per input and output channel and :class:`Rank1Options`.

    Example::

        >>> import torch
        >>> layer = Rank1ConvTranspose2d(3, 4, kernel_size=3)
        >>> layer(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 4, 10, 10])
    """

    _post = 2


class Rank1ConvTranspose3d(_Rank1ConvTranspose, _ConvTranspose3d):
    """
    :class:`torch.nn.ConvTranspose3d` with one random factor per input and output channel and :class:`Rank1Options`.

    Example::

        >>> import torch
        >>> layer = Rank1ConvTranspose3d(3, 4, kernel_size=3)
        >>> layer(torch.zeros(2, 3, 8, 8, 8)).shape
        torch.Size([2, 4, 10, 10, 10])
    """

    _post = 3
