# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Which prior of a factor induces which prior of a weight: draws of layers against densities in closed form."""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad
from scipy.special import exp1, k0
from scipy.stats import kstest, t
from torch.distributions.transforms import PowerTransform

from pyro_bnn.nn import BayesianLinear, HierarchicalPrior, Rank1Linear

N, SIGMA = 20_000, 0.5


def cdf_of(density):
    """The distribution function of a symmetric density, by quadrature on a grid."""
    grid = torch.cat([torch.zeros(1), torch.logspace(-8, 6, 1500)]).numpy()
    parts = [quad(density, a, b)[0] for a, b in itertools.pairwise(grid)]
    half = torch.tensor([0.0, *parts]).cumsum(0).numpy()
    assert half[-1] == pytest.approx(0.5, abs=1e-5)

    def cdf(w):
        value = torch.as_tensor(w).abs().numpy()
        inner = torch.as_tensor(half)[
            torch.searchsorted(torch.as_tensor(grid), torch.as_tensor(value)).clamp_max(1500)
        ]
        return (0.5 + torch.as_tensor(w).sign() * inner).numpy()

    return cdf


def horseshoe(w):
    return math.exp(w**2 / 2) * exp1(w**2 / 2) / math.sqrt(2 * math.pi**3) if w < 30 else 2 / w**2 / math.sqrt(
        2 * math.pi**3
    )  # fmt: skip


def root_of_inverse_gamma(nu):
    variance = dist.InverseGamma(torch.tensor(nu / 2), torch.tensor(nu / 2))
    return dist.TransformedDistribution(variance, [PowerTransform(torch.tensor(0.5))])


@pytest.mark.parametrize(
    ("prior", "cdf"),
    [
        (dist.Normal(0.0, 1.0), lambda: cdf_of(lambda w: k0(w) / math.pi)),
        (dist.Cauchy(0.0, 1.0), lambda: cdf_of(horseshoe)),
        (dist.HalfCauchy(1.0), lambda: cdf_of(horseshoe)),
        (root_of_inverse_gamma(3.0), lambda: t(3).cdf),
    ],
)
def test_effective_weights_of_rank1_layers(prior, cdf):
    layer = Rank1Linear(1, N, bias=False, weight_prior=dist.Normal(0.0, SIGMA), prior={"r": prior}, clip=1e9)
    weight = layer(torch.ones(1, 1))[0] / SIGMA
    assert kstest(weight.numpy(), cdf()).pvalue > 0.01
    # and the other families are told apart
    assert kstest(weight.numpy(), "norm").pvalue < 1e-6


@pytest.mark.parametrize(
    ("scale_prior", "variance", "cdf"),
    [
        (dist.HalfCauchy(1.0), False, lambda: cdf_of(horseshoe)),
        (dist.InverseGamma(1.5, 1.5), True, lambda: t(3).cdf),
    ],
)
def test_full_weights_under_a_hierarchy(scale_prior, variance, cdf):
    prior = HierarchicalPrior(scale_prior, variance=variance, level="site", loc=0.0)
    layer = BayesianLinear(1, 1, bias=False, prior={"weight": prior})
    x = torch.ones(1, 1)
    weight = torch.stack([layer(x)[0, 0] for _ in range(2000)])
    assert kstest(weight.detach().numpy(), cdf()).pvalue > 0.01
