# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
The evidence of a network with 100,000 parameters without a matrix, against the dense value in function space.

A tanh network with two hidden layers is trained on N rows of a UCI set with a Gaussian likelihood and a N(0, 1 / fan-in) prior. The
determinant of its precision is exactly that of the N × N matrix 1 + J T^-1 J' / noise^2, which plain torch forms row by row; it is
possible only because N is small, which the estimate does not know.

    PYRO_BNN_DATA=../shared/data python benchmarks/hfl_evidence.py --out results.json
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.func import grad, vmap
from uci_data import load

from pyro_bnn.infer import hfl
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace

NOISE = 0.2


def shapes(features: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Of the weights by name."""
    return {
        "w1": (hidden, features), "b1": (hidden,), "w2": (hidden, hidden), "b2": (hidden,), "w3": (1, hidden), "b3": (1,),
    }  # fmt: skip


def scale_of(shape: tuple[int, ...]) -> float:
    """The standard deviation of the prior."""
    return 1.0 if len(shape) == 1 else shape[1] ** -0.5


def network(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Outputs of shape ``(N,)``."""
    h = torch.tanh(x @ weights["w1"].mT + weights["b1"])
    h = torch.tanh(h @ weights["w2"].mT + weights["b2"])
    return (h @ weights["w3"].mT + weights["b3"]).squeeze(-1)


def bayesian(sizes: dict[str, tuple[int, ...]]) -> Any:
    """The network as an ordinary Pyro model."""

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        weights = {
            name: pyro.sample(name, dist.Normal(x.new_zeros(shape), scale_of(shape)).to_event(len(shape)))
            for name, shape in sizes.items()
        }
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(network(weights, x), NOISE), obs=y)

    return model


class Dense:
    """The same network in plain torch, as a function of one vector."""

    def __init__(self, sizes: dict[str, tuple[int, ...]]) -> None:
        self.sizes = sizes
        scales = [torch.full((math.prod(s),), scale_of(s), dtype=torch.float64) for s in sizes.values()]
        self.scale = torch.cat(scales)

    def outputs(self, u: Tensor, x: Tensor) -> Tensor:
        parts = u.split([math.prod(s) for s in self.sizes.values()])
        return network({n: p.reshape(s) for (n, s), p in zip(self.sizes.items(), parts, strict=True)}, x)

    def loss(self, u: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The negative log joint density."""
        fit = dist.Normal(self.outputs(u, x), NOISE).log_prob(y).sum()
        return -fit - dist.Normal(0.0, self.scale.to(u)).log_prob(u).sum()

    def train(self, x: Tensor, y: Tensor, steps: int) -> Tensor:
        """A point estimate by Adam, in float32."""
        torch.manual_seed(0)
        u = (self.scale * torch.randn(len(self.scale))).float().requires_grad_(True)
        optimizer = torch.optim.Adam([u], lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(u, x.float(), y.float()).backward()
            optimizer.step()
            schedule.step()
        return u.detach().double()

    def evidence(self, u: Tensor, x: Tensor, y: Tensor) -> float:
        """The Laplace evidence with the GGN, by the determinant in function space."""
        rows = []
        for part in x.split(25):
            gradients = vmap(grad(lambda v, z: self.outputs(v, z[None])[0]), in_dims=(None, 0))(u, part)
            rows.append((gradients * self.scale / NOISE).float())
        J = torch.cat(rows)
        K = torch.zeros(len(x), len(x), dtype=torch.float64)
        for part in J.split(4096, 1):
            K += part.double() @ part.double().mT
        log_det = torch.linalg.slogdet(torch.eye(len(x), dtype=torch.float64) + K)[1]
        log_prior = -2 * self.scale.log().sum()
        return float(-self.loss(u, x, y) + 0.5 * (len(u) * math.log(2 * math.pi) - log_prior - log_det))


def measure(name: str, hidden: int, rows: int, steps: int, tolerance: float) -> dict[str, Any]:
    data = load(name, "standard", 0)
    x, y = data.x[:rows].double(), data.y[:rows].double()
    sizes = shapes(x.shape[1], hidden)
    dense = Dense(sizes)
    u = dense.train(x, y, steps)
    exact = dense.evidence(u, x, y)
    runs = []
    for dtype in (torch.float64, torch.float32):
        pyro.clear_param_store()
        data_of = (x.to(dtype), y.to(dtype))
        guide = AutoHessianFreeLaplace(bayesian(sizes), curvature="ggn").initialize(*data_of)
        guide.loc.data = u.to(dtype)
        start = time.process_time()
        found = hfl.log_evidence(guide, data_of, tolerance=tolerance, map_tolerance=math.inf)
        half = 0.5 * (found.upper - found.lower)
        runs.append(
            {
                "dtype": str(dtype), "log_evidence": float(found.log_evidence), "half_bracket": half,
                "error": found.error, "difference": float(found.log_evidence) - exact, "rank": found.rank,
                "probes": found.num_probes, "products": found.products,
                "newton_decrement": found.newton_decrement, "cpu_seconds": time.process_time() - start,
            }
        )  # fmt: skip
        print(json.dumps(runs[-1]), flush=True)
    return {"set": name, "parameters": len(u), "rows": len(x), "dense": exact, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--set", default="concrete")
    parser.add_argument("--hidden", type=int, default=312)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tolerance", type=float, default=0.5)
    parser.add_argument("--smoke", action="store_true", help="a small case")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    size = (12, 40, 20) if options.smoke else (options.hidden, options.rows, options.steps)
    found = measure(options.set, *size, options.tolerance)
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
