# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample, pyro_method
from torch.distributions import constraints

from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.infer.evidence import train_with_evidence
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


@pytest.mark.parametrize("structure", ["full", "block", "kronecker", "diagonal", "function_space"])
def test_gradient_in_noise_and_prior_scale_equals_finite_differences(structure):
    guide, data, model = fitted(structure)
    assert_close(guide.log_evidence(data=data).detach(), guide.log_evidence(), rtol=1e-12)
    gradients = torch.autograd.grad(
        guide.log_evidence(data=data), [model.noise_unconstrained, model.scale_unconstrained]
    )
    h = 1e-5
    for gradient, (dn, ds) in zip(gradients, [(h, 0.0), (0.0, h)], strict=True):
        up = fitted(
            structure, 0.3 * torch.exp(torch.tensor(dn)).item(), 0.8 * torch.exp(torch.tensor(ds)).item()
        )
        down = fitted(
            structure, 0.3 * torch.exp(torch.tensor(-dn)).item(), 0.8 * torch.exp(torch.tensor(-ds)).item()
        )
        expected = (up[0].log_evidence() - down[0].log_evidence()) / (2 * h)
        assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


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
    tau = torch.tensor(report.tau["all"])
    for factor in (0.95, 1.05):
        assert guide.log_evidence(tau * factor) < after
    near = guide.optimize_hyperparameters(method="grid", candidates=[float(tau) * f for f in (0.5, 1.0, 2.0)])
    assert near.tau["all"] == pytest.approx(float(tau))


@pytest.mark.parametrize("structure", ["full", "block", "kronecker", "diagonal"])
def test_one_multiplier_per_site(structure):
    guide, _, _ = fitted(structure)
    report = guide.optimize_hyperparameters(per_site=True)
    assert set(report.tau) == {"w", "v"}
    best = guide.log_evidence().detach()
    guide.tau = None
    guide._posterior = None
    guide.optimize_hyperparameters()
    assert best > guide.log_evidence()


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
        guide, (x, y), model.parameters(), epochs=120, update_every=5, hyper_steps=10, lr=0.05
    )
    assert report.objective[-1] > report.objective[0]
    residual = y - x @ torch.linalg.lstsq(x, y).solution
    # type-II maximum likelihood of the noise: residual sum of squares over N - p degrees of freedom, nearly
    assert float(model.noise.detach()) == pytest.approx(
        float((residual.square().sum() / 398).sqrt()), rel=0.02
    )
