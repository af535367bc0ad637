# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
The bound of a mixture against a loop over its components with plain Pyro handlers. Components are so narrow that their
draws are their locations; divergences and entropies are torch's.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from pyro import poutine

from pyro_bnn.infer import Mixture_ELBO
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.infer.mixture.terms import per_component
from tests.common import assert_close

N, TOTAL, NARROW = 5, 12, 1e-9
MASK = torch.tensor([True, False, True, True, False])


def model(x, y=None, z=None):
    """A hierarchy, latents in a plate, scales, masks, a subsampled plate and two observations of its points."""
    tau = pyro.sample("tau", dist.LogNormal(0.2, 0.5))
    w = pyro.sample("w", dist.Normal(torch.ones(3), 2.0).to_event(1))
    with poutine.scale(scale=0.3):
        v = pyro.sample("v", dist.Normal(torch.zeros(2), 0.7).to_event(1))
    with pyro.plate("groups", 3), poutine.mask(mask=torch.tensor([True, True, False])):
        g = pyro.sample("g", dist.Normal(0.5, tau))
    f = (x * w).sum(-1) + v.sum(-1) + g.mean(-1, keepdim=True)
    with pyro.plate("data", TOTAL, subsample_size=N), poutine.mask(mask=MASK):
        pyro.sample("obs", dist.Normal(f, 0.4), obs=y)
        pyro.sample("other", dist.Bernoulli(logits=f.sin()), obs=z)


DATA = (
    torch.linspace(-1, 1, 15, dtype=torch.float64).view(N, 3),
    torch.linspace(-2, 2, N, dtype=torch.float64),
    torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64),
)


def guide_of(K):
    guide = AutoMixture(model, K, "normal", init_scale=NARROW).initialize(*DATA)
    for i, value in enumerate(guide.parameters()):
        if value.dim() and i % 2 == 0:
            value.data = value.data + torch.linspace(-0.3, 0.4, value.numel()).view(value.shape)
    return guide


class Loop:
    """By component: log likelihoods of the points, and by site divergences and entropies."""

    def __init__(self, guide, K):
        self.points, self.kl, self.entropy = [], [], []
        for k in range(K):
            q, values = {}, {}
            for site, loc, scale in guide._blocks():
                loc, scale = loc.detach()[k], scale.detach()[k]
                q[site.name] = td.Normal(loc.reshape(site.shape), scale.reshape(site.shape))
                values[site.name] = q[site.name].loc.exp() if site.name == "tau" else q[site.name].loc
            trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*DATA)
            trace.compute_log_prob()
            nodes = trace.nodes
            self.points.append(sum(nodes[n]["unscaled_log_prob"] * MASK for n in ("obs", "other")))
            self.scale = nodes["obs"]["scale"]
            kl = entropy = 0.0
            for name, factor in (("tau", 1.0), ("w", 1.0), ("v", 0.3), ("g", torch.tensor([1.0, 1.0, 0.0]))):
                prior = nodes[name]["fn"]
                while hasattr(prior, "base_dist") and name != "tau":
                    prior = prior.base_dist
                if name == "tau":
                    prior = td.Normal(prior.loc, prior.scale)
                    entropy = entropy + (q[name].entropy() + q[name].loc).sum()  # of a LogNormal
                else:
                    entropy = entropy + (factor * q[name].entropy()).sum()
                kl = kl + (factor * td.kl_divergence(q[name], td.Normal(prior.loc, prior.scale))).sum()
            self.kl.append(kl)
            self.entropy.append(entropy)
        self.points = torch.stack(self.points)
        self.kl, self.entropy = torch.stack(self.kl), torch.stack(self.entropy)


@pytest.mark.every(3)
@pytest.mark.parametrize("num_particles", [1, 2])
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("kl", ["mean", "sum", "exact"])
@pytest.mark.parametrize("likelihood", ["average", "log_mixture"])
@pytest.mark.parametrize("validation", [True, False])
def test_the_bound_is_that_of_a_loop_over_components(likelihood, kl, K, num_particles, validation):
    guide = guide_of(K)
    loop = Loop(guide, K)
    elbo = Mixture_ELBO(
        likelihood, kl, num_particles=num_particles, kl_scale=0.7, entropy_weight=0.2 if kl != "sum" else 0.0
    )
    with pyro.validation_enabled(validation):
        loss = elbo.differentiable_loss(model, guide, *DATA)
    if likelihood == "average":
        expected = loop.scale * loop.points.sum(-1).mean()
    else:
        expected = loop.scale * (loop.points.logsumexp(0) - math.log(K)).sum()
    assert_close(elbo.parts["expected_log_likelihood"], expected, rtol=1e-6)
    information = math.log(K) if kl == "exact" else 0.0  # which component drew can be told for sure
    divergence = loop.kl.sum() if kl == "sum" else loop.kl.mean() - information
    assert_close(elbo.parts["kl"], divergence, rtol=1e-9)
    entropy = loop.entropy.mean() + information if kl != "sum" else torch.zeros(())
    if kl != "sum":
        assert_close(elbo.parts["entropy"], entropy, rtol=1e-9)
    assert_close(loss.detach(), 0.7 * divergence - expected - 0.2 * entropy, rtol=1e-6)
    assert elbo.step == 1
    with torch.no_grad():
        elbo.differentiable_loss(model, guide, *DATA)
    assert elbo.step == 1


def test_information_is_nothing_where_components_are_alike():
    guide = AutoMixture(model, 3, "normal", init_scale=0.5).initialize(*DATA)
    for value in guide.parameters():
        if value.dim() and len(value) == 3:
            value.data = value.data[:1].expand_as(value).clone()
    exact, mean = Mixture_ELBO(kl="exact"), Mixture_ELBO(kl="mean")
    exact.loss(model, guide, *DATA)
    mean.loss(model, guide, *DATA)
    # analytic terms do not depend on the draws, but the hierarchy's do
    pyro.set_rng_seed(3)
    exact.loss(model, guide, *DATA)
    pyro.set_rng_seed(3)
    mean.loss(model, guide, *DATA)
    assert_close(exact.parts["kl"], mean.parts["kl"], rtol=1e-9)


@pytest.mark.parametrize("kl", ["mean", "sum", "exact"])
@pytest.mark.parametrize("likelihood", ["average", "log_mixture"])
@pytest.mark.parametrize(("scale", "weight"), [(1.0, 0.0), (0.5, 0.0), (2.0, 0.0), (1.0, 0.1)])
def test_what_is_a_bound(likelihood, kl, scale, weight):
    elbo = Mixture_ELBO(likelihood, kl, kl_scale=scale, entropy_weight=weight)
    expected = scale >= 1 and weight == 0 and (likelihood == "average" or kl == "sum")
    assert elbo.is_bound == expected


@pytest.mark.parametrize("nesting", [0, 1, 2])
@pytest.mark.parametrize(("S", "K"), [(1, 1), (1, 3), (4, 1), (4, 3)])
def test_terms_are_summed_over_plates_only(S, K, nesting):
    plates = (5, 2)[:nesting]
    value = torch.randn(S, K, *plates)
    expected = value.reshape(S, K, -1).sum(-1)
    assert_close(per_component(value, S, K, nesting), expected, rtol=1e-12)
    if S * K > 1:
        shared = value[0]  # the same for all particles
        assert_close(per_component(shared, S, K, nesting).expand(S, K), expected[:1].expand(S, K), rtol=1e-12)
        if nesting:
            one = torch.randn(plates)  # and for all components
            assert_close(per_component(one, S, K, nesting).expand(S, K), one.sum().expand(S, K), rtol=1e-12)
