# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Networks in evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def evaluation_mode(model: Any = None) -> Iterator[list[torch.nn.Module]]:
    """
    Within this context a model, if it is a module, and the modules that are called are in evaluation mode (dropout off,
    batch statistics fixed). It lists those that are called, each once.
    """
    seen: set[int] = set()
    found: list[torch.nn.Module] = []
    changed: list[torch.nn.Module] = []

    def evaluate(module: torch.nn.Module) -> None:
        if module.training:
            parts = [part for part in module.modules() if part.training]
            changed.extend(parts)
            for part in parts:
                part.training = False

    def note(module: torch.nn.Module, _: Any) -> None:
        if id(module) not in seen:
            seen.add(id(module))
            found.append(module)
        evaluate(module)

    if isinstance(model, torch.nn.Module):
        evaluate(model)
    # a function does not tell what it calls
    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()
        for part in changed:
            part.training = True
