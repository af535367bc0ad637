# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Plots of predictions; each takes what the scores of :mod:`pyro_bnn.diagnostics.metrics` take and returns
matplotlib axes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_bnn.diagnostics.axes import diagonal, each, new_axes
from pyro_bnn.diagnostics.metrics import LEVELS, as_prediction, calibration_curve, mean_probs, pit
from pyro_bnn.diagnostics.scored import draws_and_observations, need
from pyro_bnn.infer.train.state import FitResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_bands(
    x: Any,
    samples: Any,
    *,
    levels: Sequence[float] = (0.5, 0.9),
    site: str | None = None,
    train: tuple[Any, Any] | None = None,
    color: str = "C0",
    label: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """
    Central predictive intervals and the median over a one-dimensional input.

    :param x: inputs ``(N,)`` or ``(N, 1)``.
    :param samples: predictive draws ``(S, N)``, or a prediction.
    :param levels: nominal probabilities of the bands.
    :param str site: the observed site, if there are several.
    :param train: inputs and observations to draw as dots.
    :param str color: a matplotlib colour.
    :param str label: the name in the legend.
    :param ax: axes to draw in.
    :return: the axes.

    Example::

        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_bands(torch.linspace(0, 1, 5), torch.randn(20, 5), ax=ax) is ax
        True
    """
    ax = new_axes(ax)
    x = np.asarray(x).reshape(-1)
    order = np.argsort(x)
    if not isinstance(samples, (torch.Tensor, np.ndarray)):
        samples = need(as_prediction(samples, site).samples, "samples")
    values = torch.as_tensor(samples).flatten(1).numpy(force=True)[:, order]
    for level in sorted(levels, reverse=True):
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
        ax.fill_between(x[order], low, high, color=color, alpha=0.25, linewidth=0)
    ax.plot(x[order], np.median(values, axis=0), color=color, label=label)
    if train is not None:
        ax.plot(np.asarray(train[0]).reshape(-1), np.asarray(train[1]).reshape(-1), "k.", markersize=4)
    return ax


def plot_intervals(
    samples: Any,
    observed: Any = None,
    *,
    level: float = 0.9,
    site: str | None = None,
    color: str = "C0",
    label: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """
    The central predictive interval of every observation, sorted by predictive median.

    :param samples: predictive draws ``(S, N)``, or a prediction.
    :param observed: observations ``(N,)``; by default those of the prediction.
    :param float level: nominal probability of the intervals.
    :param str site: the observed site, if there are several.
    :param str color: a matplotlib colour.
    :param str label: the name in the legend.
    :param ax: axes to draw in.
    :return: the axes.

    Example::

        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_intervals(torch.randn(20, 5), torch.randn(5), ax=ax) is ax
        True
    """
    ax = new_axes(ax)
    drawn, found = draws_and_observations(samples, observed, site, "samples")
    values, y = drawn.flatten(1).numpy(force=True), found.flatten().numpy(force=True)
    low, middle, high = np.quantile(values, [(1 - level) / 2, 0.5, (1 + level) / 2], axis=0)
    order = np.argsort(middle)
    rank = np.arange(len(order))
    ax.vlines(rank, low[order], high[order], color=color, alpha=0.4, label=label or "")
    ax.plot(rank, middle[order], color=color)
    inside = (y >= low) & (y <= high)
    ax.plot(rank[inside[order]], y[order][inside[order]], "k.", markersize=3)
    ax.plot(rank[~inside[order]], y[order][~inside[order]], "r.", markersize=4)
    ax.set_xlabel("observation, by predictive median")
    return ax


def plot_calibration(
    predictions: Any,
    observed: Any = None,
    *,
    levels: Sequence[float] = LEVELS,
    site: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """
    Empirical over nominal coverage of central intervals; the diagonal is perfect, below it over-confident.

    :param predictions: predictive draws ``(S, N)``, a prediction, or a mapping from names to either.
    :param observed: observations ``(N,)``; by default those of the predictions.
    :param levels: nominal probabilities.
    :param str site: the observed site, if there are several.
    :param ax: axes to draw in.
    :return: the axes.

    Example::

        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_calibration({'a': torch.randn(20, 5)}, torch.randn(5), ax=ax) is ax
        True
    """
    ax = new_axes(ax)
    diagonal(ax)
    for name, prediction in each(ax, predictions):
        nominal, empirical = calibration_curve(prediction, observed, levels, site=site)
        ax.plot(nominal, empirical, marker=".", label=name)
    ax.set_xlabel("nominal coverage")
    ax.set_ylabel("empirical coverage")
    return ax


def plot_pit(
    samples: Any, observed: Any = None, *, bins: int = 10, site: str | None = None, ax: "Axes | None" = None
) -> "Axes":
    """
    Histogram of probability integral transforms, flat for calibrated predictions.

    :param samples: predictive draws ``(S, N)``, or a prediction.
    :param observed: observations ``(N,)``; by default those of the prediction.
    :param int bins: the number of bins.
    :param str site: the observed site, if there are several.
    :param ax: axes to draw in.
    :return: the axes.

    Example::

        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_pit(torch.randn(20, 5), torch.randn(5), ax=ax) is ax
        True
    """
    ax = new_axes(ax)
    values = pit(samples, observed, site=site).reshape(-1)
    ax.hist(values, bins=bins, range=(0, 1), density=True, alpha=0.6)
    # two binomial standard deviations of a bin's height
    spread = 2 * np.sqrt((1 - 1 / bins) * bins / len(values))
    ax.axhspan(1 - spread, 1 + spread, color="0.6", alpha=0.3)
    ax.set_xlabel("probability integral transform")
    return ax


def plot_reliability(
    probs: Any, labels: Any = None, *, num_bins: int = 15, site: str | None = None, ax: "Axes | None" = None
) -> "Axes":
    """
    Reliability diagram: accuracy over confidence in bins of equal width, their sizes as the areas of dots; the diagonal is
    perfect, below it over-confident.

    :param probs: see :func:`~pyro_bnn.diagnostics.metrics.mean_probs`; or a mapping from names to any of these, each with
        a colour of its own.
    :param labels: see :func:`~pyro_bnn.diagnostics.metrics.mean_probs`.
    :param int num_bins: the number of bins.
    :param str site: the observed site, if there are several.
    :param ax: axes to draw in.
    :return: the axes.

    Example::

        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_reliability(torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]]), torch.tensor([0, 1]), ax=ax) is ax
        True
    """
    ax = new_axes(ax)
    diagonal(ax)
    for name, source in each(ax, probs):
        value, y = mean_probs(source, labels, site=site)
        confidence, predicted = value.max(-1)
        bins = (confidence * num_bins).long().clamp(max=num_bins - 1)
        counts = torch.bincount(bins, minlength=num_bins)
        sums = [torch.bincount(bins, v.double(), num_bins) for v in (confidence, predicted == y)]
        used = counts > 0
        x, height, share = (
            v[used].numpy() for v in (sums[0] / counts, sums[1] / counts, counts / counts.sum())
        )
        (line,) = ax.plot(x, height, label=name)
        ax.scatter(x, height, s=20 + 200 * share, color=line.get_color())
    ax.set_xlabel("confidence")
    ax.set_ylabel("accuracy")
    return ax


def plot_losses(result: Any, *, smooth: int = 50, ax: "Axes | None" = None) -> "Axes":
    """
    The losses of fits, with their running means.

    :param result: a :class:`~pyro_bnn.infer.FitResult`, or losses; or a mapping from names to either.
    :param int smooth: steps in the running mean.
    :param ax: axes to draw in.
    :return: the axes.

    Example::

        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_losses({'a': [3.0, 2.0, 1.0]}, smooth=2, ax=ax) is ax
        True
    """
    ax = new_axes(ax)
    for index, (name, source) in enumerate(each(ax, result)):
        if not isinstance(source, FitResult):
            losses = torch.as_tensor(source, dtype=torch.float64)
            source = FitResult(losses, len(losses), "", 0.0)
        source.plot(smooth=smooth, color=f"C{index}", label=name, ax=ax)
    return ax
