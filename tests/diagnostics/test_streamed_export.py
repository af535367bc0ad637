# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Trees written in blocks of draws: the same bits as in memory, from pieces of bounded size."""

import importlib.util
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader, TensorDataset

from pyro_bnn.diagnostics import datatree_to_inference_data, to_datatree
from pyro_bnn.diagnostics.storage import TreeWriter
from pyro_bnn.infer import nuts
from pyro_bnn.infer.autoguide import AutoLaplace, AutoMixture
from tests.infer.models import linear_data, linear_model

ROWS = 17


def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
    weight = pyro.sample("layer.weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        mean = (x * weight).sum(-1)
        pyro.sample("count", dist.Poisson(mean.exp()), obs=None if y is None else y.abs().round())
        pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


def posteriors(name: str, x: torch.Tensor, y: torch.Tensor) -> Any:
    if name == "nuts":
        return nuts(model, (x, y), num_samples=20, warmup_steps=20, num_chains=2, progress_bar=False)
    if name == "draws":
        return {"layer.weight": torch.randn(40, 3), "sigma": torch.rand(40) + 0.5}
    guides = [AutoMixture(model, 2)] if name == "mixture" else [AutoNormal(model) for _ in range(3)]
    for guide in guides:
        guide(x, y)
    return guides[0] if name in ("mixture", "normal") else guides


def identical(found: xr.DataTree, expected: xr.DataTree) -> None:
    assert set(found.children) == set(expected.children)
    for name, group in expected.children.items():
        left, right = found[name].to_dataset().load(), group.to_dataset()
        # data variables, coords, dims and dtypes, to the last bit
        xr.testing.assert_equal(left, right)
        for key in right.variables:
            assert left[key].dtype.kind == right[key].dtype.kind, (name, key)
            assert left[key].dims == right[key].dims, (name, key)


@pytest.mark.every(2)
@pytest.mark.filterwarnings(
    "ignore:Estimated shape parameter of Pareto"
)  # twenty draws far from the posterior
@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
@pytest.mark.parametrize("name", ["normal", "mixture", "ensemble", "nuts", "draws"])
def test_equal_to_the_export_in_memory(name: str, suffix: str, tmp_path: Path) -> None:
    if suffix == ".zarr" and importlib.util.find_spec("zarr") is None:
        pytest.skip("zarr is not installed")
    x, y = linear_data(ROWS)
    posterior = posteriors(name, x, y)
    loader = DataLoader(TensorDataset(x, y), batch_size=7)
    options: dict[str, Any] = {
        "block_size": 6, "weights": True, "thin": 4, "prior_samples": 5,
        "num_samples": 39 if name == "ensemble" else 40, "num_chains": 2 if name == "draws" else 1,
    }  # fmt: skip
    pyro.set_rng_seed(3)
    expected = to_datatree(model, posterior, loader, **options)
    pyro.set_rng_seed(3)
    with to_datatree(model, posterior, loader, path=tmp_path / f"tree{suffix}", **options) as streamed:
        identical(streamed, expected)
        draws = streamed["log_likelihood"].sizes["draw"]
        assert streamed["posterior"].sizes["draw"] == -(-draws // 4)
        np.testing.assert_array_equal(streamed["log_likelihood"]["draw"], np.arange(draws))
        assert streamed.attrs["creation_library"] == "pyro_bnn"
        assert list(streamed["posterior"].attrs["sample_dims"]) == ["chain", "draw"]
    if suffix == ".nc":
        read = az.from_netcdf(tmp_path / "tree.nc")
        np.testing.assert_array_equal(read.log_likelihood["obs"], expected["log_likelihood"]["obs"])
        loo, in_memory = (
            az.loo(t, var_name="obs", pointwise=True) for t in (read, datatree_to_inference_data(expected))
        )
        for key in ("loo_i", "elpd_i"):
            if hasattr(loo, key):
                np.testing.assert_array_equal(getattr(loo, key), getattr(in_memory, key))


def test_blocks_of_given_draws_change_nothing(tmp_path: Path) -> None:
    """Without random numbers the size of the blocks does not matter beyond rounding."""
    x, y = linear_data(ROWS)
    posterior = posteriors("draws", x, y)
    whole = to_datatree(model, posterior, (x, y), predictions=False)
    with to_datatree(
        model, posterior, (x, y), predictions=False, path=tmp_path / "t.nc", block_size=7
    ) as tree:
        for group in whole.children:
            xr.testing.assert_allclose(tree[group].to_dataset(), whole[group].to_dataset(), rtol=1e-12)


def test_importance_weights_are_normalised_over_all_blocks(tmp_path: Path) -> None:
    x, y = linear_data(ROWS)
    guide = AutoLaplace(linear_model)
    guide.initialize(x, y)
    guide.polish((x, y)).laplace_approximation((x, y))
    with to_datatree(
        linear_model, guide, (x, y), num_samples=50, path=tmp_path / "t.nc", block_size=8
    ) as tree:
        # the Laplace approximation of a conjugate model is its posterior
        np.testing.assert_allclose(tree["sample_stats"]["log_weight"], -np.log(50), atol=1e-6)


def test_no_block_exceeds_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = linear_data(ROWS)
    sizes: list[tuple[str, int]] = []
    append = TreeWriter.append

    def record(self: TreeWriter, name: str, group: xr.Dataset) -> None:
        sizes.append((name, sum(v.nbytes for v in group.data_vars.values())))
        append(self, name, group)

    monkeypatch.setattr(TreeWriter, "append", record)
    posterior = posteriors("mixture", x, y)
    # of both components: weights, sigma, two likelihoods and two predictions per row
    per_draw = 2 * 8 * (3 + 1 + 4 * ROWS)
    for draws in (1, 3, 6):
        sizes.clear()
        options: dict[str, Any] = {"num_samples": 24, "weights": True, "max_block_memory": draws * per_draw}
        with to_datatree(model, posterior, (x, y), path=tmp_path / "t.nc", **options) as tree:
            assert tree["posterior"].sizes["draw"] == 12
        grown = [s for n, s in sizes if n in ("posterior", "log_likelihood", "posterior_predictive")]
        blocks = [sum(grown[i : i + 3]) for i in range(0, len(grown), 3)]
        assert len(blocks) == 12 // draws
        assert set(blocks) == {draws * per_draw}
    with pytest.raises(ValueError, match=r"max_block_memory: one draw of each chain \(2\) takes 1.15 kB"):
        to_datatree(model, posterior, (x, y), path=tmp_path / "t.nc", max_block_memory=per_draw - 1)


def test_data_that_cannot_be_read_again(tmp_path: Path) -> None:
    x, y = linear_data(ROWS)
    posterior = posteriors("draws", x, y)
    shuffled = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    with pytest.raises(ValueError, match="does not shuffle"):
        to_datatree(model, posterior, shuffled, path=tmp_path / "t.nc", block_size=7)
    with pytest.raises(ValueError, match="run through once only"):
        to_datatree(model, posterior, iter([(x, y)]))
