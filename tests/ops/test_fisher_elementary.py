# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Fisher information against sums over the support and quadrature of scores that torch's densities give."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from torch import Tensor

from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.ops.fisher import MonteCarloFisher, fisher_rule
from tests.common import assert_close

a, b = torch.tensor([0.6, 2.5], dtype=torch.float64), torch.tensor([1.3, 0.4], dtype=torch.float64)
#: A family of its real-valued parameters, the distribution under test, and the cumulative distribution's inverse.
CASES = {
    "exponential": (lambda u: td.Exponential(u[0].exp()), dist.Exponential(a), [a.log()]),
    "half_normal": (lambda u: td.HalfNormal(u[0].exp()), dist.HalfNormal(a), [a.log()]),
    "gumbel": (lambda u: td.Gumbel(u[0], u[1].exp()), dist.Gumbel(a, b), [a, b.log()]),
    "cauchy": (lambda u: td.Cauchy(u[0], u[1].exp()), dist.Cauchy(a, b), [a, b.log()]),
    "weibull": (lambda u: td.Weibull(u[0].exp(), u[1].exp()), dist.Weibull(a, b), [a.log(), b.log()]),
    "inverse_gamma": (
        lambda u: td.InverseGamma(u[0].exp(), u[1].exp()), dist.InverseGamma(a, b), [a.log(), b.log()]
    ),
    "pareto": (lambda u: td.Pareto(b, u[0].exp()), dist.Pareto(b, a), [a.log()]),
}  # fmt: skip
LOWEST = {"pareto": b}


def weighted_points(name: str, d: td.Distribution) -> tuple[Tensor, Tensor]:
    """Values (Q, n) and their probabilities by double-exponential quadrature."""
    t = torch.arange(-4.6, 4.6, 1 / 64, dtype=torch.float64).unsqueeze(-1)
    if name in ("gumbel", "cauchy"):
        values, width = torch.sinh(torch.pi / 2 * t.sinh()), torch.pi / 2 * t.cosh() / 64
        width = width * torch.cosh(torch.pi / 2 * t.sinh())
        values = values + torch.zeros(2, dtype=torch.float64)
    else:
        distance = (torch.pi / 2 * t.sinh()).exp()
        width = distance * torch.pi / 2 * t.cosh() / 64
        values = distance + LOWEST.get(name, torch.zeros(2, dtype=torch.float64))
    return values, (d.log_prob(values).exp() * width).nan_to_num(0.0)


def by_definition(family, u: list[Tensor], values: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of outer products of the scores at values (Q, n): (n, C, C)."""
    leaves = [v.expand(values.shape).clone().requires_grad_(True) for v in u]
    scores = torch.stack(torch.autograd.grad(family(leaves).log_prob(values).sum(), leaves), -1)
    scores = torch.where(weights[..., None] > 1e-300, scores, 0.0)
    return torch.einsum("qn,qni,qnj->nij", weights, scores, scores)


@pytest.mark.parametrize("name", CASES)
def test_information_equals_quadrature(name: str) -> None:
    family, d, u = CASES[name]
    rule = fisher_rule(d)
    assert not isinstance(rule, MonteCarloFisher)
    values, weights = weighted_points(name, d)
    assert_close(weights.sum(0), torch.ones(2, dtype=torch.float64), rtol=1e-6)
    assert_close(rule.information(d), by_definition(family, u, values, weights), rtol=1e-5, atol=1e-7)


def test_geometric_information_equals_the_sum_over_the_support() -> None:
    logits = torch.tensor([0.4, -1.2], dtype=torch.float64)
    values = torch.arange(400.0, dtype=torch.float64).unsqueeze(-1).expand(400, 2)
    weights = td.Geometric(logits=logits).log_prob(values).exp()
    wanted = by_definition(lambda u: td.Geometric(logits=u[0]), [logits], values, weights)
    d = dist.Geometric(logits=logits)
    assert_close(fisher_rule(d).information(d), wanted, rtol=1e-9)


@pytest.mark.parametrize("name", [*CASES, "geometric"])
def test_parameters_build_the_same_distribution(name: str) -> None:
    d = dist.Geometric(probs=a / 3) if name == "geometric" else CASES[name][1]
    rule, value = fisher_rule(d), d.sample()
    parameters = rule.parameters(d)
    assert_close(rule.build(d, parameters).log_prob(value), d.log_prob(value), rtol=1e-9)
    for some in parameters:
        moved = rule.build(d, {some: parameters[some].expand(3, 2, 1)})
        assert moved.batch_shape == (3, 2)
        assert_close(moved.log_prob(value)[1], d.log_prob(value), rtol=1e-9)


def test_a_latent_end_of_the_support_is_refused() -> None:
    x = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Pareto((0.1 * w * x).exp(), (w * x).exp()), obs=y)

    guide = AutoLaplace(model).initialize(x, x + 9)
    with pytest.raises(ValueError, match=r"does not go through the parameters.*Pareto"):
        guide.laplace_approximation(x, x + 9)
