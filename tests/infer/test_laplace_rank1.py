# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.nn import bayesian_, init_to_trained, rank1_
from tests.common import assert_close


class Regression(PyroModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, y=None):
        f = self.net(x).squeeze(-1)
        with pyro.plate("data", x.shape[-2]):
            return pyro.sample("obs", dist.Normal(f, 0.3), obs=y)


def network():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


@pytest.mark.parametrize("convert", [rank1_, bayesian_, lambda net: bayesian_(net, packed=True)])
def test_converted_networks_use_the_structured_path(convert):
    x, y = torch.randn(15, 3), torch.randn(15)
    guide = AutoLaplace(Regression(convert(network())), init_loc_fn=init_to_trained).initialize(x, y)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    ((_, (site,)),) = guide._stream().run((x, y))
    assert len(site.jacobian.generic) == 0  # rank-1 factors and weights alike: no generic latent
    latent = guide.loc.detach()

    def location(u):
        trace = guide.packed.trace(u, ((x, y), {}))
        return trace.nodes["obs"]["fn"].loc

    J = torch.autograd.functional.jacobian(location, latent)

    def negative_log_prior(u):
        return -guide.packed.log_prior(u, guide.packed.trace(u, ((x, y), {})))

    prior = torch.autograd.functional.hessian(negative_log_prior, latent)
    assert_close(guide.precision, J.mT @ J / 0.3**2 + prior, rtol=1e-9, atol=1e-9)
    diagonal = AutoLaplace(Regression(convert(network())), structure="diagonal", init_loc_fn=init_to_trained)
    diagonal.initialize(x, y)
    diagonal.loc.data = latent.clone()
    diagonal.laplace_approximation((x, y), map_tolerance=float("inf"))
    assert diagonal.linearized_outputs(x)["obs"].variance.shape == (15, 1)
