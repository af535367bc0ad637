# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The settings of a run in plain values, and what differs between those of two runs."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_bnn.model.data import Batch
from pyro_bnn.model.flat import StartFlatSites
from pyro_bnn.model.handlers import base_distribution, sample_sites
from pyro_bnn.model.networks import unchanged_buffers
from pyro_bnn.model.parameters import local_parameters

_PLAIN = (bool, int, float, str, type(None))
#: Attributes that change while a run goes on.
_RUNNING = {"step", "max_plate_nesting", "stop_reason", "base_lrs", "_last_lr"}


def describe(value: Any) -> Any:
    """
    A setting as a plain value; objects are described by their class and their plain public attributes.

    Example::

        >>> from pyro_bnn.infer import LinearAnnealing
        >>> describe(0.1), describe(max), describe((0.9, 0.999))
        (0.1, 'max', '(0.9, 0.999)')
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        return _summary(value)
    if isinstance(value, (list, tuple, dict, torch.dtype)):
        return str(value)
    if hasattr(value, "__name__"):
        return value.__name__
    shown = [f"{k}={v!r}" for k, v in _public(value).items() if isinstance(v, _PLAIN)]
    return f"{type(value).__name__}({', '.join(shown)})"


def _public(value: Any) -> dict[str, Any]:
    attributes = getattr(value, "__dict__", {})
    return {k: v for k, v in attributes.items() if k not in _RUNNING and not k.startswith("_")}


def _summary(value: Tensor) -> str:
    """A tensor in a few digits."""
    if value.requires_grad:
        return "trained"
    low, high = float(value.min()), float(value.max())
    if low == high:
        return f"{low:.6g}"
    return f"{low:.4g} to {high:.4g}, mean {float(value.double().mean()):.4g}"


def describe_optimizer(optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any]:
    """The settings of an optimiser and a scheduler by name, as they are before the first step."""
    found: dict[str, Any] = {"optimizer": type(optimizer).__name__}
    for i, group in enumerate(optimizer.param_groups):
        prefix = f"optimizer group {i}" if i else "optimizer"
        start = group | ({"lr": group["initial_lr"]} if "initial_lr" in group else {})
        found |= {f"{prefix} {k}": describe(v) for k, v in start.items() if k not in ("params", "initial_lr")}
    found["scheduler"] = None if scheduler is None else type(scheduler).__name__
    state = {} if scheduler is None else scheduler.state_dict()
    return found | {f"scheduler {k}": describe(v) for k, v in state.items() if k not in _RUNNING}


def describe_elbo(elbo: Any) -> dict[str, Any]:
    """The class and the public settings of a bound."""
    settings = {k: v for k, v in _public(elbo).items() if isinstance(v, _PLAIN) or callable(v)}
    return {"elbo": type(elbo).__name__} | {f"elbo {k}": describe(v) for k, v in settings.items()}


def describe_sites(model: Any, batch: Batch) -> dict[str, Any]:
    """
    The distributions of a model under one draw with a fixed seed, as texts such as ``"Normal(loc=0, scale=1)"`` by name;
    parameters that are trained, and those of observed sites, are left out.
    """
    args, kwargs = batch
    with ExitStack() as stack:
        quiet = (local_parameters(), pyro.validation_enabled(False), poutine.block(), unchanged_buffers())
        for context in (*quiet, torch.random.fork_rng()):
            stack.enter_context(context)
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
    given = [n for n in constraints if n in vars(fn)]  # others follow from those
    values = {n: getattr(fn, n, None) for n in given or constraints}
    shown = [f"{n}={_summary(v)}" for n, v in values.items() if isinstance(v, Tensor) and v.numel()]
    return ", ".join(shown)


def names_of(callbacks: Sequence[Any]) -> list[str]:
    """The callbacks of a run by name."""
    return [getattr(c, "__name__", type(c).__name__) for c in callbacks]


def differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, str]:
    """By name, what was found in the settings of a file and in the present ones where they differ."""
    pairs = {name: (saved.get(name, "missing"), own.get(name, "missing")) for name in {**saved, **own}}
    return {n: f"{n} {old!r} in the file, {new!r} here" for n, (old, new) in pairs.items() if old != new}


def say_differences(different: Mapping[str, str], scheduled: bool, path: os.PathLike[str]) -> str:
    """What a resumed run takes from its file (what a scheduler governs) and what from its arguments, in words."""
    governed = {"scheduler", "optimizer"} if scheduled else {"scheduler"}
    new = [text for name, text in different.items() if name.split()[0] not in governed]
    old = [text for name, text in different.items() if name.split()[0] in governed]
    parts = [
        f"checkpoint: {os.fspath(path)} was made with other settings, so the run differs from an uninterrupted one."
    ]
    if new:
        parts.append(f"It goes on with those passed here: {'; '.join(new)}.")
    if old:
        parts.append(f"What the scheduler governs goes on as in the file: {'; '.join(old)}.")
    return " ".join(parts)
