# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Random programs, each under a few random operations against plain references: how many are right, refused by name,
unclear (an error that names nothing of the program), wrong, not finite.

    python benchmarks/fuzz.py [--cases N] [--seed S] [--case SEED] [--smoke] [--out FILE.json]

A case is a program, made from the number that is printed with it; ``--case`` runs it again, all operations if
``--operations 0``.
"""

import argparse
import json
import logging
import sys
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.properties.checks import check, worst  # noqa: E402
from tests.properties.generator import spec_of_seed  # noqa: E402


def main() -> None:
    """Runs the cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000, help="number of programs")
    parser.add_argument("--seed", type=int, default=0, help="number of the first program")
    parser.add_argument("--case", type=int, help="run this program only, and say what comes out")
    parser.add_argument(
        "--operations", type=int, default=3, help="operations for each program; 0 for all that apply"
    )
    parser.add_argument("--smoke", action="store_true", help="twenty programs")
    parser.add_argument("--out", help="write the counts and all cells that are not right to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    most = options.operations or 1000
    seeds = [options.case] if options.case is not None else range(options.seed, options.seed + options.cases)
    seeds = list(seeds)[:20] if options.smoke else list(seeds)
    cases: Counter[str] = Counter()
    cells: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    rows = []
    start = time.perf_counter()
    for seed in seeds:
        spec = spec_of_seed(seed)
        try:
            found = check(spec, most=most)
        except KeyboardInterrupt:  # what is done counts
            break
        cases[worst(found)] += 1
        if sum(cases.values()) % 500 == 0:
            print(f"{sum(cases.values())} programs: {dict(cases)}", file=sys.stderr, flush=True)
        cells.update(v.outcome for v in found.values())
        for operation, verdict in found.items():
            if verdict.outcome == "refused":
                refusals[f"{operation}: {verdict.message[:90]}"] += 1
            if options.case is not None or not verdict.is_right:
                print(f"--case {seed} | {operation} | {verdict}"[:500], f"| {spec}", flush=True)
                rows.append({"case": seed, "operation": operation, "outcome": verdict.outcome,
                             "message": verdict.message, "program": str(spec)})  # fmt: skip
    seconds = time.perf_counter() - start
    print(
        f"{sum(cases.values())} programs in {seconds:.0f} s: {dict(cases)}; {sum(cells.values())} operations: {dict(cells)}"
    )
    for message, count in refusals.most_common(15):
        print(f"  refused {count} times: {message}")
    if options.out:
        result = {"cases": sum(cases.values()), "first": seeds[0], "seconds": round(seconds), "programs": dict(cases),
                  "operations": dict(cells), "refusals": dict(refusals.most_common(30)), "rows": rows,
                  "torch": torch.__version__, "threads": 1}  # fmt: skip
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
