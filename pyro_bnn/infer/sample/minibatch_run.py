# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A run of a minibatch sampler: its steps, what it keeps of them, and how it goes on from a file."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_bnn.infer.sample.microcanonical import Whitener
from pyro_bnn.infer.sample.minibatches import Stream, Weighted
from pyro_bnn.infer.sample.records import Records
from pyro_bnn.infer.sample.schemes import SCHEMES, Chains, Step
from pyro_bnn.infer.sample.steps import StepSchedule, step_at
from pyro_bnn.infer.sample.whitening import Scales
from pyro_bnn.infer.train.progress import shows_bars
from pyro_bnn.infer.train.settings import describe
from pyro_bnn.infer.train.state import deferred_interrupt
from pyro_bnn.model.latent_space import LatentSpace
from pyro_bnn.ops.notice import logger
from pyro_bnn.ops.options import require_choice, require_count, require_number

#: Values ``(C,)`` and gradients ``(C, p)`` of the log density, or estimates by a batch, at points ``(C, p)``.
Estimate = Callable[[Tensor, Weighted], tuple[Tensor, Tensor]]


class ControlVariates:
    """
    Estimates by the difference of a batch's gradients at a point and at a centre, and the gradient of all data there (Baker et al.,
    2019). K centres serve C chains, those of a centre one after the other.

    :param estimate: of the log density by a batch.
    :param centers: shape ``(K, p)``.
    :param values: log densities of all data at them, shape ``(K,)``.
    :param gradients: their gradients, shape ``(K, p)``.
    """

    def __init__(self, estimate: Estimate, centers: Tensor, values: Tensor, gradients: Tensor) -> None:
        self.estimate, self.centers = estimate, centers
        self.values, self.gradients = values, gradients

    def __call__(self, points: Tensor, given: Weighted) -> tuple[Tensor, Tensor]:
        """Values ``(C,)`` and gradients ``(C, p)`` at points ``(C, p)``."""
        C, each = len(points), len(points) // len(self.centers)
        values, gradients = self.estimate(torch.cat([points, self.centers]), given)
        value = (self.values - values[C:]).repeat_interleave(each)
        gradient = (self.gradients - gradients[C:]).repeat_interleave(each, 0)
        return values[:C] + value, gradients[:C] + gradient


@dataclass(frozen=True)
class Plan:
    """How the steps are made, and which of them are kept."""

    scheme: str
    schedule: StepSchedule
    friction: float
    num_samples: int
    warmup_steps: int
    thinning: int

    def __post_init__(self) -> None:
        require_choice("scheme", self.scheme, *SCHEMES)
        require_number("friction", self.friction, above=0)
        require_count("num_samples", self.num_samples)
        require_count("warmup_steps", self.warmup_steps, 0)
        require_count("thinning", self.thinning)
        first = step_at(self.schedule, 0)
        if self.scheme == "sghmc" and self.friction * first >= 2:
            raise ValueError(
                f"scheme='sghmc' is unstable with friction * step_size = {self.friction * first:.3g}, the part of the momentum that a "
                "step takes away: it must be below 2, and is the scheme that it is meant to be well below 1."
            )

    def settings(self) -> dict[str, Any]:
        """What a run that goes on must share, in plain values."""
        found = {name: describe(value) for name, value in vars(self).items() if name != "num_samples"}
        return found | {"schedule": f"{found['schedule']}, {step_at(self.schedule, 0):.6g} first"}

    @property
    def warmup_draws(self) -> int:
        """How many draws of the warm-up are kept."""
        return self.warmup_steps // self.thinning

    @property
    def draws(self) -> int:
        """How many draws are kept in all."""
        return self.warmup_draws + self.num_samples

    def step(self, number: int) -> Step:
        """The sizes of a step, which explores or samples."""
        return Step(step_at(self.schedule, number), self.friction, float(self.schedule.is_sampling(number)))


class Run:
    """
    C chains on their way.

    :param plan: of the steps.
    :param estimate: of the log density by a batch.
    :param space: of the packed latents, for errors.
    :param whitener: the preconditioner.
    :param start: positions, shape ``(C, p)``.
    :param stream: of batches.
    :param records: what is kept.
    """

    def __init__(
        self,
        plan: Plan,
        estimate: Estimate,
        space: LatentSpace,
        whitener: Whitener,
        start: Tensor,
        stream: Stream,
        records: Records,
    ) -> None:
        self.plan, self.estimate, self.space, self.whitener = plan, estimate, space, whitener
        self.stream, self.records = stream, records
        self.chains = Chains(start, torch.randn_like(start))
        self.slopes = torch.zeros_like(start)  # estimates of the last step
        self.farthest = float(start.abs().max())  # at the start
        self.step = self.sampled = self.gradients = 0
        self.elapsed = 0.0
        self.stopped_by = "num_samples"
        centers = estimate.centers if isinstance(estimate, ControlVariates) else ()
        self.cost = len(start) + len(centers)  # gradients of one state by one batch in a step

    @property
    def is_done(self) -> bool:
        """Whether all draws are there."""
        return self.records.count >= self.plan.draws

    @torch.no_grad()
    def take(self, given: Weighted) -> bool:
        """One step of all chains by a batch; whether it is kept."""
        step = self.plan.step(self.step)
        stats: dict[str, Any] = {}

        def gradient(points: Tensor) -> Tensor:
            values, slopes = self.estimate(points, given)
            self.gradients += self.cost
            stats["log_density_estimate"], self.slopes = values, slopes
            return -slopes

        moved = SCHEMES[self.plan.scheme](self.chains, gradient, step, self.whitener)
        finite = moved.position.isfinite().all(-1) & moved.momentum.isfinite().all(-1)
        if not bool(finite.all()):
            self._give_up(moved, finite, step)
        self.chains = moved
        kept = self._is_kept()
        if kept:
            stats |= {"step_size": step.size, "cycle": self.plan.schedule.cycle(self.step)}
            self.records.add(moved.position, stats | self._heat(step))
        self.step += 1
        return kept

    def _heat(self, step: Step) -> dict[str, Tensor]:
        """
        What tells how much a step heats each chain ``(C,)``: the kinetic temperature |r|^2 / p, 1 in the mean; of SGLD the squares of
        the drift over those of the noise, h^2 |R^T g|^2 / (4 p), in the mean about the relative excess of the variances.
        """
        if self.plan.scheme != "sgld":
            return {"kinetic_temperature": self.chains.momentum.square().mean(-1)}
        drift = 0.5 * step.size * self.whitener.transposed(self.slopes)
        return {"drift_to_noise": drift.square().mean(-1)}

    def _is_kept(self) -> bool:
        if self.step < self.plan.warmup_steps:
            return (self.step + 1) % self.plan.thinning == 0
        if not self.plan.schedule.is_sampling(self.step):
            return False
        self.sampled += 1
        return self.sampled % self.plan.thinning == 0

    def _give_up(self, moved: Chains, finite: Tensor, step: Step) -> NoReturn:
        """Says which chains left the finite numbers, where, and what to do."""
        chains = (~finite).nonzero().flatten().tolist()
        before = self.chains.position[chains[0]]
        bad = ~moved.position[chains[0]].isfinite() | ~moved.momentum[chains[0]].isfinite()
        place = int(bad.nonzero()[0])
        site = next(name for name, part in self.space.slices.items() if part.start <= place < part.stop)
        largest = float(before.abs().max())
        where = (
            f"chains {chains} are not finite at step {self.step}, site {site!r} first of chain {chains[0]}"
        )
        if largest > 30 * (1 + self.farthest):
            raise ArithmeticError(
                f"sgmcmc: {where}: step sizes of {step.size:.3g} are too large, the chain has run away to {largest:.3g} (at most "
                f"{self.farthest:.3g} at the start). Take half of it, or whiten by a guide: no scheme is stable beyond 2 / sqrt(largest "
                "curvature of the whitened log density)."
            )
        raise ArithmeticError(
            f"sgmcmc: {where}: the gradient of the log density by a batch is not finite, with latents of at most {largest:.3g} there. "
            "Look for roots, norms and logarithms at zero in the model, for scales that vanish, and for data out of range; a smaller "
            "step_size keeps chains from places where the density overflows."
        )

    # ------------------------------------------------------------------ loop

    def go(self, progress_bar: bool, save: Callable[[], object], is_due: Callable[[int], bool]) -> None:
        """Takes steps until all draws are there, or Ctrl-C."""
        shown = progress_bar and shows_bars()
        bar = tqdm(
            total=self.plan.draws,
            initial=self.records.count,
            disable=not shown,
            desc="sgmcmc",
            unit="draw",
            dynamic_ncols=True,
        )
        with bar, deferred_interrupt() as interrupted:
            start = time.perf_counter() - self.elapsed
            batches = iter(self.stream)
            while not self.is_done:
                kept = self.take(next(batches))
                self.elapsed = time.perf_counter() - start
                if kept and bar.update():
                    bar.set_postfix(step=self.step)
                if interrupted():
                    self.stopped_by = "interrupted"
                    break
                if is_due(self.step):
                    save()
            save()
        logger.info("sgmcmc: %d steps, %.3g s, ended by %s", self.step, self.elapsed, self.stopped_by)

    def state(self) -> dict[str, Any]:
        """Everything that the run needs to go on."""
        return {
            "step": self.step,
            "sampled": self.sampled,
            "gradients": self.gradients,
            "elapsed": self.elapsed,
            "chains": list(self.chains),
            "scales": self.whitener.scale if isinstance(self.whitener, Scales) else None,
            "records": self.records.state(),
            "stream": self.stream.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes to where another run was."""
        kept = len(state["records"]["positions"])
        if kept > self.plan.draws:
            raise ValueError(
                f"checkpoint: the file holds {kept - self.plan.warmup_draws} draws of each chain, more than num_samples="
                f"{self.plan.num_samples}."
            )
        self.step, self.sampled, self.elapsed = state["step"], state["sampled"], state["elapsed"]
        self.gradients = state["gradients"]
        self.chains = Chains(*(value.to(self.chains.position) for value in state["chains"]))
        if isinstance(self.whitener, Scales):  # those at the first start, which may have been at random
            self.whitener = Scales(state["scales"].to(self.chains.position))
        self.records.load(state["records"])
        self.stream.load(state["stream"])
