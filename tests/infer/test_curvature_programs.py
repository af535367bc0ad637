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

from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.ops.notice import CurvatureWarning
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
        w = {
            k: pyro.sample(k, dist.Normal(torch.zeros(s), 1.0).to_event(len(s)))
            for k, s in self.shapes.items()
        }
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
            grads = torch.autograd.grad(
                value, list(leaves.values()), retain_graph=True, materialize_grads=True
            )
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


def with_sizes(names):
    """Programs and numbers of rows; hundreds of backward passes through a loop over 150 rows are slow."""
    return [
        pytest.param(name, n, marks=pytest.mark.slow if (name, n) == ("time_recurrence", 150) else ())
        for name in names
        for n in (9, 150)
    ]


@pytest.mark.parametrize(("name", "n"), with_sizes(ALL))
def test_full_precision_is_that_of_dense_autograd(name, n):
    case = program(name, n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guide = case.fit()
    assert_close(guide.precision, case.precision(), rtol=1e-8, atol=1e-9)


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["inplace_scales", "derivative", "experts", "attention"])
@pytest.mark.parametrize("structure", ["diagonal", "block", "function_space", "low_rank"])
def test_every_structure(name, structure):
    case = program(name, 90)
    dense = case.precision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guide = case.fit(structure=structure, rank=len(dense))
    if structure == "diagonal":
        expected = torch.diag(dense.diagonal())
    elif structure == "block":
        sizes = [v.numel() for v in case.values.values()]
        expected = torch.block_diag(*(b.split(sizes, 1)[i] for i, b in enumerate(dense.split(sizes))))
    else:
        expected = dense
    assert_close(guide.posterior.multiply(torch.eye(len(dense))), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "n"),
    with_sizes(["inplace_relu", "inplace_entries", "second_derivative", "experts", "time_recurrence"]),
)
def test_predictions_and_gradient_are_those_of_dense_autograd(name, n):
    case = program(name, n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guide = case.fit()
        found = guide.linearized_outputs(case.x)["obs"].covariance
    J = case.jacobian()
    cov = J @ torch.linalg.inv(case.precision()) @ J.mT
    # the elements of one event are told apart
    assert_close(found.squeeze((-1, -2)), cov.diagonal(dim1=-2, dim2=-1), rtol=1e-7, atol=1e-9)
    leaves = guide.packed.space.pack(case.values)
    residual = (case.forward(case.values, case.x) - case.y) / NOISE**2
    gradient = torch.einsum("nm,nmp->p", residual, J) + leaves
    assert_close(guide.map_report.gradient_norm, gradient.norm(), rtol=1e-8)


def batches_that_mislead(name):
    """A first batch that shows nothing or something special, and others."""
    torch.manual_seed(2)
    x = torch.randn(40, 3)
    if name == "dead":  # all units of the hidden layer are off: every gradient of the first layer is zero
        special = -100 * torch.ones(6, 3)
        values = {"a": torch.rand(5, 3), "b": torch.zeros(5), "c": torch.randn(5, 2)}
        return (inplace_relu, MLP, values, [special, x])
    if name == "sorted":
        order = x[:10, 0].argsort()
        return (sorted_rows, MLP, None, [x[:10][order], x[10:20], x[20:]])
    # as many rows for one expert as for the other, and then not
    left, right = x[x[:, 0] > 0.3], x[x[:, 0] <= 0.3]
    return (experts, MLP | {"d": (5, 2)}, None, [right[:6], left[:6], x])


@pytest.mark.parametrize("name", ["dead", "sorted", "experts"])
@pytest.mark.parametrize("structure", ["full", "diagonal", "block"])
def test_the_order_of_batches_does_not_matter(name, structure):
    forward, shapes, values, batches = batches_that_mislead(name)
    case = Program(forward, shapes, batches[0])
    case.values = values or case.values
    data = [(x, (case.forward(case.values, x) + 0.3).detach()) for x in batches]
    dense = case.precision(batches)
    for order in (data, data[::-1]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CurvatureWarning)
            found = case.fit(order, structure=structure).posterior.multiply(torch.eye(len(dense)))
        if structure == "full":
            assert_close(found, dense, rtol=1e-8, atol=1e-9)
        else:
            assert_close(found.diagonal(), dense.diagonal(), rtol=1e-8, atol=1e-9)


def test_the_message_names_the_latents():
    case = program("derivative", 9)
    with pytest.warns(CurvatureWarning, match="'a', 'c'.*derivative of the network"):
        case.fit()


def test_random_numbers_of_the_program_are_left_alone():
    case = program("derivative", 90)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guide = case.guide()
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        guide.laplace_approximation((case.x, case.y), map_tolerance=float("inf"))
    assert_close(torch.rand(3), expected)


def test_compiled_functions():
    layer = torch.compile(lambda x, a, b: torch.tanh(F.linear(x, a, b)), backend="aot_eager")
    case = Program(lambda w, x: layer(x, w["a"], w["b"]) @ w["c"], MLP, torch.randn(9, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guide = case.fit()
    assert_close(guide.precision, case.precision(), rtol=1e-8, atol=1e-9)
