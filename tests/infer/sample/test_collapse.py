# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Densities with Gaussian latents integrated out, against closed forms of plain torch and quadrature."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn
from torch.distributions import MultivariateNormal, Normal

from pyro_bnn import AutoLaplace, bayesian_
from pyro_bnn.infer import Checkpoint, log_density, mclmc
from pyro_bnn.infer.sample.collapse import _simplex

N, D, H = 12, 2, 5


class Network(PyroModule):
    """A layer of tanh units with their own scale of the prior, a linear layer, unknown noise."""

    def __init__(self, outputs=1):
        super().__init__()
        net = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, outputs))
        prior = {"0.weight": dist.Normal(0.0, 1.0), "0.bias": dist.Normal(0.0, 1.0)}
        prior |= {"2.weight": dist.Normal(0.1, 0.7), "2.bias": dist.Normal(0.0, 2.0)}
        self.net = bayesian_(net, prior=prior)

    def forward(self, x, y=None):
        noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.5))
        f = self.net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, noise).to_event(1), obs=y)


def network_data(outputs=1):
    x = torch.randn(N, D)
    return x, torch.sin(2 * x[:, :1]) + 0.1 * torch.randn(N, outputs)


def marginal(u, x, y, space):
    """The density of noise and hidden layer of a packed vector, by the covariance of the targets."""
    noise = u[space.slices["noise"]].exp()
    w, b = (u[space.slices[n]] for n in ("net.0.weight", "net.0.bias"))
    units = torch.tanh(x @ w.reshape(H, D).mT + b)
    covariance = 0.49 * units @ units.mT + 4.0 + noise.square() * torch.eye(N)
    mean = 0.1 * units.sum(-1)
    total = sum(MultivariateNormal(mean, covariance).log_prob(column) for column in y.mT)
    prior = Normal(0.0, 1.0).log_prob(torch.cat([w, b])).sum()
    return total + prior + Normal(-1.0, 0.5).log_prob(noise.log()).sum()


@pytest.mark.parametrize(("outputs", "split"), [pytest.param(1, False, marks=pytest.mark.slow), (3, True)])
def test_density_and_gradient_are_those_of_the_marginal(outputs, split):
    x, y = network_data(outputs)
    data = [(x[:7], y[:7]), (x[7:], y[7:])] if split else (x, y)
    density = log_density(Network(outputs), data, collapse=["net.2"])
    assert density.size == 1 + H * D + H
    u = (0.7 * torch.randn(4, density.size)).requires_grad_()
    expected = torch.stack([marginal(row, x, y, density.space) for row in u])
    (slopes,) = torch.autograd.grad(expected.sum(), u)
    for rows in (u.detach(), u.detach()):  # recorded, and replayed
        value, gradient = density.value_and_gradient(rows)
        torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-9)
        torch.testing.assert_close(gradient, slopes, rtol=1e-8, atol=1e-8)
        one = density.value_and_gradient(rows[1])
        torch.testing.assert_close(one[0], expected[1].detach(), rtol=1e-10, atol=1e-9)
        torch.testing.assert_close(one[1], slopes[1], rtol=1e-8, atol=1e-8)
    assert density.reason == ""


def test_masks_scales_and_tables_count():
    x, y = torch.randn(N, 2), torch.randn(N)
    table, seen = torch.randn(3), torch.arange(N) % 3 > 0

    def model(x, y=None):
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(2), tau).to_event(1))
        pyro.sample("table", dist.Normal(w[0], 0.5).expand([3]).to_event(1), obs=table)
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=2.0), pyro.poutine.mask(mask=seen):
            return pyro.sample("obs", dist.Normal(x @ w, 0.3), obs=y)

    density = log_density(model, (x, y), collapse="w")
    grid = torch.linspace(-3, 3, 241)
    w = torch.cartesian_prod(grid, grid)
    for u in (torch.tensor([-0.5]), torch.tensor([0.4])):
        tau = u.exp()
        rows = Normal(0.0, tau).log_prob(w).sum(-1)
        rows = rows + Normal(w[:, :1], 0.5).log_prob(table).sum(-1)
        rows = rows + 2 * (Normal(w @ x.mT, 0.3).log_prob(y) * seen).sum(-1)
        expected = (
            rows.logsumexp(0) + 2 * math.log(float(grid[1] - grid[0])) + Normal(0.0, 1.0).log_prob(u).sum()
        )
        torch.testing.assert_close(density(u), expected, rtol=1e-9, atol=1e-9)


def test_completed_draws_have_the_conditional():
    x, y = network_data()
    model = Network()
    whole, part = (
        log_density(model, (x, y)),
        log_density(model, (x, y), collapse=("net.2.weight", "net.2.bias")),
    )
    u = 0.5 * torch.randn(part.size)
    drawn, log_prob = part.complete(u.expand(2000, -1))
    torch.testing.assert_close(part.restrict(drawn[:3]), u.expand(3, -1))
    torch.testing.assert_close(part(u) + log_prob[:50], whole(drawn[:50]), rtol=1e-9, atol=1e-9)
    values = whole.space.unpack(drawn)
    w, b = (values[f"net.0.{n}"][0] for n in ("weight", "bias"))
    phi = torch.cat([torch.tanh(x @ w.mT + b), torch.ones(N, 1)], -1)
    prior = torch.tensor([0.49] * H + [4.0])
    mean = torch.tensor([0.1] * H + [0.0])
    noise = values["noise"][0].square()
    covariance = torch.linalg.inv(phi.mT @ phi / noise + prior.reciprocal().diag())
    centre = covariance @ (phi.mT @ y[:, 0] / noise + mean / prior)
    found = torch.cat([values["net.2.weight"].reshape(-1, H), values["net.2.bias"]], -1)
    z = (found.mean(0) - centre) / (covariance.diagonal() / len(found)).sqrt()
    assert float(z.abs().max()) < 4
    torch.testing.assert_close(
        found.mT.cov() / covariance.diagonal().mean(),
        covariance / covariance.diagonal().mean(),
        rtol=0,
        atol=0.1,
    )


@pytest.mark.parametrize("adjusted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_chains_have_the_posterior_of_all_latents(adjusted):
    """A regression whose two hyperparameters the chains move, against a grid over them."""
    x = torch.randn(15, 3)
    y = x @ torch.tensor([1.0, -0.5, 0.0]) + 0.4 * torch.randn(15)

    def model(x, y=None):
        tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
        w = pyro.sample("w", dist.Normal(torch.zeros(3), tau).to_event(1))
        noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.5))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ w, noise), obs=y)

    line = torch.linspace(-3, 2, 161)
    log_tau, log_noise = torch.cartesian_prod(line, line).unbind(-1)
    tau, noise = log_tau.exp().square()[:, None, None], log_noise.exp().square()[:, None, None]
    covariance = tau * (x @ x.mT) + noise * torch.eye(15)
    mass = MultivariateNormal(torch.zeros(15), covariance).log_prob(y)
    mass = mass + Normal(0.0, 0.5).log_prob(log_tau) + Normal(-1.0, 0.5).log_prob(log_noise)
    weight = mass.softmax(0)
    w_mean = (tau * x.mT @ torch.linalg.solve(covariance, y[:, None])).squeeze(-1)
    w_var = tau[:, :, 0] - (tau * x.mT @ torch.linalg.solve(covariance, x * tau)).diagonal(dim1=1, dim2=2)
    first = torch.cat([log_tau[:, None], log_noise[:, None], w_mean], -1)
    second = torch.cat([first[:, :2].square(), w_mean.square() + w_var], -1)
    mean = (weight[:, None] * first).sum(0)
    sd = ((weight[:, None] * second).sum(0) - mean.square()).sqrt()

    start = [{"tau": torch.tensor(1.0), "noise": torch.tensor(0.5), "w": torch.zeros(3)}]
    accuracy = {} if adjusted else {"energy_variance": 0.0005}
    run = mclmc(
        model, start, (x, y), num_samples=120 if adjusted else 450, warmup_steps=200, num_chains=4, adjusted=adjusted, collapse="w",
        progress_bar=False, **accuracy,
    )  # fmt: skip
    values = run.samples
    draws = torch.cat([values["tau"].log()[..., None], values["noise"].log()[..., None], values["w"]], -1)
    sizes = pyro.ops.stats.effective_sample_size(draws.unsqueeze(0), chain_dim=1, sample_dim=2)[0]
    flat = draws.flatten(0, 1)
    z = (flat.mean(0) - mean) / sd * sizes.sqrt()
    assert float(sizes.min()) > 100
    assert float(z.abs().max()) < 4
    torch.testing.assert_close(flat.std(0) / sd, torch.ones(5), rtol=0, atol=4 / math.sqrt(2 * 100))
    # what is recorded is the density of all latents
    whole = log_density(model, (x, y))
    picked = {n: v[:, ::75] for n, v in values.items()}
    torch.testing.assert_close(
        run.sample_stats["lp"][:, ::75].flatten(),
        whole(whole.space.pack(picked).flatten(0, 1)),
        rtol=1e-9,
        atol=1e-9,
    )


def test_a_run_goes_on_bit_by_bit(tmp_path):
    x, y = network_data()
    model = Network()
    guide = AutoLaplace(model).initialize(x, y)
    options = {
        "num_samples": 8,
        "warmup_steps": 8,
        "num_chains": 2,
        "collapse": "net.2",
        "progress_bar": False,
    }
    pyro.set_rng_seed(1)
    expected = mclmc(model, guide, (x, y), **options)

    class Stop(Exception):
        pass

    class Breaks(Checkpoint):
        def is_due(self, step):
            return step == 11

        def save(self, state, step):
            super().save(state, step)
            if step == 11:
                raise Stop

    pyro.set_rng_seed(1)
    with pytest.raises(Stop):
        mclmc(model, guide, (x, y), checkpoint=Breaks(tmp_path / "run.pt"), **options)
    pyro.set_rng_seed(99)
    found = mclmc(model, guide, (x, y), checkpoint=tmp_path / "run.pt", **options)
    for name, value in expected.samples.items():
        assert torch.equal(value, found.samples[name])
    with pytest.raises(ValueError, match="cannot be continued"):
        mclmc(model, guide, (x, y), checkpoint=tmp_path / "run.pt", **(options | {"collapse": "net.2.bias"}))


def test_the_simplex_has_the_moments_of_a_standard_normal():
    for dim in (1, 4):
        corners = _simplex(dim)
        torch.testing.assert_close(corners.mean(1), torch.zeros(dim))
        torch.testing.assert_close(corners @ corners.mT / (dim + 1), torch.eye(dim))


def regression(likelihood, act=lambda f: f):
    def model(x, y=None):
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", likelihood(act(x @ w), tau), obs=y)

    return model


@pytest.mark.parametrize(
    "model",
    [
        regression(lambda f, tau: dist.StudentT(3.0, f, tau)),
        regression(lambda f, tau: dist.Laplace(f, tau)),
        regression(dist.Normal, torch.relu),
        regression(dist.Normal, torch.tanh),
        regression(lambda f, tau: dist.Normal(f, (0.1 * f.square() + 1).sqrt() * tau)),
    ],
)
def test_what_is_not_gaussian_is_refused(model):
    x = torch.randn(N, 2)
    with pytest.raises(ValueError, match=r"\['w'\] are not Gaussian"):
        log_density(model, (x, x.sum(-1)), collapse="w")


def test_what_stops_being_gaussian_is_noticed():
    """Far from where it was compared first a clamp begins to act on what is integrated out."""

    def model(x, y=None):
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        f = torch.where(tau > 50.0, (x @ w).tanh(), x @ w)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, 1.0), obs=y)

    x = torch.randn(N, 2)
    density = log_density(model, (x, x.sum(-1)), collapse="w")

    def several():
        return [density(torch.tensor([5.0])) for _ in range(8)]

    with pytest.raises(ValueError, match="are not Gaussian"):
        several()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("v", r"\['v'\] names no latent site"),
        ([], "names no latent site"),
        ("tau", r"\['tau'\] are constrained"),
        (["w", "tau"], "are constrained"),
    ],
)
def test_names_are_checked(names, message):
    x = torch.randn(N, 2)
    with pytest.raises(ValueError, match=message):
        log_density(regression(dist.Normal), (x, x.sum(-1)), collapse=names)


@pytest.mark.parametrize("names", [True, 3, ["w", 0]])
def test_names_are_strings(names):
    x = torch.randn(N, 2)
    with pytest.raises(
        TypeError, match=r"collapse: expected the name of a latent site.*the sites are \['tau', 'w'\]"
    ):
        log_density(regression(dist.Normal), (x, x.sum(-1)), collapse=names)


def test_other_refusals():
    x, y = network_data()
    linear = bayesian_(nn.Linear(D, 1))

    def model(x, y=None):
        f = linear(x)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match="Laplace approximation is exact"):
        log_density(model, (x, y), collapse=["weight", "bias"])
    net = Network()
    guide = AutoLaplace(net).initialize(x, y)
    with pytest.raises(ValueError, match="whiten='diagonal' with collapse"):
        mclmc(net, guide, (x, y), whiten="guide", collapse="net.2", progress_bar=False)
    density = log_density(net, (x, y), collapse="net.2")
    with pytest.raises(ValueError, match="without collapse"):
        density.batch_value_and_gradient(torch.zeros(density.size), (x, y), 2.0)
