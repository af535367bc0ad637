# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Single uses of entries of a vector, each against autograd's dense Jacobian."""

import operator

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

from pyro_bnn.curvature.capture import Capture
from pyro_bnn.curvature.jacobian import ExampleJacobian
from tests.common import assert_close

B, D = 5, 4
#: Uses that are found: from a vector u and inputs x (B, D) to outputs (B, M).
FOUND = {
    "linear": lambda u, x: F.linear(x, u[:8].view(2, 4), u[8:10]),
    "linear without a bias": lambda u, x: F.linear(x, u[:8].view(2, 4)),
    "only the bias": lambda u, x: F.linear(x, torch.ones(2, 4), u[:2]).sin(),
    "matmul": lambda u, x: x @ u[:8].view(4, 2),
    "method": lambda u, x: x.matmul(u[:8].view(4, 2)),
    "mm": lambda u, x: torch.mm(x, u[:8].view(4, 2)),
    "from the left": lambda u, x: (u[:8].view(2, 4) @ x.mT).mT,
    "batch from the left": lambda u, x: (u[:8].view(2, 4) @ x.unsqueeze(-1)).squeeze(-1),
    "vector": lambda u, x: (x @ u[:4]).sin().unsqueeze(-1),
    "mv": lambda u, x: torch.mv(x, u[:4]).unsqueeze(-1),
    "vector from the left": lambda u, x: (u[:4] @ x.mT).unsqueeze(-1),
    "vector from the left of a batch": lambda u, x: u[:4] @ (x.unsqueeze(-1) * torch.arange(3.0)),
    "matrix with an empty batch from the right": lambda u, x: (x.unsqueeze(0) @ u[:8].view(1, 4, 2)).squeeze(0),
    "matrix with an empty batch from the left": lambda u, x: (u[:8].view(1, 2, 4) @ x.mT.unsqueeze(0))[0].mT,
    "addmm": lambda u, x: torch.addmm(u[8:10], x, u[:8].view(4, 2)),
    "addmm of known offsets": lambda u, x: torch.addmm(torch.ones(2), x, u[:8].view(4, 2)),
    "scale": lambda u, x: x * u[:4],
    "scale from the left": lambda u, x: u[:4] * x.tanh(),
    "scale of what is overwritten": lambda u, x: (x + 1).mul_(u[:4]),
    "scale by an operator in place": lambda u, x: operator.imul(x.sin(), u[:4]),
    "torch.mul": lambda u, x: torch.mul(x, u[:4]),
    "multiply": lambda u, x: torch.multiply(u[0], x),
    "scale of one column each": lambda u, x: u[:4].view(4, 1) * x.unsqueeze(-1).expand(B, 4, 2),
    "shift": lambda u, x: (x + u[:4]).sin(),
    "shift from the left": lambda u, x: (u[:4] + x).sin(),
    "minus": lambda u, x: (x - u[:4]).sin(),
    "minus from the left": lambda u, x: (u[:4] - x).sin(),
    "torch.sub": lambda u, x: torch.sub(x, u[:4]).sin(),
    "torch.sub from the left": lambda u, x: torch.sub(u[:4], x).sin(),
    "rsub": lambda u, x: torch.rsub(x, u[:4]).sin(),
    "rsub from the left": lambda u, x: torch.rsub(u[:4], x).sin(),
    "addcmul": lambda u, x: torch.addcmul(x, x.sin(), u[:4]).sin(),
    "moves": lambda u, x: x @ u[:16].reshape(2, 2, 4).movedim(0, 1).flatten(0, 1).flip(0).roll(1, 0),
    "stacked rows": lambda u, x: F.linear(x, torch.stack([u[:4], u[4:8].flip(0), u[8:12]])),
    "cat": lambda u, x: F.linear(x, torch.cat([u[:8].view(2, 4), u[8:12].view(1, 4)])),
    "hstack and vstack": lambda u, x: F.linear(x, torch.vstack([torch.hstack([u[:2], u[4:6]]), u[8:12]])),
    "unbind and select": lambda u, x: (x * u[:8].view(2, 4).unbind(0)[1] + u[:8].view(2, 4).select(0, 0)).sin(),
    "narrow, chunk, split": lambda u, x: F.linear(
        x, torch.stack([u.narrow(0, 1, 4), u[:8].chunk(2)[1], u[:12].split([8, 4])[1]])
    ),
    "diagonal": lambda u, x: x * u[:16].view(4, 4).diagonal(),
    "repeat": lambda u, x: F.linear(x, u[:2].repeat(3, 2)),
    "tile": lambda u, x: F.linear(x, u[:2].tile(3, 2)),
    "expand": lambda u, x: x * u[:1].expand(4),
    "expand_as a row": lambda u, x: x * u[:4].expand_as(torch.ones(1, 4)),
    "broadcast_to a row": lambda u, x: x * u[:2].view(2, 1).broadcast_to(2, 2).flatten(),
    "broadcast_tensors to a row": lambda u, x: x * torch.broadcast_tensors(torch.zeros(1, 4), u[:4], u[4:5])[1],
    "rows of a table": lambda u, x: (
        x[:, [0, 1, 0]].unsqueeze(-1) * u[:8].view(2, 4)[torch.tensor([1, 0, 1])]
    ).flatten(1),
    "permute": lambda u, x: x @ u[:8].view(2, 4).permute(1, 0),
    "T": lambda u, x: x @ u[:8].view(2, 4).T,
    "mT": lambda u, x: x @ u[:8].view(2, 4).mT,
    "index_select": lambda u, x: x * u.index_select(0, torch.tensor([3, 3, 0, 9])),
    "an index": lambda u, x: x * u[torch.tensor([3, 3, 0, 9])],
    "unsqueeze and squeeze": lambda u, x: x * u[:4].unsqueeze(0).squeeze(0),
    "copies": lambda u, x: x * u[:4].contiguous().clone().double().to(x.dtype).type_as(x),
    "an offset that is used twice": lambda u, x: (x + u[:4]) * u[:4].clone(),
    "used twice": lambda u, x: torch.tanh(x @ u[:16].view(4, 4)) @ u[:16].view(4, 4),
    "conv1d": lambda u, x: F.conv1d(x.view(B, 2, 2), u[:8].view(2, 2, 2), u[8:10], padding=1).flatten(1),
    "conv1d valid": lambda u, x: F.conv1d(x.view(B, 1, 4), u[:6].view(2, 1, 3), padding="valid").flatten(1),
    "conv1d same": lambda u, x: F.conv1d(x.view(B, 1, 4), u[:6].view(2, 1, 3), padding="same").flatten(1),
    "conv1d with gaps": lambda u, x: F.conv1d(x.view(B, 1, 4), u[:4].view(2, 1, 2), stride=2, dilation=2).flatten(1),
    "conv2d same": lambda u, x: F.conv2d(
        x.view(B, 1, 2, 2), u[:9].view(1, 1, 3, 3), padding="same", dilation=(1, 2)
    ).flatten(1),
    "conv in groups": lambda u, x: F.conv1d(
        x.view(B, 2, 2), u[:8].view(4, 1, 2), u[8:12], groups=2, padding=1
    ).flatten(1),
    "transposed": lambda u, x: F.conv_transpose1d(x.view(B, 2, 2), u[:8].view(2, 2, 2), u[8:10]).flatten(1),
    "transposed with everything": lambda u, x: F.conv_transpose1d(
        x.view(B, 2, 2), u[:6].view(2, 1, 3), u[8:10], stride=3, padding=1, output_padding=2, groups=2, dilation=2
    ).flatten(1),
    "layer norm": lambda u, x: F.layer_norm(x, (4,), u[:4], u[4:8]).sin(),
    "layer norm without offset": lambda u, x: F.layer_norm(x, (4,), u[:4], None, 0.1).sin(),
    "group norm": lambda u, x: F.group_norm(x.view(B, 2, 2), 2, u[:2], u[2:4], 0.1).flatten(1).sin(),
    "instance norm": lambda u, x: F.instance_norm(x.view(B, 2, 2), None, None, u[:2], u[2:4]).flatten(1).sin(),
    "batch norm": lambda u, x: F.batch_norm(x, torch.ones(4), 2 * torch.ones(4), u[:4], u[4:8]).sin(),
    "rms norm": lambda u, x: F.rms_norm(x, (4,), u[:4], 0.1).sin(),
    "prelu": lambda u, x: F.prelu(x, u[:1]),
    "prelu by channel": lambda u, x: F.prelu(x.view(B, 2, 2), u[:2]).flatten(1),
    "embedding": lambda u, x: F.embedding((x[:, :2] > 0).long(), u[:8].view(2, 4)).flatten(1).sin(),
    "embedding with padding": lambda u, x: F.embedding(
        (x[:, :2] > 0).long() + (x[:, 2:] > 0), u[:6].view(3, 2), padding_idx=-1
    ).flatten(1),
    "an offset of every example": lambda u, x: (x[:, :1] * 0 + u[0]).sin(),
}  # fmt: skip
#: Uses that are left to autograd, and must still be right.
GENERIC = {
    "a row of a table for each example": lambda u, x: (u[:8].view(2, 4)[(x[:, 0] > 0).long()] * x).sin(),
    "the offset of a bilinear map": lambda u, x: F.bilinear(x, x, torch.ones(2, 4, 4), u[:2]).sin(),
    "broadcast_tensors in the other order": lambda u, x: torch.mul(*torch.broadcast_tensors(x, u[:4])),
    "broadcast_tensors": lambda u, x: torch.mul(*torch.broadcast_tensors(u[:4], x)),
    "broadcast_to": lambda u, x: x * u[:1].broadcast_to(B, 4),
    "expand_as": lambda u, x: x * u[:4].expand_as(x),
    "bmm of one expanded matrix": lambda u, x: torch.bmm(
        x.unsqueeze(1), u[:8].view(4, 2).expand(B, 4, 2)
    ).squeeze(1),
    "a product of both": lambda u, x: x @ (u[:8].view(4, 2) * u[8:10]),
    "a square": lambda u, x: x * u[:4] ** 2,
    "a number times": lambda u, x: x * (2.0 * u[:4]),
    "weights on both sides": lambda u, x: x @ (u[:8].view(4, 2) @ u[8:12].view(2, 2)),
    "beta and alpha": lambda u, x: torch.addmm(u[8:10], x, u[:8].view(4, 2), beta=0.5, alpha=2.0),
    "sub with alpha": lambda u, x: torch.sub(x, u[:4], alpha=2.0).sin(),
    "addcmul with a value": lambda u, x: torch.addcmul(x, x.sin(), u[:4], value=0.5),
    "a matrix times a vector": lambda u, x: torch.stack([u[:8].view(2, 4) @ row for row in x]),
    "a batch of matrices": lambda u, x: (x.unsqueeze(1) @ u.view(1, 4, 5).repeat(B, 1, 1)).squeeze(1),
    "different matrices": lambda u, x: (x.unsqueeze(1) @ u.view(B, 4, 1)).squeeze(1),
    "returned as it is": lambda u, x: u[:2].expand(B, 2),
    "returned in part": lambda u, x: torch.cat([x.sin(), u[:1].expand(B, 1)], 1),
    "cat with a known tensor": lambda u, x: F.linear(x, torch.cat([u[:8].view(2, 4), torch.ones(1, 4)])),
    "another dtype": lambda u, x: x * u[:4].view(torch.float64),
    "a bilinear map": lambda u, x: F.bilinear(x, x, u[:16].view(1, 4, 4)),
    "a scatter": lambda u, x: x * torch.zeros(4).index_add(0, torch.tensor([0, 0, 2]), u[:3]),
    "a weight of which a part mixes examples": lambda u, x: torch.cat(
        [x @ u[:8].view(4, 2), x @ u[4:12].view(4, 2) - (x @ u[4:12].view(4, 2)).mean(0), x * u[11:15]], 1
    ),
    "a call of another form": lambda u, x: torch.matmul(x, u[:8].view(4, 2), out=None),
    "exponentials": lambda u, x: torch.exp(u[:4]) * x,
    "softplus": lambda u, x: x @ F.softplus(u[:8]).view(4, 2),
    "an input of a layer": lambda u, x: F.linear(u[:4].expand(B, 4) * x, torch.ones(2, 4)),
    "found and generic at once": lambda u, x: F.linear(x, u[:8].view(2, 4)) * u[0].exp(),
}  # fmt: skip


def written(operation):
    """A function whose weight is changed in place after it was taken from the vector."""

    def function(u, x):
        w = u[:4].clone()
        w = operation(w, x)
        return x * w

    return function


def assigned(w, x):
    w[1:3] = x[0, :2].sin()
    return w


#: Changes in place of tensors that hold entries of the vector.
WRITTEN = {
    "add": lambda w, x: operator.iadd(w, x[0]),
    "sub": lambda w, x: operator.isub(w, 1.0),
    "mul": lambda w, x: operator.imul(w, 2.0),
    "div": lambda w, x: operator.itruediv(w, 2.0),
    "pow": lambda w, x: operator.ipow(w, 2),
    "a method": lambda w, x: w.mul_(x[0]),
    "zero": lambda w, x: w.zero_(),
    "an assignment": assigned,
    "a function of itself": lambda w, x: w.sin_(),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_writing_in_place_is_noticed(name):
    x = torch.randn(B, D)
    jacobian, expected = jacobian_of(written(WRITTEN[name]), x)
    rows = jacobian.dense(jacobian.basis()).movedim(0, 1)
    assert_close(rows, expected.reshape(rows.shape), rtol=1e-9, atol=1e-11)


def jacobian_of(function, x, active=None):
    u = torch.randn(20)
    latent = u.clone().requires_grad_(True)
    with Capture(latent, active) as capture:
        y = function(latent, x)
    y = y.flatten(1)
    assert_close(y.detach(), function(u, x).flatten(1), rtol=1e-12, atol=1e-13)
    expected = torch.autograd.functional.jacobian(lambda v: function(v, x).flatten(1), u)
    return ExampleJacobian(capture, latent, y), expected


@pytest.mark.parametrize("name", [*FOUND, *GENERIC])
def test_the_jacobian_is_that_of_autograd(name):
    x = torch.randn(B, D)
    jacobian, expected = jacobian_of({**FOUND, **GENERIC}[name], x)
    rows = jacobian.dense(jacobian.basis())
    if jacobian.dim < 0:
        expected = expected.reshape(1, -1, 20)
    assert_close(rows.movedim(0, 1), expected, rtol=1e-9, atol=1e-11)
    if name in FOUND:
        assert len(jacobian.generic) == 0


@pytest.mark.parametrize("name", FOUND)
def test_entries_that_are_not_of_interest_are_left_out(name):
    active = torch.zeros(20, dtype=torch.bool)
    active[3:5] = True
    jacobian, expected = jacobian_of(FOUND[name], torch.randn(B, D), active)
    rows = jacobian.dense(jacobian.basis()).movedim(0, 1)
    assert_close(
        rows[..., active], expected[..., active].reshape(rows.shape[0], -1, 2), rtol=1e-9, atol=1e-11
    )


RECURRENT = {
    "lstm": (nn.LSTM, {"batch_first": True}),
    "lstm of two layers without biases": (nn.LSTM, {"batch_first": True, "num_layers": 2, "bias": False}),
    "lstm with projections": (
        nn.LSTM,
        {"batch_first": True, "proj_size": 2, "bidirectional": True, "num_layers": 2},
    ),
    "lstm with a projection without biases": (nn.LSTM, {"batch_first": True, "proj_size": 1, "bias": False}),
    "gru both ways": (nn.GRU, {"batch_first": True, "bidirectional": True, "num_layers": 2}),
    "gru without biases": (nn.GRU, {"batch_first": True, "bias": False}),
    "tanh": (nn.RNN, {"batch_first": True}),
    "relu both ways": (nn.RNN, {"batch_first": True, "nonlinearity": "relu", "bidirectional": True}),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("states", [False, True])
def test_recurrent_layers_with_their_states(name, states):
    kind, options = RECURRENT[name]
    net = kind(2, 3, **options)
    shapes = {k: v.shape for k, v in net.named_parameters()}
    sizes = [s.numel() for s in shapes.values()]
    x = torch.randn(B, 3, 2)
    start = torch.randn(net.num_layers * (1 + net.bidirectional), B, 3)
    first = (start[..., : net.proj_size or 3], start.flip(-1)) if kind is nn.LSTM else start

    def function(u, x):
        values = {k: v.view(s) for (k, s), v in zip(shapes.items(), u.split(sizes), strict=True)}
        output, last = functional_call(net, values, (x, first) if states else (x,))
        last = torch.cat(last, -1) if isinstance(last, tuple) else last
        return torch.cat([output.flatten(1), last.movedim(1, 0).flatten(1)], 1)

    u = torch.randn(sum(sizes))
    latent = u.clone().requires_grad_(True)
    with Capture(latent) as capture:
        y = function(latent, x)
    assert_close(y.detach(), function(u, x), rtol=1e-10, atol=1e-12)
    jacobian = ExampleJacobian(capture, latent, y)
    assert len(jacobian.generic) == 0
    expected = torch.autograd.functional.jacobian(lambda v: function(v, x), u)
    assert_close(jacobian.dense(jacobian.basis()).movedim(0, 1), expected, rtol=1e-9, atol=1e-11)
