# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Weights of predictive densities against other optimisers, and their certificate."""

import arviz as az
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from pyro_bnn.infer.refine.stacking import stacking_gap, stacking_weights
from tests.common import assert_close


def score(log_densities: np.ndarray, weights: np.ndarray) -> float:
    return float(np.log(weights @ np.exp(log_densities)).mean())


@pytest.mark.parametrize(
    ("size", "points", "spread"), [(2, 5, 1.0), (5, 50, 1.0), (8, 300, 0.1), (20, 100, 3.0), (3, 40, 40.0)]
)
def test_weights_of_slsqp(size: int, points: int, spread: float) -> None:
    """Another optimiser finds nothing better than the certificate allows, and its weights where they are unique."""
    values = spread * torch.randn(size, points, dtype=torch.float64)
    found = stacking_weights(values)
    assert_close(found.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert bool((found >= 0).all())
    densities = np.exp(values.numpy() - values.numpy().max(0))

    def loss(w: np.ndarray) -> float:
        return -float(np.log(w @ densities).mean())

    def gradient(w: np.ndarray) -> np.ndarray:
        return -(densities / (w @ densities)).mean(1)

    other = minimize(
        loss, np.full(size, 1 / size), jac=gradient, method="SLSQP", bounds=[(1e-12, 1)] * size,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, options={"ftol": 1e-12, "maxiter": 1000},
    )  # fmt: skip
    gap = stacking_gap(values, found)
    assert gap < 1e-8
    assert loss(found.numpy()) <= other.fun + gap + 1e-12
    assert_close(found, torch.as_tensor(other.x), atol=2e-4)


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # ArviZ's own use of pandas
def test_weights_of_arviz() -> None:
    """From pointwise leave-one-out densities, those of ``az.compare``."""
    y = torch.randn(60, dtype=torch.float64) + 0.3 * torch.randn(60, dtype=torch.float64).square()
    trees, rows = {}, []
    for k, (location, scale) in enumerate([(0.0, 1.0), (1.0, 0.7), (-1.5, 1.0)]):
        draws = location + 0.05 * torch.randn(4, 100, dtype=torch.float64)
        values = torch.distributions.Normal(draws.unsqueeze(-1), scale).log_prob(y)
        trees[str(k)] = az.from_dict(
            posterior={"m": draws.numpy()},
            log_likelihood={"y": values.numpy()},
            observed_data={"y": y.numpy()},
        )
        rows.append(az.loo(trees[str(k)], pointwise=True).loo_i.values)
    expected = az.compare(trees, method="stacking")["weight"].sort_index().values
    assert_close(
        stacking_weights(torch.as_tensor(np.stack(rows))), torch.as_tensor(expected.astype(float)), atol=2e-3
    )


def test_gap_bounds_what_is_missed() -> None:
    """At any weights, what the best ones gain is at most the gap."""
    values = torch.randn(4, 30, dtype=torch.float64)
    best = score(values.numpy(), stacking_weights(values).numpy())
    for _ in range(20):
        weights = torch.distributions.Dirichlet(torch.ones(4, dtype=torch.float64)).sample()
        missed = best - score(values.numpy(), weights.numpy())
        assert 0 <= missed <= stacking_gap(values, weights)


def test_equal_posteriors_share() -> None:
    values = torch.randn(3, 50)
    single, double = stacking_weights(values), stacking_weights(torch.cat([values, values]))
    assert_close(double, torch.cat([single, single]) / 2, atol=1e-4)
    assert_close(stacking_weights(values[:1]), torch.ones(1))


def test_impossible_observations_count() -> None:
    """Half of the points are impossible under each posterior: both are needed, however badly one predicts."""
    values = torch.tensor([[0.0, -torch.inf, 0.0], [-torch.inf, -30.0, -torch.inf]])
    assert_close(stacking_weights(values), torch.tensor([2 / 3, 1 / 3]), atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(3), r"shape \(3,\), expected \(K, N\)"),
        (torch.zeros(0, 3), r"shape \(0, 3\), expected \(K, N\)"),
        (torch.tensor([[0.0, torch.nan], [0.0, 0.0]]), "point 1 .*NaN"),
        (torch.tensor([[-torch.inf, 0.0], [-torch.inf, 0.0]]), "point 0 .*not finite"),
        (torch.tensor([[torch.inf, 0.0], [0.0, 0.0]]), "point 0 .*not finite"),
    ],
)
def test_refusals(values: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stacking_weights(values)


def test_weights_that_are_none_have_no_gap() -> None:
    with pytest.raises(ValueError, match="2 numbers of at least 0 that sum to 1"):
        stacking_gap(torch.zeros(2, 3), torch.tensor([0.7, 0.7]))


def test_whole_numbers_and_arrays() -> None:
    """Weights are never rounded to the type of whole numbers."""
    values = [[0, -1, -1], [-1, 0, 0]]
    expected = stacking_weights(torch.tensor(values, dtype=torch.float64))
    assert_close(stacking_weights(torch.tensor(values)), expected)
    assert_close(stacking_weights(np.array(values)), expected)  # type: ignore[arg-type]
