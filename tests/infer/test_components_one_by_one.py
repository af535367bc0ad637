# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Networks and models that cannot take all components in one run: the bound is still the mean of the components'."""

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bnn.infer import ComponentLoopWarning
from pyro_bnn.nn import bayesian_, rank1_
from tests.infer.component_oracle import check_bound, classifier, standard_priors

K, B = 3, 4


class Positions(nn.Module):
    """Token and position tables as in nanoGPT: the positions are no batch."""

    def __init__(self, positions: int, extra_dim: bool = False) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 6), nn.Embedding(positions, 6)
        self.head = nn.Linear(6, 3)
        self.extra_dim = extra_dim

    def forward(self, tokens: Tensor) -> Tensor:
        index = torch.arange(tokens.shape[1])
        h = self.wte(tokens) + self.wpe(index.unsqueeze(0) if self.extra_dim else index)
        return self.head(torch.tanh(h).mean(1))


class Relative(nn.Module):
    """A bias by relative position, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.bias, self.head = nn.Embedding(11, 6), nn.Embedding(24, 1), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h, t = self.emb(tokens), torch.arange(tokens.shape[1])
        scores = h @ h.mT + self.bias((t[:, None] - t).abs()).squeeze(-1)
        return self.head((scores.softmax(-1) @ h).mean(1))


class Operator(nn.Module):
    """Branch and trunk, as in DeepONet: the trunk's points are the same for all examples."""

    def __init__(self, points: int) -> None:
        super().__init__()
        self.branch, self.trunk = nn.Linear(5, 6), nn.Linear(2, 6)
        self.points = torch.linspace(0, 1, 2 * points).view(points, 2)

    def forward(self, x: Tensor) -> Tensor:
        return (self.branch(x) @ torch.tanh(self.trunk(self.points)).mT)[:, :3]


class Graph(nn.Module):
    """Messages by ``edge_index`` between the rows of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.out = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        sent = self.message(x)[edges[0]]
        received = torch.zeros(len(x), 6).index_add(0, edges[1], sent)
        return self.out(torch.tanh(received))


class Coupled(nn.Module):
    """Examples attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.out((h @ h.mT).softmax(-1) @ h)


class TimeFirst(nn.Module):
    """Layers see ``(time, batch, features)`` inside a network that is called with the batch first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.first(x.transpose(0, 1))).mean(0))


class Borrowed(nn.Module):
    """A parent that reads the weights of its layers, as BEiT and DETR do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.query, self.out = nn.Linear(5, 6), nn.Embedding(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.qkv.weight, self.qkv.bias))
        return self.out((h @ self.query.weight.mT).softmax(-1) @ self.query.weight)


def tokens(length: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 11, (B, length)),)


def numbers(*shape: int) -> tuple[Tensor, ...]:
    return (torch.randn(B, *shape),)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "positions": (lambda: Positions(7), lambda: tokens(7)),
    "as many positions as rows": (lambda: Positions(K * B), lambda: tokens(K * B)),
    "relative positions": (Relative, lambda: tokens(K * B)),
    "trunk": (lambda: Operator(7), lambda: numbers(5)),
    "as many points as rows": (lambda: Operator(K * B), lambda: numbers(5)),
    "graph": (Graph, lambda: (*numbers(5), torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]]))),
    "coupled rows": (Coupled, lambda: numbers(5)),
    "time first": (TimeFirst, lambda: numbers(K * B, 5)),
    "weights read by the parent": (Borrowed, lambda: numbers(5)),
}


@pytest.mark.parametrize("conversion", ["rank1", "bayesian"])
@pytest.mark.parametrize("name", list(CASES))
def test_bound_is_that_of_the_loop(name: str, conversion: str) -> None:
    plain, make = CASES[name][0](), CASES[name][1]
    inputs, y = make(), torch.randint(0, 3, (B,))
    prior = dist.Normal(0.0, 1.0)
    convert = rank1_ if conversion == "rank1" else lambda net: bayesian_(net, prior=prior)
    priors = standard_priors if conversion == "rank1" else lambda name: prior
    logits = lambda net, *inputs: net(*inputs)  # noqa: E731
    with pytest.warns(ComponentLoopWarning, match="one by one, 3 runs per step, which is exact") as caught:
        check_bound(
            plain,
            convert,
            lambda net: classifier(net, logits),
            lambda call: dist.Categorical(logits=call(*inputs)).log_prob(y).sum(),
            (*inputs, y),
            priors,
            K=K,
        )
    assert len(caught) == 1, "said once"


@pytest.mark.parametrize("conversion", ["rank1", "bayesian"])
def test_a_single_row_of_positions_broadcasts(conversion: str) -> None:
    """Positions of shape (1, T), as HuggingFace has them, are one row for all examples, in one run."""
    plain, inputs, y = Positions(9, extra_dim=True), tokens(7), torch.randint(0, 3, (B,))
    prior = dist.Normal(0.0, 1.0)
    check_bound(
        plain,
        rank1_ if conversion == "rank1" else lambda net: bayesian_(net, prior=prior),
        lambda net: classifier(net, lambda net, x: net(x)),
        lambda call: dist.Categorical(logits=call(*inputs)).log_prob(y).sum(),
        (*inputs, y),
        standard_priors if conversion == "rank1" else lambda name: prior,
    )


# ---------------------------------------------------------------------- models


def textbook() -> Any:
    """The first network of Pyro's own tutorials."""
    from pyro.nn import PyroModule, PyroSample

    class Regression(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = PyroModule[nn.Linear](5, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 5]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(mean, sigma), obs=y)

    return Regression()


def trunk_and_heads() -> Any:
    trunk, heads = rank1_(nn.Linear(5, 6)), [rank1_(nn.Linear(6, 1)) for _ in range(2)]
    for i, net in enumerate([trunk, *heads]):
        net._pyro_name = f"net{i}"

    def model(x: Tensor, y: Tensor) -> None:
        h = torch.tanh(trunk(x))
        means = [head(h).squeeze(-1) for head in heads]
        with pyro.plate("data", len(x)):
            for i, mean in enumerate(means):
                pyro.sample(f"obs{i}", dist.Normal(mean, 0.5), obs=y + i)

    return model


def two_plates() -> Any:
    net = rank1_(nn.Linear(5, 2))

    def model(x: Tensor, y: Tensor) -> None:
        f = net(x)
        with pyro.plate("data", len(x), dim=-2), pyro.plate("outputs", 2, dim=-1):
            pyro.sample("obs", dist.Normal(f, 0.5), obs=y.unsqueeze(-1).expand(-1, 2))

    return model


def returns_distribution() -> Any:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 1)

        def forward(self, x: Tensor) -> Any:
            return dist.Normal(self.inner(x).squeeze(-1), 0.5)

    net = rank1_(Net())

    def model(x: Tensor, y: Tensor) -> None:
        made = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", made, obs=y)

    return model


def unsqueezed() -> Any:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x[None, None]).view(-1)

    net = rank1_(Net())

    def model(x: Tensor, y: Tensor) -> None:
        f = net(x[:, 0])
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return model


MODELS = {
    "PyroModule[nn.Linear]": textbook,
    "trunk and heads": trunk_and_heads,
    "two plates": two_plates,
    "network returns a distribution": returns_distribution,
    "one-dimensional inputs": unsqueezed,
}


@pytest.mark.parametrize(
    "options", [{}, {"num_particles": 2, "kl": "sum"}, {"kl": "exact"}, {"entropy_weight": 0.3}]
)
@pytest.mark.parametrize("name", list(MODELS))
def test_models_by_plain_handlers(name: str, options: dict[str, Any]) -> None:
    """The terms of the bound, written out from the draws that the model saw and from torch's divergences."""
    from pyro import poutine
    from torch.distributions import kl_divergence

    from pyro_bnn.infer import Mixture_ELBO
    from pyro_bnn.infer.autoguide import AutoMixture

    model = MODELS[name]()
    x, y = torch.randn(6, 5), torch.randn(6)
    guide = AutoMixture(model, K, rest="normal", init_scale=0.2).initialize(x, y)
    elbo = Mixture_ELBO(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ComponentLoopWarning)
        elbo.loss(model, guide, x, y)
        with Watch() as watch:
            loss = elbo.loss(model, guide, x, y)
    S = options.get("num_particles", 1)
    runs = watch.runs(list(guide.sample_posterior(())), S * K)
    shapes = {site.name: site.shape for site in guide.sites}
    draws = [{n: v.reshape(shapes[n]) for n, v in run.items()} for run in runs]
    q = guide.component_distributions()
    likelihood, divergence, entropy = 0.0, 0.0, 0.0
    log_q = torch.zeros(S * K, K)
    for i, values in enumerate(draws):
        trace = poutine.trace(poutine.condition(model, data=values)).get_trace(x, y)
        trace.compute_log_prob()
        likelihood += sum(trace.nodes[n]["log_prob_sum"] for n in trace.nodes if n.startswith("obs")) / (
            S * K
        )
        log_q[i] = sum(q[n].log_prob(v) for n, v in values.items())
        for n in values:
            divergence += kl_divergence(q[n], trace.nodes[n]["fn"].expand(q[n].batch_shape))[i % K] / (S * K)
            entropy += q[n].entropy()[i % K] / (S * K)
    if options.get("kl") == "sum":
        divergence *= K
    if options.get("kl") == "exact":
        own = log_q.log_softmax(-1)[range(S * K), [i % K for i in range(S * K)]]
        divergence -= (own.mean() + torch.tensor(float(K)).log()).item()
    expected = divergence - likelihood - options.get("entropy_weight", 0.0) * entropy
    torch.testing.assert_close(torch.tensor(loss), torch.as_tensor(expected).detach(), rtol=1e-10, atol=0.0)


class Watch(pyro.poutine.messenger.Messenger):
    """Keeps the values of latent sites in the order in which models and guides meet them."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[tuple[str, Tensor]] = []

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and isinstance(msg["value"], Tensor):
            self.values.append((msg["name"], msg["value"].detach()))

    def runs(self, names: list[str], number: int) -> list[dict[str, Tensor]]:
        """The last draws of each component, which model and guide see one after the other."""
        seen = {n: [v for m, v in self.values if m == n] for n in names}
        if all(len(v) == 2 * number for v in seen.values()):  # one by one: guide and model in turn
            return [{n: seen[n][2 * i] for n in names} for i in range(number)]
        joint = {n: v[-1] for n, v in seen.items()}
        lead = max(v.shape[0] if v.dim() else 1 for v in joint.values())
        assert lead == number, "no particles in joint runs here"
        return [{n: v[i] for n, v in joint.items()} for i in range(number)]
