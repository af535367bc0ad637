# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Layers that run once per sample of their weights: recurrence, attention, full-weight convolutions."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from typing_extensions import override

from pyro_bnn.nn.bayesian import BayesianMixin
from pyro_bnn.nn.rank1 import Rank1LinearMixin, Rank1Mixin
from pyro_bnn.nn.sites import SiteModule, module_path
from pyro_bnn.nn.structure import map_structure, repack, tensors_of

#: The first argument of a layer, by position or name.
MAIN_INPUTS = (0, "input", "query", "x")


class PerSampleMixin(SiteModule):
    """
    Runs the torch layer, unchanged, once per sample with the parameters of that sample, and concatenates.

    In a folded call the inputs are split along their dimensions of rows, of whatever size ``F * B`` (or a multiple of
    it) they are, and so are nested states and masks.
    """

    #: the torch layer whose forward runs
    _torch_layer: Any = None

    def _sample_parameters(self) -> dict[str, Any]:
        """Parameters by name: shape ``event`` (shared) or ``(F, *event)``."""
        raise ValueError(f"{type(self).__name__} declares no parameters.")

    def _rows_dim(self, place: int | str, value: Tensor) -> int:
        """The dimension of rows of an argument, by position or name, or of the first ``"output"`` or the ``"rest"``."""
        return 0

    @override
    def _value(self, name: str) -> Any:
        value = super()._value(name)
        if value is None or self._is_folded() or not (name in self._sites or name in self._redirects):
            return value
        samples = value.shape[: value.dim() - self._event_dim(name)]
        if samples.numel() > 1:
            raise ValueError(
                f"{module_path(self) or type(self).__name__} has {name!r} with sample dimensions {tuple(value.shape)}: "
                "convert the network with rank1_ or bayesian_, or call fold_ on it, so that samples are folded into the "
                "batch."
            )
        return value.reshape(value.shape[len(samples) :])

    def _run(self, parameters: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with self._replacing(parameters):
            return self._torch_layer.forward(self, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the torch layer does."""
        parameters = self._sample_parameters()
        varying = {n for n, v in parameters.items() if v is not None and v.dim() > self._event_dim(n)}
        if not varying:
            return self._run(parameters, *args, **kwargs)
        outputs = [
            self._run(
                {name: value[f] if name in varying else value for name, value in parameters.items()},
                *(self._part(i, value, f) for i, value in enumerate(args)),
                **{key: self._part(key, value, f) for key, value in kwargs.items()},
            )
            for f in range(self._folding.num_samples)
        ]
        packed = next((value for value in args if isinstance(value, PackedSequence)), None)
        leaves = zip(*(tensors_of(output) for output in outputs), strict=True)
        joined = iter([self._join(i, parts, packed) for i, parts in enumerate(leaves)])
        return map_structure(outputs[0], lambda _: next(joined), lambda _: next(joined))

    def _part(self, place: int | str, value: Any, f: int) -> Any:
        """What sample f gets of an argument."""
        F = self._folding.num_samples
        if isinstance(value, PackedSequence):
            return _packed_part(value, f, F)

        def take(t: Tensor) -> Tensor:
            dim = self._rows_dim(place, t)
            if t.dim() <= dim:
                return t
            if place in MAIN_INPUTS:
                t = self._folding.whole(t, dim)
                self._folding.check_rows(self, (t.shape[dim], *t.shape[:dim], *t.shape[dim + 1 :]))
            rows = t.shape[dim]
            return t if rows % (F * self._folding.batch_size) else t.narrow(dim, f * (rows // F), rows // F)

        return map_structure(value, take)

    def _join(self, index: int, parts: tuple[Any, ...], packed: PackedSequence | None) -> Any:
        """One output of all samples."""
        if not isinstance(parts[0], PackedSequence):
            return torch.cat(parts, self._rows_dim("rest" if index else "output", parts[0]))
        assert packed is not None
        padded = [pad_packed_sequence(part, batch_first=True)[0] for part in parts]
        length = max(p.shape[1] for p in padded)
        padded = [torch.nn.functional.pad(p, (0, 0, 0, length - p.shape[1])) for p in padded]
        return repack(torch.cat(padded), packed)


def _packed_part(value: PackedSequence, f: int, F: int) -> PackedSequence:
    """The sequences of one of the samples, which follow each other."""
    padded, lengths = pad_packed_sequence(value, batch_first=True)
    if len(lengths) % F:
        raise ValueError(f"a PackedSequence of {len(lengths)} sequences does not split into {F} samples.")
    return pack_padded_sequence(
        padded.chunk(F)[f], lengths.chunk(F)[f], batch_first=True, enforce_sorted=False
    )


class BayesianPerSampleMixin(PerSampleMixin, BayesianMixin):
    """A torch layer whose parameters are sample sites. Convert networks with :func:`~pyro_bnn.nn.bayesian_`."""

    @override
    def _sample_parameters(self) -> dict[str, Any]:
        return {name: self._full_value(name) for name in (*self._sites, *self._redirects)}

    def extra_repr(self) -> str:
        """The names of the random attributes."""
        return f"sites={list(self._sites)}"


class Rank1Weights(PerSampleMixin, Rank1Mixin):
    """Rank-1 layers that need the weight of every sample."""

    def _needs_rows(self) -> bool:
        """Whether there are factors per example or of the additive form, which no weight can express."""
        factors = [self._factor(kind + suffix) for suffix in self._weights for kind in "rs"]
        biases = [self._value(name) for name in self._bias_names]
        rows = [self._has_rows(f, self._factor_dim) for f in factors] + [self._has_rows(b, 1) for b in biases]
        return self._form == "additive" or any(rows)

    @override
    def _sample_parameters(self) -> dict[str, Any]:
        parameters = {}
        for suffix, name in self._weights.items():
            r, s = self._factor("r" + suffix), self._factor("s" + suffix)
            parameters[name] = self._scaled_weight(self._value(name), r, s)
        for name in self._bias_names:
            bias = self._value(name)
            parameters[name] = bias.squeeze(1) if bias is not None and bias.dim() > 1 else bias
        return parameters


class Rank1PerSampleMixin(Rank1Weights, Rank1LinearMixin):
    """
    Rank-1 layers with several weights. The weights are built for every sample, and the torch layer runs once per
    sample; factors per example and the additive form, which no weight can express, need the layer written out.
    """
