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


def scalar_offset(z, x):
    """One offset for all outputs of a map, beside one for each."""
    h = torch.tanh(x @ z["w"].mT + z["b"][:1] + z["b"][1])
    return h @ torch.cat([z["v"], z["u"]]).mT + z["b"][2:3] + z["c"]


NETWORKS = {
    f.__name__: f for f in (stacked, shared_offset, sequence, wide_sequence, exponentiated, scalar_offset)
}
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
    return guide.laplace_approximation((x, y), map_tolerance=float("inf")), x


def log_probabilities(guide, network, x, u=None):
    parts = (guide.loc.detach() if u is None else u).split([torch.Size(s).numel() for s in SHAPES.values()])
    z = {k: part.view(s) for (k, s), part in zip(SHAPES.items(), parts, strict=True)}
    return NETWORKS[network](z, x).log_softmax(-1)


def jacobian(guide, network, x):
    return torch.autograd.functional.jacobian(
        lambda u: log_probabilities(guide, network, x, u), guide.loc.detach()
    )


@pytest.mark.every(3)
@pytest.mark.parametrize("only", ONLY)
@pytest.mark.parametrize("structure", ["full", "block", "diagonal", "low_rank"])
@pytest.mark.parametrize("network", NETWORKS)
def test_covariances_of_predictions(network, structure, only):
    guide, x = case(network, structure=structure, sites=ONLY[only])
    active = torch.ones(DIM, dtype=torch.bool) if guide.active is None else guide.active
    P = guide.posterior.multiply(torch.eye(DIM))[active][:, active]
    J = jacobian(guide, network, x)[..., active]
    if structure in ("full", "diagonal"):
        # every class counts by its probability, as the mean of a score is zero
        p = log_probabilities(guide, network, x).exp()
        H = torch.einsum("nci,nc,ncj->ij", J, p, J)
        H = torch.diag(H.diagonal()) if structure == "diagonal" else H
        assert_close(P, H + torch.eye(len(P)), rtol=1e-8, atol=1e-9)
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


def test_a_weight_of_two_maps():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        f = x @ w.mT if x.shape[1] == 3 else x @ w
        with pyro.plate("data", 9, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal(f, 1.0).to_event(1), obs=y)
            pyro.sample("other", dist.Normal(x[:, :2] @ w, 1.0).to_event(1), obs=x[:, :1].expand(-1, 3))

    x = torch.randn(9, 3)
    # two maps in one run make a dense block
    guide = AutoLaplace(model, structure="kronecker").initialize(x, x[:, :2])
    guide.laplace_approximation((x, x[:, :2]), map_tolerance=float("inf"))
    first, second = x.mT @ x, x[:, :2].mT @ x[:, :2]
    expected = torch.kron(torch.eye(2), first) + torch.kron(second, torch.eye(3)) + torch.eye(6)
    assert_close(guide.posterior.multiply(torch.eye(6)), expected, rtol=1e-9, atol=1e-10)


def test_a_weight_of_different_maps_in_different_batches():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        f = x @ w.mT if x.shape[1] == 3 else x @ w
        with pyro.plate("data", 9, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal(f, 1.0).to_event(1), obs=y)

    batches = [(torch.randn(5, 3), torch.randn(5, 2)), (torch.randn(4, 2), torch.randn(4, 3))]
    guide = AutoLaplace(model, structure="kronecker").initialize(*batches[0])
    with pytest.raises(ValueError, match="in different ways, so that they have no common Kronecker factors"):
        guide.laplace_approximation(batches, map_tolerance=float("inf"))


def test_observations_across_the_rows_of_the_data():
    """Each of two observations holds one output at all rows; the rows are what the network treats apart."""

    def model(x, y=None, z=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
        with pyro.plate("outputs", 2):
            pyro.sample("first", dist.Normal((x @ w).sin().mT, 0.5).to_event(1), obs=y)
            pyro.sample("second", dist.Normal((2 * x @ w).cos().mT, 0.5).to_event(1), obs=z)

    x = torch.randn(7, 3)
    data = x, torch.randn(2, 7), torch.randn(2, 7)
    guide = AutoLaplace(model).initialize(*data)
    guide.loc.data = 0.5 * torch.randn(6)
    guide.laplace_approximation(data, map_tolerance=float("inf"))
    new = torch.randn(4, 3)
    outputs = guide.linearized_outputs(new)
    for name, function in (
        ("first", lambda w: (new @ w).sin().mT),
        ("second", lambda w: (2 * new @ w).cos().mT),
    ):
        J = torch.autograd.functional.jacobian(lambda u, f=function: f(u.view(3, 2)), guide.loc.detach())
        expected = J @ guide.posterior.covariance_matrix @ J.mT
        found = outputs[name].event_covariance
        assert found.shape == (2, 4, 4)
        assert_close(found, expected, rtol=1e-8, atol=1e-11)
        assert_close(
            outputs[name].covariance[..., 0, 0], expected.diagonal(dim1=-2, dim2=-1), rtol=1e-8, atol=1e-11
        )
