# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The families of one component of a mixture guide."""

from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_bnn.distributions.cauchy import TangentCauchy
from pyro_bnn.distributions.mixture import mixture_quantile

#: Families with a location and a scale per latent element.
SCALED_KINDS = ("normal", "cauchy", "lognormal")
#: All families: ``"delta"`` has a location per component, ``"point"`` one that all components share.
KINDS = (*SCALED_KINDS, "low_rank", "delta", "point")


@dataclass
class LatentSite:
    """
    What a mixture guide knows of one latent site.

    :ivar name: name of the site.
    :ivar kind: one of :data:`KINDS`.
    :ivar support: support of the prior.
    :ivar event_dim: number of event dimensions of the site.
    :ivar shape: shape of a value, batch and event dimensions of the model together.
    :ivar raw_shape: the same in unconstrained space; they differ for simplices and the like.
    :ivar frames: the plates around the site.
    :ivar role: what the layer that owns the site says it is, see :class:`~pyro_bnn.nn.sites.SiteSpec`.
    """

    name: str
    kind: str
    support: Any
    event_dim: int
    shape: torch.Size
    raw_shape: torch.Size
    frames: tuple[Any, ...]
    role: str | None = None

    @property
    def size(self) -> int:
        """Number of unconstrained elements."""
        return self.raw_shape.numel()

    @property
    def raw_event_dim(self) -> int:
        """Number of event dimensions in unconstrained space."""
        return self.event_dim + len(self.raw_shape) - len(self.shape)

    @property
    def transform(self) -> Any:
        """The bijection from unconstrained space to the support of the guide's distribution."""
        if self.kind == "lognormal":
            return biject_to(constraints.positive)
        return biject_to(self.support)


def constrain(site: LatentSite, raw: Tensor) -> tuple[Tensor, Tensor]:
    """
    Takes values of a site from unconstrained space to its support.

    :param site: the site.
    :param raw: shape ``(*lead, *raw_shape)``.
    :return: the values, shape ``(*lead, *shape)``, and the log of the volume that they gain, shape ``lead``.
    """
    lead = raw.shape[: raw.dim() - len(site.raw_shape)]
    if is_real(site.support) and site.kind != "lognormal":
        return raw, raw.new_zeros(lead)
    value = site.transform(raw)
    volume = site.transform.log_abs_det_jacobian(raw, value)
    return value, volume.reshape(*lead, -1).sum(-1)


def to_event(fn: Any, ndim: int) -> Any:
    """
    Declares the rightmost dimensions of a distribution as event dimensions.

    :param fn: a distribution.
    :param int ndim: number of dimensions; 0 returns ``fn`` itself.
    :return: the distribution.
    """
    return fn.to_event(ndim) if ndim else fn


def component_distribution(site: LatentSite, loc: Tensor, scale: Tensor | None, event_dim: int) -> Any:
    r"""
    The distribution of one site given its unconstrained location and scale.

    =============  =========================================================================================
    ``normal``     :math:`N(\mu, \sigma^2)` on the reals; its image under the bijection to the support else
                   (on the positive half-line a :class:`~pyro.distributions.LogNormal`, which has closed-form KL)
    ``cauchy``     :math:`\mathrm{Cauchy}(\mu, \gamma)`, reals only
    ``lognormal``  :math:`\exp N(\mu, \sigma^2)`, whatever the support of the prior
    ``delta``      a point mass at the image of :math:`\mu`
    =============  =========================================================================================

    :param site: the site.
    :param loc: shape ``(*batch, *raw_shape)``.
    :param scale: the same shape, or ``None`` for point masses.
    :param int event_dim: how many dimensions of ``site.shape``, from the right, are event dimensions.
    :return: the distribution.
    """
    if scale is None:
        return dist.Delta(site.transform(loc), event_dim=event_dim)
    if site.kind == "cauchy":
        return to_event(TangentCauchy(loc, scale), event_dim)
    if site.kind == "lognormal" or is_positive(site.support):
        return to_event(dist.LogNormal(loc, scale), event_dim)
    base = dist.Normal(loc, scale)
    if is_real(site.support):
        return to_event(base, event_dim)
    transformed = dist.TransformedDistribution(base, [site.transform])
    return to_event(transformed, event_dim - len(transformed.event_shape))


#: Rows of at least this many numbers are drawn one after the other, each while it is in the processor's caches.
LONG_ROW = 2**14


@torch.no_grad()
def draw_components(site: LatentSite, loc: Tensor, scale: Tensor | None, where: Tensor) -> Tensor:
    """
    Draws of one site, draw s from component ``where[s]``: what :func:`component_distribution` would give for the
    gathered locations and scales, without gathering them, which for a large network costs more than the numbers.

    :param site: the site, of any family but ``"low_rank"``.
    :param loc: shape ``(K, *raw_shape)``.
    :param scale: the same shape, or ``None`` for point masses.
    :param where: components, shape ``(S,)``.
    :return: shape ``(S, *site.shape)``.
    """
    if scale is None:
        return site.transform(loc)[where]
    fill = Tensor.cauchy_ if site.kind == "cauchy" else Tensor.normal_
    flat_loc, flat_scale = loc.reshape(len(loc), -1), scale.reshape(len(loc), -1)
    raw = flat_loc.new_empty(len(where), flat_loc.shape[-1])
    if raw.shape[-1] < LONG_ROW:
        fill(raw).mul_(flat_scale[where]).add_(flat_loc[where])
    else:
        for row, k in zip(raw, where.tolist(), strict=True):
            torch.addcmul(flat_loc[k], fill(row), flat_scale[k], out=row)
    raw = raw.view(-1, *site.raw_shape)
    if site.kind == "lognormal" or is_positive(site.support):
        return raw.exp_()
    return raw if is_real(site.support) else site.transform(raw)


@torch.no_grad()
def draw_low_rank(joint: Any, where: Tensor) -> Tensor:
    """
    Draws from components of a low-rank Gaussian, draw s from component ``where[s]``.

    :param joint: a :class:`~pyro.distributions.LowRankMultivariateNormal` of batch shape ``(K,)`` over P elements.
    :param where: components, shape ``(S,)``.
    :return: shape ``(S, P)``.
    """
    loc, factor, deviation = joint.loc, joint.cov_factor, joint.cov_diag.sqrt()
    draws = loc.new_empty(len(where), loc.shape[-1]).normal_()
    inner = loc.new_empty(len(where), factor.shape[-1]).normal_()
    for k in where.unique().tolist():
        mine = where == k
        draws[mine] = torch.addcmul(loc[k], draws[mine], deviation[k]) + inner[mine] @ factor[k].mT
    return draws


def is_real(support: Any) -> bool:
    """
    Tells whether a support is unconstrained.

    :param support: a constraint.
    :return: ``True`` for real numbers, vectors, and independent products of those.
    """
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real or support is constraints.real_vector


def is_positive(support: Any) -> bool:
    """
    Tells whether a support is the positive half-line, elementwise.

    :param support: a constraint.
    :return: ``True`` for positive (or non-negative) numbers and independent products of those.
    """
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return (
        isinstance(support, constraints.greater_than | constraints.greater_than_eq)
        and support.lower_bound == 0
    )


def raw_quantile(site: LatentSite, loc: Tensor, scale: Tensor | None, q: float) -> Tensor:
    """
    A quantile of the marginal mixtures in unconstrained space, where the bijections are elementwise and increasing.

    :param site: a site.
    :param loc: its locations, shape ``(K, *raw_shape)``.
    :param scale: its scales, the same shape, or ``None``.
    :param q: a level between 0 and 1.
    :return: shape ``raw_shape``.
    """
    if scale is None:
        index = max(0, min(loc.shape[0] - 1, int(-(-q * loc.shape[0] // 1)) - 1))
        return loc.sort(0).values[index]
    base: Any = dist.Cauchy(loc, scale) if site.kind == "cauchy" else dist.Normal(loc, scale)
    each = base.icdf(torch.full_like(loc, q))
    if loc.shape[0] == 1:
        return each[0]
    return mixture_quantile(lambda v: base.cdf(v).mean(0), each.amin(0), each.amax(0), q)
