# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The mathematics of the UCI benchmark: splits, scores in original units, and its fixed point of the evidence."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats

from benchmarks import uci_data
from benchmarks.gold_distances import distances
from benchmarks.uci_models import Member, Regression, Settings, settle_noise
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.nn import bayesian_


def test_split_is_standardised_by_its_training_part_and_skips_padding(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.normal(3.0, 2.0, (20, 3)), rng.normal(-5.0, 4.0, 20)
    x[:, 2] = 7.0  # a constant input must not become NaN
    (tmp_path / "uci").mkdir()
    np.savez(tmp_path / "uci/toy.npz", x=x, y=y, test_index=[[1, 4]], gap_test_index=[[0, 2, 3], [5, 6, -1]])
    monkeypatch.setattr(uci_data, "DATA", tmp_path)
    split = uci_data.load("toy", "gap", 1)
    train = np.setdiff1d(np.arange(20), [5, 6])
    sd = y[train].std(ddof=1)
    assert split.scale == pytest.approx(sd)
    np.testing.assert_allclose(split.y_test * sd + y[train].mean(), y[[5, 6]])
    np.testing.assert_allclose(split.x[:, :2].std(0), 1.0)
    np.testing.assert_allclose(split.x[:, 2], 0.0)
    held_out = uci_data.load("toy", "standard", 0, validate=True)
    raw = held_out.y_test * held_out.scale
    # of the 18 training rows a fifth is held out, none of them a test row
    offsets = (raw[:, None] - raw).flatten()
    allowed = np.delete(y, [1, 4])
    assert len(held_out.y_test) == 3
    assert len(held_out.y) == 15
    assert all(np.abs(allowed[:, None] - allowed - float(o)).min() < 1e-9 for o in offsets)


def test_scores_are_those_of_the_mixture_in_original_units():
    scale, shift = 3.0, 10.0
    mean = torch.tensor([[0.2, -1.0], [0.6, 1.5]], dtype=torch.float64)
    variance = torch.tensor([[0.3, 0.2], [0.1, 0.5]], dtype=torch.float64)
    y = torch.tensor([0.5, 4.0], dtype=torch.float64)
    found = uci_data.scores(mean, variance, y, scale)
    mu, sd = mean.numpy() * scale + shift, variance.sqrt().numpy() * scale
    target = y.numpy() * scale + shift
    log_density = np.log(stats.norm(mu, sd).pdf(target).mean(0))
    assert found["log_likelihood"] == pytest.approx(log_density.mean())
    assert found["rmse"] == pytest.approx(math.sqrt(((mu.mean(0) - target) ** 2).mean()))
    crps = [
        integrate.quad(
            lambda v, n=n: (stats.norm(mu[:, n], sd[:, n]).cdf(v).mean() - (v >= target[n])) ** 2,
            -20,
            50,
            points=[target[n]],
            limit=200,
        )[0]
        for n in range(2)
    ]
    assert found["crps"] == pytest.approx(np.mean(crps), rel=1e-5)
    # the second target lies in the upper tail of its mixture
    assert found["coverage"] == 0.5


@pytest.mark.parametrize("ard", [pytest.param(False, marks=pytest.mark.slow), True])
def test_potential_is_the_model_and_updates_converge_to_the_maximum_of_the_evidence(ard):
    torch.manual_seed(0)
    x = torch.randn(60, 2, dtype=torch.float64)
    y = torch.sin(2 * x[:, 0]) + 0.2 * torch.randn(60, dtype=torch.float64)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        settings = Settings(hidden=4, ard=ard, rounds=1, iterations=200)
        member = Member(2, settings).fit((x, y), seed=0)
        loc = member.guide.loc.detach()
        plain = member.potential((x, y))
        values = [
            torch.stack([plain(u), member.at(u, (x, y)).negative_log_joint((x, y))[0]])
            for u in (loc, 0.5 * loc)
        ]
        torch.testing.assert_close(*(values[0] - values[1]))
        for _ in range(100):
            guide = member.at(loc, (x, y)).laplace_approximation((x, y), map_tolerance=math.inf)
            member._update(guide, (x, y))
        guide = member.at(loc, (x, y)).laplace_approximation((x, y), map_tolerance=math.inf)
        for scale in member.scales.values():
            scale.requires_grad_(True)
        guide.log_evidence(data=(x, y)).backward()
        slopes = [(scale.grad * scale.detach()).abs().max() for scale in member.scales.values()]
        slopes.append(member.model.log_noise.grad.abs())
    finally:
        torch.set_default_dtype(before)
    assert max(slopes) < 1e-3


def test_distances_of_predictives_have_their_closed_forms():
    mean, sd, shift = 1.0, 0.5, 0.3
    p = torch.full((3, 2), mean, dtype=torch.float64), torch.full((3, 2), sd**2, dtype=torch.float64)
    q = p[0] + torch.tensor([0.0, shift]), p[1]
    found = distances(p, q)
    normal = stats.norm()
    total_variation = 2 * normal.cdf(shift / (2 * sd)) - 1
    mass = normal.cdf(1.96 - shift / sd) - normal.cdf(-1.96 - shift / sd)
    width = 2 * 1.96 * sd
    np.testing.assert_allclose(found["total_variation"], [0.0, total_variation], atol=1e-4)
    np.testing.assert_allclose(found["wasserstein"], [0.0, shift / sd], atol=1e-6)
    np.testing.assert_allclose(found["mass"], [0.95, mass], atol=5e-3)
    np.testing.assert_allclose(found["overlap"], [1.0, (width - shift) / (width + shift)], atol=1e-3)


def test_settled_noise_has_the_closed_form_of_linear_regression():
    """E_q (y - x w)^2 = (y - x m)^2 + x^2 s^2 for w ~ N(m, s^2)."""
    torch.manual_seed(0)
    x = torch.randn(50, 1, dtype=torch.float64)
    y = 2 * x[:, 0] + 0.3 * torch.randn(50, dtype=torch.float64)
    prior = dist.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    model = Regression(bayesian_(torch.nn.Linear(1, 1, bias=False).double(), prior=prior)).double()
    start = torch.tensor([[1.5]], dtype=torch.float64)
    guide = AutoMixture(model, 1, init_loc_fn=lambda site: start.clone(), init_scale=0.2)
    guide(x, y)
    settle_noise(model, guide, (x, y), 20_000)
    mean, scale = guide.median()["net.weight"].item(), guide.quantiles([0.5, stats.norm.cdf(1.0)])
    scale = (scale["net.weight"][1] - scale["net.weight"][0]).item()
    expected = (y - x[:, 0] * mean).square().mean() + x.square().mean() * scale**2
    # the noise of the mean over 20,000 draws is 0.5 % at most
    assert model.noise**2 == pytest.approx(float(expected), rel=0.01)
