# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Influence of examples against refits without them, on a UCI set.

A tanh network with one hidden layer and a Gaussian likelihood is brought to its minimum. For each of n examples plain torch finds the
minimum without it by Newton's method from there, and the changes of predictions at test inputs are compared with those that
``hfl.influence`` foretells.

    PYRO_BNN_DATA=../shared/data python benchmarks/hfl_influence.py --out results.json
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.func import grad, hessian, vmap
from uci_data import load

from pyro_bnn.infer import hfl
from pyro_bnn.infer.autoguide import AutoLaplace

NOISE = 0.3
METHODS: dict[str, dict[str, Any]] = {
    "hessian": {"curvature": "hessian"},
    "ggn": {"curvature": "ggn"},
    "leverage": {"curvature": "ggn", "leverage": True},
}


def network(u: Tensor, x: Tensor, hidden: int) -> Tensor:
    """Outputs of shape ``(N,)`` from a vector of all weights."""
    d = x.shape[1]
    w, b, v, c = u.split([hidden * d, hidden, hidden, 1])
    return torch.tanh(x @ w.reshape(hidden, d).mT + b) @ v + c


def bayesian(hidden: int) -> Any:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        size = hidden * x.shape[1] + 2 * hidden + 1
        u = pyro.sample("u", dist.Normal(x.new_zeros(size), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(network(u, x, hidden), NOISE), obs=y)

    return model


def refits(u: Tensor, x: Tensor, y: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """Minima without each example, shape ``(n, p)``, and the largest entry of the gradient at each, shape ``(n,)``."""

    def loss(v: Tensor, weight: Tensor) -> Tensor:
        return 0.5 * v.square().sum() + 0.5 * (weight * ((y - network(v, x, hidden)) / NOISE) ** 2).sum()

    found, slopes = [], []
    for weights in (1 - torch.eye(len(x), dtype=x.dtype)).split(10):
        v = u.expand(len(weights), -1).clone()
        for _ in range(12):
            gradient, H = vmap(grad(loss))(v, weights), vmap(hessian(loss))(v, weights)
            values, vectors = torch.linalg.eigh(H)
            # directions of negative curvature are left downhill; steps of at most 1
            inner = (vectors.mT @ gradient[..., None]) / values.abs().clamp(min=1e-3)[..., None]
            step = (vectors @ inner).squeeze(-1)
            v = v - step / step.norm(dim=-1, keepdim=True).clamp(min=1.0)
        found.append(v)
        slopes.append(vmap(grad(loss))(v, weights).abs().amax(-1))
    return torch.cat(found), torch.cat(slopes)


def measure(name: str, hidden: int, rows: int, tests: int) -> dict[str, Any]:
    data = load(name, "standard", 0)
    x, y, x_test = data.x[:rows].double(), data.y[:rows].double(), data.x_test[:tests].double()
    pyro.clear_param_store()
    torch.manual_seed(0)
    guide = AutoLaplace(bayesian(hidden)).initialize(x, y)
    guide.loc.data = 0.5 * torch.randn(len(guide.loc), dtype=x.dtype)
    guide.polish((x, y))
    u = guide.loc.detach()
    others, slopes = refits(u, x, y, hidden)
    exact = torch.stack([network(v, x_test, hidden) for v in others]) - network(u, x_test, hidden)
    kept = slopes < 1e-6
    results = {}
    for method, options in METHODS.items():
        start = time.process_time()
        change = hfl.influence(guide, (x, y), (x_test,), **options).matrix
        seconds = time.process_time() - start
        both = torch.stack([change[kept].flatten(), exact[kept].flatten()])
        results[method] = {
            "correlation": float(torch.corrcoef(both)[0, 1]),
            "relative_error": float((both[0] - both[1]).abs().median() / both[1].abs().median()),
            "cpu_seconds": seconds,
        }
        print(method, json.dumps(results[method]), flush=True)
    sizes = {"parameters": len(u), "examples": rows, "tests": tests, "converged": int(kept.sum())}
    return {"set": name, **sizes, "methods": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--set", default="energy")
    parser.add_argument("--hidden", type=int, default=5)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--tests", type=int, default=30)
    parser.add_argument("--smoke", action="store_true", help="a small case")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    size = (3, 20, 5) if options.smoke else (options.hidden, options.rows, options.tests)
    found = measure(options.set, *size)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
