# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
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


def test_errors():
    _, model = classifier(rank1_)
    x, y = torch.randn(6, 3), torch.randint(4, (6,))
    guide = AutoMixture(model, 2).initialize(x, y)
    with pytest.raises(ValueError, match=r"site='y', but the observed sites are \['obs'\]"):
        diversity(model, guide, (x, y), site="y")
    with pytest.raises(ValueError, match="first sample dimension of size 2"):
        guide.sample_posterior((3,), by_component=True)
