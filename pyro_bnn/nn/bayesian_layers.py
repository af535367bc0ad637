# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Full-weight layers of every other type, run once per sample of their weights."""

from typing import Any

from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_bnn.nn.attention import AttentionMixin, renormed, with_row
from pyro_bnn.nn.bayesian import BayesianMixin
from pyro_bnn.nn.per_sample import PerSampleMixin
from pyro_bnn.nn.priors import PriorLike


class BayesianPerSampleMixin(PerSampleMixin, BayesianMixin):
    """A torch layer whose parameters are sample sites. Convert networks with :func:`~pyro_bnn.nn.bayesian_`."""

    def _sample_parameters(self) -> dict[str, Tensor]:
        parameters = {}
        names = [*self._site_names(), *self._redirected()]
        for name in names:
            value = self._folding.value(self, name) if self._is_folded() else self.read(name)
            if self._is_folded() and value.dim() > self._event_dim(name):
                if value.shape[1] > 1:
                    raise ValueError(
                        f"{name!r} of {self._pyro_name} has a value per example, which full weights do not support."
                    )
                value = value.squeeze(1)
            parameters[name] = value
        return parameters

    def extra_repr(self) -> str:
        """The names of the random attributes."""
        return f"sites={self._site_names()}"


class _BayesianRecurrent(BayesianPerSampleMixin):
    def _batch_dim(self, index: int | str, value: Tensor) -> int:
        return 0 if index == 0 and self.batch_first else 1

    def _output_batch_dim(self, path: tuple[int, ...], value: Tensor) -> int:
        return 0 if path == (0,) and self.batch_first else 1


class _BayesianAttention(AttentionMixin, BayesianPerSampleMixin):
    def _make_bayesian(self, prior: PriorLike | None, prefix: str = "") -> None:
        self._take_out_projection()
        super()._make_bayesian(prior, prefix)


class _BayesianEmbedding(BayesianPerSampleMixin):
    """Rows of a random table, of which that of the padding symbol is not random."""

    max_norm: float | None

    def _make_bayesian(self, prior: PriorLike | None, prefix: str = "") -> None:
        if self.padding_idx is not None:
            row = self.weight.detach()[self.padding_idx].clone()
            self.register_buffer("padding_row", row, persistent=False)
        super()._make_bayesian(prior, prefix)

    def read(self, name: str) -> Any:
        """See :class:`~pyro_bnn.nn.sites.SiteModule`."""
        value = super().read(name)
        if name != "weight" or self.padding_idx is None or isinstance(value, nn.Parameter):
            return value
        return with_row(value, self.padding_idx, self.padding_row)

    def _run(self, parameters: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "weight" not in parameters or self.max_norm is None:
            return super()._run(parameters, *args, **kwargs)
        table = renormed(
            parameters["weight"], self.max_norm, self.norm_type
        )  # torch would write into the draw
        old, self.max_norm = self.max_norm, None
        try:
            return super()._run({**parameters, "weight": table}, *args, **kwargs)
        finally:
            self.max_norm = old

    def _batch_dim(self, index: int | str, value: Tensor) -> int:
        return self._axis if value.dim() > 1 else 0

    def _output_batch_dim(self, path: tuple[int, ...], value: Tensor) -> int:
        return self._axis if value.dim() > 2 else 0


def _make_class(torch_class: type, mixin: type) -> Any:
    base: Any = PyroModule[torch_class]
    name = "Bayesian" + torch_class.__name__
    made = type(base)(name, (mixin, base), {"_torch_layer": torch_class, "__module__": __name__})
    globals()[name] = made  # pickle finds classes by name
    return made


#: Full-weight layers by torch layer; linear layers have a class of their own.
BAYESIAN_LAYERS: dict[type, type] = {
    torch_class: _make_class(torch_class, mixin)
    for mixin, classes in (
        (
            BayesianPerSampleMixin,
            (
                nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
                nn.Bilinear, nn.RNNCell, nn.GRUCell, nn.LSTMCell,
            ),
        ),
        (_BayesianRecurrent, (nn.RNN, nn.GRU, nn.LSTM)),
        (_BayesianAttention, (nn.MultiheadAttention,)),
        (_BayesianEmbedding, (nn.Embedding,)),
    )
    for torch_class in classes
}  # fmt: skip
