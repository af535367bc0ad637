# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The logger of the package says what was checked and decided; without a terminal no bar is drawn."""

import io
import logging
import sys
from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_bnn.infer import Mixture_ELBO, fit, posterior_predictive
from pyro_bnn.infer.autoguide import AutoLaplace, AutoMixture
from pyro_bnn.infer.mixture.check import ComponentLoopWarning
from pyro_bnn.infer.train import loop
from pyro_bnn.infer.train.progress import shows_bars
from pyro_bnn.nn import bayesian_
from tests.infer.models import linear_data, linear_model


@pytest.fixture(autouse=True)
def informed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, logger="pyro_bnn"):
        yield


def network_model(rows: bool = True) -> object:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    bayesian_(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = net(x).squeeze(-1)
        if not rows:
            f = f - f.mean(-1, keepdim=True)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return model


@pytest.mark.parametrize("rows", [True, False])
def test_how_a_curvature_was_summed(rows: bool, caplog: pytest.LogCaptureFixture) -> None:
    x, y = linear_data(100)
    model = network_model(rows)
    guide = AutoLaplace(model, structure="diagonal").initialize(x, y)  # type: ignore[arg-type]
    guide.laplace_approximation(x, y, map_tolerance=float("inf"))
    expected = "cut into chunks" if rows else "taken whole"
    assert f"curvature: batches are {expected}" in caplog.text
    assert {record.name for record in caplog.records} == {"pyro_bnn"}


def test_that_components_and_draws_run_together_or_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    x, y = linear_data()

    def single(x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ weight.reshape(3), 0.5), obs=y)

    for model, together in ((linear_model, False), (network_model(), True)):
        caplog.clear()
        guide = AutoMixture(model, 2)  # type: ignore[arg-type]
        if together:
            fit(model, guide, (x, y), num_steps=2, elbo=Mixture_ELBO(), progress_bar=False)  # type: ignore[arg-type]
            assert "components run through the model together" in caplog.text
        posterior_predictive(model, guide.initialize(x, y), (x, y), num_samples=7)  # type: ignore[arg-type]
        assert "predictions: draws run through the model" in caplog.text
    caplog.clear()
    with pytest.warns(ComponentLoopWarning) as caught:
        fit(single, AutoMixture(single, 2), (x, y), num_steps=1, progress_bar=False)
    assert caught[0].filename == __file__  # a warning, at the line that called
    posterior_predictive(single, AutoMixture(single, 2).initialize(x, y), (x, y), num_samples=7)
    assert "predictions: draws run through the model one by one" in caplog.text


def test_searches_sums_and_runs(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = linear_data()
    monkeypatch.setattr(loop, "NOTE_EVERY", 0.0)
    guide = AutoLaplace(linear_model)
    fit(linear_model, guide, (x, y), num_steps=3)
    text = caplog.text
    assert "fit: step 3, epoch 2, loss" in text
    assert "fit: ended by num_steps after 3 steps" in text
    guide.polish(x, y)
    assert "polish: Newton decrement" in caplog.text
    assert "sums over" not in caplog.text

    def unscaled(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ weight, 0.5), obs=y)

    data = (1000 + x).float(), y.float()
    AutoLaplace(unscaled).initialize(data).laplace_approximation(data, map_tolerance=float("inf"))
    assert "sums over the data in float64" in caplog.text


def test_no_bar_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = linear_data()
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert not shows_bars()
        fit(linear_model, AutoMixture(linear_model, 1), (x, y), num_steps=3)
        if stream is not None:
            assert "\r" not in stream.getvalue()
