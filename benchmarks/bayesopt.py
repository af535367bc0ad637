# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Bayesian optimisation of three test functions with a small network as the surrogate, beside BoTorch's ``SingleTaskGP``.

Every method starts at the same scrambled Sobol points and takes one point at a time by ``LogExpectedImprovement``, whose
maximum ``optimize_acqf`` searches with the same settings. ``sobol`` goes on with Sobol points. The network has one hidden layer
of tanh units; after every observation it is fitted again from where it was, in rounds of L-BFGS steps and MacKay's updates of the
evidence (1992) for the precision of the weights of each site,

.. math:: \gamma_s = p_s - \alpha_s \operatorname{tr}_s P^{-1}, \qquad \alpha_s \leftarrow \gamma_s / |u_s|^2.

The functions have no noise, and the network is told so: 0.05 standard deviations of the outcomes. An update of the noise as well
takes a few points in many dimensions for nothing but noise, where the acquisition function vanishes. Nothing is tuned by the
regret. The score is the simple regret, the best value so far minus the minimum.

    python benchmarks/bayesopt.py --out benchmarks/results/bayesopt.json
    python benchmarks/bayesopt.py --table benchmarks/results/bayesopt.json > docs/source/tables/bayesopt.rst
"""

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import botorch
import pyro
import pyro.distributions as dist
import torch
from botorch.acquisition import LogExpectedImprovement
from botorch.exceptions import BotorchWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from botorch.optim import optimize_acqf
from botorch.test_functions import Ackley, Branin, Hartmann
from gpytorch.mlls import ExactMarginalLogLikelihood
from pyro.infer.autoguide import init_to_sample
from torch import Tensor

from pyro_bnn.contrib.botorch import surrogate
from pyro_bnn.infer.autoguide import AutoLaplace, AutoLaplaceMixture

#: Function, initial points, and points in all.
PROBLEMS = {
    "Branin": (lambda: Branin(), 5, 25),
    "Hartmann-6": (lambda: Hartmann(dim=6), 10, 40),
    "Ackley-10": (lambda: Ackley(dim=10), 15, 50),
}
HIDDEN = 20
COMPONENTS = 3
ROUNDS, STEPS = 3, 25
NOISE = 0.05
SEARCH: dict[str, Any] = {"num_restarts": 4, "raw_samples": 128, "options": {"maxiter": 50}}


class Network:
    """A network with the precisions of its weights, fitted around one mode or several."""

    def __init__(self, dim: int, components: int) -> None:
        self.shapes = {"weight": (HIDDEN, dim), "bias": (HIDDEN,), "out": (HIDDEN,)}
        self.scales = {"weight": 1.0, "bias": 1.0, "out": 1.0}
        options: dict[str, Any] = {"init_loc_fn": init_to_sample}
        self.guide: Any = (
            AutoLaplace(self.model, **options)
            if components == 1
            else AutoLaplaceMixture(self.model, components, **options)
        )
        self.parts = [self.guide] if components == 1 else list(self.guide.components)

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Inputs in the unit cube."""
        z = {
            name: pyro.sample(name, dist.Normal(torch.zeros(shape), self.scales[name]).to_event(len(shape)))
            for name, shape in self.shapes.items()
        }
        hidden = torch.tanh((2 * x - 1) @ z["weight"].mT + z["bias"])
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(hidden @ z["out"], NOISE), obs=y)

    def fit(self, x: Tensor, y: Tensor) -> None:
        """Rounds of steps on the weights and of updates of the precisions."""
        self.guide.initialize(x, y).to_point_estimate()
        for _ in range(ROUNDS):
            for part in self.parts:
                self._step(part.to_point_estimate(), (x, y))
                part.laplace_approximation((x, y), map_tolerance=float("inf"))
            self._update()
        for part in self.parts:
            self._step(part.to_point_estimate(), (x, y))
        self.guide.laplace_approximation((x, y), map_tolerance=float("inf"))

    def _step(self, part: AutoLaplace, data: tuple[Tensor, Tensor]) -> None:
        optimizer = torch.optim.LBFGS([part.loc], max_iter=STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            (loss,) = part.packed.losses(part.loc, data)
            loss.backward(inputs=[part.loc])
            return loss.detach()

        optimizer.step(closure)

    def _update(self) -> None:
        """MacKay's updates; several modes share their precisions, which are geometric means."""
        logs = torch.stack([self._log_scales(part) for part in self.parts]).mean(0)
        scales = logs.exp().clamp(0.1, 10.0).tolist()
        self.scales = dict(zip(self.shapes, scales, strict=True))

    def _log_scales(self, part: AutoLaplace) -> Tensor:
        """The updated logarithms of the scales of the sites, by one mode."""
        variances = part.packed.space.unpack(part.posterior.variance)
        found = []
        for name, value in part.median().items():
            gamma = value.numel() - float(variances[name].sum()) / self.scales[name] ** 2
            found.append(0.5 * torch.log(value.square().sum() / max(gamma, 1e-2)))
        return torch.stack(found)


def gaussian_process(x: Tensor, y: Tensor) -> Any:
    """BoTorch's default model, fitted as its documentation does."""
    model = SingleTaskGP(x, y, input_transform=Normalize(x.shape[-1]), outcome_transform=Standardize(1))
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


def network_model(components: int) -> Callable[[int], Callable[[Tensor, Tensor], Any]]:
    """Makes, for a number of inputs, the function that fits the network again."""

    def make(dim: int) -> Callable[[Tensor, Tensor], Any]:
        network = Network(dim, components)

        def fit(x: Tensor, y: Tensor) -> Any:
            outcomes = Standardize(1)
            network.fit(x, outcomes(y)[0].squeeze(-1))
            return surrogate(network.guide, outcome_transform=outcomes.eval())

        return fit

    return make


METHODS: dict[str, Callable[[int], Callable[[Tensor, Tensor], Any]] | None] = {
    "sobol": None,
    "SingleTaskGP": lambda dim: gaussian_process,
    "AutoLaplace": network_model(1),
    "AutoLaplaceMixture": network_model(COMPONENTS),
}


def run(problem: str, method: str, seed: int, smoke: bool) -> dict[str, Any]:
    """One optimisation; all points are in the unit cube, and the function is minimised."""
    make, start, budget = PROBLEMS[problem]
    budget = start + 2 if smoke else budget
    function: Any = make()
    dim, lower, upper = function.dim, *function.bounds
    torch.manual_seed(seed)
    pyro.clear_param_store()
    points = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(budget, dtype=torch.float64)
    began, maker = time.process_time(), METHODS[method]
    x = points if maker is None else points[:start]
    y = -function(lower + (upper - lower) * x).unsqueeze(-1)
    fit = None if maker is None else maker(dim)
    bounds = torch.stack([torch.zeros(dim), torch.ones(dim)])
    while fit is not None and len(x) < budget:
        acquisition = LogExpectedImprovement(fit(x, y), best_f=y.max())
        new, _ = optimize_acqf(acquisition, bounds, q=1, **SEARCH)
        x = torch.cat([x, new])
        y = torch.cat([y, -function(lower + (upper - lower) * new).unsqueeze(-1)])
    regrets = (-y.cummax(0).values.squeeze(-1) - function.optimal_value).tolist()
    return {
        "problem": problem,
        "method": method,
        "seed": seed,
        "initial": start,
        "budget": budget,
        "regret": regrets[-1],
        "regrets": [round(value, 6) for value in regrets],
        "cpu_seconds": round(time.process_time() - began, 2),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Median and quartiles of the simple regret after the budget, and CPU seconds of a run, as a table of the docs."""
    widths = (24, 20, 4, 8, 18, 9)
    rule = "  ".join("=" * width for width in widths)
    heads = ("problem", "method", "runs", "median", "quartiles", "CPU s")
    lines = [rule, _line(heads, widths), rule]
    for problem, (_, start, budget) in PROBLEMS.items():
        for method in METHODS:
            mine = [row for row in rows if row["problem"] == problem and row["method"] == method]
            if not mine:
                continue
            regret = torch.tensor([row["regret"] for row in mine], dtype=torch.float64)
            low, middle, high = regret.quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
            cost = sum(row["cpu_seconds"] for row in mine) / len(mine)
            name = f"{problem}, {start} + {budget - start}"
            cells = (name, method, str(len(mine)), f"{middle:.3g}", f"{low:.3g} to {high:.3g}", f"{cost:.1f}")
            lines.append(_line(cells, widths))
    return "\n".join([*lines, rule])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument(
        "--out", type=Path, help="append the rows to this JSON; those that are there are skipped"
    )
    parser.add_argument("--table", type=Path, help="print the table of this JSON, and run nothing")
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.filterwarnings(
        "ignore", category=UserWarning
    )  # of optimisers that stop at their number of steps
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    warnings.filterwarnings("ignore", category=BotorchWarning)  # of starts where nothing is expected
    rows = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    done = {(row["problem"], row["method"], row["seed"]) for row in rows}
    versions = {"threads": 1, "torch": torch.__version__, "pyro": pyro.__version__,
                "botorch": botorch.__version__, "python": platform.python_version()}  # fmt: skip
    for seed in range(1 if args.smoke else args.seeds):
        for problem in PROBLEMS:
            for method in METHODS:
                if (problem, method, seed) in done:
                    continue
                row = run(problem, method, seed, args.smoke)
                rows.append(row | versions)
                print(
                    f"{problem:<12}{method:<20}{seed:>3}  {row['regret']:.4g}  {row['cpu_seconds']} s",
                    flush=True,
                )
                if args.out:
                    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
