# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""What reads a guide with an exact Hessian asks for no Fisher information."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bnn.diagnostics import log_weights, to_datatree
from pyro_bnn.infer import posterior_predictive
from pyro_bnn.infer.autoguide import AutoLaplace, AutoLaplaceMixture
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


def test_predictions_of_a_mixture_for_a_likelihood_without_a_rule() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(8, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    guide = AutoLaplaceMixture(model, 2, curvature="hessian").initialize(x, y).polish((x, y))
    guide.laplace_approximation((x, y))
    prediction = posterior_predictive(model, guide, (x, y), num_samples=3)
    wanted = torch.stack([density(w, x, y) for w in prediction.draws["w"]])
    assert_close(prediction.log_likelihood, wanted)


def test_evidence_of_a_likelihood_without_a_rule_is_differentiable() -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(8, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    log_scale = torch.nn.Parameter(x.new_tensor(0.2))

    def scaled(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), log_scale.exp()).to_event(1))
        loc = torch.stack([x @ w, x @ w], -1)
        with pyro.plate("data", len(x)):
            pyro.sample(
                "obs",
                dist.MultivariateStudentT(x.new_tensor(5.0), loc, torch.linalg.cholesky(COVARIANCE)),
                obs=y,
            )

    def log_joint(w: Tensor, log_scale: Tensor) -> Tensor:
        prior = (
            -0.5 * (w / log_scale.exp()).square().sum()
            - 2 * log_scale
            - torch.log(x.new_tensor(2 * torch.pi))
        )
        return density(w, x, y).sum() + prior

    for structure in ("full", "low_rank"):
        guide = AutoLaplace(scaled, structure=structure, rank=2, curvature="hessian").initialize(x, y)
        guide.polish((x, y)).laplace_approximation((x, y))
        mode = guide.loc.detach()
        other = log_scale.detach().clone().requires_grad_(True)
        hessian = -torch.autograd.functional.hessian(
            lambda w, other=other: log_joint(w, other),
            mode,
            create_graph=True,
        )
        wanted = log_joint(mode, other) + torch.log(x.new_tensor(2 * torch.pi)) - 0.5 * torch.logdet(hessian)
        found = guide.log_evidence(data=(x, y))
        assert_close(found, wanted, rtol=1e-8)
        assert_close(
            *(torch.autograd.grad(e, p)[0] for e, p in ((found, log_scale), (wanted, other))), rtol=1e-8
        )
