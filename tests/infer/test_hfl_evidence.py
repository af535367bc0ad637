# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam, pyro_method
from torch import nn
from torch.distributions import constraints
from torch.func import jacrev

from pyro_bnn import hfl
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace
from pyro_bnn.infer.hfl import HFLWarning
from pyro_bnn.infer.hyperparameters import HyperparameterWarning
from tests.common import assert_close


class Network(PyroModule):
    """A tanh network with hyperparameters of every kind: prior scale, noise, and a map of the inputs that is no site."""

    def __init__(self, hidden=4, subsample=None):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.noise = PyroParam(torch.tensor(0.3), constraints.positive)
        self.scale = PyroParam(torch.tensor(0.8), constraints.positive)
        self.inputs = nn.Parameter(torch.randn(2, 2, generator=generator))
        self.hidden, self.size = hidden, subsample

    @pyro_method
    def forward(self, x, y=None, weight=None):
        w = pyro.sample("net.w", dist.Normal(self.scale.new_zeros(self.hidden, 2), self.scale).to_event(2))
        v = pyro.sample("head.v", dist.Normal(self.scale.new_zeros(self.hidden), 1.0).to_event(1))
        f = torch.tanh(x @ self.inputs @ w.mT) @ v
        rows = torch.arange(len(x)) if self.size else None
        scale = x.new_ones(len(x)) if weight is None else weight
        with pyro.plate("data", self.size or len(x), subsample=rows), poutine.scale(scale=scale):
            return pyro.sample("obs", dist.Normal(f, self.noise), obs=y)


def data_of(n=25):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, generator=generator)
    return x, torch.tanh(x).sum(-1), torch.rand(n, generator=generator) + 0.5


def dense_evidence(loc, x, y, weight, scale, noise, inputs, hidden=4):
    """The Laplace evidence with the GGN in plain torch."""

    def outputs(u):
        return torch.tanh(x @ inputs @ u[: 2 * hidden].reshape(hidden, 2).mT) @ u[2 * hidden :]

    J = jacrev(outputs)(loc)
    T = torch.cat([scale.expand(2 * hidden) ** -2, torch.ones(hidden)])
    P = torch.diag(T) + J.mT @ (J * (weight / noise**2)[:, None])
    prior = 0.5 * (T.log() - math.log(2 * math.pi) - T * loc**2).sum()
    terms = -0.5 * ((y - outputs(loc)) / noise) ** 2 - noise.log() - 0.5 * math.log(2 * math.pi)
    return (weight * terms).sum() + prior + 0.5 * (len(loc) * math.log(2 * math.pi) - torch.logdet(P))


def case(kind="one batch"):
    """A guide at a point that is no minimum, its data, model and the evidence of plain torch."""
    pyro.clear_param_store()
    x, y, weight = data_of()
    model = Network(subsample=25 if kind == "subsampled" else None)
    guide = AutoHessianFreeLaplace(model, curvature="ggn").initialize(x, y)
    guide.loc.data = torch.linspace(-1, 1.2, 12)
    data = (x, y)
    if kind in ("batches", "subsampled"):
        data = [(x[i : i + 9], y[i : i + 9]) for i in (0, 9, 18)]
    if kind == "weighted":
        weight[3:6] = 0.0
        data = (x, y, weight)
    used = weight if kind == "weighted" else torch.ones(25)

    def dense():
        return dense_evidence(guide.loc.detach(), x, y, used, model.scale, model.noise, model.inputs)

    return guide, data, model, dense


QUIET = {"map_tolerance": math.inf}


@pytest.mark.parametrize("kind", ["one batch", "batches", "subsampled", "weighted"])
def test_evidence_and_its_gradient_are_those_of_dense_matrices(kind):
    guide, data, model, dense = case(kind)
    found = hfl.log_evidence(guide, data, differentiable=True, **QUIET)
    assert_close(found.log_evidence.detach(), dense().detach(), rtol=1e-9)
    assert found.upper - found.lower < 1e-9
    assert found.error < 1e-9
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(found.log_evidence, parameters)
    for mine, theirs in zip(gradients, torch.autograd.grad(dense(), parameters), strict=True):
        # the smallest curvatures are left to the probes
        assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_estimates_are_within_their_errors_at_a_small_rank():
    guide, data, model, dense = case()
    exact, parameters = dense(), list(model.parameters())
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(exact, parameters)])
    gradients = []
    for seed in range(20):
        options = {"rank": 3, "num_probes": 24, "seed": 100 * seed}
        found = hfl.log_evidence(guide, data, differentiable=True, tolerance=0.5, **options, **QUIET)
        assert 0 < found.error < 0.5
        assert found.lower - 4.5 * found.error < float(exact.detach()) < found.upper + 4.5 * found.error
        gradients.append(
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(found.log_evidence, parameters)])
        )
    values = torch.stack(gradients)
    error = values.std(0) / len(values) ** 0.5
    assert bool(((values.mean(0) - expected).abs() < 4 * error).all())
    assert float(error.norm()) < 0.05 * float(expected.norm())


def test_tolerance_is_kept_where_ranks_are_small():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 400, generator=generator)
    w = torch.randn(400, generator=generator)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(400), 0.3).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    y = x @ w
    guide = AutoHessianFreeLaplace(model).initialize(x, y)
    P = torch.eye(400) / 0.09 + x.mT @ x
    guide.loc.data = torch.linalg.solve(P, x.mT @ y)
    cov = torch.eye(150) + 0.09 * x @ x.mT
    exact = dist.MultivariateNormal(torch.zeros(150), cov).log_prob(y)
    found = hfl.log_evidence(guide, (x, y), tolerance=0.5)
    half = 0.5 * (found.upper - found.lower)
    assert half + found.error < 0.5
    assert abs(float(found.log_evidence) - float(exact)) < half + 4 * found.error
    assert found.rank < 150
    assert found.newton_decrement < 1e-6
    with pytest.warns(HFLWarning, match="standard error"):
        hfl.log_evidence(guide, (x, y), rank=1, num_probes=3, tolerance=0.01)


def test_float32():
    guide, data, _, dense = case()
    exact = float(dense().detach())
    pyro.clear_param_store()
    single = tuple(t.float() for t in data)
    model = Network().float()
    other = AutoHessianFreeLaplace(model, curvature="ggn").initialize(*single)
    other.loc.data = guide.loc.data.float()
    found = hfl.log_evidence(other, single, **QUIET)
    assert found.log_evidence.dtype == torch.float64
    assert found.lower - 4 * found.error - 1e-3 < exact < found.upper + 4 * found.error + 1e-3
    assert found.upper - found.lower < 0.5


def test_multipliers_and_random_latents_are_those_of_the_guide():
    _, data, model, _ = case()
    dense = AutoLaplace(model, sites="head.v").initialize(*data)
    dense.loc.data = torch.linspace(-1, 1.2, 12)
    with pytest.raises(ValueError, match="has not chosen its random latents"):
        hfl.log_evidence(dense, data)
    dense.laplace_approximation(data, **QUIET)
    assert_close(hfl.log_evidence(dense, data, **QUIET).log_evidence, dense.log_evidence(), rtol=1e-9)
    tau = torch.tensor(0.3)
    found = hfl.log_evidence(dense, data, tau=tau, **QUIET)
    assert_close(found.log_evidence, dense.log_evidence(tau), rtol=1e-9)
    decrement = found.newton_decrement
    dense.optimize_hyperparameters(method="grid", candidates=[0.3])
    found = hfl.log_evidence(dense, data, **QUIET)
    assert_close(found.log_evidence, dense.log_evidence(), rtol=1e-9)
    assert found.newton_decrement == pytest.approx(decrement)
    with pytest.raises(ValueError, match="multipliers"):
        hfl.log_evidence(dense, data, differentiable=True)
    with pytest.raises(ValueError, match="tau has shape"):
        hfl.log_evidence(dense, data, tau=torch.ones(3))
    with pytest.raises(ValueError, match="tau must be positive"):
        hfl.log_evidence(dense, data, tau=torch.tensor(-1.0))


def test_newton_decrement_is_that_of_the_dense_precision():
    _, data, model, _ = case()
    dense = AutoLaplace(model).initialize(*data)
    dense.loc.data = torch.linspace(-1, 1.2, 12)
    dense.laplace_approximation(data, **QUIET)
    found = hfl.log_evidence(dense, data, **QUIET)
    assert found.newton_decrement == pytest.approx(dense.map_report.newton_decrement)
    with pytest.warns(HFLWarning, match="away from the minimum"):
        hfl.log_evidence(dense, data)


@pytest.mark.parametrize("per", ["global", "layer", "site"])
def test_multipliers_at_the_maximum_are_those_of_the_dense_evidence(per):
    _, data, model, _ = case()
    dense = AutoLaplace(model).initialize(*data)
    dense.loc.data = torch.linspace(-1, 1.2, 12)
    dense.laplace_approximation(data, **QUIET)
    mine = hfl.optimize_hyperparameters(dense, data, per=per)
    theirs = dense.optimize_hyperparameters(per=per)
    assert mine.tau.keys() == theirs.tau.keys()
    for name, value in theirs.tau.items():
        assert mine.tau[name] == pytest.approx(value, rel=3e-3)
    assert mine.objective[-1] == pytest.approx(max(theirs.objective), abs=1e-5)


def scaled(scale):
    """A network of two outputs whose weights have prior scales of their own."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 2), scale).to_event(2))
        v = pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(torch.tanh(x @ w.mT) @ v, 0.3), obs=y)

    return model


@pytest.mark.every(2)
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize(
    ("method", "remainder"),
    [("cg", None), ("central", None), ("probe", None), ("cg", "isotropic"), ("cg", "diagonal")],
)
def test_multipliers_of_a_guide_are_a_model_with_that_prior(method, curvature, remainder):
    x, y, _ = data_of()
    guides = []
    for scale in (1.0, 0.5):
        guide = AutoHessianFreeLaplace(scaled(scale), method=method, curvature=curvature, remainder=remainder)
        guide.initialize(x, y)
        guide.loc.data = torch.linspace(-1, 1.2, 9)
        guides.append(guide)
    first, second = guides
    second.polish((x, y))
    first.loc.data = second.loc.detach().clone()  # a minimum under the second prior
    first.tau = torch.where(torch.arange(9) < 6, 4.0, 1.0)
    targets = (torch.randn(3, 2, generator=torch.Generator().manual_seed(3)),)
    for guide in guides:
        guide.laplace_approximation((x, y), targets)
    assert_close(first.result.variance, second.result.variance, rtol=1e-5)
    assert first.result.newton_decrement < 1e-3
    # where there are no targets, too
    elsewhere = (torch.randn(2, 2, generator=torch.Generator().manual_seed(4)),)
    variances = [guide.linearized_outputs(*elsewhere)["obs"].variance for guide in guides]
    assert_close(variances[0], variances[1], rtol=1e-4)
    assert_close(first.log_evidence((x, y)).log_evidence, second.log_evidence((x, y)).log_evidence, rtol=1e-9)


def test_guides_use_the_multipliers_that_they_find():
    guide, data, *_ = case()
    guide.laplace_approximation(data, targets=(data[0][:2],), **QUIET)
    before = guide.result.variance
    report = guide.optimize_hyperparameters(data, per="site")
    expected = hfl.optimize_hyperparameters(guide, data, per="site")
    assert report.tau == expected.tau
    assert_close(guide.tau.unique(), sorted(report.tau.values()), rtol=1e-6)
    assert guide.result is None
    guide.laplace_approximation(data, targets=(data[0][:2],), **QUIET)
    assert not torch.allclose(guide.result.variance, before)
    found = guide.log_evidence(data, **QUIET)
    assert float(found.log_evidence) == pytest.approx(max(report.objective), abs=1e-3)


def test_multipliers_of_coupled_priors_are_refused_by_name():
    x, y, _ = data_of()
    guide = AutoHessianFreeLaplace(hierarchy).initialize(x, y)
    guide.tau = torch.tensor(2.0)
    with pytest.raises(ValueError, match="multipliers of the prior precision are in use"):
        hfl.solve(guide, (x, y), (x,))


def test_latents_at_their_prior_mean_have_no_best_prior():
    _, data, model, _ = case()
    guide = AutoHessianFreeLaplace(model, curvature="ggn").initialize(*data)
    guide.loc.data = torch.linspace(-1, 1.2, 12) * (torch.arange(12) < 8)
    with pytest.warns(HyperparameterWarning, match="no maximum .* 'head.v'"):
        report = hfl.optimize_hyperparameters(guide, data, per="site")
    assert report.tau["head.v"] > 1e7


def hierarchy(x, y=None):
    s = pyro.sample("s", dist.HalfNormal(1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), s).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(x @ w + b, 1.0), obs=y)


def improper(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    b = pyro.sample("b", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(x @ w + b, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (hierarchy, "couples latents with each other .site 's', 'w'"),
        (improper, "no positive curvature .* .site 'b'"),
    ],
)
def test_priors_without_a_positive_diagonal_are_refused_by_name(model, message):
    x, y, _ = data_of()
    guide = AutoHessianFreeLaplace(model).initialize(x, y)
    guide.loc.data = 0.3 + torch.zeros_like(guide.loc)
    with pytest.raises(ValueError, match=message):
        hfl.log_evidence(guide, (x, y))


@pytest.mark.parametrize(
    "options", [{"tolerance": 0.0}, {"rank": 0}, {"num_probes": 1}, {"max_steps": 0}, {"seed": -1}]
)
def test_senseless_options_are_refused_by_name(options):
    guide, data, *_ = case()
    with pytest.raises(ValueError, match=next(iter(options))):
        hfl.log_evidence(guide, data, **options, **QUIET)


def test_results_show_bracket_and_error():
    guide, data, *_ = case()
    text = str(hfl.log_evidence(guide, data, rank=3, **QUIET))
    assert "bracket" in text
    assert "standard error over probes" in text
