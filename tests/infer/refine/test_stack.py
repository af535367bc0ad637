# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Stacking of guides, components and chains: their densities by hand, leave-one-out against closed forms and ArviZ."""

import math
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import Tensor

from pyro_bnn import AutoLaplace, AutoLaplaceMixture, AutoMixture
from pyro_bnn.infer import ChainResult
from pyro_bnn.infer.autoguide import AutoEmpirical
from pyro_bnn.infer.refine.stacking import leave_one_out, stack, stacking_weights
from tests.common import assert_close

X = torch.linspace(-1, 1, 12, dtype=torch.float64)
Y = torch.where(X < 0.3, X, -X) + 0.05 * torch.sin(20 * X)


def model(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(w * x, 0.3), obs=y)


def predictive(w: Tensor) -> Tensor:
    """Log predictive densities of draws, by hand."""
    return dist.Normal(w.unsqueeze(-1) * X, 0.3).log_prob(Y).logsumexp(0) - math.log(len(w))


CHAINS = torch.stack([1 + 0.1 * torch.arange(-10, 11), -1 + 0.1 * torch.arange(-10, 11)]).double()


@pytest.mark.parametrize(
    ("posteriors", "names"),
    [
        ([{"w": CHAINS[0]}, {"w": CHAINS[1]}], ["posterior 0", "posterior 1"]),
        ({"up": {"w": CHAINS[0]}, "down": {"w": CHAINS[1]}}, ["up", "down"]),
        (ChainResult({"w": CHAINS}), ["chain 0", "chain 1"]),
    ],
    ids=["list", "mapping", "chains"],
)
def test_densities_by_hand(posteriors: Any, names: list[str]) -> None:
    found = stack(model, posteriors, (X, Y))
    expected = torch.stack([predictive(w) for w in CHAINS])
    assert found.names == names
    assert_close(found.log_densities, expected)
    assert_close(found.weights, stacking_weights(expected))
    assert found.gap < 1e-8
    assert found.score >= float(expected.mean(1).max())
    assert_close(found.score, float((found.weights @ expected.exp()).log().mean()))
    assert "stacking of 2 posteriors" in repr(found)


def test_masked_observations_do_not_count() -> None:
    keep = X > 0.3

    def part(x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=keep):
            return pyro.sample("obs", dist.Normal(w * x, 0.3), obs=y)

    found = stack(part, [{"w": CHAINS[0]}, {"w": CHAINS[1]}], (X, Y))
    assert_close(found.log_densities, torch.stack([predictive(w)[keep] for w in CHAINS]))


def test_components_of_mixtures() -> None:
    """Modes of a mixture of Laplace approximations, and components of a mixture guide, are one posterior each."""

    def two(x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(w.square() * x, 0.3), obs=y)

    mixture = (
        AutoLaplaceMixture(two, 2)
        .initialize(X, Y)
        .set_modes([{"w": torch.tensor(0.6)}, {"w": torch.tensor(0.1)}])
    )
    mixture.laplace_approximation((X, Y))
    assert stack(two, mixture, (X, Y), num_samples=50).weights.shape == (2,)
    guide = AutoMixture(model, 3).initialize(X, Y)
    assert stack(model, guide, (X, Y), num_samples=50).log_densities.shape == (3, 12)


def test_leave_one_out_in_closed_form() -> None:
    """
    The predictive of every observation given the others, of a conjugate model, within 4 standard errors: the ratios 1/p vary by
    less than half of their mean.
    """
    y = 0.8 * X + 0.2 * torch.sin(20 * X)
    guide = AutoLaplace(model).initialize(X, y).polish((X, y)).laplace_approximation((X, y))
    size = 4000
    found = stack(model, [guide], (X, y), method="loo", num_samples=size)
    for n in range(12):
        others = torch.arange(12) != n
        precision = 1 + X[others].square().sum() / 0.09
        mean = (X[others] @ y[others]) / 0.09 / precision
        exact = dist.Normal(mean * X[n], (0.09 + X[n] ** 2 / precision).sqrt()).log_prob(y[n])
        assert abs(float(found.log_densities[0, n] - exact)) < 4 * 0.5 / math.sqrt(size)
    assert found.k_hat is not None
    assert bool((found.k_hat < 0.7).all())


def test_leave_one_out_of_arviz() -> None:
    draws = 0.05 * torch.randn(2, 200)
    values = dist.Normal(draws.unsqueeze(-1), 0.4).log_prob(torch.randn(30))
    tree = az.from_dict(posterior={"m": draws.numpy()}, log_likelihood={"y": values.numpy()})
    expected = az.loo(tree, pointwise=True, reff=1.0)
    found, shapes = leave_one_out(values.flatten(0, 1))
    assert_close(found, expected.loo_i.values, atol=1e-7)
    assert_close(shapes, expected.pareto_k.values, atol=1e-7)


def test_unreliable_leave_one_out_warns() -> None:
    with pytest.warns(UserWarning, match="k-hat is above"):
        stack(model, [{"w": 5 * torch.randn(100)}], (X, 10 * Y), method="loo")


def test_refusals() -> None:
    guide = AutoDiagonalNormal(model)
    guide(X, Y)
    with pytest.raises(ValueError, match="needs several posteriors, a mixture guide or a run"):
        stack(model, guide, (X, Y))
    with pytest.raises(ValueError, match="there are no posteriors"):
        stack(model, [], (X, Y))
    with pytest.raises(ValueError, match="no observed site 'obs' with observations"):
        stack(model, [guide], (X,))
    with pytest.raises(ValueError, match="no observed site 'other'"):
        stack(model, [guide], (X, Y), site="other")
    with pytest.raises(ValueError, match="method must be 'held_out' or 'loo'"):
        stack(model, [guide], (X, Y), method="waic")  # type: ignore[arg-type]
    masked = pyro.poutine.mask(model, mask=False)
    with pytest.raises(ValueError, match="all observations of site 'obs' are masked"):
        stack(masked, [{"w": torch.zeros(3)}], (X, Y))
    with pytest.raises(ValueError, match="a run of several chains, found dict"):
        stack(model, {"w": np.zeros(3)}, (X, Y))
    draws = torch.randn(2, 4)
    weighted = AutoEmpirical(model, ChainResult({"w": draws}), weights=torch.arange(8) / 28)
    with pytest.raises(ValueError, match="the draws of a chain have weights of their own"):
        stack(model, weighted, (X, Y))


def test_present_weights_of_chains_do_not_enter() -> None:
    """Chains that have weights are stacked by what each predicts."""
    run = ChainResult({"w": torch.randn(3, 5)})
    expected = stack(model, run, (X, Y))
    found = stack(model, run.reweighted([0.5, 0.5, 0.0]), (X, Y))
    assert torch.equal(found.weights, expected.weights)
    assert torch.equal(found.log_densities, expected.log_densities)
