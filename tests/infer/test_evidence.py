# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.nn import PyroModule, PyroParam, PyroSample, pyro_method
from torch import nn
from torch.distributions import constraints

from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.infer.evidence import train_with_evidence
from pyro_bnn.infer.hyperparameters import HyperparameterWarning
from pyro_bnn.nn import bayesian_
from tests.common import assert_close
from tests.models import linear_regression


class Network(PyroModule):
    """A tanh network whose prior scale and noise are hyperparameters."""

    def __init__(self, hidden=3, noise=0.3, scale=0.8):
        super().__init__()
        self.noise = PyroParam(torch.tensor(noise), constraints.positive)
        self.scale = PyroParam(torch.tensor(scale), constraints.positive)
        self.hidden = hidden

    @pyro_method
    def forward(self, x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(self.hidden, 2), self.scale).to_event(2))
        v = pyro.sample("v", dist.Normal(torch.zeros(self.hidden), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(torch.tanh(x @ w.mT) @ v, self.noise), obs=y)


def fitted(structure, noise=0.3, scale=0.8):
    pyro.clear_param_store()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(25, 2, generator=generator)
    y = torch.tanh(x).sum(-1)
    model = Network(noise=noise, scale=scale)
    guide = AutoLaplace(model, structure=structure).initialize(x, y)
    guide.loc.data = torch.linspace(-1, 1.2, 9)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    return guide, (x, y), model


class Features(PyroModule):
    """
    Hyperparameters of every kind: a network before, between and after the random weights, the noise, and the scale of
    priors that are conjugate, coupled with each other, and not Gaussian.
    """

    def __init__(self, family):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.features = nn.Conv1d(2, 3, 3, padding=1)
        self.mixing = nn.Parameter(torch.randn(2, 2, generator=generator))
        self.noise = PyroParam(torch.tensor(0.4), constraints.positive)
        self.scale = PyroParam(torch.tensor(0.8), constraints.positive)
        self.family = family
        for value in self.features.parameters():
            value.data = 0.5 * torch.randn(value.shape, generator=generator)

    def forward(self, x, y=None):
        h = torch.tanh(self.features(x))
        kernel = pyro.sample("kernel", dist.Normal(torch.zeros(2, 3, 3), self.scale).to_event(3))
        h = torch.tanh(F.conv1d(h, kernel)).flatten(1)
        w = pyro.sample("w", dist.Normal(torch.zeros(2, h.shape[1]), self.scale).to_event(2))
        b = pyro.sample("b", dist.StudentT(4.0, torch.zeros(2), 0.7).to_event(1))
        gain = pyro.sample("gain", dist.LogNormal(0.0, self.noise))
        f = (h @ w.mT + b) @ self.mixing * gain
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", FAMILIES[self.family](f, self.noise), obs=y)


FAMILIES = {
    "normal": lambda f, noise: dist.Normal(f, noise).to_event(1),
    "heteroscedastic": lambda f, noise: dist.Normal(f[:, 0], noise * (0.3 * f[:, 1]).exp()),
    "categorical": lambda f, noise: dist.Categorical(logits=torch.cat([f, noise.expand(len(f), 1)], -1)),
    "soft_laplace": lambda f, noise: dist.SoftLaplace(f[:, 0], noise),  # no closed-form Fisher information
}
STRUCTURES = ["full", "block", "kronecker", "diagonal", "low_rank", "function_space", "nystrom"]


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("structure", "curvature", "family"),
    [(s, "ggn", "categorical") for s in STRUCTURES]
    + [(s, "ggn", "normal") for s in ("full", "kronecker", "diagonal")]
    + [("kronecker", "ggn", "soft_laplace")]
    + [(s, "empirical_fisher", "heteroscedastic") for s in STRUCTURES]
    + [(s, "hessian", "categorical") for s in ("full", "diagonal", "low_rank")],
)
def test_evidence_is_differentiable_in_every_parameter(structure, curvature, family):
    model = Features(family)
    if curvature == "hessian":
        model.scale = torch.tensor(0.1)  # positive definite
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 2, 4, generator=generator)
    y = {
        "normal": torch.randn(9, 2, generator=generator),
        "categorical": torch.randint(0, 3, (9,), generator=generator),
    }.get(family, torch.randn(9, generator=generator))
    guide = AutoLaplace(model, structure=structure, curvature=curvature, rank=29).initialize(x, y)
    size = 0.02 if curvature == "hessian" else 0.3
    guide.loc.data = size * torch.randn(len(guide.loc), generator=generator)
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    guide.laplace_approximation(batches, map_tolerance=float("inf"))
    parameters = dict(model.named_parameters())
    evidence = guide.log_evidence(data=batches)
    assert_close(evidence.detach(), guide.log_evidence(), rtol=1e-12)
    gradients = torch.autograd.grad(evidence, list(parameters.values()))
    # along a random direction in all entries of all parameters, in which each parameter has a share of about the same size
    moves = [torch.randn(g.shape, generator=generator) / g.norm() for g in gradients]
    largest = max(float(move.abs().max()) for move in moves)
    moves = [move / largest for move in moves]
    shares = torch.stack([(g * move).sum() for g, move in zip(gradients, moves, strict=True)])
    h, ends = 1e-5, []
    for step in (h, -2 * h):
        with torch.no_grad():
            for value, move in zip(parameters.values(), moves, strict=True):
                value += step * move
        ends.append(guide.log_evidence(data=batches).detach())
    assert_close(shares.sum(), (ends[0] - ends[1]) / (2 * h), rtol=0, atol=3e-6 * shares.abs().min() + 2e-8)


def test_evidence_with_multipliers_asks_for_a_new_approximation():
    guide, data, _ = fitted("full")
    guide.optimize_hyperparameters()
    with pytest.raises(ValueError, match="multipliers of the prior precision are in use"):
        guide.log_evidence(data=data)


@pytest.mark.parametrize(
    "structure", ["full", "block", "kronecker", "diagonal", "low_rank", "function_space"]
)
def test_multiplier_equals_a_model_with_that_prior(structure):
    # a multiplier of 1 / 4 is a prior twice as wide, at the same point
    model, x, y = linear_regression(prior_scale=1.0)
    wide, _, _ = linear_regression(prior_scale=2.0)
    guides = []
    for m in (model, wide):
        guide = AutoLaplace(m, structure=structure).initialize(x, y)
        guide.loc.data = torch.tensor([0.5, -1.0, 0.2])
        guides.append(guide.laplace_approximation((x, y), map_tolerance=float("inf")))
    tau = torch.tensor(0.25, requires_grad=True)
    evidence = guides[0].log_evidence(tau)
    # the normalising constant of the data differs not at all; priors differ as the multiplier says
    assert_close(evidence, guides[1].log_evidence(), rtol=1e-10)
    (gradient,) = torch.autograd.grad(evidence, tau)
    step = 1e-6
    difference = guides[0].log_evidence(torch.tensor(0.25 + step)) - guides[0].log_evidence(
        torch.tensor(0.25 - step)
    )
    assert_close(gradient, difference / (2 * step), rtol=1e-6)


@pytest.mark.parametrize("structure", ["full", "kronecker", "diagonal", "low_rank"])
def test_optimised_multiplier_is_the_best_of_the_evidence(structure):
    guide, _, _ = fitted(structure)
    before = guide.log_evidence()
    report = guide.optimize_hyperparameters()
    after = guide.log_evidence()
    assert after > before
    assert_close(report.objective[-1], after, rtol=1e-9)
    assert_close(report.objective[0], before, rtol=1e-9)  # a multiplier of 1
    tau = torch.tensor(report.tau["all"])
    for factor in (0.95, 1.05):
        assert guide.log_evidence(tau * factor) < after
    near = guide.optimize_hyperparameters(method="grid", candidates=[float(tau) * f for f in (0.5, 1.0, 2.0)])
    assert near.tau["all"] == pytest.approx(float(tau))


@pytest.mark.parametrize("structure", ["full", "block", "kronecker", "diagonal"])
def test_one_multiplier_per_site(structure):
    guide, _, _ = fitted(structure)
    report = guide.optimize_hyperparameters(per="site")
    assert set(report.tau) == {"w", "v"}
    best = guide.log_evidence().detach()
    guide.tau = None
    guide._posterior = None
    guide.optimize_hyperparameters()
    assert best > guide.log_evidence()


class Layers(PyroModule):
    """Two linear layers by the names that modules give their sites."""

    def __init__(self):
        super().__init__()
        self.net = bayesian_(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)))

    def forward(self, x, y=None):
        f = self.net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, 0.3), obs=y)


@pytest.mark.parametrize("structure", ["full", "block", "kronecker", "diagonal"])
def test_one_multiplier_per_layer(structure):
    x = torch.randn(30, 2)
    y = torch.tanh(x).sum(-1)
    guide = AutoLaplace(Layers(), structure=structure).initialize(x, y)
    guide.loc.data = torch.linspace(-1.0, 1.2, len(guide.loc))
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))

    def evidence(first, second):
        tau = torch.where(torch.arange(len(guide.loc)) < 9, first, second)
        return float(guide.log_evidence(tau.double()))

    report = guide.optimize_hyperparameters(per="layer")
    assert list(report.tau) == ["net.0", "net.2"]
    first, second = report.tau.values()
    best = float(guide.log_evidence())
    assert best == pytest.approx(evidence(first, second), rel=1e-9)
    for a, b in ((1.1, 1.0), (0.9, 1.0), (1.0, 1.1), (1.0, 0.9)):
        assert evidence(a * first, b * second) < best
    # the best of a grid in each coordinate; the two interact in the full structure only
    candidates = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
    grid = guide.optimize_hyperparameters(method="grid", per="layer", candidates=candidates)
    table = {(a, b): evidence(a, b) for a in candidates for b in candidates}
    assert tuple(grid.tau.values()) == max(table, key=table.__getitem__)
    held_out = (x + 0.1, torch.tanh(x + 0.1).sum(-1))
    found = guide.optimize_hyperparameters(held_out, method="validation", per="layer", candidates=[0.3, 3.0])
    assert_close(
        max(found.objective), guide.predictive(held_out[0])["obs"].log_prob(held_out[1]).sum(), rtol=1e-9
    )


def test_type_two_maximum_likelihood_of_linear_regression():
    # a multiplier found with refits at each step converges to the maximum of the exact evidence
    model, x, y = linear_regression()
    guide = AutoLaplace(model).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    grid = torch.linspace(-4, 4, 2001).exp()

    def exact(tau):
        covariance = 0.3**2 * torch.eye(len(x)) + 2.0**2 / tau * x @ x.mT
        return dist.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(y)

    values = torch.stack([exact(t) for t in grid])
    best = grid[values.argmax()]
    # the evidence of the linear-Gaussian model at its MAP for tau = 1, in tau: exact at tau = 1
    assert_close(guide.log_evidence(torch.tensor(1.0)), exact(torch.tensor(1.0)), rtol=1e-10)
    report = guide.optimize_hyperparameters()
    assert report.tau["all"] == pytest.approx(float(best), rel=0.05)


def test_validation_chooses_the_best_held_out_density():
    guide, _, _ = fitted("full")
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(40, 2, generator=generator)
    held_out = (x, torch.tanh(x).sum(-1))
    with pytest.warns(HyperparameterWarning, match="edge of the 3 candidates"):
        report = guide.optimize_hyperparameters(held_out, method="validation", candidates=[1e-2, 1.0, 1e2])
    assert report.tau["all"] == [1e-2, 1.0, 1e2][report.objective.index(max(report.objective))]
    expected = guide.predictive(x)["obs"].log_prob(held_out[1]).sum()
    assert_close(max(report.objective), expected, rtol=1e-10)
    with pytest.raises(ValueError, match="needs held-out data"):
        guide.optimize_hyperparameters(method="validation")


def test_online_training_recovers_the_noise():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 2, generator=generator)
    y = x @ torch.tensor([1.0, -0.5]) + 0.4 * torch.randn(400, generator=generator)

    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.noise = PyroParam(torch.tensor(1.0), constraints.positive)
            self.w = PyroSample(dist.Normal(torch.zeros(2), 1.0).to_event(1))

        def forward(self, x, y=None):
            w = self.w
            with pyro.plate("data", len(x)):
                return pyro.sample("obs", dist.Normal(x @ w, self.noise), obs=y)

    model = Regression()
    guide = AutoLaplace(model).initialize(x, y)
    report = train_with_evidence(
        guide, (x, y), model.parameters(), epochs=50, update_every=5, hyper_steps=10, lr=0.1
    )
    assert report.objective[-1] > report.objective[0]
    residual = y - x @ torch.linalg.lstsq(x, y).solution
    # type-II maximum likelihood of the noise: residual sum of squares over N - p degrees of freedom, nearly
    assert float(model.noise.detach()) == pytest.approx(
        float((residual.square().sum() / 398).sqrt()), rel=0.02
    )


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_a_batch_that_shows_the_noise_only(curvature):
    """Replicates of a blank, in a batch of their own, depend on the noise and not on the latents."""

    class Blanks(PyroModule):
        def __init__(self):
            super().__init__()
            self.noise = PyroParam(torch.tensor(0.4), constraints.positive)

        def forward(self, x, y=None, blank=False):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("blanks" if blank else "data", len(x)):
                pyro.sample(
                    "blank" if blank else "obs", dist.Normal(0.0 if blank else w * x, self.noise), obs=y
                )

    x, y, z = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.2, 0.9, 1.2]), torch.tensor([0.1, -0.3])
    model = Blanks()
    batches = [(x, y, False), (z, z, True)]
    guide = AutoLaplace(model, curvature=curvature).initialize(x, y)
    guide.polish(batches).laplace_approximation(batches)
    (found,) = torch.autograd.grad(guide.log_evidence(data=batches), list(model.parameters()))

    def log_evidence(log_noise):
        noise = log_noise.exp()
        precision = 1 + (x / noise).square().sum()
        mode = guide.loc.detach()[0]  # held fixed, at the mode of the present noise
        terms = dist.Normal(mode * x, noise).log_prob(y).sum() + dist.Normal(0.0, noise).log_prob(z).sum()
        return terms - 0.5 * mode**2 - 0.5 * precision.log()

    log_noise = torch.tensor(0.4).log().requires_grad_(True)
    (expected,) = torch.autograd.grad(log_evidence(log_noise), log_noise)
    assert_close(found, expected, rtol=1e-6)
