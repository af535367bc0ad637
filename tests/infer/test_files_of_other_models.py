# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Files of guides whose tensors fit a model that computes something else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_bnn.infer import load_guide, save_guide
from pyro_bnn.infer.autoguide import AutoLaplace, AutoMixture
from pyro_bnn.nn import bayesian_, lora_
from pyro_bnn.supervised import SupervisedModel
from tests.common import assert_close

X = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(10, 2)
Y = torch.linspace(0, 1, 10, dtype=torch.float64)


def network(activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), activation(), nn.Linear(3, 1))


def of_family(family: Callable[..., Any], *args: float) -> SupervisedModel:
    return SupervisedModel(bayesian_(network()), lambda f: family(*args[:-1], f[:, 0], args[-1]))


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "activation": (
        lambda: SupervisedModel(bayesian_(network()), noise=0.3),
        lambda: SupervisedModel(bayesian_(network(nn.ReLU)), noise=0.3),
        "'obs' has loc",
    ),
    "scale of adapters": (
        lambda: SupervisedModel(lora_(network(), rank=2, alpha=2.0), noise=0.3),
        lambda: SupervisedModel(lora_(network(), rank=2, alpha=8.0), noise=0.3),
        "'obs' has loc",
    ),
    "constant of a likelihood": (
        lambda: of_family(dist.Normal, 0.3), lambda: of_family(dist.Normal, 0.7), "scale 0.3, ... there and 0.7, ... here",
    ),
    "family": (
        lambda: of_family(dist.Normal, 0.3), lambda: of_family(dist.StudentT, 3.0, 0.3), "family Normal there and StudentT here",
    ),
}  # fmt: skip
GUIDES: dict[str, Callable[[Any], Any]] = {
    "laplace": lambda model: AutoLaplace(model, structure="diagonal"),
    "mixture": lambda model: AutoMixture(model, 2),
    "normal": AutoNormal,
}


@pytest.mark.every(2)
@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("change", MODELS)
def test_models_of_the_same_tensors_are_told_apart(change: str, guide: str, tmp_path: Path) -> None:
    first, other, says = MODELS[change]
    saved = GUIDES[guide](first())
    getattr(saved, "initialize", saved)(X, Y)
    for value in saved.parameters():  # adapters start at zero
        value.data += 0.5
    if guide == "laplace":
        saved.laplace_approximation((X, Y), map_tolerance=float("inf"))
    path = tmp_path / "guide.pt"
    pyro.clear_param_store()
    save_guide(saved, path)
    same = load_guide(GUIDES[guide](first()), path)
    for name, value in saved.median(X).items():
        assert_close(same.median(X)[name], value)
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=f"computes something else.*{says}"):
        load_guide(GUIDES[guide](other()), path)


def test_models_that_draw_or_do_not_run_are_not_compared(tmp_path: Path) -> None:
    def model(x: Any, y: Any = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        if x[0] == 0.0:
            raise RuntimeError
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(w + torch.rand(()), 1.0), obs=y)

    guide = AutoNormal(model)
    guide(torch.ones(3), torch.ones(3))
    save_guide(guide, tmp_path / "guide.pt")
    loaded = load_guide(AutoNormal(model), tmp_path / "guide.pt", data=(torch.ones(3), torch.ones(3)))
    assert_close(loaded.median()["w"], guide.median()["w"])
