# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The model of a network and its likelihood, beside densities of plain torch."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor, nn

from pyro_bnn.infer import fit, posterior_predictive
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.nn import bayesian_
from pyro_bnn.supervised import SupervisedModel
from tests.common import assert_close

N, B = 20, 5


def network(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))


def gaussian(y: Tensor, mean: Tensor, scale: Any) -> Tensor:
    return (
        -0.5 * ((y - mean) / scale) ** 2
        - torch.log(torch.as_tensor(scale))
        - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    )


def log_poisson(y: Tensor, f: Tensor) -> Tensor:
    return y * f - f.exp() - torch.lgamma(y + 1)


CASES: dict[str, tuple[Any, int, dict[str, Any], Callable[[], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "regression": ("regression", 1, {"noise": 0.3}, lambda: torch.randn(B), lambda f, y: gaussian(y, f[:, 0], 0.3)),
    "vectors": (
        "regression", 2, {"noise": torch.tensor([0.3, 2.0]), "event_dim": 1}, lambda: torch.randn(B, 2),
        lambda f, y: gaussian(y, f, torch.tensor([0.3, 2.0])),
    ),
    "columns": ("regression", 1, {"noise": 0.3}, lambda: torch.randn(B, 1), lambda f, y: gaussian(y, f, 0.3)),
    "integers": ("regression", 1, {"noise": 0.3}, lambda: torch.arange(B), lambda f, y: gaussian(y, f[:, 0], 0.3)),
    "heteroscedastic": (
        "heteroscedastic", 2, {}, lambda: torch.randn(B), lambda f, y: gaussian(y, f[:, 0], f[:, 1].exp()),
    ),
    "heteroscedastic vectors": (
        "heteroscedastic", 4, {"event_dim": 1}, lambda: torch.randn(B, 2),
        lambda f, y: gaussian(y, f[:, :2], f[:, 2:].exp()),
    ),
    "classification": (
        "classification", 3, {}, lambda: torch.arange(B) % 3, lambda f, y: -F.cross_entropy(f, y, reduction="none"),
    ),
    "short labels": (
        "classification", 3, {}, lambda: (torch.arange(B) % 3).short()[:, None],
        lambda f, y: -F.cross_entropy(f, y[:, 0].long(), reduction="none"),
    ),
    "binary": (
        "binary", 1, {}, lambda: torch.arange(B) > 2,
        lambda f, y: -F.binary_cross_entropy_with_logits(f[:, 0], y.double(), reduction="none"),
    ),
    "several labels": (
        "binary", 3, {"event_dim": 1}, lambda: torch.randint(2, (B, 3)),
        lambda f, y: -F.binary_cross_entropy_with_logits(f, y.double(), reduction="none"),
    ),
    "poisson": ("poisson", 1, {}, lambda: torch.arange(B), lambda f, y: log_poisson(y.double(), f[:, 0])),
    "callable": (
        lambda f: dist.Laplace(f[:, 0], 0.5), 1, {}, lambda: torch.randn(B),
        lambda f, y: -(y - f[:, 0]).abs() / 0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_density_of_a_mini_batch(name: str) -> None:
    """The site counts N / B times the sum over rows of what plain torch says of the outputs."""
    likelihood, outputs, options, make, expected = CASES[name]
    net = network(outputs)
    x, y = torch.randn(B, 3), make()
    reference = expected(net(x), y).sum()
    model = SupervisedModel(net, likelihood, num_data=N, **options)
    trace = poutine.trace(model).get_trace(x, y)
    site = trace.nodes["obs"]
    assert site["fn"].batch_shape == (B,)
    assert [frame.name for frame in site["cond_indep_stack"]] == ["data"]
    assert_close(trace.log_prob_sum(), N / B * reference)
    drawn = model(x)
    assert drawn.shape[0] == B


@pytest.mark.parametrize("class_dim", [1, -1])
def test_labels_of_pixels(class_dim: int) -> None:
    net = nn.Conv2d(2, 3, 3, padding=1)
    x, y = torch.randn(B, 2, 4, 6), torch.randint(3, (B, 4, 6))
    reference = -F.cross_entropy(net(x), y, reduction="sum")
    shaped = net if class_dim == 1 else lambda x: net(x).movedim(1, -1)
    model = SupervisedModel(shaped, "classification", event_dim=2, class_dim=class_dim)
    site = poutine.trace(model).get_trace(x, y).nodes["obs"]
    assert (site["fn"].batch_shape, site["fn"].event_shape) == ((B,), (4, 6))
    assert_close(site["fn"].log_prob(y).sum(), reference)


def test_mappings_and_results_with_logits() -> None:
    """Batches of a tokenizer: keywords for the network, targets under their own name, a result with logits."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            mean = (self.table(input_ids) * attention_mask.unsqueeze(-1)).sum(1)
            return SimpleNamespace(logits=self.head(mean))

    net = Encoder()
    batch = {
        "input_ids": torch.randint(7, (B, 6)),
        "attention_mask": torch.ones(B, 6),
        "labels": torch.arange(B) % 2,
    }
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    reference = -F.cross_entropy(net(**inputs).logits, batch["labels"], reduction="sum")
    model = SupervisedModel(net, "classification")
    for args, kwargs in [((), batch), ((batch,), {}), ((inputs, batch["labels"]), {})]:
        assert_close(poutine.trace(model).get_trace(*args, **kwargs).log_prob_sum(), reference)
    with pytest.raises(TypeError, match=r"x and \['attention_mask'\]"):
        model(batch["input_ids"], attention_mask=batch["attention_mask"])


def test_tuples_of_inputs() -> None:
    net = nn.Bilinear(2, 3, 1)
    x, z, y = torch.randn(B, 2), torch.randn(B, 3), torch.randn(B)
    model = SupervisedModel(net, noise=0.5)
    assert_close(
        poutine.trace(model).get_trace((x, z), y).log_prob_sum(), gaussian(y, net(x, z)[:, 0], 0.5).sum()
    )


def test_noise_is_a_parameter_a_constant_or_a_latent() -> None:
    x, y = torch.randn(40, 3), torch.randn(40)
    learned = SupervisedModel(bayesian_(network(1)))
    assert "noise_unconstrained" in dict(learned.named_parameters())
    learned.noise = torch.tensor(0.4)
    assert_close(learned.noise, 0.4)
    fixed = SupervisedModel(network(1), noise=0.4)
    assert "noise" in dict(fixed.named_buffers())
    latent = SupervisedModel(bayesian_(network(1)), noise=dist.LogNormal(0.0, 1.0))
    assert "noise" in poutine.trace(latent).get_trace(x, y).stochastic_nodes
    fit(learned, AutoMixture(learned, 1), (x, y), num_steps=200, optim=0.03, progress_bar=False)
    assert 0.5 < float(learned.noise.detach()) < 1.3  # learned by the bound: the targets are noise of scale 1


@pytest.mark.parametrize(
    "name", ["regression", "vectors", "heteroscedastic", "classification", "binary", "poisson"]
)
def test_draws_together_are_those_of_a_loop(name: str) -> None:
    """Sample dimensions of the weights pass through every likelihood."""
    likelihood, outputs, options, _, _ = CASES[name]
    model = SupervisedModel(bayesian_(network(outputs)), likelihood, **options)
    x = torch.randn(B, 3)
    draws = {
        "net.0.weight": torch.randn(6, 4, 3), "net.0.bias": torch.randn(6, 4),
        "net.2.weight": torch.randn(6, outputs, 4), "net.2.bias": torch.randn(6, outputs),
    }  # fmt: skip
    means = []
    for i in range(6):
        one = {key: value[i] for key, value in draws.items()}
        d: Any = poutine.trace(poutine.condition(model, data=one)).get_trace(x).nodes["obs"]["fn"]
        means.append(d.probs if name == "classification" else d.mean)
    prediction = posterior_predictive(model, draws, (x,))
    assert_close(prediction.mean, torch.stack(means).detach(), rtol=1e-6)


@pytest.mark.parametrize(
    ("outputs", "likelihood", "y", "options", "says"),
    [
        (1, "poison", torch.zeros(B), {}, "likelihood='poison' is unknown"),
        (2, "regression", torch.zeros(B), {}, r"returns outputs of shape \(5, 2\) for 5 rows"),
        (2, "binary", torch.zeros(B), {}, "use likelihood='classification'"),
        (3, "heteroscedastic", torch.zeros(B), {}, r"shape \(N, 2 D\); found \(5, 3\)"),
        (1, "classification", torch.zeros(B).long(), {}, "For a single logit use likelihood='binary'"),
        (3, "classification", torch.zeros(B), {}, r"labels are of type torch.float"),
        (3, "classification", torch.eye(3)[[0, 1, 2, 0, 1]], {}, r"y.argmax\(-1\)"),
        (1, "regression", torch.zeros(B - 1), {}, r"shape \(4,\), expected \(5,\)"),
        (1, "regression", torch.zeros(B, 2), {}, r"shape \(5, 2\), expected \(5,\)"),
        (1, lambda f: dist.Normal(f, 1.0), torch.zeros(B), {}, r"batch shape \(5, 1\) and event shape \(\)"),
        (1, lambda f: dist.Normal(f, 1.0).to_event(2), torch.zeros(B), {}, r"batch shape \(\)"),
        (1, "poisson", torch.zeros(B), {"noise": 1.0}, "is the standard deviation of likelihood='regression'"),
        (1, "regression", torch.zeros(B), {"noise": -1.0}, "noise must be positive"),
        (1, "regression", torch.zeros(B), {"num_data": 0}, "num_data must be a positive integer"),
        (3, "classification", torch.zeros(B).long(), {"class_dim": 2}, "class_dim=2 is 1 or -1"),
    ],
)  # fmt: skip
def test_refused(outputs: int, likelihood: Any, y: Tensor, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SupervisedModel(network(outputs), likelihood, **options)(torch.randn(B, 3), y)


def test_what_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match="the targets are a list"):
        SupervisedModel(network(1))(torch.randn(B, 3), [0.0] * B)
    with pytest.raises(TypeError, match="returns a tuple, and likelihood='regression'"):
        SupervisedModel(nn.LSTM(3, 2))(torch.randn(B, 3))


def test_priors_follow_the_type_of_the_network() -> None:
    model = SupervisedModel(bayesian_(network(1).float()), noise=0.5)
    site = poutine.trace(model).get_trace(torch.randn(B, 3).float(), torch.randn(B)).nodes["obs"]
    assert site["value"].dtype == site["fn"].mean.dtype == torch.float32
    assert isinstance(site["fn"], td.Normal)
