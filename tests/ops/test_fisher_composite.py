# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Fisher information of distributions made of others, against closed forms and sums over the support."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from torch.distributions import transforms as T

import pyro_bnn.infer  # registers the rules of Pyro's own distributions  # noqa: F401
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.ops.fisher import MonteCarloFisher, fisher_rule, matrix_square_root, score
from tests.common import assert_close
from tests.contracts.likelihood import outer

LOC, SCALE = torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0])


def estimate(d, S=10_000, names=None):
    """The Monte-Carlo estimate and its standard error, from many draws."""
    rule = fisher_rule(d)
    assert isinstance(rule, MonteCarloFisher)
    many = copy.copy(rule)
    many.num_samples = S
    names = list(rule.parameters(d)) if names is None else names
    F = MonteCarloFisher.block(many, d, names)
    scores = score(rule, d, names, rule.sample(d, S))
    error = torch.einsum("s...i,s...j->s...ij", scores, scores).std(0) / S**0.5
    return F, error, names


def mixture(K=1):
    component = dist.Normal(LOC[:, None].expand(2, K).clone(), SCALE[:, None].expand(2, K))
    return dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(2, K)), component)


def test_a_mixture_of_one_is_its_component():
    F, error, names = estimate(mixture())
    assert names == ["mixture.logits", "component.loc", "component.log_scale"]
    expected = fisher_rule(dist.Normal(LOC, SCALE)).information(dist.Normal(LOC, SCALE))
    assert (F[:, 0].abs().max() + F[:, :, 0].abs().max()) == 0
    assert ((F[:, 1:, 1:] - expected).abs() < 4.5 * error[:, 1:, 1:]).all()


def test_equal_components_share_the_information_of_one():
    # z is independent of y, so that a score is the share of the component times the component's score
    F, error, _ = estimate(mixture(2), names=["component.loc"])
    expected = (1 / SCALE**2 / 4)[:, None, None].expand(2, 2, 2)
    assert ((F - expected).abs() < 4.5 * error).all()


DISCRETE = {
    "zero-inflated poisson": lambda: dist.ZeroInflatedPoisson(torch.tensor([0.7, 4.0]), gate=torch.tensor(0.3)),
    "zero-inflated negative binomial": lambda: dist.ZeroInflatedNegativeBinomial(
        torch.tensor([2.0, 5.0]), logits=torch.tensor([0.1, -0.5]), gate_logits=torch.tensor([0.3, -1.0])
    ),
    "mixture of poissons": lambda: dist.MixtureSameFamily(
        dist.Categorical(logits=torch.tensor([[0.3, -0.4], [1.0, 0.0]])),
        dist.Poisson(torch.tensor([[0.7, 4.0], [2.0, 9.0]])),
    ),
    "beta-binomial": lambda: dist.BetaBinomial(torch.tensor([2.0, 0.7]), torch.tensor([1.5, 3.0]), 6.0),
}  # fmt: skip


@pytest.mark.parametrize("name", DISCRETE)
def test_counts_equal_the_sum_over_the_support(name):
    d = DISCRETE[name]()
    F, error, names = estimate(d)
    values = torch.arange(7.0 if name == "beta-binomial" else 150.0)[:, None].expand(-1, 2)
    scores = score(fisher_rule(d), d, names, values)
    expected = outer(scores, d.log_prob(values).exp())
    assert ((F - expected).abs() < 4.5 * error + 1e-12).all()
    rule = fisher_rule(d)
    assert_close(
        rule.build(d, rule.parameters(d)).log_prob(values), d.log_prob(values), rtol=1e-10, atol=1e-10
    )


def test_without_inflation_the_base_is_left():
    rate = torch.tensor([0.7, 4.0])
    F, error, _ = estimate(dist.ZeroInflatedPoisson(rate, gate=torch.tensor(1e-9)), names=["base.log_rate"])
    assert ((F[..., 0, 0] - rate).abs() < 4.5 * error[..., 0, 0]).all()


def test_a_multinomial_is_a_sum_of_categoricals():
    logits = torch.tensor([[0.6, 0.1, -0.3], [1.0, 0.0, 2.0]])
    one = dist.Categorical(logits=logits)
    for n in (1, 7):
        d = dist.Multinomial(n, logits=logits)
        rule = fisher_rule(d)
        assert_close(rule.information(d), n * fisher_rule(one).information(one), rtol=1e-12, atol=1e-14)
        R = rule.root(d, ["logits"])
        assert R.shape[-1] == 2
        assert_close(R @ R.mT, rule.information(d), rtol=1e-12, atol=1e-14)
    value = d.sample()
    assert_close(rule.build(d, {"logits": logits.expand(4, 2, 3)}).log_prob(value)[3], d.log_prob(value))


def test_an_invertible_transform_changes_nothing():
    base = dist.Normal(LOC, SCALE)
    d = dist.TransformedDistribution(base, [T.SigmoidTransform(), T.AffineTransform(1.0, 3.0)])
    rule = fisher_rule(d)
    assert_close(rule.information(d), fisher_rule(base).information(base), rtol=1e-14)
    value = d.sample()
    moved = rule.build(d, {"base.loc": LOC[:, None].expand(3, 2, 1)})
    assert moved.batch_shape == (3, 2)
    assert_close(moved.log_prob(value)[1], d.log_prob(value), rtol=1e-12)


def test_arguments_of_transforms_are_parameters():
    d = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), [T.AffineTransform(LOC, -SCALE)])
    F, error, _ = estimate(d, names=["loc_0", "scale_0"])
    normal = dist.Normal(LOC, SCALE)
    assert ((F - fisher_rule(normal).information(normal)).abs() < 4.5 * error).all()
    # a vector-valued base: events are flattened
    vector = dist.TransformedDistribution(
        dist.Normal(torch.zeros(2, 3), 1.0).to_event(1), [T.AffineTransform(torch.ones(3), 2.0, event_dim=1)]
    )
    rule = fisher_rule(vector)
    assert {k: v.shape for k, v in rule.parameters(vector).items()} == {
        "loc_0": (2, 3), "base.loc": (2, 3), "base.log_scale": (2, 3)
    }  # fmt: skip
    value = vector.sample()
    stacked = {k: v.expand(4, *v.shape) for k, v in rule.parameters(vector).items()}
    assert_close(rule.build(vector, stacked).log_prob(value)[2], vector.log_prob(value), rtol=1e-12)


def test_folding_far_from_zero_changes_nothing():
    F, error, _ = estimate(dist.FoldedDistribution(dist.Normal(torch.tensor([9.0, 8.0]), 0.5)))
    normal = dist.Normal(torch.tensor([9.0, 8.0]), 0.5)
    assert ((F - fisher_rule(normal).information(normal)).abs() < 4.5 * error).all()


def test_masked_mixtures_inform_about_the_chosen_component():
    mask = torch.tensor([True, False])
    d = dist.MaskedMixture(mask, dist.Normal(LOC, SCALE), dist.Normal(LOC + 1, SCALE))
    F, error, _ = estimate(d, names=["component0.loc", "component1.loc"])
    expected = torch.diag_embed(torch.stack([(~mask) / SCALE**2, mask / SCALE**2], -1))
    assert ((F - expected).abs() < 4.5 * error + 1e-12).all()


@pytest.mark.parametrize("names", [["component.loc"], ["mixture.logits"], None])
def test_a_mixture_of_diagonal_normals_with_one_component(names):
    d = dist.MixtureOfDiagNormals(torch.zeros(2, 1, 3), torch.full((2, 1, 3), 0.5), torch.zeros(2, 1))
    F, error, found = estimate(d, names=names)
    expected = {"component.loc": [4.0] * 3, "component.log_scale": [2.0] * 3, "mixture.logits": [0.0]}
    diagonal = torch.diag(torch.tensor([v for k in found for v in expected[k]]))
    assert ((F - diagonal).abs() < 4.5 * error + 1e-12).all()


def observed(family):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
        f = x @ w
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", family(f), obs=y)

    return model


@pytest.mark.parametrize(
    "family",
    [
        lambda f: dist.ZeroInflatedPoisson(f[..., 0].exp(), gate_logits=f[..., 1]),
        lambda f: dist.MixtureSameFamily(
            dist.Categorical(logits=torch.zeros(f.shape)), dist.Normal(f, torch.tensor(0.7))
        ),
        lambda f: dist.TransformedDistribution(
            dist.Gumbel(f[..., 0], 1.0), [T.AffineTransform(f[..., 1], 2.0)]
        ),
        lambda f: dist.Multinomial(4, logits=f),
    ],
)
def test_laplace_with_likelihoods_made_of_others(family):
    x = torch.randn(12, 2)
    model = observed(family)
    y = model(x).detach()
    guide = AutoLaplace(model).initialize(x, y)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    w = guide.loc.detach().clone().requires_grad_(True)
    d = family(x @ w.reshape(2, 2))
    rule = fisher_rule(d)
    outputs = {k: v for k, v in rule.parameters(d).items() if v.requires_grad}
    phi = torch.cat(list(outputs.values()), -1)
    F = rule.block(d, list(outputs)).detach()
    # the Jacobian of the outputs and the information that the rule gives, by autograd
    J = torch.stack([torch.autograd.grad(v, w, retain_graph=True)[0] for v in phi.flatten()]).reshape(
        *phi.shape, 4
    )
    R = matrix_square_root(F)
    rows = torch.einsum("nck,ncp->nkp", R, J).reshape(-1, 4)
    assert_close(guide.precision, rows.mT @ rows + torch.eye(4), rtol=1e-8, atol=1e-10)
    assert guide.linearized_outputs(x)["obs"].distribution().log_prob(y).isfinite().all()


def test_a_hidden_dependence_is_refused():
    class Shift(T.Transform):
        """A transform that this package does not know."""

        domain = codomain = td.constraints.real
        bijective = True

        def __init__(self, shift):
            super().__init__()
            self.shift = shift

        def _call(self, x):
            return x + self.shift

        def _inverse(self, y):
            return y - self.shift

        def log_abs_det_jacobian(self, x, y):
            return torch.zeros_like(x)

    x = torch.randn(6, 2)
    model = observed(lambda f: dist.TransformedDistribution(dist.Normal(f[..., 0], 1.0), [Shift(f[..., 1])]))
    guide = AutoLaplace(model).initialize(x, torch.zeros(6))
    with pytest.raises(
        ValueError, match="'obs': TransformedDistribution depends on latents through more than"
    ):
        guide.laplace_approximation((x, torch.zeros(6)), map_tolerance=float("inf"))


@pytest.mark.parametrize("name", ["affine", "power"])
def test_arguments_of_transforms_may_be_latent(name):
    x = torch.linspace(-1.0, 1.0, 40)

    def model(x, y=None):
        w, s = pyro.sample("w", dist.Normal(0.0, 1.0)), pyro.sample("s", dist.LogNormal(0.0, 0.3))
        if name == "affine":
            d = dist.TransformedDistribution(dist.Normal(w * x, 0.5), [T.AffineTransform(0.0, s)])
        else:
            d = dist.TransformedDistribution(dist.LogNormal(w * x, 0.5), [T.PowerTransform(s)])
        with pyro.plate("data", len(x)):
            pyro.sample("obs", d, obs=y)

    y = torch.randn(40) if name == "affine" else torch.randn(40).exp()
    guide = AutoLaplace(model).initialize(x, y)
    with torch.no_grad():
        guide.loc.copy_(torch.tensor([0.7, 0.2]))
    guide.laplace_approximation((x, y), map_tolerance=1e9)
    # y, or log(y), is Normal(s w x, s / 2): in (w, log s), s cancels from the location's share
    loc = 0.7 * x
    F = torch.tensor([
        [(4 * x * x).sum(), (4 * x * loc).sum()],
        [(4 * x * loc).sum(), (4 * loc * loc + 2).sum()],
    ])  # fmt: skip
    wanted = F + torch.diag(torch.tensor([1.0, 1 / 0.09]))
    found = torch.linalg.inv(guide.posterior.covariance_matrix)
    assert float((found - wanted).abs().max() / wanted.max()) < 0.05


def test_parameters_that_components_share():
    """Cut points of a mixture of ordered logits: each component of each element has its own in the information."""
    cuts = torch.tensor([-1.0, 0.0, 1.5])
    d = dist.MixtureSameFamily(
        td.Categorical(logits=torch.randn(4, 2)), dist.OrderedLogistic(torch.randn(4, 2), cuts)
    )
    rule = fisher_rule(d)
    found = rule.parameters(d)
    assert found["component.predictor"].shape == (4, 2)
    assert_close(
        found["component.steps"], torch.cat([cuts[:1], cuts.diff().log()]).expand(4, 2, 3).flatten(1)
    )
    value = torch.randint(0, 4, (4,))
    assert_close(rule.build(d, found).log_prob(value), d.log_prob(value), rtol=1e-10)
