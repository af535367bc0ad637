# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Models and data that several tests share."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

Model = Callable[..., Any]


def linear_regression(
    prior_scale: float = 2.0, noise: float = 0.3, n: int = 50
) -> tuple[Model, Tensor, Tensor]:
    """Bayesian linear regression, whose posterior, predictive and evidence are known."""
    x = torch.randn(n, 3)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + noise * torch.randn(n)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), prior_scale).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ w, noise), obs=y)

    return model, x, y


def logistic_regression(n: int = 60) -> tuple[Model, Tensor, Tensor]:
    """Three-class logistic regression with a Gaussian prior."""
    x = torch.randn(n, 2)
    y = dist.Categorical(logits=x @ torch.tensor([[1.0, 0.0, -1.0], [0.5, -1.0, 0.0]])).sample()

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.5).to_event(2))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=x @ w), obs=y)

    return model, x, y


def in_between_data(seed: int = 0, n: int = 30) -> tuple[Tensor, Tensor]:
    """Two clusters of inputs with a gap: -sin(3x - 0.3) plus noise of standard deviation 0.1."""
    generator = torch.Generator().manual_seed(seed)
    half = n // 2
    left = torch.rand(half, generator=generator, dtype=torch.float64) * 0.8 - 1.5
    right = torch.rand(n - half, generator=generator, dtype=torch.float64) * 0.8 + 0.35
    x = torch.cat([left, right])
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    return x.unsqueeze(-1), -torch.sin(3 * x - 0.3) + 0.1 * noise


def tanh_network(hidden: int = 16, inputs: int = 1, noise: float | None = 0.1) -> Model:
    """A one-layer tanh network with N(0, 1) priors; ``noise=None`` makes the noise scale latent."""

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        w1 = pyro.sample("w1", dist.Normal(torch.zeros(hidden, inputs), 1.0).to_event(2))
        b1 = pyro.sample("b1", dist.Normal(torch.zeros(hidden), 1.0).to_event(1))
        w2 = pyro.sample("w2", dist.Normal(torch.zeros(hidden), 1.0).to_event(1))
        b2 = pyro.sample("b2", dist.Normal(0.0, 1.0))
        scale = pyro.sample("sigma", dist.LogNormal(-2.0, 0.5)) if noise is None else noise
        f = torch.tanh(x @ w1.mT + b1) @ w2 + b2
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, scale), obs=y)

    return model
