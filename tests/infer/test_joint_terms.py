# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Draws and divergences of many sites at once equal those site by site."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.distributions import kl_divergence

from pyro_bnn.infer import Mixture_ELBO
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.infer.autoguide.components import cauchy_divergence, normal_divergence
from pyro_bnn.infer.autoguide.data_rows import num_rows
from pyro_bnn.nn import HierarchicalPrior, rank1_
from tests.common import assert_close
from tests.infer.test_mixture import D, N, X, Y


def network(**options):
    return rank1_(nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 1)), **options)


def model_of(net, handler=None):
    run = net if handler is None else handler(net)

    def model(x, y=None):
        f = run(x).squeeze(-1)
        with pyro.plate("data", N, subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return model


def losses(model, guide, elbo, steps=3):
    """Loss, gradients and parts: with validation (traces), without (direct), again (sites read in silence)."""
    module = elbo(model, guide)
    module(X, Y)
    rows = []
    for step in range(steps):
        with pyro.validation_enabled(step == 0):
            pyro.set_rng_seed(5)
            for p in module.parameters():
                p.grad = None
            loss = module(X, Y)
            loss.backward()
            rows.append((loss.detach(), [p.grad.clone() for p in module.parameters()], elbo.parts))
    return rows


def test_closed_forms():
    loc, scale, loc_0, scale_0 = (
        torch.randn(2, 5),
        torch.rand(2, 5) + 0.1,
        torch.randn(5),
        torch.rand(5) + 0.1,
    )
    for family, divergence in ((dist.Normal, normal_divergence), (dist.Cauchy, cauchy_divergence)):
        expected = kl_divergence(family(loc, scale), family(loc_0.expand(2, 5), scale_0.expand(2, 5))).sum()
        assert_close(divergence(loc, scale, loc_0, scale_0), expected, rtol=1e-12)


@pytest.mark.every(3)
@pytest.mark.parametrize("noise", ["shared", "per_example"])
@pytest.mark.parametrize(("K", "particles"), [(1, 1), (3, 1), (2, 4)])
@pytest.mark.parametrize(
    ("prior", "component", "weight_prior"),
    [
        (dist.Normal(1.0, 0.1), "normal", dist.Normal(0.0, 0.3)),
        (dist.Cauchy(1.0, 0.1), "cauchy", None),
        (dist.LogNormal(0.0, 0.2), "lognormal", None),
        (dist.Cauchy(1.0, 0.1), "normal", None),
        (HierarchicalPrior(dist.HalfNormal(0.2)), "normal", None),
        ({"r": dist.Normal(1.0, 0.1), "s": dist.StudentT(3.0, 1.0, 0.1)}, {"s": "cauchy"}, None),
    ],
)
def test_three_ways_agree_to_the_last_bit(prior, component, weight_prior, K, particles, noise):
    model = model_of(network(prior=prior, weight_prior=weight_prior))
    guide = AutoMixture(model, K, component, noise=noise, init_scale=0.05).initialize(X, Y)
    for kl in ("mean", "sum", "exact"):
        elbo = Mixture_ELBO(kl=kl, num_particles=particles, max_plate_nesting=1)
        rows = losses(model, guide, elbo)
        for loss, grads, parts in rows[1:]:
            assert loss == rows[0][0]
            assert all(torch.equal(a, b) for a, b in zip(grads, rows[0][1], strict=True))
            assert parts == rows[0][2]


def test_terms_equal_those_of_pyro():
    model = model_of(network(weight_prior=dist.Normal(0.1, 0.3)))
    guide = AutoMixture(model, 3, init_scale=0.3).initialize(X, Y)
    elbo = Mixture_ELBO(max_plate_nesting=1)
    *_, (_, _, parts) = losses(model, guide, elbo)
    model_trace, guide_trace = elbo._get_trace(model, guide, (X, Y), {})
    kl = sum(kl_divergence(guide_trace.nodes[n]["fn"], model_trace.nodes[n]["fn"]).mean()
             for n in ("0.r", "0.s", "2.r", "2.s"))  # fmt: skip
    model_trace.compute_log_prob()
    log_prior = sum(
        model_trace.nodes[n]["log_prob"].mean() for n in ("0.bias", "2.bias", "0.weight", "2.weight")
    )
    assert_close(parts["kl"], kl.detach(), rtol=1e-12)
    assert_close(parts["log_prior"], log_prior.detach(), rtol=1e-12)


@pytest.mark.parametrize(
    ("handler", "factor"),
    [
        (lambda net: poutine.scale(net, 0.25), 0.25),
        (lambda net: poutine.mask(net, mask=torch.tensor(False)), 0.0),
    ],
)
def test_handlers_inside_the_model_are_heard(handler, factor):
    net = network()
    plain, handled = model_of(net), model_of(net, handler)
    guide = AutoMixture(plain, 2).initialize(X, Y)
    expected = losses(plain, guide, Mixture_ELBO(max_plate_nesting=1))[0][2]
    for _, _, parts in losses(handled, guide, Mixture_ELBO(max_plate_nesting=1)):
        assert_close(parts["kl"], factor * expected["kl"], rtol=1e-12)
        assert_close(parts["log_prior"], factor * expected["log_prior"], rtol=1e-12)


def test_changes_between_steps_are_noticed():
    net = network()
    model = model_of(net)
    guide = AutoMixture(model, 2, init_scale=0.1).initialize(X, Y)
    elbo = Mixture_ELBO(max_plate_nesting=1)
    module = elbo(model, guide)
    with pyro.validation_enabled(False):
        module(X, Y)
        module(X, Y)
        before = elbo.parts["kl"]
        prior = net[0]._sites["r"].prior.base_dist
        with torch.no_grad():
            prior.scale.data.set_(torch.full((), 0.2)).expand(4)
        fresh = Mixture_ELBO(max_plate_nesting=1)
        net[0]._sites["r"].prior = dist.Normal(1.0, 0.2).expand([4]).to_event(1)
        module(X, Y)
        fresh(model, guide)(X, Y)
        assert_close(elbo.parts["kl"], fresh.parts["kl"], rtol=1e-12)
        assert abs(elbo.parts["kl"] - before) > 0.1
        guide.initialize(X, Y)
        module = elbo(model, guide)
        module(X, Y)
        fresh(model, guide)(X, Y)
        assert_close(elbo.parts["kl"], fresh.parts["kl"], rtol=1e-12)


def test_noise_per_example_finds_the_examples():
    """Time-first inputs and packed sequences have no first dimension of examples."""
    T, B = 6, 4
    plain = nn.LSTM(3, 2)
    net = rank1_(plain, batch_dim=1)

    def model(x, y=None):
        f = net(x)[0].mean(-1)  # (..., T, B)
        with pyro.plate("data", B):
            pyro.sample("obs", dist.Normal(f[..., -1:, :], 0.5).to_event(0) if f.dim() > 2 else
                        dist.Normal(f[-1], 0.5), obs=y)  # fmt: skip

    x, y = torch.randn(T, B, 3), torch.randn(B)
    guide = AutoMixture(model, 2, noise="per_example").initialize(x, y)
    assert num_rows(guide._row_sources, (x, y), {}) == B
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 3, 2, 5]), enforce_sorted=False)
    guide._row_sources = [(0, 0, B)]
    assert num_rows(guide._row_sources, (packed,), {}) == B
    with pytest.raises(ValueError, match="one row per example"):
        num_rows(guide._row_sources, (None,), {})


@pytest.mark.parametrize("noise", ["shared", "per_example"])
@pytest.mark.parametrize("particles", [1, 3])
def test_every_site_draws_the_component_of_its_slot(noise, particles):
    """Whatever the family: with a vanishing scale the draws are the locations, in the order of the components."""
    model = model_of(network(weight_prior=dist.Normal(0.0, 1.0), prior={"r": dist.Normal(1.0, 0.1), "s": dist.Cauchy(1.0, 0.1)}))  # fmt: skip
    families = {"r": "normal", "0.s": "cauchy", "2.s": "cauchy", "0.weight": "normal", "2.weight": "delta", "2.bias": "cauchy"}  # fmt: skip
    guide = AutoMixture(model, 3, families, rest="normal", noise=noise, init_scale=1e-12).initialize(X, Y)
    elbo = Mixture_ELBO(num_particles=particles, max_plate_nesting=1)
    _, trace = elbo._get_trace(model, guide, (X, Y), {})
    draws = guide.sample_posterior((3, 1), by_component=True)
    for site, loc, _ in guide._blocks():
        value = trace.nodes[site.name]["value"].reshape(
            -1, 3, *trace.nodes[site.name]["value"].shape[-len(site.shape) - 1 :]
        )
        for k in range(3):
            expected = loc[k].detach()
            assert_close(value[:, k], expected.expand(value[:, k].shape), rtol=1e-6, atol=1e-6)
            assert_close(draws[site.name][k, 0], expected, rtol=1e-6, atol=1e-6)


def test_changes_in_place_and_new_parameters_are_those_of_a_new_bound():
    net = network()
    model = model_of(net)
    loc, scale = torch.ones(4), torch.full((4,), 0.3)
    net[0]._sites["r"].prior = dist.Normal(loc, scale).to_event(1)
    guide = AutoMixture(model, 2, init_scale=0.1).initialize(X, Y)
    elbo = Mixture_ELBO(max_plate_nesting=1)

    def kl(elbo):
        with pyro.validation_enabled(False):
            elbo(model, guide)(X, Y)
        return elbo.parts["kl"]

    def narrower():
        guide.init_scale = 0.05
        guide.initialize(X, Y)

    seen = [kl(elbo)]
    for change in (lambda: scale.mul_(2.0), lambda: loc.add_(1.0), narrower):
        change()
        seen.append(kl(elbo))
        assert_close(seen[-1], kl(Mixture_ELBO(max_plate_nesting=1)), rtol=1e-12)
        assert abs(seen[-1] - seen[-2]) > 1e-3
