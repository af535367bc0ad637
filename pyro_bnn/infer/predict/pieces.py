# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The data of a prediction piece by piece, each with the posterior draws that belong to its rows."""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine import block

from pyro_bnn.infer.predict.draws import Draws, Posterior, draws_given, posterior_draws
from pyro_bnn.infer.predict.runs import MAX_MEMORY, ModelRunner, Sites, predicted_names
from pyro_bnn.model.data import Batch, Path, as_batches, differing_places
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.model.handlers import unscaled_log_prob
from pyro_bnn.model.join import Join
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.model.plates import Rows, close, plates_of, site_shape
from pyro_bnn.ops.memory import require_memory


class Pieces:
    """
    The batches of some data, or one batch in pieces, and a runner with the posterior draws for each.

    Draws of global latents are made once. Those of latents with a value per row are cut with the rows of one batch, and drawn
    anew by the guide for each batch of a loader, given the global ones.

    :param callable model: a Pyro model.
    :param posterior: see :func:`~pyro_bnn.infer.predict.draws.posterior_draws`.
    :param data: see :class:`~pyro_bnn.model.data.Batches`.
    :param int num_samples: the number of draws.
    :param int batch_size: rows in a piece of a single batch; ``None`` leaves it whole.
    :param vectorize: see :class:`~pyro_bnn.infer.predict.runs.ModelRunner`.
    :param float max_memory: see :class:`~pyro_bnn.infer.predict.runs.ModelRunner`.
    :param draws: posterior draws to use instead of fresh ones.
    :param bool redraw: whether the given draws are of the posterior, which may then draw the values of further rows.
    :param runner: one that knows the model; made anew if omitted.

    :ivar draws: the draws for all the data (for the first batch of a loader).
    :ivar join: how the pieces fit together, once they have been read.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        posterior: Posterior,
        data: Any,
        *,
        num_samples: int | None = None,
        batch_size: int | None = None,
        vectorize: bool | None = None,
        max_memory: float = MAX_MEMORY,
        draws: Draws | None = None,
        redraw: bool = False,
        runner: ModelRunner | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}.")
        self.model, self.posterior = model, posterior
        self.batches = as_batches(data)
        self.batch_size = batch_size
        self.num_samples = num_samples
        self.given = draws
        self.redraw = redraw or draws is None
        self._known_runner, self._vectorize, self._max_memory = runner, vectorize, max_memory
        self.changing: set[Path] | None = None
        self.join = Join(lambda: self.runner.rows(self.batches.first, changing=self.changing))
        self.runner: ModelRunner
        self.draws: Draws
        self.local: list[str] = []

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.batches)
        first = next(batches)
        second = next(batches, None)
        if second is not None:
            self.changing = differing_places(first, second)
        with evaluation_mode(self.model), evaluation_mode(self.posterior):
            self.start(first, second is None)
        if self.batches.is_single and self.batch_size is not None:
            yield from self.split(first, self.batch_size)
            return
        yield first
        for batch in chain((second,) if second is not None else (), batches):
            if self.changing is not None:  # labels may be the same in two batches by chance
                self.changing |= differing_places(first, batch) or set()
            if self.local:
                with evaluation_mode(self.posterior):
                    self.runner.replace_draws(self.draws_of(batch))
            yield batch

    def start(self, batch: Batch, alone: bool) -> None:
        """Makes the draws and the runner, and tells which latents have a value per row of further batches."""
        self.draws = self.given or posterior_draws(self.posterior, self.num_samples, batch)
        self.runner = self._known_runner or ModelRunner(
            self.model, self.draws, vectorize=self._vectorize, max_memory=self._max_memory, latents=False
        )
        self.runner.replace_draws(self.draws)
        self.runner.look(batch)
        sites = self.runner.prototype or {}
        self.require_memory(sites)
        inside = [n for n in self.draws if n in sites and plates_of(sites[n])]
        if inside and not alone:
            axes = {n for rows in self.runner.rows(batch, 1, self.changing) for n in rows.axes}
            self.local = [n for n in inside if n in axes]

    def require_memory(self, sites: Sites) -> None:
        """Draws, means and variances of the observations in one piece must fit into memory."""
        for name in predicted_names(sites, self.draws):
            fn, plates = sites[name]["fn"], plates_of(sites[name])
            rows = max((plate.size for plate in plates.values()), default=1)
            part = 1.0 if self.batch_size is None else min(1.0, self.batch_size / rows)
            value = sites[name]["value"]
            needed = 3.0 * self.runner.num_draws * fn.shape().numel() * value.element_size() * part
            if needed > 2**30:
                require_memory(
                    needed,
                    f"the predictions of site {name!r} under {self.runner.num_draws} draws",
                    value.device,
                    "Take fewer draws (num_samples=), or predictive_moments with batch_size=.",
                )

    def split(self, batch: Batch, size: int) -> Iterator[Batch]:
        """One batch in pieces of rows."""
        if not self.runner.has_more_rows(batch, size):
            yield batch
            return
        found = self.runner.rows(batch, 1)
        if not found or not found[0].separate:
            raise ValueError(
                f"batch_size={size}: the rows of the data cannot be taken apart: {refusal(found)}. Leave batch_size out."
            )
        rows = found[0]
        self.join.know(rows)
        witness = Witness(rows, self.runner, batch, self.draws)
        for start in range(0, rows.size, size):
            stop = min(start + size, rows.size)
            part, draws = self.runner.part(rows, batch, slice(start, stop), self.draws)
            self.runner.replace_draws(draws)
            with evaluation_mode(self.model), local_parameters(), block(), torch.random.fork_rng(devices=()):
                if (name := witness.differs(part, start, stop)) is not None:
                    raise ValueError(
                        f"batch_size={size}: site {name!r} depends on which rows run together, in the rows from {start} to {stop} "
                        "at the latest. Leave batch_size out."
                    )
            yield part
        self.runner.replace_draws(self.draws)

    def draws_of(self, batch: Batch) -> Draws:
        """The draws for a further batch: fresh ones of the latents with a value per row."""
        known = {name: value for name, value in self.draws.items() if name not in self.local}
        posterior = self.posterior
        given = isinstance(posterior, (Mapping, list, tuple)) or hasattr(posterior, "get_samples")
        if not self.redraw or given:
            raise ValueError(
                f"the draws of {self.local} have one value per row of the data, and a loader does not tell which rows are in a "
                "batch: pass all data in one batch, with batch_size= to save memory."
            )
        if not known:
            return posterior_draws(posterior, self.runner.num_draws, batch)
        if isinstance(posterior, AutoContinuous) or hasattr(posterior, "sample_posterior"):
            raise ValueError(
                f"{type(posterior).__name__} has one value of {self.local} per row of the data it was made for: pass these in "
                "one batch, with batch_size= to save memory."
            )
        return draws_given(posterior, known, batch)


class Witness:
    """
    Rows from all over the data that ran together, with which those of every piece are compared under one draw: what a few
    rows at the start did not show, such as a scaling by the largest of all.

    :param rows: where the rows are.
    :param runner: runs the model.
    :param batch: all of the data.
    :param draws: the draws for all of them.
    """

    NUMBER = 64

    def __init__(self, rows: Rows, runner: ModelRunner, batch: Batch, draws: Draws) -> None:
        self.rows, self.runner = rows, runner
        count = min(rows.size, self.NUMBER)
        self.index = torch.linspace(0, rows.size - 1, count, dtype=torch.float64).round().long()
        part, own = runner.part(rows, batch, self.index, draws)
        runner.replace_draws(own)
        with evaluation_mode(runner.model), local_parameters(), block(), torch.no_grad():
            self.sites = runner.single(part, 0)

    @torch.no_grad()
    def differs(self, part: Batch, start: int, stop: int) -> str | None:
        """
        :param part: a piece.
        :param start: its first row.
        :param stop: the row after its last one.
        :return: a site that says something else of a row here than it said among the witnesses; ``None`` if none does.
        """
        mine = ((self.index >= start) & (self.index < stop)).nonzero().squeeze(-1)
        here = self.index[mine] - start
        sites = self.runner.single(part, 0)
        for name in predicted_names(sites, self.runner.draws):
            axis, site, other = self.rows.axes.get(name), sites[name], self.sites[name]
            if axis is None or not len(mine):
                continue
            value = site["value"].expand(site_shape(site)).clone()
            device = value.device
            theirs = other["value"].expand(site_shape(other)).index_select(axis, mine.to(device))
            value.index_copy_(axis, here.to(device), theirs)
            found = unscaled_log_prob({**site, "value": value}).index_select(axis, here.to(device))
            if not close(unscaled_log_prob(other).index_select(axis, mine.to(device)), found):
                return name
        return None


def refusal(found: list[Rows]) -> str:
    """Why rows cannot be taken apart, for messages."""
    if found:
        return found[0].reason
    return "the model does not run on a part of them, or no site follows their number"
