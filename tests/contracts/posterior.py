# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Where a posterior is known, a guide that can hold it has it, and a bound stays below the evidence."""

import math
from typing import Any

import torch
from torch import Tensor

from tests.common import assert_close


class LinearGaussian:
    r"""
    Posterior, evidence and predictive of :math:`y = Xw + \epsilon` with :math:`w\sim N(0, s^2 I)`, in closed form.

    :param x: inputs, shape (N, D).
    :param y: observations, shape (N,).
    :param noise: standard deviation of the noise.
    :param prior_scale: :math:`s`.
    """

    def __init__(self, x: Tensor, y: Tensor, noise: float, prior_scale: float) -> None:
        D = x.shape[1]
        self.precision = x.mT @ x / noise**2 + torch.eye(D) / prior_scale**2
        self.covariance = torch.linalg.inv(self.precision)
        self.mean = torch.linalg.solve(self.precision, x.mT @ y / noise**2)
        marginal = noise**2 * torch.eye(len(x)) + prior_scale**2 * x @ x.mT
        normal = torch.distributions.MultivariateNormal(torch.zeros(len(x)), marginal)
        self.log_evidence = normal.log_prob(y)

    def variance(self, x: Tensor) -> Tensor:
        """Variances of :math:`x^\\top w`, shape (n,)."""
        return ((x @ self.covariance) * x).sum(-1)


def assert_exact(guide: Any, exact: LinearGaussian, *, rtol: float = 1e-9) -> None:
    """A Gaussian guide over the packed latents has the mean and the covariance of the posterior."""
    assert_close(guide.loc, exact.mean, rtol=rtol)
    assert_close(guide.posterior.covariance_matrix, exact.covariance, rtol=rtol, atol=1e-14)


def assert_below_the_evidence(elbo: Any, model: Any, guide: Any, evidence: Tensor, *args: Any) -> Tensor:
    """
    The mean of repeated evaluations of a bound exceeds the log evidence by no more than four standard errors.

    :return: the mean.
    """
    values = torch.tensor([-elbo.loss(model, guide, *args) for _ in range(20)])
    assert values.mean() <= evidence + 4 * values.std() / math.sqrt(len(values))
    return values.mean()
