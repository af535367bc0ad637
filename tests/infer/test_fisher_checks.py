# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Likelihoods whose latents do not act through the parameters of a Fisher matrix are refused; the Hessian takes them."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_bnn.infer import hfl
from pyro_bnn.infer.autoguide import AutoLaplace
from tests.common import assert_close

Model = Callable[..., None]
FISHERS: list[Any] = ["ggn", "mc_fisher", "empirical_fisher"]
STRUCTURES: list[Any] = ["full", "block", "kronecker", "diagonal", "low_rank", "nystrom", "function_space"]


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(8, 2, generator=generator, dtype=torch.float64),
        torch.randn(8, generator=generator, dtype=torch.float64),
    )


def weight() -> Tensor:
    return pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))


def residuals(x: Tensor, y: Tensor | None = None) -> None:
    w = weight()
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x.new_zeros(len(x)), 0.5), obs=None if y is None else y - x @ w)


def learned_noise(x: Tensor, y: Tensor | None = None) -> None:
    w, s = weight(), pyro.sample("s", dist.LogNormal(x.new_zeros(()), 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample(
            "obs", dist.Normal(x.new_zeros(len(x)), s.expand(len(x))), obs=None if y is None else y - x @ w
        )


def events(x: Tensor, y: Tensor | None = None) -> None:
    w = weight()
    value = None if y is None else (y - x @ w).reshape(4, 2)
    with pyro.plate("data", 4):
        pyro.sample("obs", dist.Normal(x.new_zeros(4, 2), 0.5).to_event(1), obs=value)


def one_of_two(x: Tensor, y: Tensor | None = None) -> None:
    w = weight()
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)
        pyro.sample("more", dist.Normal(x.new_zeros(len(x)), 0.5), obs=None if y is None else 1 - x @ w)


def scaled(x: Tensor, y: Tensor | None = None) -> None:
    w = weight()
    with pyro.plate("data", len(x)), pyro.poutine.scale(scale=(x @ w).exp()):
        pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)


VALUES = {f.__name__: f for f in (residuals, learned_noise, events, one_of_two)}


@pytest.mark.parametrize("curvature", FISHERS)
@pytest.mark.parametrize("name", VALUES)
def test_latents_in_an_observed_value_are_named(name: str, curvature: Any) -> None:
    x, y = data()
    guide = AutoLaplace(VALUES[name], curvature=curvature).initialize(x, y)
    with pytest.raises(
        ValueError, match=r"site '(obs|more)': the observed value depends on latents.*hessian"
    ):
        guide.laplace_approximation(x, y)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_all_structures_refuse(structure: Any) -> None:
    x, y = data()
    guide = AutoLaplace(residuals, structure=structure, rank=2).initialize(x, y)
    with pytest.raises(ValueError, match="'obs': the observed value depends on latents"):
        guide.laplace_approximation(x, y)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_all_structures_refuse_in_a_later_batch(structure: Any) -> None:
    def model(x: Tensor, y: Tensor, kind: Tensor) -> None:
        w = weight()
        with pyro.plate("data", len(x)):
            if bool(kind):
                pyro.sample("obs", dist.Normal(x.new_zeros(len(x)), 0.5), obs=y - x @ w)
            else:
                pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)

    x, y = data()
    batches = [(x[:4], y[:4], torch.tensor(0)), (x[4:], y[4:], torch.tensor(1))]
    guide = AutoLaplace(model, structure=structure, rank=2).initialize(*batches[0])
    with pytest.raises(ValueError, match="'obs': the observed value depends on latents"):
        guide.laplace_approximation(batches, map_tolerance=1e9)


def test_hfl_refuses() -> None:
    x, y = data()
    guide = AutoLaplace(residuals).initialize(x, y)
    with pytest.raises(ValueError, match="'obs': the observed value depends on latents"):
        hfl.solve(guide, (x, y), functional=lambda z: z["w"], curvature="ggn")


def test_the_hessian_of_residuals_is_exact() -> None:
    x, y = data()
    guide = AutoLaplace(residuals, curvature="hessian").initialize(x, y).polish((x, y))
    guide.laplace_approximation((x, y))
    unit = torch.eye(8, dtype=x.dtype)
    marginal = torch.distributions.MultivariateNormal(x.new_zeros(8), x @ x.mT + 0.25 * unit)
    assert_close(torch.linalg.inv(guide.posterior.covariance_matrix), torch.eye(2) + x.mT @ x / 0.25)
    assert_close(guide.log_evidence(), marginal.log_prob(y))


def test_latents_in_a_scale_are_found_by_their_gradient() -> None:
    x, y = data()
    for structure in ("full", "low_rank"):
        guide = AutoLaplace(scaled, structure=structure).initialize(x, y)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"'obs': .* % of the gradient.*does not go through.*'loc'"):
            guide.laplace_approximation(x, y)
    guide = AutoLaplace(scaled).initialize(x, y)
    with pytest.raises(ValueError, match="does not go through"):
        hfl.solve(guide, (x, y), functional=lambda z: z["w"], curvature="ggn")
