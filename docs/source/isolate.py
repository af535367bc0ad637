# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Tutorials are scripts of their own; the gallery runs them in one process."""

from typing import Any

import pyro
import torch


def reset(gallery_conf: dict[str, Any], fname: str) -> None:
    """What a new process would start from: float32, no parameters, validation on, a fixed seed."""
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()
    pyro.enable_validation(__debug__)
    pyro.set_rng_seed(0)
