# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Curvature of programs whose uses of their weights are hard to see. The reference is one ``autograd.grad`` per output of the
plain function: no capture, no blocks, no batches.
"""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from pyro_bnn.infer.autoguide import AutoLaplace
from tests.common import assert_close

NOISE = 0.5


class Program:
    """A function of named weights and inputs, as a Pyro model and as the dense precision that it should have."""

    def __init__(self, forward, shapes, x, plate=True):
        self.forward, self.shapes, self.x = forward, shapes, x
        generator = torch.Generator().manual_seed(0)
        draw = lambda shape: 0.7 * torch.randn(shape, generator=generator, dtype=torch.get_default_dtype())  # noqa: E731
        self.values = {name: draw(shape) for name, shape in shapes.items()}
        with torch.enable_grad():
            f = forward(self.values, x)
        self.y = (f + NOISE * torch.randn(f.shape, generator=generator)).detach()

    def model(self, x, y=None):
        w = {k: pyro.sample(k, dist.Normal(torch.zeros(s), 1.0).to_event(len(s))) for k, s in self.shapes.items()}
        f = self.forward(w, x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, NOISE).to_event(f.dim() - 1), obs=y)

    def guide(self, **options):
        with torch.enable_grad():
            guide = AutoLaplace(self.model, **options).initialize(self.x, self.y)
        guide.loc.data.copy_(guide.packed.space.pack(self.values))
        return guide

    def fit(self, data=None, **options):
        data = (self.x, self.y) if data is None else data
        return self.guide(**options).laplace_approximation(data, map_tolerance=float("inf"))

    def jacobian(self, x=None):
        """One gradient per output, in the order of the packed vector; shape (N, M, p)."""
        leaves = {k: v.clone().requires_grad_() for k, v in self.values.items()}
        f = self.forward(leaves, self.x if x is None else x)
        rows = []
        for value in f.reshape(-1):
            grads = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([g.reshape(-1) for g in grads]))
        return torch.stack(rows).reshape(len(f), -1, sum(v.numel() for v in self.values.values()))

    def precision(self, batches=None):
        total = torch.eye(sum(v.numel() for v in self.values.values()))
        for x in [self.x] if batches is None else batches:
            J = self.jacobian(x).flatten(0, 1)
            total = total + J.mT @ J / NOISE**2
        return total


def mlp(w, x):
    return torch.tanh(F.linear(x, w["a"], w["b"])) @ w["c"]


MLP = {"a": (5, 3), "b": (5,), "c": (5, 2)}


def inplace_relu(w, x):
    h = F.linear(x, w["a"], w["b"])
    return F.relu(h, inplace=True) @ w["c"]


def inplace_scales(w, x):
    h = x @ w["a"].T
    h += w["b"]
    h *= w["gain"]
    f = torch.tanh(h) @ w["c"]
    f *= 2.5
    f.sub_(w["offset"])
    return f


def inplace_entries(w, x):
    h = F.linear(x, w["a"], w["b"])
    h[:, 0] = 0.0
    h[:, 1:3].exp_()
    return torch.tanh(h) @ w["c"]


def masked_weight(w, x):
    a = w["a"].clone()
    a[torch.eye(5, 3, dtype=torch.bool)] = 0.0
    b = w["b"].clone()
    b.mul_(2.0)
    return torch.tanh(F.linear(x, a, b)) @ w["c"]


def assigned_weight(w, x):
    a = torch.zeros(5, 3)
    a[:] = w["a"]
    c = torch.empty(5, 2)
    c[:, 0], c[:, 1] = w["c"][:, 0], w["c"][:, 1].clone()
    return torch.tanh(F.linear(x, a, w["b"])) @ c


def out_argument(w, x):
    return torch.tanh(F.linear(x, w["a"], w["b"])) @ torch.cat([w["c"][:2], w["c"][2:]]).index_copy_(
        0, torch.tensor([0]), w["c"][4:5]
    )


@torch.jit.script
def scripted_layer(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.tanh(torch.addmm(b, x, a.t()))


def scripted(w, x):
    return scripted_layer(x, w["a"], w["b"]) @ w["c"]


def vmapped(w, x):
    return torch.vmap(lambda row: torch.tanh(w["a"] @ row + w["b"]) @ w["c"])(x)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


def custom_function(w, x):
    return torch.tanh(F.linear(x, Cube.apply(w["a"]), w["b"])) @ w["c"]


def derivative(w, x):
    """A physics-informed residual: the network and its derivative in its input."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        u = mlp(w, x)
        (du,) = torch.autograd.grad(u[:, 0].sum(), x, create_graph=True)
    return torch.stack([u[:, 1], du.sum(-1)], -1)


def second_derivative(w, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        u = mlp(w, x)[:, 0]
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (ddu,) = torch.autograd.grad(du[:, 0].sum(), x, create_graph=True)
    return torch.stack([u, ddu[:, 0]], -1)


def sorted_rows(w, x):
    order = x[:, 0].argsort()
    return torch.tanh(F.linear(x[order], w["a"], w["b"]))[order.argsort()] @ w["c"]


def experts(w, x):
    h = F.linear(x, w["a"], w["b"])
    left = x[:, 0] > 0.3
    f = torch.zeros(len(x), 2)
    f[left] = torch.tanh(h[left]) @ w["c"]
    f[~left] = torch.sin(h[~left]) @ w["d"]
    return f


def keyword_arguments(w, x):
    h = torch.add(input=F.linear(input=x, weight=w["a"]), other=w["b"])
    return torch.matmul(input=torch.tanh(h), other=w["c"])


def type_of_another(w, x):
    return torch.tanh(F.linear(x.type_as(w["a"]), w["a"], w["b"].expand_as(w["b"]))) @ w["c"]


def time_convolution(w, x):
    """A convolution over the examples."""
    h = F.conv1d(x.T.unsqueeze(0), w["kernel"], padding=1)[0].T
    return torch.tanh(h) @ w["c"]


def time_recurrence(w, x):
    h = torch.zeros(5)
    states = []
    for row in x:
        h = torch.tanh(F.linear(row, w["a"], w["b"]) + 0.5 * h)
        states.append(h)
    return torch.stack(states) @ w["c"]


def attention(w, x):
    q = F.linear(x, w["a"], w["b"])
    return torch.softmax(q @ q.T / 3, -1) @ q @ w["c"]


def batch_statistics(w, x):
    h = F.linear(x, w["a"], w["b"])
    return torch.tanh((h - h.mean(0)) / h.std(0)) @ w["c"]


def position_table(w, x):
    """Every row has an offset of its own place."""
    return torch.tanh(F.linear(x, w["a"], w["b"])) @ w["c"] + w["table"][torch.arange(len(x)) % 7]


def far_lag(w, x):
    h = torch.tanh(F.linear(x, w["a"], w["b"]))
    return (h + torch.cat([torch.zeros(70, 5), h])[: len(h)]) @ w["c"]


SEEN = {
    "mlp": (mlp, MLP),
    "inplace_relu": (inplace_relu, MLP),
    "inplace_scales": (inplace_scales, MLP | {"gain": (5,), "offset": (2,)}),
    "inplace_entries": (inplace_entries, MLP),
    "masked_weight": (masked_weight, MLP),
    "assigned_weight": (assigned_weight, MLP),
    "out_argument": (out_argument, MLP),
    "experts": (experts, MLP | {"d": (5, 2)}),
    "keyword_arguments": (keyword_arguments, MLP),
    "type_of_another": (type_of_another, MLP),
}
UNSEEN = {
    "scripted": (scripted, MLP),
    "vmapped": (vmapped, MLP),
    "custom_function": (custom_function, MLP),
    "derivative": (derivative, MLP),
    "second_derivative": (second_derivative, MLP),
}
COUPLED = {
    "sorted_rows": (sorted_rows, MLP),
    "time_convolution": (time_convolution, {"kernel": (5, 3, 3), "c": (5, 2)}),
    "time_recurrence": (time_recurrence, MLP),
    "attention": (attention, MLP),
    "batch_statistics": (batch_statistics, MLP),
    "position_table": (position_table, MLP | {"table": (7, 2)}),
    "far_lag": (far_lag, MLP),
}
ALL = SEEN | UNSEEN | COUPLED


def program(name, n):
    forward, shapes = ALL[name]
    torch.manual_seed(1)
    return Program(forward, shapes, torch.randn(n, 3))


@pytest.mark.parametrize("n", [9, 150])
@pytest.mark.parametrize("name", ALL)
def test_full_precision_is_that_of_dense_autograd(name, n):
    case = program(name, n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guide = case.fit()
    assert_close(guide.precision, case.precision(), rtol=1e-8, atol=1e-9)
