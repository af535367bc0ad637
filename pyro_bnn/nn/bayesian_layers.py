# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Full-weight layers of every other type, run once per sample of their weights."""

from typing import Any

from pyro.nn import PyroModule
from torch import Tensor, nn
from typing_extensions import override

from pyro_bnn.nn.attention import AttentionMixin
from pyro_bnn.nn.embedding import renormed, with_row
from pyro_bnn.nn.per_sample import BayesianPerSampleMixin
from pyro_bnn.nn.recurrent import RecurrentMixin


class _BayesianRecurrent(RecurrentMixin, BayesianPerSampleMixin):
    pass


class _BayesianAttention(AttentionMixin, BayesianPerSampleMixin):
    pass


class _BayesianEmbedding(BayesianPerSampleMixin):
    """Rows of a random table, of which that of the padding symbol is not random."""

    max_norm: float | None

    @override
    def _prepare(self) -> None:
        if self.padding_idx is not None:
            row = self.weight.detach()[self.padding_idx].clone()
            self.register_buffer("padding_row", row, persistent=False)

    @override
    def read(self, name: str) -> Any:
        value = super().read(name)
        if name != "weight" or self.padding_idx is None or isinstance(value, nn.Parameter):
            return value
        return with_row(value, self.padding_idx, self.padding_row)

    @override
    def _run(self, parameters: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "weight" not in parameters or self.max_norm is None:
            return super()._run(parameters, *args, **kwargs)
        # torch would write into the draw
        table = renormed(parameters["weight"], self.max_norm, self.norm_type)
        old, self.max_norm = self.max_norm, None
        try:
            return super()._run({**parameters, "weight": table}, *args, **kwargs)
        finally:
            self.max_norm = old

    @override
    def _rows_dim(self, place: int | str, value: Tensor) -> int:
        return self._axis or 0 if value.dim() > (2 if place == "output" else 1) else 0


def _make_class(torch_class: type, mixin: type) -> Any:
    base: Any = PyroModule[torch_class]
    name = "Bayesian" + torch_class.__name__
    made = type(base)(name, (mixin, base), {"_torch_layer": torch_class, "__module__": __name__})
    globals()[name] = made  # pickle finds classes by name
    return made


_MIXINS: dict[type, tuple[type, ...]] = {
    BayesianPerSampleMixin: (
        nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        nn.Bilinear, nn.RNNCell, nn.GRUCell, nn.LSTMCell,
    ),
    _BayesianRecurrent: (nn.RNN, nn.GRU, nn.LSTM),
    _BayesianAttention: (nn.MultiheadAttention,),
    _BayesianEmbedding: (nn.Embedding,),
}  # fmt: skip
#: Full-weight layers by torch layer; linear layers have a class of their own.
BAYESIAN_LAYERS: dict[type, type] = {
    torch_class: _make_class(torch_class, mixin)
    for mixin, classes in _MIXINS.items()
    for torch_class in classes
}
