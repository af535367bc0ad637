# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Every layer and every component equals the plain torch layer with explicitly built weights."""

import copy

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pyro_bnn.nn as nn_
from pyro_bnn.model.handlers import SubstituteMessenger
from pyro_bnn.nn import bayesian_, rank1_
from pyro_bnn.nn.folding import split_batch
from tests.common import assert_close
from tests.contracts.layer import assert_components_equal_plain_layers, flat, values_of

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


def batch_dim(name, index):
    """Hidden states are (layers, batch, units)."""
    return 1 if name in ("rnn", "gru", "lstm", "lstm-projected") and index > 0 else 0


@pytest.mark.parametrize("apply", ["scale", "materialise"])
@pytest.mark.parametrize("form", ["multiplicative", "residual"])
@pytest.mark.parametrize("name", list(CASES))
def test_components_equal_plain_layers(name, form, apply):
    plain, args = CASES[name]()
    net = rank1_(copy.deepcopy(plain), form=form, rank=2 if form == "residual" else 1, apply=apply)
    values = values_of(net, args, (4, 1))
    assert_components_equal_plain_layers(
        net, args, values, lambda component: explicit(plain, component, form)
    )


@pytest.mark.parametrize("name", list(CASES))
def test_full_weights_equal_plain_layers(name):
    plain, args = CASES[name]()
    net = bayesian_(copy.deepcopy(plain))

    def loaded(component):
        layer = copy.deepcopy(plain)
        layer.load_state_dict({n.replace("out_proj_", "out_proj."): v for n, v in component.items()})
        if getattr(plain, "padding_idx", None) is not None:  # the row of the padding symbol is not random
            layer.weight.data[plain.padding_idx] = plain.weight.data[plain.padding_idx]
        return layer

    assert_components_equal_plain_layers(net, args, values_of(net, args, (4, 1)), loaded)


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


@pytest.mark.parametrize("form", ["multiplicative", "residual"])
@pytest.mark.parametrize("name", list(CASES))
def test_noise_per_example(name, form):
    plain, args = CASES[name]()
    net = rank1_(copy.deepcopy(plain), form=form, rank=2 if form == "residual" else 1)
    K = 2
    values = values_of(net, args, (K, B))
    with SubstituteMessenger(values):
        actual = net(*args)
    for k in range(K):
        for b in range(B):
            layer = explicit(plain, {n: v[k, b] for n, v in values.items()}, form)
            expected = flat(layer(*(a[b : b + 1] for a in args)))
            for i, (a, e) in enumerate(zip(flat(actual), expected, strict=True)):
                a = a[k].select(batch_dim(name, i), b)
                assert_close(a, e.select(batch_dim(name, i), 0), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "linear-tokens", "conv1d", "conv2d-groups", "transpose2d-groups"])
def test_additive_form(name):
    plain, args = CASES[name]()
    net = rank1_(copy.deepcopy(plain), form="additive")
    for rows in (1, B):
        values = values_of(net, args, (2, rows))
        with SubstituteMessenger(values):
            actual = net(*args)
        post = (1,) * (plain.weight.dim() - 2)
        layer = copy.deepcopy(plain)
        layer.bias = None
        for k in range(2):
            for b in range(B):
                v = {n: value[k, b % rows].view(-1, *post) for n, value in values.items()}
                expected = layer(args[0][b : b + 1] + v["s"])[0] + v["r"] + v["bias"]
                assert_close(actual[k, b], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(RECURRENT_OR_ATTENTION)])
def test_additive_form_of_several_weights(name, rows):
    """``W (x + s) + r`` is the torch layer whose bias is larger by ``W s + r``."""
    plain, args = CASES[name]()
    net = rank1_(copy.deepcopy(plain), form="additive")
    values = values_of(net, args, (2, rows))
    for n in values:
        if "_hr_" in n:  # has no bias in torch; see the test below
            values[n] = torch.zeros_like(values[n])
    with SubstituteMessenger(values):
        actual = flat(net(*args))
    options = {"bias": True}
    if isinstance(plain, nn.MultiheadAttention):
        options |= {"batch_first": True, "kdim": plain.kdim, "vdim": plain.vdim}
        layer = nn.MultiheadAttention(plain.embed_dim, plain.num_heads, **options)
    else:
        names = ["num_layers", "bidirectional", "batch_first"] if isinstance(plain, nn.RNNBase) else []
        names += ["nonlinearity"] if isinstance(plain, (nn.RNN, nn.RNNCell)) else []
        names += ["proj_size"] if isinstance(plain, nn.LSTM) else []
        options |= {n: getattr(plain, n) for n in names}
        layer = type(plain)(plain.input_size, plain.hidden_size, **options)
    for k in range(2):
        for b in range(B):
            v = {n: value[k, b % rows] for n, value in values.items()}
            expected = flat(shifted(layer, plain, v)(*(a[b : b + 1] for a in args)))
            for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
                a = a[k].select(batch_dim(name, i), b)
                assert_close(a, e.select(batch_dim(name, i), 0), rtol=1e-11, atol=1e-12)
    # a single sample, without folding
    single = {n: v[0, 0] for n, v in values.items()}
    with SubstituteMessenger(single):
        loop = flat(net(*args))
    expected = flat(shifted(layer, plain, single)(*args))
    for a, e in zip(loop, expected, strict=True):
        assert_close(a, e, rtol=1e-11, atol=1e-12)


@torch.no_grad()
def shifted(layer, plain, values):
    """``layer`` with the weights of ``plain`` and biases that stand for additive factors."""
    layer.load_state_dict({**layer.state_dict(), **plain.state_dict()})
    attention = {"in": "in_proj_weight", "q": "q_proj_weight", "k": "k_proj_weight", "v": "v_proj_weight"}
    shifts = {}
    for name in values:
        suffix = name[2:]
        if name.startswith("r_") and "hr" not in suffix:
            if isinstance(layer, nn.MultiheadAttention):
                weight = layer.out_proj.weight if suffix == "out" else getattr(layer, attention[suffix])
            else:
                weight = getattr(layer, f"weight_{suffix}")
            shifts[suffix] = values[name] + weight @ values[f"s_{suffix}"]
    if isinstance(layer, nn.MultiheadAttention):
        joint = torch.cat([shifts[n] for n in ("in", "q", "k", "v") if n in shifts])
        layer.in_proj_bias.copy_(joint + values.get("in_proj_bias", 0.0))
        layer.out_proj.bias.copy_(shifts["out"] + values.get("out_proj_bias", 0.0))
    else:
        for suffix, shift in shifts.items():
            getattr(layer, f"bias_{suffix}").copy_(shift + values.get(f"bias_{suffix}", 0.0))
    return layer


def test_additive_form_of_projected_states():
    plain = nn.LSTM(4, 5, proj_size=2)
    net = rank1_(
        copy.deepcopy(plain),
        form="additive",
        prior={n: dist.Normal(0.0, 1.0) for n in ("r_hr_l0", "s_hr_l0")},
    )
    x = torch.randn(1, B, 4)
    values = {
        "r_hr_l0": torch.randn(2),
        "s_hr_l0": torch.randn(5),
        "bias_ih_l0": torch.randn(20),
        "bias_hh_l0": torch.randn(20),
    }
    with SubstituteMessenger(values):
        h = net(x)[0][0]
    i, _, g, o = (x[0] @ plain.weight_ih_l0.T + values["bias_ih_l0"] + values["bias_hh_l0"]).chunk(4, -1)
    memory = o.sigmoid() * (i.sigmoid() * g.tanh()).tanh()
    assert_close(h, (memory + values["s_hr_l0"]) @ plain.weight_hr_l0.T + values["r_hr_l0"], rtol=1e-12)


@pytest.mark.parametrize("rows", [1, B])
def test_additive_form_of_embeddings(rows):
    plain = nn.Embedding(7, 5)
    net = rank1_(copy.deepcopy(plain), form="additive")
    tokens = _tokens(4)
    values = values_of(net, (tokens,), (2, rows))
    with SubstituteMessenger(values):
        actual = net(tokens)
    indicators = nn.functional.one_hot(tokens, 7).double()
    for k in range(2):
        for b in range(B):
            expected = (indicators[b] + values["s"][k, b % rows]) @ plain.weight + values["r"][k, b % rows]
            assert_close(actual[k, b], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", ["r", "s"])
@pytest.mark.parametrize("apply", ["scale", "materialise"])
def test_residual_form_with_one_kind_of_factor(factor, apply):
    plain = nn.Linear(4, 6)
    net = rank1_(
        copy.deepcopy(plain), form="residual", rank=2, prior={factor: dist.Normal(0.0, 1.0)}, apply=apply
    )
    x = _x(4)
    values = values_of(net, (x,), (2, 1))
    with SubstituteMessenger(values):
        actual = net(x)
    for k in range(2):
        total = 1 + values[factor][k, 0].sum(0)
        weight = plain.weight * (total[:, None] if factor == "r" else total)
        assert_close(actual[k], x @ weight.T + values["bias"][k, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, B])
def test_factors_beside_weights_of_every_component(rows):
    plain = nn.Linear(4, 6)
    net = rank1_(copy.deepcopy(plain), weight_prior=dist.Normal(0.0, 1.0))
    x = _x(5, 4)
    values = values_of(net, (x,), (2, 1)) | {n: torch.randn(2, rows, d) for n, d in (("r", 6), ("s", 4))}
    with SubstituteMessenger(values):
        actual = net(x)
    for k in range(2):
        for b in range(B):
            r, s = values["r"][k, b % rows], values["s"][k, b % rows]
            expected = (x[b] * s) @ values["weight"][k, 0].T * r + values["bias"][k, 0]
            assert_close(actual[k, b], expected, rtol=1e-12, atol=1e-12)


RECURRENT = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("name", list(RECURRENT))
def test_packed_sequences(name, rows, inside):
    plain = RECURRENT[name](4, 5, num_layers=2, bidirectional=True, batch_first=inside)
    lengths = torch.tensor([2, 5, 3])
    x = _x(5, 4)
    if inside:

        class Packing(nn.Module):
            def __init__(self):
                super().__init__()
                self.rnn = copy.deepcopy(plain)

            def forward(self, x, lengths):
                packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
                output, state = self.rnn(packed)
                return pad_packed_sequence(output, batch_first=True)[0], state

        net, args, prefix = rank1_(Packing()), (x, lengths), "rnn."
    else:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        net, args, prefix = rank1_(copy.deepcopy(plain)), (packed,), ""
    values = values_of(net, args, (2, rows))
    with SubstituteMessenger(values):
        output, *states = net(*args)
    if not inside:
        assert output.batch_sizes.tolist() == [2 * n for n in packed.batch_sizes.tolist()]
        output = pad_packed_sequence(output, batch_first=True)[0].unflatten(0, (2, B))
    for k in range(2):
        for b, n in enumerate(lengths.tolist()):
            layer = explicit(
                plain, {m.removeprefix(prefix): v[k, b % rows] for m, v in values.items()}, "multiplicative"
            )
            x_b = x[b : b + 1, :n] if inside else x[b : b + 1, :n].transpose(0, 1)
            expected, *final = layer(x_b)
            assert_close(output[k, b, :n], expected.squeeze(0 if inside else 1), rtol=1e-11, atol=1e-12)
            assert (output[k, b, n:] == 0).all()
            for a, e in zip(flat(states), flat(final), strict=True):
                assert_close(a[k, :, b], e[:, 0], rtol=1e-11, atol=1e-12)


def test_recurrent_layers_written_out_take_states_and_single_sequences():
    plain = nn.GRU(4, 5, num_layers=2)
    net = rank1_(copy.deepcopy(plain), form="additive")
    zeros = {n: torch.zeros_like(v) for n, v in values_of(net, (torch.zeros(6, B, 4),), ()).items()}
    zeros |= {n: getattr(plain, n).detach() for n in zeros if n.startswith("bias")}
    with SubstituteMessenger(zeros):
        for args in ((torch.randn(6, B, 4), torch.randn(2, B, 5)), (torch.randn(6, 4), torch.randn(2, 5))):
            for a, e in zip(net(*args), plain(*args), strict=True):
                assert_close(a, e, rtol=1e-12, atol=1e-12)
    cell = nn.LSTMCell(4, 5)
    net = rank1_(copy.deepcopy(cell), form="additive")
    zeros = {n: torch.zeros_like(v) for n, v in values_of(net, (torch.zeros(B, 4),), ()).items()}
    zeros |= {n: getattr(cell, n).detach() for n in zeros if n.startswith("bias")}
    x, hx = torch.randn(4), (torch.randn(5), torch.randn(5))
    with SubstituteMessenger(zeros):
        for a, e in zip(net(x, hx), cell(x, hx), strict=True):
            assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("batch_first", [False, True])
def test_written_out_attention_takes_masks(batch_first, extra, need_weights):
    L, S = 4, 6
    plain = nn.MultiheadAttention(6, 2, batch_first=batch_first, **extra)
    net = rank1_(copy.deepcopy(plain), form="additive", batch_dim=0 if batch_first else 1)
    query, key = torch.randn(B, L, 6), torch.randn(B, S, 6)
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, 4:] = True
    values = {n: torch.zeros_like(v) for n, v in values_of(net, (query, key, key), ()).items()}
    values |= {"in_proj_bias": torch.randn(18), "out_proj_bias": torch.randn(6)}
    with torch.no_grad():
        plain.in_proj_bias.copy_(values["in_proj_bias"])
        plain.out_proj.bias.copy_(values["out_proj_bias"])
    masks = [None, torch.ones(L, S, dtype=torch.bool).triu(2), torch.randn(2 * B, L, S)]
    for mask in masks:
        for average in (False, True):
            options = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": need_weights,
                       "average_attn_weights": average}  # fmt: skip
            if mask is not None and mask.is_floating_point():
                options["key_padding_mask"] = torch.zeros(B, S).masked_fill(padding, -torch.inf)
            with SubstituteMessenger(values):
                actual = net(query, key, key, **options)
            expected = plain(query, key, key, **options)
            for a, e in zip(flat(actual), flat(expected), strict=True):
                assert_close(a, e, rtol=1e-11, atol=1e-12)
            with SubstituteMessenger({n: v.expand(2, B, *v.shape) for n, v in values.items()}):
                folded = net(query, key, key, **options)[0]
            assert_close(folded, expected[0].expand(2, *expected[0].shape), rtol=1e-11, atol=1e-12)
    single = query[0] if batch_first else query[:, 0]
    with SubstituteMessenger(values):
        for a, e in zip(flat(net(single, single, single)), flat(plain(single, single, single)), strict=True):
            assert_close(a, e, rtol=1e-11, atol=1e-12)
    with pytest.raises(ValueError, match="pass the mask too"):
        net(query, key, key, is_causal=True)


def test_priors_of_output_projections():
    net = rank1_(nn.MultiheadAttention(4, 2), prior={"r_out": dist.Normal(1.0, 0.3)})
    assert set(values_of(net, (torch.zeros(3, B, 4),) * 3, ())) == {"r_out", "in_proj_bias", "out_proj_bias"}


def test_split_batches_with_noise_per_example():
    plain = nn.LSTM(4, 5, batch_first=True)
    net = rank1_(copy.deepcopy(plain))
    x = torch.randn(2 * B, 6, 4)
    values = values_of(net, (x,), (2, 2 * B))
    with SubstituteMessenger(values):
        full = net(x)[0]
        with split_batch():
            y = net(x)[0]
    assert_close(y, torch.cat([full[0, :B], full[1, B:]]), rtol=1e-12, atol=1e-14)


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


@pytest.mark.every(3)
@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize(("apply", "rows"), [("scale", 1), ("materialise", 1), ("scale", B)])
def test_gradients(name, apply, rows):
    plain, args = CASES[name]()
    net = rank1_(plain, apply=apply)
    values = values_of(net, args, (2, rows))
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
        "linear": lambda: nn_.Rank1Linear(4, 6),
        "conv2d": lambda: nn_.Rank1Conv2d(4, 6, 3, stride=2, padding=1),
        "embedding": lambda: nn_.Rank1Embedding(7, 5),
        "lstm": lambda: nn_.Rank1LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True),
        "attention": lambda: nn_.Rank1MultiheadAttention(6, 2, batch_first=True),
    }
    first, second = made[name](), made[name]()
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
    for layer in (
        nn_.Rank1LSTM(2, 3, batch_first=True),
        nn_.Rank1LSTM(2, 3, batch_first=True, form="additive"),
    ):
        values = values_of(layer, (torch.zeros(4, 5, 2),), (2, 1))
        with SubstituteMessenger(values), pytest.raises(ValueError, match="call fold_ on it"):
            layer(torch.zeros(4, 5, 2))
