# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Networks whose tensors are not all batches: tables of positions, edges, grids, weights that a parent reads."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bnn.nn import bayesian_
from tests.programs.batches import normal
from tests.programs.curvatures import net_case
from tests.programs.program import Case, inputs, labels, program


class Positions(nn.Module):
    """Tokens plus a table of positions, read by arange."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(4, 2), nn.Embedding(steps, 2)
        self.head = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        return self.head(h.tanh().mean(1))


@program
def position_table() -> Case:
    return net_case(bayesian_(Positions(3)), labels(24, 4).reshape(8, 3))


@program
def position_table_that_divides() -> Case:
    """As many positions as rows under two components."""
    return net_case(bayesian_(Positions(8)), labels(32, 4).reshape(4, 8))


@program
def relative_positions() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias, self.head = nn.Embedding(5, 1), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            at = torch.arange(x.shape[1])
            bias = self.bias(at[:, None] - at[None] + 2)[..., 0]
            w = (x @ x.mT + bias).softmax(-1)
            return self.head((w @ x).mean(1))

    return net_case(bayesian_(Net()), torch.randn(6, 3, 2))


@program
def trunk_and_branch() -> Case:
    """An operator network: a grid inside the trunk, inputs in the branch."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch, self.trunk = nn.Linear(2, 2), nn.Linear(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            grid = torch.linspace(0, 1, 4).unsqueeze(-1)
            return torch.einsum("...bi,...ti->...bt", self.branch(x), self.trunk(grid).tanh())

    net = bayesian_(Net())

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, 0.5).to_event(1), obs=y)

    return Case(model, (torch.randn(6, 2), torch.randn(6, 4)), 1, (0, 0), net=net)


@program
def graph_by_edges() -> Case:
    """Message passing by an edge index; nodes are the rows."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.message, self.head = nn.Linear(2, 2), nn.Linear(2, 1)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            m = self.message(x)[edges[0]]
            h = torch.zeros_like(x).index_add(0, edges[1], m)
            return self.head((x + h).tanh())

    net = bayesian_(Net())

    def model(x: Tensor, edges: Tensor, y: Tensor | None = None) -> Any:
        return normal(net(x, edges).squeeze(-1), y)

    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 3]])
    return Case(model, (torch.randn(6, 2), edges, torch.randn(6)), 2, net=net, separate=False)


@program
def graph_by_a_sparse_matrix() -> Case:
    """The adjacency is a sparse argument of the model."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.message, self.head = nn.Linear(2, 2), nn.Linear(2, 1)

        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            return self.head(torch.sparse.mm(adjacency, self.message(x)).tanh())

    net = bayesian_(Net())

    def model(x: Tensor, adjacency: Tensor, y: Tensor | None = None) -> Any:
        return normal(net(x, adjacency).squeeze(-1), y)

    adjacency = ((torch.rand(6, 6) > 0.5) * torch.rand(6, 6)).to_sparse_coo()
    return Case(model, (torch.randn(6, 2), adjacency, torch.randn(6)), 2, net=net, separate=False)


@program
def weight_read_by_the_parent() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.head = nn.Linear(2, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.linear(x, self.qkv.weight).tanh())

    return net_case(bayesian_(Net()), torch.randn(8, 2))


@program
def layer_that_nobody_calls() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    return net_case(bayesian_(Net()), torch.randn(8, 2))


@program
def class_token() -> Case:
    """A module with a parameter of its own and layers below it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, 2))
            self.mix, self.head = nn.Linear(2, 2), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
            h = self.mix(h).tanh()
            return self.head((h @ h.mT).softmax(-1).matmul(h)[:, 0])

    return net_case(bayesian_(Net()), torch.randn(6, 2, 2))


@program
def body_and_head_apart() -> Case:
    """Two networks, converted one by one, called one after the other."""
    body, head = (
        bayesian_(nn.Sequential(nn.Linear(2, 2), nn.Tanh())),
        bayesian_(nn.Sequential(nn.Linear(2, 1))),
    )

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, head

    parts = Model()

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        with pyro.poutine.infer_config(config_fn=lambda site: {}):
            h = body(x)
        with rename("head."):
            f = head(h)
        return normal(f.squeeze(-1), y)

    return Case(model, (torch.randn(8, 2), torch.randn(8)), 1, (0, 0), net=parts)


def rename(prefix: str) -> Any:
    from pyro.contrib.autoname import scope

    return scope(prefix=prefix.rstrip("."))


@program
def network_of_a_tuple() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.log_sd = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.mean(x).squeeze(-1), 0.3 * self.log_sd(x).squeeze(-1)

    net = bayesian_(Net())

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        mean, log_sd = net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(mean, log_sd.exp()), obs=y)

    return Case(model, (torch.randn(8, 2), torch.randn(8)), 1, (0, 0), net=net)


@program
def network_of_a_distribution() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Any:
            return dist.Normal(self.mean(x).squeeze(-1), 0.5)

    net = bayesian_(Net())

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        d = net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", d, obs=y)

    return Case(model, (torch.randn(8, 2), torch.randn(8)), 1, (0, 0), net=net)


@program
def subclass_of_a_layer() -> Case:
    class Standardised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight - self.weight.mean(-1, keepdim=True), self.bias)

    net = nn.Sequential(Standardised(2, 3), nn.Tanh(), nn.Linear(3, 1))
    return net_case(bayesian_(net), torch.randn(8, 2))


@program
def reduces_over_its_batch() -> Case:
    """The network subtracts the mean over its rows."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last((h - h.mean(0)).tanh())

    case = net_case(bayesian_(Net()), torch.randn(8, 2))
    case.separate = False
    return case


@program
def state_of_the_batch_size() -> Case:
    """A buffer as long as the batch."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)
            self.register_buffer("offset", torch.linspace(0, 1, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).squeeze(-1) + self.offset[: len(x)]

    case = net_case(bayesian_(Net()), torch.randn(8, 2))
    case.separate = False
    return case


@program
def observation_in_two_plates() -> Case:
    """A row of outputs for each example, the outputs in a plate of their own."""
    net = bayesian_(nn.Sequential(nn.Linear(2, 3)))

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = net(x)
        with pyro.plate("data", len(x), dim=-2), pyro.plate("outputs", 3, dim=-1):
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return Case(model, (torch.randn(6, 2), torch.randn(6, 3)), 1, (0, 0), net=net, kron=("0",))


@program
def network_and_effects() -> Case:
    """A network beside a hierarchical effect of groups."""
    net = bayesian_(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)))

    def model(x: Tensor, group: Tensor, y: Tensor | None = None) -> Any:
        f = net(x).squeeze(-1)
        with pyro.plate("groups", 3):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Poisson((f + effect[..., group]).exp()), obs=y)

    return Case(model, (torch.randn(8, 2), torch.arange(8) % 3, labels(8, 4).double()), 2, (0, 0, 0), net=net)


@program
def network_inside_the_plate() -> Case:
    """One draw of all weights for each example: each has latents of its own."""
    net = bayesian_(nn.Sequential(nn.Linear(2, 1)), fold=False)

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("obs", dist.Normal((x * (w + z)).sum(-1), 0.5), obs=y)

    return Case(model, (torch.randn(6, 2), torch.randn(6)), 1, (0, 0), net=net, guide_rows=True)


@program
def largest_norm() -> Case:
    """An embedding that renormalises its rows in place."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(4, 2, max_norm=1.0), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x))

    return net_case(bayesian_(Net()), labels(8, 4))


@program
def inputs_of_one_feature() -> Case:
    """Rows and features look alike: eight rows of eight features."""
    net = bayesian_(nn.Sequential(nn.Linear(8, 1)))
    return net_case(net, torch.randn(8, 8), kron=("0",))


__all__ = ["inputs"]
