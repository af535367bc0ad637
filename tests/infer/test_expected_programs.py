# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Programs that a user expects to work, against plain Pyro handlers and plain torch."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.autograd.functional import hessian

from pyro_bnn.diagnostics import log_weights, prediction_draws, to_datatree
from pyro_bnn.infer import (
    Mixture_ELBO,
    NUTSResult,
    hfl,
    load_guide,
    posterior_draws,
    posterior_predictive,
    predictive_moments,
    save_guide,
)
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoMixture

torch.manual_seed(0)
X = torch.randn(12, 2, dtype=torch.float64)
Y = torch.randn(12, dtype=torch.float64)


def prior(x):
    return pyro.sample("w", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))


def linear(x, y=None):
    f = (x * prior(x)).sum(-1)
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)


def log_joint(model, w, *args):
    return poutine.trace(poutine.condition(model, {"w": w})).get_trace(*args).log_prob_sum()


# ---------------------------------------------------------------- a first batch whose rows are all equal


@pytest.mark.every(2)
@pytest.mark.parametrize("rows", [80, 4])
@pytest.mark.parametrize("equal", ["inputs", "inputs and targets", "all batches"])
def test_first_batch_of_equal_rows(rows, equal):
    torch.manual_seed(1)
    x, y = torch.randn(3 * rows, 2, dtype=torch.float64), torch.randn(3 * rows, dtype=torch.float64)
    x[:rows] = x[0]
    if equal != "inputs":
        y[:rows] = y[0]
    if equal == "all batches":
        x[:], y[:] = x[0], y[0]
    loader = [(x[i : i + rows], y[i : i + rows]) for i in range(0, 3 * rows, rows)]
    precision = torch.eye(2, dtype=x.dtype) + x.mT @ x / 0.25
    mode = torch.linalg.solve(precision, x.mT @ y / 0.25)
    for curvature in ("ggn", "hessian"):
        guide = AutoLaplace(linear, curvature=curvature).initialize(*loader[0]).polish(loader)
        guide.laplace_approximation(loader)
        torch.testing.assert_close(guide.loc.detach(), mode, atol=1e-6, rtol=0)
        torch.testing.assert_close(guide.posterior.covariance_matrix, precision.inverse())
    function_space = AutoLaplace(linear, structure="function_space").initialize(*loader[0]).polish(loader)
    function_space.laplace_approximation(loader)
    torch.testing.assert_close(function_space.posterior.variance, precision.inverse().diagonal())
    found = hfl.variance(guide, loader, functional=lambda z: z["w"])
    torch.testing.assert_close(found, precision.inverse().diagonal())

    draws = {"w": torch.randn(5, 2, dtype=torch.float64)}
    means = draws["w"] @ x.mT
    density = dist.Normal(means, 0.5).log_prob(y)
    prediction = posterior_predictive(linear, draws, loader)
    torch.testing.assert_close(prediction.mean, means)
    torch.testing.assert_close(prediction.log_likelihood, density)
    split = posterior_predictive(linear, draws, (x, y), batch_size=rows)
    torch.testing.assert_close(split.log_likelihood, density)
    moments = predictive_moments(linear, draws, loader)["obs"]
    torch.testing.assert_close(moments.log_density, density.logsumexp(0) - math.log(5))
    tree = to_datatree(linear, draws, loader)
    lp = torch.stack([log_joint(linear, w, x, y) for w in draws["w"]])
    torch.testing.assert_close(torch.as_tensor(tree["sample_stats"]["lp"].values[0]), lp)


# ---------------------------------------------------------------- deterministic sites in the log mixture


def with_deterministic(place):
    def model(x, y=None):
        w = prior(x)
        pyro.deterministic("size", w.square().sum(-1))
        f = (x * w).sum(-1)
        if place == "outside":
            f = pyro.deterministic("f", f)
        with pyro.plate("data", len(x)):
            if place == "inside":
                f = pyro.deterministic("f", f)
            return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return model


@pytest.mark.filterwarnings("ignore:the components of the mixture run")
@pytest.mark.parametrize("num_components", [1, 3])
@pytest.mark.parametrize("place", ["inside", "outside"])
def test_log_mixture_of_a_model_with_deterministic_sites(place, num_components):
    model = with_deterministic(place)
    guide = AutoMixture(model, num_components, "delta").initialize(X, Y)
    objective = Mixture_ELBO("log_mixture", kl="sum")
    with torch.no_grad():
        loss = objective(model, guide)(X, Y)
        components = guide.sample_posterior((num_components,), by_component=True)["w"]
    runs = [poutine.trace(poutine.condition(linear, {"w": w})).get_trace(X, Y) for w in components]
    for run in runs:
        run.compute_log_prob()
    pointwise = torch.stack([run.nodes["obs"]["log_prob"] for run in runs])
    mixed = (pointwise.logsumexp(0) - math.log(num_components)).sum()
    priors = torch.stack([run.nodes["w"]["log_prob"] for run in runs]).mean()
    torch.testing.assert_close(loss, -mixed - priors)


# ---------------------------------------------------------------- factors that no latent reaches


def with_constants(x, y=None):
    w = prior(x)
    pyro.factor("constant", torch.tensor(-1.5, dtype=x.dtype))
    with pyro.plate("data", len(x)):
        pyro.factor("of data", -x.sum(-1))
        return pyro.sample("obs", dist.Normal((x * w).sum(-1), 0.5), obs=y)


@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize(
    "structure", ["full", "block", "kronecker", "diagonal", "low_rank", "function_space"]
)
def test_constant_factors_have_no_curvature(structure, loader):
    data = [(X[:5], Y[:5]), (X[5:], Y[5:])] if loader else (X, Y)
    guide = AutoLaplace(with_constants, structure=structure).initialize(X, Y).polish(data)
    guide.laplace_approximation(data)
    precision = hessian(lambda w: -log_joint(with_constants, w, X, Y), guide.loc.detach())
    if structure == "diagonal":
        precision = torch.diag(precision.diagonal())
    torch.testing.assert_close(guide.posterior.variance, precision.inverse().diagonal())
    value = log_joint(with_constants, guide.loc.detach(), X, Y)
    evidence = value + math.log(2 * math.pi) - 0.5 * torch.logdet(precision)
    torch.testing.assert_close(guide.log_evidence(), evidence)


def test_hessian_free_laplace_with_constant_factors():
    guide = AutoLaplace(with_constants).initialize(X, Y).polish((X, Y))
    covariance = hessian(lambda w: -log_joint(linear, w, X, Y), guide.loc.detach()).inverse()
    found = hfl.variance(guide, (X, Y), (X,), curvature="ggn").squeeze(-1)
    torch.testing.assert_close(found, (X @ covariance * X).sum(-1))


@pytest.mark.filterwarnings("ignore:autograd's gradient of the likelihood")
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("outside", [False, True])
def test_factors_of_latents_are_still_refused(cut, outside):
    """Also those whose gradient is cut off, and those that depend on latents in a later batch only."""

    def model(x, y=None):
        w = prior(x)
        pyro.factor("penalty", torch.zeros((), dtype=x.dtype))
        with pyro.plate("data", len(x)):
            if outside or x[0, 0] == X[6, 0]:
                pyro.factor("late", -((w.detach() if cut else w).square().sum(-1)) * x[:, 0].square())
            return pyro.sample("obs", dist.Normal((x * w).sum(-1), 0.5), obs=y)

    data = [(X[:6], Y[:6]), (X[6:], Y[6:])]
    for run in (
        lambda: AutoLaplace(model).initialize(X[:6], Y[:6]).laplace_approximation(data),
        lambda: hfl.solve(AutoLaplace(model).initialize(X[:6], Y[:6]), data, (X,), curvature="ggn"),
    ):
        with pytest.raises(ValueError, match=r"'late' is a pyro.factor of latent sites"):
            run()


# ---------------------------------------------------------------- positive and bounded observations in saved guides

FAMILIES = {
    "gamma": lambda f: dist.Gamma(2.0, f.exp()),
    "lognormal": lambda f: dist.LogNormal(f, 1.0),
    "beta": lambda f: dist.Beta(f.exp(), 2.0),
    "poisson": lambda f: dist.Poisson(f.exp()),
}


@pytest.mark.filterwarnings("ignore:the point estimate is")
@pytest.mark.parametrize("family", FAMILIES)
def test_guides_load_without_data(family, tmp_path):
    y = torch.linspace(0.1, 0.9, 12, dtype=torch.float64)
    if family == "poisson":
        y = (4 * y).round()

    def model(x, y=None):
        f = (x * prior(x)).sum(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", FAMILIES[family](f), obs=y)

    curvature = "hessian" if family == "gamma" else "ggn"
    guide = AutoLaplace(model, curvature=curvature).initialize(X, y).polish((X, y))
    guide.laplace_approximation((X, y))
    free = AutoHessianFreeLaplace(model).initialize(X, y).polish((X, y))
    free.laplace_approximation((X, y), (X,))
    fresh = (AutoLaplace(model, curvature=curvature), AutoHessianFreeLaplace(model))
    for saved, other in zip((guide, free), fresh, strict=True):
        save_guide(saved, tmp_path / "guide.pt")
        loaded = load_guide(other, tmp_path / "guide.pt")
        with torch.random.fork_rng():
            torch.manual_seed(2)
            expected = saved.sample_posterior((3,))["w"]
            torch.manual_seed(2)
            torch.testing.assert_close(loaded.sample_posterior((3,))["w"], expected, rtol=0, atol=0)
        torch.testing.assert_close(
            loaded.linearized_outputs(X)["obs"].variance, saved.linearized_outputs(X)["obs"].variance
        )


# ---------------------------------------------------------------- exports of models without observed sites


def penalised(x, y):
    f = (x * prior(x)).sum(-1)
    with pyro.plate("data", len(x)):
        pyro.factor("likelihood", dist.Normal(f, 0.5).log_prob(y))


@pytest.mark.parametrize("form", ["one batch", "loader", "batch_size", "file", "blocks"])
def test_export_of_a_model_of_factors(form, tmp_path):
    draws = {"w": torch.randn(6, 2, dtype=torch.float64)}
    data = [(X[:5], Y[:5]), (X[5:], Y[5:])] if form == "loader" else (X, Y)
    options = {
        "batch_size": {"batch_size": 4},
        "file": {"path": tmp_path / "tree.zarr"},
        "blocks": {"path": tmp_path / "tree.zarr", "block_size": 2},
    }.get(form, {})
    tree = to_datatree(penalised, draws, data, **options)
    torch.testing.assert_close(torch.as_tensor(tree["posterior"]["w"].values[0]), draws["w"])
    lp = torch.stack([log_joint(penalised, w, X, Y) for w in draws["w"]])
    torch.testing.assert_close(torch.as_tensor(tree["sample_stats"]["lp"].values[0]), lp)
    prior_term = dist.Normal(0.0, 1.0).log_prob(draws["w"]).sum(-1)
    torch.testing.assert_close(torch.as_tensor(tree["log_prior"]["w"].values[0]), prior_term)
    assert not {"observed_data", "log_likelihood", "posterior_predictive"} & set(tree.children)


def test_missing_observations_are_still_refused():
    with pytest.raises(ValueError, match="observes nothing"):
        to_datatree(with_constants, {"w": torch.randn(4, 2, dtype=torch.float64)}, (X,))


# ---------------------------------------------------------------- as many draws as were asked for


@pytest.mark.parametrize("num_samples", [1, 2, 5, 6])
def test_numbers_of_draws_of_a_mixture(num_samples):
    guide = AutoMixture(linear, 2).initialize(X, Y)
    assert len(posterior_draws(guide, num_samples)["w"]) == num_samples
    assert len(posterior_predictive(linear, guide, (X, Y), num_samples=num_samples).mean) == num_samples
    predictive_moments(linear, guide, (X, Y), num_samples=num_samples)
    for export in (to_datatree, prediction_draws):
        if num_samples % 2:
            numbers = {1: "2", 5: "4 or 6"}[num_samples]
            with pytest.raises(
                ValueError, match=f"num_samples={num_samples} .* by the 2 components .*={numbers}"
            ):
                export(linear, guide, (X, Y), num_samples=num_samples)
        else:
            found = export(linear, guide, (X, Y), num_samples=num_samples)
            sizes = (found["posterior"] if export is to_datatree else found).sizes
            assert sizes["chain"] * sizes["draw"] == num_samples


def test_numbers_of_draws_of_lists_and_defaults():
    guides = [AutoMixture(linear, 1).initialize(X, Y) for _ in range(3)]
    with pytest.raises(ValueError, match=r"num_samples=10 .* 3 guides, .* pass num_samples=9 or 12"):
        to_datatree(linear, guides, (X, Y), num_samples=10)
    assert dict(to_datatree(linear, guides, (X, Y))["posterior"].sizes)["draw"] == 333
    with pytest.raises(ValueError, match="num_samples"):
        to_datatree(linear, guides, (X, Y), num_samples=0)
    mixture = AutoMixture(linear, 3).initialize(X, Y)
    assert len(log_weights(linear, mixture, (X, Y))[1]) == 999
    with pytest.raises(ValueError, match=r"num_samples=4 .* by the 3 components"):
        log_weights(linear, mixture, (X, Y), 4)


def test_numbers_of_draws_of_runs():
    chains = {"w": torch.randn(2, 10, 2, dtype=torch.float64)}
    run = NUTSResult(chains, {}, {}, {})
    assert dict(to_datatree(linear, run, (X, Y), num_samples=6)["posterior"].sizes)["draw"] == 3
    with pytest.raises(ValueError, match=r"num_samples=5 .* by the 2 chains of the run"):
        to_datatree(linear, run, (X, Y), num_samples=5)
    with pytest.raises(ValueError, match="num_samples=22, but there are 20 draws only"):
        to_datatree(linear, run, (X, Y), num_samples=22)
