# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A table outside the plate of the data, in a plate that the data are in as well: it counts once. The reference is conjugacy."""

from collections.abc import Callable
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

N, GROUPS = 8, 3


def groups(declared: bool, data_last: bool) -> Callable[..., None]:
    """A mean per group, of which each row holds a measurement, and one further measurement that is no row."""

    def model(x: Any, y: Any) -> None:
        data_dim, group_dim = (-1, -2) if data_last else (-2, -1)
        group = pyro.plate("group", GROUPS, dim=group_dim)
        size = {"size": N, "subsample_size": len(x)} if declared else {"size": len(x)}
        data = pyro.plate("data", dim=data_dim, **size)
        with group:
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with data, group:
            loc = b + (x if data_last else x[:, None])
            pyro.sample("obs", dist.Normal(loc, 0.5), obs=y.T if data_last else y)
        with group:
            other = torch.tensor([1.0, 2.0, -1.0])
            pyro.sample("other", dist.Normal(b, 1.0), obs=other[:, None] if data_last else other)

    return model


def closed_form(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    ones = torch.ones(N + 1, 1)
    cov = ones @ ones.T + torch.diag(torch.tensor([0.25] * N + [1.0]))
    loc = torch.cat([x, torch.zeros(1)])
    values = torch.cat([y, torch.tensor([[1.0, 2.0, -1.0]])])
    return sum(MultivariateNormal(loc, cov).log_prob(values[:, k]) for k in range(GROUPS))


@pytest.mark.every(3)
@pytest.mark.parametrize("sizes", [(8,), (3, 5), (4, 4), (1,) * 8], ids=str)
@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("data_last", [True, False])
def test_a_table_in_a_plate_of_the_data_counts_once(
    sizes: tuple[int, ...], declared: bool, data_last: bool
) -> None:
    x, y = torch.randn(N), torch.randn(N, GROUPS)
    data = list(zip(x.split(sizes), y.split(sizes), strict=True))
    model = groups(declared, data_last)
    guide = AutoLaplace(model).initialize(x, y).polish(data).laplace_approximation(data)
    assert_close(1 / guide.posterior.variance, torch.full((GROUPS,), 1.0 + N / 0.25 + 1.0))
    assert_close(guide.log_evidence(), closed_form(x, y))
    mean = ((y - x[:, None]).sum(0) / 0.25 + torch.tensor([1.0, 2.0, -1.0])) / 34.0
    assert_close(guide.loc, mean)
    found = hfl.solve(guide, data, functional=lambda z: z["b"])
    assert_close(found.variance.flatten(), torch.full((GROUPS,), 1 / 34.0))
    log_mean = log_weights(model, guide, data, 2)[1]
    assert_close(log_mean, closed_form(x, y).expand(2))  # the guide is the posterior
    b = torch.randn(2, GROUPS)
    density = Normal(0.0, 1.0).log_prob(b) + Normal(b, 1.0).log_prob(torch.tensor([1.0, 2.0, -1.0]))
    density = density + Normal(b[:, None] + x[:, None], 0.5).log_prob(y).sum(1)
    draws = {"b": b[..., None] if data_last else b}
    lp = to_datatree(model, draws, data)["sample_stats"]["lp"].values
    assert_close(torch.as_tensor(lp)[0], density.sum(-1))
