# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Functionals without a slope are refused; those that are constant, or have one, are not."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_bnn.infer import hfl
from pyro_bnn.infer.autoguide import AutoLaplace
from tests.common import assert_close

GRID = torch.linspace(-2, 2, 41)


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)


def curve(latents):
    w = latents["w"]
    return w[0] + w[1] * GRID - (0.5 + w[2].square()) * GRID.square()


@pytest.fixture
def fitted():
    x, y = torch.randn(20, 3), torch.randn(20)
    return AutoLaplace(model).initialize(x, y).polish((x, y)), (x, y)


SLOPELESS = {
    "argmax": lambda latents: GRID[curve(latents).argmax()],
    "probability": lambda latents: (curve(latents) > 0).double().mean(),
    "detached": lambda latents: latents["w"].detach().sum(),
    "numpy": lambda latents: torch.as_tensor(np.sin(latents["w"].detach().numpy())),
    "rounded": lambda latents: (10 * latents["w"]).round().sum(),
    "beside others": lambda latents: torch.stack([curve(latents).max(), (curve(latents) > 0).double().sum()]),
    "square at its minimum": lambda latents: (latents["w"][0] - latents["w"][0].detach()).square(),
    "constant": lambda latents: torch.ones(2),
}


@pytest.mark.parametrize("method", ["cg", "central", "probe"])
@pytest.mark.parametrize("functional", SLOPELESS.values(), ids=SLOPELESS)
def test_functionals_without_a_slope(functional, method, fitted):
    guide, data = fitted
    if functional is SLOPELESS["square at its minimum"]:
        at = guide.median()["w"][0]
        functional = lambda latents: (latents["w"][0] - at).square()  # noqa: E731
    with pytest.raises(
        ValueError, match=r"of the functional .*(zero gradient|do not depend).*draws of functions"
    ):
        hfl.solve(guide, data, functional=functional, method=method)


def test_functionals_with_a_slope_are_taken(fitted):
    guide, (x, y) = fitted
    precision = torch.eye(3) + 4 * x.mT @ x
    found = hfl.variance(guide, (x, y), functional=lambda latents: latents["w"].sum())
    assert_close(found, torch.linalg.inv(precision).sum(), rtol=1e-6)
    # the maximum over a grid has the slope of the curve at its place
    assert float(hfl.variance(guide, (x, y), functional=lambda latents: curve(latents).max())) > 0


def test_outputs_that_are_constant_have_no_variance(fitted):
    """A linear model at the origin, as an output and as a functional of inputs."""
    guide, data = fitted
    rows = torch.stack([torch.zeros(3), torch.ones(3)])
    expected = rows[1] @ torch.linalg.inv(torch.eye(3) + 4 * data[0].mT @ data[0]) @ rows[1]
    for options in ({}, {"functional": lambda latents, x: x @ latents["w"]}):
        found = hfl.variance(guide, data, (rows,), **options).flatten()
        assert_close(found, torch.stack([torch.zeros(()), expected]), rtol=1e-6)
