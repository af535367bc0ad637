# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that survive a kill at any moment and restore random numbers too."""

import os
import random
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_bnn.infer.train.files import atomic_save, checked_load

#: The entries that every checkpoint has.
KEYS = {"step", "epoch", "losses", "tensors", "optimizer", "random"}


class Checkpoint:
    """
    Where and how often :func:`~pyro_bnn.infer.fit` saves its state.

    A file appears under its name only when it is complete, so a process killed while it writes leaves the
    previous one. It holds tensors, numbers and strings alone and a digest of them, which is checked; no code in it
    is run.

    :param path: the file.
    :param int every_steps: steps between two checkpoints; by default only the time decides.
    :param float every_seconds: seconds between two checkpoints.
    :param bool resume: whether a file that is there already is continued.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        every_steps: int | None = None,
        every_seconds: float = 60.0,
        resume: bool = True,
    ) -> None:
        self.path = Path(path)
        self.every_steps = every_steps
        self.every_seconds = every_seconds
        self.resume = resume
        self.last_time = time.monotonic()
        self.last_step = 0

    def is_due(self, step: int) -> bool:
        """
        Tells whether a checkpoint should be written now.

        :param int step: the number of steps taken.
        :return: ``True`` if the interval in steps or seconds has passed.
        """
        if self.every_steps is not None and step - self.last_step >= self.every_steps:
            return True
        return time.monotonic() - self.last_time >= self.every_seconds

    def save(self, state: dict[str, Any], step: int) -> bool:
        """
        Writes a checkpoint; a failure (a full disk) warns and leaves the previous one.

        :param state: what to save.
        :param int step: the number of steps taken.
        :return: whether it was written.
        """
        self.last_time = time.monotonic()
        self.last_step = step
        try:
            atomic_save(state, self.path)
        except OSError as error:
            warnings.warn(
                f"The checkpoint {self.path} could not be written ({error}). The run continues.",
                RuntimeWarning,
                stacklevel=3,
            )
            return False
        return True

    def load(self) -> dict[str, Any] | None:
        """
        Reads the checkpoint.

        :return: what was saved, or ``None`` if there is no file or ``resume`` is off.
        :raises ValueError: naming the file, if it is damaged, of a later version, or no checkpoint.
        """
        if not (self.resume and self.path.exists()):
            return None
        state = checked_load(self.path, "checkpoint", KEYS)
        self.last_step = state["step"]
        return state


def random_state(generators: list[torch.Generator]) -> dict[str, Any]:
    """
    The states of all random number generators, as tensors and numbers.

    :param generators: generators of a data loader.
    :return: the states of torch (CPU and CUDA), numpy, Python, and of ``generators``.
    """
    kind, keys, pos, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global state is what user code may draw from
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(pos),
            int(has_gauss),
            float(cached),
        ],
        "python": [int(version), torch.tensor(words, dtype=torch.int64), gauss],
        "generators": [generator.get_state() for generator in generators],
    }


def set_random_state(state: dict[str, Any], generators: list[torch.Generator]) -> None:
    """
    Restores what :func:`random_state` returned.

    :param state: the states.
    :param generators: generators of a data loader.
    """
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    kind, keys, pos, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), pos, has_gauss, cached))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    for generator, value in zip(generators, state["generators"], strict=False):  # fit says if they differ
        generator.set_state(value)


def loader_generators(data: Any) -> list[torch.Generator]:
    """
    The random number generators that a data loader holds itself.

    :param data: data in any form.
    :return: each generator once.
    """
    owners = [
        data,
        getattr(data, "sampler", None),
        getattr(getattr(data, "batch_sampler", None), "sampler", None),
    ]
    found = {
        id(g): g for g in (getattr(o, "generator", None) for o in owners) if isinstance(g, torch.Generator)
    }
    return list(found.values())
