# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The density of a guide at given draws."""

import math
from collections.abc import Collection
from operator import attrgetter
from typing import Any

import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDelta,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoNormal,
)
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_bnn.infer.predict.draws import Draws
from pyro_bnn.model.data import Batch
from pyro_bnn.model.handlers import SubstituteMessenger, sample_sites
from pyro_bnn.model.latent_space import LatentSpace
from pyro_bnn.model.parameters import local_parameters


def guide_log_prob(
    guide: Any, draws: Draws, batch: Batch = ((), {}), *, differentiable: bool = False
) -> Tensor | None:
    r"""
    The log density :math:`\log q(z_s)` of a guide, in the (constrained) space of the model's sites.

    Exact for mixture guides, Pyro's :class:`AutoContinuous` family (its Jacobians
    included), :class:`~pyro.infer.autoguide.AutoNormal`, lists of them, and guides that sample the named
    sites from proper distributions.

    :param draws: values of the latent sites, each of shape ``(S,) + site shape``.
    :param batch: arguments of the guide, for guides that need them.
    :param bool differentiable: whether the result keeps its graph to the parameters of the guide.
    :return: shape ``(S,)``, or ``None`` for point masses and for guides with auxiliary variables, which have no density that
        could be evaluated.
    """
    if not (getattr(guide, "has_density", True) and getattr(guide, "is_fitted", True)):
        return None
    with local_parameters(), poutine.block(), torch.set_grad_enabled(differentiable):
        if hasattr(guide, "component_log_prob"):
            return _mixture_log_prob(guide, draws)
        if isinstance(guide, AutoGuideList):
            parts = [guide_log_prob(part, draws, batch, differentiable=differentiable) for part in guide]
            known = [part for part in parts if part is not None]
            return torch.stack(known).sum(0) if len(known) == len(parts) else None
        if isinstance(
            guide, (AutoDelta, AutoLaplaceApproximation)
        ):  # the latter makes a guide with a density
            return None
        if isinstance(guide, (AutoContinuous, AutoNormal)):
            return _autoguide_log_prob(guide, draws, batch)
        return _traced_log_prob(guide, draws, batch)


def _mixture_log_prob(guide: Any, draws: Draws) -> Tensor:
    log_prob: Tensor = guide.component_log_prob(draws)
    index = draws.get(guide.index_name)
    if index is None:
        log_prob = torch.logsumexp(log_prob, -1)
    else:  # the index is a site of the model too
        log_prob = log_prob.gather(-1, index.reshape(-1, 1)).squeeze(-1)
    return log_prob - math.log(guide.num_components)


def _autoguide_log_prob(guide: AutoContinuous | AutoNormal, draws: Draws, batch: Batch) -> Tensor:
    """The density in unconstrained space, and that of the change of variables."""
    args, kwargs = batch
    prototype: Any = guide.prototype_trace
    space = LatentSpace(prototype)
    latent = space.pack(draws)
    if isinstance(guide, AutoContinuous):
        log_prob = guide.get_posterior(*args, **kwargs).log_prob(latent)
    else:
        loc, scale = (
            torch.cat([attrgetter(name)(part).reshape(-1) for name in space.slices])
            for part in (guide.locs, guide.scales)
        )
        log_prob = dist.Normal(loc, scale).log_prob(latent).sum(-1)
    return log_prob - space.log_abs_det_jacobian(latent)


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
        totals.append(_sum(trace, sites if isinstance(guide, GuideMessenger) else trace.nodes))
    return torch.stack(totals)


def _sum(trace: Trace, names: Collection[str]) -> Tensor:
    return torch.as_tensor(trace.log_prob_sum(lambda name, _: name in names))
