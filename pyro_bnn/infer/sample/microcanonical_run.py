# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A run of microcanonical chains: its warm-up, its steps, what it keeps of them."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from pyro_bnn.infer.train.randomness import random_state, set_random_state
from pyro_bnn.infer.train.state import deferred_interrupt
from pyro_bnn.ops.notice import logger

#: Steps that a path of an adjusted transition has at most.
MOST_STEPS = 1000
#: Length of the paths of adjusted transitions, in the mean, in units of the momentum length of unadjusted chains.
PATH_FACTOR = 1.5


@dataclass(frozen=True)
class Plan:
    """
    How a run is made.

    :ivar step_size: the steps, if they are given.
    :ivar momentum_length: the momentum length, if it is given.
    :ivar whiten: ``"diagonal"`` estimates scales in the warm-up.
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

    @property
    def steps(self) -> int:
        """Steps, or adjusted transitions, in all."""
        return self.warmup_steps + self.num_samples * self.thinning

    @property
    def exploration(self) -> int:
        """Steps of the warm-up that are unadjusted."""
        return self.warmup_steps // 2 if self.adjusted else self.warmup_steps

    @property
    def measuring(self) -> range:
        """Steps that estimate variances: the second third of the unadjusted ones."""
        return range(self.exploration // 3, 2 * self.exploration // 3)

    @property
    def warmup_draws(self) -> int:
        """Draws of the warm-up that are kept."""
        return self.warmup_steps // self.thinning

    def is_kept(self, step: int) -> bool:
        """Whether the state after a step, counted from 0, is kept."""
        done = step + 1 if step < self.warmup_steps else step + 1 - self.warmup_steps
        return done % self.thinning == 0


class Run:
    """
    C chains of K modes on their way.

    :param plan: see there.
    :param density: the log density, with ``value_and_gradient``.
    :param whitener: a square root of a covariance.
    :param points: where the chains start, shape ``(C, p)``.
    :param num_modes: K.
    :param records: what is kept.
    """

    def __init__(
        self, plan: Plan, density: Any, whitener: Any, points: Tensor, num_modes: int, records: Records
    ) -> None:
        self.plan, self.density, self.records, self.num_modes = plan, density, records, num_modes
        self.target = Target(density.value_and_gradient, whitener)
        self.dim = points.shape[-1]
        self.chains = self.target.start(points, normalized(torch.randn_like(points)))
        start = torch.full((num_modes,), math.sqrt(self.dim), dtype=torch.float64, device=points.device)
        self.length = start if plan.momentum_length is None else torch.full_like(start, plan.momentum_length)
        self.step_size = 0.25 * start if plan.step_size is None else torch.full_like(start, plan.step_size)
        self.energy: EnergyTuner | None = None
        self.acceptance: AcceptanceTuner | None = None
        self.moments: Moments | None = None
        self.path: Path | None = None
        self.scale: Tensor | None = None  # of a diagonal found in the warm-up
        self.step, self.gradients = 0, density.gradients
        self.squares = torch.zeros_like(start)  # of energy errors after the warm-up
        self.refused = torch.zeros(
            len(points), dtype=torch.int64, device=points.device
        )  # steps since the last draw
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
            self.squares += pooled(errors.double().square(), self.num_modes)
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
        """Mean squares of the energy errors of single steps from the start, by mode, and whether all are finite."""
        chains = self.chains._replace(direction=normalized(torch.randn_like(self.chains.position)))
        moved, error = leapfrog(self.target, chains, spread(step, len(chains.position)).to(chains.position))
        sound = pooled(is_sound(moved, error).double(), self.num_modes) == 1
        return pooled(error.double().square(), self.num_modes), sound

    def _adapt(self, errors: Tensor, refused: Tensor) -> None:
        """What an unadjusted step of the warm-up teaches."""
        measuring, last = self.plan.measuring, self.plan.exploration - 1
        if self.plan.step_size is None:
            if self.energy is None or self.step == measuring.start:  # the way from the start is over
                self.energy = EnergyTuner.start(self.step_size, self.plan.energy_variance)
            self.energy.update(errors, refused, self.dim)
        if self.step in measuring:
            if self.moments is None:
                self.moments = Moments.start(self.chains.position, self.num_modes)
            self.moments.update(self.chains.position, self.step_size)
            if self.step == measuring[-1]:
                self._use_moments(self.moments)
        elif self.step >= measuring.stop:
            if self.path is None:
                room = self.plan.exploration - measuring.stop
                self.path = Path.start(self.chains.position, self.num_modes, room)
            self.path.update(self.chains.position, self.step_size)
            if self.step == last:
                self._use_path(self.path)
        if self.energy is not None:
            self.step_size = self.energy.step

    def _use_moments(self, moments: Moments) -> None:
        """A first momentum length, and the scales if they are to be estimated."""
        variance, whitener = moments.variance(), self.target.whitener
        self.moments = None
        if moments.count < 2 or not isinstance(whitener, Scales):
            return
        old = whitener.scale.expand_as(variance)
        relative = variance / old.square()
        size = relative.sum(-1).sqrt()
        if self.plan.whiten == "diagonal":
            # few positions say little of a single variance: as if five more had the mean one
            share = moments.count / (moments.count + 5)
            relative = share * relative + (1 - share) * relative.mean(-1, keepdim=True)
            self._whiten(old * relative.sqrt().to(old))
            self.step_size = self.step_size * math.sqrt(self.dim) / relative.sum(-1).sqrt()
            self.energy = None
            size = torch.full_like(size, math.sqrt(self.dim))
        if self.plan.momentum_length is None:
            self.length = torch.where(size > 0, size, self.length)

    def _whiten(self, scale: Tensor) -> None:
        """Whitens by scales of the modes, shape ``(K, p)``."""
        self.scale = scale
        self.target = Target(self.density.value_and_gradient, Scales(scale))
        self.chains = self.target.start(self.chains.position, self.chains.direction)

    def _use_path(self, path: Path) -> None:
        """The momentum length by the autocorrelation; that of the paths of adjusted transitions."""
        self.path = None
        if self.plan.momentum_length is not None:
            return
        found = path.length()
        self.length = torch.where(found.isfinite(), found, self.length)
        if self.plan.adjusted:
            self.length = PATH_FACTOR * self.length

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
            "scale": self.scale,
            "adaptation": {name: vars(part) for name, part in parts.items() if part is not None},
            "records": self.records.state(),
            "random": random_state([]),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes to where another run was."""
        device = self.chains.position.device
        if state["scale"] is not None:
            self._whiten(state["scale"].to(device))
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
