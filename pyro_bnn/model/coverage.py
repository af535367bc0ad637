# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Whether batches are all of the data, and parts of one model: plates covered once, sites observed, one prior; and which terms
of the likelihood every batch repeats: a factor of the latents, a table that is passed whole with each batch.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_bnn.model.data import Batch
from pyro_bnn.model.handlers import Site, is_deterministic, unscaled_log_prob
from pyro_bnn.model.join import Join
from pyro_bnn.model.plates import Rows, close, plates_of
from pyro_bnn.ops.distributed import all_reduce_sum


def is_likelihood(site: Site) -> bool:
    """Whether a node of a trace is an observed site or a factor."""
    sampled = site["type"] == "sample" and not site_is_subsample(site)
    return sampled and site["is_observed"] and not is_deterministic(site)


def unobserved(name: str) -> ValueError:
    """The error for a site without data."""
    return ValueError(
        f"site {name!r} was observed at initialisation but has no observation here: pass the targets as well as the inputs, "
        "as in (x, y)."
    )


def other_prior(name: str, first: Tensor, other: Tensor) -> ValueError:
    """The error for a latent site whose prior is not the same in all batches."""
    return ValueError(
        f"the prior of site {name!r} depends on the batch: its log density at the same value is {float(first.double().sum()):.6g} in the first "
        f"batch and {float(other.double().sum()):.6g} in a later one, and the prior counts once. Compute what it depends on from all the data "
        "before the model, or pass the data in one batch."
    )


class Coverage:
    """
    Counts how much of each plate the batches have covered, so that no partial sum passes for the whole, and compares their
    priors, which count once. Each observed site must be in one of the batches at least; ``before`` is how much of each plate
    earlier data covered, of which these are the continuation.
    """

    def __init__(
        self, observed: Sequence[str], latents: Sequence[str], before: Mapping[str, int] | None = None
    ) -> None:
        self._before = before
        self._latents = latents
        self._priors: dict[str, Tensor] = {}
        self._given: dict[str, tuple[Any, ...]] = {}
        self._times = dict.fromkeys(observed, 0)
        self._seen: dict[str, int] = {}
        self._full: dict[str, int] = {}

    def add(self, trace: Trace) -> None:
        """Counts the observed sites and factors of the trace of one batch."""
        self._compare_priors(trace)
        sites = [site for site in trace.nodes.values() if is_likelihood(site)]
        for name in self._times:
            self._times[name] += name in trace.nodes
        frames = {frame.name: frame for site in sites for frame in site["cond_indep_stack"]}
        for frame in frames.values():
            full = frame.full_size if frame.full_size is not None else frame.size
            self._seen[frame.name] = self._seen.get(frame.name, 0) + frame.size
            if full != frame.size:
                self._full[frame.name] = full

    @torch.no_grad()
    def _compare_priors(self, trace: Trace) -> None:
        for name in self._latents:
            if name not in trace.nodes:
                raise ValueError(
                    f"the latent site {name!r} is there in some batches only: its prior counts once, whatever the batches. Sample it in "
                    "every run of the model."
                )
            site: Site = trace.nodes[name]
            given = (site["fn"], site["mask"], site["scale"])
            if name in self._priors and all(
                a is b or (isinstance(a, float) and a == b)
                for a, b in zip(self._given[name], given, strict=True)
            ):
                continue  # the very same distribution, as that of a converted layer is
            density = torch.as_tensor(unscaled_log_prob(site) * site["scale"])
            first = self._priors.setdefault(name, density)
            self._given.setdefault(name, given)
            if first is not density and not close(first, density):
                raise other_prior(name, first, density)

    def check(self) -> None:
        """Raises if the batches did not cover a subsampled plate exactly once, or an observed site never."""
        self._priors.clear()
        self._given.clear()
        if self._times and self._before is None:
            times = torch.tensor(list(self._times.values()))
            all_reduce_sum([times])
            for name, count in zip(self._times, times.tolist(), strict=True):
                if not count:
                    raise unobserved(name)
        for name, full in self._full.items():
            seen = torch.tensor(self._seen[name])
            all_reduce_sum([seen])
            self._seen[name] = int(seen)
            total = int(seen) + (0 if self._before is None else self._before.get(name, 0))
            if int(seen) != full and (self._before is None or total > full):
                raise ValueError(
                    f"the batches cover {total} of the {full} elements of plate {name!r}: pass every data point exactly once (a "
                    "loader without drop_last, or all the data in one batch without subsampling); part after part by "
                    "laplace_approximation(part, override=False)."
                )

    @property
    def covered(self) -> dict[str, int]:
        """How much of each plate has been covered by now, of those that come part after part."""
        before = self._before or {}
        parts = {name: self._seen[name] for name, full in self._full.items() if self._seen[name] != full}
        return {**before, **{name: seen + before.get(name, 0) for name, seen in parts.items()}}

    @property
    def is_partial(self) -> bool:
        """Whether a plate is not covered as a whole yet."""
        return any(count < self._full.get(name, 0) for name, count in self.covered.items())


class Repeats:
    """
    Tells, batch by batch, which terms of the likelihood were there before: those outside the plate of the data that are the
    same as in the first batch. They count once; where they differ, they add up.

    The plate of the data is the one that holds what changed. Where all is the same, ``find`` finds rows in the first batch;
    ``elsewhere`` runs the model at other values of the latents: where a slope is zero, other inputs give the same.
    """

    def __init__(self, find: Callable[[], list[Rows]], elsewhere: Callable[[Batch], Trace]) -> None:
        self._join = Join(cache(find))
        self._elsewhere = elsewhere
        self._first: dict[str, tuple[Tensor, Tensor, Batch]] = {}
        self._terms_elsewhere: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, trace: Trace, names: list[str], batch: Batch) -> frozenset[str]:
        """Those of the named sites of the likelihood of a batch that were counted with the first batch."""
        sites = {name: trace.nodes[name] for name in names}
        self._join.add(sites)
        same = [name for name, site in sites.items() if self._is_same(name, site, batch)]
        same = self._same_elsewhere(same, batch) if same else same
        if not same:
            return frozenset()
        known = copy.copy(self._join)  # what it concludes from these batches is not for later ones
        # where other data came, they are in the plate that the batches cut
        cut, doubtful = _cut_plates(known, [sites[name] for name in sites.keys() - same])
        if cut or doubtful:
            return frozenset(name for name in same if not _is_cut(name, sites[name], cut, doubtful))
        return frozenset(name for name in same if known.axis(name) is None)

    def _same_elsewhere(self, names: list[str], batch: Batch) -> list[str]:
        for name in names:
            if name not in self._terms_elsewhere:
                first = self._elsewhere(self._first[name][2]).nodes
                together = [n for n in names if self._first[n][2] is self._first[name][2]]
                self._terms_elsewhere |= {n: unscaled_log_prob(first[n]).detach() for n in together}
        other = self._elsewhere(batch).nodes
        return [n for n in names if close(self._terms_elsewhere[n], unscaled_log_prob(other[n]))]

    def _is_same(self, name: str, site: Site, batch: Batch) -> bool:
        value = site["value"].detach()
        if name not in self._first:
            self._first[name] = value, unscaled_log_prob(site).detach(), batch
            return False
        first, terms, _ = self._first[name]
        if first.shape != value.shape or not torch.equal(first, value):
            return False
        return close(terms, unscaled_log_prob(site).detach())


def _names(site: Site) -> set[str]:
    return {plate.name for plate in plates_of(site).values()}


def _cut_plates(known: Join, changed: list[Site]) -> tuple[set[str], set[str]]:
    """
    The plates that the batches cut, and those that they might cut: a site in several plates may have other data in each
    batch with the rows of one of them.
    """
    cut: set[str] = set()
    doubtful: set[str] = set()
    for plates in map(_names, changed):
        shown = plates & known.names
        if not shown and len(plates) > 1 and known.rows is not None:
            shown = plates & known.rows.plates
        if shown or len(plates) == 1:
            cut |= shown or plates
        else:
            doubtful |= plates
    return cut, doubtful - cut


def _is_cut(name: str, site: Site, cut: set[str], doubtful: set[str]) -> bool:
    plates = _names(site)
    if not plates & cut and plates & doubtful and not plates >= doubtful:
        raise ValueError(
            f"site {name!r} is the same in every batch and in the plate {sorted(plates & doubtful)}, and the batches do not tell "
            f"which of the plates {sorted(doubtful)} they cut: write that of the data as pyro.plate(name, N, "
            "subsample_size=len(x)), with the number N of all rows, or pass the data in one batch."
        )
    return bool(plates & (cut | doubtful))
