# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Rank-1 recurrent layers: one draw of the factors per sequence, held over time."""

from typing import Any

from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pyro_bnn.nn.per_sample import Rank1PerSampleMixin
from pyro_bnn.nn.rank1 import finish_layer
from pyro_bnn.nn.rank1_conv import _OPTIONS

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
        :param input: as for the torch layer.
        :param hx: as for the torch layer.
        :return: as for the torch layer.
        """
        if isinstance(input, PackedSequence):
            raise ValueError(
                f"{self._pyro_name or type(self).__name__} does not take a PackedSequence: pad the sequences and mask "
                "the outputs."
            )
        return super().forward(input, hx)

    def _batch_dim(self, index: int | str, value: Tensor) -> int:
        return 0 if index == 0 and self.batch_first else 1

    def _output_batch_dim(self, path: tuple[int, ...], value: Tensor) -> int:
        return 0 if path == (0,) and self.batch_first else 1


class _Rank1RecurrentCell(_Rank1Recurrent):
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
