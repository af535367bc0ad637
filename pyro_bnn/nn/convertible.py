# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Which modules of a network a conversion takes, and what speaks against it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from pyro_bnn.nn.pyro_class import become, pyro_class
from pyro_bnn.nn.sites import SiteModule, describe_module
from pyro_bnn.ops.notice import warn_user

#: Selects modules: a dotted path (with everything below it), a class, or ``callable(name, module) -> bool``.
Selector = str | type | Callable[[str, nn.Module], bool]

#: Wrappers of a network by class name, and what to convert in their place.
_WRAPPERS = {
    "OptimizedModule": "convert the network before torch.compile",
    "DataParallel": "convert its attribute 'module' and wrap the result",
    "DistributedDataParallel": "convert its attribute 'module' and wrap the result",
    "FullyShardedDataParallel": "convert its attribute 'module' and wrap the result",
}


def torch_class(module: nn.Module) -> type:
    """The class of a module before it became a PyroModule and before its parameters were parametrized."""
    cls: type = getattr(type(module), "speaking_class", type(module))
    if issubclass(cls, PyroModule) and cls.__name__.startswith("Pyro") and len(cls.__mro__) > 1:
        base = cls.__mro__[1]
        cls = base if issubclass(base, nn.Module) and pyro_class(base) is cls else cls
    parametrized = cls.__name__.startswith("Parametrized") and "parametrizations" in dict(
        module.named_children()
    )
    return cls.__bases__[0] if parametrized else cls


def join_path(path: str, key: str) -> str:
    """The path of a part of the module at a path, which is empty for the network itself."""
    return f"{path}.{key}" if path else key


def convertible(
    net: nn.Module,
    only: Selector | Iterable[Selector] | None,
    skip: Selector | Iterable[Selector],
    table: Mapping[type, type],
    other: Callable[[nn.Module], type | None] = lambda module: None,
) -> list[tuple[str, Any, type]]:
    """
    The modules of a network that a conversion with a table of layers by torch layer takes: path, module and its layer,
    every module once; ``other`` finds layers for classes that the table does not have.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net is a {type(net).__name__}; expected a torch.nn.Module.")
    names = sorted(cls.__name__ for cls in table)
    find = lambda module: table.get(torch_class(module)) or other(module)  # noqa: E731
    admitted, refused = _as_list(only), _as_list(skip)
    _check_selectors(net, admitted, refused, find, names)
    found: list[tuple[str, Any, type]] = []
    left: list[str] = []
    settled: set[nn.Module] = set()
    inside: set[nn.Module] = set()
    for name, module in net.named_modules():
        check_wrapper(name, module)
        if any(_matches(s, name, module) for s in refused):
            settled.update(module.modules())
            continue
        if only is not None and not any(_matches(s, name, module) for s in admitted):
            continue
        if issubclass(type(module), LazyModuleMixin):
            raise ValueError(
                f"{describe_module(module, name)} does not know its shape yet: call the network once on data before "
                "the conversion."
            )
        cls = None if module in inside else table.get(torch_class(module))
        if (
            cls is None and module not in inside and module not in settled
        ):  # what is skipped may read its parts' weights itself
            cls = other(module)
        if cls is not None:
            _check_parameters(name, module)
            found.append((name, module, cls))
            inside.update(module.modules())
        if only is None and module not in settled and (cls is not None or module not in inside):
            keys = _left_out(name, module, cls, cls in table.values())
            keys = [key for key in keys if f"{name}.{key}".strip(".") not in refused]
            left += [f"{describe_module(module, name)}: {keys}"] if keys else []
    if not found:
        classes = sorted({type(m).__name__ for m in net.modules()})
        converted = [describe_module(m, n) for n, m in net.named_modules() if isinstance(m, SiteModule)]
        done = f"; converted already are {converted[:5]}" if converted else ""
        raise ValueError(
            f"nothing to convert: the network holds {classes}, of which the selectors admit no {names}{done}."
        )
    if left:
        warn_user(
            f"the conversion leaves out {left[:10]}{' and more' if len(left) > 10 else ''}, which keep their values: name "
            "them in skip= if that is intended.",
        )
    return found


@contextmanager
def all_or_nothing(net: nn.Module) -> Iterator[None]:
    """If the block raises, the modules of a network get their classes and attributes back."""
    saved = [
        (
            module,
            type(module),
            {k: (v, v.copy() if isinstance(v, dict) else None) for k, v in vars(module).items()},
        )
        for module in net.modules()
    ]
    trained = [(p, p.requires_grad) for p in net.parameters()]
    try:
        yield
    except BaseException:
        for module, cls, attributes in saved:
            become(module, cls)
            vars(module).clear()
            for key, (value, items) in attributes.items():
                if items is not None:
                    value.clear()
                    value.update(items)
                vars(module)[key] = value
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        raise


def _check_selectors(
    net: nn.Module,
    admitted: list[Selector],
    refused: list[Selector],
    find: Callable[[nn.Module], type | None],
    names: list[str],
) -> None:
    paths = {name for name, _ in net.named_modules(remove_duplicate=False)}
    parameters = {name for name, _ in net.named_parameters(remove_duplicate=False)}
    for argument, selectors in (("only", admitted), ("skip", refused)):
        for selector in selectors:
            known = paths | parameters if argument == "skip" else paths
            if isinstance(selector, str) and selector not in known:
                raise ValueError(
                    f"{argument} names {selector!r}, which is no module of the network; the modules are "
                    f"{sorted(paths - {''})[:20]}."
                )
    for selector in admitted:
        if isinstance(selector, str):
            module = net.get_submodule(selector)
            if not any(find(part) for part in module.modules()):
                raise ValueError(
                    f"only names {describe_module(module, selector)}, which neither is nor holds a layer that can be "
                    f"converted; those are {names}."
                )


def check_wrapper(name: str, module: nn.Module) -> None:
    """Raises for a module that stands for another one, or for compiled code."""
    advice = _WRAPPERS.get(torch_class(module).__name__)
    if isinstance(module, torch.jit.ScriptModule):
        advice = "convert the network before TorchScript compiles it"
    if advice:
        raise ValueError(f"{describe_module(module, name)} cannot be converted: {advice}.")


def _check_parameters(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.Embedding) and module.sparse:
        raise ValueError(
            f"{describe_module(module, name)} has sparse=True, but the gradients of random tables are dense: set its "
            "attribute sparse to False, or skip the layer."
        )
    if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
        raise ValueError(
            f"{describe_module(module, name)} has scale_grad_by_freq=True, which divides gradients by counts in the batch, so "
            "that they are not those of the bound: set its attribute scale_grad_by_freq to False, or skip the layer."
        )
    for key, value in module.named_parameters():
        if value.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{describe_module(module, name)} holds {key!r} in {value.dtype}, in which random factors lose "
                "their small variances: convert the network in float32 (net.float()) and use torch.autocast."
            )
    made: Any = module.parametrizations if parametrize.is_parametrized(module) else ()
    parametrized = set(made)
    if parametrized - {"weight"}:
        raise ValueError(
            f"{describe_module(module, name)} computes {sorted(parametrized)} from other parameters (a parametrization); "
            "only a parametrized 'weight' can be converted: call parametrize.remove_parametrizations, or skip the layer."
        )
    computed = [key for key, value in vars(module).items() if isinstance(value, Tensor)]
    if computed:
        raise ValueError(
            f"{describe_module(module, name)} has {computed} set by a hook, as torch.nn.utils.weight_norm, spectral_norm "
            "and prune do: use torch.nn.utils.parametrizations in place of the former two, or make the weight permanent "
            "(remove_weight_norm, prune.remove)."
        )


#: Layers that stay as they are, as in the papers.
_NORMALIZATION = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def _left_out(name: str, module: nn.Module, cls: type | None, whole: bool) -> list[str]:
    """The matrices (class tokens, tables, factors of adapters) that a module holds itself and no conversion takes."""
    if isinstance(module, (SiteModule, *_NORMALIZATION)) or whole:
        return []
    keys = [key for key, value in module.named_parameters(recurse=False) if value.dim() > 1]
    if cls is None:
        return keys
    return [key for key in keys if key != "weight"] if hasattr(cls, "_groups") else []


def _matches(selector: Selector, name: str, module: nn.Module) -> bool:
    if isinstance(selector, str):
        return name == selector or name.startswith(selector + ".")
    if isinstance(selector, type):
        return isinstance(module, selector)
    return bool(selector(name, module))


def _as_list(selectors: Any) -> list[Selector]:
    if selectors is None:
        return []
    return [selectors] if isinstance(selectors, (str, type)) or callable(selectors) else list(selectors)
