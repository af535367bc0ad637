# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Layers that run once per sample of their weights: recurrence, attention, full-weight convolutions."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from pyro_bnn.nn.rank1 import Rank1LinearMixin
from pyro_bnn.nn.sites import SiteModule
from pyro_bnn.nn.structure import map_structure, repack

#: The first argument of a layer, by position or name.
MAIN_INPUTS = (0, "input", "query", "x")


class PerSampleMixin(SiteModule):
    """
    Runs the torch layer, unchanged, once per sample with the parameters of that sample, and concatenates.

    In a folded call the inputs are split along their batch dimensions, of whatever size ``F * B`` (or a multiple of
    it) they are, and so are nested states and masks.
    """

    #: the torch layer whose forward runs
    _torch_layer: Any = None

    def _sample_parameters(self) -> dict[str, Tensor]:
        """Parameters by name: shape ``event`` (shared) or ``(F, *event)``."""
        raise ValueError(f"{type(self).__name__} declares no parameters.")

    def _batch_dim(self, index: int | str, value: Tensor) -> int:
        """The batch dimension of an argument (by position or name)."""
        return 0

    def _output_batch_dim(self, path: tuple[int, ...], value: Tensor) -> int:
        """The batch dimension of an output, given where in the output structure it is."""
        return 0

    def _run(self, parameters: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        old = self.__dict__.get("_overrides")
        self.__dict__["_overrides"] = parameters
        try:
            return self._torch_layer.forward(self, *args, **kwargs)
        finally:
            self.__dict__["_overrides"] = old

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """
        :param args: as for the torch layer.
        :param kwargs: as for the torch layer.
        :return: as for the torch layer.
        """
        parameters = self._sample_parameters()
        event_dims = {name: self._event_dim(name) for name in parameters}
        random = {name for name, value in parameters.items() if value.dim() > event_dims[name]}
        if not self._is_folded():
            for name in random:
                if parameters[name].shape[: parameters[name].dim() - event_dims[name]].numel() > 1:
                    raise ValueError(_needs_folding(self, name, parameters[name]))
                parameters[name] = parameters[name].reshape(parameters[name].shape[-event_dims[name] :])
            return self._run(parameters, *args, **kwargs)
        if not random:
            return self._run(parameters, *args, **kwargs)
        F = self._folding.num_samples
        rows = self._folding.batch_size * F

        def split(index: int | str, value: Any) -> list[Any]:
            if isinstance(value, PackedSequence):
                return _split_packed(value, F)
            pieces: list[Any] = []
            for f in range(F):

                def take(t: Tensor, f: int = f) -> Tensor:
                    dim = self._batch_dim(index, t)
                    if index in MAIN_INPUTS and t.dim() > dim:
                        t = self._folding.whole(t, dim)
                        self._folding.check_rows(self, (t.shape[dim], *t.shape[:dim], *t.shape[dim + 1 :]))
                    if t.dim() <= dim or t.shape[dim] % rows:
                        return t
                    size = t.shape[dim] // F
                    return t.narrow(dim, f * size, size)

                pieces.append(map_structure(value, take))
            return pieces

        split_args = [split(i, a) for i, a in enumerate(args)]
        split_kwargs = {key: split(key, a) for key, a in kwargs.items()}
        outputs = [
            self._run(
                {name: value[f] if name in random else value for name, value in parameters.items()},
                *(a[f] for a in split_args),
                **{key: a[f] for key, a in split_kwargs.items()},
            )
            for f in range(F)
        ]
        packed = next((a for a in args if isinstance(a, PackedSequence)), None)
        return self._concatenate(outputs, packed)

    def _parameter_templates(self) -> dict[str, Tensor]:
        """The parameters as the torch layer would have them, for their shapes."""
        return {
            name: spec.init for name, spec in self.__dict__.get("_sites", {}).items() if spec.init is not None
        } | {name: value for name, value in self._parameters.items() if value is not None}

    def _concatenate(
        self, outputs: list[Any], packed: PackedSequence | None, path: tuple[int, ...] = ()
    ) -> Any:
        first = outputs[0]
        if isinstance(first, PackedSequence) and packed is not None:
            padded = [pad_packed_sequence(o, batch_first=True)[0] for o in outputs]
            length = max(p.shape[1] for p in padded)
            padded = [torch.nn.functional.pad(p, (0, 0, 0, length - p.shape[1])) for p in padded]
            return repack(torch.cat(padded), packed)
        if isinstance(first, Tensor):
            return torch.cat(outputs, self._output_batch_dim(path, first))
        if first is None:
            return None
        return type(first)(
            self._concatenate([o[i] for o in outputs], packed, (*path, i)) for i in range(len(first))
        )


def _needs_folding(layer: Any, name: str, value: Tensor) -> str:
    return (
        f"{layer._pyro_name or type(layer).__name__} has {name!r} with sample dimensions {tuple(value.shape)}: convert "
        "the network with rank1_ or bayesian_, or call fold_ on it, so that samples are folded into the batch."
    )


def _split_packed(value: PackedSequence, F: int) -> list[PackedSequence]:
    """The sequences of each of the samples, which follow each other."""
    padded, lengths = pad_packed_sequence(value, batch_first=True)
    if len(lengths) % F:
        raise ValueError(f"a PackedSequence of {len(lengths)} sequences does not split into {F} samples.")
    return [
        pack_padded_sequence(part, length, batch_first=True, enforce_sorted=False)
        for part, length in zip(padded.chunk(F), lengths.chunk(F), strict=True)
    ]


class Rank1PerSampleMixin(PerSampleMixin, Rank1LinearMixin):
    """
    Rank-1 layers with several weights. The weights are built for every sample, and the torch layer runs once per
    sample; factors per example and the additive form, which no weight can express, need the layer written out.
    """

    def _needs_rows(self) -> bool:
        """Whether the layer must be written out."""
        if self._form == "additive":
            return True
        event_dim = 2 if self._form == "residual" else 1
        factors = (self._factor(kind + suffix) for suffix in self._groups() for kind in "rs")
        biases = (self._parameter(name) for name in self._biases())
        return any(self._has_rows(f, event_dim) for f in factors) or any(self._has_rows(b, 1) for b in biases)

    def _group_values(self, suffix: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight and factors of one group for :meth:`_map`."""
        name = self._groups()[suffix][0]
        r, s = self._factor("r" + suffix), self._factor("s" + suffix)
        event_dim = 2 if self._form == "residual" else 1
        if not self._is_folded():
            r, s = (self._only_sample(kind + suffix, f, event_dim) for kind, f in (("r", r), ("s", s)))
        return self._parameter(name), r, s

    def _bias_value(self, name: str) -> Tensor | None:
        bias = self._parameter(name)
        return bias if bias is None or self._is_folded() else self._only_sample(name, bias, 1)

    def _only_sample(self, name: str, value: Tensor | None, event_dim: int) -> Tensor | None:
        """The value of a site outside folded calls, without singleton sample dimensions."""
        if value is None:
            return None
        if value.shape[: value.dim() - event_dim].numel() > 1:
            raise ValueError(_needs_folding(self, name, value))
        return value.reshape(value.shape[value.dim() - event_dim :])

    def _sample_parameters(self) -> dict[str, Tensor]:
        parameters = {}
        for suffix, (name, _, _) in self._groups().items():
            parameters[name] = self._scaled_weight(
                self._parameter(name), self._factor("r" + suffix), self._factor("s" + suffix)
            )
        for name in self._biases():
            bias = self._parameter(name)
            if bias is not None:
                spec = self._sites.get(name)
                folded = self._is_folded() and spec is not None and bias.dim() > spec.event_dim
                parameters[name] = bias.squeeze(1) if folded else bias
        return parameters

    def _scaled_weight(self, weight: Tensor, r: Tensor | None, s: Tensor | None) -> Tensor:
        if self._is_folded():
            return super()._scaled_weight(weight, r, s)
        event_dim = 2 if self._form == "residual" else 1
        squeezed = [
            None
            if f is None
            else f.reshape(f.shape[-event_dim:])
            if f.numel() == f.shape[-event_dim:].numel()
            else f
            for f in (r, s)
        ]
        return super()._scaled_weight(weight, *squeezed)
