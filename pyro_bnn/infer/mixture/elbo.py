# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Evidence lower bounds of mixture guides, with all components in one vectorised pass."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList
from pyro.infer.elbo import ELBO
from pyro.poutine.runtime import am_i_wrapped
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_bnn.infer.autoguide.mixture import AutoMixture
from pyro_bnn.infer.mixture.check import (
    ComponentLoopWarning,
    check_alone,
    check_latents,
    check_used,
    difference,
    require_function,
)
from pyro_bnn.infer.mixture.constant_priors import ConstantPriors, plain_layers
from pyro_bnn.infer.mixture.loop import ComponentLoop
from pyro_bnn.infer.mixture.runs import PLATES, JointRun, Step, rehearsal, subsamples
from pyro_bnn.infer.mixture.terms import Terms
from pyro_bnn.model.data import coincidences
from pyro_bnn.model.handlers import sample_sites
from pyro_bnn.ops.notice import logger, warn_user
from pyro_bnn.ops.options import require_choice, require_number

_Elbo: Any = ELBO

#: How many times as many steps pass until the joint run is compared with single ones again.
AGAIN = 16


@dataclass
class Decision:
    """
    How the components of a guide run through a model on data of one structure.

    :ivar together: whether in one run.
    :ivar constant: the priors whose terms are evaluated together.
    :ivar readers: by layer, who reads its parameters in its place.
    :ivar used: whether an evaluation with gradients has shown what the likelihood depends on.
    :ivar until: the step from which it is to be found out again: gates that open later show what was hidden.
    """

    together: bool
    constant: ConstantPriors | None
    readers: dict[str, str]
    used: bool = False
    until: int = 0


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
    :param bool antithetic: whether draws come in pairs :math:`\mu \pm \sigma \epsilon` (before a bijection to the
        support), for an even number of them. The expectation stays; what is odd in the noise cancels, which takes most of
        the variance from the gradients of locations and of shared weights.
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
        antithetic: bool = False,
        batch: str = "repeat",
        entropy_weight: float = 0.0,
        max_plate_nesting: int | None = None,
    ) -> None:
        require_choice("likelihood", likelihood, "average", "log_mixture")
        require_choice("kl", kl, "mean", "sum", "exact")
        require_choice("batch", batch, "repeat", "split")
        if not isinstance(num_particles, int) or num_particles < 1:
            raise ValueError(f"num_particles must be an integer of at least 1, found {num_particles!r}.")
        if antithetic and num_particles % 2:
            raise ValueError(
                f"antithetic draws come in pairs: num_particles must be even, found {num_particles}."
            )
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=float("inf") if max_plate_nesting is None else max_plate_nesting,
        )
        self.max_plate_nesting: float
        if batch == "split" and likelihood != "average":
            raise ValueError(
                "batch='split' shows an example to one component only: it needs likelihood='average'."
            )
        self.antithetic = antithetic
        self.batch = batch
        self.likelihood = likelihood
        self.kl = kl
        if not callable(kl_scale):
            require_number("kl_scale", kl_scale, least=0)
        require_number("entropy_weight", entropy_weight, least=0)
        self.kl_scale = kl_scale
        self.entropy_weight = float(entropy_weight)
        self.step = self._last = 0
        self._parts: dict[str, Any] = {}
        self._nestings: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._decisions: weakref.WeakKeyDictionary[Any, dict[Any, Decision]] = weakref.WeakKeyDictionary()
        self._told: weakref.WeakSet[Any] = weakref.WeakSet()

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
        terms: Terms
        run: JointRun | ComponentLoop
        if decision.together:
            terms, run = self._together(step, decision)
        else:
            terms = run = ComponentLoop(step)
        if not decision.used and torch.is_grad_enabled():
            check_used(terms.likelihood, run.values, run.layers, decision.readers)
            decision.used = True
        scale = self.current_kl_scale()
        loss = scale * terms.kl - terms.likelihood - terms.log_prior - self.entropy_weight * terms.entropy
        self._parts = {
            "expected_log_likelihood": _detach(terms.likelihood),
            "kl": _detach(terms.kl),
            "kl_scale": scale,
            "log_prior": _detach(terms.log_prior),
            "entropy": _detach(terms.entropy),
        }
        if torch.is_grad_enabled():
            self._last = self.step
            self.step += 1
        return loss

    @contextmanager
    def again(self) -> Iterator[None]:
        """
        Evaluations in this block are at the place of the last one in every schedule, and leave the count of steps and the
        parts as they are.
        """
        step, parts, last = self.step, self._parts, self._last
        self.step = last
        try:
            yield
        finally:
            self.step, self._parts, self._last = step, parts, last

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
        step = self._step(model, guide, args, kwargs)
        guide_trace = step.guide_trace()
        values = {name: site["value"] for name, site in sample_sites(guide_trace).items()}
        model_trace = step.model_trace(values | subsamples(guide_trace), together=True)
        return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)

    # ------------------------------------------------------------------ set-up

    def _step(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Step:
        """What this evaluation is about; sets up guides that no call has initialised."""
        modules = list(guide.modules()) if isinstance(guide, torch.nn.Module) else []
        mixtures = [module for module in modules if isinstance(module, AutoMixture)]
        K = _common_num_components(mixtures)
        for module in modules:  # lists before their parts
            if isinstance(module, (AutoMixture, AutoGuideList)) and module.prototype_trace is None:
                module._setup_prototype(*args, **kwargs)
        for mixture in mixtures:
            for name in PLATES & mixture.plate_names:
                raise ValueError(
                    f"the model has a plate named {name!r}, the name of a plate that Mixture_ELBO adds: rename it."
                )
        nesting = self._plate_nesting(model, guide, args, kwargs)
        prototypes = [module.prototype_trace for module in modules if isinstance(module, AutoDelta)]
        points = {name for trace in prototypes if trace for name, _ in trace.iter_stochastic_nodes()}
        return Step(
            model, guide, args, kwargs, mixtures, points, K, self.num_particles, nesting, self.likelihood, self.kl,
            self.entropy_weight != 0.0, self.batch == "split", self._is_direct(guide, mixtures), self.antithetic,
        )  # fmt: skip

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
        found = self._decisions.setdefault(step.model, {})
        key = weakref.ref(step.guide), step.direct, coincidences((step.K, step.S, step.args, step.kwargs))
        known = found.get(key)
        if known is None or (known.together and not step.is_single and self.step >= known.until):
            alone, priors, readers = check_alone(step)
            constant = self._constant_priors(step, priors)
            run = JointRun(step)
            reason = "" if step.is_single else difference(step, run, alone, readers)
            if reason:
                require_function(step, alone)
                self._say(step, reason)
            elif not step.is_single:
                logger.info(
                    "Mixture_ELBO: components run through the model together; compared with runs of their own"
                )
            until = AGAIN * max(self.step, 1)
            found[key] = Decision(not reason, constant, readers, known is not None and known.used, until)
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
            warn_user(
                f"the components of the mixture run through the model one by one, {step.K * step.S} runs per step, which is "
                f"exact; one run of all would not be: {reason}",
                ComponentLoopWarning,
            )

    # ------------------------------------------------------------------ all components in one run

    def _is_direct(self, guide: Any, mixtures: list[AutoMixture]) -> bool:
        """
        Whether the draw can be taken from the guide's distributions without calling it: nobody listens to its
        statements.
        """
        return not am_i_wrapped() and mixtures == [guide] and self.batch == "repeat" and guide.is_factorized()

    def _constant_priors(self, step: Step, priors: Mapping[str, Any]) -> ConstantPriors | None:
        """Those of the given priors whose terms may be evaluated together."""
        plain = self.kl != "exact" and self.entropy_weight == 0.0
        joint = plain and step.mixtures == [step.guide] and step.guide.is_factorized()
        return ConstantPriors(step.guide, priors) if joint else None

    def _together(self, step: Step, decision: Decision) -> tuple[Terms, JointRun]:
        """
        Draws all components and runs the model. The divergences of sites with constant priors that layers of this package
        read are evaluated together, those of all others one by one.
        """
        constant = decision.constant
        run = JointRun(step)
        run.draw()
        sites = run.run()
        check_latents(sites, run.values)
        terms = Terms(step)
        terms.observe(sites)
        if constant is None:
            terms.collect(sites, run.guide_sites())
            return terms, run
        priors = plain_layers(sites)
        if not constant.is_current(step.guide, priors):
            constant = decision.constant = ConstantPriors(step.guide, priors)
        terms.add(*constant.evaluate(step.guide, run.values))
        terms.collect(sites, run.guide_sites(without=constant.priors))
        return terms, run


def default_elbo(guide: Any) -> Any:
    """
    The bound that suits a guide.

    :param guide: a guide.
    :return: :class:`Mixture_ELBO` if it holds a mixture, else :class:`~pyro.infer.Trace_ELBO`.
    """
    modules = guide.modules() if isinstance(guide, torch.nn.Module) else ()
    return Mixture_ELBO() if any(isinstance(module, AutoMixture) for module in modules) else Trace_ELBO()


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _common_num_components(mixtures: list[AutoMixture]) -> int:
    found = [mixture.num_components for mixture in mixtures]
    if len(found) > 1 and max(found) > 1:
        raise ValueError(
            f"the guide holds mixtures of {found} components, which could not share their index outside of the bound: "
            "use one AutoMixture, whose arguments component= and rest= give every site its family, and other guides "
            "beside it."
        )
    return max(found, default=1)
