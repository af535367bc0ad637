# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""One sample of the weights through a converted network, as the torch network that it was."""

from typing import Any

from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_bnn.nn.convertible import torch_class
from pyro_bnn.nn.sites import SiteModule


class Alone:
    """
    For the length of one forward with a single sample, gives the modules of a network their torch classes back, and
    layers the weights that the sample implies. What Pyro does at every module and every parameter costs more than a
    fast layer, and is of no use where nobody collects sites or parameters.

    :param root: the converted network; it keeps its own class.
    """

    def __init__(self, root: nn.Module) -> None:
        self.modules: list[tuple[Any, type, type]] = []
        for module in root.modules():
            if module is root or "parametrizations" in module._modules:
                continue
            if isinstance(module, SiteModule):
                plain = next((c for c in type(module).__mro__ if c.__module__.startswith("torch.nn.")), None)
                if plain is not None and hasattr(module, "plain_parameters"):
                    self.modules.append((module, type(module), plain))
            elif isinstance(module, PyroModule) and not module._pyro_samples and not module._pyro_params:
                plain = torch_class(module)
                if plain is not type(module):
                    self.modules.append((module, type(module), plain))
        self.given: list[tuple[Any, type, dict[str, Tensor | None]]] = []

    def start(self) -> None:
        """Before the forward of the root, whose sites have been drawn."""
        for module, cls, plain in self.modules:
            parameters = module.plain_parameters() if isinstance(module, SiteModule) else {}
            if parameters is not None and type(module) is cls:
                self.given.append((module, cls, parameters))
                module.__dict__.update(parameters)
                module.__class__ = plain

    def stop(self) -> None:
        """After it, or after an error."""
        for module, cls, parameters in self.given:
            module.__class__ = cls
            for name in parameters:
                del module.__dict__[name]
        self.given = []
