# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Networks as PyroModules, modules of abstract classes among them."""

from functools import cache
from typing import Any

from pyro.nn import PyroModule
from torch import nn


def become(module: nn.Module, cls: type) -> None:
    """
    Changes the type of a module in place, as Pyro's :func:`~pyro.nn.module.to_pyro_module_` does: a conversion is in place, and parents,
    optimisers and hooks keep the very modules that they hold.
    """
    module.__class__ = cls


def pyro_class(cls: type) -> Any:
    """
    ``PyroModule[cls]``, for classes with a metaclass of their own too: Pyro cannot derive from those, such as abstract
    classes (among them the layers of PEFT).
    """
    made: Any = PyroModule
    own = issubclass(cls, PyroModule) or issubclass(type(PyroModule), type(cls))
    return made[cls] if own else _derived(cls)


@cache
def _derived(cls: type) -> Any:
    """A class as Pyro makes it, once for each class."""
    bases = [pyro_class(base) for base in cls.__bases__ if issubclass(base, nn.Module)]
    attributes = {"__reduce__": _reduce, "__module__": __name__}
    return _metaclass(type(cls))(f"Pyro{cls.__name__}", (cls, *bases), attributes)


@cache
def _metaclass(other: Any) -> Any:
    """The metaclass of both, one for each other one."""
    return type("PyroMeta", (type(PyroModule), other), {})


def to_pyro_(net: nn.Module) -> None:
    """
    Makes the modules of a network PyroModules in place, as Pyro's :func:`to_pyro_module_` does, which takes every module
    away from its parent for a moment: wrappers that forward attributes to their parts do not survive that.
    """
    for module in net.modules():
        if not isinstance(module, PyroModule):
            become(module, pyro_class(type(module)))
            for key, value in vars(PyroModule()).items():  # what Pyro keeps in a module
                vars(module).setdefault(key, value)
    for name, module in list(net.named_modules(remove_duplicate=False)):
        if name and "." not in name:
            net.add_module(name, module)  # names everything below


def _reduce(self: Any) -> Any:
    return _new, (type(self).__mro__[1],), self.__getstate__()


def _new(cls: type) -> Any:
    made: Any = pyro_class(cls)
    return made.__new__(made)
