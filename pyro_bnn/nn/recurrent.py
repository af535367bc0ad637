# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Rank-1 recurrent layers: one draw of the factors per sequence, held over time."""

from typing import Any

from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from typing_extensions import override

from pyro_bnn.nn.per_sample import PerSampleMixin, Rank1PerSampleMixin
from pyro_bnn.nn.structure import map_structure, repack
from pyro_bnn.ops.recurrence import Affine, recurrent_step, unrolled

_RNN: Any = PyroModule[nn.RNN]
_GRU: Any = PyroModule[nn.GRU]
_LSTM: Any = PyroModule[nn.LSTM]
_RNNCell: Any = PyroModule[nn.RNNCell]
_GRUCell: Any = PyroModule[nn.GRUCell]
_LSTMCell: Any = PyroModule[nn.LSTMCell]


class RecurrentMixin(PerSampleMixin):
    """Where recurrent layers have their batch."""

    @override
    def _rows_dim(self, place: int | str, value: Tensor) -> int:
        return 0 if place in (0, "input", "output") and self.batch_first else 1


class _Rank1Cell(Rank1PerSampleMixin):
    r"""
    A recurrent layer with rank-1 random factors on its input and recurrent weights,
    :math:`W_{ih} \circ r_{ih} s_{ih}^\top` and :math:`W_{hh} \circ r_{hh} s_{hh}^\top` (section 3.1 of Dusenberry et
    al., ICML 2020), for every layer and direction: sites ``r_ih_l0``, ``s_ih_l0``, ``r_hh_l0``, ..., and one site per
    bias. The output factors have one entry per gate and unit.

    A draw holds for a whole sequence: the factors are the same at every time step, and with noise per example every
    sequence of the batch has its own. Factors per example and the additive form run a recurrence that is written out
    in Python, all samples at once; everything else runs the torch layer with the weights of each sample.

    The arguments are those of the torch layer, and by keyword those of :class:`~pyro_bnn.nn.Rank1Options`.
    """

    def _names(self, kind: str) -> list[str]:
        """The names of the weights or biases."""
        return [f"{kind}_ih", f"{kind}_hh"]

    @override
    def _groups(self) -> dict[str, tuple[str, int, int]]:
        shapes = self._shapes()
        return {name.removeprefix("weight"): (name, *shapes[name]) for name in self._names("weight")}

    @override
    def _biases(self) -> list[str]:
        return self._names("bias")

    @property
    def _kind(self) -> str:
        kind = self._torch_layer.__name__.removesuffix("Cell").lower()
        return f"rnn_{self.nonlinearity}" if kind == "rnn" else kind

    def _affine_of(self, suffix: str) -> Affine:
        """The weights of a layer and direction with their factors and biases."""
        return lambda x, part: self._map(
            x, *self._values_of_group(f"_{part}{suffix}", f"bias_{part}{suffix}")
        )

    def _states(self, hx: Any, zeros: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
        if hx is None:
            return (zeros, memory) if self._kind == "lstm" else (zeros,)
        return hx if isinstance(hx, tuple) else (hx,)

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Takes and returns what the torch layer does; packed sequences too."""
        return self._written_out(input, hx) if self._needs_rows() else super().forward(input, hx)

    def _written_out(self, input: Any, hx: Any) -> Any:
        batched = input.dim() == 2
        if not batched:
            input, hx = map_structure((input, hx), lambda t: t.unsqueeze(0))
        zeros = input.new_zeros(len(input), self.hidden_size)
        state, maps = self._states(hx, zeros, zeros), self._affine_of("")
        new = recurrent_step(self._kind, maps(input, "ih"), maps(state[0], "hh"), state)
        new = new if batched else tuple(h.squeeze(0) for h in new)
        return new if self._kind == "lstm" else new[0]


class _Rank1Recurrent(RecurrentMixin, _Rank1Cell):
    __doc__ = _Rank1Cell.__doc__

    @override
    def _names(self, kind: str) -> list[str]:
        return [name for name in self._flat_weights_names if name.startswith(kind)]

    @override
    def _written_out(self, input: Any, hx: Any) -> Any:
        if isinstance(input, PackedSequence):
            padded, lengths = pad_packed_sequence(input)
            output, state = self._unroll(padded, hx, lengths.to(padded.device))
            return repack(output.transpose(0, 1), input), state
        batched = input.dim() == 3
        if not batched:
            hx = map_structure(hx, lambda h: h.unsqueeze(1))
            output, state = self._unroll(input.unsqueeze(1), hx, None)
            return output[:, 0], map_structure(state, lambda h: h.squeeze(1))
        output, state = self._unroll(input.transpose(0, 1) if self.batch_first else input, hx, None)
        return output.transpose(0, 1) if self.batch_first else output, state

    def _unroll(self, x: Tensor, hx: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        """The recurrence on ``(T, N, inputs)``; factors need the sequences in front."""
        directions = 2 if self.bidirectional else 1
        shape = self.num_layers * directions, x.shape[1]
        zeros = x.new_zeros(*shape, self.proj_size or self.hidden_size)
        state = self._states(hx, zeros, x.new_zeros(*shape, self.hidden_size))

        def affine(suffix: str) -> Affine:
            of = self._affine_of(suffix)
            return lambda x, part: of(x.transpose(0, 1), part).transpose(0, 1) if x.dim() > 2 else of(x, part)

        sides = ("", "_reverse")[:directions]
        maps = [affine(f"_l{layer}{side}") for layer in range(self.num_layers) for side in sides]
        output, state = unrolled(
            self._kind, x, state, maps, directions, projects=bool(self.proj_size), lengths=lengths,
            dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return output, state if self._kind == "lstm" else state[0]


class Rank1RNN(_Rank1Recurrent, _RNN):
    """
    :class:`torch.nn.RNN` with random factors on input and recurrent weights and :class:`Rank1Options`.

    Example::

        >>> import torch
        >>> output, state = Rank1RNN(3, 4, batch_first=True)(torch.zeros(2, 5, 3))
        >>> output.shape
        torch.Size([2, 5, 4])
    """

    _torch_layer = nn.RNN


class Rank1GRU(_Rank1Recurrent, _GRU):
    """
    :class:`torch.nn.GRU` with random factors on input and recurrent weights and :class:`Rank1Options`.

    Example::

        >>> import torch
        >>> output, state = Rank1GRU(3, 4, batch_first=True)(torch.zeros(2, 5, 3))
        >>> output.shape
        torch.Size([2, 5, 4])
    """

    _torch_layer = nn.GRU


class Rank1LSTM(_Rank1Recurrent, _LSTM):
    """
    :class:`torch.nn.LSTM` with random factors on input and recurrent weights and :class:`Rank1Options`.

    Example::

        >>> import torch
        >>> output, state = Rank1LSTM(3, 4, batch_first=True)(torch.zeros(2, 5, 3))
        >>> output.shape
        torch.Size([2, 5, 4])
    """

    _torch_layer = nn.LSTM


class Rank1RNNCell(_Rank1Cell, _RNNCell):
    """
    :class:`torch.nn.RNNCell` with random factors on input and recurrent weights and :class:`Rank1Options`.

    Example::

        >>> import torch
        >>> state = Rank1RNNCell(3, 4)(torch.zeros(2, 3))
        >>> state.shape
        torch.Size([2, 4])
    """

    _torch_layer = nn.RNNCell


class Rank1GRUCell(_Rank1Cell, _GRUCell):
    """
    :class:`torch.nn.GRUCell` with random factors on input and recurrent weights and :class:`Rank1Options`.

    Example::

        >>> import torch
        >>> state = Rank1GRUCell(3, 4)(torch.zeros(2, 3))
        >>> state.shape
        torch.Size([2, 4])
    """

    _torch_layer = nn.GRUCell


class Rank1LSTMCell(_Rank1Cell, _LSTMCell):
    """
    :class:`torch.nn.LSTMCell` with random factors on input and recurrent weights and :class:`Rank1Options`.

    Example::

        >>> import torch
        >>> state = Rank1LSTMCell(3, 4)(torch.zeros(2, 3))
        >>> state[0].shape
        torch.Size([2, 4])
    """

    _torch_layer = nn.LSTMCell
