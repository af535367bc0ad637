# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Predictive distributions of a Gaussian over the parameters of a likelihood, element by element as in the papers."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_bnn.infer.autoguide import AutoLaplace
from tests.common import assert_close

N = 4


def outputs_of(family, C, y):
    """The outputs of a linear model with C outputs, with a mean and a covariance of our own."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, C), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", family(x @ w), obs=y)

    x = torch.randn(N, 2)
    guide = AutoLaplace(model).initialize(x, y).laplace_approximation((x, y), map_tolerance=float("inf"))
    found = copy.copy(guide.linearized_outputs(x)["obs"])
    root = torch.randn(N, C, C)
    found.mean, found.covariance = 2 * torch.randn(N, C), root @ root.mT
    return found


def test_probit_of_a_binary_logit():
    found = outputs_of(lambda f: dist.Bernoulli(logits=f[..., 0]), 1, torch.tensor([0.0, 1.0, 1.0, 0.0]))
    for n in range(N):
        m, v = float(found.mean[n, 0]), float(found.covariance[n, 0, 0])
        expected = 1 / (1 + math.exp(-m / math.sqrt(1 + math.pi * v / 8)))
        assert_close(found.distribution("probit").probs[n], expected, rtol=1e-10)
    assert_close(found.distribution().probs, found.distribution("probit").probs, rtol=0)
    assert_close(found.variance[:, 0], found.covariance[:, 0, 0], rtol=0)
    probs = found.distribution("probit").probs
    found.mean, found.covariance = found.mean.view(2, 2, 1), found.covariance.view(2, 2, 1, 1)
    assert_close(found.distribution("probit").probs, probs.view(2, 2), rtol=1e-12)


@pytest.mark.parametrize("K", [2, 3, 5])
def test_probit_and_bridge_of_several_classes(K):
    found = outputs_of(lambda f: dist.Categorical(logits=f), K, torch.tensor([0, 1, 1, 0]))
    probit, bridge = found.distribution("probit").probs, found.bridge().concentration
    for n in range(N):
        m, S = found.mean[n], found.covariance[n]
        expected = torch.zeros(K)
        for k in range(K):
            total = 0.0
            for j in range(K):
                spread = S[k, k] + S[j, j] - 2 * S[k, j]
                total = total + ((m[j] - m[k]) / (1 + torch.pi / 8 * spread).sqrt()).exp()
            expected[k] = 1 / total
        assert_close(probit[n], expected / expected.sum(), rtol=1e-9)
        C = torch.eye(K) - 1 / K  # centres
        m, S = C @ m, C @ S @ C
        alpha = [
            (1 - 2 / K + m[k].exp() / K**2 * sum((-m[j]).exp() for j in range(K))) / S[k, k] for k in range(K)
        ]
        assert_close(bridge[n], torch.stack(alpha), rtol=1e-9)
        assert_close(found.distribution("bridge").probs[n], torch.stack(alpha) / sum(alpha), rtol=1e-9)
    assert_close(found.distribution().probs, probit, rtol=0)


def test_gaussian_likelihoods_add_their_variance():
    normal = outputs_of(lambda f: dist.Normal(f[..., 0], 0.7), 1, torch.randn(N))
    d = normal.distribution()
    assert_close(d.mean, normal.mean[:, 0], rtol=1e-12)
    assert_close(d.variance, normal.covariance[:, 0, 0] + 0.49, rtol=1e-10)
    normal.mean, normal.covariance = normal.mean.view(2, 2, 1), normal.covariance.view(2, 2, 1, 1)
    normal.site.base = dist.Normal(normal.mean[..., 0], 0.7)
    again = normal.distribution()
    assert again.batch_shape == (2, 2)
    assert_close(again.variance, d.variance.view(2, 2), rtol=1e-12)
    lognormal = outputs_of(lambda f: dist.LogNormal(f[..., 0], 0.7), 1, torch.rand(N))
    assert_close(lognormal.distribution().scale.square(), lognormal.covariance[:, 0, 0] + 0.49, rtol=1e-10)
    noise = torch.tensor([[1.0, 0.3], [0.3, 0.5]])
    vector = outputs_of(lambda f: dist.MultivariateNormal(f, noise), 2, torch.randn(N, 2))
    d = vector.distribution()
    assert_close(d.loc, vector.mean, rtol=1e-12)
    assert_close(d.covariance_matrix, vector.covariance + noise, rtol=1e-10)
    y = torch.randn(N, 2)
    expected = torch.distributions.MultivariateNormal(vector.mean, vector.covariance + noise).log_prob(y)
    assert_close(vector.log_density(y), expected, rtol=1e-10)
    assert_close(vector.log_density(y[0])[0], expected[0], rtol=1e-10)


def test_draws_have_the_mean_and_the_covariance():
    found = outputs_of(lambda f: dist.Categorical(logits=f), 3, torch.tensor([0, 1, 1, 0]))
    draws = found.sample((100, 200)).reshape(20_000, N, 3)
    for n in range(N):
        sd = found.variance[n].sqrt()
        assert ((draws[:, n].mean(0) - found.mean[n]).abs() < 5 * sd / 20_000**0.5).all()
        error = (draws[:, n].mT.cov() - found.covariance[n]).abs() / sd / sd[:, None]
        assert error.max() < 5 * (2 / 20_000) ** 0.5
    one, two = (found.sample((3,), generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert_close(one, two, rtol=0)
    mixture = found.distribution("monte_carlo", num_samples=7, generator=torch.Generator().manual_seed(2))
    again = found.sample((7,), generator=torch.Generator().manual_seed(2)).softmax(-1).mean(0)
    assert_close(mixture.log_prob(torch.arange(3)[:, None]).exp().mT, again, rtol=1e-9)


def test_methods_for_other_likelihoods_are_refused():
    normal = outputs_of(lambda f: dist.Normal(f[..., 0], 0.7), 1, torch.randn(N))
    bernoulli = outputs_of(lambda f: dist.Bernoulli(logits=f[..., 0]), 1, torch.ones(N))
    for found in (normal, bernoulli):
        with pytest.raises(ValueError, match="'bridge' needs a Categorical likelihood"):
            found.distribution("bridge")
    with pytest.raises(ValueError, match="'probit' needs a Bernoulli or Categorical likelihood"):
        normal.distribution("probit")
    with pytest.raises(ValueError, match="unknown method 'exact'"):
        normal.distribution("exact")


@pytest.mark.parametrize("structure", ["full", "diagonal"])
def test_rows_that_interact_in_large_batches_only(structure):
    """More than 1,500 rows see their mean: parts of the batch do not show it, the whole does."""
    torch.manual_seed(0)

    def loc(w, x):
        h = torch.tanh(x @ w)
        return h * (1 + h.mean()) if len(x) > 1500 else h

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(loc(w, x), 0.5), obs=y)

    x, y, x_new = torch.randn(20, 3), torch.randn(20), torch.randn(2000, 3)
    guide = AutoLaplace(model, structure=structure).initialize(x, y)
    guide.loc.data.copy_(w := torch.randn(3))
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))

    def precision():
        J = torch.autograd.functional.jacobian(lambda w: loc(w, x), w)
        P = J.mT @ J / 0.25 + torch.eye(3)
        return P if structure == "full" else P.diagonal().diag()

    J = torch.autograd.functional.jacobian(lambda w: loc(w, x_new), w)
    found = guide.linearized_outputs(x_new)["obs"]
    assert_close(found.mean[:, 0], loc(w, x_new), rtol=1e-10)
    assert_close(found.variance[:, 0], ((J @ precision().inverse()) * J).sum(-1), rtol=1e-8)


@pytest.mark.parametrize("family", [dist.Normal, dist.LogNormal])
def test_densities_of_observed_elements_are_marginals(family):
    """Of vectors of three elements, of which some are masked; the values of one observation serve all."""
    mask = torch.tensor(
        [[True, True, True], [True, False, True], [False, False, True], [False, False, False]]
    )

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", family(x @ w, 0.7).mask(mask).to_event(1), obs=y)

    x, y = torch.randn(N, 2), torch.rand(N, 3) + 0.5
    guide = AutoLaplace(model).initialize(x, y).laplace_approximation((x, y), map_tolerance=float("inf"))
    found = guide.linearized_outputs(x)["obs"]
    value = y[:1]
    logs = value[0] if family is dist.Normal else value[0].log()
    jacobian = torch.zeros(3) if family is dist.Normal else -logs
    expected = torch.zeros(N)
    for n in range(N):
        at = mask[n].nonzero().flatten()
        if len(at):
            S = found.event_covariance[n][at[:, None], at] + 0.49 * torch.eye(len(at))
            d = torch.distributions.MultivariateNormal(found.mean[n].reshape(3)[at], S)
            expected[n] = d.log_prob(logs[at]) + jacobian[at].sum()
    assert_close(found.log_density(value), expected, rtol=1e-9)
