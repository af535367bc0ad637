# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Latents with a value per row of the data, whose guide has a parameter per position in a batch."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, AutoDelta, AutoGuideList, AutoNormal
from pyro.infer.autoguide.structured import AutoStructured
from pyro.poutine.util import site_is_subsample

from pyro_bnn.model.data import Batch, differing_places
from pyro_bnn.model.handlers import Site, is_deterministic, run_model
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.model.plates import FAILURES, Sites, find_rows, plates_of, says_same


def check_local_latents(model: Callable[..., Any], guide: Any, batches: Callable[[], list[Batch]]) -> None:
    """
    Raises where a latent site has a value per row and the batches are parts of the data. The values of Pyro's autoguides belong
    to positions in a plate; the same positions are other rows in each part.
    """
    owners = {name: part for part in _parts(guide) for name in _latents_in_plates(part)}
    if not owners:
        return
    first, *others = batches()
    sites = _run(model, first)
    owners = {name: part for name, part in owners.items() if name in sites and _is_in_plate(sites[name])}
    shifted: Sites | None = None
    for name, part in owners.items():
        parts = [plate for plate in plates_of(sites[name]).values() if plate.size < plate.full_size]
        if not parts:
            continue
        # these take the parameters of the rows that the plate chose
        if isinstance(part, (AutoNormal, AutoDelta)):
            values = {n: s["value"] for n, s in sites.items() if not s["is_observed"]}
            shifted = shifted or _run(model, first, 1, values)
            if _takes_rows(sites, shifted):
                continue
        raise _refusal(
            part,
            name,
            f"of the plate {parts[0].name!r}, {parts[0].size} of {parts[0].full_size} of which are in a batch",
        )
    if others and owners:
        for name in local_names(model, first, others[0], owners):
            raise _refusal(owners[name], name, "of a batch")


def local_names(
    model: Callable[..., Any], first: Batch, second: Batch, names: Collection[str]
) -> Iterator[str]:
    """Those of some latent sites in plates that have a value per row of a batch, given a second one, which tells what changes."""
    places = differing_places(first, second)
    for rows in find_rows(lambda tree: _run(model, tree[:2]), (*first, {}), places):
        yield from (name for name in names if name in rows.axes)


def _refusal(guide: Any, name: str, where: str) -> ValueError:
    return ValueError(
        f"site {name!r} is latent with a value per row {where}, and {type(guide).__name__} has one parameter per position, "
        "which stands for other rows in other batches. Pass all the data in one batch, or give the site a guide that computes its "
        "parameters from the rows (amortised), in an AutoGuideList."
    )


def _parts(guide: Any) -> Iterator[Any]:
    """Those of Pyro's autoguides in a guide that have parameters of their own for all latents."""
    if isinstance(guide, AutoGuideList):
        for part in guide:
            yield from _parts(part)
    elif isinstance(guide, (AutoNormal, AutoDelta, AutoContinuous, AutoStructured)):
        yield guide


def _latents_in_plates(guide: Any) -> list[str]:
    """Those of a guide's sites that may be latent in plates; of guides that keep nothing of their sites all."""
    nodes = {} if guide.prototype_trace is None else guide.prototype_trace.nodes
    return [name for name, site in nodes.items() if not site or _is_in_plate(site)]


def _is_in_plate(site: Site) -> bool:
    sampled = site["type"] == "sample" and not site_is_subsample(site)
    return sampled and not site["is_observed"] and any(frame.vectorized for frame in site["cond_indep_stack"])


@torch.enable_grad()  # some models take derivatives themselves
def _run(model: Callable[..., Any], batch: Batch, shift: int = 0, values: Any = None) -> Sites:
    with (
        local_parameters(),
        poutine.block(),
        torch.random.fork_rng(devices=()),
        pyro.validation_enabled(False),
    ):
        torch.manual_seed(0)  # latents outside the rows are the same in every run
        return run_model(model, batch, values, shift=shift)


def _takes_rows(sites: Sites, shifted: Sites) -> bool:
    """Whether the model takes those rows of its arguments that the plate chose."""
    observed = {name: s for name, s in sites.items() if s["is_observed"] and not is_deterministic(s)}
    try:
        return not all(says_same(site, shifted[name]) for name, site in observed.items())
    except (KeyError, *FAILURES):
        return True
