# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Runs a model under many posterior draws: at once where it broadcasts, one after the other elsewhere."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pyro_bnn.infer.predict.draws import Draws
from pyro_bnn.infer.predict.together import (
    PAIR,
    Key,
    Reader,
    Sites,
    Structure,
    Together,
    compare,
    predicted_names,
    undrawn,
)
from pyro_bnn.model.arguments import explain_arrays
from pyro_bnn.model.data import Arguments, Batch, Path, argument_name, coincidences, leaves, map_tensors
from pyro_bnn.model.dispatch import Watch
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.model.handlers import (
    CollectMessenger,
    RowsMessenger,
    Site,
    categorical_draw,
    run_model,
    unscaled_log_prob,
)
from pyro_bnn.model.observations import check_values
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.model.plates import (
    FAILURES,
    FEW,
    Rows,
    dims_of,
    find_rows,
    first_line,
    plates_of,
    rows_of,
    says_same,
    site_shape,
    take_rows,
)
from pyro_bnn.nn.folding import sample_loops
from pyro_bnn.ops.notice import warn_user

#: Bytes that the intermediate values of one run may take by default.
MAX_MEMORY = 24 * 2**20

#: With more rows than these the comparison is made on a few of them; finding them costs some runs too.
LARGE = 1024

NO_FUNCTION = (
    "the model is not a function of its latents: {}. A module or closure keeps something from call to call, such as a "
    "hidden state: reset it at the start of the model."
)


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

    :param model: a Pyro model.
    :param draws: values of the latent sites, each of shape ``(S,) + site shape``; others of the same sites may take their
        place, what was found out about the model stays.
    :param vectorize: ``None`` to check, ``False`` to loop, ``True`` to fail if the model does not broadcast.
    :param max_memory: bytes that the intermediate values of one run may take, by an upper bound; draws are
        processed in chunks that keep to it. Draws that run together save Python's and Pyro's cost of a run; beyond the
        processor's caches they cost more than they save.
    :ivar differentiable: whether readings keep their graph to the arguments of the model.
    :ivar values: deterministic sites that are read.
    :ivar collects: whether readings go beyond the predicted sites. If not, networks of this package may run their draws one
        after the other, and what their modules say is said for each.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        draws: Draws,
        *,
        vectorize: bool | None = None,
        max_memory: float = MAX_MEMORY,
    ) -> None:
        self.model, self.draws = model, draws
        self.structure = Structure()
        self.together = Together(vectorize, vectorize is True, max_memory)
        self.values: Sequence[str] = ()
        self.collects = False
        self.needs_grad = False  # whether the model differentiates something itself
        self.differentiable = False
        self._compared: set[Any] = set()  # kinds of batches on which joint and single runs were compared
        self._inspected: Batch | None = None  # the batch that showed the structure

    @property
    def num_draws(self) -> int:
        """The number S of draws."""
        return len(next(iter(self.draws.values()))) if self.draws else 1

    @property
    def vectorized(self) -> bool:
        """Whether draws run together."""
        return bool(self.together.on)

    def single(
        self, batch: Batch, index: int, values: Mapping[str, Tensor] | None = None, shift: int = 0
    ) -> Sites:
        """The sites of the model under one draw, of which some values may be given; subsampled plates may be shifted."""
        values = {name: value[index] for name, value in self.draws.items()} | dict(values or {})
        with torch.set_grad_enabled(self.needs_grad or self.differentiable):
            return self._detached(run_model(self.model, batch, values, shift=shift))

    def joint(self, batch: Batch, index: Tensor | slice) -> Sites:
        """The sites of the model under several draws, S leftmost in every batch shape."""
        args, kwargs = batch
        values = {name: self.structure.spread(name, value[index]) for name, value in self.draws.items()}
        nesting, size = self.structure.nesting, len(torch.arange(self.num_draws)[index])
        plate = pyro.plate("_draws", size, dim=-1 - nesting)
        grad, loops = (
            torch.set_grad_enabled(self.needs_grad or self.differentiable),
            sample_loops(not self.collects),
        )
        with grad, RowsMessenger(), _Draws(), plate, _Reads(values) as reads, loops:
            self.model(*args, **kwargs)
        return self._detached(reads.sites)

    def _detached(self, sites: Sites) -> Sites:
        """Sites without the graph of a model that differentiates something itself."""
        for site in sites.values() if self.needs_grad and not self.differentiable else ():
            site["value"] = site["value"].detach()
        return sites

    def run(self, batch: Batch, read: Reader[Key]) -> dict[Key, Tensor]:
        """
        Runs the model under all draws and collects readings.

        :param batch: the arguments of the model.
        :param read: returns the readings of a run by a key of its choice.
        :return: by key, a tensor of shape ``(S,) + batch shape + rest``.
        """
        with torch.set_grad_enabled(self.differentiable), local_parameters(), poutine.block():
            self.look(batch)
            self._compare_kind(batch)
            validated = is_validation_enabled()
            # what was looked at has been validated, and the rest has its structure
            with pyro.validation_enabled(False):
                parts = list(self._joint_parts(batch, read, validated)) if self.together.on else []
                if not self.together.on:
                    parts = [self._single_part(batch, i, read, validated) for i in range(self.num_draws)]
        # a site that some draws do not reach has no value for all of them
        common = [key for key in parts[0] if all(key in part for part in parts)]
        with torch.set_grad_enabled(self.differentiable):
            return {key: torch.cat([part[key] for part in parts]) for key in common}

    def _joint_parts(self, batch: Batch, read: Reader[Key], validated: bool) -> list[dict[Key, Tensor]]:
        """Readings of the draws, as many at once as fit; of some only where the draws turn out not to run together."""
        parts: list[dict[Key, Tensor]] = []
        start = 0
        while self.together.on and start < self.num_draws:
            index = slice(start, min(start + (self.together.number or PAIR), self.num_draws))
            sites = self._try_joint(batch, index)
            if sites is None:
                break
            if self.structure.lacks(sites):
                with pyro.validation_enabled(validated):
                    self._inspect(batch)
                more = f"there are the sites {sorted(sites)}, more than under one draw"
                self.together.decide(more if self.structure.lacks(sites) else compare(self, batch)[0])
                parts, start = [], 0
                continue
            lead = torch.Size((index.stop - index.start,) + (1,) * self.structure.nesting)
            found = read(sites, lead)
            parts.append({key: self.structure.align(*reading) for key, reading in found.items()})
            start = index.stop
        return parts

    def _single_part(self, batch: Batch, index: int, read: Reader[Key], validated: bool) -> dict[Key, Tensor]:
        """Readings of one draw."""
        sites = self.single(batch, index)
        if self.structure.lacks(sites):
            with pyro.validation_enabled(validated):
                self.structure.note(self.single(batch, index))
        return {key: value.unsqueeze(0) for key, (_, value, _) in read(sites, torch.Size()).items()}

    def _try_joint(self, batch: Batch, index: slice) -> Sites | None:
        """A joint run, the first of which tells how many draws fit; ``None`` if it fails, as with as many rows as draws."""
        try:
            if self.together.number:
                return self.joint(batch, index)
            with Watch() as watch:
                sites = self.joint(batch, index)
            error = self._misplaced(sites, index.stop - index.start)
        except FAILURES as failure:
            error = first_line(failure)
        self.together.decide(error)
        if error:
            self._inspect(batch)  # a few examples did not show the model as it is
            return None
        self.together.fit(watch.total / (index.stop - index.start))
        return sites

    def _misplaced(self, sites: Sites, size: int) -> str:
        """Which site does not have the draws left of its plates; empty if all do."""
        nesting = self.structure.nesting
        for name in predicted_names(sites, self.draws):
            shape = sites[name]["fn"].batch_shape
            lead = (size,) + (1,) * (nesting - self.structure.ndims.get(name, 0))
            if shape[: len(lead)] != lead or len(shape) != nesting + 1:
                return f"site {name!r} has batch shape {tuple(shape)} under {size} draws"
        return ""

    @torch.no_grad()
    def look(self, batch: Batch) -> None:
        """Runs the model for its structure, once."""
        if self.structure.sites:
            return
        with local_parameters(), poutine.block():
            before = map_tensors(batch, Tensor.clone)
            try:
                self._inspect(batch)
            except FAILURES as error:
                explain_arrays(error, Arguments(*batch))
                self._check_shapes(batch)
                raise
            require_unchanged(batch, before)
            check_values(self.structure.sites, batch)
            self._require_all_rows(batch)

    def _inspect(self, batch: Batch) -> None:
        """Runs the model under the first draw and notes its sites and their plates."""
        try:
            sites = self.single(batch, 0)
        except RuntimeError:
            if self.needs_grad:
                raise
            self.needs_grad = True
            sites = self.single(batch, 0)
        self._inspected = batch
        self.structure.note(sites)
        self._check_names()

    def _check_names(self) -> None:
        """Draws of other sites than the model's would be ignored, and the model's own come from their prior."""
        sites = self.structure.sites
        unknown = sorted(set(self.draws) - set(sites))
        free = list(predicted_names(sites, self.draws))
        latent = [name for name in free if not sites[name]["is_observed"]]
        # without observations some of the free sites are those to predict
        if unknown and (len(unknown) == len(self.draws) or (latent and len(latent) < len(free))):
            raise ValueError(
                f"There are draws of {unknown}, which the model does not sample, and none of {latent}, which it "
                "does. Give the draws the names of the model's sites."
            )

    def _check_shapes(self, batch: Batch) -> None:
        """Raises if a draw does not have the shape of its site."""
        with pyro.validation_enabled(False):
            sites = run_model(self.model, batch)
        for name, value in self.draws.items():
            if name in sites and value.shape[1:] != (shape := site_shape(sites[name])):
                raise ValueError(
                    f"the draws of {name!r} have shape {tuple(value.shape[1:])} each, the model's site has {tuple(shape)} on these "
                    "data. Draws with one value per row belong to the rows for which they were made: pass these in one "
                    "batch, with batch_size= to save memory."
                )

    def _require_all_rows(self, batch: Batch) -> None:
        """Raises if the model chooses some of the rows itself, anew in every run."""
        sites = self.structure.sites
        plates = {p.name: p for site in sites.values() for p in plates_of(site).values()}
        chosen = {n: p for n, p in plates.items() if p.size < p.full_size}
        other = self.single(batch, 0, shift=1) if chosen else {}
        for name in predicted_names(sites, self.draws) if chosen else ():
            if not says_same(sites[name], other[name]):
                sizes = ", ".join(f"{n!r} ({p.size} of {p.full_size})" for n, p in chosen.items())
                raise ValueError(
                    f"the model takes some of the rows itself in the plate {sizes}: site {name!r} depends on which, and every "
                    "draw would see others. Make subsample_size an argument of the model and leave it out for predictions."
                )

    def _compare_kind(self, batch: Batch) -> None:
        """Finds out, for each kind of batches, whether the model broadcasts: one row may hide what several show."""
        if (key := coincidences(batch)) in self._compared:
            return
        open_question = self.together.on if self._compared else self.together.on is not False
        if open_question and self._inspected is not batch:  # as where parts of the data follow the whole
            self._inspect(batch)
        if self._compared:
            check_values(self.single(batch, 0), batch)
        else:
            self._warn_missing(batch)
        if not self._compared or self.together.on:
            self._prepare(batch)
        if not self.together.on:
            self._require_function(batch)
        self._compared.add(key)

    def _require_function(self, batch: Batch) -> None:
        """Raises if two runs under one draw and the same random numbers differ."""
        state, runs = get_rng_state(), []
        for _ in range(2):
            try:
                runs.append(self.single(batch, 0))
            except FAILURES as failure:  # the first run of all did not fail
                what = f"a second run fails, {first_line(failure)}"
                raise ValueError(NO_FUNCTION.format(what)) from failure
            finally:
                set_rng_state(state)
        first, second = runs
        for name in predicted_names(first, self.draws):
            if name in second and not says_same(first[name], second[name]):
                what = f"the distribution of site {name!r} differs between two runs under the same draw and random numbers"
                raise ValueError(NO_FUNCTION.format(what))

    def _prepare(self, batch: Batch) -> None:
        """Finds out whether the model broadcasts, on a few rows where there are many."""
        if self.together.on is None and self.num_draws <= PAIR:
            self.together.on = False
        if self.together.on is False:
            return
        found = self.rows(batch, 1) if has_more_rows(batch, LARGE) else []
        if found and found[0].separate and found[0].size > LARGE:
            few, draws = self.part(found[0], batch, slice(0, FEW), self.draws)
            whole, all_rows = self.draws, self.structure.sites
            try:
                self.draws = draws
                self.structure.sites = self.single(few, 0)
                if not compare(self, few)[0]:
                    self.together.decide("")
                    return
            finally:
                self.draws, self.structure.sites = whole, all_rows
        error, per_draw = compare(self, batch)
        self.together.decide(error)
        if not error:
            self.together.fit(per_draw)

    def _warn_missing(self, batch: Batch) -> None:
        """Says so where the density of observations depends on a latent site of which there are no draws."""
        sites = self.structure.sites
        free = {name: sites[name] for name in predicted_names(sites, self.draws)}
        observed = [name for name, site in free.items() if site["is_observed"]]
        missing = list(undrawn(sites, self.draws))
        if not missing or not observed:
            return

        def densities() -> list[Tensor]:
            found = self.single(batch, 0)
            return [unscaled_log_prob(found[name]) for name in observed if name in found]

        # a latent of few values may repeat by chance
        first, *others = (densities() for _ in range(4))
        if any(not torch.equal(a, b) for other in others for a, b in zip(first, other, strict=False)):
            warn_user(
                f"There are no draws of {missing}, which the model samples, and the density of {observed} depends on them: "
                "every run takes new ones from the model. If they are latent, give draws of them too."
            )

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
        sites = self.structure.sites
        local = {n: v[0] for n, v in self.draws.items() if n in sites and plates_of(sites[n])}

        def run(tree: Any) -> Sites:
            args, kwargs, values = tree
            return self.single((args, kwargs), 0, values)

        with ExitStack() as stack:
            for context in (evaluation_mode(self.model), local_parameters(), poutine.block()):
                stack.enter_context(context)
            stack.enter_context(pyro.validation_enabled(False))
            stack.enter_context(torch.random.fork_rng(devices=()))
            return list(islice(find_rows(run, (*batch, local), changing), number))

    def part(self, rows: Rows, batch: Batch, index: Tensor | slice, draws: Draws) -> tuple[Batch, Draws]:
        """Some rows of a batch, and the draws for it: those of sites with one value per row are cut."""
        args, kwargs, _ = rows.take((*batch, {}), index)
        return (args, kwargs), {
            name: take_rows(value, 1 + rows.axes[name], index) if (2, name) in rows.cuts else value
            for name, value in draws.items()
        }


def has_more_rows(batch: Batch, number: int) -> bool:
    """Whether there could be more rows than a number, by any dimension of any argument."""
    return any(rows_of(leaf, d) > number for leaf in leaves(batch).values() for d in dims_of(leaf))


def require_unchanged(batch: Batch, before: Batch) -> None:
    """Raises if a run has changed one of its arguments, given copies of them; it has its values back."""
    copies = leaves(before)
    for path, leaf in leaves(batch).items():
        old, new = (x.data if isinstance(x, PackedSequence) else x for x in (copies[path], leaf))
        if not torch.equal(old, new):
            new.copy_(old)
            raise ValueError(
                f"the model changes {argument_name(path)} in place: every run would see other data. Work on a copy."
            )
