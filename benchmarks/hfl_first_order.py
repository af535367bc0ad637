# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
What first-order runs of a training loop find, and what they cost: passes over the data for each functional.

The networks, modes and targets are those of ``hfl_speed.py``, as plain modules in a loop of four batches; the reference is a dense
Hessian.

    python benchmarks/hfl_first_order.py --out benchmarks/results/hfl_first_order.json
"""

import argparse
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hfl_speed import problem, rows_and_reference
from torch import Tensor, nn

from pyro_bnn.infer import hfl

NOISE = 0.1


def as_module(latents: dict[str, Tensor]) -> nn.Sequential:
    """The network of two layers with these weights."""
    hidden, inputs = latents["w0"].shape
    net = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 1))
    for layer, i in ((net[0], 0), (net[2], 1)):
        layer.weight.data.copy_(latents[f"w{i}"])
        layer.bias.data.copy_(latents[f"b{i}"])
    return net


def train(net: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor], epochs: int) -> None:
    """Four batches of every fourth row; those of 30 rows have 7 or 8, and are weighed by that."""
    x, y = data
    for _ in range(epochs):
        for i in range(4):
            optimizer.zero_grad()
            errors = (net(x[i::4]).squeeze(-1) - y[i::4]) / NOISE
            (0.5 * errors.square().sum() * 4 / len(x)).backward()
            optimizer.step()


def cases(smoke: bool) -> Iterator[dict[str, Any]]:
    for inputs, hidden, n, m in ((1, (16,), 30, 12), (5, (32,), 200, 4))[: 1 if smoke else None]:
        guide, data = problem(inputs, hidden, n)
        targets = torch.randn(12 if inputs == 1 else 32, inputs)[:m]
        _, exact, _ = rows_and_reference(guide, data, targets)
        for method, epochs, sweeps in (
            ("gradients", 0, 10), ("gradients", 0, 40), ("central", 30, 10), ("paired", 30, 40),
        ):  # fmt: skip
            net = as_module(guide.median())
            optimizer = torch.optim.SGD(net.parameters(), lr=0.002, momentum=0.9, weight_decay=1 / n)
            runs = hfl.FirstOrder(
                net,
                lambda net, x=targets: net(x),
                optimizer,
                scale=n,
                method=method,
                sweeps=sweeps,
                tolerance=1e-3,
            )
            trained = 0
            for run in runs:
                trained += epochs if run.is_training else 0
                train(net, optimizer, data, run.epochs(epochs))
            result = runs.result()
            error = (result.variances / exact - 1).abs()
            yield {
                "method": method,
                "epochs": epochs,
                "sweeps": sweeps,
                "parameters": result.num_latents,
                "targets": m,
                "passes_per_target": (result.gradient_evaluations + trained) / m,
                "max_relative_error": float(error.max()),
                "median_relative_error": float(error.median()),
                "residual_squared": result.residual**2,
            }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", hfl.HFLWarning)
    rows = []
    for row in cases(args.smoke):
        rows.append(row)
        print(row, flush=True)
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
