# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Draws that run together: whether a model says the same under them as under each alone, and how their values fit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bnn.infer.predict.draws import Draws
from pyro_bnn.model.data import Batch, leaves
from pyro_bnn.model.dispatch import Watch
from pyro_bnn.model.handlers import Site, base_distribution, is_deterministic, is_factor, unscaled_log_prob
from pyro_bnn.model.observations import is_validated
from pyro_bnn.model.plates import FAILURES, close, dims_of, first_line, rows_of, site_shape
from pyro_bnn.ops.notice import logger

if TYPE_CHECKING:
    from pyro_bnn.infer.predict.runs import ModelRunner

Key = TypeVar("Key")

#: What is read at a site: its name, a tensor shaped batch shape + rest, and the number of dims of the rest.
Reading = tuple[str, Tensor, int]

#: The sample sites of a run by name.
Sites = dict[str, Site]

#: Reads the sites of a run; also given is the shape of the draws in it, ``(S, 1, ..., 1)``, or ``()`` under one draw.
Reader = Callable[[Sites, torch.Size], dict[Key, Reading]]

#: The numbers of draws whose joint run may be compared with single runs: the first that is no size of the data or a site,
#: with which the dimension of the draws could be confused.
PAIR, OTHERS = 2, (3, 5, 7, 11, 13)


@dataclass
class Structure:
    """
    What runs under single draws showed of a model; a site need not be there in every batch.

    :ivar sites: the sites of these runs.
    :ivar ndims: the number of batch dimensions of each.
    :ivar nesting: the number of dimensions of the plates, at most.
    :ivar validated: the sites whose observations are held against the support.
    """

    sites: Sites = field(default_factory=dict)
    ndims: dict[str, int] = field(default_factory=dict)
    nesting: int = 0
    validated: set[str] = field(default_factory=set)

    def note(self, sites: Sites) -> None:
        """Adds the sites of a run."""
        self.validated |= {n for n in sites.keys() - self.sites.keys() if is_validated(sites[n])}
        self.sites |= sites
        self.ndims |= {name: len(site["fn"].batch_shape) for name, site in sites.items()}
        frames = [frame for site in sites.values() for frame in site["cond_indep_stack"]]
        depth = max((-frame.dim for frame in frames if frame.vectorized), default=0)
        self.nesting = max([self.nesting, depth, *self.ndims.values()])

    def lacks(self, sites: Sites) -> bool:
        """Whether there are sites that no run had before: those of some batches only."""
        return not sites.keys() <= self.sites.keys()

    def spread(self, name: str, value: Tensor) -> Tensor:
        """Draws ``(S,) + site shape`` with S left of all plates."""
        missing = self.nesting - self.ndims.get(name, 0)
        return value.reshape(value.shape[:1] + (1,) * missing + value.shape[1:])

    def align(self, name: str, value: Tensor, rest: int = 0) -> Tensor:
        """Removes the singleton dimensions between S and the batch shape from a value of a joint run."""
        own = self.ndims.get(name, 0) + rest
        return value.reshape(value.shape[:1] + (value.shape[value.dim() - own :] if own else ()))

    def value_reading(self, name: str, site: Site) -> Reading:
        """
        The value of a deterministic site. In a joint run one without a dimension for the draws is taken for one that does
        not depend on them; that it does not is what the comparison with single runs finds out.
        """
        value, batch = site["value"], site["fn"].batch_shape
        own = self.sites[name]["value"].dim()
        if len(batch) > self.ndims[name] and value.dim() <= own:
            value = value.expand(batch[:1] + value.shape)
        return name, value, own - self.ndims[name]


def predicted_names(sites: Sites, draws: Draws) -> Iterator[str]:
    """
    The sites that draws do not fix: the observed ones, and those that a model called without observations
    samples in their place.
    """
    for name, site in sites.items():
        if name not in draws and not is_deterministic(site) and not is_factor(site):
            yield name


def undrawn(sites: Sites, draws: Draws) -> Iterator[str]:
    """The sites of which every run takes new draws: those without observations, and without draws."""
    for name in predicted_names(sites, draws):
        site = sites[name]
        if not site["is_observed"] and not isinstance(base_distribution(site["fn"]), dist.Delta):
            yield name


@dataclass
class Together:
    """
    Whether draws run together, and how many.

    :ivar on: ``None`` while it is not known.
    :ivar required: whether it is an error if they cannot.
    :ivar max_memory: bytes that the intermediate values of one run may take.
    :ivar number: of draws in one run; 0 while it is not known.
    """

    on: bool | None
    required: bool
    max_memory: float
    number: int = 0

    def decide(self, error: str) -> None:
        """Joint runs from now on, or after an error single ones; raises it if those are not wanted."""
        if error and self.required:
            raise ValueError(f"The model does not broadcast over posterior draws: {error}.")
        self.on = not error
        if error:
            logger.info("predictions: draws run through the model one by one: %s", error)
        else:
            logger.info("predictions: draws run through the model together; compared with single runs")

    def fit(self, per_draw: float) -> None:
        """Sets the number of draws from the bytes that one takes."""
        self.number = max(1, int(self.max_memory / max(per_draw, 1)))


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
                joint = runner.joint(batch, slice(0, size))
            if watch.where:
                return watch.reason, 0.0
            error = _difference(runner, batch, singles, joint)
    except FAILURES as failure:
        return first_line(failure), 0.0
    return error, watch.total / size


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
    twins = runner.joint(batch, torch.zeros(size, dtype=torch.long))
    found = {}
    for what, name, singly, jointly, floor in _said(runner, [runner.structure.sites] * size, twins):
        finite = singly.isfinite() & jointly.isfinite()
        if singly.shape == jointly.shape and singly.is_floating_point() and finite.any():
            apart, scale = (float(x[finite].abs().max()) for x in (jointly - singly, singly))
            bound = 1e-6 if singly.dtype == torch.float64 else 1e-3
            found[what, name] = min(bound, 30 * apart / max(scale, floor, 1e-30))
    return found
