# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
The bias of minibatch samplers on linear regression, whose posterior is known: how much larger their variances are.

Run ``python benchmarks/sgmcmc_bias.py`` (some minutes); it writes the table of the documentation. With ``--network`` it prints the
kinetic temperatures of chains of a small network instead, whose curvature away from its modes is larger.
"""

import argparse
import csv
import warnings
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bnn.infer import sgmcmc
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.nn import bayesian_

N, P, NOISE = 200, 3, 0.5
TABLE = Path(__file__).parents[1] / "docs" / "source" / "tables" / "sgmcmc_bias.csv"
COLUMNS: dict[str, dict[str, Any]] = {
    "sgld": {"scheme": "sgld", "order": "independent"},
    "sghmc": {"scheme": "sghmc", "order": "independent"},
    "baoa": {"scheme": "baoa", "order": "independent"},
    "baoa, symmetric": {"scheme": "baoa", "order": "symmetric"},
    "baoa, symmetric, control variates": {"scheme": "baoa", "order": "symmetric", "control_variates": True},
}


def model(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Linear regression with known noise."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(x @ weight, NOISE), obs=y)


def excess(run: Any, mean: Tensor, precision: Tensor) -> tuple[float, float]:
    """The mean excess of variances over those of the posterior, relative, and its standard error from ten blocks of time."""
    centred = run.samples["weight"] - mean
    ratio = ((centred @ precision) * centred).sum(-1).mean(0) / P  # (draws,)
    blocks = torch.stack([block.mean() for block in ratio.chunk(10)])
    return float(blocks.mean() - 1), float(blocks.std() / 10**0.5)


def heated_networks() -> None:
    """Kinetic temperatures of four chains by all data, for a network of 13 weights and its noise, over step sizes."""
    x = torch.linspace(-1, 1, 40)[:, None]
    y = torch.sin(3 * x[:, 0]) + 0.1 * torch.randn(40)
    layers = (torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    net = bayesian_(torch.nn.Sequential(*layers))

    def network(x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = net(x).squeeze(-1)
        sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 0.3))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(mean, sigma), obs=y)

    guide = AutoLaplace(network).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    for step in (0.1, 0.03):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that they are hot
            run = sgmcmc(network, guide, (x, y), step_size=step, num_samples=1000, progress_bar=False)
        found = run.sample_stats["kinetic_temperature"].mean(-1)
        print(f"h = {step:g}: kinetic temperatures {found.min():.3g} to {found.max():.3g}", flush=True)


def main() -> None:
    """Runs all of the table, or the networks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--network", action="store_true", help="kinetic temperatures of a network")
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    if parser.parse_args().network:
        heated_networks()
        return
    x = torch.randn(N, P)
    y = x @ torch.arange(1.0, P + 1) + NOISE * torch.randn(N)
    precision = torch.eye(P) + x.T @ x / NOISE**2
    mean = torch.linalg.solve(precision, x.T @ y / NOISE**2)
    guide = AutoLaplace(model).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
    rows = []
    for step in (0.1, 0.3):
        for size in (None, 50, 10):
            row = [f"{step:g}", "all" if size is None else str(size)]
            for options in COLUMNS.values():
                if size is None and len(set(options.values()) & {"symmetric"}):
                    row.append("")  # as with any other order
                    continue
                run = sgmcmc(
                    model, guide, (x, y), step_size=step, batch_size=size, num_chains=500, warmup_steps=400, start="draws",
                    num_samples=500, thinning=2, progress_bar=False, **options,
                )  # fmt: skip
                value, error = excess(run, mean, precision)
                row.append(f"{100 * value:.1f} ± {100 * error:.1f}")
            rows.append(row)
            print(*row, sep="  |  ", flush=True)
    with TABLE.open("w", newline="") as file:
        csv.writer(file).writerows([["h", "batch size", *COLUMNS], *rows])


if __name__ == "__main__":
    main()
