# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Arguments and outputs of networks: tensors and packed sequences in nested containers."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def map_structure(
    value: Any, fn: Callable[[Tensor], Any], packed: Callable[[PackedSequence], Any] | None = None
) -> Any:
    """Applies functions to the tensors and packed sequences in nested tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, PackedSequence):
        return value if packed is None else packed(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_structure(item, fn, packed) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_structure(item, fn, packed) for item in value)
    if isinstance(value, MutableMapping):
        new: Any = copy.copy(value)  # of its own class, which may give its items as attributes
        for key, item in value.items():
            new[key] = map_structure(item, fn, packed)
        return new
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        new = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(new, field.name, map_structure(getattr(value, field.name), fn, packed))
        return new
    return value


def tensors_of(value: Any) -> Iterator[Tensor | PackedSequence]:
    """The tensors and packed sequences of a structure, in order."""
    if isinstance(value, (Tensor, PackedSequence)):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, Mapping):
        yield from tensors_of(tuple(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_of([getattr(value, field.name) for field in dataclasses.fields(value)])


def repack(padded: Tensor, like: PackedSequence) -> PackedSequence:
    """Packs padded sequences ``(N, T, d)``, in their order before packing, as another packed sequence of the same lengths."""
    if like.sorted_indices is not None:
        padded = padded.index_select(0, like.sorted_indices)
    steps = zip(padded.unbind(1), like.batch_sizes.tolist(), strict=False)
    data = torch.cat([step[:size] for step, size in steps])
    return PackedSequence(data, like.batch_sizes, like.sorted_indices, like.unsorted_indices)
