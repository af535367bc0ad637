# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Rank-1 recurrent layers: one draw of the factors per sequence, held over time."""

from typing import Any

import torch
import torch.nn.functional as F
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from pyro_bnn.nn.conv import _OPTIONS
from pyro_bnn.nn.per_sample import Rank1PerSampleMixin
from pyro_bnn.nn.rank1 import finish_layer
from pyro_bnn.nn.structure import repack

_RNN: Any = PyroModule[nn.RNN]
_GRU: Any = PyroModule[nn.GRU]
_LSTM: Any = PyroModule[nn.LSTM]
_RNNCell: Any = PyroModule[nn.RNNCell]
_GRUCell: Any = PyroModule[nn.GRUCell]
_LSTMCell: Any = PyroModule[nn.LSTMCell]


class _Rank1Recurrent(Rank1PerSampleMixin):
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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = {key: kwargs.pop(key) for key in _OPTIONS if key in kwargs}
        super().__init__(*args, **kwargs)
        finish_layer(self, options)

    def _weight_names(self) -> list[str]:
        return [name for name in self._flat_weights_names if name.startswith("weight")]

    def _bias_names(self) -> list[str]:
        return [name for name in self._flat_weights_names if name.startswith("bias")]

    def _groups(self) -> dict[str, tuple[str, int, int]]:
        templates = self._parameter_templates()
        return {name[len("weight") :]: (name, *templates[name].shape) for name in self._weight_names()}

    def _biases(self) -> dict[str, str]:
        return {name: name for name in self._bias_names()}

    def forward(self, input: Any, hx: Any = None) -> Any:
        """
        :param input: as for the torch layer; packed sequences too.
        :param hx: as for the torch layer.
        :return: as for the torch layer.
        """
        if not self._needs_rows():
            return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            padded, lengths = pad_packed_sequence(input, batch_first=True)
            output, state = self._unroll(padded, hx, lengths.to(padded.device))
            return repack(output, input), state
        batched = input.dim() == 3
        if not batched:
            input = input.unsqueeze(0 if self.batch_first else 1)
            hx = None if hx is None else _each(hx, lambda h: h.unsqueeze(1))
        output, state = self._unroll(input if self.batch_first else input.transpose(0, 1), hx, None)
        if not batched:
            return output[0], _each(state, lambda h: h.squeeze(1))
        return output if self.batch_first else output.transpose(0, 1), state

    def _unroll(self, x: Tensor, hx: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        """The recurrence on ``(N, T, inputs)``, step by step."""
        directions = 2 if self.bidirectional else 1
        if hx is None:
            zeros = x.new_zeros(self.num_layers * directions, len(x), self.proj_size or self.hidden_size)
            memory = x.new_zeros(self.num_layers * directions, len(x), self.hidden_size)
            hx = (zeros, memory) if self.mode == "LSTM" else zeros
        finals: list[Any] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                suffix = f"_l{layer}{'_reverse' if direction else ''}"
                state = _each(hx, lambda h: h[len(finals)])
                output, state = self._scan(_reverse(x, lengths) if direction else x, state, suffix, lengths)
                outputs.append(_reverse(output, lengths) if direction else output)
                finals.append(state)
            x = torch.cat(outputs, -1)
            if self.dropout and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        if self.mode == "LSTM":
            return x, (torch.stack([h for h, _ in finals]), torch.stack([c for _, c in finals]))
        return x, torch.stack(finals)

    def _scan(self, x: Tensor, state: Any, suffix: str, lengths: Tensor | None) -> tuple[Tensor, Any]:
        """One layer in one direction."""
        outputs = []
        for t, from_input in enumerate(self._apply_group(x, "_ih" + suffix).unbind(1)):
            new = self._step(from_input, state, suffix)
            if lengths is not None:  # a sequence that has ended keeps its state
                going = (t < lengths).unsqueeze(-1)
                new = (
                    tuple(torch.where(going, a, b) for a, b in zip(new, state, strict=True))
                    if isinstance(new, tuple)
                    else torch.where(going, new, state)
                )
            state = new
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1), state

    def _step(self, from_input: Tensor, state: Any, suffix: str) -> Any:
        """
        The next state, by the equations of :class:`torch.nn.RNN`, :class:`torch.nn.GRU` and
        :class:`torch.nn.LSTM`.
        """
        h = state[0] if isinstance(state, tuple) else state
        from_state = self._apply_group(h, "_hh" + suffix)
        if isinstance(state, tuple):
            i, f, g, o = (from_input + from_state).chunk(4, -1)
            c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            return (self._apply_group(h, "_hr" + suffix) if self._projects else h), c
        if self._kind == "GRU":
            (r_x, z_x, n_x), (r_h, z_h, n_h) = from_input.chunk(3, -1), from_state.chunk(3, -1)
            z = (z_x + z_h).sigmoid()
            return (1 - z) * (n_x + (r_x + r_h).sigmoid() * n_h).tanh() + z * h
        y = from_input + from_state
        return y.tanh() if self._kind == "RNN_TANH" else y.relu()

    def _apply_group(self, x: Tensor, suffix: str) -> Tensor:
        """One weight with its factors and bias."""
        weight, r, s = self._group_values(suffix)
        bias = self._bias_value("bias" + suffix) if "bias" + suffix in self._bias_names() else None
        return self._map(x, weight, bias, r, s)

    @property
    def _kind(self) -> str:
        return str(self.mode)

    @property
    def _projects(self) -> bool:
        return bool(self.proj_size)

    def _batch_dim(self, index: int | str, value: Tensor) -> int:
        return 0 if index == 0 and self.batch_first else 1

    def _output_batch_dim(self, path: tuple[int, ...], value: Tensor) -> int:
        return 0 if path == (0,) and self.batch_first else 1


class _Rank1RecurrentCell(_Rank1Recurrent):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """
        :param input: as for the torch layer.
        :param hx: as for the torch layer.
        :return: as for the torch layer.
        """
        if not self._needs_rows():
            return super(_Rank1Recurrent, self).forward(input, hx)
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            hx = None if hx is None else _each(hx, lambda h: h.unsqueeze(0))
        if hx is None:
            zeros = input.new_zeros(len(input), self.hidden_size)
            hx = (zeros, zeros) if self._kind == "LSTM" else zeros
        state = self._step(self._apply_group(input, "_ih"), hx, "")
        return state if batched else _each(state, lambda h: h.squeeze(0))

    @property
    def _kind(self) -> str:
        kind = self._torch_layer.__name__.removesuffix("Cell")
        return f"RNN_{self.nonlinearity.upper()}" if kind == "RNN" else kind

    @property
    def _projects(self) -> bool:
        return False

    def _weight_names(self) -> list[str]:
        return ["weight_ih", "weight_hh"]

    def _bias_names(self) -> list[str]:
        return ["bias_ih", "bias_hh"]

    def _batch_dim(self, index: int | str, value: Tensor) -> int:
        return 0

    def _output_batch_dim(self, path: tuple[int, ...], value: Tensor) -> int:
        return 0


class Rank1RNN(_Rank1Recurrent, _RNN):
    """:class:`torch.nn.RNN` with random factors on input and recurrent weights and :class:`Rank1Options`."""

    _torch_layer = nn.RNN


class Rank1GRU(_Rank1Recurrent, _GRU):
    """:class:`torch.nn.GRU` with random factors on input and recurrent weights and :class:`Rank1Options`."""

    _torch_layer = nn.GRU


class Rank1LSTM(_Rank1Recurrent, _LSTM):
    """:class:`torch.nn.LSTM` with random factors on input and recurrent weights and :class:`Rank1Options`."""

    _torch_layer = nn.LSTM


class Rank1RNNCell(_Rank1RecurrentCell, _RNNCell):
    """:class:`torch.nn.RNNCell` with random factors on input and recurrent weights and :class:`Rank1Options`."""

    _torch_layer = nn.RNNCell


class Rank1GRUCell(_Rank1RecurrentCell, _GRUCell):
    """:class:`torch.nn.GRUCell` with random factors on input and recurrent weights and :class:`Rank1Options`."""

    _torch_layer = nn.GRUCell


class Rank1LSTMCell(_Rank1RecurrentCell, _LSTMCell):
    """:class:`torch.nn.LSTMCell` with random factors on input and recurrent weights and :class:`Rank1Options`."""

    _torch_layer = nn.LSTMCell


def _each(state: Any, fn: Any) -> Any:
    """A function of every tensor of a state."""
    return tuple(fn(h) for h in state) if isinstance(state, tuple) else fn(state)


def _reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverses ``(N, T, d)`` in time, each sequence within its length."""
    if lengths is None:
        return x.flip(1)
    steps = torch.arange(x.shape[1], device=x.device)
    index = torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)
    return x.gather(1, index.unsqueeze(-1).expand_as(x))
