# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Priors that depend on the data: right in one batch, refused by name where batches do not agree."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from pyro_bnn.diagnostics import log_weights, to_datatree
from pyro_bnn.infer import hfl
from pyro_bnn.infer.autoguide import AutoLaplace
from tests.common import assert_close

N = 8


def model(x: Any, mean: Any, y: Any) -> None:
    """The prior takes the mean of what it is given."""
    w = pyro.sample("w", dist.Normal(mean.mean(0), 1.0).to_event(1))
    with pyro.plate("data", N, subsample_size=len(x)):
        pyro.sample("obs", dist.Normal((x * w).sum(-1), 0.5), obs=y)


def test_a_prior_of_the_batch_is_refused_by_name() -> None:
    x, y = 1 + torch.randn(N, 2), torch.randn(N)
    guide = AutoLaplace(model).initialize(x, x, y).polish((x, x, y)).laplace_approximation((x, x, y))
    exact = MultivariateNormal(x @ x.mean(0), x @ x.T + 0.25 * torch.eye(N)).log_prob(y)
    assert_close(guide.log_evidence(), exact)
    assert_close(log_weights(model, guide, (x, x, y), 2)[1], exact.expand(2))
    for sizes in ((3, 5), (4, 4)):
        loader = list(zip(x.split(sizes), x.split(sizes), y.split(sizes), strict=True))
        for call in (
            AutoLaplace(model).initialize(x, x, y).polish,
            AutoLaplace(model).initialize(x, x, y).laplace_approximation,
            lambda data: guide.log_evidence(data=data),
            lambda data: hfl.solve(guide, data, functional=lambda z: z["w"]),
            lambda data: log_weights(model, guide, data, 2),
            lambda data: to_datatree(model, {"w": torch.randn(3, 2)}, data),
        ):
            with pytest.raises(ValueError, match=r"prior of site 'w' depends on the batch: .* -\d.* -\d"):
                call(loader)


def test_a_prior_of_all_the_data_counts_once() -> None:
    x, y = 1 + torch.randn(N, 2), torch.randn(N)
    loader = [(x[:3], x, y[:3]), (x[3:], x, y[3:])]
    guide = AutoLaplace(model).initialize(x, x, y).polish(loader).laplace_approximation(loader)
    exact = MultivariateNormal(x @ x.mean(0), x @ x.T + 0.25 * torch.eye(N)).log_prob(y)
    assert_close(guide.log_evidence(), exact)
    assert_close(log_weights(model, guide, loader, 2)[1], exact.expand(2))
    w = torch.randn(3, 2)
    lp = Normal(x.mean(0), 1.0).log_prob(w).sum(-1) + Normal(w @ x.T, 0.5).log_prob(y).sum(-1)
    found = to_datatree(model, {"w": w}, loader)["sample_stats"]["lp"].values
    assert_close(torch.as_tensor(found)[0], lp)


def test_latents_of_rows_are_refused_in_batches() -> None:
    def rows(y: Any) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            e = pyro.sample("e", dist.Normal(m, 1.0))
            pyro.sample("obs", dist.Normal(e, 0.5), obs=y)

    y = torch.randn(N)
    guide = AutoLaplace(rows).initialize(y[:4]).polish((y[:4],))
    with pytest.raises(ValueError, match="latent site 'e' has a value per row"):
        guide.laplace_approximation([(y[:4],), (y[4:],)])
    guide = AutoLaplace(rows).initialize(y).polish((y,)).laplace_approximation((y,))
    cov = torch.ones(N, N) + 1.25 * torch.eye(N)
    assert_close(guide.log_evidence(), MultivariateNormal(torch.zeros(N), cov).log_prob(y))
