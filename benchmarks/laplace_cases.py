# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Size and largest errors of the table of Laplace cases: structure x curvature x likelihood x layer against dense
autograd in float64.

    python benchmarks/laplace_cases.py [--smoke] [--out FILE.json]

Errors are relative to the largest entry of the quantity; the tests assert 1e-8 entry by entry.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import pyro
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


class Counter:
    """Counts the cases that passed and failed."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest after each phase of a test."""
        if report.when == "call":
            self.outcomes.append(report.outcome)


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one network only")
    parser.add_argument("--out", help="write the rows to this file")
    options = parser.parse_args()
    counter = Counter()
    arguments = [str(ROOT / "tests/infer/test_laplace_cases.py"), "-q", "--rootdir", str(ROOT)]
    pytest.main(arguments + (["-k", "norm and poisson"] if options.smoke else []), plugins=[counter])
    errors = sys.modules["tests.infer.test_laplace_cases"].ERRORS
    rows = [
        {
            "quantity": quantity,
            "comparisons": len(found),
            "largest": max(found),
            "median": statistics.median(found),
            "cases": len(counter.outcomes),
            "failed": sum(outcome != "passed" for outcome in counter.outcomes),
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "threads": torch.get_num_threads(),
            "seed": 0,
        }
        for quantity, found in errors.items()
    ]
    print(f"{len(counter.outcomes)} cases, {rows[0]['failed'] if rows else 0} failed")
    for row in rows:
        print(
            f"{row['quantity']:24s} {row['comparisons']:5d} comparisons, largest error {row['largest']:.1e}"
        )
    if options.out:
        Path(options.out).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
