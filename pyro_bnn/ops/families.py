# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Whether a subclass of a distribution still is of its family: one with a density of its own is not."""

import inspect
from typing import Any

from torch import Size, Tensor

#: Modules whose classes have the density of the class of torch that they extend.
_SAME = ("torch.distributions.", "pyro.distributions.torch.", "pyro_bnn.")
_LIBRARY = ("torch.", "pyro.", "pyro_bnn.")


def _definer(cls: type, name: str) -> type:
    """The class in a method resolution order that defines a method or property."""
    return next((parent for parent in cls.__mro__ if name in vars(parent)), object)


def _is_in(cls: type, modules: tuple[str, ...]) -> bool:
    return cls is object or f"{cls.__module__}.".startswith(modules)


def shares_density(cls: type, family: type) -> bool:
    """Whether the density of a class is that of one that it extends, or the same one written anew by torch or Pyro."""
    own = _definer(cls, "log_prob")
    return own is _definer(family, "log_prob") or _is_in(own, _SAME)


def of_family(d: Any, *families: type) -> bool:
    """Whether a distribution belongs to one of some classes by its class and by its density."""
    return any(isinstance(d, family) and shares_density(type(d), family) for family in families)


def has_own(d: Any, name: str, trusted: tuple[str, ...] = _LIBRARY) -> bool:
    """
    Whether a method or property of a distribution goes with its density: one inherited from a class whose density was
    replaced does not, unless that density is of the trusted modules.
    """
    order, density = type(d).__mro__, _definer(type(d), "log_prob")
    return _is_in(density, trusted) or order.index(_definer(type(d), name)) <= order.index(density)


def is_known(d: Any) -> bool:
    """Whether the density of a distribution is a library's, as is that of all that it wraps or transforms."""
    base = getattr(d, "base_dist", None)
    return _is_in(_definer(type(d), "log_prob"), _LIBRARY) and (base is None or is_known(base))


def reparametrised(d: Any) -> bool:
    """Whether draws from a distribution have gradients."""
    return bool(d.has_rsample) and has_own(d, "rsample")


def can_draw(d: Any) -> bool:
    """Whether a distribution draws from its own density."""
    return has_own(d, "sample", _SAME) or (bool(d.has_rsample) and has_own(d, "rsample", _SAME))


def draw(d: Any, shape: Size) -> Tensor:
    """Draws, of a sample shape, from a distribution's own density."""
    value: Tensor = d.rsample(shape) if reparametrised(d) else d.sample(shape)
    return value


def was_given(d: Any, name: str) -> bool:
    """Whether an argument of a distribution is there, that its class else computes from another, as probs from logits."""
    return isinstance(inspect.getattr_static(d, name), Tensor)
