# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Flat priors start at zero in unconstrained space, and give what least squares gives."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_median, init_to_value
from torch import Tensor
from torch.distributions import biject_to

from pyro_bnn.infer import fit, nuts
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoLaplaceMixture, AutoMixture
from pyro_bnn.model.flat import init_flat
from tests.common import assert_close
from tests.infer.models import NOISE, linear_data

constraints = dist.constraints


def model(x: Tensor, y: Tensor | None = None) -> Tensor:
    weight = pyro.sample("weight", dist.ImproperUniform(constraints.real_vector, (), (x.shape[-1],)))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal((x * weight).sum(-1), NOISE), obs=y)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_laplace_is_least_squares(curvature: Any) -> None:
    x, y = linear_data()
    guide = AutoLaplace(model, curvature=curvature).initialize(x, y).polish(x, y).laplace_approximation(x, y)
    assert_close(guide.loc.detach(), torch.linalg.lstsq(x, y.unsqueeze(-1)).solution.squeeze(-1), rtol=1e-9)
    assert_close(guide.posterior.covariance_matrix, NOISE**2 * torch.linalg.inv(x.T @ x), rtol=1e-9)


@pytest.mark.parametrize(
    ("support", "event"),
    [
        (constraints.real, ()),
        (constraints.positive, ()),
        (constraints.unit_interval, ()),
        (constraints.simplex, (3,)),
        (constraints.corr_cholesky, (3, 3)),
        (constraints.interval(2.0, 5.0), ()),
    ],
)
def test_every_support_starts_at_zero(support: Any, event: tuple[int, ...]) -> None:
    def scaled(y: Tensor) -> None:
        with pyro.plate("groups", 4):
            value = pyro.sample("value", dist.ImproperUniform(support, (), event))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(value.sum(), 1.0), obs=y)

    guide = AutoLaplace(scaled).initialize(torch.ones(3))
    transform = biject_to(support)
    zero = torch.zeros(4, *transform.inverse_shape(event))
    assert_close(guide.loc.detach(), torch.zeros(zero.numel()), atol=1e-12)
    assert_close(guide.median()["value"], transform(zero), atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        AutoLaplace,
        AutoHessianFreeLaplace,
        lambda model: AutoLaplaceMixture(model, 2),
        lambda model: AutoMixture(model, 2),
        lambda model: AutoNormal(model, init_loc_fn=init_flat(init_to_median)),
    ],
)
def test_every_guide_can_be_fitted(make: Callable[..., Any]) -> None:
    x, y = linear_data()
    assert fit(model, make(model), (x, y), num_steps=2, progress_bar=False).num_steps == 2


def test_values_of_the_user_win() -> None:
    x, y = linear_data()
    start = torch.tensor([1.0, 2.0, 3.0])
    guide = AutoLaplace(model, init_loc_fn=init_to_value(values={"weight": start})).initialize(x, y)
    assert_close(guide.loc.detach(), start)


def test_guides_of_pyro_say_how() -> None:
    x, y = linear_data()
    with pytest.raises(NotImplementedError) as caught:
        fit(model, AutoNormal(model), (x, y), num_steps=1, progress_bar=False)
    assert "init_flat" in str(caught.value.__notes__)


def test_chains_start_without_a_draw() -> None:
    x, y = linear_data()
    run = nuts(model, (x, y), num_samples=150, warmup_steps=100, num_chains=1, progress_bar=False)
    exact = torch.linalg.lstsq(x, y.unsqueeze(-1)).solution.squeeze(-1)
    assert_close(run.samples["weight"].mean((0, 1)), exact, atol=0.08, rtol=0)
