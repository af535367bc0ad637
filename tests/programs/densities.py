# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Densities: scales, masks, factors, missing values, deterministic sites."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from tests.programs.plain import linear, perceptron
from tests.programs.program import Case, inputs, labels, program


@program
def scaled_likelihood() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        with pyro.plate("data", len(x)), poutine.scale(scale=3.0):
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def scaled_latents() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        with poutine.scale(scale=0.3):
            f = linear(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def scaled_model() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return Case(poutine.scale(model, scale=0.5), (inputs(), torch.randn(10)), 1, (0, 0))


@program
def scales_of_rows() -> Case:
    def model(x: Tensor, weight: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        with pyro.plate("data", len(x)), poutine.scale(scale=weight):
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return Case(model, (inputs(), torch.rand(10) + 0.5, torch.randn(10)), 2, (0, 0, 0))


@program
def masked_observations() -> Case:
    def model(x: Tensor, seen: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        with pyro.plate("data", len(x)), poutine.mask(mask=seen):
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    seen = torch.arange(10) % 3 > 0
    return Case(model, (inputs(), seen, torch.where(seen, torch.randn(10), 99.0)), 2, (0, 0, 0))


@program
def masked_distribution() -> Case:
    def model(x: Tensor, seen: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, 0.5).mask(seen), obs=y)

    seen = torch.arange(10) % 3 > 0
    return Case(model, (inputs(), seen, torch.where(seen, torch.randn(10), 99.0)), 2, (0, 0, 0))


@program
def masked_labels() -> Case:
    net = perceptron(3, 2)

    def model(x: Tensor, seen: Tensor, y: Tensor | None = None) -> Any:
        f = net(x)
        with pyro.plate("data", len(x)), poutine.mask(mask=seen):
            return pyro.sample("obs", dist.Categorical(logits=f), obs=y)

    seen = torch.arange(10) % 3 > 0
    return Case(model, (torch.randn(10, 2), seen, torch.where(seen, labels(), 0)), 2, (0, 0, 0), net=net)


@program
def labels_filled_with_minus_100() -> Case:
    net = perceptron(3, 2)

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = net(x)
        seen = torch.ones(len(x), dtype=torch.bool) if y is None else y >= 0
        with pyro.plate("data", len(x)), poutine.mask(mask=seen):
            return pyro.sample("obs", dist.Categorical(logits=f), obs=y if y is None else y.clamp(min=0))

    y = torch.where(torch.arange(10) % 3 > 0, labels(), -100)
    return Case(model, (torch.randn(10, 2), y), 1, (0, 0), net=net)


@program
def masked_tasks() -> Case:
    """Three tasks for each example, some of them missing."""
    net = perceptron(3, 2)

    def model(x: Tensor, seen: Tensor, y: Tensor | None = None) -> Any:
        f = net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, 0.5).mask(seen).to_event(1), obs=y)

    seen = torch.rand(8, 3) > 0.3
    return Case(
        model, (torch.randn(8, 2), seen, torch.where(seen, torch.randn(8, 3), 50.0)), 2, (0, 0, 0), net=net
    )


@program
def masked_steps() -> Case:
    """Sequences of several lengths in a plate of steps."""

    def model(x: Tensor, lengths: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        mask = torch.arange(x.shape[1]) < lengths[:, None]
        with (
            pyro.plate("data", len(x), dim=-2),
            pyro.plate("steps", x.shape[1], dim=-1),
            poutine.mask(mask=mask),
        ):
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    lengths = torch.tensor([1, 4, 3, 2, 4, 2])

    def model_of_draws(x: Tensor, lengths: Tensor, y: Tensor | None = None) -> Any:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        f = (x * (w if w.dim() == 1 else w.unsqueeze(-2))).sum(-1) if w.dim() < 3 else (x * w).sum(-1)
        mask = torch.arange(x.shape[1]) < lengths[:, None]
        with (
            pyro.plate("data", len(x), dim=-2),
            pyro.plate("steps", x.shape[1], dim=-1),
            poutine.mask(mask=mask),
        ):
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return Case(model, (torch.randn(6, 4, 2), lengths, torch.randn(6, 4)), 2, (0, 0, 0))


@program
def missing_values_as_latents() -> Case:
    def model(x: Tensor, seen: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y, obs_mask=seen)

    seen = torch.arange(10) % 3 > 0
    return Case(model, (inputs(), seen, torch.randn(10)), 3, (0, 0, 0), guide_rows=True)


@program
def masked_latents() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        with poutine.mask(mask=False):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        f = linear(x) + b
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def factor_as_penalty() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("ridge", -2.0 * w.square().sum(-1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal((x * w).sum(-1), 0.5), obs=y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def factor_as_likelihood() -> Case:
    def model(x: Tensor, y: Tensor) -> None:
        f = linear(x)
        with pyro.plate("data", len(x)):
            pyro.factor("loss", -2.0 * (y - f).square())

    return Case(model, (inputs(), torch.randn(10)), 2, (0, 0))


@program
def factor_and_observations() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        with pyro.plate("data", len(x)):
            pyro.factor("smooth", -0.5 * f.square())
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def constant_factor() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        pyro.factor("constant", torch.tensor(3.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def deterministic_sites() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        with pyro.plate("data", len(x)):
            rate = pyro.deterministic("rate", f.exp())
            return pyro.sample("obs", dist.Poisson(rate), obs=y)

    return Case(model, (inputs(), labels(10, 4).double()), 1, (0, 0))


@program
def latent_that_is_data_too() -> Case:
    """An observed covariate with a model of its own, outside of the plate."""

    def model(x: Tensor, level: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("level", dist.Normal(b, 1.0), obs=level)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f + b, 0.5), obs=y)

    return Case(model, (inputs(), torch.tensor(0.7), torch.randn(10)), 2, (0, None, 0))


@program
def likelihood_without_latents() -> Case:
    """The predictor is detached: nothing that is observed depends on a latent."""

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x).detach()
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return Case(
        model, (inputs(), torch.randn(10)), 1, (0, 0), must_refuse=("Laplace", "Hessian-free", "log evidence")
    )


@program
def scaled_and_masked_and_subsampled() -> Case:
    def model(x: Tensor, seen: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        with pyro.plate("data", 10, subsample_size=len(x)), poutine.scale(scale=2.0), poutine.mask(mask=seen):
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    seen = torch.arange(10) % 4 > 0
    return Case(model, (inputs(), seen, torch.where(seen, torch.randn(10), 7.0)), 2, (0, 0, 0))


@program
def soft_labels() -> Case:
    net = perceptron(3, 2)

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.OneHotCategorical(logits=f, validate_args=False), obs=y)

    return Case(model, (torch.randn(10, 2), torch.randn(10, 3).softmax(-1)), 1, (0, 0), net=net)
