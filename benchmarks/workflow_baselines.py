# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The networks of ``workflow_speed.py``, and the same work written by hand in plain torch."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor


def network(sizes: list[int]) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


class Model(PyroModule):
    """A network and its likelihood: Normal with known noise, or Categorical."""

    def __init__(self, net: torch.nn.Module, outputs: int) -> None:
        super().__init__()
        self.net = net
        self.outputs = outputs

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        """The likelihood of y given x."""
        out = self.net(x)
        with pyro.plate("data", len(x)):
            if self.outputs == 1:
                return pyro.sample("obs", dist.Normal(out.squeeze(-1), 0.1), obs=y)
            return pyro.sample("obs", dist.Categorical(logits=out), obs=y)


def textbook(net: torch.nn.Sequential) -> Any:
    """Every weight a PyroSample with a N(0, 1 / fan-in) prior, the way Pyro's documentation does it."""
    module = PyroModule[torch.nn.Sequential](
        *[
            PyroModule[torch.nn.Linear](layer.in_features, layer.out_features)
            if isinstance(layer, torch.nn.Linear)
            else layer
            for layer in net
        ]
    )
    for layer in module:
        if isinstance(layer, torch.nn.Linear):
            for name, value in list(layer.named_parameters(recurse=False)):
                prior = dist.Normal(torch.tensor(0.0), torch.tensor(layer.in_features**-0.5))
                setattr(layer, name, PyroSample(prior.expand(value.shape).to_event(value.dim())))
    return module


def data_of(sizes: list[int], rows: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, sizes[0])
    return x, (x[:, 0].sin() if sizes[-1] == 1 else torch.randint(sizes[-1], (rows,)))


def plain_step(sizes: list[int], x: Tensor, y: Tensor) -> Callable[[], Any]:
    net = network(sizes)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        out = net(x)
        loss = (
            ((out.squeeze(-1) - y) ** 2).sum()
            if sizes[-1] == 1
            else torch.nn.functional.cross_entropy(out, y)
        )
        loss.backward()
        optimizer.step()

    return step


def layers(x: Tensor, weights: Tensor, shapes: list[torch.Size]) -> Tensor:
    """The network with its weights and biases one after the other in one vector, of which they are views."""
    parts = weights.split([shape.numel() for shape in shapes])
    for i in range(0, len(parts), 2):
        x = torch.nn.functional.linear(x, parts[i].view(shapes[i]), parts[i + 1])
        x = x.relu() if i + 2 < len(parts) else x
    return x


def by_hand(net: torch.nn.Sequential, guide: Any, x: Tensor, draws: int, store: bool) -> Any:
    """Draws all weights into one vector and applies the layers to views of it: the least that draws cost."""
    loc, scale = guide.loc.detach()[0], guide.scale.detach()[0]
    shapes = [p.shape for p in net.parameters()]

    @torch.no_grad()
    def run() -> Tensor:
        weights = torch.empty(draws if store else 1, len(loc))
        found = []
        for s in range(draws):
            row = weights[s if store else 0].normal_()
            torch.addcmul(loc, row, scale, out=row)
            found.append(layers(x, row, shapes))
        return torch.stack(found)

    return run


def hand_step(sizes: list[int], x: Tensor, y: Tensor) -> Callable[[], Any]:
    """Mean-field variational inference in plain torch: one vector, closed-form KL, fused Adam."""
    net = network(sizes)
    shapes = [p.shape for p in net.parameters()]
    loc = torch.nn.Parameter(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
    raw = torch.nn.Parameter(torch.full_like(loc, -3.0))
    optimizer = torch.optim.Adam([loc, raw], lr=1e-3, fused=True)

    def step() -> None:
        scale = torch.nn.functional.softplus(raw)
        weights = loc + scale * torch.randn_like(loc)
        h = layers(x, weights, shapes)
        if sizes[-1] == 1:
            nll = 50 * ((h.squeeze(-1) - y) ** 2).sum()
        else:
            nll = torch.nn.functional.cross_entropy(h, y, reduction="sum")
        variance = scale.square()
        loss = nll + 0.5 * (variance + loc.square() - 1 - variance.log()).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
