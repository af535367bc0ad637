# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Antithetic draws. Where the log likelihood is quadratic in the latents, its gradient is linear, so that the gradient of the
locations under a pair of draws is that under their mean: exact, whatever the draws are.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import nn

from pyro_bnn.infer import ComponentLoopWarning, Mixture_ELBO
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.nn import rank1_
from tests.common import assert_close
from tests.infer.models import NOISE, TextbookNet, linear_data, linear_model


def noise_free_gradient(x, y, loc, prior_loc=0.0, prior_scale=1.0):
    """Of minus the bound in the locations (K, d) of components of linear regression, by hand; the bound is their mean."""
    residual = loc @ x.T - y
    return (residual @ x / NOISE**2 + (loc - prior_loc) / prior_scale**2) / len(loc)


@pytest.mark.parametrize("kind", ["normal", "cauchy", "low_rank"])
@pytest.mark.parametrize(("K", "S"), [(1, 2), (3, 2), (3, 4)])
@pytest.mark.parametrize("way", ["direct", "called"])
def test_gradients_of_locations_have_no_noise(kind, K, S, way):
    pyro.set_rng_seed(0)
    x, y = linear_data(20)
    model = linear_model
    if kind == "cauchy":  # whose divergence from a Cauchy prior so wide has no gradient in the location

        def model(x, y=None):
            weight = pyro.sample("weight", dist.Cauchy(torch.zeros(3), 1e30).to_event(1))
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal((x * weight).sum(-1), NOISE), obs=y)

    guide = AutoMixture(model, K, kind, init_loc_fn=lambda site: torch.randn(3), init_scale=0.5)
    guide.initialize(x, y)
    elbo = Mixture_ELBO(num_particles=S, antithetic=True)
    loss = elbo(model, guide)
    if way == "direct":
        value = loss(x, y)
    else:  # a handler outside listens to the statements of the guide
        with poutine.scale(scale=1.0):
            value = loss(x, y)
    (found,) = torch.autograd.grad(value, guide.loc)
    wanted = noise_free_gradient(x, y, guide.loc.detach(), prior_scale=1e30 if kind == "cauchy" else 1.0)
    assert_close(found, wanted, rtol=1e-9 if kind != "cauchy" else 1e-6)
    plain = torch.autograd.grad(Mixture_ELBO(num_particles=S)(model, guide)(x, y), guide.loc)[0]
    assert float((plain - wanted).abs().max()) > 1e-3 * float(wanted.abs().max())


def test_of_components_one_by_one():
    pyro.set_rng_seed(0)
    x, y = linear_data(20)
    model = TextbookNet()
    guide = AutoMixture(model, 2, init_scale=0.5).initialize(x, y)
    with pytest.warns(ComponentLoopWarning):
        value = Mixture_ELBO(num_particles=4, antithetic=True)(model, guide)(x, y)
    (found,) = torch.autograd.grad(value, guide.loc)
    inputs = {"linear.weight": x, "linear.bias": torch.ones(len(x), 1)}
    columns = torch.cat([inputs[site.name] for site, _, _ in guide._blocks()], -1)
    assert_close(found, noise_free_gradient(columns, y, guide.loc.detach()), rtol=1e-9)


def test_of_noise_per_example():
    pyro.set_rng_seed(0)
    x, y = linear_data(20)
    net = rank1_(nn.Linear(3, 1, bias=False).double(), prior={"s": dist.Normal(1.0, 0.5)})
    weight = net.weight.detach().squeeze(0)

    def model(x, y=None):
        f = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, NOISE), obs=y)

    guide = AutoMixture(model, 3, noise="per_example", init_scale=0.5).initialize(x, y)
    value = Mixture_ELBO(num_particles=2, antithetic=True)(model, guide)(x, y)
    (found,) = torch.autograd.grad(value, guide.loc)
    assert_close(found, noise_free_gradient(x * weight, y, guide.loc.detach(), 1.0, 0.5), rtol=1e-9)


def test_beside_another_guide():
    """Draws of the other guide are free, and those of the mixture are pairs."""
    pyro.set_rng_seed(0)
    x, y = linear_data(20)

    def model(x, y=None):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((x * weight).sum(-1) + shift, NOISE), obs=y)

    guide = AutoGuideList(model)
    mixture = AutoMixture(poutine.block(model, hide=["shift"]), 2, init_scale=0.5)
    guide.append(mixture)
    guide.append(AutoNormal(poutine.block(model, expose=["shift"]), init_scale=1e-9))
    elbo = Mixture_ELBO(num_particles=2, antithetic=True)
    value = elbo(model, guide)(x, y)
    shift = guide[1].median()["shift"].detach()
    (found,) = torch.autograd.grad(value, mixture.loc)
    assert_close(found, noise_free_gradient(x, y - shift, mixture.loc.detach()), rtol=1e-6)


@pytest.mark.parametrize("antithetic", [False, True])
def test_expectations_stay(antithetic):
    """A positive latent: the expected log likelihood by Gauss-Hermite quadrature."""
    pyro.set_rng_seed(1)
    y = torch.tensor([0.7, 1.9])

    def model(y):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Exponential(z), obs=y)

    guide = AutoMixture(model, 2, init_scale=0.6).initialize(y)
    node, weight = (torch.from_numpy(v) for v in hermegauss(60))
    z = (guide.loc.detach() + guide.scale.detach() * node).exp()
    wanted = ((2 * z.log() - z * y.sum()) * weight).sum(-1).mean() / weight.sum()
    elbo = Mixture_ELBO(num_particles=200_000, antithetic=antithetic)
    elbo.loss(model, guide, y)
    spread = float((2 * z.log() - z * y.sum()).std()) * 3
    assert abs(elbo.parts["expected_log_likelihood"] - float(wanted)) < 4 * spread / 400_000**0.5


def test_odd_numbers_are_refused():
    with pytest.raises(ValueError, match="num_particles must be even, found 3"):
        Mixture_ELBO(num_particles=3, antithetic=True)
