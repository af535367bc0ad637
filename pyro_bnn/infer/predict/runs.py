# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Runs a model under many posterior draws: at once where it broadcasts, one after the other elsewhere."""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from functools import cache
from itertools import islice
from typing import Any, TypeVar

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pyro_bnn.infer.predict.draws import Draws
from pyro_bnn.model.data import Batch, Path, argument_name, coincidences, leaves, map_tensors
from pyro_bnn.model.dispatch import Watch
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.model.handlers import (
    CollectMessenger,
    RowsMessenger,
    Site,
    SubstituteMessenger,
    base_distribution,
    categorical_draw,
    is_deterministic,
    is_factor,
    sample_sites,
    unscaled_log_prob,
)
from pyro_bnn.model.observations import check_values, is_validated
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.model.plates import (
    FAILURES,
    FEW,
    Rows,
    close,
    dims_of,
    find_rows,
    first_line,
    plates_of,
    rows_of,
    site_shape,
    take_rows,
)
from pyro_bnn.nn.sites import silent_sites

Key = TypeVar("Key")

#: What is read at a site: its name, a tensor shaped batch shape + rest, and the number of dims of the rest.
Reading = tuple[str, Tensor, int]


#: Bytes that the intermediate values of one run may take by default.
MAX_MEMORY = 24 * 2**20

#: The numbers of draws whose joint run may be compared with single runs: the first that is no size of the data or a site,
#: with which the dimension of the draws could be confused.
PAIR, OTHERS = 2, (3, 5, 7, 11, 13)

#: With more rows than these the comparison is made on a few of them; finding them costs some runs too.
LARGE = 1024

NO_FUNCTION = (
    "the model is not a function of its latents: {}. A module or closure keeps something from call to call, such as a "
    "hidden state: reset it at the start of the model."
)

#: The sample sites of a run by name.
Sites = dict[str, Site]


@cache
def keep_freed_memory() -> None:
    """
    Once per process, lets the allocator keep what operations free. By default that of Linux (glibc) returns larger blocks
    to the system, and an operation on fresh pages takes up to twice as long. A block that is freed raises its threshold to
    the size of the block, for good; no page of this one is ever touched. Up to twice its size may stay with the process.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


class _Reads(CollectMessenger):
    """The innermost handler of a joint run: nobody outside listens to its parameters."""

    def _pyro_param(self, msg: Site) -> None:
        msg["stop"] = True

    def _pyro_post_sample(self, msg: Site) -> None:
        if not msg["infer"].get("_do_not_trace"):
            super()._pyro_post_sample(msg)


class _Draws(Messenger):
    """The outermost handler of a joint run, which sees distributions in full shape: draws faster where it can."""

    def _pyro_sample(self, msg: Site) -> None:
        if msg["value"] is None and not msg["done"]:
            msg["value"] = categorical_draw(msg["fn"])


class ModelRunner:
    """
    Runs a model under draws of its latent sites.

    A model *broadcasts* if it accepts draws shaped ``(S,) + (1,)*k + batch_shape + event_shape``, with as many
    singleton dimensions as put S left of all its plates. Whether it does is checked once, on a few examples, by
    comparing a joint run of two draws with two single runs; a model that fails, then or in its first run on a whole
    batch, is run in a loop over draws.

    :param callable model: a Pyro model.
    :param draws: values of the latent sites, each of shape ``(S,) + site shape``.
    :param bool vectorize: ``None`` to check, ``False`` to loop, ``True`` to fail if the model does not
        broadcast.
    :param float max_memory: bytes that the intermediate values of one run may take, by an upper bound; draws are
        processed in chunks that keep to it. Draws that run together save Python's and Pyro's cost of a run; beyond the
        processor's caches they cost more than they save.
    :param bool latents: whether readings need the latent sites. If not, layers of this package read their draws
        without a sample statement, and those sites are missing. May change between runs.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        draws: Draws,
        *,
        vectorize: bool | None = None,
        max_memory: float = MAX_MEMORY,
        latents: bool = True,
    ) -> None:
        self.model = model
        self.latents = latents
        self.priors: dict[str, Any] = {}  # of the sites that layers may read without a sample statement
        self.replace_draws(draws)
        self.vectorize, self.required = vectorize, vectorize is True
        self.max_memory = max_memory
        self.chunk_size = 0  # not known yet
        self.bytes_per_draw = 0.0  # of intermediate values, as far as they were compared
        self.plain_bytes = 0  # of a draw, in networks that run their draws one after the other
        self.ndims: dict[str, int] = {}  # number of batch dimensions of each site in a single run
        self.nesting = 0  # of the plates, at most
        self.prototype: Sites | None = None
        self.values: list[str] = []  # deterministic sites that are read
        self.warned = False
        self.compared: set[Any] = set()  # kinds of batches on which joint and single runs were compared
        self.validated: set[str] = set()  # sites whose observations are held against the support
        # of the present run: the draws and the dimensions between them and those of the model
        self.lead = torch.Size()
        self.needs_grad = False  # whether the model differentiates something itself

    def replace_draws(self, draws: Draws) -> None:
        """Goes on with other draws of the same sites; what was found out about the model stays."""
        self.draws = draws
        self.num_draws = len(next(iter(draws.values()))) if draws else 1

    def single(
        self, batch: Batch, index: int, values: Mapping[str, Tensor] | None = None, shift: int = 0
    ) -> Sites:
        """The sites of the model under one draw, of which some values may be given; subsampled plates may be shifted."""
        args, kwargs = batch
        self.lead = torch.Size()
        values = {name: value[index] for name, value in self.draws.items()} | dict(values or {})
        with RowsMessenger(shift), torch.set_grad_enabled(self.needs_grad):
            trace = poutine.trace(SubstituteMessenger(values)(self.model)).get_trace(*args, **kwargs)
        return self.detached(sample_sites(trace))

    def detached(self, sites: Sites) -> Sites:
        """Sites without the graph of a model that differentiates something itself."""
        if self.needs_grad:
            for site in sites.values():
                site["value"] = site["value"].detach()
        return sites

    @torch.no_grad()
    def rows(
        self, batch: Batch, number: int | None = None, changing: Collection[Path] | None = None
    ) -> list[Rows]:
        """
        Finds the rows of a batch, and of the draws of sites in plates; see :func:`~pyro_bnn.model.plates.find_rows`.

        :param batch: the arguments of the model.
        :param number: how many findings suffice; ``None`` for all.
        :param changing: the places of tensors that certainly have the rows, if some are known.
        """
        sites = self.prototype or {}
        local = {n: v[0] for n, v in self.draws.items() if n in sites and plates_of(sites[n])}

        def run(tree: Any) -> Sites:
            args, kwargs, values = tree
            return self.single((args, kwargs), 0, values)

        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(self.model))
            stack.enter_context(local_parameters())
            stack.enter_context(poutine.block())
            stack.enter_context(pyro.validation_enabled(False))
            stack.enter_context(torch.random.fork_rng(devices=()))
            return list(islice(find_rows(run, (*batch, local), changing), number))

    def part(self, rows: Rows, batch: Batch, index: Tensor | slice, draws: Draws) -> tuple[Batch, Draws]:
        """Some rows of a batch, and of the draws for it."""
        args, kwargs, _ = rows.take((*batch, {}), index)
        return (args, kwargs), local_draws(rows, draws, index)

    def joint(self, batch: Batch, index: slice) -> Sites:
        """The sites of the model under several draws, S leftmost in every batch shape."""
        args, kwargs = batch
        values = {}
        for name, value in self.draws.items():
            value = value[index]
            missing = self.nesting - self.ndims.get(name, 0)
            values[name] = value.reshape(value.shape[:1] + (1,) * missing + value.shape[1:])
        size = len(range(*index.indices(self.num_draws)))
        self.lead = torch.Size((size,) + (1,) * self.nesting)
        plate = pyro.plate("_draws", size, dim=-1 - self.nesting)
        # last, because layers take values at this depth of the stack of handlers only
        silence = silent_sites(values, {} if self.latents else self.priors, parameters=not self.latents)
        grad = torch.set_grad_enabled(self.needs_grad)
        with grad, RowsMessenger(), _Draws(), plate, _Reads(values) as reads, silence as silent:
            self.model(*args, **kwargs)
        self.plain_bytes = silent.plain_bytes
        return self.detached(reads.sites)

    @torch.no_grad()
    def look(self, batch: Batch) -> None:
        """Runs the model for its structure, once."""
        if self.prototype is None:
            with local_parameters(), poutine.block():
                before = map_tensors(batch, Tensor.clone)
                try:
                    self.inspect(batch)
                except FAILURES:
                    self.check_shapes(batch)
                    raise
                require_unchanged(batch, before)
                check_values(self.prototype or {}, batch)
                self.require_all_rows(batch)

    def prepare(self, batch: Batch) -> None:
        """Finds out whether the model broadcasts."""
        if self.vectorize is None and self.num_draws <= PAIR:
            self.vectorize = False
        if self.vectorize is not False:
            found = self.rows(batch, 1) if self.has_more_rows(batch, LARGE) else []
            if found and found[0].separate and found[0].size > LARGE:
                few, draws = self.part(found[0], batch, slice(0, FEW), self.draws)
                all_rows, whole = self.prototype, self.draws
                try:
                    self.draws = draws
                    self.prototype = self.single(few, 0)
                    if not self.check(few):
                        self.vectorize = True
                        return
                finally:
                    self.prototype, self.draws = all_rows, whole
            self.decide(self.check(batch))
            if self.vectorize:
                self.set_chunk_size(self.bytes_per_draw)

    def require_function(self, batch: Batch) -> None:
        """
        :raises ValueError: if two runs under one draw and the same random numbers differ.
        """
        with torch.random.fork_rng(devices=()):
            state = get_rng_state()
            try:
                first = self.single(batch, 0)
                set_rng_state(state)
                second = self.single(batch, 0)
            except FAILURES as failure:  # the first run of all did not fail
                raise ValueError(
                    NO_FUNCTION.format(f"a second run fails, {first_line(failure)}")
                ) from failure
            finally:
                set_rng_state(state)
        for name in predicted_names(first, self.draws):
            values = {"value": first[name]["value"]}
            if name in second and not close(
                unscaled_log_prob(first[name]), unscaled_log_prob({**second[name], **values})
            ):
                raise ValueError(
                    NO_FUNCTION.format(
                        f"the distribution of site {name!r} differs between two runs under the same draw and random numbers"
                    )
                )

    def set_chunk_size(self, per_draw: float) -> None:
        """How many draws run together, from the bytes that one takes."""
        self.chunk_size = max(1, int(self.max_memory / max(per_draw, 1)))

    @staticmethod
    def has_more_rows(batch: Batch, number: int) -> bool:
        """Whether there could be more rows than a number, by any dimension of any argument."""
        return any(rows_of(leaf, d) > number for leaf in leaves(batch).values() for d in dims_of(leaf))

    def check_shapes(self, batch: Batch) -> None:
        """
        :raises ValueError: if a draw does not have the shape of its site.
        """
        args, kwargs = batch
        with RowsMessenger(), pyro.validation_enabled(False):
            sites = sample_sites(poutine.trace(self.model).get_trace(*args, **kwargs))
        for name, value in self.draws.items():
            if name in sites and value.shape[1:] != (shape := site_shape(sites[name])):
                raise ValueError(
                    f"the draws of {name!r} have shape {tuple(value.shape[1:])} each, the model's site has {tuple(shape)} on these "
                    "data. Draws with one value per row belong to the rows for which they were made: pass these in one "
                    "batch, with batch_size= to save memory."
                )

    def require_all_rows(self, batch: Batch) -> None:
        """
        :raises ValueError: if the model chooses some of the rows itself, anew in every run.
        """
        assert self.prototype is not None
        plates = {p.name: p for site in self.prototype.values() for p in plates_of(site).values()}
        chosen = {n: p for n, p in plates.items() if p.size < p.full_size}
        if not chosen:
            return
        other = self.single(batch, 0, shift=1)
        for name in predicted_names(self.prototype, self.draws):
            site = self.prototype[name]
            value = site["value"]
            if not (
                close(unscaled_log_prob(site), unscaled_log_prob({**other[name], "value": value}))
                and (not site["is_observed"] or close(value, other[name]["value"]))
            ):
                sizes = ", ".join(f"{n!r} ({p.size} of {p.full_size})" for n, p in chosen.items())
                raise ValueError(
                    f"the model takes some of the rows itself in the plate {sizes}: site {name!r} depends on which, and every "
                    "draw would see others. Make subsample_size an argument of the model and leave it out for predictions."
                )

    def inspect(self, batch: Batch) -> None:
        """Runs the model under the first draw and notes its sites, their plates and who reads them."""
        with silent_sites({}, {}) as layers:
            try:
                nodes = self.single(batch, 0)
            except RuntimeError:
                if self.needs_grad:
                    raise
                # a model that differentiates something itself runs with gradients only
                self.needs_grad = True
                nodes = self.single(batch, 0)
        self.priors = {n: p for n, p in layers.seen.items() if n in self.draws}
        self.note(nodes)
        self.check_names()

    def note(self, nodes: Sites) -> None:
        """Notes sites of a single run and their plates; a site need not be there in every batch."""
        new = nodes.keys() - (self.prototype or {}).keys()
        self.prototype = {**(self.prototype or {}), **nodes}
        self.validated |= {name for name in new if is_validated(nodes[name])}
        self.ndims |= {name: len(site["fn"].batch_shape) for name, site in nodes.items()}
        frames = [frame for site in nodes.values() for frame in site["cond_indep_stack"]]
        depth = max((-frame.dim for frame in frames if frame.vectorized), default=0)
        self.nesting = max([self.nesting, depth, *self.ndims.values()])

    def has_new(self, sites: Sites) -> bool:
        """Whether there are sites that no run had before: those of some batches only."""
        return not sites.keys() <= (self.prototype or {}).keys()

    def decide(self, error: str) -> None:
        """Joint runs from now on, or after an error single ones; raises it if those are not wanted."""
        if error and self.required:
            raise ValueError(f"The model does not broadcast over posterior draws: {error}.")
        self.vectorize = not error

    def check_names(self) -> None:
        """Draws of other sites than the model's would be ignored, and the model's own come from their prior."""
        assert self.prototype is not None
        sites = self.prototype
        unknown = sorted(set(self.draws) - set(sites))
        free = list(predicted_names(sites, self.draws))
        latent = [name for name in free if not sites[name]["is_observed"]]
        # without observations some of the free sites are those to predict
        if unknown and (len(unknown) == len(self.draws) or (latent and len(latent) < len(free))):
            raise ValueError(
                f"There are draws of {unknown}, which the model does not sample, and none of {latent}, which it "
                "does. Give the draws the names of the model's sites."
            )

    def warn_missing(self, batch: Batch) -> None:
        """Says so, once, where the density of observations depends on a latent site of which there are no draws."""
        if self.warned:
            return
        assert self.prototype is not None
        self.warned = True
        free = {name: self.prototype[name] for name in predicted_names(self.prototype, self.draws)}
        observed = [name for name, site in free.items() if site["is_observed"]]
        missing = [
            name
            for name, site in free.items()
            if not site["is_observed"] and not isinstance(base_distribution(site["fn"]), dist.Delta)
        ]

        def densities() -> Iterator[Tensor]:
            sites = self.single(batch, 0)
            yield from (unscaled_log_prob(sites[name]) for name in observed if name in sites)

        if not missing or not observed:
            return
        # a latent of few values may repeat by chance
        first, *others = (list(densities()) for _ in range(4))
        if any(not torch.equal(a, b) for other in others for a, b in zip(first, other, strict=False)):
            warnings.warn(
                f"There are no draws of {missing}, which the model samples, and the density of {observed} depends on them: "
                "every run takes new ones from the model. If they are latent, give draws of them too.",
                stacklevel=2,
            )

    def number_to_compare(self, batch: Batch) -> int:
        """How many draws a comparison takes."""
        assert self.prototype is not None
        sizes = {n for leaf in leaves(batch).values() for n in (rows_of(leaf, d) for d in dims_of(leaf))}
        sizes |= {n for site in self.prototype.values() for n in site_shape(site)}
        return next((n for n in (PAIR, *OTHERS) if n not in sizes), PAIR)

    def check(self, batch: Batch) -> str:
        """Compares a joint run with single runs; the text of the difference, empty if there is none."""
        assert self.prototype is not None
        pair = slice(0, min(self.number_to_compare(batch), self.num_draws))
        try:
            with pyro.validation_enabled(
                False
            ):  # the first run was validated, and the others are compared with it
                singles = [self.prototype] + [self.single(batch, i) for i in range(1, pair.stop)]
                with Watch(self.draws.values()) as watch:
                    joint = self.joint(batch, pair)
            if watch.where:
                return watch.reason
            self.bytes_per_draw = self.plain_bytes + watch.total / pair.stop
            predicted = set(predicted_names(self.prototype, self.draws))
            for name in self.prototype:
                if name not in joint or (name not in predicted and not is_factor(self.prototype[name])):
                    continue
                shared = {} if is_factor(self.prototype[name]) else {"value": self.prototype[name]["value"]}
                expected = torch.stack([unscaled_log_prob({**sites[name], **shared}) for sites in singles])
                found = self.align(name, unscaled_log_prob({**joint[name], **shared}))
                if error := _difference(found, expected, "density", name, 1.0):
                    return error
            for name in self.values:
                if name not in joint or any(name not in sites for sites in singles):
                    continue
                expected = torch.stack([sites[name]["value"] for sites in singles])
                found = self.align(*self.value_reading(name, joint[name]))
                if error := _difference(found, expected, "value", name, 1e-30):
                    return error
        except FAILURES as failure:
            return first_line(failure)
        return ""

    def first(self, batch: Batch, index: slice) -> Sites | None:
        """The first joint run on a whole batch, which tells how many draws fit; ``None`` if it fails after all."""
        error = ""
        try:
            with Watch() as watch:
                sites = self.joint(batch, index)
            for name in predicted_names(sites, self.draws):
                shape = sites[name]["fn"].batch_shape
                lead = (index.stop - index.start,) + (1,) * (self.nesting - self.ndims.get(name, 0))
                if shape[: len(lead)] != lead or len(shape) != self.nesting + 1:
                    error = f"site {name!r} has batch shape {tuple(shape)} under {lead[0]} draws"
        except FAILURES as failure:
            error = first_line(failure)
        self.decide(error)
        if error:
            self.inspect(batch)  # a few examples did not show the model as it is
            return None
        self.set_chunk_size(self.plain_bytes + watch.total / (index.stop - index.start))
        return sites

    def value_reading(self, name: str, site: Site) -> Reading:
        """
        The value of a deterministic site in a single or a joint run.

        In a joint run a value without a dimension for the draws is taken for one that does not depend on them; that it
        does not is what :meth:`check` finds out.
        """
        assert self.prototype is not None
        value, batch = site["value"], site["fn"].batch_shape
        own = self.prototype[name]["value"].dim()
        if len(batch) > self.ndims[name] and value.dim() <= own:
            value = value.expand(batch[:1] + value.shape)
        return name, value, own - self.ndims[name]

    def align(self, name: str, value: Tensor, rest: int = 0) -> Tensor:
        """Removes the singleton dimensions between S and the batch shape from a value of a joint run."""
        own = self.ndims.get(name, 0) + rest
        keep = value.shape[value.dim() - own :] if own else torch.Size()
        return value.reshape(value.shape[:1] + keep)

    @torch.no_grad()
    def run(self, batch: Batch, read: Callable[[Sites], dict[Key, Reading]]) -> dict[Key, Tensor]:
        """
        Runs the model under all draws and collects readings.

        :param batch: the arguments of the model.
        :param callable read: a function of the sites of a run returning readings by a key of its choice.
        :return: by key, a tensor of shape ``(S,) + batch shape + rest``.
        """
        with ExitStack() as stack:
            stack.enter_context(local_parameters())
            stack.enter_context(poutine.block())
            self.look(batch)
            if (key := coincidences(batch)) not in self.compared:  # one row may hide what several show
                if self.compared and self.vectorize:
                    self.inspect(batch)
                if self.compared:
                    check_values(self.single(batch, 0), batch)
                if not self.compared or self.vectorize:
                    self.prepare(batch)
                    self.warn_missing(batch)
                if not self.vectorize:
                    self.require_function(batch)
                self.compared.add(key)
            parts: list[dict[Key, Tensor]] = []
            # the prototype has been validated, and the rest has its structure
            validated = is_validation_enabled()
            stack.enter_context(pyro.validation_enabled(False))
            keep_freed_memory()
            start = 0
            while self.vectorize and start < self.num_draws:
                index = slice(start, min(start + (self.chunk_size or PAIR), self.num_draws))
                try:
                    sites = self.joint(batch, index) if self.chunk_size else self.first(batch, index)
                except FAILURES as failure:  # as many rows as draws that were compared, for example
                    self.decide(first_line(failure))
                    parts, sites = [], None
                if sites is not None and self.has_new(sites):
                    with pyro.validation_enabled(validated):
                        self.inspect(batch)
                    more = f"there are the sites {sorted(sites)}, more than under one draw"
                    self.decide(more if self.has_new(sites) else self.check(batch))
                    parts, start = [], 0
                elif sites is not None:
                    parts.append({k: self.align(n, v, rest) for k, (n, v, rest) in read(sites).items()})
                    start = index.stop
            if not self.vectorize:
                for draw in range(self.num_draws):
                    sites = self.single(batch, draw)
                    if self.has_new(sites):
                        with pyro.validation_enabled(validated):
                            self.note(self.single(batch, draw))
                    found = read(sites)
                    parts.append({k: v.unsqueeze(0) for k, (_, v, _) in found.items()})
        # a site that some draws do not reach has no value for all of them
        common = [key for key in parts[0] if all(key in part for part in parts)]
        return {key: torch.cat([part[key] for part in parts]) for key in common}


def _difference(found: Tensor, expected: Tensor, what: str, name: str, floor: float) -> str:
    """
    How a joint run differs from single runs at a site; empty if it does not.

    :param floor: sizes below which differences are rounding.
    """
    if found.shape != expected.shape:
        return f"site {name!r} has shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    if expected.is_floating_point() or expected.is_complex():
        finite = expected.isfinite()
        scale = floor + (float(expected[finite].abs().max()) if finite.any() else 0.0)
        # rounding differs between batched and single products; a wrong broadcast differs by more
        tolerance = 1e-6 if expected.dtype in (torch.float64, torch.complex128) else 1e-3
        close = (found - expected).abs() <= tolerance * scale
        same = torch.where(finite, close, (found == expected) | (found.isnan() & expected.isnan()))
    else:
        same = found == expected
    return "" if same.all() else f"the {what} of site {name!r} depends on which draws run together"


def require_unchanged(batch: Batch, before: Batch) -> None:
    """
    :param batch: the arguments of a model after a run.
    :param before: copies of them.
    :raises ValueError: naming an argument that the run changed; it has its values back.
    """
    copies = leaves(before)
    for path, leaf in leaves(batch).items():
        old, new = (x.data if isinstance(x, PackedSequence) else x for x in (copies[path], leaf))
        if not torch.equal(old, new):
            new.copy_(old)
            raise ValueError(
                f"the model changes {argument_name(path)} in place: every run would see other data. Work on a copy."
            )


def predicted_names(sites: Sites, draws: Draws) -> Iterator[str]:
    """
    The sites that draws do not fix: the observed ones, and those that a model called without observations
    samples in their place.

    :param sites: the sample sites of a run under draws.
    :param draws: the draws.
    :return: an iterator over names.
    """
    for name, site in sites.items():
        if name not in draws and not is_deterministic(site) and not is_factor(site):
            yield name


def local_draws(rows: Rows, draws: Draws, index: Tensor | slice) -> Draws:
    """Draws for some of the rows: those of sites with one value per row are cut."""
    return {
        name: take_rows(value, 1 + rows.axes[name], index) if (2, name) in rows.cuts else value
        for name, value in draws.items()
    }
