# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""One convention for data everywhere: a batch is what the model is called with."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

#: The positional and keyword arguments of one call of a model.
Batch = tuple[tuple[Any, ...], dict[str, Any]]

#: Where a tensor is in nested containers: positions, keys and names of fields.
Path = tuple[Any, ...]


class Arguments(NamedTuple):
    """
    One batch without any doubt: the model is called as ``model(*args, **kwargs)``.

    Data that a model with unusual arguments could take in two ways are given as this object.

    :param args: positional arguments of the model.
    :param kwargs: its keyword arguments.

    Example::

        >>> as_batch(Arguments(([1, 2],), {"y": 3}))
        Arguments(args=([1, 2],), kwargs={'y': 3})
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012 (never changed in place)


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
    if isinstance(item, Arguments):
        return item
    if isinstance(item, Mapping):
        return (), dict(item)
    if isinstance(item, (tuple, list)) and not isinstance(item, PackedSequence):
        return tuple(item), {}
    return (item,), {}


def is_single_batch(data: Any) -> bool:
    """
    Tells whether ``data`` is one batch (a tensor, a tuple or mapping of arguments, or a list of tensors)
    rather than an iterable of batches (a :class:`~torch.utils.data.DataLoader`, a list of tuples, ...).

    :param data: data in any of the forms that :class:`Batches` takes.
    :return: ``True`` for one batch.
    """
    if isinstance(data, Batches):
        return data.is_single
    if isinstance(data, (Tensor, tuple, Mapping)):
        return True
    if isinstance(data, list):
        return len(data) > 0 and all(isinstance(item, Tensor) or item is None for item in data)
    return not isinstance(data, Iterable)


def is_dense(x: Tensor) -> bool:
    """Whether a tensor has entries that can be cut and compared; sparse and nested ones are constants to the package."""
    return x.layout is torch.strided and not x.is_nested


def map_leaves(tree: Any, fn: Callable[[Path, Any], Any], path: Path = (), *, every: bool = False) -> Any:
    """
    Applies a function to the dense tensors and packed sequences in nested containers (tuples, lists, mappings, dataclasses).

    :param tree: any value.
    :param callable fn: takes the place of a tensor or packed sequence and the object, and returns what replaces it.
    :param path: the place of ``tree``.
    :param bool every: whether sparse and nested tensors count, too.
    :return: the same containers with replaced leaves; containers in which nothing changes are returned as they are.
    """
    if isinstance(tree, Tensor):
        return fn(path, tree) if every or is_dense(tree) else tree
    if isinstance(tree, PackedSequence):
        return fn(path, tree)
    if isinstance(tree, Mapping):
        items: list[tuple[Any, Any]] = list(tree.items())
    elif isinstance(tree, (tuple, list)):
        items = list(enumerate(tree))
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        items = [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree)]
    else:
        return tree
    changed = {}
    for key, value in items:
        new = map_leaves(value, fn, (*path, key), every=every)
        if new is not value:
            changed[key] = new
    if not changed:
        return tree
    if isinstance(tree, Mapping):
        if not isinstance(tree, MutableMapping):
            return {**tree, **changed}
        out: Any = copy.copy(tree)  # keeps the type: a dict, or what tokenizers return
        for key, value in changed.items():
            out[key] = value
        return out
    if isinstance(tree, (tuple, list)):
        values = [changed.get(i, value) for i, value in items]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    out = copy.copy(tree)
    for key, value in changed.items():
        object.__setattr__(out, key, value)  # frozen dataclasses too
    return out


def leaves(tree: Any, *, every: bool = False) -> dict[Path, Any]:
    """The dense tensors (or every one) and the packed sequences in nested containers by their place."""
    found: dict[Path, Any] = {}

    def note(path: Path, leaf: Any) -> Any:
        found[path] = leaf
        return leaf

    map_leaves(tree, note, every=every)
    return found


def differing_places(first: Batch, second: Batch) -> set[Path] | None:
    """The places of tensors that are not the same in two batches; ``None`` if all are."""
    others = leaves(second)
    found = {
        path
        for path, leaf in leaves(first).items()
        if not isinstance(leaf, Tensor) or path not in others or not torch.equal(leaf, others[path])
    }
    return found or None


def map_tensors(batch: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """
    Applies ``fn`` to every tensor among the arguments of a batch, in containers and packed sequences too.

    :param batch: ``(args, kwargs)`` as :func:`as_batch` returns them, or any nested containers.
    :param callable fn: a function of a tensor.
    :return: the batch with each tensor replaced; other arguments are untouched.

    Example::

        >>> map_tensors((({"x": torch.ones(2)}, "mean"), {}), lambda x: 2 * x)
        (({'x': tensor([2., 2.])}, 'mean'), {})
    """

    def replace(_: Path, leaf: Any) -> Any:
        if not isinstance(leaf, PackedSequence):
            return fn(leaf)
        data = fn(leaf.data)
        return leaf if data is leaf.data else leaf._replace(data=data)

    return map_leaves(batch, replace)


def argument_name(path: Path) -> str:
    """The place of a tensor of a batch in words, e.g. ``argument 0['ids'][1]`` or ``argument 'y'``."""
    _, first, *rest = path
    return f"argument {first!r}" + "".join(f"[{key!r}]" for key in rest)


def _entries(leaf: Any) -> Tensor:
    """The numbers in a packed sequence or a tensor of any layout."""
    if isinstance(leaf, PackedSequence):
        return leaf.data
    if leaf.is_nested:
        return torch.cat([part.reshape(-1) for part in leaf.unbind()])
    return leaf if is_dense(leaf) else leaf.to_sparse_coo().coalesce().values()


def check_finite(batch: Batch) -> None:
    """
    Checks that the floating-point tensors of a batch are finite, in nested containers too. Tensors of zeros and minus
    infinity are masks to be added to attention weights.

    :param batch: ``(args, kwargs)`` as :func:`as_batch` returns them.
    :raises ValueError: naming the argument and the number of entries that are not finite.
    """
    for path, leaf in leaves(batch, every=True).items():
        value = _entries(leaf)
        # a finite sum proves it in one pass; only otherwise entries are looked at one by one
        if not value.is_floating_point() or bool(torch.isfinite(value.detach().sum())):
            continue
        bad = int((~torch.isfinite(value)).sum())
        if bad and not bool(((value == 0) | (value == -torch.inf)).all()):
            raise ValueError(
                f"{argument_name(path)} of the model holds {bad} non-finite entries (shape {tuple(value.shape)}): "
                "remove them, or replace them by numbers (torch.nan_to_num) and pass the model what is missing as an argument, "
                "for poutine.mask."
            )


def structure(value: Any) -> Any:
    """What all batches of a data set have in common: the arguments, which of them are tensors, and their numbers of dims."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dim()} dimensions"
    if isinstance(value, PackedSequence):
        return "a packed sequence"
    if isinstance(value, Mapping):
        return {key: structure(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return {key: structure(item) for key, item in enumerate(value)}
    return None if value is None else "a value"


def coincidences(value: Any, known: dict[int, int] | None = None) -> Any:
    """
    What may decide how a model handles its arguments, hashable: their nesting, and which of their sizes agree. Other sizes in
    the same places are the same structure; ``known`` are those that were met before.
    """
    known = {} if known is None else known
    if isinstance(value, Tensor) and is_dense(value):
        return tuple(1 if n == 1 else -known.setdefault(n, len(known)) for n in value.shape), value.dtype
    if isinstance(value, Mapping):
        return tuple((key, coincidences(item, known)) for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(coincidences(item, known) for item in value)
    if isinstance(value, bool | str | None):
        return value
    return -known.setdefault(value, len(known)) if isinstance(value, int) else type(value)


def check_structure(first: Any, other: Any, number: int, path: Path = ()) -> None:
    """Raises, naming the argument, if the :func:`structure` of a batch with this number differs from that of the first."""
    if first == other:
        return
    if isinstance(first, dict) and isinstance(other, dict):
        for key in [*first, *(key for key in other if key not in first)]:
            check_structure(first.get(key), other.get(key), number, (*path, key))
        return
    name = argument_name(path) if len(path) > 1 else "the arguments"
    raise ValueError(
        f"batch {number} of the data differs from batch 0: {name} of the model is {other or 'missing or None'}, there "
        f"{first or 'it is missing or None'}. Give all batches the same arguments with the same number of dimensions."
    )


class Batches:
    """
    The data of any public function, read once: an iterable over the arguments of the model, batch by batch.

    Every batch is checked: its entries are finite, in whatever containers they are, and its arguments and their numbers of
    dimensions are those of the first batch. Tensors made in inference mode are copied, so that they can take part in a graph.

    :param data: one batch (a tensor; a tuple of positional arguments; a mapping of keyword arguments; a list
        of tensors) or an iterable of batches (a :class:`~torch.utils.data.DataLoader`, a list of tuples).
    :ivar bool is_single: whether the data are one batch.
    :ivar bool is_stream: whether they are an iterator, which can be run through once only.

    :raises ValueError: if a batch fails these checks, if there is no batch, or if an iterator is run through a second time.

    Example::

        >>> x, y = torch.zeros(4, 2), torch.zeros(4)
        >>> len(list(Batches((x, y)))), len(list(Batches([(x, y), (x, y)])))
        (1, 2)
    """

    def __init__(self, data: Any) -> None:
        self.is_single = is_single_batch(data)
        self.is_stream = not self.is_single and isinstance(data, Iterator)
        self._source: Iterable[Any] = (data,) if self.is_single else data
        self._change: Callable[[Tensor], Tensor] = lambda x: x.clone() if x.is_inference() else x
        self._first: Batch | None = None
        self._structure: Any = None
        self._is_used = False

    @property
    def first(self) -> Batch:
        """The first batch; the pass over an iterator still begins with it."""
        if self._first is None:
            for item in self._source:
                self._first = self._ready(item, 0)
                return self._first
            raise ValueError(
                "data is an empty iterable: it yielded no batch. Pass tensors, or a loader with at least one "
                "batch that can be iterated again (not an exhausted generator)."
            )
        return self._first

    def __iter__(self) -> Iterator[Batch]:
        if self.is_stream and self._is_used:
            raise ValueError(
                "data is an iterator, which can be run through once only, and a second pass is needed: pass tensors, "
                "a list of batches or a loader."
            )
        self._is_used = True
        number = 0
        if self.is_single or self.is_stream:
            yield self.first
            number = 1
        for item in () if self.is_single else self._source:
            batch = self._ready(item, number)
            self._first = self._first or batch
            yield batch
            number += 1
        if not number:
            self.first  # noqa: B018 (raises)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Batches":
        """The same data with every tensor changed by a function."""
        found = copy.copy(self)
        found._first = None if self._first is None else map_tensors(self._first, fn)
        found._structure, found._change = None, fn
        return found

    def _ready(self, item: Any, number: int) -> Batch:
        batch = as_batch(item)
        check_finite(batch)
        if not self.is_single:
            found = structure(batch)
            if self._structure is None:
                self._structure = found
            check_structure(self._structure, found, number)
        return map_tensors(batch, self._change)


def as_batches(data: Any) -> Batches:
    """The data, read; a :class:`Batches` is returned as it is."""
    return data if isinstance(data, Batches) else Batches(data)


def repeatable_batches(data: Any) -> Batches:
    """The data, read; refused if they are an iterator, which can be run through once only."""
    batches = as_batches(data)
    if batches.is_stream:
        raise ValueError(
            "data is an iterator, which can be run through once only, and several passes are needed: pass tensors, a list of "
            "batches or a loader."
        )
    return batches


def iter_batches(data: Any) -> Iterator[Batch]:
    """Iterates over data as arguments ``(args, kwargs)`` of the model; see :class:`Batches`."""
    return iter(as_batches(data))
