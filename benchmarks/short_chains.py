# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Short microcanonical chains from an ensemble of modes of one member's posterior, their cost counted in gradients."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import Tensor
from uci_models import Member

from pyro_bnn.infer import ChainResult, mclmc
from pyro_bnn.ops.newton import lbfgs

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """
    A run of chains.

    :param modes: in which chains start.
    :param chains: of each mode.
    :param warmup: steps of adaptation of each chain.
    :param steps: after that.
    :param draws: of each chain that are kept, evenly spaced.
    :param spread: standard deviations of the prior at which the search for a mode starts.
    :param iterations: of L-BFGS for each mode.
    :param laplace: whether modes are Laplace approximations, which whitening and draws need.
    :param options: of :func:`~pyro_bnn.infer.mclmc`.
    """

    modes: int = 10
    chains: int = 1
    warmup: int = 600
    steps: int = 1400
    draws: int = 140
    spread: float = 0.1
    iterations: int = 200
    laplace: bool = False
    options: tuple[tuple[str, Any], ...] = (
        ("whiten", "diagonal"),
        ("collapse", "net.2"),
        ("energy_variance", 0.005),
    )

    def with_options(self, **options: Any) -> "Recipe":
        return replace(self, options=tuple((dict(self.options) | options).items()))


def modes(member: Member, data: Data, recipe: Recipe, seed: int) -> list[Tensor]:
    """
    Points ``(p,)`` by L-BFGS under the member's prior scales and noise. From small weights, simple functions, searches reach modes
    from which chains take larger steps than from modes near draws of the prior.
    """
    assert member.guide is not None
    guide, found = member.guide, []
    energy = member.potential(data)
    widths = torch.cat([scale.expand(n) for scale, n in zip(*_by_site(member), strict=True)])
    for k in range(recipe.modes):
        pyro.set_rng_seed(seed + k)
        start = recipe.spread * torch.randn_like(guide.loc)
        # in units of the prior, in which L-BFGS goes further
        found.append(widths * lbfgs(lambda z: [energy(widths * z)], start, max_iter=recipe.iterations))
    return found


def _by_site(member: Member) -> tuple[list[Tensor], list[int]]:
    """Prior scales in the order of the packed vector, and the sizes of their sites."""
    assert member.guide is not None
    space = member.guide.packed.space
    names = list(space.slices)
    sizes = [space.slices[name].stop - space.slices[name].start for name in names]
    return [member.scales[name.removeprefix("net.")].detach() for name in names], sizes


def short_chains(member: Member, data: Data, recipe: Recipe, seed: int) -> tuple[ChainResult, dict[str, Any]]:
    """
    The chains, and what they cost.

    :param member: a fitted member, whose prior scales and noise the chains have.
    :param data: inputs and targets.
    :param recipe: see there.
    :param seed: of the first mode, and of the chains.
    :return: also gradients: those of the member's fit, of the modes, of the chains, and their sum.
    """
    assert member.guide is not None
    fitted = member.gradients
    points = modes(member, data, recipe, seed)
    searched, member.gradients = member.gradients - fitted, fitted  # the next recipe has modes of its own
    if recipe.laplace:
        guide: Any = [member.at(u, data).laplace_approximation(data, map_tolerance=math.inf) for u in points]
    else:
        guide = [member.guide.packed.space.unpack(u) for u in points]
    pyro.set_rng_seed(seed)
    thinning = max(1, recipe.steps // recipe.draws)
    run = mclmc(
        member.model,
        guide,
        data,
        num_samples=recipe.steps // thinning,
        thinning=thinning,
        warmup_steps=recipe.warmup,
        num_chains=recipe.chains,
        progress_bar=False,
        **dict(recipe.options),
    )
    cost = {"fit_gradients": fitted, "mode_gradients": searched, "chain_gradients": run.info["gradients"]}
    report = cost | {
        "gradients": sum(cost.values()),
        "modes": recipe.modes,
        "chains": recipe.modes * recipe.chains,
        "steps": f"{recipe.warmup} + {recipe.steps}",
        "refused": int(run.sample_stats["diverging"].sum()),
    }
    return run, report
