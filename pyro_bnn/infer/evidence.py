# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
The Laplace evidence as a function of hyperparameters.

Multipliers :math:`\tau` of the prior precision cost O(p) per value after one decomposition:
:math:`\log\det P(\tau) = \sum_i \log(\tau + e_i) + c`.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from typing_extensions import override

from pyro_bnn.curvature.accumulate import CurvatureAccumulator
from pyro_bnn.curvature.kronecker import KroneckerPart
from pyro_bnn.curvature.low_rank import LowRankPart, placed_rows
from pyro_bnn.curvature.parts import NotAMinimumError, Part
from pyro_bnn.curvature.prior import diagonal_of_diagonal
from pyro_bnn.curvature.stream import FisherKind, SiteExamples
from pyro_bnn.distributions.precision_normal import PrecisionNormal
from pyro_bnn.infer.hyperparameters import (
    LIMIT,
    Groups,
    HyperparameterReport,
    climb,
    search,
    warn_of_runaways,
)
from pyro_bnn.model.data import iter_batches, repeatable_batches
from pyro_bnn.ops.described import Described, first_of
from pyro_bnn.ops.distributed import all_reduce_sum, rank
from pyro_bnn.ops.graph import FirstOrderSum
from pyro_bnn.ops.jacobian import hvp_operator, vjp, wide


def tau_of(part: Part, tau: Tensor) -> Tensor:
    """The multiplier of a part, of a scalar or shape ``(p,)``: a scalar where it is the same for all of its entries."""
    if tau.dim() == 0:
        return tau
    mine = tau[part.index]
    if isinstance(part, KroneckerPart):
        return mine[0]
    # equal values of different sites still have different derivatives
    return mine[0] if bool((mine == mine[0]).all()) and not tau.requires_grad else mine


def prior_change(part: Part, gradient: Tensor, tau: Tensor) -> Tensor:
    r"""
    The change of the log prior density of a part's entries when a Gaussian prior's precision D is multiplied by
    :math:`\tau`: :math:`\tfrac12\sum_i (\log\tau_i - (\tau_i - 1) D_i (u_i - m_i)^2)`. The gradient of the negative log
    prior is :math:`D(u - m)`.
    """
    distance = _distance(part, gradient)
    return 0.5 * (tau.log().expand(distance.shape) - (tau - 1) * distance).sum()


def _distance(part: Part, gradient: Tensor) -> Tensor:
    """The terms of the squared distance from the prior mean in prior standard deviations, shape (q,)."""
    prior = part.prior
    if prior.dim() == 1:
        return gradient.square() / prior
    return gradient * torch.linalg.solve(prior, gradient)


def differentiable_evidence(guide: Any, data: Any, *, generator: torch.Generator | None = None) -> Tensor:
    r"""
    The log evidence at the guide's point estimate :math:`\hat u` and the present values of the model's parameters
    :math:`\psi`, with its gradient in all of them: scales of priors, noise, and weights of networks that are
    parameters rather than sample sites.

    .. math:: \partial_\psi \log p(D) = \partial_\psi \log p(D, \hat u) - \tfrac12\operatorname{tr}(P^{-1}\,\partial_\psi P)

    at fixed :math:`\hat u` (MacKay, 1992; Immer et al., 2021), exact in every structure, Jacobian and Fisher information
    included: the derivative of :math:`\log\det P` in the sums that make up P, times the derivative of these sums in
    :math:`\psi`. Exceptions: ``"mc_fisher"`` takes the second factor from the exact Fisher information, and
    ``"nystrom"`` holds the features fixed.

    Two passes over the data. Memory is that of one chunk, since gradients are summed chunk by chunk: the result can
    be differentiated once.

    :param guide: a fitted :class:`~pyro_bnn.infer.autoguide.AutoLaplace`; it is not changed.
    :param data: the data of the approximation: one batch or an iterable of batches, with observations.
    :param generator: source of random numbers for random curvatures.
    :return: a scalar, in nats.
    :raises ValueError: if multipliers of the prior precision are in use, or the curvature is that of a subset of data.
    """
    if guide.tau is not None:
        raise ValueError(
            "multipliers of the prior precision are in use (optimize_hyperparameters), in which the model's own "
            "parameters are not all there is: call laplace_approximation again, or differentiate "
            "log_evidence(tau) in tau."
        )
    if guide.subset_size is not None:
        raise ValueError(
            "the evidence of a subset of data is not differentiable in the model's parameters: leave subset_size out, "
            "or use another structure."
        )
    data = repeatable_batches(data)
    with torch.enable_grad():
        sums = guide.at_mode
        found, parts = sums.parts(data, generator)
        posterior = sums.gaussian(parts)
        value = LaplaceEvidence(
            parts, found.log_likelihood + found.log_prior, found.prior.gradient, guide.loc
        ).value()
        weights = [_part_gradients(part, guide.loc) for part in parts]
        latent, chunks = _differentiable_chunks(sums, data)
        total = FirstOrderSum(latent)
        for i, (trace, sites) in enumerate(chunks):
            log_likelihood = guide.packed.log_likelihood(trace)
            term = log_likelihood
            if i == 0:
                log_prior = guide.packed.log_prior(latent, trace)
                of_prior = log_prior - 0.5 * _prior_trace(posterior, -log_prior, latent)
                # one prior for all processes, which differentiate in the same parameters
                term = term + of_prior * (1.0 if rank() == 0 else 0.0)
            if guide.curvature == "hessian":
                term = term - 0.5 * _hessian_trace(posterior, parts, -log_likelihood, latent)
            for site in sites:
                term = term - 0.5 * _curvature_trace(sums, parts, weights, site)
            total.add(term)
        all_reduce_sum(total.gradients())
        return total.attach(value)


def _differentiable_chunks(sums: Any, data: Any) -> tuple[Tensor, Iterator[tuple[Trace, list[SiteExamples]]]]:
    """The packed vector, and by chunk of data a trace at it with the sites whose Fisher information is wanted."""
    if sums.curvature == "hessian":
        accumulator = CurvatureAccumulator(sums.packed, sums.loc, "hessian")
        return accumulator.latent, ((trace, []) for trace, _ in accumulator.likelihood_terms(data))
    stream = sums.stream(differentiable=True)
    return stream.latent, stream.run(data)


def _part_gradients(part: Part, loc: Tensor) -> dict[str, Tensor]:
    """The derivatives of the log determinant in the sums over data that a part consists of."""
    if isinstance(part, LowRankPart):
        values, vectors = part.tensors["values"], part.tensors["vectors"]
        return {"root": vectors * (1 + values).rsqrt() / part.prior.sqrt().unsqueeze(-1)}
    names = [name for name in ("curvature", "outputs", "inputs") if name in part.tensors]
    leaves = {name: part.tensors[name].detach().clone().requires_grad_(True) for name in names}
    moved = type(part)(**dict(part.tensors, **leaves))
    gradients = torch.autograd.grad(
        moved.posterior(loc.detach()).log_det_precision, list(leaves.values()), materialize_grads=True
    )
    return dict(zip(names, gradients, strict=True))


def _curvature_trace(
    sums: Any, parts: list[Part], weights: list[dict[str, Tensor]], site: SiteExamples
) -> Tensor:
    """One chunk's share of the curvature, weighted by the derivatives of the log determinant."""
    kind: FisherKind = "empirical_fisher" if sums.curvature == "empirical_fisher" else "ggn"
    cotangents = site.cotangents(kind, differentiable=True)
    total = sums.loc.new_zeros(())
    if isinstance(parts[0], LowRankPart):
        (part,), (weight,) = parts, weights
        for rows in placed_rows(site, cotangents, part.index):
            total = total + (rows @ weight["root"]).square().sum()
        return total
    chunk = sums.empty_sum()
    chunk.add(site, cotangents)
    for mine in chunk.parts(torch.zeros_like):
        for part, weight in zip(parts, weights, strict=True):
            if part.kind == mine.kind and torch.equal(part.index, mine.index):
                for name, gradient in weight.items():
                    total = total + (gradient * mine.tensors[name]).sum()
    return total


def _hessian_trace(posterior: PrecisionNormal, parts: list[Part], value: Tensor, latent: Tensor) -> Tensor:
    r""":math:`\operatorname{tr}(P^{-1} \nabla^2 \text{value})` with P held fixed, of what the structure keeps of it."""
    if isinstance(parts[0], LowRankPart):
        roots = latent.new_zeros(parts[0].tensors["vectors"].shape[1], len(latent))
        roots[:, parts[0].index] = _part_gradients(parts[0], latent)["root"].mT
    else:
        roots = _roots(posterior, latent)
    return _trace_along(_gradient(value, latent), latent, roots)


def _roots(posterior: PrecisionNormal, latent: Tensor) -> Tensor:
    return posterior.half_solve(torch.eye(len(latent), dtype=latent.dtype, device=latent.device))


def _gradient(value: Tensor, latent: Tensor) -> Tensor | None:
    """The gradient with its graph; ``None`` where it is constant."""
    if not value.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(value, latent, create_graph=True, materialize_grads=True)
    return gradient if gradient.requires_grad else None


def _trace_along(gradient: Tensor | None, latent: Tensor, roots: Tensor) -> Tensor:
    r""":math:`\sum_i r_i^\top H r_i` for the Jacobian H of a gradient."""
    total = latent.new_zeros(())
    if gradient is None:
        return total
    for some in roots.split(256):
        total = total + (vjp(gradient, latent, some, create_graph=True) * some).sum()
    return total


def _prior_trace(posterior: PrecisionNormal, value: Tensor, latent: Tensor) -> Tensor:
    r""":math:`\operatorname{tr}(P^{-1} \nabla^2 \text{value})` with P held fixed."""
    gradient = _gradient(value, latent)
    if gradient is None:
        return latent.new_zeros(())
    if diagonal_of_diagonal(hvp_operator(value, latent), latent) is None:
        return _trace_along(gradient, latent, _roots(posterior, latent))
    (diagonal,) = torch.autograd.grad(
        gradient, latent, torch.ones_like(latent), create_graph=True, materialize_grads=True
    )
    return (diagonal * posterior.variance).sum()


@dataclass(frozen=True, repr=False)
class LaplaceEvidence(Described):
    r"""
    The log evidence of a Laplace approximation as a function of multipliers :math:`\tau` of the prior precision, the point
    estimate held fixed.

    :param parts: the curvature.
    :param log_joint: the log joint density at the point estimate, for :math:`\tau = 1`.
    :param prior_gradient: the gradient of the negative log prior there, shape ``(p,)``.
    :param loc: the point estimate, shape ``(p,)``.
    :param indefinite: whether the curvature of the likelihood may be negative by more than rounding.
    """

    parts: Sequence[Part]
    log_joint: Tensor
    prior_gradient: Tensor
    loc: Tensor
    indefinite: bool = False

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        kinds = Counter(part.kind for part in self.parts)
        random = sum(len(part.index) for part in self.parts)
        return "Laplace evidence as a function of the prior precision", {
            "log joint density at the point estimate": f"{float(self.log_joint):.6g} nats",
            "latents": f"{len(self.loc):,}, {random:,} of them random",
            "curvature": first_of(f"{number} x {kind}" for kind, number in kinds.items()),
        }

    def value(self, tau: Tensor | None = None) -> Tensor:
        """The log evidence, differentiable in multipliers of shape ``(p,)`` or a scalar."""
        total = self.log_joint.double()
        for part in self.parts:
            scale = None if tau is None else tau_of(part, tau)
            log_det = part.posterior(wide(self.loc.detach()), scale).log_det_precision
            total = total + 0.5 * (len(part.index) * math.log(2 * math.pi) - log_det)
            if scale is not None:
                total = total + prior_change(part, self.prior_gradient[part.index], scale)
        return total

    def spectrum(self, groups: list[list[Part]]) -> "EvidenceSpectrum":
        """The evidence as a function of one multiplier per group of parts."""
        found = []
        for parts in groups:
            spectra = [part.spectrum() for part in parts]
            values = torch.cat([values for values, _ in spectra]).double()
            distances = [_distance(part, self.prior_gradient[part.index]).double().sum() for part in parts]
            constants = [constant.double() for _, constant in spectra]
            found.append((values, torch.stack(distances).sum(), torch.stack(constants).sum()))
        return EvidenceSpectrum(self.log_joint, found, self.indefinite)

    def maximise(
        self, groups: Groups, *, tolerance: float = 1e-6, max_steps: int = 100
    ) -> HyperparameterReport:
        """
        The best multipliers, by Newton's method in their logarithms, in which the evidence is concave where the curvature
        is positive, until its gradient is below the tolerance.
        """
        split = groups.split(self.parts)
        if split is None:
            return self._maximise_jointly(groups, max_steps)
        spectrum = self.spectrum(split)
        log_tau = torch.zeros(len(groups), dtype=torch.float64, device=self.loc.device)
        history: list[float] = []
        for _ in range(max_steps):
            slope, bend = spectrum.derivatives(log_tau)
            history.append(float(spectrum.value(log_tau)))
            if bool((slope.abs() <= tolerance * (1 + bend.abs())).all()):
                break
            # a vanishing second derivative of what has no maximum must not turn the step around
            step = (slope / bend.abs().clamp(min=1e-12)).clamp(-2.0, 2.0)
            # halfway to where the precision has an eigenvalue of zero, instead of beyond
            log_tau = torch.maximum((log_tau + step).clamp(-LIMIT, LIMIT), (log_tau + spectrum.floor) / 2)
        report = groups.report(log_tau.exp(), history)
        for name, margin in zip(report.tau, (log_tau - spectrum.floor).tolist(), strict=True):
            if margin < 1e-3:
                raise _unbounded(name, report.tau[name])
        warn_of_runaways(report, bend.tolist())
        return report

    def _maximise_jointly(self, groups: Groups, max_steps: int) -> HyperparameterReport:
        """Multipliers of groups that parts span several of: L-BFGS on the log evidence itself."""
        start = torch.zeros(len(groups), dtype=self.loc.dtype, device=self.loc.device)
        log_tau, history = climb(lambda t: self.value(groups.expand(t.exp())), start, max_iter=max_steps)
        report = groups.report(log_tau.exp(), history)
        warn_of_runaways(report, None)
        return report

    def best_of(self, candidates: Sequence[float], groups: Groups) -> HyperparameterReport:
        """The best multipliers among candidates."""
        split = groups.split(self.parts)
        spectrum = None if split is None else self.spectrum(split)

        def score(tau: Tensor) -> float:
            return float(self.value(groups.expand(tau)) if spectrum is None else spectrum.value(tau.log()))

        return search(groups, candidates, score)


def _unbounded(name: str, tau: float) -> NotAMinimumError:
    """The error for an evidence that is infinite where a smaller multiplier makes the point a saddle."""
    return NotAMinimumError(
        f"optimize_hyperparameters: the evidence rises without end as the multiplier of the prior precision of {name!r} falls to "
        f"{tau:.3g}, where the Hessian is no longer positive definite: along some directions the prior alone makes the point a "
        "minimum. Use method='validation', or curvature='ggn', whose evidence has a maximum."
    )


@dataclass(frozen=True)
class EvidenceSpectrum:
    """
    The log evidence in the logarithms of one multiplier per group, O(p) per value.

    :param log_joint: the log joint density for multipliers of 1.
    :param groups: by group the eigenvalues of the curvature relative to the prior's, the squared distance from the prior
        mean and the log determinant of the prior's.
    :param indefinite: whether negative eigenvalues are more than rounding.
    """

    log_joint: Tensor
    groups: list[tuple[Tensor, Tensor, Tensor]]
    indefinite: bool = False

    def value(self, log_tau: Tensor) -> Tensor:
        """The log evidence, differentiable."""
        total = self.log_joint
        for t, (values, distance, constant) in zip(log_tau.exp(), self.groups, strict=True):
            total = total + 0.5 * (len(values) * (t.log() + math.log(2 * math.pi)) - (t - 1) * distance)
            total = total - 0.5 * (constant + torch.log(t + values).sum())
        return total

    @cached_property
    def floor(self) -> Tensor:
        """By group the logarithm of the multiplier below which the precision is indefinite, shape (G,)."""
        lowest = torch.stack([values.min() for values, _, _ in self.groups])
        return (-lowest).clamp(min=0).log() if self.indefinite else torch.full_like(lowest, -math.inf)

    def derivatives(self, log_tau: Tensor) -> tuple[Tensor, Tensor]:
        """The first two derivatives in each log multiplier; they do not interact."""
        slopes, bends = [], []
        for t, (values, distance, _) in zip(log_tau.exp(), self.groups, strict=True):
            shrunk = t / (t + values)
            slopes.append(0.5 * (len(values) - t * distance - shrunk.sum()))
            bends.append(-0.5 * (t * distance + (shrunk * (1 - shrunk)).sum()))
        return torch.stack(slopes), torch.stack(bends)


def train_with_evidence(
    guide: Any,
    data: Any,
    hyperparameters: Iterable[Tensor] = (),
    *,
    epochs: int,
    update_every: int = 10,
    burn_in: int = 0,
    hyper_steps: int = 10,
    lr: float = 1e-2,
    hyper_lr: float = 1e-1,
) -> HyperparameterReport:
    r"""
    Trains the point estimate and, on the way, the model's hyperparameters by the evidence (Immer et al., 2021,
    "Scalable marginal likelihood estimation for model selection in deep learning", algorithm 1).

    :param guide: an initialised guide; fitted afterwards, at its last point estimate.
    :param data: one batch or an iterable of batches, with observations.
    :param hyperparameters: parameters of the model, such as the unconstrained values behind scales of priors and
        noise (``model.parameters()``).
    :param epochs: passes over the data with Adam steps on the point estimate.
    :param update_every: epochs between updates of the hyperparameters.
    :param burn_in: epochs before the first update.
    :param hyper_steps: Adam steps on the hyperparameters per update.
    :param lr: step size for the point estimate.
    :param hyper_lr: step size for the hyperparameters.
    :return: a :class:`HyperparameterReport` with the log evidence at each update.
    """
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs must be an integer of at least 1, found {epochs!r}")
    chosen = [h for h in hyperparameters if h.requires_grad]
    optimizer = torch.optim.Adam([guide.loc], lr=lr)
    hyper = torch.optim.Adam(chosen, lr=hyper_lr) if chosen else None
    history: list[float] = []
    batches = sum(1 for _ in iter_batches(data))
    with warnings.catch_warnings():
        # before the end the point estimate is not expected to have converged
        warnings.simplefilter("ignore", UserWarning)
        for epoch in range(epochs):
            for batch in iter_batches(data):
                optimizer.zero_grad()
                trace = guide.packed.trace(guide.loc, batch)
                guide.packed.check_observations(trace)
                loss = -guide.packed.log_likelihood(trace)
                loss = loss - guide.packed.log_prior(guide.loc, trace) / batches
                loss.backward(inputs=[guide.loc])
                optimizer.step()
            if epoch >= burn_in and (epoch - burn_in + 1) % update_every == 0:
                guide.laplace_approximation(data)
                history.append(float(guide.log_evidence()))
                for _ in range(hyper_steps if hyper else 0):
                    assert hyper is not None
                    hyper.zero_grad()
                    # at the present hyperparameters: the curvature is computed anew
                    (-differentiable_evidence(guide, data)).backward(inputs=chosen)
                    hyper.step()
        guide.laplace_approximation(data)
    history.append(float(guide.log_evidence()))
    return HyperparameterReport({}, history)
