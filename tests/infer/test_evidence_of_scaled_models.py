# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Scales, masks and factors in the log evidence and its derivatives, against quadrature and closed forms."""

import functools
import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from scipy import stats
from scipy.integrate import quad
from scipy.special import gammaln
from torch import Tensor

from pyro_bnn.infer.autoguide import AutoLaplace
from tests.common import assert_close

X = torch.tensor([0.5, -1.0, 2.0, 1.5, -0.3, 0.8], dtype=torch.float64)
Y = torch.tensor([0.9, -1.2, 2.5, 1.1, 0.2, 0.4], dtype=torch.float64)
MASK = torch.tensor([True, True, False, True, False, True])
COUNTS = torch.tensor([3.0, 5.0, 2.0, 4.0, 6.0, 1.0], dtype=torch.float64)

#: scale of the likelihood, mask, strength of a factor, scale of the whole model
CASES = {
    "plain": (1.0, False, 0.0, 1.0),
    "scale": (3.0, False, 0.0, 1.0),
    "mask": (1.0, True, 0.0, 1.0),
    "factor": (1.0, False, 0.7, 1.0),
    "all": (2.5, True, 0.7, 1.0),
    "whole": (2.0, True, 0.7, 1.5),
}


def handled(scale: float, masked: bool, mask: Tensor = MASK) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(poutine.scale(scale=scale))
    if masked:
        stack.enter_context(poutine.mask(mask=mask))
    return stack


class Regression(PyroModule):
    def __init__(self, scale: float, masked: bool, factor: float) -> None:
        super().__init__()
        self.prior = PyroParam(torch.tensor(1.3), constraint=dist.constraints.positive)
        self.noise = PyroParam(torch.tensor(0.6), constraint=dist.constraints.positive)
        self.options = (scale, masked, factor)

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        scale, masked, factor = self.options
        weight = pyro.sample("weight", dist.Normal(0.0, self.prior))
        if factor:
            pyro.factor("pull", -0.5 * factor * (weight - 1) ** 2)
        with pyro.plate("data", len(x)), handled(scale, masked):
            pyro.sample("obs", dist.Normal(weight * x, self.noise), obs=y)


@functools.cache
def regression_evidence(case: str, prior: float, noise: float) -> float:
    scale, masked, factor, whole = CASES[case]
    keep = MASK.numpy() if masked else np.ones(6, dtype=bool)
    x, y = X.numpy()[keep], Y.numpy()[keep]

    def normal(z: Any, sd: float) -> Any:  # scipy's takes a hundred times as long
        return -0.5 * (z / sd) ** 2 - math.log(sd * math.sqrt(2 * math.pi))

    def log_joint(w: float) -> float:
        likelihood = scale * normal(y - w * x, noise).sum() - 0.5 * factor * (w - 1) ** 2
        return float(whole * (normal(w, prior) + likelihood))

    assert_close(normal(0.3, 0.7), stats.norm.logpdf(0.3, 0.0, 0.7), rtol=1e-12)
    top = max(log_joint(w) for w in np.linspace(-2, 3, 501))
    value, _ = quad(
        lambda w: math.exp(log_joint(w) - top), -6, 8, points=[0.5, 1.0, 1.5], epsabs=0, epsrel=1e-12
    )
    return top + math.log(value)


@pytest.mark.every(3)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("structure", ["full", "diagonal", "low_rank"])
def test_regression_is_exact_in_value_and_derivative(case: str, structure: Any) -> None:
    scale, masked, factor, whole = CASES[case]
    module = Regression(scale, masked, factor)
    model: Callable[..., Any] = module if whole == 1 else poutine.scale(module, scale=whole)
    curvatures: list[Any] = ["hessian"] if factor else ["ggn", "hessian"]
    for curvature in curvatures:
        guide = AutoLaplace(model, structure=structure, curvature=curvature).initialize(X, Y)
        guide.polish(X, Y).laplace_approximation(X, Y)
        expected = regression_evidence(case, 1.3, 0.6)
        assert_close(guide.log_evidence(), expected, rtol=1e-9)
        value = guide.log_evidence(data=(X, Y))
        assert_close(value.detach(), expected, rtol=1e-9)
        leaves = [module.prior_unconstrained, module.noise_unconstrained]
        found = torch.autograd.grad(value, leaves)
        h = 1e-5  # in logarithms, the unconstrained space of positive numbers
        up, down = math.exp(h), math.exp(-h)
        by_prior = (regression_evidence(case, 1.3 * up, 0.6) - regression_evidence(case, 1.3 * down, 0.6)) / (
            2 * h
        )
        by_noise = (regression_evidence(case, 1.3, 0.6 * up) - regression_evidence(case, 1.3, 0.6 * down)) / (
            2 * h
        )
        assert_close(torch.stack(found), torch.tensor([by_prior, by_noise]), rtol=1e-6)


class Counts(PyroModule):
    def __init__(self, scale: float, masked: bool, factor: float) -> None:
        super().__init__()
        self.shape = PyroParam(torch.tensor(2.0), constraint=dist.constraints.positive)
        self.rate = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)
        self.options = (scale, masked, factor)

    def forward(self, y: Tensor) -> None:
        scale, masked, factor = self.options
        level = pyro.sample("level", dist.Gamma(self.shape, self.rate))
        if factor:
            pyro.factor("push", factor * level.log())
        with pyro.plate("data", len(y)), handled(scale, masked, MASK[: len(y)]):
            pyro.sample("obs", dist.Poisson(level), obs=y)


def stirling(a: float) -> float:
    """The logarithm of what Laplace's method makes of the gamma function."""
    return a * math.log(a) - a + 0.5 * math.log(2 * math.pi / a)


@pytest.mark.parametrize("case", [case for case in CASES if case != "whole"])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_counts_differ_from_quadrature_by_stirlings_error(case: str, curvature: Any) -> None:
    scale, masked, factor, _ = CASES[case]
    if factor and curvature == "ggn":
        pytest.skip("factors have no Fisher information")
    y = COUNTS.numpy()[MASK.numpy()] if masked else COUNTS.numpy()
    a, b = 2.0 + scale * float(y.sum()) + factor, 0.5 + scale * len(y)

    def density(u: float) -> float:
        prior = stats.gamma.logpdf(math.exp(u), 2.0, scale=2.0) + u
        return float(prior + factor * u + scale * stats.poisson.logpmf(y, math.exp(u)).sum())

    top = density(math.log(a / b))
    area, _ = quad(
        lambda u: math.exp(density(u) - top),
        math.log(a / b) - 9,
        math.log(a / b) + 5,
        points=[math.log(a / b)],
        epsabs=0,
        epsrel=1e-11,
    )
    exact = top + math.log(area)
    module = Counts(scale, masked, factor)
    guide = AutoLaplace(module, curvature=curvature).initialize(COUNTS).polish(COUNTS)
    guide.laplace_approximation(COUNTS)
    assert_close(guide.median()["level"], a / b, rtol=1e-8)
    assert_close(guide.log_evidence(), exact - (float(gammaln(a)) - stirling(a)), rtol=1e-8)
    value = guide.log_evidence(data=COUNTS)
    (by_rate,) = torch.autograd.grad(value, [module.rate_unconstrained])
    # at a fixed point: d/db [2 log b - b level - 1/2 log(b + ...)], times b for its logarithm
    assert_close(by_rate, 2.0 - 0.5 * a / b - 0.5 * 0.5 / b, rtol=1e-8)


def test_single_precision_sums_in_double() -> None:
    torch.set_default_dtype(torch.float32)
    x = torch.randn(20_000, 2)
    y = x @ torch.tensor([1.0, -2.0]) + 30.0 * torch.randn(20_000)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ weight, 30.0), obs=y)

    guide = AutoLaplace(model).initialize(x, y).polish(x, y).laplace_approximation(x, y)
    wide = x.double()
    precision = torch.eye(2, dtype=torch.float64) + wide.T @ wide / 900
    mean = torch.linalg.solve(precision, wide.T @ y.double() / 900)
    joint = torch.distributions.Normal(wide @ mean, 30.0).log_prob(y.double()).sum()
    joint = joint + torch.distributions.Normal(torch.zeros(2).double(), 1.0).log_prob(mean).sum()
    expected = joint + math.log(2 * math.pi) - 0.5 * torch.logdet(precision)
    assert guide.log_evidence().dtype == torch.float64
    assert abs(float(guide.log_evidence() - expected)) < 3e-3  # of 96,000 nats
    batches = list(zip(x.split(1000), y.split(1000), strict=True))
    guide.to_point_estimate().laplace_approximation(batches)
    assert abs(float(guide.log_evidence() - expected)) < 3e-3
