# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""In-place conversion of torch networks that keeps their trained weights."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from pyro.nn import PyroModule
from pyro.nn.module import to_pyro_module_
from torch import nn

from pyro_bnn.nn.bayesian import BayesianLinear
from pyro_bnn.nn.packed import PackedSite
from pyro_bnn.nn.priors import FanInNormal, PriorLike, check_keys
from pyro_bnn.nn.rank1 import Rank1Linear
from pyro_bnn.nn.sites import describe_module

#: Selects modules: a dotted path (with everything below it), a class, or ``callable(name, module) -> bool``.
Selector = str | type | Callable[[str, nn.Module], bool]


def rank1_(
    net: nn.Module,
    *,
    prior: PriorLike | None = None,
    weight_prior: PriorLike | None = None,
    bias_prior: PriorLike | None = None,
    only: Selector | Iterable[Selector] | None = None,
    skip: Selector | Iterable[Selector] = (),
) -> Any:
    """
    Converts the layers of a network into rank-1 layers, in place, keeping its weights.

    The network becomes a :class:`~pyro.nn.PyroModule`; its code does not change. With all factors at 1 and the
    biases at their trained values it computes what it computed before.

    :param net: any network.
    :param prior: prior of the factors, see :class:`~pyro_bnn.nn.Rank1Linear`; names are ``"path.r"`` and
        ``"path.s"``.
    :param weight_prior: prior of the shared weights; ``None`` keeps them parameters.
    :param bias_prior: prior of the biases.
    :param only: convert only these modules: a path or paths, classes, or ``callable(name, module)``.
    :param skip: leave these modules as they are.
    :return: ``net``.
    :raises ValueError: if no layer can be converted, or a key of a prior names no parameter.

    Example::

        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> _ = rank1_(net, skip="2")
        >>> type(net[0]).__name__, isinstance(net[2], Rank1Linear)
        ('Rank1Linear', False)
    """
    layers = list(_convertible(net, only, skip, _RANK1))
    _require(layers, net, _RANK1)
    _check_names(prior, layers, ("r", "s"), "prior")
    _check_names(weight_prior, layers, ("weight",), "weight_prior")
    _check_names(bias_prior, layers, ("bias",), "bias_prior")
    to_pyro_module_(net)
    for name, layer in layers:
        new_class = _RANK1[_torch_class(layer)]
        layer.__class__ = new_class
        layer._make_rank1(prior, weight_prior, bias_prior, prefix=name + "." if name else "")
    return net


def bayesian_(
    net: nn.Module,
    *,
    prior: PriorLike | None = None,
    packed: bool = False,
    only: Selector | Iterable[Selector] | None = None,
    skip: Selector | Iterable[Selector] = (),
) -> Any:
    """
    Makes the weights of a network random, in place. The trained weights are remembered, and guides that are built
    with ``init_loc_fn=pyro_bnn.nn.init_to_trained`` start there.

    :param net: any network.
    :param prior: prior of the parameters in one of the three forms of
        :func:`~pyro_bnn.nn.priors.resolve_prior`, by names such as ``"0.weight"`` or ``"weight"``;
        :class:`~pyro_bnn.nn.priors.FanInNormal` by default.
    :param bool packed: draw all weights as one flat site ``"packed"`` of which the layers use views. Pyro's cost
        per site dominates the training of small networks. All priors must then be Normal.
    :param only: convert only these modules: a path or paths, classes, or ``callable(name, module)``.
    :param skip: leave these modules as they are.
    :return: ``net``.
    :raises ValueError: if no layer can be converted, or a key of the prior names no parameter.

    Example::

        >>> net = bayesian_(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)))
        >>> net(torch.zeros(3, 4)).shape
        torch.Size([3, 1])
    """
    layers = list(_convertible(net, only, skip, _BAYESIAN))
    _require(layers, net, _BAYESIAN)
    _check_names(prior, layers, ("weight", "bias"), "prior")
    prior = FanInNormal() if prior is None else prior
    to_pyro_module_(net)
    owners: dict[nn.Parameter, tuple[Any, str]] = {}
    for name, layer in layers:
        layer.__class__ = _BAYESIAN[_torch_class(layer)]
        for key, value in list(layer._parameters.items()):
            if value is not None and value in owners:
                layer._redirect_site(key, *owners[value])
        owners.update({p: (layer, key) for key, p in layer._parameters.items() if p is not None})
        layer._make_bayesian(prior, prefix=name + "." if name else "")
    if packed:
        PackedSite(net, layers)
    return net


_RANK1: dict[type, type] = {nn.Linear: Rank1Linear}
_BAYESIAN: dict[type, type] = {nn.Linear: BayesianLinear}


def _torch_class(module: nn.Module) -> type:
    """The class of a module before it became a PyroModule."""
    cls = type(module)
    if issubclass(cls, PyroModule) and cls.__name__.startswith("Pyro") and len(cls.__mro__) > 1:
        base = cls.__mro__[1]
        return base if PyroModule[base] is cls else cls
    return cls


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


def _convertible(net: nn.Module, only: Any, skip: Any, table: dict[type, type]) -> Iterator[tuple[str, Any]]:
    """The modules of ``net`` that ``table`` can convert and that the selectors admit, each once."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"net is a {type(net).__name__}; expected a torch.nn.Module.")
    admitted, refused = _as_list(only), _as_list(skip)
    paths = {name for name, _ in net.named_modules(remove_duplicate=False)}
    for argument, selectors in (("only", admitted), ("skip", refused)):
        for selector in selectors:
            if isinstance(selector, str) and selector not in paths:
                raise ValueError(
                    f"{argument} names {selector!r}, which is no module of the network; the modules are "
                    f"{sorted(paths - {''})[:20]}."
                )
    for name, module in net.named_modules():
        if _torch_class(module) not in table:
            continue
        if only is not None and not any(_matches(s, name, module) for s in admitted):
            continue
        if any(_matches(s, name, module) for s in refused):
            continue
        for key, value in module.named_parameters(recurse=False):
            if value.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(
                    f"{describe_module(module, name)} holds {key!r} in {value.dtype}, in which random factors lose "
                    "their small variances: convert the network in float32 (net.float()) and use torch.autocast."
                )
        yield name, module


def _require(layers: list[tuple[str, Any]], net: nn.Module, table: dict[type, type]) -> None:
    if not layers:
        found = sorted({type(m).__name__ for m in net.modules()})
        raise ValueError(
            f"nothing to convert: the network holds {found}, of which the selectors admit no "
            f"{sorted(c.__name__ for c in table)}."
        )


def _check_names(prior: Any, layers: list[tuple[str, Any]], keys: Iterable[str], argument: str) -> None:
    check_keys(prior, [f"{name}.{key}" if name else key for name, _ in layers for key in keys], argument)
