# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import copy
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn as nn
from pyro.infer import Trace_ELBO
from torch.func import functional_call

from pyro_bnn.distributions.mixture import EqualMixture
from pyro_bnn.infer.autoguide import AutoLaplace
from tests.common import assert_close
from tests.models import in_between_data, linear_regression, logistic_regression, tanh_network


def fitted(model, *data, **options):
    guide = AutoLaplace(model, **options).initialize(*data)
    guide.loc.data = torch.linspace(-1.0, 1.0, len(guide.loc))
    return guide.laplace_approximation(data, map_tolerance=float("inf"))


@pytest.mark.parametrize("structure", ["full", "kronecker", "diagonal", "low_rank", "function_space"])
def test_joint_covariance_and_coherent_functions(structure):
    x, y = in_between_data()
    guide = fitted(tanh_network(hidden=4), x, y, structure=structure)
    x_new = torch.tensor([[-1.0], [0.1], [0.12], [2.0]])
    joint = guide.joint_covariance(x_new)["obs"][:, 0, :, 0]
    assert_close(joint.diagonal(), guide.linearized_outputs(x_new)["obs"].variance[:, 0], rtol=1e-9)
    draws = guide.functional_samples(20_000, x_new)["obs"][..., 0]
    assert_close(
        torch.corrcoef(draws.mT),
        joint / (joint.diag().sqrt()[:, None] * joint.diag().sqrt()),
        atol=0.03,
        rtol=0,
    )
    again = [
        guide.functional_samples(3, x_new, generator=torch.Generator().manual_seed(1))["obs"]
        for _ in range(2)
    ]
    assert_close(*again, rtol=0)
    loader = [(x_new[:3],), (x_new[3:],)]
    assembled = torch.zeros(4, 4)
    for i, j, blocks in guide.joint_covariance_batches(loader):
        rows, columns = ([slice(0, 3), slice(3, 4)][k] for k in (i, j))
        assembled[rows, columns] = blocks["obs"][:, 0, :, 0]
        assembled[columns, rows] = blocks["obs"][:, 0, :, 0].mT
    assert_close(assembled, joint, rtol=1e-9, atol=1e-13)
    batches = list(guide.linearized_batches(loader))
    assert [len(b["obs"].mean) for b in batches] == [3, 1]


def test_monte_carlo_predictive_converges_to_the_closed_form():
    model, x, y = linear_regression()
    guide = fitted(model, x, y)
    exact = guide.predictive(x[:4])["obs"]
    sampled = guide.linearized_outputs(x[:4])["obs"].distribution("monte_carlo", num_samples=40_000)
    assert_close(sampled.mean, exact.mean, atol=0.01, rtol=0)
    assert_close(sampled.variance, exact.variance, rtol=0.05)
    assert_close(sampled.log_prob(y[:4]), exact.log_prob(y[:4]), atol=0.05, rtol=0.02)


def test_bridge_inverts_the_map_from_dirichlets_to_gaussians():
    model, x, y = logistic_regression()
    outputs = AutoLaplace(model).initialize(x, y).laplace_approximation((x, y), map_tolerance=float("inf"))
    outputs = outputs.linearized_outputs(x[:1])["obs"]
    alpha = torch.tensor([[2.0, 0.7, 5.0]])
    K = 3
    outputs.mean = alpha.log() - alpha.log().mean(-1, keepdim=True)
    inverse = 1 / alpha[0]
    outputs.covariance = (
        torch.diag(inverse) - (inverse[:, None] + inverse - inverse.sum() / K) / K
    ).unsqueeze(0)
    assert_close(outputs.bridge().concentration, alpha, rtol=1e-10)
    assert_close(outputs.distribution("bridge").probs, alpha / alpha.sum(), rtol=1e-10)
    linear, x, y = linear_regression()
    normal = fitted(linear, x, y).linearized_outputs(x)["obs"]
    with pytest.raises(ValueError, match="needs a Categorical"):
        normal.distribution("bridge")


def test_exact_predictives_of_gaussian_likelihoods():
    x, y = torch.randn(12, 3), torch.randn(12, 2)
    tril = torch.tensor([[0.5, 0.0], [0.2, 0.4]])

    def model(x, y=None, family="full"):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        d = (
            dist.MultivariateNormal(x @ w.mT, scale_tril=tril)
            if family == "full"
            else dist.LowRankMultivariateNormal(x @ w.mT, tril[:, :1], torch.tensor([0.3, 0.2]))
        )
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", d, obs=y)

    for family, noise in (
        ("full", tril @ tril.mT),
        ("low", tril[:, :1] @ tril[:, :1].mT + torch.diag(torch.tensor([0.3, 0.2]))),
    ):
        guide = AutoLaplace(lambda x, y=None, f=family: model(x, y, f)).initialize(x, y).polish((x, y))
        guide.laplace_approximation((x, y))
        found = guide.predictive(x[:3])["obs"]
        # Bayesian linear regression with two outputs
        precision = torch.kron(torch.linalg.inv(noise).contiguous(), (x.mT @ x).contiguous()) + torch.eye(6)
        rows = torch.kron(torch.eye(2), x[:1])
        expected = rows @ torch.linalg.inv(precision) @ rows.mT + noise
        assert_close(found.covariance_matrix[0], expected, rtol=1e-9)

    def positive(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.LogNormal(x @ w, 0.3), obs=y)

    guide = fitted(positive, x, y[:, 0].exp())
    outputs = guide.linearized_outputs(x)["obs"]
    found, sampled = outputs.distribution(), outputs.distribution("monte_carlo", num_samples=20_000)
    value = outputs.mean[:, 0].exp()
    assert_close(found.log_prob(value), sampled.log_prob(value), atol=0.1, rtol=0)


def test_likelihoods_without_a_closed_form_are_sampled():
    x, y = torch.randn(12, 3), torch.randint(0, 4, (12,)).double()

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Poisson((x @ w).exp()), obs=y)

    guide = fitted(model, x, y)
    found = [
        guide.predictive(x, num_samples=50, generator=torch.Generator().manual_seed(4))["obs"]
        for _ in range(2)
    ]
    assert_close(found[0].log_prob(y), found[1].log_prob(y), rtol=0)
    exact = guide.linearized_outputs(x)["obs"]
    many = guide.predictive(x, num_samples=50_000)["obs"]
    # E exp(N(m, v)) = exp(m + v / 2)
    assert_close(many.mean, (exact.mean + exact.variance / 2).exp()[:, 0], rtol=0.03)


@pytest.mark.parametrize("structure", ["full", "kronecker", "diagonal", "low_rank", "block"])
def test_generators_are_honoured(structure):
    x, y = in_between_data()
    guide = fitted(tanh_network(hidden=4), x, y, structure=structure)

    def generator():
        return torch.Generator().manual_seed(7)

    first, other = (guide.sample_posterior((3,), generator=generator()) for _ in range(2))
    for name, value in first.items():
        assert_close(value, other[name], rtol=0)
    assert not torch.equal(guide.sample_posterior((3,))["w1"], first["w1"])
    functions = guide.functional_samples(3, x, generator=generator())["obs"]
    means = guide.observed_distributions(first, x)["obs"].mean  # the same draws
    assert_close(functions[..., 0], means, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_multiclass_probit(spread):
    model, x, y = logistic_regression()
    outputs = fitted(model, x, y).linearized_outputs(x[:40])["obs"]
    root = spread * torch.randn(40, 3, 3)
    outputs.mean, outputs.covariance = 2 * torch.randn(40, 3), root @ root.mT
    exact = outputs.sample((40_000,)).softmax(-1).mean(0)
    found = outputs.distribution("probit").probs
    if spread < 1:  # standard deviations of the logits near 1
        assert (found - exact).abs().max() < 0.06
    # a random constant added to all logits changes nothing
    shifted = copy.copy(outputs)
    shifted.mean = outputs.mean + 3.0
    shifted.covariance = outputs.covariance + 5.0
    assert_close(shifted.distribution("probit").probs, found, rtol=1e-9)
    assert_close(shifted.distribution("bridge").probs, outputs.distribution("bridge").probs, rtol=1e-9)
    # scaling each logit by its own variance, as is often done, is worse
    naive = (outputs.mean / (1 + torch.pi / 8 * outputs.variance).sqrt()).softmax(-1)
    assert (found - exact).abs().mean() < (naive - exact).abs().mean()


def test_equal_mixture_samples_what_its_density_says():
    mixture = EqualMixture(dist.Normal(torch.tensor([[0.0, 5.0], [4.0, 5.0]]), torch.tensor(1.0)))
    draws = mixture.sample((50_000,))
    assert_close(draws.mean(0), mixture.mean, atol=0.05, rtol=0)
    assert_close(draws.var(0), mixture.variance, rtol=0.05)
    two = dist.MultivariateNormal(torch.zeros(3, 4, 2), torch.eye(2))
    assert EqualMixture(two).sample((5,)).shape == (5, 4, 2)
    assert EqualMixture(two).log_prob(torch.zeros(5, 4, 2)).shape == (5, 4)


def normalised():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    shapes = {k: v.shape for k, v in net.named_parameters()}

    def model(x, y=None):
        values = {
            k: pyro.sample(k, dist.Normal(torch.zeros(s), 1.0).to_event(len(s))) for k, s in shapes.items()
        }
        f = functional_call(net, values, (x,))[..., 0]
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, 0.3), obs=y)

    return net, model, torch.randn(20, 3), torch.randn(20)


@pytest.mark.parametrize("structure", ["full", "kronecker", "low_rank"])
def test_the_model_is_not_changed(structure):
    net, model, x, y = normalised()
    before = copy.deepcopy(net.state_dict())
    guide = AutoLaplace(model, structure=structure).initialize(x, y)
    guide.loc.data.normal_()
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    guide.linearized_outputs(x)
    guide.functional_samples(2, x)
    with pytest.raises(ValueError, match="the observation has shape"):
        guide.laplace_approximation((x, y[:, None]))
    for name, value in net.state_dict().items():
        assert_close(value, before[name], rtol=0)
    assert all(module.training and not module._forward_hooks for module in net.modules())
    # dropout is off: the same curvature again
    assert_close(
        guide.laplace_approximation((x, y), map_tolerance=float("inf")).log_evidence(),
        guide.laplace_approximation((x, y), map_tolerance=float("inf")).log_evidence(),
        rtol=1e-9,
    )


@pytest.mark.parametrize(
    "structure", ["full", "block", "kronecker", "diagonal", "low_rank", "function_space"]
)
def test_data_can_be_added_saved_and_split(structure, tmp_path):
    x, y = in_between_data(n=200)
    model = tanh_network(hidden=4)
    # the inputs' factor of the Kronecker approximation is an average: halves of equal size add up up to rounding only
    whole = fitted(model, x, y, structure=structure, rank=13)
    parts = fitted(model, x[:100], y[:100], structure=structure, rank=13)
    parts.laplace_approximation((x[100:], y[100:]), override=False, map_tolerance=float("inf"))
    assert_close(parts.posterior.variance, whole.posterior.variance, rtol=1e-7)
    assert_close(parts.log_evidence(), whole.log_evidence(), rtol=1e-8)
    small = fitted(model, x, y, structure=structure, rank=13, budget=2000)  # chunks of a few points
    assert_close(small.posterior.variance, whole.posterior.variance, rtol=1e-8)
    whole.optimize_hyperparameters()
    torch.save(whole.state_dict(), tmp_path / "guide.pt")
    state = torch.load(tmp_path / "guide.pt", weights_only=True)
    assert all(value.shape[:1] != (200,) for value in state.values())
    fresh = AutoLaplace(model, structure=structure, rank=13).initialize(x[:5], y[:5])
    fresh.load_state_dict(state)
    assert_close(fresh.log_evidence(), whole.log_evidence(), rtol=1e-12)
    assert_close(fresh.posterior.variance, whole.posterior.variance, rtol=1e-12)


def test_memory_is_estimated_before_it_is_allocated():
    x, y = in_between_data()
    message = (
        r"structure='full' over 121 entries needs about 469 kB but 50 kB are available on cpu. These would fit: "
        r"structure='diagonal' \(2.9 kB\); or take fewer latents"
    )
    with pytest.raises(MemoryError, match=message):
        fitted(tanh_network(hidden=40), x, y, memory_limit=5e4)
    with pytest.raises(MemoryError, match="No structure over all of these fits"):
        fitted(tanh_network(hidden=40), x, y, memory_limit=1000.0)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(100, 41), 1.0).to_event(2))
        b = pyro.sample("b", dist.Normal(torch.zeros(100), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal((x @ w.mT + b).sum(-1), 1.0), obs=y)

    with pytest.raises(
        MemoryError, match=r"structure='kronecker' over 4,200 entries needs about .*'diagonal'"
    ):
        fitted(model, torch.randn(30, 41), y, structure="kronecker", memory_limit=2e5)
    with pytest.raises(MemoryError, match=r"structure='function_space' with 3.* rows"):
        fitted(tanh_network(hidden=40), x, y, structure="function_space", memory_limit=2e4)


def half_network(dtype):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(4, 3, dtype=dtype), 1.0).to_event(2))
        b = pyro.sample("b", dist.Normal(torch.zeros(4, dtype=dtype), 1.0).to_event(1))
        v = pyro.sample("v", dist.Normal(torch.zeros(3, 4, dtype=dtype), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=torch.tanh(x @ w.mT + b) @ v.mT), obs=y)

    return model


@pytest.mark.every(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("structure", ["full", "block", "kronecker", "diagonal", "low_rank", "nystrom"])
def test_networks_in_half_precision(structure, dtype):
    torch.set_default_dtype(torch.float32)
    x, y = torch.randn(40, 3).to(dtype), torch.randint(0, 3, (40,))
    point = torch.linspace(-1.0, 1.0, 28).to(dtype)
    found = []
    for kind in (dtype, torch.float32):
        model, data = half_network(kind), x.to(kind)
        guide = AutoLaplace(model, structure=structure, rank=20).initialize(data, y)
        guide.loc.data = point.to(kind)
        guide.laplace_approximation((data, y), map_tolerance=float("inf"))
        found.append((guide, guide.linearized_outputs(data)["obs"]))
        assert guide.posterior.variance.dtype == torch.float32
        assert guide.sample_posterior((2,))["w"].dtype == kind
        assert torch.isfinite(torch.tensor(Trace_ELBO().loss(model, guide, data, y)))
        assert guide.quantiles([0.1])["w"].dtype == kind
        assert torch.isfinite(guide.log_evidence(data=(data, y)))
    # the digits of the network's own arithmetic: 8 bits in bfloat16, 11 in float16
    digits = 30 * torch.finfo(dtype).eps
    (half, outputs), (exact, expected) = found
    assert_close(half.log_evidence(), exact.log_evidence(), rtol=digits / 10)
    if structure != "nystrom":  # whose landmarks are drawn at random
        assert_close(half.posterior.variance, exact.posterior.variance, rtol=digits)
        assert_close(outputs.variance, expected.variance, rtol=digits, atol=digits * 0.1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_modes_of_the_caller_do_not_matter(mode):
    x, y = in_between_data()
    expected = fitted(tanh_network(hidden=4), x, y)
    with mode():
        guide = AutoLaplace(tanh_network(hidden=4)).initialize(x, y)
        guide.loc.data = torch.linspace(-1.0, 1.0, len(guide.loc))
        # the data are made in this mode, too
        data = (x + 0.0, y + 0.0)
        guide.laplace_approximation(data, map_tolerance=float("inf"))
        assert_close(guide.posterior.variance, expected.posterior.variance, rtol=1e-12)
        for name in ("linearized_outputs", "joint_covariance", "predictive"):
            getattr(guide, name)(data[0])
        functions = guide.functional_samples(2, data[0], generator=torch.Generator().manual_seed(0))
        guide.optimize_hyperparameters()
    same = expected.functional_samples(2, x, generator=torch.Generator().manual_seed(0))
    assert_close(functions["obs"], same["obs"], rtol=1e-9)


@pytest.mark.parametrize("structure", ["full", "kronecker", "diagonal"])
def test_float32(structure):
    x, y = in_between_data()
    double = fitted(tanh_network(hidden=4), x, y, structure=structure)
    torch.set_default_dtype(torch.float32)
    guide = AutoLaplace(tanh_network(hidden=4), structure=structure).initialize(x.float(), y.float())
    guide.loc.data = torch.linspace(-1.0, 1.0, len(guide.loc))
    guide.laplace_approximation((x.float(), y.float()), map_tolerance=float("inf"))
    assert guide.posterior.variance.dtype == torch.float32
    assert_close(guide.posterior.variance, double.posterior.variance, rtol=1e-3)


def test_predictions_of_a_split_batch_keep_no_activations():
    pyro.set_rng_seed(0)
    x = torch.randn(600, 3)
    kept = []

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(40, 3), 1.0).to_event(2))
        v = pyro.sample("v", dist.Normal(torch.zeros(40), 1.0).to_event(1))
        hidden = torch.tanh(x @ w.T)
        kept.append((len(x), weakref.ref(hidden)))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(hidden @ v, 1.0), obs=y)

    guide = AutoLaplace(model, structure="diagonal", budget=200_000).initialize(x, torch.zeros(600))
    guide.laplace_approximation((x, torch.zeros(600)), map_tolerance=float("inf"))
    kept.clear()
    result = guide.linearized_outputs(x)["obs"]
    largest = [size for size, ref in kept if ref() is not None]
    assert result.mean.shape == (600, 1)
    assert largest == [], "activations of the prediction are still alive"
    whole = AutoLaplace(model, structure="diagonal").initialize(x, torch.zeros(600))
    whole.loc.data.copy_(guide.loc)
    whole.laplace_approximation((x, torch.zeros(600)), map_tolerance=float("inf"))
    assert_close(result.covariance, whole.linearized_outputs(x)["obs"].covariance, rtol=1e-4)


def test_the_budget_counts_activations_before_the_last_layer():
    pyro.set_rng_seed(0)
    x, y = torch.randn(400, 3), torch.zeros(400)
    sizes = []

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(500, 3), 1.0).to_event(2))
        v = pyro.sample("v", dist.Normal(torch.zeros(500), 1.0).to_event(1))
        sizes.append(len(x))
        hidden = torch.tanh(torch.relu(x @ w.T) @ torch.eye(500))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(hidden @ v / 500, 1.0), obs=y)

    guide = AutoLaplace(model, structure="diagonal", sites=["v"], budget=50_000).initialize(x, y)
    sizes.clear()
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    # the outputs of two activations are kept per example, and a few numbers more
    chunks = [size for size in sizes if size not in (2, 4, 5, 7, 17, 64, 128)]  # runs that look for the rows
    assert sum(chunks) + 64 == 400
    assert max(chunks) * 1000 <= 50_000


def test_a_subset_of_data_stands_for_all_of_them():
    model, x, y = linear_regression(prior_scale=2.0, noise=0.3, n=50)
    # all the data in the subset: exact
    exact = fitted(model, x, y, structure="full")
    everything = fitted(model, x, y, structure="function_space", subset_size=50)
    assert_close(everything.posterior.variance, exact.posterior.variance, rtol=1e-10)
    assert_close(everything.log_evidence(), exact.log_evidence(), rtol=1e-10)
    # M points of 50, in batches: the Gaussian process with kernel s^2 x x' given these points with noise M / N
    guide = AutoLaplace(model, structure="function_space", subset_size=12).initialize(x, y)
    guide.loc.data = torch.linspace(-1.0, 1.0, 3)
    loader = [(x[:20], y[:20]), (x[20:], y[20:])]
    generator = torch.Generator().manual_seed(3)
    guide.laplace_approximation(loader, generator=generator, map_tolerance=float("inf"))
    chosen = x[torch.randperm(50, generator=torch.Generator().manual_seed(3))[:12]]
    new = torch.randn(7, 3)
    inner = 4.0 * chosen @ chosen.mT + 0.09 * 12 / 50 * torch.eye(12)
    cross = 4.0 * new @ chosen.mT
    expected = 4.0 * new @ new.mT - cross @ torch.linalg.solve(inner, cross.mT)
    assert_close(guide.joint_covariance(new)["obs"][:, 0, :, 0], expected, rtol=1e-8)
    assert_close(guide.linearized_outputs(new)["obs"].variance[:, 0], expected.diagonal(), rtol=1e-8)
    # a proper distribution over the weights, and an evidence of its own precision
    precision = torch.eye(3) / 4.0 + chosen.mT @ chosen / 0.09 * 50 / 12
    posterior = torch.distributions.MultivariateNormal(guide.loc.detach(), precision_matrix=precision)
    w = torch.randn(5, 3)
    assert_close(guide.posterior.log_prob(w), posterior.log_prob(w), rtol=1e-8)
    assert_close(guide.posterior.entropy(), posterior.entropy(), rtol=1e-8)
    assert_close(
        guide.log_evidence(),
        exact.log_evidence() + posterior.entropy() - exact.posterior.entropy(),
        rtol=1e-8,
    )


def test_a_subset_needs_only_its_own_memory_and_separate_examples():
    x, y = in_between_data(n=200)
    model = tanh_network(hidden=40)
    limit = 3.1 * 8 * (20 * 121 + 20**2)
    message = r"structure='function_space' with 200 rows needs about .* Pass a smaller subset_size"
    with pytest.raises(MemoryError, match=message):
        fitted(model, x, y, structure="function_space", memory_limit=limit)
    fitted(model, x, y, structure="function_space", subset_size=20, memory_limit=limit)
    with pytest.raises(ValueError, match="goes with structure='function_space' only"):
        AutoLaplace(model, structure="full", subset_size=3)
    guide = fitted(model, x, y, structure="function_space", subset_size=20)
    with pytest.raises(ValueError, match="subset of data is not differentiable"):
        guide.log_evidence(data=(x, y))

    def coupled(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        return pyro.sample("obs", dist.Normal(x @ w, 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match="treats its examples separately"):
        fitted(coupled, x, y, structure="function_space", subset_size=20)
