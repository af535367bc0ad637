# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The networks that a model calls, wherever it holds them, and the tensors in them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyro_bnn.model.data import Batch
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.model.parameters import local_parameters


@contextmanager
def unchanged_buffers() -> Iterator[list[nn.Module]]:
    """
    A context that lists the modules whose forward methods run within it, and puts their buffers (running statistics)
    back at its end.
    """
    found: list[nn.Module] = []
    seen: set[int] = set()
    before: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def note(module: nn.Module, *_: Any) -> None:
        if id(module) not in seen:
            seen.add(id(module))
            found.append(module)
            for name, buffer in module.named_buffers(recurse=False):
                if not is_lazy(buffer):
                    before.append((module, name, buffer, buffer.clone()))

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()
        with torch.no_grad():
            for module, name, buffer, value in before:
                buffer.copy_(value)
                if getattr(module, name, None) is not buffer:  # the module has put another in its place
                    setattr(module, name, buffer)


def outermost(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Those of some modules that are part of no other."""
    parts = {id(part) for module in modules for part in module.modules() if part is not module}
    return [module for module in modules if id(module) not in parts]


def tensors_of(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The parameters and persistent buffers of the networks among some modules."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for i, module in enumerate(outermost(modules)):
        for name, value in module.state_dict(keep_vars=True).items():
            if isinstance(value, Tensor) and id(value) not in seen:
                seen.add(id(value))
                found[f"{type(module).__name__}[{i}].{name}"] = value
    return found


def named_networks(model: Any, guide: Any, called: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Model and guide, where they are modules, and the networks that they call without holding them as parts."""
    found = {n: m for n, m in (("model", model), ("guide", guide)) if isinstance(m, nn.Module)}
    held = {id(part) for module in found.values() for part in module.modules()}
    others = outermost([module for module in called if id(module) not in held])
    return found | {f"{type(module).__name__}[{i}]": module for i, module in enumerate(others)}


def model_tensors(model: Any, guide: Any, batch: Batch, latents: Any = None) -> dict[str, Tensor]:
    """
    The tensors that predictions depend on beside the guide's own: those of the networks that model and guide call, and
    those of their :func:`pyro.param` statements.
    """
    args, kwargs = batch
    with ExitStack() as stack:
        for context in (
            local_parameters(),
            torch.enable_grad(),
            pyro.validation_enabled(False),
            poutine.block(),
        ):
            stack.enter_context(context)
        stack.enter_context(torch.random.fork_rng())
        called = stack.enter_context(evaluation_mode())
        nodes: dict[str, Any] = {}
        if latents is None:
            latents = poutine.trace(guide).get_trace(*args, **kwargs)
            nodes.update(latents.nodes)
        replayed = poutine.replay(model, trace=latents)
        nodes.update(poutine.trace(replayed, param_only=True).get_trace(*args, **kwargs).nodes)
    own = list(guide.modules()) if isinstance(guide, nn.Module) else []
    parts = {id(module) for module in own}
    found = tensors_of([module for module in called if id(module) not in parts])
    held = {
        id(value)
        for value in (*found.values(), *(p for module in own for p in module.parameters(recurse=False)))
    }
    for name, site in nodes.items():
        if site["type"] == "param" and isinstance(site["value"], Tensor):
            value: Any = site["value"]
            leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
            if leaf.is_leaf and id(leaf) not in held:
                found[f"param {name!r}"] = leaf
    return found
