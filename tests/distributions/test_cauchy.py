# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import kstest
from torch.distributions import kl_divergence

from pyro_bnn.distributions.cauchy import TangentCauchy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_have_the_cauchy_distribution(dtype):
    pyro.set_rng_seed(0)
    loc, scale = torch.tensor([1.0, -2.0], dtype=dtype), torch.tensor([0.1, 3.0], dtype=dtype)
    fn = TangentCauchy(loc, scale)
    draws = fn.sample((20_000,))
    assert draws.dtype == dtype
    assert torch.isfinite(draws).all()
    for i in range(2):
        assert kstest(fn.cdf(draws)[:, i].double().numpy(), "uniform").pvalue > 0.01
    # both tails: P(|x - loc| > 100 scale) = 2 atan(1/100) / pi, here 127 of 20,000
    far = (draws - loc).abs() > 100 * scale
    expected = 2 / math.pi * math.atan(0.01)
    assert (far.double().mean(0) - expected).abs().max() < 4 * math.sqrt(expected / 20_000)


def test_it_is_a_cauchy_distribution_otherwise():
    loc = torch.tensor([1.0], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    fn = TangentCauchy(loc, scale).expand([4, 1]).to_event(1)
    assert isinstance(fn.base_dist, TangentCauchy)
    prior = dist.Cauchy(torch.zeros(1), torch.ones(1)).expand([4, 1]).to_event(1)
    exact = kl_divergence(dist.Cauchy(loc, scale), dist.Cauchy(torch.zeros(1), torch.ones(1)))
    torch.testing.assert_close(kl_divergence(fn, prior), exact.expand(4))
    value = fn.rsample()
    value.sum().backward()
    assert loc.grad is not None
    assert scale.grad is not None
    torch.testing.assert_close(loc.grad, torch.tensor([4.0]))
    torch.testing.assert_close(scale.grad, ((value - loc) / scale).sum().detach().reshape(1))


def test_divergence_agrees_with_numerical_integration():
    q, p = (
        TangentCauchy(torch.tensor(0.7), torch.tensor(0.2)),
        dist.Cauchy(torch.tensor(1.0), torch.tensor(0.1)),
    )
    level = (
        torch.arange(200_000, dtype=torch.float64) + 0.5
    ) / 200_000  # the midpoint rule over quantiles of q
    z = q.icdf(level)
    numeric = (q.log_prob(z) - p.log_prob(z)).mean()
    torch.testing.assert_close(kl_divergence(q, p).double(), numeric, rtol=1e-5, atol=1e-7)
