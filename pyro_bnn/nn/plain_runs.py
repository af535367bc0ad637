# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Samples of the weights through a converted network one after the other, as the torch network that it was."""

from typing import Any

from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_bnn.nn.convertible import torch_class
from pyro_bnn.nn.sites import SiteModule


class PlainRuns:
    """
    For some forwards of a network, gives its modules their torch classes back, and its layers the weights that a sample
    implies. Where activations are larger than weights this beats folding: a layer costs what torch's layer costs, no
    activations are repeated, scaled or joined, and the caches see those of one sample. What Pyro does at every module
    and every parameter costs more than a fast layer, and is of no use where nobody collects sites or parameters.

    :param root: the converted network; it keeps its own class.
    """

    def __init__(self, root: nn.Module) -> None:
        self.layers: list[tuple[Any, type]] = []
        self.others: list[tuple[Any, type]] = []
        self.possible = True
        for module in root.modules():
            parametrized = "parametrizations" in module._modules
            if isinstance(module, SiteModule):
                plain = next((c for c in type(module).__mro__ if c.__module__.startswith("torch.nn.")), None)
                if plain is None or parametrized or module is root or not hasattr(module, "plain_parameters"):
                    self.possible = False
                else:
                    self.layers.append((module, plain))
            elif module is not root and isinstance(module, PyroModule) and not parametrized:
                plain = torch_class(module)
                if plain is not type(module) and not module._pyro_samples and not module._pyro_params:
                    self.others.append((module, plain))
        self.given: list[tuple[Any, type, dict[str, Tensor | None]]] = []

    def pays(self, batch_size: int) -> bool:
        """
        :param int batch_size: the number of examples.
        :return: whether building weights costs less than scaling activations, by what layers saw in an earlier call.
        """
        costs = [layer.__dict__.get("_costs") for layer, _ in self.layers] if self.possible else [None]
        known = [cost for cost in costs if cost is not None]
        if len(known) < len(costs):
            return False
        return sum(weights for weights, _ in known) < batch_size * sum(
            activations for _, activations in known
        )

    def start(self) -> int | None:
        """
        Before the forwards, when the sites have been drawn.

        :return: bytes of the parameters per sample; ``None`` if a layer has no torch layer that does the same.
        """
        size = 0
        for layer, plain in self.layers:
            parameters = layer.plain_parameters()
            if parameters is None:
                self.stop()
                return None
            self.given.append((layer, type(layer), parameters))
            layer.__dict__.update(dict.fromkeys(parameters))
            layer.__class__ = plain
            size += sum(p[0].numel() * p.element_size() for p in parameters.values() if p is not None)
        for module, plain in self.others:
            self.given.append((module, type(module), {}))
            module.__class__ = plain
        return size

    def choose(self, sample: int) -> None:
        """
        :param int sample: the sample that the next forward is about.
        """
        for module, _, parameters in self.given:
            for name, value in parameters.items():
                module.__dict__[name] = value if value is None else value[sample if len(value) > 1 else 0]

    def stop(self) -> None:
        """After the forwards, or an error."""
        for module, cls, parameters in self.given:
            module.__class__ = cls
            for name in parameters:
                del module.__dict__[name]
        self.given = []
