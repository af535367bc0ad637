# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Likelihoods that no latent reaches, and parts of likelihoods that belong to no batch."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta

from pyro_bnn.infer import hfl
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace
from tests.common import assert_close

CUTS = {
    "detach": lambda f: f.detach(),
    "numpy": lambda f: torch.as_tensor(f.detach().numpy().copy()),
    "not used": lambda f: torch.zeros_like(f).detach(),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_likelihood_that_no_latent_reaches(cut):
    def model(x, y=None):
        w = pyro.sample("weights", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(cut(x @ w), 0.5), obs=y)

    x, y = torch.randn(9, 3), torch.randn(9)
    guide = AutoDelta(model)
    guide(x, y)
    for options in ({"targets": (x,)}, {"functional": lambda latents: latents["weights"].sum()}):
        with pytest.raises(ValueError, match=r"likelihood.*weights.*(detach|torch operations)"):
            hfl.solve(guide, (x, y), **options)
    own = AutoHessianFreeLaplace(model).initialize(x, y)
    with pytest.raises(ValueError, match=r"likelihood.*weights"):
        own.laplace_approximation((x, y), (x,))


def measured(x, y, z):
    """A regression, and a measurement of a coefficient beside it."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("one", dist.Normal(w[0].sinh(), 0.3), obs=z)
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("method", ["cg", "central"])
def test_sites_beside_the_plate_count_once(curvature, method):
    x, y, z = torch.randn(12, 3), torch.randn(12), torch.tensor(0.7)
    batches = [(x[:5], y[:5], z), (x[5:], y[5:], z)]
    guide = AutoLaplace(measured).initialize(x, y, z).polish((x, y, z))
    loc = guide.loc.detach()

    def loss(w):
        one = torch.distributions.Normal(w[0].sinh(), 0.3).log_prob(z)
        each = torch.distributions.Normal(x @ w, 0.5).log_prob(y)
        return -one - each.sum() + 0.5 * w.square().sum()

    precision = torch.func.hessian(loss)(loc)
    if curvature == "ggn":
        precision = torch.eye(3) + 4 * x.mT @ x
        precision[0, 0] += (loc[0].cosh() / 0.3) ** 2
    expected = torch.linalg.inv(precision)
    found = hfl.solve(
        guide, batches, functional=lambda latents: latents["w"], curvature=curvature, method=method
    )
    assert_close(found.variance, expected.diagonal(), rtol=1e-4)
    if method == "cg":
        scores = torch.func.jacrev(lambda w: torch.distributions.Normal(x @ w, 0.5).log_prob(y))(loc)
        own = torch.func.grad(lambda w: torch.distributions.Normal(w[0].sinh(), 0.3).log_prob(z))(loc)
        scores = torch.cat([scores, own[None]])
        robust = hfl.covariance(
            guide, batches, functional=lambda latents: latents["w"], curvature=curvature, robust=True
        )
        assert_close(robust, expected @ scores.mT @ scores @ expected, rtol=1e-4, atol=1e-7)
