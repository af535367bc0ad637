# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Mutation score of the mathematics: small random changes of the source, one at a time, and whether a fast test fails.

    python benchmarks/mutants.py [--count N] [--seed S] [--only PATH] [--out FILE.json] [--smoke]

A line is drawn uniformly among those that can be changed in ``TARGETS``, then one of its changes: operators and
comparisons swapped, constants moved, signs flipped, terms and statements dropped, sums and means exchanged,
transposes, detachments and roots dropped, branches exchanged. The working tree is copied to a temporary directory; the
tests are collected there once, and each mutant is tried in a fork of that process (``mutants_suite.py``).
The tests of a mutant are those of the fast suite that execute its line, cheapest first, up to the first failure and
at most ``--budget`` seconds of them; what survives that is tried again with ``--again`` seconds of them. A line that no test
executes survives.
Which test executes which line is measured once (needs ``coverage``) and kept in ``--cache``, by file of tests; a change of
the package makes a measurement less precise, not wrong. ``--fresh`` measures everything again.

Mutants that cannot be told from the original are listed, each with the reason, in ``mutants_equivalent.json``; they
are passed over. A mutant that runs into the time limit counts as killed and is reported by itself.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mutants_changes import Mutant, draw
from mutants_suite import (
    Outcomes,
    Session,
    Suite,
    collect,
    in_fork,
    lines_of_import,
    measure,
    missing,
    owners,
)

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.json")
#: The mathematics. Left out: processes (ops/distributed.py), files, training loops, options of guides.
TARGETS = [
    "ops/[!d]*.py",
    "ops/fisher/*.py",
    "distributions/*.py",
    "curvature/*.py",
    "model/latent_space.py",
    "infer/evidence.py",
    "infer/hyperparameters.py",
    *(f"infer/sample/{name}.py" for name in ("joint", "evaluation", "log_density")),
    "infer/hfl/*.py",
    *(f"infer/autoguide/{name}.py" for name in ("components", "outputs")),
    *(f"infer/predict/{name}.py" for name in ("density", "moments")),
    *(f"infer/mixture/{name}.py" for name in ("constant_priors", "elbo", "schedules", "terms")),
]  # fmt: skip
#: Functions that choose how much is done at once: other numbers cost time or memory and give the same results, as tests of
#: chunks against the whole show. They are not changed.
COST = {
    ("pyro_bnn/curvature/stream.py", ".ExampleStream._choose_chunk"),
    ("pyro_bnn/curvature/stream.py", ".ExampleStream._count_kept"),
    ("pyro_bnn/curvature/jacobian.py", ".ExampleJacobian.floats_per_example"),
    ("pyro_bnn/curvature/jacobian.py", ".ExampleJacobian.largest_output"),
    ("pyro_bnn/curvature/linear_maps.py", "._chunks"),
}
#: Tests that are asked; those of diagnostics, tutorials and programs execute the mathematics, too, but check other things.
TESTS = ("tests/ops", "tests/distributions", "tests/infer", "tests/nn")
LEFT_OUT = (
    "test_distributed.py",
    "test_checkpoint.py",
    "test_persist.py",
    "test_lightning.py",
    "test_nuts.py",
)
#: What the tests import beside the package; loaded once, before mutants run in forks.
PRELOAD = (
    "torch", "pyro", "pyro.infer", "pyro.infer.autoguide", "pyro.infer.mcmc", "scipy.stats", "scipy.integrate",
    "scipy.optimize", "arviz", "arviz_stats", "xarray", "matplotlib.pyplot", "sklearn.datasets", "lightning",
    "torchmetrics", "h5netcdf", "h5py", "torch._dynamo",
)  # fmt: skip


# ---------------------------------------------------------------------- rounds

SAVED = os.dup(1)


def say(*lines: str) -> None:
    """Prints where this program was told to, whatever the tests do with their output."""
    os.write(SAVED, ("\n".join(lines) + "\n").encode())


def copy_repository(target: Path) -> None:
    """The tracked and new files of the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())


def targets(root: Path) -> set[Path]:
    return {path for pattern in TARGETS for path in (root / "pyro_bnn").glob(pattern)}


def equivalents() -> dict[tuple[str, str, str], str]:
    listed = json.loads(EQUIVALENT.read_text()) if EQUIVALENT.exists() else []
    return {(e["path"], e["before"], e["after"]): e["reason"] for e in listed}


def drawn(options: argparse.Namespace, root: Path) -> tuple[list[Mutant], list[dict[str, Any]]]:
    """The mutants to try, and rows for those that cannot be told from the original."""
    known, chosen, same = equivalents(), [], []
    for mutant in draw(root, targets(root), options.seed):
        if len(chosen) == options.count:
            break
        if options.only not in mutant.path:
            continue
        source = (root / mutant.path).read_bytes()
        if (mutant.path, owners(source.decode()).get(mutant.line)) in COST:
            continue
        reason = known.get((mutant.path, *mutant.lines(source)))
        if reason is None:
            chosen.append(mutant)
        else:
            same.append(row(mutant, source, outcome="equivalent", by=reason))
    return chosen, same


def row(mutant: Mutant, source: bytes, **more: Any) -> dict[str, Any]:
    before, after = mutant.lines(source)
    return {**asdict(mutant), "before": before, "after": after, "diff": mutant.diff(source), **more}


def attempt(session: Session, path: Path, source: bytes, changed: bytes, names: list[str]) -> dict[str, Any]:
    """Runs tests against changed functions, in a fork of the process that has collected them."""
    if not session.replace(path, source, changed):
        return {"anew": True}
    outcomes = Outcomes()
    session.run(names, outcomes, first=True)
    return {"failed": outcomes.failed, "ran": outcomes.ran}


def attempt_anew(root: Path, names: list[str]) -> Any:
    """Runs tests in a process that imports the package after a change of a file."""

    def use(session: Session) -> dict[str, Any]:
        outcomes = Outcomes()
        session.run(names, outcomes, first=True)
        return {"failed": outcomes.failed, "ran": outcomes.ran}

    return collect(root, list(dict.fromkeys(name.split("::")[0] for name in names)), use)


class Trial:
    """One mutant, its tests, and what became of it."""

    def __init__(self, root: Path, mutant: Mutant, suite: Suite, budget: float) -> None:
        self.root, self.mutant, self.suite, self.path = root, mutant, suite, root / mutant.path
        self.source = self.path.read_bytes()
        self.changed = mutant.apply(self.source)
        self.order: dict[str, float] = {}
        self.result: dict[str, Any] | None = {"outcome": "survived", "by": "no test"}
        self.seconds = 0.0
        self.ask(budget)

    def ask(self, budget: float) -> None:
        """Asks for so many seconds of tests, where the mutant has survived fewer."""
        order = self.suite.of(self.mutant, self.source, budget)
        if self.result and self.result["outcome"] == "survived" and len(order) > len(self.order):
            self.order, self.result = order, None
            self.cpu = 20 + 4 * sum(order.values())

    def in_session(self, session: Session) -> None:
        start = time.monotonic()
        arguments = (session, self.path, self.source, self.changed, list(self.order))
        found, late = in_fork(attempt, *arguments, cpu=self.cpu, root=self.root, quiet=False)
        if late or not found.get("anew"):
            self.judge(found, late, time.monotonic() - start)

    def anew(self, stamp: int) -> None:
        start = time.monotonic()
        try:
            self.path.write_bytes(self.changed)
            os.utime(self.path, (stamp, stamp))  # compiled files are told apart by their times
            found, late = in_fork(attempt_anew, self.root, list(self.order), cpu=self.cpu, root=self.root)
        finally:
            self.path.write_bytes(self.source)
            os.utime(self.path, (stamp + 1, stamp + 1))
        self.judge(found, late, time.monotonic() - start)

    def judge(self, found: Any, late: bool, seconds: float) -> None:
        outcome, by = "survived", ""
        if late:
            outcome = "timeout"
        elif found.get("failed") or "error" in found:
            outcome, by = "killed", found["failed"][0] if found.get("failed") else str(found)
        elif found["ran"] < len(self.order):
            by = f"only {found['ran']} tests ran"
        self.result, self.seconds = {"outcome": outcome, "by": by}, round(seconds, 1)
        say(f"{outcome:9s} {seconds:6.1f} s  {self.mutant.path}:{self.mutant.line}  {by}")
        if outcome == "survived":
            say(f"{len(self.order)} tests", self.mutant.diff(self.source))

    def row(self) -> dict[str, Any]:
        more = {"tests": len(self.order), "seconds": self.seconds, **(self.result or {})}
        return row(self.mutant, self.source, **more)


def play(options: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    files = [path for name in TESTS for path in (root / name).glob("test_*.py")]
    parts = [*sorted(str(p.relative_to(root)) for p in files if p.name not in LEFT_OUT), "pyro_bnn"]
    if options.smoke:
        parts = ["tests/ops/test_block_cg.py"]
    cache, stamp = Path(options.cache), int(time.time()) - 10**6
    todo = parts if options.fresh else missing(root, cache, parts, known=options.known)
    if todo:
        in_fork(collect, root, todo, lambda s: measure(s, root, cache, todo, say), cpu=1e6, root=root)
    suite = Suite(root, cache, parts)
    chosen, same = drawn(options, root)
    trials = [Trial(root, mutant, suite, options.budget) for mutant in chosen]
    imported, _ = in_fork(lines_of_import, root, cpu=600, root=root)

    def use(session: Session) -> list[Any]:
        for trial in trials:
            if trial.result is None and trial.mutant.line not in imported.get(trial.mutant.path, ()):
                trial.in_session(session)
        return [(trial.result, trial.seconds) for trial in trials]

    for budget in (options.budget, options.again):
        for trial in trials:
            trial.ask(budget)
        judged, _ = in_fork(collect, root, parts, use, cpu=1e6, root=root)
        assert isinstance(judged, list), f"the tests cannot be run: {judged}"
        for trial, (result, seconds) in zip(trials, judged, strict=True):
            trial.result, trial.seconds = result, seconds
        for trial in trials:
            if trial.result is None:
                trial.anew(stamp := stamp + 2)
    return [trial.row() for trial in trials] + same


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=150, help="non-equivalent mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of tests per mutant")
    parser.add_argument("--again", type=float, default=300.0, help="the same for those that survive that")
    parser.add_argument("--fresh", action="store_true", help="measure which tests execute which lines again")
    parser.add_argument("--known", action="store_true", help="measure only tests of files that never were")
    parser.add_argument("--only", default="", help="files whose path contains this")
    parser.add_argument("--cache", default=str(Path(tempfile.gettempdir()) / "pyro_bnn_mutants"))
    parser.add_argument("--out", help="write the results to this file")
    parser.add_argument("--smoke", action="store_true", help="five mutants of one file")
    options = parser.parse_args()
    if options.smoke:
        options.count, options.only = 5, "ops/block_cg.py"
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory).resolve()
        copy_repository(root)
        sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "benchmarks")]
        for name in PRELOAD:
            with suppress(ImportError):
                importlib.import_module(name)
        rows = play(options, root)
    counts = Counter(row["outcome"] for row in rows)
    total = sum(counts.values()) - counts["equivalent"]
    score = (counts["killed"] + counts["timeout"]) / total
    print(f"seed {options.seed}: {dict(counts)}, {score:.1%} of {total} killed")
    if options.out:
        summary = {"seed": options.seed, "count": total, "score": round(score, 4), **counts}
        Path(options.out).write_text(json.dumps({"summary": summary, "mutants": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
