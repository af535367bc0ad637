# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The divergence and the log prior of many sites with constant priors, in a few operations on long vectors."""

import math
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Cauchy, LogNormal, Normal

from pyro_bnn.infer.autoguide.components import LatentSite, is_real
from pyro_bnn.infer.autoguide.joint_draws import Span, columns, spans_of
from pyro_bnn.infer.autoguide.mixture import AutoMixture
from pyro_bnn.nn.priors import unwrap

_PLAIN = (Normal, LogNormal, Cauchy, dist.Normal, dist.LogNormal, dist.Cauchy)


def normal_divergence(loc: Tensor, scale: Tensor, loc_0: Tensor, scale_0: Tensor) -> Tensor:
    r"""
    :math:`\mathrm{KL}(N(\mu, \sigma^2) \| N(\mu_0, \sigma_0^2))`, summed over all elements.

    :param loc: :math:`\mu`.
    :param scale: :math:`\sigma`.
    :param loc_0: :math:`\mu_0`.
    :param scale_0: :math:`\sigma_0`.
    :return: a scalar.
    """
    ratio = scale / scale_0
    distance = (loc - loc_0) / scale_0
    flat, apart = ratio.flatten(), distance.flatten()
    return 0.5 * (flat.dot(flat) + apart.dot(apart) - ratio.numel()) - ratio.log().sum()


def cauchy_divergence(loc: Tensor, scale: Tensor, loc_0: Tensor, scale_0: Tensor) -> Tensor:
    """
    The closed form of Chyzak and Nielsen (2019) for two Cauchy distributions, summed over all elements.

    :param loc: location.
    :param scale: scale.
    :param loc_0: location of the second.
    :param scale_0: scale of the second.
    :return: a scalar.
    """
    squares = (scale + scale_0).square() + (loc - loc_0).square()
    return (squares / (4.0 * scale * scale_0)).log().sum()


def _log_normal_density(rows: int, value: Tensor, loc: Tensor, scale: Tensor, log_scale: Tensor) -> Tensor:
    """Sum of the log densities of independent Normals; ``log_scale`` is the sum for one of the rows of values."""
    z = ((value - loc) / scale).flatten()
    return -0.5 * z.dot(z) - rows * log_scale - 0.5 * math.log(2 * math.pi) * value.numel()


class JointTerms:
    """
    The terms of those sites of a mixture whose prior is one constant distribution.

    :param guide: the mixture.
    :param priors: by site, the prior of the model.
    :ivar priors: those that this object covers: Normal and Delta components under Normal, LogNormal components under
        LogNormal, Cauchy components under Cauchy priors, none of them with parameters.
    """

    def __init__(self, guide: AutoMixture, priors: Mapping[str, Any]) -> None:
        self.sites = guide.sites
        self.priors: dict[str, Any] = {}
        self._tensors: list[tuple[Tensor, int]] = []
        self._divergences: list[tuple[Callable[..., Tensor], list[Span], Tensor, Tensor]] = []
        self._points: list[tuple[str, Tensor, Tensor, Tensor]] = []
        self._deltas: tuple[list[Span], Tensor, Tensor, Tensor] | None = None
        families: dict[str, list[LatentSite]] = {"normal": [], "cauchy": [], "delta": []}
        for site in guide._mixed:
            family = _family(site, priors.get(site.name))
            if family:
                families[family].append(site)
        for family, divergence in (("normal", normal_divergence), ("cauchy", cauchy_divergence)):
            if families[family]:
                spans, loc, scale = self._pack(guide, families[family], priors)
                self._divergences.append((divergence, spans, loc, scale))
        if families["delta"]:
            spans, loc, scale = self._pack(guide, families["delta"], priors)
            self._deltas = spans, loc, scale, scale.log().sum()
        for site in guide.sites:
            prior = priors.get(site.name)
            if site.kind == "point" and _family(site, prior):
                loc, scale = self._moments(site, prior)
                self._points.append((site.name, loc, scale, scale.expand(site.shape).log().sum()))

    def _moments(self, site: LatentSite, prior: Any) -> tuple[Tensor, Tensor]:
        """Location and scale of a prior, as scalars if they are the same for all elements."""
        base = unwrap(prior)
        self.priors[site.name] = prior
        moments = []
        for t in (base.loc, base.scale):
            self._tensors.append((t, t._version))
            moments.append(t[(0,) * t.dim()] if not any(t.stride()) else t)
        return moments[0], moments[1]

    def _pack(
        self, guide: AutoMixture, sites: list[LatentSite], priors: Mapping[str, Any]
    ) -> tuple[list[Span], Tensor, Tensor]:
        moments = [self._moments(site, priors[site.name]) for site in sites]
        shapes = [site.shape for site in sites]
        loc, scale = (
            torch.cat([m[i].expand(shape).reshape(-1) for m, shape in zip(moments, shapes, strict=True)])
            for i in (0, 1)
        )
        return spans_of(guide._mixed, sites), loc, scale

    def is_current(self, guide: AutoMixture) -> bool:
        """
        :param guide: the mixture.
        :return: whether neither the guide was initialised again nor a prior changed in place.
        """
        return self.sites is guide.sites and all(t._version == version for t, version in self._tensors)

    def evaluate(self, guide: AutoMixture) -> tuple[Tensor | float, Tensor | float]:
        """
        The terms at the present parameters.

        :param guide: the mixture.
        :return: the divergence, averaged over components, and the log prior of the point estimates, likewise.
        """
        K = guide.num_components
        kl: Tensor | float = 0.0
        log_prior: Tensor | float = 0.0
        loc: Any = guide.loc if self._divergences or self._deltas else None
        scale: Any = guide._full_scale() if self._divergences else None
        for divergence, spans, loc_0, scale_0 in self._divergences:
            kl = kl + divergence(columns(loc, spans), columns(scale, spans), loc_0, scale_0) / K
        if self._deltas is not None:
            spans, *prior = self._deltas
            log_prior = log_prior + _log_normal_density(K, columns(loc, spans), *prior) / K
        for name, *prior in self._points:
            value = attrgetter(name)(guide.points)
            log_prior = log_prior + _log_normal_density(1, value, *prior)
        return kl, log_prior


def constant_priors(
    model_sites: Mapping[str, Any], seen: Mapping[str, Any], plates: set[str]
) -> dict[str, Any]:
    """
    The priors of the sites that layers of this package read outside of plates, scales and masks of the model.

    :param model_sites: the sites of the model.
    :param seen: by site, the prior that a layer gave it.
    :param plates: plates that do not count.
    :return: priors by site.
    """
    found = {}
    for name, prior in seen.items():
        site = model_sites[name]
        frames = {frame.name for frame in site["cond_indep_stack"]}
        unscaled = not isinstance(site["scale"], Tensor) and site["scale"] == 1.0 and site["mask"] is None
        if unscaled and frames <= plates:
            found[name] = prior
    return found


def _family(site: LatentSite, prior: Any) -> str:
    """How a site is treated; empty if not here."""
    base = unwrap(prior)
    # a subclass may mean something else
    if type(base) not in _PLAIN or base.loc.requires_grad or base.scale.requires_grad:
        return ""
    if site.kind == "lognormal" and isinstance(base, LogNormal):
        return "normal"
    if not is_real(site.support):
        return ""
    if site.kind == "cauchy" and isinstance(base, Cauchy):
        return "cauchy"
    if isinstance(base, Normal):
        return {"normal": "normal", "delta": "delta", "point": "delta"}.get(site.kind, "")
    return ""
