# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The UCI splits and the scores of Gaussian mixture predictions in the target's original units."""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_bnn.diagnostics import metrics

DATA = Path(os.environ.get("PYRO_BNN_DATA", Path(__file__).parents[1] / "../shared/data"))
SETS = ("yacht", "boston", "energy", "concrete", "wine", "kin8nm", "power", "naval", "protein")


@dataclass
class Split:
    """
    Standardised training and test data.

    :param x: training inputs, shape (N, D).
    :param y: training targets, shape (N,).
    :param x_test: test inputs.
    :param y_test: test targets.
    :param scale: standard deviation of the training targets in original units.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    scale: float


def number_of_splits(name: str, kind: str) -> int:
    return len(_read(name)["gap_test_index" if kind == "gap" else "test_index"])


def _read(name: str) -> dict[str, np.ndarray]:
    path = DATA / "uci" / f"{name}.npz"
    if not path.exists():
        print(f"{path} is missing: set PYRO_BNN_DATA to the folder that holds uci/", file=sys.stderr)
        sys.exit(2)
    return dict(np.load(path))


def load(name: str, kind: str, split: int, *, validate: bool = False, gap: int | None = None) -> Split:
    """
    One split, standardised with the mean and standard deviation of its training part.

    :param name: data set.
    :param kind: ``"standard"`` or ``"gap"``.
    :param split: its number.
    :param validate: whether rows of the training part take the place of the test part, which is then not used: a
        random fifth, or for gap splits the middle third along the next feature.
    :param gap: with ``validate``, the feature along which the middle third is held out, for all kinds of splits.
    """
    raw = _read(name)
    x, y = torch.from_numpy(raw["x"]).double(), torch.from_numpy(raw["y"]).double()
    index = torch.from_numpy(raw["gap_test_index" if kind == "gap" else "test_index"][split]).long()
    test = torch.zeros(len(x), dtype=torch.bool)
    test[index[index >= 0]] = True
    if validate:
        x, y = x[~test], y[~test]
        third = len(x) // 3
        if kind == "gap" and gap is None:
            gap = split + 1
        if gap is not None:
            held_out = x[:, gap % x.shape[1]].argsort(stable=True)[third : 2 * third]
        else:
            held_out = torch.randperm(len(x), generator=torch.Generator().manual_seed(split))[: len(x) // 5]
        test = torch.zeros(len(x), dtype=torch.bool)
        test[held_out] = True
    mean, sd = x[~test].mean(0), x[~test].std(0)
    x = (x - mean) / torch.where(sd > 0, sd, torch.ones_like(sd))
    y_mean, y_sd = y[~test].mean(), y[~test].std()
    y = (y - y_mean) / y_sd
    return Split(x[~test], y[~test], x[test], y[test], float(y_sd))


def mixture_cdf(mean: Tensor, variance: Tensor, value: Tensor) -> Tensor:
    r"""
    :math:`\frac1S\sum_s \Phi((v - \mu_s)/\sigma_s)` for ``mean`` and ``variance`` of shape (S, N), values (..., N).
    """
    return torch.special.ndtr((value.unsqueeze(-2) - mean) / variance.sqrt()).mean(-2)


def log_likelihood(mean: Tensor, variance: Tensor, y: Tensor, scale: float) -> float:
    """The mean log likelihood in original units; see :func:`scores`."""
    log_density = -0.5 * ((y - mean).square() / variance + (2 * math.pi * variance).log())
    mixed = torch.logsumexp(log_density, 0) - math.log(len(mean))
    return float(mixed.mean()) - math.log(scale)


def coverage(mean: Tensor, variance: Tensor, y: Tensor) -> float:
    """The share of targets in central 95 % intervals; see :func:`scores`."""
    pit = mixture_cdf(mean, variance, y)
    return float(((pit >= 0.025) & (pit <= 0.975)).double().mean())


def scores(mean: Tensor, variance: Tensor, y: Tensor, scale: float) -> dict[str, float]:
    """
    Scores of the predictions (1/S) sum_s N(mean_s, variance_s), all exact for the mixture.

    :param mean: in standardised units, shape (S, N).
    :param variance: likewise.
    :param y: standardised targets.
    :param scale: standard deviation of the targets: log likelihood, RMSE and CRPS are in original units.
    """
    return {
        "log_likelihood": log_likelihood(mean, variance, y, scale),
        "rmse": metrics.rmse(mean, y) * scale,
        "crps": metrics.crps_normal(mean, variance, y) * scale,
        "coverage": coverage(mean, variance, y),
    }
