# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Hessian-free Laplace: what it refuses or warns of, preconditioners, stochastic fits, and its place among other guides."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoDelta, AutoGuideList, init_to_sample

from pyro_bnn.infer import NotAMinimumError, hfl
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace
from pyro_bnn.infer.hfl import HFLWarning
from tests.common import assert_close
from tests.models import linear_regression, logistic_regression


def wide_regression(n=10, p=200):
    """More weights than data, with prior scales over an order of magnitude."""
    scale = torch.logspace(-0.5, 0.5, p)
    x = torch.randn(n, p)
    y = x @ (scale * torch.randn(p)) + 0.5 * torch.randn(n)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(p), scale).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)

    covariance = torch.linalg.inv(x.mT @ x / 0.25 + torch.diag(scale**-2))
    return AutoLaplace(model).initialize(x, y), (x, y), covariance


def test_prior_preconditioner_needs_no_more_iterations_than_data_points():
    """With P = S + A'A, the preconditioned matrix has at most n + 1 distinct eigenvalues, and CG as many steps."""
    guide, data, covariance = wide_regression()
    x = torch.randn(1, 200)
    options = {"tolerance": 1e-8, "map_tolerance": float("inf")}
    result = hfl.solve(guide, data, (x,), preconditioner="prior", block_size=1, **options)
    expected = (x @ covariance * x).sum(-1)
    assert_close(result.variances, expected, rtol=1e-9)
    plain = hfl.solve(guide, data, (x,), block_size=1, **options)
    assert_close(plain.variances, expected, rtol=1e-6)
    # two right-hand sides: the target and the gradient
    assert result.iterations <= 2 * 13 < plain.iterations / 4
    nystrom = hfl.solve(guide, data, (x,), preconditioner="nystrom", rank=12, block_size=1, **options)
    assert_close(nystrom.variances, expected, rtol=1e-9)
    assert nystrom.iterations < plain.iterations / 4


def test_paired_error_is_bounded_by_its_residual():
    """Of the variance a share of the residual squared is missing."""
    model, x, y = linear_regression(n=40)
    guide = AutoLaplace(model).initialize(x, y).polish((x, y))
    batches = [(x[i::4], y[i::4]) for i in range(4)]
    posterior = torch.linalg.inv(x.mT @ x / 0.3**2 + torch.eye(3) / 4)
    exact = (x[:5] @ posterior @ x[:5].mT).diagonal()
    result = hfl.solve(guide, batches, (x[:5],), method="paired", preconditioner="nystrom", num_epochs=40)
    assert (result.variances / exact - 1).abs().max() < 1e-6
    with pytest.warns(HFLWarning, match="variances may be too small by"):
        result = hfl.solve(guide, batches, (x[:2],), method="paired", num_epochs=1)
    error = (exact[:2] / result.variances - 1).max()
    assert error > 1e-4
    # the residual's own solve has a relative tolerance of 0.1
    assert_close(error, result.residual**2, rtol=0.1)


def test_paired_warns_when_it_has_not_converged():
    guide, (x, y), covariance = wide_regression(n=20, p=30)
    guide.polish((x, y))
    batches = [(x[:10], y[:10]), (x[10:], y[10:])]
    with pytest.warns(HFLWarning, match="variances may be too small by"):
        result = hfl.solve(guide, batches, (x[:3],), method="paired", num_epochs=2)
    error = ((x[:3] @ covariance * x[:3]).sum(-1) / result.variances - 1).max()
    assert 0.02 < error <= 1.1 * result.residual**2


def test_point_estimate_away_from_the_minimum_warns():
    model, x, y = linear_regression()
    guide = AutoLaplace(model).initialize(x, y).polish((x, y))
    posterior = torch.linalg.inv(x.mT @ x / 0.3**2 + torch.eye(3) / 4)
    direction = torch.linalg.cholesky(posterior) @ torch.tensor([0.0, 1.0, 0.0])
    guide.loc.data += 2 * direction  # two posterior standard deviations
    with pytest.warns(HFLWarning, match="2 posterior standard deviations away"):
        result = hfl.solve(guide, (x, y), (x[:3],))
    assert_close(result.newton_decrement, 2.0, rtol=1e-6)
    assert_close(
        result.covariance, x[:3] @ posterior @ x[:3].mT, rtol=1e-6
    )  # the same everywhere in a quadratic


def test_missing_derivatives_raise():
    def model(y=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", 3):
            pyro.sample("obs", dist.Normal(a[0].abs().pow(power) + a[1], 1.0), obs=y)

    y = torch.ones(3)
    power = 0.5  # infinite slope at zero
    guide = AutoLaplace(model, curvature="hessian").initialize(y)
    guide.loc.data.copy_(torch.tensor([0.0, 0.75]))
    with pytest.raises(
        ValueError, match="1 of 2 entries of the gradient of the log density, those of 'a', are not finite"
    ):
        hfl.variance(guide, (y,), functional=lambda z: z["a"][1])
    power = 1.5  # infinite curvature at zero
    for options in ({}, {"preconditioner": "nystrom"}, {"proximal": "auto"}, {"method": "central"}):
        with pytest.raises(
            ValueError, match="1 of 2 entries of the second derivative of the log density, those of 'a'"
        ):
            hfl.variance(guide, (y,), functional=lambda z: z["a"], **options)
    # the Fisher information is finite there: a[0] has no slope, so its variance is the prior's
    ggn = hfl.variance(guide, (y,), functional=lambda z: z["a"], curvature="ggn")
    assert_close(ggn, torch.tensor([1.0, 1 / (1 + 3)]), rtol=1e-8)
    with pytest.raises(ValueError, match="1 of 2 gradients to solve for are not finite"):
        hfl.variance(guide, (y,), functional=lambda z: z["a"][0].abs().sqrt(), curvature="ggn")


def noisy_regression(x, y=None):
    """A regression with a latent noise scale."""
    sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 0.1))
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(x @ w, sigma), obs=y)


def test_part_of_the_sites_in_a_guide_list():
    """A hidden site is drawn anew in every run, which is an error; conditioned on a value it is the closed form."""
    _, x, y = linear_regression()
    hidden = AutoHessianFreeLaplace(poutine.block(noisy_regression, hide=["sigma"])).initialize(x, y)
    with pytest.raises(ValueError, match="not a function of its latents"):
        hidden.laplace_approximation((x, y), (x[:3],))
    sigma = torch.tensor(0.4)
    conditioned = poutine.block(poutine.condition(noisy_regression, data={"sigma": sigma}), hide=["sigma"])
    part = AutoHessianFreeLaplace(conditioned).initialize(x, y).polish((x, y))
    part.laplace_approximation((x, y), (torch.eye(3),))
    posterior = torch.linalg.inv(x.mT @ x / sigma**2 + torch.eye(3) / 4)
    assert_close(part.result.covariance, posterior, rtol=1e-6)
    guide = AutoGuideList(noisy_regression)
    guide.append(AutoDelta(poutine.block(noisy_regression, expose=["sigma"])))
    guide.append(part)
    draws = Predictive(noisy_regression, guide=guide, num_samples=2000)(x)
    assert draws["obs"].shape == (2000, 50)
    w = draws["w"].reshape(2000, 3)
    assert (((w.mean(0) - part.loc.detach()) / posterior.diagonal().sqrt()).abs() < 4.5 / 2000**0.5).all()
    assert_close(w.var(0), posterior.diagonal(), rtol=4.5 * (2 / 2000) ** 0.5)


@pytest.mark.parametrize("method", ["probit", "bridge", "monte_carlo"])
def test_class_probabilities_are_those_of_the_dense_approximation(method):
    model, x, y = logistic_regression()
    exact = AutoLaplace(model, curvature="ggn").initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    guide = AutoHessianFreeLaplace(model, curvature="ggn").initialize(x, y)
    guide.loc.data.copy_(exact.loc.data)
    guide.laplace_approximation((x, y), (3 * x[:6],))
    classes = torch.arange(3)[:, None]

    def probabilities(guide):
        pyro.set_rng_seed(1)
        return guide.predictive(3 * x[:6], method=method)["obs"].log_prob(classes).exp()

    assert_close(probabilities(guide).sum(0), torch.ones(6), rtol=1e-9)
    assert_close(probabilities(guide), probabilities(exact), rtol=1e-5)


def test_probes_for_more_targets_than_probes():
    model, x, y = linear_regression()
    exact = AutoLaplace(model).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    guide = AutoHessianFreeLaplace(model, method="probe").initialize(x, y)
    guide.loc.data.copy_(exact.loc.data)
    guide.laplace_approximation((x, y), (x[:20],), num_probes=4)  # rank 3 is all there is
    variance = exact.linearized_outputs(x)["obs"].variance
    assert_close(guide.result.variance, variance[:20], rtol=1e-6)
    assert guide.result.captured > 1 - 1e-6
    guide.add_targets((x, y), (x[20:],), num_probes=2)
    assert_close(guide.linearized_outputs(x)["obs"].variance, variance, rtol=1e-6)
    assert guide.result.mean.shape == (30,)


def test_helpful_errors():
    model, x, y = linear_regression()
    guide = AutoLaplace(model).initialize(x, y).polish((x, y))
    for call in (hfl.solve, hfl.covariance):
        with pytest.raises(ValueError, match="is a score, not a covariance: call"):
            call(guide, (x, y), (x[:2],), method="regvar")
    with pytest.raises(ValueError, match="is a score, which makes no guide"):
        AutoHessianFreeLaplace(model, method="regvar")
    with pytest.raises(ValueError, match="targets hold 2 batches, expected one"):
        hfl.solve(guide, (x, y), [(x[:2],), (x[2:4],)])


def test_negative_variance_at_a_maximum():
    """A functional at a maximum of the density of a one-dimensional latent: what a silent abs() would hide."""

    def model(y=None):
        a = pyro.sample("a", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 4):
            pyro.sample("obs", dist.Normal(a.square(), 1.0), obs=y)

    y = torch.full((4,), 2.0)
    guide = AutoLaplace(model, curvature="hessian", init_loc_fn=init_to_sample).initialize(y)
    guide.loc.data.fill_(0.0)  # between the minima at +-sqrt(2)
    for method in ("cg", "one_sided", "central"):
        with pytest.raises(NotAMinimumError, match="not a minimum"):
            hfl.variance(guide, (y,), functional=lambda z: z["a"], method=method)


def _offset(z):
    return torch.cat([z["w"] + 1e5, z["w"]]) - 1e5 * torch.cat(
        [torch.ones_like(z["w"]), torch.zeros_like(z["w"])]
    )


CUT = {
    "a factor": lambda z: z["w"].detach() * z["w"],
    "a term": lambda z: z["w"][0] ** 2 + z["w"][1].detach() ** 2,
    "half of the elements": lambda z: torch.cat([z["w"], z["w"] + z["w"].detach().sin()]),
    "numpy": lambda z: z["w"].sum() + float(z["w"].detach().numpy().sum()),
}
WHOLE = {
    "squares": lambda z: z["w"] ** 2,
    "kinks near by": lambda z: (z["w"] - z["w"].detach()).relu() * 0 + z["w"].abs(),
    "a constant": lambda z: torch.cat([z["w"], z["w"].new_ones(3)]),
    "large and small": lambda z: 1e6 + 1e-6 * z["w"],
    "rounding": _offset,
    "steep": lambda z: (10 * z["w"]).exp(),
    "fast": lambda z: torch.sin(1e3 * z["w"]),
    "many": lambda z: torch.sin(torch.linspace(0, 1e3, 800, dtype=z["w"].dtype)[:, None] * z["w"]).sum(-1),
    "counts and slopes": lambda z: z["w"] + (z["w"] > 0).to(z["w"]),
    "an own derivative": lambda z: torch.autograd.grad(z["w"].pow(3).sum(), z["w"], create_graph=True)[0],
}


def _regression(dtype):
    x = torch.randn(20, 3, dtype=dtype, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([1.0, -0.5, 0.3], dtype=dtype)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=dtype), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)

    return AutoLaplace(model).initialize(x, y).polish((x, y)), (x, y)


@pytest.mark.every(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["cg", "probe"])
@pytest.mark.parametrize("name", CUT)
def test_functionals_that_are_partly_detached(name, method, dtype):
    guide, data = _regression(dtype)
    with pytest.raises(ValueError, match="another derivative than automatic differentiation says"):
        hfl.solve(guide, data, functional=CUT[name], method=method)


@pytest.mark.every(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["cg", "probe"])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_functionals_raise_no_false_alarm(name, method, dtype):
    guide, data = _regression(dtype)
    hfl.solve(guide, data, functional=WHOLE[name], method=method)


def test_functionals_at_kinks_raise_no_false_alarm():
    """ReLU, absolute values and maxima right at the point estimate, where every derivative of autograd is a choice."""
    guide, data = _regression(torch.float64)
    at = guide.loc.detach().clone()
    for kinked in (torch.relu, torch.abs, lambda d: torch.maximum(d, -2 * d), lambda d: d.clamp(-1e-30, 1.0)):
        hfl.solve(guide, data, functional=lambda z, f=kinked: f(z["w"] - at) + 1e-2 * z["w"])
