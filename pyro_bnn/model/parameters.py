# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The parameters of a model and a guide, kept apart from every other model of the process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor


@contextmanager
def local_parameters() -> Iterator[None]:
    """
    Runs a block in which the parameters of every module are the module's own.

    By default Pyro shares the parameters of :class:`~pyro.nn.PyroModule` instances, autoguides among them,
    by name through its global store, so that a second guide silently starts from the values of the first.
    Inside this context the store holds only what plain ``pyro.param`` statements put there: a module finds no
    entry of its name and uses its own tensors. Unlike the setting ``module_local_params`` it also works for
    modules that were built before.

    Example::

        >>> from pyro.nn import PyroModule, PyroParam
        >>> def build(value):
        ...     module = PyroModule("m")
        ...     module.p = PyroParam(torch.tensor(value))
        ...     module.forward = lambda: module.p.item()
        ...     return module
        >>> with local_parameters():
        ...     build(1.0)(), build(2.0)()
        (1.0, 1.0)
        >>> with local_parameters():
        ...     first = build(1.0)()
        >>> with local_parameters():
        ...     build(2.0)()
        2.0
    """
    store = pyro.get_param_store()
    inner = _plain(store.get_state())
    try:
        with store.scope(inner):
            try:
                yield
            finally:  # also after an error: what a failed run has learnt stays
                inner = _plain(store.get_state())
    finally:
        # statements outside modules keep their place in the store, where their owner looks for them
        store.set_state(inner)


def _plain(state: Any) -> Any:
    """The entries of a store's state that belong to no module: modules hold ``nn.Parameter``s."""
    names = [name for name, value in state["params"].items() if not isinstance(value, torch.nn.Parameter)]
    return {key: {name: state[key][name] for name in names} for key in ("params", "constraints")}


def statement_leaves(trace: Trace) -> Iterator[tuple[str, Tensor]]:
    """The unconstrained leaf tensors of the :func:`pyro.param` statements in a trace, by the name of the statement."""
    for name, site in trace.nodes.items():
        value: Any = site["value"] if site["type"] == "param" else None
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
        if isinstance(leaf, Tensor) and leaf.is_leaf:
            yield name, leaf


def named_parameters(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """
    The trainable leaf tensors of a model and a guide by a unique name, each once: those of the modules, and those that
    :func:`pyro.param` statements reach when both run once.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()

    def add(name: str, value: Tensor) -> None:
        if id(value) not in seen and value.requires_grad:
            seen.add(id(value))
            found[name] = value

    for prefix, part in (("model", model), ("guide", guide)):
        if isinstance(part, torch.nn.Module):
            for name, value in part.named_parameters():
                add(f"{prefix}.{name}", value)
    # statements in plain functions, and modules that such a function closes over
    # with gradients: a model may differentiate something itself
    with poutine.block(), poutine.trace(param_only=True) as capture:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        poutine.replay(model, trace=guide_trace)(*args, **kwargs)
    for name, leaf in statement_leaves(capture.trace):
        add(f"param.{name}", leaf)
    return found
