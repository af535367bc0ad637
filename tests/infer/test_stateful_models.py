# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""A network that keeps a hidden state from call to call gives no function of the latents, and nobody answers for it."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_bnn.diagnostics import to_datatree
from pyro_bnn.infer import Mixture_ELBO, posterior_predictive, predictive_moments
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.nn import bayesian_


class Recurrent(nn.Module):
    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.cell, self.head, self.keeps = nn.RNNCell(2, 2), nn.Linear(2, 1), keeps
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        fits = self.state is not None and len(self.state) == len(x)
        before = self.state if fits else x.new_zeros(len(x), 2)
        after = self.cell(x, before)
        if self.keeps:
            self.state = after.detach()
        return self.head(after)


def build(keeps: bool, noise: bool = False) -> tuple[Any, tuple[Tensor, Tensor]]:
    net = bayesian_(Recurrent(keeps))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = net(x).squeeze(-1)
        if noise:  # random numbers that are no sites are taken anew in every run, as ever
            f = f + 0.1 * torch.randn(())
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return model, (torch.randn(6, 2), torch.randn(6))


READERS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "predictive": lambda m, g, d: posterior_predictive(m, g, d, num_samples=4),
    "loop": lambda m, g, d: posterior_predictive(m, g, d, num_samples=4, vectorize=False),
    "one draw": lambda m, g, d: posterior_predictive(m, g, d, num_samples=1),
    "moments": lambda m, g, d: predictive_moments(m, g, d, num_samples=4),
    "export": lambda m, g, d: to_datatree(m, g, d, num_samples=4),
    "bound": lambda m, g, d: Mixture_ELBO().differentiable_loss(m, g, *d),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.filterwarnings("ignore::pyro_bnn.infer.mixture.check.ComponentLoopWarning")
def test_a_state_that_is_kept_is_refused(reader: str) -> None:
    model, data = build(keeps=True)
    guide = AutoMixture(model, 2).initialize(*data)
    with pytest.raises(ValueError, match=r"not a function of its latents: .*'obs' differs"):
        READERS[reader](model, guide, data)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.filterwarnings("ignore::pyro_bnn.infer.mixture.check.ComponentLoopWarning")
def test_a_state_that_is_not_kept_is_not(reader: str, noise: bool) -> None:
    model, data = build(keeps=False, noise=noise)
    guide = AutoMixture(model, 2).initialize(*data)
    READERS[reader](model, guide, data)
