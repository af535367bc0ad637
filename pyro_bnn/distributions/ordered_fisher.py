# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Fisher information of Pyro's ordinal likelihood."""

from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_bnn.ops.fisher import FisherRule, register_fisher


@register_fisher(dist.OrderedLogistic)
class OrderedLogisticFisher(FisherRule):
    r"""
    Ordered logistic in the predictor :math:`f` and :math:`v = (c_1, \log(c_2 - c_1), \dots)` for cut points c:
    with :math:`\pi_k = \sigma(c_k - f) - \sigma(c_{k-1} - f)`, :math:`F = \sum_k \nabla\pi_k\nabla\pi_k^\top/\pi_k`.
    """

    def parameters(self, d: dist.OrderedLogistic) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`FisherRule.parameters`."""
        cuts = d.cutpoints
        steps = (cuts[..., 1:] - cuts[..., :-1]).log()
        return {"predictor": d.predictor.unsqueeze(-1), "steps": torch.cat([cuts[..., :1], steps], -1)}

    def information(self, d: dist.OrderedLogistic) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        cuts = d.cutpoints
        cumulative = torch.sigmoid(cuts - d.predictor.unsqueeze(-1))
        density = cumulative * (1 - cumulative)
        K = cuts.shape[-1]
        # rows: cumulative probabilities; columns: predictor, then v, with c_k = v_0 + sum_{0<j<=k} exp(v_j)
        widths = torch.cat([torch.ones_like(cuts[..., :1]), cuts[..., 1:] - cuts[..., :-1]], -1)
        lower = torch.ones(K, K, dtype=cuts.dtype, device=cuts.device).tril()
        by_step = lower * widths.unsqueeze(-2)
        by_step = by_step.expand(density.shape + (K,))
        slopes = density.unsqueeze(-1) * torch.cat([-torch.ones_like(by_step[..., :1]), by_step], -1)
        edge = torch.zeros_like(slopes[..., :1, :])
        gradient = torch.cat([slopes, edge], -2) - torch.cat([edge, slopes], -2)
        return gradient.mT @ (gradient / d.probs.unsqueeze(-1))

    def build(self, d: dist.OrderedLogistic, parameters: Mapping[str, Tensor]) -> Distribution:  # type: ignore[override]
        """See :meth:`FisherRule.build`."""
        predictor = parameters["predictor"].squeeze(-1) if "predictor" in parameters else d.predictor
        cuts = d.cutpoints
        if "steps" in parameters:
            steps = parameters["steps"]
            cuts = torch.cat([steps[..., :1], steps[..., 1:].exp()], -1).cumsum(-1)
        return dist.OrderedLogistic(predictor, cuts, validate_args=False)
