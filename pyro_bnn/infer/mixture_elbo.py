# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Evidence lower bounds of mixture guides, with all components in one vectorised pass."""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.infer.elbo import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.runtime import am_i_wrapped
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, get_rng_state, set_rng_state
from torch import Tensor

from pyro_bnn.infer.autoguide.mixture import AutoMixture
from pyro_bnn.infer.handlers import CollectMessenger, Site, check_broadcast, sample_sites
from pyro_bnn.infer.joint_terms import JointTerms, constant_priors
from pyro_bnn.infer.mixture_terms import SiteTerms, per_component
from pyro_bnn.infer.options import require_number
from pyro_bnn.nn.folding import split_batch
from pyro_bnn.nn.priors import unwrap
from pyro_bnn.nn.sites import SITE_KEY, silent_sites

_Elbo: Any = ELBO

COMPONENT_PLATE = "_components"
PARTICLE_PLATE = "_mixture_particles"
PLATES = {COMPONENT_PLATE, PARTICLE_PLATE}


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

    :ivar int step: the number of evaluations with gradients so far; set it to resume a schedule.

    **References**

    [1] Dusenberry et al., *Efficient and Scalable Bayesian Neural Nets with Rank-1 Factors*, ICML 2020, section 3.

    [2] Trinh et al., *Tackling covariate shift with node-based Bayesian neural networks*, ICML 2022.

    Example::

        >>> import pyro.distributions as dist
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
        mixtures = list(_mixtures(guide))
        K = _common_num_components(mixtures)
        for mixture in mixtures:
            if mixture.prototype_trace is None:
                mixture._setup_prototype(*args, **kwargs)
            for name in PLATES & mixture.plate_names:
                raise ValueError(
                    f"the model has a plate named {name!r}, the name of a plate that Mixture_ELBO adds: rename it."
                )
        nesting = self._plate_nesting(model, guide, args, kwargs)
        want_entropy = self.entropy_weight != 0.0
        terms = SiteTerms(self.kl, want_entropy, self.num_particles, mixtures, K, nesting, _points(guide))
        if self._is_direct(guide, mixtures):
            model_sites = self._direct_sites(model, guide, terms, nesting, args, kwargs)
        else:
            with silent_sites({}, {}) as silent:
                model_trace, guide_trace = self._component_traces(
                    model, guide, mixtures, K, nesting, args, kwargs
                )
            model_sites, guide_sites = sample_sites(model_trace), sample_sites(guide_trace)
            joint = set()
            if self._is_joint(guide, mixtures):
                joint = self._add_joint(guide, terms, constant_priors(model_sites, silent.seen, PLATES))
            terms.collect(model_sites, {n: s for n, s in guide_sites.items() if n not in joint})
        likelihood = self._likelihood_term(model_sites, K, nesting)
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
        mixtures = list(_mixtures(guide))
        nesting = self._plate_nesting(model, guide, args, kwargs)
        return self._component_traces(
            model, guide, mixtures, _common_num_components(mixtures), nesting, args, kwargs
        )

    # ------------------------------------------------------------------ traces

    def _plate_nesting(self, model: Any, guide: Any, args: Any, kwargs: Any) -> int:
        if self.max_plate_nesting != float("inf"):
            return int(self.max_plate_nesting)
        if model not in self._nestings:
            # the guess runs the model, which must not shift the random numbers of a run that was resumed
            state = get_rng_state()
            with torch.no_grad():
                self._guess_max_plate_nesting(model, guide, args, kwargs)
            set_rng_state(state)
            self._nestings[model] = int(self.max_plate_nesting)
            self.max_plate_nesting = float("inf")
        return self._nestings[model]

    def _component_traces(
        self,
        model: Any,
        guide: Any,
        mixtures: list[AutoMixture],
        K: int,
        nesting: int,
        args: Any,
        kwargs: Any,
    ) -> tuple[Any, Any]:
        dim = -nesting - 1
        with ExitStack() as stack:
            single = self._is_single(mixtures)
            for mixture in mixtures:
                stack.enter_context(mixture.stratified(None if single else dim, self.num_particles))
            if not single:
                if self.batch == "split":
                    stack.enter_context(split_batch())
                guide, model = self._in_plates(guide, K, dim), self._in_plates(model, K, dim)
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, nesting + 1 + (self.num_particles > 1))
        guide_trace = prune_subsample_sites(guide_trace)
        if self.batch == "split":
            _check_split(model_trace, guide_trace)
        model_trace = prune_subsample_sites(model_trace)
        _check_latents(sample_sites(model_trace), sample_sites(guide_trace))
        return model_trace, guide_trace

    def _is_single(self, mixtures: list[AutoMixture]) -> bool:
        """Whether one draw of the guide is all: then model and guide run without plates of components."""
        return self.num_particles == 1 and self.batch == "repeat" and all(m.is_single for m in mixtures)

    def _is_direct(self, guide: Any, mixtures: list[AutoMixture]) -> bool:
        """
        Whether the draw can be taken from the guide's distributions without calling it: nobody listens to its
        statements, which after the first step (with Pyro's validation) nobody needs to check either.
        """
        quiet = not am_i_wrapped() and not is_validation_enabled()
        return quiet and mixtures == [guide] and self.batch == "repeat" and guide.is_factorized()

    def _direct_sites(
        self, model: Any, guide: AutoMixture, terms: "SiteTerms", nesting: int, args: Any, kwargs: Any
    ) -> dict[str, Site]:
        """
        The sample sites of the model under a draw of a guide of independent sites. Their divergences go to ``terms``:
        together for the sites with constant priors that layers of this package read, one by one for all others.
        """
        layout = None if self._is_single([guide]) else nesting
        lead = (self.num_particles,) if self.num_particles > 1 else ()
        cached = self._joint_terms.get(guide) if self._is_joint(guide, [guide]) else None
        priors = cached.priors if cached is not None and cached.is_current(guide) else {}
        values = guide.draw(layout, self.num_particles, args, kwargs)
        blocks = {site.name: (site, loc, scale) for site, loc, scale in guide._blocks()}
        for name, (site, loc, scale) in blocks.items():
            if scale is None:
                value = unwrap(guide.site_distribution(site, loc, None, layout)).v
                values[name] = value.expand(*lead, *value.shape) if lead else value
        points = {site.name: (site, fn) for site, fn in guide.point_distributions()}
        values |= {name: fn.v for name, (_, fn) in points.items()}
        with CollectMessenger(values) as collected, silent_sites(values, priors) as silent:
            model(*args, **kwargs)
        model_sites = collected.sites
        _check_latents(model_sites, values)
        if cached is not None and priors and silent.taken == priors.keys():
            terms.add(*cached.evaluate(guide))
            done = silent.taken
        else:
            for name in silent.taken:
                model_sites[name] = _site(priors[name], values[name], {})
            done = set()
            if self._is_joint(guide, [guide]):
                done = self._add_joint(guide, terms, constant_priors(model_sites, silent.seen, PLATES))
        guide_sites = {}
        for name in (n for n in (*points, *blocks) if n not in done):  # the order of the guide
            if name in points:
                site, fn = points[name]
            else:
                site, loc, scale = blocks[name]
                fn = guide.site_distribution(site, loc, scale, layout)
                fn = fn.expand(torch.Size((*lead, *fn.batch_shape))) if lead else fn
            guide_sites[name] = _site(fn, values[name], {"kind": site.kind, "role": site.role})
        terms.collect(model_sites, guide_sites)
        return model_sites

    def _is_joint(self, guide: Any, mixtures: list[AutoMixture]) -> bool:
        """Whether the terms of constant priors may be evaluated together."""
        plain = self.kl != "exact" and self.entropy_weight == 0.0
        return plain and mixtures == [guide] and guide.is_factorized()

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

    def _in_plates(self, fn: Any, K: int, dim: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                if self.num_particles > 1:
                    stack.enter_context(pyro.plate(PARTICLE_PLATE, self.num_particles, dim=dim - 1))
                stack.enter_context(pyro.plate(COMPONENT_PLATE, K, dim=dim))
                return fn(*args, **kwargs)

        return run

    # ------------------------------------------------------------------ terms

    def _likelihood_term(self, model_sites: dict[str, Site], K: int, nesting: int) -> Any:
        total: Any = 0.0
        pointwise: dict[Any, Tensor] = {}
        for name, site in model_sites.items():
            if not site["is_observed"]:
                continue
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            check_broadcast(name, log_prob.shape, nesting + 1 + (self.num_particles > 1), "components")
            if self.likelihood == "average" or K == 1:  # with one component they are the same
                log_prob = scale_and_mask(log_prob, site["scale"], site["mask"])
                total = total + per_component(log_prob, self.num_particles, K, nesting).mean()
                continue
            log_prob = scale_and_mask(log_prob, 1.0, site["mask"])
            if log_prob.dim() < nesting + 1:
                raise ValueError(
                    f"observed site {name!r} has no component dimension: the log-mixture likelihood needs it inside "
                    "the data plate."
                )
            # sites that share their plates describe the same examples, so they share the component too
            key = (
                tuple(log_prob.shape),
                site["scale"] if not isinstance(site["scale"], Tensor) else id(site["scale"]),
            )
            pointwise[key] = pointwise[key] + log_prob if key in pointwise else log_prob
        for (_, scale), log_prob in pointwise.items():
            mixed = log_prob.logsumexp(-nesting - 1) - math.log(K)
            total = total + scale * mixed.sum() / self.num_particles
        return total


def _site(fn: Any, value: Tensor, hint: dict[str, Any]) -> Site:
    """A node as a trace would have it."""
    return {"fn": fn, "value": value, "infer": {SITE_KEY: hint}, "args": (), "kwargs": {}, "scale": 1.0, "mask": None,
            "is_observed": False, "cond_indep_stack": ()}  # fmt: skip


def _check_latents(model_sites: dict[str, Site], guide_sites: dict[str, Any]) -> None:
    for name, site in model_sites.items():
        if not site["is_observed"] and name not in guide_sites:
            raise ValueError(
                f"site {name!r} of the model is missing from the guide: if it is an observation, pass its data; "
                "if it is latent, add a guide for it."
            )


def default_elbo(guide: Any) -> Any:
    """
    The bound that suits a guide.

    :param guide: a guide.
    :return: :class:`Mixture_ELBO` if it holds a mixture, else :class:`~pyro.infer.Trace_ELBO`.
    """
    return Mixture_ELBO() if any(True for _ in _mixtures(guide)) else Trace_ELBO()


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _check_split(model_trace: Any, guide_trace: Any) -> None:
    """Examples meet their component inside the network only, so nothing else may differ between components."""
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample" and name in model_trace and SITE_KEY in site["infer"]:
            hint = site["infer"][SITE_KEY]
            if hint["role"] is None and hint["kind"] != "point":
                raise ValueError(
                    f"site {name!r} lies outside the converted network and differs between components, which "
                    "batch='split' cannot match with the examples: give it the family 'point', e.g. "
                    f"component={{{name!r}: 'point'}}."
                )


def _mixtures(guide: Any) -> Iterator[AutoMixture]:
    if isinstance(guide, torch.nn.Module):
        yield from (module for module in guide.modules() if isinstance(module, AutoMixture))


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
