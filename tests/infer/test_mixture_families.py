# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Low-rank and constrained components, noise per example, scales, indices, split batches, entropy weights."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.distributions import kl_divergence

from pyro_bnn.infer import Mixture_ELBO, posterior_predictive
from pyro_bnn.infer.autoguide import AutoMixture, dropout_scale, init_to_normal, init_to_random_sign
from pyro_bnn.infer.mixture.schedules import CosineAnnealing, CyclicalAnnealing, LinearAnnealing
from pyro_bnn.nn import init_to_trained, rank1_
from tests.common import assert_close
from tests.contracts.posterior import LinearGaussian
from tests.infer.test_mixture import D, N, X, Y, linear_model, rank1_model, run


def test_low_rank_component_holds_a_correlated_posterior():
    x = X @ torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.5, 0.0], [0.3, 0.0, 1.0]])
    exact = LinearGaussian(x, Y, 0.5, 1.0)
    assert exact.covariance[0, 1].abs() > 0.5 * (exact.covariance[0, 0] * exact.covariance[1, 1]).sqrt()
    guide = AutoMixture(linear_model, 1, "low_rank", rank=D, init_scale=0.1).initialize(x, Y)
    elbo = Mixture_ELBO(num_particles=32)
    for lr in (0.03, 0.01, 0.002):
        run(guide, elbo, linear_model, x, Y, 150, lr=lr)
    found = torch.distributions.MultivariateNormal(
        guide._low_rank().loc[0], guide._low_rank().covariance_matrix[0]
    )
    posterior = torch.distributions.MultivariateNormal(exact.mean, exact.covariance)
    best = torch.distributions.MultivariateNormal(
        exact.mean, precision_matrix=exact.precision.diagonal().diag()
    )
    assert kl_divergence(found, posterior) < 0.05 * kl_divergence(best, posterior)  # of independent sites
    # at the posterior itself every single draw gives the evidence
    variance, vectors = torch.linalg.eigh(exact.covariance)
    noise = 0.5 * variance[0]
    with torch.no_grad():
        guide.loc.copy_(exact.mean)
        guide.cov_factor.copy_(vectors * (variance - noise).sqrt())
    guide.scale = noise.sqrt().expand(1, D)
    for _ in range(3):
        assert_close(-elbo.loss(linear_model, guide, x, Y), exact.log_evidence, rtol=1e-9)
    draws = guide.sample_posterior((50_000,))["w"]
    assert_close(draws.T.cov(), exact.covariance, rtol=0, atol=0.03 * float(exact.covariance.max()))
    q = guide.quantiles([0.16, 0.84])["w"]
    assert_close((q[1] - q[0]) / 2, exact.covariance.diagonal().sqrt(), rtol=0.01)


def test_low_rank_over_the_factors_of_a_network():
    _, model = rank1_model()
    guide = AutoMixture(model, 3, "low_rank", rank=4).initialize(X, Y)
    kinds = {site.name: site.kind for site in guide.sites}
    assert {kinds[n] for n in ("0.r", "0.s", "2.r", "2.s")} == {"low_rank"}
    assert kinds["0.bias"] == "delta"
    assert guide.cov_factor.shape == (3, D + 4 + 4 + 1, 4)
    for kl in ("mean", "exact"):
        elbo = Mixture_ELBO(kl=kl, num_particles=3)
        assert run(guide, elbo, model, X, Y, 5).isfinite().all()
        # biases stay MAP terms beside the auxiliary site
        bias = guide.component_distributions()["2.bias"].sample()
        first = guide.component_distributions()["0.bias"].sample()
        sigma = guide.component_distributions()["sigma"].sample()
        expected = dist.Normal(0.0, 1.0).log_prob(bias).sum(-1) + dist.Normal(0.0, 1.0).log_prob(first).sum(
            -1
        )
        expected = expected + dist.LogNormal(-1.0, 0.5).log_prob(sigma)
        elbo.loss(model, guide, X, Y)
        assert_close(elbo.parts["log_prior"], expected.mean().detach())
    trace = poutine.trace(guide).get_trace(X, Y)
    assert torch.isfinite(trace.log_prob_sum())


@pytest.mark.parametrize("kl", ["mean", "exact"])
def test_low_rank_kl_is_unbiased(kl):
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    guide = AutoMixture(model, 2, "low_rank", rank=2, init_scale=0.6).initialize()
    elbo = Mixture_ELBO(kl=kl, num_particles=20_000, max_plate_nesting=0)
    elbo.loss(model, guide)
    joint = guide._low_rank()
    prior = dist.MultivariateNormal(torch.zeros(3), torch.eye(3))
    components = [dist.MultivariateNormal(joint.loc[k], joint.covariance_matrix[k]) for k in range(2)]
    if kl == "mean":
        expected = sum(kl_divergence(c, prior) for c in components) / 2
    else:
        draws = [c.sample((200_000,)) for c in components]
        log_q = [torch.stack([c.log_prob(d) for c in components]).logsumexp(0) - math.log(2) for d in draws]
        expected = sum((q - prior.log_prob(d)).mean() for q, d in zip(log_q, draws, strict=True)) / 2
    assert_close(elbo.parts["kl"], expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("kl", ["mean", "exact"])
def test_noise_per_example_has_the_same_expectation(kl):
    _, model = rank1_model()
    shared = AutoMixture(model, 2, init_scale=0.2).initialize(X, Y)
    each = AutoMixture(model, 2, init_scale=0.2, noise="per_example").initialize(X, Y)
    each.load_state_dict(shared.state_dict())
    values = {}
    for name, guide in (("shared", shared), ("each", each)):
        elbo = Mixture_ELBO(kl=kl, num_particles=50)
        with torch.no_grad():
            losses = torch.tensor([elbo.loss(model, guide, X, Y) for _ in range(60)])
        values[name] = losses.mean(), losses.std() / 60**0.5
        values[name + " kl"] = elbo.parts["kl"]
    error = (values["shared"][1] ** 2 + values["each"][1] ** 2).sqrt()
    assert (values["shared"][0] - values["each"][0]).abs() < 4 * error
    assert values["each"][1] < values["shared"][1]
    assert_close(values["each kl"], values["shared kl"], rtol=0, atol=1e-10 if kl == "mean" else 0.1)


def test_noise_per_example_counts_a_monte_carlo_kl_once():
    prior = dist.StudentT(4.0, 1.0, 0.2)  # no closed form against a Normal
    _, model = rank1_model(prior)
    kls = {}
    for noise in ("shared", "per_example"):
        pyro.set_rng_seed(1)
        guide = AutoMixture(model, 2, init_scale=0.1, noise=noise).initialize(X, Y)
        elbo = Mixture_ELBO(num_particles=400)
        elbo.loss(model, guide, X, Y)
        kls[noise] = elbo.parts["kl"]
    assert_close(kls["per_example"], kls["shared"], rtol=0, atol=0.25)
    assert kls["shared"] > 1.0


def test_noise_per_example_counts_a_monte_carlo_entropy_once():
    _, model = rank1_model(
        dist.Beta(torch.full((), 20.0), 5.0)
    )  # the entropy of its components has no closed form
    entropies = {}
    for noise in ("shared", "per_example"):
        pyro.set_rng_seed(1)
        guide = AutoMixture(model, 2, init_scale=0.1, noise=noise).initialize(X, Y)
        elbo = Mixture_ELBO(num_particles=400, entropy_weight=0.1)
        elbo.loss(model, guide, X, Y)
        entropies[noise] = elbo.parts["entropy"]
    assert_close(entropies["per_example"], entropies["shared"], rtol=0.02)
    assert entropies["shared"] < -20


def test_fixed_and_shared_scales():
    _, model = rank1_model()
    for mode, number in (("free", 12), ("shared", 4), ("fixed", 0)):
        guide = AutoMixture(model, 2, scale=mode, init_scale=0.07).initialize(X, Y)
        trainable = sum(p.numel() for n, p in guide.named_parameters() if n.startswith("scale"))
        assert trainable == 2 * number
        before = {
            n: d.base_dist.scale.clone()
            for n, d in guide.component_distributions().items()
            if n.endswith("r")
        }
        assert_close(before["0.r"], torch.full((2, 4), 0.07))
        run(guide, Mixture_ELBO(), model, X, Y, 3)
        after = guide.component_distributions()["0.r"].base_dist.scale
        if mode == "fixed":
            assert_close(after, before["0.r"])
        elif mode == "shared":
            assert_close(after, after[:, :1].expand(2, 4), rtol=1e-12)
            assert (after != before["0.r"]).all()
        fresh = AutoMixture(model, 2, scale=mode).initialize(X, Y)
        fresh.load_state_dict(guide.state_dict())
        assert_close(fresh.component_distributions()["0.r"].base_dist.scale, after)


def test_initialisers():
    _, model = rank1_model()
    guide = AutoMixture(model, 500, init_loc_fn=init_to_random_sign(probability=0.75)).initialize(X, Y)
    r = guide.component_distributions()["0.r"].base_dist.loc
    assert_close(r.abs(), torch.ones_like(r))
    assert_close((r > 0).double().mean(), 0.75, rtol=0, atol=0.04)
    guide = AutoMixture(model, 500, init_loc_fn=init_to_normal(loc=1.0, scale=0.3)).initialize(X, Y)
    r = guide.component_distributions()["0.r"].base_dist.loc
    assert_close(torch.stack([r.mean(), r.std()]), [1.0, 0.3], rtol=0, atol=0.03)
    assert_close(dropout_scale(0.2), 0.5)
    trained = nn.Linear(D, 1)
    net = rank1_(nn.Sequential(trained))

    def model(x, y=None):
        f = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, 1.0), obs=y)

    guide = AutoMixture(model, 2, init_loc_fn=init_to_trained).initialize(X, Y)
    bias = net[0]._sites["bias"].init
    assert_close(guide.component_distributions()["0.bias"].sample(), bias.expand(2, 1))


def test_component_index_reaches_the_normalisation():
    K = 3
    net = rank1_(
        nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)),
        batchnorm="component", num_components=K,
    )  # fmt: skip

    def model(x, y=None):
        f = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, 1.0), obs=y)

    guide = AutoMixture(model, K).initialize(X, Y)
    elbo = Mixture_ELBO()
    run(guide, elbo, model, X, Y, 20)
    _, trace = elbo._get_trace(model, guide, (X, Y), {})
    assert_close(trace.nodes["1.component"]["value"].flatten(), torch.arange(K))
    draws = guide.sample_posterior((9,))
    index = draws["1.component"]
    assert_close(index.bincount(), torch.full((K,), 3))
    bias = guide.component_distributions()["0.bias"].sample()
    assert_close(draws["0.bias"], bias[index])
    net.eval()
    pyro.set_rng_seed(1)
    loss = elbo.loss(model, guide, X, Y)
    before = posterior_predictive(model, guide, (X,), draws=draws).mean
    with torch.no_grad():
        for module in net.modules():
            if hasattr(module, "running_mean"):
                module.running_mean[1] += 5.0  # component 1 alone sees this
    after = posterior_predictive(model, guide, (X,), draws=draws).mean
    assert_close(after[index != 1], before[index != 1], rtol=1e-12)
    assert (after[index == 1] - before[index == 1]).abs().amax(-1).min() > 0.01
    pyro.set_rng_seed(1)
    assert abs(elbo.loss(model, guide, X, Y) - loss) > 0.01
    trace = poutine.trace(guide).get_trace(X, Y)
    k = trace.nodes["1.component"]["value"]
    assert_close(trace.nodes["0.bias"]["value"], bias[k])
    with pytest.raises(ValueError, match=r"'1\.component' distinguishes 3 components, but the guide has 2"):
        AutoMixture(model, 2).initialize(X, Y)


def test_split_batches_are_unbiased():
    _, model = rank1_model()
    guide = AutoMixture(model, 3).initialize(X, Y)
    with pytest.raises(ValueError, match="'sigma' lies outside the converted network"):
        Mixture_ELBO(batch="split").loss(model, guide, X, Y)
    guide = AutoMixture(model, 3, {"sigma": "point"}, init_scale=1e-6).initialize(X, Y)
    full, split = Mixture_ELBO(max_plate_nesting=1), Mixture_ELBO(batch="split", max_plate_nesting=1)
    expected = full.loss(model, guide, X, Y)
    # every rotation of the batch over the components: each example meets each of them once
    rotations = [torch.arange(N).roll(s) for s in range(0, N, N // 3)]
    losses = [split.loss(model, guide, X[o], Y[o]) for o in rotations]
    assert_close(sum(losses) / 3, expected, rtol=1e-5)
    assert max(losses) - min(losses) > 0.1
    with pytest.raises(ValueError, match="needs likelihood='average'"):
        Mixture_ELBO("log_mixture", batch="split")


def test_entropy_weight():
    _, model = rank1_model()
    guide = AutoMixture(model, 2, rest="normal", init_scale=0.3).initialize(X, Y)
    elbo = Mixture_ELBO(entropy_weight=0.5, max_plate_nesting=1)
    pyro.set_rng_seed(0)
    weighted = elbo.loss(model, guide, X, Y)
    pyro.set_rng_seed(0)
    plain = Mixture_ELBO(max_plate_nesting=1).loss(model, guide, X, Y)
    entropy = sum(d.entropy() for d in guide.component_distributions().values()).mean()
    assert_close(plain - weighted, 0.5 * entropy)


def test_schedules():
    _, model = rank1_model()
    guide = AutoMixture(model, 2).initialize(X, Y)
    elbo = Mixture_ELBO(kl_scale=LinearAnnealing(4))
    scales = []
    module = elbo(model, guide)
    for _ in range(6):
        module(X, Y)
        scales.append(elbo.parts["kl_scale"])
    assert scales == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    elbo.loss(model, guide, X, Y)  # evaluation does not advance the schedule
    assert elbo.step == 6
    assert not Mixture_ELBO(kl_scale=LinearAnnealing(4)).is_bound
    assert elbo.is_bound
    assert CosineAnnealing(10, 0.5)(100) == 0.5
    cyclical = CyclicalAnnealing(100, num_cycles=2)
    assert cyclical(0) == cyclical(50) < cyclical(10) < cyclical(40) == 1.0
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        LinearAnnealing(0)


@pytest.mark.parametrize(
    ("prior", "component"),
    [
        (dist.LogNormal(0.0, 0.2), "lognormal"),
        (dist.LogNormal(0.0, 0.2), "normal"),
        (dist.HalfCauchy(1.0), "lognormal"),
        (dist.Cauchy(1.0, 0.1), "normal"),
        (dist.Normal(1.0, 0.1), "cauchy"),
        (dist.StudentT(3.0, 1.0, 0.1), "low_rank"),
    ],
)
def test_priors_and_families_combine(prior, component):
    _, model = rank1_model(prior)
    guide = AutoMixture(model, 2, component, init_scale=0.05).initialize(X, Y)
    for kl in ("mean", "sum", "exact"):
        for noise in ("shared", "per_example"):
            guide.noise = noise if component != "low_rank" else "shared"
            losses = run(guide, Mixture_ELBO(kl=kl, num_particles=2), model, X, Y, 4, lr=1e-3)
            assert losses.isfinite().all()
    if isinstance(prior, (dist.LogNormal, dist.HalfCauchy)):
        assert (guide.sample_posterior((20,))["0.r"] > 0).all()


def test_monte_carlo_kl_agrees_with_numerical_integration():
    def model():
        pyro.sample("z", dist.Cauchy(1.0, 0.5))

    guide = AutoMixture(
        model, 1, "normal", init_scale=0.3, init_loc_fn=lambda site: torch.tensor(0.8)
    ).initialize()
    elbo = Mixture_ELBO(num_particles=200_000, max_plate_nesting=0)
    elbo.loss(model, guide)
    z = torch.linspace(-2.0, 4.0, 20_001)
    q = dist.Normal(0.8, 0.3).log_prob(z)
    expected = torch.trapezoid(q.exp() * (q - dist.Cauchy(1.0, 0.5).log_prob(z)), z)
    assert_close(elbo.parts["kl"], expected, rtol=0, atol=0.01)


def test_components_that_would_stay_together():
    with pytest.warns(UserWarning, match="all 3 components start at the same values and have no noise"):
        AutoMixture(linear_model, 3, "delta", init_loc_fn=lambda site: torch.ones(D)).initialize(X, Y)
    _, model = rank1_model()
    with pytest.raises(ValueError, match=r"noise='per_example' is for.*those of '0\.[rs]' are low-rank"):
        AutoMixture(model, 3, "low_rank", noise="per_example").initialize(X, Y)


def test_component_plate_in_use():
    def model(x, y=None):
        with pyro.plate("_components", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=y)

    guide = AutoMixture(model, 2, component={"z": "normal"}).initialize(X[:, 0], Y)
    with pytest.raises(ValueError, match="a plate named '_components'"):
        Mixture_ELBO().loss(model, guide, X[:, 0], Y)


def test_network_called_inside_the_plate():
    net = rank1_(nn.Linear(D, 1))

    def model(x, y=None):
        with pyro.plate("data", N, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal(net(x).squeeze(-1), 1.0), obs=y)

    with pytest.raises(
        ValueError, match=r"'[rs]' of a layer is drawn inside the plate 'data'.*before the plate"
    ):
        AutoMixture(model, 2).initialize(X[:5], Y[:5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": "none"}, "scale must be"),
        ({"noise": "both"}, "noise must be"),
        ({"rank": 0}, "rank must be"),
        ({"init_scale": 0.0}, "init_scale must be positive"),
        ({"rest": "none"}, "unknown component family"),
    ],
)
def test_clear_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        AutoMixture(linear_model, 2, **arguments)
    with pytest.raises(ValueError, match="probability must lie"):
        init_to_random_sign(probability=2.0)
    with pytest.raises(ValueError, match="rate must lie"):
        dropout_scale(1.0)


def test_low_rank_components_of_constrained_sites():
    """The joint Gaussian lives in unconstrained space: densities and divergences carry the Jacobians."""

    def model():
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = AutoMixture(model, 2, "low_rank", rank=2, init_scale=0.4).initialize()
    joint = guide._low_rank()
    assert joint.event_shape == (1 + 2 + 2,)
    simplex = dist.constraints.simplex
    to_simplex = torch.distributions.biject_to(simplex)

    def log_q(v):
        raw = torch.cat([v["scale"].log().unsqueeze(-1), to_simplex.inv(v["share"]), v["slope"]], -1)
        order = {"scale": raw[..., :1], "share": raw[..., 1:3], "slope": raw[..., 3:]}
        raw = torch.cat([order[s.name] for s in guide._low_rank_sites()], -1)
        volume = v["scale"].log() + to_simplex.log_abs_det_jacobian(order["share"], v["share"])
        return joint.log_prob(raw.unsqueeze(-2)) - volume.unsqueeze(-1)

    def log_p(v):
        parts = (
            dist.LogNormal(0.0, 1.0).log_prob(v["scale"]),
            dist.Dirichlet(torch.ones(3)).log_prob(v["share"]),
        )
        return sum(parts) + dist.Normal(0.0, 1.0).log_prob(v["slope"]).sum(-1)

    draws = guide.sample_posterior((2, 20_000), by_component=True)
    assert_close(draws["share"].sum(-1), torch.ones(2, 20_000))
    assert_close(guide.component_log_prob(draws), log_q(draws), rtol=1e-9, atol=1e-9)
    each = log_q(draws)
    own = each.diagonal(dim1=0, dim2=2).T
    expected = {"mean": (own - log_p(draws)).mean()}
    expected["exact"] = (each.logsumexp(-1) - math.log(2) - log_p(draws)).mean()
    for kl, value in expected.items():
        elbo = Mixture_ELBO(kl=kl, num_particles=20_000, max_plate_nesting=0, entropy_weight=1.0)
        elbo.loss(model, guide)
        assert_close(elbo.parts["kl"], value.detach(), rtol=0, atol=0.03)
        entropy = -own.mean() if kl == "mean" else -(each.logsumexp(-1) - math.log(2)).mean()
        assert_close(elbo.parts["entropy"], entropy.detach(), rtol=0, atol=0.03)
    trace = poutine.trace(guide).get_trace()
    v = {n: trace.nodes[n]["value"] for n in draws}
    assert_close(trace.log_prob_sum(), log_q(v).logsumexp(-1) - math.log(2), rtol=1e-9)
    q = guide.quantiles([0.25, 0.75])["scale"]
    share = ((draws["scale"] > q[0]) & (draws["scale"] < q[1])).double().mean()
    assert_close(share, 0.5, rtol=0, atol=0.01)


def test_a_shared_value_under_a_prior_of_each_component():
    def model(y: torch.Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(0.0, scale.unsqueeze(-1).expand(*scale.shape, 2)).to_event(1))
        loc = w.sum(-1, keepdim=True).expand(*w.shape[:-1], len(y))
        pyro.sample(
            "obs", dist.Normal(loc, 1.0).to_event(1), obs=y
        )  # no plate, and so no dimension of size one

    y = torch.tensor([0.3, -1.0, 0.8])
    guide = AutoMixture(model, 2, {"w": "point", "scale": "lognormal"}, init_scale=1e-9).initialize(y)
    level, w = torch.tensor([-0.7, 1.1]), torch.tensor([0.4, -0.9])
    with torch.no_grad():
        guide.loc.copy_(level.unsqueeze(-1))
        guide.points.w.copy_(w)
    q = dist.LogNormal(level, torch.full((2,), 1e-9))
    prior = dist.Normal(0.0, level.exp().unsqueeze(-1)).log_prob(w).sum(-1).mean()
    bound = (
        dist.Normal(w.sum(), 1.0).log_prob(y).sum()
        + prior
        - kl_divergence(q, dist.LogNormal(0.0, 1.0)).mean()
    )
    assert_close(-Mixture_ELBO().loss(model, guide, y), bound, rtol=1e-6)
