# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
    AutoStructured,
)

from pyro_bnn.infer import fit, load_guide, posterior_draws, save_guide
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoLaplaceMixture, AutoMixture
from pyro_bnn.infer.autoguide.laplace import Structure
from pyro_bnn.nn import rank1_
from tests.infer.models import linear_data, linear_model


def guide_list(model: Any) -> AutoGuideList:
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["weight"])))
    return guide


def positive(site: Any) -> torch.Tensor:
    return torch.ones(site["fn"].shape())


COMPONENTS = ("normal", "cauchy", "delta", "point", "low_rank")
BUILDERS: dict[str, Callable[[Any], Any]] = {
    "AutoDelta": AutoDelta,
    "AutoDiagonalNormal": AutoDiagonalNormal,
    "AutoGuideList": guide_list,
    "AutoHierarchicalNormalMessenger": AutoHierarchicalNormalMessenger,
    "AutoIAFNormal": lambda model: AutoIAFNormal(model, hidden_dim=[8]),
    "AutoLaplaceApproximation": AutoLaplaceApproximation,
    "AutoLowRankMultivariateNormal": AutoLowRankMultivariateNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoNormal": AutoNormal,
    "AutoNormalMessenger": AutoNormalMessenger,
    "AutoRegressiveMessenger": AutoRegressiveMessenger,
    "AutoStructured": AutoStructured,
    **{f"mixture {c}": partial(AutoMixture, num_components=3, component=c) for c in COMPONENTS},
    "mixture lognormal": lambda model: AutoMixture(model, 3, component="lognormal", init_loc_fn=positive),
    **{f"mixture {s} scale": partial(AutoMixture, num_components=3, scale=s) for s in ("shared", "fixed")},
    **{f"laplace {s}": partial(AutoLaplace, structure=s) for s in get_args(Structure)},
    "laplace mixture": lambda model: AutoLaplaceMixture(model, 2, weights="evidence"),
    "hfl": AutoHessianFreeLaplace,
}


def trained(name: str) -> Any:
    x, y = linear_data(12)
    guide = BUILDERS[name](linear_model)
    if name == "laplace mixture":
        guide.initialize(x, y)
        guide.set_modes([{"weight": torch.randn(3)} for _ in range(2)])
        return guide.laplace_approximation((x, y), map_tolerance=math.inf)
    fit(linear_model, guide, (x, y), num_steps=20, optim=0.1, progress_bar=False)
    if name.startswith("laplace"):
        guide.polish((x, y))
        guide.laplace_approximation((x, y))
    if name == "hfl":
        guide.polish((x, y))
        guide.laplace_approximation((x, y), (x,))
    return guide


def draws(guide: Any) -> torch.Tensor:
    pyro.set_rng_seed(3)
    return posterior_draws(guide, 5, (linear_data(12), {}))["weight"]


@pytest.mark.parametrize("name", BUILDERS)
def test_loads_into_a_fresh_guide(name: str, tmp_path: Path) -> None:
    guide = trained(name)
    # fit remembers the shapes of the data; a guide that never passed through it is told
    save_guide(guide, tmp_path / "guide", linear_data(12) if name == "laplace mixture" else None)
    fresh = load_guide(BUILDERS[name](linear_model), tmp_path / "guide")
    assert torch.equal(draws(fresh), draws(guide))
    save_guide(fresh, tmp_path / "again")  # a loaded guide still knows the shapes
    assert torch.equal(draws(load_guide(BUILDERS[name](linear_model), tmp_path / "again")), draws(guide))
    assert not list(pyro.get_param_store().keys())


def test_loads_into_a_fresh_process(tmp_path: Path) -> None:
    expected = {}
    for name in BUILDERS:
        guide = trained(name)
        save_guide(guide, tmp_path / name, linear_data(12))
        expected[name] = draws(guide)
    code = f"""
import torch
torch.set_default_dtype(torch.float64)
from tests.infer.test_persist import *
folder = Path({str(tmp_path)!r})
torch.save({{n: draws(load_guide(b(linear_model), folder / n)) for n, b in BUILDERS.items()}}, folder / "out")
"""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    found = torch.load(tmp_path / "out")
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", BUILDERS)
def test_state_dict_and_types_before_the_first_step(name: str) -> None:
    x, y = linear_data(12)
    guide = BUILDERS[name](linear_model)
    fit(linear_model, guide, (x, y), num_steps=1, optim=0.0, progress_bar=False)
    state = guide.state_dict()
    assert state
    guide.float()
    floats = [v for v in guide.state_dict().values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    assert all(v.dtype == torch.float32 for v in floats)
    guide.double()
    if not (name.startswith("laplace") or name == "hfl"):
        assert draws(guide).dtype == torch.float64


@pytest.mark.parametrize("name", BUILDERS)
def test_pickles(name: str) -> None:
    guide = trained(name)
    expected = draws(guide)
    assert torch.equal(draws(pickle.loads(pickle.dumps(guide))), expected)


def test_loading_leaves_the_statistics_of_a_network(tmp_path: Path) -> None:
    """A fresh guide is initialised on zeros, which the network must not take for data."""

    def build() -> tuple[torch.nn.Module, Any]:
        net = rank1_(
            torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
        )

        def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
            f = net(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(f, 1.0), obs=y)

        return net, model

    net, model = build()
    guide = AutoMixture(model, 2)
    fit(model, guide, linear_data(10), num_steps=3, progress_bar=False)
    save_guide(guide, tmp_path / "guide.pt")
    other, model = build()
    other.load_state_dict(net.state_dict())
    load_guide(AutoMixture(model, 2), tmp_path / "guide.pt")
    for name, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert other.training


def test_errors(tmp_path: Path) -> None:
    x, y = linear_data(12)
    guide = AutoNormal(linear_model)
    guide(x, y)
    save_guide(guide, tmp_path / "guide")
    with pytest.raises(ValueError, match="pass data"):
        load_guide(AutoNormal(linear_model), tmp_path / "guide")
    assert torch.equal(draws(load_guide(AutoNormal(linear_model), tmp_path / "guide", (x, y))), draws(guide))
    with pytest.raises(ValueError, match="holds a AutoNormal, not a AutoDelta"):
        load_guide(AutoDelta(linear_model), tmp_path / "guide")
    with pytest.raises(TypeError, match="parameter store"):
        save_guide(linear_model, tmp_path / "guide")
