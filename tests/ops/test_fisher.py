# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import itertools

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from scipy import integrate, special, stats

import pyro_bnn.infer  # registers the rules of Pyro's own distributions  # noqa: F401
from pyro_bnn.ops.fisher import MonteCarloFisher, fisher_rule, score
from tests.common import assert_close
from tests.contracts.likelihood import assert_information_is_the_sum_over_the_support

COV = torch.tensor([[1.0, 0.3, 0.0], [0.3, 0.5, -0.1], [0.0, -0.1, 0.8]], dtype=torch.float64)
W = torch.tensor([[0.4], [-0.3], [0.8]], dtype=torch.float64)

CONTINUOUS = {
    "normal": lambda: dist.Normal(torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0])),
    "lognormal": lambda: dist.LogNormal(torch.tensor(0.3), torch.tensor(0.5)),
    "laplace": lambda: dist.Laplace(torch.tensor(0.3), torch.tensor(0.5)),
    "studentt": lambda: dist.StudentT(torch.tensor(3.5), torch.tensor(0.2), torch.tensor(0.7)),
    "gamma": lambda: dist.Gamma(torch.tensor(2.5), torch.tensor(0.7)),
    "beta": lambda: dist.Beta(torch.tensor(2.5), torch.tensor(3.7)),
}
DISCRETE = {
    "poisson": lambda: dist.Poisson(torch.tensor([0.7, 4.0])),
    "negative_binomial": lambda: dist.NegativeBinomial(
        torch.tensor([1.5, 6.0]), logits=torch.tensor([0.3, -1.0])
    ),
    "bernoulli": lambda: dist.Bernoulli(logits=torch.tensor(0.6)),
    "binomial": lambda: dist.Binomial(7, logits=torch.tensor([0.6, -1.0])),
    "categorical": lambda: dist.Categorical(logits=torch.tensor([[0.6, 0.1, -0.3], [1.0, 0.0, 2.0]])),
    "ordered_logistic": lambda: dist.OrderedLogistic(
        torch.tensor([0.4, -1.0]), torch.tensor([-1.0, 0.2, 1.7])
    ),
}


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_information_equals_the_sum_over_the_support(name):
    d = DISCRETE[name]()
    values = None
    if not d.has_enumerate_support:
        values = torch.arange(400.0).reshape((-1,) + (1,) * len(d.batch_shape)).expand((400,) + d.batch_shape)
    assert_information_is_the_sum_over_the_support(d, values)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_information_equals_quadrature(name):
    d = CONTINUOUS[name]().expand(torch.Size([1])) if name != "normal" else CONTINUOUS[name]()
    d = type(d)(*[getattr(d, a)[:1] for a in d.arg_constraints if isinstance(getattr(d, a), torch.Tensor)])
    rule = fisher_rule(d)
    names = list(rule.parameters(d))
    F = rule.information(d)[0]
    low, high = (
        (0.0, 1.0)
        if name == "beta"
        else (0.0, torch.inf)
        if name in ("gamma", "lognormal")
        else (-torch.inf, torch.inf)
    )

    for i in range(len(F)):
        for j in range(i + 1):

            def integrand(y, i=i, j=j):
                value = torch.tensor([y])
                s = score(rule, d, names, value)[0]
                return float(s[i] * s[j] * d.log_prob(value).exp())

            points = [(low, 0.3), (0.3, high)]  # the Laplace density has a kink at its location
            expected = sum(integrate.quad(integrand, a, b, limit=400, epsabs=1e-11)[0] for a, b in points)
            assert_close(F[i, j], expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "d",
    [
        lambda: dist.MultivariateNormal(torch.tensor([0.1, 0.2, 0.3]), COV),
        lambda: dist.LowRankMultivariateNormal(
            torch.tensor([0.1, 0.2, 0.3]), W, torch.tensor([0.5, 1.0, 0.2])
        ),
    ],
)
def test_gaussian_information_equals_the_hessian_of_the_divergence(d):
    # F is the Hessian of KL(p_phi0 || p_phi) at phi0
    d = d()
    rule = fisher_rule(d)
    start = rule.parameters(d)
    sizes = [v.shape[-1] for v in start.values()]
    fixed = td.MultivariateNormal(d.loc, d.covariance_matrix)

    def divergence(flat):
        moved = rule.build(d, dict(zip(start, flat.split(sizes), strict=True)))
        return td.kl_divergence(fixed, td.MultivariateNormal(moved.loc, moved.covariance_matrix))

    expected = torch.autograd.functional.hessian(divergence, torch.cat(list(start.values())))
    assert_close(rule.information(d), expected, rtol=1e-9, atol=1e-10)
    assert_close(rule.block(d, ["loc"]), rule.information(d)[:3, :3], rtol=1e-9, atol=1e-12)


GAUSSIANS = {
    "multivariate": lambda: dist.MultivariateNormal(torch.tensor([[0.1, 0.2, 0.3], [0.0, 1.0, 2.0]]), COV),
    "low_rank": lambda: dist.LowRankMultivariateNormal(
        torch.tensor([[0.1, 0.2, 0.3], [0.0, 1.0, 2.0]]), W, torch.tensor([0.5, 1.0, 0.2])
    ),
}


@pytest.mark.parametrize("name", [*CONTINUOUS, *DISCRETE, *GAUSSIANS])
def test_a_block_is_that_of_the_whole(name):
    d = {**CONTINUOUS, **DISCRETE, **GAUSSIANS}[name]()
    rule = fisher_rule(d)
    whole, sizes = rule.information(d), {k: v.shape[-1] for k, v in rule.parameters(d).items()}
    assert whole.shape == d.batch_shape + (sum(sizes.values()),) * 2
    places = dict(zip(sizes, torch.arange(sum(sizes.values())).split(list(sizes.values())), strict=True))
    for r in range(1, len(sizes) + 1):
        for names in itertools.combinations(sizes, r):
            keep = torch.cat([places[k] for k in names])
            assert_close(rule.block(d, list(names)), whole[..., keep[:, None], keep], rtol=1e-12, atol=1e-14)


def test_the_count_of_a_negative_binomial_from_few_to_many_failures():
    # E[trigamma(r) - trigamma(r + y)], summed by scipy
    for r, probs in ((0.2, 0.3), (1.5, 0.9), (40.0, 0.5)):
        y = np.arange(20_000)
        mass = stats.nbinom.pmf(y, r, 1 - probs)
        expected = r**2 * (mass * (special.polygamma(1, r) - special.polygamma(1, r + y))).sum()
        d = dist.NegativeBinomial(torch.tensor([r]), probs=torch.tensor([probs]))
        F = fisher_rule(d).information(d)[0]
        assert_close(F, [[expected, r * probs], [r * probs, r * probs]], rtol=1e-9)


def test_counts_too_large_for_the_series_are_refused():
    d = dist.NegativeBinomial(torch.tensor([1e6]), probs=torch.tensor([0.13]))  # of mean 149,425
    with pytest.raises(ValueError, match=r"NegativeBinomial.*mean of 149,425.*100,000"):
        fisher_rule(d).information(d)


@pytest.mark.parametrize("name", [*CONTINUOUS, *DISCRETE])
def test_build_inverts_parameters_and_roots_are_roots(name):
    d = {**CONTINUOUS, **DISCRETE}[name]()
    rule = fisher_rule(d)
    parameters = rule.parameters(d)
    value = d.sample()
    assert_close(rule.build(d, parameters).log_prob(value), d.log_prob(value), rtol=1e-9, atol=1e-12)
    stacked = {
        k: v.expand(d.batch_shape + v.shape[-1:]).expand((4,) + d.batch_shape + v.shape[-1:])
        for k, v in parameters.items()
    }
    assert rule.build(d, stacked).batch_shape == (4,) + d.batch_shape
    assert_close(rule.build(d, {}).log_prob(value), d.log_prob(value), rtol=1e-9, atol=1e-12)
    for names in ([*parameters], [*parameters][-1:]):
        R = rule.root(d, names)
        assert_close(R @ R.mT, rule.block(d, names), rtol=1e-9, atol=1e-12)


def test_the_rest_by_monte_carlo():
    # any distribution that has no rule of its own, against one that has
    assert type(fisher_rule(dist.VonMises(torch.tensor(0.3), torch.tensor(2.0)))) is MonteCarloFisher
    d = dist.Gumbel(torch.tensor([0.5, 1.0]), torch.tensor(2.0))
    rule = MonteCarloFisher()
    S = 200_000
    F = MonteCarloFisher(S).information(d)
    draws = score(rule, d, list(rule.parameters(d)), d.sample((S,)))[:, 0]
    error = torch.einsum("si,sj->sij", draws, draws).std(0) / S**0.5
    euler = 0.5772156649015329
    expected = torch.tensor(
        [[1 / 4, -(1 - euler) / 2], [-(1 - euler) / 2, torch.pi**2 / 6 + (1 - euler) ** 2]]
    )
    assert ((F[0].abs() - expected.abs()).abs() < 4.5 * error).all()
    assert_close(rule.information(d), rule.information(d), rtol=0)
    vonmises = dist.VonMises(torch.tensor(0.3), torch.tensor(2.0))
    bessel = torch.special.i1e(torch.tensor(2.0)) / torch.special.i0e(torch.tensor(2.0))
    # E[sin^2] kappa^2 = kappa I1(kappa) / I0(kappa)
    assert_close(MonteCarloFisher(100_000).block(vonmises, ["loc"])[0, 0], 2.0 * bessel, rtol=0.03)


def test_a_distribution_without_arguments_is_refused_by_name():
    class Odd(td.Distribution):
        arg_constraints = {}  # noqa: RUF012
        support = td.constraints.real

    with pytest.raises(KeyError, match="No Fisher information is registered for Odd"):
        fisher_rule(Odd(validate_args=False))


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_softmax_root_has_one_column_less_than_classes(scale):
    torch.manual_seed(0)
    d = td.Categorical(logits=scale * torch.randn(7, 5, dtype=torch.float64))
    rule = fisher_rule(d)
    root = rule.root(d, ["logits"])
    assert root.shape == (7, 5, 4)
    torch.testing.assert_close(root @ root.mT, rule.information(d), rtol=1e-12, atol=1e-15)


def test_counts_beyond_the_series_are_refused_at_once():
    d = td.NegativeBinomial(torch.tensor(3.0), logits=torch.tensor(150_000 / 3.0).log())
    with pytest.raises(ValueError, match="more than 100,000 terms"):
        fisher_rule(d).information(d)
    assert_close(fisher_rule(d).block(d, ["logits"]), (3 * d.probs).reshape(1, 1), rtol=1e-12)


def test_a_distribution_is_built_again_from_no_parameters():
    d = td.VonMises(torch.randn(4), torch.rand(4) + 0.5)
    rule = fisher_rule(d)
    value = torch.randn(4)
    assert_close(rule.build(d, {}).log_prob(value), d.log_prob(value), rtol=1e-12)


@pytest.mark.parametrize("low_rank", [False, True])
def test_gaussians_in_two_batch_dimensions(low_rank):
    shape = (2, 5)
    loc, factor, diagonal = torch.randn(*shape, 3), torch.randn(*shape, 3, 2), torch.rand(*shape, 3) + 0.5
    if low_rank:
        d = td.LowRankMultivariateNormal(loc, factor, diagonal)
    else:
        d = td.MultivariateNormal(loc, factor @ factor.mT + torch.diag_embed(diagonal))
    found = fisher_rule(d).information(d)
    for i, j in itertools.product(range(2), range(5)):
        one = (
            td.LowRankMultivariateNormal(loc[i, j], factor[i, j], diagonal[i, j])
            if low_rank
            else td.MultivariateNormal(loc[i, j], d.covariance_matrix[i, j])
        )
        assert_close(found[i, j], fisher_rule(one).information(one), rtol=1e-9, atol=1e-12)
    names = list(fisher_rule(d).parameters(d))[1:]
    assert_close(fisher_rule(d).block(d, names), found[..., 3:, 3:], rtol=1e-12)


def test_probabilities_and_logits_are_one_parameter():
    """Of a family without a rule, in its logits, which are natural: the information is the variance."""
    d = td.ContinuousBernoulli(probs=torch.tensor([0.2, 0.8, 0.3]))
    rule = MonteCarloFisher(200_000)
    assert list(rule.parameters(d)) == ["logits"]
    assert_close(rule.information(d)[:, 0, 0], d.variance, rtol=5 * (5 / 200_000) ** 0.5)


class Unbroadcast(td.Normal):
    """Keeps its arguments in the shapes that they have."""

    def __init__(self, loc, scale, validate_args=None):
        super().__init__(loc, scale, validate_args=validate_args)
        self.scale = scale

    def log_prob(self, value):
        return -0.5 * ((value - self.loc) / self.scale) ** 2 - self.scale.log() - 0.5 * np.log(2 * np.pi)

    def sample(self, sample_shape=()):
        with torch.no_grad():
            return self.loc + self.scale * torch.randn(self._extended_shape(sample_shape))

    rsample = None
    has_rsample = False


def test_arguments_of_fewer_dimensions_than_the_batch():
    """Each element of the batch has a scale of its own in the information."""
    d = Unbroadcast(torch.randn(3), torch.tensor(0.7))
    rule = MonteCarloFisher(100_000)
    assert {name: value.shape for name, value in rule.parameters(d).items()} == {
        "loc": (3, 1),
        "scale": (3, 1),
    }
    expected = torch.diag(torch.tensor([0.7**-2, 2.0])).expand(3, 2, 2)
    assert_close(rule.information(d), expected, atol=0.06, rtol=0.03)


def test_one_class_has_no_information():
    for d in (td.Categorical(logits=torch.randn(4, 1)), td.OneHotCategorical(logits=torch.randn(4, 1))):
        root = fisher_rule(d).root(d, ["logits"])
        assert_close(root, torch.zeros(4, 1, 1), rtol=0)
