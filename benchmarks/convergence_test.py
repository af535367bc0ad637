# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
How often the convergence test of fit calls stationary losses falling or diverging, in any check of a run.

    python benchmarks/convergence_test.py [--smoke] [--out FILE.json]

Losses are an autoregression of order one with noise of Student's t distribution (5 degrees of freedom).
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.signal import lfilter

from pyro_bnn.infer import ConvergenceTest


def false_alarms(
    correlation: float, runs: int, window: int, checks: int = 20, seed: int = 0
) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    test = ConvergenceTest(window=window, alpha=0.05)
    alarms = {"falling": 0, "diverging": 0}
    for _ in range(runs):
        noise = rng.standard_t(5, size=checks * window + 500)
        losses = lfilter([1.0], [1.0, -correlation], noise)[500:]
        found = {test.check(losses[j * window : (j + 1) * window], j + 1) for j in range(checks)}
        for wrong in alarms:
            alarms[wrong] += wrong in found
    return {name: count / runs for name, count in alarms.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs, window = (20, 100) if options.smoke else (1000, 400)
    rows = []
    for correlation in (0.0, 0.8, 0.95):
        found = false_alarms(correlation, runs, window)
        rows.append(
            {"correlation": correlation, "runs": runs, "window": window, "checks": 20, "seed": 0}
            | {"alpha": 0.05, "numpy": np.__version__, **found}
        )
        print(rows[-1])
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
