# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Cost of Laplace approximations, in epochs of forward + backward passes of the same network on the same data in batches
of 128 in the same process; beside laplace-torch where it is installed.

    python benchmarks/laplace_speed.py --out results.json
    python benchmarks/laplace_speed.py --smoke

Each cost is the median over repetitions of (time / time of an epoch measured right before it), so that a machine
whose load changes slowly changes little. ``--clock cpu`` counts processor seconds instead of seconds, for machines that
are shared; with one thread the two agree where nothing else runs.
"""

import argparse
import importlib.metadata
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pyro_bnn.infer.autoguide import AutoLaplace

SIZES = {"mlp": 10_000, "cnn": 5_000, "resnet": 1_000}
STRUCTURES: dict[str, dict[str, Any]] = {
    "kronecker": {"structure": "kronecker"},
    "diagonal": {"structure": "diagonal"},
    "last-layer full": {"structure": "full", "sites": "last_layer"},
    "last-layer kronecker": {"structure": "kronecker", "sites": "last_layer"},
    "kronecker, Monte-Carlo Fisher": {"structure": "kronecker", "curvature": "mc_fisher"},
}
PEER = {
    "kronecker": ("all", "kron"),
    "diagonal": ("all", "diag"),
    "last-layer full": ("last_layer", "full"),
    "last-layer kronecker": ("last_layer", "kron"),
}


class Residual(nn.Module):
    """Two convolutions around a skip connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return torch.relu(self.skip(x) + self.second(torch.relu(self.first(x))))


def network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    if name == "mlp":
        layers = [nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)]
        return nn.Sequential(*layers), (784,)
    if name == "cnn":
        return nn.Sequential(
            nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
        ), (1, 28, 28)  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    ), (3, 32, 32)  # fmt: skip


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(
    unit: Callable[[], None], work: Callable[[], Any], repeat: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Ratios of the work's time to that of a unit right before it."""
    work()
    ratios = []
    for _ in range(repeat):
        start = clock()
        unit()
        middle = clock()
        work()
        ratios.append((clock() - middle) / (middle - start))
    return {"median": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="small data, to see that everything runs")
    parser.add_argument("--networks", default="mlp,cnn,resnet")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--peer", action="store_true", help="run laplace-torch too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    common = {
        "versions": {k: importlib.metadata.version(k) for k in ("torch", "pyro-ppl")},
        "threads": options.threads,
        "clock": options.clock,
        "seed": 0,
    }
    rows = []
    for name in options.networks.split(","):
        for row in compare(name, options):
            rows.append({**row, **common})
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rows, indent=1))


def compare(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    pyro.set_rng_seed(0)
    net, shape = network(name)
    n = 200 if options.smoke else SIZES[name]
    x, y = torch.randn(n, *shape), torch.randint(0, 10, (n,))
    x_new = torch.randn(50 if options.smoke else 1000, *shape)
    shapes = {k: v.shape for k, v in net.named_parameters()}
    trained = {k: v.detach().clone() for k, v in net.named_parameters()}

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        values = {
            k: pyro.sample(k, dist.Normal(torch.zeros(s), 1.0).to_event(len(s))) for k, s in shapes.items()
        }
        logits = functional_call(net, values, (x,))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    def epoch() -> None:
        for start in range(0, n, 128):
            net.zero_grad()
            F.cross_entropy(net(x[start : start + 128]), y[start : start + 128]).backward()

    rows = []
    clock = CLOCKS[options.clock]
    for structure, arguments in STRUCTURES.items():
        guide = AutoLaplace(model, **arguments).initialize(x[:4], y[:4])
        guide.loc.data.copy_(guide.packed.space.pack(trained))
        repeat = 1 if options.smoke else options.repeat
        row: dict[str, Any] = {"network": name, "structure": structure, "library": "pyro_bnn", "n": n}

        def fit(guide: AutoLaplace = guide) -> None:
            guide.laplace_approximation((x, y), map_tolerance=float("inf"))

        def predict(guide: AutoLaplace = guide) -> None:
            guide.linearized_outputs(x_new)

        def tune(guide: AutoLaplace = guide) -> None:
            guide.optimize_hyperparameters(
                method="grid", candidates=[10 ** (0.02 * i - 1) for i in range(100)]
            )

        row["fit"] = measure(epoch, fit, repeat, clock)
        row["predict 1000"] = measure(epoch, predict, repeat, clock)
        row["evidence at 100 prior precisions"] = measure(epoch, tune, repeat, clock)
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.peer:
        rows += peer(name, net, x, y, x_new, epoch, options)
    return rows


def peer(
    name: str,
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    x_new: Tensor,
    epoch: Callable[[], None],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    try:
        from laplace import Laplace
    except (ImportError, RuntimeError) as error:
        print(f"laplace-torch is left out: {error}")
        return []
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(x, y), batch_size=128)
    rows = []
    for structure, (subset, hessian) in PEER.items():
        fitted: list[Any] = []

        def fit(subset: str = subset, hessian: str = hessian, fitted: list[Any] = fitted) -> None:
            approximation = Laplace(
                net, "classification", subset_of_weights=subset, hessian_structure=hessian
            )
            approximation.fit(loader)
            fitted[:] = [approximation]

        def predict(fitted: list[Any] = fitted) -> None:
            for start in range(0, len(x_new), 16):
                fitted[0]._glm_predictive_distribution(x_new[start : start + 16])

        # one run each: these take minutes
        row: dict[str, Any] = {
            "network": name,
            "structure": structure,
            "library": "laplace-torch",
            "n": len(x),
        }
        for key, work in (("fit", fit), ("predict 1000", predict)):
            epoch()
            clock = CLOCKS[options.clock]
            start = clock()
            epoch()
            middle = clock()
            work()
            ratio = (clock() - middle) / (middle - start)
            row[key] = {"median": ratio, "smallest": ratio, "largest": ratio}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


if __name__ == "__main__":
    main()
