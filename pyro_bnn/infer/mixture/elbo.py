# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Evidence lower bounds of mixture guides, with all components in one vectorised pass."""

import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList
from pyro.infer.elbo import ELBO
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor

from pyro_bnn.infer.autoguide.mixture import AutoMixture
from pyro_bnn.infer.mixture.check import (
    ComponentLoopWarning,
    Decision,
    check_alone,
    check_latents,
    check_used,
    difference,
)
from pyro_bnn.infer.mixture.joint_terms import JointTerms, constant_priors
from pyro_bnn.infer.mixture.loop import OUTSIDE, ComponentLoop, example_key
from pyro_bnn.infer.mixture.runs import PLATES, DirectRun, Step, TracedRun, rehearsal
from pyro_bnn.infer.mixture.terms import SiteTerms, per_component
from pyro_bnn.model.data import coincidences
from pyro_bnn.model.handlers import Site, check_broadcast, is_deterministic, log_prob_of, sample_sites
from pyro_bnn.model.plates import FAILURES
from pyro_bnn.ops.options import require_number

_Elbo: Any = ELBO

#: How many times as many steps pass until the joint run is compared with single ones again.
AGAIN = 16


class Mixture_ELBO(_Elbo):
    r"""
    The bounds of a mixture :math:`q = \frac1K \sum_k q_k` whose components share their index over all sites
    (:class:`~pyro_bnn.infer.autoguide.AutoMixture`, alone or in an
    :class:`~pyro.infer.autoguide.AutoGuideList` beside guides of other sites),

    .. math:: \mathcal{L} = \text{likelihood term} - \beta\, \mathrm{KL} + \log p(\text{point estimates}),

    for the minibatch scaled to the full data by the model's plates. The components are evaluated in one pass, as a
    plate left of the model's own plates; the model knows nothing of them.

    =====================  ==============================================================================
    likelihood
    ``"average"``          :math:`\frac1K\sum_k \sum_n E_{q_k} \log p(y_n \mid z)`
    ``"log_mixture"``      :math:`\sum_n E \log \frac1K \sum_k p(y_n \mid z_k)`, one draw per component
    KL
    ``"mean"``             :math:`\frac1K \sum_k \mathrm{KL}(q_k \| p)`, at most :math:`\log K` above the exact one
    ``"sum"``              :math:`\sum_k \mathrm{KL}(q_k \| p)`, what the reference implementation of [1] computes
    ``"exact"``            :math:`\mathrm{KL}(q \| p)`: the mean minus the information
                           :math:`\frac1K\sum_k E_{q_k} \log \frac{q_k}{q}` between index and sites, by Monte Carlo
    =====================  ==============================================================================

    With the average likelihood all three are lower bounds of the log evidence, and exact :math:`\ge` mean
    :math:`\ge` sum. The log-mixture likelihood with the sum bounds the evidence of another model, in which
    every example picks its component; with the mean or the exact KL it bounds nothing. :attr:`is_bound` tells.

    KL terms are analytic wherever torch registers them (Normal, Cauchy and LogNormal pairs among them) and by
    Monte Carlo otherwise. Point estimates (:class:`~pyro.distributions.Delta` sites) contribute their log prior
    density, which is neither multiplied by ``kl_scale`` nor summed over components; with them the value is
    a MAP objective in those sites and a bound only in the others.

    :param str likelihood: ``"average"`` or ``"log_mixture"``.
    :param str kl: ``"mean"``, ``"sum"`` or ``"exact"``.
    :param kl_scale: the factor :math:`\beta`, or a schedule ``callable(step) -> float``, the steps being the
        evaluations of the loss with gradients, counted from 0 in :attr:`step`.
    :param int num_particles: draws per component, vectorised.
    :param str batch: ``"repeat"`` runs every example through every component; ``"split"`` gives each component its
        own part of the batch (networks that were converted by :func:`~pyro_bnn.nn.rank1_` only), at the cost of one
        pass and the variance of the smaller part.
    :param float entropy_weight: adds this multiple of the entropy of the guide (a tempered posterior) [2].
    :param int max_plate_nesting: number of plate dimensions of the model; found by running it once if omitted.

    The first evaluation, and the first on data of another structure, compares the joint run with runs of single
    components on the path that all later evaluations take, in evaluation mode and without a random number spent. Where
    they differ (networks that mix rows of the batch or hold tensors that are no batch, models that do not broadcast) the
    components run through the model one by one, and a :class:`ComponentLoopWarning` says so once.

    :ivar int step: the number of evaluations with gradients so far; set it to resume a schedule.

    **References**

    [1] Dusenberry et al., *Efficient and Scalable Bayesian Neural Nets with Rank-1 Factors*, ICML 2020, section 3.

    [2] Trinh et al., *Tackling covariate shift with node-based Bayesian neural networks*, ICML 2022.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro_bnn.infer.autoguide import AutoMixture
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("obs", dist.Normal(z, 1.0), obs=y)
        >>> y = torch.tensor([0.5, 1.0])
        >>> guide = AutoMixture(model, num_components=2).initialize(y)
        >>> elbo = Mixture_ELBO()
        >>> loss = elbo(model, guide)(y)
        >>> sorted(elbo.parts)
        ['entropy', 'expected_log_likelihood', 'kl', 'kl_scale', 'log_prior']
    """

    def __init__(
        self,
        likelihood: str = "average",
        kl: str = "mean",
        *,
        kl_scale: float | Callable[[int], float] = 1.0,
        num_particles: int = 1,
        batch: str = "repeat",
        entropy_weight: float = 0.0,
        max_plate_nesting: int | None = None,
    ) -> None:
        if likelihood not in ("average", "log_mixture"):
            raise ValueError(f"likelihood must be 'average' or 'log_mixture', found {likelihood!r}.")
        if kl not in ("mean", "sum", "exact"):
            raise ValueError(f"kl must be 'mean', 'sum' or 'exact', found {kl!r}.")
        if not isinstance(num_particles, int) or num_particles < 1:
            raise ValueError(f"num_particles must be an integer of at least 1, found {num_particles!r}.")
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=float("inf") if max_plate_nesting is None else max_plate_nesting,
        )
        self.max_plate_nesting: float
        if batch not in ("repeat", "split"):
            raise ValueError(f"batch must be 'repeat' or 'split', found {batch!r}.")
        if batch == "split" and likelihood != "average":
            raise ValueError(
                "batch='split' shows an example to one component only: it needs likelihood='average'."
            )
        self.batch = batch
        self.likelihood = likelihood
        self.kl = kl
        if not callable(kl_scale):
            require_number("kl_scale", kl_scale, least=0)
        require_number("entropy_weight", entropy_weight, least=0)
        self.kl_scale = kl_scale
        self.entropy_weight = float(entropy_weight)
        self.step = 0
        self._parts: dict[str, Any] = {}
        self._nestings: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._decisions: weakref.WeakKeyDictionary[Any, dict[Any, Decision]] = weakref.WeakKeyDictionary()
        self._told: weakref.WeakSet[Any] = weakref.WeakSet()
        self._joint_terms: weakref.WeakKeyDictionary[Any, JointTerms] = weakref.WeakKeyDictionary()

    @property
    def is_bound(self) -> bool:
        """
        Whether the value is, in expectation and for a guide without point estimates, a lower bound of the log
        evidence of the model (average likelihood) or of the model in which each example picks a component
        (log-mixture).
        """
        scale = self.current_kl_scale()
        if scale < 1.0 or self.entropy_weight > 0:
            return False
        return self.likelihood == "average" or self.kl == "sum"

    def current_kl_scale(self) -> float:
        r"""
        The factor of the KL at the present step.

        :return: :math:`\beta`.
        """
        if not callable(self.kl_scale):
            return float(self.kl_scale)
        scale = float(self.kl_scale(self.step))
        require_number(f"kl_scale at step {self.step}", scale, least=0)
        return scale

    @property
    def parts(self) -> dict[str, float]:
        """
        The terms of the last evaluation: ``expected_log_likelihood``, ``kl`` (before scaling), ``kl_scale``,
        ``log_prior`` of the point estimates, and ``entropy`` (only with ``entropy_weight``). The loss is
        ``kl_scale * kl - expected_log_likelihood - log_prior - entropy_weight * entropy``.
        """
        return {key: float(value) for key, value in self._parts.items()}

    # ------------------------------------------------------------------ interface of SVI and ELBOModule

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """
        The negative objective, an unbiased estimate that can be differentiated.

        :param model: the model.
        :param guide: the guide.
        :return: a scalar tensor.
        """
        step = self._step(model, guide, args, kwargs)
        decision = self._decide(step)
        terms: SiteTerms | ComponentLoop
        run: TracedRun | DirectRun | ComponentLoop
        if decision.together:
            terms, run = self._together(step, decision.direct)
            likelihood = self._likelihood_term(run.sites, step)
        else:
            run = terms = ComponentLoop(step, self.likelihood, self.kl, self._wants_entropy, _points(guide))
            likelihood = terms.likelihood
        if not decision.used and torch.is_grad_enabled():
            check_used(likelihood, run.values, run.layers, decision.readers)
            decision.used = True
        scale = self.current_kl_scale()
        loss = scale * terms.kl - likelihood - terms.log_prior - self.entropy_weight * terms.entropy
        self._parts = {
            "expected_log_likelihood": _detach(likelihood),
            "kl": _detach(terms.kl),
            "kl_scale": scale,
            "log_prior": _detach(terms.log_prior),
            "entropy": _detach(terms.entropy),
        }
        if torch.is_grad_enabled():
            self.step += 1
        return loss

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """:return: an estimate of the negative objective."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """
        Estimates the negative objective and accumulates its gradients.

        :return: the estimate.
        """
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return float(loss.detach())

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        run = TracedRun(self._step(model, guide, args, kwargs))
        run.draw()
        run.run()
        return run.traces()

    # ------------------------------------------------------------------ set-up

    def _step(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Step:
        """What this evaluation is about; sets up guides that no call has initialised."""
        mixtures = list(_mixtures(guide))
        K = _common_num_components(mixtures)
        _set_up(guide, args, kwargs)
        for mixture in mixtures:
            for name in PLATES & mixture.plate_names:
                raise ValueError(
                    f"the model has a plate named {name!r}, the name of a plate that Mixture_ELBO adds: rename it."
                )
        nesting = self._plate_nesting(model, guide, args, kwargs)
        split = self.batch == "split"
        return Step(model, guide, mixtures, K, self.num_particles, nesting, split, args, kwargs)

    def _plate_nesting(self, model: Any, guide: Any, args: Any, kwargs: Any) -> int:
        if self.max_plate_nesting != float("inf"):
            return int(self.max_plate_nesting)
        if model not in self._nestings:
            # this runs the model, which must not shift the random numbers of a run that was resumed
            with rehearsal(model):
                guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
                trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
            sites = {**sample_sites(guide_trace), **sample_sites(trace)}.values()
            frames = [frame for site in sites for frame in site["cond_indep_stack"]]
            self._nestings[model] = max((-frame.dim for frame in frames if frame.vectorized), default=0)
        return self._nestings[model]

    def _decide(self, step: Step) -> Decision:
        """
        Whether all components go through the model in one run. The first evaluation on data of a structure finds out
        whether that gives each of them what a run of its own gives, along the path that later evaluations take.
        """
        direct = self._is_direct(step.guide, step.mixtures)
        found = self._decisions.setdefault(step.model, {})
        key = weakref.ref(step.guide), direct, coincidences((step.K, step.S, step.args, step.kwargs))
        known = found.get(key)
        if known is None or (known.together and not step.is_single and self.step >= known.until):
            alone, readers = check_alone(step)
            if direct:
                self._find_priors(step)
            reason = "" if step.is_single else difference(step, self._joint_run(step, direct), alone, readers)
            if reason:
                self._say(step, reason)
            until = AGAIN * max(self.step, 1)
            found[key] = Decision(not reason, direct, readers, known is not None and known.used, until)
        return found[key]

    def _say(self, step: Step, reason: str) -> None:
        """Tells once per model why its components run one by one."""
        if step.split:
            raise ValueError(
                f"batch='split' needs a network that keeps its examples apart, in the rows of its batch, but {reason}. Use "
                "batch='repeat'."
            )
        if step.model not in self._told:
            self._told.add(step.model)
            warnings.warn(
                f"the components of the mixture run through the model one by one, {step.K * step.S} runs per step, which is "
                f"exact; one run of all would not be: {reason}",
                ComponentLoopWarning,
                stacklevel=4,
            )

    # ------------------------------------------------------------------ all components in one run

    def _is_direct(self, guide: Any, mixtures: list[AutoMixture]) -> bool:
        """
        Whether the draw can be taken from the guide's distributions without calling it: nobody listens to its
        statements.
        """
        return not am_i_wrapped() and mixtures == [guide] and self.batch == "repeat" and guide.is_factorized()

    def _is_joint(self, guide: Any, mixtures: list[AutoMixture]) -> bool:
        """Whether the terms of constant priors may be evaluated together."""
        plain = self.kl != "exact" and self.entropy_weight == 0.0
        return plain and mixtures == [guide] and guide.is_factorized()

    def _constant_terms(self, step: Step) -> JointTerms | None:
        """The terms of constant priors, if they are still those of the guide and the model."""
        terms = self._joint_terms.get(step.guide) if self._is_joint(step.guide, step.mixtures) else None
        return terms if terms is not None and terms.is_current(step.guide) else None

    def _find_priors(self, step: Step) -> None:
        """Finds the constant priors, so that the first direct run is like all later ones."""
        if self._constant_terms(step) is not None or not self._is_joint(step.guide, step.mixtures):
            return
        run = DirectRun(step, {})
        try:
            with rehearsal(step.model):
                run.draw()
                sites = run.run()
        except FAILURES:  # the comparison finds the same
            return
        self._joint_terms[step.guide] = JointTerms(step.guide, constant_priors(sites, run.layers, PLATES))

    def _joint_run(self, step: Step, direct: bool) -> TracedRun | DirectRun:
        """The run of all components."""
        if not direct:
            return TracedRun(step)
        terms = self._constant_terms(step)
        return DirectRun(step, {} if terms is None else terms.priors)

    def _together(self, step: Step, direct: bool) -> tuple[SiteTerms, TracedRun | DirectRun]:
        """
        Draws all components and runs the model. The divergences of sites with constant priors that layers of this package
        read are evaluated together, those of all others one by one.
        """
        cached = self._constant_terms(step)
        run = self._joint_run(step, direct)
        run.draw()
        sites = run.run()
        check_latents(sites, run.values)
        terms = SiteTerms(
            self.kl, self._wants_entropy, step.S, step.mixtures, step.K, step.nesting, _points(step.guide)
        )
        done: set[str] = set()
        if cached is not None and direct and run.silent.taken == cached.priors.keys():
            terms.add(*cached.evaluate(step.guide))
            done = run.silent.taken
        else:
            run.restore()
            if self._is_joint(step.guide, step.mixtures):
                done = self._add_joint(step.guide, terms, constant_priors(sites, run.layers, PLATES))
        terms.collect(sites, run.guide_sites(done))
        return terms, run

    def _add_joint(self, guide: AutoMixture, terms: "SiteTerms", priors: dict[str, Any]) -> set[str]:
        """Adds the terms of the sites with constant priors and returns their names."""
        joint = self._joint_terms.get(guide)
        if (
            joint is None
            or not joint.is_current(guide)
            or any(priors.get(n) is not p for n, p in joint.priors.items())
        ):
            joint = self._joint_terms[guide] = JointTerms(guide, priors)
        terms.add(*joint.evaluate(guide))
        return set(joint.priors)

    # ------------------------------------------------------------------ terms

    @property
    def _wants_entropy(self) -> bool:
        return self.entropy_weight != 0.0

    def _likelihood_term(self, model_sites: dict[str, Site], step: Step) -> Any:
        K, nesting = step.K, step.nesting
        total: Any = 0.0
        pointwise: dict[Any, tuple[Any, Tensor]] = {}
        for name, site in model_sites.items():
            if not site["is_observed"] or is_deterministic(site):
                continue
            log_prob = log_prob_of(site)
            check_broadcast(name, log_prob.shape, nesting + 1 + (self.num_particles > 1), "components")
            if self.likelihood == "average" or K == 1:  # with one component they are the same
                log_prob = scale_and_mask(log_prob, site["scale"], site["mask"])
                total = total + per_component(log_prob, self.num_particles, K, nesting).mean()
                continue
            if log_prob.dim() < nesting + 1:
                raise ValueError(OUTSIDE.format(name=name))
            key, log_prob = example_key(log_prob, site)
            before = pointwise.get(key)
            pointwise[key] = site["scale"], log_prob if before is None else before[1] + log_prob
        for scale, log_prob in pointwise.values():
            mixed = log_prob.logsumexp(-nesting - 1) - math.log(K)
            total = total + (scale * mixed).sum() / self.num_particles
        return total


def default_elbo(guide: Any) -> Any:
    """
    The bound that suits a guide.

    :param guide: a guide.
    :return: :class:`Mixture_ELBO` if it holds a mixture, else :class:`~pyro.infer.Trace_ELBO`.
    """
    return Mixture_ELBO() if any(True for _ in _mixtures(guide)) else Trace_ELBO()


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _mixtures(guide: Any) -> Iterator[AutoMixture]:
    if isinstance(guide, torch.nn.Module):
        yield from (module for module in guide.modules() if isinstance(module, AutoMixture))


def _set_up(guide: Any, args: Any, kwargs: Any) -> None:
    """Lets every guide that has not seen the model see it, lists before their parts."""
    for module in guide.modules() if isinstance(guide, torch.nn.Module) else ():
        if isinstance(module, (AutoMixture, AutoGuideList)) and module.prototype_trace is None:
            module._setup_prototype(*args, **kwargs)


def _points(guide: Any) -> set[str]:
    """The sites of Pyro's point estimates in a guide."""
    deltas = (
        [m for m in guide.modules() if isinstance(m, AutoDelta)] if isinstance(guide, torch.nn.Module) else []
    )
    traces = [delta.prototype_trace for delta in deltas if delta.prototype_trace is not None]
    return {name for trace in traces for name, _ in trace.iter_stochastic_nodes()}


def _common_num_components(mixtures: list[AutoMixture]) -> int:
    found = [mixture.num_components for mixture in mixtures]
    if len(found) > 1 and max(found) > 1:
        raise ValueError(
            f"the guide holds mixtures of {found} components, which could not share their index outside of the bound: "
            "use one AutoMixture, whose arguments component= and rest= give every site its family, and other guides "
            "beside it."
        )
    return max(found, default=1)
