# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import copy
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoGuideList, AutoNormal
from pyro.optim import Adam
from torch import nn
from torch.distributions import kl_divergence

from pyro_bnn.infer import Mixture_ELBO, posterior_predictive
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.model.handlers import SubstituteMessenger
from pyro_bnn.nn import Rank1Linear, init_to_trained, rank1_
from tests.common import assert_close
from tests.contracts.posterior import LinearGaussian, assert_below_the_evidence

N, D = 30, 3
X = torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.3


def linear_model(x, y=None, noise=0.5):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal((x * w).sum(-1), noise), obs=y)


def log_evidence(x, y, noise=0.5):
    return LinearGaussian(x, y, noise, prior_scale=1.0).log_evidence


def rank1_model(prior=None):
    net = rank1_(nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 1)), prior=prior)

    def model(x, y=None):
        sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 0.5))
        f = net(x).squeeze(-1)
        with pyro.plate("data", N, subsample_size=len(x)):
            return pyro.sample("obs", dist.Normal(f, sigma), obs=y)

    return net, model


def run(guide, elbo, model, x, y, steps, lr=0.02):
    module = elbo(model, guide)
    module(x, y)
    optim = torch.optim.Adam(module.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        optim.zero_grad()
        loss = module(x, y)
        loss.backward()
        optim.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("likelihood", ["average", "log_mixture"])
@pytest.mark.parametrize("kl", ["mean", "sum", "exact"])
@pytest.mark.parametrize("prior", [dist.Normal(1.0, 0.1), dist.Cauchy(1.0, 0.1)])
@pytest.mark.parametrize("particles", [1, 2])
def test_objectives_equal_hand_computed_values(likelihood, kl, prior, particles):
    K, S, B = 3, particles, 12
    x, y = X[:B], Y[:B]
    net, model = rank1_model(prior)
    kind = "cauchy" if isinstance(prior, dist.Cauchy) else "normal"
    guide = AutoMixture(model, K, kind, rest="normal", init_scale=0.2).initialize(x, y)
    elbo = Mixture_ELBO(likelihood, kl, num_particles=S, kl_scale=0.7, max_plate_nesting=1)

    pyro.set_rng_seed(3)
    actual = elbo.loss(model, guide, x, y)
    pyro.set_rng_seed(3)
    with guide.stratified(-2, S), pyro.plate("s", S, dim=-3), pyro.plate("c", K, dim=-2):
        trace = poutine.trace(guide).get_trace(x, y)
    values = {
        n: s["value"].reshape(S, K, *guide.prototype_trace.nodes[n]["value"].shape)
        for n, s in trace.iter_stochastic_nodes()
    }

    components = guide.component_distributions()
    priors = {n: s["fn"] for n, s in guide.prototype_trace.iter_stochastic_nodes()}
    kl_k = torch.stack(
        [sum(kl_divergence(_at(components[n], k), priors[n]) for n in priors) for k in range(K)]
    )
    log_q = torch.stack(
        [sum(_at(components[n], k).log_prob(values[n]) for n in priors) for k in range(K)], -1
    )
    information = math.log(K) + log_q.log_softmax(-1).diagonal(dim1=1, dim2=2).mean()
    divergence = {"mean": kl_k.mean(), "sum": kl_k.sum(), "exact": kl_k.mean() - information}[kl]

    log_lik = torch.zeros(S, K, B)
    for i in range(S):
        for k in range(K):
            with SubstituteMessenger({n: v[i, k] for n, v in values.items()}):
                f = net(x).squeeze(-1)
            log_lik[i, k] = dist.Normal(f, values["sigma"][i, k]).log_prob(y)
    if likelihood == "average":
        expected = log_lik.sum(-1).mean()
    else:
        expected = (log_lik.logsumexp(1) - math.log(K)).sum(-1).mean()
    assert_close(actual, 0.7 * divergence - N / B * expected, rtol=1e-10)
    assert_close(elbo.parts["kl"], divergence, rtol=1e-10)
    assert_close(elbo.parts["expected_log_likelihood"], N / B * expected, rtol=1e-10)
    assert information <= math.log(K)


def _at(fn, k):
    base = fn.base_dist if hasattr(fn, "base_dist") and not isinstance(fn, dist.LogNormal) else fn
    new = type(base)(base.loc[k], base.scale[k])
    return new.to_event(base.loc.dim() - 1)


def test_point_estimates_are_map_terms():
    x, y = X, Y
    _, model = rank1_model()
    guide = AutoMixture(model, 2, "normal").initialize(x, y)
    kinds = {site.name: site.kind for site in guide.sites}
    assert kinds["0.r"] == kinds["2.s"] == "normal"
    assert kinds["0.bias"] == kinds["sigma"] == "delta"
    elbo = Mixture_ELBO(kl="sum", kl_scale=0.0)
    elbo.loss(model, guide, x, y)
    values = {n: guide.component_distributions()[n].sample() for n in ("sigma", "0.bias", "2.bias")}
    expected = dist.LogNormal(-1.0, 0.5).log_prob(values["sigma"])
    expected = expected + sum(dist.Normal(0.0, 1.0).log_prob(values[n]).sum(-1) for n in ("0.bias", "2.bias"))
    assert_close(elbo.parts["log_prior"], expected.mean())


@pytest.mark.parametrize("num_components", [1, 3])
def test_point_estimates_follow_the_scale_of_the_model(num_components):
    def model(x, y=None):
        with poutine.scale(scale=0.3):
            w = pyro.sample("w", dist.Normal(torch.ones(D), 2.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((x * w).sum(-1), 0.5), obs=y)

    guide = AutoMixture(model, num_components, {"w": "point"}).initialize(X, Y)
    elbo = Mixture_ELBO()
    elbo.loss(model, guide, X, Y)
    assert_close(elbo.parts["log_prior"], 0.3 * dist.Normal(1.0, 2.0).log_prob(guide.points.w.detach()).sum())


def test_shared_weights_are_one_point():
    layer = Rank1Linear(D, 2, weight_prior=dist.Normal(0.0, 0.3))
    weight = layer._sites["weight"].init.clone()

    def model(x, y=None):
        f = layer(x)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, 1.0).to_event(1), obs=y)

    y = torch.zeros(N, 2)
    guide = AutoMixture(model, 3).initialize(X, y)
    assert {site.name: site.kind for site in guide.sites}["weight"] == "point"
    assert_close(guide.sample_posterior((5,))["weight"], weight.expand(5, 2, D))
    elbo = Mixture_ELBO()
    elbo.loss(model, guide, X, y)
    bias = guide.component_distributions()["bias"].sample()
    prior = dist.Normal(0.0, 0.3).log_prob(weight).sum() + dist.Normal(0.0, 1.0).log_prob(bias).sum(-1).mean()
    assert_close(elbo.parts["log_prior"], prior)


@pytest.mark.parametrize("kl", ["mean", "sum", "exact"])
def test_bounds_stay_below_the_exact_evidence(kl):
    evidence = log_evidence(X, Y)
    guide = AutoMixture(linear_model, 3, init_scale=0.1).initialize(X, Y)
    elbo = Mixture_ELBO(kl=kl, num_particles=64)
    assert elbo.is_bound
    run(guide, elbo, linear_model, X, Y, 600)
    value = assert_below_the_evidence(elbo, linear_model, guide, evidence, X, Y)
    # mean-field Gaussian components lose the posterior correlations only, the sum KL two KLs more
    assert value > evidence - (2.0 if kl != "sum" else 40.0)


def test_log_mixture_bounds_the_evidence_of_a_model_of_experts():
    """Every example picks its component: the evidence is a sum over all assignments of products of Gaussian ones."""
    n, K, noise = 8, 2, 0.2
    x = torch.linspace(0.5, 2.0, n)
    y = 2.0 * x * torch.tensor([1.0, -1.0]).repeat(n // 2)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", n):
            return pyro.sample("obs", dist.Normal(w * x, noise), obs=y)

    def exact(part):
        return LinearGaussian(x[part, None], y[part], noise, prior_scale=1.0)

    own = exact(slice(None)).log_evidence
    total = []
    for assignment in itertools.product(range(K), repeat=n):
        parts = [torch.tensor(assignment) == k for k in range(K)]
        total.append(sum(exact(part).log_evidence for part in parts if part.any()))
    experts = torch.stack(total).logsumexp(0) - n * math.log(K)
    assert experts > own + 10
    guide = AutoMixture(model, K).initialize(x, y)
    halves = [exact(y > 0), exact(y < 0)]
    with torch.no_grad():
        guide.loc.copy_(torch.stack([half.mean for half in halves]))
    guide.scale = torch.stack([half.covariance.diagonal().sqrt() for half in halves])
    found = {}
    for kl in ("sum", "mean", "exact"):
        elbo = Mixture_ELBO("log_mixture", kl, num_particles=20_000)
        found[kl] = -elbo.loss(model, guide, x, y)
        assert elbo.is_bound == (kl == "sum")
    # the components are the posteriors of the experts: only their order, log 2, is lost
    assert_close(found["sum"], experts - math.log(2), rtol=0, atol=0.02)
    # the other two are no bound of either model
    assert min(found["mean"], found["exact"]) > max(own, experts) + 1


def test_narrow_unit_factors_are_the_deterministic_network():
    plain = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 1))
    net = rank1_(copy.deepcopy(plain))

    def model(x, y=None):
        f = net(x).squeeze(-1)
        with pyro.plate("data", N, subsample_size=len(x)):
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    initial = init_to_trained(fallback=lambda site: torch.ones(site["fn"].shape()))
    biases = [plain[0].bias, plain[2].bias]
    log_prior = sum(dist.Normal(0.0, 1.0).log_prob(bias).sum() for bias in biases)
    expected = N / 12 * dist.Normal(plain(X[:12]).squeeze(-1), 0.5).log_prob(Y[:12]).sum() + log_prior
    expected.backward()
    for scale in (1e-4, 1e-10):
        guide = AutoMixture(model, 1, scale="fixed", init_scale=scale, init_loc_fn=initial)
        guide.initialize(X[:12], Y[:12])
        prediction = posterior_predictive(model, guide, (X,), num_samples=5)
        assert_close(prediction.mean, plain(X).squeeze(-1).expand(5, N), rtol=0, atol=100 * scale)
    net.zero_grad()
    elbo = Mixture_ELBO(kl_scale=0.0)
    loss = elbo.differentiable_loss(model, guide, X[:12], Y[:12])
    loss.backward()
    assert_close(loss, -expected, rtol=1e-8)
    for mine, theirs in ((net[0].weight, plain[0].weight), (net[2].weight, plain[2].weight)):
        assert_close(mine.grad, -theirs.grad, rtol=1e-6, atol=1e-7)


def test_delta_components_are_batch_ensemble():
    """The mean of the members' losses, and its gradients, by a loop over members written out."""
    K = 3
    net, model = rank1_model()
    guide = AutoMixture(model, K, lambda name, site: "point" if name == "sigma" else "delta").initialize(X, Y)
    loss = Mixture_ELBO().differentiable_loss(model, guide, X, Y)
    loss.backward()
    at = {site.name: loc.detach().clone().requires_grad_() for site, loc, _ in guide._blocks()}
    weights = [net[i].weight.detach().clone().requires_grad_() for i in (0, 2)]
    sigma = guide.points.sigma.detach()
    total = 0.0
    for k in range(K):
        v = {name: value[k] for name, value in at.items()}
        h = torch.tanh(((X * v["0.s"]) @ weights[0].mT) * v["0.r"] + v["0.bias"])
        f = ((h * v["2.s"]) @ weights[1].mT) * v["2.r"] + v["2.bias"]
        total = total + dist.Normal(f.squeeze(-1), sigma).log_prob(Y).sum()
        for name, value in v.items():
            prior = dist.Normal(0.0, 1.0) if name.endswith("bias") else dist.Normal(1.0, 0.1)
            total = total + prior.log_prob(value).sum()
    expected = -total / K - dist.LogNormal(-1.0, 0.5).log_prob(sigma)
    expected.backward()
    assert_close(loss, expected, rtol=1e-10)
    order = [site.name for site, _, _ in guide._blocks()]
    (mine,) = (p.grad for n, p in guide.named_parameters() if n.startswith("loc"))
    assert_close(mine, torch.cat([at[n].grad.flatten(1) for n in order], -1), rtol=1e-9, atol=1e-12)
    for layer, weight in zip((net[0], net[2]), weights, strict=True):
        assert_close(layer.weight.grad, weight.grad, rtol=1e-9, atol=1e-12)


def test_one_component_reaches_the_evidence_of_a_factorised_posterior():
    x = torch.linalg.qr(X).Q * 5  # orthogonal columns: the exact posterior is a product of Normals
    guide = AutoMixture(linear_model, 1, init_scale=0.1).initialize(x, Y)
    elbo = Mixture_ELBO(num_particles=32)
    run(guide, elbo, linear_model, x, Y, 1500, lr=0.01)
    values = torch.tensor([-elbo.loss(linear_model, guide, x, Y) for _ in range(200)])
    assert_close(values.mean(), log_evidence(x, Y), rtol=0, atol=0.05)
    precision = torch.eye(D) + x.T @ x / 0.25
    _, loc, scale = next(guide._blocks())
    assert_close(loc[0], torch.linalg.solve(precision, x.T @ Y / 0.25), rtol=0, atol=0.02)
    assert_close(scale[0], precision.inverse().diagonal().sqrt(), rtol=0.1)


def test_order_of_the_bounds():
    guide = AutoMixture(linear_model, 4, init_scale=0.5).initialize(X, Y)
    kls = {}
    for kl in ("mean", "sum", "exact"):
        elbo = Mixture_ELBO(kl=kl, num_particles=2000)
        elbo.loss(linear_model, guide, X, Y)
        kls[kl] = elbo.parts["kl"]
    assert_close(kls["sum"], 4 * kls["mean"])
    assert 0.05 < kls["mean"] - kls["exact"] < math.log(4)
    assert not Mixture_ELBO("log_mixture", "mean").is_bound
    assert Mixture_ELBO("log_mixture", "sum").is_bound
    assert not Mixture_ELBO(kl_scale=0.5).is_bound
    assert not Mixture_ELBO(entropy_weight=0.1).is_bound


def test_density_outside_the_bound_is_the_joint_mixture():
    guide = AutoMixture(linear_model, 2, init_scale=0.3).initialize(X, Y)
    trace = poutine.trace(guide).get_trace(X, Y)
    w = trace.nodes["w"]["value"]
    components = [_at(guide.component_distributions()["w"], k).log_prob(w) for k in range(2)]
    assert_close(trace.log_prob_sum(), torch.stack(components).logsumexp(0) - math.log(2))
    # importance weights average to the evidence
    guide2 = AutoMixture(linear_model, 2, init_scale=0.1).initialize(X, Y)
    run(guide2, Mixture_ELBO(num_particles=8), linear_model, X, Y, 800)
    with torch.no_grad(), pyro.plate("draws", 50_000, dim=-2):
        gt = poutine.trace(guide2).get_trace(X, Y)
        mt = poutine.trace(poutine.replay(linear_model, trace=gt)).get_trace(X, Y)
    gt.compute_log_prob()
    mt.compute_log_prob()
    latent = next(n for n in gt.nodes if n.startswith("_") and n.endswith("_latent"))
    log_w = mt.nodes["obs"]["log_prob"].sum(-1) + mt.nodes["w"]["log_prob"].squeeze(-1)
    log_w = log_w - gt.nodes[latent]["log_prob"].squeeze(-1)
    assert_close(log_w.logsumexp(0) - math.log(50_000), log_evidence(X, Y), rtol=0, atol=0.03)


@pytest.mark.parametrize("num_components", [1, 3])
def test_stock_pyro(num_components):
    _, model = rank1_model()
    guide = AutoMixture(model, num_components, rest="normal").initialize(X, Y)
    for elbo in (Mixture_ELBO(), Trace_ELBO(), TraceMeanField_ELBO()):
        svi = SVI(model, guide, Adam({"lr": 1e-2}), elbo)
        before = guide.loc.detach().clone()
        assert all(math.isfinite(svi.step(X, Y)) for _ in range(3))
        assert (guide.loc != before).any()
    predictive = Predictive(model, guide=guide, num_samples=7)
    assert predictive(X[:5])["obs"].shape[:1] == (7,)


def test_stock_svi_initialises_the_guide_and_keeps_what_is_frozen():
    net = nn.Sequential(nn.Linear(D, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))
    net[3].weight.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for freeze in (True, False):
        pyro.clear_param_store()
        made = rank1_(copy.deepcopy(net), freeze_base=freeze)

        def model(x, y=None, made=made):
            f = made(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

        guide = AutoMixture(model, 2)
        svi = SVI(model, guide, Adam({"lr": 0.1}), Mixture_ELBO())
        assert all(math.isfinite(svi.step(X, Y)) for _ in range(3))
        moved = {n for n, p in made.named_parameters() if (p != before[n]).any()}
        assert moved == (set() if freeze else {"0.weight", "1.weight", "1.bias"})
        assert guide.loc.std(0).max() > 0.05


def test_two_guides_do_not_share_parameters():
    first = AutoMixture(linear_model, 2).initialize(X, Y)
    svi = SVI(linear_model, first, Adam({"lr": 0.1}), Mixture_ELBO())
    for _ in range(5):
        svi.step(X, Y)
    second = AutoMixture(linear_model, 2).initialize(X, Y)
    start = second.loc.detach().clone()
    SVI(linear_model, second, Adam({"lr": 1e-8}), Mixture_ELBO()).step(X, Y)
    assert_close(second.loc, start, rtol=0, atol=1e-6)


def test_guide_list_with_a_subset_of_the_sites():
    _, model = rank1_model()
    guide = AutoGuideList(model)
    guide.append(AutoMixture(poutine.block(model, hide=["sigma"]), 3))
    guide.append(AutoDelta(poutine.block(model, expose=["sigma"])))
    guide(X, Y)
    elbo = Mixture_ELBO()
    losses = run(guide, elbo, model, X, Y, 200)
    assert losses[-20:].mean() < losses[:20].mean()
    assert guide[0].num_components == 3


def test_sample_posterior_is_stratified_and_shares_the_index():
    guide = AutoMixture(linear_model, 4, "delta", init_loc_fn=lambda site: torch.randn(D)).initialize(X, Y)
    draws = guide.sample_posterior((2, 6))["w"].reshape(12, D)
    counts = (draws[:, None, :] == guide.loc[None]).all(-1).sum(0)
    assert_close(counts, torch.full((4,), 3))
    free = guide.sample_posterior((400,), stratified=False)["w"]
    counts = (free[:, None, :] == guide.loc[None]).all(-1).sum(0)
    assert counts.sum() == 400
    assert (counts > 60).all()


@pytest.mark.parametrize("component", ["normal", "cauchy", "lognormal", "delta"])
def test_quantiles(component):
    def model():
        pyro.sample("z", dist.LogNormal(0.0, 1.0) if component == "lognormal" else dist.Normal(0.0, 1.0))

    guide = AutoMixture(model, 3, component, init_scale=0.5).initialize()
    levels = [0.1, 0.5, 0.9]
    quantiles = guide.quantiles(levels)["z"]
    draws = guide.sample_posterior((30_000,))["z"]
    for q, value in zip(levels, quantiles, strict=True):
        assert_close((draws <= value).double().mean(), q, rtol=0, atol=0.01 if component != "delta" else 0.3)
    assert_close(guide.median()["z"], quantiles[1])


def test_state_dict_round_trip():
    _, model = rank1_model()
    guide = AutoMixture(model, 2).initialize(X, Y)
    run(guide, Mixture_ELBO(), model, X, Y, 3)
    fresh = AutoMixture(model, 2).initialize(X, Y)
    fresh.load_state_dict(guide.state_dict())
    pyro.set_rng_seed(5)
    a = guide.sample_posterior((4,))
    pyro.set_rng_seed(5)
    b = fresh.sample_posterior((4,))
    for name in a:
        assert_close(a[name], b[name], rtol=0, atol=0)


def test_per_site_families():
    _, model = rank1_model()
    guide = AutoMixture(model, 2, {"0.*": "cauchy", "sigma": "normal", "bias": "delta"}).initialize(X, Y)
    kinds = {site.name: site.kind for site in guide.sites}
    assert kinds == {
        "sigma": "normal",
        "0.s": "cauchy",
        "0.r": "cauchy",
        "0.bias": "delta",
        "2.s": "normal",
        "2.r": "normal",
        "2.bias": "delta",
    }
    assert (guide.sample_posterior((50,))["sigma"] > 0).all()


def test_clear_errors():
    with pytest.raises(ValueError, match="unknown component family 'gauss'"):
        AutoMixture(linear_model, 2, "gauss")
    with pytest.raises(ValueError, match="num_components must be an integer of at least 1, found 0"):
        AutoMixture(linear_model, 0)
    with pytest.raises(ValueError, match=r"'obs' is latent inside a plate.*initialize\(x, y\)"):
        AutoMixture(linear_model, 2).initialize(X)
    with pytest.raises(ValueError, match=r"keys \['v'\] that match no site"):
        AutoMixture(linear_model, 2, {"v": "delta"}).initialize(X, Y)
    with pytest.raises(ValueError, match=r"'sigma' has support.*Cauchy"):
        AutoMixture(rank1_model()[1], 2, {"sigma": "cauchy"}).initialize(X, Y)
    with pytest.raises(ValueError, match="likelihood must be"):
        Mixture_ELBO("mean")
    with pytest.raises(ValueError, match="kl must be"):
        Mixture_ELBO(kl="min")

    def two(x, y=None):
        pyro.sample("v", dist.Normal(0.0, 1.0))
        linear_model(x, y)

    for numbers in ([2, 2], [1, 3], [1, 1]):
        guide = AutoGuideList(two)
        guide.append(AutoMixture(poutine.block(two, expose=["v"]), numbers[0]))
        guide.append(AutoMixture(poutine.block(two, expose=["w"]), numbers[1]))
        guide(X, Y)
        if numbers == [1, 1]:
            assert math.isfinite(Mixture_ELBO().loss(two, guide, X, Y))
            continue
        # drawn one after the other, they would draw different components
        with pytest.raises(ValueError, match=rf"mixtures of \[{numbers[0]}, {numbers[1]}\] components"):
            Mixture_ELBO().loss(two, guide, X, Y)
    guide = AutoMixture(linear_model, 2).initialize(X, Y)
    with pytest.raises(ValueError, match="site 'obs' of the model is missing from the guide"):
        Mixture_ELBO(max_plate_nesting=1).loss(linear_model, guide, X)


@pytest.mark.parametrize("kl", ["mean", "sum"])
@pytest.mark.parametrize("component", ["normal", "low_rank"])
@pytest.mark.parametrize("other", [AutoNormal, AutoDiagonalNormal])
def test_guides_of_other_sites_count_once(kl, component, other):
    """A Gaussian of Pyro on a constrained site (its Jacobian included), a point estimate, and a mixture, in one list."""
    K, S = 2, 3
    net, model = rank1_model()
    expose = poutine.block
    guide = AutoGuideList(model)
    guide.append(AutoMixture(expose(model, hide=["sigma", "0.bias", "2.bias"]), K, component, init_scale=0.2))
    guide.append(other(expose(model, expose=["sigma"]), init_scale=0.3))
    guide.append(AutoDelta(expose(model, expose=["0.bias", "2.bias"])))
    guide(X, Y)
    elbo = Mixture_ELBO(kl=kl, kl_scale=0.7, num_particles=S, max_plate_nesting=1)
    pyro.set_rng_seed(2)
    loss = elbo.loss(model, guide, X, Y)
    pyro.set_rng_seed(2)
    _, trace = elbo._get_trace(model, guide, (X, Y), {})
    shapes = {n: s["value"].shape for n, s in poutine.trace(net).get_trace(X).iter_stochastic_nodes()} | {
        "sigma": ()
    }
    values = {
        n: trace.nodes[n]["value"].expand(S, K, 1, *shape).reshape(S, K, *shape)
        for n, shape in shapes.items()
    }
    factors = [n for n in shapes if n.endswith((".r", ".s"))]
    names = [n for n, _ in guide[1].named_parameters()]
    loc, scale = (p.detach().flatten()[0] for p in _locations(guide[1], names))
    divergence, log_prior, fit = torch.zeros(K), 0.0, 0.0
    for s in range(S):
        for k in range(K):
            v = {n: value[s, k] for n, value in values.items()}
            with SubstituteMessenger(v):
                f = net(X).squeeze(-1)
            fit = fit + dist.Normal(f, v["sigma"]).log_prob(Y).sum() / (S * K)
            log_prior = log_prior + sum(
                dist.Normal(0.0, 1.0).log_prob(v[n]).sum() for n in shapes if "bias" in n
            ) / (S * K)
            each = dist.LogNormal(loc, scale).log_prob(v["sigma"]) - dist.LogNormal(-1.0, 0.5).log_prob(
                v["sigma"]
            )
            if component == "normal":
                for n in factors:
                    each = each + kl_divergence(
                        _at(guide[0].component_distributions()[n], k),
                        dist.Normal(1.0, 0.1).expand(shapes[n]).to_event(1),
                    )
            else:
                each = each + guide[0].component_log_prob(v)[k]
                each = each - sum(dist.Normal(1.0, 0.1).log_prob(v[n]).sum() for n in factors)
            divergence[k] += each.detach() / S
    total = divergence.mean() if kl == "mean" else divergence.sum()
    assert_close(loss, 0.7 * total - fit - log_prior, rtol=1e-9)


def _locations(guide, names):
    if isinstance(guide, AutoDiagonalNormal):
        return guide.loc, guide.scale
    return guide.locs.sigma, guide.scales.sigma
