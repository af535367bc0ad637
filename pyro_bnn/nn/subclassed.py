# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Subclasses of torch layers: their own forward with the weights of every sample."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from pyro_bnn.nn.per_sample import BayesianPerSampleMixin, Rank1Weights
from pyro_bnn.nn.pyro_class import pyro_class
from pyro_bnn.nn.rank1 import Rank1Mixin
from pyro_bnn.nn.rank1_options import Rank1Options
from pyro_bnn.nn.sites import SiteModule, module_path


class Made(SiteModule):
    """A class that no file can name: it is made again, by the function and the classes of its recipe."""

    _recipe: tuple[Any, ...]

    def __reduce__(self) -> Any:
        return _new_layer, self._recipe, self.__getstate__()


class _Subclassed(Rank1Weights):
    r"""
    A rank-1 layer whose forward is that of a class which torch does not know: it runs with the weight of each sample,
    :math:`W \circ r s^\top`, in place of its own.
    """

    takes_shared_input = False

    @override
    def _make_rank1(self, options: Rank1Options, prefix: str = "") -> None:
        if options.resolved_form == "additive":
            raise ValueError(
                f"{prefix.rstrip('.') or 'the network itself'} has a forward method of its own, which takes no additive "
                "factors: choose another form, or skip the layer."
            )
        super()._make_rank1(options, prefix)

    @override
    def _sample_parameters(self) -> dict[str, Any]:
        if self._needs_rows():
            raise ValueError(
                f"{module_path(self)} has a value per example, which its own forward method does not take: use "
                "noise='shared', or skip the layer."
            )
        return super()._sample_parameters()


class _InputsFirst(Rank1Mixin):
    """A linear layer whose weight has the inputs in its first dimension, as the Conv1D of transformers."""

    weight_is_transposed = True

    @override
    def _groups(self) -> dict[str, tuple[str, int, int]]:
        inputs, outputs = self._shapes()["weight"]
        return {"": ("weight", outputs, inputs)}

    @override
    def _row_factor(self, r: Tensor) -> Tensor:
        return r.unsqueeze(-2)

    @override
    def _column_factor(self, s: Tensor) -> Tensor:
        return s.unsqueeze(-1)


def subclass_layer(module: nn.Module, cls: type, table: Mapping[type, type]) -> type | None:
    """
    The layer for a module of a class that a table of layers by torch layer does not have: it runs the forward of that
    class. ``None`` if the class is no subclass of a torch layer with a single weight, nor a linear layer with its inputs
    first.
    """
    if isinstance(module, SiteModule) or parametrize.is_parametrized(module):
        return None
    if any(True for child in module.children() for _ in child.parameters()):
        return None
    base = next((known for known in cls.__mro__ if known in table), None)
    rank1 = any(issubclass(made, Rank1Mixin) for made in table.values())
    if base is None and is_inputs_first(module):
        return _make(cls, _InputsFirst) if rank1 else _make(cls, SiteModule)
    if base is None or issubclass(base, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention):
        return None
    return _make(cls, table[base])


def is_inputs_first(module: nn.Module) -> bool:
    """Whether a module is like the Conv1D of transformers: ``x @ weight + bias``."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    sizes = getattr(module, "nx", None), getattr(module, "nf", None)
    return type(module).__name__.endswith("Conv1D") and weight is not None and tuple(weight.shape) == sizes


@cache
def _make(cls: type, layer: type) -> type:
    base = pyro_class(cls)
    bayesian = not issubclass(layer, Rank1Mixin)
    if bayesian:
        mixins: tuple[type, ...] = (Made, BayesianPerSampleMixin)
    else:
        mixins = (Made, _Subclassed, layer)
    name = ("Bayesian" if bayesian else "Rank1") + cls.__name__
    extra = {"weight_is_transposed": True} if layer is SiteModule else {}
    attributes = {"_torch_layer": cls, "_recipe": (_make, cls, layer), "__module__": __name__, **extra}
    return type(base)(name, (*mixins, base), attributes)


@cache
def holder_class(cls: type) -> type:
    """A class whose modules read parameters of their parts that they hold under names of their own."""
    base = pyro_class(cls)
    attributes = {"_recipe": (holder_class, cls), "__module__": __name__}
    return type(base)(f"Tied{cls.__name__}", (Made, base), attributes)


def _new_layer(make: Any, *classes: type) -> Any:
    made: Any = make(*classes)
    return made.__new__(made)
