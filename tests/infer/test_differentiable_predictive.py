# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Predictions as differentiable functions of the inputs: against finite differences, and against what is not differentiable."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoLaplaceMixture
from pyro_bnn.ops.square_root import symmetric_root
from tests.common import assert_close

FAR = {"map_tolerance": float("inf")}


def sites_of(shapes):
    return {
        name: pyro.sample(name, dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape)))
        for name, shape in shapes.items()
    }


def network(x):
    z = sites_of({"w": (3, 2), "b": (3,), "v": (2, 3), "c": (2,)})
    return torch.tanh(x @ z["w"].mT + z["b"]) @ z["v"].mT + z["c"]


def convolution(x):
    z = sites_of({"k": (2, 1, 2), "b": (2,), "v": (2, 2)})
    features = torch.conv1d(torch.cat([x, x.square()], -1).unsqueeze(-2), z["k"], z["b"])
    return torch.sin(features).mean(-1) @ z["v"].mT


def embedded(x):
    """Weights that enter in a way of their own."""
    z = sites_of({"w": (2, 2), "v": (2, 2)})
    return torch.tanh(x @ z["w"].exp().mT) @ z["v"].mT


def model(x, y=None, network=network):
    """Two outputs of inputs of any leading shape, with a noise that depends on the input."""
    loc = network(x)
    scale = 0.2 + 0.1 * x.square().sum(-1, keepdim=True).expand(loc.shape)
    with pyro.plate_stack("data", x.shape[:-1]):
        return pyro.sample("obs", dist.Normal(loc, scale).to_event(1), obs=y)


def classifier(x, y=None):
    logits = network(x)
    with pyro.plate_stack("data", x.shape[:-1]):
        return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)


def data(n=7):
    return torch.randn(n, 2), torch.randn(n, 2)


def laplace(model=model, y=None, **options):
    x, values = data()
    guide = AutoLaplace(model, **options).initialize(x, values if y is None else y)
    guide.loc.data = torch.linspace(-1.0, 1.2, len(guide.loc)).sin()
    return guide.laplace_approximation((x, values if y is None else y), **FAR)


def hessian_free(**options):
    x, y = data()
    guide = AutoHessianFreeLaplace(model, curvature="ggn", **options).initialize(x, y)
    guide.loc.data = torch.linspace(-1.0, 1.2, len(guide.loc)).sin()
    return guide.laplace_approximation((x, y), (x[:3],), **FAR)


def mixture():
    x, y = data()
    guide = AutoLaplaceMixture(model, 2).initialize(x, y)
    return guide.laplace_approximation((x, y))


GUIDES = {
    **{
        s: lambda s=s: laplace(structure=s, rank=4)
        for s in ("full", "block", "diagonal", "kronecker", "low_rank", "function_space")
    },
    "last layer": lambda: laplace(sites="last_layer", structure="full"),
    "subnetwork": lambda: laplace(subnetwork="largest_magnitude", subnetwork_size=5),
    "hessian free": hessian_free,
    "remainder": lambda: hessian_free(remainder="isotropic"),
    "mixture": mixture,
}


def predictions(guide, x, differentiable=True):
    """Everything that can be predicted, as one vector."""
    options = {"differentiable": differentiable}
    functions = guide.functional_samples(2, x, generator=torch.Generator().manual_seed(0), **options)["obs"]
    predictive = guide.predictive(x, **options)["obs"]
    found = [functions, predictive.mean, predictive.variance]
    if not isinstance(guide, AutoLaplaceMixture):
        outputs = guide.linearized_outputs(x, **options)["obs"]
        found += [outputs.mean, outputs.covariance, outputs.event_covariance]
        found.append(guide.joint_covariance(x, **options)["obs"])
    return torch.cat([value.reshape(-1) for value in found])


@pytest.mark.parametrize("kind", GUIDES)
def test_predictions_are_differentiable_in_their_inputs(kind):
    guide, x = GUIDES[kind](), torch.randn(3, 2, requires_grad=True)
    found, plain = predictions(guide, x), predictions(guide, x, differentiable=False)
    assert found.requires_grad
    assert not plain.requires_grad
    assert_close(found.detach(), plain, rtol=1e-12, atol=1e-12)
    weights = torch.randn(len(plain))
    assert gradcheck(lambda x: weights @ predictions(guide, x), x, fast_mode=True)


@pytest.mark.parametrize("network", [convolution, embedded])
@pytest.mark.parametrize("structure", ["full", "kronecker", "diagonal"])
def test_networks_of_other_kinds_are_differentiable(network, structure):
    def other(x, y=None):
        return model(x, y, network)

    guide, x = laplace(other, structure=structure), torch.randn(2, 2, requires_grad=True)
    assert gradcheck(lambda x: predictions(guide, x).sum(), x, fast_mode=True)


@pytest.mark.parametrize("structure", ["full", "kronecker"])
def test_covariances_are_differentiable_twice(structure):
    guide, x = laplace(structure=structure), torch.randn(2, 2, requires_grad=True)
    assert gradgradcheck(lambda x: guide.joint_covariance(x, differentiable=True)["obs"].sum(), x)
    assert gradgradcheck(lambda x: guide.predictive(x, differentiable=True)["obs"].variance.sum(), x)


@pytest.mark.parametrize("method", ["probit", "bridge", "monte_carlo"])
def test_class_probabilities_are_differentiable(method):
    def probabilities(x):
        generator = torch.Generator().manual_seed(0)
        found = guide.predictive(x, method=method, generator=generator, differentiable=True)["obs"]
        return found.components.probs.mean(0) if method == "monte_carlo" else found.probs

    guide = laplace(classifier, torch.arange(7) % 2)
    # roots of singular covariances are rounded to 1e-10, which smaller steps would show
    assert gradcheck(probabilities, torch.randn(3, 2, requires_grad=True), eps=1e-4)


@pytest.mark.parametrize("kind", GUIDES)
def test_batches_of_points_are_those_of_a_loop(kind):
    guide, x = GUIDES[kind](), torch.randn(2, 3, 2)

    def read(x):
        generator = torch.Generator().manual_seed(0)
        predictive = guide.predictive(x)["obs"]
        functions = guide.functional_samples(2, x, generator=generator)["obs"].movedim(0, -1)
        found = [functions, predictive.mean, predictive.variance]
        if kind != "mixture":
            outputs = guide.linearized_outputs(x)["obs"]
            joint = guide.joint_covariance(x, batch_dims=x.dim() - 2)["obs"]
            found += [outputs.mean, outputs.covariance, outputs.event_covariance, joint]
        return found

    for whole, *parts in zip(read(x), *map(read, x), strict=True):
        assert_close(whole, torch.stack(parts), rtol=1e-9, atol=1e-12)


def test_many_points_are_differentiated_in_chunks():
    guide = laplace()
    x = torch.randn(150, 2, requires_grad=True)

    def covariance(points):
        return guide.joint_covariance(points, differentiable=True)["obs"][..., 0, :, :, 0]

    few, many = covariance(x[[3, 100]]), covariance(x)[[3, 100]][:, :, [3, 100]]
    assert_close(many, few, rtol=1e-9, atol=1e-12)
    assert_close(*(slope(value[0, 0, 1, 1], x) for value in (few, many)), rtol=1e-9, atol=1e-12)
    variance = guide.linearized_outputs(x, differentiable=True)["obs"].variance[100, 0, 0]
    assert_close(slope(variance, x), slope(few[1, 0, 1, 0], x), rtol=1e-9, atol=1e-12)


def slope(value, x):
    return torch.autograd.grad(value, x, retain_graph=True)[0]


def test_the_posterior_is_a_constant():
    guide = laplace()
    x = torch.randn(3, 2, requires_grad=True)
    predictions(guide, x).sum().backward()
    assert x.grad is not None
    assert guide.loc.grad is None


def test_basis_functions_are_a_root_of_the_covariance_at_all_pairs_of_points():
    guide, a, b = laplace(), torch.randn(3, 2), torch.randn(4, 2)
    joint = guide.joint_covariance(torch.cat([a, b]))["obs"][..., 0, :, :, 0]
    (mean, left), (_, right) = (guide.basis_functions(x)["obs"] for x in (a, b))
    assert_close(torch.einsum("nicr,mjcr->nimj", left, right), joint[:3, :, 3:], rtol=1e-9, atol=1e-12)
    assert_close(mean, guide.linearized_outputs(a)["obs"].mean, rtol=1e-12)


def test_symmetric_root_has_a_derivative_where_eigenvalues_agree():
    equal = torch.eye(3).mul(2.0).requires_grad_()
    assert gradcheck(lambda a: symmetric_root(0.5 * (a + a.mT)), equal)
    rows = torch.randn(4, 3, 5)
    matrix = (rows @ rows.mT).requires_grad_()
    assert gradcheck(lambda a: symmetric_root(0.5 * (a + a.mT)), matrix)
    low = torch.randn(4, 1).requires_grad_()  # of rank one: the root is a a' / |a|
    found = torch.autograd.grad(symmetric_root(low @ low.mT)[0, 1], low)[0]
    assert_close(found, torch.autograd.grad((low @ low.mT / low.norm())[0, 1], low)[0], rtol=1e-6, atol=1e-9)
