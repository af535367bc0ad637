# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Refinement by the forward divergence against moments by quadrature, and what becomes of guides."""

import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

import pyro_bnn.infer.refine.forward_kl as module
from pyro_bnn import AutoLaplace, AutoLaplaceMixture, AutoMixture, posterior_predictive
from pyro_bnn.diagnostics import to_datatree
from pyro_bnn.infer import load_guide, save_guide
from pyro_bnn.infer.autoguide import AutoRescaled
from pyro_bnn.infer.refine.families import family_of
from pyro_bnn.infer.refine.forward_kl import Quality, RefinementWarning, exponent_of, forward_kl
from tests.common import assert_close

X = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
Y = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
SIZE = 2000


def model(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Logistic regression with four data: the posterior is skewed."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Bernoulli(logits=2 * (w[..., :1] * x + w[..., 1:])), obs=y)


def quadrature() -> tuple[Tensor, Tensor]:
    """Points and their shares of the posterior."""
    axis = torch.linspace(-12, 12, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    log_p = dist.Normal(0.0, 2.0).log_prob(grid).sum(-1)
    logits = 2 * (grid[:, :1] * X + grid[:, 1:])
    return grid, (log_p + dist.Bernoulli(logits=logits).log_prob(Y).sum(-1)).softmax(0)


def moments() -> tuple[Tensor, Tensor]:
    """The mean and covariance of the posterior, by quadrature."""
    grid, p = quadrature()
    mean = p @ grid
    return mean, (grid - mean).mT @ (p.unsqueeze(-1) * (grid - mean))


def laplace(**options: Any) -> AutoLaplace:
    guide = AutoLaplace(model, **options).initialize(X, Y)
    return guide.polish((X, Y)).laplace_approximation((X, Y))


def started(kind: Any, **options: Any) -> Any:
    guide = kind(model, **options)
    guide(X, Y)
    return guide


def moments_of(guide: Any) -> tuple[Tensor, Tensor]:
    draws = guide.get_posterior()
    if isinstance(draws, torch.distributions.MultivariateNormal):
        return draws.mean.detach(), draws.covariance_matrix.detach()
    return draws.mean.detach(), draws.variance.detach().diag()


@pytest.mark.parametrize(
    "guide",
    [laplace, lambda: started(AutoMultivariateNormal, init_scale=0.7), lambda: laplace(structure="diagonal"),
     lambda: started(AutoDiagonalNormal, init_scale=0.7)],
    ids=["full", "AutoMultivariateNormal", "diagonal", "AutoDiagonalNormal"],
)  # fmt: skip
def test_the_optimum_matches_moments(guide: Any) -> None:
    """
    The least forward divergence among Gaussians has the posterior's mean and covariance, among independent ones its variances.
    The error of the last round is that of about half the draws, 4 standard errors of which are allowed.
    """
    given = guide()
    found = forward_kl(model, given, (X, Y), num_samples=SIZE)
    assert found.improved
    mean, covariance = moments()
    sd = covariance.diagonal().sqrt()
    at, spread = moments_of(found.guide)
    error = 4 / math.sqrt(SIZE / 2)
    assert bool(((at - mean).abs() < error * sd).all())
    assert bool(((spread.diagonal() / covariance.diagonal() - 1).abs() < 2 * error).all())
    if isinstance(found.guide, AutoMultivariateNormal):
        assert abs(float((spread - covariance)[0, 1] / (sd[0] * sd[1]))) < 2 * error
    assert found.after.exponent > found.before.exponent
    assert found.gain > 0
    assert "refined" in repr(found)


def test_a_step_is_moment_matching() -> None:
    """One step from weights that are exact: a Gaussian guide under the ratios to another Gaussian."""
    guide = started(AutoMultivariateNormal, init_scale=1.0)
    family = family_of(guide, ((X, Y), {}))
    posterior = guide.get_posterior()
    before = posterior.mean.detach().clone()
    target = torch.distributions.MultivariateNormal(
        posterior.mean.detach() + 0.2, torch.tensor([[1.1, 0.3], [0.3, 0.8]])
    )
    draws = posterior.sample((200000,))
    log_ratios = target.log_prob(draws) - posterior.log_prob(draws)
    family.update({"w": draws}, log_ratios.softmax(0))
    after = family.guide.get_posterior()
    assert_close(after.mean.detach(), target.mean, atol=4 * 1.5 / math.sqrt(200000))
    assert_close(after.covariance_matrix.detach(), target.covariance_matrix, atol=4 * 3 / math.sqrt(200000))
    assert not torch.allclose(before, target.mean)


def test_constant_weights_move_nothing() -> None:
    for guide in (started(AutoMultivariateNormal), started(AutoNormal)):
        family = family_of(guide, ((X, Y), {}))
        before = family.state()
        family.update({"w": torch.randn(50, 2)}, torch.full((50,), 1 / 50))
        for now, then in zip(family.parameters, before, strict=True):
            assert_close(now, then, atol=1e-12)


def test_gradients_reach_the_moments() -> None:
    """Gradient steps on a low-rank guide of full rank end where the closed form does."""
    found = forward_kl(
        model, started(AutoLowRankMultivariateNormal, init_scale=0.7, rank=2), (X, Y), num_samples=SIZE
    )
    mean, covariance = moments()
    at = found.guide.get_posterior()
    sd = covariance.diagonal().sqrt()
    assert found.improved
    assert bool(((at.mean - mean).abs() < 8 / math.sqrt(SIZE / 2) * sd).all())


@pytest.mark.parametrize(
    "guide",
    [lambda: laplace(structure="kronecker"),
     lambda: AutoLaplaceMixture(model, 2).initialize(X, Y).polish((X, Y)).laplace_approximation((X, Y)),
     lambda: AutoMixture(model, 2, init_scale=0.5).initialize(X, Y), lambda: started(AutoNormal, init_scale=0.5)],
    ids=["kronecker", "mixture", "AutoMixture", "AutoNormal"],
)  # fmt: skip
def test_refined_guides_go_through_every_door(guide: Any, tmp_path: Path) -> None:
    """They have gained, predict by the model, export, and load into a guide that was built like them."""
    given = guide()
    before = {name: value.clone() for name, value in given.state_dict().items()}
    found = forward_kl(model, given, (X, Y), num_samples=1000)
    assert found.improved
    assert found.gain > 0
    refined = found.guide
    assert (refined is given) == (not isinstance(refined, AutoRescaled))
    if refined is not given:  # a Laplace approximation stays as it was
        for name, value in given.state_dict().items():
            assert_close(value, before[name])
    assert refined.model is given.model
    prediction = posterior_predictive(model, refined, (X,), num_samples=50)
    w = prediction.draws["w"]
    assert_close(prediction.mean, (2 * (w[:, :1] * X + w[:, 1:])).sigmoid())
    assert "log_q" in to_datatree(model, refined, (X, Y), num_samples=20)["sample_stats"]
    save_guide(refined, tmp_path / "guide.pt")
    fresh = (
        AutoRescaled(type(given)(model, **options_of(given)))
        if isinstance(refined, AutoRescaled)
        else type(refined)(model, *([2] if isinstance(refined, AutoMixture) else []))
    )
    loaded = load_guide(fresh, tmp_path / "guide.pt")
    if isinstance(refined, AutoRescaled):
        assert_close(loaded.get_posterior().log_prob(w), refined.get_posterior().log_prob(w))
        assert bool((refined.quantiles([0.1])["w"] < refined.median()["w"]).all())
    else:
        assert_close(loaded.median()["w"], refined.median()["w"])


def options_of(guide: Any) -> dict[str, Any]:
    if isinstance(guide, AutoLaplaceMixture):
        return {"num_components": 2}
    return {"structure": guide.structure, "rank": guide.rank}


def test_the_rescaled_guide_starts_as_the_other() -> None:
    mixture = AutoLaplaceMixture(model, 2).initialize(X, Y)
    mixture.set_modes([{"w": torch.zeros(2)}, {"w": torch.ones(2)}]).laplace_approximation((X, Y))
    guide = AutoRescaled(mixture).initialize(X, Y)
    points = torch.randn(20, 2)
    assert_close(guide.get_posterior().log_prob(points), mixture.posterior.log_prob(points))
    guide.loc.data += 1.0
    guide.scale = torch.full((2, 2), 3.0)
    parts = [
        torch.distributions.MultivariateNormal(part.loc + 1, 9 * torch.linalg.inv(part.precision))
        for part in mixture.components
    ]
    expected = torch.stack([part.log_prob(points) for part in parts]).logsumexp(0) - math.log(2)
    assert_close(guide.get_posterior().log_prob(points), expected, rtol=1e-6)
    draws = guide.get_posterior().sample((20000,))
    assert bool(
        ((draws.mean(0) - guide.get_posterior().mean).abs() < 4 * draws.std(0) / math.sqrt(20000)).all()
    )


def test_a_good_guide_stays() -> None:
    """Nothing can be gained on the posterior itself, and no warning says so."""

    def linear(x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(w * x, 0.5), obs=y)

    guide = AutoLaplace(linear).initialize(X, Y).polish((X, Y)).laplace_approximation((X, Y))
    found = forward_kl(linear, guide, (X, Y), num_samples=200)
    assert found.guide is guide
    assert not found.improved
    assert abs(found.gain) < 1e-8
    assert "as good" in found.reason


def test_a_guide_that_gets_worse_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that ruins the guide leaves it as it was, and a warning says so."""

    def ruin(density: Any, family: Any, *rest: Any) -> list[Quality]:
        family.guide.loc.data -= 5.0
        return []

    monkeypatch.setattr(module, "_search", ruin)
    guide = started(AutoDiagonalNormal, init_scale=0.7)
    before = guide.loc.detach().clone()
    with pytest.warns(RefinementWarning, match="the guide is as it was"):
        found = forward_kl(model, guide, (X, Y))
    assert found.guide is guide
    assert not found.improved
    assert_close(guide.loc, before)


def test_exponent_of_normal_ratios() -> None:
    """Of log ratios with a normal spread s, the fraction exp(-s^2) is effective."""
    ratios = 5 * torch.randn(200000)
    assert abs(exponent_of(ratios, 100000) * 5 - math.sqrt(math.log(2))) < 0.01
    assert exponent_of(torch.zeros(10), 5) == 100


def test_refusals() -> None:
    with pytest.raises(ValueError, match="num_samples must be a whole number of at least 50"):
        forward_kl(model, laplace(), (X, Y), num_samples=10)
    with pytest.raises(ValueError, match="holds some latents at their point estimates"):
        forward_kl(model, laplace(sites=torch.tensor([True, False])), (X, Y))

    def by_hand(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(TypeError, match="a guide that is a module"):
        forward_kl(model, by_hand, (X, Y), num_samples=50)
    with pytest.raises(
        TypeError, match="needs a Laplace approximation or a mixture of them, found AutoNormal"
    ):
        AutoRescaled(AutoNormal(model))  # type: ignore[arg-type]

    with pytest.raises(TypeError, match=r"needs a guide that is a module.*found list"):
        forward_kl(model, [started(AutoNormal), started(AutoNormal)], (X, Y), num_samples=50)


def test_one_round_is_one_step() -> None:
    """The only step moves the guide towards the mean of the posterior, and is looked at."""
    guide = started(AutoMultivariateNormal, init_scale=1.5)
    before = guide.loc.detach().clone()
    found = forward_kl(model, guide, (X, Y), num_samples=SIZE, num_rounds=1)
    mean, _ = moments()
    assert found.improved
    assert len(found.rounds) == 2
    assert found.rounds[1].exponent > found.rounds[0].exponent
    assert float((guide.loc.detach() - mean).norm()) < float((before - mean).norm())


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_frozen_parameters_stay(kind: Any) -> None:
    """With the location frozen away from the mean, the best variance is that around the location."""
    guide = started(kind, init_scale=1.5)
    loc = next(p for name, p in guide.named_parameters() if "loc" in name)
    loc.requires_grad_(False)
    before = loc.clone()
    found = forward_kl(model, guide, (X, Y), num_samples=SIZE)
    assert found.improved
    assert torch.equal(loc, before)
    grid, p = quadrature()
    expected, fourth = (p @ (grid - before).pow(power) for power in (2, 4))
    variance = guide.scales.w.square() if kind is AutoNormal else moments_of(guide)[1].diagonal()
    error = ((fourth - expected.square()) / (SIZE / 2)).sqrt()  # of half the draws, as above
    assert bool(((variance - expected).abs() < 4 * error).all())


def cut(least: float) -> Any:
    """An observation of 1 with unit noise, of a standard normal that is at least so large."""

    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.factor("cut", torch.where(w > least, 0.0 * w, -math.inf))
        pyro.sample("obs", dist.Normal(w, 1.0), obs=y)

    guide = AutoDiagonalNormal(
        model, init_loc_fn=init_to_value(values={"w": torch.tensor(0.5)}), init_scale=1.0
    )
    guide(torch.tensor(1.0))
    return model, guide


def test_impossible_draws() -> None:
    """The moments of a normal that is cut at zero, where a third of the draws have no density."""
    shape, guide = cut(0.0)
    found = forward_kl(shape, guide, (torch.tensor(1.0),), num_samples=SIZE)
    standard, s = torch.distributions.Normal(0.0, 1.0), math.sqrt(0.5)
    a = torch.tensor(-0.5 / s)
    ratio = standard.log_prob(a).exp() / (1 - standard.cdf(a))
    variance = 0.5 * (1 + a * ratio - ratio**2)
    error = 4 / math.sqrt(SIZE / 2)
    assert found.improved
    assert abs(float(guide.loc.detach() - (0.5 + s * ratio))) < error * float(variance.sqrt())
    assert abs(float(guide.scale.detach().square() / variance) - 1) < 2 * error


def test_too_many_impossible_draws_are_refused() -> None:
    shape, guide = cut(2.5)
    with pytest.raises(
        ValueError, match="of 1000 draws of the guide are possible under the model, and a step needs 100"
    ):
        forward_kl(shape, guide, (torch.tensor(1.0),))
