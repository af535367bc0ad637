# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_bnn.infer import default_preset, dusenberry2020, fit
from pyro_bnn.model.handlers import SubstituteMessenger
from tests.common import assert_close
from tests.infer.test_mixture import D, N, X, Y


@pytest.mark.parametrize("preset", [default_preset(), dusenberry2020(N), dusenberry2020(N, family="cauchy")])
def test_presets_train(preset):
    net = preset.convert_(nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)))

    def model(x, y=None):
        f = net(x).squeeze(-1)
        with pyro.plate("data", N, subsample=torch.arange(len(x))):
            return pyro.sample("obs", dist.Normal(f, 0.3), obs=y)

    guide = preset.guide(model, num_components=2)
    elbo = preset.elbo(100)
    result = fit(model, guide, (X, Y), num_steps=100, optim=0.02, elbo=elbo, progress_bar=False)
    assert result.losses[-10:].mean() < result.losses[:10].mean()
    assert elbo.current_kl_scale() == 1.0
    draws = {n: v.unsqueeze(1) for n, v in guide.sample_posterior((6,)).items()}
    net.eval()
    with SubstituteMessenger(draws):
        assert net(X).shape == (6, N, 1)


def test_settings_of_the_paper():
    preset = dusenberry2020(50_000, l2=1e-4)
    elbo = preset.elbo(1000)
    assert (elbo.kl, elbo.likelihood, elbo.kl_scale.num_steps) == ("sum", "average", 800)
    assert_close(preset.weight_prior.scale, 1 / math.sqrt(2 * 50_000 * 1e-4), rtol=1e-6)
    guide = preset.guide(lambda: None)
    assert (guide.num_components, guide.noise) == (4, "per_example")
    assert_close(guide.init_scale, math.sqrt(1e-3 / 0.999))
    guide = preset.guide(lambda: None, num_components=2)
    net = preset.convert_(nn.Sequential(nn.Linear(400, 400), nn.BatchNorm1d(400)))
    assert set(net[0]._clips.values()) == {10.0}
    assert not hasattr(net[1], "num_components")  # one for all components
    nodes = dict(poutine.trace(net).get_trace(torch.randn(3, 400)).iter_stochastic_nodes())
    for name in ("0.r", "0.s"):
        prior = nodes[name]["fn"].base_dist
        assert_close([prior.loc[0], prior.scale[0]], [1.0, 0.1], rtol=1e-6)
        start = guide.init_loc_fn(nodes[name])
        assert_close(start.abs(), torch.ones(400))
        assert_close((start > 0).double().mean(), 0.5, rtol=0, atol=0.1)
    net = preset.convert_(nn.Linear(2, 2), clip=5.0)
    assert set(net._clips.values()) == {5.0}


def test_settings_of_the_default():
    preset = default_preset()
    elbo = preset.elbo(1000)
    assert (elbo.kl, elbo.likelihood, elbo.kl_scale.num_steps) == ("mean", "average", 800)
    guide = preset.guide(lambda: None)
    assert (guide.noise, guide.init_scale, guide.component) == ("shared", 0.1, "normal")
    net = preset.convert_(nn.Linear(16, 3))
    nodes = dict(poutine.trace(net).get_trace(torch.zeros(2, 16)).iter_stochastic_nodes())
    assert_close(nodes["weight"]["fn"].base_dist.scale, torch.ones(3, 16))  # 4 / sqrt(16)
    assert_close(nodes["r"]["fn"].base_dist.scale, torch.full((3,), 0.5))


def test_the_cauchy_preset():
    preset = dusenberry2020(50_000, family="cauchy")
    net = preset.convert_(nn.Linear(2, 2))
    assert set(net._clips.values()) == {10.0}
    guide = preset.guide(lambda: None)
    assert (guide.component, guide.noise) == ("cauchy", "per_example")
    assert guide.init_scale < preset.prior.scale / 10
    with pytest.raises(ValueError, match="'normal' or 'cauchy', found 'student'"):
        dusenberry2020(10, family="student")


def test_mixtures_are_fitted_with_their_own_bound():
    preset = default_preset()
    net = preset.convert_(nn.Sequential(nn.Linear(D, 1)))

    def model(x, y=None):
        f = net(x).squeeze(-1)
        with pyro.plate("data", N, subsample=torch.arange(len(x))):
            return pyro.sample("obs", dist.Normal(f, 0.3), obs=y)

    seen = []
    fit(model, preset.guide(model, 2), (X, Y), num_steps=1, progress_bar=False,
        callbacks=lambda state: seen.append(type(state.elbo).__name__))  # fmt: skip
    assert seen == ["Mixture_ELBO"]
