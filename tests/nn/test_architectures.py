# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Conversion of real architectures: folded samples equal the loop over components; unit factors change nothing."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_bnn.infer import Mixture_ELBO
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.model.handlers import SubstituteMessenger
from pyro_bnn.nn import bayesian_, rank1_
from pyro_bnn.nn.folding import split_batch
from tests.common import assert_close
from tests.nn import architectures as arch

pytestmark = pytest.mark.filterwarnings("ignore:the conversion leaves out")  # class tokens and positions

B = 4


def images(channels=3, size=32):
    return torch.randn(B, channels, size, size)


def tokens(n, length=7):
    return torch.randint(1, n, (B, length))


NETWORKS = {
    "resnet18": (lambda: arch.resnet18(4, 10), images),
    "resnet50": (lambda: arch.resnet50(4, 10), images),
    "wide-resnet": (lambda: arch.WideResNet(10, 2, 4), lambda: images(size=8)),
    "vision-transformer": (arch.VisionTransformer, lambda: images(size=8)),
    "transformer-encoder": (arch.TransformerClassifier, lambda: tokens(11)),
    "lstm-classifier": (arch.LSTMClassifier, lambda: tokens(11)),
    "u-net": (arch.UNet, lambda: images(1, 8)),
    "tied-weights": (arch.TiedAutoencoder, lambda: tokens(9)),
    "flatten-and-view": (arch.FlattenNet, lambda: torch.randn(B, 16)),
    "shared-module": (arch.SharedModule, lambda: torch.randn(B, 4)),
}


def trained(name):
    """A network whose running statistics are not those of initialisation."""
    make, data = NETWORKS[name]
    net, x = make(), data()
    with torch.no_grad():
        for _ in range(3):
            net(x)
    return net, x


def draw(net, x, batch_shape=()):
    nodes = dict(poutine.trace(net).get_trace(x).iter_stochastic_nodes())
    return {
        name: site["value"] if not batch_shape else
        site["value"] * (1 + 0.3 * torch.randn(*batch_shape, *site["value"].shape))
        for name, site in nodes.items()
    }  # fmt: skip


@pytest.mark.every(2)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_unit_factors_change_nothing(name, training):
    net, x = trained(name)
    original = copy.deepcopy(net)
    rank1_(net)
    net.train(training)
    original.train(training)
    nodes = dict(poutine.trace(copy.deepcopy(net)).get_trace(x).iter_stochastic_nodes())
    hints = {n: s["infer"]["pyro_bnn"] for n, s in nodes.items()}
    values = {
        n: torch.ones_like(nodes[n]["value"]) if h["role"] == "factor" else h["init"]
        for n, h in hints.items()
    }
    with SubstituteMessenger(values), torch.no_grad():
        assert_close(net(x), original(x), rtol=1e-12, atol=1e-12)


@pytest.mark.every(2)
@pytest.mark.parametrize("convert", [rank1_, bayesian_, lambda net: rank1_(net, apply="materialise")])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_folding_equals_the_loop(name, convert):
    net, x = trained(name)
    net.eval()
    convert(net)
    S, K = 2, 3
    values = draw(net, x, (S, K, 1))
    with SubstituteMessenger(values), torch.no_grad():
        y = net(x)
    for s in range(S):
        for k in range(K):
            with SubstituteMessenger({n: v[s, k, 0] for n, v in values.items()}), torch.no_grad():
                assert_close(y[s, k], net(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_training_step_through_the_bound(name):
    net, x = trained(name)
    rank1_(net)
    out_shape = net(x).shape[1:]
    y = torch.randint(out_shape[-1] if len(out_shape) == 1 else 2, (B,))

    def model(x, y=None):
        f = net(x)
        if f.dim() > 2 and len(out_shape) > 1:
            f = f.flatten(-len(out_shape))[..., :2]
        with pyro.plate("data", 100, subsample_size=len(x)):
            pyro.sample("obs", dist.Categorical(logits=f), obs=y)

    guide = AutoMixture(model, 2).initialize(x, y)
    module = Mixture_ELBO(max_plate_nesting=1)(model, guide)
    loss = module(x, y)
    loss.backward()
    assert torch.isfinite(loss)
    names = dict(net.named_parameters())
    assert names
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all() for n, p in names.items() if "position" not in n
    )
    assert torch.isfinite(guide.loc_unconstrained.grad).all()


@pytest.mark.every(2)
@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_independent(name, copier):
    net, x = trained(name)
    rank1_(net.eval())
    values = draw(net, x, (2, 1))
    other = copier(net)
    with SubstituteMessenger(values), torch.no_grad():
        y = net(x)
        assert_close(other(x), y, rtol=0)
        for p in net.parameters():
            p.zero_()
        assert_close(other(x), y, rtol=0)


def test_freeze_base_leaves_only_factors_and_biases():
    net, x = trained("resnet18")
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    rank1_(net, freeze_base=True)
    assert not [n for n, p in net.named_parameters() if p.requires_grad]

    def model(x, y=None):
        f = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Categorical(logits=f), obs=y)

    y = torch.randint(10, (B,))
    guide = AutoMixture(model, 2).initialize(x, y)
    module = Mixture_ELBO(max_plate_nesting=1)(model, guide)
    optim = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.1)
    start = guide.loc.detach().clone()
    for _ in range(2):
        optim.zero_grad()
        module(x, y).backward()
        optim.step()
    assert (guide.loc != start).any()
    for n, p in net.named_parameters():
        assert_close(p, before[n], rtol=0)


def test_only_and_skip():
    def sites(**selectors):
        net = rank1_(arch.resnet18(4, 10), **selectors)
        return set(dict(poutine.trace(net).get_trace(images()).iter_stochastic_nodes()))

    assert sites(only="fc") == {"fc.r", "fc.s", "fc.bias"}
    everything = sites()
    assert everything - sites(skip="fc") == {"fc.r", "fc.s", "fc.bias"}
    assert all(n.startswith("layer4.") for n in sites(only="layer4"))
    assert sites(only=nn.Linear) == {"fc.r", "fc.s", "fc.bias"}
    assert sites(skip=[nn.Conv2d]) == {"fc.r", "fc.s", "fc.bias"}
    assert sites(only=lambda name, module: name == "conv1") == {"conv1.r", "conv1.s"}


def test_split_batches_give_each_component_its_own_examples():
    K, x = 2, images(size=8)
    net = rank1_(arch.WideResNet(10, 1, 4)).eval()
    values = draw(net, x, (K, 1))
    with SubstituteMessenger(values), torch.no_grad():
        full = net(x)
        with split_batch():
            y = net(x)
            with pytest.raises(ValueError, match="3 examples does not split over 2"):
                net(x[:3])
    assert_close(y, torch.cat([full[0, :2], full[1, 2:]]), rtol=1e-10)


@pytest.mark.parametrize("training", [False, True])
def test_component_batchnorm(training):
    K = 3
    plain, x = trained("resnet18")
    net = rank1_(copy.deepcopy(plain), batchnorm="component", num_components=K)
    net.train(training)
    values = draw(net, x)
    index = next(n for n in values if n.endswith("component"))
    values = {n: v * torch.rand(K, 1, *v.shape) + 0.5 for n, v in values.items() if n != index}
    values[index] = torch.arange(K)[:, None]
    with torch.no_grad():  # tell the components apart
        for module in net.modules():
            if hasattr(module, "running_mean"):
                module.running_mean.mul_(torch.rand(K, 1) + 0.5)
                module.weight.mul_(torch.rand(K, 1) + 0.5)
                module.bias.add_(torch.rand(K, 1))
    state = {n: t.clone() for n, t in (*net.named_buffers(), *net.named_parameters())}
    with SubstituteMessenger(values), torch.no_grad():
        y = net(x)
    for k in range(K):
        alone = rank1_(copy.deepcopy(plain)).train(training)
        with torch.no_grad():
            for n, t in (*alone.named_buffers(), *alone.named_parameters()):
                if "running" in n or t.shape != state[n].shape:
                    t.copy_(state[n][k])
        with SubstituteMessenger({n: v[k, 0] for n, v in values.items() if n != index}), torch.no_grad():
            assert_close(y[k], alone(x), rtol=1e-9, atol=1e-9)
        if training:
            after = dict(net.named_buffers())
            for n, b in alone.named_buffers():
                if "running" in n:
                    assert_close(after[n][k], b, rtol=1e-9, atol=1e-12)


def test_component_batchnorm_cancels_the_size_of_output_factors():
    net = rank1_(
        nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3, eps=1e-12)),
        batchnorm="component", num_components=2,
    )  # fmt: skip
    x = images(1, 8)
    values = {
        "0.r": torch.randn(2, 1, 3),
        "0.s": torch.ones(2, 1, 1),
        "1.component": torch.arange(2)[:, None],
    }
    with SubstituteMessenger(values):
        y = net(x)
    with SubstituteMessenger({**values, "0.r": values["0.r"].sign()}):
        assert_close(net(x), y, rtol=1e-9)
    shared = rank1_(nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3, eps=1e-12)))
    values.pop("1.component")
    with SubstituteMessenger(values):
        y = shared(x)
    with SubstituteMessenger({**values, "0.r": values["0.r"].sign()}):
        assert (shared(x) - y).abs().max() > 0.1


def test_errors_of_batchnorm():
    with pytest.raises(ValueError, match="num_components goes with"):
        rank1_(arch.resnet18(4), batchnorm="component")
    with pytest.raises(ValueError, match="no batch normalisation"):
        rank1_(nn.Sequential(nn.Linear(2, 2)), batchnorm="component", num_components=2)


@pytest.mark.parametrize(
    ("make", "plain", "K", "mean_field", "deltas"),
    [
        # K = 4: 25.98 M and 25.77 M; K = 1: 0.408 % more than the deterministic network
        (arch.resnet50, 25_557_032, 1, 104_278, 52_139),
        (arch.resnet50, 25_557_032, 4, 420_112, 211_556),
        # K = 4: 36.64 M and 36.56 M
        (lambda: arch.WideResNet(28, 10), 36_479_194, 4, 156_678, 78_354),
    ],
)
def test_parameter_counts(make, plain, K, mean_field, deltas):
    net = make().float()
    assert sum(p.numel() for p in net.parameters()) == plain
    rank1_(net)

    def model(x, y=None):
        f = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Categorical(logits=f), obs=y)

    x = torch.randn(2, 3, 32, 32).float()
    for component, extra in (("normal", mean_field), ("delta", deltas)):
        guide = AutoMixture(model, K, component).initialize(x, torch.zeros(2, dtype=torch.long))
        assert sum(p.numel() for m in (net, guide) for p in m.parameters()) == plain + extra


@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("apply", ["scale", "materialise"])
@pytest.mark.parametrize("factors", ["rs", "r", "s"])
@pytest.mark.parametrize(
    "first", [nn.Linear(12, 5), nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), nn.Conv1d(3, 2, 2)]
)
def test_first_layers_of_chains_repeat_their_input_themselves(first, factors, apply, rows):
    layers = list(copy.deepcopy(first)) if isinstance(first, nn.Sequential) else [copy.deepcopy(first)]
    x = torch.randn(B, 12) if isinstance(first, nn.Linear) else torch.randn(B, 3, 4)
    net = nn.Sequential(*layers, nn.Tanh()).double()  # parametrised before the default type was set
    rank1_(net, prior={f: dist.Normal(1.0, 0.1) for f in factors}, apply=apply)
    values = draw(net, x, (3, rows))
    with SubstituteMessenger(values):
        y = net(x)
    for k in range(3):
        for b in range(B):
            with SubstituteMessenger({n: v[k, b % rows] for n, v in values.items()}):
                assert_close(y[k, b], net(x)[b], rtol=1e-12, atol=1e-14)
