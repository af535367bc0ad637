# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The families of one component of a mixture guide: of each its distribution, draws, quantiles and divergence."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_bnn.distributions.cauchy import TangentCauchy, tangent_noise_
from pyro_bnn.distributions.mixture import marginal_quantile
from pyro_bnn.nn.priors import unwrap

#: Rows of at least this many numbers are drawn one after the other, each while it is in the processor's caches.
LONG_ROW = 2**14


def normal_divergence(loc: Tensor, scale: Tensor, loc_0: Tensor, scale_0: Tensor) -> Tensor:
    r""":math:`\mathrm{KL}(N(\mu, \sigma^2) \| N(\mu_0, \sigma_0^2))`, summed over all elements."""
    ratio = scale / scale_0
    distance = (loc - loc_0) / scale_0
    flat, apart = ratio.flatten(), distance.flatten()
    return 0.5 * (flat.dot(flat) + apart.dot(apart) - ratio.numel()) - ratio.log().sum()


def cauchy_divergence(loc: Tensor, scale: Tensor, loc_0: Tensor, scale_0: Tensor) -> Tensor:
    """The closed form of Chyzak and Nielsen (2019) for two Cauchy distributions, summed over all elements."""
    squares = (scale + scale_0).square() + (loc - loc_0).square()
    return (squares / (4.0 * scale * scale_0)).log().sum()


def is_real(support: Any) -> bool:
    """Whether a support is that of unconstrained numbers or vectors."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real or support is constraints.real_vector


def _is_positive(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    half_line = isinstance(support, constraints.greater_than | constraints.greater_than_eq)
    return half_line and support.lower_bound == 0


@dataclass(frozen=True)
class Family:
    r"""
    A kind of component.

    =============  =========================================================================================
    ``normal``     :math:`N(\mu, \sigma^2)` on the reals; its image under the bijection to the support else
                   (on the positive half-line a :class:`~pyro.distributions.LogNormal`, which has closed-form KL)
    ``cauchy``     :math:`\mathrm{Cauchy}(\mu, \gamma)`, reals only
    ``lognormal``  :math:`\exp N(\mu, \sigma^2)`, whatever the support of the prior
    ``low_rank``   a Gaussian over all sites of this family together; what is here are its margins
    ``delta``      a point mass at the image of :math:`\mu`
    ``point``      one that all components share
    ``index``      the index of the component itself
    =============  =========================================================================================

    :ivar name: what users call it.
    :ivar unit: the distribution of its unconstrained values given location and scale; ``None`` for point masses.
    :ivar noise: fills a tensor with standard draws of it.
    :ivar prior: the family of priors for which :attr:`divergence`, or for point masses a joint density, is there.
    :ivar divergence: KL from such a prior given both locations and scales, in unconstrained space, summed.
    """

    name: str
    unit: Any = None
    noise: Callable[[Tensor], Tensor] = Tensor.normal_
    prior: type | None = None
    divergence: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = normal_divergence


FAMILIES = {
    family.name: family
    for family in (
        Family("normal", dist.Normal, prior=td.Normal),
        Family("cauchy", TangentCauchy, tangent_noise_, td.Cauchy, cauchy_divergence),
        Family("lognormal", dist.Normal, prior=td.LogNormal),
        Family("low_rank", dist.Normal),
        Family("delta", prior=td.Normal),
        Family("point", prior=td.Normal),
    )
}

#: The site of the model that holds the index of the component is no component itself.
INDEX = Family("index")


@dataclass
class LatentSite:
    """
    What a mixture guide knows of one latent site.

    :ivar name: name of the site.
    :ivar family: of its components.
    :ivar support: support of the prior.
    :ivar event_dim: number of event dimensions of the site.
    :ivar shape: shape of a value, batch and event dimensions of the model together.
    :ivar raw_shape: the same in unconstrained space; they differ for simplices and the like.
    :ivar frames: the plates around the site.
    :ivar role: what the layer that owns the site says it is, see :class:`~pyro_bnn.nn.sites.SiteSpec`.
    """

    name: str
    family: Family
    support: Any
    event_dim: int
    shape: torch.Size
    raw_shape: torch.Size
    frames: tuple[Any, ...]
    role: str | None = None

    @property
    def kind(self) -> str:
        """The name of the family."""
        return self.family.name

    @cached_property
    def size(self) -> int:
        """Number of unconstrained elements."""
        return self.raw_shape.numel()

    @cached_property
    def is_positive(self) -> bool:
        """Whether values are exponentials."""
        return self.kind == "lognormal" or _is_positive(self.support)

    @cached_property
    def is_real(self) -> bool:
        """Whether values are unconstrained."""
        return self.kind != "lognormal" and is_real(self.support)

    @cached_property
    def transform(self) -> Any:
        """The bijection from unconstrained space to the support of the guide's distribution."""
        return biject_to(constraints.positive if self.kind == "lognormal" else self.support)

    def distribution(self, loc: Tensor, scale: Tensor | None, event_dim: int) -> Any:
        """
        The distribution of a site given its unconstrained location and scale, shape ``(*batch, *raw_shape)``, the last
        ``event_dim`` dimensions of the site being event dimensions.
        """
        if scale is None:
            return dist.Delta(self.transform(loc), event_dim=event_dim)
        if self.is_positive:
            fn: Any = dist.LogNormal(loc, scale)
        else:
            fn = self.family.unit(loc, scale)
            fn = fn if self.is_real else dist.TransformedDistribution(fn, [self.transform])
        ndim = event_dim - len(fn.event_shape)
        return fn.to_event(ndim) if ndim else fn

    @torch.no_grad()
    def draw(self, loc: Tensor, scale: Tensor | None, where: Tensor) -> Tensor:
        """
        Draw s from component ``where[s]``, shape ``(S, *site_shape)``: what :meth:`distribution` would give for the
        gathered locations and scales, without gathering them, which for a large network costs more than the numbers.
        """
        if scale is None:
            return self.transform(loc)[where]
        flat_loc, flat_scale = loc.reshape(len(loc), -1), scale.reshape(len(loc), -1)
        raw = flat_loc.new_empty(len(where), flat_loc.shape[-1])
        if raw.shape[-1] < LONG_ROW:
            self.family.noise(raw).mul_(flat_scale[where]).add_(flat_loc[where])
        else:
            for row, k in zip(raw, where.tolist(), strict=True):
                torch.addcmul(flat_loc[k], self.family.noise(row), flat_scale[k], out=row)
        return self.transform(raw.view(-1, *self.raw_shape))

    def quantile(self, loc: Tensor, scale: Tensor | None, q: float) -> Tensor:
        """
        A quantile of the marginal mixtures, shape ``site_shape``: the bijections are elementwise and increasing.
        """
        if scale is None:
            index = max(0, min(len(loc) - 1, math.ceil(q * len(loc)) - 1))
            return self.transform(loc.sort(0).values[index])
        return self.transform(marginal_quantile(self.family.unit(loc, scale), q))

    def covers(self, prior: Any) -> bool:
        """Whether a prior is a constant of the family for which there are closed forms over many sites at once."""
        base = unwrap(prior)
        if self.family.prior is None or type(base) not in (
            self.family.prior,
            getattr(dist, self.family.prior.__name__),
        ):
            return False  # a subclass may mean something else
        suits = self.kind == "lognormal" or is_real(self.support)
        return suits and not base.loc.requires_grad and not base.scale.requires_grad

    def constrain(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """
        Values from unconstrained ones, shape ``(*lead, *raw_shape)``, and the log of the volume that they gain, shape
        ``lead``.
        """
        lead = raw.shape[: raw.dim() - len(self.raw_shape)]
        value = self.transform(raw)
        if self.is_real:
            return value, raw.new_zeros(lead)
        volume = self.transform.log_abs_det_jacobian(raw, value)
        return value, volume.reshape(*lead, -1).sum(-1)


@torch.no_grad()
def draw_low_rank(joint: Any, where: Tensor) -> Tensor:
    """Draw s, shape ``(S, P)``, from component ``where[s]`` of low-rank Gaussians of batch shape ``(K,)``."""
    loc, factor, deviation = joint.loc, joint.cov_factor, joint.cov_diag.sqrt()
    draws = loc.new_empty(len(where), loc.shape[-1]).normal_()
    inner = loc.new_empty(len(where), factor.shape[-1]).normal_()
    for k in where.unique().tolist():
        mine = where == k
        draws[mine] = torch.addcmul(loc[k], draws[mine], deviation[k]) + inner[mine] @ factor[k].mT
    return draws


def mirrored_draws(joint: Any, particles: int) -> Tensor:
    """Draws of Gaussians, the second half of them mirrored at the location; of one particle its mirror image alone."""
    if particles == 1:
        return 2 * joint.loc - joint.rsample()
    half = joint.rsample((particles // 2,))
    return torch.cat([half, 2 * joint.loc - half])
