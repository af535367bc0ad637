# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Searches that end at the edge of their range are said, with the numbers."""

import math
import warnings
from typing import Any

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from pyro_bnn.curvature.dense import DensePart
from pyro_bnn.curvature.parts import NotAMinimumError
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.infer.evidence import LaplaceEvidence
from pyro_bnn.infer.hyperparameters import Groups, HyperparameterWarning
from tests.common import assert_close
from tests.infer.models import NOISE, linear_data, linear_model


def fitted(x: Tensor, y: Tensor) -> AutoLaplace:
    return AutoLaplace(linear_model).initialize(x, y).polish(x, y).laplace_approximation(x, y)


def useless(x: Tensor) -> Tensor:
    """Observations that no feature explains: the evidence grows with the prior precision for ever."""
    noise = torch.randn(len(x))
    return 0.1 * (noise - x @ torch.linalg.lstsq(x, noise.unsqueeze(-1)).solution.squeeze(-1))


@pytest.mark.parametrize("per", ["global", "site"])
def test_evidence_without_a_maximum(per: Any) -> None:
    x, _ = linear_data()
    guide = fitted(x, useless(x))
    with pytest.warns(HyperparameterWarning, match=r"no maximum.*second derivative in log tau") as caught:
        report = guide.optimize_hyperparameters(per=per)
    assert caught[0].filename == __file__
    (tau,) = report.tau.values()
    assert 1e4 < tau <= 1.001e8


@pytest.mark.parametrize("options", [{"method": "grid"}, {"method": "grid", "candidates": [0.5, 1.0, 2.0]}])
def test_the_edge_of_a_grid(options: Any) -> None:
    x, _ = linear_data()
    guide = fitted(x, useless(x))
    with pytest.warns(HyperparameterWarning, match=r"edge of the (21|3) candidates.*the largest"):
        guide.optimize_hyperparameters(**options)


def test_the_edge_of_a_search_by_validation() -> None:
    x, y = linear_data()
    guide = fitted(x, y)
    with pytest.warns(HyperparameterWarning, match="edge of the 3 candidates from 2 to 3"):
        guide.optimize_hyperparameters((x, y), method="validation", candidates=[2.0, 2.5, 3.0])


def test_an_optimum_is_found_in_silence() -> None:
    x, y = linear_data()
    guide = fitted(x, y)
    mean = guide.loc.detach()
    eigenvalues = torch.linalg.eigvalsh(x.T @ x) / NOISE**2

    def negative(log_tau: float) -> float:
        tau = torch.tensor(log_tau).exp()
        value = 1.5 * log_tau - 0.5 * tau * mean.square().sum() - 0.5 * (eigenvalues + tau).log().sum()
        return -float(value)

    expected = minimize_scalar(negative, bounds=(-10, 10), method="bounded", options={"xatol": 1e-10}).x
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = guide.optimize_hyperparameters()
        guide.optimize_hyperparameters(method="grid")
        guide.optimize_hyperparameters(method="grid", candidates=[1.0])
        guide.optimize_hyperparameters(method="grid", candidates=[1.0, 30.0])
    assert_close(torch.tensor(report.tau["all"]).log(), expected, atol=1e-5, rtol=0)


def saddle(lowest: float, distance: float) -> tuple[Groups, LaplaceEvidence]:
    """A Hessian of the likelihood beside a prior precision of 1, at a distance from the prior mean along its second axis."""
    loc = torch.tensor([0.0, distance])
    hessian = torch.tensor([lowest, 10.0]).diag()
    part = DensePart(index=torch.arange(2), curvature=hessian, prior=torch.eye(2))
    evidence = LaplaceEvidence([part], torch.zeros(()), loc, loc, indefinite=True)
    return Groups({"w": slice(0, 2)}, loc, None, "global"), evidence


def test_evidence_that_is_infinite_at_a_saddle() -> None:
    """From a multiplier of 1 the evidence rises towards 1/2, where the precision has an eigenvalue of zero."""
    groups, evidence = saddle(-0.5, 1.0)
    with pytest.raises(NotAMinimumError, match=r"of 'all' falls to 0\.5.*no longer positive definite"):
        evidence.maximise(groups)


def test_evidence_of_a_hessian_with_a_maximum() -> None:
    groups, evidence = saddle(-0.1, 0.1)
    (tau,) = evidence.maximise(groups).tau.values()

    def loss(log_tau: float) -> float:
        t = math.exp(log_tau)
        return -(log_tau - (t - 1) * 0.01 / 2 - math.log(t - 0.1) / 2 - math.log(t + 10) / 2)

    best = minimize_scalar(loss, bounds=(0.0, 9.0), method="bounded", options={"xatol": 1e-9})
    assert_close(tau, math.exp(best.x), rtol=1e-4)
