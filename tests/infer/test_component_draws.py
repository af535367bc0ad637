# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Draws from mixtures, component by component: their moments, their densities, their chains."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_bnn.diagnostics import to_datatree
from pyro_bnn.infer import posterior_draws
from pyro_bnn.infer.autoguide import AutoMixture, components
from pyro_bnn.infer.predict.density import guide_log_prob
from pyro_bnn.infer.predict.draws import component_draws
from pyro_bnn.nn import rank1_
from tests.common import assert_close


def model(y: Tensor | None = None) -> None:
    pyro.sample("vector", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("positive", dist.Gamma(2.0, 1.0))
    pyro.sample("unit", dist.Beta(2.0, 2.0))
    pyro.sample("obs", dist.Normal(0.0, 1.0), obs=y)


def half(site: Any) -> Tensor:
    return torch.full(site["fn"].shape(), 0.5)


def guide_of(component: str, K: int = 2) -> AutoMixture:
    kinds = {"vector": component, "*": "normal"}
    guide = AutoMixture(model, K, kinds, rank=2, init_scale=0.3, init_loc_fn=half).initialize(
        torch.tensor(0.0)
    )
    with torch.no_grad():
        guide.loc.copy_(0.5 * torch.randn_like(guide.loc))
    return guide


@pytest.mark.every(2)
@pytest.mark.parametrize("long_rows", [False, True])
@pytest.mark.parametrize("component", ["normal", "low_rank", "lognormal"])
def test_moments_of_components(component: str, long_rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In unconstrained space mean and covariance are those of the parameters."""
    if long_rows:
        monkeypatch.setattr(components, "LONG_ROW", 1)
    guide = guide_of(component)
    draws = component_draws(guide, 40_000)
    low_rank = guide._low_rank()
    for site, loc, scale in guide._blocks():
        assert scale is not None
        raw = site.transform.inv(draws[site.name]).reshape(2, 40_000, -1)
        for k in range(2):
            covariance = torch.diag(scale[k].detach().reshape(-1).square())
            if site.kind == "low_rank":
                covariance = low_rank.covariance_matrix[k].detach()
            spread = covariance.diagonal().sqrt()
            assert_close(raw[k].mean(0), loc[k].detach().reshape(-1), rtol=0, atol=0.03 * float(spread.max()))
            assert_close(
                raw[k].T.cov().reshape(covariance.shape),
                covariance,
                rtol=0,
                atol=0.04 * float(spread.max()) ** 2,
            )


def test_quantiles_of_cauchy() -> None:
    guide = guide_of("cauchy", 1)
    draws = posterior_draws(guide, 100_000)["vector"]
    _, loc, scale = next(block for block in guide._blocks() if block[0].name == "vector")
    expected = (
        loc[0] + scale[0] * torch.tensor([-1.0, 0.0, 1.0])[:, None]
    )  # quartiles of a Cauchy distribution
    found = torch.quantile(draws, torch.tensor([0.25, 0.5, 0.75]), dim=0)
    assert_close(found, expected.detach(), rtol=0, atol=0.02)


@pytest.mark.parametrize("component", ["normal", "low_rank"])
def test_density_is_normalised(component: str) -> None:
    """Importance weights of the mixture against one wide component average to one."""
    guide, wide = guide_of(component), guide_of("normal", 1)
    with torch.no_grad():
        wide.loc.copy_(guide.loc.mean(0, keepdim=True))
        wide.scale_unconstrained.copy_(wide.scale_unconstrained + 1.5)
    draws = posterior_draws(wide, 200_000)
    log_q, log_wide = guide_log_prob(guide, draws), guide_log_prob(wide, draws)
    assert log_q is not None
    assert log_wide is not None
    weights = (log_q - log_wide).exp()
    error = float(weights.std()) / math.sqrt(len(weights))
    assert error < 0.05
    assert abs(float(weights.mean()) - 1) < 4 * error


def test_chains_of_low_rank_components() -> None:
    """Every chain of an export holds draws of its own component, and their density."""
    guide = guide_of("low_rank")
    with torch.no_grad():
        guide.loc.copy_(torch.tensor([[-5.0], [5.0]]).expand_as(guide.loc))
    tree = to_datatree(model, guide, {"y": torch.tensor(0.3)}, num_samples=200)
    means = tree["posterior"]["vector"].mean(("draw", "vector_dim_0")).values
    assert_close(means, [-5.0, 5.0], rtol=0, atol=0.2)
    spread = tree["posterior"]["vector"].std("draw").values
    assert float(spread.min()) > 0.1
    assert bool(torch.isfinite(torch.as_tensor(tree["sample_stats"]["log_q"].values)).all())


def test_density_with_the_index_in_the_model() -> None:
    """Batch normalisation per component makes the index a site: its draws carry the density of their component."""
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1))
    net = rank1_(net, batchnorm="component", num_components=2)

    def network(x, y=None):
        f = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, 1.0), obs=y)

    x, y = torch.randn(6, 2), torch.randn(6)
    guide = AutoMixture(network, 2, rest="normal").initialize(x, y)
    draws = component_draws(guide, 3)
    assert draws[guide.index_name].reshape(2, 3).tolist() == [[0, 0, 0], [1, 1, 1]]
    flat = {name: value.flatten(0, 1) for name, value in draws.items()}
    each = guide.component_log_prob(flat)
    expected = torch.cat([each[:3, 0], each[3:, 1]]) - math.log(2)
    assert_close(guide_log_prob(guide, flat), expected.detach())
