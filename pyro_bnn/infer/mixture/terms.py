# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The terms of the bound of a mixture: likelihood, divergences, log priors, entropies."""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from pyro import distributions as dist
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from pyro_bnn.infer.autoguide.components import LatentSite
from pyro_bnn.infer.autoguide.mixture import AutoMixture
from pyro_bnn.infer.mixture.runs import Step
from pyro_bnn.model.handlers import Site, check_broadcast, is_deterministic, log_prob_of
from pyro_bnn.nn.hierarchical import closed_form_source
from pyro_bnn.nn.priors import unwrap
from pyro_bnn.nn.sites import SITE_KEY
from pyro_bnn.ops.families import is_known


def per_component(value: Tensor, num_particles: int, K: int, nesting: int) -> Tensor:
    """Sums a term of batch shape ``(S, K, *plates)``, or less on the left, over the plates of the model: ``(S, K)``."""
    if K == num_particles == 1:
        return value.sum().view(1, 1)
    shape = (num_particles, K) if value.dim() > nesting + 1 else (K,)
    if value.dim() < nesting + 1:
        value = value.expand(K, *(1,) * (nesting - value.dim()), *value.shape)
    total = value.flatten(value.dim() - nesting).sum(-1) if nesting else value
    return total.expand(shape).reshape(-1, K)


class Terms:
    """
    The terms of one evaluation.

    :param step: the evaluation.
    :ivar likelihood: the likelihood term.
    :ivar kl: the divergence, before scaling.
    :ivar log_prior: log prior density of the point estimates.
    :ivar entropy: of the guide, if it is wanted.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.likelihood: Any = 0.0
        self.kl: Any = 0.0
        self.log_prior: Any = 0.0
        self.entropy: Any = 0.0

    def add(self, kl: Any, log_prior: Any) -> None:
        """Adds a divergence and a log density of point estimates that are averages over the components."""
        self.kl = self.kl + (self.step.K if self.step.kl == "sum" else 1) * kl
        self.log_prior = self.log_prior + log_prior

    def observe(self, model_sites: Mapping[str, Site]) -> None:
        """Adds the likelihood of all observed sites."""
        step = self.step
        for name, log_prob, site in observed(model_sites):
            check_broadcast(name, log_prob.shape, step.nesting + 1 + (step.S > 1), "components")
            if not step.mixes:
                self.likelihood = self.likelihood + self._mean(log_prob, site)
        if step.mixes:
            for scale, log_prob in pointwise(model_sites, step.nesting + 1).values():
                self.mix(scale, log_prob, step.dim)

    def mix(self, scale: Any, log_prob: Tensor, dim: int) -> None:
        """Adds the likelihood of examples that are mixtures over the components in a dimension."""
        mixed = log_prob.logsumexp(dim) - math.log(self.step.K)
        self.likelihood = self.likelihood + (scale * mixed).sum() / self.step.S

    def collect(self, model_sites: Mapping[str, Site], guide_sites: Mapping[str, Site]) -> None:
        """Adds the divergences, log priors and entropies of all latent and auxiliary sites."""
        exact = self.step.kl == "exact" and self.step.K > 1
        has_auxiliary = not guide_sites.keys() <= model_sites.keys()
        for name, site in guide_sites.items():
            if name not in model_sites:
                log_q = self._mean(_log_prob(site), site)
                self.add(log_q, 0.0)
                if self.step.entropy:
                    self.entropy = self.entropy - log_q
                continue
            kind = site["infer"].get(SITE_KEY, {}).get("kind")
            if kind == "index":  # uniform in the model and in the guide
                continue
            prior = model_sites[name]
            point = kind in ("delta", "point") or name in self.step.points or not has_auxiliary
            if point and isinstance(unwrap(site["fn"]), Delta):
                shared = _shared_log_prob(prior) if kind == "point" and prior["mask"] is None else None
                self.add(
                    0.0, self._mean(_log_prob(prior), prior) if shared is None else shared * prior["scale"]
                )
                continue
            self.add(self._mean(_divergence(site, prior), prior), 0.0)
            if self.step.entropy:
                self.entropy = self.entropy + self._mean(_entropy(site), prior)
        if exact:
            self.share(scaled_values(self.step, guide_sites, (self.step.S, self.step.K)))

    def share(self, values: Mapping[str, Tensor]) -> None:
        """Subtracts from the mean divergence the information between index and sites."""
        shared = information(self.step.mixtures, values)
        self.kl, self.entropy = self.kl - shared, self.entropy + (shared if self.step.entropy else 0.0)

    def _mean(self, value: Tensor, site: Site) -> Tensor:
        """The average over components and draws of what a node's entries add."""
        value = scale_and_mask(value, site["scale"], site["mask"])
        return per_component(value, self.step.S, self.step.K, self.step.nesting).mean()


def observed(model_sites: Mapping[str, Site]) -> Iterator[tuple[str, Tensor, Site]]:
    """The observed sites with their log densities, by entry."""
    for name, site in model_sites.items():
        if site["is_observed"] and not is_deterministic(site):
            yield name, log_prob_of(site), site


def pointwise(model_sites: Mapping[str, Site], least: int) -> dict[Any, tuple[Any, Tensor]]:
    """
    Scales and log densities by example, masked entries at zero, for a mixture over components. Sites that share their
    plates describe the same examples, so they share the component too. ``least`` is the number of dimensions below which
    an observation belongs to no example.
    """
    found: dict[Any, tuple[Any, Tensor]] = {}
    for name, log_prob, site in observed(model_sites):
        if log_prob.dim() < least:
            raise ValueError(
                f"observed site {name!r} has no component dimension: the log-mixture likelihood needs it inside the data "
                "plate."
            )
        scale = site["scale"]
        key = tuple(log_prob.shape), id(scale) if isinstance(scale, Tensor) else scale
        log_prob = scale_and_mask(log_prob, 1.0, site["mask"])
        found[key] = scale, log_prob if key not in found else found[key][1] + log_prob
    return found


def scaled_values(
    step: Step, guide_sites: Mapping[str, Site], lead: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """The draws of the sites with a density, shape ``lead + site_shape``; with one per example that of the first."""
    sites = [site for mixture in step.mixtures for site, _, scale in mixture._blocks() if scale is not None]
    return {s.name: _one_draw(guide_sites[s.name], s, step.nesting).reshape(lead + s.shape) for s in sites}


def _one_draw(node: Site, site: LatentSite, nesting: int) -> Tensor:
    value: Tensor = node["value"]
    if nesting and not site.frames:
        dim = value.dim() - site.event_dim - 1
        if dim >= 0 and node["fn"].batch_shape[-1:] == (1,) and value.shape[dim] > 1:
            return value.narrow(dim, 0, 1)
    return value


def information(mixtures: list[AutoMixture], values: Mapping[str, Tensor]) -> Any:
    r"""
    :math:`\log K + \frac1K\sum_k \log \mathrm{softmax}_{k'}(\log q_{k'}(z_k))_k`, from 0 to log K, of draws of shape
    ``(S, K, *site_shape)``.
    """
    log_q: Any = 0.0  # summed over all sites of all mixtures before the softmax: one index for all
    for mixture in mixtures:
        log_q = log_q + mixture.component_log_prob(values)  # (S, K, K')
    if not isinstance(log_q, Tensor):
        return 0.0
    return math.log(log_q.shape[-1]) + log_q.log_softmax(-1).diagonal(dim1=-2, dim2=-1).mean()


def _divergence(site: Site, prior: Site) -> Tensor:
    """KL of a guide site from the model site, analytic if torch knows it, else one Monte Carlo term."""
    source = closed_form_source(prior["fn"])
    base = unwrap(site["fn"])
    if source is not None:
        if not isinstance(base, Normal):
            kind = site["infer"].get(SITE_KEY, {}).get("kind", type(base).__name__)
            raise ValueError(
                f"site {prior['name']!r} has a ClosedFormPrior, which needs Normal components, found {kind}: choose "
                "component='normal' or another prior."
            )
        return source.divergence(base.loc, base.scale.square())
    if isinstance(base, Delta):  # a part of a joint draw, whose density is counted with that
        return _log_prob(site) - _log_prob(prior)
    if is_known(site["fn"]) and is_known(prior["fn"]):  # else torch may take it for the class that it extends
        with suppress(NotImplementedError):
            return kl_divergence(site["fn"], prior["fn"])
    return _once(site, _log_prob(site) - _log_prob(prior))


def _entropy(site: Site) -> Tensor:
    if is_known(site["fn"]):
        with suppress(NotImplementedError):
            entropy: Tensor = site["fn"].entropy()
            return entropy
    return _once(site, -_log_prob(site))


def _once(site: Site, sample: Tensor) -> Tensor:
    """Values per example are draws of one site: averages a term over them."""
    once = site["fn"].batch_shape
    extra = [i - len(once) for i, n in enumerate(once) if n == 1 and sample.shape[i - len(once)] > 1]
    return sample.mean(extra, keepdim=True) if extra else sample


def _log_prob(site: Site) -> Tensor:
    return site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])


def _shared_log_prob(site: Site) -> Tensor | None:
    """
    The log density of a Normal site whose value all samples share, without repeating it per sample: shared weights are
    by far the largest sites.
    """
    fn, value = site["fn"], site["value"]
    base = unwrap(fn)
    batch = len(fn.batch_shape)
    if type(base) not in (Normal, dist.Normal):
        return None
    tensors = (value, base.loc, base.scale)
    if any(n > 1 and t.stride(i) for t in tensors for i, n in enumerate(t.shape[:batch])):
        return None
    value, loc, scale = (t[(0,) * batch] for t in tensors)
    return Normal(loc, scale, validate_args=False).log_prob(value).sum()
