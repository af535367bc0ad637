# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Networks on tables: their model in the units of the data, their priors, and a place apart to run them in."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_bnn.nn import FanInNormal
from pyro_bnn.ops.options import require_count
from pyro_bnn.supervised import SupervisedModel

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
#: Rows per step of variational inference, and per piece of a prediction.
ROWS = 1000

_LOCK = threading.RLock()


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """
    A block with random numbers and a parameter store of its own. Pyro's handlers, its store and torch's default generator
    belong to the process, so that threads take turns.
    """
    with _LOCK, torch.random.fork_rng(devices=()), pyro.get_param_store().scope():
        torch.default_generator.manual_seed(seed)
        yield


class ScaledPrior(FanInNormal):
    r"""
    :math:`N(0, s^2)` for each parameter, with :math:`s = g / \sqrt{\text{fan in}}` for weights and :math:`g` for biases until
    :attr:`scales`, whose memory the priors share, are changed in place.
    """

    def __init__(self, gain: float) -> None:
        super().__init__(gain, bias_scale=gain)
        self.scales: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: torch.Size, fan_in: int | None = None) -> dist.TorchDistribution:
        """The prior of one parameter."""
        start = self.gain / math.sqrt(fan_in) if fan_in and len(shape) > 1 else self.bias_scale
        self.scales[name] = torch.tensor(start, dtype=torch.float64)
        return self.at(name, shape)

    def at(self, name: str, shape: Sequence[int] = ()) -> Any:
        """The prior of one parameter at its present scale."""
        scale = self.scales[name]
        return dist.Normal(torch.zeros_like(scale), scale).expand(shape).to_event(len(shape))


def network(inputs: int, outputs: int, hidden: Sequence[int], activation: str) -> nn.Module:
    """A multilayer perceptron."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, found {activation!r}")
    if isinstance(hidden, str) or not hasattr(hidden, "__iter__"):
        raise ValueError(
            f"hidden must hold the units of each hidden layer, such as (50,) or () for none, found {hidden!r}"
        )
    layers: list[nn.Module] = []
    for size in hidden:
        require_count("hidden", size)
        layers += [nn.Linear(inputs, size), ACTIVATIONS[activation]()]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


@torch.no_grad()
def require_rowwise(net: nn.Module, x: Tensor, found: Tensor) -> None:
    """
    :param net: a network in evaluation mode.
    :param x: inputs.
    :param found: its outputs at these.
    :raises ValueError: if it normalises batches, or a row alone gives something else.
    """
    norms = [name for name, module in net.named_modules() if isinstance(module, _BatchNorm)]
    if norms:
        raise ValueError(
            f"network: its layers {norms} normalise batches, whose statistics the search for a mode, on all rows at once and in "
            "evaluation mode, does not collect: leave such layers out."
        )
    alone = torch.cat([net(row) for row in x.split(1)])
    if not torch.allclose(alone, found):
        raise ValueError(
            "network gives other outputs for a row alone than beside another one: it is random, or rows interact in it. "
            "Outputs must be a function of the parameters and the row."
        )


class TabularModel(SupervisedModel):
    """
    A network that sees standardised inputs and gives standardised targets, as a model of the data in their own units, in which
    every row may have a weight, the factor of its log likelihood.
    """

    def __init__(self, net: Any, likelihood: Any, data: Sequence[Tensor], **options: Any) -> None:
        super().__init__(net, likelihood, **options)
        x, y, *weights = data
        self.register_buffer("x_mean", average(x, *weights))
        self.register_buffer("x_scale", spread(x, *weights))
        real = likelihood == "regression"
        self.register_buffer("y_mean", average(y, *weights) if real else None)
        self.register_buffer("y_scale", spread(y, *weights) if real else None)

    def standardized(self, x: Tensor) -> Tensor:
        """Inputs as the network sees them."""
        return (x - self.x_mean) / self.x_scale

    def rescaled(self, f: Tensor) -> Tensor:
        """The network's outputs, of a regression in the units of the targets."""
        if self.y_mean is None:
            return f
        return self.y_mean + self.y_scale * (f if self.event_dim else f.squeeze(-1))

    def outputs(self, x: Tensor) -> Tensor:
        """The outputs at inputs in their own units."""
        return self.rescaled(super().outputs(self.standardized(x)))

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """The negative log likelihood of every row given what the network returns, shape (N,), up to a constant."""
        if self.likelihood == "regression":
            error = 0.5 * ((y - self.rescaled(f)) / self.noise).square()
            return error.sum(-1) if self.event_dim else error
        if self.likelihood == "binary":
            return nn.functional.binary_cross_entropy_with_logits(f.squeeze(-1), y.to(f), reduction="none")
        return nn.functional.cross_entropy(f, y, reduction="none")

    def forward(
        self, x: Any = None, y: Tensor | None = None, weights: Tensor | None = None, **inputs: Any
    ) -> Any:
        """The model."""
        if weights is None:
            return super().forward(x, y, **inputs)
        with _ScaleRows(weights):
            return super().forward(x, y, **inputs)


class _ScaleRows(pyro.poutine.messenger.Messenger):
    """Multiplies the log likelihood of every row by its weight; latent sites are left alone."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "obs":
            msg["scale"] = msg["scale"] * self.weights


def average(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean over rows."""
    return values.mean(0) if weights is None else weights @ values / weights.sum()


def spread(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """The standard deviation over rows, 1 of what is constant."""
    largest = values.abs().amax(0)
    unit = torch.where(largest > 0, largest, 1.0)  # squares of very large and small numbers are no numbers
    values = values / unit
    found = average((values - average(values, weights)).square(), weights).sqrt()
    return torch.where(found <= 10 * torch.finfo(found.dtype).eps, 1.0, found * unit)
