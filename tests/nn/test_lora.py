# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Adapters: explicit weights W + (alpha / r) B diag(s) A in the network that was never touched say the same."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_bnn.infer import Mixture_ELBO, fit, posterior_predictive
from pyro_bnn.infer.autoguide import AutoLaplace, AutoMixture
from pyro_bnn.model.handlers import SubstituteMessenger
from pyro_bnn.nn import bayesian_, init_to_trained, lora_, merged_weights
from pyro_bnn.supervised import laplace
from tests.common import assert_close
from tests.infer.component_oracle import classifier
from tests.nn.test_subclassed_layers import Conv1D, Doubled, Renamed

B, R, ALPHA, K = 4, 2, 5.0, 3


class Text(nn.Module):
    """Torch's encoder, whose fused kernel reads weights in evaluation mode, on sequences with the time first."""

    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        layer = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head, self.first = nn.Linear(6, 3), batch_first

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.table(tokens)
        h = self.encoder(h) if self.first else self.encoder(h.transpose(0, 1)).transpose(0, 1)
        return self.head(h.mean(1))


def numbers() -> Tensor:
    return torch.randn(B, 5)


def tokens() -> Tensor:
    return torch.randint(0, 9, (B, 7))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)), numbers),
    "subclass": (lambda: nn.Sequential(Renamed(5, 6), nn.Tanh(), Renamed(6, 3)), numbers),
    "inputs first": (lambda: nn.Sequential(Conv1D(6, 5), nn.Tanh(), Conv1D(3, 6)), numbers),
    "time first": (Text, tokens),
    "batch first": (lambda: Text(True), tokens),
}


def explicit(plain: nn.Module, values: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights of the plain network by hand, from what A, B and s are said to be."""
    made = {}
    for path, module in plain.named_modules():
        if f"{path}.lora_A.weight" in values:
            A, product = values[f"{path}.lora_A.weight"], values[f"{path}.lora_B.weight"]
            s = values.get(f"{path}.lora_A.r", torch.ones(len(A)))
            product = torch.einsum("or,r,ri->oi", product, s, A) * scale
            made[f"{path}.weight"] = module.weight + (product.T if isinstance(module, Conv1D) else product)
    return made


def adapted(plain: nn.Module, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lora_ leaves out")
        return lora_(copy.deepcopy(plain), rank=R, alpha=ALPHA, **options).eval()


def start(net: Any, x: Tensor) -> dict[str, Tensor]:
    """Values of all adapters and factors away from the start; parameters among them are set in the network."""
    sites = dict(poutine.trace(net).get_trace(x).iter_stochastic_nodes())
    values = {name: torch.randn_like(site["value"]) for name, site in sites.items()}
    for name, p in net.named_parameters():
        if "lora_" in name:
            p.data = torch.randn_like(p)
            values[name] = p.detach()
    return values


@pytest.mark.parametrize("family", ["full", "rank1"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_outputs_are_those_of_explicit_weights(name: str, family: str) -> None:
    """One draw, and several draws at once; nothing changes at the start, and merged weights are the explicit ones."""
    plain, x = NETWORKS[name][0]().eval(), NETWORKS[name][1]()
    net = adapted(plain, family=family)
    if family == "full":
        initial = dict(poutine.trace(net).get_trace(x).iter_stochastic_nodes())
        with SubstituteMessenger({n: site["infer"]["pyro_bnn"]["init"] for n, site in initial.items()}):
            assert_close(net(x), plain(x), rtol=1e-12)
    else:
        assert_close(net(x), plain(x), rtol=1e-12)
    values = start(net, x)
    random = [n for n in values if n in dict(poutine.trace(net).get_trace(x).iter_stochastic_nodes())]
    draws = {n: values[n] + torch.randn(K, *values[n].shape) for n in random}
    with SubstituteMessenger({n: draw[:, None] for n, draw in draws.items()}):
        joint = net(x)
    merged = merged_weights(net, draws)
    for k in range(K):
        own = values | {n: draw[k] for n, draw in draws.items()}
        weights = explicit(plain, own, ALPHA / R)
        assert merged.keys() == weights.keys()
        for key, weight in weights.items():
            assert_close(merged[key][k], weight, rtol=1e-12)
        expected = functional_call(plain, weights, (x,))
        assert_close(joint[k], expected, rtol=1e-10)
        with SubstituteMessenger({n: draw[k] for n, draw in draws.items()}):
            assert_close(net(x), expected, rtol=1e-10)


@pytest.mark.parametrize("family", ["full", "rank1"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_bound_is_the_mean_over_components(name: str, family: str) -> None:
    plain, x = NETWORKS[name][0]().eval(), NETWORKS[name][1]()
    y = torch.randint(0, 3, (B,))
    net = adapted(plain, family=family)
    fixed = {n: v for n, v in start(net, x).items() if n in dict(net.named_parameters())}
    model = classifier(net, lambda net, x: net(x))
    guide = AutoMixture(model, K, component="delta").initialize(x, y)
    guide.loc.data += 0.3 * torch.randn_like(guide.loc)
    draws = guide.sample_posterior((K,), by_component=True)
    expected = 0.0
    for k in range(K):
        own = {n: draw[k] for n, draw in draws.items()}
        weights = explicit(plain, fixed | own, ALPHA / R)
        f = functional_call(plain, weights, (x,))
        expected += dist.Categorical(logits=f).log_prob(y).sum().detach() / K
        for value in own.values():
            rows = value.shape[1] if value.dim() > 1 else 1
            prior = dist.Normal(1.0, 0.1) if family == "rank1" else dist.Normal(0.0, rows**-0.5)
            expected += prior.log_prob(value).sum().detach() / K
    elbo = Mixture_ELBO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all components run together
        for _ in range(2):
            assert_close(-elbo.differentiable_loss(model, guide, x, y).detach(), expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["linear", "inputs first", "time first"])
@pytest.mark.parametrize("structure", ["full", "diagonal"])
def test_laplace_of_adapters_is_the_dense_ggn(structure: str, name: str) -> None:
    plain, x = NETWORKS[name][0]().eval(), NETWORKS[name][1]()
    y, net = torch.randint(0, 3, (B,)), adapted(plain)
    model = classifier(net, lambda net, x: net(x))
    guide = AutoLaplace(model, structure=structure, init_loc_fn=init_to_trained).initialize(x, y)
    guide.loc.data += 0.5 * torch.randn_like(guide.loc)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    expected = dense_precision(plain, guide, x)
    assert_close(
        guide.precision, expected if structure == "full" else expected.diagonal(), rtol=1e-9, atol=1e-9
    )


def test_kronecker_blocks_of_one_example_are_exact() -> None:
    """One outer product of inputs and one of outputs is what the GGN of one example is."""
    plain, x, y = NETWORKS["linear"][0](), torch.randn(1, 5), torch.tensor([2])
    model = classifier(adapted(plain), lambda net, x: net(x))
    guide = AutoLaplace(model, structure="kronecker", init_loc_fn=init_to_trained).initialize(x, y)
    guide.loc.data += 0.5 * torch.randn_like(guide.loc)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    dense, slices = dense_precision(plain, guide, x), guide.packed.space.slices
    assert len(slices) == 4
    for where in slices.values():
        variance = torch.linalg.inv(dense[where, where]).diagonal()
        assert_close(guide.posterior.variance[where], variance, rtol=1e-8)


def dense_precision(plain: nn.Module, guide: AutoLaplace, x: Tensor) -> Tensor:
    """Prior and GGN of the adapters' entries, with the Jacobian of the network that knows explicit weights only."""
    space = guide.packed.space

    def logits(u: Tensor) -> Tensor:
        return functional_call(plain, explicit(plain, space.unpack(u), ALPHA / R), (x,))

    u = guide.loc.detach()
    J, probs = torch.autograd.functional.jacobian(logits, u), logits(u).softmax(-1)
    fisher = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None]
    prior = torch.cat([torch.full_like(v, v.shape[1]).flatten() for v in space.unpack(u).values()])
    return torch.einsum("nci,ncd,ndj->ij", J, fisher, J) + torch.diag(prior)


def test_prediction_and_fit_leave_the_network_as_it_was() -> None:
    plain, x, y = NETWORKS["linear"][0](), torch.randn(20, 5), torch.randint(0, 3, (20,))
    for family, moving in (("full", 0), ("rank1", 4)):
        net = adapted(plain, family=family)
        model = classifier(net, lambda net, x: net(x))
        assert sum(p.requires_grad for p in net.parameters()) == moving
        guide = AutoMixture(model, 2)
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        fit(model, guide, (x, y), num_steps=3, optim=0.1, elbo=Mixture_ELBO(), progress_bar=False)
        for n, p in net.named_parameters():
            assert torch.equal(p, before[n]) == ("lora_" not in n)
        together = posterior_predictive(model, guide, (x, y), num_samples=4)
        alone = posterior_predictive(model, guide, (x, y), draws=together.draws, vectorize=False)
        assert together.vectorized
        assert_close(together.log_likelihood, alone.log_likelihood, rtol=1e-10)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that an operation makes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor) and not func.is_view]
        self.size = max([self.size, *made])
        return out


@pytest.mark.parametrize("family", ["full", "rank1"])
def test_nothing_of_the_size_of_a_weight_is_made(family: str) -> None:
    """Forward and backward of the bound of all components: at most K r (in + out) numbers, and the activations."""
    n, rank, components = 200, 2, 3
    net = lora_(nn.Sequential(nn.Linear(n, n), nn.Tanh(), nn.Linear(n, 3)), rank=rank, family=family)
    model = classifier(net, lambda net, x: net(x))
    x, y = torch.randn(5, n), torch.tensor([0, 1, 2, 0, 1])
    guide, elbo = AutoMixture(model, components).initialize(x, y), Mixture_ELBO()
    elbo.differentiable_loss(model, guide, x, y)
    with Largest() as largest:
        elbo.differentiable_loss(model, guide, x, y).backward()
    latents = guide.loc.numel()
    assert 0 < largest.size <= max(4 * latents, components * 5 * n)
    assert largest.size < n * n / 2


def test_a_new_head_goes_with_adapters() -> None:
    """``bayesian_`` makes the head random beside adapters, and both are folded."""
    plain, x = NETWORKS["linear"][0](), numbers()
    net = bayesian_(adapted(plain, only="0"), only="2", prior=dist.Normal(0.0, 1.0))
    sites = dict(poutine.trace(net).get_trace(x).iter_stochastic_nodes())
    assert set(sites) == {"0.lora_A.weight", "0.lora_B.weight", "2.weight"}
    draws = {n: torch.randn(K, *site["value"].shape) for n, site in sites.items()}
    with SubstituteMessenger({n: draw[:, None] for n, draw in draws.items()}):
        joint = net(x)
    for k in range(K):
        own = {n: draw[k] for n, draw in draws.items()}
        weights = explicit(plain, own, ALPHA / R) | {"2.weight": own["2.weight"]}
        assert_close(joint[k], functional_call(plain, weights, (x,)), rtol=1e-10)


@pytest.mark.parametrize("family", ["full", "rank1"])
def test_copies_and_files(family: str) -> None:
    net = adapted(NETWORKS["inputs first"][0](), family=family)
    x = numbers()
    values = start(net, x)
    with SubstituteMessenger({n: v for n, v in values.items() if n not in dict(net.named_parameters())}):
        expected = net(x)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert_close(other(x), expected, rtol=0)
            assert isinstance(other[0], Conv1D)


def test_priors_and_selectors() -> None:
    def sites(**options: Any) -> dict[str, Any]:
        net = adapted(NETWORKS["linear"][0](), **options)
        return dict(poutine.trace(net).get_trace(numbers()).iter_stochastic_nodes())

    only_A = sites(prior={"lora_A": dist.Normal(0.0, 2.0)})  # B is a parameter, as in BLoB
    assert set(only_A) == {"0.lora_A.weight", "2.lora_A.weight"}
    assert float(only_A["0.lora_A.weight"]["fn"].base_dist.scale.max()) == 2.0
    both = sites(prior={"lora_A": dist.Normal(0.0, 2.0), "2.lora_B.weight": dist.Normal(0.0, 3.0)})
    assert set(both) == {"0.lora_A.weight", "2.lora_A.weight", "2.lora_B.weight"}
    assert set(sites(skip="0", family="rank1")) == {"2.lora_A.r"}
    mapped = sites(family="rank1", weight_prior=dist.Normal(0.0, 1.0), prior=dist.Normal(1.0, 0.5))
    assert set(mapped) == {f"{p}.lora_{m}" for p in "02" for m in ("A.weight", "A.r", "B.weight")}
    assert float(mapped["0.lora_A.r"]["fn"].base_dist.scale.max()) == 0.5
    assert set(sites(family="rank1", prior={"r": dist.Normal(1.0, 0.5)})) == {"0.lora_A.r", "2.lora_A.r"}


def test_adapters_in_two_steps_are_all_trained() -> None:
    net = adapted(NETWORKS["linear"][0](), only="0", family="rank1")
    lora_(net, only="2", family="rank1")
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {
        f"{path}.lora_{m}.weight" for path in "02" for m in "AB"
    }


def test_errors_name_what_is_wrong_and_change_nothing() -> None:
    net = NETWORKS["linear"][0]()
    with pytest.raises(ValueError, match=r"family must be one of \['full', 'rank1'\], found 'mixture'"):
        lora_(net, family="mixture")
    with pytest.raises(TypeError, match=r"takes no \['clip'\] with family='full'"):
        lora_(net, clip=1.0)
    with pytest.raises(ValueError, match="rank must be an integer of at least 1, found 0"):
        lora_(net, rank=0)
    with pytest.raises(ValueError, match="alpha must be a positive number, found 0"):
        lora_(net, rank=2, alpha=0.0)
    with pytest.raises(ValueError, match="only names '5', which is no module"):
        lora_(net, only="5")
    with pytest.raises(ValueError, match=r"prior has keys \['lora_C'\]"):
        lora_(net, prior={"lora_A": dist.Normal(0.0, 1.0), "lora_C": dist.Normal(0.0, 1.0)})
    assert type(net[0]) is nn.Linear
    assert all(p.requires_grad for p in net.parameters())
    assert len(list(net.parameters())) == 3
    with pytest.raises(ValueError, match="nothing to convert"):
        lora_(lora_(net))
    with pytest.raises(ValueError, match="has no adapters"):
        merged_weights(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"0 \(LoraDoubled\) has a forward method of its own"):
        merged_weights(lora_(nn.Sequential(Doubled(5, 6))))
    with pytest.warns(UserWarning, match=r"lora_ leaves out \['encoder.layers.0.self_attn'\]"):
        lora_(Text())


# ---------------------------------------------------------------------- PEFT


def of_peft(**options: Any) -> tuple[Any, nn.Module, Tensor]:
    """A network with trained adapters of PEFT, the same without, and inputs."""
    peft = pytest.importorskip("peft")
    plain = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    config = peft.LoraConfig(**{"r": R, "lora_alpha": ALPHA, "target_modules": ["0", "2"]} | options)
    net = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    for name, p in net.named_parameters():
        if "lora_" in name:
            p.data = torch.randn_like(p)
    return net.double(), plain, numbers()


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"modules_to_save": ["4"]}, {"lora_dropout": 0.5}]
)
@pytest.mark.parametrize("family", ["full", "rank1"])
def test_networks_of_peft_keep_their_outputs(family: str, options: dict[str, Any]) -> None:
    trained, plain, x = of_peft(**options)
    expected, kept = trained(x).detach(), copy.deepcopy(trained).merge_and_unload()
    trainable = {n for n, p in trained.named_parameters() if p.requires_grad}
    net = lora_(copy.deepcopy(trained), family=family).eval()
    sites = dict(poutine.trace(net).get_trace(x).iter_stochastic_nodes())
    ending = "lora_A.default.r" if family == "rank1" else "default.weight"
    assert len(sites) == (2 if family == "rank1" else 4)
    assert all(name.endswith(ending) for name in sites)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == trainable - sites.keys()
    inits = {n: site["infer"]["pyro_bnn"]["init"] for n, site in sites.items()}
    values = {n: torch.ones(R) if v is None else v for n, v in inits.items()}
    with SubstituteMessenger(values):
        assert_close(net(x), expected, rtol=1e-12)
    for key, weight in merged_weights(net).items():
        assert_close(weight, kept.get_parameter(key), rtol=1e-12)
    draws = {n: v + torch.randn(K, *v.shape) for n, v in values.items()}
    with SubstituteMessenger({n: draw[:, None] for n, draw in draws.items()}):
        joint = net(x)
    merged = merged_weights(net, draws)
    for k in range(K):
        alone = functional_call(plain, {key: weight[k] for key, weight in merged.items()}, (x,))
        assert_close(joint[k], alone, rtol=1e-10)


@pytest.mark.parametrize("head", [False, True])
def test_one_call_for_a_network_of_peft_is_laplace_over_what_it_trains(head: bool) -> None:
    """Adapters, and a head that PEFT saves with them: by hand it takes ``bayesian_`` as well."""
    trained, _, x = of_peft(**({"modules_to_save": ["4"]} if head else {}))
    y = torch.randint(0, 3, (B,))
    options: dict[str, Any] = {"structure": "full", "map_tolerance": float("inf"), "tune": None}
    one = laplace(trained, (x, y), likelihood="classification", **options)
    net = lora_(trained).eval()
    if head:
        bayesian_(net, only="base_model.model.4.modules_to_save")
    guide = AutoLaplace(classifier(net, lambda net, x: net(x)), init_loc_fn=init_to_trained).initialize(x, y)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    assert len(guide.packed.space.slices) == (6 if head else 4)
    assert [n.removeprefix("net.") for n in one.packed.space.slices] == list(guide.packed.space.slices)
    assert_close(one.precision, guide.precision, rtol=1e-12)


def test_what_peft_means_by_other_adapters_is_refused() -> None:
    net, _, _ = of_peft()
    with pytest.raises(ValueError, match="leave out rank= and alpha="):
        lora_(net, rank=4)
    net.merge_adapter()
    with pytest.raises(ValueError, match="adapters merged or disabled"):
        lora_(net)
    with pytest.raises(ValueError, match=r"has the variants \['DoraLinearVariant'\]"):
        lora_(of_peft(use_dora=True)[0])


def test_layers_with_several_adapters_of_peft() -> None:
    """The active ones are sites, and all of them are merged; one with a bias is no change of a weight."""
    net, plain, x = of_peft()
    config = copy.deepcopy(net.peft_config["default"])
    for name in ("second", "third"):
        net.add_adapter(name, config)
    net.base_model.set_adapter(["default", "second"])
    for name, p in net.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape)
    expected = net(x).detach()
    lora_(net)
    sites = dict(poutine.trace(net).get_trace(x).iter_stochastic_nodes())
    assert len(sites) == 8
    assert not any("third" in name for name in sites)
    assert_close(functional_call(plain, merged_weights(net), (x,)), expected, rtol=1e-10)
    with pytest.raises(ValueError, match="has an adapter with a bias"):
        merged_weights(lora_(of_peft(lora_bias=True)[0]))


def test_embeddings_of_peft_are_no_layers() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0", "1"])
    net = peft.get_peft_model(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)), config)
    with pytest.raises(ValueError, match="has no matrices A and B of an active adapter"):
        lora_(net)
    lora_(net, skip="base_model.model.0")
    sites = dict(poutine.trace(net).get_trace(torch.tensor([[1, 2]])).iter_stochastic_nodes())
    assert set(sites) == {f"base_model.model.1.lora_{m}.default.weight" for m in "AB"}


def test_guides_of_pyro_name_the_weights_to_merge() -> None:
    """Mean field that starts at the trained network has the network's own weights as its median."""
    plain, x, y = NETWORKS["linear"][0](), torch.randn(6, 5), torch.randint(0, 3, (6,))
    net = adapted(plain)
    guide = AutoNormal(classifier(net, lambda net, x: net(x)), init_loc_fn=init_to_trained)
    guide(x, y)
    merged = merged_weights(net, guide.median())
    assert set(merged) == {"0.weight", "2.weight"}
    for key, weight in merged.items():
        assert_close(weight, plain.get_parameter(key), rtol=0)
    with pytest.raises(ValueError, match=r"latents have no value of site '0\.lora_A\.weight'"):
        merged_weights(net, {"lora_A.weight": torch.zeros(2, 5)})
