# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The packed vector of latents, its change of variables, and the density of guides at draws."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.poutine import block

from pyro_bnn.curvature.selection import largest
from pyro_bnn.infer.autoguide import AutoLaplace, AutoMixture
from pyro_bnn.infer.mixture.schedules import CosineAnnealing, CyclicalAnnealing, LinearAnnealing
from pyro_bnn.infer.predict.density import guide_log_prob
from pyro_bnn.model.latent_space import LatentSpace
from tests.common import assert_close


def model():
    pyro.sample("real", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    pyro.sample("positive", dist.LogNormal(torch.zeros(2), 0.5).to_event(1))
    pyro.sample("unit", dist.Beta(2.0, 3.0))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("groups", 2):
        pyro.sample("between", dist.Uniform(-1.0, 4.0))


DIMS = {"real": 6, "positive": 2, "unit": 1, "simplex": 2, "between": 2}


def test_sites_are_unconstrained_in_order():
    space = LatentSpace(pyro.poutine.trace(model).get_trace())
    assert space.dim == 13
    assert list(space.slices) == list(DIMS)
    starts = torch.tensor([0, *DIMS.values()]).cumsum(0)
    for (name, size), start in zip(DIMS.items(), starts, strict=False):
        assert space.slices[name] == slice(int(start), int(start) + size)
    u = torch.randn(4, 5, 13)
    values = space.unpack(u)
    assert_close(values["real"], u[..., :6].reshape(4, 5, 2, 3), rtol=0)
    assert_close(values["positive"], u[..., 6:8].exp(), rtol=1e-12)
    assert_close(values["unit"], u[..., 8].sigmoid(), rtol=1e-12)
    assert values["simplex"].shape == (4, 5, 3)
    assert_close(values["simplex"].sum(-1), torch.ones(4, 5), rtol=1e-12)
    assert_close(values["between"], 5 * u[..., 11:].sigmoid() - 1, rtol=1e-12)
    assert_close(space.pack(values), u, rtol=1e-8, atol=1e-10)
    assert_close(space.pack({k: v[0, 0] for k, v in values.items()}), u[0, 0], rtol=1e-8, atol=1e-10)
    one = u[0, 0]

    def free(u):
        """As many coordinates as the vector has: two of the three of the simplex."""
        z = space.unpack(u)
        z["simplex"] = z["simplex"][:2]
        return torch.cat([v.reshape(-1) for v in z.values()])

    J = torch.autograd.functional.jacobian(free, one)
    assert_close(space.log_abs_det_jacobian(one), torch.linalg.slogdet(J).logabsdet, rtol=1e-9)


def two(y=None):
    pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("obs", dist.Normal(0.0, sigma), obs=y)


DRAWS = {
    "w": torch.tensor([[0.3, -1.0], [2.0, 0.1]], dtype=torch.float64),
    "sigma": torch.tensor([0.5, 2.0], dtype=torch.float64),
}
Y = torch.ones(3, dtype=torch.float64)


def change(draws):
    """log q(z) - log q(u)."""
    return -draws["sigma"].log()


def test_densities_of_guides_in_the_space_of_the_model():
    u = torch.cat([DRAWS["w"], DRAWS["sigma"].log().unsqueeze(-1)], -1)
    normal = AutoNormal(two, init_scale=0.3)
    normal(Y)
    loc = torch.cat([normal.locs.w, normal.locs.sigma.reshape(1)]).detach()
    expected = torch.distributions.Normal(loc, 0.3).log_prob(u).sum(-1) + change(DRAWS)
    assert_close(guide_log_prob(normal, DRAWS), expected, rtol=1e-9)
    dense = AutoMultivariateNormal(two, init_scale=0.3)
    dense(Y)
    expected = dense.get_posterior(Y).log_prob(u).detach() + change(DRAWS)
    assert_close(guide_log_prob(dense, DRAWS, ((Y,), {})), expected, rtol=1e-9)
    delta = AutoDelta(two)
    delta(Y)
    assert guide_log_prob(delta, DRAWS) is None
    parts = AutoGuideList(two)
    parts.append(AutoNormal(block(two, expose=["w"]), init_scale=0.2))
    parts.append(AutoNormal(block(two, expose=["sigma"]), init_scale=0.4))
    parts(Y)
    first, second = parts[0].locs.w.detach(), parts[1].locs.sigma.detach()
    expected = torch.distributions.Normal(first, 0.2).log_prob(DRAWS["w"]).sum(-1)
    expected = (
        expected + torch.distributions.Normal(second, 0.4).log_prob(DRAWS["sigma"].log()) + change(DRAWS)
    )
    assert_close(guide_log_prob(parts, DRAWS), expected, rtol=1e-9)
    some = AutoGuideList(two)
    some.append(AutoNormal(block(two, expose=["w"])))
    some.append(AutoDelta(block(two, expose=["sigma"])))
    some(Y)
    assert guide_log_prob(some, DRAWS) is None

    def by_hand(y=None):
        pyro.sample("w", dist.Normal(torch.ones(2), 0.5).to_event(1))
        pyro.sample("sigma", dist.Gamma(2.0, 1.0))

    expected = torch.distributions.Normal(1.0, 0.5).log_prob(DRAWS["w"]).sum(-1)
    expected = expected + torch.distributions.Gamma(2.0, 1.0).log_prob(DRAWS["sigma"])
    assert_close(guide_log_prob(by_hand, DRAWS), expected, rtol=1e-9)

    def auxiliary(y=None):
        by_hand()
        pyro.sample("more", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})

    assert guide_log_prob(auxiliary, DRAWS) is None
    laplace = AutoLaplace(two).initialize(Y)
    assert guide_log_prob(laplace, DRAWS) is None  # still a point
    laplace.loc.data = torch.tensor([0.1, 0.2, 0.3])
    laplace.laplace_approximation((Y,), map_tolerance=float("inf"))
    P = torch.diag(torch.tensor([1.0, 1.0, 1.0 + 2 * 3]))  # the information in a log scale is 2
    expected = torch.distributions.MultivariateNormal(laplace.loc.detach(), precision_matrix=P).log_prob(u)
    assert_close(guide_log_prob(laplace, DRAWS), expected + change(DRAWS), rtol=1e-9)


@pytest.mark.parametrize("K", [1, 3])
def test_densities_of_mixtures(K):
    guide = AutoMixture(two, K, init_scale=0.4).initialize(Y)
    u = {"w": DRAWS["w"], "sigma": DRAWS["sigma"].log().unsqueeze(-1)}
    total = torch.zeros(2, K)
    for site, loc, scale in guide._blocks():
        loc, scale = loc.detach().reshape(K, -1), scale.detach().reshape(K, -1)
        total += torch.distributions.Normal(loc, scale).log_prob(u[site.name].unsqueeze(1)).sum(-1)
    expected = total.logsumexp(-1) - math.log(K) + change(DRAWS)
    assert_close(guide_log_prob(guide, DRAWS), expected, rtol=1e-9)


def test_schedules():
    linear, cosine = LinearAnnealing(4, 0.6), CosineAnnealing(4, 0.6)
    assert [linear(t) for t in (0, 1, 3, 4, 50)] == pytest.approx([0.15, 0.3, 0.6, 0.6, 0.6])
    assert cosine(0) == pytest.approx(0.3 * (1 - math.cos(math.pi / 4)))
    assert [cosine(t) for t in (1, 3, 9)] == pytest.approx([0.3, 0.6, 0.6])
    cyclical = CyclicalAnnealing(20, 0.6, 2)
    expected = [0.12, 0.24, 0.36, 0.48, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]
    assert [cyclical(t) for t in range(20)] == pytest.approx(2 * expected)
    assert cyclical(20) == cyclical(1000) == pytest.approx(0.6)
    assert CyclicalAnnealing(8).num_cycles == 4
    for steps in (0, -3):
        with pytest.raises(ValueError, match="num_steps must be at least 1"):
            LinearAnnealing(steps)
    assert LinearAnnealing(1)(0) == 1.0


def test_the_largest_entries():
    values = torch.tensor([3.0, -5.0, 2.0, 4.0])
    assert largest(values, 2, None).tolist() == [True, False, False, True]
    within = torch.tensor([True, True, True, False])
    assert largest(values, 2, within).tolist() == [True, False, True, False]
    assert largest(values, 9, within).tolist() == within.tolist()
    assert largest(values, 9, None).tolist() == [True] * 4
