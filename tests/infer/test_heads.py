# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""``sites="last_layer"`` of networks with several heads is refused, and that of others is not."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.nn import bayesian_


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).tanh()
        return self.first(h).squeeze(-1), self.second(h).squeeze(-1)


def tasks(net: Any) -> Any:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        a, b = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(a, 0.5), obs=y)
            pyro.sample("b", dist.Normal(b, 0.5), obs=y)

    return model


def variance_head(net: Any) -> Any:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        loc, log_scale = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(loc, log_scale.exp()), obs=y)

    return model


def noise_of_its_own(net: Any) -> Any:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        loc = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(loc, scale), obs=y)

    return model


def guide_of(build: Any, net: nn.Module) -> tuple[AutoLaplace, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(8, 2), torch.randn(8)
    return AutoLaplace(build(bayesian_(net)), sites="last_layer").initialize(x, y), x, y


@pytest.mark.parametrize("build", [tasks, variance_head])
def test_one_of_several_heads_is_not_the_last_layer(build: Any) -> None:
    guide, x, y = guide_of(build, Heads())
    with pytest.raises(ValueError, match=r"parameter 'loc' of site 'a' does not depend on .*'second.weight'"):
        guide.laplace_approximation((x, y), map_tolerance=1e9)


def test_the_refusal_names_a_site_of_which_the_last_map_is_a_part() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 2), torch.randn(8)
    model = tasks(bayesian_(Heads(), packed=True))
    guide = AutoLaplace(model, sites="last_layer").initialize(x, y)
    (site,) = [name for name in guide.packed.space.slices if name != "noise"]
    with pytest.raises(ValueError, match=rf"does not depend on .*'{site}'"):
        guide.laplace_approximation((x, y), map_tolerance=1e9)


def test_a_latent_scale_is_no_head() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0))
    guide, x, y = guide_of(noise_of_its_own, net)
    guide.laplace_approximation((x, y), map_tolerance=1e9)
    assert guide.active is not None
    assert int(guide.active.sum()) == 4
