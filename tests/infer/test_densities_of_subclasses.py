# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""A subclass of a known distribution with a density of its own is not treated as its parent."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_bnn.infer import Mixture_ELBO, hfl, predictive_moments
from pyro_bnn.infer.autoguide import AutoLaplace, AutoMixture
from pyro_bnn.nn import bayesian_
from pyro_bnn.ops.fisher import FisherRule, fisher_rule, register_fisher, rule
from tests.common import assert_close

_unit = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)


class Truncated(dist.Normal):
    """A Normal above zero that still draws as the whole one."""

    support = dist.constraints.positive

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) - _unit.cdf(self.loc / self.scale).log()


class TruncatedWithDraws(dist.Normal):
    """The same with its own draws, by inversion."""

    support = dist.constraints.positive

    def log_prob(self, value: Tensor) -> Tensor:
        return dist.Normal.log_prob(self, value) - _unit.cdf(self.loc / self.scale).log()

    def sample(self, sample_shape: Any = ()) -> Tensor:
        below = _unit.cdf(-self.loc / self.scale)
        level = below + (1 - below) * torch.rand(
            self._extended_shape(torch.Size(sample_shape)), dtype=self.loc.dtype
        )
        return (self.loc + self.scale * _unit.icdf(level)).detach()


class Heavy(dist.Normal):
    """Student t with three degrees of freedom."""

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.distributions.StudentT(3.0, self.loc, self.scale).log_prob(value)


class Named(dist.Normal):
    """Only another name and constructor."""

    def __init__(self, loc: Tensor) -> None:
        super().__init__(loc, 0.7)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Named":
        return Named(self.loc.expand(batch_shape))


Normal = type("Normal", (Heavy,), {})  # by the name of its parent


class Tempered(dist.Bernoulli):
    def log_prob(self, value: Tensor) -> Tensor:
        return 2 * super().log_prob(value)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(8, 2, generator=generator, dtype=torch.float64),
        0.1 + 2 * torch.rand(8, generator=generator, dtype=torch.float64),
    )


def regression(likelihood: Callable[[Tensor], Any]) -> Callable[..., None]:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", likelihood(x @ w), obs=y)

    return model


def truncated_information(loc: Tensor, scale: float) -> Tensor:
    """Of a Normal above zero in its location: the variance of its draws over scale^4."""
    z = loc / scale
    ratio = _unit.log_prob(z).exp() / _unit.cdf(z)
    return (1 - ratio * (z + ratio)) / scale**2


@pytest.mark.parametrize("curvature", ["ggn", "mc_fisher", "empirical_fisher"])
@pytest.mark.parametrize("family", [Truncated, Tempered])
def test_a_density_of_its_own_with_the_draws_of_its_parent_is_refused(family: Any, curvature: Any) -> None:
    x, y = data()
    y = (y > 1).double() if family is Tempered else y
    likelihood = (
        (lambda f: Tempered(logits=f)) if family is Tempered else (lambda f: Truncated(f, torch.tensor(0.7)))
    )
    guide = AutoLaplace(regression(likelihood), curvature=curvature).initialize(x, y)
    with pytest.raises(KeyError, match=f"{family.__name__} has a log_prob of its own.*hessian"):
        guide.laplace_approximation(x, y)
    with pytest.raises(KeyError, match=f"{family.__name__} has a log_prob of its own"):
        hfl.solve(guide, (x, y), functional=lambda z: z["w"], curvature="ggn")


def test_its_hessian_is_exact() -> None:
    x, y = data()
    guide = AutoLaplace(regression(lambda f: Truncated(f, torch.tensor(0.7))), curvature="hessian")
    guide.initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    F = truncated_information(x @ guide.loc.detach(), 0.7)  # the family is exponential in its location
    wanted = torch.eye(2, dtype=x.dtype) + x.mT @ (F[:, None] * x)
    assert_close(torch.linalg.inv(guide.posterior.covariance_matrix), wanted)


@pytest.mark.parametrize("curvature", ["ggn", "mc_fisher"])
def test_its_own_draws_estimate_its_information(curvature: Any) -> None:
    x, y = data()
    model = regression(lambda f: TruncatedWithDraws(f, torch.tensor(0.7, dtype=torch.float64)))
    guide = AutoLaplace(model, curvature=curvature, num_samples=20_000).initialize(x, y)
    with torch.no_grad():
        guide.loc.copy_(torch.tensor([0.3, -0.2]))
    guide.laplace_approximation((x, y), map_tolerance=1e9)
    F = truncated_information(x @ guide.loc.detach(), 0.7)
    wanted = torch.eye(2, dtype=x.dtype) + x.mT @ (F[:, None] * x)
    found = torch.linalg.inv(guide.posterior.covariance_matrix)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 0.05


@pytest.fixture
def registered() -> Iterator[None]:
    """A rule for the class, for as long as a test runs."""

    @register_fisher(Truncated)
    class TruncatedFisher(FisherRule):
        def parameters(self, d: Any) -> dict[str, Tensor]:
            return {"loc": d.loc.unsqueeze(-1)}

        def information(self, d: Any) -> Tensor:
            z = d.loc / d.scale
            ratio = _unit.log_prob(z).exp() / _unit.cdf(z)
            return ((1 - ratio * (z + ratio)) / d.scale**2)[..., None, None]

        def build(self, d: Any, parameters: Mapping[str, Tensor]) -> Any:
            return Truncated(parameters["loc"].squeeze(-1), d.scale)

    yield
    del rule._RULES[Truncated]


def test_a_registered_rule_counts_and_no_closed_form_of_the_parent(registered: None) -> None:
    x, y = data()
    guide = AutoLaplace(regression(lambda f: Truncated(f, torch.tensor(0.7, dtype=torch.float64))))
    guide.initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    F = truncated_information(x @ guide.loc.detach(), 0.7)
    wanted = torch.eye(2, dtype=x.dtype) + x.mT @ (F[:, None] * x)
    assert_close(torch.linalg.inv(guide.posterior.covariance_matrix), wanted)
    # the predictive density has all its mass above zero
    grid = torch.linspace(0.0, 12.0, 4001, dtype=x.dtype)[1:]
    density = guide.linearized_outputs(x[:1])["obs"].distribution().log_prob(grid.unsqueeze(-1)).exp()
    assert_close(density.sum() * 12 / 4000, torch.ones((), dtype=x.dtype), rtol=2e-3, atol=0.0)

    class Again(Truncated):
        def log_prob(self, value: Tensor) -> Tensor:
            return 2 * super().log_prob(value)

    with pytest.raises(KeyError, match="Again has a log_prob of its own"):
        fisher_rule(Again(torch.zeros(()), torch.ones(())))


def test_a_subclass_with_the_density_of_its_parent_has_its_rule() -> None:
    x, y = data()
    guide = AutoLaplace(regression(Named)).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    unit = torch.eye(2, dtype=x.dtype)
    assert_close(torch.linalg.inv(guide.posterior.covariance_matrix), unit + x.mT @ x / 0.49)
    found = guide.predictive(x)["obs"]
    variance = torch.einsum("ni,ij,nj->n", x, torch.linalg.inv(unit + x.mT @ x / 0.49), x)
    assert_close(found.variance, variance + 0.49)


@pytest.mark.parametrize("family", [Heavy, Normal])
def test_divergences_are_those_of_the_density(family: Any) -> None:
    x, y = data()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", family(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((x * w).sum(-1), 0.7), obs=y)

    pyro.set_rng_seed(0)
    guide = AutoMixture(model, 1, "normal", init_scale=1.0).initialize(x, y)
    bound = Mixture_ELBO(num_particles=20_000)
    bound.loss(model, guide, x, y)
    loc = guide.loc.detach().reshape(-1)
    grid = torch.linspace(-12, 12, 20_001, dtype=x.dtype)
    total = 0.0
    for m in loc:
        q = torch.distributions.Normal(m, 1.0).log_prob(grid)
        p = torch.distributions.StudentT(3.0, 0.0, 1.0).log_prob(grid)
        total += float((q.exp() * (q - p)).sum() * 24 / 20_000)
    assert math.isclose(bound.parts["kl"], total, rel_tol=0.05)


def test_a_prior_on_packed_layers_is_not_taken_for_normal() -> None:
    prior = Heavy(torch.zeros(()), torch.ones(()))
    with pytest.raises(ValueError, match=r"needs Normal priors.*is Heavy"):
        bayesian_(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), prior=prior, packed=True)


def test_moments_of_the_parent_are_not_reported() -> None:
    x, y = data()
    draws = {"w": torch.zeros(3, 2, dtype=x.dtype)}
    model = regression(lambda f: Truncated(f, torch.tensor(0.7, dtype=torch.float64)))
    found = predictive_moments(model, draws, (x, y))["obs"]
    assert found.mean is None
    assert found.aleatoric is None
    assert found.log_density is not None
    assert_close(
        found.log_density, torch.distributions.HalfNormal(torch.tensor(0.7, dtype=x.dtype)).log_prob(y)
    )
