# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""All objectives with random prior scales, several draws, minibatches and noise per example, in loops written out."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import kl_divergence

from pyro_bnn.infer import Mixture_ELBO
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.nn import HierarchicalPrior, rank1_
from tests.common import assert_close

K, S, B, N, D = 3, 2, 5, 20, 4


@pytest.mark.every(3)
@pytest.mark.parametrize("noise", ["shared", "per_example"])
@pytest.mark.parametrize("likelihood", ["average", "log_mixture"])
@pytest.mark.parametrize("kl", ["mean", "sum", "exact"])
@pytest.mark.parametrize(
    ("level", "hyperprior"),
    [
        ("global", lambda: dist.HalfCauchy(torch.tensor(0.2))),
        ("layer", lambda: dist.InverseGamma(torch.tensor(3.0), torch.tensor(0.1))),
        ("site", lambda: dist.HalfNormal(torch.tensor(0.2))),
    ],
)
def test_enumeration(level, hyperprior, kl, likelihood, noise):
    hyperprior = hyperprior()
    variance = isinstance(hyperprior, dist.InverseGamma)
    quantity = "variance" if variance else "scale"
    prior = HierarchicalPrior(hyperprior, variance=variance, level=level)
    net = rank1_(nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, 1)), prior=prior)

    def model(x, y=None):
        f = net(x).squeeze(-1)
        with pyro.plate("data", N, subsample_size=len(x)):
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    x, y = torch.randn(B, D), torch.randn(B)
    guide = AutoMixture(model, K, rest="normal", init_scale=0.1, noise=noise).initialize(x, y)
    elbo = Mixture_ELBO(
        likelihood, kl, kl_scale=0.7, num_particles=S, entropy_weight=0.3, max_plate_nesting=1
    )
    pyro.set_rng_seed(1)
    loss = elbo.loss(model, guide, x, y)
    pyro.set_rng_seed(1)
    _, trace = elbo._get_trace(model, guide, (x, y), {})
    blocks = {site.name: (site, loc, scale) for site, loc, scale in guide._blocks()}
    assert set(blocks) == {n for n, _ in trace.iter_stochastic_nodes() if not n.startswith("_")}
    values = {n: trace.nodes[n]["value"].reshape(S, K, -1, *site.shape) for n, (site, _, _) in blocks.items()}
    rows = {n: v.shape[2] for n, v in values.items()}
    assert {n for n in rows if rows[n] == B} == (
        {n for n in rows if n.endswith((".r", ".s"))} if noise == "per_example" else set()
    )

    def q(n, k):
        made = dist.LogNormal if n.endswith(quantity) else dist.Normal
        _, loc, scale = blocks[n]
        return made(loc[k], scale[k])

    def p(n, s, k):
        if n.endswith(quantity):
            return hyperprior
        if n.endswith("bias"):
            return dist.Normal(torch.zeros(()), torch.ones(()))
        key = {
            "global": f"factor_{quantity}",
            "layer": f"{n[0]}.factor_{quantity}",
            "site": f"{n}_{quantity}",
        }
        tau = values[key[level]][s, k, 0]
        return dist.Normal(torch.ones(()), tau.sqrt() if variance else tau)

    divergence, entropy, fit, information = torch.zeros(K), 0.0, torch.zeros(S, K, B), 0.0
    for s in range(S):
        for k in range(K):
            for n in blocks:
                if n.endswith(quantity):  # torch knows no divergence of these pairs
                    z = values[n][s, k, 0]
                    divergence[k] += (q(n, k).log_prob(z) - p(n, s, k).log_prob(z)) / S
                else:
                    divergence[k] += kl_divergence(q(n, k), p(n, s, k)).sum() / S
                entropy = entropy + q(n, k).entropy().sum() / (S * K)
            each = [sum(q(n, j).log_prob(values[n][s, k, 0]).sum() for n in blocks) for j in range(K)]
            information = information + (math.log(K) + torch.stack(each).log_softmax(0)[k]) / (S * K)
            for b in range(B):
                v = {n: value[s, k, b % rows[n]] for n, value in values.items()}
                h = torch.tanh((x[b] * v["0.s"]) @ net[0].weight.T * v["0.r"] + v["0.bias"])
                f = (h * v["2.s"]) @ net[2].weight.T * v["2.r"] + v["2.bias"]
                fit[s, k, b] = dist.Normal(f.squeeze(), 0.5).log_prob(y[b])
    if likelihood == "average":
        expected = fit.sum(-1).mean()
    else:
        expected = (fit.logsumexp(1) - math.log(K)).sum(-1).mean()
    total = {"mean": divergence.mean(), "sum": divergence.sum(), "exact": divergence.mean() - information}[kl]
    if kl == "exact":
        entropy = entropy + information
    assert_close(loss, 0.7 * total - N / B * expected - 0.3 * entropy, rtol=1e-9)
