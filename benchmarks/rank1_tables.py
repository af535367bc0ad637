# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Turns the results of the rank-1 benchmarks into the tables of the documentation.

    python benchmarks/rank1_tables.py
"""

import csv
import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, TABLES = ROOT / "benchmarks/results", ROOT / "docs/source/tables"


def read(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def spread(rows: list[dict[str, Any]], key: str, digits: int = 3) -> str:
    values = [row[key] for row in rows]
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def write(name: str, header: list[str], rows: list[list[str]]) -> None:
    TABLES.mkdir(parents=True, exist_ok=True)
    with (TABLES / f"{name}.csv").open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([header, *rows])


def by_method(name: str, columns: dict[str, tuple[str, int]]) -> None:
    rows = read(name)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    table = []
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        table.append(
            [method, str(len(mine)), *(spread(mine, key, digits) for key, digits in columns.values())]
        )
    write(name, ["", "seeds", *columns], table)


def main() -> None:
    columns = {
        "NLL": ("nll", 4), "accuracy": ("accuracy", 4), "ECE": ("ece", 4), "Brier": ("brier", 4),
        "AUROC MNIST": ("auroc_mnist", 3), "AUROC notMNIST": ("auroc_notmnist", 3), "corrupted NLL": ("corrupted_nll", 3),
        "corrupted ECE": ("corrupted_ece", 3), "disagreement": ("disagreement", 3), "parameters": ("parameters", 0),
    }  # fmt: skip
    for name in ("rank1_fashion", "rank1_fashion_l2"):
        by_method(name, columns)
    by_method("rank1_sequences", {"NLL": ("nll", 4), "ECE": ("ece", 4), "accuracy": ("accuracy", 4),
                                  "parameters": ("parameters", 0)})  # fmt: skip
    training, prediction, memory = [], [], []
    for row in read("rank1_speed"):
        if row["what"] == "training step":
            training.append([row["network"], str(row["K"]), str(row["batch"]), f"{row['baseline_ms']:.1f}",
                             *(f"{row[k]:.2f}" for k in ("hand", "pyro", "pyro_over_hand"))])  # fmt: skip
        elif row["what"].startswith("prediction"):
            prediction.append(
                [row["network"], str(row["batch"]), f"{row['vectorised']:.2f}", f"{row['chunks_of_20']:.2f}"]
            )
        else:
            memory.append(
                [row["network"], row["which"], f"{row['MiB']:.0f}", f"{row['MiB_above_start']:.0f}"]
            )
    write("rank1_speed_training", ["network", "K", "batch", "deterministic, ms", "by hand, x", "through Pyro, x",
                                   "Pyro / by hand"], training)  # fmt: skip
    write(
        "rank1_speed_prediction", ["network", "batch", "all draws at once, x", "20 at a time, x"], prediction
    )
    write("rank1_speed_memory", ["network", "", "peak, MiB", "above the start, MiB"], memory)


if __name__ == "__main__":
    main()
