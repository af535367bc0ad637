# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Terms of a likelihood that every batch repeats: a factor of the latents, a table that is passed whole with each batch."""

import copy
from collections.abc import Callable
from functools import cache

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_bnn.model.data import Batch
from pyro_bnn.model.handlers import Site, unscaled_log_prob
from pyro_bnn.model.join import Join
from pyro_bnn.model.plates import Rows, close, plates_of


class Repeats:
    """
    Tells, batch by batch, which terms of the likelihood were there before: those outside the plate of the data that are the
    same as in the first batch. They count once; where they differ, they add up.

    The plate of the data is the one that holds what changed. Where all is the same, it is found as for predictions.
    """

    def __init__(self, find: Callable[[], list[Rows]], elsewhere: Callable[[Batch], Trace]) -> None:
        self._join = Join(cache(find))
        self._elsewhere = elsewhere
        self._first: dict[str, tuple[Tensor, Tensor, Batch]] = {}
        self._terms_elsewhere: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, trace: Trace, names: list[str], batch: Batch) -> frozenset[str]:
        """Those of them that were counted with the first batch."""
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
