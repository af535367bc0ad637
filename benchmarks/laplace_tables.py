# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Tables of ``laplace_speed.py`` for the documentation.

    python benchmarks/laplace_tables.py benchmarks/results/laplace_speed.json
"""

import json
import sys
from pathlib import Path
from typing import Any

NETWORKS = {"mlp": "MLP", "cnn": "CNN", "resnet": "ResNet"}
Row = dict[str, Any]


def cost(row: Row | None, part: str) -> str:
    """Median, and in brackets the smallest and largest of several runs."""
    found = (row or {}).get(part)
    if not isinstance(found, dict):
        return "–"
    text = f"{found['median']:.2g}" if found["median"] < 100 else f"{found['median']:.0f}"
    if found["repetitions"] > 1:
        text += f" ({found['smallest']:.2g}–{found['largest']:.2g})"
    return text


def megabytes(row: Row | None) -> str:
    found = (row or {}).get("memory, MB")
    return " / ".join(f"{max(found[part], 0):.0f}" for part in ("fit", "predict")) if found else "–"


def table(header: list[str], body: list[list[str]]) -> str:
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for cells in (header, *body):
        lines += [f"   {'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(cells)]
    return "\n".join(lines) + "\n"


def main() -> None:
    rows: list[Row] = json.loads(Path(sys.argv[1]).read_text())
    by_key = {(row["network"], row["structure"], row["library"]): row for row in rows}
    header = ["structure", "fit", "100 evaluations", "predict 1,000", "memory, MB",
              "laplace-torch: fit", "100 evaluations", "predict 1,000"]  # fmt: skip
    for name, title in NETWORKS.items():
        body = []
        for structure in dict.fromkeys(row["structure"] for row in rows if row["library"] == "pyro_bnn"):
            ours, theirs = (by_key.get((name, structure, lib)) for lib in ("pyro_bnn", "laplace-torch"))
            if ours:
                parts = ("fit", "tune", "predict")
                body.append([structure, *(cost(ours, p) for p in parts), megabytes(ours),
                             *(cost(theirs, p) for p in parts)])  # fmt: skip
        bound = by_key.get((name, "lower bound", "by hand"))
        if bound:
            body.append(["passes alone, by hand", cost(bound, "fit"), *["–"] * 6])
        print(f"{title}\n")
        print(table(header, body))
    for row in rows:
        for key in ("memory by budget, MB", "microseconds per point by batch size"):
            if key in row:
                print(row["network"], row["structure"], key, row[key])


if __name__ == "__main__":
    main()
