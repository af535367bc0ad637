# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Variances and covariances of functionals: all methods against dense Laplace approximations and closed forms."""

import warnings
from contextlib import suppress
from functools import lru_cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, init_to_sample
from pyro.optim import Adam

from pyro_bnn.infer import NotAMinimumError, hfl
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.infer.hfl import HFLWarning
from tests.common import assert_close
from tests.models import in_between_data, linear_regression, logistic_regression, tanh_network

TARGETS = torch.linspace(-2, 2, 12, dtype=torch.float64).unsqueeze(-1)


def exact_laplace(model, data, curvature="hessian"):
    guide = AutoLaplace(model, curvature=curvature, init_loc_fn=init_to_sample).initialize(*data)
    return guide.polish(data).laplace_approximation(data)


@lru_cache
def toy(seed=0, curvature="hessian", hidden=16):
    x, y = in_between_data(seed)
    torch.manual_seed(seed)
    return exact_laplace(tanh_network(hidden=hidden), (x, y), curvature), (x, y)


@pytest.mark.parametrize(
    ("options", "rtol"),
    [
        ({"method": "cg"}, 1e-6),
        ({"method": "cg", "preconditioner": "diagonal"}, 1e-6),
        ({"method": "cg", "preconditioner": "nystrom", "block_size": 5}, 1e-6),
        ({"method": "central"}, 1e-4),
        ({"method": "one_sided"}, 2e-3),
        ({"method": "probe", "num_probes": 12}, 1e-4),
    ],
)
def test_toy_variances(options, rtol):
    guide, data = toy()
    expected = guide.linearized_outputs(TARGETS)["obs"].variance
    result = hfl.solve(guide, data, (TARGETS,), **options)
    assert result.variance.shape == (12, 1)
    assert_close(result.variance, expected, rtol=rtol)
    assert_close(hfl.variance(guide, data, (TARGETS,), **options), result.variance, rtol=1e-10)


def test_bias_orders():
    """One-sided errors are O(ε), central ones O(ε²)."""
    guide, data = toy(2)
    expected = guide.linearized_outputs(TARGETS)["obs"].variance
    errors = {
        (method, epsilon): float(
            (
                hfl.variance(guide, data, (TARGETS,), method=method, epsilon=epsilon, check=False) / expected
                - 1
            )
            .abs()
            .max()
        )
        for method in ("one_sided", "central")
        for epsilon in (1e-2, 1e-3)
    }
    assert 7 < errors["one_sided", 1e-2] / errors["one_sided", 1e-3] < 14
    assert 50 < errors["central", 1e-2] / errors["central", 1e-3] < 200


@pytest.mark.parametrize("epsilon", [1e-4, 1.0, 1e3])
def test_linearised_gaussian_model_is_exact_for_every_lambda(epsilon):
    guide, data = toy(0, "ggn")
    expected = guide.linearized_outputs(TARGETS)["obs"].variance
    result = hfl.solve(guide, data, (TARGETS,), method="one_sided", curvature="ggn", epsilon=epsilon)
    assert_close(result.variance, expected, rtol=1e-4)
    assert result.agreement < 1e-4


def test_linearised_classifier():
    model, x, y = logistic_regression()
    guide = exact_laplace(model, (x, y), "ggn")
    expected = guide.linearized_outputs(x[:4])["obs"].covariance
    for method in ("cg", "central"):
        covariance = hfl.covariance(guide, (x, y), (x[:4],), method=method, curvature="ggn")
        blocks = covariance.reshape(4, 3, 4, 3).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        assert_close(blocks, expected, rtol=1e-4, atol=1e-6)


def test_closed_form_of_any_functional():
    model, x, y = linear_regression()
    guide = AutoLaplace(model).initialize(x, y).polish((x, y))
    posterior = torch.linalg.inv(x.mT @ x / 0.3**2 + torch.eye(3) / 4)
    A = torch.tensor([[1.0, -1.0, 0.0], [0.5, 2.0, 1.0]])
    assert_close(
        hfl.covariance(guide, (x, y), functional=lambda latents: A @ latents["w"]),
        A @ posterior @ A.mT,
        rtol=1e-8,
    )
    effect = hfl.variance(guide, (x, y), (x[:5],), lambda latents, x: (x @ latents["w"]).mean())
    assert effect.shape == ()
    assert_close(effect, x[:5].mean(0) @ posterior @ x[:5].mean(0), rtol=1e-8)
    curved = hfl.solve(
        guide, (x, y), functional=lambda latents: latents["w"].square().sum(), method="central", epsilon=1e-3
    )
    g = 2 * guide.median()["w"]
    assert_close(curved.variance, g @ posterior @ g, rtol=1e-5)


def test_any_point_estimate_serves():
    model, x, y = linear_regression(n=30)
    guide = AutoDelta(model)
    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(400):
        svi.step(x, y)
    posterior = torch.linalg.inv(x.mT @ x / 0.3**2 + torch.eye(3) / 4)
    assert_close(hfl.covariance(guide, (x, y), (x[:4],)), x[:4] @ posterior @ x[:4].mT, rtol=1e-6)


def test_constrained_latent_is_invariant_to_units():
    """A positive latent is differentiated through its constraint; scaling it scales the sd by the same factor."""

    def model(unit):
        def sample(y=None):
            rate = pyro.sample("rate", dist.Gamma(3.0, 2.0 / unit))
            with pyro.plate("data", 20):
                pyro.sample("obs", dist.Poisson(rate / unit), obs=y)

        return sample

    y = dist.Poisson(4.0).sample((20,))
    sd = []
    for unit in (1.0, 10.0):
        guide = AutoLaplace(model(unit), curvature="hessian").initialize(y).polish((y,))
        result = hfl.solve(guide, (y,), functional=lambda latents: latents["rate"])
        log_sd = hfl.variance(guide, (y,), functional=lambda latents: latents["rate"].log()).sqrt()
        assert_close(result.variance.sqrt(), result.mean[0] * log_sd, rtol=1e-8)  # the delta method
        sd.append(result.variance.sqrt() / unit)
    assert_close(sd[0], sd[1], rtol=1e-6)
    # the posterior of the log rate: u has density ~ exp((a + sum y) u - (b + n) e^u)
    shape = 3.0 + y.sum()
    assert_close(log_sd, shape.rsqrt(), rtol=1e-8)


def test_minibatch_sweep_equals_full_batch():
    guide, (x, y) = toy()
    batches = [(x[:7], y[:7]), (x[7:20], y[7:20]), (x[20:], y[20:])]
    for method in ("cg", "central"):
        assert_close(
            hfl.variance(guide, batches, (TARGETS,), method=method),
            hfl.variance(guide, (x, y), (TARGETS,), method=method),
            rtol=1e-6,
        )


def test_paired_cancels_the_noise_of_the_batches():
    model, x, y = linear_regression(n=40)
    guide = AutoLaplace(model).initialize(x, y).polish((x, y))
    batches = [(x[i::4], y[i::4]) for i in range(4)]
    posterior = torch.linalg.inv(x.mT @ x / 0.3**2 + torch.eye(3) / 4)
    result = hfl.solve(
        guide, batches, (x[:5],), method="paired", preconditioner="nystrom", num_epochs=40, epsilon=1e-2
    )
    assert_close(result.variances, (x[:5] @ posterior @ x[:5].mT).diagonal(), rtol=0.1)
    # in a quadratic loss the difference from the twin does not depend on the size of the perturbation
    again = hfl.variance(
        guide, batches, (x[:5],), method="paired", preconditioner="nystrom", num_epochs=40, epsilon=1e-4
    )
    assert_close(again, result.variance, rtol=1e-6)


def test_sandwich_is_the_dense_one_and_robust_to_the_noise_model():
    model, x, y = linear_regression(n=200)
    y = y + x[:, 0].abs() * torch.randn(200)  # noise that the model does not know of
    guide = AutoLaplace(model).initialize(x, y).polish((x, y))
    w = guide.median()["w"]
    P = x.mT @ x / 0.3**2 + torch.eye(3) / 4
    scores = (y - x @ w)[:, None] * x / 0.3**2
    dense = torch.linalg.inv(P) @ scores.mT @ scores @ torch.linalg.inv(P)
    result = hfl.solve(guide, (x, y), functional=lambda latents: latents["w"], robust=True)
    assert_close(result.sandwich, dense, rtol=1e-6, atol=1e-12)
    halves = [(x[:90], y[:90]), (x[90:], y[90:])]
    robust = hfl.covariance(guide, halves, functional=lambda latents: latents["w"], robust=True)
    assert_close(robust, dense, rtol=1e-6, atol=1e-12)
    assert (result.sandwich.diagonal() > 5 * result.variances).all()


def test_probes_never_exceed_and_know_what_they_miss():
    guide, data = toy()
    grid = torch.linspace(-2, 2, 81).unsqueeze(-1)
    exact = guide.linearized_outputs(grid)["obs"].variance
    for num_probes in (3, 8):
        result = hfl.solve(guide, data, (grid,), method="probe", num_probes=num_probes)
        assert (result.variance <= exact * (1 + 1e-6)).all()
        truth = float(result.variance.sum() / exact.sum())
        assert abs(result.captured - truth) < 5 * result.captured_error + 0.02
    assert truth > 0.99


def test_regvar_limit_is_the_mean_covariance_with_the_training_outputs():
    guide, (x, y) = toy()
    inputs = torch.cat([TARGETS, x])
    K = hfl.covariance(guide, (x, y), (inputs,), tolerance=1e-8)
    leaf = guide.loc.detach().clone().requires_grad_()
    signs = guide.packed.outputs(leaf, ((x,), {}))[0].outputs.detach().sign()
    expected = (K[:12, 12:] @ signs.squeeze(-1) / 30).abs()
    score = hfl.regvar(guide, (x, y), (TARGETS,), num_epochs=None, calibrate=12, tolerance=1e-8)
    assert_close(score.score, expected, rtol=1e-4, atol=1e-8)
    ratio = (K.diagonal()[:12] / score.score).log()
    assert_close(score.scale, ratio.mean().exp(), rtol=1e-4)
    assert_close(score.spread, ratio.std(), rtol=1e-4)
    assert score.spread > 1  # which is why it is called a score
    with pytest.warns(HFLWarning, match="it is a score"):
        calibrated = hfl.variance(
            guide, (x, y), (TARGETS,), method="regvar", num_epochs=None, calibrate=12, tolerance=1e-8
        )
    assert calibrated.shape == (12, 1)
    assert_close(calibrated.flatten(), score.calibrated, rtol=1e-6)


def test_regvar_is_a_variance_where_outputs_are_independent():
    """Each mean is seen once: the only model in which the score is the variance over n."""

    def model(x, y=None):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(10), torch.linspace(0.2, 2.0, 10)).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(mean[x], 0.5), obs=y)

    x, y = torch.arange(10), 3 * torch.randn(10)
    guide = AutoLaplace(model).initialize(x, y).polish((x, y))
    exact = 1 / (torch.linspace(0.2, 2.0, 10) ** -2 + 4)
    score = hfl.regvar(guide, (x, y), (x,), num_epochs=None, calibrate=4, tolerance=1e-9)
    assert_close(10 * score.score, exact, rtol=1e-6)
    assert_close(
        hfl.variance(guide, (x, y), (x,), method="regvar", num_epochs=None).flatten(), exact, rtol=1e-3
    )


def test_regvar_fine_tuning_approaches_its_limit():
    model, x, y = linear_regression(n=40)
    guide = AutoLaplace(model).initialize(x, y).polish((x, y))
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    limit = hfl.regvar(guide, batches, (x[:6],), num_epochs=None)
    tuned = hfl.regvar(
        guide, batches, (x[:6],), num_epochs=60, epsilon=1e-3, preconditioner="nystrom", calibrate=3
    )
    assert_close(tuned.score, limit.score, rtol=0.05, atol=0.05 * float(limit.score.max()))
    assert "a score, not a variance" in str(tuned)


def test_unconverged_map_with_and_without_gradient_correction():
    guide, data = toy()
    direction = guide.posterior.half_solve(torch.nn.functional.normalize(torch.randn(49), dim=0))
    moved = AutoLaplace(tanh_network(), curvature="hessian").initialize(*data)
    moved.loc.data.copy_(guide.loc.data + 0.01 * direction)
    at_point = moved.laplace_approximation(data).linearized_outputs(TARGETS)["obs"].variance
    corrected = hfl.solve(moved, data, (TARGETS,), method="one_sided", epsilon=1e-2, check=False)
    assert_close(corrected.variance, at_point, rtol=0.02)
    assert_close(corrected.newton_decrement, 0.01, rtol=0.02)
    plain = hfl.solve(
        moved, data, (TARGETS,), method="central", epsilon=1e-2, check=False, correct_gradient=False
    )
    # without the correction both perturbed fits go to the true minimum first
    at_map = guide.linearized_outputs(TARGETS)["obs"].variance
    assert_close(plain.variance, at_map, rtol=1e-3)


def test_saddle_proximal_term_and_flat_direction():
    x, y = in_between_data()
    guide = AutoLaplace(tanh_network(), curvature="hessian", init_loc_fn=init_to_sample).initialize(x, y)
    for method in ("cg", "central"):
        with pytest.raises(NotAMinimumError, match="not a minimum"):
            hfl.solve(guide, (x, y), (TARGETS,), method=method)
    with pytest.warns(HFLWarning, match="biases variances down"):
        result = hfl.solve(guide, (x, y), (TARGETS,), proximal="auto", map_tolerance=float("inf"))
    accumulated = torch.autograd.functional.hessian(
        lambda u: sum(guide.packed.losses(u, (x, y))), guide.loc.detach()
    )
    assert_close(result.proximal, 2 * torch.linalg.eigvalsh(accumulated)[0].abs(), rtol=1e-6)
    damped = accumulated + result.proximal * torch.eye(49)
    J = result.gradients
    assert_close(result.variances, (J * torch.linalg.solve(damped, J.mT).mT).sum(-1), rtol=1e-6)
    assert "proximal delta" in str(result)

    def flat(y=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1).mask(False))
        with pyro.plate("data", 5):
            pyro.sample("obs", dist.Normal(a.sum(), 1.0), obs=y)

    y = torch.ones(5)
    guide = AutoLaplace(flat).initialize(y)
    guide.loc.data.fill_(0.5)
    assert_close(hfl.variance(guide, (y,), functional=lambda z: z["a"].sum()), 0.2, rtol=1e-8)
    with pytest.raises(NotAMinimumError, match="curvature 0"):  # a[0] alone has no finite variance
        hfl.solve(guide, (y,), functional=lambda z: z["a"][0])


def test_relu_kinks_are_told_by_the_agreement_check():
    def model(x, y=None):
        w1 = pyro.sample("w1", dist.Normal(torch.zeros(8, 2), 1.0).to_event(2))
        w2 = pyro.sample("w2", dist.Normal(torch.zeros(8), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(torch.relu(x @ w1.mT) @ w2, 0.3), obs=y)

    x = torch.randn(40, 2)
    y = x[:, 0].abs() + 0.3 * torch.randn(40)
    guide = AutoLaplace(model, curvature="ggn", init_loc_fn=init_to_sample).initialize(x, y)
    guide.polish((x, y), max_iter=500)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    far = {"map_tolerance": float("inf")}  # kinks stop the optimiser short of the minimum
    result = hfl.solve(guide, (x, y), (x[:6],), curvature="ggn", **far)
    assert_close(result.variance, guide.linearized_outputs(x[:6])["obs"].variance, rtol=1e-6)
    # a step of three standard deviations crosses kinks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((HFLWarning, NotAMinimumError)):
            hfl.solve(guide, (x, y), (x[:6],), method="one_sided", epsilon=3.0, **far)


def test_float32():
    guide, data = toy(2)
    expected = guide.linearized_outputs(TARGETS)["obs"].variance
    torch.set_default_dtype(torch.float32)
    x, y = data[0].float(), data[1].float()
    single = AutoLaplace(tanh_network(), curvature="hessian").initialize(x, y)
    single.loc.data.copy_(guide.loc.data.float())
    targets = (TARGETS.float(),)
    assert_close(hfl.variance(single, (x, y), targets), expected, rtol=1e-2)
    assert_close(hfl.variance(single, (x, y), targets, method="central"), expected, rtol=1e-2)
    with pytest.warns(HFLWarning, match="float32 resolves"), suppress(NotAMinimumError):
        hfl.solve(single, (x, y), targets, method="central", epsilon=1e-6)


def test_negative_variance_proves_something():
    from pyro_bnn.infer.hfl.task import Found

    with pytest.raises(NotAMinimumError, match="this proves that"):
        Found.from_responses(torch.eye(2), torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, -0.1]]))


def test_result_prints():
    guide, data = toy()
    text = str(hfl.solve(guide, data, (TARGETS,), method="central", robust=True))
    for word in (
        "Newton decrement",
        "smallest curvature",
        "antisymmetry",
        "epsilon / 3",
        "gradient equivalents",
    ):
        assert word in text


def test_bad_input():
    model, x, y = linear_regression()
    guide = AutoLaplace(model).initialize(x, y).polish((x, y))
    with pytest.raises(ValueError, match="nothing to compute a variance of"):
        hfl.variance(guide, (x, y))
    with pytest.raises(TypeError, match="the functional returned float"):
        hfl.variance(guide, (x, y), functional=lambda latents: 1.0)
    with pytest.raises(ValueError, match="1 of 3 functionals are not finite"):
        hfl.variance(guide, (x, y), functional=lambda z: z["w"] / torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match="unknown preconditioner 'jacobi'"):
        hfl.variance(guide, (x, y), (x[:2],), preconditioner="jacobi")
    with pytest.raises(ValueError, match="must be a number above 0"):
        hfl.variance(guide, (x, y), (x[:2],), epsilon=-1.0)
    with pytest.raises(ValueError, match="robust=True needs"):
        hfl.solve(guide, (x, y), (x[:2],), method="probe", robust=True)
