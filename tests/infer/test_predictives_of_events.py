# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
The elements of one observation (``to_event``) share the latents: their predictive is joint. Against closed forms from dense
algebra, and quadrature.
"""

from contextlib import ExitStack

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoLaplaceMixture
from tests.common import assert_close

NOISE = 0.4


def features(x: Tensor, E: int) -> Tensor:
    """The Jacobian of E outputs per row of x in four weights, shape (n, E, 4): a few directions that they share."""
    directions = torch.linspace(0.2, 1.5, E)[:, None] * torch.tensor([1.0, 0.5, -0.5, 0.3]) + 0.1 * torch.eye(
        E, 4
    )
    return x[:, None, :] * directions


def model_of(E: int, family=dist.Normal, shape=None):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        f = features(x, E) @ w
        f = f if shape is None else f.reshape((len(x), *shape))
        d = family(f, NOISE) if family in (dist.Normal, dist.LogNormal) else family(logits=f)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", d.to_event(f.dim() - 1), obs=y)

    return model


def linear(E: int, x: Tensor, y: Tensor, x_new: Tensor) -> tuple[Tensor, Tensor]:
    """The exact predictive of Bayesian linear regression: means (m, E) and covariances (m, E, E)."""
    J = features(x, E).reshape(-1, 4)
    covariance = torch.linalg.inv(torch.eye(4) + J.mT @ J / NOISE**2)
    mean = covariance @ J.mT @ y.reshape(-1) / NOISE**2
    rows = features(x_new, E)
    return rows @ mean, rows @ covariance @ rows.mT + NOISE**2 * torch.eye(E)


def fitted(model, *data, **options):
    guide = AutoLaplace(model, **options).initialize(*data).polish(data)
    return guide.laplace_approximation(data)


@pytest.mark.parametrize("E", [2, 5, 70])
def test_vectors_of_outputs(E):
    """70 outputs are more than are formed together with the variances."""
    x, y, new = torch.randn(6, 4), torch.randn(6, E), torch.randn(3, 4)
    mean, covariance = linear(E, x, y, new)
    guide = fitted(model_of(E), x, y)
    found = guide.predictive(new)["obs"]
    assert_close(found.mean, mean, rtol=1e-6, atol=1e-8)
    assert_close(found.covariance_matrix, covariance, rtol=1e-6, atol=1e-9)
    target = torch.randn(3, E)
    expected = [
        stats.multivariate_normal(m.numpy(), c.numpy()).logpdf(t.numpy())
        for m, c, t in zip(mean, covariance, target, strict=True)
    ]
    assert_close(found.log_prob(target), np.array(expected), rtol=1e-6)
    outputs = guide.linearized_outputs(new)["obs"]
    variances = covariance.diagonal(dim1=-2, dim2=-1) - NOISE**2
    assert_close(outputs.variance[..., 0], variances, rtol=1e-6)
    if E == 2:
        draws = outputs.sample((20_000,))[:, 0, :, 0]
        assert_close(torch.cov(draws.mT), covariance[0] - NOISE**2 * torch.eye(E), atol=0.02, rtol=0.05)
        sampled = outputs.distribution("monte_carlo", num_samples=4_000)
        assert_close(sampled.log_prob(target), found.log_prob(target), atol=0.1, rtol=0)
        assert_close(torch.cov(sampled.sample((1_000,))[:, 1].mT), covariance[1], atol=0.05, rtol=0.15)


@pytest.mark.parametrize(
    "structure", ["full", "block", "kronecker", "diagonal", "low_rank", "function_space"]
)
def test_every_structure(structure):
    x, y, new = torch.randn(20, 3), torch.randn(20, 2), torch.randn(5, 3)

    def network(x, w1, w2):
        return torch.tanh(x @ w1.mT) @ w2.mT

    def model(x, y=None):
        w1 = pyro.sample("w1", dist.Normal(torch.zeros(4, 3), 1.0).to_event(2))
        w2 = pyro.sample("w2", dist.Normal(torch.zeros(2, 4), 1.0).to_event(2))
        f = torch.nn.functional.linear(torch.tanh(torch.nn.functional.linear(x, w1)), w2)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, NOISE).to_event(1), obs=y)

    guide = AutoLaplace(
        model, structure=structure, curvature="ggn", **({"rank": 6} if structure == "low_rank" else {})
    )
    guide.initialize(x, y)
    guide.loc.data = torch.randn(20)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    dense = guide.posterior.quadratic_form(torch.eye(20))
    J = torch.func.jacrev(lambda u: network(new, u[:12].reshape(4, 3), u[12:].reshape(2, 4)))(
        guide.loc.detach()
    )
    expected = J @ dense @ J.mT + NOISE**2 * torch.eye(2)
    assert expected[:, 0, 1].abs().max() > 1e-3
    assert_close(guide.predictive(new)["obs"].covariance_matrix, expected, rtol=1e-8, atol=1e-11)


def test_images_of_outputs():
    x, y, new = torch.randn(6, 4), torch.randn(6, 6), torch.randn(3, 4)
    flat = fitted(model_of(6), x, y).predictive(new)["obs"]
    found = fitted(model_of(6, shape=(2, 3)), x, y.reshape(6, 2, 3)).predictive(new)["obs"]
    target = torch.randn(3, 6)
    assert found.event_shape == (2, 3)
    assert found.sample((4,)).shape == (4, 3, 2, 3)
    assert_close(found.log_prob(target.reshape(3, 2, 3)), flat.log_prob(target), rtol=1e-8)
    assert_close(found.mean.reshape(3, 6), flat.mean, rtol=1e-6, atol=1e-9)
    assert_close(found.variance.reshape(3, 6), flat.variance, rtol=1e-8)


def test_logarithms():
    x, y, new = torch.randn(6, 4), torch.randn(6, 3), torch.randn(2, 4)
    mean, covariance = linear(3, x, y, new)
    found = fitted(model_of(3, dist.LogNormal), x, y.exp()).predictive(new)["obs"]
    target = torch.randn(2, 3).exp()
    expected = torch.distributions.MultivariateNormal(mean, covariance).log_prob(
        target.log()
    ) - target.log().sum(-1)
    assert_close(found.log_prob(target), expected, rtol=1e-6)
    marginal = torch.distributions.LogNormal(mean, covariance.diagonal(dim1=-2, dim2=-1).sqrt())
    assert_close(found.mean, marginal.mean, rtol=1e-6)
    assert_close(found.variance, marginal.variance, rtol=1e-5)


def test_vectors_of_vectors():
    """A MultivariateNormal in a further event dimension."""
    x, y, new = torch.randn(6, 4), torch.randn(6, 3, 2), torch.randn(2, 4)
    tril = torch.tensor([[0.5, 0.0], [0.2, 0.4]])

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        f = (features(x, 6) @ w).reshape(-1, 3, 2)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.MultivariateNormal(f, scale_tril=tril).to_event(1), obs=y)

    noise = torch.kron(torch.eye(3), tril @ tril.mT)
    J = features(x, 6)
    covariance = torch.linalg.inv(torch.eye(4) + (J.mT @ torch.linalg.inv(noise) @ J).sum(0))
    rows = features(new, 6)
    found = fitted(model, x, y).predictive(new)["obs"]
    assert_close(found.covariance_matrix, rows @ covariance @ rows.mT + noise, rtol=1e-7, atol=1e-10)
    assert found.event_shape == (3, 2)


def test_one_observation_of_many_elements():
    """All rows of the data are one event: the elements are examples to the network, and correlated in the predictive."""
    x, y, new = torch.randn(7, 4), torch.randn(7), torch.randn(3, 4)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        return pyro.sample("obs", dist.Normal(x @ w, NOISE).to_event(1), obs=y)

    covariance = torch.linalg.inv(torch.eye(4) + x.mT @ x / NOISE**2)
    found = fitted(model, x, y).predictive(new)["obs"]
    assert_close(
        found.covariance_matrix, new @ covariance @ new.mT + NOISE**2 * torch.eye(3), rtol=1e-8, atol=1e-10
    )


def test_two_labels_of_one_observation():
    """Bernoulli vectors have no closed form: draws agree with quadrature, and the products of probits are refused."""
    x = torch.randn(8, 4)
    y = (torch.rand(8, 2) < 0.5).double()
    guide = fitted(model_of(2, dist.Bernoulli), x, y, curvature="ggn")
    outputs = guide.linearized_outputs(x[:3])["obs"]
    J = features(x, 2)
    p = torch.sigmoid(J @ guide.loc.detach())
    precision = torch.eye(4) + (J.mT @ torch.diag_embed(p * (1 - p)) @ J).sum(0)
    rows = J[:3]
    V, m = rows @ torch.linalg.inv(precision) @ rows.mT, rows @ guide.loc.detach()
    assert_close(outputs.event_covariance, V, rtol=1e-7)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    z = torch.tensor(np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2))
    w = torch.tensor(np.outer(weights, weights).reshape(-1) / (2 * np.pi))
    values, vectors = torch.linalg.eigh(V)
    f = m + torch.einsum("nij,sj->sni", vectors * values.clamp(min=0).sqrt()[:, None], z)
    each = torch.distributions.Bernoulli(logits=f).log_prob(y[:3]).sum(-1).exp()
    exact = (w[:, None] * each).sum(0)
    found = guide.predictive(x[:3], num_samples=20_000)["obs"]
    assert_close(found.log_prob(y[:3]).exp(), exact, atol=0.01, rtol=0)
    for method in ("probit", "bridge"):
        with pytest.raises(ValueError, match=f"method='{method}' gives .* 2 labels"):
            outputs.distribution(method)


def test_other_guides():
    x, y, new = torch.randn(6, 4), torch.randn(6, 2), torch.randn(3, 4)
    _, covariance = linear(2, x, y, new)
    model = model_of(2)
    free = AutoHessianFreeLaplace(model).initialize(x, y).polish((x, y))
    free.laplace_approximation((x, y), (new,))
    assert_close(free.predictive(new)["obs"].covariance_matrix, covariance, rtol=1e-5, atol=1e-8)
    mixture = AutoLaplaceMixture(model, 2).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    found, single = mixture.predictive(new)["obs"], fitted(model, x, y).predictive(new)["obs"]
    assert_close(found.log_prob(y[:3]), single.log_prob(y[:3]), rtol=1e-5)  # both modes are the same
    draws = found.sample((10_000,))[:, 0]
    assert_close(
        torch.corrcoef(draws.mT)[0, 1],
        covariance[0, 0, 1] / covariance[0].diagonal().prod().sqrt(),
        atol=0.04,
        rtol=0,
    )


@pytest.mark.parametrize("family", [dist.Normal, dist.LogNormal])
@pytest.mark.parametrize("filler", [0.0, 50.0])
def test_validation_density_of_partly_masked_observations(filler, family):
    """Against the marginal Gaussian of the observed elements, or of their logarithms."""
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    logs = torch.where(mask, y, filler)
    y = torch.where(mask, y.exp(), filler + 1) if family is dist.LogNormal else logs

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", family(features(x, 3) @ w, NOISE).mask(mask).to_event(1), obs=y)

    guide = fitted(model, x, y)
    J = features(x, 3)
    covariance = torch.linalg.inv(torch.eye(4) + J[mask].mT @ J[mask] / NOISE**2)
    mean = J @ covariance @ J[mask].mT @ logs[mask] / NOISE**2
    joint = J @ covariance @ J.mT + NOISE**2 * torch.eye(3)
    expected = sum(
        stats.multivariate_normal(m[k].numpy(), c[k][:, k].numpy()).logpdf(t[k].numpy())
        for m, c, t, k in zip(mean, joint, logs, mask, strict=True)
        if k.any()
    )
    expected -= logs[mask].sum() if family is dist.LogNormal else 0.0
    outputs = guide.linearized_outputs(x, y)["obs"]
    assert_close(outputs.log_density(y).sum(), expected, rtol=1e-6)
    scores = guide.optimize_hyperparameters((x, y), method="validation", candidates=[1.0]).objective
    assert_close(scores[0], expected, rtol=1e-6)


def test_validation_density_of_masked_labels():
    x, y = torch.randn(9, 2), torch.randint(3, (9,))
    mask = torch.arange(9) % 3 > 0

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.5).to_event(2))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=x @ w).mask(mask[: len(x)]), obs=y)

    guide = fitted(model, x, y, curvature="ggn")
    found = guide.linearized_outputs(x, y)["obs"].log_density(torch.where(mask, y, -100))
    expected = guide.predictive(x)["obs"].log_prob(y)
    assert_close(found, torch.where(mask, expected, 0.0))


@pytest.mark.parametrize("inside", [True, False])
def test_masks_inside_and_outside_of_events(inside):
    """As many observations as elements, so that a mask of one would fit the other."""
    x, y = torch.randn(3, 4), torch.randn(3, 3)
    mask = (
        torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 1]]).bool() if inside else torch.tensor([1, 0, 1]).bool()
    )

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        d = dist.Normal(features(x, 3) @ w, NOISE)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", d.mask(mask).to_event(1) if inside else d.to_event(1).mask(mask), obs=y)

    J = features(x, 3)[mask].reshape(-1, 4)
    expected = torch.eye(4) + J.mT @ J / NOISE**2
    for curvature in ("ggn", "hessian"):
        guide = fitted(model, x, y, curvature=curvature)
        assert_close(guide.posterior.covariance_matrix, torch.linalg.inv(expected), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("plates", [("data",), ("sensor", "data"), ("data", "sensor")])
@pytest.mark.parametrize("n", [5, 150])
def test_plates_and_chunks(plates, n):
    """Blocks of observations in their places, also where the data are cut into chunks, against the dense covariance."""
    x = torch.randn(n, 4)
    shape = torch.Size({"data": n, "sensor": 2}[name] for name in plates)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        f = features(torch.tanh(x), 3) @ w.exp()
        with ExitStack() as stack:
            for name, size in zip(plates, shape, strict=True):
                size = len(x) if name == "data" else size
                stack.enter_context(pyro.plate(name, size, dim=plates.index(name) - len(plates)))
            if len(plates) == 2:
                f = torch.stack([f, -2 * f + 1], 1 - plates.index("data"))
            return pyro.sample("obs", dist.Normal(f, NOISE).to_event(1), obs=y)

    few = x[:5], torch.randn((*(min(size, 5) for size in shape), 3))
    guide = AutoLaplace(model, curvature="ggn").initialize(*few)
    guide.laplace_approximation(few, map_tolerance=float("inf"))
    found = guide.predictive(x)["obs"]
    size = 3 * shape.numel()
    dense = guide.joint_covariance(x)["obs"].reshape(size, size)
    rows = torch.arange(size).reshape(-1, 3)
    expected = dense[rows[:, :, None], rows[:, None]].reshape((*shape, 3, 3)) + NOISE**2 * torch.eye(3)
    assert_close(found.covariance_matrix, expected, rtol=1e-7, atol=1e-10)
