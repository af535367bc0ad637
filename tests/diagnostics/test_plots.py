# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from matplotlib import pyplot

from pyro_bnn.diagnostics import plots
from pyro_bnn.infer import posterior_predictive
from tests.infer.models import linear_data, linear_model


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    pyplot.close("all")


def test_bands_are_quantiles_in_order_of_x() -> None:
    x = torch.tensor([2.0, 0.0, 1.0])
    samples = torch.tensor([[20.0, 0.0, 10.0]]) + torch.linspace(-1, 1, 101)[:, None]
    ax = plots.plot_bands(x, samples, levels=(0.5,), train=(x, x))
    line = ax.lines[0]
    np.testing.assert_allclose(line.get_xdata(), [0, 1, 2])
    np.testing.assert_allclose(line.get_ydata(), [0, 10, 20], atol=1e-12)
    vertices = ax.collections[0].get_paths()[0].vertices
    assert {0.5, -0.5} <= {round(float(v), 6) for px, v in vertices if px == 0}


def test_calibration_and_pit_and_intervals() -> None:
    x, y = linear_data(30)
    prediction = posterior_predictive(linear_model, {"weight": torch.randn(50, 3)}, (x, y))
    ax = plots.plot_calibration({"a": prediction, "b": prediction})
    assert [line.get_label() for line in ax.lines[1:]] == ["a", "b"]
    heights = [patch.get_height() for patch in plots.plot_pit(prediction, bins=5).patches]
    assert sum(heights[:5]) == pytest.approx(5)
    assert len(plots.plot_intervals(prediction).lines) == 3


def test_reliability_of_certain_and_right_predictions() -> None:
    labels = torch.randint(3, (50,))
    probs = torch.nn.functional.one_hot(labels, 3).double()
    ax = plots.plot_reliability(probs[None], labels)
    assert ax.lines[1].get_xdata().tolist() == [1.0]
    assert ax.lines[1].get_ydata().tolist() == [1.0]


def test_losses() -> None:
    ax = plots.plot_losses(torch.arange(100.0), smooth=10)
    np.testing.assert_allclose(ax.lines[1].get_ydata()[0], 4.5)
