# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Mutation score of the mathematics: small random changes of the source, one at a time, and whether a fast test fails.

    python benchmarks/mutants.py [--count N] [--seed S] [--out FILE.json] [--smoke]

A line is drawn uniformly among those that can be changed in ``TARGETS``, then one of its changes: operators and
comparisons swapped, constants moved, signs flipped, terms and statements dropped, sums and means exchanged,
transposes, detachments and roots dropped, branches exchanged. Changed are copies of the files in a temporary directory.
The tests of a mutant are those of the fast suite that execute its line, cheapest first, up to the first failure and
at most ``--budget`` seconds of them: what survives that is reported as survived. A line that no test executes survives.
Which test executes which line is measured once (needs ``coverage``) and kept in ``--cache``, by the contents of files.

Mutants that cannot be told from the original are listed, each with the reason, in ``mutants_equivalent.json``; they
are passed over. A mutant that runs into the time limit counts as killed and is reported by itself.
"""

import argparse
import ast
import hashlib
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from mutants_changes import Mutant, draw

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
    "infer/hfl/*.py",
    *(f"infer/autoguide/{name}.py" for name in ("components", "outputs")),
    *(f"infer/predict/{name}.py" for name in ("density", "moments")),
    *(f"infer/mixture/{name}.py" for name in ("constant_priors", "elbo", "schedules", "terms")),
]  # fmt: skip
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


class Chosen:
    """A pytest plugin that keeps the wanted tests, in the given order, and notes the first failure."""

    def __init__(self, order: dict[str, float] | None) -> None:
        self.order, self.failed, self.ran = order, "", 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.order is not None:
            kept = [item for item in items if item.nodeid in self.order]
            items[:] = sorted(kept, key=lambda item: self.order[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran += report.when == "call"
        if report.failed and not self.failed:
            self.failed = report.nodeid


class Recorder:
    """A pytest plugin that says to coverage which test runs, and notes times and outcomes."""

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.seconds: dict[str, float] = {}
        self.passed: set[str] = set()
        self.failed: set[str] = set()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        start = time.process_time()
        yield
        self.seconds[item.nodeid] = round(time.process_time() - start, 4)
        self.coverage.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)
        if report.failed:
            self.failed.add(report.nodeid)


def in_fork(function: Any, *arguments: Any, cpu: float, root: Path) -> tuple[Any, bool]:
    """Runs a function in a child process in ``root``; returns its result, or whether time ran out."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(read)
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu) + 1, int(cpu) + 2))
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        os.chdir(root)
        sys.path.insert(0, str(root))
        try:
            result = function(*arguments)
        except BaseException as error:  # a mutant may end the process in any way
            result = {"error": repr(error)}
        with os.fdopen(write, "w") as pipe:
            pipe.write(json.dumps(result))
        os._exit(0)
    os.close(write)
    deadline = time.monotonic() + 20 * cpu
    os.set_blocking(read, False)
    text = b""
    while True:
        with suppress(BlockingIOError):
            piece = os.read(read, 1 << 20)
            if not piece:
                break
            text += piece
            continue
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, 9)  # the group that the child opened: itself and what its tests started
    os.waitpid(child, 0)
    os.close(read)
    return (json.loads(text), False) if text else (None, True)


def measure(part: str) -> dict[str, Any]:
    """Runs the tests of a file under coverage; by test, its seconds and the lines that it executes."""
    from coverage import Coverage

    coverage = Coverage(data_file=None, source=["pyro_bnn"], config_file=False)
    recorder = Recorder(coverage)
    coverage.start()
    pytest.main([part, "-q", "-m", "not slow", "-p", "no:cacheprovider"], plugins=[recorder])
    coverage.stop()
    data = coverage.get_data()
    tests: dict[str, Any] = {
        name: {"seconds": seconds, "lines": {}}
        for name, seconds in recorder.seconds.items()
        if name in recorder.passed - recorder.failed
    }
    imported: dict[str, list[int]] = {}
    for file in data.measured_files():
        name = str(Path(file).relative_to(Path.cwd()))
        for line, contexts in data.contexts_by_lineno(file).items():
            for context in contexts:
                if context in tests:
                    tests[context]["lines"].setdefault(name, []).append(line)
                elif not context:
                    imported.setdefault(name, []).append(line)
    return {"tests": tests, "imported": imported, "failed": sorted(recorder.failed)}


def digest(paths: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def owners(source: str) -> dict[int, str]:
    """By line, the qualified name of the innermost function around it; lines outside of functions are left out."""
    found: dict[int, str] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = f"{prefix}.{child.name}"
            if isinstance(child, ast.FunctionDef):
                found.update(dict.fromkeys(range(child.body[0].lineno, (child.end_lineno or 0) + 1), name))
            visit(child, name)

    visit(ast.parse(source), "")
    return found


def measured(root: Path, cache: Path, parts: list[str], *, stale: bool = False) -> dict[str, Any]:
    """
    The measurements of all parts of the suite, those of unchanged files from the cache; where they may be ``stale``, the
    latest of each part with these tests, however the package has changed since.
    """
    package = digest((root / "pyro_bnn").rglob("*.py"))
    found = {}
    cache.mkdir(parents=True, exist_ok=True)
    for part in parts:
        path = root / part
        key = package if path.is_dir() else package + digest([path])
        name = part.replace("/", ".")
        file, latest = cache / f"{name}-{key}.json", cache / f"{name}.json"
        if stale and latest.exists():
            kept = json.loads(latest.read_text())["digest"]
            file = latest if path.is_dir() or kept == digest([path]) else file
        if not file.exists():
            start = time.monotonic()
            result, late = in_fork(measure, part, cpu=3000, root=root)
            assert not late, f"{part} does not end"
            assert "error" not in result, f"{part}: {result}"
            names: dict[str, dict[int, str]] = {}
            for test in result["tests"].values():
                for path_, lines in test["lines"].items():
                    if path_ not in names:
                        names[path_] = owners((root / path_).read_text())
                    called = {names[path_][line] for line in lines if line in names[path_]}
                    test.setdefault("functions", {})[path_] = sorted(called)
            result["digest"] = "" if path.is_dir() else digest([path])
            for target in (file, latest):
                target.write_text(json.dumps(result))
            count, failed = len(result["tests"]), result["failed"]
            print(f"measured {part}: {count} tests, {time.monotonic() - start:.0f} s", *failed, flush=True)
        found[part] = json.loads(file.read_text())
    return found


class Suite:
    """Which tests execute which line, and what they cost."""

    def __init__(self, measurements: dict[str, Any], *, stale: bool = False) -> None:
        self.stale = stale
        self.seconds: dict[str, float] = {}
        self.functions: dict[tuple[str, str], list[str]] = {}
        self.lines: dict[tuple[str, int], list[str]] = {}
        self.files: dict[str, list[str]] = {}
        for found in measurements.values():
            for name, test in found["tests"].items():
                self.seconds[name] = test["seconds"]
                for file, lines in test["lines"].items():
                    self.files.setdefault(file, []).append(name)
                    for line in lines:
                        self.lines.setdefault((file, line), []).append(name)
                    for function in test["functions"][file]:
                        self.functions.setdefault((file, function), []).append(name)

    def of(self, mutant: Mutant, source: bytes, budget: float) -> dict[str, float]:
        """The tests of a mutant and their seconds, cheapest first."""
        owner = owners(source.decode()).get(mutant.line)
        if self.stale and owner is not None:
            # lines have moved; a function that is new is asked for by all the tests of its file
            names = self.functions.get((mutant.path, owner), self.files.get(mutant.path, []))
        elif owner is not None:
            names = self.lines.get((mutant.path, mutant.line), [])
            if len(names) < 3:  # perhaps executed on import, which only the first test of a process shows
                names = list(dict.fromkeys([*names, *self.files.get(mutant.path, [])]))
        else:  # constants of a module, defaults of arguments
            names = self.files.get(mutant.path, [])
        chosen, total = {}, 0.0
        for name in sorted(names, key=self.seconds.__getitem__):
            total += self.seconds[name]
            if chosen and total > budget:
                break
            chosen[name] = self.seconds[name]
        return chosen


def run_tests(order: dict[str, float]) -> dict[str, Any]:
    plugin = Chosen(order)
    files = list(dict.fromkeys(name.split("::")[0] for name in order))
    arguments = [*files, "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no"]
    code = pytest.main(arguments, plugins=[plugin])
    assert Path(sys.modules["pyro_bnn"].__file__ or "").is_relative_to(Path.cwd()), "another copy was tested"
    return {"code": int(code), "test": plugin.failed, "ran": plugin.ran}


# ---------------------------------------------------------------------- rounds


def copy_repository(target: Path) -> None:
    """The tracked and new files of the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())


def judge(root: Path, mutant: Mutant, suite: Suite, budget: float, stamp: int) -> dict[str, Any]:
    """Runs the tests of one mutant in the copy at ``root``."""
    path = root / mutant.path
    source = path.read_bytes()
    order = suite.of(mutant, source, budget)
    start = time.monotonic()
    result: dict[str, Any] = {"outcome": "survived", "tests": len(order), "by": ""}
    if order:
        try:
            path.write_bytes(mutant.apply(source))
            os.utime(path, (stamp, stamp))  # compiled files are told apart by their times
            found, late = in_fork(run_tests, order, cpu=60 + 3 * sum(order.values()), root=root)
        finally:
            path.write_bytes(source)
            os.utime(path, (stamp + 1, stamp + 1))
        if late:
            result["outcome"] = "timeout"
        elif found.get("code") != 0:
            result |= {"outcome": "killed", "by": found.get("test") or str(found)}
        elif found["ran"] < len(order):
            result["by"] = f"only {found['ran']} tests ran"
    before, after = mutant.lines(source)
    result |= {"seconds": round(time.monotonic() - start, 1), "diff": mutant.diff(source)}
    return {**asdict(mutant), "before": before, "after": after, **result}


def targets(root: Path) -> set[Path]:
    return {path for pattern in TARGETS for path in (root / "pyro_bnn").glob(pattern)}


def equivalents() -> dict[tuple[str, str, str], str]:
    listed = json.loads(EQUIVALENT.read_text()) if EQUIVALENT.exists() else []
    return {(e["path"], e["before"], e["after"]): e["reason"] for e in listed}


def play(options: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    files = [path for name in TESTS for path in (root / name).glob("test_*.py")]
    parts = sorted(str(p.relative_to(root)) for p in files if p.name not in LEFT_OUT)
    if options.smoke:
        parts = ["tests/ops/test_block_cg.py"]
    parts += [] if options.smoke else ["pyro_bnn"]
    suite = Suite(measured(root, Path(options.cache), parts, stale=options.stale), stale=options.stale)
    known, rows, stamp = equivalents(), [], int(time.time()) - 10**6
    earlier = json.loads(Path(options.judged).read_text())["mutants"] if options.judged else []
    killed = {
        (r["path"], r["before"], r["after"]): r for r in earlier if r["outcome"] in ("killed", "timeout")
    }
    for mutant in draw(root, targets(root), options.seed):
        source = (root / mutant.path).read_bytes()
        if options.smoke and mutant.path != "pyro_bnn/ops/block_cg.py":
            continue
        if options.only not in mutant.path:
            continue
        name = (mutant.path, *mutant.lines(source))
        reason = known.get(name)
        if reason is not None:
            rows.append(
                {**asdict(mutant), "outcome": "equivalent", "by": reason, "diff": mutant.diff(source)}
            )
            continue
        if sum(row["outcome"] != "equivalent" for row in rows) >= options.count:
            break
        if name in killed:
            rows.append(killed[name])
            continue
        stamp += 2
        rows.append(judge(root, mutant, suite, options.budget, stamp))
        row = rows[-1]
        print(
            f"{row['outcome']:9s} {row['seconds']:6.1f} s  {mutant.path}:{mutant.line}  {row['by']}",
            flush=True,
        )
        if row["outcome"] == "survived":
            print(f"{row['tests']} tests\n{row['diff']}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=150, help="non-equivalent mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of tests per mutant")
    parser.add_argument(
        "--stale", action="store_true", help="the latest measurements, by function instead of by line"
    )
    parser.add_argument(
        "--judged", help="results of an earlier run: mutants that were killed in it are not run again"
    )
    parser.add_argument("--only", default="", help="files whose path contains this")
    parser.add_argument("--cache", default=str(Path(tempfile.gettempdir()) / "pyro_bnn_mutants"))
    parser.add_argument("--out", help="write the results to this file")
    parser.add_argument("--smoke", action="store_true", help="five mutants of one file")
    options = parser.parse_args()
    if options.smoke:
        options.count = 5
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
