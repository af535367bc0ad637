# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Data given as one object, as everywhere in this package, or as the arguments of the model, as in Pyro."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.model.data import Batch, as_batches


def as_data(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], method: str) -> Any:
    """
    Reads the data out of a call ``method(data)`` or ``method(*args, **kwargs)`` with the arguments of the model.

    Example::

        >>> def model(x, y=None, scale=1.0): ...
        >>> as_data(model, ((1, 2),), {}, "polish"), as_data(model, (1, 2), {}, "polish")
        ((1, 2), (1, 2))
        >>> as_data(model, (1,), {"y": 2}, "polish"), as_data(model, (), {"x": 1, "y": 2}, "polish")
        ((1, 2), {'x': 1, 'y': 2})
    """
    if not args and set(kwargs) == {"data"}:
        return kwargs["data"]
    if not kwargs:
        return args[0] if len(args) == 1 else args
    if not args:
        _bind(model, args, kwargs, method)
        return dict(kwargs)
    if len(args) == 1 and not isinstance(args[0], Tensor) and isinstance(args[0], Iterable):
        raise TypeError(
            f"{method}: a {type(args[0]).__name__} and the keywords {sorted(kwargs)}: these are data, which are one "
            f"object as in {method}((x, y)), and something else. Pass data alone with options of {method}, or the "
            f"arguments of the model one by one, as in {method}(x, y=y)."
        )
    bound = _bind(model, args, kwargs, method)
    if bound.kwargs:  # an argument between was left out
        bound.apply_defaults()
    if bound.kwargs:
        raise TypeError(
            f"{method}: the model takes {sorted(bound.kwargs)} by keyword only, beside positional arguments: pass all "
            f"of them by keyword, as in {method}({{'x': x, 'y': y}})."
        )
    return bound.args


def _bind(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], method: str
) -> inspect.BoundArguments:
    called = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        return inspect.signature(called).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"{method}: {sorted(kwargs)} are no options of {method}, and the model does not take these arguments "
            f"({error}). Data are one object, as in {method}((x, y)), or the arguments of the model, as in "
            f"{method}(x, y)."
        ) from None


def is_container(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the arguments of a call are one object that could be data as well as an argument of the model."""
    return (
        len(args) == 1
        and not kwargs
        and not isinstance(args[0], (Tensor, str))
        and isinstance(args[0], Iterable)
    )


def arguments_of(data: Any) -> Batch:
    """
    The arguments of the model that ``(args, kwargs)``, one batch, or the first of several batches stand for.

    Example::

        >>> arguments_of(((1, 2), {})), arguments_of((1, 2)), arguments_of({"x": 1})
        (((1, 2), {}), ((1, 2), {}), ((), {'x': 1}))
    """
    if isinstance(data, tuple) and len(data) == 2 and type(data[0]) is tuple and type(data[1]) is dict:
        return data[0], data[1]
    return as_batches(data).first
