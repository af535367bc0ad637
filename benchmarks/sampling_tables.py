# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Turns the results about chains into the tables of the documentation.

    python benchmarks/sampling_tables.py
"""

import json
from collections.abc import Sequence
from typing import Any

from gold_distances import HALVES
from uci_tables import RESULTS, write

Rows = list[dict[str, Any]]
GOLD_SETS = ("boston", "energy", "yacht")
#: Neighbours of short chains in their table.
NEIGHBOURS = ("MAP", "full Laplace", "deep ensemble", "mixture of Laplace")


def read(name: str) -> Rows:
    path = RESULTS / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def number(value: Any, digits: int) -> str:
    return "—" if value is None else f"{value:,.{digits}f}".replace("-", "−")


def gold(rows: Rows) -> list[list[str]]:
    """Total variation, mass and cost of short chains and their controls, by data set."""
    sets = [name for name in GOLD_SETS if any(row["set"] == name for row in rows)]
    methods = [
        m for m in dict.fromkeys(row["method"] for row in rows) if m in (HALVES, *NEIGHBOURS) or "MCLMC" in m
    ]
    header = [""]
    for name in sets:
        header += [f"{name}: TV", "mass in 95 %", "sd ratio", "LL", "gradients", "CPU seconds"]
    table = [header]
    found = {(row["set"], row["method"]): row for row in rows}
    for method in methods:
        line = [method]
        for name in sets:
            row = found.get((name, method), {})
            line += [
                number(row.get(key), 3) for key in ("total_variation", "mass", "sd_ratio", "log_likelihood")
            ]
            line += [
                number(row.get("gradients"), 0),
                number(row.get("seconds", row.get("sampling_seconds")), 0),
            ]
        table.append(line)
    return table


def posteriordb(rows: Rows) -> list[list[str]]:
    """The worst parameter of each posterior by method."""
    header = ["posterior", "method", "error of means, sd", "sd ratio: least", "largest", "z of means", "z of sds", "ESS",
              "gradients", "CPU seconds"]  # fmt: skip
    keys = (("mean_error", 2), ("sd_ratio_min", 2), ("sd_ratio_max", 2), ("z_mean", 1), ("z_sd", 1), ("ess", 0),
            ("gradients", 0), ("seconds", 1))  # fmt: skip
    table = [header]
    for row in sorted(rows, key=lambda row: row["posterior"]):
        cells = [number(row.get(key), digits) for key, digits in keys]
        table.append([row["posterior"].split("-")[-1], row["method"], *cells])
    return table


def calibration(rows: Rows) -> list[list[str]]:
    """The smallest p-value over the quantities of a model, and the smallest that is to be expected of so many tests."""
    table = [
        ["model", "way", "adjusted", "simulations", "tests", "smallest p-value", "times tests", "acceptance"]
    ]
    for key in dict.fromkeys((row["model"], row["way"], row["adjusted"]) for row in rows):
        here = [row for row in rows if (row["model"], row["way"], row["adjusted"]) == key]
        least = min(row["p_value"] for row in here)
        table.append([key[0], key[1], "yes" if key[2] else "no (control)", str(here[0]["simulations"]), str(len(here)),
                      f"{least:.2g}", f"{min(1.0, least * len(here)):.2g}", number(here[0].get("acceptance"), 2)])  # fmt: skip
    return table


def main(names: Sequence[str] = ("gold", "posteriordb", "calibration")) -> None:
    for name in names:
        rows = read(f"{name}.jsonl")
        if rows:
            write(
                f"sampling_{name}",
                {"gold": gold, "posteriordb": posteriordb, "calibration": calibration}[name](rows),
            )


if __name__ == "__main__":
    main()
