# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What a model says at given latents and inputs of no data, by which two models of the same tensors are told apart."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.model.data import Batch, map_tensors
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.model.handlers import base_distribution, is_deterministic, is_factor, run_model
from pyro_bnn.model.observations import stand_in_data
from pyro_bnn.model.parameters import local_parameters

#: How many numbers of each parameter of a distribution are kept.
KEPT = 64

#: By site its family, and by parameter its first values.
Reading = dict[str, dict[str, Any]]


def read(guide: Any, model: Callable[..., Any], batch: Batch) -> Reading | None:
    """
    The distributions of the observed sites at the median of a guide and at waves in the shapes of a batch; ``None`` where that
    is not a function of them: the model does not run on waves, or is random, or the guide has no median.
    """
    waves = map_tensors(batch, _wave)
    try:
        first, second = (_read(guide, model, waves, seed) for seed in range(2))
    except Exception:
        return None
    return first if not differences(first, second) else None


def differences(saved: Reading, own: Reading) -> list[str]:
    """What differs by more than devices and libraries do."""
    found = []
    for name in sorted(saved.keys() | own.keys()):
        here, there = own.get(name, {}), saved.get(name, {})
        for key in sorted(here.keys() | there.keys(), key=lambda k: (k != "family", k)):
            if not _same(there.get(key), here.get(key)):
                found.append(
                    f"site {name!r} has {key} {_shown(there.get(key))} there and {_shown(here.get(key))} here"
                )
    return found


def _wave(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    return torch.arange(1, value.numel() + 1, device=value.device).sin().to(value.dtype).reshape(value.shape)


def _read(guide: Any, model: Callable[..., Any], batch: Batch, seed: int) -> Reading:
    with (
        local_parameters(),
        evaluation_mode(model),
        evaluation_mode(guide),
        stand_in_data(),
        torch.random.fork_rng(),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        sites = run_model(model, batch, guide.median(*batch[0], **batch[1]))
        observed = [
            n for n, s in sites.items() if s["is_observed"] and not is_deterministic(s) and not is_factor(s)
        ]
        return {name: _parameters(base_distribution(sites[name]["fn"])) for name in observed}


def _parameters(fn: Any) -> dict[str, Any]:
    values = {name: getattr(fn, name, None) for name in fn.arg_constraints if name in vars(fn)}
    kept = {name: value.flatten()[:KEPT].cpu() for name, value in values.items() if isinstance(value, Tensor)}
    return {"family": type(fn).__name__, **kept}


def _same(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and a == b
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return False
    least = torch.promote_types(a.dtype, b.dtype)
    tolerance = 1e-5 if least == torch.float64 else 2e-2  # reduced precision of matrix products among them
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return bool(((a - b).abs() <= tolerance * a.abs().amax().clamp(min=1e-30)).all()) if a.numel() else True


def _shown(value: Any) -> str:
    return f"{float(value[0]):.4g}, ..." if isinstance(value, Tensor) and value.numel() else str(value)
