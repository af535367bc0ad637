# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""An observed site that some batches do not have, in any order of the batches. The reference is conjugacy in plain torch."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import MultivariateNormal, Normal

from pyro_bnn.diagnostics import log_weights, to_datatree
from pyro_bnn.infer import hfl, posterior_predictive, predictive_moments
from pyro_bnn.infer.autoguide import AutoLaplace
from tests.common import assert_close

N = 8
NOISY = torch.tensor([5, 6])


def regression(declared: bool) -> Any:
    """Rows with more noise are observed at a site of their own."""

    def model(x: Any, noisy: Any, y: Any = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        f = (x * w).sum(-1)
        with pyro.plate("data", N if declared else len(x), len(x)):
            with poutine.mask(mask=~noisy):
                pyro.sample("obs", dist.Normal(f, 0.5), obs=y)
            if noisy.any():
                with poutine.mask(mask=noisy):
                    pyro.sample("noisy", dist.Normal(f, 2.0), obs=y)

    return model


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    noisy = torch.zeros(N, dtype=torch.bool)
    noisy[NOISY] = True
    return torch.randn(N, 2), noisy, torch.randn(N)


def batches(order: list[int], sizes: tuple[int, ...]) -> Any:
    rows = data()
    parts = list(zip(*(t.split(sizes) for t in rows), strict=True))
    return rows, [parts[i] for i in order]


ORDERS = [([0, 1], (4, 4)), ([1, 0], (4, 4)), ([2, 1, 0], (3, 3, 2))]


@pytest.mark.every(3)
@pytest.mark.parametrize(("order", "sizes"), ORDERS, ids=str)
@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("start", ["first", "all"])
def test_curvature_evidence_and_weights(
    order: list[int], sizes: tuple[int, ...], declared: bool, curvature: Any, start: str
) -> None:
    (x, noisy, y), loader = batches(order, sizes)
    scale = torch.where(noisy, 2.0, 0.5)
    precision = torch.eye(2) + x.T @ (x / scale[:, None] ** 2)
    evidence = MultivariateNormal(torch.zeros(N), x @ x.T + torch.diag(scale**2)).log_prob(y)
    model = regression(declared)
    guide = AutoLaplace(model, curvature=curvature).initialize(
        *(loader[0] if start == "first" else (x, noisy, y))
    )
    guide = guide.polish(loader).laplace_approximation(loader)
    assert_close(guide.loc, torch.linalg.solve(precision, x.T @ (y / scale**2)))
    assert_close(guide.posterior.covariance_matrix, torch.linalg.inv(precision))
    assert_close(guide.log_evidence(), evidence)
    assert_close(log_weights(model, guide, loader, 3)[1], evidence.expand(3))
    found = hfl.solve(guide, loader, functional=lambda z: z["w"])
    assert_close(found.variance.flatten(), torch.linalg.inv(precision).diagonal())


@pytest.mark.parametrize(("order", "sizes"), ORDERS, ids=str)
@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("vectorize", [None, False])
def test_export_and_predictions(
    order: list[int], sizes: tuple[int, ...], declared: bool, vectorize: bool | None
) -> None:
    (x, noisy, y), loader = batches(order, sizes)
    draws = {"w": torch.randn(3, 2)}
    model = regression(declared)
    scale = torch.where(noisy, 2.0, 0.5)
    terms = Normal(draws["w"] @ x.T, scale).log_prob(y)
    lp = terms.sum(-1) + Normal(0.0, 1.0).log_prob(draws["w"]).sum(-1)
    tree = to_datatree(model, draws, loader, vectorize=vectorize)
    assert_close(torch.as_tensor(tree["sample_stats"]["lp"].values)[0], lp)
    x, noisy, y = (torch.cat([batch[i] for batch in loader]) for i in range(3))
    scale = torch.where(noisy, 2.0, 0.5)
    terms = Normal(draws["w"] @ x.T, scale).log_prob(y)
    likelihood = tree["log_likelihood"]
    assert_close(torch.as_tensor(likelihood["obs"].values)[0], terms[:, ~noisy])
    assert_close(torch.as_tensor(likelihood["noisy"].values)[0], terms[:, noisy])
    found = posterior_predictive(model, draws, loader, vectorize=vectorize)
    there = torch.cat([batch[1].any().expand(len(batch[1])) for batch in loader])
    assert_close(found["obs"].mean, draws["w"] @ x.T)
    assert_close(found["noisy"].mean, (draws["w"] @ x.T)[:, there])
    moments = predictive_moments(model, draws, loader, vectorize=vectorize)
    assert_close(moments["noisy"].mean, (draws["w"] @ x.T).mean(0)[there])


def test_a_label_outside_the_support_is_found_at_a_site_of_later_batches() -> None:
    def model(x: Any, counts: Any, y: Any) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, len(x)):
            pyro.sample("obs", dist.Normal(w * x, 1.0), obs=y)
            if counts.any():
                pyro.sample("count", dist.Poisson((w * x).exp()), obs=counts)

    x, y = torch.randn(N), torch.randn(N)
    counts = torch.tensor([0.0] * 5 + [1.0, -2.0, 0.0])
    loader = list(zip(*(t.split(4) for t in (x, counts, y)), strict=True))
    for vectorize in (None, False):
        with pytest.raises(ValueError, match="'count'"):
            posterior_predictive(model, {"w": torch.randn(3)}, loader, vectorize=vectorize)


def test_a_site_that_no_batch_has_is_named() -> None:
    x, noisy, y = data()
    model = regression(True)
    guide = AutoLaplace(model).initialize(x, noisy, y)
    none = torch.zeros(N, dtype=torch.bool)
    for call in (guide.polish, guide.laplace_approximation):
        with pytest.raises(ValueError, match="'noisy' was observed at initialisation"):
            call([(x[:4], none[:4], y[:4]), (x[4:], none[4:], y[4:])])
    with pytest.raises(ValueError, match="has no observation here"):
        guide.laplace_approximation((x, noisy))
