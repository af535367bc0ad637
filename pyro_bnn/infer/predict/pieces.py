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
from pyro_bnn.infer.predict.runs import MAX_MEMORY, ModelRunner, has_more_rows
from pyro_bnn.infer.predict.together import Sites, predicted_names
from pyro_bnn.model.data import Batch, Path, as_batches, differing_places
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.model.join import Join
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.model.plates import Rows, plates_of, says_same
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
    :ivar local: the latents that are drawn anew for each batch.
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
        self.join = Join(lambda: self.runner.rows(self.batches.first, changing=self._changing))
        self.local: list[str] = []
        self.draws = draws or {}
        self.runner = runner or ModelRunner(model, {}, vectorize=vectorize, max_memory=max_memory)
        self._batch_size, self._num_samples = batch_size, num_samples
        self._redraw = redraw or draws is None
        self._changing: set[Path] | None = None

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.batches)
        first = next(batches)
        second = next(batches, None)
        if second is not None:
            self._changing = differing_places(first, second)
        with evaluation_mode(self.model), evaluation_mode(self.posterior):
            self._start(first, second is None)
        if self.batches.is_single and self._batch_size is not None:
            yield from self._split(first, self._batch_size)
            return
        yield first
        for batch in chain((second,) if second is not None else (), batches):
            if self._changing is not None:  # labels may be the same in two batches by chance
                self._changing |= differing_places(first, batch) or set()
            if self.local:
                with evaluation_mode(self.posterior):
                    self.runner.draws = self._draws_of(batch)
            yield batch

    def _start(self, batch: Batch, alone: bool) -> None:
        """Makes the draws, and tells which latents have a value per row of further batches."""
        self.draws = self.draws or posterior_draws(self.posterior, self._num_samples, batch)
        self.runner.draws = self.draws
        self.runner.look(batch)
        self._require_memory()
        sites = self.runner.structure.sites
        inside = [n for n in self.draws if n in sites and plates_of(sites[n])]
        if inside and not alone:
            axes = {n for rows in self.runner.rows(batch, 1, self._changing) for n in rows.axes}
            self.local = [n for n in inside if n in axes]

    def _require_memory(self) -> None:
        """Draws, means and variances of the observations in one piece must fit into memory."""
        sites = self.runner.structure.sites
        for name in predicted_names(sites, self.draws):
            rows = max((plate.size for plate in plates_of(sites[name]).values()), default=1)
            part = 1.0 if self._batch_size is None else min(1.0, self._batch_size / rows)
            value, count = sites[name]["value"], self.runner.num_draws
            needed = 3.0 * count * sites[name]["fn"].shape().numel() * value.element_size() * part
            if needed > 2**30:
                require_memory(
                    needed,
                    f"the predictions of site {name!r} under {count} draws",
                    value.device,
                    "Take fewer draws (num_samples=), or predictive_moments with batch_size=.",
                )

    def _split(self, batch: Batch, size: int) -> Iterator[Batch]:
        """One batch in pieces of rows."""
        if not has_more_rows(batch, size):
            yield batch
            return
        found = self.runner.rows(batch, 1)
        if not found or not found[0].separate:
            reason = (
                found[0].reason
                if found
                else "the model does not run on a part of them, or no site follows their number"
            )
            raise ValueError(
                f"batch_size={size}: the rows of the data cannot be taken apart: {reason}. Leave batch_size out."
            )
        rows = found[0]
        self.join.know(rows)
        witness = Witness(rows, self.runner, batch, self.draws)
        for start in range(0, rows.size, size):
            stop = min(start + size, rows.size)
            part, self.runner.draws = self.runner.part(rows, batch, slice(start, stop), self.draws)
            with torch.random.fork_rng(devices=()):
                if (name := witness.differs(part, start, stop)) is not None:
                    raise ValueError(
                        f"batch_size={size}: site {name!r} depends on which rows run together, in the rows from {start} to {stop} "
                        "at the latest. Leave batch_size out."
                    )
            yield part
        self.runner.draws = self.draws

    def _draws_of(self, batch: Batch) -> Draws:
        """The draws for a further batch: fresh ones of the latents with a value per row."""
        known = {name: value for name, value in self.draws.items() if name not in self.local}
        posterior = self.posterior
        given = isinstance(posterior, (Mapping, list, tuple)) or hasattr(posterior, "get_samples")
        if not self._redraw or given:
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
    """

    NUMBER = 64

    def __init__(self, rows: Rows, runner: ModelRunner, batch: Batch, draws: Draws) -> None:
        self.rows, self.runner = rows, runner
        count = min(rows.size, self.NUMBER)
        self.index = torch.linspace(0, rows.size - 1, count, dtype=torch.float64).round().long()
        part, runner.draws = runner.part(rows, batch, self.index, draws)
        self.sites = self._run(part)

    @torch.no_grad()
    def _run(self, part: Batch) -> Sites:
        with evaluation_mode(self.runner.model), local_parameters(), block():
            return self.runner.single(part, 0)

    def differs(self, part: Batch, start: int, stop: int) -> str | None:
        """A site that says something else of a row in this piece than it said among the witnesses; ``None`` if none does."""
        mine = ((self.index >= start) & (self.index < stop)).nonzero().squeeze(-1)
        sites = self._run(part)
        for name in predicted_names(sites, self.runner.draws):
            axis = self.rows.axes.get(name)
            if axis is None or not len(mine):
                continue
            if not says_same(self.sites[name], sites[name], axis, mine, self.index[mine] - start):
                return name
        return None
