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
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else text


def write(name: str, header: list[str], rows: list[list[str]]) -> None:
    TABLES.mkdir(parents=True, exist_ok=True)
    with (TABLES / f"{name}.csv").open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([header, *rows])


def by_method(name: str, rows: list[dict[str, Any]], columns: dict[str, tuple[str, int]]) -> None:
    """One line per method: number of seeds, mean and standard deviation over seeds."""
    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        shown = [spread(mine, key, digits) if key in mine[0] else "" for key, digits in columns.values()]
        table.append([method, str(len(mine)), *shown])
    if table:
        write(name, ["", "seeds", *columns], table)


def add_overhead(rows: list[dict[str, Any]]) -> None:
    """The parameters that a method has beyond those of the deterministic network, in per cent of the latter."""
    least = next((row["parameters"] for row in rows if row["method"] == "deterministic"), None)
    for row in rows:
        if least:
            row["overhead"] = 100 * (row["parameters"] / least - 1)


def convergence(path: Path) -> None:
    """Minus the bound after each number of steps, with its standard error, and the seconds."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    found = {(row["problem"], row["method"], row["steps"]): row for row in rows}
    table = []
    for method, steps in dict.fromkeys((row["method"], row["steps"]) for row in rows):
        line = [method if method.startswith(("Adam", "fixed")) else f"{method}, {steps} steps"]
        for problem in problems:
            row = found.get((problem, method, steps))
            shown = "—" if row is None else f"{row['loss']:.1f} ± {row['error']:.1f} ({row['seconds']:.0f} s)"
            line.append(shown.replace("-", "−"))
        table.append(line)
    if table:
        write("rank1_convergence", ["", *problems], table)


def paired(rows: list[dict[str, Any]], first: str, second: str, key: str) -> list[float]:
    """Differences ``first`` − ``second`` of a score, seed by seed."""
    found = {(row["method"], row["seed"]): row[key] for row in rows}
    seeds = sorted({seed for _, seed in found})
    return [found[first, s] - found[second, s] for s in seeds if (first, s) in found and (second, s) in found]


def verdict(differences: list[float]) -> str:
    """What differences that a claim expects to be negative say about it."""
    if len(differences) < 2:
        return "one seed: undecided"
    mean, sd = statistics.mean(differences), statistics.stdev(differences)
    if abs(mean) <= sd or len({d < 0 for d in differences}) > 1:
        return "not separated"
    return "reproduced" if mean < 0 else "not reproduced"


def claims(rows: list[dict[str, Any]]) -> None:
    """The claims of the paper, one line each, for every study that has the methods they compare."""
    table = []
    for study in dict.fromkeys(row["study"] for row in rows):
        mine = [row for row in rows if row["study"] == study]
        if all(row["method"] != "deterministic" for row in mine):
            continue
        for method in ("rank-1 Gaussian", "rank-1 Cauchy"):
            for other in ("deterministic", "batch ensemble", "mean-field VI"):
                for key, label in (("nll", "NLL"), ("ece", "ECE"), ("corrupted_nll", "corrupted NLL")):
                    differences = paired(mine, method, other, key)
                    if differences:
                        shown = spread([{key: d} for d in differences], key, 4)
                        table.append([study, f"{label}: {method} below {other}", str(len(differences)), shown,
                                      verdict(differences)])  # fmt: skip
            low, high = (
                paired(mine, method, "deterministic", "nll"),
                paired(mine, "deep ensemble", "deterministic", "nll"),
            )
            if low and len(low) == len(high):
                closed = [100 * d / e for d, e in zip(low, high, strict=True)]
                # negative where more than half of a gap is closed that is there
                margin = [d - 0.5 * e for d, e in zip(low, high, strict=True)]
                there = all(e < 0 for e in high)
                table.append([study, f"{method} closes half of the gap to the deep ensemble in NLL", str(len(low)),
                              "closes " + " / ".join(f"{c:.0f}" for c in closed) + " % by seed",
                              verdict(margin) if there else "no gap"])  # fmt: skip
    header = ["study", "claim", "seeds", "difference, mean ± sd over seeds", ""]
    if table:
        write("rank1_fashion_claims", header, table)


def corruptions(rows: list[dict[str, Any]]) -> None:
    """NLL by kind and severity, mean over seeds."""
    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        for kind in ("noise", "blur", "contrast", "rotation"):
            cells = [f"{statistics.mean(row[f'{kind}_{s}_nll'] for row in mine):.2f}" for s in range(1, 6)]
            table.append([method, kind, *cells])
    if table:
        write("rank1_fashion_corruptions", ["", "", *(f"severity {s}" for s in range(1, 6))], table)


def fashion() -> None:
    rows = read("rank1_fashion")
    columns = {
        "NLL": ("nll", 4), "accuracy": ("accuracy", 4), "ECE": ("ece", 4), "Brier": ("brier", 4),
        "AUROC MNIST": ("auroc_mnist", 3), "AUROC notMNIST": ("auroc_notmnist", 3), "corrupted NLL": ("corrupted_nll", 3),
        "corrupted accuracy": ("corrupted_accuracy", 3), "corrupted ECE": ("corrupted_ece", 3),
        "disagreement": ("disagreement", 3), "parameters": ("parameters", 0), "more than deterministic, %": ("overhead", 1),
    }  # fmt: skip
    choice = {"NLL": ("nll", 4), "accuracy": ("accuracy", 4), "ECE": ("ece", 4), "NLL, training": ("train_nll", 4),
              "NLL of one draw": ("member_nll", 3), "disagreement": ("disagreement", 3),
              "CPU seconds": ("cpu_seconds", 0)}  # fmt: skip
    for study in dict.fromkeys(row["study"] for row in rows):
        mine = [row for row in rows if row["study"] == study]
        add_overhead(mine)
        by_method(f"rank1_fashion_{study}", mine, choice if study in ("cauchy", "choice") else columns)
    claims(rows)
    corruptions([row for row in rows if row["study"] == "penalty"])
    noise = read("rank1_noise")
    if noise:
        write("rank1_noise", ["factors", "noise", "median distance", "largest distance"],
              [[row["factors"], row["noise"].replace("_", " "), f"{row['median']:.2f}", f"{row['max']:.2f}"]
               for row in noise])  # fmt: skip
    for row in rows:
        if row["study"] == "penalty" and row["method"] == "rank-1 Gaussian" and "report" in row:
            (TABLES / "rank1_diversity_fashion.txt").write_text(row["report"] + "\n")


def main() -> None:
    fashion()
    by_method("rank1_sequences", read("rank1_sequences"), {
        "NLL": ("nll", 4), "ECE": ("ece", 4), "accuracy": ("accuracy", 4), "parameters": ("parameters", 0)
    })  # fmt: skip
    small = read("rank1_presets")
    for row in small:
        if row["steps"] != 400:
            row["method"] += f", {row['steps']} steps"
    for task in dict.fromkeys(row["task"] for row in small):
        by_method(f"rank1_presets_{task}", [row for row in small if row["task"] == task], {
            "NLL": ("nll", 3), **({"accuracy": ("accuracy", 3), "ECE": ("ece", 3)} if task == "digits" else
                                  {"RMSE": ("rmse", 3)}),
        })  # fmt: skip
    for row in small:
        if row["task"] == "digits" and "report" in row:
            end = {"default preset": "default", "dusenberry2020, weights N(0, 1/fan-in)": "collapsed"}
            if row["method"] in end:
                path = TABLES / f"rank1_diversity_{end[row['method']]}.txt"
                path.write_text(row["report"] + "\n")
    convergence(RESULTS / "rank1_convergence.jsonl")
    training, prediction, memory = [], [], []
    for row in read("rank1_speed"):
        if row["what"] == "training step":
            training.append([row["network"], str(row["K"]), str(row["batch"]), str(row["threads"]),
                             f"{row['baseline_ms']:.1f}",
                             *(f"{row[k]:.2f}" for k in ("hand", "pyro", "pyro_over_hand"))])  # fmt: skip
        elif row["what"].startswith("prediction"):
            own = [f"{row['posterior_predictive' + end]:.2f}" for end in ("", "_low", "_high")]
            alone = [f"{row[f'chunks_of_{n}']:.2f}" for n in (1, 4, 20)]
            base = f"{row['baseline_ms']:.0f}"
            prediction.append([row["network"], str(row["batch"]), str(row["threads"]), base,
                               f"{own[0]} ({own[1]} to {own[2]})", *alone])  # fmt: skip
        else:
            memory.append([row["network"], row["which"], str(row["threads"]), f"{row['MiB']:.0f}",
                           f"{row['MiB_above_start']:.0f}"])  # fmt: skip
    write("rank1_speed_training", ["network", "K", "batch", "threads", "deterministic, ms", "by hand, x",
                                   "through Pyro, x", "Pyro / by hand"], training)  # fmt: skip
    header = ["network", "batch", "threads", "S passes, ms", "posterior_predictive, x", "1 draw at a time, x",
              "4 at a time, x", "20 at a time, x"]  # fmt: skip
    write("rank1_speed_prediction", header, prediction)
    write("rank1_speed_memory", ["network", "", "threads", "peak, MiB", "above the start, MiB"], memory)


if __name__ == "__main__":
    main()
