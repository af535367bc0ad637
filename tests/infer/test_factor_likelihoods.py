# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Likelihoods that are pyro.factor statements, and sites beside the plates."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_bnn.curvature.accumulate import CurvatureAccumulator
from pyro_bnn.infer import fit, hfl
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoLaplaceMixture
from tests.common import assert_close
from tests.infer.models import NOISE, linear_data, linear_model, linear_posterior


def model(x: Tensor, y: Tensor) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.factor("likelihood", dist.Normal((x * weight).sum(-1), NOISE).log_prob(y))


def log_evidence(x: Tensor, y: Tensor) -> Tensor:
    covariance = x @ x.T + NOISE**2 * torch.eye(len(x))
    return torch.distributions.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(y)


@pytest.mark.parametrize("structure", ["full", "block", "low_rank", "diagonal"])
def test_the_hessian_needs_no_observed_site(structure: Any) -> None:
    x, y = linear_data()
    batches = [(x[:15], y[:15]), (x[15:], y[15:])]
    mean, covariance = linear_posterior(x, y)
    for data in ((x, y), batches):
        guide = AutoLaplace(model, structure=structure, curvature="hessian").initialize(x, y)
        guide.polish(data).laplace_approximation(data)
        assert_close(guide.loc.detach(), mean, rtol=1e-8)
        if structure == "diagonal":
            assert_close(guide.posterior.precision, torch.linalg.inv(covariance).diagonal(), rtol=1e-8)
            continue
        assert_close(guide.posterior.variance, covariance.diagonal(), rtol=1e-8)
        assert_close(guide.log_evidence(), log_evidence(x, y), rtol=1e-9)
        assert_close(guide.log_evidence(data=data), log_evidence(x, y), rtol=1e-9)


def test_mixtures_and_hessian_free_solves() -> None:
    x, y = linear_data()
    covariance = linear_posterior(x, y)[1]
    mixture = AutoLaplaceMixture(model, 2, curvature="hessian").initialize(x, y)
    mixture.polish(x, y).laplace_approximation(x, y)
    for part in mixture.posterior.components:
        assert_close(part.variance, covariance.diagonal(), rtol=1e-8)
    guide = AutoHessianFreeLaplace(model).initialize(x, y).polish(x, y)
    result = hfl.solve(guide, (x, y), functional=lambda sites: sites["weight"])
    assert_close(result.variances, covariance.diagonal(), rtol=1e-8)
    with pytest.raises(ValueError, match=r"no observed site.*functional"):
        guide.laplace_approximation((x, y), (x, y))


def test_fit_reaches_the_mode() -> None:
    x, y = linear_data()
    guide = AutoLaplace(model, curvature="hessian")
    fit(model, guide, (x, y), num_steps=1500, optim=0.02, progress_bar=False)
    assert_close(guide.loc.detach(), linear_posterior(x, y)[0], rtol=1e-3)


@pytest.mark.parametrize("curvature", ["ggn", "mc_fisher", "empirical_fisher"])
def test_fisher_matrices_are_refused(curvature: Any) -> None:
    x, y = linear_data()
    with pytest.raises(ValueError, match=r"'likelihood' is a pyro.factor.*curvature='hessian'"):
        AutoLaplace(model, curvature=curvature).initialize(x, y)
    with pytest.raises(ValueError, match="curvature='hessian'"):
        fit(model, AutoLaplace(model, curvature=curvature), (x, y), num_steps=1, progress_bar=False)


def test_products_with_a_fisher_matrix_are_refused() -> None:
    x, y = linear_data()
    guide = AutoLaplace(model, curvature="hessian").initialize(x, y)
    with pytest.raises(ValueError, match=r"'likelihood' is a pyro.factor.*curvature='hessian'"):
        CurvatureAccumulator(guide.packed, guide.loc, "ggn").operator((x, y))


def test_partly_covered_factors_are_refused() -> None:
    def subsampled(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
        with pyro.plate("data", 40, subsample_size=len(x)):
            pyro.factor("likelihood", dist.Normal((x * weight).sum(-1), NOISE).log_prob(y))

    x, y = linear_data()
    guide = AutoLaplace(subsampled, curvature="hessian").initialize(x, y)
    with pytest.raises(ValueError, match="cover 10 of the 40"):
        guide.laplace_approximation(x[:10], y[:10])


def beside_the_plate(weight: Tensor) -> None:
    pyro.sample("anchor", dist.Normal(weight, 0.3).to_event(1), obs=torch.tensor([1.0, -1.0, 2.0]))


def factor_beside(weight: Tensor) -> None:
    pyro.factor("anchor", dist.Normal(weight, 0.3).log_prob(torch.tensor([1.0, -1.0, 2.0])).sum())


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("beside", "curvature"),
    [(beside_the_plate, "ggn"), (beside_the_plate, "hessian"), (factor_beside, "hessian")],
)
@pytest.mark.parametrize("sizes", [[40], [25, 15], [10, 10, 20]], ids=str)
def test_what_is_beside_the_plate_counts_once(
    beside: Callable[[Tensor], None], curvature: Any, sizes: list[int]
) -> None:
    def anchored(x: Tensor, y: Tensor | None = None) -> Tensor:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
        beside(weight)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal((x * weight).sum(-1), NOISE), obs=y)

    x, y = linear_data()
    precision = x.T @ x / NOISE**2 + (1 + 1 / 0.3**2) * torch.eye(3)
    mean = torch.linalg.solve(precision, x.T @ y / NOISE**2 + torch.tensor([1.0, -1.0, 2.0]) / 0.3**2)
    # the anchor is an observation with x = 1: evidence of all data together
    rows = torch.cat([x / NOISE, torch.eye(3) / 0.3])
    target = torch.cat([y / NOISE, torch.tensor([1.0, -1.0, 2.0]) / 0.3])
    covariance = rows @ rows.T + torch.eye(len(rows))
    evidence = torch.distributions.MultivariateNormal(torch.zeros(len(rows)), covariance).log_prob(target)
    evidence = evidence - 40 * torch.tensor(NOISE).log() - 3 * torch.tensor(0.3).log()
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    guide = AutoLaplace(anchored, curvature=curvature).initialize(x, y)
    guide.polish(batches).laplace_approximation(batches)
    assert_close(guide.loc.detach(), mean, rtol=1e-8)
    assert_close(guide.posterior.precision, precision, rtol=1e-8)
    assert_close(guide.log_evidence(), evidence, rtol=1e-9)
    assert_close(guide.log_evidence(data=batches), evidence, rtol=1e-9)


def test_equal_batches_count_each() -> None:
    x, y = linear_data()
    twice = [(x, y), (x, y)]
    guide = AutoLaplace(linear_model).initialize(x, y).polish(twice).laplace_approximation(twice)
    assert_close(guide.posterior.precision, 2 * x.T @ x / NOISE**2 + torch.eye(3), rtol=1e-9)
