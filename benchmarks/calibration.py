# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Simulation-based calibration of microcanonical chains.

Latents :math:`\theta` are drawn from the prior and data from the model, so that :math:`\theta` is a draw of the posterior. Two ways to ask
whether chains sample that posterior, both by ranks that must be uniform on 0 to L over simulations:

* ``exact`` (Gandy and Scott, 2020): two chains of a reversible kernel start at :math:`\theta`, of k and of L - k transitions, k uniform. All
  L + 1 states are exchangeable, whatever the chains' mixing, so that the rank of :math:`\theta` among the others is exactly uniform if, and in
  the limit of many simulations only if, the kernel leaves the posterior invariant. Step size and momentum length are given, large enough for
  a quarter of the proposals to be refused.
* ``whole`` (Talts et al., 2018): runs with warm-up from a draw of the prior that knows nothing of :math:`\theta`; draws are thinned to be nearly
  independent.

Unadjusted chains with the same steps are the control: the test must see their bias. One row per model, way and quantity: the
p-value of the chi-square statistic of the ranks, over the latents and the log joint density of latents and data.

    python benchmarks/calibration.py --out benchmarks/results/calibration.jsonl
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from scipy.stats import chisquare
from torch import Tensor

from pyro_bnn.infer import ChainResult, log_density, mclmc

RANKS = 15


def straight_line(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Linear regression with an unknown scale."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(-0.5), 0.5))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(x @ beta, sigma), obs=y)


def network(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Three tanh units, whose posterior has modes that are permutations and reflections of each other."""
    first = pyro.sample("first", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
    bias = pyro.sample("bias", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    last = pyro.sample("last", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(torch.tanh(x @ first.mT + bias) @ last, 0.3), obs=y)


def hierarchy(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Groups with an unknown spread, not centred: a funnel."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(torch.ones(())))
    z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    groups = torch.arange(len(x)) % 4
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(mu + tau * z[groups], 0.5), obs=y)


def counts(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Counts, of which a share is zero."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 0.7).to_event(1))
    gate = pyro.sample("gate", dist.Beta(torch.tensor(2.0), 2.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.ZeroInflatedPoisson((x @ beta).exp(), gate=gate), obs=y)


class Kind(NamedTuple):
    """
    :param model: a model of inputs ``(N, 2)``.
    :param size: N.
    :param step: step size, in units of the prior.
    :param length: momentum length.
    """

    model: Callable[..., Tensor]
    size: int
    step: float
    length: float


MODELS = {
    "straight line": Kind(straight_line, 6, 0.35, 1.5),
    "network": Kind(network, 8, 0.5, 2.0),
    "hierarchy": Kind(hierarchy, 8, 0.7, 2.0),
    "counts": Kind(counts, 8, 0.9, 2.0),
}


def simulate(kind: Kind, seed: int) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """Latents and data."""
    pyro.set_rng_seed(seed)
    x = torch.randn(kind.size, 2)
    trace = poutine.trace(kind.model).get_trace(x)
    latents = {n: trace.nodes[n]["value"] for n in trace.stochastic_nodes if n not in ("data", "obs")}
    return latents, (x, trace.nodes["obs"]["value"])


def one_way(kind: Kind, data: Any, latents: dict[str, Tensor], adjusted: bool, length: int) -> ChainResult:
    """
    A chain of so many transitions from the latents, without adaptation. Forward and backward chains are runs of their own: chains of
    one run have the same random lengths of paths.
    """
    return mclmc(
        kind.model, latents, data, num_samples=length, warmup_steps=0, adjusted=adjusted,
        step_size=kind.step, momentum_length=kind.length, progress_bar=False,
    )  # fmt: skip


def whole(kind: Kind, data: Any, adjusted: bool) -> ChainResult:
    """One chain from the prior, with its warm-up."""
    return mclmc(
        kind.model, None, data, num_samples=RANKS, warmup_steps=400, thinning=8, adjusted=adjusted, progress_bar=False
    )  # fmt: skip


def ranks(kind: Kind, way: str, adjusted: bool, seed: int) -> tuple[dict[str, int], float]:
    """The rank of each quantity in one simulation, and the mean acceptance."""
    latents, data = simulate(kind, seed)
    density = log_density(kind.model, data)
    if way == "exact":
        k = int(torch.randint(RANKS + 1, ()))
        runs = [one_way(kind, data, latents, adjusted, length) for length in (k, RANKS - k) if length]
    else:
        runs = [whole(kind, data, adjusted)]
    states = {n: torch.cat([run.samples[n][0] for run in runs]) for n in latents}
    packed = torch.cat([density.space.pack(latents)[None], density.space.pack(states)])
    quantities = torch.cat([packed, density(packed).detach()[:, None]], 1)
    below = (quantities[1:] < quantities[0]).sum(0) + _ties(quantities)
    names = [f"{n}[{i}]" for n, s in density.space.slices.items() for i in range(s.stop - s.start)]
    rates = [run.sample_stats["acceptance_rate"][0] for run in runs if adjusted]
    found = dict(zip([*names, "log joint"], below.tolist(), strict=True))
    return found, float(torch.cat(rates).mean()) if adjusted else math.nan


def _ties(quantities: Tensor) -> Tensor:
    """Refused proposals repeat a state: ties are broken at random."""
    same = (quantities[1:] == quantities[0]).sum(0)
    return (torch.rand(len(same)) * (same + 1)).floor().long()


def rows(name: str, way: str, adjusted: bool, simulations: int) -> Iterator[dict[str, Any]]:
    """The test of each quantity."""
    kind, start = MODELS[name], time.process_time()
    each = [ranks(kind, way, adjusted, seed) for seed in range(simulations)]
    seconds = time.process_time() - start
    acceptance = [rate for _, rate in each if not math.isnan(rate)]
    for quantity in each[0][0]:
        found = torch.tensor([r[quantity] for r, _ in each])
        counted = torch.bincount(found, minlength=RANKS + 1).reshape(-1, 2).sum(1)
        row = {"model": name, "way": way, "adjusted": adjusted, "quantity": quantity, "simulations": simulations,
               "p_value": float(chisquare(counted.numpy()).pvalue), "counts": counted.tolist(),
               "seconds": round(seconds, 1)}  # fmt: skip
        if acceptance:
            row["acceptance"] = sum(acceptance) / len(acceptance)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="append rows to this file; what it holds is not run again")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=["exact", "whole"], default=["exact", "whole"])
    parser.add_argument("--simulations", type=int, default=400)
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines = args.out.read_text().splitlines() if args.out and args.out.exists() else []
    done = {(row["model"], row["way"], row["adjusted"]) for row in map(json.loads, lines)}
    for name in args.models:
        for way, adjusted in (("exact", True), ("exact", False), ("whole", True)):
            if way not in args.ways or (name, way, adjusted) in done:
                continue
            for row in rows(name, way, adjusted, args.simulations):
                print({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
                if args.out:
                    with args.out.open("a") as stream:
                        stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
