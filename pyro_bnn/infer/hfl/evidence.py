# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The Laplace evidence of models whose latents are too many for any matrix, and its maximum."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bnn.curvature.accumulate import check_option
from pyro_bnn.infer.hfl.checks import check_sizes
from pyro_bnn.infer.hfl.diagnostics import HFLWarning
from pyro_bnn.infer.hfl.evidence_terms import EvidenceGradient, EvidenceTerms
from pyro_bnn.infer.hyperparameters import LIMIT, Groups, HyperparameterReport, Per, warn_of_runaways
from pyro_bnn.model.arguments import takes_data
from pyro_bnn.ops.described import Described
from pyro_bnn.ops.log_det import Plan, Probes, Split
from pyro_bnn.ops.memory import available_bytes
from pyro_bnn.ops.notice import warn_user
from pyro_bnn.ops.options import require_count, require_number


@dataclass(frozen=True, repr=False)
class HFLEvidence(Described):
    r"""
    An estimate of the log evidence, with a bracket and a standard error.

    With infinitely many of the probes the evidence would be between the means of ``lower`` and ``upper``; what these probes tell
    of it has the standard error ``error``.

    :ivar log_evidence: the middle of the bracket, a scalar in nats, float64; once differentiable in the parameters of the
        model if that was asked for.
    :ivar float lower: the lower end of the bracket, in nats.
    :ivar float upper: its upper end.
    :ivar float error: the standard error over probes, in nats.
    :ivar float log_joint: the log joint density at the point estimate.
    :ivar float log_det: the estimate of :math:`\log\det P`.
    :ivar float newton_decrement: the distance of the point estimate from the minimum in posterior standard deviations.
    :ivar int rank: directions in which the curvature is known exactly.
    :ivar int num_probes: of the rest.
    :ivar int products: with the curvature.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_bnn import AutoLaplace, hfl
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 1.0), obs=y)
        >>> x = torch.ones(3)
        >>> guide = AutoLaplace(model).initialize(x, x).polish((x, x))
        >>> found = hfl.log_evidence(guide, (x, x))
        >>> found.lower <= float(found.log_evidence) <= found.upper, found.error
        (True, 0.0)
    """

    log_evidence: Tensor
    lower: float
    upper: float
    error: float
    log_joint: float
    log_det: float
    newton_decrement: float
    rank: int
    num_probes: int
    products: int

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        return "log evidence of a Laplace approximation without matrices", {
            "log evidence": f"{float(self.log_evidence.detach()):.6g} nats",
            "bracket": f"{self.lower:.6g} to {self.upper:.6g}",
            "standard error over probes": f"{self.error:.2g}",
            "log joint density": f"{self.log_joint:.6g}",
            "log determinant of the precision": f"{self.log_det:.6g}",
            "Newton decrement of the point estimate": f"{self.newton_decrement:.2g} sd",
            "cost": f"{self.products} products (rank {self.rank}, {self.num_probes} probes)",
        }


def _start(
    terms: EvidenceTerms, plan: Plan, tau: Tensor | None, *, solve: bool
) -> tuple[Tensor, Probes, int]:
    """The start of a plan for A under multipliers of the prior precision."""
    scale = terms.scale(tau)
    return plan.start(terms.whitened(scale), terms.part.curvature * scale.square(), solve=solve)


def _plan(
    terms: EvidenceTerms,
    tolerance: float,
    rank: int | None,
    num_probes: int | None,
    max_steps: int,
    seed: int,
) -> Plan:
    require_number("tolerance", tolerance, above=0)
    check_sizes(rank=rank, max_steps=max_steps)
    require_count("seed", seed, least=0)
    if num_probes is not None:
        require_count("num_probes", num_probes, least=2)
    row = len(terms.index) * terms.part.prior.element_size()
    # tests, images, rows, eigenvectors and their images take as much each
    fits = int(min(0.5 * available_bytes(terms.latent.device), 2**40) / (6 * row))
    return Plan(
        2 * tolerance, rank, num_probes, max_rank=max(1, min(1024, fits)), max_steps=max_steps, seed=seed
    )


@takes_data(after=())
@torch.inference_mode(False)
@torch.enable_grad()
def log_evidence(
    guide: Any,
    *args: Any,
    tolerance: float = 0.5,
    rank: int | None = None,
    num_probes: int | None = None,
    tau: Tensor | None = None,
    differentiable: bool = False,
    max_steps: int = 200,
    map_tolerance: float = 1.0,
    chunk_size: int = 256,
    seed: int = 0,
    **kwargs: Any,
) -> HFLEvidence:
    r"""
    The Laplace approximation of the log marginal likelihood for any number of latents,

    .. math:: \log p(D) \approx \log p(D, \hat u) + \tfrac p2\log 2\pi - \tfrac12\log\det T - \tfrac12\log\det(1 + A),
        \qquad A = T^{-1/2} H T^{-1/2},

    with the prior precision T, which has to be diagonal, and the GGN H of the likelihood, from products with H. A Nyström
    approximation :math:`\hat A\preceq A` gives most of the last term exactly; of the rest, which has no negative eigenvalue,
    random probes are bracketed by the Gauss rule (from above) and the Gauss-Radau rule with a node at the bound that the prior
    gives (from below), step by step, and their mean has a standard error. See :mod:`pyro_bnn.ops.log_det`.

    Brackets are exact but for the rounding of products, by an estimate of which they are widened: in float32 that is what limits them.
    They certify the evidence of the *Laplace approximation* at this point estimate.

    :param guide: a point estimate, as for :func:`~pyro_bnn.infer.hfl.solve`. Multipliers of the prior precision that a guide
        uses, and its choice of random latents, are respected.
    :param args: one batch or an iterable of batches, **with observations**, covering every data point once; or the arguments
        of the model (see :mod:`pyro_bnn.model.arguments`).
    :param float tolerance: half the width of the bracket plus the standard error, in nats, that is aimed at.
    :param int rank: directions of the Nyström approximation; memory is about six such vectors each. By default it doubles
        while the probes that are still needed would cost more products.
    :param int num_probes: by default as many as the tolerance takes, at most 512.
    :param tau: multipliers of the prior precision, a scalar or shape ``(p,)``, exact for Gaussian priors; by default those
        in use.
    :param bool differentiable: whether the value carries its gradient in the parameters of the model (scales of priors, noise,
        weights that are no sites): exact in the captured directions and in the mean over the rest of them, from the same probes.
    :param int max_steps: largest number of Lanczos steps; memory is as many vectors.
    :param map_tolerance: the Newton decrement, in posterior standard deviations, above which a warning says that the point
        estimate has not converged.
    :param int chunk_size: how many vectors are multiplied at once.
    :param int seed: of the random numbers.
    :param kwargs: keyword arguments of the model.
    :return: an :class:`HFLEvidence`; print it.
    :raises ValueError: for a prior that is not diagonal or not positive at the point estimate, and for multipliers together with
        ``differentiable``.

    Sources: Ubaru, Chen and Saad (2017), "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature"; Golub and Meurant (1994),
    "Matrices, moments and quadrature"; MacKay (1992), "A practical Bayesian framework for backpropagation networks".

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro_bnn import AutoLaplace
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)
        >>> x, y = torch.eye(2), torch.tensor([1.0, -1.0])
        >>> guide = AutoLaplace(model).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
        >>> bool((log_evidence(guide, (x, y)).log_evidence - guide.log_evidence()).abs() < 1e-4)
        True
    """
    (data,) = args
    check_sizes(chunk_size=chunk_size)
    terms = EvidenceTerms(guide, data, chunk_size=chunk_size)
    tau = getattr(guide, "tau", None) if tau is None else torch.as_tensor(tau)
    if differentiable and tau is not None:
        raise ValueError(
            "differentiable=True with multipliers of the prior precision, in which the model's own parameters are not all there "
            "is: call laplace_approximation again, or leave tau out."
        )
    _check_tau(tau, len(terms.latent))
    plan = _plan(terms, tolerance, rank, num_probes, max_steps, seed)
    _, probes, products = _start(terms, plan, tau, solve=differentiable)
    result = _result(terms, tau, plan.finished(probes), products)
    _warn(result, tolerance, map_tolerance)
    if not differentiable:
        return result
    return replace(result, log_evidence=EvidenceGradient(terms, probes).attach(result.log_evidence))


def _check_tau(tau: Tensor | None, p: int) -> None:
    if tau is None:
        return
    if tau.shape not in ((), (p,)):
        raise ValueError(f"tau has shape {tuple(tau.shape)}, expected a scalar or ({p},)")
    if not bool((tau > 0).all() and torch.isfinite(tau).all()):
        raise ValueError(f"tau must be positive, found {float(tau.min()):.3g} to {float(tau.max()):.3g}")


def _result(terms: EvidenceTerms, tau: Tensor | None, probes: Probes, products: int) -> HFLEvidence:
    split, found, constant = probes.split, probes.log_det(), terms.constant(tau)
    log_prior = -2 * float(terms.scale(tau).double().log().sum())
    return HFLEvidence(
        log_evidence=torch.tensor(
            constant - 0.5 * found.value, dtype=torch.float64, device=terms.latent.device
        ),
        lower=constant - 0.5 * found.upper,
        upper=constant - 0.5 * found.lower,
        error=0.5 * found.error,
        log_joint=terms.log_joint(tau),
        log_det=log_prior + found.value,
        newton_decrement=terms.decrement(split, terms.scale(tau), tau),
        rank=len(split.values),
        num_probes=len(probes),
        products=products + split.products,
    )


def _warn(result: HFLEvidence, tolerance: float, map_tolerance: float) -> None:
    half = 0.5 * (result.upper - result.lower)
    if not half + result.error <= 1.5 * tolerance:
        warn_user(
            f"the evidence is known to {half:.2g} (bracket) + {result.error:.2g} (standard error) nats, not {tolerance:.2g}: more "
            "probes lower the second, a larger rank both, more max_steps or float64 the first",
            HFLWarning,
        )
    if not result.newton_decrement <= map_tolerance:
        warn_user(
            f"the point estimate is {result.newton_decrement:.3g} posterior standard deviations away from the minimum (Newton "
            "decrement), and the evidence is that of the Laplace approximation there: train longer or call guide.polish(data) first",
            HFLWarning,
        )


@takes_data(after=())
@torch.inference_mode(False)
@torch.enable_grad()
def optimize_hyperparameters(
    guide: Any,
    *args: Any,
    per: Per = "global",
    tolerance: float = 0.5,
    rank: int | None = None,
    num_probes: int | None = None,
    max_steps: int = 200,
    max_iter: int = 50,
    chunk_size: int = 256,
    seed: int = 0,
    **kwargs: Any,
) -> HyperparameterReport:
    r"""
    Multipliers :math:`\tau` of the prior precision with the highest evidence of :func:`log_evidence`, the point estimate held fixed.

    At the maximum :math:`\tau_a\,|\hat u_a - m_a|^2_T = \gamma_a`, the effective number of parameters
    :math:`\gamma_a = \operatorname{tr}_a(1 - (1 + A)^{-1})` of group a (MacKay, 1992), which the probes of the evidence estimate.
    The equation is solved for :math:`\log\tau_a`, in which its two sides differ by a decreasing function of a slope between -2 and -1.

    :param guide: a point estimate, which stays as it is; :class:`~pyro_bnn.infer.autoguide.AutoHessianFreeLaplace` has a method of this
        name that uses the multipliers.
    :param args: the data, as for :func:`log_evidence`.
    :param str per: ``"global"``, one multiplier for all; ``"layer"``, one for the sites of each module (their names up to the last
        dot); ``"site"``.
    :param float tolerance: of each evidence, in nats.
    :param int rank: as for :func:`log_evidence`; chosen at :math:`\tau = 1`.
    :param int num_probes: as for :func:`log_evidence`.
    :param int max_steps: as for :func:`log_evidence`.
    :param int max_iter: largest number of values of :math:`\tau`.
    :param int chunk_size: how many vectors are multiplied at once.
    :param int seed: of the random numbers, which are the same for all :math:`\tau`.
    :param kwargs: keyword arguments of the model.
    :return: the multipliers, and the evidence at each step.
    :raises ValueError: as :func:`log_evidence`.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro_bnn import AutoLaplace
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)
        >>> x, y = torch.eye(2), torch.tensor([1.0, -1.0])
        >>> guide = AutoLaplace(model).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
        >>> mine, dense = optimize_hyperparameters(guide, (x, y)), guide.optimize_hyperparameters()
        >>> abs(mine.tau["all"] / dense.tau["all"] - 1) < 1e-2
        True
    """
    (data,) = args
    check_option("per", per, Per)
    check_sizes(max_iter=max_iter, chunk_size=chunk_size)
    terms = EvidenceTerms(guide, data, chunk_size=chunk_size)
    plan = _plan(terms, tolerance, rank, num_probes, max_steps, seed)
    groups = Groups(terms.model.space.slices, terms.latent, terms.active, per)
    return _Search(terms, plan, groups).run(max_iter)


class _Search:
    """Fixed-point steps in the logarithms of multipliers, one for each group, with the slope of the last two."""

    def __init__(self, terms: EvidenceTerms, plan: Plan, groups: Groups) -> None:
        self.terms, self.plan, self.groups = terms, plan, groups
        rows, *_ = _start(terms, plan, None, solve=False)
        #: F with F' F below H, whatever the prior, shape (r, q)
        self.rows = rows / terms.scale()
        #: the group of each random entry, shape (q,)
        self.places = torch.zeros_like(terms.index)
        for number, mask in enumerate(groups.masks.values()):
            if mask is not None:
                self.places[mask[terms.index]] = number
        empty = torch.zeros(len(groups), dtype=torch.float64, device=terms.latent.device)
        self.distance = empty.index_add(0, self.places, terms.distances)

    def run(self, max_iter: int) -> HyperparameterReport:
        """Steps until the two sides of the equation agree."""
        log_tau = torch.zeros_like(self.distance)
        history: list[float] = []
        before = None
        bend = torch.full_like(log_tau, 0.5)  # minus the derivative of log gamma in log tau, between 0 and 1
        for _ in range(max_iter):
            value, gamma = self._evaluate(log_tau)
            history.append(value)
            found = gamma.clamp(min=1e-300).log()
            if before is not None:
                moved = log_tau - before[0]
                slope = -(found - before[1]) / torch.where(moved == 0, 1.0, moved)
                bend = torch.where(moved.abs() > 1e-6, slope.clamp(0.0, 1.0), bend)
            before = log_tau, found
            gap = found - log_tau - self.distance.clamp(min=1e-300).log()
            ahead = (log_tau + (gap / (1 + bend)).clamp(-4.0, 4.0)).clamp(-LIMIT, LIMIT)
            if float((ahead - log_tau).abs().max()) < 1e-3:
                break
            log_tau = ahead
        report = self.groups.report(log_tau.exp(), history)
        squares = log_tau.exp() * self.distance
        warn_of_runaways(report, (-0.5 * (squares + bend * gamma)).tolist())
        return report

    def _evaluate(self, log_tau: Tensor) -> tuple[float, Tensor]:
        """The evidence and the effective numbers of parameters, shape ``(G,)``."""
        tau = self.groups.expand(log_tau.exp().to(self.groups.like))
        scale = self.terms.scale(tau)
        diagonal = self.terms.part.curvature * scale.square()
        split = Split(self.terms.whitened(scale), diagonal, self.rows * scale)
        probes = self.plan.finished(self.plan.first(split, solve=True))
        gamma, _ = probes.traces(self.places)
        return self.terms.constant(tau) - 0.5 * probes.log_det().value, gamma
