# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The examples in the arguments of a model."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pyro_bnn.model.handlers import observed_names

#: An argument, by position or name, one of its dimensions, and the size that it had.
RowSource = tuple[int | str, int, int]


def row_sources(trace: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[RowSource]:
    """
    Arguments and dimensions that are as long as the data plate, the most telling ones first: observations come last and
    have one row per example, while inputs may have the time in front.
    """
    sizes = {f.size for n in observed_names(trace) for f in trace.nodes[n]["cond_indep_stack"] if f.dim == -1}
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    found = [(key, dim, _size(value, dim)) for dim in (0, 1) for key, value in reversed(named)]
    return [(key, dim, size) for key, dim, size in found if size is not None and size in sizes]


def num_rows(sources: Sequence[RowSource], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """
    The number of examples in a call. An argument that was as long as the data plate by chance keeps its size where that
    of the data changes.
    """
    sizes = []
    for key, dim, first in sources:
        value = kwargs.get(key) if isinstance(key, str) else args[key] if key < len(args) else None
        size = _size(value, dim)
        if size is not None and size != first:
            return size
        if size is not None:
            sizes.append(size)
    if sizes:
        return sizes[0]
    raise ValueError(
        "noise='per_example' needs a model with a data plate and an argument with one row per example."
    )


def require_observations(trace: Any, args: tuple[Any, ...]) -> None:
    """An observed site without data looks like a latent one; catch it before parameters are made for it."""
    if observed_names(trace):
        return
    lengths = {len(a) for a in args if isinstance(a, Tensor) and a.dim()}
    for name, site in trace.iter_stochastic_nodes():
        if any(frame.size in lengths for frame in site["cond_indep_stack"]):
            raise ValueError(
                f"site {name!r} is latent inside a plate over the data, and the model has no observed site: call "
                "initialize with the observations, e.g. guide.initialize(x, y)."
            )


def _size(value: Any, dim: int) -> int | None:
    """Rows of an argument, or sequences of a packed sequence."""
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0]) if dim == 0 else None
    return value.shape[dim] if isinstance(value, Tensor) and value.dim() > dim else None
