# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Networks in unusual states: parametrized, tied, lazy, compiled, converted in parts, called with structures."""

import copy
import pickle
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from pyro_bnn.infer import ComponentLoopWarning, default_preset
from pyro_bnn.model.handlers import SubstituteMessenger
from pyro_bnn.nn import bayesian_, rank1_
from tests.common import assert_close
from tests.infer.component_oracle import check_bound, classifier, standard_priors
from tests.nn import architectures as arch

B = 5


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def sites(net, *args):
    return dict(poutine.trace(net).get_trace(*args).iter_stochastic_nodes())


def assert_folding_equals_the_loop(net, *args):
    """Three samples at once equal one after the other; returns the values and the outputs."""
    values = {
        n: s["value"] * (1 + 0.3 * torch.randn(3, 1, *s["value"].shape)) for n, s in sites(net, *args).items()
    }
    with SubstituteMessenger(values):
        y = net(*args)
    for k in range(3):
        with SubstituteMessenger({n: v[k, 0] for n, v in values.items()}):
            single = net(*args)
        assert_close(y[k], single, rtol=1e-10, atol=1e-12)
    return values, y


@pytest.mark.parametrize("apply", ["scale", "materialise"])
@pytest.mark.parametrize(
    "parametrized",
    [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal],
)
@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 6), lambda: nn.Conv1d(4, 6, 1)])
def test_factors_scale_a_parametrized_weight(make, parametrized, apply):
    layer = parametrized(make()).eval()
    weight = layer.weight.detach().clone()
    net = rank1_(nn.Sequential(copy.deepcopy(layer)), apply=apply).eval()
    x = torch.randn(B, 4, *(1,) * (weight.dim() - 2))
    values, y = assert_folding_equals_the_loop(net, x)
    for k in range(3):
        scaled = weight.flatten(1) * values["0.r"][k, 0][:, None] * values["0.s"][k, 0]
        assert_close(y[k].flatten(1), F.linear(x.flatten(1), scaled, values["0.bias"][k, 0]), rtol=1e-10)
    y.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    fresh = rank1_(nn.Sequential(parametrized(make()))).eval()
    fresh.load_state_dict(net.state_dict())
    with SubstituteMessenger(values):
        assert_close(fresh(x), y, rtol=1e-12)


def test_parametrized_weights_have_no_prior():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)), nn.Linear(6, 1))
    with pytest.raises(ValueError, match=r"'0\.weight' is computed from other parameters"):
        rank1_(net, weight_prior=dist.Normal(0.0, 1.0))
    with pytest.raises(
        ValueError, match=r"0 \(ParametrizedLinear\) computes its weight from other parameters"
    ):
        bayesian_(net)
    assert set(sites(rank1_(net, weight_prior={"1.weight": dist.Normal(0.0, 1.0)}), torch.zeros(2, 4))) == {
        *(f"{i}.{n}" for i in "01" for n in ("r", "s", "bias")), "1.weight",
    }  # fmt: skip
    rnn = nn.LSTM(4, 3)
    parametrize.register_parametrization(rnn, "weight_hh_l0", nn.Tanh())
    with pytest.raises(ValueError, match=r"computes \['weight_hh_l0'\] from other parameters"):
        rank1_(nn.Sequential(rnn))


def lazy():
    return nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 2))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 6))),
            r"0 \(Linear\) has \['weight'\] set by a hook",
        ),
        (
            lambda: nn.Sequential(prune.identity(nn.Linear(4, 6), "weight")),
            r"0 \(Linear\) has \['weight'\] set by a",
        ),
        (lazy, r"0 \(LazyLinear\) does not know its shape yet: call the network once"),
        (lambda: torch.compile(mlp(), backend="eager"), "OptimizedModule.*before torch.compile"),
        (lambda: nn.DataParallel(mlp()), "DataParallel.*its attribute 'module'"),
        (lambda: torch.jit.trace(mlp(), torch.zeros(1, 4)), "before TorchScript"),
        (lambda: rank1_(mlp()), r"nothing to convert.*converted already are \['0 \(Rank1Linear\)'"),
    ],
)
def test_states_that_cannot_be_converted(make, message):
    for convert in (rank1_, bayesian_):
        with pytest.raises(ValueError, match=message):
            convert(make())


def test_layers_that_stay_as_they_are_are_named():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 6))
            self.inner = nn.Linear(4, 6)

        def forward(self, x):
            return self.inner(x) + self.token

    def make():
        return nn.Sequential(Shifted(), nn.LayerNorm(6), nn.PReLU(), nn.Linear(6, 2))

    for convert in (rank1_, bayesian_):
        with pytest.warns(UserWarning, match=r"leaves out \[\"0 \(Shifted\): \['token'\]\"\], which keep"):
            net = convert(make())
        assert type(net[0].inner) is not nn.Linear
    rank1_(make(), skip="0")
    rank1_(make(), skip="0.token")
    rank1_(make(), only="3")
    attention = nn.TransformerEncoderLayer(4, 2, 8)  # its inner projections are the attention's own
    rank1_(attention, skip=nn.MultiheadAttention)


def state(net):
    return {
        name: (type(m), list(m._parameters), list(m._forward_hooks), sorted(vars(m)))
        for name, m in net.named_modules()
    }


@pytest.mark.parametrize(
    "options",
    [
        {"prior": {"q": dist.Normal(0.0, 1.0)}},
        {"prior": dist.Normal(torch.ones(3), 1.0)},
        {"batchnorm": "component", "num_components": 2, "freeze_base": True},
        {"batch_dim": 2},
    ],
)
def test_a_failed_conversion_changes_nothing(options):
    net = mlp()
    net[0].weight.requires_grad_(False)
    x = torch.randn(B, 4)
    expected, before = net(x), state(net)
    with pytest.raises(ValueError):
        rank1_(net, **options)
    assert state(net) == before
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True]
    assert_close(net(x), expected, rtol=0)
    assert_folding_equals_the_loop(rank1_(net), x)


def test_a_network_may_be_converted_in_parts():
    x = torch.randn(B, 4)
    net = rank1_(rank1_(mlp(), only="0", prior=dist.Normal(1.0, 0.3)), only="2")
    values, y = assert_folding_equals_the_loop(net, x)
    assert y.shape == (3, B, 2)
    assert_close(sites(net, x)["0.r"]["fn"].base_dist.scale, torch.full((6,), 0.3))
    hybrid = bayesian_(rank1_(mlp(), skip="2"), only="2")
    values, y = assert_folding_equals_the_loop(hybrid, x)
    assert set(values) == {"0.r", "0.s", "0.bias", "2.weight", "2.bias"}
    # a part that was converted by itself, and whose forward needs folding
    body = rank1_(arch.FlattenNet())
    whole = rank1_(nn.Sequential(nn.Linear(4, 16), body, nn.Linear(3, 1)), skip="1")
    values, y = assert_folding_equals_the_loop(whole, x)
    assert {"1.conv.r", "1.fc.s", "2.bias"} < set(values)
    assert y.shape == (3, B, 1)
    assert_folding_equals_the_loop(copy.deepcopy(whole), x)


@pytest.mark.parametrize("apply", ["scale", "materialise"])
def test_tied_weights_with_a_prior_stay_tied(apply):
    plain = arch.TiedAutoencoder()
    tokens = torch.randint(9, (B, 7))
    net = rank1_(copy.deepcopy(plain), weight_prior=dist.Normal(0.0, 1.0), apply=apply)
    values, _ = assert_folding_equals_the_loop(net, tokens)
    assert {n for n in values if n.endswith("weight")} == {"embedding.weight", "hidden.weight"}
    unit = {n: torch.ones_like(v[0, 0]) for n, v in values.items() if n.endswith((".r", ".s"))}
    unit["hidden.bias"] = plain.hidden.bias
    table, hidden = torch.randn(9, 6), torch.randn(6, 6)
    with SubstituteMessenger({**unit, "embedding.weight": table, "hidden.weight": hidden}):
        y = net(tokens)
    assert_close(y, torch.tanh(F.linear(table[tokens], hidden, plain.hidden.bias)) @ table.T, rtol=1e-12)
    for convert in (
        bayesian_,
        lambda net, **options: rank1_(net, weight_prior=dist.Normal(0.0, 1.0), **options),
    ):
        with pytest.raises(
            ValueError, match=r"'decoder\.weight' would become random, but 'embedding\.weight' is the same"
        ):
            convert(copy.deepcopy(plain), only="decoder")


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclass
class Output:
    logits: torch.Tensor
    name: str = "out"


class Answer(dict):
    """As in model hubs: a dictionary with attributes."""

    def __init__(self, **items):
        super().__init__()
        for key, value in items.items():
            self[key] = value

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.__dict__[key] = value


class Structured(nn.Module):
    """Takes and returns structures, and needs folding because of its convolution and ``flatten(1)``."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv1d(1, 3, 2), nn.Linear(9, 2)

    def forward(self, inputs, kind=None):
        x = inputs["x"] if isinstance(inputs, dict) else inputs[0]
        y = self.fc(torch.relu(self.conv(x.unsqueeze(1))).flatten(1))
        if kind == "dataclass":
            return Output(y)
        return Answer(logits=y) if kind == "dict" else y


def test_structures_of_inputs_and_outputs():
    x = torch.randn(B, 4)
    net = rank1_(Structured())
    values, y = assert_folding_equals_the_loop(net, {"x": x, "length": 4})
    for inputs in ([x], (x, "text"), Pair(x, torch.zeros(2))):
        with SubstituteMessenger(values):
            assert_close(net(inputs), y, rtol=1e-12)
    with SubstituteMessenger(values):
        found = net((x,), kind="dataclass")
        assert isinstance(found, Output)
        assert_close(found.logits, y, rtol=1e-12)
        answer = net((x,), kind="dict")
        assert isinstance(answer, Answer)
        assert answer.logits is answer["logits"]
        assert_close(answer.logits, y, rtol=1e-12)


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_states_of_recurrent_layers_are_folded(cell):
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = cell(4, 3, num_layers=2, batch_first=True), nn.Linear(3, 1)

        def forward(self, x, state):
            return self.head(self.rnn(x, state)[0][:, -1])

    plain = Stateful()
    h = torch.randn(2, B, 3)
    args = (torch.randn(B, 7, 4), (h, torch.randn(2, B, 3)) if cell is nn.LSTM else h)
    for form in ("multiplicative", "additive"):
        net = rank1_(copy.deepcopy(plain), form=form)
        assert_folding_equals_the_loop(net, *args)
        hints = {n: (s["value"], s["infer"]["pyro_bnn"]) for n, s in sites(net, *args).items()}
        neutral = 1.0 if form == "multiplicative" else 0.0
        unit = {
            n: torch.full_like(v, neutral) if h["role"] == "factor" else h["init"]
            for n, (v, h) in hints.items()
        }
        with SubstituteMessenger({n: v.expand(2, 1, *v.shape) for n, v in unit.items()}):
            assert_close(net(*args), plain(*args).expand(2, B, 1), rtol=1e-12)


def test_normalisation_without_a_version_per_component():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.SyncBatchNorm(6))
    with pytest.raises(
        ValueError, match=r"2 \(PyroSyncBatchNorm\) has no version with statistics per component"
    ):
        rank1_(net, batchnorm="component", num_components=2)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_parameter_counts_of_ranks(rank):
    net = rank1_(arch.WideResNet(10, 2, 4), rank=rank, form="residual")
    nodes = sites(net, torch.randn(2, 3, 8, 8))
    total = sum(c.in_channels + c.out_channels for c in net.modules() if isinstance(c, nn.Conv2d))
    total += net.fc.in_features + net.fc.out_features
    factors = sum(s["value"].numel() for s in nodes.values() if s["infer"]["pyro_bnn"]["role"] == "factor")
    assert factors == rank * total


def test_frozen_networks_have_no_prior_of_their_weights():
    with pytest.raises(ValueError, match="freeze_base keeps the weights as they are"):
        rank1_(mlp(), freeze_base=True, weight_prior=dist.Normal(0.0, 1.0))
    net = default_preset().convert_(mlp(), freeze_base=True)
    assert set(sites(net, torch.zeros(2, 4))) == {f"{i}.{n}" for i in "02" for n in ("r", "s", "bias")}
    assert not [p for p in net.parameters() if p.requires_grad]
    net[0].requires_grad_(True)
    sites(net, torch.zeros(2, 4))
    assert [p.requires_grad for p in net.parameters()] == [True, False]
    with pytest.raises(ValueError, match="clip must be positive, found 0"):
        rank1_(mlp(), clip=0.0)


class Guess(nn.Module):
    """As the head of a masked language model: it holds the bias of its layer under a name of its own, and may use it."""

    def __init__(self, uses: bool) -> None:
        super().__init__()
        self.first, self.decoder, self.uses = nn.Linear(5, 6), nn.Linear(6, 3), uses
        self.bias = self.decoder.bias

    def forward(self, x):
        y = self.decoder(torch.tanh(self.first(x)))
        return y + 2 * self.bias if self.uses else y


@pytest.mark.parametrize(("conversion", "uses"), [("rank1", False), ("bayesian", False), ("bayesian", True)])
def test_parents_that_hold_a_parameter_of_their_layer_read_it_there(conversion, uses):
    x, y, prior = torch.randn(4, 5), torch.randint(0, 3, (4,)), dist.Normal(0.0, 1.0)
    plain = Guess(uses)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if uses else "error", ComponentLoopWarning)
        check_bound(
            plain,
            rank1_ if conversion == "rank1" else lambda net: bayesian_(net, prior=prior),
            lambda net: classifier(net, lambda net, x: net(x)),
            lambda call: dist.Categorical(logits=call(x)).log_prob(y).sum(),
            (x, y),
            lambda name: standard_priors(name) if conversion == "rank1" else prior,
        )
    other = pickle.loads(pickle.dumps(bayesian_(plain)))
    assert isinstance(other, Guess)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match=r"'1\.weight' is the same parameter and would not"):
        bayesian_(net, skip="1")
