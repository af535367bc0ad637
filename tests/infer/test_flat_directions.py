# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Flat directions and saddles are refused, and the sites are named."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_bnn.curvature.accumulate import NotAMinimumError
from pyro_bnn.infer.autoguide import AutoLaplace
from tests.common import assert_close
from tests.infer.models import linear_data


def redundant(x: Tensor, y: Tensor | None = None) -> Tensor:
    """The data know the sum of the two only."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    first = pyro.sample("first", dist.ImproperUniform(dist.constraints.real, (), ()))
    second = pyro.sample("second", dist.ImproperUniform(dist.constraints.real, (), ()))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(x[:, :2] @ slope + first + second, 1.0), obs=y)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_a_flat_direction_is_named(curvature: Any, scale: float) -> None:
    x, y = linear_data()
    guide = AutoLaplace(redundant, curvature=curvature).initialize(scale * x, y)
    with pytest.raises(NotAMinimumError, match=r"'first', 'second'|'second', 'first'"):
        guide.laplace_approximation(scale * x, y, map_tolerance=float("inf"))


def test_a_nearly_flat_direction_is_right() -> None:
    def model(y: Tensor) -> None:
        first = pyro.sample("first", dist.Normal(0.0, 1e4))
        second = pyro.sample("second", dist.Normal(0.0, 1e4))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(first + second, 1.0), obs=y)

    y = torch.randn(10)
    guide = AutoLaplace(model).initialize(y).laplace_approximation(y, map_tolerance=float("inf"))
    # (prior + n 11')^-1 by the formula of Sherman and Morrison
    expected = 1e8 - 1e16 * 10 / (1 + 2e9)
    assert_close(guide.posterior.variance, torch.full((2,), expected), rtol=1e-6)


def product(y: Tensor) -> None:
    """At zero the curvature in each factor is that of the prior, and that in both is negative."""
    first = pyro.sample("first", dist.Normal(0.0, 1.0))
    second = pyro.sample("second", dist.Normal(0.0, 1.0))
    other = pyro.sample("other", dist.Normal(0.0, 1.0))
    pyro.sample("obs", dist.Normal(first * second + other, 0.5), obs=y)


@pytest.mark.parametrize("structure", ["full", "diagonal", "block", "low_rank"])
def test_a_saddle_is_named(structure: Any) -> None:
    y = torch.tensor(3.0)
    guide = AutoLaplace(product, structure=structure, curvature="hessian", rank=1).initialize(y)
    guide.loc.data.zero_()
    with pytest.raises(NotAMinimumError, match=r"\['first', 'second'\]|\['second', 'first'\]"):
        guide.laplace_approximation(y)


@pytest.mark.parametrize("structure", ["diagonal", "block", "low_rank"])
def test_a_minimum_passes(structure: Any) -> None:
    y = torch.tensor(3.0)
    guide = AutoLaplace(product, structure=structure, curvature="hessian", rank=3).initialize(y)
    guide.loc.data.normal_()
    guide.polish(y).laplace_approximation(y)

    def loss(u: Tensor) -> Tensor:
        return 0.5 * u.square().sum() + 0.5 * ((y - u[0] * u[1] - u[2]) / 0.5) ** 2

    hessian = torch.autograd.functional.hessian(loss, guide.loc.detach())
    expected = (
        torch.linalg.inv(hessian).diagonal() if structure == "low_rank" else hessian.diagonal().reciprocal()
    )
    assert_close(guide.posterior.variance, expected, rtol=1e-8)


def test_a_saddle_over_batches_is_found() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        first = pyro.sample("first", dist.Normal(0.0, 1.0))
        second = pyro.sample("second", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(first * second * x, 0.5), obs=y)

    x = torch.ones(6)
    batches = [(x[:4], 2 * x[:4]), (x[4:], 2 * x[4:])]
    guide = AutoLaplace(model, structure="diagonal", curvature="hessian").initialize(x, x)
    guide.loc.data.zero_()
    with pytest.raises(NotAMinimumError, match="saddle"):
        guide.laplace_approximation(batches)
