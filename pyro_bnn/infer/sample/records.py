# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What a sampler keeps of its steps, and the files by which its runs go on."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.infer.train.checkpoint import Checkpoint
from pyro_bnn.infer.train.settings import differences
from pyro_bnn.ops.memory import require_memory
from pyro_bnn.ops.notice import logger


class Records:
    """
    What is kept of C chains in p dimensions.

    :param number: of draws that are kept, those of the warm-up among them.
    :param start: positions, shape ``(C, p)``.
    :param memory_limit: bytes that they may take, by default what is free.
    :param whole: the latents of a draw in the result, of which positions may be a part; by default p.
    :ivar positions: shape ``(number, C, p)``, of which ``count`` are filled.
    :ivar stats: by name, shape ``(number, C)``, the same; NaN where a statistic was not recorded.
    """

    def __init__(self, number: int, start: Tensor, memory_limit: float | None, whole: int = 0) -> None:
        self.count = 0
        size = start.shape[-1]
        # once more, by site, in the result; where latents are added, these are put together before
        values = 2 * size if whole in (0, size) else size + 2 * whole
        require_memory(
            float(number) * len(start) * values * start.element_size(),
            f"num_samples and warmup_steps: {number} draws of {len(start)} chains in {start.shape[-1]} dimensions",
            start.device,
            "Keep fewer draws: a smaller num_samples with as many steps between them by thinning.",
            memory_limit,
        )
        self.positions = start.new_empty((number, *start.shape))
        self.stats: dict[str, Tensor] = {}

    def add(self, position: Tensor, stats: Mapping[str, Any]) -> None:
        """Keeps positions ``(C, p)`` with numbers, of all chains or of each."""
        self.positions[self.count] = position
        for name, value in stats.items():
            if name not in self.stats:
                shape = self.positions.shape[:2]
                self.stats[name] = torch.full(shape, math.nan, dtype=torch.float64)
            self.stats[name][self.count] = torch.as_tensor(value).to("cpu", torch.float64)
        self.count += 1

    def part(self, start: int, stop: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Positions ``(C, n, p)`` and, by name, statistics ``(C, n)`` of some draws, without those that none of them has."""
        stats = {name: value[start:stop].mT.contiguous() for name, value in self.stats.items()}
        known = {n: v for n, v in stats.items() if v.numel() and not bool(v.isnan().all())}
        return self.positions[start:stop].transpose(0, 1), known

    def state(self) -> dict[str, Any]:
        """What has been kept."""
        stats = {name: value[: self.count].clone() for name, value in self.stats.items()}
        return {"positions": self.positions[: self.count].clone(), "stats": stats}

    def load(self, state: dict[str, Any]) -> None:
        """Puts what an earlier run kept into the first places."""
        self.count = len(state["positions"])
        self.positions[: self.count] = state["positions"].to(self.positions)
        for name, value in state["stats"].items():
            self.stats[name] = torch.full(self.positions.shape[:2], math.nan, dtype=torch.float64)
            self.stats[name][: self.count] = value


@dataclass
class Resumption:
    """
    How a run of a sampler is saved and goes on.

    :param sampler: the name of the function.
    :param checkpoint: the file, or ``None``.
    :param settings: what must be the same in both runs, in plain values.
    :param probe: a point, shape ``(p,)``, and the log density of all data there, by which other data and other models are told.
    :param density: of all data at a point ``(p,)``.
    """

    sampler: str
    checkpoint: Checkpoint | None
    settings: dict[str, Any]
    probe: tuple[Tensor, float]
    density: Callable[[Tensor], float]

    def save(self, run: Any) -> None:
        """Writes the file."""
        if self.checkpoint is not None:
            point, value = self.probe
            about = {"sampler": self.sampler, "settings": self.settings, "probe": point, "probe_value": value}
            self.checkpoint.save({**about, "step": run.step, "run": run.state()}, run.step)

    def is_due(self, step: int) -> bool:
        """Whether it is time to save."""
        return self.checkpoint is not None and self.checkpoint.is_due(step)

    def load(self, run: Any) -> None:
        """
        Goes on with the run in the file, if there is one.

        :raises ValueError: if it was made with other settings, another model or other data.
        """
        keys = {"sampler", "settings", "probe", "probe_value", "step", "run"}
        state = None if self.checkpoint is None else self.checkpoint.load(keys)
        if state is None or self.checkpoint is None:
            return
        path = os.fspath(self.checkpoint.path)
        advice = "Pass what the interrupted run had, or Checkpoint(path, resume=False) to start again."
        found = differences(
            {"function": state["sampler"], **state["settings"]}, {"function": self.sampler, **self.settings}
        )
        if found:
            raise ValueError(
                f"checkpoint: {path} cannot be continued with {'; '.join(found.values())}. {advice}"
            )
        point, old = state["probe"].to(self.probe[0]), state["probe_value"]
        new = self.density(point)
        if not abs(old - new) <= 1e4 * torch.finfo(point.dtype).eps * max(abs(old), 1.0):
            raise ValueError(
                f"checkpoint: {path} belongs to another model or other data: at the same latents the log density is {old:.8g} "
                f"there and {new:.8g} here. {advice}"
            )
        self.probe = point, old
        run.load(state["run"])
        logger.warning("%s: resuming from step %d of %s", self.sampler, run.step, path)
