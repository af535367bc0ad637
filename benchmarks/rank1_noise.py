# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
How noisy the gradients of rank-1 networks are, for Gaussian and Cauchy factors and for noise per batch and per example.

The network, its initial state and the batch are those of ``rank1_fashion.py``; nothing is trained. For each setting the
gradient of the loss with respect to all locations and shared weights is drawn repeatedly: reported are the norm of the
mean gradient, the median distance from it, and the largest distance, both relative to that norm.

    PYRO_BNN_DATA=../shared/data python benchmarks/rank1_noise.py --out results.json
"""

import argparse
import json
import math
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from rank1_fashion import CAUCHY, GAUSS, mlp
from rank1_images import Images
from torch import Tensor

from pyro_bnn.infer import Mixture_ELBO


def gradients(method: Any, data: Images, draws: int, seed: int) -> dict[str, float]:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    x, y = data.x, data.y
    net = method.convert_(mlp(), dist.Normal(0.0, 1.0))

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    # every setting starts at the same locations, draws of N(1, 0.1)
    guide = method.guide(model).initialize(x, y)
    pyro.set_rng_seed(seed)
    with torch.no_grad():
        guide.loc[:, : guide.scale.shape[1]] = 1.0 + 0.1 * torch.randn(guide.scale.shape)
    module = Mixture_ELBO(kl_scale=0.0)(model, guide)
    module(x, y)
    found = []
    parameters = [p for n, p in guide.named_parameters() if not n.startswith("scale")]
    for _ in range(draws):
        grads = torch.autograd.grad(module(x, y), parameters)
        found.append(torch.cat([g.flatten() for g in grads]))
    each = torch.stack(found)
    centre = each.mean(0)
    distance = (each - centre).norm(dim=-1) / centre.norm()
    return {
        "mean_norm": float(centre.norm()),
        "median": float(distance.median()),
        "max": float(distance.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="three draws")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    parser.add_argument("--draws", type=int, default=40)
    args = parser.parse_args()
    data = Images.read(128, 10, 1)
    cases = {
        "Gaussian, 0.1": GAUSS,
        "Cauchy, 0.0003": replace(CAUCHY, init_scale=3e-4),
        "Cauchy, 0.003": CAUCHY,
        "Cauchy, 0.03": replace(CAUCHY, init_scale=3e-2),
    }
    rows = []
    for name, method in cases.items():
        for noise in ("shared", "per_example"):
            row: dict[str, Any] = {"factors": name, "noise": noise, "draws": 3 if args.smoke else args.draws}
            row |= gradients(replace(method, noise=noise), data, row["draws"], 0)
            assert math.isfinite(row["max"])
            versions = {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "pyro": pyro.__version__,
            }
            rows.append(row | {"threads": torch.get_num_threads(), **versions})
            print(f"{name:16s} {noise:12s} |mean| {row['mean_norm']:9.2f} median {row['median']:.2f} "
                  f"max {row['max']:.2f}", flush=True)  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
