# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Simulation-based calibration of the adjusted kernel: latents from the prior, data given the latents, and two chains of k and L - k
transitions from these latents, k uniform (Gandy and Scott, 2020). The kernel is reversible, so that all L + 1 states are exchangeable and the rank
of the first is uniform exactly, however badly chains mix. One chain is one row with data of its own.
"""

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from pyro_bnn.infer.sample.microcanonical import (
    Chains,
    Target,
    adjusted_transition,
    langevin_step,
    normalized,
)
from pyro_bnn.infer.sample.whitening import Scales

SIMULATIONS, RANKS, DATA = 1200, 7, 5


def line(x: Tensor, u: Tensor) -> Tensor:
    """The mean of a regression on two inputs."""
    return (x * u[:, None, :2]).sum(-1)


def unit(x: Tensor, u: Tensor) -> Tensor:
    """The mean by one tanh unit, which has two modes."""
    return 2 * u[:, 1:2] * torch.tanh(2 * u[:, :1] * x[..., 0])


def posterior(mean, x: Tensor, y: Tensor):
    """Values and gradients of log N(u; 0, I) + log N(y; mean, e^u_3) by rows."""

    def function(u: Tensor) -> tuple[Tensor, Tensor]:
        u = u.detach().requires_grad_(True)
        z = (y - mean(x, u)) * (-u[:, 2:3]).exp()
        value = -0.5 * u.square().sum(-1) - 0.5 * z.square().sum(-1) - y.shape[1] * u[:, 2]
        return value.detach(), torch.autograd.grad(value.sum(), u)[0]

    return function


def first_ranks(mean, step: float, adjusted: bool) -> Tensor:
    """Ranks of latents and of the log density, shape ``(simulations, 4)``."""
    torch.manual_seed(0)
    latents, x = torch.randn(SIMULATIONS, 3).double(), torch.randn(SIMULATIONS, DATA, 2).double()
    y = mean(x, latents) + latents[:, 2:].exp() * torch.randn(SIMULATIONS, DATA).double()
    start, x, y = (value.repeat(2, *(1,) * (value.dim() - 1)) for value in (latents, x, y))
    target = Target(posterior(mean, x, y), Scales(torch.ones(3).double()))
    chains: Chains = target.start(start, normalized(torch.randn_like(start)))
    steps = start.new_full((len(start),), step)
    states = [chains]
    for _ in range(RANKS):
        noise, level = torch.randn_like(start), torch.rand_like(steps)
        if adjusted:
            chains, *_ = adjusted_transition(target, chains, steps, 2, noise, level)
        else:
            chains, *_ = langevin_step(target, chains, steps, 4 * steps, noise)
        states.append(chains)
    all_values = torch.stack([torch.cat([s.position, s.log_density[:, None]], 1) for s in states])
    forward, back = all_values.chunk(2, 1)
    k = torch.randint(RANKS + 1, (SIMULATIONS,))
    index = torch.arange(1, RANKS + 1)[:, None]
    seen_forward, seen_back = (index <= k)[..., None], (index <= RANKS - k)[..., None]
    below = ((forward[1:] < forward[0]) & seen_forward).sum(0) + ((back[1:] < back[0]) & seen_back).sum(0)
    same = ((forward[1:] == forward[0]) & seen_forward).sum(0) + ((back[1:] == back[0]) & seen_back).sum(0)
    return below + (torch.rand(same.shape) * (same + 1)).floor().long()


def p_values(ranks: Tensor) -> list[float]:
    counts = [torch.bincount(column, minlength=RANKS + 1).numpy() for column in ranks.unbind(1)]
    return [float(chisquare(column).pvalue) for column in counts]


@pytest.mark.parametrize("mean", [line, unit])
def test_ranks_of_latents_under_the_adjusted_kernel_are_uniform(mean):
    # four tests for each of two models: the smallest p-value is below 1e-4 once in a thousand seeds
    assert min(p_values(first_ranks(mean, 0.7, adjusted=True))) > 1e-4


@pytest.mark.parametrize("mean", [line, unit])
def test_the_same_steps_without_the_adjustment_are_seen(mean):
    assert min(p_values(first_ranks(mean, 0.7, adjusted=False))) < 1e-6
