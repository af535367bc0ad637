# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Importance weights against closed forms, and those of functions against the linearised density written by hand."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoGuideList, AutoNormal
from pyro.nn import PyroModule
from torch import Tensor

from pyro_bnn import AutoLaplace, AutoLaplaceMixture, posterior_predictive
from pyro_bnn.infer.refine.importance import ImportanceWarning, ImportanceWeights, importance_weights, weigh
from pyro_bnn.infer.sample.log_density import log_density
from tests.common import assert_close
from tests.models import linear_regression

X = torch.linspace(-2, 2, 12, dtype=torch.float64)
Y = (X + 0.3 * X.flip(0).square() > 0.5).double()


def weights_of(model: Any, guide: Any, data: Any, size: int, space: Any = "latents") -> ImportanceWeights:
    """Weights without a warning."""
    return weigh(log_density(model, data), guide, data, size, space)


def curve(x: Tensor, w: Tensor) -> Tensor:
    return 2 * torch.sin(w[..., :1] * x) + w[..., 1:]


def nonlinear(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Two weights and a logit that is no linear function of them."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Bernoulli(logits=curve(x, w).reshape(w.shape[:-2] + x.shape)), obs=y)


def gaussian(scale: float) -> Any:
    """A guide N(0, scale^2 I) of two standard normals."""

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = AutoDiagonalNormal(model)
    guide()
    guide.loc.data.zero_()
    guide.scale = torch.full((2,), scale)
    return model, guide


@pytest.mark.parametrize("space", ["latents", "functions"])
def test_the_posterior_itself_has_constant_weights(space: Any) -> None:
    model, x, y = linear_regression()
    guide = AutoLaplace(model).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    found = importance_weights(model, guide, (x, y), num_samples=200, space=space)
    assert float(found.log_ratios.std()) < 1e-7
    assert_close(found.log_ratios[0], guide.log_evidence(), rtol=1e-8)
    assert_close(found.effective_sample_size, 200.0, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.9, 0.6, 0.4])
def test_shape_of_a_narrow_gaussian(scale: float) -> None:
    """
    In two dimensions the log ratio of N(0, I) to N(0, s^2 I) is (1 - s^2) times an exponential variable: a Pareto tail with
    exactly the shape 1 - s^2. The standard error is that of the fit, (1 + k) / sqrt(tail).
    """
    model, guide = gaussian(scale)
    size, shape = 20000, 1 - scale**2
    found = weights_of(model, guide, (), size)
    assert abs(found.k_hat - shape) < 4 * (1 + shape) / math.sqrt(3 * math.sqrt(size))


def test_unreliable_weights_warn() -> None:
    model, guide = gaussian(0.3)
    with pytest.warns(ImportanceWarning, match="k-hat is .*above 0.67 for 1000 draws"):
        found = importance_weights(model, guide, (), num_samples=1000)
    assert not found.is_reliable
    assert "not reliable" in repr(found)


def test_moments_of_a_posterior_by_quadrature() -> None:
    guide = AutoLaplace(nonlinear).initialize(X, Y).polish((X, Y)).laplace_approximation((X, Y))
    found = weights_of(nonlinear, guide, (X, Y), 20000)
    grid = torch.cartesian_prod(torch.linspace(-5, 5, 401), torch.linspace(-8, 8, 401))
    log_p = dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).log_prob(grid).sum(-1)
    log_p = log_p + dist.Bernoulli(logits=curve(X, grid)).log_prob(Y).sum(-1)
    p = log_p.softmax(0)
    # the guide stands at one of the two modes, u and -u in the first weight with another offset: what both share by weights
    inside = grid[:, 0] * guide.loc.detach()[0] > 0
    p = torch.where(inside, p, 0.0) / p[inside].sum()
    mine = found.draws["w"][:, 0] * guide.loc.detach()[0] > 0
    weights = torch.where(mine, found.weights, 0.0)
    weights = weights / weights.sum()
    for power in (1, 2):
        values = found.draws["w"].pow(power)
        mean = weights @ values
        error = (weights.square() @ (values - mean).square()).sqrt()
        expected = p @ grid.pow(power)
        assert bool(((mean - expected).abs() < 4 * error).all())


def linearised_ratio(guide: Any, draws: Tensor) -> Tensor:
    """The log ratio of the linearised posterior, unnormalised, to the guide, by plain torch."""
    mode = guide.loc.detach()
    slopes = torch.autograd.functional.jacobian(lambda w: curve(X, w), mode)
    logits = curve(X, mode) + (draws - mode) @ slopes.mT
    log_p = dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).log_prob(draws).sum(-1)
    return log_p + dist.Bernoulli(logits=logits).log_prob(Y).sum(-1) - guide.posterior.log_prob(draws)


@pytest.mark.parametrize("structure", ["full", "diagonal", "kronecker", "low_rank"])
def test_ratios_of_functions_by_hand(structure: Any) -> None:
    guide = AutoLaplace(nonlinear, structure=structure, rank=1).initialize(X, Y).polish((X, Y))
    guide.laplace_approximation((X, Y))
    found = weights_of(nonlinear, guide, (X, Y), 50, "functions")
    assert_close(found.log_ratios, linearised_ratio(guide, found.draws["w"]), rtol=1e-9)


def test_ratios_of_functions_depend_on_functions_alone() -> None:
    """With the full matrix and a Gaussian prior: the likelihood less its quadratic expansion, whatever the prior."""
    guide = AutoLaplace(nonlinear).initialize(X, Y).polish((X, Y)).laplace_approximation((X, Y))
    found = weights_of(nonlinear, guide, (X, Y), 50, "functions")
    mode = guide.loc.detach()
    slopes = torch.autograd.functional.jacobian(lambda w: curve(X, w), mode)
    at, moved = curve(X, mode), (found.draws["w"] - mode) @ slopes.mT
    p = at.sigmoid()
    expected = (
        dist.Bernoulli(logits=at + moved).log_prob(Y) - (Y - p) * moved + 0.5 * p * (1 - p) * moved.square()
    )
    difference = found.log_ratios - expected.sum(-1)
    assert_close(difference, difference.mean().expand(50), atol=1e-6)


def test_ratios_of_functions_over_batches_scales_and_masks() -> None:
    """Batches of a subsampled plate, a scale and a mask count as they do in the model."""
    keep = torch.arange(12) % 3 > 0

    def model(x: Tensor, y: Tensor | None = None, keep: Tensor = keep) -> Tensor:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with (
            pyro.plate("data", 12, subsample_size=len(x)),
            pyro.poutine.scale(scale=0.5),
            pyro.poutine.mask(mask=keep),
        ):
            return pyro.sample("obs", dist.Bernoulli(logits=w[..., 0:1] * x + w[..., 1:]), obs=y)

    parts = [(X[:5], Y[:5], keep[:5]), (X[5:], Y[5:], keep[5:])]
    guide = AutoLaplace(model).initialize(X, Y, keep).polish((X, Y, keep)).laplace_approximation((X, Y, keep))
    seeds = [torch.Generator().manual_seed(0) for _ in range(3)]
    whole = importance_weights(model, guide, (X, Y, keep), space="functions", generator=seeds[0])
    split = importance_weights(model, guide, parts, space="functions", generator=seeds[1])
    latent = importance_weights(model, guide, (X, Y, keep), generator=seeds[2])
    assert_close(split.log_ratios, whole.log_ratios, rtol=1e-9)
    assert_close(latent.log_ratios, whole.log_ratios, rtol=1e-9)  # a linear model


def test_weighted_draws_predict() -> None:
    """The mean under resampled draws and under the guide of draws is the weighted mean."""
    model, x, y = linear_regression(n=8)
    guide = AutoDiagonalNormal(model)
    guide(x, y)
    exact = AutoLaplace(model).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    guide.loc.data = exact.loc.detach() + 0.05
    guide.scale = exact.posterior.variance.sqrt() * 1.3
    found = importance_weights(model, guide, (x, y), num_samples=4000)
    assert found.is_reliable
    spread = (found.weights @ (found.draws["w"] - exact.loc.detach()).square()).sqrt()
    assert bool(
        (
            (found.mean(found.draws["w"]) - exact.loc).abs() < 4 * spread / found.effective_sample_size**0.5
        ).all()
    )
    resampled = found.resample(4000)["w"]
    assert bool(((resampled.mean(0) - found.mean(found.draws["w"])).abs() < 0.02 * spread).all())
    predicted = posterior_predictive(model, found.guide().initialize(x, y), (x,), num_samples=4000)
    assert_close(predicted.mean.mean(0), x @ resampled.mean(0), atol=1e-3)


def test_guides_in_a_list_are_a_mixture() -> None:
    model, x, y = linear_regression(n=8)
    guides = []
    for shift in (-0.2, 0.2):
        guide = AutoDiagonalNormal(model)
        guide(x, y)
        guide.loc.data += shift
        guides.append(guide)
    found = weights_of(model, guides, (x, y), 10)
    w = found.draws["w"]
    log_q = torch.stack([guide.get_posterior().log_prob(w) for guide in guides]).logsumexp(0) - math.log(2)
    log_p = dist.Normal(0.0, 2.0).log_prob(w).sum(-1) + dist.Normal(w @ x.mT, 0.3).log_prob(y).sum(-1)
    assert_close(found.log_ratios, (log_p - log_q).detach())
    with pytest.raises(ValueError, match="num_samples=9 is no multiple of the number of guides, 2"):
        importance_weights(model, guides, (x, y), num_samples=9)


def test_refusals() -> None:
    model, x, y = linear_regression(n=8)
    laplace = AutoLaplace(model).initialize(x, y)
    with (
        pytest.raises(ValueError, match="AutoLaplace has no density"),
        pytest.warns(UserWarning, match="point"),
    ):
        weights_of(model, laplace, (x, y), 10)
    delta, normal = AutoDelta(model), AutoNormal(model)
    delta(x, y), normal(x, y)
    with pytest.raises(ValueError, match="AutoDelta has no density"):
        weights_of(model, delta, (x, y), 10)
    with pytest.raises(ValueError, match="space must be 'latents' or 'functions'"):
        importance_weights(model, normal, (x, y), space="weights")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="needs a guide with a linearised model, such as AutoLaplace, found AutoNormal"
    ):
        importance_weights(model, normal, (x, y), space="functions")
    mixture = AutoLaplaceMixture(model, 2).initialize(x, y).laplace_approximation((x, y))
    with pytest.raises(ValueError, match=r"weigh guide\.components one by one"):
        importance_weights(model, mixture, (x, y), space="functions")
    laplace.polish((x, y)).laplace_approximation((x, y))
    with pytest.raises(ValueError, match="predicts by the model itself"):
        weights_of(model, laplace, (x, y), 10, "functions").guide()
    with pytest.raises(ValueError, match=r"values has shape \(9,\), expected \(S, ...\) with S = 10"):
        weights_of(model, laplace, (x, y), 10).mean(torch.zeros(9))


def test_missing_and_impossible() -> None:
    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(a + b, 1.0), obs=y)

    guide = AutoNormal(pyro.poutine.block(model, hide=["b"]))
    guide(torch.zeros(3))
    with pytest.raises(ValueError, match=r"no draws of the sites \['b'\]"):
        weights_of(model, guide, (torch.zeros(3),), 10)
    both = AutoGuideList(model)
    both.append(AutoNormal(pyro.poutine.block(model, hide=["b"])))
    both.append(AutoNormal(pyro.poutine.block(model, hide=["a"])))
    both(torch.zeros(3))
    assert weights_of(model, both, (torch.zeros(3),), 20).log_ratios.shape == (20,)

    def shut(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.factor("shut", -math.inf * (1 + 0 * a))
        pyro.sample("obs", dist.Normal(a, 1.0), obs=y)

    alone = AutoNormal(shut)
    alone(torch.tensor(0.0))
    with pytest.raises(ValueError, match="log ratios lie between -inf and -inf"):
        weights_of(shut, alone, (torch.tensor(0.0),), 10)


class Module(PyroModule):  # a module in training mode, whose dropout would make the density random
    def __init__(self) -> None:
        super().__init__()
        self.drop = torch.nn.Dropout(0.9)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(self.drop(w * x), 1.0), obs=y)


def test_modules_are_evaluated() -> None:
    model = Module()
    guide = AutoLaplace(model).initialize(X, Y).polish((X, Y)).laplace_approximation((X, Y))
    assert float(weights_of(model, guide, (X, Y), 50).log_ratios.std()) < 1e-7
