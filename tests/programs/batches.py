# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Data and plates: where the examples are, what holds them, what is no data."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_bnn.nn import bayesian_
from tests.programs.plain import linear, perceptron
from tests.programs.program import Case, inputs, labels, program


def normal(f: Tensor, y: Tensor | None, name: str = "data", size: int | None = None) -> Any:
    with pyro.plate(name, f.shape[-1] if size is None else size):
        return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)


def sensors(data_dim: int, full: bool = False) -> Case:
    """Three sensors with an offset each see eight examples."""

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        rows: dict[str, Any] = {"size": len(x)}
        if full:
            rows = {"size": 8, "subsample": torch.arange(len(x))}
        f = linear(x)
        sensor, data = pyro.plate("sensors", 3, dim=-3 - data_dim), pyro.plate("data", dim=data_dim, **rows)
        with sensor:
            offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        f = f.unsqueeze(-2) if data_dim == -1 else f.unsqueeze(-1)
        with sensor, data:
            return pyro.sample("obs", dist.Normal(f + offset, 0.5), obs=y)

    y = torch.randn(3, 8) if data_dim == -1 else torch.randn(8, 3)
    return Case(model, (inputs(8), y), 1, (0, 1 if data_dim == -1 else 0))


@program
def sensors_left_of_data() -> Case:
    return sensors(-1)


@program
def data_left_of_sensors() -> Case:
    return sensors(-2)


@program
def sensors_left_of_full_size_data() -> Case:
    return sensors(-1, full=True)


@program
def full_size_plate() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        with pyro.plate("data", 10, subsample_size=len(x)):
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def full_size_plate_by_index() -> Case:
    def model(index: Tensor, x: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        with pyro.plate("data", 10, subsample=index):
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return Case(model, (torch.arange(10), inputs(), torch.randn(10)), 2, (0, 0, 0))


@program
def subsamples_itself() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        with pyro.plate("data", len(x), subsample_size=5) as at:
            return pyro.sample("obs", dist.Normal(f[..., at], 0.5), obs=None if y is None else y[at])

    return Case(
        model, (inputs(), torch.randn(10)), 1, (0, 0), noise=True, must_refuse=("Laplace, full, ggn",)
    )


@program
def two_tables() -> Case:
    def model(x: Tensor, z: Tensor, y: Tensor | None = None, count: Tensor | None = None) -> Any:
        f, g = linear(x), pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("people", len(x)):
            pyro.sample("obs", dist.Normal(f, 0.5), obs=y)
        with pyro.plate("places", len(z)):
            return pyro.sample("count", dist.Poisson((g * z).exp()), obs=count)

    data = (inputs(8), torch.randn(5), torch.randn(8), labels(5, 3).double())
    return Case(model, data, 2, size=8)


@program
def two_tables_of_one_size() -> Case:
    def model(x: Tensor, z: Tensor, y: Tensor | None = None, count: Tensor | None = None) -> Any:
        f, g = linear(x), pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("people", len(x)):
            pyro.sample("obs", dist.Normal(f, 0.5), obs=y)
        with pyro.plate("places", len(z)):
            return pyro.sample("count", dist.Poisson((g * z).exp()), obs=count)

    data = (inputs(8), torch.randn(8), torch.randn(8), labels(8, 3).double())
    return Case(model, data, 2, (0, 0, 0, 0))


@program
def table_of_effects() -> Case:
    """A second table of covariates of groups, which every batch of the first needs whole."""

    def model(groups: Tensor, x: Tensor, group: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", len(groups)):
            effect = pyro.sample("effect", dist.Normal(slope * groups, 0.5))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f + effect[..., group], 0.5), obs=y)

    data = (torch.randn(4), inputs(), torch.arange(10) % 4, torch.randn(10))
    return Case(model, data, 3, (None, 0, 0, 0))


class LastStep(nn.Module):
    def __init__(self, features: int, batch_first: bool, cls: Any = nn.GRU) -> None:
        super().__init__()
        self.rnn = cls(features, 2, batch_first=batch_first)
        self.head = nn.Linear(2, 1)
        self.dim = 1 if batch_first else 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].select(self.dim, -1))


def sequence(net: nn.Module, x: Tensor, dim: int) -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        return normal(net(x).squeeze(-1), y)

    return Case(model, (x, torch.randn(x.shape[dim])), 1, (dim, 0), net=net)


@program
def time_first() -> Case:
    net = nn.Sequential(bayesian_(LastStep(2, False), batch_dim=1))
    return sequence(net, torch.randn(4, 9, 2), 1)


@program
def time_first_square() -> Case:
    """As many steps as examples."""
    net = nn.Sequential(bayesian_(LastStep(2, False), batch_dim=1))
    return sequence(net, torch.randn(6, 6, 2), 1)


@program
def time_first_one_dimension() -> Case:
    """Sequences of tokens, time first."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 2)
            self.head = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x).mean(0))

    return sequence(bayesian_(Net(), batch_dim=1), labels(24, 4).reshape(4, 6), 1)


def container(wrap: Any, read: Any) -> Case:
    """A regression of which the inputs are in a container."""

    def model(batch: Any, y: Tensor | None = None) -> Any:
        x, z = read(batch)
        return normal(linear(torch.cat([x, z], -1)), y)

    x, z, y = inputs(), torch.randn(10, 1), torch.randn(10)
    case = Case(model, (wrap(x, z), y), 1, size=10, take=lambda at: (wrap(x[at], z[at]), y[at]))
    return case


Pair = namedtuple("Pair", "x z")


@dataclass
class Record:
    x: Tensor
    z: Tensor


@program
def dictionary() -> Case:
    return container(lambda x, z: {"x": x, "z": z}, lambda b: (b["x"], b["z"]))


@program
def list_of_inputs() -> Case:
    return container(lambda x, z: [x, z], lambda b: b)


@program
def nested_tuples() -> Case:
    return container(lambda x, z: (x, {"deep": [z]}), lambda b: (b[0], b[1]["deep"][0]))


@program
def named_tuple() -> Case:
    return container(Pair, lambda b: (b.x, b.z))


@program
def data_class() -> Case:
    return container(Record, lambda b: (b.x, b.z))


@program
def dictionary_into_network() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 1), nn.Linear(1, 1)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return (self.a(batch["x"]) + self.b(batch["z"])).squeeze(-1)

    net = bayesian_(Net())

    def model(batch: dict[str, Tensor], y: Tensor | None = None) -> Any:
        return normal(net(batch), y)

    x, z, y = torch.randn(10, 2), torch.randn(10, 1), torch.randn(10)
    return Case(
        model, ({"x": x, "z": z}, y), 1, size=10, take=lambda at: ({"x": x[at], "z": z[at]}, y[at]), net=net
    )


@program
def latents_of_rows() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 0.5))
            return pyro.sample("obs", dist.Normal(f + z, 0.5), obs=y)

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("w", dist.Delta(torch.tensor([0.5, -0.2, 0.1]), event_dim=1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x.sum(-1).sin()))

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0), guide_rows=True, guide=guide)


@program
def autoencoder() -> Case:
    """A decoder of latents of rows, and the encoder as its guide."""
    decoder, encoder = nn.Linear(2, 3), nn.Linear(3, 2)

    def model(x: Tensor) -> Any:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("obs", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(encoder(x), event_dim=1))

    return Case(model, (inputs(),), 1, (0,), net=decoder, guide_rows=True, guide=guide)


@program
def causal_mask_of_the_batch_size() -> Case:
    """A constant (T, T) argument where T is the number of examples."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.head = nn.Linear(2, 2), nn.Linear(2, 1)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q = self.query(x)
            w = (q @ x.mT + mask).softmax(-1)
            return self.head((w @ x).mean(-2)).squeeze(-1)

    net = bayesian_(Net())

    def model(mask: Tensor, x: Tensor, y: Tensor | None = None) -> Any:
        return normal(net(x, mask), y)

    mask = torch.full((5, 5), -1e9).triu(1)
    return Case(model, (mask, torch.randn(5, 5, 2), torch.randn(5)), 2, (None, 0, 0), net=net)


@program
def means_of_the_batch_size() -> Case:
    """A constant vector (d,) where d is the number of examples."""
    net = bayesian_(nn.Sequential(nn.Linear(4, 1)))

    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: Tensor, mean: Tensor) -> Tensor:
            return self.layer(x - mean).squeeze(-1)

    net = bayesian_(Standardised())

    def model(x: Tensor, mean: Tensor, y: Tensor | None = None) -> Any:
        return normal(net(x, mean), y)

    return Case(model, (torch.randn(4, 4), torch.randn(4), torch.randn(4)), 2, (0, None, 0), net=net)


@program
def weights_of_the_batch_size() -> Case:
    """As many features as examples, used outside of a network."""

    def model(x: Tensor, scale: Tensor, y: Tensor | None = None) -> Any:
        return normal(linear(x * scale), y)

    return Case(model, (torch.randn(6, 6), torch.rand(6) + 0.5, torch.randn(6)), 2, (0, None, 0))


@program
def no_plate() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        return pyro.sample("obs", dist.Normal(f, 0.5).to_event(1), obs=y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def sequential_plate() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = linear(x)
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"obs_{i}", dist.Normal(f[..., i], 0.5), obs=None if y is None else y[i])

    return Case(model, (inputs(4), torch.randn(4)), 1)


@program
def plate_named_like_an_argument() -> Case:
    def model(data: Tensor, y: Tensor | None = None) -> Any:
        f = linear(data)
        with pyro.plate("data", len(data)):
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def numbers_among_arguments() -> Case:
    def model(x: Tensor, degree: int, noise: float, extra: None = None, y: Tensor | None = None) -> Any:
        f = linear(x**degree)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, noise), obs=y)

    return Case(model, (inputs(), 2, 0.5, None, torch.randn(10)), 4, (0, None, None, None, 0))


@program
def row_of_a_matrix() -> Case:
    """Observations of all pairs of rows and columns, with latents of both."""

    def model(shape: Tensor, y: Tensor | None = None) -> Any:
        rows, columns = pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1)
        with rows:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with columns:
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with rows, columns:
            return pyro.sample("obs", dist.Normal(a + b + shape, 0.5), obs=y)

    return Case(model, (torch.randn(4, 3), torch.randn(4, 3)), 1)


@program
def integer_inputs() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(4, 2), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x)).squeeze(-1)

    net = bayesian_(Net())

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        return normal(net(x), y)

    return Case(model, (labels(10, 4), torch.randn(10)), 1, (0, 0), net=net, kron=("table", "head"))


@program
def one_column() -> Case:
    """Inputs of one dimension, made two inside the network."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x.unsqueeze(-1)).squeeze(-1)

    net = bayesian_(Net())

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        return normal(net(x), y)

    return Case(model, (torch.randn(10), torch.randn(10)), 1, (0, 0), net=net)


@program
def network_in_two_plates() -> Case:
    """Inputs (examples, times, features), an observation for each example and time."""
    net = perceptron(1, 2)

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = net(x).squeeze(-1)
        with pyro.plate("data", f.shape[-2], dim=-2), pyro.plate("times", f.shape[-1], dim=-1):
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return Case(model, (torch.randn(6, 4, 2), torch.randn(6, 4)), 1, (0, 0), net=net)
