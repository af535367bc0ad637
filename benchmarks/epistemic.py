# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Epistemic uncertainty with a known answer: targets drawn from a Gaussian process with a known kernel on the inputs of the UCI sets,
whose posterior variance is a closed form (in the style of arXiv 2608.05995).

    PYRO_BNN_DATA=../shared/data python benchmarks/epistemic.py --out benchmarks/results/epistemic.jsonl
    python benchmarks/epistemic.py --smoke
    python benchmarks/epistemic.py --tables

The function has the kernel exp(-|x - x'|² / 2 D) of D standardised inputs, the noise a standard deviation of 0.1. At most 800 training and 400 test
rows, at random. Every posterior of ``uci.py`` is fitted as there, without knowledge of the kernel or the noise. Reported for the variance
of the function at the test inputs: Spearman's rank correlation with the oracle's variance; the median ratio of the standard deviations; the share
of true function values within 1.96 standard deviations of the predicted mean, and the oracle's; the root mean squared error of the mean.
"""

import argparse
import json
import time
import warnings
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import torch
from scipy.stats import spearmanr
from torch import Tensor
from uci import METHODS, SETTINGS, SMALL, SMOKE, Fits
from uci_data import SETS, Split, load
from uci_tables import RESULTS, cell, write

NOISE = 0.1
ROWS = 800, 400
LEFT_OUT = ("NUTS", "mean-field VI", "rank-1 Gaussian", "rank-1 Cauchy")


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """The covariance of the function at two sets of inputs, (N, D) and (M, D)."""
    return (-0.5 * torch.cdist(a, b).square() / a.shape[1]).exp()


def draw(name: str, kind: str, number: int) -> tuple[Split, Tensor, Tensor, Tensor]:
    """A split with targets of the process, the function at its test inputs, and the oracle's mean and variance there."""
    split = load(name, kind, number)
    generator = torch.Generator().manual_seed(number)
    x, x_test = (
        v[torch.randperm(len(v), generator=generator)[:n]]
        for v, n in zip((split.x, split.x_test), ROWS, strict=True)
    )
    both = torch.cat([x, x_test])
    root = torch.linalg.cholesky(kernel(both, both) + 1e-8 * torch.eye(len(both)))
    f = root @ torch.randn(len(both), generator=generator, dtype=both.dtype)
    y = f[: len(x)] + NOISE * torch.randn(len(x), generator=generator, dtype=both.dtype)
    gram = torch.linalg.cholesky(kernel(x, x) + NOISE**2 * torch.eye(len(x)))
    cross = torch.linalg.solve_triangular(gram, kernel(x, x_test), upper=False)
    mean = cross.T @ torch.linalg.solve_triangular(gram, y[:, None], upper=False).squeeze(-1)
    variance = (1 - cross.square().sum(0)).clamp(min=1e-10)
    return Split(x, y, x_test, f[len(x) :], 1.0), f[len(x) :], mean, variance


def compare(mean: Tensor, variance: Tensor, f: Tensor, oracle: Tensor) -> dict[str, float]:
    """The scores of a mean and an epistemic variance, both of shape (N,)."""
    within = (f - mean).abs() <= 1.96 * variance.sqrt()
    correlation = 0.0 if variance.std() == 0 else spearmanr(variance.numpy(), oracle.numpy()).statistic
    return {
        "rank_correlation": float(correlation),
        "sd_ratio": float((variance / oracle).sqrt().median()),
        "coverage": float(within.double().mean()),
        "rmse": float((f - mean).square().mean().sqrt()),
    }


def run(
    name: str, kind: str, number: int, methods: list[str], overrides: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows of one split."""
    split, f, mean, variance = draw(name, kind, number)
    found = [{"method": "oracle", **compare(mean, variance, f, variance)}]
    settings = replace(
        SETTINGS.get(name, SMALL), hidden=50, epochs=0, rounds=10, iterations=100, collapse="net.2"
    )
    fits = Fits(split, replace(settings, **overrides), seed=number)
    for method in methods:
        pyro.clear_param_store()
        fits.prepare(method)
        pyro.set_rng_seed(number)
        start = time.process_time()
        prediction = METHODS[method](fits)
        row = compare(prediction.mean.mean(0), prediction.epistemic.clamp(min=0), f, variance)
        found.append({"method": method, **row, "seconds": time.process_time() - start})
    about = {"set": name, "kind": kind, "split": number, "n": len(split.x), "torch": torch.__version__}
    return [
        about | {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()} for row in found
    ]


def tables(path: Path) -> None:
    """Means over the splits of each set, and over the sets."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        cells[row["method"], row["set"]].append(row)
        cells[row["method"], "all"].append(row)
    methods, sets = (list(dict.fromkeys(row[key] for row in rows)) for key in ("method", "set"))
    usual = {name: len(cells["oracle", name]) for name in [*sets, "all"]}
    for key in ("rank_correlation", "sd_ratio", "coverage"):
        table = [["", *sets, "all"]]
        table += [[m, *(cell(cells[m, n], key, 2, usual[n]) for n in [*sets, "all"])] for m in methods]
        write(f"epistemic_{key}", table)


def main() -> None:
    """Appends the rows that the output does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--kinds", nargs="+", default=["standard"], choices=["standard", "gap"])
    parser.add_argument("--splits", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--methods", nargs="+", default=[m for m in METHODS if m not in LEFT_OUT], choices=METHODS
    )
    parser.add_argument("--smoke", action="store_true", help="yacht, small fits")
    parser.add_argument("--tables", action="store_true", help="the tables of the documentation")
    args = parser.parse_args()
    if args.tables:
        tables(RESULTS / "epistemic.jsonl")
        return
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    known = set()
    if args.out is not None and args.out.exists():
        rows = map(json.loads, args.out.read_text().splitlines())
        known = {(row["set"], row["kind"], row["split"], row["method"]) for row in rows}
    for number in args.splits:
        for kind in args.kinds:
            for name in ["yacht"] if args.smoke else args.sets:
                wanted = [m for m in args.methods if (name, kind, number, m) not in known]
                if not wanted:
                    continue
                found = run(name, kind, number, wanted, SMOKE if args.smoke else {})
                found = [row for row in found if (name, kind, number, row["method"]) not in known]
                lines = [json.dumps(row, separators=(",", ":")) for row in found]
                print("\n".join(lines), flush=True)
                if args.out is not None:
                    with args.out.open("a") as stream:
                        stream.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
