# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Data in parts, more rows than the plate has, and other rows than those of the guide: right, or refused by name. The reference
is conjugacy.
"""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_bnn.diagnostics import to_datatree
from pyro_bnn.infer import hfl, posterior_predictive
from pyro_bnn.infer.autoguide import AutoLaplace
from tests.common import assert_close

N = 8


def model(x: Any, y: Any = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", N, subsample_size=len(x)):
        pyro.sample("obs", dist.Normal((x * w).sum(-1), 0.5), obs=y)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(N, 2), torch.randn(N)


@pytest.mark.parametrize("structure", ["full", "diagonal"])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_parts_of_a_plate_one_after_the_other(structure: Any, curvature: Any) -> None:
    x, y = data()
    guide = AutoLaplace(model, structure=structure, curvature=curvature).initialize(x, y).polish((x, y))
    whole = AutoLaplace(model, structure=structure, curvature=curvature).initialize(x, y).polish((x, y))
    whole.laplace_approximation((x, y))
    for i, part in enumerate((slice(0, 3), slice(3, 5), slice(5, 8))):
        guide.laplace_approximation((x[part], y[part]), override=False)
        if not i and structure == "full":
            seen = torch.eye(2) + x[part].T @ x[part] / 0.25
            assert_close(guide.posterior.covariance_matrix, torch.linalg.inv(seen))
    precision = torch.eye(2) + x.T @ x / 0.25
    if structure == "full":
        exact = MultivariateNormal(torch.zeros(N), x @ x.T + 0.25 * torch.eye(N)).log_prob(y)
        assert_close(guide.posterior.covariance_matrix, torch.linalg.inv(precision))
        assert_close(guide.log_evidence(), exact)
    assert_close(guide.posterior.variance, whole.posterior.variance)
    assert_close(guide.log_evidence(), whole.log_evidence())
    with pytest.raises(ValueError, match="cover 11 of the 8 elements of plate 'data'"):
        guide.laplace_approximation((x[:3], y[:3]), override=False)


def test_a_part_alone_is_refused_unless_more_follow() -> None:
    x, y = data()
    guide = AutoLaplace(model).initialize(x, y).polish((x, y))
    with pytest.raises(ValueError, match="cover 3 of the 8 elements of plate 'data'"):
        guide.laplace_approximation((x[:3], y[:3]))


def test_more_test_rows_than_the_plate_has() -> None:
    x, y = data()
    test = torch.randn(13, 2), torch.randn(13)
    guide = AutoLaplace(model).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    covariance = torch.linalg.inv(torch.eye(2) + x.T @ x / 0.25)
    mean = covariance @ x.T @ y / 0.25
    variance = ((test[0] @ covariance) * test[0]).sum(-1)
    found = guide.predictive(test[0])["obs"]
    assert_close(found.mean, test[0] @ mean)
    assert_close(found.variance, variance + 0.25)
    assert_close(hfl.solve(guide, (x, y), (test[0],)).variance.flatten(), variance)
    prediction = posterior_predictive(model, guide, test, num_samples=4)
    assert_close(prediction.mean, prediction.draws["w"] @ test[0].T)
    density = torch.distributions.Normal(prediction.draws["w"] @ test[0].T, 0.5).log_prob(test[1])
    assert_close(prediction.log_likelihood, density)
    with pytest.raises(ValueError, match="cover 13 of the 8"):
        guide.laplace_approximation(test)


def test_other_rows_than_those_of_the_latents() -> None:
    def local(x: Any, y: Any = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", N, subsample_size=len(x)):
            e = pyro.sample("e", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal((x * w).sum(-1) + e, 0.5), obs=y)

    x, y = data()
    guide = AutoLaplace(local).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    for rows in (torch.randn(3, 2), torch.randn(13, 2), torch.randn(1, 2)):
        for call in (guide.predictive, lambda rows: hfl.solve(guide, (x, y), (rows,))):
            with pytest.raises(ValueError, match="latent site 'e' has shape"):
                call(rows)


def test_missing_observations_in_a_loader_are_refused_by_name() -> None:
    def missing(x: Any, seen: Any, y: Any) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", N, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y, obs_mask=seen)

    x, y = data()
    seen = torch.arange(N) % 3 > 0
    for sizes in ((4, 4), (3, 5)):
        loader = list(zip(*(t.split(sizes) for t in (x, seen, y)), strict=True))
        for first in ((x, seen, y), loader[0]):
            guide = AutoLaplace(missing).initialize(*first)
            with pytest.raises(ValueError, match="latent site 'obs_unobserved' has"):
                guide.polish(loader)


def test_iterators_are_named() -> None:
    x, y = data()
    guide = AutoLaplace(model).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    for call in (
        lambda data: guide.log_evidence(data=data),
        lambda data: hfl.solve(guide, data, (x,)),
        lambda data: hfl.regvar(guide, data, (x,)),
    ):
        with pytest.raises(ValueError, match="data is an iterator"):
            call(iter(batches))


@pytest.mark.parametrize("name", ["draw", "chain", "a/b"])
@pytest.mark.parametrize("role", ["latent", "observed", "plate"])
def test_names_that_trees_use_themselves(name: str, role: str) -> None:
    latent, observed, plate = (name if role == r else r for r in ("latent", "observed", "plate"))

    def named(x: Any, y: Any) -> None:
        w = pyro.sample(latent, dist.Normal(0.0, 1.0))
        with pyro.plate(plate, len(x)):
            pyro.sample(observed, dist.Normal(w * x, 1.0), obs=y)

    draws, x, y = {latent: torch.randn(3)}, torch.randn(4), torch.randn(4)
    if name != "a/b":
        with pytest.raises(ValueError, match=f"{name!r} is the name of a dimension of every tree"):
            to_datatree(named, draws, (x, y))
        return
    tree = to_datatree(named, draws, (x, y))
    assert_close(torch.as_tensor(tree["posterior"][latent.replace("/", ".")].values)[0], draws[latent])
    expected = torch.distributions.Normal(draws[latent][:, None] * x, 1.0).log_prob(y)
    found = tree["log_likelihood"][observed.replace("/", ".")]
    assert_close(torch.as_tensor(found.values)[0], expected)
    assert found.dims[-1] == plate.replace("/", ".")


def test_predictions_with_names_that_clash() -> None:
    def named(x: Any, y: Any, z: Any) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(w * x, 1.0), obs=y)
            pyro.sample("obs_mean", dist.Normal(w * x, 1.0), obs=z)

    found = posterior_predictive(
        named, {"w": torch.randn(3)}, (torch.randn(4), torch.randn(4), torch.randn(4))
    )
    with pytest.raises(ValueError, match="'obs_mean'"):
        found.to_dataset()
