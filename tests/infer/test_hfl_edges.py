# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Hessian-free Laplace where something is zero: the curvature of a prior, the variance of a functional."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_bnn.infer import hfl
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.infer.hfl.low_rank import low_rank_factor, unit_scale
from pyro_bnn.infer.hfl.nystrom import inverse_root
from tests.common import assert_close

NOISE = 0.5


@pytest.fixture(scope="module")
def flat():
    """A linear model with a flat prior at its mode: the guide, the data and the covariance."""
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    x, y = torch.randn(20, 3), torch.randn(20)

    def model(x, y=None):
        w = pyro.sample("w", dist.ImproperUniform(dist.constraints.real_vector, (), (3,)))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ w, NOISE), obs=y)

    guide = AutoLaplace(model).initialize(x, y)
    guide.loc.data.copy_(torch.linalg.lstsq(x, y[:, None]).solution[:, 0])
    return guide, (x, y), NOISE**2 * torch.linalg.inv(x.mT @ x)


@pytest.mark.parametrize("preconditioner", ["prior", "nystrom", "diagonal"])
def test_preconditioners_of_models_with_flat_priors(flat, preconditioner):
    guide, data, covariance = flat
    targets = torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, -1.0]])
    result = hfl.solve(guide, data, (targets,), preconditioner=preconditioner, tolerance=1e-10)
    assert_close(result.variances, (targets @ covariance * targets).sum(-1), rtol=1e-8)


def test_inverse_roots_are_those_of_the_pseudo_inverse():
    half = torch.randn(5, 2) * torch.tensor([1e-3, 1.0, 1e3, 1.0, 1.0])[:, None]
    half[3] = 0.0
    gram = half @ half.mT
    root = inverse_root(gram)
    assert root.shape == (5, 2)
    assert bool(root.isfinite().all())
    assert (root[3] == 0).all()
    # whatever the scales: G R R' G = G
    scale = gram.diagonal().clamp(min=1e-300).sqrt()
    assert_close(
        gram @ root @ root.mT @ gram / scale / scale[:, None], gram / scale / scale[:, None], atol=1e-9
    )


def test_a_functional_without_variance_has_none_under_the_low_rank_guide():
    J, D = torch.randn(4, 6), torch.randn(4, 6)
    P = torch.randn(6, 6)
    P = P @ P.mT + torch.eye(6)
    J[2] = 0.0
    D = torch.linalg.solve(P, J.mT).mT
    C = J @ D.mT
    sd = unit_scale(C.diagonal())
    assert_close(sd[2], 1.0)
    W = low_rank_factor(J / sd[:, None], D / sd[:, None], C / sd / sd[:, None], 0.0)
    assert W.shape == (6, 3)
    assert_close(J @ W @ W.mT @ J.mT, C, atol=1e-9)
    more = torch.randn(9, 6)  # more functionals than latents
    DD = torch.linalg.solve(P, more.mT).mT
    W = low_rank_factor(more, DD, more @ DD.mT, 0.0)
    assert_close(W @ W.mT, torch.linalg.inv(P), rtol=1e-7, atol=1e-10)
    # what the responses do not resolve is left out
    assert low_rank_factor(J, D, C, 2 * float(torch.linalg.matrix_norm(C, 2))).shape == (6, 0)
