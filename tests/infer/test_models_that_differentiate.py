# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Models that take derivatives themselves: every first run has gradients enabled."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyro_bnn.infer import EarlyStopping, fit, nuts
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoLaplaceMixture
from tests.common import assert_close

X = torch.linspace(-1, 1, 12, dtype=torch.float64)


def oscillator(x: Tensor, y: Tensor | None = None) -> Tensor:
    """The observed slope of a cubic, taken by autograd: that of weights on 1, 2x and 3x^2."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    point = x.detach().clone().requires_grad_(True)
    value = weight[0] * point + weight[1] * point**2 + weight[2] * point**3
    (slope,) = torch.autograd.grad(value.sum(), point, create_graph=True)
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(slope, 0.3), obs=y)


def data() -> tuple[Tensor, Tensor]:
    return X, 1.0 - X + 0.5 * X**2 + 0.3 * torch.randn(12)


def exact(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.stack([torch.ones_like(x), 2 * x, 3 * x**2], -1)
    precision = torch.eye(3) + rows.T @ rows / 0.09
    return torch.linalg.solve(precision, rows.T @ y / 0.09), torch.linalg.inv(precision)


def test_the_exact_hessian_of_a_derivative() -> None:
    x, y = data()
    mean, covariance = exact(x, y)
    guide = AutoLaplace(oscillator, curvature="hessian").initialize(x, y)
    with torch.no_grad():  # whatever surrounds the calls
        guide.polish(x, y).laplace_approximation(x, y)
    assert_close(guide.loc.detach(), mean, rtol=1e-8)
    assert_close(guide.posterior.covariance_matrix, covariance, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    "make", [AutoLaplace, AutoHessianFreeLaplace, lambda model: AutoLaplaceMixture(model, 2), AutoNormal]
)
def test_guides_initialise_and_fit(make: Callable[..., Any]) -> None:
    x, y = data()
    with torch.no_grad():
        guide = make(oscillator)
        if hasattr(guide, "initialize"):
            guide.initialize(x, y)
    assert fit(oscillator, guide, (x, y), num_steps=2, progress_bar=False).num_steps == 2


def test_data_held_out() -> None:
    x, y = data()
    stopping = EarlyStopping((x, y), every=1, patience=2, num_samples=2)
    fit(oscillator, AutoNormal(oscillator), (x, y), num_steps=3, callbacks=stopping, progress_bar=False)
    assert len(stopping.history) == 3


def test_chains() -> None:
    x, y = data()
    mean, covariance = exact(x, y)
    run = nuts(oscillator, (x, y), num_samples=200, warmup_steps=100, num_chains=1, progress_bar=False)
    draws = run.samples["weight"][0]
    assert_close((draws.mean(0) - mean) / covariance.diagonal().sqrt(), torch.zeros(3), atol=0.4)


class Scaled(PyroModule):
    """The prior has a parameter, so that a first run with gradients leaves a graph behind."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = PyroParam(torch.tensor(2.0, dtype=torch.float64), constraint=dist.constraints.positive)

    def forward(self, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(0.0, self.scale).expand([2]).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(weight.sum(), 1.0), obs=y)


@pytest.mark.parametrize("make", [AutoLaplace, lambda model: AutoLaplaceMixture(model, 2)])
def test_guides_keep_no_graph(make: Callable[..., Any]) -> None:
    model = Scaled()
    guide = make(model).initialize(torch.ones(3))
    for site in guide.prototype_trace.nodes.values():
        if site["type"] == "sample":
            assert not site["value"].requires_grad
    copy.deepcopy(guide)
    pickle.dumps(guide)
    guide.laplace_approximation(torch.ones(3), map_tolerance=float("inf"))
    (gradient,) = torch.autograd.grad(
        (guide if isinstance(guide, AutoLaplace) else guide.components[0]).log_evidence(data=torch.ones(3)),
        [model.scale_unconstrained],
    )
    assert float(gradient) != 0  # the model's own parameter is still in use
