# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import copy
import math
import os
import pickle
import random
import subprocess
import sys
import traceback
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

from pyro_bnn.infer import fit, load_guide, posterior_draws, posterior_predictive, save_guide
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoLaplaceMixture, AutoMixture
from pyro_bnn.infer.autoguide.laplace import Structure
from pyro_bnn.infer.train.files import atomic_save
from pyro_bnn.nn import rank1_
from tests.common import small_disk
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
    assert torch.equal(draws(load_guide(AutoNormal(linear_model), tmp_path / "guide")), draws(guide))
    assert torch.equal(draws(load_guide(AutoNormal(linear_model), tmp_path / "guide", (x, y))), draws(guide))
    with pytest.raises(ValueError, match="holds a AutoNormal, not a AutoDelta"):
        load_guide(AutoDelta(linear_model), tmp_path / "guide")
    with pytest.raises(TypeError, match="parameter store"):
        save_guide(linear_model, tmp_path / "guide")
    messenger = AutoNormalMessenger(linear_model)
    messenger(x, y)
    with pytest.raises(ValueError, match="pass data"):
        save_guide(messenger, tmp_path / "messenger")
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_guide(guide, tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"guide belongs to a guide of another model.*weight"):
        load_guide(AutoNormal(normal_network()[1]), tmp_path / "guide", (x, y))


class Table:
    """An argument that a file does not hold."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


def test_arguments_of_any_nesting(tmp_path: Path) -> None:
    def nested(batch: Any, y: torch.Tensor | None = None) -> None:
        linear_model(batch["x"][0] if isinstance(batch, dict) else batch.x, y)

    x, y = linear_data(12)
    guide = AutoNormal(nested)
    fit(nested, guide, ({"x": [x, (1, None)], "n": 3}, y), num_steps=3, progress_bar=False)
    save_guide(guide, tmp_path / "guide")
    load_guide(AutoNormal(nested), tmp_path / "guide")
    other = AutoNormal(nested)
    other(Table(x), y)
    save_guide(other, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other does not say what data .*; pass data"):
        load_guide(AutoNormal(nested), tmp_path / "other")
    load_guide(AutoNormal(nested), tmp_path / "other", (Table(x), y))


# ---------------------------------------------------------------------------- networks


def normal_network(seed: int = 0) -> tuple[torch.nn.Module, Any]:
    """A classifier with batch normalisation, whose first layer is deterministic, in a plain function."""
    torch.manual_seed(seed)
    features = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Tanh())

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        weight = pyro.sample("head", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        temperature = pyro.param("temperature", torch.tensor(1.0), constraint=dist.constraints.positive)
        logits = (features(x) * weight).sum(-1) / temperature
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=logits), obs=y)

    return features, model


GUIDES: dict[str, Callable[[Any], Any]] = {
    "normal": AutoNormal,
    "mixture": lambda model: AutoMixture(model, 2),
    "laplace": AutoLaplace,
    "messenger": AutoNormalMessenger,
}


def fitted(name: str, seed: int = 0) -> tuple[torch.nn.Module, Any, Any]:
    features, model = normal_network(seed)
    x, y = 3 + 2 * torch.randn(40, 3), (torch.rand(40) < 0.5).double()
    guide = GUIDES[name](model)
    fit(model, guide, (x, y), num_steps=20, optim=0.05, progress_bar=False)
    pyro.get_param_store().setdefault("temperature", torch.tensor(1.0), dist.constraints.positive)
    with torch.no_grad():
        features[0].weight.mul_(1.7)
        pyro.param("temperature").unconstrained().fill_(0.4)
    if name == "laplace":
        guide.polish((x, y)).laplace_approximation((x, y), map_tolerance=math.inf)
    return features, model, guide


def probabilities(model: Any, guide: Any) -> torch.Tensor:
    pyro.set_rng_seed(3)
    draws = posterior_draws(guide, 7, ((torch.zeros(40, 3), torch.zeros(40)), {}))
    found = posterior_predictive(model, guide, torch.linspace(-1, 2, 12).reshape(4, 3), draws=draws).mean
    assert found is not None
    return found


@pytest.mark.parametrize("name", GUIDES)
def test_network_travels_with_the_guide(name: str, tmp_path: Path) -> None:
    """A fresh process, with other initial weights, predicts the same numbers."""
    _, model, guide = fitted(name)
    save_guide(guide, tmp_path / "guide")
    expected = probabilities(model, guide)
    code = f"""
import torch
torch.set_default_dtype(torch.float64)
from tests.infer.test_persist import *
_, model = normal_network(seed=5)
guide = load_guide(GUIDES[{name!r}](model), {str(tmp_path / "guide")!r})
torch.save(probabilities(model, guide), {str(tmp_path / "out")!r})
"""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    assert torch.equal(torch.load(tmp_path / "out"), expected)


def test_network_that_is_a_module(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.features, self.run = normal_network(seed)
            self.unused = torch.nn.Parameter(torch.zeros(2))

        def forward(self, *args: Any) -> None:
            self.run(*args)

    model, x = Model(0), torch.randn(40, 3)
    guide = AutoNormal(model)
    fit(model, guide, (x, torch.ones(40)), num_steps=5, progress_bar=False)
    save_guide(guide, tmp_path / "guide")
    other = Model(4)
    loaded = load_guide(AutoNormal(other), tmp_path / "guide")
    assert torch.equal(probabilities(other, loaded), probabilities(model, guide))
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_network_that_is_kept_elsewhere(tmp_path: Path) -> None:
    features, model, guide = fitted("normal")
    save_guide(guide, tmp_path / "guide", network=False)
    assert (tmp_path / "guide").stat().st_size < 6000
    other_features, other = normal_network(seed=5)
    with pytest.raises(
        ValueError, match=r"guide belongs to another model.*differ from this model .* are Seq.*0\].0.bias"
    ):
        load_guide(AutoNormal(other), tmp_path / "guide")
    other_features.load_state_dict(features.state_dict())
    loaded = load_guide(AutoNormal(other), tmp_path / "guide")
    assert torch.equal(probabilities(other, loaded), probabilities(model, guide))


def test_model_that_takes_derivatives(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        x = x.detach().requires_grad_()
        slope = torch.autograd.grad(net(x).sum(), x, create_graph=True)[0].squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(slope, scale), obs=y)

    guide = AutoNormal(model)
    guide(torch.zeros(5, 1), torch.zeros(5))
    save_guide(guide, tmp_path / "guide")
    weight = net[0].weight.clone()
    with torch.no_grad():
        net[0].weight.zero_()
    fresh = load_guide(AutoNormal(model), tmp_path / "guide")
    assert torch.equal(net[0].weight, weight)
    assert torch.equal(copy.deepcopy(fresh).median()["scale"], guide.median()["scale"])


def test_network_of_another_architecture(tmp_path: Path) -> None:
    _, _, guide = fitted("normal")
    save_guide(guide, tmp_path / "guide")
    with pytest.raises(ValueError, match=r"belongs to a guide of another model.*head"):
        load_guide(AutoNormal(linear_model), tmp_path / "guide", linear_data(12))

    def other(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        features = torch.nn.Linear(3, 5)
        weight = pyro.sample("head", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=(features(x) * weight).sum(-1)), obs=y)

    with pytest.raises(
        ValueError, match=r"differ from this model .* are Linear\[0\].bias, Linear\[0\].weight, Seq"
    ):
        load_guide(AutoNormal(other), tmp_path / "guide")


def test_network_that_was_trained_elsewhere(tmp_path: Path) -> None:
    """A Laplace guide that never saw ``fit``."""
    x, y = linear_data(12)
    guide = AutoLaplace(linear_model).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    save_guide(guide, tmp_path / "guide")
    assert torch.equal(draws(load_guide(AutoLaplace(linear_model), tmp_path / "guide")), draws(guide))


@pytest.mark.parametrize(
    ("build", "other", "name"),
    [
        (partial(AutoLaplace, structure="kronecker"), partial(AutoLaplace, structure="diagonal"), "structure='kronecker'"),
        (partial(AutoLaplace, curvature="ggn"), partial(AutoLaplace, curvature="hessian"), "curvature='ggn'"),
        (partial(AutoMixture, component="normal"), partial(AutoMixture, component="cauchy"), "component='normal'"),
        (
            partial(AutoMixture, component={"weight": "normal"}),
            partial(AutoMixture, component={"weight": "cauchy"}),
            "component='weight: normal'",
        ),
        (partial(AutoLaplaceMixture, num_components=2), partial(AutoLaplaceMixture, num_components=3), "num_components=2"),
        (
            partial(AutoLaplaceMixture, num_components=1, structure="full"),
            partial(AutoLaplaceMixture, num_components=1, structure="diagonal"),
            "components.0.structure='full'",
        ),
    ],
)  # fmt: skip
def test_settings_that_differ_are_refused(build: Any, other: Any, name: str, tmp_path: Path) -> None:
    guide = build(linear_model)
    guide.initialize(*linear_data(12))
    save_guide(guide, tmp_path / "guide")
    load_guide(build(linear_model), tmp_path / "guide")
    with pytest.raises(ValueError, match=f"guide holds a .* with {name}"):
        load_guide(other(linear_model), tmp_path / "guide")


def test_precision_of_the_file(tmp_path: Path) -> None:
    _, _, guide = fitted("normal")
    save_guide(guide, tmp_path / "double")
    torch.set_default_dtype(torch.float32)
    _, model = normal_network()
    with pytest.raises(
        ValueError, match=r"double holds locs.* in torch.float64, the guide here in torch.float32"
    ):
        load_guide(AutoNormal(model), tmp_path / "double", (torch.zeros(40, 3), torch.zeros(40)))
    with pytest.raises(RuntimeError, match="same dtype") as caught:
        load_guide(AutoNormal(model), tmp_path / "double")
    assert "double" in caught.value.__notes__[0]
    single = AutoNormal(model)
    fit(model, single, (torch.randn(40, 3), torch.ones(40)), num_steps=2, progress_bar=False)
    save_guide(single, tmp_path / "single")
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    loaded = load_guide(
        AutoNormal(normal_network()[1]), tmp_path / "single", (torch.zeros(40, 3), torch.zeros(40))
    )
    assert torch.equal(loaded.median()["head"], single.median()["head"].double())  # widening is exact


def parts_of_functions(seed: int) -> tuple[Any, Any]:
    """A guide with a function that calls an encoder and has a parameter of its own."""
    torch.manual_seed(seed)
    encoder = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.BatchNorm1d(1))

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(slope * z, 0.5), obs=y)

    def local(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        scale = pyro.param("scale", torch.tensor(1.0 + seed), constraint=dist.constraints.positive)
        with guide.plates["data"]:
            pyro.sample("z", dist.Normal(encoder(x).squeeze(-1), scale))

    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["slope"])))
    guide.append(local)
    return encoder, guide


def test_functions_in_a_guide(tmp_path: Path) -> None:
    x, y = linear_data(12)
    encoder, guide = parts_of_functions(0)
    fit(guide.model, guide, (x, y), num_steps=5, optim=0.1, progress_bar=False)
    save_guide(guide, tmp_path / "guide")
    scale = pyro.param("scale").item()
    pyro.clear_param_store()  # as in a fresh process
    other, fresh = parts_of_functions(1)
    load_guide(fresh, tmp_path / "guide")
    assert pyro.param("scale").item() == scale
    assert scale != 1.0
    for name, value in encoder.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


# ---------------------------------------------------------------------------- files


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    guide, path = trained("AutoNormal"), tmp_path / "guide"
    save_guide(guide, path)
    whole = path.read_bytes()
    chance = random.Random(0)
    ends = [8 * len(whole) - 1 - i for i in range(0, 400, 7)]  # the digest and its mark
    for bit in ends + [chance.randrange(8 * len(whole)) for _ in range(200)]:
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"guide (is damaged|cannot be read)") as caught:
            load_guide(AutoNormal(linear_model), path)
        assert "weights_only" not in "".join(traceback.format_exception(caught.value))
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 48, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"guide (is damaged|cannot be read)"):
            load_guide(AutoNormal(linear_model), path)
    path.write_bytes(whole)
    assert torch.equal(draws(load_guide(AutoNormal(linear_model), path)), draws(guide))


def test_files_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "file"
    guide = AutoNormal(linear_model)
    fit(linear_model, guide, linear_data(), num_steps=2, checkpoint=path, progress_bar=False)
    with pytest.raises(ValueError, match="file is no saved guide of pyro_bnn"):
        load_guide(guide, path)
    for content in ({"a": torch.zeros(2)}, torch.zeros(2), pyro, {"format": "x"}):
        torch.save(content, path) if content is not pyro else path.write_text("some text")
        with pytest.raises(ValueError, match="file cannot be read"):
            load_guide(guide, path)
    torch.save(Table(torch.zeros(2)), path)  # code that would have to be run
    with pytest.raises(ValueError, match="file cannot be read") as caught:
        load_guide(guide, path)
    assert "weights_only" not in "".join(traceback.format_exception(caught.value))
    atomic_save({"format": 3}, path)
    with pytest.raises(ValueError, match=r"file was written by a later version of pyro_bnn .format 3"):
        load_guide(guide, path)
    save_guide(guide, path)
    with pytest.raises(ValueError, match="file is no checkpoint of pyro_bnn"):
        fit(linear_model, guide, linear_data(), num_steps=2, checkpoint=path, progress_bar=False)


def old_file(guide: Any, path: Path) -> None:
    """A file as versions before format 2 wrote it."""
    arguments = [[0, "tensor", [12, 3], "float64"], [1, "tensor", [12], "float64"]]
    state = {name: value for name, value in guide.state_dict().items() if isinstance(value, torch.Tensor)}
    saved = {"format": 1, "guide": type(guide).__name__, "state": state, "example": {"arguments": arguments}}
    torch.save(saved, path)


@pytest.mark.parametrize("name", BUILDERS)
def test_old_files(name: str, tmp_path: Path) -> None:
    guide = trained(name)
    old_file(guide, tmp_path / "guide")
    assert torch.equal(draws(load_guide(BUILDERS[name](linear_model), tmp_path / "guide")), draws(guide))


def test_old_file_without_the_network(tmp_path: Path) -> None:
    _, model, guide = fitted("normal")
    old_file(guide, tmp_path / "guide")
    with pytest.warns(
        UserWarning, match=r"guide does not hold the networks of the model \(Sequential\[0\].0.weight"
    ):
        load_guide(AutoNormal(model), tmp_path / "guide")


def test_permissions_and_links(tmp_path: Path) -> None:
    guide = trained("AutoNormal")
    link, target = tmp_path / "link", tmp_path / "folder" / "target"
    link.symlink_to(target)
    old = os.umask(0o022)
    try:
        save_guide(guide, link)
    finally:
        os.umask(old)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o644
    target.chmod(0o600)
    save_guide(guide, link)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o600
    load_guide(AutoNormal(linear_model), link)


def test_full_disk(tmp_path: Path) -> None:
    guide = trained("AutoNormal")
    with small_disk(tmp_path, "16k"):
        save_guide(guide, tmp_path / "guide")
        before = (tmp_path / "guide").read_bytes()
        with pytest.raises(OSError, match=r"No space left.*what was there before is unchanged.*guide"):
            atomic_save({"a": torch.zeros(4000)}, tmp_path / "guide")
        assert (tmp_path / "guide").read_bytes() == before
        assert list(tmp_path.iterdir()) == [tmp_path / "guide"]


@pytest.mark.parametrize("structure", get_args(Structure))
def test_curvatures_of_earlier_files_load(structure: Structure) -> None:
    """The parts were the buffers of one module before they were modules: ``0_dense_index`` for ``0_dense.index``."""
    x, y = linear_data()
    guide = AutoLaplace(linear_model, structure=structure).initialize(x, y)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    state = guide.state_dict()
    parts = [name for name in state if name.startswith("part_store.")]
    earlier = {f"part_store.{n[11:].replace('.', '_')}" if n in parts else n: v for n, v in state.items()}
    assert parts
    assert not set(parts) & set(earlier)
    other = AutoLaplace(linear_model, structure=structure).initialize(x, y)
    other.load_state_dict(earlier)
    assert list(other.state_dict()) == list(state)
    assert torch.equal(other.posterior.variance, guide.posterior.variance)
    assert torch.equal(other.log_evidence(), guide.log_evidence())
