# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The terms of the bound of a mixture beside the likelihood: divergences, log priors, entropies."""

import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from pyro import distributions as dist
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from pyro_bnn.infer.autoguide.components import LatentSite
from pyro_bnn.infer.autoguide.mixture import AutoMixture
from pyro_bnn.model.handlers import Site
from pyro_bnn.nn.hierarchical import closed_form_source
from pyro_bnn.nn.priors import unwrap
from pyro_bnn.nn.sites import SITE_KEY
from pyro_bnn.ops.families import is_known


def per_component(value: Tensor, num_particles: int, K: int, nesting: int) -> Tensor:
    """
    Sums a term over the plates of the model.

    :param value: batch shape ``(S, K, *plates)``, or with fewer dimensions on the left.
    :param num_particles: S.
    :param K: number of components.
    :param nesting: number of plate dimensions of the model.
    :return: shape ``(S, K)``.
    """
    if K == num_particles == 1:
        return value.sum().view(1, 1)
    shape = (num_particles, K) if value.dim() > nesting + 1 else (K,)
    if value.dim() < nesting + 1:
        value = value.expand(K, *(1,) * (nesting - value.dim()), *value.shape)
    total = value.flatten(value.dim() - nesting).sum(-1) if nesting else value
    return total.expand(shape).reshape(-1, K)


class SiteTerms:
    """
    The KL, log prior and entropy terms of one evaluation.

    :param kind: ``"mean"``, ``"sum"`` or ``"exact"``.
    :param want_entropy: whether the entropy of the guide is needed.
    :param num_particles: draws per component.
    :param mixtures: the mixtures in the guide.
    :param K: number of components.
    :param nesting: number of plate dimensions of the model.
    :param points: sites whose guide is a point estimate of another kind.
    :ivar kl: the divergence, before scaling.
    :ivar log_prior: log prior density of the point estimates.
    :ivar entropy: of the guide, if it is wanted.
    """

    def __init__(
        self,
        kind: str,
        want_entropy: bool,
        num_particles: int,
        mixtures: list[AutoMixture],
        K: int,
        nesting: int,
        points: Collection[str] = (),
    ) -> None:
        self.points = points
        self.kind, self.want_entropy, self.num_particles = kind, want_entropy, num_particles
        self.mixtures, self.K, self.nesting = mixtures, K, nesting
        self.kl: Any = 0.0
        self.log_prior: Any = 0.0
        self.entropy: Any = 0.0

    def add(self, kl: Any, log_prior: Any) -> None:
        """
        Adds terms that are averages over the components.

        :param kl: a divergence.
        :param log_prior: a log density of point estimates.
        """
        self.kl = self.kl + (self.K if self.kind == "sum" else 1) * kl
        self.log_prior = self.log_prior + log_prior

    def collect(self, model_sites: dict[str, Site], guide_sites: dict[str, Site]) -> None:
        """
        Adds the terms of all latent and auxiliary sites.

        :param model_sites: nodes of the model.
        :param guide_sites: nodes of the guide.
        """
        auxiliary = {n: s for n, s in guide_sites.items() if n not in model_sites}
        for name, site in guide_sites.items():
            if name in auxiliary:
                log_q = self._per_component(scale_and_mask(_log_prob(site), site["scale"], site["mask"]))
                self._add_kl(log_q)
                if self.want_entropy:
                    self.entropy = self.entropy - log_q.mean()
                continue
            prior = model_sites[name]
            scale, mask = prior["scale"], prior["mask"]
            kind = site["infer"].get(SITE_KEY, {}).get("kind")
            if kind == "index":  # uniform in the model and in the guide
                continue
            point = kind in ("delta", "point") or name in self.points or not auxiliary
            if isinstance(unwrap(site["fn"]), Delta) and point:
                shared = _shared_log_prob(prior) if kind == "point" and mask is None else None
                if shared is None:
                    log_p = self._per_component(scale_and_mask(_log_prob(prior), scale, mask)).mean()
                else:
                    log_p = shared * scale
                self.log_prior = self.log_prior + log_p
                continue
            self._add_kl(self._per_component(scale_and_mask(_divergence(site, prior), scale, mask)))
            if self.want_entropy:
                self.entropy = (
                    self.entropy + self._per_component(scale_and_mask(_entropy(site), scale, mask)).mean()
                )
        if self.kind == "exact" and self.K > 1:
            information = self._information(guide_sites)
            self.kl = self.kl - information
            if self.want_entropy:
                self.entropy = self.entropy + information

    def _per_component(self, value: Tensor) -> Tensor:
        return per_component(value, self.num_particles, self.K, self.nesting)

    def _add_kl(self, per_component: Tensor) -> None:
        factor = self.K if self.kind == "sum" else 1
        self.kl = self.kl + factor * per_component.mean()

    def _information(self, guide_sites: dict[str, Any]) -> Any:
        lead = (self.num_particles, self.K)
        values = {
            site.name: one_draw(guide_sites[site.name], site, self.nesting).reshape(lead + site.shape)
            for site in scaled_sites(self.mixtures)
        }
        return information(self.mixtures, values)


def scaled_sites(mixtures: list[AutoMixture]) -> list[LatentSite]:
    """
    :param mixtures: the mixtures in a guide.
    :return: their sites with a density.
    """
    return [site for mixture in mixtures for site, _, scale in mixture._blocks() if scale is not None]


def information(mixtures: list[AutoMixture], values: Mapping[str, Tensor]) -> Any:
    r"""
    :math:`\log K + \frac1K\sum_k \log \mathrm{softmax}_{k'}(\log q_{k'}(z_k))_k`, from 0 to log K.

    :param mixtures: the mixtures in the guide.
    :param values: the draws of their sites, shape ``(S, K, *site.shape)``.
    :return: a scalar.
    """
    log_q: Any = 0.0  # summed over all sites of all mixtures before the softmax: one index for all
    for mixture in mixtures:
        log_q = log_q + mixture.component_log_prob(values)  # (S, K, K')
    if not isinstance(log_q, Tensor):
        return 0.0
    return math.log(log_q.shape[-1]) + log_q.log_softmax(-1).diagonal(dim1=-2, dim2=-1).mean()


def _divergence(site: Any, prior: Any) -> Tensor:
    """KL of a guide site from the model site, analytic if torch knows it, else one Monte Carlo term."""
    source = closed_form_source(prior["fn"])
    if source is not None:
        base = unwrap(site["fn"])
        if not isinstance(base, Normal):
            kind = site["infer"].get(SITE_KEY, {}).get("kind", type(base).__name__)
            raise ValueError(
                f"site {prior['name']!r} has a ClosedFormPrior, which needs Normal components, found {kind}: choose "
                "component='normal' or another prior."
            )
        return source.divergence(base.loc, base.scale.square())
    if isinstance(unwrap(site["fn"]), Delta):  # a part of a joint draw, whose density is counted with that
        return _log_prob(site) - _log_prob(prior)
    if is_known(site["fn"]) and is_known(prior["fn"]):  # else torch may take it for the class that it extends
        with suppress(NotImplementedError):
            return kl_divergence(site["fn"], prior["fn"])
    return _once(site, _log_prob(site) - _log_prob(prior))


def _once(site: Any, sample: Tensor) -> Tensor:
    """Values per example are draws of one site: averages a term over them."""
    once = site["fn"].batch_shape
    extra = [i - len(once) for i, n in enumerate(once) if n == 1 and sample.shape[i - len(once)] > 1]
    return sample.mean(extra, keepdim=True) if extra else sample


def one_draw(node: Any, site: Any, nesting: int) -> Tensor:
    """
    The value of a site; with a value per example, that of the first example.

    :param node: a node of the guide.
    :param site: what the mixture knows of the site.
    :param nesting: number of plate dimensions of the model.
    :return: the value.
    """
    value = node["value"]
    if nesting and not site.frames:
        dim = value.dim() - site.event_dim - 1
        if dim >= 0 and node["fn"].batch_shape[-1:] == (1,) and value.shape[dim] > 1:
            return value.narrow(dim, 0, 1)
    return value


def _entropy(site: Any) -> Tensor:
    if is_known(site["fn"]):
        with suppress(NotImplementedError):
            entropy: Tensor = site["fn"].entropy()
            return entropy
    return _once(site, -_log_prob(site))


def _log_prob(site: Any) -> Tensor:
    return site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])


def _shared_log_prob(site: Any) -> Tensor | None:
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
