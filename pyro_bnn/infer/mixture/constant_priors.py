# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The divergence and the log prior of many sites with constant priors, in a few operations on long vectors."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.infer.autoguide.component_parameters import columns, spans_of
from pyro_bnn.infer.autoguide.components import LatentSite
from pyro_bnn.infer.autoguide.mixture import AutoMixture
from pyro_bnn.nn.priors import unwrap
from pyro_bnn.nn.sites import layer_priors


class ConstantPriors:
    """
    The terms of those sites of a mixture whose prior is one distribution without parameters for which their family has
    a closed form.

    :param guide: the mixture.
    :param priors: by site that a layer of this package reads, see :func:`plain_layers`, the prior of the layer.
    :ivar priors: those that this object covers.
    """

    def __init__(self, guide: AutoMixture, priors: Mapping[str, Any]) -> None:
        self.sites = guide.sites
        covered = [site for site in guide.sites if site.name in priors and site.covers(priors[site.name])]
        self.priors = {site.name: priors[site.name] for site in covered}
        self._points = [site for site in covered if site.kind == "point"]
        groups: dict[Any, list[LatentSite]] = {}
        for site in guide._mixed:
            if site.name in self.priors:
                groups.setdefault(site.family.divergence if site.family.unit else None, []).append(site)
        self._groups = [(how, sites, spans_of(guide._mixed, sites)) for how, sites in groups.items()]

    def is_current(self, guide: AutoMixture, priors: Mapping[str, Any]) -> bool:
        """Whether guide and priors are still those that this object was made for."""
        return self.sites is guide.sites and all(priors.get(n) is p for n, p in self.priors.items())

    def evaluate(
        self, guide: AutoMixture, values: Mapping[str, Tensor]
    ) -> tuple[Tensor | float, Tensor | float]:
        """
        The divergence, averaged over components, and the log prior of the point estimates, likewise; ``values`` are those
        of the sites that components share.
        """
        K = guide.num_components
        kl: Tensor | float = 0.0
        log_prior: Tensor | float = 0.0
        all_loc: Any = guide.loc if self._groups else None
        all_scale: Any = guide._full_scale() if any(divergence for divergence, *_ in self._groups) else None
        for divergence, sites, spans in self._groups:
            at = columns(all_loc, spans)
            loc, scale = (torch.cat(moments) for moments in zip(*map(self._flat, sites), strict=True))
            if divergence is None:
                log_prior = log_prior + _log_density(at, loc, scale) / K
            else:
                kl = kl + divergence(at, columns(all_scale, spans), loc, scale) / K
        for site in self._points:
            base = unwrap(self.priors[site.name])
            density = _log_density(values[site.name], _scalar(base.loc), _scalar(base.scale))
            log_prior = log_prior + density
        return kl, log_prior

    def _flat(self, site: LatentSite) -> tuple[Tensor, Tensor]:
        base = unwrap(self.priors[site.name])
        return base.loc.reshape(-1), base.scale.reshape(-1)


def _scalar(t: Tensor) -> Tensor:
    """A scalar if all elements are the same number in memory."""
    return t if any(t.stride()) else t[(0,) * t.dim()]


def _log_density(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Sum of the log densities of independent Normals, whose parameters broadcast to the values."""
    z = ((value - loc) / scale).flatten()
    log_scale = scale.log().sum() * (value.numel() / scale.numel())
    return -0.5 * z.dot(z) - log_scale - 0.5 * math.log(2 * math.pi) * value.numel()


def plain_layers(sites: Mapping[str, Any]) -> dict[str, Any]:
    """The priors of those sites of layers that are outside of plates, scales and masks of the model."""

    def is_plain(site: Any) -> bool:
        unscaled = not isinstance(site["scale"], Tensor) and site["scale"] == 1.0 and site["mask"] is None
        return unscaled and not site["cond_indep_stack"]

    return {name: prior for name, prior in layer_priors(sites).items() if is_plain(sites[name])}
