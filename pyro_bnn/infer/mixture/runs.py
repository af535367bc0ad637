# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Draws of the components of a guide, and runs of the model under them: of all at once, or of one."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor

from pyro_bnn.infer.autoguide.mixture import AutoMixture
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.model.handlers import CollectMessenger, Site, SubstituteMessenger, sample_sites
from pyro_bnn.nn.folding import rows_per_example, split_batch
from pyro_bnn.nn.priors import unwrap
from pyro_bnn.nn.sites import SITE_KEY, SilentSites, silent_sites

COMPONENT_PLATE = "_components"
PARTICLE_PLATE = "_mixture_particles"
PLATES = {COMPONENT_PLATE, PARTICLE_PLATE}


@dataclass
class Step:
    """
    What one evaluation of the bound is about.

    :ivar mixtures: the mixtures in the guide.
    :ivar K: number of components.
    :ivar S: draws per component.
    :ivar nesting: number of plate dimensions of the model.
    :ivar split: whether every component sees its own part of the batch.
    """

    model: Any
    guide: Any
    mixtures: list[AutoMixture]
    K: int
    S: int
    nesting: int
    split: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def dim(self) -> int:
        """The batch dimension of the components."""
        return -self.nesting - 1

    @property
    def is_single(self) -> bool:
        """Whether one draw of the guide is all: then model and guide run without plates of components."""
        return self.S == 1 and not self.split and all(m.is_single for m in self.mixtures)

    @property
    def per_example(self) -> bool:
        """Whether factors have a value per example."""
        return any(mixture.noise == "per_example" for mixture in self.mixtures)

    def in_plates(self, fn: Callable[..., Any], S: int, K: int) -> Callable[..., Any]:
        """A model or guide inside plates of particles and components."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                if S > 1:
                    stack.enter_context(pyro.plate(PARTICLE_PLATE, S, dim=self.dim - 1))
                stack.enter_context(pyro.plate(COMPONENT_PLATE, K, dim=self.dim))
                return fn(*args, **kwargs)

        return run

    @contextmanager
    def layout(self) -> Iterator[None]:
        """Tells networks what the dimensions of their sites mean."""
        with ExitStack() as stack:
            stack.enter_context(rows_per_example(self.per_example))
            if self.split:
                stack.enter_context(split_batch())
            yield


class TracedRun:
    """
    All components at once, in plates, under traces.

    :param step: the evaluation.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.guide_trace = Trace()
        self.silent = SilentSites({}, {})

    def draw(self) -> dict[str, Tensor]:
        """Calls the guide; the values of its sites."""
        step = self.step
        with ExitStack() as stack:
            for mixture in step.mixtures:
                stack.enter_context(mixture.stratified(None if step.is_single else step.dim, step.S))
            stack.enter_context(step.layout())
            guide = step.guide if step.is_single else step.in_plates(step.guide, step.S, step.K)
            self.guide_trace = poutine.trace(guide).get_trace(*step.args, **step.kwargs)
        self.values = {name: site["value"] for name, site in self.guide_sites().items()}
        return self.values

    def guide_sites(self, without: Collection[str] = ()) -> dict[str, Site]:
        """The nodes of the guide but for some."""
        return {n: site for n, site in sample_sites(self.guide_trace).items() if n not in without}

    @property
    def layers(self) -> Mapping[str, Any]:
        """By site of a layer of this package, the prior that the layer has for it."""
        return self.silent.seen

    def restore(self) -> None:
        """All sites of the model are there."""

    @property
    def guide_subsamples(self) -> dict[str, Tensor]:
        """By plate, the rows that the guide took."""
        return subsamples(self.guide_trace)

    def run(
        self, values: Mapping[str, Tensor] | None = None, frozen: Mapping[str, Tensor] | None = None
    ) -> dict[str, Site]:
        """
        The nodes of the model.

        :param values: values of the same shapes in place of those that were drawn.
        :param frozen: subsample indices.
        """
        step = self.step
        for name, value in (values or {}).items():
            self.guide_trace.nodes[name]["value"] = value
        model = step.model if step.is_single else step.in_plates(step.model, step.S, step.K)
        with step.layout(), silent_sites({}, {}) as self.silent:
            replayed = poutine.replay(SubstituteMessenger(frozen or {})(model), trace=self.guide_trace)
            self.model_trace = poutine.trace(replayed).get_trace(*step.args, **step.kwargs)
        self.sites = sample_sites(self.model_trace)
        return self.sites

    def traces(self) -> tuple[Trace, Trace]:
        """Traces of the model and the guide without subsample sites."""
        return prune_subsample_sites(self.model_trace), prune_subsample_sites(self.guide_trace)


class DirectRun:
    """
    All components at once, the draws taken from the guide's parameters without calling it.

    :param step: the evaluation, of a guide that is one mixture of independent sites.
    :param priors: by site, the constant priors of those that layers may read without a sample statement.
    """

    def __init__(self, step: Step, priors: Mapping[str, Any]) -> None:
        self.step, self.priors = step, priors
        self.guide: AutoMixture = step.guide
        self.nesting = None if step.is_single else step.nesting
        self.lead = (step.S,) if step.S > 1 else ()
        self.silent = SilentSites({}, {})

    def draw(self) -> dict[str, Tensor]:
        """The values of the guide's sites."""
        step, guide = self.step, self.guide
        values = guide.draw(self.nesting, step.S, step.args, step.kwargs)
        self.blocks = {site.name: (site, loc, scale) for site, loc, scale in guide._blocks()}
        for name, (site, loc, scale) in self.blocks.items():
            if scale is None:
                value = unwrap(guide.site_distribution(site, loc, None, self.nesting)).v
                values[name] = value.expand(*self.lead, *value.shape) if self.lead else value
        self.points = {site.name: (site, fn) for site, fn in guide.point_distributions()}
        self.values = values | {name: fn.v for name, (_, fn) in self.points.items()}
        return self.values

    guide_subsamples: Mapping[str, Tensor] = {}

    def run(
        self, values: Mapping[str, Tensor] | None = None, frozen: Mapping[str, Tensor] | None = None
    ) -> dict[str, Site]:
        """See :meth:`TracedRun.run`."""
        self.values = {**self.values, **(values or {})}
        with (
            self.step.layout(),
            CollectMessenger({**self.values, **(frozen or {})}) as collected,
            silent_sites(self.values, self.priors) as self.silent,
        ):
            self.step.model(*self.step.args, **self.step.kwargs)
        self.sites = collected.sites
        return self.sites

    @property
    def layers(self) -> Mapping[str, Any]:
        """See :class:`TracedRun`."""
        return self.silent.seen

    def restore(self) -> None:
        """Adds the nodes of the sites that layers read without a statement."""
        for name in self.silent.taken:
            self.sites[name] = _site(self.priors[name], self.values[name], {})

    def guide_sites(self, without: Collection[str] = ()) -> dict[str, Site]:
        """The nodes of the guide but for some, in its order."""
        sites = {}
        for name in (n for n in (*self.points, *self.blocks) if n not in without):
            if name in self.points:
                site, fn = self.points[name]
            else:
                site, loc, scale = self.blocks[name]
                fn = self.guide.site_distribution(site, loc, scale, self.nesting)
                fn = fn.expand(torch.Size((*self.lead, *fn.batch_shape))) if self.lead else fn
            sites[name] = _site(fn, self.values[name], {"kind": site.kind, "role": site.role})
        return sites


def _site(fn: Any, value: Tensor, hint: dict[str, Any]) -> Site:
    """A node as a trace would have it."""
    return {"fn": fn, "value": value, "infer": {SITE_KEY: hint}, "args": (), "kwargs": {}, "scale": 1.0, "mask": None,
            "is_observed": False, "cond_indep_stack": ()}  # fmt: skip


def component_draw(step: Step, k: int, frozen: Mapping[str, Tensor]) -> Trace:
    """
    Calls the guide for one component, without a dimension of components; a value per example, which needs one, has
    a component dimension of size 1.

    :param step: the evaluation.
    :param k: the component.
    :param frozen: subsample indices.
    :return: the trace.
    """
    with ExitStack() as stack:
        for mixture in step.mixtures:
            stack.enter_context(mixture.stratified(step.dim if step.per_example else None, component=k))
        stack.enter_context(rows_per_example(step.per_example))
        guide = step.in_plates(step.guide, 1, 1) if step.per_example else step.guide
        return poutine.trace(SubstituteMessenger(frozen)(guide)).get_trace(*step.args, **step.kwargs)


def component_run(
    step: Step, values: Mapping[str, Tensor], guide_trace: Trace | None = None, plated: bool | None = None
) -> Trace:
    """
    Runs the model under one draw of one component.

    :param step: the evaluation.
    :param values: by site, what the model must not draw.
    :param guide_trace: a trace of :func:`component_draw` that the model replays.
    :param plated: whether there is a dimension of components, by default where :func:`component_draw` has one.
    :return: the trace.
    """
    plated = step.per_example if plated is None else plated
    model = step.in_plates(step.model, 1, 1) if plated else step.model
    model = SubstituteMessenger(values)(model)
    if guide_trace is not None:
        model = poutine.replay(model, trace=guide_trace)
    with rows_per_example(plated):
        return poutine.trace(model).get_trace(*step.args, **step.kwargs)


def subsamples(trace: Trace) -> dict[str, Tensor]:
    """
    :param trace: a trace.
    :return: by plate, the rows that it took.
    """
    nodes: dict[str, Site] = dict(trace.nodes.items())
    found = (n for n, s in nodes.items() if s["type"] == "sample" and isinstance(s["fn"], _Subsample))
    return {name: nodes[name]["value"] for name in found}


@contextmanager
def rehearsal(model: Any) -> Iterator[None]:
    """
    Runs of a model that leave no trace: no handler outside hears of them, random numbers and statistics of batches stay
    where they were.

    :param model: the model, whose modules are in evaluation mode meanwhile.
    """
    state = get_rng_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with poutine.block(), torch.random.fork_rng(devices), evaluation_mode(model):
            yield
    finally:
        set_rng_state(state)
