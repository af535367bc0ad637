# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Small models with known answers."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

NOISE = 0.5


def linear_model(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Linear regression with known noise: the posterior is Gaussian in closed form."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal((x * weight).sum(-1), NOISE), obs=y)


def linear_data(num: int = 40, features: int = 3) -> tuple[Tensor, Tensor]:
    x = torch.randn(num, features)
    return x, x @ torch.arange(1.0, features + 1) + NOISE * torch.randn(num)


def linear_posterior(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the weight of :func:`linear_model`."""
    covariance = torch.linalg.inv(torch.eye(x.shape[-1], dtype=x.dtype) + x.T @ x / NOISE**2)
    return covariance @ x.T @ y / NOISE**2, covariance


class TextbookNet(PyroModule):
    """The usual Pyro network, whose ``F.linear`` takes no weights with sample dims."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, torch.tensor(1.0)).expand([1, 3]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, torch.tensor(1.0)).expand([1]).to_event(1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(mean, NOISE), obs=y)
