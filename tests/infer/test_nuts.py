# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer.autoguide import AutoMultivariateNormal
from torch.utils.data import DataLoader, TensorDataset

from pyro_bnn.diagnostics.arviz import to_datatree, to_inference_data
from pyro_bnn.infer import fit, posterior_predictive
from pyro_bnn.infer.autoguide import AutoLaplace, AutoMixture
from pyro_bnn.infer.sample.nuts import RecordingNUTS, nuts, starting_points
from pyro_bnn.nn import rank1_
from tests.common import assert_close
from tests.infer.models import linear_data, linear_model, linear_posterior


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"warmup_steps": -1}, {"num_chains": 1.5}])
def test_numbers_that_are_none_are_refused(options: dict[str, float]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=rf"{name} must be a whole number of at least [01], found {value}"):
        nuts(linear_model, linear_data(), progress_bar=False, **options)


def test_posterior_from_a_laplace_guide() -> None:
    x, y = linear_data()
    guide = AutoLaplace(linear_model)
    guide.initialize(x, y)
    guide.polish((x, y))
    guide.laplace_approximation((x, y))
    run = nuts(
        linear_model, (x, y), guide=guide, num_samples=400, warmup_steps=100, num_chains=2, progress_bar=False
    )
    mean, covariance = linear_posterior(x, y)
    draws = run.get_samples()["weight"]
    assert draws.shape == (800, 3)
    assert_close(draws.mean(0), mean, atol=0.03, rtol=0)
    assert_close(draws.T.cov(), covariance, atol=0.25 * float(covariance.diagonal().max()), rtol=0)
    stats = run.sample_stats
    assert float(stats["acceptance_rate"].mean()) > 0.6
    assert bool(((stats["acceptance_rate"] >= -1e-9) & (stats["acceptance_rate"] <= 1 + 1e-9)).all())
    assert not stats["diverging"].any()
    assert bool((stats["tree_depth"] >= 1).all())
    # energy = potential + kinetic; the potential is at least its minimum, the kinetic part is chi-squared / 2
    assert_close(stats["energy"].mean(), float(_minimum(x, y)) + 1.5 + 1.5, atol=0.5, rtol=0)


def _minimum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    mean, _ = linear_posterior(x, y)
    prior = dist.Normal(0.0, 1.0).log_prob(mean).sum()
    return -(dist.Normal(x @ mean, 0.5).log_prob(y).sum() + prior)


def test_mass_matrix_follows_the_sorted_names() -> None:
    """Two sites of very different scales, declared in the opposite order of their names."""

    def model(y: torch.Tensor) -> None:
        wide = pyro.sample("wide", dist.Normal(0.0, 100.0))
        pyro.sample("narrow", dist.Normal(torch.zeros(2), 0.01).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(1e-6 * wide, 1.0), obs=y)

    y = torch.zeros(2)
    guide = AutoLaplace(model, curvature="hessian")
    guide.initialize(y)
    guide.polish(y)
    guide.laplace_approximation(y)
    run = nuts(model, y, guide=guide, num_samples=300, warmup_steps=50, num_chains=1, progress_bar=False)
    assert_close(run.samples["wide"].std(), 100.0, rtol=0.3)
    assert_close(run.samples["narrow"].std(), 0.01, rtol=0.3)
    # with the right mass matrix the first trajectories are short already
    assert float(run.warmup_stats["tree_depth"][:, :20].double().mean()) < 4


def test_chains_start_in_components() -> None:
    """A bimodal posterior: chains from different components of a mixture visit both modes."""

    def model(y: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(z**2, 0.2), obs=y)

    y = torch.full((5,), 4.0)
    guide = AutoMixture(model, 2)
    guide.initialize(y)
    with torch.no_grad():
        guide.loc_unconstrained.copy_(torch.tensor([[-2.0], [2.0]]))
    points = starting_points(guide, 4, ((y,), {}))
    assert points["z"].sign().tolist() == [-1, 1, -1, 1]
    run = nuts(model, y, guide=guide, num_samples=30, warmup_steps=30, num_chains=2, progress_bar=False)
    assert_close(run.samples["z"].mean(1), [-2.0, 2.0], atol=0.1, rtol=0)


def test_export_with_warmup_and_statistics(tmp_path: Path) -> None:
    x, y = linear_data(15)
    run = nuts(linear_model, (x, y), num_samples=25, warmup_steps=20, num_chains=2, progress_bar=False)
    tree = to_datatree(linear_model, run, (x, y))
    assert tree["posterior"]["weight"].shape == (2, 25, 3)
    assert tree["warmup_posterior"]["weight"].shape == (2, 20, 3)
    assert set(tree["sample_stats"].data_vars) == {
        "lp", "energy", "tree_depth", "step_size", "acceptance_rate", "diverging",
    }  # fmt: skip
    assert tree["sample_stats"]["diverging"].dtype == bool
    tree.to_netcdf(tmp_path / "tree.nc")
    data = to_inference_data(linear_model, run, (x, y))
    energy = tree["sample_stats"]["energy"].values
    expected = (np.diff(energy) ** 2).mean(-1) / energy.var(-1, ddof=1)
    found = az.bfmi(data)  # an array in ArviZ 0.x, a tree in 1.x
    np.testing.assert_allclose(found["energy"] if isinstance(found, xr.DataTree) else found, expected)
    assert posterior_predictive(linear_model, run, (x, y)).mean.shape == (50, 15)


def test_rank1_network_under_nuts() -> None:
    torch.manual_seed(0)
    net = rank1_(torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)))
    x, y = linear_data(20, 2)

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        mean = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    guide = AutoMixture(model, 2)
    fit(model, guide, (x, y), num_steps=5, progress_bar=False)
    run = nuts(model, (x, y), guide=guide, num_samples=5, warmup_steps=5, num_chains=2, progress_bar=False)
    found = posterior_predictive(model, run, (x, y))
    assert found.mean.shape == (10, 20)
    assert set(run.samples) == set(guide.sample_posterior((1,)))


def test_one_batch_only() -> None:
    x, y = linear_data(10)
    with pytest.raises(ValueError, match="2 batches"):
        nuts(linear_model, DataLoader(TensorDataset(x, y), batch_size=5))


def test_covariance_of_pyros_guides() -> None:
    x, y = linear_data(10)
    guide = AutoMultivariateNormal(linear_model, init_scale=0.3)
    guide(x, y)
    kernel = RecordingNUTS(linear_model, 0.09 * torch.eye(3))
    kernel.setup(5, x, y)
    assert_close(kernel.inverse_mass_matrix[("weight",)], 0.09 * torch.eye(3))
    from pyro_bnn.infer.sample.nuts import _laplace_covariance

    assert_close(
        _laplace_covariance(guide, ["weight"], ((x, y), {})), 0.09 * torch.eye(3), rtol=1e-9, atol=1e-12
    )


def test_observations_and_sites_are_needed() -> None:
    """Without them NUTS would sample the prior, or fail far from the cause."""
    x, y = linear_data(10)
    with pytest.raises(ValueError, match=r"no observed site.*'obs'"):
        nuts(linear_model, (x,), num_samples=2, warmup_steps=2, num_chains=1, progress_bar=False)

    def with_noise(x: torch.Tensor, y: torch.Tensor) -> None:
        linear_model(x, y)
        pyro.sample("noise", dist.Normal(0.0, 1.0))

    guide = AutoMultivariateNormal(linear_model)
    guide(x, y)
    with pytest.raises(ValueError, match=r"no draws of the sites \['noise'\]"):
        nuts(with_noise, (x, y), guide=guide, num_samples=2, warmup_steps=2, num_chains=1, progress_bar=False)

    def density() -> None:
        pyro.sample("z", dist.Normal(2.0, 0.1))

    run = nuts(density, (), num_samples=50, warmup_steps=50, num_chains=1, progress_bar=False)
    assert_close(run.samples["z"].mean(), torch.tensor(2.0), atol=0.1, rtol=0)


def test_subsampled_plates_are_refused_by_name():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 20, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal(w * x, 1.0), obs=y)

    with pytest.raises(ValueError, match="plate 'rows' has 6 of its 20 rows"):
        nuts(model, (torch.ones(6), torch.ones(6)), num_samples=2, warmup_steps=2, progress_bar=False)
