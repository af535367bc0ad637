# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""One convention for data everywhere: a batch is what the model is called with."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

#: The positional and keyword arguments of one call of a model.
Batch = tuple[tuple[Any, ...], dict[str, Any]]


def as_batch(item: Any) -> Batch:
    """
    Turns one element of a loader into the arguments of a model.

    A mapping becomes keyword arguments, a tuple or list positional arguments, and anything else a single
    positional argument.

    :param item: what a loader yields, e.g. ``(x, y)``, ``{"x": x, "y": y}`` or ``x``.
    :return: ``(args, kwargs)`` such that the model is called as ``model(*args, **kwargs)``.

    Example::

        >>> as_batch((1, 2)), as_batch({"x": 1}), as_batch(3)
        (((1, 2), {}), ((), {'x': 1}), ((3,), {}))
    """
    if isinstance(item, Mapping):
        return (), dict(item)
    if isinstance(item, (tuple, list)):
        return tuple(item), {}
    return (item,), {}


def is_single_batch(data: Any) -> bool:
    """
    Tells whether ``data`` is one batch (a tensor, a tuple or mapping of arguments, or a list of tensors)
    rather than an iterable of batches (a :class:`~torch.utils.data.DataLoader`, a list of tuples, ...).

    :param data: data in any of the forms that :func:`iter_batches` takes.
    :return: ``True`` for one batch.
    """
    if isinstance(data, (Tensor, tuple, Mapping)):
        return True
    if isinstance(data, list):
        return len(data) > 0 and all(isinstance(item, Tensor) or item is None for item in data)
    return not isinstance(data, Iterable)


def iter_batches(data: Any) -> Iterator[Batch]:
    """
    Iterates over ``data`` as arguments of the model.

    :param data: one batch (a tensor; a tuple of positional arguments; a mapping of keyword arguments; a list
        of tensors) or an iterable of batches (a :class:`~torch.utils.data.DataLoader`, a list of tuples).
    :return: an iterator over ``(args, kwargs)``.
    :raises ValueError: if the iterable yields nothing.

    Example::

        >>> x, y = torch.zeros(4, 2), torch.zeros(4)
        >>> len(list(iter_batches((x, y)))), len(list(iter_batches([(x, y), (x, y)])))
        (1, 2)
    """
    if is_single_batch(data):
        yield as_batch(data)
        return
    empty = True
    for item in data:
        empty = False
        yield as_batch(item)
    if empty:
        raise ValueError(
            "data is an empty iterable: it yielded no batch. Pass tensors, or a loader with at least one "
            "batch that can be iterated again (not an exhausted generator)."
        )


def map_tensors(batch: Batch, fn: Any) -> Batch:
    """
    Applies ``fn`` to every tensor among the arguments of a batch.

    :param batch: ``(args, kwargs)`` as :func:`as_batch` returns them.
    :param callable fn: a function of a tensor.
    :return: the batch with each tensor replaced; other arguments are untouched.
    """
    args, kwargs = batch
    return (
        tuple(fn(a) if isinstance(a, Tensor) else a for a in args),
        {k: fn(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()},
    )


def batch_size(batch: Batch) -> int | None:
    """
    :param batch: arguments of a model.
    :return: the length of the first argument that is a tensor with dimensions, or ``None``.
    """
    args, kwargs = batch
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    return None


def slice_batch(batch: Batch, size: int, part: slice | Tensor) -> Batch:
    """
    :param batch: arguments of a model.
    :param size: the number of examples.
    :param part: which of them, a slice or positions.
    :return: the batch with every tensor of that length sliced.
    """

    def take(x: Tensor) -> Tensor:
        if not x.dim() or x.shape[0] != size:
            return x
        return x[part.to(x.device) if isinstance(part, Tensor) else part]

    return map_tensors(batch, take)


def check_finite(batch: Batch) -> None:
    """
    Checks that the floating-point tensors of a batch are finite.

    :param batch: ``(args, kwargs)`` as :func:`as_batch` returns them.
    :raises ValueError: naming the argument and the number of entries that are not finite.
    """
    args, kwargs = batch
    named = [(f"argument {i}", a) for i, a in enumerate(args)] + [
        (f"argument {k!r}", v) for k, v in kwargs.items()
    ]
    for name, value in named:
        if isinstance(value, Tensor) and value.is_floating_point():
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise ValueError(
                    f"{name} of the model holds {bad} non-finite entries (shape {tuple(value.shape)}): "
                    "remove them, or mask the observations with poutine.mask."
                )
