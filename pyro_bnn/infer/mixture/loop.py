# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The bound of a mixture as what it is by definition: the components one after the other, each with its own run."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_bnn.infer.mixture.check import check_latents
from pyro_bnn.infer.mixture.runs import Step, component_draw, component_run, subsamples
from pyro_bnn.infer.mixture.terms import SiteTerms, information, one_draw, scaled_sites
from pyro_bnn.model.handlers import Site, is_deterministic, log_prob_of, sample_sites
from pyro_bnn.nn.sites import SITE_KEY


class ComponentLoop:
    """
    Draws every component by itself, and runs the model under each draw: for models that cannot take all components in
    one run. The components see the same rows of plates that subsample.

    :param step: the evaluation.
    :param str likelihood: see :class:`~pyro_bnn.infer.Mixture_ELBO`.
    :param str kl: see :class:`~pyro_bnn.infer.Mixture_ELBO`.
    :param bool want_entropy: whether the entropy of the guide is needed.
    :param points: sites whose guide is a point estimate of another kind.
    :ivar kl: the divergence, before scaling.
    :ivar log_prior: log prior density of the point estimates.
    :ivar entropy: of the guide, if it is wanted.
    :ivar likelihood: the likelihood term.
    :ivar values: by site, the last draw.
    :ivar model_sites: the nodes of the last run of the model.
    :ivar layers: the sites of layers of this package.
    """

    def __init__(
        self, step: Step, likelihood: str, kl: str, want_entropy: bool, points: Collection[str]
    ) -> None:
        self.step, self.want_entropy, self.points = step, want_entropy, points
        self.mixes = likelihood == "log_mixture" and step.K > 1
        self.kl: Any = 0.0
        self.log_prior: Any = 0.0
        self.entropy: Any = 0.0
        self.likelihood: Any = 0.0
        self.values: dict[str, Tensor] = {}
        self.model_sites: dict[str, Site] = {}
        draws: list[dict[str, Tensor]] = []
        pointwise: list[list[tuple[Any, Tensor]]] = []
        frozen: dict[str, Tensor] = {}
        for index in range(step.S * step.K):
            guide_sites = self._run(index % step.K, frozen)
            self.values = {name: site["value"] for name, site in guide_sites.items()}
            draws.append(self._scaled_values(guide_sites))
            pointwise.append(self._observe())
        self.layers = {
            n for n, site in self.model_sites.items() if site["infer"].get(SITE_KEY, {}).get("role")
        }
        if kl == "sum":
            self.kl = self.kl * step.K
        if kl == "exact" and step.K > 1:
            shared = information(step.mixtures, {n: self._stack([d[n] for d in draws]) for n in draws[0]})
            self.kl, self.entropy = self.kl - shared, self.entropy + shared
        self._add_mixed(pointwise)

    def _run(self, k: int, frozen: dict[str, Tensor]) -> dict[str, Site]:
        """One component; adds its terms and returns the nodes of its guide."""
        step = self.step
        guide_trace = component_draw(step, k, frozen)
        frozen.update(subsamples(guide_trace))
        model_trace = component_run(step, frozen, guide_trace)
        frozen.update(subsamples(model_trace))
        self.model_sites, guide_sites = sample_sites(model_trace), sample_sites(guide_trace)
        check_latents(self.model_sites, guide_sites)
        terms = SiteTerms("mean", self.want_entropy, 1, step.mixtures, 1, step.nesting, self.points)
        terms.collect(self.model_sites, guide_sites)
        runs = step.S * step.K
        self.kl = self.kl + terms.kl / runs
        self.log_prior = self.log_prior + terms.log_prior / runs
        self.entropy = self.entropy + terms.entropy / runs
        return guide_sites

    def _observe(self) -> list[tuple[Any, Tensor]]:
        """Adds the likelihood of the last run, or returns scales and densities by example for a mixture over components."""
        pointwise: dict[Any, tuple[Any, Tensor]] = {}
        for name, site in self.model_sites.items():
            if not site["is_observed"] or is_deterministic(site):
                continue
            log_prob = log_prob_of(site)
            if not self.mixes:
                total = scale_and_mask(log_prob, site["scale"], site["mask"]).sum()
                self.likelihood = self.likelihood + total / (self.step.S * self.step.K)
                continue
            if self.step.nesting and not log_prob.dim():
                raise ValueError(OUTSIDE.format(name=name))
            key, log_prob = example_key(log_prob, site)
            both = log_prob if key not in pointwise else pointwise[key][1] + log_prob
            pointwise[key] = site["scale"], both
        return list(pointwise.values())

    def _add_mixed(self, pointwise: list[list[tuple[Any, Tensor]]]) -> None:
        for group in zip(*pointwise, strict=True):
            mixed = self._stack([log_prob for _, log_prob in group]).logsumexp(1) - math.log(self.step.K)
            self.likelihood = self.likelihood + (group[0][0] * mixed).sum() / self.step.S

    def _scaled_values(self, guide_sites: Mapping[str, Site]) -> dict[str, Tensor]:
        sites = scaled_sites(self.step.mixtures)
        return {s.name: one_draw(guide_sites[s.name], s, self.step.nesting).reshape(s.shape) for s in sites}

    def _stack(self, draws: list[Tensor]) -> Tensor:
        return torch.stack(draws).unflatten(0, (self.step.S, self.step.K))


#: Where the log-mixture likelihood finds an observation that belongs to no example.
OUTSIDE = "observed site {name!r} has no component dimension: the log-mixture likelihood needs it inside the data plate."


def example_key(log_prob: Tensor, site: Site) -> tuple[Any, Tensor]:
    """
    Sites that share their plates describe the same examples, so they share the component too.

    :param log_prob: the log density of an observed site, by entry.
    :param site: its node.
    :return: what such sites have in common, and the log density with its masked entries at zero.
    """
    scale = site["scale"]
    key = tuple(log_prob.shape), id(scale) if isinstance(scale, Tensor) else scale
    return key, scale_and_mask(log_prob, 1.0, site["mask"])
