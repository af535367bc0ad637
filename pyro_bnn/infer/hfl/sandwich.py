# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The infinitesimal-jackknife covariance from displacements that exist already."""

from typing import Any

import torch
from torch import Tensor

from pyro_bnn.model.handlers import Site, subsample_scale, unscaled_log_prob
from pyro_bnn.model.packed import PackedModel
from pyro_bnn.ops.jacobian import jvp_operator


def score_responses(model: PackedModel, latent: Tensor, data: Any, displacements: Tensor) -> Tensor:
    r"""
    :math:`s_i^\top d_j` for the scores :math:`s_i = \nabla\log p(y_i\mid u)` of all data points.

    The sandwich covariance :math:`P^{-1}(\sum_i s_i s_i^\top)P^{-1}` of the functionals is the Gram matrix of its
    columns. A data point is an element of the batch shape of the observed sites; sites of equal batch shape under
    the same plates are taken to observe the same points, and their scores add up.

    :param model: the packed model.
    :param latent: the point estimate, shape ``(p,)``.
    :param data: one batch or an iterable of batches, with observations.
    :param displacements: :math:`d_j`, shape ``(m, p)``.
    :return: shape ``(n, m)``.

    Source: Giordano et al. (2019), "A Swiss army infinitesimal jackknife".
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
