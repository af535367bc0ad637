# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Continuing a run from its checkpoint: the settings of both in plain values, what differs, and what is loaded."""

import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_bnn.infer.train.checkpoint import random_state, set_random_state
from pyro_bnn.model.data import Batch
from pyro_bnn.model.flat import StartFlatSites
from pyro_bnn.model.handlers import base_distribution, sample_sites
from pyro_bnn.model.networks import unchanged_buffers
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.ops.distributed import rank

logger = logging.getLogger(__name__)

#: What the scheduler of an interrupted run governs.
SCHEDULED = ("optimizer", "scheduler")
_PLAIN = (bool, int, float, str, type(None))
#: Attributes that change while a run goes on.
_RUNNING = {"step", "max_plate_nesting", "stop_reason", "base_lrs", "_last_lr"}


def describe(value: Any) -> Any:
    """
    :param value: a setting: a plain value, a function, or an object.
    :return: a plain value; objects are described by their class and their plain public attributes.

    Example::

        >>> from pyro_bnn.infer import LinearAnnealing
        >>> describe(0.1), describe(max), describe((0.9, 0.999))
        (0.1, 'max', '(0.9, 0.999)')
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        return summary(value)
    if isinstance(value, (list, tuple, dict, torch.dtype)):
        return str(value)
    if hasattr(value, "__name__"):
        return value.__name__
    attributes = {k: v for k, v in getattr(value, "__dict__", {}).items() if isinstance(v, _PLAIN)}
    shown = [f"{k}={v!r}" for k, v in attributes.items() if k not in _RUNNING and not k.startswith("_")]
    return f"{type(value).__name__}({', '.join(shown)})"


def summary(value: Tensor) -> str:
    """A tensor in a few digits."""
    if value.requires_grad:
        return "trained"
    low, high = float(value.min()), float(value.max())
    return (
        f"{low:.6g}" if low == high else f"{low:.4g} to {high:.4g}, mean {float(value.double().mean()):.4g}"
    )


def describe_optimizer(optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any]:
    """The settings of an optimiser and a scheduler by name, as they are before the first step."""
    found: dict[str, Any] = {"optimizer": type(optimizer).__name__}
    for i, group in enumerate(optimizer.param_groups):
        prefix = f"optimizer group {i}" if i else "optimizer"
        for name, value in group.items():
            if name not in ("params", "initial_lr"):
                value = group.get("initial_lr", value) if name == "lr" else value
                found[f"{prefix} {name}"] = describe(value)
    found["scheduler"] = None if scheduler is None else type(scheduler).__name__
    if scheduler is not None:
        for name, value in scheduler.state_dict().items():
            if name not in _RUNNING:
                found[f"scheduler {name}"] = describe(value)
    return found


def describe_elbo(elbo: Any) -> dict[str, Any]:
    """The class and the public settings of a bound."""
    found: dict[str, Any] = {"elbo": type(elbo).__name__}
    for name, value in getattr(elbo, "__dict__", {}).items():
        if (
            not name.startswith("_")
            and name not in _RUNNING
            and (isinstance(value, _PLAIN) or callable(value))
        ):
            found[f"elbo {name}"] = describe(value)
    return found


def describe_sites(model: Any, batch: Batch) -> dict[str, Any]:
    """
    The distributions of a model under one draw with a fixed seed; parameters that are trained, and those of observed
    sites, are left out.

    :param model: a Pyro model.
    :param batch: its arguments, with observations.
    :return: texts such as ``"Normal(loc=0, scale=1)"`` by name.
    """
    args, kwargs = batch
    with ExitStack() as stack:
        for context in (
            local_parameters(),
            pyro.validation_enabled(False),
            poutine.block(),
            unchanged_buffers(),
        ):
            stack.enter_context(context)
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(0)
        stack.enter_context(StartFlatSites())
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    found = {}
    for name, site in sample_sites(trace).items():
        fn = base_distribution(site["fn"])
        parameters = "" if site["is_observed"] else f"({_parameters(fn)})"
        found[f"{'site' if site['is_observed'] else 'prior of'} {name!r}"] = type(fn).__name__ + parameters
    return found


def _parameters(fn: Any) -> str:
    constraints = getattr(fn, "arg_constraints", {})
    found = []
    for name in [
        n for n in constraints if n in vars(fn)
    ] or constraints:  # others follow from those that were given
        value = getattr(fn, name, None)
        if isinstance(value, Tensor) and value.numel():
            found.append(f"{name}={summary(value)}")
    return ", ".join(found)


def names_of(callbacks: Sequence[Any]) -> list[str]:
    """The callbacks of a run by name."""
    return [getattr(c, "__name__", type(c).__name__) for c in callbacks]


def differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, str]:
    """
    :param saved: the settings in a file.
    :param own: the present ones.
    :return: by name, what was found in both.
    """
    names = [*saved, *(name for name in own if name not in saved)]
    return {
        name: f"{name} {saved.get(name, 'missing')!r} in the file, {own.get(name, 'missing')!r} here"
        for name in names
        if saved.get(name, "missing") != own.get(name, "missing")
    }


def say_differences(different: Mapping[str, str], scheduled: bool, path: os.PathLike[str]) -> str:
    """
    What a resumed run takes from the file and what from its arguments, in words.

    :param different: what :func:`differences` found.
    :param scheduled: whether a scheduler governs the optimiser.
    :param path: the file.
    :return: a text, empty if nothing differs.
    """
    kept = {
        name
        for name in different
        if name.split()[0] == "scheduler" or (scheduled and name.split()[0] == "optimizer")
    }
    new = [text for name, text in different.items() if name not in kept]
    old = [different[name] for name in different if name in kept]
    parts = [
        f"checkpoint: {os.fspath(path)} was made with other settings, so the run differs from an uninterrupted one."
    ]
    if new:
        parts.append(f"It goes on with those passed here: {'; '.join(new)}.")
    if old:
        parts.append(f"What the scheduler governs goes on as in the file: {'; '.join(old)}.")
    return " ".join(parts) if different else ""


def check_optimizer(
    optimizer: torch.optim.Optimizer, scheduler: Any, state: Mapping[str, Any], path: os.PathLike[str]
) -> None:
    """
    Checks that the state of an optimiser and a scheduler in a file can be continued.

    :param optimizer: the present optimiser.
    :param scheduler: the present scheduler, or ``None``.
    :param state: what the checkpoint holds.
    :param path: the file.
    :raises ValueError: naming what was found in both.
    """
    own, saved = describe_optimizer(optimizer, scheduler), state.get("settings")
    is_old = saved is None  # files of format 1 do not name them
    if saved is None:
        saved = own | {"scheduler": state["scheduler"] and (own["scheduler"] or "one")}
    for name in SCHEDULED:
        if saved[name] != own[name]:
            _refuse(path, f"{name} {saved[name] or 'missing'} in the file, {own[name] or 'missing'} here")
    groups, present = state["optimizer"]["param_groups"], optimizer.param_groups
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in present]:
        _refuse(path, "an optimizer whose groups hold other parameters")
    for group, other in zip(groups, present, strict=True):
        odd = (group.keys() ^ other.keys()) - {"initial_lr"}
        if is_old and odd:
            _refuse(path, f"another optimizer: {', '.join(sorted(odd))} is not a setting of both")


def _refuse(path: os.PathLike[str], what: str) -> None:
    raise ValueError(
        f"checkpoint: {os.fspath(path)} cannot be continued with {what}. Pass what the interrupted run had, or "
        "Checkpoint(path, resume=False) to start again."
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], own_settings: bool) -> None:
    """
    Loads the state of an optimiser.

    :param optimizer: the present optimiser.
    :param state: its state dict in the file.
    :param own_settings: whether to keep the present learning rate and further settings.
    """
    present = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    if own_settings:
        for group, settings in zip(optimizer.param_groups, present, strict=True):
            group.update(settings)


def load_callbacks(callbacks: Sequence[Any], names: Sequence[str], states: Sequence[Any]) -> None:
    """
    Loads the states of callbacks into those of the same name, in order; others start afresh.

    :param callbacks: the present callbacks.
    :param names: those in the file.
    :param states: their states, ``None`` for those without.
    """
    left = list(zip(names, states, strict=False))
    for callback, name in zip(callbacks, names_of(callbacks), strict=True):
        index = next((i for i, (saved, _) in enumerate(left) if saved == name), None)
        if index is not None:
            saved = left.pop(index)[1]
            if saved is not None:
                callback.load_state_dict(saved)


# ---------------------------------------------------------------------------- runs of fit


def describe_run(run: Any) -> dict[str, Any]:
    """
    What a checkpoint says of a run of :func:`~pyro_bnn.infer.fit`; random numbers stay where they are.

    :param run: the run, before its first step.
    :return: plain values by name.
    """
    states = random_state(run.generators)
    sites = describe_sites(run.model, run.first)
    set_random_state(states, run.generators)
    return {
        **describe_optimizer(run.optimizer, run.scheduler),
        **describe_elbo(run.elbo),
        "clip_grad_norm": describe(run.clip_grad_norm),
        "kl_scale": describe(run.kl_scale),
        "autocast": describe(run.autocast),
        "callbacks": ", ".join(map(describe, run.callbacks)),
        "random generators of the loader": len(run.generators),
        **sites,
    }


def resume(run: Any) -> None:
    """
    Continues a run of :func:`~pyro_bnn.infer.fit` from its checkpoint, if there is one.

    :param run: the run, before its first step.
    :raises ValueError: if the file is broken, or if it belongs to another model, guide, optimiser or scheduler.
    """
    state, path = run.checkpoint.load(), run.checkpoint.path
    if state is None:
        return
    own = run.parameters | run.buffers()
    check_tensors(own, run.parameters, state, path)
    check_optimizer(run.optimizer, run.scheduler, state, path)
    look_ahead(run)
    with torch.no_grad():
        for name, value in state["tensors"].items():
            own[name].copy_(value)
    load_optimizer(run.optimizer, state["optimizer"], run.scheduler is None)
    if run.scheduler is not None:
        run.scheduler.load_state_dict(state["scheduler"])
    if state["elbo_step"] is not None:
        run.elbo.step = state["elbo_step"]
    load_callbacks(run.callbacks, state.get("callback_names", names_of(run.callbacks)), state["callbacks"])
    run.step, run.epoch, run.batches_done = state["step"], state["epoch"], state["batches_done"]
    run.losses, run.elapsed = state["losses"].tolist(), state["elapsed"]
    run.snapshot = run.candidate = run.copy_parameters()
    set_random_state(state["epoch_random"], run.generators)
    run.resume_random = state["random"]
    if rank() == 0:
        logger.warning("fit: resuming from step %d of %s", run.step, path)
        different = differences(state.get("settings", run.settings), run.settings)
        if different:
            text = say_differences(different, run.scheduler is not None, path)
            warnings.warn(text, UserWarning, stacklevel=4)


def look_ahead(run: Any) -> None:
    """
    Lets a bound that runs the model before its first step do so before the state of the run is loaded, as the interrupted
    run has done it.

    :param run: the run, before its first step.
    """
    if getattr(run.elbo, "max_plate_nesting", 0) == math.inf and run.statistics():
        step = getattr(run.elbo, "step", None)
        with local_parameters(), unchanged_buffers():
            run.loss(run.first)
        if step is not None:
            run.elbo.step = step


def check_tensors(
    own: Mapping[str, Tensor], trained: Mapping[str, Tensor], state: Mapping[str, Any], path: os.PathLike[str]
) -> None:
    """
    Checks that a checkpoint holds the tensors of the same model and guide.

    :param own: the present tensors.
    :param trained: those that are trained.
    :param state: what the checkpoint holds.
    :param path: the file.
    :raises ValueError: naming a tensor in which they differ.
    """
    found = {name: tuple(value.shape) for name, value in state["tensors"].items()}
    expected = {name: tuple(value.shape) for name, value in own.items()}
    if state["format"] == 1:  # without the networks that functions hold
        held = (*trained, *found, *(n for n in expected if n.startswith(("model.", "guide."))))
        expected = {name: shape for name, shape in expected.items() if name in held}
    if found != expected:
        odd = min(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        raise ValueError(
            f"checkpoint: {os.fspath(path)} belongs to another model or guide; {odd!r} has shape {found.get(odd)} in "
            f"the file and {expected.get(odd)} here. Choose another path, or pass Checkpoint(path, resume=False) to "
            "start again."
        )
