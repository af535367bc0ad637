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
        with pyro.plate("data", len(f)):
            return pyro.sample("obs", dist.Normal(f, 0.3), obs=y)


def network():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


class Last(nn.Module):
    def forward(self, x):
        return x[0][:, -1]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0].mean(1)


#: name -> (network, shape of an example; None for tokens)
LAYERS = {
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1)), (2, 4, 4)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 1)), (2, 3, 3, 3)),
    "conv_transpose2d": (lambda: nn.Sequential(nn.ConvTranspose2d(2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 1)), (2, 3, 3)),
    "lstm": (lambda: nn.Sequential(nn.LSTM(4, 3, batch_first=True), Last(), nn.Linear(3, 1)), (5, 4)),
    "gru": (lambda: nn.Sequential(nn.GRU(4, 3, batch_first=True), Last(), nn.Linear(3, 1)), (5, 4)),
    "attention": (lambda: nn.Sequential(Attention(), nn.Linear(4, 1)), (5, 4)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 1)), None),
}  # fmt: skip


@pytest.mark.every(2)
@pytest.mark.parametrize("weights", [None, dist.Normal(0.0, 0.5)])
@pytest.mark.parametrize("name", LAYERS)
def test_rank1_layers_of_every_kind(name, weights):
    build, shape = LAYERS[name]
    x = torch.randint(0, 7, (6, 5)) if shape is None else torch.randn(6, *shape)
    y = torch.randn(6)
    net = rank1_(build()) if weights is None else rank1_(build(), weight_prior=weights)
    guides = {}
    model = Regression(net)
    for structure in ("full", "diagonal", "kronecker"):
        guide = AutoLaplace(model, structure=structure, init_loc_fn=init_to_trained).initialize(x, y)
        if structure == "full":
            guide.loc.data += 0.1 * torch.randn_like(guide.loc)
        else:
            guide.loc.data = guides["full"].loc.detach().clone()
        guides[structure] = guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    latent = guides["full"].loc.detach()

    def location(u):
        return guides["full"].packed.trace(u, ((x, y), {})).nodes["obs"]["fn"].loc

    J = torch.autograd.functional.jacobian(location, latent)
    prior = torch.autograd.functional.hessian(
        lambda u: -guides["full"].packed.log_prior(u, guides["full"].packed.trace(u, ((x, y), {}))), latent
    )
    dense = J.mT @ J / 0.3**2 + prior
    assert_close(guides["full"].precision, dense, rtol=1e-8, atol=1e-9)
    assert_close(guides["diagonal"].precision, dense.diagonal(), rtol=1e-8, atol=1e-9)
    for guide in guides.values():
        covariance = guide.posterior.quadratic_form(torch.eye(len(latent)))
        found = guide.linearized_outputs(x)["obs"].variance[:, 0]
        assert_close(found, (J @ covariance * J).sum(-1), rtol=1e-8)
    last = AutoLaplace.last_layer(model, init_loc_fn=init_to_trained).initialize(x, y)
    last.laplace_approximation((x, y), map_tolerance=float("inf"))
    sites = [k for k, where in last.packed.space.slices.items() if bool(last.active[where].all())]
    layer = sites[0].rpartition(".")[0]
    assert {"r", "s", "bias"} <= {site.removeprefix(layer + ".") for site in sites}
    assert int(last.active.sum()) == sum(
        where.stop - where.start for k, where in last.packed.space.slices.items() if k.startswith(layer + ".")
    )


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
