# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Observations that a model masks are not scored, whatever stands in their place."""

from dataclasses import replace

import pytest
import torch

from pyro_bnn.diagnostics import metrics
from pyro_bnn.infer.predictive import SitePrediction
from tests.common import assert_close

OBSERVED = torch.tensor([True, False, True, True, False, True])


def numeric(filler: float) -> tuple[SitePrediction, SitePrediction]:
    """A prediction with masked entries, and the same without them."""
    samples, mean, y = torch.randn(50, 6), torch.randn(50, 6), torch.randn(6)
    whole = SitePrediction(samples, mean, mean.exp(), y, -mean.square(), ("data",), "numeric", OBSERVED)
    kept = replace(
        whole,
        **{
            name: getattr(whole, name)[:, OBSERVED]
            for name in ("samples", "mean", "variance", "log_likelihood")
        },
        observed=y[OBSERVED],
        mask=None,
    )
    y = torch.where(OBSERVED, y, filler)
    return replace(whole, observed=y, log_likelihood=whole.log_likelihood * OBSERVED), kept


@pytest.mark.parametrize("filler", [99.0, torch.nan, -100.0])
def test_numbers(filler: float) -> None:
    whole, kept = numeric(filler)
    assert metrics.evaluate(whole) == metrics.evaluate(kept)
    for found, expected in zip(
        metrics.calibration_curve(whole), metrics.calibration_curve(kept), strict=True
    ):
        assert_close(found, expected)
    assert metrics.pit(whole).shape == (4,)
    assert_close(metrics.rmse(whole, torch.zeros(6)), metrics.rmse(kept, torch.zeros(4)))


@pytest.mark.parametrize("filler", [-100, 0, 7])
def test_labels(filler: int) -> None:
    probs, labels = torch.softmax(torch.randn(9, 6, 3), -1), torch.randint(3, (6,))
    masked = torch.where(OBSERVED, labels, filler)
    found = SitePrediction(None, probs, None, masked, None, ("data",), "classes", OBSERVED)
    for score in (metrics.accuracy, metrics.brier, metrics.ece):
        assert_close(score(found), score(probs[:, OBSERVED], labels[OBSERVED]))
    binary = SitePrediction(None, probs[..., 0], None, (masked > 0).double(), None, (), "binary", OBSERVED)
    assert_close(metrics.brier(binary), metrics.brier(probs[:, OBSERVED, 0], (labels[OBSERVED] > 0).long()))


def test_masks_of_several_dimensions() -> None:
    """Steps of sequences, and tasks of a vector of observations, each with a mask of its own."""
    mask = torch.rand(5, 4) < 0.6
    mask[0] = False
    mean, y = torch.randn(8, 5, 4), torch.where(mask, torch.randn(5, 4), torch.nan)
    for log_likelihood in (mean, mean.sum(-1)):  # of each step; of each vector
        found = SitePrediction(mean, mean, None, y, log_likelihood, (), "numeric", mask)
        assert_close(metrics.rmse(found), metrics.rmse(mean[:, mask], y[mask]))
        kept = log_likelihood[:, mask if log_likelihood.dim() == 3 else mask.any(-1)]
        assert_close(metrics.nll(found), metrics.nll(kept))
    # a mask of whole vectors
    rows = torch.tensor([True, True, False, True, False])
    found = SitePrediction(mean, mean, None, mean[0], mean.sum(-1), (), "numeric", rows)
    assert_close(metrics.crps(found), metrics.crps(mean[:, rows], mean[0, rows]))


def test_masks_that_leave_nothing_or_do_not_fit() -> None:
    whole, _ = numeric(0.0)
    for score in (metrics.rmse, metrics.nll, metrics.interval_width):
        with pytest.raises(ValueError, match="all observations are masked"):
            score(replace(whole, mask=torch.zeros(6, dtype=torch.bool)))
        with pytest.raises(ValueError, match=r"mask of the prediction has shape \(3,\)"):
            score(replace(whole, mask=OBSERVED[:3]))
