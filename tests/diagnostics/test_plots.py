# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib import pyplot
from matplotlib.axes import Axes

from pyro_bnn.diagnostics import metrics, plots, to_datatree
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


def class_tree(probs: torch.Tensor, labels: torch.Tensor, draws: int = 4000) -> xr.DataTree:
    samples = torch.distributions.Categorical(probs=probs).sample((draws,))
    return xr.DataTree.from_dict(
        {
            "posterior_predictive": xr.Dataset({"obs": (("chain", "draw", "data"), samples[None].numpy())}),
            "observed_data": xr.Dataset({"obs": (("data",), labels.numpy())}),
        }
    )


def test_reliability_of_several_methods_in_every_form() -> None:
    """Accuracy 0.7 at confidence 0.7 and 0.9, as arrays and as a tree of drawn labels of three classes."""
    labels = torch.arange(20) % 3
    confidence = torch.tensor([0.7, 0.9]).repeat_interleave(10)
    right = torch.arange(20) % 10 < 7
    predicted = torch.where(right, labels, (labels + 1) % 3)
    hot = torch.nn.functional.one_hot(predicted, 3).double()
    probs = hot * confidence[:, None] + (1 - hot) * (1 - confidence[:, None]) / 2
    methods = {"array": probs[None], "tree": class_tree(probs, labels)}
    ax = plots.plot_reliability(methods, labels, num_bins=5)
    lines = ax.lines[1:]
    assert [line.get_label() for line in lines] == ["array", "tree"]
    assert len({line.get_color() for line in lines}) == 2
    for line, tolerance in zip(lines, (1e-6, 0.02), strict=True):
        np.testing.assert_allclose(line.get_xdata(), [0.7, 0.9], atol=tolerance)
        np.testing.assert_allclose(line.get_ydata(), [0.7, 0.7], atol=1e-12)
    scores = metrics.evaluate(class_tree(probs, labels))
    assert scores["accuracy"] == pytest.approx(0.7)
    assert scores["brier"] == pytest.approx(metrics.brier(probs[None], labels), abs=0.03)


def test_every_plot_takes_a_tree_and_arrays() -> None:
    x, y = linear_data(20)
    tree = to_datatree(linear_model, {"weight": torch.randn(40, 3)}, (x, y))
    samples, observed = tree["posterior_predictive"]["obs"].values[0], tree["observed_data"]["obs"].values

    def drawn(ax: Axes) -> list[np.ndarray]:
        return [np.asarray(line.get_ydata(), dtype=float) for line in ax.lines]

    for plot in (
        lambda p, y: plots.plot_bands(x[:, 0], p),
        plots.plot_intervals,
        plots.plot_calibration,
    ):
        for a, b in zip(drawn(plot(tree, None)), drawn(plot(samples, observed)), strict=True):
            np.testing.assert_allclose(a, b)
    torch.manual_seed(0)
    heights = [patch.get_height() for patch in plots.plot_pit(tree).patches]
    torch.manual_seed(0)
    np.testing.assert_allclose(heights, [p.get_height() for p in plots.plot_pit(samples, observed).patches])


def test_losses_of_several_fits() -> None:
    ax = plots.plot_losses({"a": torch.arange(100.0), "b": torch.ones(60)}, smooth=10)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    np.testing.assert_allclose(ax.lines[3].get_ydata(), np.ones(51))
