# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What is no prediction or no observation raises in every score, by the name of the argument."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_bnn.diagnostics import metrics, prediction_draws, quality
from pyro_bnn.infer import posterior_predictive
from pyro_bnn.infer.predict.predictive import SitePrediction

NUMERIC: dict[str, Callable[..., object]] = {
    "rmse": metrics.rmse,
    "crps": metrics.crps,
    "coverage": metrics.interval_coverage,
    "calibration": metrics.calibration_curve,
    "pit": metrics.pit,
    "crps_normal": lambda s, y: metrics.crps_normal(s, torch.ones(3, 5), y),
}
LABELLED: dict[str, Callable[..., object]] = {
    "accuracy": metrics.accuracy,
    "brier": metrics.brier,
    "ece": metrics.ece,
    "mean_probs": metrics.mean_probs,
}
numeric = pytest.mark.parametrize("score", NUMERIC.values(), ids=NUMERIC)
labelled = pytest.mark.parametrize("score", LABELLED.values(), ids=LABELLED)


@numeric
def test_shapes_are_not_broadcast(score: Callable[..., object]) -> None:
    samples, y = torch.randn(3, 5), torch.randn(5)
    score(samples, y)
    with pytest.raises(ValueError, match=r"observed has shape \(5, 1\)"):
        score(samples, y[:, None])
    with pytest.raises(ValueError, match=r"observed has shape \(5,\).*\(3, 5, 1\)"):
        score(samples[..., None], y)
    with pytest.raises(ValueError, match=r"\(5,\), expected \(S, N, \.\.\.\)"):
        score(samples[0], y)
    with pytest.raises(ValueError, match=r"observed has shape \(\)"):
        score(samples, 1.0)


@numeric
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite(score: Callable[..., object], bad: float) -> None:
    samples, y = torch.randn(3, 5), torch.randn(5)
    y[1] = bad
    with pytest.raises(ValueError, match=r"observed .*1 entries that are not finite"):
        score(samples, y)
    samples[0, 0] = bad
    with pytest.raises(ValueError, match=r"(samples|mean) .*1 entries that are not finite"):
        score(samples, torch.zeros(5))


@numeric
def test_nothing_to_score(score: Callable[..., object]) -> None:
    for samples, y in ((torch.zeros(0, 5), torch.zeros(5)), (torch.zeros(3, 0), torch.zeros(0))):
        with pytest.raises(ValueError, match=r"is empty"):
            score(samples, y)


@labelled
@pytest.mark.parametrize("bad", [-1, 3, 0.5, torch.nan, -100])
def test_labels_that_are_no_class(score: Callable[..., object], bad: float) -> None:
    probs = torch.full((4, 5, 3), 1 / 3)
    with pytest.raises(ValueError, match=r"^labels"):
        score(probs, torch.tensor([0, 1, 2, 0, bad]))


@labelled
def test_probabilities_that_are_none(score: Callable[..., object]) -> None:
    labels = torch.tensor([0, 1, 2, 0, 1])
    probs = torch.full((4, 5, 3), 1 / 3)
    score(probs, labels)
    score(probs.float(), labels)
    score(probs.bfloat16(), labels)
    for wrong, message in (
        (torch.where(torch.arange(3) == 0, 0.4, probs), "sum to one"),
        (probs - 0.5, "between 0 and 1"),
        (torch.where(torch.arange(3) == 0, torch.nan, probs), "probs .*not finite"),
        (probs[:0], "is empty"),
        (probs[:, :4], "(labels|probs) has shape"),
        (torch.randn(4, 5), "between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            score(wrong, labels)
    with pytest.raises(ValueError, match=r"labels \(5, 1\)"):
        score(probs[0], labels[:, None])
    with pytest.raises(ValueError, match=r"labels has shape \(5, 1\)"):
        score(probs[..., None, :].expand(4, 5, 2, 3), labels[:, None])


def test_densities_and_scores() -> None:
    assert metrics.nll(torch.tensor([[-torch.inf], [0.0]])) == pytest.approx(torch.tensor(2.0).log().item())
    for wrong, message in (
        (torch.full((3, 4), torch.nan), "log_likelihood .*NaN"),
        (torch.full((3, 4), torch.inf), "infinite densities"),
        (torch.zeros(0, 4), "empty"),
        (torch.zeros(4), "log_likelihood has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.nll(wrong)
    for inside, outside, message in (
        ([0.1, torch.nan], [0.2], "scores_in .*NaN"),
        ([0.1], [torch.nan], "scores_out .*NaN"),
        ([], [0.2], "scores_in .*empty"),
        ([0.1], [], "scores_out .*empty"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.auroc(inside, outside)
    assert metrics.auroc([-torch.inf, 0.0], [1.0, torch.inf]) == 1.0


def test_options() -> None:
    samples, y = torch.randn(3, 5), torch.randn(5)
    for level in (0.0, 1.0, 90, torch.nan):
        with pytest.raises(ValueError, match=r"level="):
            metrics.interval_coverage(samples, y, level)
        with pytest.raises(ValueError, match=r"level="):
            metrics.interval_width(samples, level)
        with pytest.raises(ValueError, match=r"levels="):
            metrics.calibration_curve(samples, y, [0.5, level])
    with pytest.raises(ValueError, match=r"num_bins=0"):
        metrics.ece(torch.full((4, 2), 0.5), torch.zeros(4), 0)
    with pytest.raises(ValueError, match=r"variance .*smallest -1"):
        metrics.crps_normal(samples, -torch.ones(3, 5), y)
    with pytest.raises(ValueError, match=r"variance of shape \(5,\)"):
        metrics.crps_normal(samples, torch.ones(5), y)
    with pytest.raises(ValueError, match=r"unknown kind 'logits'"):
        metrics.brier(torch.full((4, 2), 0.5), torch.zeros(4), kind="logits")  # type: ignore[arg-type]


def test_importance_ratios() -> None:
    ratios = torch.randn(1000)
    ratios[3] = torch.nan
    for wrong in (ratios, ratios[:0], torch.full((100,), -torch.inf), torch.tensor([0.0, torch.inf])):
        for function in (
            quality.pareto_k,
            quality.elbo_gap,
            lambda r: quality.functional_k(r, torch.zeros(len(r))),
        ):
            with pytest.raises(ValueError, match=r"log_ratios"):
                function(wrong)
    ratios[3] = -torch.inf  # a draw of no weight
    assert quality.pareto_k(ratios) < 1
    with pytest.raises(ValueError, match=r"values .*not finite"):
        quality.functional_k(torch.zeros(2), torch.tensor([0.0, torch.nan]))
    with pytest.raises(ValueError, match=r"values has shape \(3,\), expected \(S, ...\) with S = 2"):
        quality.functional_k(torch.zeros(2), torch.zeros(3))


def test_predictions_are_checked_like_arrays() -> None:
    mean = torch.randn(4, 5)
    prediction = SitePrediction(mean, mean, mean.exp(), torch.randn(5, 1), mean, ("data",))
    for score in (metrics.rmse, metrics.crps, metrics.pit, metrics.evaluate, metrics.interval_coverage):
        with pytest.raises(ValueError, match=r"observed has shape \(5, 1\)"):
            score(prediction)


def test_distributions_without_a_mean() -> None:
    def model(y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            pyro.sample("obs", dist.Cauchy(w, 1.0), obs=y)

    draws = {"w": torch.randn(6)}
    prediction = posterior_predictive(model, draws, torch.zeros(5))
    assert set(metrics.evaluate(prediction)) == {
        "nll",
        "crps",
        "coverage_50",
        "coverage_90",
        "width_50",
        "width_90",
    }
    with pytest.raises(ValueError, match=r"mean .*not finite"):
        metrics.rmse(prediction)
    with pytest.raises(ValueError, match="have no mean"):
        prediction_draws(model, draws, torch.zeros(5))
