# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The density of a guide at given draws."""

import math
from typing import Any

import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import AutoContinuous, AutoDelta, AutoGuideList, AutoNormal
from pyro.poutine.guide import GuideMessenger
from torch import Tensor
from torch.distributions import biject_to

from pyro_bnn.infer.predict.draws import Draws
from pyro_bnn.model.data import Batch
from pyro_bnn.model.handlers import SubstituteMessenger, sample_sites
from pyro_bnn.model.parameters import local_parameters


@torch.no_grad()
def guide_log_prob(guide: Any, draws: Draws, batch: Batch = ((), {})) -> Tensor | None:
    r"""
    The log density :math:`\log q(z_s)` of a guide, in the (constrained) space of the model's sites.

    Exact for mixture guides, Pyro's :class:`AutoContinuous` family (its Jacobians
    included), :class:`~pyro.infer.autoguide.AutoNormal`, lists of them, and guides that sample the named
    sites from proper distributions.

    :param guide: an initialised guide.
    :param draws: values of the latent sites, each of shape ``(S,) + site shape``.
    :param batch: arguments of the guide, for guides that need them.
    :return: a tensor of shape ``(S,)``, or ``None`` for point masses and for guides with auxiliary variables,
        which have no density that could be evaluated.
    """
    if not (getattr(guide, "has_density", True) and getattr(guide, "is_fitted", True)):
        return None
    with local_parameters(), poutine.block():
        if hasattr(guide, "component_log_prob"):
            log_prob = guide.component_log_prob(draws)
            index = draws.get(guide.index_name)
            if index is None:
                log_prob = torch.logsumexp(log_prob, -1)
            else:  # the index is a site of the model too
                log_prob = log_prob.gather(-1, index.reshape(-1, 1)).squeeze(-1)
            return log_prob - math.log(guide.num_components)
        if isinstance(guide, AutoGuideList):
            parts = [guide_log_prob(part, draws, batch) for part in guide]
            return (
                None
                if any(p is None for p in parts)
                else torch.stack([p for p in parts if p is not None]).sum(0)
            )
        if isinstance(guide, AutoDelta):
            return None
        if isinstance(guide, AutoContinuous):
            return _continuous_log_prob(guide, draws, batch)
        if isinstance(guide, AutoNormal):
            return _normal_log_prob(guide, draws)
        return _traced_log_prob(guide, draws, batch)


def _unconstrain(site: Any, value: Tensor) -> tuple[Tensor, Tensor]:
    """Unconstrained values, flat after the draws, and the log density of the change of variables."""
    transform = biject_to(site["fn"].support)
    unconstrained = transform.inv(value)
    # log q(z) = log q(u) - log |dz/du|
    jacobian = -transform.log_abs_det_jacobian(unconstrained, value)
    size = len(value)
    return unconstrained.reshape(size, -1), jacobian.reshape(size, -1).sum(-1)


def _continuous_log_prob(guide: AutoContinuous, draws: Draws, batch: Batch) -> Tensor:
    args, kwargs = batch
    prototype: Any = guide.prototype_trace
    pieces = [_unconstrain(site, draws[name]) for name, site in prototype.iter_stochastic_nodes()]
    latent = torch.cat([flat for flat, _ in pieces], -1)
    return guide.get_posterior(*args, **kwargs).log_prob(latent) + sum(jacobian for _, jacobian in pieces)


def _normal_log_prob(guide: AutoNormal, draws: Draws) -> Tensor:
    prototype: Any = guide.prototype_trace
    total = torch.zeros(())
    for name, site in prototype.iter_stochastic_nodes():
        flat, jacobian = _unconstrain(site, draws[name])
        loc, scale = guide._get_loc_and_scale(name)
        density = dist.Normal(loc.reshape(-1), scale.reshape(-1)).log_prob(flat).sum(-1)
        total = total + density + jacobian
    return total


def _traced_log_prob(guide: Any, draws: Draws, batch: Batch) -> Tensor | None:
    """One run per draw, of a guide that samples exactly the sites of the draws."""
    args, kwargs = batch
    size = len(next(iter(draws.values())))
    totals = []
    for index in range(size):
        values = {name: value[index] for name, value in draws.items()}
        trace = poutine.trace(SubstituteMessenger(values)(guide)).get_trace(*args, **kwargs)
        sites = {n: s for n, s in sample_sites(trace).items() if not s["is_observed"]}
        if set(sites) != set(draws) or any(isinstance(s["fn"], dist.Delta) for s in sites.values()):
            return None
        # a messenger guide runs the model, whose observations and factors are none of its own
        own = sites if isinstance(guide, GuideMessenger) else trace.nodes
        totals.append(trace.log_prob_sum(lambda name, _, own=own: name in own))
    return torch.stack([torch.as_tensor(total) for total in totals])
