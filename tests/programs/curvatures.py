# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Code that changes tensors in place, couples rows, routes them, or hides what it does."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bnn.nn import bayesian_
from tests.programs.batches import normal
from tests.programs.plain import linear, perceptron
from tests.programs.program import Case, inputs, labels, program


def net_case(net: nn.Module, x: Tensor, **options: Any) -> Case:
    """A network of one output under Normal observations."""

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = net(x)
        return normal(f.squeeze(-1) if f.dim() > 1 else f, y)

    return Case(model, (x, torch.randn(len(x))), 1, (0, 0), net=net, **options)


@program
def relu_in_place() -> Case:
    net = bayesian_(nn.Sequential(nn.Linear(2, 4), nn.ReLU(inplace=True), nn.Linear(4, 1)))
    return net_case(net, torch.randn(10, 2), kron=("0", "2"))


class Sub(nn.Module):
    """A perceptron with code between its layers."""

    def __init__(self, between: Any, after: Any = lambda f: f) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 1)
        self.between, self.after = between, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.last(self.between(self.first(x))))


def gate(h: Tensor) -> Tensor:
    g = h.sigmoid()
    h *= g
    return h


def zero_column(h: Tensor) -> Tensor:
    h = h * 2.0
    h[..., 0] = 0
    return h.tanh()


def double(f: Tensor) -> Tensor:
    f *= 2.5
    f += 0.3
    return f


@program
def gate_in_place() -> Case:
    return net_case(bayesian_(Sub(gate)), torch.randn(10, 2), kron=("first", "last"))


@program
def output_scaled_in_place() -> Case:
    return net_case(bayesian_(Sub(torch.tanh, double)), torch.randn(10, 2), kron=("first", "last"))


@program
def column_set_to_zero() -> Case:
    return net_case(bayesian_(Sub(zero_column)), torch.randn(10, 2))


@program
def in_place_on_the_predictor() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        f *= 2.0
        f.add_(0.1)
        return normal(f, y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def weight_copied_into_a_buffer() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        W = torch.zeros(w.shape[:-1] + (4,))
        W[..., :3] = w
        return normal((torch.cat([x, x[:, :1]], -1) * W).sum(-1), y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def masked_weights() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1)).clone()
        w[..., torch.tensor([False, True, False])] = 0
        return normal((x * w).sum(-1), y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def scripted_function() -> Case:
    @torch.jit.script
    def function(x: Tensor, w: Tensor) -> Tensor:
        return (x * w).sum(-1).tanh()

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        return normal(function(x, w), y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def scripted_linear() -> Case:
    @torch.jit.script
    def function(x: Tensor, w: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, w).tanh().sum(-1)

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        return normal(function(x, w), y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def vmap_over_rows() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        return normal(torch.vmap(lambda row: (row * w).sum().tanh())(x), y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def vmap_of_gradients() -> Case:
    """The slope of a function of the rows, by transforms of torch.func."""

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
        slopes = torch.vmap(torch.func.grad(lambda row: torch.tanh(w @ row).sum()))(x)
        return normal(slopes[:, 0], y)

    return Case(model, (torch.randn(8, 2), torch.randn(8)), 1, (0, 0))


@program
def vmap_of_a_linear_layer() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        return normal(torch.vmap(lambda row: F.linear(row, w).tanh().sum())(x), y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def checkpointed_layer() -> Case:
    from torch.utils.checkpoint import checkpoint

    def between(h: Tensor) -> Tensor:
        return checkpoint(torch.tanh, h, use_reentrant=False)

    return net_case(bayesian_(Sub(between)), torch.randn(10, 2))


@program
def second_use_of_a_layer() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(2, 2), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.layer(x).tanh()).tanh())

    return net_case(bayesian_(Net()), torch.randn(10, 2))


@program
def tied_weights() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh()).sum(-1)

    return net_case(bayesian_(Net()), torch.randn(10, 2))


@program
def two_layers_added() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x.tanh())

    return net_case(bayesian_(Net()), torch.randn(10, 2))


@program
def residual_block() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            h = h + self.b(h.tanh())
            h += h.sigmoid()
            return self.head(h)

    return net_case(bayesian_(Net()), torch.randn(10, 2))


# ---------------------------------------------------------------- rows that see each other


@program
def convolution_over_examples() -> Case:
    """A filter along the plate of 70 observations: neighbours share inputs."""

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        w = pyro.sample("w", dist.Normal(torch.zeros(1, 1, 3), 1.0).to_event(3))
        f = F.conv1d(x[None, None], w.reshape(-1, 1, 3), padding=1)[0]
        f = f.reshape(w.shape[:-4] + (-1,)) if w.dim() == 3 else f
        return normal(f.reshape(w.shape[:-3] + (len(x),)) if w.dim() == 3 else f, y)

    return Case(model, (torch.randn(70), torch.randn(70)), 1, (0, 0), separate=False)


@program
def recurrence_over_examples() -> Case:
    """A series of 70 observations through a recurrence: each depends on all before."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.RNN(1, 2), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x.unsqueeze(1))[0]).reshape(-1)

    net = bayesian_(Net(), fold=False)

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        return normal(net(x), y)

    data = (torch.randn(70, 1), torch.randn(70))
    return Case(model, data, 1, (0, 0), net=net, separate=False, hessian=False)


@program
def attention_over_examples() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.head = nn.Linear(2, 2), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.query(x) @ x.mT).softmax(-1) @ x)

    net = bayesian_(Net(), fold=False)
    case = net_case(net, torch.randn(70, 2))
    case.separate = False
    return case


@program
def batch_statistics_by_hand() -> Case:
    def between(h: Tensor) -> Tensor:
        return ((h - h.mean(0)) / (h.var(0) + 0.1).sqrt()).tanh()

    case = net_case(bayesian_(Sub(between)), torch.randn(70, 2))
    case.separate = False
    return case


@program
def sorted_inside() -> Case:
    """Rows are sorted before the network and put back after it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            order = x[:, 0].argsort()
            f = self.last(self.first(x[order]).tanh())
            return f[order.argsort()]

    return net_case(bayesian_(Net()), torch.randn(70, 2))


@program
def experts() -> Case:
    """Rows go to one of two layers by the sign of an input, so that each has its own number of rows."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            f = x.new_zeros(len(x), 1)
            high = x[:, 0] > 0
            f[high] = self.a(x[high])
            f[~high] = self.b(x[~high])
            return f

    return net_case(bayesian_(Net()), torch.randn(70, 2))


@program
def first_rows_without_gradient() -> Case:
    net = bayesian_(nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1, bias=False)))
    x = torch.randn(80, 1).abs()
    x[:66] = 0.0
    return net_case(net, x)


@program
def padding_index() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(4, 2, padding_idx=0), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x).sum(1).tanh())

    return net_case(bayesian_(Net()), labels(30, 4).reshape(10, 3))


@program
def embedding_bag() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.EmbeddingBag(4, 2, mode="sum"), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x).tanh())

    return net_case(bayesian_(Net()), labels(30, 4).reshape(10, 3))


# ---------------------------------------------------------------- derivatives of the network


@program
def physics_informed() -> Case:
    """The residual of u' = -u, by autograd inside of the model."""
    net = bayesian_(nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)))

    def model(t: Tensor, y: Tensor | None = None, zero: Tensor | None = None) -> Any:
        t = t.detach().requires_grad_(True)
        u = net(t)
        (slope,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        u = u.squeeze(-1)
        with pyro.plate("data", len(t)):
            pyro.sample("residual", dist.Normal(slope.squeeze(-1) + u, 0.3), obs=zero)
            return pyro.sample("obs", dist.Normal(u, 0.5), obs=y)

    return Case(model, (torch.rand(8, 1), torch.randn(8), torch.zeros(8)), 1, (0, 0, 0), net=net)


@program
def energies_and_forces() -> Case:
    net = perceptron(1, 2)

    def model(x: Tensor, force: Tensor | None = None) -> Any:
        x = x.detach().requires_grad_(True)
        energy = net(x)
        (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        with pyro.plate("data", len(x)):
            return pyro.sample("force", dist.Normal(-slope, 0.5).to_event(1), obs=force)

    return Case(model, (torch.randn(8, 2), torch.randn(8, 2)), 1, (0, 0), net=net)


@program
def gradient_under_no_grad() -> Case:
    """The model asks for gradients itself, as code that must also run in evaluation does."""
    net = perceptron(1, 2)

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(slope[..., 0], 0.5), obs=y)

    return Case(model, (torch.randn(8, 2), torch.randn(8)), 1, (0, 0), net=net)


# ---------------------------------------------------------------- precision


@program
def float32_network() -> Case:
    """A float32 network under float64 observations."""
    net = bayesian_(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).float())

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        return normal(net(x.float()).squeeze(-1).double(), y)

    return Case(model, (torch.randn(10, 2), torch.randn(10)), 1, (0, 0), net=net, digits=3e-5)


@program
def all_float32() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=torch.float32), 1.0).to_event(1))
        f = (x * w).sum(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return Case(model, (inputs().float(), torch.randn(10).float()), 1, (0, 0), digits=3e-5)


@program
def total_of_the_type_of_a_latent() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        total = torch.tensor(5).type_as(f)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Binomial(total, logits=f), obs=y)

    return Case(model, (inputs(), labels(10, 6).double()), 1, (0, 0))


@program
def integer_total() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Binomial(5, logits=f), obs=y)

    return Case(model, (inputs(), labels(10, 6).double()), 1, (0, 0))
