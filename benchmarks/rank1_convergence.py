# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
The bound of rank-1 mixtures against time, for Adam and for stochastic L-BFGS.

    PYRO_BNN_DATA=../shared/data python benchmarks/rank1_convergence.py --out results.jsonl
    python benchmarks/rank1_convergence.py --smoke

Problems: one hidden layer of 50 units on a split of three UCI sets, from the MAP of ``uci.py``, factors N(1, 0.5²) with noise per
example, biases as points, the noise of the observations a parameter; and a perceptron 64-64-10 on 1,000 images of digits, from random weights,
with the default preset but noise per example. Four components. All runs of a problem start at the same parameters; losses are minus the bound (the mean of the
components' divergences) at the end, from 256 draws that no run has seen, in nats, with their standard error. Adam: each number of steps is a run of
its own (rate 0.01, cosine, divergence annealed over the first half). Seconds are those of the processor, without the MAP and the evaluation.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from uci import SETTINGS, SMALL
from uci_data import load
from uci_models import Member, rank1

from pyro_bnn.infer import LinearAnnealing, Mixture_ELBO, StochasticLBFGS, default_preset, fit
from pyro_bnn.model.parameters import local_parameters

ADAM, LBFGS = (800, 3200, 12800), (20, 40, 80, 160, 320)
#: Options of the optimiser and of the bound, by name.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "L-BFGS, antithetic pairs": ({}, {"num_particles": 2, "antithetic": True}),
    "two independent draws": ({}, {"num_particles": 2}),
    "memory of 10 pairs": ({"history_size": 10}, {"num_particles": 2, "antithetic": True}),
    "fixed draws": ({"max_iter": 800}, {"num_particles": 2, "antithetic": True}),
}

Problem = Callable[[], tuple[Any, Any, Any]]


def uci_problem(name: str) -> Problem:
    """A regression: its model, guide and data, the same at every call."""
    split = load(name, "standard", 0)
    data = split.x, split.y
    member = Member(split.x.shape[1], SETTINGS.get(name, SMALL)).fit(data, 0)

    def make() -> tuple[Any, Any, Any]:
        pyro.set_rng_seed(0)
        model, guide = rank1(member, data, "normal", rest="delta")
        return model, guide.initialize(*data), data

    return make


def digits_problem() -> tuple[Any, Any, Any]:
    """A classification of images: its model, guide and data, the same at every call."""
    pyro.set_rng_seed(0)
    digits = load_digits()
    data = torch.tensor(digits.data[:1000] / 16), torch.tensor(digits.target[:1000])
    preset = default_preset()
    net = preset.convert_(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)))

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    return model, preset.guide(model, noise="per_example").initialize(*data), data


def loss_of(model: Any, guide: Any, data: Any, draws: int) -> tuple[float, float]:
    """Minus the bound and its standard error, from draws of a seed of their own."""
    elbo = Mixture_ELBO(num_particles=4, antithetic=True)(model, guide)
    with torch.random.fork_rng(), torch.no_grad(), local_parameters():
        torch.manual_seed(77)
        values = torch.tensor([float(elbo(*data)) for _ in range(draws // 4)])
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def adam(make: Problem, steps: int, bound: dict[str, Any], draws: int) -> Iterator[dict[str, Any]]:
    """One run of Adam."""
    model, guide, data = make()
    start = time.process_time()
    fit(
        model,
        guide,
        data,
        num_steps=steps,
        optim=0.01,
        progress_bar=False,
        elbo=Mixture_ELBO(kl_scale=LinearAnnealing(steps // 2), **bound),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps, 5e-4),
    )
    seconds = time.process_time() - start
    loss, error = loss_of(model, guide, data, draws)
    yield {"steps": steps, "loss": loss, "error": error, "seconds": seconds}


def lbfgs(make: Problem, variant: str, marks: tuple[int, ...], draws: int) -> Iterator[dict[str, Any]]:
    """One run of stochastic L-BFGS, with its loss at some steps."""
    model, guide, data = make()
    optim, bound = VARIANTS[variant]
    found, spent = [], 0.0
    start = time.process_time()

    def look(state: Any) -> bool:
        nonlocal spent
        if state.step in marks:
            before = time.process_time()
            loss, error = loss_of(model, guide, data, draws)
            row = {"steps": state.step, "loss": loss, "error": error, "seconds": before - start - spent}
            found.append(row)
            spent += time.process_time() - before
        return False

    steps = marks[-1]
    if variant == "fixed draws":  # all iterations in one step
        marks, steps = (1,), 1
    fit(model, guide, data, num_steps=steps, optim=partial(StochasticLBFGS, **optim), elbo=Mixture_ELBO(**bound),
        callbacks=look, progress_bar=False)  # fmt: skip
    yield from found


def main() -> None:
    """Appends one line of JSON per run and mark; what the output holds is not run again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--problems", nargs="+", default=["yacht", "boston", "energy", "digits"])
    parser.add_argument("--methods", nargs="+", help="as the output calls them; all by default")
    parser.add_argument("--smoke", action="store_true", help="digits, a few steps")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    known = set()
    if options.out is not None and options.out.exists():
        known = {(r["problem"], r["method"]) for r in map(json.loads, options.out.read_text().splitlines())}
    draws = 8 if options.smoke else 256
    for problem in ["digits"] if options.smoke else options.problems:
        make = digits_problem if problem == "digits" else uci_problem(problem)
        runs = {
            f"Adam, {n:,} steps": partial(adam, make, n, {}, draws)
            for n in ((10,) if options.smoke else ADAM)
        }
        pairs = VARIANTS["L-BFGS, antithetic pairs"][1]
        n = 10 if options.smoke else ADAM[1]
        runs[f"Adam, {n:,} steps, antithetic pairs"] = partial(adam, make, n, pairs, draws)
        marks = (2, 4) if options.smoke else LBFGS
        variants = [
            v for v in VARIANTS if not (options.smoke and v == "fixed draws")
        ]  # which takes 800 iterations
        runs |= {variant: partial(lbfgs, make, variant, marks, draws) for variant in variants}
        for method, run in runs.items():
            wanted = options.methods is None or method in options.methods
            if (problem, method) in known or not wanted:
                continue
            for row in run():
                row = {"problem": problem, "method": method, **row, "torch": torch.__version__, "threads": 1}
                row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
                print(json.dumps(row), flush=True)
                if options.out is not None:
                    with options.out.open("a") as stream:
                        stream.write(json.dumps(row, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
