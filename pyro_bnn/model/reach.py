# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Whether gradients of the likelihood reach the latents that it depends on."""

from collections.abc import Sequence

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_bnn.model.derivatives import Probe
from pyro_bnn.model.handlers import is_deterministic, sample_sites

_CAUSES = (
    "Something on the way cuts the graph (detach(), .data, .item(), numpy, torch.no_grad(), integer indices), or the "
    "value is not used at all"
)


def unreached(value: Tensor, leaves: dict[str, Tensor]) -> list[str]:
    """The names of those tensors from which no path leads to a scalar."""
    if not value.requires_grad:
        return list(leaves)
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return [name for name, gradient in zip(leaves, found, strict=True) if gradient is None]


def nothing_reached(names: Sequence[str]) -> ValueError:
    """The error for a likelihood without any latent."""
    return ValueError(
        f"no gradient of the likelihood reaches a latent site ({', '.join(map(repr, list(names)[:5]))}): the posterior "
        f"would be the prior. {_CAUSES}: compute the observed distribution from the sites by torch operations."
    )


def require_reach(probe: Probe) -> None:
    """Raises if no latent site reaches the likelihood, or if one moves it without a gradient."""
    moving = [name for name in probe.unreached if _moves(probe, name)]
    if moving:
        raise ValueError(
            f"the likelihood depends on the latent sites {moving}, but its gradient does not reach them: their "
            f"posterior would be their prior. {_CAUSES.partition(', or')[0]}: compute it by torch operations."
        )
    if probe.unreached == list(probe.model.space.slices):
        raise nothing_reached(probe.unreached)


def _moves(probe: Probe, name: str) -> bool:
    """Whether another value of a site gives another likelihood."""
    model, moved, before = probe.model, probe.latent.clone(), probe.log_likelihood
    generator = torch.Generator(device=moved.device).manual_seed(0)
    part = moved[model.space.slices[name]]
    part += torch.randn(part.shape, generator=generator, dtype=part.dtype, device=part.device)
    with torch.random.fork_rng():
        after = model.log_likelihood(model.trace(moved, probe.batch), require_finite=False)
    return abs(float(after.detach()) - before) > 1e3 * probe.eps * abs(before)


def check_reached(trace: Trace, leaves: dict[str, Tensor]) -> None:
    """Raises if the likelihood of a trace reaches none of its latent sites."""
    terms = [
        site for site in sample_sites(trace).values() if site["is_observed"] and not is_deterministic(site)
    ]
    if not leaves or not terms:
        return
    value = sum((site["fn"].log_prob(site["value"]).sum() for site in terms), torch.zeros(()))
    if len(unreached(value, leaves)) == len(leaves):
        raise nothing_reached(list(leaves))
