# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, init_to_sample, init_to_value
from pyro.nn import PyroModule
from torch import nn

from pyro_bnn.infer import NotAMinimumError, posterior_predictive
from pyro_bnn.infer.autoguide import AutoLaplace, PointEstimateWarning, UnconvergedMAPWarning
from pyro_bnn.ops.newton import newton_cg
from tests.common import assert_close
from tests.contracts.curvature import assert_batches_add_up, assert_equals_dense_hessian
from tests.contracts.posterior import LinearGaussian, assert_exact
from tests.models import in_between_data, linear_regression, logistic_regression, tanh_network


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_linear_regression_closed_form(curvature):
    model, x, y = linear_regression()
    guide = AutoLaplace(model, curvature=curvature).initialize(x, y).polish((x, y))
    guide.laplace_approximation((x, y))
    exact = LinearGaussian(x, y, noise=0.3, prior_scale=2.0)
    assert_exact(guide, exact)
    assert_close(guide.log_evidence(), exact.log_evidence, rtol=1e-11)

    x_new = torch.randn(7, 3)
    predictive = guide.predictive(x_new)["obs"]
    assert_close(predictive.mean, x_new @ guide.loc, rtol=1e-9)
    variance = exact.variance(x_new) + 0.3**2
    assert_close(predictive.variance, variance, rtol=1e-9)


def test_diagonal_is_the_diagonal_of_the_precision():
    model, x, y = linear_regression()
    guide = AutoLaplace(model, structure="diagonal").initialize(x, y).polish((x, y))
    guide.laplace_approximation((x, y))
    precision = x.mT @ x / 0.3**2 + torch.eye(3) / 2.0**2
    assert_close(guide.posterior.variance, 1 / precision.diagonal(), rtol=1e-12)
    assert_close(guide.posterior.entropy(), -guide.posterior.log_prob(guide.loc).detach() + 1.5, rtol=1e-12)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_logistic_regression_equals_dense_autograd(curvature):
    # the softmax is canonical, so that the GGN is the exact Hessian
    model, x, y = logistic_regression()
    guide = AutoLaplace(model, curvature=curvature).initialize(x, y).polish((x, y))
    guide.laplace_approximation((x, y))
    assert_equals_dense_hessian(model, guide, x, y, rtol=1e-10, atol=1e-10)


def test_ggn_of_a_network_equals_explicit_product():
    # learned noise: parameters are (loc, log_scale) and the Fisher information diag(1/s^2, 2)
    x, y = in_between_data()
    model = tanh_network(hidden=5, noise=None)
    guide = AutoLaplace(model, init_loc_fn=init_to_sample).initialize(x, y)
    with pytest.warns(UnconvergedMAPWarning):
        guide.laplace_approximation((x, y))
    space = guide.packed.space

    def location(u):
        v = space.unpack(u)
        return torch.tanh(x @ v["w1"].mT + v["b1"]) @ v["w2"] + v["b2"]

    latent = guide.loc.detach()
    J = torch.autograd.functional.jacobian(location, latent)
    sigma = space.unpack(latent)["sigma"]
    expected = J.mT @ J / sigma**2
    at = space.slices["sigma"].start
    expected[at, at] += 2.0 * len(x)  # d log_scale / du = 1
    prior = torch.ones(space.dim)
    prior[at] = 1 / 0.5**2  # log sigma ~ N(-2, 0.5)
    assert_close(guide.precision, expected + torch.diag(prior), rtol=1e-9, atol=1e-9)


def test_exact_hessian_of_a_network_equals_dense_autograd():
    x, y = in_between_data()
    model = tanh_network(hidden=5, noise=None)
    guide = AutoLaplace(model, curvature="hessian", init_loc_fn=init_to_sample).initialize(x, y)
    guide.polish((x, y)).laplace_approximation((x, y))
    expected = assert_equals_dense_hessian(model, guide, x, y, rtol=1e-7, atol=1e-6)
    assert_close(guide.map_report.smallest_curvature, torch.linalg.eigvalsh(expected)[0], rtol=1e-2)
    diagonal = AutoLaplace(model, curvature="hessian", structure="diagonal").initialize(x, y)
    diagonal.loc.data.copy_(guide.loc.data)
    diagonal.laplace_approximation((x, y))
    assert_close(diagonal.precision, expected.diagonal(), rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("structure", ["full", "diagonal"])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_batches_add_up(structure, curvature):
    model, x, y = logistic_regression()
    guide = AutoLaplace(model, structure=structure, curvature=curvature).initialize(x, y).polish((x, y))
    assert_batches_add_up(guide, x, y)


def test_subsampled_plate_is_not_counted_twice():
    model, x, y = linear_regression()

    def subsampled(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        with pyro.plate("data", 50, subsample_size=len(x), subsample=torch.arange(len(x))):
            return pyro.sample("obs", dist.Normal(x @ w, 0.3), obs=y)

    batches = [(x[:30], y[:30]), (x[30:], y[30:])]
    guide = AutoLaplace(subsampled).initialize(*batches[0]).polish(batches).laplace_approximation(batches)
    expected = AutoLaplace(model).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    assert_close(guide.precision, expected.precision, rtol=1e-11, atol=1e-12)
    assert_close(guide.log_evidence(), expected.log_evidence(), rtol=1e-10)
    with pytest.raises(ValueError, match="cover 30 of the 50 elements of plate 'data'"):
        guide.laplace_approximation(batches[:1])


def test_masked_observations_do_not_count():
    model, x, y = linear_regression()
    keep = torch.arange(50) < 40

    def masked(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=keep[: len(x)]):
            return pyro.sample("obs", dist.Normal(x @ w, 0.3), obs=y)

    guide = AutoLaplace(masked).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    x, y = x[keep], y[keep]
    expected = AutoLaplace(model).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    assert_close(guide.precision, expected.precision, rtol=1e-11)
    assert_close(guide.loc, expected.loc, rtol=1e-8)


def test_vector_valued_observations():
    x, W = torch.randn(40, 3), torch.randn(3, 2)
    y = x @ W + 0.1 * torch.randn(40, 2)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ w, torch.tensor([0.1, 0.2])).to_event(1), obs=y)

    guide = AutoLaplace(model).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    noise_precision = torch.diag(torch.tensor([0.1, 0.2]) ** -2)
    assert_close(guide.precision, torch.kron(x.mT @ x, noise_precision) + torch.eye(6), rtol=1e-10, atol=1e-9)


def test_hierarchical_prior_is_laplace_approximated_jointly():
    # a non-separable prior: the Hessian of its negative log density is dense and must be exact
    _, x, y = linear_regression()

    def hierarchical(x, y=None):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(3), scale).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ w, 0.3), obs=y)

    guide = AutoLaplace(hierarchical, curvature="hessian").initialize(x, y).polish((x, y))
    guide.laplace_approximation((x, y))
    expected = assert_equals_dense_hessian(hierarchical, guide, x, y, rtol=1e-9, atol=1e-9)
    ggn = AutoLaplace(hierarchical).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    assert_close(ggn.precision, expected, rtol=1e-6, atol=1e-6)  # the likelihood is linear-Gaussian


def test_linearized_draws_match_the_closed_form():
    x, y = in_between_data()
    model = tanh_network(hidden=5)
    guide = AutoLaplace(model, init_loc_fn=init_to_sample).initialize(x, y).polish((x, y))
    guide.laplace_approximation((x, y))
    x_new = torch.linspace(-2, 2, 9).unsqueeze(-1)
    outputs = guide.linearized_outputs(x_new)["obs"]
    draws = guide.sample_posterior((40_000,))
    means = guide.observed_distributions(draws, x_new)["obs"].mean
    standard_error = (outputs.variance.squeeze(-1) / 40_000).sqrt()
    assert ((means.mean(0) - outputs.mean.squeeze(-1)).abs() < 4.5 * standard_error).all()
    assert_close(means.var(0), outputs.variance.squeeze(-1), rtol=4.5 * (2 / 40_000) ** 0.5)


def test_posterior_predictive_uses_the_linearized_model():
    x, y = in_between_data()
    model = tanh_network(hidden=5, noise=None)
    guide = AutoLaplace(model, init_loc_fn=init_to_sample).initialize(x, y).polish((x, y))
    with pytest.warns(PointEstimateWarning):
        point = posterior_predictive(model, guide, (x, y), num_samples=2)
    assert_close(point.mean[0], point.mean[1], rtol=0)
    assert point.mean.shape == point.log_likelihood.shape == (2, len(x))
    guide.laplace_approximation((x, y))
    prediction = posterior_predictive(model, guide, (x, y), num_samples=20_000)
    outputs = guide.linearized_outputs(x)["obs"]
    assert_close(prediction.mean.var(0), outputs.variance[:, 0], rtol=4.5 * (2 / 20_000) ** 0.5)
    scale = prediction.draws["sigma"].unsqueeze(-1)  # linear in log sigma, so exact
    assert_close(
        prediction.log_likelihood, dist.Normal(prediction.mean, scale).log_prob(y), rtol=1e-9, atol=1e-9
    )


def test_probit_matches_monte_carlo():
    model, x, y = logistic_regression()
    guide = AutoLaplace(model).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    outputs = guide.linearized_outputs(x[:10])["obs"]
    probs = outputs.sample((20_000,)).softmax(-1).mean(0)
    assert_close(outputs.distribution().probs, probs, atol=0.02, rtol=0)


def test_composes_with_stock_pyro():
    model, x, y = linear_regression()
    guide = AutoLaplace(model)
    guide.initialize(x, y)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(400):
        svi.step(x, y)
    guide.laplace_approximation((x, y))
    exact = guide.log_evidence()
    # the posterior is exactly Gaussian: importance weights are constant, the ELBO equals the log evidence
    losses = torch.tensor([Trace_ELBO().loss(model, guide, x, y) for _ in range(3)])
    assert losses.std() < 1.0
    assert (-losses < exact + 1e-6 + 3 * losses.std()).all()
    draws = Predictive(model, guide=guide, num_samples=50)(x)
    assert draws["obs"].shape == (50, len(x))


def test_exact_posterior_has_constant_importance_weights():
    model, x, y = linear_regression()
    guide = AutoLaplace(model).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    losses = torch.tensor([Trace_ELBO().loss(model, guide, x, y) for _ in range(5)])
    assert_close(-losses, guide.log_evidence().expand(5), rtol=1e-10)


def test_part_of_the_sites_in_a_guide_list():
    _, x, y = linear_regression()

    def two(x, y=None):
        sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 0.1))
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ w, sigma), obs=y)

    guide = AutoGuideList(two)
    guide.append(AutoDelta(pyro.poutine.block(two, expose=["sigma"])))
    guide.append(AutoLaplace(pyro.poutine.block(two, hide=["sigma"])))
    svi = SVI(two, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    first = svi.step(x, y)
    for _ in range(200):
        last = svi.step(x, y)
    assert last < first

    # at the end the value that was drawn for sigma is the one that the Laplace approximation must see
    part = guide[1]
    for method in (part.polish, part.laplace_approximation):
        with pytest.raises(ValueError, match="not a function of its latents"):
            method((x, y))
    sigma = guide[0].median()["sigma"]
    conditioned = pyro.poutine.block(pyro.poutine.condition(two, data={"sigma": sigma}), hide=["sigma"])
    part = AutoLaplace(conditioned).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    precision = x.mT @ x / sigma**2 + torch.eye(3) / 4
    assert_close(part.posterior.covariance_matrix, torch.linalg.inv(precision), rtol=1e-8)
    assert_close(part.loc.detach(), torch.linalg.solve(precision, x.mT @ y / sigma**2), rtol=1e-6)
    parts = AutoGuideList(two)
    parts.append(AutoDelta(pyro.poutine.block(two, expose=["sigma"])))
    parts.append(part)
    draws = Predictive(two, guide=parts, num_samples=2000)(x)["w"].reshape(2000, 3)
    scale = torch.linalg.inv(precision).diagonal().sqrt()
    assert (((draws.mean(0) - part.loc.detach()) / scale).abs() < 4.5 / 2000**0.5).all()


def test_state_dict_loads_into_a_fresh_guide(tmp_path):
    model, x, y = logistic_regression()
    guide = AutoLaplace(model).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    fresh = AutoLaplace(model).initialize(x, y)
    fresh.load_state_dict(torch.load(tmp_path / "guide.pt", weights_only=True))
    assert_close(fresh.posterior.covariance_matrix, guide.posterior.covariance_matrix, rtol=0)
    assert_close(fresh.log_evidence(), guide.log_evidence(), rtol=0)
    pyro.set_rng_seed(3)
    draws = guide.sample_posterior((4,))
    pyro.set_rng_seed(3)
    assert_close(fresh.sample_posterior((4,))["w"], draws["w"], rtol=0)


def test_quantiles_are_those_of_the_marginals():
    model, x, y = linear_regression()
    guide = AutoLaplace(model).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    low, high = guide.quantiles([0.025, 0.975])["w"]
    assert_close((high - low) / 2 / 1.959963984540054, guide.posterior.variance.sqrt(), rtol=1e-9)
    assert_close(guide.median()["w"], guide.loc.detach(), rtol=0)


def test_newton_steps_out_of_the_support_are_rejected():
    # from ten times the maximum likelihood rate, the first Newton step is negative and the density NaN
    y = dist.Poisson(4.0).sample((30,))

    def model(y=None):
        rate = pyro.sample("rate", dist.Normal(4.0, 1e4))
        with pyro.plate("data", 30):
            return pyro.sample("obs", dist.Poisson(rate), obs=y)

    guide = AutoLaplace(model, init_loc_fn=init_to_value(values={"rate": torch.tensor(40.0)})).initialize(y)
    result = newton_cg(lambda u: guide.packed.losses(u, y), torch.tensor([40.0]), tolerance=1e-6)
    assert_close(result.point[0], y.mean(), rtol=1e-6)


class Halved(PyroModule):
    """A float32 network with batch normalisation and a prior built from buffers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh()).float()
        self.register_buffer("width", torch.tensor(0.7, dtype=torch.float32))

    def forward(self, x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3).to(x), self.width).to_event(1))
        f = self.net(x) @ w
        if y is not None and len(y) == 3:
            raise RuntimeError("a model that fails")
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, 0.1), obs=y)


def test_polish_in_double_precision_leaves_the_model_as_it_was():
    x, y = torch.randn(40, 2), torch.randn(40)
    model = Halved()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    guide = AutoLaplace(model).initialize(x.float(), y.float())
    guide.polish((x.float(), y.float()), float64=True)
    assert guide.loc.dtype == torch.float32
    with torch.no_grad():
        h = copy.deepcopy(model).double().eval().net(x.float().double())
    scale = torch.tensor(0.7, dtype=torch.float32).double()
    exact = torch.linalg.solve(h.mT @ h / 0.01 + torch.eye(3) / scale**2, h.mT @ y.float().double() / 0.01)
    assert_close(guide.loc.detach().double(), exact, rtol=1e-6)  # to the last bits of float32
    with pytest.raises(RuntimeError, match="a model that fails"):
        guide.polish((x[:3].float(), y[:3].float()), float64=True)
    assert torch.get_default_dtype() == torch.float64
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    assert model.training


def test_indefinite_hessian_is_refused():
    x, y = in_between_data()
    guide = AutoLaplace(tanh_network(), curvature="hessian", init_loc_fn=init_to_sample).initialize(x, y)
    with pytest.raises(NotAMinimumError, match=r"of 49 eigenvalues are not positive.*polish"):
        guide.laplace_approximation((x, y))


def test_bad_input():
    model, x, y = linear_regression()
    with pytest.raises(
        ValueError, match="unknown structure 'kron', expected one of 'full', 'block', 'kronecker', 'diagonal'"
    ):
        AutoLaplace(model, structure="kron")
    with pytest.raises(ValueError, match="unknown curvature 'fisher'"):
        AutoLaplace(model, curvature="fisher")
    with pytest.raises(ValueError, match=r"no observed site.*'obs'"):
        AutoLaplace(model).initialize(x)
    with pytest.raises(RuntimeError, match="not initialised"):
        AutoLaplace(model).polish((x, y))
    guide = AutoLaplace(model).initialize(x, y)
    with pytest.raises(RuntimeError, match="call laplace_approximation"):
        guide.linearized_outputs(x)
    with pytest.raises(ValueError, match="'obs' was observed at initialisation"):
        guide.laplace_approximation((x,))
    with pytest.raises(ValueError, match="empty iterable"):
        guide.laplace_approximation([])
    bad = y.clone()
    bad[3] = torch.nan
    with pytest.raises(ValueError, match="argument 1 of the model holds 1 non-finite"):
        guide.laplace_approximation((x, bad))
    with pytest.raises(
        ValueError, match=r"'obs': the observation has shape \(50, 1\), its distribution has shape \(50,\)"
    ):
        guide.laplace_approximation((x, y.unsqueeze(-1)))
