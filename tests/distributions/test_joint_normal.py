# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
import torch.distributions as td

from pyro_bnn.distributions.joint_normal import JointNormal, cholesky
from tests.common import assert_close


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("batch", "event"), [((), (3,)), ((4,), (2, 3)), ((2, 3), (2,))])
def test_it_is_the_flattened_gaussian(batch, event, log):
    n = torch.Size(event).numel()
    loc = torch.randn(batch + event)
    A = 0.3 * torch.randn(batch + (n, n))
    covariance = A @ A.mT + 0.1 * torch.eye(n)
    d = JointNormal(loc, covariance, len(event), log=log)
    assert d.batch_shape == batch
    assert d.event_shape == event
    flat = td.MultivariateNormal(loc.reshape(batch + (n,)), covariance)
    base = td.TransformedDistribution(flat, td.ExpTransform()) if log else flat
    for sample in ((), (6,), (2, 6)):
        value = torch.randn(sample + batch + event)
        value = value.exp() if log else value
        expected = base.log_prob(value.reshape(sample + batch + (n,)))
        assert_close(d.log_prob(value), expected, rtol=1e-9)
        assert d.sample(torch.Size(sample)).shape == sample + batch + event
    variance = covariance.diagonal(dim1=-2, dim2=-1).reshape(batch + event)
    each = td.LogNormal(loc, variance.sqrt()) if log else td.Normal(loc, variance.sqrt())
    assert_close(d.mean, each.mean, rtol=1e-10)
    assert_close(d.variance, each.variance, rtol=1e-9)
    assert_close(d.covariance_matrix, covariance, rtol=1e-9, atol=1e-12)
    draws = d.sample((20_000,))
    draws = (draws.log() if log else draws).reshape((20_000,) + batch + (n,))
    centred = draws - loc.reshape(batch + (n,))
    found = torch.einsum("s...i,s...j->...ij", centred, centred) / 20_000
    sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((found - covariance).abs() / (sd.unsqueeze(-1) * sd.unsqueeze(-2))).max() < 5.5 * (
        2 / 20_000
    ) ** 0.5
    assert d.support.check(draws.exp().reshape((20_000,) + batch + event) if log else d.sample((3,))).all()
    if log:
        assert not d.support.check(-torch.ones(batch + event)).any()


def test_factors_are_found_in_double_precision_where_that_is_needed():
    P = torch.eye(2) + (1 - 2e-8) * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert_close(cholesky(P) @ cholesky(P).mT, P, rtol=1e-12)
    with pytest.raises(ValueError, match="1 of 2 predictive covariances are not positive definite"):
        cholesky(torch.stack([torch.eye(2), -torch.eye(2)]))
    single = torch.stack([torch.eye(3), torch.eye(3)]).float()
    assert cholesky(single).dtype == torch.float32
