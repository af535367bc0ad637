# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Predictions of converted networks: draws together, one at a time inside the network, and in a loop."""

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_bnn.infer import posterior_predictive
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.model.handlers import categorical_draw
from pyro_bnn.nn import HierarchicalPrior, bayesian_, folding, rank1_
from pyro_bnn.nn.folding import Folding
from tests.common import assert_close
from tests.nn import architectures as arch

ROWS = 17
CONVERSIONS = {
    "rank-1": rank1_,
    "materialised": lambda net: rank1_(net, apply="materialise"),
    "rank 2": lambda net: rank1_(net, rank=2, apply="materialise"),
    "additive": lambda net: rank1_(net, form="additive"),
    "hierarchical": lambda net: rank1_(net, prior=HierarchicalPrior(dist.HalfCauchy(0.1))),
    "random weights": lambda net: rank1_(net, weight_prior=dist.Normal(0.0, 1.0), apply="materialise"),
    "full weights": bayesian_,
    "packed": lambda net: bayesian_(net, packed=True),
}
NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), (6,)),
    "wide-resnet": (lambda: arch.WideResNet(10, 1, 3), (3, 8, 8)),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)),
        (2, 2, 2),
    ),
}  # fmt: skip


def classifier(net: Any, handler: Any = nullcontext) -> Any:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        with handler():
            hidden = net(x)
        with pyro.plate("data", 1000, subsample_size=len(x)):
            return pyro.sample("obs", dist.Categorical(logits=hidden), obs=y)

    return model


@pytest.fixture(autouse=True)
def _loops_of_small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks as small as these run their samples one by one here too, which otherwise large ones do."""
    monkeypatch.setattr(folding, "_ONE_RUN", 0)


@pytest.mark.every(3)
@pytest.mark.parametrize("conversion", list(CONVERSIONS))
@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("one_by_one", [True, False])
def test_chunks_equal_the_loop(
    name: str, conversion: str, one_by_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not one_by_one:
        monkeypatch.undo()  # as small a network runs them together otherwise
    make, shape = NETWORKS[name]
    net = make()
    x, y = torch.randn(ROWS, *shape), torch.randint(3, (ROWS,))
    for _ in range(3):
        net(x)  # running statistics
    CONVERSIONS[conversion](net.eval())
    model = classifier(net)
    guide = AutoMixture(model, 3).initialize(x, y)
    draws = {n: v + 0.3 * torch.randn(v.shape) for n, v in guide.sample_posterior((7,)).items()}
    draws = {n: v.abs() + 0.1 if "scale" in n else v for n, v in draws.items()}
    chosen: list[int] = []
    choose = Folding._choose

    def note(self: Folding, sample: int) -> None:
        chosen.append(sample)
        choose(self, sample)

    monkeypatch.setattr(Folding, "_choose", note)
    loop = posterior_predictive(model, draws, (x, y), vectorize=False)
    assert not chosen
    one = posterior_predictive(model, draws, (x, y), max_memory=1.0)
    many = posterior_predictive(model, draws, (x, y), max_memory=1e9)
    assert one.vectorized and many.vectorized  # noqa: PT018
    for found in (one, many):
        for field in ("mean", "variance", "log_likelihood"):
            assert_close(getattr(found, field), getattr(loop, field), rtol=1e-12, atol=1e-12)
    # draws run through the network one by one where the weight of a draw can be built
    can = conversion not in ("additive", "full weights", "packed")
    assert (max(chosen, default=0) == 6) == (one_by_one and can)


class Gain(nn.Module):
    """A module with a parameter of torch's, one of Pyro's and one that is random."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x + self.shift + self.noise  # type: ignore[operator]


def test_samples_one_by_one_make_statements_of_pyro_parameters_only(monkeypatch: pytest.MonkeyPatch) -> None:
    net: Any = rank1_(nn.Sequential(nn.Linear(6, 5), Gain(), nn.Linear(5, 3)), apply="materialise")
    net[1].gain = PyroParam(torch.tensor(2.0), constraint=dist.constraints.positive)
    net[1].noise = PyroSample(dist.Normal(0.0, 1.0))
    x = torch.randn(ROWS, 6)
    heard: list[str] = []

    class Listen(Messenger):
        def _pyro_param(self, msg: Any) -> None:
            if folding.runs_samples_alone():
                heard.append(msg["name"])

    with poutine.block():
        model = poutine.condition(classifier(net, Listen), {"1.noise": torch.tensor(0.7)})
        guide = AutoMixture(model, 2).initialize(x, torch.randint(3, (ROWS,)))
    draws = {n: v + 0.3 * torch.randn(v.shape) for n, v in guide.sample_posterior((7,)).items()}
    loop = posterior_predictive(model, draws, (x,), vectorize=False)
    many = posterior_predictive(model, draws, (x,))
    assert many.vectorized
    assert_close(many["obs"].mean, loop["obs"].mean, rtol=1e-12, atol=1e-12)
    assert set(heard) == {"1.gain"}


def test_copies_and_files_of_networks_keep_the_classes_of_their_modules() -> None:
    net = rank1_(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))
    loaded = pickle.loads(pickle.dumps(net))
    assert [type(m) for m in net] == [type(m) for m in copy.deepcopy(net)] == [type(m) for m in loaded]
    assert isinstance(net[1], PyroModule[nn.BatchNorm1d])


def test_handlers_of_the_model_hear_every_site() -> None:
    net = rank1_(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), apply="materialise")
    x, y = torch.randn(ROWS, 4), torch.randint(2, (ROWS,))
    guide = AutoMixture(classifier(net), 2).initialize(x, y)
    draws = guide.sample_posterior((6,))
    heard: list[str] = []

    class Listener(Messenger):
        def _pyro_sample(self, msg: Any) -> None:
            heard.append(msg["name"])

    expected = posterior_predictive(classifier(net), draws, (x, y), vectorize=False)
    for max_memory, runs in (
        (1.0, 3 + 1 + 4),
        (1e9, 3 + 1 + 1),
    ):  # check, first pair, the rest; more to find the rows
        heard.clear()
        found = posterior_predictive(classifier(net, Listener), draws, (x, y), max_memory=max_memory)
        assert_close(found.mean, expected.mean, rtol=1e-12, atol=1e-12)
        assert len({heard.count(name) for name in draws}) == 1
        assert all(heard.count(name) >= runs for name in draws)


def test_errors_leave_the_layers_as_they_were() -> None:
    class Failing(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Failing.calls += 1
            if Failing.calls == 7:
                raise KeyError("the seventh call")
            return x

    net = rank1_(nn.Sequential(nn.Linear(4, 3), Failing()), apply="materialise")
    model = classifier(net)
    x = torch.randn(ROWS, 4)
    guide = AutoMixture(model, 2).initialize(x, torch.zeros(ROWS).long())
    for fails in (True, False):
        Failing.calls = 0 if fails else 100
        args: Any = (model, guide.sample_posterior((9,)), (x,))
        if fails:
            with pytest.raises(KeyError, match="seventh"):
                posterior_predictive(*args, max_memory=1.0)
        else:
            posterior_predictive(*args, max_memory=1.0)
        assert not net[0]._is_folded()
        assert not net[0]._replaced


def test_a_model_that_wants_all_examples_still_runs_at_once() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 40):
            return pyro.sample("obs", dist.Normal((x * weight).sum(-1), 1.0), obs=y)

    x, weights = torch.randn(40, 3), torch.randn(5, 3)
    found = posterior_predictive(model, {"weight": weights}, (x,))
    assert found.vectorized
    assert_close(found.mean, weights @ x.T, rtol=1e-12)


@pytest.mark.parametrize("how", ["wrong shape", "error", "another site"])
def test_a_model_that_broadcasts_on_few_examples_only(how: str) -> None:
    """It joins pieces of the batch along the first dimension, where draws are: seen in the first run on all examples."""

    def model(x: Tensor) -> Any:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pieces = [(part * weight).sum(-1) for part in x.split(10)]
        mean = torch.cat(pieces, -1 if how == "error" else 0)
        if how == "error" and mean.dim() > 1 and len(x) > 10:
            raise RuntimeError("no draws here")
        name = "obs" if how != "another site" or len(x) > 10 else "few"
        return pyro.sample(name, dist.Normal(mean, 1.0))

    x, weights = torch.randn(40, 3), torch.randn(5, 3)
    found = posterior_predictive(model, {"weight": weights}, (x,))
    assert not found.vectorized
    assert_close(found.mean, weights @ x.T, rtol=1e-12)
    with pytest.raises(ValueError, match="does not broadcast over posterior draws"):
        posterior_predictive(model, {"weight": weights}, (x,), vectorize=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_follow_their_probabilities(dtype: torch.dtype) -> None:
    probs = torch.tensor([[0.0, 0.2, 0.5, 0.0, 0.3, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]], dtype=dtype)
    n = 20_000
    for fn in (
        dist.Categorical(probs).expand([n, 2]),
        dist.Categorical(logits=probs.log()).expand([n, 2]),
        dist.Categorical(probs).expand([n, 2]).to_event(1),
        dist.Categorical(probs).expand([n, 2]).mask(torch.tensor(True)),
    ):
        labels = categorical_draw(fn)
        assert labels is not None
        assert labels.shape == (n, 2)
        counts = torch.nn.functional.one_hot(labels, 6).to(dtype).mean(0)
        assert_close(counts[probs == 0], torch.zeros(8))
        # four standard errors
        assert ((counts - probs).abs() <= 4 * (probs * (1 - probs) / n).sqrt() + 1e-6).all()
        lag = (labels[1:, 0] == labels[:-1, 0]).double().mean()
        assert abs(lag - probs[0].double().square().sum()) < 4 * (0.25 / n) ** 0.5  # independent rows
    assert categorical_draw(dist.Normal(0.0, 1.0)) is None


def test_labels_that_do_not_depend_on_draws_differ_between_them() -> None:
    def model(x: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(weight * x, 1.0))
            pyro.sample("label", dist.Categorical(torch.ones(2)))

    found = posterior_predictive(model, {"weight": torch.randn(50)}, (torch.randn(40),))
    assert found.vectorized
    labels = found["label"].samples
    assert labels is not None
    assert labels.shape == (50, 40)
    assert abs(float(labels.double().mean()) - 0.5) < 0.05
    assert (labels.double().mean(0) != labels[0]).any()
