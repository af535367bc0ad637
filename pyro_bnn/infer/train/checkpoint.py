# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that survive a kill at any moment: when they are written, what they hold, how a run continues from one."""

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from pyro_bnn.infer.train.files import atomic_save, checked_load
from pyro_bnn.infer.train.settings import (
    describe,
    describe_elbo,
    describe_optimizer,
    describe_sites,
    differences,
    names_of,
    say_differences,
)
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.ops.distributed import rank
from pyro_bnn.ops.notice import warn_user
from pyro_bnn.ops.randomness import random_state, same_random_numbers, set_random_state

if TYPE_CHECKING:
    from pyro_bnn.infer.train.loop import Run

logger = logging.getLogger(__name__)

#: The entries that every checkpoint has.
KEYS = {"step", "epoch", "losses", "tensors", "optimizer", "random"}


class Checkpoint:
    """
    Where and how often :func:`~pyro_bnn.infer.fit`, or a sampler, saves its state.

    A file appears under its name only when it is complete, so a process killed while it writes leaves the
    previous one. It holds tensors, numbers and strings alone and a digest of them, which is checked; no code in it
    is run.

    :param path: the file.
    :param int every_steps: steps between two checkpoints; by default only the time decides.
    :param float every_seconds: seconds between two checkpoints.
    :param bool resume: whether a file that is there already is continued.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> import tempfile
        >>> from pyro_bnn import AutoMixture, fit
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/run.ckpt"
        ...     options = {"checkpoint": Checkpoint(path, every_steps=2), "progress_bar": False}
        ...     _ = fit(model, AutoMixture(model, 1), (x, x), num_steps=4, **options)
        ...     fit(model, AutoMixture(model, 1), (x, x), num_steps=6, **options).num_steps  # goes on
        6
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
        """Whether the interval in steps or seconds has passed since the last checkpoint."""
        if self.every_steps is not None and step - self.last_step >= self.every_steps:
            return True
        return time.monotonic() - self.last_time >= self.every_seconds

    def save(self, state: dict[str, Any], step: int) -> bool:
        """Writes a checkpoint; a failure (a full disk) warns, leaves the previous one, and returns ``False``."""
        self.last_time = time.monotonic()
        self.last_step = step
        try:
            atomic_save(state, self.path)
        except OSError as error:
            text = f"The checkpoint {self.path} could not be written ({error}). The run continues."
            warn_user(text, RuntimeWarning)
            return False
        return True

    def load(self, keys: set[str] = KEYS) -> dict[str, Any] | None:
        """
        What was saved, or ``None`` if there is no file or ``resume`` is off.

        :param keys: the entries that it has.
        :raises ValueError: naming the file, if it is damaged, of a later version, or no checkpoint.
        """
        if not (self.resume and self.path.exists()):
            return None
        state = checked_load(self.path, "checkpoint", keys)
        self.last_step = state["step"]
        return state


def as_checkpoint(given: Checkpoint | str | os.PathLike[str] | None) -> Checkpoint | None:
    """A checkpoint, whatever a user passes as one."""
    return given if given is None or isinstance(given, Checkpoint) else Checkpoint(given)


def describe_run(run: "Run") -> dict[str, Any]:
    """The settings of a run before its first step; random numbers stay where they are."""
    step = run.descent
    with same_random_numbers(run.generators):
        sites = describe_sites(run.model, run.batches.first)
    return {
        **describe_optimizer(step.optimizer, step.scheduler),
        **describe_elbo(run.elbo),
        "clip_grad_norm": describe(step.clip_grad_norm),
        "kl_scale": describe(step.kl_scale),
        "autocast": describe(step.autocast),
        "callbacks": ", ".join(map(describe, run.callbacks)),
        "random generators of the loader": len(run.generators),
        **sites,
    }


def save_run(run: "Run", checkpoint: Checkpoint) -> None:
    """Writes the checkpoint of a run; of several processes the first one does."""
    if rank() > 0:
        return
    random, scheduler = random_state(run.generators), run.descent.scheduler
    state = {
        "step": run.step,
        "epoch": run.epoch,
        "batches_done": run.batches_done,
        "losses": torch.tensor(run.losses, dtype=torch.float64),
        "elapsed": run.elapsed,
        "tensors": {n: p.detach() for n, p in run.tensors.all().items()},
        "optimizer": run.descent.optimizer.state_dict(),
        "scheduler": scheduler.state_dict() if scheduler is not None else None,
        "elbo_step": getattr(run.elbo, "step", None),
        "callbacks": [c.state_dict() if hasattr(c, "state_dict") else None for c in run.callbacks],
        "callback_names": names_of(run.callbacks),
        "settings": run.settings,
        "random": random,
        # a pass over one batch draws no random number
        "epoch_random": random if run.batches.is_single else run.epoch_random,
    }
    checkpoint.save(state, run.step)


def resume(run: "Run", checkpoint: Checkpoint) -> None:
    """
    Continues a run from its checkpoint, if there is one.

    :raises ValueError: if the file is broken, or if it belongs to another model, guide, optimiser or scheduler.
    """
    run.settings = describe_run(run)
    state, path = checkpoint.load(), checkpoint.path
    if state is None:
        return
    _check_tensors(run, state, path)
    _check_optimizer(run, state, path)
    _look_ahead(run)
    _load(run, state)
    if rank() == 0:
        logger.warning("fit: resuming from step %d of %s", run.step, path)
        different = differences(state.get("settings", run.settings), run.settings)
        if different:
            warn_user(say_differences(different, run.descent.scheduler is not None, path))


def _load(run: "Run", state: dict[str, Any]) -> None:
    optimizer, scheduler, own = run.descent.optimizer, run.descent.scheduler, run.tensors.all()
    with torch.no_grad():
        for name, value in state["tensors"].items():
            own[name].copy_(value)
    present = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    else:  # the present learning rate and further settings count
        for group, settings in zip(optimizer.param_groups, present, strict=True):
            group.update(settings)
    if state["elbo_step"] is not None:
        run.elbo.step = state["elbo_step"]
    _load_callbacks(run.callbacks, state.get("callback_names", names_of(run.callbacks)), state["callbacks"])
    run.step, run.epoch, run.batches_done = state["step"], state["epoch"], state["batches_done"]
    run.losses, run.elapsed = state["losses"].tolist(), state["elapsed"]
    run.tensors.restart()
    set_random_state(state["epoch_random"], run.generators)
    run.resume_random = state["random"]


def _load_callbacks(callbacks: Sequence[Any], names: Sequence[str], states: Sequence[Any]) -> None:
    """Loads the states of callbacks into those of the same name, in order; others start afresh."""
    left = list(zip(names, states, strict=False))
    for callback, name in zip(callbacks, names_of(callbacks), strict=True):
        index = next((i for i, (saved, _) in enumerate(left) if saved == name), None)
        saved = None if index is None else left.pop(index)[1]
        if saved is not None:
            callback.load_state_dict(saved)


def _look_ahead(run: "Run") -> None:
    """A bound that runs the model before its first step does so before the state is loaded, as in the interrupted run."""
    if getattr(run.elbo, "max_plate_nesting", 0) == math.inf and run.tensors.statistics():
        with local_parameters():
            run.descent.rehearse(run.batches.first, run.step, run.generators)


def _check_tensors(run: "Run", state: Mapping[str, Any], path: Path) -> None:
    found = {name: tuple(value.shape) for name, value in state["tensors"].items()}
    expected = {name: tuple(value.shape) for name, value in run.tensors.all().items()}
    if state["format"] == 1:  # without the networks that functions hold
        own = ("model.", "guide.")
        held = {n for n in expected if n in run.tensors.parameters or n in found or n.startswith(own)}
        expected = {name: shape for name, shape in expected.items() if name in held}
    if found != expected:
        odd = min(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        raise ValueError(
            f"checkpoint: {os.fspath(path)} belongs to another model or guide; {odd!r} has shape {found.get(odd)} in "
            f"the file and {expected.get(odd)} here. Choose another path, or pass Checkpoint(path, resume=False) to "
            "start again."
        )


def _check_optimizer(run: "Run", state: Mapping[str, Any], path: Path) -> None:
    """Checks that the state of the optimiser and the scheduler in a file can be continued."""
    optimizer = run.descent.optimizer
    own, saved = describe_optimizer(optimizer, run.descent.scheduler), state.get("settings")
    is_old = saved is None  # files of format 1 do not name them
    if saved is None:
        saved = own | {"scheduler": state["scheduler"] and (own["scheduler"] or "one")}
    for name in ("optimizer", "scheduler"):
        if saved[name] != own[name]:
            _refuse(path, f"{name} {saved[name] or 'missing'} in the file, {own[name] or 'missing'} here")
    groups, present = state["optimizer"]["param_groups"], optimizer.param_groups
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in present]:
        _refuse(path, "an optimizer whose groups hold other parameters")
    for group, other in zip(groups, present, strict=True):
        odd = (group.keys() ^ other.keys()) - {"initial_lr"}
        if is_old and odd:
            _refuse(path, f"another optimizer: {', '.join(sorted(odd))} is not a setting of both")


def _refuse(path: Path, what: str) -> NoReturn:
    raise ValueError(
        f"checkpoint: {os.fspath(path)} cannot be continued with {what}. Pass what the interrupted run had, or "
        "Checkpoint(path, resume=False) to start again."
    )
