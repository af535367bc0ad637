# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Bounds of mixtures, against loops over their components."""

import math
from functools import partial
from typing import Any

import pyro
import torch
import torch.distributions as td
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta, AutoGuideList
from torch import Tensor

from pyro_bnn.infer import Mixture_ELBO, fit
from pyro_bnn.infer.autoguide import AutoMixture
from tests.programs import dense
from tests.programs.facts import Facts, Pairs, is_function, one_plate, operation
from tests.programs.program import Case


def mixture(
    facts: Facts, case: Case, K: int, component: str = "delta", **options: Any
) -> tuple[Any, list[dict[str, Tensor]]]:
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
SEVERAL = BOUND + "; components share no batch statistics"


def is_separate(facts: Facts) -> bool:
    return is_function(facts) and not facts.case.shares_statistics


operation("bound, K = 1", BOUND, is_function)(partial(bound, 1))
operation("bound, K = 2", SEVERAL, is_separate)(partial(bound, 2))


def normal_latents(facts: Facts) -> bool:
    priors = [dense.plain(s["fn"], torch.ones(()))[0] for s in facts.space.sites.values()]
    return is_separate(facts) and all(isinstance(p, td.Normal) for p in priors) and not facts.case.guide_rows


@operation(
    "bound, Normal components",
    SEVERAL + "; all latents have Normal priors, none belongs to a row",
    normal_latents,
)
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


@operation(
    "log-mixture bound",
    SEVERAL + "; one observed site in one plate",
    lambda facts: is_separate(facts) and one_plate(facts) and not facts.case.guide_rows,
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


@operation("one step of fit", SEVERAL, is_separate)
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
            (facts.space.transforms[n].inv(values[n]) - facts.space.transforms[n].inv(before[k][n])).reshape(
                -1
            )
            for n in facts.space.sites
        ]
        # the step is the difference of two rounded parameters
        size = max(float(values[n].abs().max()) for n in facts.space.sites)
        rounding = 2 * torch.finfo(expected[k].dtype).eps * size / (lr * float(expected[k].abs().max()))
        yield f"component {k}", torch.cat(moved) / lr, expected[k], max(1e-7, rounding)  # type: ignore[misc]


@operation(
    "bound of a list of guides",
    SEVERAL + "; at least two latent sites, none belongs to a row",
    lambda facts: is_separate(facts) and len(facts.space.sites) > 1 and not facts.case.guide_rows,
)
def guide_list(facts: Facts) -> Pairs:
    """A mixture of the first site beside a point estimate of the others."""
    case = facts.program.make()
    first, *others = facts.space.sites
    guide = AutoGuideList(case.model)
    part = AutoMixture(poutine.block(case.model, hide=others), 2, "delta", rest="delta")
    guide.append(part)
    guide.append(AutoDelta(poutine.block(case.model, hide=[first])))
    guide(*case.data)
    with torch.no_grad():
        for p in part.parameters():
            p += case.spread * torch.randn_like(p)
    rest = {n: v.detach() for n, v in guide[1].median().items()}
    values = [v | rest for v in places(part, 2)]
    expected = -sum(float(dense.joint(case, v)) for v in values) / 2
    elbo = Mixture_ELBO()
    svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 0.0}), elbo)
    with pyro.validation_enabled(True):
        yield "step of SVI", float(svi.step(*case.data)), expected
    with pyro.validation_enabled(False):
        yield "second step", float(svi.step(*case.data)), expected
