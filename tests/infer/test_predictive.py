# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from torch.utils.data import DataLoader, TensorDataset

from pyro_bnn.infer.predict.draws import posterior_draws
from pyro_bnn.infer.predict.predictive import posterior_predictive
from tests.common import assert_close
from tests.infer.models import NOISE, TextbookNet, linear_data, linear_model, linear_posterior

GUIDES = [
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
]


def hierarchical(x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
    """Latents in a plate, a constrained scalar, an event dim, and two observed sites."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.1))
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("groups", 2, dim=-2):
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            mean = (x * weight).sum(-1) + offset
            obs = pyro.sample("obs", dist.Normal(mean, scale), obs=None if y is None else y.expand(2, -1))
    with pyro.plate("classes", len(x)):
        first = weight[..., 0] * x[:, 0]
        pyro.sample(
            "label",
            dist.Categorical(logits=torch.stack(torch.broadcast_tensors(first, x[:, 1], x[:, 2]), -1)),
            obs=None if y is None else (y > 0).long(),
        )
    return obs


@pytest.mark.parametrize("auto_class", GUIDES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("model", [linear_model, hierarchical], ids=["linear", "hierarchical"])
def test_joint_run_equals_loop(auto_class: Any, model: Any) -> None:
    x, y = linear_data(7)
    guide = auto_class(model)
    guide(x, y)
    draws = posterior_draws(guide, 5, ((x, y), {}))
    joint = posterior_predictive(model, guide, (x, y), draws=draws, vectorize=True)
    loop = posterior_predictive(model, guide, (x, y), draws=draws, vectorize=False)
    assert joint.vectorized
    assert not loop.vectorized
    assert set(joint) == set(loop) == ({"obs"} if model is linear_model else {"obs", "label"})
    for name, site in loop.items():
        assert joint[name].dims == site.dims
        for field in ("mean", "variance", "log_likelihood", "observed"):
            assert_close(getattr(joint[name], field), getattr(site, field), rtol=1e-10, atol=1e-12)
        assert joint[name].samples.shape == site.samples.shape


def test_values_by_hand() -> None:
    x, y = linear_data(7)
    weights = torch.randn(4, 3)
    found = posterior_predictive(linear_model, {"weight": weights}, (x, y))
    mean = weights @ x.T
    assert found.vectorized
    assert_close(found.mean, mean, rtol=1e-10)
    assert_close(found.variance, torch.full_like(mean, NOISE**2), rtol=1e-10)
    assert_close(found.log_likelihood, dist.Normal(mean, NOISE).log_prob(y), rtol=1e-10)
    assert_close(found.observed, y)
    assert_close(found.draws["weight"], weights)


def test_a_generator_decides_all_draws() -> None:
    x = torch.randn(6, 3)
    weights = {"weight": torch.randn(5, 3)}
    state = torch.get_rng_state()
    first, again, other = (
        posterior_predictive(
            linear_model, weights, (x,), generator=torch.Generator().manual_seed(seed)
        ).samples
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_predictive_distribution_of_linear_regression() -> None:
    x, y = linear_data()
    mean, covariance = linear_posterior(x, y)
    weights = torch.distributions.MultivariateNormal(mean, covariance).sample((20000,))
    test_x = torch.randn(5, 3)
    found = posterior_predictive(linear_model, {"weight": weights}, (test_x,))
    assert found.log_likelihood is None
    variance = (test_x @ covariance * test_x).sum(-1) + NOISE**2
    assert_close(found.samples.mean(0), test_x @ mean, atol=0.02, rtol=0)
    assert_close(found.samples.var(0), variance, rtol=0.05)


def test_textbook_network_falls_back_to_the_loop() -> None:
    x, y = linear_data(7)
    net = TextbookNet()
    weights = {"linear.weight": torch.randn(4, 1, 3), "linear.bias": torch.randn(4, 1)}
    found = posterior_predictive(net, weights, (x, y))
    assert not found.vectorized
    assert_close(found.mean, weights["linear.weight"][:, 0] @ x.T + weights["linear.bias"], rtol=1e-10)
    with pytest.raises(ValueError, match="does not broadcast"):
        posterior_predictive(net, weights, (x, y), vectorize=True)


def test_wrong_broadcast_is_detected() -> None:
    """A model that runs with leading dims, but mixes draws, must not be vectorised."""
    x, y = linear_data(7)

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((x * weight).sum(-1) + weight.mean(), 1.0), obs=y)

    weights = torch.randn(4, 3)
    found = posterior_predictive(model, {"weight": weights}, (x, y))
    assert not found.vectorized
    assert_close(found.mean, weights @ x.T + weights.mean(-1, keepdim=True), rtol=1e-10)


@pytest.mark.parametrize(("dtype", "part"), [(torch.float32, 4e-4), (torch.float64, 1e-8)])
def test_a_slight_mixing_of_draws_is_no_rounding(dtype: torch.dtype, part: float) -> None:
    """Beside copies of itself a draw shows how large rounding is, which is far less."""
    x, y = torch.linspace(-1, 1, 7, dtype=dtype), torch.full((7,), 2.0, dtype=dtype)

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros((), dtype=dtype), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x * weight + part * weight.mean(), 1.0), obs=y)

    weights = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=dtype)
    found = posterior_predictive(model, {"weight": weights}, (x, y))
    assert not found.vectorized
    assert_close(found.mean, weights[:, None] * (x + part), rtol=1e-6)


def test_rounding_that_a_network_magnifies_is_no_mixing() -> None:
    """Means of large terms that cancel: products of one and of several draws round differently, by more than the last places."""
    torch.manual_seed(0)
    x = 200 * torch.randn(20, 512, dtype=torch.float32)
    weights = torch.randn(512, dtype=torch.float32) + 5e-6 * torch.randn(5, 512, dtype=torch.float32)

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        prior = dist.Normal(torch.zeros(512, dtype=torch.float32), 1.0).to_event(1)
        weight = pyro.sample("weight", prior)
        mean = weight @ x.T
        mean = mean.squeeze(-2) if mean.dim() > 1 else mean
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    y = x @ weights[0] + torch.randn(20, dtype=torch.float32)
    assert posterior_predictive(model, {"weight": weights}, (x, y)).vectorized


@pytest.mark.parametrize("how", ["batch_size", "loader", "max_memory"])
def test_pieces_equal_the_whole(how: str) -> None:
    x, y = linear_data(23)
    draws = {"weight": torch.randn(9, 3)}
    whole = posterior_predictive(linear_model, draws, (x, y))
    if how == "batch_size":
        pieces = posterior_predictive(linear_model, draws, (x, y), batch_size=5)
    elif how == "loader":
        pieces = posterior_predictive(linear_model, draws, DataLoader(TensorDataset(x, y), batch_size=5))
    else:
        pieces = posterior_predictive(linear_model, draws, (x, y), max_memory=1.0, vectorize=True)
    for field in ("mean", "variance", "log_likelihood", "observed"):
        assert_close(getattr(pieces["obs"], field), getattr(whole["obs"], field), rtol=1e-10)
    assert pieces.samples.shape == whole.samples.shape


def test_subsampled_plate_does_not_scale_the_log_likelihood() -> None:
    x, y = linear_data(10)

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 1000, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal((x * weight).sum(-1), 1.0), obs=y)

    weights = torch.randn(4, 3)
    for vectorize in (True, False):
        found = posterior_predictive(model, {"weight": weights}, (x, y), vectorize=vectorize)
        assert_close(found.log_likelihood, dist.Normal(weights @ x.T, 1.0).log_prob(y), rtol=1e-10)


def test_linearised_guides_are_asked() -> None:
    """A guide with ``observed_distributions`` replaces the model's distribution given the draws."""
    x, y = linear_data(6)
    draws = {"weight": torch.randn(4, 3)}

    class Linearized:
        def sample_posterior(self, sample_shape: Any, *args: Any, **kwargs: Any) -> Any:
            return draws

        def observed_distributions(self, draws: Any, x: torch.Tensor, y: Any = None) -> Any:
            return {"obs": dist.Normal(draws["weight"] @ x.T + 1.0, 2.0)}

    found = posterior_predictive(linear_model, Linearized(), (x, y))
    assert_close(found.mean, draws["weight"] @ x.T + 1.0)
    assert_close(found.log_likelihood, dist.Normal(found.mean, 2.0).log_prob(y))


def test_mcmc() -> None:
    x, y = linear_data()
    mcmc = MCMC(NUTS(linear_model), num_samples=300, warmup_steps=100, disable_progbar=True)
    mcmc.run(x, y)
    found = posterior_predictive(linear_model, mcmc, (x, y), num_samples=150)
    mean, _ = linear_posterior(x, y)
    assert found.mean.shape == (150, 40)
    assert_close(found.mean.mean(0), x @ mean, atol=0.15, rtol=0)


def test_guide_list_and_function() -> None:
    x, y = linear_data(6)

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        pyro.sample("other", dist.Normal(0.0, 1.0))
        linear_model(x, y)

    guide = AutoGuideList(model)
    guide.append(AutoNormal(pyro.poutine.block(model, hide=["other"])))
    guide.append(AutoDelta(pyro.poutine.block(model, expose=["other"])))
    guide(x, y)
    assert posterior_predictive(model, guide, (x, y), num_samples=4).mean.shape == (4, 6)

    def function(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    assert posterior_predictive(linear_model, function, (x, y), num_samples=4).mean.shape == (4, 6)


def test_evaluation_mode_and_back() -> None:
    net = TextbookNet()
    net.dropout = torch.nn.Dropout()
    net.linear.eval()
    seen = []
    net.register_forward_pre_hook(lambda module, args: seen.append(module.dropout.training))
    posterior_predictive(net, AutoNormal(net), linear_data(4), num_samples=3)
    assert not any(seen)
    assert net.dropout.training
    assert not net.linear.training


def test_networks_that_a_function_calls_are_in_evaluation_mode() -> None:
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout())
    net(torch.randn(50, 3) * 2 + 1)
    net[1].eval()
    mean, var = net[0].running_mean.clone(), net[0].running_var.clone()

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        f = (net(x) * weight).sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, 1.0), obs=y)

    x, weight = torch.randn(6, 3), torch.randn(4, 3)
    expected = weight @ ((x - mean) / (var + 1e-5).sqrt()).T
    for vectorize in (True, False):
        found = posterior_predictive(model, {"weight": weight}, (x,), vectorize=vectorize).mean
        assert_close(found, expected.detach())
    assert torch.equal(net[0].running_mean, mean)
    assert [net.training, net[0].training, net[1].training] == [True, True, False]


def test_dataset_has_named_dims() -> None:
    x, y = linear_data(6)
    draws = {
        "scale": torch.ones(4),
        "weight": torch.randn(4, 3),
        "offset": torch.randn(4, 2, 1),
    }
    dataset = posterior_predictive(hierarchical, draws, (x, y)).to_dataset()
    assert dataset["obs"].dims == ("draw", "groups", "data")
    assert dataset["obs_log_likelihood"].shape == (4, 2, 6)
    assert dataset["label_mean"].dims == ("draw", "classes", "label_class")
    assert dataset["label_observed"].dims == ("classes",)


def test_draws_are_spread_evenly() -> None:
    draws = {"weight": torch.arange(10.0)[:, None].expand(10, 3)}
    assert posterior_draws(draws, 4)["weight"][:, 0].tolist() == [0, 3, 6, 9]
    with pytest.raises(ValueError, match="10 draws only"):
        posterior_draws(draws, 11)
    with pytest.raises(ValueError, match="same number of draws"):
        posterior_draws({"a": torch.zeros(2), "b": torch.zeros(3)})


def test_draws_of_other_sites_are_refused() -> None:
    """They would be ignored in silence, and the predictions be those of the prior."""
    x, y = linear_data(5)
    draws = torch.randn(4, 3)
    for data in ((x, y), (x,)):
        with pytest.raises(ValueError, match=r"draws of \['weights'\].*none of \['weight'"):
            posterior_predictive(linear_model, {"weights": draws}, data)
    # what a guide draws beside the sites of the model does no harm
    extra = posterior_predictive(linear_model, {"weight": draws, "unused": torch.zeros(4)}, (x, y))
    assert_close(extra.mean, draws @ x.T)
    with pytest.raises(ValueError, match="num_samples must be a whole number of at least 1, found 0"):
        posterior_predictive(linear_model, AutoNormal(linear_model), (x, y), num_samples=0)


def test_draws_that_lack_a_latent_site() -> None:
    """The site comes from its prior, anew in every run: that is said, and it is what happens."""
    x, y = linear_data(5)
    torch.manual_seed(0)
    full = {"weight": torch.randn(2000, 3), "scale": torch.ones(2000), "offset": torch.zeros(2000, 2, 1)}
    posterior_predictive(hierarchical, full, (x, y))
    part = {name: value for name, value in full.items() if name != "offset"}
    with pytest.warns(UserWarning, match=r"no draws of \['offset'\]") as record:
        found = posterior_predictive(hierarchical, part, (x, y))["obs"]
    assert len(record) == 1
    assert found.mean is not None
    offset = found.mean - (part["weight"] @ x.T)[:, None]
    assert_close(offset.var(0), torch.ones(2, 5), rtol=0.15)  # 2000 draws: 4.7 standard errors


def test_sites_that_are_predicted_are_not_missing() -> None:
    """Of two outputs the first is to be predicted, and a Delta has no prior to come from: no warning."""
    x, y = linear_data(5)

    def model(x: torch.Tensor, first: torch.Tensor | None = None, second: torch.Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        shift = pyro.sample("shift", dist.Delta(torch.tensor(1.0)))
        mean = (x * weight).sum(-1) + shift
        with pyro.plate("data", len(x)):
            pyro.sample("first", dist.Normal(mean, 1.0), obs=first)
            pyro.sample("second", dist.Normal(mean, NOISE), obs=second)

    draws = torch.randn(4, 3)
    found = posterior_predictive(model, {"weight": draws}, (x, None, y))
    assert_close(found["second"].log_likelihood, dist.Normal(draws @ x.T + 1, NOISE).log_prob(y))
