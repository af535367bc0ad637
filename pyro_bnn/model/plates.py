# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Where the examples are in a model's arguments and sites: read from its plates, and checked by running it on a part."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from pyro_bnn.model.data import Path, leaves, map_leaves
from pyro_bnn.model.handlers import Site, is_deterministic, unscaled_log_prob

#: The sample sites of one run of a model by name.
Sites = Mapping[str, Site]

#: What a model may raise that does not run on a part of its data, or not under several draws.
FAILURES = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)

#: The rows of the part that shows where the rows are, and how many ways of cutting the arguments are tried.
FEW, WAYS = 7, 24


def first_line(failure: Exception) -> str:
    """The first line of the text of an error, or its type: never empty, as that of a bare ``assert`` is."""
    return str(failure).strip().partition("\n")[0] or type(failure).__name__


@dataclass(frozen=True)
class DataPlate:
    r"""
    The plate of the examples, as a run of the model states it.

    :ivar str name: its name.
    :ivar int dim: its dimension, negative, counted from the right of the batch shape.
    :ivar int size: the number of rows in this run.
    :ivar int full_size: the number of rows for which the plate stands.
    """

    name: str
    dim: int
    size: int
    full_size: int

    @property
    def factor(self) -> float:
        r""":math:`N / B`, by which the plate scales the log densities within it."""
        return self.full_size / self.size


def plates_of(site: Site) -> dict[int, DataPlate]:
    """The plates of a site with dimensions of their own, by position from the left in its batch shape."""
    ndim = len(site["fn"].batch_shape)
    found = {}
    for frame in site["cond_indep_stack"]:
        if frame.vectorized and ndim + frame.dim >= 0:
            full = frame.size if frame.full_size is None else frame.full_size
            found[ndim + frame.dim] = DataPlate(frame.name, frame.dim, int(frame.size), int(full))
    return found


def site_shape(site: Site) -> torch.Size:
    """The shape of one value of a site: what its distribution says, but for deterministic sites."""
    if is_deterministic(site):
        return site["value"].shape
    return torch.Size((*site["fn"].batch_shape, *site["fn"].event_shape))


def rows_of(leaf: Any, dim: int) -> int:
    """The length of a tensor in a dimension; of a packed sequence the number of sequences."""
    return int(leaf.batch_sizes[0]) if isinstance(leaf, PackedSequence) else int(leaf.shape[dim])


def dims_of(leaf: Any) -> range:
    """The dimensions of a tensor in which it could be cut; of a packed sequence one."""
    return range(1 if isinstance(leaf, PackedSequence) else leaf.dim())


def take_rows(leaf: Any, dim: int, index: Tensor | slice) -> Any:
    """Some rows of a tensor along a dimension, or some sequences of a packed sequence."""
    if isinstance(leaf, PackedSequence):
        sequences = unpack_sequence(leaf)
        chosen = torch.arange(len(sequences))[index].tolist()
        return pack_sequence([sequences[i] for i in chosen], enforce_sorted=leaf.sorted_indices is None)
    if isinstance(index, slice):
        return leaf[(slice(None),) * dim + (index,)]
    return leaf.index_select(dim, index.to(leaf.device))


@dataclass(frozen=True)
class Rows:
    """
    Where the examples of a batch are.

    :ivar int size: the number of rows of the batch.
    :ivar cuts: the dimension of the rows by the place of a tensor in ``(args, kwargs, draws)``.
    :ivar axes: the dimension of the rows by site, from the left in one value of the site.
    :ivar plates: the names of the plates that have the rows: usually one, none where rows are dimensions of events, several
        where tables of the same length are cut together.
    :ivar reason: why the rows cannot be taken apart; empty if they can: some of them alone then give what they give
        among the others.
    """

    size: int
    cuts: Mapping[Path, int]
    axes: Mapping[str, int]
    plates: frozenset[str]
    reason: str

    @property
    def separate(self) -> bool:
        """Whether the model treats the rows separately."""
        return not self.reason

    def take(self, tree: Any, index: Tensor | slice) -> Any:
        """``(args, kwargs)`` or ``(args, kwargs, draws)`` with some rows only, given by positions or a slice."""

        def cut(path: Path, leaf: Any) -> Any:
            return take_rows(leaf, self.cuts[path], index) if path in self.cuts else leaf

        return map_leaves(tree, cut)


def find_rows(
    run: Callable[[Any], Sites], tree: Any, changing: Collection[Path] | None = None
) -> Iterator[Rows]:
    """
    Finds the rows of the data by running the model on a few of them.

    For each way of cutting the arguments (those dimensions that have one and the same length; one dimension of each
    tensor, or none) the model runs on seven rows and on four of these. It is a way of cutting rows if the shape of
    a site follows; the rows are separate if the densities and observations of those that remain are the same, and those of
    all other sites too.

    :param run: runs the model on ``(args, kwargs, draws)`` and returns its sites; it must be a function of them.
    :param tree: ``(args, kwargs, draws)``, the draws by site with the site's own shape.
    """
    found: dict[frozenset[str], Rows] = {}
    given = leaves(tree)
    inputs = {path: leaf for path, leaf in given.items() if path[0] != 2}
    if changing is not None:
        inputs = {path: leaf for path, leaf in inputs.items() if path in changing}
    fewest = len(given)  # tensors cut that need not be, in the ways that were found
    for size in _lengths(inputs.values()):
        for cuts in islice(_ways(given, size, changing), WAYS):
            others = 0 if changing is None else sum(path[0] != 2 and path not in changing for path in cuts)
            if others > fewest:
                continue
            rows = _try(run, tree, Rows(size, cuts, {}, frozenset(), ""))
            if rows is None or (rows.plates in found and (found[rows.plates].separate or not rows.separate)):
                continue
            found[rows.plates] = rows
            if rows.separate:
                fewest = others
                yield rows
    if not any(rows.separate for rows in found.values()):
        yield from found.values()


def _lengths(inputs: Iterable[Any]) -> list[int]:
    """Lengths that may be the number of rows: of first dimensions before others, of later arguments before earlier ones."""
    last = list(inputs)[::-1]
    deepest = max((len(dims_of(leaf)) for leaf in last), default=0)
    found = [rows_of(x, d) for d in range(deepest) for x in last if d in dims_of(x)]
    return sorted(dict.fromkeys(found), key=lambda n: n == 1)


def _ways(
    given: Mapping[Path, Any], size: int, changing: Collection[Path] | None
) -> Iterator[dict[Path, int]]:
    """The ways of cutting tensors that have a dimension of this length, the likeliest first."""
    options: dict[Path, list[int | None]] = {}
    for path, leaf in given.items():
        dims: list[int | None] = [d for d in dims_of(leaf) if rows_of(leaf, d) == size]
        if not dims:
            continue
        if changing is None or path[0] == 2:
            options[path] = [*dims, None]
        else:
            options[path] = dims if path in changing else [None, *dims]
    ways = [dict(zip(options, choice, strict=True)) for choice in islice(product(*options.values()), 4096)]
    ways.sort(key=lambda way: sum(options[path].index(dim) > 0 for path, dim in way.items()))
    for way in ways:
        if any(dim is not None for dim in way.values()):
            yield {path: dim for path, dim in way.items() if dim is not None}


def _try(run: Callable[[Any], Sites], tree: Any, rows: Rows) -> Rows | None:
    """Rows with sites, plate and reason filled in, if this is a way of cutting rows."""
    few = max(2, min(rows.size, FEW))  # a single row runs beside a copy of itself
    kept = torch.tensor([i for i in range(few) if i % 3])
    try:
        first = rows.take(tree, torch.arange(few) % rows.size)
        more, fewer = run(first), run(rows.take(first, kept))
    except FAILURES:
        return None
    axes: dict[str, int] = {}
    plates: set[str] = set()
    for name in more.keys() & fewer.keys():
        shape, shorter = site_shape(more[name]), site_shape(fewer[name])
        if shape == shorter:
            continue
        changed = [i for i, pair in enumerate(zip(shape, shorter, strict=False)) if pair[0] != pair[1]]
        if len(shape) != len(shorter) or len(changed) > 1 or shape[changed[0]] != few:
            return None
        axes[name] = changed[0]
        own = plates_of(more[name])
        if changed[0] in own and not is_deterministic(more[name]):
            plates.add(own[changed[0]].name)
    if not axes:
        return None
    try:
        reason = _coupling(more, fewer, axes, plates, kept)
    except FAILURES as failure:
        reason = first_line(failure)
    return Rows(rows.size, rows.cuts, axes, frozenset(plates), reason)


def _coupling(more: Sites, fewer: Sites, axes: Mapping[str, int], plates: set[str], kept: Tensor) -> str:
    """Why rows are not separate: what differs at a site when fewer of them run together; empty if nothing does."""
    if more.keys() != fewer.keys():
        return f"the sites {sorted(more.keys() ^ fewer.keys())} are there for some numbers of rows only"
    for name, site in more.items():
        axis = axes.get(name)
        if axis is not None and not is_deterministic(site) and axis >= len(site["fn"].batch_shape):
            return f"the rows are a dimension of the event of site {name!r}: they have one density together"
        if not says_same(site, fewer[name], axis, kept):
            what = f"plate {', '.join(map(repr, sorted(plates)))}" if plates else "the data"
            return f"site {name!r} depends on which rows of {what} run together"
    return ""


def says_same(
    site: Site, other: Site, axis: int | None = None, rows: Tensor | None = None, at: Tensor | None = None
) -> bool:
    """
    Whether two runs say the same at a site: its density at the values of the first, and what is observed. Compared are
    some rows along ``axis``, counted from the left in one value, and those of the second run at some places; all by default.
    """

    def pick(value: Tensor, index: Tensor | None) -> Tensor:
        return value if axis is None or index is None else value.index_select(axis, index.to(value.device))

    if is_deterministic(site):
        return close(pick(site["value"], rows), pick(other["value"], at))
    value, theirs = (x["value"].expand(site_shape(x)) for x in (site, other))
    given = pick(value, rows)
    if axis is not None and at is not None:
        given = theirs.clone().index_copy_(axis, at.to(given.device), given)
    if site["is_observed"] and at is None and not close(given, theirs):
        return False
    terms = unscaled_log_prob({**other, "value": given})
    before, after = pick(unscaled_log_prob(site), rows), pick(terms, at)
    return close(before, after) or close(before, after, floor=_felt(other, given, terms))


def _felt(site: Site, value: Tensor, terms: Tensor) -> float:
    """How large a density seems to which rounding of real values does what it does to a narrow one: its change over theirs."""
    if not (value.is_floating_point() and _is_real(site["fn"].support)):
        return 0.0
    step = 1e3 * torch.finfo(value.dtype).eps
    moved = unscaled_log_prob({**site, "value": value * (1 + step)})
    return float((moved - terms).detach().abs().nan_to_num(0.0, 0.0).max()) / step if terms.numel() else 0.0


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support in (constraints.real, constraints.real_vector)


def close(a: Tensor, b: Tensor, *, tolerance: float | None = None, floor: float = 0.0) -> bool:
    """
    Whether two tensors differ by rounding only: relative to the largest finite entry of the first, or a floor if that is less,
    by 1000 units in the last place, or a given tolerance.
    """
    a, b = a.detach(), b.detach()
    if a.shape != b.shape:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return bool(torch.equal(a, b))
    finite = a.isfinite()
    scale = max(float(a[finite].abs().max()) if finite.any() else 0.0, floor, torch.finfo(a.dtype).tiny)
    relative = 1e3 * torch.finfo(a.dtype).eps if tolerance is None else tolerance
    return bool(torch.allclose(a, b.to(a.dtype), rtol=0, atol=relative * scale, equal_nan=True))
