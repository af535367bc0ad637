# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
The noise of a regression and the prior precision, tuned together after one approximation.

The curvature of a Gaussian likelihood is proportional to :math:`\rho = \sigma_0^2 / \sigma^2`, so that with the eigenvalues
:math:`e_i` of the curvature relative to the prior at :math:`\sigma_0`, M targets and S squared residuals in units of
:math:`\sigma_0`, up to a constant

.. math:: \log p(D) = \tfrac M2\log\rho - \tfrac\rho2 S + \tfrac12\sum_i\big(\log\tau - \log(\tau + \rho^k e_i)\big)
    - \tfrac{\tau - 1}2 \hat u^\top D\hat u

with k = 1 (2 for the empirical Fisher matrix, whose scores are squared). It is jointly concave in :math:`\log\tau` and
:math:`\log\rho`. Every value costs O(p).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log, pi
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.infer.evidence import EvidenceSpectrum, LaplaceEvidence
from pyro_bnn.infer.hyperparameters import Groups, HyperparameterReport, Per, climb, warn_of_edges
from pyro_bnn.model.data import iter_batches
from pyro_bnn.ops.notice import logger, warn_user
from pyro_bnn.supervised.likelihoods import targets
from pyro_bnn.supervised.model import SupervisedModel
from pyro_bnn.supervised.survey import Survey


@dataclass(frozen=True)
class Tuning:
    """
    :ivar guide: an initialised guide.
    :ivar model: its model.
    :ivar approximate: computes the curvature.
    :ivar found: what is known of the data.
    :ivar per: what has a multiplier of the prior precision of its own.
    :ivar candidates: multipliers for held-out data.
    :ivar limit: the distance from the mode up to which the evidence is used.
    :ivar moves: whether ``approximate`` moves the weights.
    """

    guide: AutoLaplace
    model: SupervisedModel
    approximate: Callable[[], Any]
    found: Survey
    per: Per
    candidates: Sequence[float] | None
    limit: float
    moves: bool = False

    def run(self, tune: str | None, validation: Any) -> str | None:
        """Approximates and tunes; returns the method that has been used."""
        learns_noise = self.model.settings.get("noise") == "parameter"
        if learns_noise:
            self._set_noise(self.found.residual)
        self.approximate()
        if not self.moves:
            self._compare_passes(learns_noise)
        assert self.guide.map_report is not None
        if tune == "evidence" and self.guide.map_report.newton_decrement > self.limit:
            return None
        options: dict[str, Any] = {"per": self.per, "method": tune}
        if tune == "validation":
            options |= {"data": validation, "candidates": self.candidates}
        if tune is not None and learns_noise:
            tau, rho = self._with_noise(tune, validation)
            self._set_noise(self.found.residual * rho**-0.5)
            self.approximate()
            if tune == "validation" and self.per == "global":
                options = {"method": "grid", "candidates": [tau]}
        if tune is not None:
            report = self.guide.optimize_hyperparameters(**options)
            noise = f", noise {float(self.model.noise.detach()):.4g}" if learns_noise else ""
            logger.info("laplace: by %s, the prior precision times %s%s", tune, report.tau, noise)
        return tune

    def _compare_passes(self, learns_noise: bool) -> None:
        """Warns if the data of the fit were others than those of the pass before."""
        found, guide = self.found, self.guide
        before = found.log_likelihood_at(found.residual) if learns_noise else found.log_likelihood
        if before is None or self.model.settings.get("noise") == "latent":
            return
        assert guide.log_joint is not None
        assert guide.log_prior is not None
        here = float(guide.log_joint.double() - guide.log_prior.double())
        tolerance = 1e-6 if guide.loc.dtype == torch.float64 else 1e-3
        if not abs(here - before) <= tolerance * max(abs(before), found.num_elements):
            warn_user(
                f"the data differ between passes: the log likelihood of the same weights was {before:.6g}, and then {here:.6g}. "
                "Data that are drawn anew in every pass (augmentation, noise) have no posterior: pass a loader that gives the "
                "same rows each time."
            )

    def _with_noise(self, tune: str, validation: Any) -> tuple[float | None, float]:
        # scores are squared in the one; the other is not positive definite under every noise
        refused = "empirical_fisher" if tune == "validation" else "hessian"
        if self.guide.curvature == refused:
            raise ValueError(
                f"curvature={refused!r}: tune={tune!r} does not find the noise from one decomposition. Pass noise=, or a "
                "distribution as noise=, which makes it a latent site; or curvature='ggn'."
            )
        if tune == "validation":
            return by_held_out(self.guide, self.model, validation, self.candidates)
        noise = float(self.model.noise.detach())
        return None, noise_by_evidence(self.guide, noise, self.found.num_elements, self.per)

    def _set_noise(self, value: float) -> None:
        if not value > 0:
            raise ValueError(
                "the residuals of the network are all zero, so that the noise has no estimate: pass noise=, the standard deviation "
                "of the targets given the inputs."
            )
        self.model.noise = torch.full_like(self.model.noise.detach(), value)


def noise_by_evidence(guide: Any, noise: float, num_elements: int, per: Per) -> float:
    r"""
    The factor :math:`\rho` of the precision of the noise at the joint optimum of the evidence.

    :param guide: a fitted guide; it is not changed.
    :param noise: :math:`\sigma_0`, at which it was fitted.
    :param num_elements: M.
    :param per: what has a multiplier of the prior precision of its own; one for all, where the structure couples them.
    """
    assert guide.log_joint is not None
    assert guide.prior_gradient is not None
    parts = guide.part_store.get()
    evidence = LaplaceEvidence(parts, guide.log_joint, guide.prior_gradient, guide.loc)
    groups = [
        Groups(guide.packed.space.slices, guide.loc, guide.active, p).split(parts) for p in (per, "global")
    ]
    split = groups[0] if groups[0] is not None else groups[1]
    assert split is not None
    spectrum = evidence.spectrum(split)
    # the log likelihood of a Gaussian tells S, at the weights of the guide, which may have been moved
    assert guide.log_prior is not None
    likelihood = float(guide.log_joint.double() - guide.log_prior.double())
    squares = -2 * likelihood - num_elements * log(2 * pi * noise**2)
    power = 2 if guide.curvature == "empirical_fisher" else 1

    def objective(logs: Tensor) -> Tensor:
        return _joint_evidence(spectrum, logs, squares, num_elements, power) / num_elements

    start = torch.zeros(len(split) + 1, dtype=torch.float64, device=guide.loc.device)
    return float(climb(objective, start, max_iter=500)[0][-1].exp())


def _joint_evidence(
    spectrum: EvidenceSpectrum, logs: Tensor, squares: float, num_elements: int, power: int
) -> Tensor:
    """The evidence, up to a constant, in the logarithms of one multiplier per group and, last, of that of the precision of the noise."""
    rho = logs[-1].exp()
    likelihood = 0.5 * (num_elements * logs[-1] - rho * squares)
    groups = [(rho**power * values, distance, c) for values, distance, c in spectrum.groups]
    return EvidenceSpectrum(likelihood, groups).value(logs[:-1])


def by_held_out(guide: Any, model: Any, data: Any, candidates: Sequence[float] | None) -> tuple[float, float]:
    r"""
    The multiplier of the prior precision and the factor :math:`\rho` of the precision of the noise with the highest log
    predictive density of held-out data. Covariances of predictions are those of :math:`\tau/\rho` divided by :math:`\rho`: for
    each candidate of the quotient the best :math:`\rho` is that under which squared residuals, in units of their
    covariance, have a mean of 1.
    """
    grid = [10.0 ** (0.4 * i - 4) for i in range(21)] if candidates is None else list(candidates)
    found = []
    for quotient in grid:
        guide.optimize_hyperparameters(method="grid", candidates=[quotient])
        score, rho = _best_noise(guide, model, data)
        found.append((score, quotient, rho))
    score, quotient, rho = max(found)
    warn_of_edges(HyperparameterReport({"all": quotient}, [s for s, _, _ in found]), grid)
    return quotient * rho, rho


@torch.no_grad()
def _best_noise(guide: Any, model: Any, data: Any) -> tuple[float, float]:
    """The log predictive density at the best factor of the precision of the noise, and that factor."""
    peak = distance = 0.0
    size = 0
    for args, kwargs in iter_batches(data):
        x, y = model.split(*args, **kwargs)
        d = guide.predictive(x)["obs"]
        y = targets(y, d, model.likelihood)
        highest = d.log_prob(d.mean)
        peak += float(highest.double().sum())
        distance += float(2 * (highest - d.log_prob(y)).double().sum())
        size += y.numel()
    if not distance > 0:
        raise ValueError(
            "validation: the held-out targets are predicted exactly, so that the noise has no estimate: pass noise=, the standard "
            "deviation of the targets given the inputs."
        )
    rho = size / distance
    return peak + 0.5 * size * (log(rho) - 1), rho
