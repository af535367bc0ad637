# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.func import grad, hessian, vmap

from pyro_bnn import hfl
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace
from tests.common import assert_close

NOISE = 0.5


def data_of(n=30, outputs=1):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator)
    y = x @ torch.randn(3, outputs, generator=generator) + NOISE * torch.randn(
        n, outputs, generator=generator
    )
    return x, y.squeeze(-1), torch.rand(n, generator=generator) + 0.5


def linear(x, y=None, weight=None, mask=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    weight = torch.ones(len(x)) if weight is None else weight
    mask = torch.ones(len(x), dtype=torch.bool) if mask is None else mask
    with pyro.plate("data", len(x)), poutine.scale(scale=weight), poutine.mask(mask=mask):
        return pyro.sample("obs", dist.Normal(x @ w, NOISE), obs=y)


def several(x, y=None):
    """Three outputs for each example, in dimensions that are and are not those of an event."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3, 3), 1.0).to_event(2))
    f = x @ w
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("first", dist.Normal(f[:, :2], NOISE).to_event(1), obs=None if y is None else y[:, :2])
        return pyro.sample("second", dist.Normal(f[:, 2], NOISE), obs=None if y is None else y[:, 2])


def subsampled(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", 30, subsample=torch.arange(len(x))):
        return pyro.sample("obs", dist.Normal(x @ w, NOISE), obs=y)


def ridge(x, y, weight):
    """Mean, shape (3, outputs), and covariance of one output's weights."""
    P = torch.eye(3) + x.mT @ (x * weight[:, None]) / NOISE**2
    return torch.linalg.solve(P, x.mT @ (y * weight[:, None]) / NOISE**2), torch.linalg.inv(P)


def left_out(x, y, weight, x_test):
    """Changes of predictions, shape (n, tests, outputs), and of their variances, shape (n, tests), by refits."""
    mean, covariance = ridge(x, y, weight)
    changes, variances = [], []
    for i in range(len(x)):
        rest = weight * (torch.arange(len(x)) != i)
        other, wider = ridge(x, y, rest)
        changes.append(x_test @ (other - mean))
        variances.append(((x_test @ (wider - covariance)) * x_test).sum(-1))
    return torch.stack(changes), torch.stack(variances)


@pytest.mark.parametrize("kind", ["plain", "batches", "weighted", "masked", "several", "subsampled"])
def test_leaving_out_is_exact_for_linear_models_with_leverage(kind):
    x, y, weight = data_of(outputs=3 if kind == "several" else 1)
    weight = weight if kind == "weighted" else torch.ones(30)
    if kind == "masked":
        weight[4:9] = 0.0
    x_test = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    model = {"several": several, "subsampled": subsampled}.get(kind, linear)
    data, targets = (x, y), (x_test,)
    if kind in ("batches", "subsampled"):
        data = [(x[:11], y[:11]), (x[11:12], y[11:12]), (x[12:], y[12:])]
    if kind == "weighted":
        data, targets = (x, y, weight), (x_test, None, torch.ones(4))
    if kind == "masked":
        data = (x, y, torch.ones(30), weight > 0)
    guide = AutoHessianFreeLaplace(model).initialize(x, y)
    wide = y.reshape(30, -1)
    mean, covariance = ridge(x, wide, weight)
    guide.loc.data = mean.reshape(-1)
    found = hfl.influence(guide, data, targets, curvature="ggn", leverage=True)
    changes, variances = left_out(x, wide, weight, x_test)
    if kind == "several":  # outputs of the sites one after the other
        changes = torch.cat([changes[..., :2].flatten(1), changes[..., 2]], 1)
        variances = torch.cat([variances.repeat_interleave(2, 1), variances], 1)
    assert_close(found.matrix, changes.reshape(30, -1), rtol=1e-6, atol=1e-9)
    assert_close(found.variances, variances, rtol=1e-6, atol=1e-9)
    leverage = ((x @ covariance) * x).sum(-1) * weight / NOISE**2 * wide.shape[1]
    assert_close(found.leverage, leverage, rtol=1e-6, atol=1e-9)
    assert found.matrix.shape == (30, found.sd.numel())
    assert found.change.shape == (30, *found.shape)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_first_order_influence_of_linear_models(curvature):
    x, y, _ = data_of()
    guide = AutoHessianFreeLaplace(linear).initialize(x, y)
    mean, covariance = ridge(x, y[:, None], torch.ones(30))
    guide.loc.data = mean.reshape(-1)
    found = hfl.influence(guide, (x, y), functional=lambda sites: sites["w"][:2], curvature=curvature)
    residual = y - x @ mean[:, 0]
    assert_close(found.matrix, -(x * residual[:, None] / NOISE**2) @ covariance[:, :2], rtol=1e-6)
    assert_close(found.sd, covariance.diagonal()[:2].sqrt(), rtol=1e-6)
    if curvature == "ggn":
        assert_close(found.variances, ((x @ covariance[:, :2]) / NOISE).square(), rtol=1e-6)
    else:
        assert found.variances is None
    order = found.matrix.abs().argsort(0, descending=True)[:3]
    assert torch.equal(found.largest(3), order)


def network(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3, 3), 1.0).to_event(2))
    v = pyro.sample("v", dist.Normal(torch.zeros(3, 3), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Categorical(logits=torch.tanh(x @ w) @ v), obs=y)


def trained(n=20):
    x, _, _ = data_of(n)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    guide = AutoLaplace(network).initialize(x, y)
    guide.loc.data = torch.linspace(-1, 1, 18)
    return guide.polish((x, y)), x, y


def logits(u, x):
    """The parameters of the observed site in plain torch."""
    w, v = u.reshape(2, 3, 3)
    return (torch.tanh(x @ w) @ v).log_softmax(-1)


def refitted(guide, x, y, weights, x_test):
    """Logits at test inputs, shape (R, 5, 3), of minima under weights of the examples, shape (R, n), by Newton's method."""

    def loss(u, weight):
        picked = logits(u, x).gather(-1, y[:, None])[:, 0]
        return 0.5 * u.square().sum() - (weight * picked).sum()

    u = guide.loc.detach().expand(len(weights), -1).clone()
    for _ in range(8):
        gradient, H = vmap(grad(loss))(u, weights), vmap(hessian(loss))(u, weights)
        u = u - torch.linalg.solve(H, gradient)
    assert float(gradient.abs().max()) < 1e-9
    return vmap(lambda v: logits(v, x_test))(u)


def test_influence_is_the_derivative_in_the_weight_of_an_example():
    guide, x, y = trained()
    x_test = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    found = hfl.influence(guide, (x, y), (x_test,), tolerance=1e-10)
    less, more = (refitted(guide, x, y, 1 + step * torch.eye(20), x_test) for step in (-1e-4, 1e-4))
    assert_close(found.change, (less - more) / 2e-4, rtol=1e-5, atol=1e-6)


def test_influence_on_a_network_foretells_refits():
    guide, x, y = trained()
    x_test = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    exact = refitted(guide, x, y, 1 - torch.eye(20), x_test) - refitted(
        guide, x, y, torch.ones(1, 20), x_test
    )
    scores = {}
    for name, options in {"first": {}, "leverage": {"curvature": "ggn", "leverage": True}}.items():
        change = hfl.influence(guide, (x, y), (x_test,), **options).change
        scores[name] = float(torch.corrcoef(torch.stack([change.flatten(), exact.flatten()]))[0, 1])
    assert scores["first"] > 0.9
    assert scores["leverage"] > 0.9


def interacting(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    f = (x - x.mean(0)) @ w
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(f, NOISE), obs=y)


def joint(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    return pyro.sample("obs", dist.Normal(x @ w, NOISE).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("model", "message"),
    [(interacting, " depends on which rows"), (joint, ": they have one density together")],
)
def test_rows_that_interact_are_refused_by_name(model, message):
    x, y, _ = data_of()
    guide = AutoHessianFreeLaplace(model).initialize(x, y)
    with pytest.raises(ValueError, match=f"influence needs a density for each example: .*'obs'.*{message}"):
        hfl.influence(guide, (x, y), functional=lambda sites: sites["w"])


def test_contradictions_are_refused():
    x, y, _ = data_of()
    guide = AutoHessianFreeLaplace(linear).initialize(x, y)
    with pytest.raises(ValueError, match="curvature='ggn'"):
        hfl.influence(guide, (x, y), (x,), leverage=True)
    with pytest.raises(ValueError, match="nothing to compute"):
        hfl.influence(guide, (x, y))
    with pytest.raises(ValueError, match="curvature"):
        hfl.influence(guide, (x, y), (x,), curvature="fisher")


def test_factors_of_rows_count_and_common_terms_do_not():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("common", -0.5 * w.square().sum())
        with pyro.plate("data", len(x)):
            pyro.factor("rows", -0.5 * ((x @ w - 1.0) / NOISE) ** 2)

    x, _, _ = data_of()
    y = torch.ones(30, 1)
    P = 2 * torch.eye(3) + x.mT @ x / NOISE**2
    mean = torch.linalg.solve(P, x.mT @ y / NOISE**2)
    guide = AutoHessianFreeLaplace(model).initialize(x)
    guide.loc.data = mean.reshape(-1)
    found = hfl.influence(guide, (x,), functional=lambda sites: sites["w"])
    scores = x * (y - x @ mean) / NOISE**2
    assert_close(found.matrix, -scores @ torch.linalg.inv(P), rtol=1e-6)


def test_results_describe_themselves():
    x, y, _ = data_of()
    guide = AutoHessianFreeLaplace(linear).initialize(x, y).polish((x, y))
    text = str(hfl.influence(guide, (x, y), (x[:2],), curvature="ggn", leverage=True))
    assert "examples" in text
    assert "leverage" in text
