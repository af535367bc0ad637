# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_bnn.distributions.factor_normal import FactorNormal
from tests.common import assert_close


def with_remainder(p=6, r=3):
    loc, factor = torch.randn(p), torch.randn(p, r)
    basis = torch.linalg.qr(torch.randn(p, r)).Q.mT
    precision = torch.rand(p) + 0.5
    d = FactorNormal(loc, factor, basis, precision)
    R = torch.diag(1 / precision)
    remainder = R - R @ basis.mT @ torch.linalg.solve(basis @ R @ basis.mT, basis @ R)
    return d, factor @ factor.mT + remainder


@pytest.mark.parametrize(("p", "r"), [(6, 3), (4, 4), (5, 1)])
def test_density_is_that_of_a_dense_gaussian(p, r):
    d, covariance = with_remainder(p, r)
    x = d.loc + torch.randn(10, p)
    dense = MultivariateNormal(d.loc, 0.5 * (covariance + covariance.mT))
    assert_close(d.log_prob(x), dense.log_prob(x), rtol=1e-9)
    assert_close(d.variance, covariance.diagonal(), rtol=1e-9)
    rows = torch.randn(2, 3, p)
    assert_close(d.quadratic_form(rows), rows @ covariance @ rows.mT, rtol=1e-8, atol=1e-10)


def test_draws_have_the_covariance():
    d, covariance = with_remainder()
    draws = d.rsample((200_000,))
    assert_close(draws.T.cov(), covariance, rtol=0, atol=0.02 * float(covariance.max()))
    assert d.rsample((2, 3)).shape == (2, 3, 6)


def test_the_remainder_leaves_the_basis_alone():
    d, _ = with_remainder()
    rows = torch.randn(2, 3) @ d.basis
    assert_close(d.quadratic_form(rows), rows @ d.factor @ d.factor.mT @ rows.mT, rtol=1e-9)


def test_no_density_without_a_remainder():
    with pytest.raises(ValueError, match="rank 2 over 5 dimensions has no density"):
        FactorNormal(torch.zeros(5), torch.randn(5, 2)).log_prob(torch.zeros(5))
    with pytest.raises(ValueError, match="go together"):
        FactorNormal(torch.zeros(5), torch.randn(5, 2), torch.randn(2, 5))
    with pytest.raises(ValueError, match="basis has shape"):
        FactorNormal(torch.zeros(5), torch.randn(5, 2), torch.randn(3, 5), torch.ones(5))
