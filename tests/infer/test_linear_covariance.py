# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Covariances of predictions against J P^-1 J', where weights and the posterior's parts do not fit each other."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_bnn.infer.autoguide import AutoLaplace
from tests.common import assert_close

SHAPES = {"w": (4, 3), "b": (4,), "v": (2, 4), "u": (1, 4), "c": (3,)}


def stacked(z, x):
    """The rows of the last weight are two sites."""
    h = torch.tanh(x @ z["w"].mT + z["b"])
    return h @ torch.cat([z["v"], z["u"]]).mT + z["c"]


def shared_offset(z, x):
    """The offset of the last map scales the hidden units, too."""
    h = torch.tanh(x @ z["w"].mT + z["b"]) * z["c"].sum()
    return h @ torch.cat([z["v"], z["u"]]).mT + z["c"]


def sequence(z, x):
    """Weights that are used at three positions of every example."""
    h = torch.tanh(torch.stack([x, x.flip(-1), 2 * x], 1) @ z["w"].mT + z["b"])
    return (h @ torch.cat([z["v"], z["u"]]).mT + z["c"]).sum(1)


def wide_sequence(z, x):
    """More positions than outputs of a map."""
    h = torch.tanh(x.unsqueeze(1) * torch.linspace(-1, 1, 40).view(1, 40, 1) @ z["w"].mT + z["b"])
    return (h @ torch.cat([z["v"], z["u"]]).mT + z["c"]).mean(1)


def exponentiated(z, x):
    """Entries that enter in a way of their own."""
    h = torch.tanh(x @ z["w"].mT.exp() + z["b"])
    return h @ torch.cat([z["v"], z["u"]]).mT + z["c"]


NETWORKS = {f.__name__: f for f in (stacked, shared_offset, sequence, wide_sequence, exponentiated)}
DIM = sum(torch.Size(s).numel() for s in SHAPES.values())
ONLY = {
    "all": None,
    "some sites": ["v", "c"],
    "the last": ["v", "u", "c"],
    "every third": torch.arange(DIM) % 3 == 0,
    "all but the first": torch.arange(DIM) > 0,
    "half of a weight": torch.arange(DIM) < 6,
}


def case(network, **options):
    def model(x, y=None):
        z = {k: pyro.sample(k, dist.Normal(torch.zeros(s), 1.0).to_event(len(s))) for k, s in SHAPES.items()}
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=NETWORKS[network](z, x)), obs=y)

    x, y = torch.randn(9, 3), torch.randint(0, 3, (9,))
    guide = AutoLaplace(model, rank=DIM, **options).initialize(x, y)
    guide.loc.data = 0.5 * torch.randn(DIM)
    return guide.laplace_approximation((x, y), map_tolerance=float("inf"))


def jacobian(guide, network, x):
    def function(u):
        parts = u.split([torch.Size(s).numel() for s in SHAPES.values()])
        z = {k: part.view(s) for (k, s), part in zip(SHAPES.items(), parts, strict=True)}
        return NETWORKS[network](z, x).log_softmax(-1)

    return torch.autograd.functional.jacobian(function, guide.loc.detach())


@pytest.mark.parametrize("only", ONLY)
@pytest.mark.parametrize("structure", ["full", "block", "diagonal", "low_rank"])
@pytest.mark.parametrize("network", NETWORKS)
def test_covariances_of_predictions(network, structure, only):
    guide = case(network, structure=structure, sites=ONLY[only])
    active = torch.ones(DIM, dtype=torch.bool) if guide.active is None else guide.active
    P = guide.posterior.multiply(torch.eye(DIM))[active][:, active]
    x = torch.randn(5, 3)
    J = jacobian(guide, network, x)[..., active]
    expected = J @ torch.linalg.inv(P) @ J.mT
    assert_close(guide.linearized_outputs(x)["obs"].covariance, expected, rtol=1e-7, atol=1e-10)
    joint = torch.einsum("nci,ij,mdj->ncmd", J, torch.linalg.inv(P), J)
    assert_close(guide.joint_covariance(x)["obs"], joint, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("network", ["sequence", "wide_sequence"])
def test_kronecker_parts_beside_others(network):
    def model(x, y=None):
        z = {k: pyro.sample(k, dist.Normal(torch.zeros(s), 1.0).to_event(len(s))) for k, s in SHAPES.items()}
        z["u"] = z["u"].detach() * 0
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=NETWORKS[network](z, x)), obs=y)

    x, y = torch.randn(9, 3), torch.randint(0, 3, (9,))
    guide = AutoLaplace(model, structure="kronecker", sites=["w", "b", "c"]).initialize(x, y)
    guide.loc.data = 0.5 * torch.randn(DIM)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    active = guide.active
    P = guide.posterior.multiply(torch.eye(DIM))[active][:, active]
    x = torch.randn(5, 3)

    def function(u):
        parts = u.split([torch.Size(s).numel() for s in SHAPES.values()])
        z = {k: part.view(s) for (k, s), part in zip(SHAPES.items(), parts, strict=True)}
        z["u"] = z["u"] * 0
        return NETWORKS[network](z, x).log_softmax(-1)

    J = torch.autograd.functional.jacobian(function, guide.loc.detach())[..., active]
    expected = J @ torch.linalg.inv(P) @ J.mT
    assert_close(guide.linearized_outputs(x)["obs"].covariance, expected, rtol=1e-7, atol=1e-10)
