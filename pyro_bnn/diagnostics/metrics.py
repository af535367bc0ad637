# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Scores of predictions under posterior draws.

Every function takes either a prediction (:class:`~pyro_bnn.infer.PosteriorPredictive`, one of its sites, an
:class:`xarray.DataTree` or :class:`arviz.InferenceData` of :mod:`pyro_bnn.diagnostics.arviz`) or plain arrays
with the S posterior draws in the first dimension. Observations that the model masks do not count.

NaN, infinite values, shapes that do not fit, labels that are no class and probabilities that do not sum to one raise a
``ValueError`` that names the argument.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_bnn.diagnostics.scored import (
    Kind,
    Scored,
    check_numbers,
    check_probability,
    draws_and_observations,
    is_soft,
    need,
    probabilities_and_labels,
)
from pyro_bnn.diagnostics.scored import as_prediction as as_prediction
from pyro_bnn.infer.predict.predictive import SitePrediction as SitePrediction

#: Nominal coverages of a calibration curve.
LEVELS = tuple(k / 20 for k in range(1, 20))


def nll(log_likelihood: Any, *, site: str | None = None) -> float:
    r"""
    The negative log predictive density per point, nats:
    :math:`-\frac1N \sum_n \log \frac1S \sum_s p(y_n \mid z_s)`.

    An estimate from S draws, biased upwards by Jensen's inequality.

    :param log_likelihood: pointwise log likelihoods ``(S, N)``, or a prediction.
    :param str site: the observed site, if there are several.
    :return: the mean over points.

    Example::

        >>> round(nll(torch.tensor([[0.2], [0.4]]).log()), 4) == round(-math.log(0.3), 4)
        True
    """
    value = Scored(log_likelihood, site, "log_likelihood").draws("log_likelihood", infinite=True)
    if bool((value == math.inf).any()):
        raise ValueError("log_likelihood holds infinite densities: the score would be minus infinity.")
    return float(-(torch.logsumexp(value, 0) - math.log(len(value))).mean())


def rmse(mean: Any, observed: Any = None, *, site: str | None = None) -> float:
    r"""
    Root mean squared error of the predictive mean :math:`\frac1S\sum_s E[y \mid z_s]`.

    :param mean: means under each draw ``(S, N)``, or a prediction.
    :param observed: observations ``(N,)``; by default those of the prediction.
    :param str site: the observed site, if there are several.
    :return: the error, in units of y.

    Example::

        >>> rmse(torch.tensor([[0.0], [2.0]]), torch.tensor([4.0]))
        3.0
    """
    value, y = draws_and_observations(mean, observed, site, "mean")
    return float((value.mean(0) - y).square().mean().sqrt())


def crps(samples: Any, observed: Any = None, *, site: str | None = None) -> float:
    r"""
    Continuous ranked probability score of predictive draws,
    :math:`E|Y - y| - \frac12 E|Y - Y'|`, in its unbiased form (pairs of different draws).

    :param samples: draws of the observation ``(S, N)``, or a prediction.
    :param observed: observations ``(N,)``; by default those of the prediction.
    :param str site: the observed site, if there are several.
    :return: the mean over points, in units of y.

    **References**

    Gneiting and Raftery, *Strictly proper scoring rules, prediction, and estimation*, JASA 2007, equation 21.

    Example::

        >>> crps(torch.tensor([[0.0], [2.0]]), torch.tensor([1.0]))
        0.0
    """
    value, y = draws_and_observations(samples, observed, site, "samples")
    size = len(value)
    if size < 2:
        return float((value - y).abs().mean())
    # sum over pairs |a - b| = sum_i (2i - S + 1) a_(i) of the sorted draws
    weight = 2 * torch.arange(size, dtype=value.dtype, device=value.device) - size + 1
    pairs = (value.sort(0).values * weight.reshape(-1, *(1,) * (value.dim() - 1))).sum(0)
    return float(((value - y).abs().mean(0) - pairs / (size * (size - 1))).mean())


def crps_normal(mean: Any, variance: Any, observed: Any) -> float:
    r"""
    The exact score of the mixture :math:`\frac1S\sum_s N(\mu_s, \sigma_s^2)`; memory O(S² N), in chunks of points.

    :param mean: means ``(S, N)``.
    :param variance: variances ``(S, N)``.
    :param observed: observations ``(N,)``.
    :return: the mean over points, in units of y.

    **References**

    Grimit, Gneiting, Berrocal, Johnson, *The continuous ranked probability score for circular variables and its
    application to mesoscale forecast ensemble verification*, QJRMS 2006, equation 5.

    Example::

        >>> y = torch.zeros(1)
        >>> round(crps_normal(torch.zeros(1, 1), torch.ones(1, 1), y), 4)
        0.2337
    """
    mean, y = draws_and_observations(mean, observed, None, "mean")
    variance = check_numbers(need(variance, "variance"), "variance")
    if variance.shape != mean.shape or bool((variance < 0).any()):
        raise ValueError(
            f"variance of shape {tuple(variance.shape)}, smallest {float(variance.min()):.3g}: expected numbers that are not "
            f"negative, of the shape {tuple(mean.shape)} of mean."
        )
    mean, variance, y = mean.flatten(1), variance.flatten(1), y.flatten()

    def absolute(location: Tensor, var: Tensor) -> Tensor:
        """E|X| of X ~ N(location, var)."""
        scale = var.sqrt().clamp(min=torch.finfo(var.dtype).tiny)
        return location * torch.erf(location / (scale * math.sqrt(2))) + scale * math.sqrt(
            2 / math.pi
        ) * torch.exp(-0.5 * (location / scale).square())

    scores = []
    for m, v, target in zip(mean.split(64, 1), variance.split(64, 1), y.split(64), strict=True):
        first = absolute(m - target, v).mean(0)
        second = absolute(m[:, None] - m, v[:, None] + v).mean((0, 1))
        scores.append(first - second / 2)
    return float(torch.cat(scores).mean())


def interval_coverage(
    samples: Any, observed: Any = None, level: float = 0.9, *, site: str | None = None
) -> float:
    """
    The fraction of observations inside the central predictive interval.

    :param samples: draws of the observation ``(S, N)``, or a prediction.
    :param observed: observations ``(N,)``; by default those of the prediction.
    :param float level: the nominal probability of the interval.
    :param str site: the observed site, if there are several.
    :return: the fraction, to be compared with ``level``.

    Example::

        >>> interval_coverage(torch.linspace(-1, 1, 101)[:, None].expand(-1, 2), torch.tensor([0.3, 0.8]), 0.5)
        0.5
    """
    value, y = draws_and_observations(samples, observed, site, "samples")
    return float(_coverage(value, y, [check_probability(level, "level")])[0])


def interval_width(samples: Any, level: float = 0.9, *, site: str | None = None) -> float:
    """
    Sharpness: the mean width of the central predictive interval.

    :param samples: draws of the observation ``(S, N)``, or a prediction.
    :param float level: the nominal probability of the interval.
    :param str site: the observed site, if there are several.
    :return: the mean width, in units of y.

    Example::

        >>> import torch
        >>> round(interval_width(torch.linspace(0, 1, 101).unsqueeze(-1), level=0.9), 3)
        0.9
    """
    value = Scored(samples, site, "samples").draws("samples")
    low, high = _intervals(value, [check_probability(level, "level")])
    return float((high - low).mean())


def _intervals(samples: Tensor, levels: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The ends of central intervals, shape ``(levels, *shape)`` each; the draws ``(S, *shape)`` are sorted once."""
    tails = [(1 - level) / 2 for level in levels] + [(1 + level) / 2 for level in levels]
    where = torch.tensor(tails, dtype=samples.dtype, device=samples.device)
    ends = torch.quantile(samples, where, dim=0)
    return ends[: len(levels)], ends[len(levels) :]


def _coverage(samples: Tensor, y: Tensor, levels: Sequence[float]) -> np.ndarray:
    """The fractions of observations inside central intervals, shape ``(levels,)``."""
    low, high = _intervals(samples, levels)
    inside = ((y >= low) & (y <= high)).double()
    return inside.unsqueeze(-1).flatten(1).mean(1).cpu().numpy()


def calibration_curve(
    samples: Any, observed: Any = None, levels: Sequence[float] = LEVELS, *, site: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """
    Nominal against empirical coverage of central intervals.

    :param samples: draws of the observation ``(S, N)``, or a prediction.
    :param observed: observations ``(N,)``; by default those of the prediction.
    :param levels: nominal probabilities.
    :param str site: the observed site, if there are several.
    :return: nominal and empirical coverage.

    Example::

        >>> import torch
        >>> draws = torch.linspace(-1, 1, 101).unsqueeze(-1)
        >>> levels, observed = calibration_curve(draws, torch.zeros(1), levels=[0.5, 0.9])
        >>> observed
        array([1., 1.])
    """
    value, y = draws_and_observations(samples, observed, site, "samples")
    checked = [check_probability(level, "levels") for level in levels]
    return np.asarray(levels), _coverage(value, y, checked)


def pit(samples: Any, observed: Any = None, *, site: str | None = None) -> np.ndarray:
    r"""
    Probability integral transforms :math:`\frac1S \#\{s: y_s < y\}`, ties split at random; uniform for
    calibrated predictions.

    :param samples: draws of the observation ``(S, N)``, or a prediction.
    :param observed: observations ``(N,)``; by default those of the prediction.
    :param str site: the observed site, if there are several.
    :return: one value per observation; masked ones are left out.

    Example::

        >>> import torch
        >>> float(pit(torch.zeros(100, 1), torch.ones(1))[0]) > 0.99  # the observation is above all draws
        True
    """
    value, y = draws_and_observations(samples, observed, site, "samples")
    below, equal = (value < y).sum(0), (value == y).sum(0)
    rank = below + torch.rand(y.shape, dtype=torch.float64, device=y.device) * (equal + 1)
    return (rank / (len(value) + 1)).cpu().numpy()


def mean_probs(
    probs: Any, labels: Any = None, *, site: str | None = None, kind: Kind | None = None
) -> tuple[Tensor, Tensor]:
    """
    Class probabilities averaged over draws, and labels.

    :param probs: probabilities ``(S, N, C)`` or already averaged ``(N, C)``; of two classes those of the second,
        ``(S, N)``, will do; whole numbers ``(S, N)`` are labels that were drawn; or a prediction. Of a tree, which holds no
        probabilities, the frequencies of the classes among its draws.
    :param labels: labels ``(N,)``; by default the observations of the prediction.
    :param str site: the observed site, if there are several.
    :param str kind: what an array holds, where its shape leaves that open, which happens for N = C: ``"classes"`` for
        probabilities of all classes, ``"binary"`` for those of the second of two under draws, ``"labels"`` for drawn labels.
    :return: probabilities ``(N, C)`` and labels ``(N,)``.
    :raises ValueError: if the shape can be read in two ways, for labels that are no class (negative, fractional, C or more),
        and for probabilities that are not between 0 and 1 or do not sum to one.

    Example::

        >>> mean_probs(torch.eye(2), torch.tensor([0, 1]), kind="classes")[0]
        tensor([[1., 0.],
                [0., 1.]])
    """
    return probabilities_and_labels(probs, labels, site, kind)


def accuracy(probs: Any, labels: Any = None, *, site: str | None = None, kind: Kind | None = None) -> float:
    """
    The fraction of labels that have the largest mean probability.

    :param probs: see :func:`mean_probs`.
    :param labels: see :func:`mean_probs`.
    :param str site: the observed site, if there are several.
    :param str kind: see :func:`mean_probs`.
    :return: the fraction.

    Example::

        >>> import torch
        >>> accuracy(torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]]), torch.tensor([0, 0]))
        0.5
    """
    value, y = mean_probs(probs, labels, site=site, kind=kind)
    return float((value.argmax(-1) == y).double().mean())


def brier(probs: Any, labels: Any = None, *, site: str | None = None, kind: Kind | None = None) -> float:
    r"""
    The Brier score :math:`\frac1N\sum_n \sum_c (p_{nc} - 1[y_n = c])^2` (between 0 and 2).

    :param probs: see :func:`mean_probs`.
    :param labels: see :func:`mean_probs`.
    :param str site: the observed site, if there are several.
    :param str kind: see :func:`mean_probs`.
    :return: the mean over points.

    Example::

        >>> brier(torch.tensor([[0.5, 0.5]]), torch.tensor([1]))
        0.5
    """
    value, y = mean_probs(probs, labels, site=site, kind=kind)
    hot = torch.nn.functional.one_hot(y, value.shape[-1])
    return float((value - hot).square().sum(-1).mean())


def ece(
    probs: Any, labels: Any = None, num_bins: int = 15, *, site: str | None = None, kind: Kind | None = None
) -> float:
    r"""
    Expected calibration error: the mean distance of confidence and accuracy over ``num_bins`` bins of equal
    width of the confidence (the largest mean probability), weighted by their counts.

    Computed by :mod:`torchmetrics`.

    :param probs: see :func:`mean_probs`.
    :param labels: see :func:`mean_probs`.
    :param int num_bins: the number of bins.
    :param str site: the observed site, if there are several.
    :param str kind: see :func:`mean_probs`.
    :return: the error.

    Example::

        >>> import torch
        >>> round(ece(torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.9, 0.0]]), torch.tensor([0, 1])), 3)
        0.1
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    if not isinstance(num_bins, int) or num_bins < 1:
        raise ValueError(f"num_bins={num_bins!r}: expected a whole number of at least 1.")
    value, y = mean_probs(probs, labels, site=site, kind=kind)
    value, y = value.flatten(0, -2), y.flatten()
    return float(
        multiclass_calibration_error(value, y, num_classes=value.shape[-1], n_bins=num_bins, norm="l1")
    )


def auroc(scores_in: Any, scores_out: Any) -> float:
    """
    Area under the receiver operating characteristic of a score that should be larger out of distribution, such
    as the entropy or the epistemic variance.

    Computed by :mod:`torchmetrics`.

    :param scores_in: scores of points in distribution.
    :param scores_out: scores of points out of distribution.
    :return: the probability that a point outside scores higher than one inside.

    Example::

        >>> auroc([0.1, 0.2], [0.15, 0.3])
        0.75
    """
    from torchmetrics.functional.classification import binary_auroc

    inside = check_numbers(torch.as_tensor(scores_in), "scores_in", infinite=True).reshape(-1)
    outside = check_numbers(torch.as_tensor(scores_out), "scores_out", infinite=True).reshape(-1)
    scores = torch.cat([inside, outside])
    # ranks: torchmetrics takes probabilities and would push other scores through a sigmoid
    ranks = torch.unique(scores, return_inverse=True)[1].double() / len(scores)
    target = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
    return float(binary_auroc(ranks, target))


def evaluate(
    prediction: Any, *, site: str | None = None, levels: Sequence[float] = (0.5, 0.9)
) -> dict[str, float]:
    """
    All scores that fit a prediction: NLL, RMSE, CRPS, coverage and width of intervals for real observations;
    NLL, accuracy, Brier score and ECE for class labels; NLL for soft labels.

    :param prediction: a prediction with observations.
    :param str site: the observed site, if there are several.
    :param levels: nominal probabilities of the intervals.
    :return: scores by name.

    Example::

        >>> mean = torch.zeros(50, 3)
        >>> found = evaluate(SitePrediction(torch.randn(50, 3), mean, mean + 1, mean[0], mean - 1, ("data",)))
        >>> sorted(found)
        ['coverage_50', 'coverage_90', 'crps', 'nll', 'rmse', 'width_50', 'width_90']
    """
    found = as_prediction(prediction, site)
    need(found.observed, "observations")
    scores = {"nll": nll(found)} if found.log_likelihood is not None else {}
    if is_soft(found):
        return scores
    if found.kind != "numeric":
        return scores | {"accuracy": accuracy(found), "brier": brier(found), "ece": ece(found)}
    if found.mean is None or bool(found.mean.isfinite().any()):  # a Cauchy distribution has no mean
        scores["rmse"] = rmse(found)
    scores["crps"] = crps(found)
    for level in levels:
        scores[f"coverage_{level * 100:g}"] = interval_coverage(found, level=level)
        scores[f"width_{level * 100:g}"] = interval_width(found, level)
    return scores


def table(rows: Mapping[str, Mapping[str, float]], digits: int = 3) -> str:
    """
    Formats scores of several methods as a text table.

    :param rows: scores by method, as :func:`evaluate` returns them.
    :param int digits: significant digits after the point.
    :return: lines of text, one method per line.

    Example::

        >>> print(table({"map": {"nll": 1.0}, "laplace": {"nll": 0.5}}))
                   nll
        map      1.000
        laplace  0.500
    """
    columns = list(dict.fromkeys(name for scores in rows.values() for name in scores))
    cells = [["", *columns]] + [
        [name, *(f"{scores[c]:.{digits}f}" if c in scores else "" for c in columns)]
        for name, scores in rows.items()
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns) + 1)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)])
        for row in cells
    )
