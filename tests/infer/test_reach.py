# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""A likelihood that depends on latents without a gradient to them is refused by name."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_bnn.infer import fit
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoLaplaceMixture, AutoMixture
from tests.common import assert_close
from tests.infer.models import linear_data


def regression(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
        mean = x @ change(weight)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    return model


detached = regression(lambda w: w.detach())
CUTS = {
    "detach": detached,
    "numpy": regression(lambda w: torch.from_numpy(w.detach().numpy())),
    "items": regression(lambda w: torch.tensor([v.item() for v in w])),
    "data": regression(lambda w: w.data),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_graph_is_named(cut: str) -> None:
    x, y = linear_data()
    guide = AutoLaplace(CUTS[cut]).initialize(x, y)
    with pytest.raises(ValueError, match=r"depends on the latent sites \['weight'\].*does not reach"):
        guide.laplace_approximation(x, y)
    with pytest.raises(ValueError, match=r"'weight'.*does not reach"):
        guide.polish(x, y)


@pytest.mark.parametrize(
    "structure", ["full", "block", "kronecker", "diagonal", "low_rank", "nystrom", "function_space"]
)
@pytest.mark.parametrize("curvature", ["ggn", "mc_fisher", "empirical_fisher", "hessian"])
def test_all_structures_and_curvatures_refuse(structure: Any, curvature: Any) -> None:
    if curvature == "hessian" and structure in ("kronecker", "nystrom", "function_space"):
        pytest.skip("no such combination")
    x, y = linear_data()
    guide = AutoLaplace(detached, structure=structure, curvature=curvature).initialize(x, y)
    with pytest.raises(ValueError, match=r"'weight'.*does not reach"):
        guide.laplace_approximation(x, y)


def test_mixtures_and_hessian_free_guides_refuse() -> None:
    x, y = linear_data()
    with pytest.raises(ValueError, match=r"'weight'.*does not reach"):
        AutoLaplaceMixture(detached, 2).initialize(x, y).laplace_approximation(x, y)
    with pytest.raises(ValueError, match=r"'weight'.*does not reach"):
        AutoHessianFreeLaplace(detached).initialize(x, y).laplace_approximation((x, y), (x,))


@pytest.mark.parametrize("make", [AutoLaplace, AutoNormal, lambda model: AutoMixture(model, 1)])
def test_fit_refuses_before_the_first_step(make: Callable[..., Any]) -> None:
    x, y = linear_data()
    with pytest.raises(ValueError, match=r"no gradient of the likelihood reaches a latent site \('weight'\)"):
        fit(detached, make(detached), (x, y), num_steps=1, progress_bar=False)


def test_one_of_two_sites_is_named() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        slope = pyro.sample("slope", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        mean = x @ slope + offset.detach()
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    x, y = linear_data()
    with pytest.raises(ValueError, match=r"latent sites \['offset'\]"):
        AutoLaplace(model).initialize(x, y).laplace_approximation(x, y)


def test_a_site_that_does_not_enter_keeps_its_prior() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        slope = pyro.sample("slope", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
        level = pyro.sample("level", dist.Normal(0.0, 3.0))
        pyro.sample("below", dist.Normal(level, 2.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ slope, 0.5), obs=y)

    x, y = linear_data()
    guide = AutoLaplace(model).initialize(x, y).laplace_approximation(x, y, map_tolerance=float("inf"))
    assert_close(
        guide.posterior.covariance_matrix[3:, 3:], torch.tensor([[9.0, 9.0], [9.0, 13.0]]), rtol=1e-12
    )


def test_a_likelihood_without_latents_is_refused() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        pyro.sample("weight", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x.sum(-1), 0.5), obs=y)

    x, y = linear_data()
    with pytest.raises(ValueError, match=r"no gradient of the likelihood.*'weight'"):
        AutoLaplace(model).initialize(x, y).laplace_approximation(x, y)


def test_discrete_paths_and_score_functions_are_left_alone() -> None:
    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Beta(2.0, 2.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(rate), infer={"enumerate": "parallel"})
            pyro.sample("obs", dist.Normal(z, 1.0), obs=y)

    guide = AutoNormal(pyro.poutine.block(model, hide=["z"]))
    elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
    result = fit(model, guide, torch.randn(5), num_steps=2, elbo=elbo, progress_bar=False)
    assert result.num_steps == 2
