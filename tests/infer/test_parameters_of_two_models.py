# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Two models of one process whose parameters have the same names."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor

from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoLaplaceMixture, AutoMixture
from tests.common import assert_close


class Line(PyroModule):
    weight: Tensor
    scale: Any

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.weight = PyroSample(dist.Normal(0.0, 1.0))  # type: ignore[assignment]
        self.scale = PyroParam(torch.tensor(scale), constraint=dist.constraints.positive)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        w = self.weight
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(w * x, self.scale), obs=y)


X = torch.linspace(-1, 1, 10)
MAKERS: dict[str, Callable[[Any], Any]] = {
    "laplace": lambda m: AutoLaplace(m).initialize(X, X).polish((X, X)).laplace_approximation((X, X)),
    "hfl": lambda m: AutoHessianFreeLaplace(m).initialize(X, X).polish((X, X)),
    "mixture of laplace": lambda m: (
        AutoLaplaceMixture(m, 2).initialize(X, X).polish((X, X)).laplace_approximation((X, X))
    ),
    "mixture": lambda m: AutoMixture(m, 2).initialize(X, X),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_parameters_are_not_shared_by_name(kind: str) -> None:
    pyro.clear_param_store()
    models = [Line(0.3), Line(3.0)]
    guides = [MAKERS[kind](model) for model in models]
    assert [round(float(model.scale.detach()), 6) for model in models] == [0.3, 3.0]
    if kind == "laplace":
        for guide, scale in zip(guides, (0.3, 3.0), strict=True):
            precision = 1 + (X.square().sum() / scale**2)
            assert_close(guide.predictive(X)["obs"].variance, X.square() / precision + scale**2)
