# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
What Hessian-free Laplace costs.

Parts:

methods         gradient equivalents and seconds per target of every method, with its error, by number of parameters
overhead        seconds of a solve over the seconds of the products in it
batch           targets in blocks against one by one
precondition    iterations to 1 % error with and without a preconditioner (5-32-1 tanh network, 40 targets)
scaling         seconds against 10^3 to 10^7 parameters, beside the dense GGN as far as it fits

Ratios are taken within one process; times are CPU seconds of one thread, medians over repetitions.

    python benchmarks/hfl_speed.py --out results.json
"""

import argparse
import bisect
import itertools
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_sample
from torch import Tensor

from pyro_bnn.curvature.accumulate import CurvatureAccumulator
from pyro_bnn.infer import hfl
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.infer.hfl import HFLWarning
from pyro_bnn.infer.hfl.loss import Problem
from pyro_bnn.infer.hfl.solver import Solver
from pyro_bnn.ops.block_cg import ConjugateBasis, block_conjugate_gradient, conjugate_gradient
from pyro_bnn.ops.jacobian import LinearMap, jacobian

DENSE_LIMIT = 4e9  # bytes of a p × p matrix


def network(inputs: int, hidden: tuple[int, ...], noise: float) -> Callable[..., Any]:
    """A tanh network with N(0, 1 / fan-in) weights (N(0, 1) for one hidden layer)."""
    widths = (inputs, *hidden, 1)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            scale = 1.0 if len(hidden) == 1 else fan_in**-0.5
            w = pyro.sample(f"w{i}", dist.Normal(torch.zeros(fan_out, fan_in), scale).to_event(2))
            b = pyro.sample(f"b{i}", dist.Normal(torch.zeros(fan_out), 1.0).to_event(1))
            x = x @ w.mT + b
            if i < len(hidden):
                x = torch.tanh(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x.squeeze(-1), noise), obs=y)

    return model


def problem(inputs: int, hidden: tuple[int, ...], n: int, *, polish: bool = True) -> tuple[AutoLaplace, Any]:
    pyro.set_rng_seed(0)
    x = torch.randn(n, inputs)
    y = torch.sin(x @ torch.randn(inputs)) + 0.1 * torch.randn(n)
    guide = AutoLaplace(network(inputs, hidden, 0.1), curvature="hessian", init_loc_fn=init_to_sample)
    guide.initialize(x, y)
    return (guide.polish((x, y)) if polish else guide), (x, y)


def timed(repeats: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[float, Any]:
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        value = function(*args, **kwargs)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds), value


def rows_and_reference(guide: AutoLaplace, data: Any, targets: Tensor) -> tuple[Tensor, Tensor, LinearMap]:
    """Gradients of the outputs, their exact variances, and products with the Hessian."""
    leaf = guide.loc.detach().clone().requires_grad_(True)
    J = jacobian(guide.packed.outputs(leaf, ((targets,), {}))[0].outputs.reshape(-1), leaf)
    accumulator = CurvatureAccumulator(guide.packed, guide.loc, "hessian")
    P = accumulator.matrix(data)
    return J, (J * torch.linalg.solve(P, J.mT).mT).sum(-1), accumulator.operator(data)


def methods(smoke: bool, only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    cases = [(1, (16,), 30, 12), (5, (32,), 200, 32)]
    for inputs, hidden, n, m in cases[: 1 if smoke else None]:
        guide, data = problem(inputs, hidden, n)
        targets = torch.randn(m, inputs)
        _, exact, _ = rows_and_reference(guide, data, targets)
        runs: dict[str, dict[str, Any]] = {
            "cg": {"tolerance": 1e-3},
            "cg, nystrom": {"tolerance": 1e-3, "preconditioner": "nystrom"},
            "one_sided": {"method": "one_sided", "epsilon": 1e-3, "check": False},
            "central": {"method": "central", "epsilon": 1e-3, "check": False},
            "paired": {"method": "paired", "preconditioner": "nystrom", "num_epochs": 120},
            "probe": {"method": "probe", "tolerance": 1e-3, "num_probes": 16 if inputs == 1 else 128},
        }
        many = torch.randn(500, inputs)  # probes are for whole test sets
        batches = [tuple(v[i::4] for v in data) for i in range(4)]
        _, exact_many, _ = rows_and_reference(guide, data, many)
        for name, options in runs.items():
            if only and name not in only:
                continue
            at, expected = (many, exact_many) if name == "probe" else (targets, exact)
            if name == "paired" and guide.loc.shape[0] > 100:
                at, expected = targets[:4], exact[:4]  # minutes for all
            source = batches if name == "paired" else data
            repeats = 1 if smoke or name == "paired" else 3
            seconds, result = timed(repeats, hfl.solve, guide, source, (at,), **options)
            error = (result.variances / expected - 1).abs()
            yield {
                "method": name,
                "parameters": guide.loc.shape[0],
                "targets": len(at),
                "gradient_equivalents_per_target": result.gradient_equivalents / len(at),
                "seconds_per_target": seconds / len(at),
                "max_relative_error": float(error.max()),
                "median_relative_error": float(error.median()),
                "reaches_one_percent": bool(error.max() <= 0.01),
            }
        if guide.loc.shape[0] < 100 and not only:
            score = hfl.regvar(guide, batches, (targets,), num_epochs=100, calibrate=m)
            yield {
                "method": "regvar",
                "parameters": guide.loc.shape[0],
                "targets": m,
                "spread_of_log_ratio": score.spread,
                "rank_correlation": score.rank_correlation,
            }


def overhead(smoke: bool) -> Iterator[dict[str, Any]]:
    sizes = (((32,), 200), ((256,), 500), ((128, 128), 500), ((128, 128), 2000))
    for (hidden, n), m in itertools.product(sizes[: 1 if smoke else None], (1, 32)):
        guide, data = problem(5, hidden, n, polish=False)
        operator = CurvatureAccumulator(guide.packed, guide.loc, "ggn").operator(data)
        rhs = torch.randn(m, guide.loc.shape[0])
        inside = 0.0

        def counted(v: Tensor, operator: LinearMap = operator) -> Tensor:
            nonlocal inside
            start = time.process_time()
            image = operator(v)
            inside += time.process_time() - start
            return image

        for name, solver in (("single", conjugate_gradient), ("block", block_conjugate_gradient)):
            ratios = []
            for _ in range(5):
                inside = 0.0
                start = time.process_time()
                solver(counted, rhs, tolerance=1e-6, max_iter=30)
                ratios.append((time.process_time() - start) / inside)
            yield {
                "solver": name,
                "parameters": guide.loc.shape[0],
                "n": n,
                "targets": m,
                "total_over_products": statistics.median(ratios),
                "spread": max(ratios) - min(ratios),
            }


def one_by_one(guide: AutoLaplace, data: Any, targets: Tensor, **options: Any) -> list[hfl.HFLResult]:
    """Every target in a Krylov space of its own."""
    return [hfl.solve(guide, data, (row[None],), **options) for row in targets]


def batch(smoke: bool) -> Iterator[dict[str, Any]]:
    for hidden, m in ((32, 32), (128, 32), (32, 500))[: 1 if smoke else None]:
        guide, data = problem(5, (hidden,), 200, polish=False)
        targets = torch.randn(m, 5)
        ratios = []
        for _ in range(1 if smoke else 3):
            options = {"curvature": "ggn", "tolerance": 1e-4}
            together, block = timed(1, hfl.solve, guide, data, (targets,), **options)
            alone, single = timed(1, one_by_one, guide, data, targets, **options)
            ratios.append(alone / together)
        yield {
            "parameters": guide.loc.shape[0],
            "targets": m,
            "speedup": statistics.median(ratios),
            "spread": max(ratios) - min(ratios),
            "products_block": block.products,
            "products_one_by_one": sum(result.products for result in single),
            "max_relative_difference": float(
                (block.variances / torch.stack([result.variances[0] for result in single]) - 1).abs().max()
            ),
        }


def precondition(smoke: bool) -> Iterator[dict[str, Any]]:
    guide, data = problem(5, (32,), 200)
    targets = torch.randn(40, 5)
    J, exact, operator = rows_and_reference(guide, data, targets)
    source = Solver(Problem(guide.packed, guide.loc, data, "hessian"), tolerance=1e-6)
    choices: dict[str, tuple[LinearMap | None, int]] = {"none": (None, 0)}
    for name, rank in (("diagonal", 0), ("nystrom", 32), ("nystrom", 64), ("nystrom", 96)):
        choices[f"nystrom, rank {rank}" if rank else name] = (source.resolve(name, rank), 2 * rank)
    for structure in ("kronecker", "block", "full"):
        other = AutoLaplace(guide.model, structure=structure, curvature="ggn").initialize(*data)
        other.loc.data.copy_(guide.loc.data)
        other.laplace_approximation(data, map_tolerance=float("inf"))
        choices[f"Laplace guide, {structure} GGN"] = (source.resolve(other, 0), 0)
    for name, (M, setup) in choices.items():
        for solver in ("single", "block"):
            grid = range(2, 200) if solver == "block" else [round(10 * 1.1**k) for k in range(54)]
            solve = conjugate_gradient if solver == "single" else block_conjugate_gradient

            def run(iterations: int, solve: Any = solve, M: LinearMap | None = M) -> Any:
                return solve(operator, J, tolerance=1e-12, max_iter=iterations, preconditioner=M)

            def good(iterations: int, run: Any = run) -> bool:
                error = (J * run(iterations).solution).sum(-1) / exact - 1
                return bool(error.abs().max() <= 0.01)

            # early stops are monotone lower bounds, so that bisection finds the first good one
            iterations = grid[bisect.bisect_left(grid, True, key=good)]
            result = run(iterations)
            products = result.products if solver == "block" else int(result.iterations.sum())
            yield {
                "preconditioner": name,
                "solver": solver,
                "parameters": guide.loc.shape[0],
                "targets": len(J),
                "iterations": iterations,
                "products": products,
                "setup_products": setup,
            }


def dense(guide: AutoLaplace, data: Any, rows: Tensor) -> Tensor:
    """Displacements by the Cholesky factor of the p × p matrix."""
    P = CurvatureAccumulator(guide.packed, guide.loc, "ggn").matrix(data)
    return torch.cholesky_solve(rows.mT, torch.linalg.cholesky(P))


def scaling(smoke: bool) -> Iterator[dict[str, Any]]:
    torch.set_default_dtype(torch.float32)
    sizes = [(20, 24, 20), (20, 45, 45), (20, 90, 90), (50, 290, 290), (100, 940, 940), (200, 3050, 3050)]
    n = 256
    for inputs, *hidden in sizes[: 2 if smoke else None]:
        m = 2 if hidden[0] > 1000 else 8  # memory is O(p m)
        pyro.set_rng_seed(0)
        x, y = torch.randn(n, inputs), torch.randn(n)
        guide = AutoLaplace(network(inputs, tuple(hidden), 0.5), curvature="ggn", init_loc_fn=init_to_sample)
        guide.initialize(x, y)
        p = guide.loc.shape[0]
        targets = (torch.randn(m, inputs),)
        options = {
            "curvature": "ggn",
            "tolerance": 1e-2,
            "preconditioner": "prior",
            "chunk_size": 256 if p < 1e5 else 4,
            "map_tolerance": float("inf"),
        }
        seconds, result = timed(1 if p > 1e5 else 3, hfl.solve, guide, (x, y), targets, **options)
        kept = min(ConjugateBasis(p).capacity, result.products)
        row = {
            "parameters": p,
            "targets": m,
            "n": n,
            "seconds_hfl": seconds,
            "gradient_equivalents_per_target": result.gradient_equivalents / m,
            "seconds_per_target": seconds / m,
            "seconds_gradient": timed(3, guide.negative_log_joint, (x, y))[0],
            "megabytes_hfl": (2 * kept + (2 + 6) * (m + 1)) * p * 4 / 1e6,
            "megabytes_dense": 4 * p**2 / 1e6,
        }
        if 4 * p**2 < DENSE_LIMIT:
            row["seconds_dense"], solution = timed(1, dense, guide, (x, y), result.gradients)
            row["max_relative_error"] = float(
                (result.variances / (result.gradients * solution.mT).sum(-1) - 1).abs().max()
            )
        yield row
    torch.set_default_dtype(torch.float64)


def main() -> None:
    parts: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
        "methods": methods,
        "overhead": overhead,
        "batch": batch,
        "precondition": precondition,
        "scaling": scaling,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--methods", nargs="+", default=[], help="of the first part; default all")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # CPU seconds are those of one thread
    warnings.simplefilter("ignore", HFLWarning)
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    rows: list[dict[str, Any]] = []
    for part in args.parts:
        options = {"only": args.methods} if part == "methods" else {}
        for row in parts[part](args.smoke, **options):
            rows.append({"part": part, **row, **versions})
            print({k: v for k, v in rows[-1].items() if k not in versions}, flush=True)
            if args.out:
                args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
