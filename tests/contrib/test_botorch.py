# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Surrogate models of BoTorch: against Gaussian processes, plain Pyro runs and closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from botorch.acquisition import (
    LogExpectedImprovement,
    UpperConfidenceBound,
    qKnowledgeGradient,
    qLogExpectedImprovement,
    qUpperConfidenceBound,
)
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from botorch.optim import optimize_acqf
from botorch.posteriors import GPyTorchPosterior
from botorch.sampling import SobolQMCNormalSampler
from gpytorch.kernels import ConstantKernel, LinearKernel
from gpytorch.means import ZeroMean

from pyro_bnn.contrib.botorch import DrawsModel, LaplaceMixtureModel, LaplaceModel, surrogate
from pyro_bnn.contrib.surrogates.base import check_rows
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoLaplaceMixture, AutoMixture
from tests.common import assert_close

NOISE, WEIGHT, OFFSET = 0.3, 1.5, 0.7


def linear(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), WEIGHT).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, OFFSET))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(x @ w + b, NOISE), obs=y)


def network(x, y=None, outputs=1, noise=NOISE):
    """A noise that depends on the input."""
    w = pyro.sample("w", dist.Normal(torch.zeros(4, 2), 1.0).to_event(2))
    v = pyro.sample("v", dist.Normal(torch.zeros(outputs, 4), 1.0).to_event(2))
    loc = torch.tanh(x @ w.mT + 0.5) @ v.mT
    scale = noise * (1 + x.square().sum(-1, keepdim=True))
    with pyro.plate("data", len(x)):
        if outputs == 1:
            return pyro.sample("obs", dist.Normal(loc.squeeze(-1), scale.squeeze(-1)), obs=y)
        return pyro.sample("obs", dist.Normal(loc, scale).to_event(1), obs=y)


def two_outputs(x, y=None):
    return network(x, y, outputs=2)


def data(n=12):
    x = torch.rand(n, 2)
    return x, torch.sin(4 * x[:, 0]) + x[:, 1]


def laplace(model, x, y, **options):
    guide = AutoLaplace(model, **options).initialize(x, y).polish((x, y))
    return guide.laplace_approximation((x, y), map_tolerance=float("inf"))


def process(x, y):
    """BoTorch's Gaussian process with the covariance of :func:`linear`."""
    kernel, constant = LinearKernel(), ConstantKernel()
    kernel.variance, constant.constant = WEIGHT**2, torch.tensor(OFFSET**2)
    variance = torch.full_like(y, NOISE**2).unsqueeze(-1)
    gp = SingleTaskGP(
        x,
        y.unsqueeze(-1),
        variance,
        covar_module=kernel + constant,
        mean_module=ZeroMean(),
        outcome_transform=None,
    )
    return gp.double().eval()


@pytest.fixture
def pair():
    x, y = data()
    return surrogate(laplace(linear, x, y)), process(x, y)


def same_posteriors(ours, theirs, x, **options):
    found, expected = ours.posterior(x, **options), theirs.posterior(x, **options)
    assert_close(found.mean, expected.mean, rtol=1e-6, atol=1e-8)
    assert_close(
        found.distribution.covariance_matrix, expected.distribution.covariance_matrix, rtol=1e-6, atol=1e-8
    )


def test_a_linear_model_is_the_process_with_a_linear_kernel(pair):
    for shape in ((3, 2), (4, 3, 2), (2, 4, 1, 2)):
        same_posteriors(*pair, torch.randn(shape))
    same_posteriors(*pair, torch.randn(4, 3, 2), observation_noise=True)


def test_conditioning_is_that_of_the_process(pair):
    x, y = torch.rand(2, 2), torch.randn(2, 1)
    pair[1].posterior(x)  # fills the caches that its conditioning needs
    noise = torch.full_like(y, NOISE**2)
    ours = pair[0].condition_on_observations(x, y)
    theirs = pair[1].condition_on_observations(x, y, noise=noise)
    same_posteriors(ours, theirs, torch.randn(4, 3, 2))
    theirs.posterior(x)
    again = torch.rand(1, 2), torch.randn(1, 1)
    same_posteriors(
        ours.condition_on_observations(*again),
        theirs.condition_on_observations(*again, noise=noise[:1]),
        torch.randn(3, 2),
    )


def test_conditioning_on_all_data_at_once_is_refitting():
    x, y = data()
    few = surrogate(laplace(linear, x[:5], y[:5])).condition_on_observations(x[5:], y[5:].unsqueeze(-1))
    same_posteriors(few, surrogate(laplace(linear, x, y)), torch.randn(4, 3, 2))


def test_fantasies_and_knowledge_gradient_are_those_of_the_process(pair):
    x = torch.rand(3, 2, 2)
    sampler = SobolQMCNormalSampler(torch.Size([4]), seed=1)
    ours, theirs = (model.fantasize(x, sampler) for model in pair)
    assert ours.batch_shape == (4, 3)
    same_posteriors(ours, theirs, torch.rand(2, 2))
    values = []
    for model in pair:
        acquisition = qKnowledgeGradient(
            model, num_fantasies=4, sampler=SobolQMCNormalSampler(torch.Size([4]), seed=1)
        )
        points = torch.linspace(0, 1, 2 * 5 * 2).reshape(2, 5, 2).requires_grad_()
        value = acquisition(points)
        values.append((value.detach(), torch.autograd.grad(value.sum(), points)[0]))
    for found, expected in zip(*values, strict=True):
        assert_close(found, expected, rtol=1e-5, atol=1e-7)


ACQUISITIONS = {
    "analytic": (lambda model: LogExpectedImprovement(model, best_f=1.0), 1),
    "noisy improvement": (
        lambda model: qLogExpectedImprovement(
            model, best_f=1.0, sampler=SobolQMCNormalSampler(torch.Size([32]), seed=0)
        ),
        3,
    ),
    "bound": (
        lambda model: qUpperConfidenceBound(
            model, beta=2.0, sampler=SobolQMCNormalSampler(torch.Size([32]), seed=0)
        ),
        3,
    ),
}


@pytest.mark.parametrize("kind", ACQUISITIONS)
def test_acquisition_functions_and_their_gradients_are_those_of_the_process(pair, kind):
    make, q = ACQUISITIONS[kind]
    x = torch.rand(4, q, 2)
    values = []
    for model in pair:
        points = x.clone().requires_grad_()
        value = make(model)(points)
        values.append((value.detach(), torch.autograd.grad(value.sum(), points)[0]))
    for found, expected in zip(*values, strict=True):
        assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("structure", ["full", "kronecker", "hessian free"])
def test_batches_are_those_of_a_loop_over_the_guide(structure):
    x, y = data()
    if structure == "hessian free":
        guide = AutoHessianFreeLaplace(network, curvature="ggn").initialize(x, y).polish((x, y))
        guide = guide.laplace_approximation((x, y), (x[:4],))
    else:
        guide = laplace(network, x, y, structure=structure)
    new = torch.rand(3, 2, 2)
    posterior = surrogate(guide).posterior(new, observation_noise=True)
    for k in range(3):
        outputs = guide.linearized_outputs(new[k])["obs"]
        joint = guide.joint_covariance(new[k])["obs"][:, 0, :, 0]
        scale = NOISE * (1 + new[k].square().sum(-1))
        assert_close(posterior.mean[k], outputs.mean, rtol=1e-9)
        expected = joint + torch.diag(scale.square())
        assert_close(posterior.distribution.covariance_matrix[k], expected, rtol=1e-8)


def test_several_outputs_are_jointly_gaussian_and_may_be_chosen():
    x, _ = data()
    y = torch.stack([x.sum(-1), x[:, 0] - x[:, 1]], -1)
    guide = laplace(two_outputs, x, y)
    model, new = surrogate(guide, num_outputs=2), torch.rand(5, 3, 2)
    joint = guide.joint_covariance(new[2])["obs"].reshape(6, 6)
    posterior = model.posterior(new)
    assert model.num_outputs == 2
    assert posterior.mean.shape == (5, 3, 2)
    assert_close(posterior.distribution.covariance_matrix[2], joint, rtol=1e-8, atol=1e-12)
    for one in (model.subset_output([1]).posterior(new), model.posterior(new, output_indices=[1])):
        assert_close(one.mean, posterior.mean[..., 1:], rtol=1e-12)
        assert_close(one.distribution.covariance_matrix[2], joint[1::2, 1::2], rtol=1e-8, atol=1e-12)
    weights = torch.tensor([0.3, -0.7])
    summed = model.posterior(new, posterior_transform=ScalarizedPosteriorTransform(weights))
    blocks = joint.reshape(3, 2, 3, 2)
    expected = torch.einsum("a,iajb,b->ij", weights, blocks, weights)
    assert_close(summed.distribution.covariance_matrix[2], expected, rtol=1e-8, atol=1e-12)
    # observing one output of two tells of the other what their covariance does
    seen = model.subset_output([0]).condition_on_observations(
        new[0, :1], torch.ones(1, 1), noise=torch.ones(1, 1)
    )
    both = guide.joint_covariance(new[0])["obs"].reshape(6, 6)
    gain = both[[0, 2, 4], 0] / (both[0, 0] + 1)
    mean = model.posterior(new[0]).mean
    assert_close(seen.posterior(new[0]).mean[:, 0], mean[:, 0] + gain * (1 - mean[0, 0]), rtol=1e-8)


def test_transforms_of_inputs_and_outcomes_are_undone():
    x, y = data()
    x, y = 10 * x, 100 + 20 * y.unsqueeze(-1)
    inputs, outcomes = Normalize(2), Standardize(1)
    unit, standard = inputs(x), outcomes(y)[0]
    guide = laplace(network, unit, standard.squeeze(-1))
    model = surrogate(guide, input_transform=inputs, outcome_transform=outcomes)
    new = 10 * torch.rand(4, 2, 2)
    plain = surrogate(guide).posterior(inputs(new))
    found = model.posterior(new)
    assert_close(found.mean, y.mean() + y.std() * plain.mean, rtol=1e-9)
    assert_close(found.variance, y.var() * plain.variance, rtol=1e-9)
    given = model.condition_on_observations(new[0], y[:2])
    expected = surrogate(guide).condition_on_observations(inputs(new[0]), standard[:2]).posterior(inputs(new))
    assert_close(given.posterior(new).mean, y.mean() + y.std() * expected.mean, rtol=1e-9)


def test_improvement_of_a_mixture_is_the_mean_of_its_components():
    x, y = data()
    guide = AutoLaplaceMixture(network, 3).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    mixture, points = surrogate(guide), torch.rand(5, 1, 2)
    assert isinstance(mixture, LaplaceMixtureModel)
    members = [LogExpectedImprovement(surrogate(part), best_f=0.5)(points) for part in guide.components]
    expected = torch.stack(members).logsumexp(0) - math.log(3)
    assert_close(LogExpectedImprovement(mixture, best_f=0.5)(points), expected, rtol=1e-9)
    sampler = SobolQMCNormalSampler(torch.Size([64]), seed=0)
    assert qLogExpectedImprovement(mixture, best_f=0.5, sampler=sampler)(torch.rand(5, 2, 2)).shape == (5,)
    posterior = mixture.posterior(points)
    each = torch.stack([surrogate(part).posterior(points).mean for part in guide.components])
    assert_close(posterior.mixture_mean, each.mean(0), rtol=1e-9)
    with pytest.raises(NotImplementedError, match="fit the guide again"):
        mixture.condition_on_observations(points[0], torch.ones(1, 1))


def test_draws_are_an_ensemble_of_plain_runs():
    points = torch.rand(4, 3, 2).requires_grad_()
    draws = {"w": torch.randn(5, 4, 2), "v": torch.randn(5, 1, 4)}
    model = surrogate(draws, network)
    expected = torch.stack(
        [torch.tanh(points @ w.mT + 0.5) @ v.mT for w, v in zip(draws["w"], draws["v"], strict=True)], 1
    )
    values = model.posterior(points).values
    assert_close(values.detach(), expected.detach(), rtol=1e-12)
    slopes = (torch.autograd.grad(v.square().sum(), points)[0] for v in (values, expected))
    assert_close(*slopes, rtol=1e-10)
    assert_close(model.posterior(points).mean.detach(), expected.mean(1).detach(), rtol=1e-12)
    assert not model.posterior(points.detach()).values.requires_grad


def test_deep_ensembles_have_one_member_per_component():
    x, y = data()
    guide = AutoMixture(network, 3, component="delta").initialize(x, y)
    model = surrogate(guide)
    assert isinstance(model, DrawsModel)
    assert model.posterior(x).values.shape == (3, 12, 1)
    mean_field = surrogate(AutoMixture(network, 2).initialize(x, y), num_samples=10)
    state = torch.get_rng_state()
    first, second = (mean_field.posterior(x).values for _ in range(2))
    assert_close(first, second, rtol=0)
    assert torch.equal(state, torch.get_rng_state())
    assert first.shape == (10, 12, 1)
    value = qLogExpectedImprovement(mean_field, best_f=0.0)(torch.rand(6, 2, 2))
    assert value.shape == (6,)


@pytest.mark.parametrize("kind", ["laplace", "ensemble"])
def test_optimisers_of_acquisition_functions_find_what_a_grid_finds(kind):
    x, y = data()
    guide = laplace(network, x, y) if kind == "laplace" else AutoMixture(network, 4, component="delta")
    model = surrogate(guide if kind == "laplace" else guide.initialize(x, y))
    acquisition = UpperConfidenceBound(model, beta=1.0)
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    _, value = optimize_acqf(acquisition, bounds, q=1, num_restarts=4, raw_samples=32, options={"seed": 0})
    side = torch.linspace(0, 1, 21)
    with torch.no_grad():
        grid = acquisition(torch.cartesian_prod(side, side).unsqueeze(1))
    assert float(value) >= float(grid.max()) - 1e-6


def test_what_is_not_exact_is_refused_by_name():
    x, y = data()

    def counts(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Poisson((x @ w).exp()), obs=y)

    def centred(x, y=None):
        """What a row gives depends on the others."""
        return linear(x - x.mean(0), y)

    def hetero(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ w[0], (x @ w[1]).exp()), obs=y)

    with pytest.raises(ValueError, match="'obs' is Poisson"):
        surrogate(laplace(counts, x, torch.ones(12))).posterior(x)
    with pytest.raises(ValueError, match="must not depend on the others"):
        surrogate(laplace(centred, x, y)).posterior(torch.rand(4, 2, 2))
    noisy = surrogate(laplace(hetero, x, y))
    assert isinstance(noisy.posterior(x), GPyTorchPosterior)
    with pytest.raises(ValueError, match="depends on the latents"):
        noisy.condition_on_observations(x, y.unsqueeze(-1))
    with pytest.raises(ValueError, match="weights='evidence'"):
        surrogate(AutoLaplaceMixture(linear, 2, weights="evidence").initialize(x, y))
    with pytest.raises(ValueError, match="Pyro model is needed"):
        surrogate({"w": torch.ones(3, 2)})
    with pytest.raises(ValueError, match="pass num_outputs=1"):
        surrogate(laplace(linear, x, y), num_outputs=2).posterior(x)
    with pytest.raises(RuntimeError, match="still a point estimate"):
        LaplaceModel(AutoLaplace(linear).initialize(x, y))
    with pytest.raises(ValueError, match="no observed site"):
        surrogate(laplace(linear, x, y), site="y")


def test_rounding_where_an_output_happens_to_vanish_is_no_sign_of_other_rows():
    x, found = torch.rand(3, 1, 2), torch.tensor([[1e-17], [2.0], [-1.0]])
    check_rows("obs", x, found, torch.tensor([[-2e-17]]))
    with pytest.raises(ValueError, match="must not depend on the others"):
        check_rows("obs", x, found, torch.tensor([[1e-9]]))
