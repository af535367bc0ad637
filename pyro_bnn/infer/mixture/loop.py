# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The bound of a mixture as what it is by definition: the components one after the other, each with its own run."""

from contextlib import nullcontext
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_bnn.infer.mixture.check import check_latents
from pyro_bnn.infer.mixture.runs import Step, subsamples
from pyro_bnn.infer.mixture.terms import Terms, observed, pointwise, scaled_values
from pyro_bnn.model.handlers import Site, sample_sites
from pyro_bnn.nn.sites import SITE_KEY
from pyro_bnn.ops.randomness import random_numbers_from, random_state


class ComponentLoop(Terms):
    """
    Draws every component by itself, and runs the model under each draw: for models that cannot take all components in
    one run. The components see the same rows of plates that subsample.

    :param step: the evaluation.
    :ivar values: by site, the last draw.
    :ivar layers: the sites of layers of this package.
    """

    def __init__(self, step: Step) -> None:
        super().__init__(step)
        draws: list[dict[str, Tensor]] = []
        points: list[dict[Any, tuple[Any, Tensor]]] = []
        frozen: dict[str, Tensor] = {}
        states: list[dict[str, Any]] = []  # of the random numbers, before each draw that has a mirror image
        for index in range(step.S * step.K):
            states.append(random_state(()) if step.antithetic else {})
            partner = index - step.S // 2 * step.K if step.antithetic else -1
            image = states[partner] if partner >= 0 else None
            model_sites, guide_sites = self._run(index % step.K, frozen, image)
            draws.append(scaled_values(step, guide_sites))
            if step.mixes:
                points.append(pointwise(model_sites, min(step.nesting, 1)))
        self.values = {name: site["value"] for name, site in guide_sites.items()}
        self.layers = {n for n, site in model_sites.items() if site["infer"].get(SITE_KEY, {}).get("role")}
        if step.kl == "sum":
            self.kl = self.kl * step.K
        if step.kl == "exact" and step.K > 1:
            self.share({name: self._stack([draw[name] for draw in draws]) for name in draws[0]})
        for group in zip(*(run.values() for run in points), strict=True):
            self.mix(group[0][0], self._stack([log_prob for _, log_prob in group]), 1)

    def _run(
        self, k: int, frozen: dict[str, Tensor], image: dict[str, Any] | None
    ) -> tuple[dict[str, Site], dict[str, Site]]:
        """
        One component: adds its terms and returns the nodes of model and guide. Its draw may be the mirror ``image`` of
        one that began at a state of the random numbers.
        """
        with nullcontext() if image is None else random_numbers_from(image):
            guide_trace = self.step.guide_trace(k, frozen, image is not None)
        frozen.update(subsamples(guide_trace))
        guide_sites = sample_sites(guide_trace)
        values = {name: site["value"] for name, site in guide_sites.items()}
        model_trace = self.step.model_trace({**values, **frozen})
        frozen.update(subsamples(model_trace))
        model_sites = sample_sites(model_trace)
        check_latents(model_sites, guide_sites)
        terms = Terms(self.step.of_one())
        terms.collect(model_sites, guide_sites)
        for _, log_prob, site in observed(model_sites) if not self.step.mixes else ():
            terms.likelihood = terms.likelihood + scale_and_mask(log_prob, site["scale"], site["mask"]).sum()
        runs = self.step.S * self.step.K
        self.kl = self.kl + terms.kl / runs
        self.log_prior = self.log_prior + terms.log_prior / runs
        self.entropy = self.entropy + terms.entropy / runs
        self.likelihood = self.likelihood + terms.likelihood / runs
        return model_sites, guide_sites

    def _stack(self, draws: list[Tensor]) -> Tensor:
        return torch.stack(draws).unflatten(0, (self.step.S, self.step.K))
