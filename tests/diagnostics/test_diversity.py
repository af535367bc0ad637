# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import nn
from torch.distributions import kl_divergence

from pyro_bnn.diagnostics import diversity
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.nn import bayesian_, rank1_
from tests.common import assert_close
from tests.infer.test_mixture import X, Y, rank1_model


def classifier(convert):
    net = convert(nn.Linear(3, 4))

    def model(x, y=None):
        f = net(x)
        with pyro.plate("data", 300, subsample_size=len(x)):
            return pyro.sample("obs", dist.Categorical(logits=f), obs=y)

    return net, model


def test_ensemble_against_direct_computation():
    _, model = classifier(bayesian_)
    x, y = torch.randn(30, 3), torch.randint(4, (30,))
    guide = AutoMixture(model, 3, "delta").initialize(x, y)
    report = diversity(model, guide, [(x[:20], y[:20]), (x[20:], y[20:])], num_samples=2)
    values = {n: d.sample() for n, d in guide.component_distributions().items()}
    logits = torch.stack([F.linear(x, values["weight"][k], values["bias"][k]) for k in range(3)])
    log_p = logits.log_softmax(-1)
    each = log_p[:, torch.arange(30), y]
    assert_close(report.member_nll, -each.mean(-1))
    assert_close(report.mixture_nll, -(each.logsumexp(0) - math.log(3)).mean())
    label = logits.argmax(-1)
    for i in range(3):
        for j in range(3):
            assert_close(report.disagreement[i, j], (label[i] != label[j]).double().mean())
            expected = (log_p[i].exp() * (log_p[i] - log_p[j])).sum(-1).mean()
            assert_close(report.predictive_kl[i, j], expected, rtol=1e-6, atol=1e-12)
    assert report.guide_kl is None
    assert not report.collapsed
    assert report.num_observations == 30
    assert "disagreement" in str(report)


def test_guide_divergence_and_collapse():
    _, model = rank1_model()
    guide = AutoMixture(model, 2, init_scale=0.1).initialize(X, Y)
    report = diversity(model, guide, (X, Y), num_samples=3)
    expected = torch.zeros(2, 2)
    for fn in guide.component_distributions().values():
        if isinstance(fn.base_dist if hasattr(fn, "base_dist") else fn, dist.Delta):
            continue
        loc, scale = fn.base_dist.loc, fn.base_dist.scale
        for i in range(2):
            for j in range(2):
                p, q = (dist.Normal(loc[k], scale[k]) for k in (i, j))
                expected[i, j] += kl_divergence(p, q).sum()
    assert_close(report.guide_kl, expected)
    low_rank = AutoMixture(model, 2, "low_rank").initialize(X, Y)
    assert diversity(model, low_rank, (X, Y), num_samples=1).guide_kl.diagonal().abs().max() < 1e-9
    pyro.set_rng_seed(0)
    same = AutoMixture(
        model, 2, init_scale=1e-4, init_loc_fn=lambda site: torch.ones_like(site["fn"].sample())
    )
    report = diversity(model, same.initialize(X, Y), (X, Y), num_samples=1)
    assert report.collapsed
    assert "collapsed" in str(report)
    assert_close(report.guide_distance, torch.zeros(2, 2))


def regression(observe):
    net = bayesian_(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)))

    def model(x, y=None):
        f = net(x)
        with pyro.plate("data", 300, subsample_size=len(x)):
            return pyro.sample("obs", observe(f), obs=y)

    return net, model


def test_predictions_of_components_are_averages_over_draws():
    """Normals with the moments of the predictions; binary labels exactly."""
    K, S = 3, 5
    x, y = torch.randn(20, 3), torch.randn(20, 2)
    for observe in (
        lambda f: dist.Normal(f, 0.4).to_event(1),
        lambda f: dist.Bernoulli(logits=4 * f).to_event(1),
        lambda f: dist.Cauchy(f, 0.4).to_event(1),
    ):
        binary = "Bernoulli" in repr(observe(torch.zeros(1, 2)))
        net, model = regression(observe)
        net(10 + 3 * x)  # running statistics that are not those of the data
        before = {n: b.clone() for n, b in net.named_buffers()}
        guide = AutoMixture(model, K, init_scale=0.5).initialize(x, y := (y > 0).double() if binary else y)
        net.load_state_dict({**net.state_dict(), **before})
        pyro.set_rng_seed(1)
        report = diversity(model, guide, [(x[:12], y[:12]), (x[12:], y[12:])], num_samples=S)
        assert net.training
        for n, b in net.named_buffers():
            assert_close(b, before[n], rtol=0)
        pyro.set_rng_seed(1)
        draws = guide.sample_posterior((K, S), by_component=True)
        f = x @ draws["0.weight"].mT + draws["0.bias"].unsqueeze(-2)
        f = (f - before["1.running_mean"]) / (before["1.running_var"] + 1e-5).sqrt()  # no dropout either
        each = observe(f).log_prob(y).logsumexp(1) - math.log(S)
        assert_close(report.member_nll, -each.mean(-1))
        assert_close(report.mixture_nll, -(each.logsumexp(0) - math.log(K)).mean())
        if binary:
            p = (4 * f).sigmoid().mean(1)
            made = [dist.Bernoulli(p[k]) for k in range(K)]
            for i in range(K):
                for j in range(K):
                    assert_close(report.disagreement[i, j], ((p[i] > 0.5) != (p[j] > 0.5)).double().mean())
        else:
            made = [dist.Normal(f[k].mean(0), (0.16 + f[k].var(0, correction=0)).sqrt()) for k in range(K)]
            assert report.disagreement is None
        if "Cauchy" in repr(observe(f)):
            assert report.predictive_kl is None
            continue
        for i in range(K):
            for j in range(K):
                expected = kl_divergence(made[i], made[j]).sum() / 20
                assert_close(report.predictive_kl[i, j], expected, rtol=1e-6, atol=1e-12)


def test_guides_of_several_parts_and_constrained_sites():
    def model(x, y=None):
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        slope = pyro.sample("slope", dist.Cauchy(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(share * slope * x, sigma), obs=y)

    x = torch.linspace(-1, 1, 9)
    parts = AutoGuideList(model)
    families = {"share": "normal", "slope": "cauchy"}
    parts.append(AutoMixture(poutine.block(model, hide=["sigma"]), 2, families, init_scale=0.3))
    parts.append(AutoNormal(poutine.block(model, expose=["sigma"])))
    parts(x, x)
    report = diversity(model, parts, (x, x), num_samples=4)
    assert report.num_observations == 9
    loc, scale = parts[0].loc, parts[0]._full_scale()
    names = [site.name for site, _, _ in parts[0]._blocks()]
    for i in range(2):
        for j in range(2):
            # divergences do not depend on the bijection to the support
            pairs = [(dist.Cauchy if n == "slope" else dist.Normal, c) for c, n in enumerate(names)]
            made = [(f(loc[i, c], scale[i, c]), f(loc[j, c], scale[j, c])) for f, c in pairs]
            expected = sum(kl_divergence(p, q) for p, q in made)
            assert_close(report.guide_kl[i, j], expected.detach(), rtol=1e-9, atol=1e-12)
    shared = AutoMixture(model, 2, "point").initialize(x, x)
    assert_close(diversity(model, shared, (x, x)).guide_distance, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="type AutoNormal, holds 0"):
        diversity(model, parts[1], (x, x))


def test_errors():
    _, model = classifier(rank1_)
    x, y = torch.randn(6, 3), torch.randint(4, (6,))
    guide = AutoMixture(model, 2).initialize(x, y)
    with pytest.raises(ValueError, match=r"site='y', but the observed sites are \['obs'\]"):
        diversity(model, guide, (x, y), site="y")
    with pytest.raises(ValueError, match="first sample dimension of size 2"):
        guide.sample_posterior((3,), by_component=True)
