# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Networks in evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """
    Within this context the modules that a model calls are in evaluation mode (dropout off, batch statistics fixed).

    :param model: a module, or a function that calls modules.
    """
    changed: list[torch.nn.Module] = []

    def evaluate(module: torch.nn.Module, _: Any = None) -> None:
        if module.training:
            parts = [part for part in module.modules() if part.training]
            changed.extend(parts)
            for part in parts:
                part.training = False

    if isinstance(model, torch.nn.Module):
        evaluate(model)
    # a function does not tell what it calls
    handle = torch.nn.modules.module.register_module_forward_pre_hook(evaluate)
    try:
        yield
    finally:
        handle.remove()
        for part in changed:
            part.training = True
