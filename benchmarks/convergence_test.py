# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
How often the convergence test of fit calls stationary losses falling or diverging, in any check of a run.

    python benchmarks/convergence_test.py [--smoke] [--out FILE.json]

Losses are an autoregression of order one with noise of Student's t distribution (5 degrees of freedom), alone or with
as much white noise on top, as minibatches add it to a slowly wandering loss. ``power`` is the rate at which the third
check calls a linear fall by twice the standard deviation of the losses within the window falling.
"""

import argparse
import json
import math
import platform
from pathlib import Path

import numpy as np
from scipy.signal import lfilter

from pyro_bnn.infer import ConvergenceTest


def stationary(rng: np.random.Generator, correlation: float, white: float, size: int) -> np.ndarray:
    """Losses of variance one: an autoregression, and white noise with the share ``white`` of the variance."""
    noise = rng.standard_t(5, size=size + 500) * math.sqrt(3 / 5)
    slow = lfilter([1.0], [1.0, -correlation], noise)[500:] * math.sqrt(1 - correlation**2)
    return math.sqrt(1 - white) * slow + math.sqrt(white) * rng.normal(size=size)


def rates(
    correlation: float, white: float, runs: int, window: int, checks: int = 20, seed: int = 0
) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    test = ConvergenceTest(window=window, alpha=0.05)
    counts = {"falling": 0, "diverging": 0, "power": 0}
    fall = 2 * np.linspace(0, 1, window)
    for _ in range(runs):
        losses = stationary(rng, correlation, white, checks * window)
        found = {test.check(losses[j * window : (j + 1) * window], j + 1) for j in range(checks)}
        for wrong in ("falling", "diverging"):
            counts[wrong] += wrong in found
        counts["power"] += test.check(losses[:window] - fall, 3) == "falling"
    return {name: count / runs for name, count in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs, window = (20, 100) if options.smoke else (1000, 400)
    rows = []
    cases = [(0.0, 0.0), (0.8, 0.0), (0.95, 0.0), (0.98, 0.0), (0.9, 0.5), (0.95, 0.5)]
    for correlation, white in cases:
        found = rates(correlation, white, runs, window)
        rows.append(
            {
                "correlation": correlation,
                "white": white,
                "runs": runs,
                "window": window,
                "checks": 20,
                "seed": 0,
            }
            | {"alpha": 0.05, "python": platform.python_version(), "numpy": np.__version__, **found}
        )
        print(rows[-1])
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
