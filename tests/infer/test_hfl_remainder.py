# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The remainder of a Hessian-free guide where targets leave few dimensions, or none."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_bnn.curvature.accumulate import NotAMinimumError
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace
from tests.common import assert_close


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)


@pytest.mark.parametrize("remainder", ["isotropic", "diagonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rotated", [False, True])
def test_targets_that_span_all_latents(remainder, dtype, rotated):
    """Nothing remains: the guide is the exact Gaussian posterior of a linear regression."""
    torch.set_default_dtype(dtype)
    x, y = torch.randn(20, 3), torch.randn(20)
    targets = torch.linalg.qr(torch.randn(3, 3)).Q if rotated else torch.eye(3)
    guide = AutoHessianFreeLaplace(model, remainder=remainder).initialize(x, y).polish((x, y), float64=True)
    guide.laplace_approximation((x, y), targets=(targets,))
    precision = torch.eye(3).double() + 4 * x.double().mT @ x.double()
    covariance = torch.linalg.inv(precision)
    mean = 4 * covariance @ x.double().mT @ y.double()
    exact = torch.distributions.MultivariateNormal(mean, covariance)
    slack = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-6, "atol": 1e-8}
    posterior = guide.posterior
    assert_close(posterior.variance, covariance.diagonal(), **slack)
    assert_close(posterior.quadratic_form(torch.eye(3)), covariance, **slack)
    value = exact.sample((5,))
    assert_close(posterior.log_prob(value.to(dtype)), exact.log_prob(value), rtol=1e-3, atol=1e-2)
    draws = guide.sample_posterior((20_000,))["w"].double()
    assert_close(draws.mean(0), mean, rtol=0, atol=0.01)
    assert_close(torch.cov(draws.mT), covariance, rtol=0.05, atol=0.003)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_dimension_remains(dtype):
    """The isotropic remainder has the curvature of the one direction that is left, here exactly."""
    torch.set_default_dtype(dtype)
    x, y = torch.tensor([[2.0, 1.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 3.0]]), torch.ones(3)
    guide = AutoHessianFreeLaplace(model, remainder="isotropic").initialize(x, y)
    guide.polish((x, y), float64=True).laplace_approximation((x, y), targets=(torch.eye(3)[:2],))
    covariance = torch.linalg.inv(torch.eye(3) + 4 * x.mT @ x)
    assert_close(guide.posterior.quadratic_form(torch.eye(3)), covariance, rtol=1e-4, atol=1e-6)


def test_flat_directions_have_no_remainder():
    def flat(x, y=None):
        w = pyro.sample("w", dist.ImproperUniform(dist.constraints.real_vector, (), (3,)))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)

    x = torch.randn(20, 3)
    x[:, 2] = 0.0
    y = torch.randn(20)
    for remainder in ("isotropic", "diagonal"):
        guide = AutoHessianFreeLaplace(
            flat, remainder=remainder, init_loc_fn=lambda site: torch.zeros(3)
        ).initialize(x, y)
        guide.loc.data[:2] = torch.linalg.lstsq(x[:, :2], y).solution
        with pytest.raises(NotAMinimumError, match=f"remainder='{remainder}'"):
            guide.laplace_approximation((x, y), targets=(torch.eye(3)[:2],))
