# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Which dimension of predicted probabilities holds the classes is known, or asked for."""

import pytest
import torch
from sklearn.metrics import brier_score_loss

from pyro_bnn.diagnostics import metrics
from pyro_bnn.infer.predict.predictive import SitePrediction
from tests.common import assert_close


def reference(probs: torch.Tensor, labels: list[int]) -> float:
    return sum(
        float((p[c] - float(c == y)) ** 2)
        for p, y in zip(probs, labels, strict=True)
        for c in range(probs.shape[-1])
    ) / len(labels)


@pytest.mark.parametrize("size", [2, 3])
def test_as_many_points_as_classes(size: int) -> None:
    probs, labels = torch.softmax(torch.randn(size, size), -1), list(range(size))
    for score in (metrics.brier, metrics.accuracy, metrics.ece, metrics.mean_probs):
        with pytest.raises(ValueError, match=r"kind='classes'.*kind='binary'"):
            score(probs, labels)
        with pytest.raises(ValueError, match=r"kind='classes'.*kind='labels'"):
            score(torch.eye(size).long(), labels)
    assert_close(metrics.brier(probs, labels, kind="classes"), reference(probs, labels))
    assert metrics.brier(torch.eye(size), labels, kind="classes") == 0
    assert metrics.brier(torch.eye(size).long(), labels, kind="classes") == 0
    # one draw more, or one point more, leaves no doubt
    assert_close(metrics.brier(probs[None], labels), reference(probs, labels))
    more, longer = torch.cat([probs, probs[:1]]), [*labels, 0]
    assert_close(metrics.brier(more, longer), reference(more, longer))


def test_binary_draws_of_as_many_points() -> None:
    second, labels = torch.rand(2, 2), [0, 1]
    expected = 2 * brier_score_loss(labels, second.mean(0))
    assert_close(metrics.brier(second, labels, kind="binary"), expected)
    drawn = torch.tensor([[0, 1], [1, 1]])
    assert_close(metrics.mean_probs(drawn, labels, kind="labels")[0], torch.tensor([[0.5, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"kind='classes' does not fit"):
        metrics.brier(torch.rand(5, 2), labels, kind="classes")


def test_predictions_say_what_they_hold() -> None:
    """With two draws, two points and two classes no shape could tell."""
    probs = torch.softmax(torch.randn(2, 2, 2), -1)
    labels = torch.tensor([0, 1])
    classes = SitePrediction(labels.expand(2, 2), probs, None, labels, None, ("data",), "classes")
    assert_close(metrics.brier(classes), reference(probs.mean(0), [0, 1]))
    binary = SitePrediction(None, probs[..., 1], None, labels.double(), None, ("data",), "binary")
    assert_close(metrics.brier(binary), reference(probs.mean(0), [0, 1]))
    assert set(metrics.evaluate(binary)) == {"accuracy", "brier", "ece"}
    one_hot = SitePrediction(None, probs, None, torch.eye(2), None, ("data", "class"), "classes")
    assert_close(metrics.brier(one_hot), reference(probs.mean(0), [0, 1]))
    one_hot.observed = torch.ones(2, 2)
    for score in (metrics.brier, metrics.evaluate):
        with pytest.raises(ValueError, match=r"one-hot"):
            score(one_hot)
    one_hot.observed = torch.softmax(torch.randn(2, 2), -1)
    one_hot.log_likelihood = -torch.rand(2, 2)
    assert set(metrics.evaluate(one_hot)) == {"nll"}
    with pytest.raises(ValueError, match=r"soft labels"):
        metrics.accuracy(one_hot)


def test_scores_of_labels_in_several_dimensions() -> None:
    """A calibration error over all labels, whichever dimensions they lie in."""
    probs, labels = torch.softmax(torch.randn(7, 40, 6, 3), -1), torch.randint(3, (40, 6))
    flat = probs.flatten(1, 2), labels.flatten()
    for score in (metrics.ece, metrics.brier, metrics.accuracy):
        assert_close(score(probs, labels), score(*flat))


def test_draws_that_are_whole_numbers() -> None:
    counts, y = torch.randint(9, (30, 12)), torch.randint(9, (12,))
    for score in (metrics.crps, metrics.rmse, metrics.interval_coverage):
        assert_close(score(counts, y), score(counts.double(), y.double()))
    pairs = (counts[:, None] - counts[None]).abs().double().sum((0, 1)) / (30 * 29)
    expected = ((counts - y).abs().double().mean(0) - pairs / 2).mean()
    assert_close(metrics.crps(counts, y), expected)


def test_crps_of_certain_predictions() -> None:
    mean, y = torch.tensor([[1.0, 2.0]]), torch.tensor([1.5, 2.0])
    assert_close(metrics.crps_normal(mean, torch.zeros(1, 2), y), 0.25)
