# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
The fast suite as ``mutants.py`` uses it: collected once, which test executes which line, and runs of some tests in forks.

A change inside of functions is made in a fork of the process that has collected the tests, by giving the live functions
the changed code; a change of anything else, such as a constant of a module, needs a process that imports the package anew.
"""

import ast
import gc
import hashlib
import importlib
import inspect
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
from mutants_changes import Mutant

COMMON = ("-q", "-m", "not slow", "-p", "no:cacheprovider", "--no-header", "--tb=no")
#: Plugins of other packages that are loaded before pytest knows of them.
LOADED = ("-W", "ignore::pytest.PytestAssertRewriteWarning")


# ------------------------------------------------------------------ processes


def in_fork(function: Any, *arguments: Any, cpu: float, root: Path, quiet: bool = True) -> tuple[Any, bool]:
    """Runs a function in a child process in ``root``; returns its result, or whether time ran out."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(read)
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu) + 1, int(cpu) + 2))
        if quiet:
            silence()
        os.chdir(root)
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
        time.sleep(0.01)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, 9)  # the group that the child opened: itself and what its tests started
    os.waitpid(child, 0)
    os.close(read)
    return (json.loads(text), False) if text else (None, True)


def silence() -> None:
    """Writes the output of this process to nowhere."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)


# ------------------------------------------------------------------- sessions


class Outcomes:
    """A pytest plugin that notes times and outcomes of tests and, while they run, tells coverage which one it is."""

    def __init__(self, coverage: Any = None) -> None:
        self.coverage = coverage
        self.seconds: dict[str, float] = {}
        self.passed: set[str] = set()
        self.failed: list[str] = []
        self.ran = 0

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if self.coverage is not None:
            self.coverage.switch_context(item.nodeid)
        start = time.process_time()
        yield
        self.seconds[item.nodeid] = round(time.process_time() - start, 4)
        if self.coverage is not None:
            self.coverage.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran += report.when == "call"
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)
        if report.failed:
            self.failed.append(report.nodeid)


class Session:
    """A pytest plugin that does something else with the collected tests than run them all."""

    def __init__(self, use: "Callable[[Session], Any]") -> None:
        self.use, self.found = use, None
        self.items: dict[str, pytest.Item] = {}
        self.functions: dict[tuple[str, str, int], list[FunctionType]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.config = session.config
        self.items = {item.nodeid: item for item in session.items}
        for found in gc.get_objects():
            if type(found) is FunctionType and "pyro_bnn" in found.__code__.co_filename:
                self.functions.setdefault(_key(found.__code__), []).append(found)
        gc.collect()
        gc.freeze()
        self.found = self.use(self)
        return True

    def run(self, names: Iterable[str], outcomes: Outcomes, *, first: bool) -> None:
        """Runs tests in this process, up to the first failure if wanted."""
        self.config.pluginmanager.register(outcomes)
        items = [self.items[name] for name in names if name in self.items]
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if first and outcomes.failed:
                return

    def replace(self, path: Path, old: bytes, new: bytes) -> bool:
        """Gives live functions the code of another source; ``False`` where more than functions change."""
        codes = [compile(text, str(path), "exec") for text in (old, new)]
        changes = list(_changes(*codes))
        if any(change is None for change in changes):
            return False
        for before, after in filter(None, changes):
            for function in self.functions.get(_key(before), []):
                if function.__code__ == before:
                    function.__code__ = after
        return True


def collect(root: Path, parts: list[str], use: Callable[[Session], Any]) -> Any:
    """Collects tests in this process, hands them on, and returns what is made of them."""
    sys.path.insert(0, str(root))
    session = Session(use)
    code = pytest.main([*parts, *COMMON, *LOADED], plugins=[session])
    if session.found is None:
        return {"failed": [f"collected with code {int(code)}"], "ran": 0}
    assert Path(sys.modules["pyro_bnn"].__file__ or "").is_relative_to(root), "another copy was tested"
    return session.found


def _key(code: CodeType) -> tuple[str, str, int]:
    return code.co_filename, code.co_qualname, code.co_firstlineno


def _inner(code: CodeType) -> list[CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _is_alike(old: CodeType, new: CodeType) -> bool:
    """Whether two codes are the same but for the functions and classes that are defined in them."""
    plain = [
        [(type(c), repr(c)) for c in code.co_consts if not isinstance(c, CodeType)] for code in (old, new)
    ]
    return old.co_code == new.co_code and old.co_names == new.co_names and plain[0] == plain[1]


def _changes(old: CodeType, new: CodeType) -> Iterator[tuple[CodeType, CodeType] | None]:
    """Pairs of codes of functions that differ; ``None`` where something else does."""
    inner = _inner(old), _inner(new)
    matched = [c.co_name for c in inner[0]] == [c.co_name for c in inner[1]]
    if old.co_flags & inspect.CO_OPTIMIZED:
        if old.co_freevars != new.co_freevars:
            yield None
        elif old != new:
            yield old, new
    elif not matched or not _is_alike(old, new):
        yield None
        return
    if matched:
        for pair in zip(*inner, strict=True):
            yield from _changes(*pair)


# --------------------------------------------------------------- measurements


def digest(*paths: Path) -> str:
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


def _measure(session: Session, part: str, root: Path) -> dict[str, Any]:
    """Runs the tests of a file under coverage; by test, its seconds and the lines and functions that it executes."""
    from coverage import Coverage

    coverage = Coverage(data_file=None, source=[str(root / "pyro_bnn")], config_file=False)
    outcomes = Outcomes(coverage)
    coverage.start()
    session.run([name for name in session.items if name.startswith(part)], outcomes, first=False)
    coverage.stop()
    kept = outcomes.passed - set(outcomes.failed)
    tests: dict[str, Any] = {
        name: {"seconds": outcomes.seconds[name], "lines": {}, "functions": {}} for name in kept
    }
    sources = {}
    data = coverage.get_data()
    for file in data.measured_files():
        name, names = str(Path(file).relative_to(root)), owners(Path(file).read_text())
        sources[name] = digest(Path(file))
        for line, contexts in data.contexts_by_lineno(file).items():
            for context in kept.intersection(contexts):
                tests[context]["lines"].setdefault(name, []).append(line)
                if line in names:
                    called = tests[context]["functions"].setdefault(name, [])
                    called += [] if names[line] in called else [names[line]]
    return {"tests": tests, "sources": sources, "failed": outcomes.failed}


def lines_of_import(root: Path) -> dict[str, list[int]]:
    """By file, the lines that an import of the package executes; changes there need a process that imports it anew."""
    from coverage import Coverage

    sys.path.insert(0, str(root))
    coverage = Coverage(data_file=None, source=[str(root / "pyro_bnn")], config_file=False)
    coverage.start()
    for path in sorted((root / "pyro_bnn").rglob("*.py")):
        with suppress(ImportError):  # of what is not installed
            importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
    coverage.stop()
    data = coverage.get_data()
    return {str(Path(file).relative_to(root)): data.lines(file) or [] for file in data.measured_files()}


def _cached(root: Path, cache: Path, part: str) -> tuple[Path, str]:
    path = root / part
    tests = [path] if path.is_file() else []
    return cache / f"{part.replace('/', '.')}.json", digest(*tests)


def measure(session: Session, root: Path, cache: Path, parts: list[str], say: Callable[..., None]) -> bool:
    """Measures parts of the suite, each in a fork, and keeps what was found."""
    for part in parts:
        start = time.monotonic()
        result, late = in_fork(_measure, session, part, root, cpu=3000, root=root, quiet=False)
        if late or "error" in result:
            say(f"{part} could not be measured: {result}")
            continue
        file, result["digest"] = _cached(root, cache, part)
        file.write_text(json.dumps(result))
        say(
            f"measured {part}: {len(result['tests'])} tests, {time.monotonic() - start:.0f} s",
            *result["failed"],
        )
    return True


def missing(root: Path, cache: Path, parts: list[str], *, known: bool = False) -> list[str]:
    """The parts that have no measurement, or one of other tests, which may do if ``known``."""
    cache.mkdir(parents=True, exist_ok=True)
    found = []
    for part in parts:
        file, tests = _cached(root, cache, part)
        if not file.exists() or (not known and json.loads(file.read_text()).get("digest") != tests):
            found.append(part)
    return found


class Suite:
    """
    Which tests execute which line, and what they cost. Where a source file has changed since a test was measured, it counts
    for the functions that it called, by their names, and for a function that nothing called where it was, also by a name alone:
    a test that is missed lets a mutant survive that the suite kills, never the reverse.
    """

    def __init__(self, root: Path, cache: Path, parts: list[str]) -> None:
        self.seconds: dict[str, float] = {}
        self.lines: dict[tuple[str, int], list[str]] = {}
        self.called: dict[tuple[str, str], list[str]] = {}
        self.named: dict[str, list[str]] = {}
        self.files: dict[str, list[str]] = {}
        current = {str(path.relative_to(root)): digest(path) for path in (root / "pyro_bnn").rglob("*.py")}
        for part in parts:
            file, _ = _cached(root, cache, part)
            found = json.loads(file.read_text()) if file.exists() else {"tests": {}, "sources": {}}
            fresh = {name for name, value in found.get("sources", {}).items() if current.get(name) == value}
            for name, test in found["tests"].items():
                self._add(name, test, fresh)

    def _add(self, name: str, test: dict[str, Any], fresh: set[str]) -> None:
        self.seconds[name] = test["seconds"]
        for file, lines in test["lines"].items():
            self.files.setdefault(file, []).append(name)
            for line in lines if file in fresh else ():
                self.lines.setdefault((file, line), []).append(name)
        for file, functions in test.get("functions", {}).items():
            for function in functions:
                self.named.setdefault(function, []).append(name)
                if file not in fresh:
                    self.called.setdefault((file, function), []).append(name)

    def of(self, mutant: Mutant, source: bytes, budget: float) -> dict[str, float]:
        """The tests of a mutant and their seconds, cheapest first, those of its line before those of its function."""
        owner = owners(source.decode()).get(mutant.line)
        exact = self.lines.get((mutant.path, mutant.line), []) if owner is not None else []
        names = list(exact)
        if owner is not None:
            names += self.called.get((mutant.path, owner), [])
            names += [] if len(names) >= 3 else self.named.get(owner, [])
        if len(names) < 3:  # constants of a module, defaults of arguments, what is executed on import
            names += self.files.get(mutant.path, [])
        chosen, total = {}, 0.0
        for name in sorted(dict.fromkeys(names), key=self.seconds.__getitem__):
            total += self.seconds[name]
            if chosen and total > budget:
                break
            chosen[name] = self.seconds[name]
        return chosen
