# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Networks whose weights are one flat site compute what the plain networks compute with the same weights."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.model.handlers import SubstituteMessenger
from pyro_bnn.nn import bayesian_, init_to_trained, unpack_site
from tests.common import assert_close


class LastStep(nn.Module):
    """The last output of a recurrent network, through a linear layer."""

    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True, **options)
        self.out = nn.Linear(8 if options.get("bidirectional") else 4, 2)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


class TiedEmbedding(nn.Module):
    """An embedding that also is the output map."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 3)
        self.out = nn.Linear(3, 6)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(torch.tanh(self.embed(x)).mean(1))


class Attention(nn.Module):
    """Self-attention and a linear layer."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.attention(x, x, x)[0].mean(1))


def symbols():
    return torch.randint(6, (5, 3))


NETWORKS = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)), (5, 2, 4)),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3, bias=False), nn.Tanh(), nn.ConvTranspose2d(2, 2, 2), nn.Flatten(), nn.Linear(18, 2)
        ),
        (5, 1, 4, 4),
    ),
    "lstm": (lambda: LastStep(nn.LSTM, num_layers=2), (5, 3, 3)),
    "gru": (lambda: LastStep(nn.GRU, bidirectional=True), (5, 3, 3)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(9, 2)), symbols),
    "tied": (TiedEmbedding, symbols),
    "attention": (Attention, (5, 3, 4)),
    "transformer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), nn.Flatten(), nn.Linear(12, 2)
        ),
        (5, 3, 4),
    ),
}  # fmt: skip


def made(name):
    make, shape = NETWORKS[name]
    return make(), shape() if callable(shape) else torch.randn(shape)


def plain_name(name):
    return name.replace("out_proj_", "out_proj.")


@pytest.mark.parametrize("name", NETWORKS)
def test_packed_equals_the_plain_network(name):
    plain, x = made(name)
    original = copy.deepcopy(plain)
    net = bayesian_(copy.deepcopy(plain), packed=True)
    trace = poutine.trace(net).get_trace(x)
    assert list(dict(trace.iter_stochastic_nodes())) == ["packed"]
    S = 3
    draws = torch.randn(S, 1, *trace.nodes["packed"]["value"].shape)
    with SubstituteMessenger({"packed": draws}):
        many = net(x)
    for s in range(S):
        with torch.no_grad():
            for key, value in unpack_site(net, draws[s, 0]).items():
                plain.get_parameter(plain_name(key)).copy_(value)
        assert_close(many[s], plain(x), rtol=1e-10, atol=1e-12)
        with SubstituteMessenger({"packed": draws[s, 0]}):
            assert_close(net(x), plain(x), rtol=1e-10, atol=1e-12)
    with SubstituteMessenger({"packed": trace.nodes["packed"]["infer"]["pyro_bnn"]["init"]}):
        assert_close(net(x), original(x), rtol=1e-10, atol=1e-12)


@pytest.mark.every(2)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("structure", ["full", "kronecker"])
def test_laplace_of_packed_equals_laplace_of_sites(name, structure):
    plain, x = made(name)
    y = torch.randint(2, (len(x),))

    def fitted(packed):
        net = bayesian_(copy.deepcopy(plain), packed=packed)

        def model(x, y=None):
            f = net(x)
            with pyro.plate("data", len(x)):
                return pyro.sample("obs", dist.Categorical(logits=f), obs=y)

        guide = AutoLaplace(model, structure=structure, init_loc_fn=init_to_trained).initialize(x, y)
        return guide.laplace_approximation((x, y), map_tolerance=float("inf"))

    packed, sites = fitted(True), fitted(False)
    assert_close(packed.log_evidence(), sites.log_evidence(), rtol=1e-9)
    found, expected = packed.linearized_outputs(x)["obs"], sites.linearized_outputs(x)["obs"]
    assert_close(found.mean, expected.mean, rtol=1e-10, atol=1e-12)
    assert_close(found.covariance, expected.covariance, rtol=1e-8, atol=1e-10)
