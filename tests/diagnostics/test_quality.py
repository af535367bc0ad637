# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pyro_bnn.diagnostics.quality import (
    CalibrationRanks,
    compare_with_nuts,
    elbo_gap,
    functional_k,
    log_weights,
    pareto_k,
    simulation_based_calibration,
)
from tests.common import assert_close
from tests.diagnostics.test_arviz import exact_guide
from tests.infer.models import linear_data, linear_model, linear_posterior


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_pareto_k_of_pareto_ratios(shape: float) -> None:
    """exp(shape x exponential) has a Pareto tail with exactly that shape."""
    found = [pareto_k(shape * dist.Exponential(1.0).sample((5000,))) for _ in range(20)]
    # the fit averages the tail's shape with 10 pseudo-draws of 1/2; its standard error is (1 + k) / sqrt(M)
    tail = 3 * 5000**0.5
    expected = (shape * tail + 5) / (tail + 10)
    assert_close(sum(found) / 20, expected, atol=3 * (1 + shape) / (20 * tail) ** 0.5, rtol=0)
    assert pareto_k(torch.zeros(10)) == math.inf


def test_functional_k() -> None:
    """h r is Pareto with the shape of h where the ratios are constant."""
    values = torch.stack([torch.exp(0.8 * dist.Exponential(1.0).sample((20000,))), torch.rand(20000)], -1)
    found = functional_k(torch.zeros(20000), values)
    assert found[0] == pytest.approx(0.8, abs=0.15)
    assert found[1] < 0.2


def test_gap_of_gaussians() -> None:
    r"""q = N(m, s): E log w = log p(y) - KL(q || p), in closed form for the conjugate model."""
    x, y = linear_data(12)
    guide = exact_guide(x, y)
    covariance = torch.eye(12) * 0.25 + x @ x.T
    evidence = float(dist.MultivariateNormal(torch.zeros(12), covariance).log_prob(y))
    _, exact = log_weights(linear_model, guide, (x, y), 50)
    assert_close(elbo_gap(exact)["elbo"], evidence, rtol=1e-9)
    assert elbo_gap(exact)["gap"] == pytest.approx(0, abs=1e-9)

    with torch.no_grad():
        guide.loc += 0.1
    mean, cov = linear_posterior(x, y)
    shifted = dist.MultivariateNormal(mean + 0.1, cov)
    kl = float(torch.distributions.kl_divergence(shifted, dist.MultivariateNormal(mean, cov)))
    _, weights = log_weights(linear_model, guide, (x, y), 20000)
    found = elbo_gap(weights)
    assert found["elbo"] == pytest.approx(evidence - kl, abs=4 * found["elbo_error"])
    assert found["bound"] == pytest.approx(evidence, abs=0.2)
    delta = AutoDelta(linear_model)
    delta(x, y)
    with pytest.raises(ValueError, match="AutoDelta has no density"):
        log_weights(linear_model, delta, (x, y), 5)


def normal_mean(x: Tensor) -> None:
    """z ~ N(0, 1), four observations of N(z, 1)."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("obs", dist.Normal(z, 1.0))


def exact_recipe(scale: float) -> Any:
    def recipe(model: Any) -> dict[str, Tensor]:
        trace = pyro.poutine.trace(model).get_trace(torch.zeros(4))
        y = trace.nodes["obs"]["value"]
        assert trace.nodes["obs"]["is_observed"]
        return {"z": dist.Normal(y.sum() / 5, scale * (1 / 5) ** 0.5).sample((99,))}

    return recipe


def test_calibration_of_exact_and_of_narrow_posteriors() -> None:
    args = (torch.zeros(4),)
    exact = simulation_based_calibration(normal_mean, exact_recipe(1.0), args, num_simulations=500)
    assert exact.ranks["z"].shape == (500, 1)
    assert exact.p_values()["z"] > 0.01
    narrow = simulation_based_calibration(normal_mean, exact_recipe(0.5), args, num_simulations=500)
    assert narrow.p_values()["z"] < 1e-6
    counts = narrow.counts("z")
    assert min(counts[0], counts[-1]) > 2 * counts[4]
    ax = narrow.plot("z")
    assert len(ax.patches) >= 10
    ax.figure.clear()


def test_calibration_of_a_fit_and_of_quantities() -> None:
    from pyro_bnn.infer import fit

    x = torch.zeros(4)

    def recipe(model: Any) -> Any:
        guide = AutoNormal(model)
        fit(model, guide, (x,), num_steps=150, optim=0.05, progress_bar=False)
        return guide

    found = simulation_based_calibration(
        normal_mean, recipe, (x,), num_simulations=20, quantities=lambda d: {"square": d["z"] ** 2}
    )
    assert isinstance(found, CalibrationRanks)
    assert found.ranks["square"].shape == (20, 1)
    assert 10 < found.ranks["square"].mean() < 90


def test_agreement_with_nuts() -> None:
    x, y = linear_data(20)
    good = exact_guide(x, y)
    found = compare_with_nuts(linear_model, good, (x, y), num_samples=300, warmup_steps=100, num_chains=2)
    assert list(found["quantity"].values) == ["weight", "obs_mean"]
    assert float(found["r_hat"].max()) < 1.05
    assert float(found["shift"].max()) < 0.2
    assert_close(found["scale_ratio"].values, torch.ones(2), atol=0.15, rtol=0)

    poor = AutoMultivariateNormal(linear_model, init_scale=0.01)
    poor(x, y)
    with torch.no_grad():
        poor.loc.copy_(good.loc)
    bad = compare_with_nuts(linear_model, poor, (x, y), num_samples=50, warmup_steps=50, num_chains=2)
    assert float(bad["scale_ratio"].max()) < 0.3
