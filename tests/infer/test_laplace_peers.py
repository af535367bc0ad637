# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Agreement with other libraries; each test is skipped by name where its library is missing."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import pyro_bnn
from pyro_bnn.infer.autoguide import AutoLaplace
from tests.common import assert_close

PRECISION = 2.5
SIGMA = 0.4


def problem(kind, network="mlp"):
    outputs = 3 if kind == "classification" else 1
    if network == "mlp":
        net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs))
        x = torch.randn(30, 3)
    else:
        net = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, outputs)
        )
        x = torch.randn(30, 2, 4, 4)
    shapes = {k: v.shape for k, v in net.named_parameters()}
    y = torch.randint(0, 3, (30,)) if kind == "classification" else torch.randn(30, 1)

    def model(x, y=None):
        values = {
            k: pyro.sample(k, dist.Normal(torch.zeros(s), PRECISION**-0.5).to_event(len(s)))
            for k, s in shapes.items()
        }
        f = functional_call(net, values, (x,))
        with pyro.plate("data", len(x)):
            d = dist.Categorical(logits=f) if kind == "classification" else dist.Normal(f, SIGMA).to_event(1)
            return pyro.sample("obs", d, obs=y)

    return net, model, x, y


def ours(net, model, x, y, **options):
    guide = AutoLaplace(model, **options).initialize(x, y)
    guide.loc.data = guide.packed.space.pack({k: v.detach() for k, v in net.named_parameters()})
    return guide.laplace_approximation((x, y), map_tolerance=float("inf"))


@pytest.mark.parametrize("network", ["mlp", "cnn"])
@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize(
    ("subset", "theirs", "options"),
    [
        ("all", "full", {"structure": "full"}),
        ("all", "kron", {"structure": "kronecker"}),
        ("all", "diag", {"structure": "diagonal"}),
        ("last_layer", "full", {"structure": "full", "sites": "last_layer"}),
        ("last_layer", "kron", {"structure": "kronecker", "sites": "last_layer"}),
        ("last_layer", "diag", {"structure": "diagonal", "sites": "last_layer"}),
    ],
)
@pytest.mark.filterwarnings("default")
def test_laplace_torch(network, kind, subset, theirs, options):
    laplace = pytest.importorskip("laplace", exc_type=(ImportError, RuntimeError))
    net, model, x, y = problem(kind, network)
    reduce = network == "cnn" and (subset, theirs) == ("all", "kron")
    if reduce:
        # "expand" treats the offsets of a convolution as a factor there and exactly here; "reduce" is exact in both
        options = {**options, "sharing": "reduce"}
    guide = ours(net, model, x, y, **options)
    noise = {"sigma_noise": SIGMA} if kind == "regression" else {}
    peer = laplace.Laplace(
        net, kind, subset_of_weights=subset, hessian_structure=theirs, prior_precision=PRECISION, **noise
    )
    if reduce:
        peer.backend.kron = partial(peer.backend.kron, kfac_approx="reduce")
    peer.fit(DataLoader(TensorDataset(x, y), batch_size=30))
    x_new = torch.randn(7, *x.shape[1:])
    mean, variance = peer._glm_predictive_distribution(x_new)
    outputs = guide.linearized_outputs(x_new)["obs"]
    covariance = outputs.covariance
    if kind == "classification":
        # our logits are normalised: compare what does not change when a constant is added to all logits
        center = torch.eye(3) - 1 / 3
        covariance, variance = center @ covariance @ center, center @ variance @ center
    else:
        assert_close(outputs.mean.reshape(mean.shape), mean, rtol=1e-6, atol=1e-8)
        variance = variance.reshape(covariance.shape)
    assert_close(covariance, variance, rtol=1e-5, atol=1e-7)
    if subset == "all":  # for a last layer the two count different parts of the prior
        assert_close(guide.log_evidence(), peer.log_marginal_likelihood(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize(
    ("theirs", "structure"), [("full", "full"), ("kron", "kronecker"), ("diag", "diagonal")]
)
@pytest.mark.filterwarnings("default")
def test_laplace_torch_in_one_call(kind, theirs, structure):
    """The same network, prior precision and noise give the same covariances and evidence."""
    peers = pytest.importorskip("laplace", exc_type=(ImportError, RuntimeError))
    net, _, x, y = problem(kind)
    noise = kind == "regression"
    loader = DataLoader(TensorDataset(x, y), batch_size=30)
    guide = pyro_bnn.laplace(
        net, loader, likelihood=kind, structure=structure, prior=dist.Normal(0.0, PRECISION**-0.5), tune=None,
        noise=SIGMA if noise else None, map_tolerance=float("inf"),
    )  # fmt: skip
    options = {"sigma_noise": SIGMA} if noise else {}
    peer = peers.Laplace(
        net, kind, subset_of_weights="all", hessian_structure=theirs, prior_precision=PRECISION, **options
    )
    peer.fit(loader)
    covariance, variance = (
        guide.linearized_outputs(x)["obs"].covariance,
        peer._glm_predictive_distribution(x)[1],
    )
    if not noise:
        center = torch.eye(3) - 1 / 3
        covariance, variance = center @ covariance @ center, center @ variance @ center
    assert_close(covariance, variance, rtol=1e-9, atol=1e-12)
    assert_close(guide.log_evidence(), peer.log_marginal_likelihood(), rtol=1e-10)


@pytest.mark.filterwarnings("default")
def test_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    net, model, x, y = problem("classification")
    guide = ours(net, model, x, y)
    loss = nn.CrossEntropyLoss(reduction="sum")
    operator = curvlinops.GGNLinearOperator(net, loss, list(net.parameters()), [(x, y)])
    matrix = operator @ torch.eye(len(guide.loc))
    assert_close(guide.precision - PRECISION * torch.eye(len(guide.loc)), matrix, rtol=1e-6, atol=1e-8)
