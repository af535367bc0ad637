# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Importance weights against closed forms, and those of functions against the linearised density written by hand."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoNormal,
)
from pyro.nn import PyroModule
from torch import Tensor

from pyro_bnn import AutoLaplace, AutoLaplaceMixture, posterior_predictive
from pyro_bnn.infer import ChainResult
from pyro_bnn.infer.refine.forward_kl import forward_kl
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


def test_means_of_conditions_whole_numbers_and_impossible_draws() -> None:
    log_weights = torch.tensor([0.25, 0.75, 0.0]).log()
    draws = {"w": torch.tensor([-1.0, 2.0, math.inf])}
    found = ImportanceWeights(draws, log_weights, log_weights, 0.1, "latents", nonlinear)
    assert_close(found.mean(draws["w"] > 0), 0.75)
    assert_close(found.mean(torch.tensor([4, 8, 100])), 7.0)
    assert_close(found.mean(draws["w"]), 1.25)  # a draw of weight zero does not enter
    assert found.mean(draws["w"].float()).dtype == torch.float32


def test_what_has_no_density_is_refused() -> None:
    model, x, y = linear_regression(n=8)
    point = AutoLaplaceApproximation(model)  # a point: its draws are all the same, and their weights would be
    point(x, y)
    with pytest.raises(ValueError, match="AutoLaplaceApproximation has no density"):
        weights_of(model, point, (x, y), 20)
    draws = {"w": torch.zeros(20, 3)}
    for wrong, found in ((draws, "dict"), (ChainResult({"w": torch.zeros(1, 20, 3)}), "ChainResult")):
        with pytest.raises(ValueError, match=rf"needs a guide with a density.*found \['{found}'\]"):
            weights_of(model, wrong, (x, y), 20)
    with pytest.raises(ValueError, match="found an empty list"):
        weights_of(model, [], (x, y), 20)


def test_sites_that_the_model_does_not_sample_are_refused() -> None:
    model, x, y = linear_regression(n=8)

    def more(x: Tensor, y: Tensor | None = None) -> Tensor:
        pyro.sample("v", dist.Normal(0.0, 1.0))
        return model(x, y)

    guides = [AutoNormal(more), AutoNormal(model)]
    for guide in guides:
        guide(x, y)
    with pytest.raises(
        ValueError, match=r"the guide draws the sites \['v'\], to which the model gives no density"
    ):
        weights_of(model, guides[0], (x, y), 20)
    with pytest.raises(ValueError, match=r"draw different sites, \['v', 'w'\] and \['w'\]"):
        weights_of(more, guides, (x, y), 20)


def counts(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Counts with a skewed posterior: a positive factor and a line in the logarithm."""
    factor = pyro.sample("factor", dist.LogNormal(0.0, 0.7))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        rate = factor * (w[..., 0] * x + w[..., 1]).exp()
        return pyro.sample("obs", dist.Poisson(rate), obs=y)


def rates_by_metropolis(x: Tensor, y: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior means of rates and their standard errors by random walks, 1,000 side by side, in plain torch."""

    def parts(u: Tensor, at: Tensor) -> Tensor:
        return u[:, :1].exp() * (u[:, 1:2] * at + u[:, 2:]).exp()

    def log_p(u: Tensor) -> Tensor:
        prior = dist.Normal(0.0, torch.tensor([0.7, 1.0, 1.0])).log_prob(u).sum(-1)
        return prior + dist.Poisson(parts(u, x)).log_prob(y).sum(-1)

    u = 0.3 * torch.randn(1000, 3)
    value, total, steps = log_p(u), torch.zeros(1000, len(points)), 1200
    for step in range(steps):
        proposal = u + 0.5 * torch.randn_like(u)
        new = log_p(proposal)
        taken = torch.rand(1000).log() < new - value
        u, value = torch.where(taken.unsqueeze(-1), proposal, u), torch.where(taken, new, value)
        if step >= 400:
            total += parts(u, points) / (steps - 400)
    return total.mean(0), total.std(0) / math.sqrt(1000)


def test_weighted_predictions_agree_with_metropolis() -> None:
    """Means of rates under weights of a refined guide, and under the guide of draws, within 4 standard errors."""
    x, y = torch.linspace(-1, 1, 5), torch.tensor([0.0, 2.0, 1.0, 4.0, 5.0])
    points = torch.tensor([-1.5, 0.0, 1.5])
    expected, noise = rates_by_metropolis(x, y, points)
    laplace = AutoLaplace(counts).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    refined = forward_kl(counts, laplace, (x, y))
    assert refined.improved
    refined.guide.scale = 1.4 * refined.guide.scale  # covers the tails
    found = importance_weights(counts, refined.guide, (x, y), num_samples=10000)
    assert found.is_reliable
    w = found.draws["w"]
    rates = found.draws["factor"].unsqueeze(-1) * (w[:, :1] * points + w[:, 1:]).exp()
    mean = found.mean(rates)
    error = (found.weights.square() @ (rates - mean).square()).sqrt()
    assert bool(((mean - expected).abs() < 4 * (error.square() + noise.square()).sqrt()).all())
    assert bool((error < 0.05 * expected).all())  # or the comparison would say little
    guide = found.guide().initialize(x, y)
    predicted = posterior_predictive(counts, guide, (points,), num_samples=10000).mean.mean(0)
    # counts of draws are rounded, which moves a mean by no more than the error of so many draws
    spread = (found.weights @ (rates - mean).square()).sqrt()
    assert bool(((predicted - mean).abs() < 4 * spread / math.sqrt(10000)).all())
