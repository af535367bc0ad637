# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The network, the data and the measure that all libraries share."""

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NEW = torch.randn(500, 784, generator=torch.Generator().manual_seed(1))
Rows = list[dict[str, Any]]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))


def median_ratio(work: Callable[[], Any], unit: Callable[[], Any], repeat: int) -> dict[str, float]:
    """The work in units that are measured right before it, and the unit in milliseconds."""
    unit(), work()
    ratios, units = [], []
    for _ in range(repeat):
        unit()  # after the work before, whose memory and caches are not the unit's
        start = time.perf_counter()
        unit()
        middle = time.perf_counter()
        work()
        units.append(middle - start)
        ratios.append((time.perf_counter() - middle) / units[-1])
    return {
        "median": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios),
        "unit_ms": 1e3 * statistics.median(units),
    }  # fmt: skip


def mebibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def mean_field_problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    net = mlp()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0.0, 0.1)
    return net, torch.randn(128, 784), torch.randint(0, 10, (128,))


def pyro_model(net: Any, num_data: int = 128) -> Callable[..., Any]:
    import pyro
    import pyro.distributions as dist

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        logits = net(x)
        with pyro.plate("data", num_data, subsample=torch.arange(len(x))):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    return model
