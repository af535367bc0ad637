# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
How every function that needs the arguments of a model takes them.

#. **Data are one object**, the first and only one: ``polish((x, y))``, ``polish({"x": x, "y": y})``, ``polish(loader)``,
   ``polish(x)``, or ``data=`` with it. It is one batch or several; see :mod:`pyro_bnn.model.data`.
#. **Pyro's own form**, the arguments of the model one by one: ``polish(x, y)``, ``polish(x, y=y)``, ``polish(x=x, y=y)``.
   They are one batch.

Options are keyword arguments in both. Where the two meet, in one container that the model itself could take as an argument
(``def model(batch)``), the model decides: the container is data if the batch that it holds fits the model's signature and
the kinds of arguments (containers or not) that the guide was initialised with, and the argument of the model if only that
fits. What fits neither is an error that names the arguments. An argument of the model with the name of an option
is passed in the first form, where keywords are options only; :class:`~pyro_bnn.model.data.Arguments` is one batch
without any doubt.

Functions that predict one batch (``predictive``, ``linearized_outputs``, ...) take it in the same two forms and refuse
several. Functions with ``targets`` take them after data, ``solve(guide, (x, y), (x_test,))``; in Pyro's own form targets
are named, ``solve(guide, x, y, targets=(x_test,))``.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pyro_bnn.model.data import Arguments, Batch, as_batch, as_batches, is_single_batch

P = ParamSpec("P")
R = TypeVar("R")


def signature_of(model: Any) -> inspect.Signature | None:
    """The signature of a model, a module or a function, perhaps under handlers of Pyro; ``None`` if it tells none."""
    while (
        isinstance(model, functools.partial) and len(model.args) > 1 and isinstance(model.args[0], Messenger)
    ):
        model = model.args[1]  # what a handler runs
    try:
        return inspect.signature(model.forward if isinstance(model, torch.nn.Module) else model)
    except (TypeError, ValueError):
        return None


def is_container(value: Any) -> bool:
    """Whether an object could be data as well as an argument of the model."""
    return isinstance(value, Iterable) and not isinstance(value, (Tensor, str, PackedSequence, np.ndarray))


def argument_kinds(model: Any, batch: Batch) -> dict[str, bool]:
    """
    Which of the arguments of a call are containers, by the name of the model's parameter.

    Example::

        >>> def model(x, y=None): ...
        >>> argument_kinds(model, ((1, [2]), {}))
        {'x': False, 'y': True}
    """
    signature, (args, kwargs) = signature_of(model), batch
    if signature is None:
        return {}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    given = signature.bind(*args, **kwargs).arguments
    own = {name: value for name, value in given.items() if signature.parameters[name].kind not in variadic}
    return {name: is_container(value) for name, value in own.items() if value is not None}


def _fits(model: Any, batch: Batch, seen: Mapping[str, bool]) -> bool:
    """Whether a model can be called with these arguments, of the kinds seen before."""
    try:
        found = argument_kinds(model, batch)
    except TypeError:
        return False
    return all(seen.get(name, kind) == kind for name, kind in found.items())


def as_data(
    model: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    method: str,
    *,
    options: Collection[str] = (),
    seen: Mapping[str, bool] | None = None,
) -> Any:
    """
    The data in a call ``method(data)`` or ``method(*args, **kwargs)``, by the rules above.

    :param model: the model, or anything that is called with the same arguments.
    :param args: what was passed by position.
    :param kwargs: what was passed by name and is no option.
    :param str method: the name of the function, for errors.
    :param options: the options that were passed.
    :param seen: :func:`argument_kinds` of an earlier call of the model.
    :return: the one object, or :class:`~pyro_bnn.model.data.Arguments`.
    :raises TypeError: if the model does not take these arguments, or if they cannot be told from options.

    Example::

        >>> def model(x, y=None, scale=1.0): ...
        >>> as_data(model, ((1, 2),), {}, "polish"), as_data(model, (1,), {"y": 2}, "polish")
        ((1, 2), Arguments(args=(1,), kwargs={'y': 2}))
        >>> def model(batch): ...
        >>> as_data(model, ((1, 2),), {}, "polish")
        Arguments(args=((1, 2),), kwargs={})
    """
    seen = seen or {}
    if not args and set(kwargs) == {"data"}:
        args, kwargs = (kwargs["data"],), {}
    if len(args) == 1 and not kwargs and (isinstance(args[0], Arguments) or not is_container(args[0])):
        return args[0] if isinstance(args[0], Arguments) else Arguments(args, {})
    arguments = Arguments(args, dict(kwargs))
    if len(args) == 1 and not kwargs:
        first = _first_of(args[0])
        is_data = first is None or _fits(model, first, seen) or not _fits(model, arguments, seen)
        return args[0] if is_data else arguments
    if len(args) == 1 and is_container(args[0]) and not _fits(model, arguments, seen):
        raise TypeError(
            f"{method}: a {type(args[0]).__name__} and the keywords {sorted(kwargs)}: these are data, which are one "
            f"object as in {method}((x, y)), and something else. Pass data alone with options of {method}, or the "
            f"arguments of the model one by one, as in {method}(x, y=y)."
        )
    _require_distinct(model, arguments, method, options)
    return arguments


def _first_of(data: Any) -> Batch | None:
    """The first batch of data where looking at it changes nothing."""
    if isinstance(data, (Mapping, tuple, np.ndarray)) or (isinstance(data, list) and is_single_batch(data)):
        return as_batch(data)
    return as_batch(data[0]) if isinstance(data, list) and data else None


def _require_distinct(model: Any, batch: Batch, method: str, options: Collection[str]) -> None:
    """Raises where the model does not take the arguments, or has an argument of the name of an option that was passed."""
    signature, (args, kwargs) = signature_of(model), batch
    if signature is None:
        return
    both = sorted(set(options) & set(signature.parameters))
    if both:
        raise TypeError(
            f"{method}: {both} are options of {method} and arguments of the model: pass the arguments of the model as one "
            f"object, as in {method}({{'x': x, {both[0]!r}: value}}), and options of {method} by keyword beside it."
        )
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        what = f"{sorted(kwargs)} are no options of {method}, and " if kwargs else ""
        raise TypeError(
            f"{method}: {what}the model does not take these arguments ({error}). Data are one object, as in "
            f"{method}((x, y)), or the arguments of the model, as in {method}(x, y)."
        ) from None


def _parameters(method: Callable[..., Any]) -> tuple[dict[str, Any], set[str]]:
    """The parameters with defaults that come before the arguments of the model, after the guide, and the options."""
    _, *others = inspect.signature(method).parameters.values()
    leading = {p.name: p.default for p in others if p.kind is p.POSITIONAL_OR_KEYWORD}
    return leading, {p.name for p in others if p.kind is p.KEYWORD_ONLY}


def takes_data(
    *,
    after: tuple[str, ...] = (),
    also: tuple[Callable[..., Any], ...] = (),
    one_batch: bool = False,
    optional: bool = False,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """
    Decorates ``method(guide, *args, option=..., **kwargs)``, which is called with the arguments of the model by the rules
    above and runs with ``args = (data,)`` and no ``kwargs``.

    :param after: options that may follow data by position, as long as the first of them is not named.
    :param also: functions whose options the method takes, too.
    :param bool one_batch: whether data are one batch, handed on as :class:`~pyro_bnn.model.data.Arguments`.
    :param bool optional: whether the method runs with ``args = ()`` where it is called without any.
    """

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        leading, names = _parameters(method)
        names = names.union(*(_parameters(other)[1] for other in also))
        name = method.__name__
        required = {
            n for n in after if inspect.signature(method).parameters[n].default is inspect.Parameter.empty
        }

        @functools.wraps(method)
        def call(guide: Any, *args: Any, **kwargs: Any) -> R:
            given = {key: kwargs.pop(key) for key in [*kwargs] if key in names or key in leading}
            args, lead = _split(args, leading, given)
            if optional and not args and not kwargs:
                return method(guide, *lead, **given)
            in_order = bool(after) and after[0] not in given and not kwargs
            if in_order:
                args = _take_after(args, after, given, name)
            if required - given.keys():
                raise TypeError(f"{name} needs {after[0]}. {_how_to_name(name, after[0])}")
            model, seen = getattr(guide, "model", guide), getattr(guide, "argument_kinds", None)
            data = as_data(model, args, kwargs, name, options=given.keys() - leading.keys(), seen=seen)
            if one_batch:
                data = _one_batch(data, name)
            try:
                return method(guide, *lead, data, **given)
            except Exception as error:
                if isinstance(error, (TypeError, AttributeError)) or "numpy" in str(error):
                    explain_arrays(error, data, given.get("targets"))
                if in_order and after[0] in given and isinstance(data, Arguments):
                    error.add_note(
                        f"The arguments were read as data and {after[0]}. {_how_to_name(name, after[0])}"
                    )
                raise

        return call  # type: ignore[return-value]

    return decorate


def _take_after(
    args: tuple[Any, ...], after: tuple[str, ...], given: dict[str, Any], method: str
) -> tuple[Any, ...]:
    """Data alone; what follows them by position is put among the options."""
    if len(args) > 1 + len(after):
        raise TypeError(
            f"{method}: {len(args)} arguments by position, at most data, {', '.join(after)}. {_how_to_name(method, after[0])}"
        )
    given |= dict(zip(after, args[1:], strict=False))
    return args[:1]


def _how_to_name(method: str, option: str) -> str:
    return (
        f"Pass data as one object, as in {method}((x, y), (x_test,)), or arguments of the model one by one with {option} by name, "
        f"as in {method}(x, y, {option}=(x_test,))."
    )


def explain_arrays(error: Exception, *data: Any) -> None:
    """Raises another error in the place of one of a model where an argument of it is a numpy array, which it names."""
    for item in data:
        args, kwargs = (None if item is None else _first_of(item)) or ((), {})
        for name, value in [*enumerate(args), *kwargs.items()]:
            if isinstance(value, np.ndarray) and "is a numpy array" not in str(error):
                raise TypeError(
                    f"argument {name!r} of the model is a numpy array of shape {value.shape} and type {value.dtype}, with "
                    "which the model fails: pass a tensor, torch.as_tensor(array, dtype=torch.get_default_dtype()) for "
                    f"numbers. ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
                ) from error


def _split(
    args: tuple[Any, ...], leading: Mapping[str, Any], given: dict[str, Any]
) -> tuple[tuple[Any, ...], list[Any]]:
    """The arguments by position without those of leading parameters, and these, which may be named."""
    lead = []
    for name, default in leading.items():
        if name in given:
            lead.append(given.pop(name))
        elif args:
            args, value = args[1:], args[0]
            lead.append(value)
        elif default is not inspect.Parameter.empty:
            lead.append(default)
    return args, lead


def _one_batch(data: Any, method: str) -> Arguments:
    if not is_single_batch(data):
        raise TypeError(
            f"{method} takes one batch, and found a {type(data).__name__} of batches: call it batch by batch, as "
            "guide.linearized_batches(data) does, or predict all of them with posterior_predictive(model, guide, data) or "
            "predictive_moments(model, guide, data)."
        )
    return Arguments(*as_batch(data))


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
