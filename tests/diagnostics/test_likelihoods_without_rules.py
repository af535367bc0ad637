# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""What reads a guide with an exact Hessian asks for no Fisher information."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bnn.diagnostics import log_weights, to_datatree
from pyro_bnn.infer import posterior_predictive
from pyro_bnn.infer.autoguide import AutoLaplace
from tests.common import assert_close

COVARIANCE = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=torch.float64)


def model(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    loc = torch.stack([x @ w, x @ w], -1)
    with pyro.plate("data", len(x)):
        pyro.sample(
            "obs", dist.MultivariateStudentT(x.new_tensor(5.0), loc, torch.linalg.cholesky(COVARIANCE)), obs=y
        )


def density(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Of the bivariate Student t with five degrees of freedom, by its formula."""
    r = y - (x @ w)[:, None]
    q = torch.einsum("ni,ij,nj->n", r, torch.linalg.inv(COVARIANCE), r)
    constant = (
        torch.lgamma(torch.tensor(3.5, dtype=x.dtype))
        - torch.lgamma(torch.tensor(2.5, dtype=x.dtype))
        - torch.log(torch.tensor(5 * torch.pi, dtype=x.dtype))
    )
    return constant - 0.5 * torch.logdet(COVARIANCE) - 3.5 * torch.log1p(q / 5)


def test_weights_and_densities_of_a_likelihood_without_a_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(8, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    guide = AutoLaplace(model, curvature="hessian").initialize(x, y).polish((x, y))
    guide.laplace_approximation((x, y))
    draws, found = log_weights(model, guide, (x, y), 3)
    normal = torch.distributions.Normal(torch.zeros(2, dtype=x.dtype), 1.0)
    q = torch.distributions.MultivariateNormal(guide.loc.detach(), guide.posterior.covariance_matrix)
    for w, weight in zip(draws["w"], found, strict=True):
        wanted = density(w, x, y).sum() + normal.log_prob(w).sum() - q.log_prob(w)
        assert_close(weight, wanted, rtol=1e-7)
    tree = to_datatree(model, guide, (x, y), num_samples=3)
    for w, value in zip(
        tree["posterior"]["w"].values[0], tree["log_likelihood"]["obs"].values[0], strict=True
    ):
        assert_close(torch.as_tensor(value), density(torch.as_tensor(w), x, y))
    prediction = posterior_predictive(model, guide, (x, y), num_samples=3)
    wanted = torch.stack([density(w, x, y) for w in prediction.draws["w"]])
    assert_close(prediction.log_likelihood, wanted)
