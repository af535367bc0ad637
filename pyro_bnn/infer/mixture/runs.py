# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Draws of the components of a guide, and runs of the model under them: of all at once, or of one."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor

from pyro_bnn.infer.autoguide.mixture import AutoMixture
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.model.handlers import CollectMessenger, Site, SubstituteMessenger, sample_sites
from pyro_bnn.nn.folding import rows_per_example, split_batch
from pyro_bnn.nn.sites import SITE_KEY, layer_priors

COMPONENT_PLATE = "_components"
PARTICLE_PLATE = "_mixture_particles"
PLATES = {COMPONENT_PLATE, PARTICLE_PLATE}


@dataclass
class Step:
    """
    What one evaluation of the bound is about.

    :ivar mixtures: the mixtures in the guide.
    :ivar points: the sites of Pyro's point estimates in the guide.
    :ivar K: number of components.
    :ivar S: draws per component.
    :ivar nesting: number of plate dimensions of the model.
    :ivar likelihood: see :class:`~pyro_bnn.infer.Mixture_ELBO`.
    :ivar kl: see :class:`~pyro_bnn.infer.Mixture_ELBO`.
    :ivar entropy: whether the entropy of the guide is needed.
    :ivar split: whether every component sees its own part of the batch.
    :ivar direct: whether the draws are taken from the guide's parameters without calling it.
    :ivar antithetic: whether the noise of the second half of the draws is minus that of the first.
    """

    model: Any
    guide: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mixtures: list[AutoMixture]
    points: set[str]
    K: int
    S: int
    nesting: int
    likelihood: str
    kl: str
    entropy: bool
    split: bool
    direct: bool
    antithetic: bool = False

    @property
    def dim(self) -> int:
        """The batch dimension of the components."""
        return -self.nesting - 1

    @property
    def mixes(self) -> bool:
        """Whether the likelihood is that of a mixture over components; with one of them it is the average."""
        return self.likelihood == "log_mixture" and self.K > 1

    @property
    def is_single(self) -> bool:
        """Whether one draw of the guide is all: then the guide runs without plates of components."""
        return self.S == 1 and not self.split and all(m.is_single for m in self.mixtures)

    @property
    def per_example(self) -> bool:
        """Whether factors have a value per example."""
        return any(mixture.noise == "per_example" for mixture in self.mixtures)

    def of_one(self) -> "Step":
        """The same for one draw of one component, whose likelihood and divergence are those of a mixture of one."""
        return replace(self, K=1, S=1, kl="mean", likelihood="average", antithetic=False)

    def guide_trace(
        self, component: int | None = None, frozen: Mapping[str, Tensor] = {}, mirrored: bool = False
    ) -> Trace:
        """
        Calls the guide for all components in their plates, or for one without a dimension of components; a value per
        example, which needs one, has a component dimension of size 1. ``frozen`` are the rows that plates take;
        ``mirrored`` turns the noise of a single draw round.
        """
        plated = not self.is_single if component is None else self.per_example
        S, K = (self.S, self.K) if component is None else (1, 1)
        mirrored = self.antithetic if component is None else mirrored
        with ExitStack() as stack:
            for mixture in self.mixtures:
                stack.enter_context(mixture.stratified(self.dim if plated else None, S, component, mirrored))
            stack.enter_context(self.layout(split=component is None))
            stack.enter_context(SubstituteMessenger(frozen))
            trace = stack.enter_context(poutine.trace())
            if plated and S > 1:
                stack.enter_context(pyro.plate(PARTICLE_PLATE, S, dim=self.dim - 1))
            if plated:
                stack.enter_context(pyro.plate(COMPONENT_PLATE, K, dim=self.dim))
            self.guide(*self.args, **self.kwargs)
        for name in PLATES & trace.trace.nodes.keys():  # the model has no such plates
            trace.trace.remove_node(name)
        return trace.trace

    def model_trace(self, values: Mapping[str, Tensor], *, together: bool = False) -> Trace:
        """Runs the model under values of its sites, of one draw of one component or of all ``together``."""
        with self.layout(split=together), poutine.trace() as trace, SubstituteMessenger(values):
            self.model(*self.args, **self.kwargs)
        return trace.trace

    @contextmanager
    def layout(self, split: bool = True) -> Iterator[None]:
        """Tells networks what the dimensions of their sites mean."""
        with ExitStack() as stack:
            stack.enter_context(rows_per_example(self.per_example))
            if self.split and split:
                stack.enter_context(split_batch())
            yield


class JointRun:
    """
    All components at once: their draws, taken from the parameters of the guide or by calling it, and one run of the
    model under them.

    :param step: the evaluation.
    :ivar values: by site of the guide, its value.
    :ivar sites: the nodes of the model.
    """

    values: dict[str, Tensor]
    sites: dict[str, Site]

    def __init__(self, step: Step) -> None:
        self.step = step
        self.frozen: dict[str, Tensor] = {}  # by plate, the rows that the guide took

    @property
    def layers(self) -> Mapping[str, Any]:
        """By site of a layer of this package, the prior that the layer has for it."""
        return layer_priors(self.sites)

    def draw(self) -> dict[str, Tensor]:
        """The values of the guide's sites."""
        step = self.step
        if step.direct:
            points = {site.name: value for site, value in step.guide.point_values()}
            drawn = step.guide.draw(self._nesting, step.S, step.args, step.kwargs, step.antithetic)
            self.values = points | drawn
        else:
            trace = step.guide_trace()
            self._nodes, self.frozen = sample_sites(trace), subsamples(trace)
            self.values = {name: node["value"] for name, node in self._nodes.items()}
        return self.values

    @property
    def _nesting(self) -> int | None:
        return None if self.step.is_single else self.step.nesting

    def guide_sites(self, without: Collection[str] = ()) -> dict[str, Site]:
        """The nodes of the guide but for some, in its order."""
        step = self.step
        if not step.direct:
            return {name: node for name, node in self._nodes.items() if name not in without}
        nodes: dict[str, Site] = {}
        if all(site.name in without for site in step.guide.sites):
            return nodes
        blocks: list[Any] = [(site, value, None) for site, value in step.guide.point_values()]
        for site, loc, scale in [*blocks, *step.guide._blocks()]:
            if site.name in without:
                continue
            value = self.values[site.name]
            if scale is None:
                fn = dist.Delta(value, event_dim=site.event_dim)
            else:
                fn = step.guide.site_distribution(site, loc, scale, self._nesting)
                fn = fn.expand(torch.Size((step.S, *fn.batch_shape))) if step.S > 1 else fn
            nodes[site.name] = _site(fn, value, {"kind": site.kind, "role": site.role})
        return nodes

    def run(
        self, values: Mapping[str, Tensor] | None = None, frozen: Mapping[str, Tensor] | None = None
    ) -> dict[str, Site]:
        """The nodes of the model, under other values of the same shapes and rows of plates if they are given."""
        step = self.step
        self.values = {**self.values, **(values or {})}
        given = {**self.values, **self.frozen, **(frozen or {})}
        with step.layout(), CollectMessenger(given) as collected:
            step.model(*step.args, **step.kwargs)
        self.sites = collected.sites
        return self.sites


def _site(fn: Any, value: Tensor, hint: Mapping[str, Any]) -> Site:
    """A node as a trace would have it."""
    return {"fn": fn, "value": value, "infer": {SITE_KEY: hint}, "args": (), "kwargs": {}, "scale": 1.0, "mask": None,
            "is_observed": False, "cond_indep_stack": ()}  # fmt: skip


def subsamples(trace: Trace) -> dict[str, Tensor]:
    """By plate, the rows that it took."""
    known = sample_sites(trace)
    nodes: dict[str, Site] = dict(trace.nodes.items())
    return {n: s["value"] for n, s in nodes.items() if s["type"] == "sample" and n not in known}


@contextmanager
def rehearsal(model: Any) -> Iterator[None]:
    """
    Runs of a model that leave no trace: no handler outside hears of them, random numbers and statistics of batches stay
    where they were; its modules are in evaluation mode meanwhile.
    """
    state = get_rng_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with poutine.block(), torch.random.fork_rng(devices), evaluation_mode(model):
            yield
    finally:
        set_rng_state(state)
