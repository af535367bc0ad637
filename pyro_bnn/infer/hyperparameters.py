# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What a search for hyperparameters found, and whether it is an optimum."""

from collections.abc import Sequence
from dataclasses import dataclass

from pyro_bnn.ops.notice import warn_user

#: Logarithms of multipliers beyond which a search does not go: 1e-8 to 1e8.
LIMIT = 8 * 2.302585092994046
#: A second derivative of the evidence in log tau below which tau is not determined: a standard deviation of log tau of 10.
_FLAT = 1e-2


class HyperparameterWarning(UserWarning):
    """A search for hyperparameters ended at the edge of its range, or where the objective says nothing about them."""


@dataclass
class HyperparameterReport:
    """
    What a search for hyperparameters found.

    :ivar tau: the multipliers of the prior precision, by site (or ``"all"``).
    :ivar objective: the objective at each evaluation: the log evidence, or the validation log likelihood.
    """

    tau: dict[str, float]
    objective: list[float]


def warn_of_edges(report: HyperparameterReport, candidates: Sequence[float]) -> None:
    """
    Warns where the best candidate is the smallest or the largest of at least three.

    :param report: the result of the search.
    :param candidates: the multipliers that were tried.
    """
    lowest, highest = min(candidates), max(candidates)
    found = [
        f"{name!r}: {tau:.3g}, the {'smallest' if tau == lowest else 'largest'}"
        for name, tau in report.tau.items()
        if len(candidates) > 2 and (tau <= lowest * (1 + 1e-6) or tau >= highest * (1 - 1e-6))
    ]
    if found:
        warn_user(
            f"optimize_hyperparameters: the best multiplier of the prior precision is at the edge of the {len(candidates)} "
            f"candidates from {lowest:.3g} to {highest:.3g} ({'; '.join(found)}): the optimum may lie beyond. Pass wider "
            "candidates=; if it stays at the edge, the objective rises without end and the data do not determine the prior.",
            HyperparameterWarning,
        )


def warn_of_runaways(report: HyperparameterReport, bends: Sequence[float] | None) -> None:
    """
    Warns where the evidence has no maximum: the search went to the edge of its range, or its curvature has vanished.

    :param report: the result of the search.
    :param bends: second derivatives of the log evidence in the logarithms of the multipliers there, where known.
    """
    found = []
    for i, (name, tau) in enumerate(report.tau.items()):
        low, high = tau <= 1.001e-8, tau >= 0.999e8
        flat = bends is not None and not bends[i] < -_FLAT
        if low or high or flat:
            curvature = "" if bends is None else f", second derivative in log tau {bends[i]:.2g}"
            found.append(f"{name!r}: {tau:.3g}{curvature}")
    if found:
        gain = report.objective[-1] - report.objective[0] if report.objective else 0.0
        warn_user(
            f"optimize_hyperparameters: the evidence has no maximum in the multiplier of the prior precision of {'; '.join(found)} "
            f"(gain over tau = 1: {gain:.3g} nats): the latents sit at their prior mean, or the data determine them without the "
            "prior. The guide uses this value; laplace_approximation(data) goes back to tau = 1. Choose per='global' or "
            "'layer', give the scale of these priors a prior of its own in the model, or use method='validation'.",
            HyperparameterWarning,
        )
