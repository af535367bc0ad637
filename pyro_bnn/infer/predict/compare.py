# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Whether a model says the same under draws that run together as under each of them alone."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_bnn.infer.predict.structure import Sites, predicted_names
from pyro_bnn.model.data import Batch, leaves
from pyro_bnn.model.dispatch import Watch
from pyro_bnn.model.handlers import is_factor, unscaled_log_prob
from pyro_bnn.model.plates import FAILURES, close, dims_of, first_line, rows_of, site_shape

if TYPE_CHECKING:
    from pyro_bnn.infer.predict.runs import ModelRunner

#: The numbers of draws whose joint run may be compared with single runs: the first that is no size of the data or a site,
#: with which the dimension of the draws could be confused.
PAIR, OTHERS = 2, (3, 5, 7, 11, 13)


class _Said(NamedTuple):
    """What single runs and a joint run say at a site, each ``(S,) + batch shape``; sizes below the floor are rounding."""

    what: str
    name: str
    singly: Tensor
    jointly: Tensor
    floor: float


def compare(runner: "ModelRunner", batch: Batch) -> tuple[str, float]:
    """How a joint run differs from single runs, empty if it does not; and the bytes that each draw takes."""
    first = runner.structure.sites
    size = min(_number(first, batch), runner.num_draws)
    try:
        with pyro.validation_enabled(False):  # the first run was validated, the others are compared with it
            singles = [first] + [runner.single(batch, i) for i in range(1, size)]
            with Watch(runner.draws.values()) as watch:
                joint, plain = runner.joint(batch, slice(0, size))
            if watch.where:
                return watch.reason, 0.0
            error = _difference(runner, batch, singles, joint)
    except FAILURES as failure:
        return first_line(failure), 0.0
    return error, plain + watch.total / size


def _number(sites: Sites, batch: Batch) -> int:
    """How many draws a comparison takes."""
    sizes = {n for leaf in leaves(batch).values() for n in (rows_of(leaf, d) for d in dims_of(leaf))}
    sizes |= {n for site in sites.values() for n in site_shape(site)}
    return next((n for n in (PAIR, *OTHERS) if n not in sizes), PAIR)


def _said(runner: "ModelRunner", singles: Sequence[Sites], joint: Sites) -> Iterator[_Said]:
    """The densities of predicted sites at the same values, those of factors, and the values that are read."""
    first, structure = singles[0], runner.structure
    everywhere = [name for name in first if name in joint and all(name in sites for sites in singles)]
    predicted = set(predicted_names(first, runner.draws))
    for name in everywhere:
        if name in predicted or is_factor(first[name]):
            shared = {} if is_factor(first[name]) else {"value": first[name]["value"]}
            terms = [unscaled_log_prob({**sites[name], **shared}) for sites in singles]
            found = structure.align(name, unscaled_log_prob({**joint[name], **shared}))
            yield _Said("density", name, torch.stack(terms), found, 1.0)
    for name in everywhere:
        if name in runner.values:
            values = torch.stack([sites[name]["value"] for sites in singles])
            found = structure.align(*structure.value_reading(name, joint[name]))
            yield _Said("value", name, values, found, 0.0)


def _difference(runner: "ModelRunner", batch: Batch, singles: list[Sites], joint: Sites) -> str:
    """
    How a joint run differs from single runs; empty if by rounding only. Where more than the last places differ, the first
    draw beside copies of itself shows what rounding does in this network: no mixing of draws shows there.
    """
    rounding: dict[tuple[str, str], float] = {}
    for what, name, singly, jointly, floor in _said(runner, singles, joint):
        if jointly.shape != singly.shape:
            return f"site {name!r} has shape {tuple(jointly.shape)} instead of {tuple(singly.shape)}"
        if close(singly, jointly, floor=floor):
            continue
        rounding = rounding or _rounding(runner, batch, len(singles))
        if not close(singly, jointly, tolerance=rounding.get((what, name), 0.0), floor=floor):
            return f"the {what} of site {name!r} depends on which draws run together"
    return ""


def _rounding(runner: "ModelRunner", batch: Batch, size: int) -> dict[tuple[str, str], float]:
    """By site, 30 times the relative difference of one draw alone and beside itself, within bounds."""
    twins, _ = runner.joint(batch, torch.zeros(size, dtype=torch.long))
    found = {}
    for what, name, singly, jointly, floor in _said(runner, [runner.structure.sites] * size, twins):
        finite = singly.isfinite() & jointly.isfinite()
        if singly.shape == jointly.shape and singly.is_floating_point() and finite.any():
            apart, scale = (float(x[finite].abs().max()) for x in (jointly - singly, singly))
            bound = 1e-6 if singly.dtype == torch.float64 else 1e-3
            found[what, name] = min(bound, 30 * apart / max(scale, floor, 1e-30))
    return found
