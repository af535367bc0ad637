# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import functools

import pytest
import torch
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import init_to_sample

from pyro_bnn.diagnostics import to_datatree
from pyro_bnn.infer import NotAMinimumError
from pyro_bnn.infer.autoguide import (
    AutoHessianFreeLaplace,
    AutoLaplace,
    PointEstimateWarning,
    UnconvergedMAPWarning,
)
from pyro_bnn.infer.hfl.functionals import output_functionals
from tests.common import assert_close
from tests.contracts.posterior import LinearGaussian
from tests.models import in_between_data, linear_regression, logistic_regression, tanh_network

TARGETS = torch.linspace(-2, 2, 12, dtype=torch.float64).unsqueeze(-1)


@functools.cache
def exact_laplace(seed, curvature):
    """The exact Laplace approximation on the in-between toy, which no test changes."""
    x, y = in_between_data(seed)
    torch.manual_seed(seed)
    exact = AutoLaplace(tanh_network(), curvature=curvature, init_loc_fn=init_to_sample)
    return exact.initialize(x, y).polish((x, y)).laplace_approximation((x, y)), (x, y)


def fitted_pair(seed, **options):
    """The exact approximation, and an HFL guide at the same polished MAP."""
    exact, data = exact_laplace(seed, options.get("curvature", "hessian"))
    torch.manual_seed(seed)
    guide = AutoHessianFreeLaplace(tanh_network(), **options).initialize(*data)
    guide.loc.data.copy_(exact.loc.data)
    return exact, guide, data


@pytest.mark.every(3)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("options", "rtol"),
    [
        ({"method": "cg"}, 1e-4),
        ({"method": "cg", "curvature": "ggn"}, 1e-4),
        ({"method": "central", "epsilon": 1e-3}, 1e-2),
    ],
)
def test_variances_and_guide_covariance(seed, options, rtol):
    exact, guide, data = fitted_pair(seed, **options)
    guide.laplace_approximation(data, (TARGETS,))
    J = output_functionals(exact.packed, exact.loc, ((TARGETS,), {})).gradients
    expected = exact.posterior.quadratic_form(J)
    assert_close(guide.result.variances, expected.diagonal(), rtol=rtol)
    sd = expected.diagonal().sqrt()
    assert_close(guide.result.covariance / sd / sd[:, None], expected / sd / sd[:, None], rtol=0, atol=rtol)
    # the guide's own covariance at the targets, from its factor alone, against S = sym(J D)
    S = J @ guide.result.displacements.mT
    if options["method"] == "cg":
        assert_close(guide.posterior.quadratic_form(J), 0.5 * (S + S.mT), rtol=0, atol=1e-8)
    outputs = guide.linearized_outputs(TARGETS)["obs"]
    assert_close(outputs.variance, guide.result.variance, rtol=1e-5)


def test_never_exceeds_the_full_posterior_off_the_targets():
    exact, guide, data = fitted_pair(0, method="cg")
    grid = torch.linspace(-2.5, 2.5, 81).unsqueeze(-1)
    full = exact.linearized_outputs(grid)["obs"].variance
    few = guide.laplace_approximation(data, (TARGETS[::4],)).linearized_outputs(grid)["obs"].variance
    many = guide.laplace_approximation(data, (TARGETS,)).linearized_outputs(grid)["obs"].variance
    assert (few <= full * (1 + 1e-6)).all()
    assert (many <= full * (1 + 1e-6)).all()
    assert (few / full).min() < 0.5 < 0.99 < (many / full).min()


def test_linear_model_has_the_closed_form():
    model, x, y = linear_regression()
    for method in ("cg", "central"):
        guide = AutoHessianFreeLaplace(model, method=method).initialize(x, y).polish((x, y))
        guide.laplace_approximation([(x[:20], y[:20]), (x[20:], y[20:])], (x[:5],))
        exact = LinearGaussian(x, y, noise=0.3, prior_scale=2.0)
        assert_close(guide.result.covariance, x[:5] @ exact.covariance @ x[:5].mT, rtol=1e-6)


def test_logits_have_one_functional_per_class():
    model, x, y = logistic_regression()
    exact = AutoLaplace(model, curvature="hessian").initialize(x, y).polish((x, y))
    exact.laplace_approximation((x, y))
    guide = AutoHessianFreeLaplace(model).initialize(x, y)
    guide.loc.data.copy_(exact.loc.data)
    guide.laplace_approximation((x, y), (x[:4],))
    assert_close(
        guide.linearized_outputs(x[:4])["obs"].covariance,
        exact.linearized_outputs(x[:4])["obs"].covariance,
        rtol=1e-6,
        atol=1e-9,
    )


def test_learned_noise_and_draws():
    x, y = in_between_data()
    model = tanh_network(hidden=4, noise=None)
    exact = AutoLaplace(model, curvature="hessian", init_loc_fn=init_to_sample).initialize(x, y)
    exact.polish((x, y)).laplace_approximation((x, y))
    guide = AutoHessianFreeLaplace(model).initialize(x, y)
    guide.loc.data.copy_(exact.loc.data)
    guide.laplace_approximation((x, y), (TARGETS,))
    assert_close(
        guide.linearized_outputs(TARGETS)["obs"].covariance,
        exact.linearized_outputs(TARGETS)["obs"].covariance,
        rtol=1e-4,
        atol=1e-9,
    )
    draws = guide.sample_posterior((20_000,))
    means = guide.observed_distributions(draws, TARGETS)["obs"].mean
    outputs = guide.linearized_outputs(TARGETS)["obs"]
    assert_close(means.var(0), outputs.variance[:, 0], rtol=4.5 * (2 / 20_000) ** 0.5)
    assert Predictive(model, guide=guide, num_samples=3)(x)["obs"].shape == (3, len(x))


def test_state_dict_loads_into_a_fresh_guide(tmp_path):
    _, guide, data = fitted_pair(0, method="cg")
    guide.laplace_approximation(data, (TARGETS,))
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    fresh = AutoHessianFreeLaplace(tanh_network()).initialize(*data)
    fresh.load_state_dict(torch.load(tmp_path / "guide.pt", weights_only=True))
    assert_close(fresh.posterior.variance, guide.posterior.variance, rtol=0)


def test_exports_predictions_of_the_linearised_model():
    _, guide, (x, y) = fitted_pair(0, method="cg")
    with pytest.warns(PointEstimateWarning):
        point = to_datatree(tanh_network(), guide, (x, y), num_samples=3)
    assert "log_q" not in point["sample_stats"]
    guide.laplace_approximation((x, y), (x,))
    tree = to_datatree(tanh_network(), guide, (x, y), num_samples=4000)
    assert "log_q" not in tree["sample_stats"]  # a Gaussian of low rank has no density
    outputs = guide.linearized_outputs(x)["obs"]
    mean, variance = outputs.mean[:, 0], outputs.variance[:, 0]
    # E_q log N(y | f, s^2) = log N(y | mean, s^2) - variance / (2 s^2)
    expected = torch.distributions.Normal(mean, 0.1).log_prob(y) - variance / 0.02
    actual = torch.as_tensor(tree["log_likelihood"]["obs"].values).mean((0, 1))
    error = torch.as_tensor(tree["log_likelihood"]["obs"].values).std((0, 1)) / 4000**0.5
    assert ((actual - expected).abs() < 5 * error).all()


@pytest.mark.parametrize("method", ["cg", "central"])
def test_unconverged_map_is_never_silent(method):
    x, y = in_between_data()
    guide = AutoHessianFreeLaplace(tanh_network(), method=method, init_loc_fn=init_to_sample).initialize(x, y)
    with pytest.raises(NotAMinimumError, match="not a minimum"):
        guide.laplace_approximation((x, y), (TARGETS,))
    exact, guide, data = fitted_pair(0, method=method)
    direction = exact.posterior.half_solve(torch.randn(exact.loc.shape))
    guide.loc.data += (
        0.2 * direction / exact.posterior.half_solve_transposed(exact.posterior.multiply(direction)).norm()
    )
    with pytest.raises((NotAMinimumError, UnconvergedMAPWarning)):
        guide.laplace_approximation(data, (TARGETS,))


def test_bad_input():
    model, x, y = linear_regression()
    with pytest.raises(ValueError, match="unknown method 'newton', expected one of 'cg', 'one_sided'"):
        AutoHessianFreeLaplace(model, method="newton")
    with pytest.raises(ValueError, match="unknown remainder 'full'"):
        AutoHessianFreeLaplace(model, remainder="full")
    guide = AutoHessianFreeLaplace(model).initialize(x, y)
    with pytest.raises(ValueError, match="argument 0 of the model holds 3 non-finite"):
        guide.laplace_approximation((x, y), (torch.full((1, 3), torch.inf),))
    with pytest.raises(ValueError, match="has no density"):
        guide.polish((x, y)).laplace_approximation((x, y), (x[:1],)).posterior.log_prob(torch.zeros(3))


def test_added_targets_nest():
    exact, guide, data = fitted_pair(0, method="cg")
    grid = torch.linspace(-2.5, 2.5, 41).unsqueeze(-1)
    full = exact.linearized_outputs(grid)["obs"].variance
    with pytest.raises(RuntimeError, match="no targets yet"):
        guide.add_targets(data, (TARGETS,))
    first = guide.laplace_approximation(data, (TARGETS[::4],)).linearized_outputs(grid)["obs"].variance
    cost = guide.result.products
    both = guide.add_targets(data, (TARGETS[1::4],)).linearized_outputs(grid)["obs"].variance
    assert guide.result.products > cost
    assert (both >= first * (1 - 1e-8)).all()
    assert (both <= full * (1 + 1e-6)).all()
    together = AutoHessianFreeLaplace(tanh_network()).initialize(*data)
    together.loc.data.copy_(guide.loc.data)
    together.laplace_approximation(data, (torch.cat([TARGETS[::4], TARGETS[1::4]]),))
    assert_close(both, together.linearized_outputs(grid)["obs"].variance, rtol=1e-5)
    assert guide.result.variance.shape == (6,)


@pytest.mark.parametrize("remainder", ["isotropic", "diagonal"])
def test_proper_density(remainder):
    exact, guide, data = fitted_pair(2, remainder=remainder)
    guide.laplace_approximation(data, (TARGETS[::3],))
    assert_close(
        guide.linearized_outputs(TARGETS[::3])["obs"].variance,
        exact.linearized_outputs(TARGETS[::3])["obs"].variance,
        rtol=1e-4,
    )
    draws = guide.posterior.rsample((4000,))
    weights = exact.posterior.log_prob(draws) - guide.posterior.log_prob(draws)
    # a proper density: KL(q || p) is not negative, and beats the prior by far
    assert 0 < float(-weights.mean()) < 100
    elbo = Trace_ELBO(num_particles=20, vectorize_particles=False)
    assert elbo.loss(guide.model, guide, *data) < float("inf")


def test_importance_weights_are_constant_when_the_targets_determine_the_posterior():
    model, x, y = linear_regression()
    guide = AutoHessianFreeLaplace(model, remainder="isotropic").initialize(x, y).polish((x, y))
    guide.laplace_approximation((x, y), (x[:6],))
    draws = guide.sample_posterior((50,))
    u = guide.packed.space.pack(draws)
    log_joint = torch.stack([-sum(guide.packed.losses(v, (x, y))) for v in u])
    weights = log_joint - guide.posterior.log_prob(u)
    assert_close(weights, weights.mean().expand(50), rtol=1e-9)


def test_sandwich_guide_and_probe_guide():
    exact, guide, data = fitted_pair(0, robust=True)
    guide.laplace_approximation(data, (TARGETS[::3],))
    assert_close(
        guide.linearized_outputs(TARGETS[::3])["obs"].variance.squeeze(-1),
        guide.result.sandwich.diagonal(),
        rtol=1e-5,
    )
    _, guide, data = fitted_pair(0, method="probe")
    guide.laplace_approximation(data, (TARGETS,), num_probes=12)
    assert_close(
        guide.linearized_outputs(TARGETS)["obs"].variance,
        exact.linearized_outputs(TARGETS)["obs"].variance,
        rtol=1e-3,
    )


def test_preconditioned_by_a_laplace_guide():
    exact, guide, data = fitted_pair(1)
    diagonal = AutoLaplace(tanh_network(), structure="diagonal").initialize(*data)
    diagonal.loc.data.copy_(exact.loc.data)
    diagonal.laplace_approximation(data)
    guide.preconditioner = diagonal
    guide.laplace_approximation(data, (TARGETS,))
    expected = exact.linearized_outputs(TARGETS)["obs"].variance
    assert_close(guide.result.variance, expected, rtol=1e-5)


@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode])
def test_blocks_without_gradients_change_nothing(block):
    exact, guide, data = fitted_pair(0, curvature="ggn")
    with block():
        guide.laplace_approximation(data, (TARGETS[:8],)).add_targets(data, (TARGETS[8:],))
    expected = exact.linearized_outputs(TARGETS)["obs"].variance
    assert_close(guide.linearized_outputs(TARGETS)["obs"].variance, expected, rtol=1e-4)
