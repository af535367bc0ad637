# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Runs the matrix, compares it with what is known, and writes the page of the documentation.

    python -m tests.programs [--only PROGRAM ...] [--report FILE] [--write]
"""

import argparse
import json
import logging
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.programs.matrix import Verdict, load, run
from tests.programs.operations import OPERATIONS

Cells = dict[str, dict[str, Verdict]]

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs/source/exactness.rst"
REFUSED, FAILING = HERE / "refused.txt", HERE / "failing.txt"

HEAD = """Exact, or refused by name
=========================

Every cell of this page is a program times an operation, run by ``python -m tests.programs --write``: {programs} programs
as people write them (Pyro model, network and data, a few lines each, in ``tests/programs``), {cells} cells. A cell is
either *exact*, with the largest difference from a reference relative to the largest entry, or *refused* with an error that names
the site, module or argument that is the reason. No number is guessed.

References know nothing of this package: loops over components, draws and rows with plain Pyro handlers, dense autograd with one
backward pass per output, Fisher matrices by enumeration or quadrature over observations, densities of torch and scipy. Arithmetic is
float64 except where the name of a program says otherwise; tests assert 1e-8 (derivatives by one step of SGD: 1e-7; solves of Hessian-free
Laplace: 1e-6).

Of the cells {exact} are exact (median error {median:.0e}, largest {largest:.0e} in float64) and {refused} are refused.{failing}

When does a cell exist?
-----------------------

.. list-table::
   :header-rows: 1
   :widths: 24 9 8 8 12 39

   * - operation
     - programs
     - exact
     - refused
     - largest error (float32 included)
     - where it applies
"""


def read(path: Path) -> set[tuple[str, str]]:
    """Cells in a file, one per line: program, operation and, in the second file, what happens."""
    if not path.exists():
        return set()
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {(line.split(" | ")[0], line.split(" | ")[1]) for line in lines}


def table(names: list[str], cells: Cells) -> list[str]:
    """The rows of one kind of program: errors of what is exact, messages of what is refused."""
    lines = [".. list-table::", "   :class: stack exact", "   :header-rows: 1", "   :widths: 32 14 54", ""]
    lines += ["   * - program", "     - exact", "     - refused"]
    for name in names:
        found = cells[name]
        exact = [v.error for v in found.values() if v.outcome == "exact"]
        by_message: dict[str, list[str]] = {}
        for operation, v in found.items():
            if v.outcome != "exact":
                by_message.setdefault(short(v), []).append(operation)
        refused = [f"{'; '.join(operations)}: *{m}*" for m, operations in by_message.items()]
        lines += [f"   * - ``{name}``", f"     - {shown(exact)}"]
        lines += [f"     - * {refused[0]}" if refused else "     -"]
        lines += [f"       * {group}" for group in refused[1:]]
    return [*lines, ""]


def shown(errors: list[float]) -> str:
    """How many cells are exact, and their largest error."""
    return f"{len(errors)}\u00a0({max(errors):.0e})".replace("-", "\u2011") if errors else "0"


def short(verdict: Verdict) -> str:
    """A message of one line, safe in a table."""
    text = re.sub(r"/\S+/", "", str(verdict).removeprefix("refused: ").split(": ", 1)[-1])
    text = text.replace("\\", " ").replace("*", "·").replace("`", "'").replace("|", "/").replace("_", "\\_")
    return text if len(text) < 160 else text[:157].rstrip(" \\") + "..."


def write_page(cells: Cells, programs: dict[str, Any]) -> None:
    """Writes the page."""
    every = [(p, o, v) for p, found in cells.items() for o, v in found.items()]
    exact = [v.error for p, _, v in every if v.outcome == "exact" and programs[p].make().digits < 1e-6]
    count = Counter(v.outcome for *_, v in every)
    wrong = [f"{p}, {o}: {short(v)}" for p, o, v in every if not v.is_right]
    failing = (
        f" {len(wrong)} are neither, which is work to be done (``tests/programs/failing.txt``)."
        if wrong
        else ""
    )
    text = HEAD.format(
        programs=len(cells), cells=len(every), exact=count["exact"], refused=count["refused"], failing=failing,
        median=sorted(exact)[len(exact) // 2], largest=max(exact),
    )  # fmt: skip
    for name, operation in OPERATIONS.items():
        found = [found[name] for found in cells.values() if name in found]
        errors = [v.error for v in found if v.outcome == "exact"]
        text += (
            f"   * - {name}\n     - {len(found)}\n     - {len(errors)}\n"
            f"     - {sum(v.outcome == 'refused' for v in found)}\n     - {max(errors, default=0):.0e}\n     - {operation.rule}\n"
        )
    for kind in dict.fromkeys(p.kind for p in programs.values()):
        names = [n for n in cells if programs[n].kind == kind]
        module = __import__(f"tests.programs.{kind}", fromlist=[kind])
        title = kind.capitalize()
        text += f"\n{title}\n{'-' * len(title)}\n\n{(module.__doc__ or '').strip()}\n\n" + "\n".join(
            table(names, cells)
        )
    PAGE.write_text(text.rstrip() + "\n")


def merge(path: Path, cells: Cells, programs: dict[str, Any], keep: bool) -> Cells:
    """The cells of a file, with those of this run in their places; the file holds them afterwards."""
    old = json.loads(path.read_text()) if path.exists() else {}
    held = {p: {o: Verdict(*v) for o, v in found.items()} for p, found in old.items() if p in programs}
    held |= {p: (held.get(p, {}) if keep else {}) | found for p, found in cells.items()}
    ordered = {p: held[p] for p in programs if p in held}
    plain = {
        p: {o: (v.outcome, v.error, v.message) for o, v in found.items()} for p, found in ordered.items()
    }
    path.write_text(json.dumps(plain))
    return ordered


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=None, help="names of programs")
    parser.add_argument("--operation", default="", help="a part of the name of an operation")
    parser.add_argument("--cells", help="a file that holds all cells; those of this run replace its own")
    parser.add_argument("--report", help="write all cells that are not exact to this file, as JSON lines")
    parser.add_argument("--write", action="store_true", help="write the page and the lists of known cells")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    programs = load()
    cells: Cells = {}
    start = time.perf_counter()
    if options.report:
        Path(options.report).write_text("")
    for name, program in programs.items():
        if options.only is None or name in options.only:
            cells[name] = run(program, [o for o in OPERATIONS if options.operation in o])
            for operation, verdict in cells[name].items():
                if not verdict.is_right or options.only is not None:
                    print(f"{name} | {operation} | {verdict}"[:400], flush=True)
                if options.report and verdict.outcome != "exact":
                    row = {
                        "program": name,
                        "operation": operation,
                        "outcome": verdict.outcome,
                        "message": verdict.message,
                    }
                    with Path(options.report).open("a") as report:
                        report.write(json.dumps(row) + "\n")
    seconds = time.perf_counter() - start
    if options.cells:
        cells = merge(Path(options.cells), cells, programs, bool(options.operation))
    every = [(p, o, v) for p, found in cells.items() for o, v in found.items()]
    print(
        f"{len(cells)} programs, {len(every)} cells in {seconds:.0f} s: {dict(Counter(v.outcome for *_, v in every))}"
    )
    if options.write:
        write_page(cells, programs)
        refused = sorted((p, o) for p, o, v in every if v.outcome == "refused")
        REFUSED.write_text(
            "# cells that may refuse; all others are exact\n" + "".join(f"{p} | {o}\n" for p, o in refused)
        )
        failing = sorted((p, o, short(v), v.outcome) for p, o, v in every if not v.is_right)
        FAILING.write_text(
            "# cells that are neither exact nor refused by name: program, operation, what happens\n"
            + "".join(f"{p} | {o} | {outcome}: {what}\n" for p, o, what, outcome in failing)
        )
