# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
The UCI benchmark with noise from gaps inside the training part, for every method.

The evidence, and the bound of the variational methods, choose the noise that fits the training data; across a gap the
errors are larger. Here every method is also fitted to parts of the training data that leave out the middle third along
another feature (``--inner`` of them), and the noise is chosen on the left-out rows, everything else as it is:

.. math:: \ell_g(\sigma) = \frac1{N_g} \sum_{n \in g} \log \frac1S \sum_s N(y_n; \mu_{gs}(x_n), v_{gs}(x_n) + \sigma^2)

is the mean log likelihood of gap g, with v the variance of the function that draw or component s has (0 for point
estimates). Three rules: ``mean`` takes the noise of the largest mean of :math:`\ell_g` over gaps, ``worst`` that of the
largest minimum, and ``mixture`` predicts with equal weights under each gap's own best noise. The test rows are predicted by the
fit to the whole training part. Rows of the rule ``own`` are the same predictions with the method's own noise.

    PYRO_BNN_DATA=../shared/data python benchmarks/uci_noise.py --sets energy --out benchmarks/results/uci_noise.jsonl
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from uci import GAP_ROUNDS, METHODS, SETTINGS, SMALL, SMOKE, Fits, Prediction
from uci_data import SETS, Split, coverage, load, log_likelihood, number_of_splits
from uci_models import NOISE_FLOOR

from pyro_bnn.diagnostics import metrics

#: Standard deviations, in those of the targets.
GRID = torch.logspace(math.log10(NOISE_FLOOR), math.log10(3.0), 400, dtype=torch.float64)


def with_noise(prediction: Prediction, noise: Tensor) -> tuple[Tensor, Tensor]:
    """
    Means and variances with other noise.

    :param prediction: S components for N rows.
    :param noise: G standard deviations with equal weights.
    :return: shapes (G S, N).
    """
    variance = prediction.variance - prediction.noise + noise.square()[:, None, None]
    return prediction.mean.expand_as(variance).flatten(0, 1), variance.flatten(0, 1)


def rules(held_out: list[tuple[Prediction, Split]], grid: Tensor) -> dict[str, Tensor]:
    """
    The noise by the three rules.

    :param held_out: predictions of the left-out rows and the split that they belong to, per gap.
    :param grid: standard deviations in original units.
    :return: standard deviations in original units.
    """
    table = torch.tensor(
        [
            [
                log_likelihood(*with_noise(found, noise / split.scale), split.y_test, split.scale)
                for found, split in held_out
            ]
            for noise in grid[:, None]
        ]
    )
    return {
        "mean": grid[table.mean(1).argmax(0, keepdim=True)],
        "worst": grid[table.min(1).values.argmax(0, keepdim=True)],
        "mixture": grid[table.argmax(0)],
    }


def predict(method: str, fits: Fits, seed: int) -> Prediction:
    pyro.clear_param_store()
    fits.prepare(method)
    pyro.set_rng_seed(seed)
    return METHODS[method](fits)


def run(
    name: str, kind: str, number: int, methods: list[str], inner: int, smoke: bool
) -> Iterator[dict[str, Any]]:
    """The rows of one split."""
    outer = load(name, kind, number)
    settings = replace(SETTINGS.get(name, SMALL), targets=10_000)
    if kind == "gap":
        settings = replace(settings, rounds=GAP_ROUNDS)
    if smoke:
        settings = replace(settings, **SMOKE | {"targets": 10_000})
    parts = [load(name, kind, number, validate=True, gap=number + 1 + k) for k in range(inner)]
    fits = [Fits(split, settings, seed=1000 * number) for split in (*parts, outer)]
    for method in methods:
        start = time.process_time()
        *held_out, found = [predict(method, each, number) for each in fits]
        noises = rules(list(zip(held_out, parts, strict=True)), GRID * outer.scale)
        seconds = round(time.process_time() - start, 2)
        row = {
            "set": name,
            "kind": kind,
            "split": number,
            "method": method,
            "inner": inner,
            "seconds": seconds,
        }
        for rule, noise in {"own": None, **noises}.items():
            chosen = found[:2] if noise is None else with_noise(found, noise / outer.scale)
            used = found.noise.mean().sqrt()[None] if noise is None else noise / outer.scale
            yield row | {
                "noise_from": rule,
                "log_likelihood": log_likelihood(*chosen, outer.y_test, outer.scale),
                "coverage": coverage(*chosen, outer.y_test),
                "rmse": metrics.rmse(found.mean, outer.y_test) * outer.scale,
                "noise": [round(float(value), 5) for value in used],
                "torch": torch.__version__,
            }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="one split of yacht, small fits, three methods")
    parser.add_argument("--out", type=Path, help="append the rows to this file of JSON lines")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["energy", "naval"])
    parser.add_argument("--kinds", nargs="+", choices=("standard", "gap"), default=["gap"])
    parser.add_argument("--splits", nargs="+", type=int, help="their numbers; all by default")
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=[m for m in METHODS if m != "NUTS"]
    )
    parser.add_argument("--inner", type=int, default=3, help="gaps inside the training part")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.smoke:
        args.sets, args.splits, args.methods = ["yacht"], [0], ["MAP", "full Laplace", "mean-field VI"]
    done = set()
    if args.out and args.out.exists():
        rows = [json.loads(line) for line in args.out.read_text().splitlines()]
        done = {(row["set"], row["kind"], row["split"], row["method"]) for row in rows}
    for name in args.sets:
        for kind in args.kinds:
            for number in args.splits if args.splits is not None else range(number_of_splits(name, kind)):
                methods = [m for m in args.methods if (name, kind, number, m) not in done]
                for row in run(name, kind, number, methods, args.inner, args.smoke) if methods else ():
                    print(
                        f"{name:8s}{kind:9s}{number:3d}  {row['method']:20s}{row['noise_from']:9s}"
                        f"{row['log_likelihood']:9.3f} coverage {row['coverage']:.3f} noise {max(row['noise']):.3f}",
                        flush=True,
                    )
                    if args.out:
                        with args.out.open("a") as stream:
                            stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
