# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What a guide keeps of its first run, without the graphs of that run, which can be neither copied nor freed."""

import copy
from typing import Any

import torch
from torch import Tensor


def detached(fn: Any) -> Any:
    """A distribution without graphs in its parameters: the same, or a copy."""
    result = fn
    for name, value in vars(fn).items():
        new = value
        if isinstance(value, Tensor) and value.requires_grad:
            new = value.detach()
        elif isinstance(value, torch.distributions.Distribution):
            new = detached(value)
        if new is not value:
            result = copy.copy(fn) if result is fn else result
            setattr(result, name, new)
    return result


def detach_prototypes(guide: Any) -> None:
    """Frees the graphs of the prototype traces of a guide and its parts."""
    for part in guide if isinstance(guide, torch.nn.ModuleList) else ():
        detach_prototypes(part)
    trace = getattr(guide, "prototype_trace", None)
    for site in trace.nodes.values() if trace is not None else ():
        if isinstance(site.get("value"), Tensor):
            site["value"] = site["value"].detach()
        if isinstance(site.get("fn"), torch.distributions.Distribution):
            site["fn"] = detached(site["fn"])
