# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import nn

from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.model.handlers import SubstituteMessenger
from pyro_bnn.nn import (
    BayesianLinear,
    FanInNormal,
    Rank1Linear,
    bayesian_,
    init_to_trained,
    rank1_,
    unpack_site,
)
from pyro_bnn.nn.priors import resolve_prior
from tests.common import assert_close


@pytest.mark.parametrize("bias", [True, False])
def test_components_equal_plain_layers(bias):
    K, B, d, m = 3, 5, 4, 6
    layer = Rank1Linear(d, m, bias=bias)
    r, s, b = torch.randn(K, 1, m), torch.randn(K, 1, d), torch.randn(K, 1, m)
    values = {"r": r, "s": s, "bias": b}
    x = torch.randn(B, d)
    with SubstituteMessenger(values):
        y = layer(x)
    assert y.shape == (K, B, m)
    for k in range(K):
        weight = layer.weight * r[k, 0][:, None] * s[k, 0][None, :]
        assert_close(y[k], F.linear(x, weight, b[k, 0] if bias else None), rtol=0, atol=1e-12)


def test_two_sample_dimensions():
    S, K, B = 2, 3, 5
    net = rank1_(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)))
    trace = poutine.trace(net).get_trace(torch.zeros(B, 4))
    sites = {n: torch.randn(S, K, 1, *v["value"].shape) for n, v in trace.iter_stochastic_nodes()}
    assert set(sites) == {"0.r", "0.s", "0.bias", "2.r", "2.s", "2.bias"}
    x = torch.randn(B, 4)
    with SubstituteMessenger(sites):
        y = net(x)
    for i in range(S):
        for k in range(K):
            with SubstituteMessenger({n: v[i, k, 0] for n, v in sites.items()}):
                assert_close(y[i, k], net(x), rtol=0, atol=1e-12)


def test_conversion_leaves_outputs_unchanged_at_unit_factors():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    original = copy.deepcopy(net)
    rank1_(net)
    values = {
        n: torch.ones_like(s["value"]) if not n.endswith("bias") else s["infer"]["pyro_bnn"]["init"]
        for n, s in poutine.trace(net).get_trace(torch.zeros(1, 4)).iter_stochastic_nodes()
    }
    x = torch.randn(3, 4)
    with SubstituteMessenger(values):
        assert_close(net(x), original(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("prior", ["distribution", "dict", "callable"])
def test_three_forms_of_prior(prior):
    cauchy = dist.Cauchy(1.0, 0.2)
    forms = {
        "distribution": cauchy,
        "dict": {"r": cauchy, "0.s": cauchy},
        "callable": lambda name, shape: cauchy.expand(shape),
    }
    net = rank1_(nn.Sequential(nn.Linear(4, 6)), prior=forms[prior])
    nodes = poutine.trace(net).get_trace(torch.zeros(1, 4)).nodes
    for name, size in (("0.r", 6), ("0.s", 4)):
        fn = nodes[name]["fn"]
        assert fn.event_shape == (size,)
        assert isinstance(fn.base_dist, dist.Cauchy)
        assert_close(fn.base_dist.scale, torch.full((size,), 0.2))


def test_dictionary_leaves_factors_out():
    layer = Rank1Linear(4, 6, prior={"s": dist.Normal(1.0, 0.1)}, bias_prior={})
    assert set(dict(poutine.trace(layer).get_trace(torch.zeros(1, 4)).iter_stochastic_nodes())) == {"s"}
    assert isinstance(layer.bias, nn.Parameter)


def test_prior_errors_name_the_parameter():
    with pytest.raises(ValueError, match=r"'0\.weight'.*\(7,\).*\(3, 2\)"):
        resolve_prior(dist.Normal(torch.zeros(7), 1.0), "0.weight", (3, 2))
    with pytest.raises(TypeError, match=r"'w' is a float"):
        resolve_prior(3.0, "w", (2,))
    with pytest.raises(TypeError, match="returned a Tensor for 'w'"):
        resolve_prior(lambda name, shape: torch.zeros(shape), "w", (2,))
    with pytest.raises(ValueError, match=r"\['wieght'\].*0\.weight"):
        bayesian_(nn.Sequential(nn.Linear(2, 2)), prior={"wieght": dist.Normal(0.0, 1.0)})
    with pytest.raises(ValueError, match="skip names '5'"):
        rank1_(nn.Sequential(nn.Linear(2, 2)), skip="5")
    with pytest.raises(ValueError, match=r"only names 1\.0 \(Tanh\), which neither is nor holds a layer"):
        rank1_(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh())), only=["0", "1.0"])
    with pytest.raises(ValueError, match=r"nothing to convert.*ReLU"):
        rank1_(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match=r"0 \(Linear\) holds 'weight' in torch.float16"):
        rank1_(nn.Sequential(nn.Linear(2, 2)).half())
    with pytest.raises(ValueError, match=r"inputs of shape \(\.\.\., 2\), found \(5, 3\)"):
        Rank1Linear(2, 2)(torch.zeros(5, 3))


@pytest.mark.parametrize("convert", [rank1_, bayesian_, lambda net: bayesian_(net, packed=True)])
def test_priors_follow_the_module(convert):
    net = convert(nn.Sequential(nn.Linear(2, 3).float(), nn.Linear(3, 1).float()))
    nodes = list(poutine.trace(net).get_trace(torch.zeros(4, 2).float()).iter_stochastic_nodes())
    assert {site["value"].dtype for _, site in nodes} == {torch.float32}
    net.double()
    nodes = list(poutine.trace(net).get_trace(torch.zeros(4, 2)).iter_stochastic_nodes())
    assert {site["value"].dtype for _, site in nodes} == {torch.float64}
    assert all(
        site["infer"]["pyro_bnn"]["init"] is None or site["infer"]["pyro_bnn"]["init"].dtype == torch.float64
        for _, site in nodes
    )


def test_fan_in_prior_keeps_the_variance():
    layer = BayesianLinear(400, 1000)
    x = torch.randn(1, 400)
    y = layer(x / x.square().mean().sqrt())
    # one unit of variance from the weights, one from the biases
    assert_close(y.var(), 2.0, rtol=0.15)
    assert FanInNormal(gain=2.0)("w", torch.Size([3, 16])).base_dist.scale[0, 0] == 0.5


@pytest.mark.parametrize("packed", [False, True])
def test_bayesian_broadcasts(packed):
    S, B = 3, 5
    net = bayesian_(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2, bias=False)), packed=packed)
    trace = poutine.trace(net).get_trace(torch.zeros(B, 4))
    draws = {n: torch.randn(S, 1, *s["value"].shape) for n, s in trace.iter_stochastic_nodes()}
    assert set(draws) == ({"packed"} if packed else {"0.weight", "0.bias", "2.weight"})
    x = torch.randn(B, 4)
    with SubstituteMessenger(draws):
        y = net(x)
    assert y.shape == (S, B, 2)
    named = unpack_site(net, draws["packed"]) if packed else draws
    for i in range(S):
        w = {n: v[i, 0] for n, v in named.items()}
        expected = F.linear(torch.tanh(F.linear(x, w["0.weight"], w["0.bias"])), w["2.weight"])
        assert_close(y[i], expected, rtol=0, atol=1e-12)


def test_tied_weights_stay_tied():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    for packed in (False, True):
        net = bayesian_(copy.deepcopy(nn.Sequential(first, second)), packed=packed)
        names = set(dict(poutine.trace(net).get_trace(torch.zeros(1, 3)).iter_stochastic_nodes()))
        assert names == ({"packed"} if packed else {"0.weight", "0.bias", "1.bias"})
    weight = torch.randn(3, 3)
    net = bayesian_(copy.deepcopy(nn.Sequential(first, second)))
    with SubstituteMessenger({"0.weight": weight, "0.bias": torch.zeros(3), "1.bias": torch.zeros(3)}):
        assert_close(net(torch.eye(3)), (weight @ weight).T, rtol=1e-12)


def test_dictionary_prior_leaves_parameters():
    net = bayesian_(nn.Sequential(nn.Linear(4, 6)), prior={"weight": dist.Normal(0.0, 1.0)})
    assert set(dict(poutine.trace(net).get_trace(torch.zeros(1, 4)).iter_stochastic_nodes())) == {"0.weight"}
    assert set(dict(net.named_parameters())) == {"0.bias"}


def test_guides_start_at_trained_weights():
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    net = bayesian_(copy.deepcopy(plain), packed=True)
    x, y = torch.randn(10, 4), torch.randn(10)

    def model(x, y=None):
        f = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, 1.0), obs=y)

    guide = AutoMixture(model, 1, "delta", init_loc_fn=init_to_trained).initialize(x, y)
    with SubstituteMessenger(guide.sample_posterior()):
        assert_close(net(x), plain(x), rtol=1e-12)


def test_priors_may_have_been_evaluated_before():
    # a transform keeps its inverse, and the inverse the transform
    prior = dist.InverseGamma(torch.tensor(3.0), torch.tensor(0.1)).expand([2]).to_event(1)
    value = torch.tensor([0.2, 0.4])
    before = prior.log_prob(value)
    net = rank1_(nn.Linear(2, 2), prior={"s": prior}).float()
    after = net._sites["s"].prior.log_prob(value.float())
    assert after.dtype == torch.float32
    assert_close(after, before, rtol=1e-5)
