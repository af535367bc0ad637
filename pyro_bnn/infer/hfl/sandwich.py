# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The infinitesimal-jackknife covariance from displacements that exist already."""

from typing import Any

import torch
from torch import Tensor

from pyro_bnn.model.handlers import Site, subsample_scale, unscaled_log_prob
from pyro_bnn.model.packed import PackedModel
from pyro_bnn.ops.distributed import all_reduce_sum
from pyro_bnn.ops.jacobian import jvp_operator


def sandwich(model: PackedModel, latent: Tensor, data: Any, displacements: Tensor) -> Tensor:
    r"""
    :math:`\sum_i (s_i^\top d_j)(s_i^\top d_k)` over the data points of all processes, shape ``(m, m)``.

    Source: Giordano et al. (2019), "A Swiss army infinitesimal jackknife".
    """
    scores = score_responses(model, latent, data, displacements)
    covariance = scores.mT @ scores
    all_reduce_sum([covariance])
    return covariance


def score_responses(model: PackedModel, latent: Tensor, data: Any, displacements: Tensor) -> Tensor:
    r"""
    :math:`s_i^\top d_j` for the scores :math:`s_i = \nabla\log p(y_i\mid u)` of n data points and m displacements of shape
    ``(m, p)``, as shape ``(n, m)``.

    A data point is an element of the batch shape of the observed sites; sites of equal batch shape under
    the same plates are taken to observe the same points, and their scores add up.
    """
    parts = []
    leaf = latent.detach().clone().requires_grad_(True)
    for trace in model.traces(leaf, data):
        points: dict[tuple[Any, ...], Tensor] = {}
        for name in model.counted(trace):
            site: Site = trace.nodes[name]
            log_prob = unscaled_log_prob(site) * (site["scale"] / subsample_scale(site))
            key = (log_prob.shape, tuple(frame.name for frame in site["cond_indep_stack"]))
            points[key] = points[key] + log_prob if key in points else log_prob
        scores = torch.cat([log_prob.reshape(-1) for log_prob in points.values()])
        operator = jvp_operator(scores, leaf)
        parts.append(torch.cat([operator(chunk) for chunk in displacements.split(256)]).mT)
    return torch.cat(parts)
