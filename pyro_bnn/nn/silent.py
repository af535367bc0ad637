# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The modules of a converted network that are no layers of this package."""

from functools import cache
from typing import Any

from pyro.nn import PyroModule
from torch import nn

from pyro_bnn.nn.convertible import torch_class
from pyro_bnn.nn.folding import runs_samples_alone
from pyro_bnn.nn.pyro_class import become, pyro_class

_PyroModule: Any = PyroModule


class Silent(_PyroModule):
    """
    A :class:`~pyro.nn.PyroModule` that makes no statements about its parameters while its network runs samples one after the
    other: nobody listens, and they would cost more than a fast layer. Their values are not those of the statements anyhow.
    """

    def __getattr__(self, name: str) -> Any:
        if runs_samples_alone():
            try:
                return nn.Module.__getattr__(self, name)
            except AttributeError:  # what Pyro makes: PyroParam, PyroSample
                pass
        return super().__getattr__(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the module does."""
        if runs_samples_alone():
            return nn.Module.__call__(self, *args, **kwargs)
        return super().__call__(*args, **kwargs)


@cache
def silent_class(cls: type) -> type:
    """Pyro's class of a torch class or the user's, as a :class:`Silent` one of the same name."""
    base = pyro_class(cls)
    attributes = {"__module__": __name__, "__reduce__": _reduce, "speaking_class": base}
    made: type = type(base)(base.__name__, (base, Silent), attributes)
    return made


def _reduce(module: nn.Module) -> Any:
    """A class that no file can name is made again."""
    return _new_module, (torch_class(module),), module.__getstate__()


def _new_module(cls: type) -> Any:
    made: Any = silent_class(cls)
    return made.__new__(made)


def silence_(net: nn.Module) -> None:
    """Makes those modules of a network silent whose classes Pyro made."""
    for module in net.modules():
        cls = torch_class(module)
        if type(module) is not cls and type(module) is pyro_class(cls):
            become(module, silent_class(cls))
