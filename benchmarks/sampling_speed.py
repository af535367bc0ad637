# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Cost of the log density of a Pyro model and its gradient, in evaluations of the same density written by hand in torch.

    python benchmarks/sampling_speed.py --out results.json
    python benchmarks/sampling_speed.py --smoke

Two networks with standard normal weights: 13-50-1 with 455 rows (tanh, noise 0.2) and 784-100-10 with 1,000 rows (ReLU, ten
classes), at one vector of weights and at those of 20 chains. Rows: ``log_density`` (pyro_bnn), the same of the first layer of the
regression alone, whose output layer is integrated out, one of its minibatches of a
tenth of the rows, against as much by hand, the potential of Pyro's NUTS and of NumPyro's (jitted, where it is installed), and
steps of NUTS with Pyro's potential and with ``log_density``.

Each cost is the median over repetitions of (time / time of the hand-written density measured right before it), so that a
machine whose load changes slowly changes little; ``low`` and ``high`` are its quartiles. ``--clock cpu`` counts
processor seconds. Gradients of all chains count: ``per_second`` of 20 chains is 20 per evaluation.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import MCMC
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.integrator import potential_grad
from torch import Tensor, nn

from pyro_bnn.infer import log_density
from pyro_bnn.infer.sample.nuts import RecordingNUTS
from pyro_bnn.nn import bayesian_

CHAINS = 20
NETWORKS = {"13-50-1": (455, 400), "784-100-10": (1000, 10)}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Work = Callable[[], Any]


class Problem:
    """A network, its data, and its log density by hand."""

    def __init__(self, name: str, rows: int) -> None:
        pyro.set_rng_seed(0)
        self.sizes = [int(n) for n in name.split("-")]
        inputs, hidden, outputs = self.sizes
        self.is_regression = outputs == 1
        self.x = torch.randn(rows, inputs)
        self.y = torch.randn(rows) if self.is_regression else torch.randint(0, outputs, (rows,))
        self.shapes = [(hidden, inputs), (hidden,), (outputs, hidden), (outputs,)]
        self.size = sum(map(math.prod, self.shapes))
        activation = nn.Tanh() if self.is_regression else nn.ReLU()
        net = nn.Sequential(nn.Linear(inputs, hidden), activation, nn.Linear(hidden, outputs))
        self.net = bayesian_(net, prior=dist.Normal(0.0, 1.0))

    def model(self, x: Tensor, y: Tensor | None = None) -> Any:
        f = self.net(x)
        family: Any = dist.Normal(f.squeeze(-1), 0.2) if self.is_regression else dist.Categorical(logits=f)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", family, obs=y)

    def vectors(self, chains: int) -> Tensor:
        """Weights, ``(p,)``, or ``(C, p)`` for several chains."""
        return 0.1 * torch.randn(*((chains,) if chains > 1 else ()), self.size)

    def by_hand(self, u: Tensor, x: Tensor, y: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Value and gradient, without constants."""
        u = u.detach().requires_grad_()
        parts = u.split([math.prod(shape) for shape in self.shapes], -1)
        w1, b1, w2, b2 = (part.view(*u.shape[:-1], *s) for part, s in zip(parts, self.shapes, strict=True))
        if u.dim() == 1:
            f = F.linear(self.activate(F.linear(x, w1, b1)), w2, b2)
        else:
            f = self.activate(x @ w1.mT + b1.unsqueeze(-2)) @ w2.mT + b2.unsqueeze(-2)
        if self.is_regression:
            terms = -0.5 * ((y - f.squeeze(-1)) / 0.2).square()
        else:
            labels = y.expand(f.shape[:-1]).unsqueeze(-1)
            terms = f.log_softmax(-1).gather(-1, labels).squeeze(-1)
        value = factor * terms.sum(-1) - 0.5 * u.square().sum(-1)
        return value.detach(), torch.autograd.grad(value.sum(), u)[0]

    def activate(self, h: Tensor) -> Tensor:
        return h.tanh() if self.is_regression else h.relu()


def works(problem: Problem, chains: int) -> Iterator[tuple[str, Work, Work]]:
    """The densities by name, each with what is measured beside it."""
    u, x, y = problem.vectors(chains), problem.x, problem.y
    density = log_density(problem.model, (x, y))
    hand: Work = lambda: problem.by_hand(u, x, y)  # noqa: E731
    agree(density.value_and_gradient(u)[1], hand()[1])
    yield "log_density", lambda: density.value_and_gradient(u), hand
    if problem.is_regression:
        rest = log_density(problem.model, (x, y), collapse="2")
        v = rest.restrict(u)
        yield "log_density, output layer integrated out", lambda: rest.value_and_gradient(v), hand
    part = len(x) // 10
    yield (
        "log_density, minibatch",
        lambda: density.batch_value_and_gradient(u, (x[:part], y[:part]), 10.0),
        lambda: problem.by_hand(u, x[:part], y[:part], 10.0),
    )
    if chains == 1:
        params, potential, _, _ = initialize_model(problem.model, (x, y))
        yield "Pyro's potential", lambda: potential_grad(potential, params), hand
    if importlib.util.find_spec("numpyro") is not None:
        yield "NumPyro's potential, jitted", jitted(problem, u), hand


def agree(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def jitted(problem: Problem, u: Tensor) -> Work:
    """The gradient of NumPyro's potential, compiled, with chains together."""
    import jax
    import jax.numpy as jnp
    import numpyro
    from numpyro import distributions as ndist
    from numpyro.infer.util import initialize_model as initialize

    x, y = jnp.asarray(problem.x.numpy()), jnp.asarray(problem.y.numpy())
    names = ["w1", "b1", "w2", "b2"]

    def model() -> None:
        normal = ndist.Normal(0.0, 1.0)
        w1, b1, w2, b2 = (
            numpyro.sample(n, normal.expand(s).to_event(len(s)))
            for n, s in zip(names, problem.shapes, strict=True)
        )
        h = x @ w1.T + b1
        f = (jnp.tanh(h) if problem.is_regression else jax.nn.relu(h)) @ w2.T + b2
        family: Any = ndist.Normal(f[:, 0], 0.2) if problem.is_regression else ndist.Categorical(logits=f)
        with numpyro.plate("data", len(x)):
            numpyro.sample("obs", family, obs=y)

    potential = initialize(jax.random.key(0), model).potential_fn
    pieces = u.split([math.prod(s) for s in problem.shapes], -1)
    params = {
        n: jnp.asarray(piece.reshape(*u.shape[:-1], *s).numpy())
        for n, piece, s in zip(names, pieces, problem.shapes, strict=True)
    }
    both = jax.value_and_grad(potential)
    run = jax.jit(both if u.dim() == 1 else jax.vmap(both))
    slopes = run(params)[1]
    flat = [torch.tensor(jax.device_get(slopes[n])).reshape(*u.shape[:-1], -1) for n in names]
    agree(-torch.cat(flat, -1), problem.by_hand(u, problem.x, problem.y)[1])
    return lambda: jax.block_until_ready(run(params))


def measure(work: Work, unit: Work, calls: int, repeat: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds per call of a work in those of a unit measured right before it."""
    for _ in range(min(calls, 10)):  # recordings are compared with the model most often in the beginning
        work(), unit()
    ratios, seconds = [], []
    for _ in range(repeat):
        times = []
        for each in (unit, work):
            start = clock()
            for _ in range(calls):
                each()
            times.append((clock() - start) / calls)
        ratios.append(times[1] / times[0])
        seconds.append(times[1])
    low, _, high = statistics.quantiles(ratios, n=4) if repeat > 1 else (ratios[0],) * 3
    return {
        "cost": statistics.median(ratios),
        "low": low,
        "high": high,
        "seconds": statistics.median(seconds),
    }


def steps_of_nuts(problem: Problem, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Trees of one depth with steps of one size, so that all take as many gradients."""
    u, clock = problem.vectors(1), CLOCKS[options.clock]
    depth, draws = (2, 2) if options.smoke else (6, 5)
    densities = {"Pyro's potential": None, "log_density": log_density(problem.model, (problem.x, problem.y))}
    for name, density in densities.items():

        def run(density: Any = density) -> None:
            pyro.set_rng_seed(1)
            kernel = RecordingNUTS(
                problem.model, density=density, step_size=1e-5, adapt_step_size=False, adapt_mass_matrix=False,
                max_tree_depth=depth,
            )  # fmt: skip
            MCMC(kernel, num_samples=draws, warmup_steps=0, disable_progbar=True).run(problem.x, problem.y)

        def unit() -> None:
            for _ in range(draws * 2**depth):
                problem.by_hand(u, problem.x, problem.y)

        found = measure(run, unit, 1, 1 if options.smoke else 5, clock)
        yield {"density": f"NUTS, {name}", **found, "seconds": found["seconds"] / (draws * 2**depth)}


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    clock, repeat = CLOCKS[options.clock], 1 if options.smoke else options.repeat
    for name in options.networks:
        number, calls = NETWORKS[name]
        problem = Problem(name, 40 if options.smoke else number)
        options.calls = 2 if options.smoke else calls
        for chains in (1, CHAINS):
            for what, work, unit in works(problem, chains):
                times = max(1, options.calls // chains)
                found = measure(work, unit, times, repeat, clock)
                yield {"network": name, "chains": chains, "density": what, **found,
                       "per_second": chains / found["seconds"]}  # fmt: skip
        for row in steps_of_nuts(problem, options):
            yield {"network": name, "chains": 1, **row, "per_second": 1 / row["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="small data, to see that everything runs")
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=tuple(NETWORKS))
    parser.add_argument("--repeat", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    found = []
    for row in rows(options):
        found.append(row)
        print(
            f"{row['network']:>10} {row['chains']:>3} chains  {row['density']:<28} {row['cost']:6.2f} "
            f"({row['low']:.2f} to {row['high']:.2f})  {row['per_second']:,.0f} gradients / s",
            flush=True,
        )
    if options.out is not None:
        versions = {k: importlib.metadata.version(k) for k in ("torch", "pyro-ppl")}
        head = {"threads": options.threads, "clock": options.clock, "versions": versions}
        options.out.write_text(json.dumps({**head, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
