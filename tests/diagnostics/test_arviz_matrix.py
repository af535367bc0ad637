# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Every ArviZ function of both generations on posteriors of every kind, in memory and read back from disk."""

import json
from pathlib import Path
from typing import Any

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer.autoguide import AutoNormal

from benchmarks.arviz_matrix import (
    POSTERIORS,
    arviz_generation,
    attempt,
    check_folder,
    new_checks,
    old_checks,
    table,
    why_not,
)
from pyro_bnn.diagnostics import datatree_to_inference_data, to_datatree
from pyro_bnn.infer import fit, nuts
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoMixture
from tests.infer.models import linear_data


def two_sites(x: torch.Tensor, y: torch.Tensor | None = None) -> None:

    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal((x * weight).sum(-1), sigma), obs=y)


def posterior(name: str, x: torch.Tensor, y: torch.Tensor) -> Any:
    if name == "nuts":
        return nuts(two_sites, (x, y), num_samples=100, warmup_steps=50, num_chains=2, progress_bar=False)
    guide = {
        "mixture": lambda: AutoMixture(two_sites, 4),
        "ensemble": lambda: AutoMixture(two_sites, 4, component="delta"),
        "laplace": lambda: AutoLaplace(two_sites),
        "hfl": lambda: AutoHessianFreeLaplace(two_sites),
        "svi": lambda: AutoNormal(two_sites),
    }[name]()
    fit(two_sites, guide, (x, y), num_steps=300, optim=0.05, progress_bar=False)
    if name == "laplace":
        guide.polish((x, y)).laplace_approximation((x, y))
    if name == "hfl":
        guide.polish((x, y))
        guide.laplace_approximation((x, y), (x,))
    return guide


#: What cannot be done on a posterior, whoever exports it: without a density there is no log_q, and the importance
#: ratios of four points have no tail to smooth.
IMPOSSIBLE = {
    "hfl": {"loo_approximate_posterior"},
    "nuts": {"loo_approximate_posterior"},
    "ensemble": {"loo_approximate_posterior", "loo", "compare", "loo_pit", "psense_summary"},
}


@pytest.mark.parametrize("name", ["svi", "mixture", "ensemble", "laplace", "hfl", "nuts"])
def test_functions_run(name: str, tmp_path: Path) -> None:
    x, y = linear_data(20)
    tree = to_datatree(two_sites, posterior(name, x, y), (x, y), num_samples=200, prior_samples=20)
    path = tmp_path / "tree.nc"
    tree.to_netcdf(path)
    if arviz_generation() == 0:
        data = az.from_netcdf(path)
        failed = {c: text for c, f in old_checks().items() if (text := attempt(f, data)) != "ok"}
        assert not failed
        assert isinstance(datatree_to_inference_data(tree), az.InferenceData)
    with xr.open_datatree(path) as loaded:
        failed = {c: t for c, f in new_checks(plots=False).items() if (t := attempt(f, loaded)) != "ok"}
    assert set(failed) == IMPOSSIBLE.get(name, set()), failed


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FILES = [RESULTS / "arviz_matrix_0.json", RESULTS / "arviz_matrix_1.json"]


@pytest.mark.parametrize("path", FILES, ids=["ArviZ 0", "ArviZ 1"])
def test_committed_matrix_is_complete(path: Path) -> None:
    """Every posterior, every cell what the reasons say, and the versions that wrote and checked it."""
    rows = json.loads(path.read_text())
    assert {row["posterior"] for row in rows} == set(POSTERIORS)
    for row in rows:
        assert {"python", "torch", "pyro-ppl", "arviz", "xarray"} <= set(row["written"]) & set(row["checked"])
        old = row["checked"]["arviz"].startswith("0")
        for function, text in row["cells"].items():
            assert (text == "ok") == (why_not(function, row["posterior"], old) is None), (
                row["posterior"],
                function,
            )
    documented = Path(__file__).parents[2] / "docs" / "source" / "tables" / "arviz.rst"
    assert documented.read_text() == table(FILES)


def test_check_fails_without_posteriors(tmp_path: Path) -> None:
    rows, wrong = check_folder(tmp_path)
    assert not rows
    assert len(wrong) == len(POSTERIORS)


def test_check_fails_where_a_cell_is_wrong(tmp_path: Path) -> None:
    """A tree with draws alone: what needs a log likelihood is not ok, and the other posteriors are missing."""
    draws = xr.Dataset({n: (("chain", "draw"), torch.randn(2, 50).numpy()) for n in ("sigma", "slope")})
    xr.DataTree.from_dict({"posterior": draws}).to_netcdf(tmp_path / "MCMC.nc")
    (row,), wrong = check_folder(tmp_path)
    assert row["cells"]["summary"] == "ok"
    assert row["cells"]["loo"] != "ok"
    assert any(text.startswith("MCMC, loo:") for text in wrong)
    assert sum("lacks the posterior" in text for text in wrong) == len(POSTERIORS) - 1
