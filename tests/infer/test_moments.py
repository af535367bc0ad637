# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_bnn.infer import posterior_predictive, predictive_moments
from pyro_bnn.infer.predict.moments import site_moments
from tests.common import assert_close
from tests.infer.models import NOISE, linear_data, linear_model, linear_posterior


def test_variance_of_linear_regression() -> None:
    x, y = linear_data()
    mean, covariance = linear_posterior(x, y)
    weights = torch.distributions.MultivariateNormal(mean, covariance).sample((20000,))
    found = predictive_moments(linear_model, {"weight": weights}, (x, y), batch_size=7)["obs"]
    assert_close(found.mean, x @ mean, atol=0.01, rtol=0)
    assert_close(found.aleatoric, torch.full((40,), NOISE**2), rtol=1e-9)
    assert_close(found.epistemic, (x @ covariance * x).sum(-1), rtol=0.05)
    exact = dist.Normal(x @ mean, (found.aleatoric + (x @ covariance * x).sum(-1)).sqrt()).log_prob(y)
    assert_close(found.log_density, exact, atol=0.02, rtol=0)


@pytest.mark.parametrize("classes", [2, 4])
def test_mutual_information_by_enumeration(classes: int) -> None:
    """With z on a finite set, I(y; z) = sum over z and y of p(z) p(y|z) log p(y|z) / p(y)."""
    logits = torch.randn(5, 3, classes)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3, classes]).to_event(2))
        with pyro.plate("data", 3):
            if classes == 2:
                pyro.sample("obs", dist.Bernoulli(logits=(z[..., 1] - z[..., 0])), obs=y)
            else:
                pyro.sample("obs", dist.Categorical(logits=z), obs=y)

    probs = logits.softmax(-1)
    marginal = probs.mean(0)
    information = (probs * (probs / marginal).log()).sum(-1).mean(0)
    found = predictive_moments(model, {"z": logits}, torch.zeros(3))["obs"]
    assert_close(found.epistemic, information, rtol=1e-9, atol=1e-12)
    assert_close(found.total, -(marginal * marginal.log()).sum(-1), rtol=1e-9)


def test_streaming_equals_the_whole() -> None:
    x, y = linear_data(23)
    draws = {"weight": torch.randn(9, 3)}
    whole = site_moments(posterior_predictive(linear_model, draws, (x, y))["obs"])
    loader = DataLoader(TensorDataset(x, y), batch_size=5)
    streamed = predictive_moments(linear_model, draws, loader)["obs"]
    for field in ("mean", "aleatoric", "epistemic", "log_density", "observed"):
        assert_close(getattr(streamed, field), getattr(whole, field), rtol=1e-10)
    dataset = predictive_moments(linear_model, draws, loader).to_dataset()
    assert dataset["obs_epistemic"].dims == ("data",)
    assert dataset.sizes == {"data": 23}


def test_draws_of_parts_of_the_data_run_together() -> None:
    """A model that broadcasts is run a few times for each part, however many draws there are."""
    calls = 0

    def model(x: Tensor, y: Tensor | None = None) -> None:
        nonlocal calls
        calls += 1
        linear_model(x, y)

    x, y = linear_data()
    draws = {"weight": torch.randn(100, 3)}
    parts = predictive_moments(model, draws, (x, y), batch_size=7)["obs"]
    assert calls < 60
    assert_close(parts.mean, predictive_moments(model, draws, (x, y))["obs"].mean, rtol=1e-12)
