# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Smoothed importance weights against ArviZ's, and tails of known shape."""

import math

import arviz as az
import pytest
import torch

from pyro_bnn.ops.pareto import reliable_shape, smoothed, tail_shape
from tests.common import assert_close


@pytest.mark.parametrize("shape", [0.1, 0.5, 0.9, 1.5])
@pytest.mark.parametrize("size", [100, 4000])
def test_weights_of_arviz(shape: float, size: int) -> None:
    """The weights and the shape of ``az.psislw``, an implementation of its own."""
    log_ratios = 3.0 + shape * torch.distributions.Exponential(1.0).sample((size,))
    found, k_hat = smoothed(log_ratios)
    expected, expected_k = az.psislw(log_ratios.numpy().copy())
    assert_close(found, expected, atol=1e-8)
    assert_close(k_hat, float(expected_k), rtol=1e-8)
    assert_close(found.exp().sum(), 1.0)


def test_huge_ranges_of_ratios() -> None:
    """Ratios that differ by hundreds of nats, as those of networks do, have weights and an infinite or large shape."""
    found, k_hat = smoothed(300 * torch.randn(1000))
    assert_close(found.exp().sum(), 1.0)
    assert k_hat > 1


def test_constant_ratios_stay_constant() -> None:
    found, k_hat = smoothed(torch.full((50,), 7.0))
    assert_close(found.exp(), torch.full((50,), 1 / 50))
    assert k_hat == -math.inf
    assert tail_shape(torch.ones(10)) == math.inf  # too few draws


def test_impossible_draws_weigh_nothing() -> None:
    log_ratios = torch.randn(200)
    log_ratios[:20] = -torch.inf
    found, _ = smoothed(log_ratios)
    assert bool((found[:20] == -torch.inf).all())
    assert_close(found[20:].exp().sum(), 1.0)


def test_reliable_shape_of_few_draws() -> None:
    assert reliable_shape(5) == 0.0
    assert_close(reliable_shape(1000), 2 / 3)
    assert reliable_shape(10**6) == 0.7
