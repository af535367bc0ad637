# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Batches with weights, and the log density and gradient that they estimate.

A batch b with weight w gives log p(u) + w sum_{i in b} log p(y_i | u) + (terms outside of the plate of the data, once). Of random
rows w is N / n. Where a pass goes through a partition of the data into K batches, of whatever sizes, w is K: every row counts
alike, and the mean of the estimates over a pass is the log density itself; with N / n_b a smaller last batch would count too much.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyro_bnn.infer.sample.evaluation import Evaluator
from pyro_bnn.infer.sample.joint import Share
from pyro_bnn.model.data import Batch, Batches
from pyro_bnn.model.packed import moved_from
from pyro_bnn.model.plates import Rows, close, plates_of
from pyro_bnn.ops.options import require_choice, require_count
from pyro_bnn.ops.randomness import random_state, set_random_state

#: What a latent in a plate may be.
_LOCAL = (
    "Latent site {!r} lies in a plate: if it has a value per row, a batch of other rows does not know it. "
)

Order = Literal["symmetric", "forward", "independent"]


class Weighted(NamedTuple):
    """A batch, what each of its rows counts, and whether it is always the same."""

    batch: Batch
    weight: float
    stays: bool = False


#: The batches of one pass; it may draw random numbers.
Pass = Callable[[], Iterator[Weighted]]


class Estimator:
    """
    The log density and its gradient by a batch, at several points in one pass.

    :param evaluator: of the model.
    :param once: the terms of the likelihood that every batch holds as a whole.
    """

    def __init__(self, evaluator: Evaluator, once: frozenset[str] = frozenset()) -> None:
        self.evaluator, self.once = evaluator, once

    def __call__(self, points: Tensor, given: Weighted) -> tuple[Tensor, Tensor]:
        """Values ``(C,)`` and gradients ``(C, p)`` at points ``(C, p)``."""
        share = Share(given.batch, scaled=True, once=self.once)
        weight = torch.tensor(given.weight, dtype=torch.float64, device=points.device)
        values, gradients = self.evaluator(points, share, weight, keep="all" if given.stays else None)
        return values.to(points), gradients.to(points)


class Minibatches:
    """
    The batches of a run.

    :ivar number: how many batches a pass over the data has.
    :ivar rows: the rows of the one batch that is cut, or ``None``.
    :ivar once: the terms of the likelihood that every batch holds as a whole.
    """

    def __init__(self, evaluator: Evaluator, batches: Batches, batch_size: int | None, order: Order) -> None:
        require_choice("order", order, "symmetric", "forward", "independent")
        self.evaluator, self.packed = evaluator, evaluator.joint.packed
        self.batches, self.order = batches, order
        self.rows: Rows | None = None
        self.batch_size = self._checked_size(batch_size)
        self.number = 1
        self.once: frozenset[str] = frozenset()

    def _checked_size(self, batch_size: int | None) -> int | None:
        if batch_size is not None:
            require_count("batch_size", batch_size)
            if not self.batches.is_single:
                raise ValueError(
                    f"batch_size={batch_size} cuts data that are one batch, and these come in batches: leave batch_size out, or "
                    "pass all the data as one batch, e.g. (x, y)."
                )
        elif not self.batches.is_single and self.order == "independent":
            raise ValueError(
                "order='independent' draws rows at random, and these data come in batches, pass by pass: use order='forward' or "
                "'symmetric', or pass all the data as one batch with batch_size."
            )
        return batch_size

    # ------------------------------------------------------------------ set-up

    def prepare(self, point: Tensor) -> tuple[Tensor, float]:
        """
        Reads and checks the data near a point ``(p,)``; a point and the log density of all data there.

        :raises ValueError: if the model is no function of its latents, or batches do not give its log density without bias.
        """
        for name in self.evaluator.joint.moving:
            raise ValueError(
                f"the support of observed site {name!r} depends on latents: the density ends where data leave it, which no gradient "
                "of a batch tells. Use nuts or mclmc with all data, or a likelihood with a fixed support."
            )
        self.packed.require_function(point, self.batches)
        probe = moved_from(point)
        value, gradient = self.survey(probe)
        self.check_unbiased(probe, value, gradient)
        return probe, float(value)

    def density(self, point: Tensor) -> float:
        """The log density of all data at a point ``(p,)``."""
        return float(self.of_all_data(point.unsqueeze(0))[0])

    @torch.enable_grad()
    def survey(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """
        Reads how the data fall into batches at a point ``(p,)``; the log density, float64, and its gradient ``(p,)`` by all data.

        :raises ValueError: if rows interact, belong to latents of their own, or do not cover a plate of the model; naming what is.
        """
        if self.batches.is_single and self.batch_size is not None:
            self._find_rows(point, self.batch_size)
        latent = point.detach().clone().requires_grad_(True)
        value, gradient = torch.zeros((), dtype=torch.float64), torch.zeros_like(point)
        coverage = self.packed.coverage(self.batches)
        repeats = None if self.batches.is_single else self.packed.repeats(latent, self.batches)
        times: dict[str, int] = {}
        number = 0
        for number, batch in enumerate(self.batches, 1):
            trace = self.packed.trace(latent, batch)
            coverage.add(trace)
            self.packed.check_observations(trace)
            if repeats is not None:
                left_out = repeats.add(trace, self.packed.likelihood_names(trace), batch)
                self.packed.leave_out(trace, left_out)
                times |= {name: times.get(name, 0) + 1 for name in left_out}
            term = self.packed.log_likelihood(trace)  # raises where it is not finite
            if number == 1:
                term = term + self.packed.log_prior(latent, trace)
            gradient = gradient + torch.autograd.grad(term, latent)[0]
            value = value + term.detach().cpu()
        coverage.check()
        if not self.batches.is_single:
            self.number, self.once = number, _always(times, number)
        return value, gradient

    def _find_rows(self, point: Tensor, batch_size: int) -> None:
        """Where the rows of the one batch are, which must be the model's alone."""
        found = self.packed.rows(point, self.batches.first, 1)
        trace = self.packed.trace(point.detach(), self.batches.first)
        if not found:
            inside = [n for n in self.packed.space.slices if plates_of(trace.nodes[n])]
            raise ValueError(
                f"batch_size={batch_size}: no dimension of the arguments can be cut so that the model runs on some rows with the same "
                f"latents. {_LOCAL.format(inside[0]) if inside else ''}Write the plate of the data as pyro.plate(name, N, "
                "subsample_size=len(x)) or pyro.plate(name, len(x)), or leave batch_size out."
            )
        rows = found[0]
        if not rows.separate:
            raise ValueError(
                f"batch_size={batch_size}: rows cannot be taken apart ({rows.reason}), so that batches do not add up to the log "
                "density: leave batch_size out."
            )
        if batch_size > rows.size:
            raise ValueError(f"batch_size={batch_size} is more than the {rows.size} rows of the data.")
        names = self.packed.likelihood_names(trace)
        self.rows, self.once = rows, frozenset(names).difference(rows.axes)
        self.number = -(-rows.size // batch_size)

    def check_unbiased(self, point: Tensor, value: Tensor, gradient: Tensor) -> None:
        """
        Raises unless the mean of the estimates over one pass is the log density of all data and its gradient at a point ``(p,)``.
        """
        if self.number == 1:
            return
        estimate = Estimator(self.evaluator, self.once)
        found = [(w.weight, *estimate(point.unsqueeze(0), w)) for w in self._partition()]
        shares = [1 / self.number] * len(found)
        if self.rows is not None and self.order == "independent":
            shares = [1 / weight for weight, *_ in found]  # n / N
        gradients = torch.stack([share * g[0] for share, (_, _, g) in zip(shares, found, strict=True)])
        values = torch.stack(
            [share * v[0].double() for share, (_, v, _) in zip(shares, found, strict=True)]
        ).cpu()
        size = max(float(gradients.abs().sum(0).max()), torch.finfo(point.dtype).tiny)
        same = close(gradient, gradients.sum(0), floor=size)
        scale, eps = float(values.abs().sum()), torch.finfo(point.dtype).eps
        if not (same and abs(float(value - values.sum())) <= 1e3 * eps * scale):
            raise ValueError(
                f"the batches do not estimate the log density without bias: at one point the mean over a pass is "
                f"{float(values.sum()):.8g} and all data together give {float(value):.8g}; the gradients differ by "
                f"{float((gradient - gradients.sum(0)).abs().max()):.3g}. Rows of a batch interact, or passes of the loader hold other rows "
                "(drop_last with shuffle, sampling with replacement): pass all the data in one batch, with batch_size if rows do not interact."
            )

    def of_all_data(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities ``(K,)`` and gradients ``(K, p)`` by all data at points ``(K, p)``."""
        estimate = Estimator(self.evaluator, self.once)
        if self.batches.is_single:
            return estimate(points, Weighted(self.batches.first, 1.0))
        found = [estimate(points, given) for given in self._loaded()]
        values, gradients = zip(*found, strict=True)
        return torch.stack(values).mean(0), torch.stack(gradients).mean(0)

    def _partition(self) -> Iterator[Weighted]:
        """The batches of one pass, without random numbers where rows are cut."""
        if self.rows is None or self.batch_size is None:
            yield from self._loaded()
            return
        N, n = self.rows.size, self.batch_size
        for start in range(0, N, n):
            weight = (
                N / len(range(N)[start : start + n]) if self.order == "independent" else float(self.number)
            )
            yield Weighted(self._take(slice(start, start + n)), weight)

    # ------------------------------------------------------------------ passes

    def one_pass(self) -> Iterator[Weighted]:
        """The batches of one pass, or of a pass forward and the same backward, or one random batch."""
        if self.number == 1:
            single = self.batches.is_single
            yield Weighted(self.batches.first if single else next(iter(self.batches)), 1.0, single)
        elif self.rows is not None and self.order == "independent":
            yield self._random_rows()
        else:
            yield from self._cut() if self.rows is not None else self._sweeps()

    def _take(self, index: Tensor | slice) -> Batch:
        assert self.rows is not None
        args, kwargs, *_ = self.rows.take((*self.batches.first, {}), index)
        return args, kwargs

    def _random_rows(self) -> Weighted:
        """Rows at random, none twice."""
        assert self.rows is not None
        assert self.batch_size is not None
        index = torch.randperm(self.rows.size)[: self.batch_size]
        return Weighted(self._take(index), self.rows.size / self.batch_size)

    def _cut(self) -> Iterator[Weighted]:
        """A random partition of the rows, forward, and backward in symmetric order."""
        assert self.rows is not None
        assert self.batch_size is not None
        parts = torch.randperm(self.rows.size).split(self.batch_size)
        for index in (*parts, *(reversed(parts) if self.order == "symmetric" else ())):
            yield Weighted(self._take(index), float(self.number))

    def _sweeps(self) -> Iterator[Weighted]:
        """The batches of a loader; in symmetric order they are kept, and come again backward."""
        seen = []
        for given in self._loaded():
            if self.order == "symmetric":
                seen.append(given)
            yield given
        yield from reversed(seen)

    def _loaded(self) -> Iterator[Weighted]:
        number = 0
        for batch in self.batches:
            number += 1
            yield Weighted(batch, float(self.number))
        if number != self.number:
            raise ValueError(
                f"the data had {self.number} batches in the first pass and {number} in a later one: the weight of a batch is their "
                "number. Pass a loader with the same number of batches in every pass, or all the data in one batch."
            )


def _always(times: dict[str, int], number: int) -> frozenset[str]:
    """The terms that all later batches repeated, of a pass of so many; raises where only some did."""
    for name, count in times.items():
        if count != number - 1:
            raise ValueError(
                f"site {name!r} is the same in {count + 1} of {number} batches and another in the rest: whether it counts once or with "
                "each batch cannot be known. Put what belongs to rows into the plate of the data, or pass the data in one batch."
            )
    return frozenset(times)


class Stream:
    """
    Batches without end, pass after pass, that can go on where an earlier stream stopped.

    :param one_pass: see :meth:`Minibatches.one_pass`.
    :param generators: those of the loader.
    :param keeps: whether to note the random numbers at the start of each pass, to go on within it.
    """

    def __init__(self, one_pass: Pass, generators: Sequence[torch.Generator], *, keeps: bool) -> None:
        self._one_pass, self._generators, self._keeps = one_pass, generators, keeps
        self._done = 0
        self._start: dict[str, Any] | None = None
        self._resumed: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """Where the stream is: random numbers at the start of the pass and now, and how many of its batches are done."""
        now = random_state(self._generators)
        if self._start is None:  # passes of one batch are over
            return {"random": now, "start": now, "done": 0}
        return {"random": now, "start": self._start, "done": self._done}

    def load(self, state: dict[str, Any]) -> None:
        """Goes to where another stream was."""
        self._done, self._resumed = state["done"], state["random"]
        set_random_state(state["start"], self._generators)

    def __iter__(self) -> Iterator[Weighted]:
        while True:
            if self._keeps:
                self._start = random_state(self._generators)
            batches = self._one_pass()
            if self._resumed is not None:
                for _ in islice(batches, self._done):
                    pass
                set_random_state(self._resumed, self._generators)
                self._resumed = None
            else:
                self._done = 0
            for given in batches:
                self._done += 1
                yield given
