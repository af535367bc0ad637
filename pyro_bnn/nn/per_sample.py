# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Layers that run once per sample of their weights: recurrence, attention, full-weight convolutions."""

from typing import Any

import torch
from torch import Tensor

from pyro_bnn.nn.folding import map_structure
from pyro_bnn.nn.rank1 import Rank1Mixin, Rank1Options
from pyro_bnn.nn.sites import SiteModule


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
        event_dims = {name: value.dim() for name, value in self._parameter_templates().items()}
        parameters = self._sample_parameters()
        random = {name for name, value in parameters.items() if value.dim() > event_dims[name]}
        if not self._is_folded():
            for name in random:
                if parameters[name].shape[: parameters[name].dim() - event_dims[name]].numel() > 1:
                    raise ValueError(
                        f"{self._pyro_name or type(self).__name__} has {name!r} with sample dimensions "
                        f"{tuple(parameters[name].shape)}: convert the network with rank1_ or bayesian_, or call "
                        "fold_ on it, so that samples are folded into the batch."
                    )
                parameters[name] = parameters[name].reshape(parameters[name].shape[-event_dims[name] :])
            return self._run(parameters, *args, **kwargs)
        if not random:
            return self._run(parameters, *args, **kwargs)
        F = self._folding.num_samples
        rows = self._folding.batch_size * F

        def split(index: int | str, value: Any) -> list[Any]:
            pieces: list[Any] = []
            for f in range(F):

                def take(t: Tensor, f: int = f) -> Tensor:
                    dim = self._batch_dim(index, t)
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
        return self._concatenate(outputs)

    def _parameter_templates(self) -> dict[str, Tensor]:
        """The parameters as the torch layer would have them, for their shapes."""
        return {
            name: spec.init for name, spec in self.__dict__.get("_sites", {}).items() if spec.init is not None
        } | {name: value for name, value in self._parameters.items() if value is not None}

    def _concatenate(self, outputs: list[Any], path: tuple[int, ...] = ()) -> Any:
        first = outputs[0]
        if isinstance(first, Tensor):
            return torch.cat(outputs, self._output_batch_dim(path, first))
        if first is None:
            return None
        return type(first)(self._concatenate([o[i] for o in outputs], (*path, i)) for i in range(len(first)))


class Rank1PerSampleMixin(PerSampleMixin, Rank1Mixin):
    """Rank-1 layers with several weights, which are built for every sample."""

    def _make_rank1(self, options: Rank1Options, prefix: str = "") -> None:
        if options.resolved_form == "additive":
            raise ValueError(
                f"{prefix + type(self).__name__} has no additive form: use the multiplicative or residual one, or "
                "leave the layer out with skip=."
            )
        super()._make_rank1(options, prefix)

    def _sample_parameters(self) -> dict[str, Tensor]:
        parameters = {}
        for suffix, (name, _, _) in self._groups().items():
            r, s = self._factor("r" + suffix), self._factor("s" + suffix)
            for kind, factor in (("r", r), ("s", s)):
                event_dim = 2 if self._form == "residual" else 1
                if (
                    self._is_folded()
                    and factor is not None
                    and factor.dim() > event_dim
                    and factor.shape[1] > 1
                ):
                    raise ValueError(
                        f"site {kind + suffix!r} of {self._pyro_name} ({type(self).__name__}) has a value per "
                        "example, but this layer builds one weight per sample: use shared noise, or skip the layer."
                    )
            parameters[name] = self._scaled_weight(self._parameter(name), r, s)
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
