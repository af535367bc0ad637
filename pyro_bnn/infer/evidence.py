# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
The Laplace evidence as a function of hyperparameters.

Multipliers :math:`\tau` of the prior precision cost O(p) per value after one decomposition:
:math:`\log\det P(\tau) = \sum_i \log(\tau + e_i) + c`.
"""

import torch
from torch import Tensor

from pyro_bnn.infer.parts import Part


def tau_of(part: Part, tau: Tensor) -> Tensor:
    """
    :param part: a part of the curvature.
    :param tau: a scalar, or shape ``(p,)``.
    :return: the multiplier of the part: a scalar where it is the same for all of its entries.
    """
    if tau.dim() == 0:
        return tau
    mine = tau[part.index]
    return mine[0] if bool((mine == mine[0]).all()) else mine


def prior_change(part: Part, gradient: Tensor, tau: Tensor) -> Tensor:
    r"""
    The change of the log prior density of a part's entries when a Gaussian prior's precision D is multiplied by
    :math:`\tau`: :math:`\tfrac12\sum_i (\log\tau_i - (\tau_i - 1) D_i (u_i - m_i)^2)`.

    :param part: the part.
    :param gradient: the gradient of the negative log prior, :math:`D(u - m)`, shape ``(q,)``.
    :param tau: a scalar or shape ``(q,)``.
    :return: a scalar.
    """
    prior = part.prior
    if prior.dim() == 1:
        distance = gradient.square() / prior
    else:
        distance = gradient * torch.linalg.solve(prior, gradient)
    return 0.5 * (tau.log().expand(distance.shape) - (tau - 1) * distance).sum()
