# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A network at given latents is what torch.func.functional_call says."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.func import functional_call

from pyro_bnn.infer import hfl, network_at, posterior_predictive
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.nn import bayesian_, rank1_
from tests.common import assert_close


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 1))


def model_of(net: Any) -> Any:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = net(x).squeeze(-1)
        noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, noise), obs=y)

    return model


def test_it_is_the_functional_call() -> None:
    x = torch.randn(6, 2, requires_grad=True)
    net = plain()
    converted = bayesian_(plain().eval())
    guide = AutoLaplace(model_of(converted), structure="diagonal").initialize(x.detach(), torch.randn(6))
    latents = {name: value.requires_grad_() for name, value in guide.median().items()}
    # batch normalisation has no sites of its own here
    weights = {name: value for name, value in latents.items() if name != "noise"}
    expected = functional_call(net.eval(), weights, (x,))
    found = network_at(converted.train(), latents)(x)
    assert converted.training
    assert_close(found, expected)
    cotangent = torch.randn_like(found)
    inputs = [x, *weights.values()]
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
        strict=True,
    ):
        assert_close(mine, theirs)


def test_draws_one_by_one_are_the_predictions() -> None:
    net = rank1_(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)))
    model, x = model_of(net), torch.randn(5, 2)
    guide = AutoLaplace(model, structure="diagonal").initialize(x, torch.randn(5))
    draws = {name: value + 0.1 * torch.rand_like(value) for name, value in guide.median().items()}
    stacked = {name: torch.stack([value, 2 * value, value + 1]) for name, value in draws.items()}
    found = posterior_predictive(model, stacked, x).mean
    for i in range(3):
        one = {name: value[i] for name, value in stacked.items()}
        assert_close(network_at(net, one)(x).squeeze(-1), found[i])  # type: ignore[index]
    with pytest.raises(ValueError, match=r"has shape \(3, .*pass one draw at a time"):
        network_at(net, stacked)(x)


def test_functionals_of_a_network() -> None:
    x, y = torch.randn(20, 2), torch.randn(20)
    net = bayesian_(nn.Linear(2, 1))
    guide = AutoLaplace(model_of(net), curvature="hessian").initialize(x, y).polish(x, y)
    inside = torch.randn(2)

    def slope(latents: dict[str, Tensor]) -> Tensor:
        at = inside.clone().requires_grad_()
        return torch.autograd.grad(network_at(net, latents)(at[None]).exp().sum(), at, create_graph=True)[0]

    found = hfl.covariance(guide, x, y, targets=None, functional=slope, tolerance=1e-10)
    covariance = guide.laplace_approximation(x, y).posterior.covariance_matrix
    space = guide.packed.space

    def closed(u: Tensor) -> Tensor:  # the gradient of exp(w x + b) is w times its value
        latents = space.unpack(u)
        return latents["weight"][0] * (latents["weight"][0] @ inside + latents["bias"]).exp()

    J = torch.autograd.functional.jacobian(closed, guide.loc.detach())
    assert_close(found, J @ covariance @ J.mT, rtol=1e-6)


def test_modules_of_pyro_and_what_is_refused() -> None:
    net = PyroModule[nn.Linear](2, 1)
    net.weight = PyroSample(dist.Normal(torch.zeros(1, 2), 1.0).to_event(2))
    x, weight = torch.randn(3, 2), torch.randn(1, 2)
    assert_close(network_at(net, {"weight": weight})(x), x @ weight.mT + net.bias)
    assert not pyro.poutine.trace(network_at(net, {"weight": weight})).get_trace(x).stochastic_nodes
    with pytest.raises(
        ValueError, match=r"samples site 'weight', of which latents hold no value \(found \['w'\]\)"
    ):
        network_at(net, {"w": weight})(x)
    with pytest.raises(ValueError, match=r"the network \(Linear\) samples no site: convert it"):
        network_at(nn.Linear(2, 1), {"weight": weight})(x)


def test_networks_of_the_same_names_keep_their_own_parameters() -> None:
    class Scaled(PyroModule):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = PyroParam(torch.tensor(scale), dist.constraints.positive)
            self.weight = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.weight * x

    latents, x = {"weight": torch.tensor(3.0)}, torch.ones(2)
    pyro.clear_param_store()
    for scale in (1.0, 2.0):
        assert_close(network_at(Scaled(scale), latents)(x), 3.0 * scale * x)
    assert not list(pyro.get_param_store().keys())
