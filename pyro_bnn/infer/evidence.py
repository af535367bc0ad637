# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
The Laplace evidence as a function of hyperparameters.

Multipliers :math:`\tau` of the prior precision cost O(p) per value after one decomposition:
:math:`\log\det P(\tau) = \sum_i \log(\tau + e_i) + c`.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_bnn.curvature.accumulate import CurvatureAccumulator
from pyro_bnn.curvature.diagonal import DiagonalPart
from pyro_bnn.curvature.kronecker import KroneckerPart
from pyro_bnn.curvature.low_rank import LowRankPart, placed_rows
from pyro_bnn.curvature.parts import Part
from pyro_bnn.curvature.prior import diagonal_of_diagonal
from pyro_bnn.curvature.stream import FisherKind, SiteExamples
from pyro_bnn.distributions.precision_normal import PrecisionNormal
from pyro_bnn.infer.hyperparameters import LIMIT, HyperparameterReport, warn_of_edges, warn_of_runaways
from pyro_bnn.model.data import iter_batches, repeatable_batches
from pyro_bnn.ops.distributed import all_reduce_sum, rank
from pyro_bnn.ops.graph import FirstOrderSum
from pyro_bnn.ops.jacobian import hvp_operator, vjp

#: What a multiplier of the prior precision is shared by: everything, the sites of one module, or one site.
Per = Literal["global", "layer", "site"]


def tau_of(part: Part, tau: Tensor) -> Tensor:
    """
    :param part: a part of the curvature.
    :param tau: a scalar, or shape ``(p,)``.
    :return: the multiplier of the part: a scalar where it is the same for all of its entries.
    """
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
    :math:`\tau`: :math:`\tfrac12\sum_i (\log\tau_i - (\tau_i - 1) D_i (u_i - m_i)^2)`.

    :param part: the part.
    :param gradient: the gradient of the negative log prior, :math:`D(u - m)`, shape ``(q,)``.
    :param tau: a scalar or shape ``(q,)``.
    :return: a scalar.
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
        found, parts = guide.curvature_parts(data, generator)
        posterior = guide._assemble(parts, None)
        value = guide._evidence_of(parts, found.log_likelihood + found.log_prior)
        weights = [_part_gradients(part, guide.loc) for part in parts]
        latent, chunks = _differentiable_chunks(guide, data)
        total = FirstOrderSum(latent)
        for i, (trace, sites) in enumerate(chunks):
            log_likelihood = guide.packed.log_likelihood(trace)
            term = log_likelihood
            if i == 0 and rank() == 0:
                log_prior = guide.packed.log_prior(latent, trace)
                term = term + log_prior - 0.5 * _prior_trace(posterior, -log_prior, latent)
            if guide.curvature == "hessian":
                term = term - 0.5 * _hessian_trace(posterior, parts, -log_likelihood, latent)
            for site in sites:
                term = term - 0.5 * _curvature_trace(guide, parts, weights, site)
            total.add(term)
        all_reduce_sum(total.gradients())
        return total.attach(value)


def _differentiable_chunks(
    guide: Any, data: Any
) -> tuple[Tensor, Iterator[tuple[Trace, list[SiteExamples]]]]:
    """The packed vector, and by chunk of data a trace at it with the sites whose Fisher information is wanted."""
    if guide.curvature == "hessian":
        accumulator = CurvatureAccumulator(guide.packed, guide.loc, "hessian")
        return accumulator.latent, ((trace, []) for trace, _ in accumulator.likelihood_terms(data))
    stream = guide._stream(differentiable=True)
    return stream.latent, stream.run(data)


def _part_gradients(part: Part, loc: Tensor) -> dict[str, Tensor]:
    """The derivatives of the log determinant in the sums over data that a part consists of."""
    if isinstance(part, LowRankPart):
        values, vectors = part.tensors["values"], part.tensors["vectors"]
        return {"root": vectors * (1 + values).rsqrt() / part.prior.sqrt().unsqueeze(-1)}
    names = [name for name in ("curvature", "outputs", "inputs") if name in part.tensors]
    leaves: dict[str, Tensor] = {
        name: part.tensors[name].detach().clone().requires_grad_(True) for name in names
    }
    moved = type(part)(**dict(part.tensors, **leaves))
    gradients = torch.autograd.grad(
        moved.posterior(loc.detach()).log_det_precision, list(leaves.values()), materialize_grads=True
    )
    return dict(zip(names, gradients, strict=True))


def _curvature_trace(
    guide: Any, parts: list[Part], weights: list[dict[str, Tensor]], site: SiteExamples
) -> Tensor:
    """One chunk's share of the curvature, weighted by the derivatives of the log determinant."""
    kind: FisherKind = "empirical_fisher" if guide.curvature == "empirical_fisher" else "ggn"
    cotangents = site.cotangents(kind, differentiable=True)
    total = guide.loc.new_zeros(())
    if isinstance(parts[0], LowRankPart):
        (part,), (weight,) = parts, weights
        for rows in placed_rows(site, cotangents, part.index):
            total = total + (rows @ weight["root"]).square().sum()
        return total
    chunk = guide.empty_sum()
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
        return _trace_along(value, latent, roots)
    return _trace_along(value, latent, _roots(posterior, latent))


def _roots(posterior: PrecisionNormal, latent: Tensor) -> Tensor:
    return posterior.half_solve(torch.eye(len(latent), dtype=latent.dtype, device=latent.device))


def _trace_along(value: Tensor, latent: Tensor, roots: Tensor) -> Tensor:
    r""":math:`\sum_i r_i^\top \nabla^2 \text{value}\, r_i`."""
    if not value.requires_grad:
        return latent.new_zeros(())
    (gradient,) = torch.autograd.grad(value, latent, create_graph=True, materialize_grads=True)
    if not gradient.requires_grad:
        return latent.new_zeros(())
    total = latent.new_zeros(())
    for some in roots.split(256):
        total = total + (vjp(gradient, latent, some, create_graph=True) * some).sum()
    return total


def _prior_trace(posterior: PrecisionNormal, value: Tensor, latent: Tensor) -> Tensor:
    r""":math:`\operatorname{tr}(P^{-1} \nabla^2 \text{value})` with P held fixed."""
    if not value.requires_grad:
        return latent.new_zeros(())
    (gradient,) = torch.autograd.grad(value, latent, create_graph=True, materialize_grads=True)
    if not gradient.requires_grad:
        return latent.new_zeros(())
    if diagonal_of_diagonal(hvp_operator(value, latent), latent) is None:
        return _trace_along(value, latent, _roots(posterior, latent))
    (diagonal,) = torch.autograd.grad(
        gradient, latent, torch.ones_like(latent), create_graph=True, materialize_grads=True
    )
    return (diagonal * posterior.variance).sum()


class _Spectrum:
    """The evidence as a function of one multiplier per group of parts, O(p) per value."""

    def __init__(self, guide: Any, groups: list[list[Part]]) -> None:
        self.groups = []
        for parts in groups:
            spectra = [part.spectrum() for part in parts]
            values = torch.cat([values for values, _ in spectra]).double()
            distance = sum(
                (_distance(part, guide.prior_gradient[part.index]).double().sum() for part in parts),
                torch.zeros_like(values[:0].sum()),
            )
            constant = sum((c for _, c in spectra), torch.zeros_like(distance))
            self.groups.append((values, distance, constant))
        count = sum(len(values) for values, _, _ in self.groups)
        self.base = guide.log_joint + 0.5 * count * math.log(2 * math.pi)

    def value(self, log_tau: Tensor) -> Tensor:
        """The log evidence."""
        total = self.base
        for t, (values, distance, constant) in zip(log_tau.exp(), self.groups, strict=True):
            total = total + 0.5 * (len(values) * t.log() - (t - 1) * distance - constant)
            total = total - 0.5 * torch.log(t + values).sum()
        return total

    def evidence(self, log_tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The log evidence and its first two derivatives in each log multiplier (they do not interact)."""
        slopes, bends = [], []
        for t, (values, distance, _) in zip(log_tau.exp(), self.groups, strict=True):
            shrunk = t / (t + values)
            slopes.append(0.5 * (len(values) - t * distance - shrunk.sum()))
            bends.append(-0.5 * (t * distance + (shrunk * (1 - shrunk)).sum()))
        return self.value(log_tau), torch.stack(slopes), torch.stack(bends)


def optimize_evidence(
    guide: Any, *, per: Per = "global", tolerance: float = 1e-6, max_steps: int = 100
) -> HyperparameterReport:
    r"""
    Maximises the evidence in multipliers of the prior precision, by Newton's method in their logarithms, in which it
    is concave, with the point estimate held fixed.

    :param guide: a fitted guide.
    :param per: one multiplier for all entries, per layer or per site.
    :param tolerance: the gradient at which to stop.
    :param max_steps: largest number of steps.
    :return: a :class:`HyperparameterReport`; ``guide.tau`` is set.
    """
    masks = _masks(guide, per)
    groups = _groups(guide.part_store.get(), masks)
    history: list[float] = []
    if groups is None:
        return _optimize_joint(guide, masks, history, max_steps)
    spectrum = _Spectrum(guide, groups)
    log_tau = torch.zeros(len(groups), dtype=torch.float64, device=guide.loc.device)
    for _ in range(max_steps):
        value, slope, bend = spectrum.evidence(log_tau)
        history.append(float(value))
        if bool((slope.abs() <= tolerance * (1 + bend.abs())).all()):
            break
        # a vanishing second derivative of what has no maximum must not turn the step around
        step = (slope / bend.abs().clamp(min=1e-12)).clamp(-2.0, 2.0)
        log_tau = (log_tau + step).clamp(-LIMIT, LIMIT)
    report = _finish(guide, masks, log_tau.exp(), history)
    warn_of_runaways(report, bend.tolist())
    return report


def optimize_grid(guide: Any, candidates: Sequence[float], *, per: Per = "global") -> HyperparameterReport:
    """
    Chooses multipliers of the prior precision by the evidence.

    :param guide: a fitted guide.
    :param candidates: the multipliers to try.
    :param per: one multiplier for all entries, per layer or per site.
    :return: a :class:`HyperparameterReport`; ``guide.tau`` is set to the best.
    """
    masks = _masks(guide, per)
    groups = _groups(guide.part_store.get(), masks)
    spectrum = None if groups is None else _Spectrum(guide, groups)

    def score(tau: Tensor) -> float:
        if spectrum is None:
            return float(guide.log_evidence(_expand_tau(guide, masks, tau)))
        return float(spectrum.value(tau.log()))

    return _search(guide, masks, candidates, score)


def optimize_validation(
    guide: Any,
    data: Any,
    candidates: Sequence[float],
    *,
    per: Per = "global",
    num_samples: int = 100,
    seed: int = 0,
) -> HyperparameterReport:
    """
    Chooses multipliers of the prior precision by the log predictive density of held-out data: in closed form
    where the linearised predictive has one, by draws from the linearised parameters otherwise.

    :param guide: a fitted guide.
    :param data: validation data: one batch or an iterable of batches, with observations.
    :param candidates: the multipliers to try.
    :param per: one multiplier for all entries, per layer or per site.
    :param num_samples: draws where there is no closed form.
    :param seed: of these draws, the same for all candidates.
    :return: a :class:`HyperparameterReport`; ``guide.tau`` is set to the best.
    """
    if not guide.packed.observed:
        raise ValueError(
            "method='validation' scores observations, and the model has none, only pyro.factor statements: use "
            "method='evidence'."
        )
    masks = _masks(guide, per)

    def score(tau: Tensor) -> float:
        _set_tau(guide, _expand_tau(guide, masks, tau))
        return validation_score(guide, data, num_samples=num_samples, seed=seed)

    return _search(guide, masks, candidates, score)


def _search(
    guide: Any,
    masks: dict[str, Tensor | None],
    candidates: Sequence[float],
    score: Callable[[Tensor], float],
) -> HyperparameterReport:
    """The best candidate of each group in turn, the others held fixed, until nothing changes."""
    if not candidates:
        raise ValueError("candidates is empty: pass the multipliers to try")
    tau = torch.ones(len(masks), dtype=guide.loc.dtype, device=guide.loc.device)
    history: list[float] = []
    for _ in range(5):
        before = tau.clone()
        for group in range(len(masks)):
            scores = []
            for value in candidates:
                tau[group] = value
                scores.append(score(tau))
            tau[group] = candidates[max(range(len(scores)), key=scores.__getitem__)]
            history += scores
        if len(masks) == 1 or torch.equal(before, tau):
            break
    report = _finish(guide, masks, tau, history)
    warn_of_edges(report, candidates)
    return report


def _masks(guide: Any, per: Per) -> dict[str, Tensor | None]:
    """The random entries of each group: everything, a layer (sites of one module) or a site."""
    if per == "global":
        return {"all": None}
    found: dict[str, Tensor | None] = {}
    for site, where in guide.packed.space.slices.items():
        name = site.rpartition(".")[0] or site if per == "layer" else site
        mask = torch.zeros(len(guide.loc), dtype=torch.bool, device=guide.loc.device)
        mask[where] = True
        if guide.active is not None:
            mask &= guide.active
        old = found.get(name)
        if bool(mask.any()):
            found[name] = mask if old is None else mask | old
    return found


def _groups(parts: list[Part], masks: dict[str, Tensor | None]) -> list[list[Part]] | None:
    """The parts of each group, or ``None`` if a part spans several of them."""
    found: dict[str, list[Part]] = {name: [] for name in masks}
    for part in parts:
        for name, mask in masks.items():
            inside = None if mask is None else mask[part.index]
            if inside is None or bool(inside.all()):
                found[name].append(part)
            elif bool(inside.any()) and isinstance(part, DiagonalPart):
                tensors = {k: v[inside] for k, v in part.tensors.items()}
                found[name].append(DiagonalPart(**tensors))
            elif bool(inside.any()):
                return None
    return list(found.values())


def _expand_tau(guide: Any, masks: dict[str, Tensor | None], tau: Tensor) -> Tensor:
    full = torch.ones_like(guide.loc.detach())
    for mask, value in zip(masks.values(), tau, strict=True):
        if mask is None:
            return value
        full = torch.where(mask, value, full)
    return full


def _set_tau(guide: Any, tau: Tensor) -> None:
    guide.tau = tau.detach().clone().to(guide.loc)
    guide._posterior = None


def _finish(
    guide: Any, masks: dict[str, Tensor | None], tau: Tensor, history: list[float]
) -> HyperparameterReport:
    _set_tau(guide, _expand_tau(guide, masks, tau))
    return HyperparameterReport({name: float(v) for name, v in zip(masks, tau, strict=True)}, history)


def _optimize_joint(
    guide: Any, masks: dict[str, Tensor | None], history: list[float], max_steps: int
) -> HyperparameterReport:
    """Multipliers of groups that parts span several of: L-BFGS on the log evidence itself."""
    log_tau = torch.zeros(len(masks), dtype=guide.loc.dtype, device=guide.loc.device, requires_grad=True)

    def multipliers() -> Tensor:
        return log_tau.clamp(-LIMIT, LIMIT).exp()

    optimizer = torch.optim.LBFGS(
        [log_tau], max_iter=max_steps, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -guide.log_evidence(_expand_tau(guide, masks, multipliers()))
        value.backward()
        history.append(-float(value.detach()))
        return value.detach()

    optimizer.step(loss)
    report = _finish(guide, masks, multipliers().detach(), history)
    warn_of_runaways(report, None)
    return report


@torch.no_grad()
def validation_score(guide: Any, data: Any, *, num_samples: int = 100, seed: int = 0) -> float:
    """
    The log predictive density of data under the linearised model, summed over observations.

    :param guide: a fitted guide.
    :param data: one batch or an iterable of batches, with observations.
    :param num_samples: draws where there is no closed form.
    :param seed: of these draws.
    :return: nats.
    """
    total = 0.0
    for args, kwargs in iter_batches(data):
        with torch.enable_grad():
            trace = guide.packed.trace(guide.loc.detach(), (args, kwargs))
            guide.packed.check_observations(trace)
            outputs = guide.linearized_outputs(*args, **kwargs)
        for name, found in outputs.items():
            value = trace.nodes[name]["value"]
            assert isinstance(value, Tensor)
            generator = torch.Generator(device=found.mean.device).manual_seed(seed)
            total += float(found.log_density(value, num_samples=num_samples, generator=generator).sum())
    return total


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
