# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What the first evaluation of a mixture's bound checks, and what it leaves as it was."""

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import Tensor, nn

from pyro_bnn.infer import ComponentLoopWarning, Mixture_ELBO, fit
from pyro_bnn.infer.autoguide import AutoLaplaceMixture, AutoMixture
from pyro_bnn.infer.mixture.runs import JointRun
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.nn import bayesian_, rank1_
from tests.common import assert_close


class Coupled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.out((h @ h.mT).softmax(-1) @ h)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 1))


def regression(net: Any) -> Any:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return model


@pytest.mark.parametrize("build", [plain, Coupled])
@pytest.mark.parametrize("K", [1, 3])
def test_random_numbers_and_statistics_stay(build: Any, K: int) -> None:
    """An evaluation that checks, and one that has nothing to check any more, give the same numbers."""
    net = rank1_(build())
    model, x, y = regression(net), torch.randn(8, 3), torch.randn(8)
    guide = AutoMixture(model, K).initialize(x, y)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    elbo, losses = Mixture_ELBO(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ComponentLoopWarning)
        for _ in range(3):
            net.load_state_dict(state)
            pyro.set_rng_seed(1)
            loss = elbo.differentiable_loss(model, guide, x, y)
            after = {name: value.clone() for name, value in net.state_dict().items()}
            losses.append(
                (loss.item(), torch.rand(()).item(), *(v.double().sum().item() for v in after.values()))
            )
    assert losses[0] == losses[1] == losses[2]


def test_the_first_step_is_direct_under_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """``fit`` validates its first step: it takes the path of all others."""
    runs = []
    run = JointRun.run

    def note(self: JointRun, *args: Any) -> Any:
        sites = run(self, *args)
        runs.append((self.step.direct, len(sites)))
        return sites

    monkeypatch.setattr(JointRun, "run", note)
    model = regression(bayesian_(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))))
    x, y = torch.randn(8, 3), torch.randn(8)
    fit(model, AutoMixture(model, 2), (x, y), num_steps=3, progress_bar=False)
    assert runs == [(True, 5)] * 4  # the check, three steps


@pytest.mark.parametrize("how", ["fit", "SVI"])
def test_said_once_and_trained(how: str) -> None:
    net = rank1_(Coupled())
    model, x, y = regression(net), torch.randn(8, 3), torch.randn(8)
    guide = AutoMixture(model, 2)

    def train() -> list[float]:
        if how == "fit":
            return list(fit(model, guide, (x, y), num_steps=40, optim=0.02, progress_bar=False).losses)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Mixture_ELBO())
        return [svi.step(x, y) for _ in range(40)]

    with pytest.warns(ComponentLoopWarning) as caught:
        losses = train()
    assert len(caught) == 1
    assert sum(losses[-5:]) < sum(losses[:5])
    assert "obs" in str(caught[0].message)


def test_a_constant_argument_of_the_batch_size() -> None:
    """A mask over as many steps as there are examples: what it is is known from other batches, or else found out."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(2, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            h = self.first(x)
            return self.out((((h @ h.mT) + mask).softmax(-1) @ h).mean(1))

    T = 5
    mask = torch.full((T, T), -torch.inf).triu(1)
    for first in (8, T):
        net = rank1_(Masked())

        def model(x: Tensor, mask: Tensor, y: Tensor, net: Any = net) -> None:
            f = net(x, mask).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

        guide = AutoMixture(model, 2, component="delta").initialize(
            torch.randn(8, T, 2), mask, torch.randn(8)
        )
        elbo = Mixture_ELBO()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for size in (first, T, 3):
                x, y = torch.randn(size, T, 2), torch.randn(size)
                found = elbo.differentiable_loss(model, guide, x, mask, y)
                draws = guide.sample_posterior((2,), by_component=True)
                expected = 0.0
                for k in range(2):
                    trace = poutine.trace(poutine.condition(model, {n: v[k] for n, v in draws.items()}))
                    expected -= trace.get_trace(x, mask, y).log_prob_sum() / 2
                assert_close(found.detach(), expected.detach(), rtol=1e-10)
        loops = [w for w in caught if issubclass(w.category, ComponentLoopWarning)]
        assert len(loops) == (1 if first == T else 0)


def test_particles_and_components_without_plates() -> None:
    """(S, K) draws are no values per example where K is the number of rows."""
    net = rank1_(nn.Linear(3, 1))
    K = 4

    def model(x: Tensor, y: Tensor) -> None:
        f = net(x).squeeze(-1)
        pyro.sample("obs", dist.Normal(f, 0.5).to_event(1), obs=y)

    x, y = torch.randn(K, 3), torch.randn(K)
    guide = AutoMixture(model, K, component="delta").initialize(x, y)
    found = Mixture_ELBO(num_particles=2).loss(model, guide, x, y)
    draws = guide.sample_posterior((K,), by_component=True)
    traces = [poutine.trace(poutine.condition(model, {n: v[k] for n, v in draws.items()})) for k in range(K)]
    expected = -sum(trace.get_trace(x, y).log_prob_sum() for trace in traces) / K
    assert_close(found, expected.detach(), rtol=1e-12)


def test_per_example_noise_needs_rows() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.first, self.out = nn.Embedding(8, 4), nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            mixed = self.first(x) * self.table(torch.arange(len(x))).flip(0)
            return self.out(torch.tanh(mixed))

    model, x, y = regression(rank1_(Positions())), torch.randn(8, 3), torch.randn(8)
    guide = AutoMixture(model, 2, noise="per_example").initialize(x, y)
    with pytest.raises(ValueError, match=r"'obs' at example \d does not depend .* Use noise='shared'"):
        Mixture_ELBO().loss(model, guide, x, y)


def test_split_batches_need_examples_apart() -> None:
    model, x, y = regression(rank1_(Coupled())), torch.randn(8, 3), torch.randn(8)
    guide = AutoMixture(model, 2, rest="point").initialize(x, y)
    with pytest.raises(ValueError, match=r"batch='split' needs .* 'obs' .*Use batch='repeat'"):
        Mixture_ELBO(batch="split").loss(model, guide, x, y)


def test_subsampled_rows_are_shared_by_the_components() -> None:
    """A model that subsamples by itself and does not broadcast: the bound is finite and every component sees the same rows."""
    seen: list[Tensor] = []

    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3, 1), 1.0).to_event(2))
        with pyro.plate("data", len(x), subsample_size=4) as index:
            seen.append(index)
            pyro.sample("obs", dist.Normal((x[index] @ weight).squeeze(-1), 0.5), obs=y[index])

    x, y = torch.randn(20, 3), torch.randn(20)
    guide = AutoMixture(model, 3).initialize(x, y)
    elbo = Mixture_ELBO()
    with pytest.warns(ComponentLoopWarning):
        elbo.loss(model, guide, x, y)
    seen.clear()
    elbo.loss(model, guide, x, y)
    first, second = seen[:3], seen
    assert len(second) == 3
    assert all(torch.equal(index, first[0]) for index in first)
    elbo.loss(model, guide, x, y)
    assert not torch.equal(seen[-1], first[0])


def test_guide_lists_under_svi() -> None:
    """A list is set up in the first step, its mixture too."""

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(w * x, sigma), obs=y)

    guide = AutoGuideList(model)
    guide.append(AutoMixture(poutine.block(model, hide=["sigma"]), 3))
    guide.append(AutoNormal(poutine.block(model, hide=["w"])))
    x = torch.randn(50)
    y = 2 * x + 0.1 * torch.randn(50)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Mixture_ELBO())
    losses = [svi.step(x, y) for _ in range(300)]
    assert losses[-1] < losses[0]
    w = guide[0].component_distributions()["w"].mean
    assert ((w - 2).abs() < 0.2).all()


@pytest.mark.parametrize("elbo", [Trace_ELBO, JitTrace_ELBO])
def test_every_mode_of_a_laplace_mixture_is_trained(elbo: Any) -> None:
    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(a.sum(), 1.0), obs=y)

    y = torch.randn(5) + 3
    guide = AutoLaplaceMixture(model, 3).initialize(y)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo(ignore_jit_warnings=True))
    for _ in range(400):
        svi.step(y)
    posterior = y.sum() * 25 / (1 + 50 * len(y)) * 2
    for component in guide.components:
        assert_close(component.loc.detach().sum(), posterior, atol=0.1, rtol=0)


def test_model_that_differentiates_its_network() -> None:
    """Nothing in an evaluation runs without gradients, where a model takes derivatives itself."""
    net = bayesian_(nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))

    def model(x: Tensor, y: Tensor) -> None:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(slope.squeeze(-1), 0.5), obs=y)

    x, y = torch.randn(6, 1), torch.randn(6)
    guide = AutoMixture(model, 2, component="delta").initialize(x, y)
    unused = r"depends on the sites \['2.bias'\]"  # a constant has no slope
    with local_parameters(), pytest.warns(ComponentLoopWarning), pytest.warns(UserWarning, match=unused):
        found = Mixture_ELBO().differentiable_loss(model, guide, x, y)
    draws = guide.sample_posterior((2,), by_component=True)
    traces = [poutine.trace(poutine.condition(model, {n: v[k] for n, v in draws.items()})) for k in range(2)]
    expected = -sum(trace.get_trace(x, y).log_prob_sum() for trace in traces) / 2
    assert_close(found.detach(), expected.detach(), rtol=1e-10)


def test_layers_that_nothing_depends_on_are_named() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.pooler, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x))
            self.pooler(h)
            return self.out(h)

    model, x, y = regression(rank1_(Pooled())), torch.randn(8, 3), torch.randn(8)
    guide = AutoMixture(model, 2).initialize(x, y)
    with pytest.warns(UserWarning, match=r"no observation depends on the layers \['pooler'\], which keep"):
        Mixture_ELBO().differentiable_loss(model, guide, x, y)

    class Copied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(x @ self.first.weight.detach().mT)
            return self.out(h)

    model = regression(rank1_(Copied()))
    guide = AutoMixture(model, 2).initialize(x, y)
    with (
        pytest.raises(ValueError, match=r"'first' are drawn, but .*network itself \(PyroCopied\) reads"),
        pytest.warns(ComponentLoopWarning),
    ):
        Mixture_ELBO().differentiable_loss(model, guide, x, y)


@pytest.mark.parametrize("seed", range(10))
def test_a_number_that_falls_on_the_rows_in_single_precision(seed: int):
    """As many rows as components, and an intercept that differs little between these."""
    torch.manual_seed(seed)
    x, y = torch.randn(2, 2).float(), torch.tensor([1.0, 2.0]).float()

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2).float(), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(torch.tensor(0.0).float(), 0.5))
        pyro.sample("obs", dist.Normal((x * w.unsqueeze(-2)).sum(-1) + b, 3.0).to_event(1), obs=y)

    guide = AutoMixture(model, 2, "delta", rest="delta").initialize(x, y)
    places = [
        {"w": torch.tensor(w).float(), "b": torch.tensor(b).float()}
        for w, b in (([0.3, -0.8], -0.1203), ([1.1, 0.4], -0.1151))
    ]
    with torch.no_grad():
        (value,) = guide.parameters()
        value.copy_(torch.stack([torch.cat([p["w"], p["b"].reshape(1)]) for p in places]))
    expected = (
        -sum(
            pyro.poutine.trace(pyro.poutine.condition(model, p)).get_trace(x, y).log_prob_sum()
            for p in places
        )
        / 2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ComponentLoopWarning)
        found = Mixture_ELBO().differentiable_loss(model, guide, x, y)
    assert_close(found, expected, rtol=1e-6)
