# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.distributions import kl_divergence

from pyro_bnn.infer import Mixture_ELBO
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.model.handlers import SubstituteMessenger
from pyro_bnn.nn import ClosedFormPrior, HierarchicalPrior, LearnedScalePrior, bayesian_, rank1_
from tests.common import assert_close
from tests.infer.test_mixture import D, X, Y, run


def make_model(prior, convert=rank1_):
    net = convert(nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 1)), prior=prior)

    def model(x, y=None):
        f = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return net, model


@pytest.mark.parametrize(
    ("level", "names"),
    [
        ("global", {"factor_scale"}),
        ("layer", {"0.factor_scale", "2.factor_scale"}),
        ("site", {"0.r_scale", "0.s_scale", "2.r_scale", "2.s_scale"}),
    ],
)
def test_levels(level, names):
    net, _ = make_model(HierarchicalPrior(dist.HalfCauchy(0.1), level=level))
    nodes = dict(poutine.trace(net).get_trace(X).iter_stochastic_nodes())
    assert {n for n in nodes if "scale" in n} == names
    for name, site in nodes.items():
        if name.endswith((".r", ".s")):
            key = {"global": "factor_scale", "layer": name[0] + ".factor_scale", "site": name + "_scale"}[
                level
            ]
            assert_close(site["fn"].base_dist.scale, nodes[key]["value"].expand(site["value"].shape))


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("hyperprior", "variance"),
    [(dist.HalfCauchy(0.2), False), (dist.HalfNormal(0.2), False), (dist.InverseGamma(3.0, 0.1), True)],
)
@pytest.mark.parametrize("family", ["normal", "cauchy", "lognormal"])
def test_density_and_inference(hyperprior, variance, family):
    prior = HierarchicalPrior(hyperprior, variance=variance, level="layer", family=family)
    _, model = make_model(prior)
    trace = poutine.trace(model).get_trace(X, Y)
    trace.compute_log_prob()
    quantity = "0.factor_variance" if variance else "0.factor_scale"
    tau = trace.nodes[quantity]["value"]
    tau = tau.sqrt() if variance else tau
    made = {"normal": dist.Normal, "cauchy": dist.Cauchy, "lognormal": dist.LogNormal}[family](1.0, tau)
    assert_close(trace.nodes["0.r"]["log_prob"], made.log_prob(trace.nodes["0.r"]["value"]).sum())
    kind = "lognormal" if family == "lognormal" else "normal"
    for rest in ("delta", "normal"):
        guide = AutoMixture(model, 3, kind, rest=rest, init_scale=0.05).initialize(X, Y)
        losses = run(guide, Mixture_ELBO(num_particles=2), model, X, Y, 30)
        assert losses.isfinite().all()
        scale = guide.sample_posterior((6,))[quantity]
        assert (scale > 0).all()
    # every component meets its own scale: shapes of the bound's traces
    elbo = Mixture_ELBO(max_plate_nesting=1)
    model_trace, guide_trace = elbo._get_trace(model, guide, (X, Y), {})
    tau = guide_trace.nodes[quantity]["value"]
    tau = (tau.sqrt() if variance else tau).reshape(3)
    assert_close(model_trace.nodes["0.r"]["fn"].base_dist.scale[:, 0, 0], tau)


@pytest.mark.every(3)
@pytest.mark.parametrize("kl", ["mean", "sum"])
@pytest.mark.parametrize("component", ["normal", "cauchy", "low_rank", "delta"])
@pytest.mark.parametrize("level", ["global", "layer", "site"])
@pytest.mark.parametrize(
    ("family", "arguments"),
    [(dist.HalfCauchy, (0.2,)), (dist.HalfNormal, (0.2,)), (dist.InverseGamma, (3.0, 0.1))],
)
def test_bound_of_hierarchies(family, arguments, level, component, kl):
    """The divergence of a component is that from the prior with its own scale, plus that of the scale."""
    K, hyperprior, variance = 2, family(*map(torch.tensor, arguments)), family is dist.InverseGamma
    net, model = make_model(HierarchicalPrior(hyperprior, variance=variance, level=level))
    families = lambda name, site: component if name.endswith((".r", ".s")) else None  # noqa: E731
    rest = "delta" if component == "delta" else "lognormal"
    kinds = lambda name, site: families(name, site) or ("delta" if "bias" in name else rest)  # noqa: E731
    guide = AutoMixture(model, K, kinds, init_scale=0.1).initialize(X, Y)
    elbo = Mixture_ELBO(kl=kl, max_plate_nesting=1)
    pyro.set_rng_seed(5)
    loss = elbo.loss(model, guide, X, Y)
    pyro.set_rng_seed(5)
    _, trace = elbo._get_trace(model, guide, (X, Y), {})
    q = guide.component_distributions()
    shapes = {site.name: site.shape for site in guide.sites}
    values = {n: trace.nodes[n]["value"].reshape(K, *shapes[n]) for n in shapes}
    divergence, log_prior, fit = 0.0, 0.0, 0.0
    for k in range(K):
        v = {n: value[k] for n, value in values.items()}
        with SubstituteMessenger(v):
            fit = fit + dist.Normal(net(X).squeeze(-1), 0.5).log_prob(Y).sum()
        for n, value in v.items():
            if "factor" in n or n.endswith(("_scale", "_variance")):
                prior = hyperprior
            elif n.endswith("bias"):
                prior = dist.Normal(0.0, 1.0)
            else:
                name = "_variance" if variance else "_scale"
                key = {"global": "factor" + name, "layer": n[0] + ".factor" + name, "site": n + name}[level]
                prior = dist.Normal(1.0, v[key].sqrt() if variance else v[key])
            log_p = prior.log_prob(value).sum()
            if guide_kind(guide, n) == "delta":
                log_prior = log_prior + log_p
            elif guide_kind(guide, n) == "low_rank":
                divergence = divergence - log_p
            elif component == "normal" and isinstance(prior, dist.Normal):
                each = q[n].base_dist
                divergence = divergence + kl_divergence(dist.Normal(each.loc[k], each.scale[k]), prior).sum()
            elif isinstance(prior, dist.InverseGamma) or component == "cauchy" or prior is hyperprior:
                base = q[n].base_dist if hasattr(q[n], "base_dist") and n[-2:] in (".r", ".s") else q[n]
                made = type(base)(base.loc[k], base.scale[k])
                divergence = divergence + made.log_prob(value).sum() - log_p
        if component == "low_rank":
            joint = guide._low_rank()
            flat = torch.cat([v[s.name].reshape(-1) for s in guide._low_rank_sites()])
            each = dist.LowRankMultivariateNormal(joint.loc[k], joint.cov_factor[k], joint.cov_diag[k])
            divergence = divergence + each.log_prob(flat)
    factor = 1.0 if kl == "sum" else 1.0 / K
    assert_close(loss, factor * divergence - (fit + log_prior) / K, rtol=1e-9)


def guide_kind(guide, name):
    return next(site.kind for site in guide.sites if site.name == name)


def test_horseshoe_of_full_weights():
    prior = HierarchicalPrior(dist.HalfCauchy(1.0), level="site", loc=0.0)
    _, model = make_model({"weight": prior, "bias": dist.Normal(0.0, 1.0)}, bayesian_)
    guide = AutoMixture(model, 2, {"weight": "normal", "bias": "normal", "weight_scale": "normal"})
    guide.initialize(X, Y)
    assert run(guide, Mixture_ELBO(), model, X, Y, 20).isfinite().all()


@pytest.mark.parametrize("per_element", [False, True])
def test_learned_scale_reaches_its_optimum(per_element):
    net, model = make_model(LearnedScalePrior(0.3, per_element=per_element))
    nodes = poutine.trace(net).get_trace(X).nodes
    assert_close(nodes["0.r"]["fn"].base_dist.scale, torch.full((4,), 0.3))
    names = {n for n, _ in net.named_parameters() if "prior_scale" in n}
    assert names == {f"{layer}.{f}_prior_scale_raw" for layer in (0, 2) for f in "rs"}
    guide = AutoMixture(model, 1, init_scale=0.1).initialize(X, Y)
    raw = net[0].r_prior_scale_raw
    loc = guide.component_distributions()["0.r"].base_dist.loc[0].detach()
    variance = 0.1**2 + (loc - 1.0) ** 2
    elbo = Mixture_ELBO(max_plate_nesting=1)
    optim = torch.optim.LBFGS([raw], max_iter=100, line_search_fn="strong_wolfe")

    def kl():
        optim.zero_grad()
        m, g = elbo._get_trace(model, guide, (X, Y), {})
        value = kl_divergence(g.nodes["0.r"]["fn"], m.nodes["0.r"]["fn"]).sum()
        value.backward()
        return value

    optim.step(kl)
    optimum = variance if per_element else variance.mean()
    assert_close(nn.functional.softplus(raw) ** 2, optimum, rtol=1e-4)
    if per_element:
        assert_close(kl(), 0.5 * (1 + (loc - 1.0) ** 2 / 0.1**2).log().sum(), rtol=1e-6)


def test_closed_form_variance_is_the_minimiser():
    prior = ClosedFormPrior(2.01, 0.101)
    _, model = make_model(prior)
    guide = AutoMixture(model, 2, init_scale=0.2).initialize(X, Y)
    elbo = Mixture_ELBO(kl="sum", max_plate_nesting=1)
    elbo.loss(model, guide, X, Y)
    total = 0.0
    v = torch.logspace(-4, 2, 200_001)
    hyper = dist.InverseGamma(2.01, 0.101).log_prob(v)
    for name in ("0.r", "0.s", "2.r", "2.s"):
        q = guide.component_distributions()[name].base_dist
        for k in range(2):
            n = q.loc.shape[-1]
            second = (q.scale[k] ** 2 + (q.loc[k] - 1.0) ** 2).sum()
            kl = 0.5 * (n * v.log() - q.scale[k].square().log().sum() + second / v - n) - hyper
            total = total + kl.min()
    assert_close(elbo.parts["kl"], total.detach(), rtol=1e-7)
    wrong = AutoMixture(model, 2, "cauchy").initialize(X, Y)
    with pytest.raises(ValueError, match="ClosedFormPrior, which needs Normal components, found cauchy"):
        elbo.loss(model, wrong, X, Y)


@pytest.mark.parametrize(
    "prior",
    [
        HierarchicalPrior(dist.HalfCauchy(torch.tensor(0.1, dtype=torch.float32))),
        LearnedScalePrior(),
        ClosedFormPrior(),
    ],
)
def test_precision_and_copies(prior):
    net, _ = make_model(prior)
    net.float()
    nodes = dict(poutine.trace(net).get_trace(X.float()).iter_stochastic_nodes())
    assert {site["value"].dtype for site in nodes.values()} == {torch.float32}
    net.double()
    nodes = dict(poutine.trace(copy.deepcopy(net)).get_trace(X).iter_stochastic_nodes())
    assert {site["value"].dtype for site in nodes.values()} == {torch.float64}


def test_errors():
    with pytest.raises(ValueError, match="unknown family 'gamma'"):
        LearnedScalePrior(family="gamma")
    with pytest.raises(ValueError, match="level must be"):
        HierarchicalPrior(dist.HalfCauchy(1.0), level="network")
    with pytest.raises(ValueError, match=r"scalar distribution, found shape \(3,\)"):
        HierarchicalPrior(dist.HalfCauchy(torch.ones(3)))
    with pytest.raises(ValueError, match="init must be positive"):
        LearnedScalePrior(0.0)
    with pytest.raises(ValueError, match="concentration and rate"):
        ClosedFormPrior(0.0)
