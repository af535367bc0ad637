# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Every layer and every component equals the plain torch layer with explicitly built weights."""

import copy

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_bnn.infer.handlers import SubstituteMessenger
from pyro_bnn.nn import bayesian_, rank1_
from tests.common import assert_close

B = 3


def _x(*shape):
    return torch.randn(B, *shape)


def _tokens(*shape):
    return torch.randint(7, (B, *shape))


# name -> (layer, arguments, keyword arguments of the conversion)
CASES = {
    "linear": lambda: (nn.Linear(4, 6), (_x(4),)),
    "linear-no-bias": lambda: (nn.Linear(4, 6, bias=False), (_x(4),)),
    "linear-tokens": lambda: (nn.Linear(4, 6), (_x(5, 4),)),
    "linear-three-dims": lambda: (nn.Linear(4, 6), (_x(2, 5, 4),)),
    "conv1d": lambda: (nn.Conv1d(4, 6, 3, padding=1, dilation=2), (_x(4, 9),)),
    "conv2d": lambda: (nn.Conv2d(4, 6, 3, stride=2, padding=1), (_x(4, 7, 8),)),
    "conv2d-groups": lambda: (nn.Conv2d(4, 6, 3, groups=2), (_x(4, 7, 8),)),
    "conv2d-depthwise": lambda: (nn.Conv2d(4, 8, 3, groups=4, bias=False), (_x(4, 7, 8),)),
    "conv2d-circular": lambda: (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (_x(4, 7, 8),)),
    "conv2d-reflect": lambda: (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (_x(4, 7, 8),)),
    "conv3d": lambda: (nn.Conv3d(2, 3, 2, padding="same", padding_mode="replicate"), (_x(2, 4, 5, 4),)),
    "transpose1d": lambda: (nn.ConvTranspose1d(4, 6, 3, stride=2), (_x(4, 5),)),
    "transpose2d-groups": lambda: (
        nn.ConvTranspose2d(4, 6, 3, groups=2, output_padding=1, stride=2),
        (_x(4, 4, 5),),
    ),
    "transpose3d": lambda: (nn.ConvTranspose3d(2, 3, 2, dilation=2), (_x(2, 3, 3, 4),)),
    "embedding": lambda: (nn.Embedding(7, 5), (_tokens(4),)),
    "embedding-padding": lambda: (nn.Embedding(7, 5, padding_idx=0), (_tokens(2, 4),)),
    "rnn": lambda: (nn.RNN(4, 5, num_layers=2, batch_first=True, nonlinearity="relu"), (_x(6, 4),)),
    "gru": lambda: (nn.GRU(4, 5, bidirectional=True, batch_first=True, bias=False), (_x(6, 4),)),
    "lstm": lambda: (nn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True), (_x(6, 4),)),
    "lstm-projected": lambda: (nn.LSTM(4, 5, proj_size=2, batch_first=True), (_x(6, 4),)),
    "rnn-cell": lambda: (nn.RNNCell(4, 5), (_x(4),)),
    "gru-cell": lambda: (nn.GRUCell(4, 5), (_x(4), _x(5))),
    "lstm-cell": lambda: (nn.LSTMCell(4, 5), (_x(4),)),
    "attention": lambda: (nn.MultiheadAttention(6, 2, batch_first=True), (_x(5, 6),) * 3),
    "attention-kdim": lambda: (
        nn.MultiheadAttention(6, 3, kdim=4, vdim=5, bias=False, batch_first=True),
        (_x(5, 6), _x(7, 4), _x(7, 5)),
    ),
}

RECURRENT_OR_ATTENTION = ("rnn", "gru", "lstm", "attention")


def values_of(net, args, batch_shape):
    nodes = dict(poutine.trace(net).get_trace(*args).iter_stochastic_nodes())
    return {name: torch.randn(*batch_shape, *site["value"].shape) for name, site in nodes.items()}


def outer(layer, form, r, s):
    """``r s^T`` (or its residual form) in the layout of the layer's weight, by looping over its entries."""
    weight_shape = layer.weight.shape
    groups = getattr(layer, "groups", 1)
    factor = torch.empty(weight_shape[:2])
    for a in range(weight_shape[0]):
        for b in range(weight_shape[1]):
            if isinstance(layer, nn.Embedding):
                i, o = a, b
            elif getattr(layer, "transposed", False):
                group = a // (layer.in_channels // groups)
                i, o = a, group * weight_shape[1] + b
            elif isinstance(layer, nn.Linear):
                i, o = b, a
            else:
                group = a // (layer.out_channels // groups)
                i, o = group * weight_shape[1] + b, a
            factor[a, b] = r[o] * s[i] if form == "multiplicative" else 1 + (r[:, o] * s[:, i]).sum()
    return factor[(..., *(None,) * (len(weight_shape) - 2))]


def explicit(plain, values, form):
    """The plain torch layer with the weights of one component."""
    layer = copy.deepcopy(plain)
    with torch.no_grad():
        if "r" in values:
            layer.weight *= outer(layer, form, values["r"], values["s"])
        for name, value in values.items():
            if name.startswith("bias") or name == "in_proj_bias":
                getattr(layer, name).copy_(value)
            elif name == "out_proj_bias":
                layer.out_proj.bias.copy_(value)
            elif name.startswith("r_"):
                suffix = name[1:]
                attention = {"_in": "in_proj_weight", "_q": "q_proj_weight", "_k": "k_proj_weight",
                             "_v": "v_proj_weight"}  # fmt: skip
                if suffix == "_out":
                    weight = layer.out_proj.weight
                else:
                    weight = getattr(layer, attention.get(suffix, "weight" + suffix))
                r, s = value, values["s" + suffix]
                weight *= r[:, None] * s[None, :] if form == "multiplicative" else 1 + r.mT @ s
    return layer


def flat(output):
    if isinstance(output, torch.Tensor):
        return [output]
    return [] if output is None else [t for part in output for t in flat(part)]


def batch_dim(name, index):
    """Hidden states are (layers, batch, units)."""
    return 1 if name in ("rnn", "gru", "lstm", "lstm-projected") and index > 0 else 0


@pytest.mark.parametrize("apply", ["scale", "materialise"])
@pytest.mark.parametrize("form", ["multiplicative", "residual"])
@pytest.mark.parametrize("name", list(CASES))
def test_components_equal_plain_layers(name, form, apply):
    plain, args = CASES[name]()
    net = rank1_(copy.deepcopy(plain), form=form, rank=2 if form == "residual" else 1, apply=apply)
    K = 4
    values = values_of(net, args, (K, 1))
    with SubstituteMessenger(values):
        actual = net(*args)
    for k in range(K):
        component = {site: value[k, 0] for site, value in values.items()}
        expected = explicit(plain, component, form)(*args)
        for i, (a, e) in enumerate(zip(flat(actual), flat(expected), strict=True)):
            if batch_dim(name, i):
                a = a.unflatten(1, (K, B))[:, k]
            else:
                a = a[k]
            assert_close(a, e, rtol=1e-12, atol=1e-12)
        # the loop over components, without sample dimensions
        with SubstituteMessenger(component):
            loop = net(*args)
        for a, e in zip(flat(loop), flat(expected), strict=True):
            assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list(CASES))
def test_full_weights_equal_plain_layers(name):
    plain, args = CASES[name]()
    net = bayesian_(copy.deepcopy(plain))
    K = 4
    values = values_of(net, args, (K, 1))
    with SubstituteMessenger(values):
        actual = net(*args)
    for k in range(K):
        layer = copy.deepcopy(plain)
        state = {n.replace("out_proj_", "out_proj."): v[k, 0] for n, v in values.items()}
        layer.load_state_dict(state)
        for i, (a, e) in enumerate(zip(flat(actual), flat(layer(*args)), strict=True)):
            a = a.unflatten(1, (K, B))[:, k] if batch_dim(name, i) else a[k]
            assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list(CASES))
def test_unit_factors_change_nothing(name):
    plain, args = CASES[name]()
    net = rank1_(copy.deepcopy(plain))
    nodes = dict(poutine.trace(net).get_trace(*args).iter_stochastic_nodes())
    values = {
        n: torch.ones_like(s["value"])
        if s["infer"]["pyro_bnn"]["role"] == "factor"
        else s["infer"]["pyro_bnn"]["init"]
        for n, s in nodes.items()
    }
    with SubstituteMessenger(values):
        for a, e in zip(flat(net(*args)), flat(plain(*args)), strict=True):
            assert_close(a, e, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith(RECURRENT_OR_ATTENTION)])
def test_noise_per_example(name):
    plain, args = CASES[name]()
    net = rank1_(copy.deepcopy(plain))
    K = 2
    values = values_of(net, args, (K, B))
    with SubstituteMessenger(values):
        actual = net(*args)
    for k in range(K):
        for b in range(B):
            expected = explicit(plain, {n: v[k, b] for n, v in values.items()}, "multiplicative")(
                args[0][b : b + 1]
            )
            assert_close(actual[k, b], expected[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "linear-tokens", "conv1d", "conv2d-groups", "transpose2d-groups"])
def test_additive_form(name):
    plain, args = CASES[name]()
    net = rank1_(copy.deepcopy(plain), form="additive")
    values = values_of(net, args, (2, 1))
    with SubstituteMessenger(values):
        actual = net(*args)
    post = (1,) * (plain.weight.dim() - 2)
    for k in range(2):
        layer = copy.deepcopy(plain)
        layer.bias = None
        v = {n: value[k, 0].view(-1, *post) for n, value in values.items()}
        assert_close(actual[k], layer(args[0] + v["s"]) + v["r"] + v["bias"], rtol=1e-12, atol=1e-12)


def test_additive_form_needs_a_single_weight():
    with pytest.raises(ValueError, match="LSTM has no additive form"):
        rank1_(nn.LSTM(2, 3), form="additive")


def test_cauchy_factors_are_clipped_but_not_their_site():
    for prior, clip, bound in ((dist.Cauchy(1.0, 0.1), None, 10.0), (dist.Normal(1.0, 0.1), 2.0, 2.0)):
        net = rank1_(nn.Linear(1, 1, bias=False), prior=prior, clip=clip)
        values = {"r": torch.tensor([50.0]), "s": torch.tensor([-70.0])}
        with SubstituteMessenger(values), poutine.trace() as tr:
            y = net(torch.ones(2, 1))
        assert_close(y, (net.weight * -(bound**2)).expand(2, 1))
        assert tr.trace.nodes["r"]["value"] == 50.0
    net = rank1_(nn.Linear(1, 1, bias=False))
    with SubstituteMessenger(values):
        assert_close(net(torch.ones(2, 1)), (net.weight * -3500.0).expand(2, 1))


@pytest.mark.parametrize("name", ["linear", "conv2d-groups", "transpose1d", "lstm", "attention"])
@pytest.mark.parametrize("apply", ["scale", "materialise"])
def test_gradients(name, apply):
    plain, args = CASES[name]()
    net = rank1_(plain, apply=apply)
    values = values_of(net, args, (2, 1))
    names = list(values)

    def fn(*tensors):
        with SubstituteMessenger(dict(zip(names, tensors, strict=True))):
            return flat(net(*args))[0]

    tensors = tuple(values[n].requires_grad_() for n in names)
    assert torch.autograd.gradcheck(fn, tensors, fast_mode=True)


def test_time_first_sequences():
    plain = nn.Sequential(nn.Linear(4, 5))
    net = rank1_(copy.deepcopy(plain), batch_dim=1)
    x = torch.randn(7, B, 4)
    values = values_of(net, (x,), (2, 1))
    with SubstituteMessenger(values):
        actual = net(x)
    assert actual.shape == (2, 7, B, 5)
    for k in range(2):
        with SubstituteMessenger({n: v[k, 0] for n, v in values.items()}):
            assert_close(actual[k], net(x), rtol=1e-12)
    lstm = rank1_(nn.LSTM(4, 5), batch_dim=1)
    values = values_of(lstm, (x,), (2, 1))
    with SubstituteMessenger(values):
        actual = lstm(x)[0]
    for k in range(2):
        with SubstituteMessenger({n: v[k, 0] for n, v in values.items()}):
            assert_close(actual[k], lstm(x)[0], rtol=1e-12)


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding", "lstm", "attention"])
def test_constructors_state_dict_and_precision(name):
    _, args = CASES[name]()
    made = {
        "linear": lambda nn_: nn_.Rank1Linear(4, 6),
        "conv2d": lambda nn_: nn_.Rank1Conv2d(4, 6, 3, stride=2, padding=1),
        "embedding": lambda nn_: nn_.Rank1Embedding(7, 5),
        "lstm": lambda nn_: nn_.Rank1LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True),
        "attention": lambda nn_: nn_.Rank1MultiheadAttention(6, 2, batch_first=True),
    }
    import pyro_bnn.nn as nn_

    first, second = made[name](nn_), made[name](nn_)
    second.load_state_dict(first.state_dict())
    values = values_of(first, args, ())
    with SubstituteMessenger(values):
        for a, b in zip(flat(first(*args)), flat(second(*args)), strict=True):
            assert_close(a, b, rtol=0)
    first.float()
    small = tuple(a.float() if a.is_floating_point() else a for a in args)
    assert {t.dtype for t in flat(first(*small))} == {torch.float32}
    assert "sites=" in repr(first)


def test_errors():
    net = rank1_(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(
        ValueError, match=r"0 takes inputs of shape \(\.\.\., 3, \*\*\), found \(2, 4, 5, 5\)"
    ):
        net(torch.zeros(2, 4, 5, 5))
    with pytest.raises(ValueError, match="empty batch"):
        net(torch.zeros(0, 3, 5, 5))
    with pytest.raises(ValueError, match="rank=2 needs form='residual'"):
        rank1_(nn.Linear(2, 2), rank=2, form="additive")
    with pytest.raises(ValueError, match="form must be one of"):
        rank1_(nn.Linear(2, 2), form="outer")
    net = rank1_(nn.Sequential(nn.LSTM(2, 3, batch_first=True)))
    values = values_of(net, (torch.zeros(4, 5, 2),), (2, 4))
    with SubstituteMessenger(values), pytest.raises(ValueError, match=r"'r_ih_l0' of 0.*value per example"):
        net(torch.zeros(4, 5, 2))
    with pytest.raises(ValueError, match="PackedSequence"):
        net[0](nn.utils.rnn.pack_sequence([torch.zeros(3, 2)]))
