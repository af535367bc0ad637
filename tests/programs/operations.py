# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Operations on programs. Each yields pairs of what the package says and what the reference says, or raises what the
package raises. ``applies`` is the rule by which a cell is absent.
"""

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_bnn.diagnostics import evaluate, log_weights, to_datatree
from pyro_bnn.infer import (
    Mixture_ELBO,
    fit,
    load_guide,
    posterior_predictive,
    predictive_moments,
    save_guide,
)
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoMixture
from tests.programs import dense
from tests.programs.dense import Space, Undefined
from tests.programs.program import Case, Program

Pairs = Iterator[tuple[str, Any, Any]]
Rule = Callable[["Facts"], bool]


class Facts:
    """What references know of a program, computed once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.case = program.make()
        self.held: dict[str, Any] = {}
        self.space = Space(self.case)
        self.trace = dense.prototype(self.case)

    @property
    def sites(self) -> dict[str, Any]:
        return {n: self.trace.nodes[n] for n in self.space.observed}

    @property
    def is_real(self) -> bool:
        return all(s["fn"].support.is_discrete is False for s in self.space.sites.values()) and all(
            isinstance(t, td.transforms.IndependentTransform)
            or t is td.transforms.identity_transform
            or t == td.transforms.identity_transform
            for t in self.space.transforms.values()
        )

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.held:
            try:
                with self.case.evaluation():
                    self.held[name] = make()
            except Exception as error:
                self.held[name] = error
        found = self.held[name]
        if isinstance(found, Exception):
            raise found
        return found

    # ------------------------------------------------------------ points

    @property
    def start(self) -> Tensor:
        return self.get("start", lambda: self.space.start(self.case.spread))

    @property
    def mode(self) -> Tensor:
        return self.get("mode", lambda: dense.newton(self.case, self.space))

    def curvature(self, kind: str) -> Tensor:
        """The precision of the definition: at the start for Fisher matrices, at the mode for Hessians."""
        c, s = self.case, self.space
        if kind == "hessian":
            return self.get("hessian", lambda: dense.hessian(lambda v: dense.negative_joint(c, s, v), self.mode))
        prior = self.get("prior", lambda: dense.hessian(lambda v: -dense.log_prior(c, s, v), self.start))
        likelihood = {"ggn": dense.ggn, "empirical_fisher": dense.empirical}[kind]
        return prior + self.get(kind, lambda: likelihood(c, s, self.start))

    def point(self, kind: str) -> Tensor:
        return self.mode if kind == "hessian" else self.start

    def draws(self, size: int = 3) -> dict[str, Tensor]:
        """Values of the latents under several draws."""
        generator = torch.Generator().manual_seed(8)
        rows = self.case.spread * torch.randn(size, self.space.dim, generator=generator, dtype=torch.float64)
        if not self.space.dim:
            return {}
        like = next(iter(self.space.sites.values()))["value"]
        values = [self.space.values(row.to(like.dtype)) for row in rows]
        return {n: torch.stack([v[n] for v in values]).detach() for n in values[0]}

    def traces(self, args: str = "data") -> list[Any]:
        """The model at each of these draws."""

        def make() -> list[Any]:
            found = []
            for values in dense.components(self.case, self.draws()):
                trace = dense.trace_at(self.case, values, self.case.data if args == "data" else self.case.inputs)
                trace.compute_log_prob()
                found.append(trace)
            return found

        return self.get(f"traces {args}", make)

    def outputs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By site the parameters that a linearised prediction moves and their Jacobian, at the start."""
        return self.get("outputs", lambda: self._outputs(self.start))

    def _outputs(self, u: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        u = u.detach().clone().requires_grad_(True)
        trace = dense.trace_at(self.case, self.space.values(u))
        found = {}
        for name in self.space.observed:
            fn, _ = dense.plain(trace.nodes[name]["fn"], torch.ones(()))
            phi = fn.loc if isinstance(fn, td.Normal) else fn.logits
            found[name] = phi.detach(), dense.jacobian(phi, u).reshape(*phi.shape, -1)
        return found

    @property
    def is_simple(self) -> bool:
        """Whether each observation is Normal with a fixed scale, a coin or a label: one obvious linear predictor."""
        for site in self.sites.values():
            fn, _ = dense.plain(site["fn"], torch.ones(()))
            if not isinstance(fn, (td.Normal, td.Bernoulli, td.Categorical)) or isinstance(fn, dist.OrderedLogistic):
                return False
        return bool(self.sites) and self.get("simple", self._fixed_scales)

    def _fixed_scales(self) -> bool:
        u = self.space.start(0.1).requires_grad_(True)
        trace = dense.trace_at(self.case, self.space.values(u))
        for name in self.space.observed:
            fn, _ = dense.plain(trace.nodes[name]["fn"], torch.ones(()))
            if isinstance(fn, td.Normal) and fn.scale.requires_grad:
                return False
        return True


@dataclass
class Operation:
    name: str
    run: Callable[[Facts], Pairs]
    applies: Rule
    rule: str


OPERATIONS: dict[str, Operation] = {}


def operation(name: str, rule: str, applies: Rule) -> Callable[[Callable[[Facts], Pairs]], Callable[[Facts], Pairs]]:
    def register(run: Callable[[Facts], Pairs]) -> Callable[[Facts], Pairs]:
        OPERATIONS[name] = Operation(name, run, applies, rule)
        return run

    return register


def always(facts: Facts) -> bool:
    return True


# ---------------------------------------------------------------- bounds


def mixture(facts: Facts, case: Case, K: int, component: str = "delta", **options: Any) -> tuple[Any, list[dict[str, Tensor]]]:
    """A guide of point masses or narrow components at places that differ, and these places."""
    guide = AutoMixture(case.model, K, component, rest=component, **options).initialize(*case.data)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in guide.named_parameters():
            if "scale" not in name:
                p += case.spread * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    return guide, places(guide, K)


def places(guide: Any, K: int) -> list[dict[str, Tensor]]:
    found = guide.sample_posterior((K, 1), by_component=True)
    return [{n: v[k, 0] for n, v in found.items()} for k in range(K)]


def bound(K: int, facts: Facts) -> Pairs:
    case = facts.program.make()
    guide, values = mixture(facts, case, K)
    expected = -sum(float(dense.joint(case, v)) for v in values) / K
    elbo = Mixture_ELBO()
    with pyro.validation_enabled(True):
        yield "first step", float(elbo.differentiable_loss(case.model, guide, *case.data)), expected
    with pyro.validation_enabled(False):
        for step in (2, 3):
            yield f"step {step}", float(elbo.differentiable_loss(case.model, guide, *case.data)), expected


BOUND = "the model draws nothing beyond its latents"


def is_function(facts: Facts) -> bool:
    return not facts.case.noise


operation("bound, K = 1", BOUND, is_function)(partial(bound, 1))
operation("bound, K = 2", BOUND, is_function)(partial(bound, 2))


def normal_latents(facts: Facts) -> bool:
    priors = [dense.plain(s["fn"], torch.ones(()))[0] for s in facts.space.sites.values()]
    return is_function(facts) and all(isinstance(p, td.Normal) for p in priors) and not facts.case.guide_rows


@operation("bound, Normal components", BOUND + "; all latents have Normal priors, none belongs to a row", normal_latents)
def bound_normal(facts: Facts) -> Pairs:
    case = facts.program.make()
    scale = 1e-10 if case.digits < 1e-6 else 1e-6
    guide, values = mixture(facts, case, 2, "normal", init_scale=scale)
    total = 0.0
    for v in values:
        trace = dense.trace_at(case, v)
        trace.compute_log_prob()
        for name, site in trace.nodes.items():
            if dense.is_latent(site) or name in facts.space.sites:
                prior, weight = dense.plain(site["fn"], torch.ones(()) * torch.as_tensor(site["scale"]))
                mask = 1.0 if site["mask"] is None else torch.as_tensor(site["mask"]).to(torch.float64)
                while isinstance(mask, Tensor) and mask.dim() < prior.loc.dim():
                    mask = mask.unsqueeze(-1)
                q = td.Normal(v[name], torch.as_tensor(scale).to(v[name]))
                total += float((td.kl_divergence(q, td.Normal(prior.loc, prior.scale)) * weight * mask).sum())
            elif site["type"] == "sample" and site["is_observed"]:
                total -= float(site["log_prob_sum"])
    elbo = Mixture_ELBO()
    with pyro.validation_enabled(True):
        yield "first step", float(elbo.differentiable_loss(case.model, guide, *case.data)), total / 2
    with pyro.validation_enabled(False):
        for step in (2, 3):
            yield f"step {step}", float(elbo.differentiable_loss(case.model, guide, *case.data)), total / 2


def one_plate(facts: Facts) -> bool:
    """One observed site whose batch shape is that of one plate."""
    sites = list(facts.sites.values())
    return (
        len(sites) == 1
        and not dense.factors(facts.trace)
        and len(sites[0]["fn"].batch_shape) == 1
        and sum(f.vectorized for f in sites[0]["cond_indep_stack"]) == 1
    )


@operation(
    "log-mixture bound",
    BOUND + "; one observed site in one plate",
    lambda facts: is_function(facts) and one_plate(facts) and not facts.case.guide_rows,
)
def log_mixture(facts: Facts) -> Pairs:
    case = facts.program.make()
    guide, values = mixture(facts, case, 2)
    rows, prior = [], 0.0
    for v in values:
        trace = dense.trace_at(case, v)
        trace.compute_log_prob()
        for name, site in trace.nodes.items():
            if site["type"] != "sample":
                continue
            if name in facts.space.observed:
                scale = site["scale"]
                rows.append(site["unscaled_log_prob"] * (1.0 if site["mask"] is None else site["mask"]))
            else:
                prior += float(torch.as_tensor(site["log_prob_sum"])) / 2
    expected = -float(((torch.stack(rows).logsumexp(0) - math.log(2)) * scale).sum()) - prior
    elbo = Mixture_ELBO("log_mixture", "sum")
    for step, validate in (("first step", True), ("step 2", False)):
        with pyro.validation_enabled(validate):
            yield step, float(elbo.differentiable_loss(case.model, guide, *case.data)), expected


@operation("one step of fit", BOUND, is_function)
def one_step(facts: Facts) -> Pairs:
    case = facts.program.make()
    guide, before = mixture(facts, case, 2)
    lr = 0.01  # the step is linear in it
    expected = []
    for values in before:
        u = torch.cat([facts.space.transforms[n].inv(values[n]).reshape(-1) for n in facts.space.sites])
        u = u.detach().requires_grad_(True)
        value = dense.trace_at(case, facts.space.values(u)).log_prob_sum()
        expected.append(torch.autograd.grad(value, u)[0] / 2)
    optim = partial(torch.optim.SGD, lr=lr)
    fit(case.model, guide, case.data, num_steps=1, optim=optim, progress_bar=False)
    for k, values in enumerate(places(guide, 2)):
        moved = [
            (facts.space.transforms[n].inv(values[n]) - facts.space.transforms[n].inv(before[k][n])).reshape(-1)
            for n in facts.space.sites
        ]
        yield f"component {k}", torch.cat(moved) / lr, expected[k], 1e-7  # type: ignore[misc]


# ---------------------------------------------------------------- Laplace


def approximation(facts: Facts, case: Case, data: Any = None, kind: str = "ggn", **options: Any) -> Any:
    guide = AutoLaplace(case.model, curvature=kind, **options).initialize(*case.data)  # type: ignore[arg-type]
    guide.loc.data = place(facts, guide, facts.point(kind))
    return guide.laplace_approximation(case.data if data is None else data, map_tolerance=math.inf)


def order(facts: Facts, guide: Any) -> Tensor:
    """Positions in the guide's vector, in the order of the reference."""
    slices = guide.packed.space.slices
    parts = [torch.arange(slices[n].start, slices[n].stop) for n in facts.space.sites]
    return torch.cat(parts)


def place(facts: Facts, guide: Any, u: Tensor) -> Tensor:
    found = torch.empty_like(guide.loc)
    found[order(facts, guide)] = u.to(found)
    return found


def covariance(facts: Facts, guide: Any) -> Tensor:
    at = order(facts, guide)
    eye = torch.eye(facts.space.dim, dtype=guide.loc.dtype)
    return guide.posterior.quadratic_form(eye)[at[:, None], at]


def expected_covariance(precision: Tensor) -> Tensor:
    values = torch.linalg.eigvalsh(precision)
    if not values[0] > 1e-14 * values[-1]:
        raise Undefined("the precision is not positive definite")
    return torch.linalg.inv(precision)


def variances(J: Tensor, precision: Tensor) -> Tensor:
    """The diagonal of J P^-1 J', which exists if J does not see the flat directions of P."""
    values, vectors = torch.linalg.eigh(precision.double())
    rows = J.double() @ vectors
    flat = values <= 1e-13 * values[-1]
    if bool((rows[..., flat].abs() > 1e-7 * (1e-9 + rows.abs().max())).any()):
        raise Undefined("the precision is not positive definite")
    return (rows[..., ~flat].square() / values[~flat]).sum(-1)


def masked_precision(facts: Facts, kind: str, structure: str) -> Tensor:
    P = facts.curvature(kind)
    if structure == "diagonal":
        return torch.diag(P.diagonal())
    if structure == "block":
        kept = torch.zeros_like(P)
        for at in facts.space.places().values():
            kept[at[:, None], at] = P[at[:, None], at]
        return kept
    return P


def laplace(structure: str, kind: str, facts: Facts) -> Pairs:
    case = facts.program.make()
    extra = {"rank": facts.space.dim} if structure == "low_rank" else {}
    guide = approximation(facts, case, kind=kind, structure=structure, **extra)
    expected = expected_covariance(masked_precision(facts, kind, structure))
    yield "covariance", covariance(facts, guide), expected, factor(facts, kind)  # type: ignore[misc]


def factor(facts: Facts, kind: str) -> float:
    """The digits that an ill-conditioned precision leaves."""
    P = facts.curvature(kind).double()
    values = torch.linalg.eigvalsh(P)
    condition = float(values[-1] / values[0].clamp(min=1e-300))
    precise = 1e-16 if facts.case.digits < 1e-6 else 1e-7
    return max(facts.case.digits, 30 * precise * condition)


def few(facts: Facts) -> bool:
    return 0 < facts.space.dim <= 60


def uncoupled(facts: Facts) -> bool:
    if not few(facts):
        return False
    c, s = facts.case, facts.space
    try:
        prior = facts.get("prior", lambda: dense.hessian(lambda v: -dense.log_prior(c, s, v), facts.start))
    except Exception:
        return True
    off = prior - torch.diag(prior.diagonal())
    return not bool(off.abs().max() > 1e-12) and bool((prior.diagonal() > 0).all())


HESSIAN = "at most 60 latents; the reference takes seconds at most"


def has_hessian(facts: Facts) -> bool:
    return few(facts) and facts.case.hessian


for _structure in ("full", "block", "diagonal"):
    operation(f"Laplace, {_structure}, ggn", "at most 60 latents", few)(partial(laplace, _structure, "ggn"))
for _structure in ("low_rank", "function_space"):
    operation(
        f"Laplace, {_structure.replace('_', ' ')}, ggn",
        "at most 60 latents, whose priors are not coupled",
        uncoupled,
    )(partial(laplace, _structure, "ggn"))
for _structure in ("full", "diagonal"):
    operation(f"Laplace, {_structure}, hessian", HESSIAN, has_hessian)(partial(laplace, _structure, "hessian"))
operation(
    "Laplace, full, empirical Fisher",
    "one observed site in one plate",
    lambda facts: few(facts) and one_plate(facts),
)(partial(laplace, "full", "empirical_fisher"))


@operation("Laplace, last site", "at least two latent sites", lambda facts: few(facts) and len(facts.space.sites) > 1)
def subset(facts: Facts) -> Pairs:
    case = facts.program.make()
    name = list(facts.space.sites)[-1]
    guide = approximation(facts, case, sites=[name])
    at = facts.space.places()[name]
    expected = torch.zeros(facts.space.dim, facts.space.dim)
    P = facts.curvature("ggn")
    expected[at[:, None], at] = expected_covariance(P[at[:, None], at])
    yield "covariance", covariance(facts, guide), expected, factor(facts, "ggn")  # type: ignore[misc]


@operation("Laplace, kronecker, ggn", "linear layers that one call uses", lambda facts: bool(facts.case.kron))
def kronecker(facts: Facts) -> Pairs:
    case = facts.program.make()
    guide = approximation(facts, case, structure="kronecker")
    expected = facts.get("kronecker", lambda: kronecker_factors(facts))
    yield "covariance", covariance(facts, guide), expected_covariance(expected), factor(facts, "ggn")  # type: ignore[misc]


def kronecker_factors(facts: Facts) -> Tensor:
    """Products of second moments of inputs and of output gradients, seen by hooks."""
    case, space, u = facts.case, facts.space, facts.start
    P = facts.curvature("ggn")
    prior, likelihood = facts.held["prior"], facts.held["ggn"]
    total = prior.clone()
    places = space.places()
    done = set()
    for path in case.kron:
        name = next(n for n in places if n == f"{path}.weight" or n.endswith(f".{path}.weight"))
        assert case.net is not None
        module = case.net.get_submodule(path)
        seen: dict[str, Any] = {}

        def hook(module: Any, args: Any, output: Tensor, seen: dict[str, Any] = seen) -> Tensor:
            seen["x"] = args[0].detach().clone()
            seen["shift"] = torch.zeros_like(output, requires_grad=True)
            return output + seen["shift"]

        handle = module.register_forward_hook(hook)
        trace = dense.trace_at(case, space.values(u))
        handle.remove()
        x, size = seen["x"], seen["shift"].shape
        if isinstance(module, torch.nn.Embedding):
            x = torch.nn.functional.one_hot(x, module.num_embeddings).to(u)
        G = torch.zeros(size[-1], size[-1])
        live = torch.zeros(len(x), dtype=torch.bool)
        for site_name in space.observed:
            phi, F, weight = dense.site_parameters(trace.nodes[site_name])
            J = dense.jacobian_wrt(phi, seen["shift"]).reshape(*phi.shape, *size)
            J = J.reshape(*phi.shape, len(x), -1, size[-1])
            G += torch.einsum("ncbto,ncd,ndbtp,n->op", J, F, J, weight)
            live |= (torch.einsum("ncbto,ncd,ndbto,n->b", J, F, J, weight) > 0) | (weight.max() == 0)
        rows = x.reshape(len(x), -1, x.shape[-1])[live]
        A = torch.einsum("nti,ntj->ij", rows, rows) / (rows.shape[0] * rows.shape[1])
        at = places[name]
        block = torch.kron(G, A) if not isinstance(module, torch.nn.Embedding) else torch.kron(A, G)
        total[at[:, None], at] += block
        done.add(name)
    for name, at in places.items():
        if name not in done:
            total[at[:, None], at] += likelihood[at[:, None], at]
    assert P is not None
    return total


@operation("log evidence, ggn", "at most 60 latents", few)
def evidence(facts: Facts) -> Pairs:
    case = facts.program.make()
    guide = approximation(facts, case)
    P = facts.curvature("ggn")
    expected_covariance(P)
    with case.evaluation():
        value = -float(dense.negative_joint(case, facts.space, facts.start))
    expected = value + 0.5 * (facts.space.dim * math.log(2 * math.pi) - float(torch.logdet(P)))
    yield "evidence", float(guide.log_evidence()), expected


@operation(
    "Laplace from a loader",
    "examples are apart; the program has rows",
    lambda facts: few(facts) and loads(facts),
)
def laplace_loader(facts: Facts) -> Pairs:
    case = facts.program.make()
    for size, backwards in ((4, False), (3, True)):
        batches = case.batches(size)
        guide = approximation(facts, case, batches[::-1] if backwards else batches)
        expected = expected_covariance(facts.curvature("ggn"))
        yield f"batches of {size}", covariance(facts, guide), expected, factor(facts, "ggn")  # type: ignore[misc]


def loads(facts: Facts) -> bool:
    c = facts.case
    return c.take is not None and c.separate and not c.guide_rows and not c.noise


@operation(
    "linearised prediction",
    "each observation is Normal with a fixed scale, a coin or a label",
    lambda facts: few(facts) and facts.is_simple,
)
def linearized(facts: Facts) -> Pairs:
    case = facts.program.make()
    guide = approximation(facts, case)
    expected = facts.outputs()
    P = facts.curvature("ggn")
    for args in (case.inputs, case.data):
        for name, found in guide.linearized_outputs(*args).items():
            if name not in expected:
                continue
            phi, J = expected[name]
            if not J.any() and not found.variance.numel():
                continue
            variance = variances(J, P)
            yield f"mean of {name}", found.mean.reshape(phi.shape), phi
            yield f"variance of {name}", found.variance.reshape(phi.shape), variance, factor(facts, "ggn")  # type: ignore[misc]


def hessian_free(kind: str, facts: Facts) -> Pairs:
    case = facts.program.make()
    options: Any = {"curvature": kind}
    guide = AutoHessianFreeLaplace(case.model, **options).initialize(*case.data)
    guide.loc.data = place(facts, guide, facts.mode)
    guide.laplace_approximation(case.data, case.inputs, map_tolerance=math.inf)
    expected = facts.get("outputs at mode", lambda: facts._outputs(facts.mode))
    if kind == "hessian":
        P = facts.curvature("hessian")
    else:
        c, s, u = facts.case, facts.space, facts.mode
        P = facts.get("ggn at mode", lambda: dense.ggn(c, s, u)) + facts.get(
            "prior at mode", lambda: dense.hessian(lambda v: -dense.log_prior(c, s, v), u)
        )
    for name, found in guide.linearized_outputs(*case.inputs).items():
        if name in expected:
            phi, J = expected[name]
            if not J.any() and not found.variance.numel():
                continue
            variance = variances(J, P)
            yield f"variance of {name}", found.variance.reshape(phi.shape), variance, max(1e-6, factor(facts, "ggn"))  # type: ignore[misc]


for _kind in ("ggn", "hessian"):
    operation(
        f"Hessian-free Laplace, {_kind}",
        "each observation is Normal with a fixed scale, a coin or a label",
        lambda facts: has_hessian(facts) and facts.is_simple,
    )(partial(hessian_free, _kind))


# ---------------------------------------------------------------- predictions


def compare_prediction(facts: Facts, found: Any, traces: list[Any], what: str = "") -> Pairs:
    for name in facts.space.observed:
        site = traces[0].nodes[name]
        if isinstance(site["fn"], dist.Unit):
            continue
        assert name in found, f"site {name} was not predicted"
        stacked = [dense.moments(t.nodes[name]["fn"]) for t in traces]
        values = [dense.pointwise(t.nodes[name]) for t in traces]
        if stacked[0][0] is not None:
            yield f"{what}mean of {name}", found[name].mean, torch.stack([m for m, _ in stacked])
            yield f"{what}variance of {name}", found[name].variance, torch.stack([v for _, v in stacked])
        yield f"{what}shape of draws of {name}", tuple(found[name].samples.shape[1:]), tuple(site["value"].shape)
        if found[name].log_likelihood is not None:
            mask = values[0][1]
            actual = found[name].log_likelihood
            yield f"{what}log likelihood of {name}", actual[..., mask], torch.stack([v for v, _ in values])[..., mask]


def deterministic_predictions(facts: Facts) -> bool:
    return not facts.case.noise


def predict(what: str, facts: Facts) -> Pairs:
    case = facts.program.make()
    draws, data, options = facts.draws(), case.data, {}
    if what == "loader":
        data = case.batches(4)
    if what == "batch_size":
        options = {"batch_size": 4}
    found = posterior_predictive(case.model, draws, data, **options)
    yield from compare_prediction(facts, found, facts.traces())
    if what == "whole":
        plain = posterior_predictive(case.model, draws, case.inputs)
        traces = facts.traces()
        for name in facts.space.observed:
            stacked = [dense.moments(t.nodes[name]["fn"])[0] for t in traces]
            if stacked[0] is not None and not isinstance(traces[0].nodes[name]["fn"], dist.Unit):
                yield f"mean of {name} without observations", plain[name].mean, torch.stack(stacked)


PREDICT = "the model draws nothing beyond its latents"
operation("posterior predictive", PREDICT, deterministic_predictions)(partial(predict, "whole"))
operation(
    "predictive of a loader",
    PREDICT + "; examples are apart; latents are shared by all",
    lambda facts: deterministic_predictions(facts) and loads(facts),
)(partial(predict, "loader"))
operation(
    "predictive with batch_size",
    PREDICT + "; the program has rows",
    lambda facts: deterministic_predictions(facts) and facts.case.size > 4,
)(partial(predict, "batch_size"))


@operation("predictive moments", PREDICT, deterministic_predictions)
def moments(facts: Facts) -> Pairs:
    case = facts.program.make()
    found = predictive_moments(case.model, facts.draws(), case.data)
    traces = facts.traces()
    for name in facts.space.observed:
        fn = traces[0].nodes[name]["fn"]
        stacked = [dense.moments(t.nodes[name]["fn"]) for t in traces]
        if stacked[0][0] is None or isinstance(fn, dist.Unit):
            continue
        mean = torch.stack([m for m, _ in stacked])
        variance = torch.stack([v for _, v in stacked])
        base, _ = dense.plain(fn, torch.ones(()))
        yield f"mean of {name}", found[name].mean, mean.mean(0)
        if not isinstance(base, (td.Categorical, td.Bernoulli, td.OneHotCategorical)):
            yield f"aleatoric variance of {name}", found[name].aleatoric, variance.mean(0)
            yield f"epistemic variance of {name}", found[name].epistemic, mean.var(0, correction=0)
        values = [dense.pointwise(t.nodes[name]) for t in traces]
        mask = values[0][1]
        density = torch.stack([v for v, _ in values]).logsumexp(0) - math.log(len(values))
        yield f"log density of {name}", found[name].log_density[mask], density[mask]


@operation("scores", PREDICT + "; one observed site", lambda facts: deterministic_predictions(facts) and len(facts.sites) == 1)
def scores(facts: Facts) -> Pairs:
    case = facts.program.make()
    prediction = posterior_predictive(case.model, facts.draws(), case.data)
    found = evaluate(prediction)
    (name,) = facts.space.observed
    traces = facts.traces()
    site = traces[0].nodes[name]
    values = [dense.pointwise(t.nodes[name]) for t in traces]
    mask = values[0][1]
    density = torch.stack([v for v, _ in values]).logsumexp(0) - math.log(len(values))
    yield "nll", found["nll"], -float(density[mask].mean())
    means = [dense.moments(t.nodes[name]["fn"])[0] for t in traces]
    if means[0] is None:
        return
    mean = torch.stack([m for m in means if m is not None]).mean(0)
    y = site["value"]
    if "rmse" in found and mean.shape == y.shape:
        weight = mask.reshape(mask.shape + (1,) * (y.dim() - mask.dim())).expand(y.shape)
        yield "rmse", found["rmse"], float(((mean - y)[weight] ** 2).mean().sqrt())
    if "accuracy" in found and mean.dim() == y.dim() + 1:
        yield "accuracy", found["accuracy"], float((mean.argmax(-1) == y)[mask].double().mean())
        one_hot = torch.nn.functional.one_hot(y.clamp(min=0).long(), mean.shape[-1])
        yield "brier", found["brier"], float(((mean - one_hot) ** 2).sum(-1)[mask].mean())


# ---------------------------------------------------------------- export


def export(what: str, facts: Facts) -> Pairs:
    case = facts.program.make()
    data, options = case.data, {}
    if what == "loader":
        data = case.batches(4)
    if what == "batch_size":
        options = {"batch_size": 4}
    tree = to_datatree(case.model, facts.draws(), data, weights=True, **options)
    traces = facts.traces()
    lp = np.array([float(t.log_prob_sum()) for t in traces])
    yield "lp", tree["sample_stats"]["lp"].values.reshape(-1), lp
    for name in facts.space.observed:
        if isinstance(traces[0].nodes[name]["fn"], dist.Unit):
            continue
        values = [dense.pointwise(t.nodes[name]) for t in traces]
        mask = values[0][1]
        expected = torch.stack([v for v, _ in values])
        actual = torch.as_tensor(tree["log_likelihood"][name].values.copy())[0]
        if actual.shape == expected.shape:
            yield f"log likelihood of {name}", actual[..., mask], expected[..., mask]
            if not bool(mask.all()):
                left = actual[..., ~mask]
                yield "masked observations count for nothing", float(left.nan_to_num().abs().max()), 0.0
        else:
            yield f"log likelihood of {name}", actual.reshape(len(traces), -1), expected[..., mask]
        predicted = tree["posterior_predictive"][name].values
        yield f"shape of {name}", tuple(predicted.shape[2:]), tuple(traces[0].nodes[name]["value"].shape)


operation("export", PREDICT, deterministic_predictions)(partial(export, "whole"))
operation(
    "export of a loader",
    PREDICT + "; examples are apart; latents are shared by all",
    lambda facts: deterministic_predictions(facts) and loads(facts),
)(partial(export, "loader"))
operation(
    "export with batch_size",
    PREDICT + "; the program has rows",
    lambda facts: deterministic_predictions(facts) and facts.case.size > 4,
)(partial(export, "batch_size"))


@operation("importance weights", PREDICT, deterministic_predictions)
def weights(facts: Facts) -> Pairs:
    case = facts.program.make()
    guide = AutoNormal(case.model, init_scale=0.1)
    guide(*case.data)
    data = case.batches(4) if loads(facts) else case.data
    draws, found = log_weights(case.model, guide, data, num_samples=3)
    expected = []
    with case.evaluation():
        for values in dense.components(case, {n: draws[n] for n in facts.space.sites}):
            log_q = 0.0
            for n, v in values.items():
                t = facts.space.transforms[n]
                u = t.inv(v)
                loc, scale = guide._get_loc_and_scale(n)
                log_q += float(td.Normal(loc, scale).log_prob(u).sum() - t.log_abs_det_jacobian(u, v).sum())
            expected.append(float(dense.joint(case, values)) - log_q)
    yield "log weights", found, torch.tensor(expected)


# ---------------------------------------------------------------- files


def restored(facts: Facts, build: Callable[[Case], Any]) -> Pairs:
    case, fresh = facts.program.make(), facts.program.make()
    if case.net is not None and case.train:
        case.net.train()
        with torch.no_grad():
            poutine.block(case.model)(*case.data)  # running statistics move
    guide = build(case)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "guide.pt"
        save_guide(guide, path, case.data)
        simple = all(a is None or isinstance(a, (Tensor, int, float)) for a in fresh.data)
        loaded = load_guide(empty(guide, fresh), path, **({} if simple else {"data": fresh.data}))
    if case.net is not None and not case.train:
        fresh.net.load_state_dict(case.net.state_dict())  # type: ignore[union-attr]
    predictions = []
    for model, g, args in ((case.model, guide, case.inputs), (fresh.model, loaded, fresh.inputs)):
        pyro.set_rng_seed(2)
        predictions.append(posterior_predictive(model, g, args, num_samples=3))
    for name in predictions[0]:
        for field in ("samples", "mean"):
            before, after = (getattr(p[name], field) for p in predictions)
            if before is not None:
                yield f"{field} of {name}", after, before


def empty(guide: Any, case: Case) -> Any:
    if isinstance(guide, AutoMixture):
        return AutoMixture(case.model, 2, "normal", rest="normal")
    return AutoLaplace(case.model)


def normal_mixture(case: Case) -> Any:
    guide = AutoMixture(case.model, 2, "normal", rest="normal").initialize(*case.data)
    with torch.no_grad():
        for name, p in guide.named_parameters():
            if "scale" not in name:
                p += 0.3 * torch.randn_like(p)
    return guide


def real_line(facts: Facts) -> bool:
    return deterministic_predictions(facts) and not facts.case.guide_rows


@operation("save and load a mixture", PREDICT + "; no latent belongs to a row", real_line)
def save_mixture(facts: Facts) -> Pairs:
    yield from restored(facts, normal_mixture)


@operation("save and load a Laplace guide", "at most 60 latents, none belongs to a row", lambda f: few(f) and real_line(f))
def save_laplace(facts: Facts) -> Pairs:
    yield from restored(facts, lambda case: approximation(facts, case))


def quiet(run: Callable[[Facts], Pairs], facts: Facts) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(run(facts))
