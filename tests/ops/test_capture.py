# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

from pyro_bnn.curvature.capture import Capture
from pyro_bnn.curvature.jacobian import ExampleJacobian
from tests.common import assert_close


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.cell = kind(4, 3, **options)
        self.first = options.get("batch_first", False)

    def forward(self, x):
        y = self.cell(x if self.first else x.transpose(0, 1))[0]
        return y[:, -1] if self.first else y[-1]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0].mean(1)


class Tied(nn.Module):
    """A weight that is an embedding and, transposed, a decoder."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.bias = nn.Parameter(torch.randn(7))

    def forward(self, x):
        return torch.tanh(self.table(x).mean(1)) @ self.table.weight.mT + self.bias


class Functional(nn.Module):
    """Uses that no layer makes: a slice of a packed weight, a bare scale, a log scale, a re-used weight."""

    def __init__(self):
        super().__init__()
        self.packed = nn.Parameter(torch.randn(44))
        self.scale = nn.Parameter(torch.randn(4))
        self.log_gain = nn.Parameter(torch.randn(()))

    def forward(self, x):
        first, second, third = self.packed.split([16, 16, 12])
        h = torch.tanh(x.flatten(1)[:, :4] @ first.view(4, 4) * self.scale)
        for _ in range(2):
            h = torch.tanh(second.view(4, 4) @ h.unsqueeze(-1)).squeeze(-1)
        return self.log_gain.exp() * (h - self.scale) @ third.view(4, 3)


def seq(*layers):
    return nn.Sequential(*layers)


SEQUENCE, IMAGE, VOLUME, TOKENS = (5, 4), (4, 5, 5), (2, 3, 3, 3), None
CASES = {
    "linear": (lambda: seq(nn.Flatten(), nn.Linear(20, 3), nn.Tanh(), nn.Linear(3, 2, bias=False)), SEQUENCE),
    "linear_over_sequence": (lambda: seq(nn.Linear(4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(15, 2)), SEQUENCE),
    "conv1d": (lambda: seq(nn.Conv1d(5, 4, 3, padding=1), nn.PReLU(4), nn.Flatten(), nn.Linear(16, 2)), SEQUENCE),
    "conv2d_groups": (lambda: seq(nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2)), IMAGE),
    "conv2d_same": (lambda: seq(nn.Conv2d(4, 2, 3, padding="same", dilation=2), nn.Flatten(), nn.Linear(50, 2)), IMAGE),
    "conv3d": (lambda: seq(nn.Conv3d(2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)), VOLUME),
    "conv_transpose1d": (lambda: seq(nn.ConvTranspose1d(5, 2, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 2)), SEQUENCE),
    "conv_transpose2d": (lambda: seq(nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(200, 2)), IMAGE),
    "conv_transpose3d": (lambda: seq(nn.ConvTranspose3d(2, 1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2)), VOLUME),
    "embedding": (lambda: seq(nn.Embedding(7, 4, padding_idx=1), nn.Flatten(), nn.Linear(20, 2)), TOKENS),
    "layer_norm": (lambda: seq(nn.LayerNorm(4), nn.Flatten(), nn.Linear(20, 2)), SEQUENCE),
    "batch_norm": (lambda: seq(nn.BatchNorm1d(5), nn.Flatten(), nn.Linear(20, 2)).eval(), SEQUENCE),
    "group_norm": (lambda: seq(nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(100, 2)), IMAGE),
    "lstm": (lambda: Recurrent(nn.LSTM, batch_first=True, num_layers=2, bidirectional=True), SEQUENCE),
    "lstm_time_first": (lambda: Recurrent(nn.LSTM), SEQUENCE),
    "gru": (lambda: Recurrent(nn.GRU, batch_first=True), SEQUENCE),
    "rnn": (lambda: Recurrent(nn.RNN, nonlinearity="relu"), SEQUENCE),
    "attention": (Attention, SEQUENCE),
    "transformer": (lambda: seq(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0), nn.Flatten(), nn.Linear(20, 2)), SEQUENCE),
    "tied": (Tied, TOKENS),
    "functional": (Functional, SEQUENCE),
}  # fmt: skip


def flat_function(net, x):
    shapes = {name: value.shape for name, value in net.named_parameters()}

    def function(u):
        parts = u.split([shape.numel() for shape in shapes.values()])
        values = {k: v.reshape(s) for (k, s), v in zip(shapes.items(), parts, strict=True)}
        return functional_call(net, values, (x,))

    return function, 0.5 * torch.randn(sum(shape.numel() for shape in shapes.values()))


@pytest.mark.parametrize("name", CASES)
def test_jacobian_equals_autograd(name):
    build, shape = CASES[name]
    net = build()
    x = torch.randint(0, 7, (6, 5)) if shape is None else torch.randn(6, *shape)
    function, start = flat_function(net, x)
    latent = start.clone().requires_grad_(True)
    with Capture(latent) as capture:
        y = function(latent)
    assert_close(y.detach(), function(start), rtol=1e-10, atol=1e-12)
    jacobian = ExampleJacobian(capture, latent, y)
    assert (jacobian.B, jacobian.dim) == (6, 0)
    # everything is found but what the functional case hides in an exponential
    assert len(jacobian.generic) == (1 if name == "functional" else 0)
    expected = torch.autograd.functional.jacobian(function, start)
    assert_close(jacobian.dense(jacobian.basis()).movedim(0, 1), expected, rtol=1e-9, atol=1e-11)


def test_a_use_that_shares_an_entry_with_what_is_not_recognised_is_given_up():
    latent = torch.randn(6, requires_grad=True)
    with Capture(latent) as capture:
        y = (
            F.linear(torch.randn(5, 3), latent[:3].view(1, 3)) * torch.special.i0e(latent[0])
            + latent[3:].sum()
        )
    capture.finish(y)
    assert capture.generic[:3].all()


@pytest.mark.parametrize("width", [2, 8])
def test_outputs_that_mix_examples(width):
    # few entries: by forward products; many: everything counts as one example
    x = torch.randn(6, 4)
    latent = torch.randn(4 * width, requires_grad=True)

    def function(u):
        h = (x @ u.view(4, width))[:, :2]
        return h - h.mean(0)

    with Capture(latent) as capture:
        y = function(latent)
    jacobian = ExampleJacobian(capture, latent, y)
    assert (1 if width == 8 else 6) == jacobian.B
    rows = jacobian.dense(jacobian.basis())
    expected = torch.autograd.functional.jacobian(function, latent.detach())
    assert_close(rows.movedim(0, 1).reshape(expected.shape), expected, rtol=1e-9, atol=1e-12)


def test_layouts_carry_over_to_batches_of_other_sizes():
    net = Recurrent(nn.LSTM)
    function, start = flat_function(net, torch.randn(6, 5, 4))
    latent = start.clone().requires_grad_(True)
    with Capture(latent) as capture:
        y = function(latent)
    layouts = ExampleJacobian(capture, latent, y).layouts
    for size in (1, 3):
        other, _ = flat_function(net, torch.randn(size, 5, 4))
        with Capture(latent) as capture:
            y = other(latent)
        jacobian = ExampleJacobian(capture, latent, y, layouts)
        assert jacobian.layouts is layouts
        expected = torch.autograd.functional.jacobian(other, start)
        assert_close(jacobian.dense(jacobian.basis()).movedim(0, 1), expected, rtol=1e-9, atol=1e-11)


def test_inactive_entries_cost_nothing():
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    function, start = flat_function(net, torch.randn(6, 4))
    latent = start.requires_grad_(True)
    active = torch.zeros(len(start), dtype=torch.bool)
    active[15:] = True
    with Capture(latent, active) as capture:
        function(latent)
    assert len(capture.outputs) == 1
    with Capture(latent) as capture:
        F.linear(torch.ones(2, 4), latent[:12].view(3, 4)).detach()
    assert len(capture.uses) == 1
