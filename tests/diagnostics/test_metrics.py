# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import math

import numpy as np
import pytest
import torch
from pyro.ops.stats import crps_empirical
from sklearn.metrics import brier_score_loss, roc_auc_score

from pyro_bnn.diagnostics import metrics
from pyro_bnn.diagnostics.arviz import to_datatree, to_inference_data
from pyro_bnn.infer import posterior_predictive
from tests.common import assert_close
from tests.infer.models import linear_data, linear_model, linear_posterior


def normal_samples(num: int = 4000, points: int = 50) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean = torch.randn(points)
    samples = mean + 0.7 * torch.randn(num, points)
    return mean, samples, mean + 0.7 * torch.randn(points)


def test_crps() -> None:
    mean, samples, y = normal_samples()
    size = len(samples)
    # pyro's score averages over all pairs, those of a draw with itself included
    pairs = (samples - y).abs().mean(0) - crps_empirical(samples, y)
    expected = ((samples - y).abs().mean(0) - pairs * size / (size - 1)).mean()
    assert_close(metrics.crps(samples, y), expected, rtol=1e-10)
    # closed form for one normal (Gneiting and Raftery 2007, equation 5)
    z = (y - mean) / 0.7
    normal = torch.distributions.Normal(0.0, 1.0)
    exact = 0.7 * (z * (2 * normal.cdf(z) - 1) + 2 * normal.log_prob(z).exp() - 1 / math.sqrt(math.pi))
    found = metrics.crps_normal(mean[None], torch.full_like(mean, 0.49)[None], y)
    assert_close(found, exact.mean(), rtol=1e-10)
    assert_close(metrics.crps(samples, y), exact.mean(), rtol=0.02)


def test_crps_of_a_mixture_of_normals() -> None:
    mean, variance, y = torch.randn(3, 70), torch.rand(3, 70) + 0.1, torch.randn(70)
    index = torch.randint(3, (20000, 70))
    samples = mean.gather(0, index) + variance.gather(0, index).sqrt() * torch.randn(20000, 70)
    assert_close(metrics.crps_normal(mean, variance, y), metrics.crps(samples, y), rtol=0.01)


def test_nll_rmse_of_linear_regression() -> None:
    """Against the closed-form predictive of the conjugate model."""
    x, y = linear_data()
    mean, covariance = linear_posterior(x, y)
    weights = torch.distributions.MultivariateNormal(mean, covariance).sample((20000,))
    test_x, test_y = linear_data(200)
    found = posterior_predictive(linear_model, {"weight": weights}, (test_x, test_y))
    scale = ((test_x @ covariance * test_x).sum(-1) + 0.25).sqrt()
    exact = torch.distributions.Normal(test_x @ mean, scale)
    assert_close(metrics.nll(found), -exact.log_prob(test_y).mean(), rtol=5e-3)
    assert_close(metrics.rmse(found), (test_x @ mean - test_y).square().mean().sqrt(), rtol=5e-3)
    low, high = exact.icdf(torch.tensor(0.05)), exact.icdf(torch.tensor(0.95))
    coverage = ((test_y > low) & (test_y < high)).double().mean()
    assert_close(metrics.interval_coverage(found, level=0.9), coverage, atol=0.015)
    assert_close(metrics.interval_width(found, level=0.9), (high - low).mean(), rtol=0.01)


def test_calibrated_predictions() -> None:
    mean = torch.randn(5000)
    samples = mean + torch.randn(1000, 5000)
    y = mean + torch.randn(5000)
    nominal, empirical = metrics.calibration_curve(samples, y)
    # 4 binomial standard deviations
    np.testing.assert_array_less(np.abs(nominal - empirical), 4 * np.sqrt(0.25 / 5000))
    counts, _ = np.histogram(metrics.pit(samples, y), bins=10, range=(0, 1))
    np.testing.assert_array_less(np.abs(counts - 500), 4 * np.sqrt(450))


def test_calibration_curve_counts_level_by_level() -> None:
    samples, y = torch.randn(30, 7, 2), torch.randn(7, 2)
    levels = [0.1, 0.5, 0.95]
    nominal, empirical = metrics.calibration_curve(samples, y, levels)
    assert nominal.tolist() == levels
    for level, found in zip(levels, empirical, strict=True):
        low, high = np.quantile(samples.numpy(), [(1 - level) / 2, (1 + level) / 2], axis=0)
        assert found == pytest.approx(((low <= y.numpy()) & (y.numpy() <= high)).mean(), rel=1e-12)
        assert found == metrics.interval_coverage(samples, y, level)


def test_classification_scores() -> None:
    probs = torch.softmax(torch.randn(6, 200, 2), -1)
    labels = torch.randint(2, (200,))
    mean = probs.mean(0)
    expected = brier_score_loss(labels, mean[:, 1])
    assert_close(metrics.brier(probs, labels), 2 * expected, rtol=1e-10)
    assert_close(metrics.brier(probs[..., 1], labels), 2 * expected, rtol=1e-10)
    assert_close(metrics.accuracy(probs, labels), (mean.argmax(-1) == labels).double().mean())

    confidence, predicted = mean.max(-1)
    correct = (predicted == labels).double()
    expected = 0.0
    for low in range(10):
        inside = (confidence > low / 10) & (confidence <= (low + 1) / 10)
        if inside.any():
            gap = (confidence[inside].mean() - correct[inside].mean()).abs()
            expected += float(inside.double().mean() * gap)
    assert_close(metrics.ece(probs, labels, num_bins=10), expected, rtol=1e-5)


def test_auroc() -> None:
    inside, outside = torch.randn(50), torch.randn(70) + 1
    target = torch.cat([torch.zeros(50), torch.ones(70)])
    expected = roc_auc_score(target, torch.cat([inside, outside]))
    assert_close(metrics.auroc(inside, outside), expected, rtol=1e-6)


def test_trees_and_arrays_agree() -> None:
    x, y = linear_data(20)
    draws = {"weight": torch.randn(40, 3)}
    prediction = posterior_predictive(linear_model, draws, (x, y))
    for source in (
        to_datatree(linear_model, draws, (x, y), num_chains=4),
        to_inference_data(linear_model, draws, (x, y), num_chains=4),
    ):
        assert_close(metrics.nll(source), metrics.nll(prediction), rtol=1e-10)
        found = metrics.as_prediction(source)
        assert_close(found.observed, y)
        assert metrics.crps(source) == metrics.crps(found.samples, y)
    with pytest.raises(ValueError, match=r"site='no'.*\['obs'\]"):
        metrics.nll(prediction, site="no")
