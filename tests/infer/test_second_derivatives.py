# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Hessians through operations whose derivatives torch does not batch, or knows for one implementation only."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.func import functional_call

from pyro_bnn.infer import hfl
from pyro_bnn.infer.autoguide import AutoLaplace
from tests.common import assert_close


class Attends(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.query = torch.nn.Linear(4, 4)

    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(self.query(x), x, x)[:, 0, 0]


class Grouped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = torch.nn.Linear(4, 4), torch.nn.GroupNorm(2, 4)

    def forward(self, x):
        return self.norm(torch.tanh(self.first(x[:, 0])))[:, :2].square().sum(-1)


@pytest.mark.parametrize("network", [Attends, Grouped])
def test_hessians(network):
    net = network().requires_grad_(False)
    shapes = {name: value.shape for name, value in net.named_parameters()}
    x, y = torch.randn(9, 3, 4), torch.randn(9)

    def model(x, y=None):
        values = {
            name: pyro.sample(name, dist.Normal(torch.zeros(shape), 0.2).to_event(len(shape)))
            for name, shape in shapes.items()
        }
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(functional_call(net, values, (x,)), 2.0), obs=y)

    guide = AutoLaplace(model, curvature="hessian").initialize(x, y).polish((x, y))
    loc = guide.loc.detach()

    def loss(u):
        values = guide.packed.space.unpack(u)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            f = functional_call(net, values, (x,))
        prior = torch.distributions.Normal(0.0, 0.2).log_prob(u).sum()
        return -torch.distributions.Normal(f, 2.0).log_prob(y).sum() - prior

    leaf = loc.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    rows = [torch.autograd.grad(g, leaf, retain_graph=True)[0] for g in gradient]  # one by one
    covariance = torch.linalg.inv(torch.stack(rows))
    guide.laplace_approximation((x, y))
    assert_close(guide.posterior.covariance_matrix, covariance, rtol=1e-6, atol=1e-9)
    found = hfl.variance(guide, (x, y), functional=lambda latents: guide.packed.space.pack(latents))
    assert_close(found, covariance.diagonal(), rtol=1e-5)
