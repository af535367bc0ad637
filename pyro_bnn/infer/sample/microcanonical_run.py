# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A run of microcanonical chains: its warm-up, its steps, what it keeps of them."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_bnn.infer.sample.adaptation import (
    AcceptanceTuner,
    EnergyTuner,
    Moments,
    Path,
    first_steps,
    pooled,
    spread,
)
from pyro_bnn.infer.sample.microcanonical import (
    Chains,
    Target,
    adjusted_transition,
    is_sound,
    langevin_step,
    leapfrog,
    normalized,
)
from pyro_bnn.infer.sample.records import Records
from pyro_bnn.infer.sample.whitening import Scales
from pyro_bnn.infer.train.progress import shows_bars
from pyro_bnn.infer.train.state import deferred_interrupt
from pyro_bnn.ops.notice import logger
from pyro_bnn.ops.randomness import random_state, set_random_state

#: Steps that a path of an adjusted transition has at most.
MOST_STEPS = 1000
#: Mean length of the paths of adjusted transitions in units of the spread: about a quarter of a period of a Gaussian.
PATH_FACTOR = 1.5


@dataclass(frozen=True)
class Plan:
    """
    How a run is made.

    :ivar step_size: the steps, if they are given.
    :ivar momentum_length: the momentum length, if it is given.
    :ivar whiten: ``"diagonal"`` estimates factors of the prior's scales in the warm-up.
    :ivar per_mode: whether each mode has its own step size and momentum length.
    """

    num_samples: int
    warmup_steps: int
    thinning: int
    adjusted: bool
    energy_variance: float
    target_accept_prob: float
    step_size: float | None
    momentum_length: float | None
    whiten: str | None
    per_mode: bool

    @property
    def steps(self) -> int:
        """Steps, or adjusted transitions, in all."""
        return self.warmup_steps + self.num_samples * self.thinning

    @property
    def exploration(self) -> int:
        """Steps of the warm-up that are unadjusted."""
        return self.warmup_steps // 2 if self.adjusted else self.warmup_steps

    @property
    def rounds(self) -> tuple[int, int]:
        """Unadjusted steps after which scales are estimated: a quarter and half of them."""
        return self.exploration // 4, self.exploration // 2

    @property
    def warmup_draws(self) -> int:
        """Draws of the warm-up that are kept."""
        return self.warmup_steps // self.thinning

    def is_kept(self, step: int) -> bool:
        """Whether the state after a step, counted from 0, is kept."""
        done = step + 1 if step < self.warmup_steps else step + 1 - self.warmup_steps
        return done % self.thinning == 0


@dataclass
class Units:
    """
    In what chains are whitened.

    :ivar whitener: a square root of a covariance.
    :ivar centre: of the prior, ``(K, p)``.
    :ivar scale: its units, ``(K, p)``; ``None`` if whitening is not by units of latents.
    :ivar site: the index of the site of each latent, ``(p,)``.
    """

    whitener: Any
    centre: Tensor
    scale: Tensor | None
    site: Tensor


class Run:
    """
    C chains of K modes on their way.

    :param plan: see there.
    :param density: the log density, with ``value_and_gradient``.
    :param units: in what chains are whitened.
    :param points: where the chains start, shape ``(C, p)``.
    :param records: what is kept.
    """

    def __init__(self, plan: Plan, density: Any, units: Units, points: Tensor, records: Records) -> None:
        self.plan, self.density, self.units, self.records = plan, density, units, records
        self.num_modes = len(units.centre)
        whitener, num_groups = units.whitener, self.num_modes if plan.per_mode else 1
        self.target = Target(density.value_and_gradient, whitener)
        self.dim = points.shape[-1]
        self.chains = self.target.start(points, normalized(torch.randn_like(points)))
        start = torch.full((num_groups,), math.sqrt(self.dim), dtype=torch.float64, device=points.device)
        self.length = start if plan.momentum_length is None else torch.full_like(start, plan.momentum_length)
        self.step_size = 0.25 * start if plan.step_size is None else torch.full_like(start, plan.step_size)
        self.energy: EnergyTuner | None = None
        self.acceptance: AcceptanceTuner | None = None
        self.moments: Moments | None = None
        self.path: Path | None = None
        # of the prior's units, found in the warm-up
        self.factors = torch.ones(int(units.site.max()) + 1, dtype=torch.float64, device=points.device)
        self.step, self.gradients = 0, density.gradients
        self.squares = torch.zeros_like(start)  # of energy errors after the warm-up
        # steps since the last draw
        self.refused = torch.zeros(len(points), dtype=torch.int64, device=points.device)
        self.elapsed = 0.0
        self.stopped_by = "num_samples"

    @property
    def is_warm(self) -> bool:
        """Whether the warm-up is over."""
        return self.step >= self.plan.warmup_steps

    # ------------------------------------------------------------------ steps

    @torch.no_grad()
    def take(self) -> None:
        """One step, or one adjusted transition, of all chains."""
        if self.plan.adjusted and self.step >= self.plan.exploration:
            stats, errors, refused = self._adjusted()
        else:
            stats, errors, refused = self._unadjusted()
        self.refused += refused
        if self.is_warm:
            self.squares += pooled(errors.double().square(), len(self.squares))
        if self.plan.is_kept(self.step):
            self._keep(stats)
        self.step += 1

    def _sizes(self) -> tuple[Tensor, Tensor]:
        """Step sizes and momentum lengths of the chains, shape ``(C,)``."""
        position = self.chains.position
        both = (spread(value, len(position)).to(position.dtype) for value in (self.step_size, self.length))
        step, length = both
        return step, length

    def _unadjusted(self) -> tuple[dict[str, Any], Tensor, Tensor]:
        if self.step == 0 and self.plan.step_size is None:
            self.step_size = first_steps(self._trial, self.step_size, self.plan.energy_variance, self.dim)
        step, length = self._sizes()
        noise = torch.randn_like(self.chains.position)
        self.chains, errors, refused = langevin_step(self.target, self.chains, step, length, noise)
        if not self.is_warm:
            self._adapt(errors, refused)
        return {"step_size": step, "momentum_length": length, "energy_error": errors}, errors, refused

    def _adjusted(self) -> tuple[dict[str, Any], Tensor, Tensor]:
        if self.acceptance is None:
            self.acceptance = AcceptanceTuner.start(self.step_size, self.plan.target_accept_prob)
        step, length = self._sizes()
        mean = float((self.length / self.step_size).median())
        # of uniform length, the same for all chains: whatever they do, it does not depend on where they are
        num_steps = min(max(math.ceil(2 * mean * float(torch.rand(()))), 1), MOST_STEPS)
        noise = torch.randn_like(self.chains.position)
        level = torch.rand_like(step)
        self.chains, errors, accepted = adjusted_transition(
            self.target, self.chains, step, num_steps, noise, level
        )
        rate = (-errors).exp().clamp(max=1)
        diverging = ~(errors.abs() <= 1000)
        if not self.is_warm and self.plan.step_size is None:
            self.acceptance.update(rate)
            last = self.step == self.plan.warmup_steps - 1
            self.step_size = self.acceptance.finish() if last else self.acceptance.step
        stats = {
            "step_size": step,
            "path_length": length,
            "n_steps": num_steps,
            "energy_error": errors,
            "acceptance_rate": rate,
            "accepted": accepted,
        }
        return stats, errors.where(~diverging, torch.zeros_like(errors)), diverging

    def _keep(self, stats: Mapping[str, Any]) -> None:
        more = {"lp": self.chains.log_density, "diverging": self.refused > 0}
        self.records.add(self.chains.position, {**stats, **more})
        self.refused = torch.zeros_like(self.refused)

    # ------------------------------------------------------------------ warm-up

    def _trial(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squares of the energy errors of single steps from the start, by group, and whether all are finite."""
        chains = self.chains._replace(direction=normalized(torch.randn_like(self.chains.position)))
        moved, error = leapfrog(self.target, chains, spread(step, len(chains.position)).to(chains.position))
        sound = pooled(is_sound(moved, error).double(), len(step)) == 1
        return pooled(error.double().square(), len(step)), sound

    def _adapt(self, errors: Tensor, refused: Tensor) -> None:
        """What an unadjusted step of the warm-up teaches."""
        done, rounds, end = self.step + 1, self.plan.rounds, self.plan.exploration
        if self.plan.step_size is None:
            if self.energy is None:
                self.energy = EnergyTuner.start(self.step_size, self.plan.energy_variance)
            self.energy.update(errors, refused, self.dim)
            self.step_size = self.energy.step
        if self.step < rounds[1]:
            begin, stop = (0, rounds[0]) if self.step < rounds[0] else rounds
            if self.step >= (begin + stop) // 2:
                self._measure()
            if done == stop:
                self._finish_round()
        else:
            self._walk(end)
        if done == end and self.energy is not None:
            self.step_size = self.energy.finish()

    def _measure(self) -> None:
        """Adds the present state to the second moments, in units of the prior."""
        scale = self.units.scale
        if scale is None:
            return
        if self.moments is None:
            self.moments = Moments.start(len(self.factors), self.factors.device)
        chains, site = self.chains, self.units.site
        centre, unit = (spread(value, len(chains.position)) for value in (self.units.centre, scale))
        gradient = chains.gradient / self.factors[site].to(unit)
        self.moments.update((chains.position - centre) / unit, gradient, site)

    def _finish_round(self) -> None:
        """After each of the first two rounds: new scales, if they are to be estimated, a momentum length, the search for a step anew."""
        moments, self.moments = self.moments, None
        before = self.factors
        if moments is not None and self.plan.whiten == "diagonal":
            self._whiten(moments.factors())
        if moments is not None and self.plan.momentum_length is None:
            self.length = torch.full_like(self.length, moments.length(self.factors))
        if self.energy is not None:
            change = (before / self.factors).log()[self.units.site].mean().exp()
            self.step_size, self.energy = self.energy.finish() * change, None

    def _whiten(self, factors: Tensor) -> None:
        """Whitens by so many units of the prior at each site, shape ``(S,)``."""
        assert self.units.scale is not None
        self.factors = factors
        scale = self.units.scale * factors[self.units.site].to(self.units.centre)
        self.target = Target(self.density.value_and_gradient, Scales(scale))
        self.chains = self.target.start(self.chains.position, self.chains.direction)

    def _walk(self, end: int) -> None:
        """Notes the path of the second half; at its end the momentum length by its autocorrelation, if it is long enough to tell."""
        position, scale = self.chains.position, self.units.scale
        if self.path is None:
            self.path = Path.start(position, len(self.length), end - self.plan.rounds[1])
        if scale is not None:  # whitened
            position = position / spread(scale, len(position)) / self.factors[self.units.site].to(position)
        self.path.update(position, self.step_size)
        if self.step + 1 < end:
            return
        path, self.path = self.path, None
        if self.plan.momentum_length is not None:
            return
        found = path.length()
        if self.plan.adjusted:
            found = path.spread(self.dim) if scale is not None else self.length / PATH_FACTOR
            found = PATH_FACTOR * found.where(found > 0, self.length / PATH_FACTOR)
        self.length = torch.where(found.isfinite(), found, self.length)

    # ------------------------------------------------------------------ loop

    def go(self, progress_bar: bool, save: Callable[[], object], is_due: Callable[[int], bool]) -> None:
        """Takes steps until all draws are there, or Ctrl-C."""
        shown = progress_bar and shows_bars()
        bar = tqdm(
            total=self.plan.steps,
            initial=self.step,
            disable=not shown,
            desc="mclmc",
            unit="step",
            dynamic_ncols=True,
        )
        counted = self.density.gradients - self.gradients
        with bar, deferred_interrupt() as interrupted:
            start = time.perf_counter() - self.elapsed
            while self.step < self.plan.steps:
                self.take()
                self.gradients = self.density.gradients - counted
                self.elapsed = time.perf_counter() - start
                if bar.update():
                    self._show(bar)
                if interrupted():
                    self.stopped_by = "interrupted"
                    break
                if is_due(self.step):
                    save()
            save()
        logger.info("mclmc: %d steps, %.3g s, ended by %s", self.step, self.elapsed, self.stopped_by)

    def _show(self, bar: tqdm) -> None:
        mean = float(self.chains.log_density.mean())
        bar.set_postfix(
            phase="sampling" if self.is_warm else "warm-up",
            lp=f"{mean:.5g}",
            step=f"{float(self.step_size.mean()):.3g}",
        )

    def state(self) -> dict[str, Any]:
        """Everything that the run needs to go on."""
        parts = {name: getattr(self, name) for name in ("energy", "acceptance", "moments", "path")}
        return {
            "step": self.step,
            "gradients": self.gradients,
            "elapsed": self.elapsed,
            "chains": list(self.chains),
            "sizes": [self.step_size, self.length, self.squares, self.refused],
            "factors": self.factors,
            "units": [self.units.centre, self.units.scale],
            "adaptation": {name: vars(part) for name, part in parts.items() if part is not None},
            "records": self.records.state(),
            "random": random_state([]),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes to where another run was."""
        device = self.chains.position.device
        centre, scale = state["units"]  # at the first start, which may have been at random
        if scale is not None:
            self.units = replace(self.units, centre=centre.to(device), scale=scale.to(device))
            self._whiten(state["factors"].to(device))
        self.step, self.gradients, self.elapsed = state["step"], state["gradients"], state["elapsed"]
        self.chains = Chains(*(value.to(device) for value in state["chains"]))
        self.step_size, self.length, self.squares, self.refused = (
            value.to(device) for value in state["sizes"]
        )
        kinds = {"energy": EnergyTuner, "acceptance": AcceptanceTuner, "moments": Moments, "path": Path}
        for name, kind in kinds.items():
            known = state["adaptation"].get(name)
            moved = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in (known or {}).items()}
            setattr(self, name, kind(**moved) if known is not None else None)
        self.records.load(state["records"])
        set_random_state(state["random"], [])
