# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Layers: convolutions, recurrences, attention, normalisation, dropout."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_bnn.nn import bayesian_, rank1_
from tests.programs.batches import LastStep, normal
from tests.programs.curvatures import net_case
from tests.programs.program import Case, labels, program


@program
def convolution() -> Case:
    net = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 1))
    return net_case(bayesian_(net), torch.randn(10, 1, 4))


@program
def convolution_of_images() -> Case:
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 1))
    return net_case(bayesian_(net), torch.randn(8, 1, 4, 4))


@program
def transposed_convolution() -> Case:
    net = nn.Sequential(nn.ConvTranspose1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1))
    return net_case(bayesian_(net), torch.randn(8, 1, 3))


@program
def lstm() -> Case:
    return net_case(bayesian_(LastStep(1, True, nn.LSTM)), torch.randn(8, 3, 1))


@program
def gru() -> Case:
    return net_case(bayesian_(LastStep(1, True)), torch.randn(8, 3, 1))


@program
def bidirectional() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.RNN(1, 2, batch_first=True, bidirectional=True), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0].mean(1))

    return net_case(bayesian_(Net()), torch.randn(8, 3, 1))


class Packed(nn.Module):
    """A recurrence over sequences of several lengths."""

    def __init__(self, cls: Any) -> None:
        super().__init__()
        self.rnn, self.head = cls(1, 2, batch_first=True), nn.Linear(2, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        state = self.rnn(packed)[1]
        state = state[0] if isinstance(state, tuple) else state
        return self.head(state[-1])


def packed_case(cls: Any) -> Case:
    net = bayesian_(Packed(cls))

    def model(x: Tensor, lengths: Tensor, y: Tensor | None = None) -> Any:
        return normal(net(x, lengths).squeeze(-1), y)

    lengths = torch.tensor([1, 3, 2, 3, 1, 2])
    return Case(model, (torch.randn(6, 3, 1), lengths, torch.randn(6)), 2, (0, 0, 0), net=net)


@program
def packed_lstm() -> Case:
    return packed_case(nn.LSTM)


@program
def packed_gru() -> Case:
    return packed_case(nn.GRU)


@program
def layer_norm() -> Case:
    net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 1))
    return net_case(bayesian_(net), torch.randn(10, 2))


@program
def batch_norm_evaluated() -> Case:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))
    net(torch.randn(20, 2))
    return net_case(bayesian_(net), torch.randn(10, 2))


@program
def batch_norm_in_training() -> Case:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))
    return net_case(bayesian_(net), torch.randn(10, 2), train=True, shares_statistics=True)


@program
def dropout_evaluated() -> Case:
    net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Tanh(), nn.Linear(3, 1))
    return net_case(bayesian_(net), torch.randn(10, 2))


@program
def dropout_always_on() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(nn.functional.dropout(self.first(x), 0.5, training=True))

    case = net_case(bayesian_(Net()), torch.randn(10, 2), noise=True)
    case.must_refuse = ("Laplace, full, ggn",)
    return case


@program
def multihead_attention() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(2, 1, batch_first=True), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    return net_case(bayesian_(Net()), torch.randn(8, 3, 2))


@program
def attention_by_hand() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.head = nn.Linear(2, 6), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.head(nn.functional.scaled_dot_product_attention(q, k, v).mean(-2))

    return net_case(bayesian_(Net()), torch.randn(8, 3, 2))


@program
def transformer_layer() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(2, 1, 2, dropout=0.0, batch_first=True)
            self.head = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x).mean(1))

    return net_case(bayesian_(Net()), torch.randn(6, 3, 2))


@program
def rank_one_convolution() -> Case:
    net = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
    return net_case(rank1_(net), torch.randn(8, 1, 4))


@program
def rank_one_without_folding() -> Case:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    return net_case(rank1_(net, fold=False), torch.randn(10, 2))


@program
def group_norm() -> Case:
    net = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.GroupNorm(2, 2), nn.Flatten(), nn.Linear(8, 1))
    return net_case(bayesian_(net), torch.randn(8, 1, 4))


@program
def sequence_labels() -> Case:
    """A label for each step of each sequence."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(1, 2, batch_first=True), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    net = bayesian_(Net())

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = net(x)
        with pyro.plate("data", len(x), dim=-2), pyro.plate("steps", x.shape[1], dim=-1):
            return pyro.sample("obs", dist.Categorical(logits=f), obs=y)

    return Case(model, (torch.randn(6, 3, 1), labels(18).reshape(6, 3)), 1, (0, 0), net=net)


@program
def pictures_as_events() -> Case:
    """An autoencoder: an image is one event."""
    net = bayesian_(
        nn.Sequential(nn.Flatten(), nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 4), nn.Unflatten(1, (2, 2)))
    )

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Bernoulli(logits=f).to_event(2), obs=y)

    x = (torch.rand(8, 2, 2) > 0.5).double()
    return Case(model, (x, x), 1, (0, 0), net=net)
