# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Turns the results of the UCI benchmarks into the tables of the documentation, beside published ones.

    python benchmarks/uci_tables.py
"""

import csv
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uci_data import SETS

ROOT = Path(__file__).parents[1]
RESULTS, TABLES = ROOT / "benchmarks/results", ROOT / "docs/source/tables"
ORDER = ("boston", "concrete", "energy", "kin8nm", "naval", "power", "protein", "wine", "yacht")

#: Published test log likelihoods in the order of ORDER. (a) readme of yaringal/DropoutUncertaintyExps, grid search,
#: ± standard error; (b) Lakshminarayanan et al. 2017, Table 1, ± standard deviation; (d) readme of
#: uncertainty-baselines, baselines/uci; (e) Wu et al. 2019, Table 2, ± standard error. A source is quoted with all its rows.
SINGLE_LAYER = {
    "MC dropout (a)": ("-2.40±0.04", "-2.93±0.02", "-1.21±0.01", "1.14±0.01", "4.45±0.00", "-2.80±0.01",
                       "-2.87±0.00", "-0.93±0.01", "-1.25±0.01"),
    "deep ensemble, 5 (b)": ("-2.41±0.25", "-3.06±0.18", "-1.38±0.22", "1.20±0.02", "5.63±0.05", "-2.79±0.04",
                             "-2.83±0.02", "-0.94±0.12", "-1.18±0.21"),
    "PBP (b)": ("-2.57±0.09", "-3.16±0.02", "-2.04±0.02", "0.90±0.01", "3.73±0.01", "-2.84±0.01", "-2.97±0.00",
                "-0.97±0.01", "-1.63±0.02"),
    "VI (d)": ("-3.12", "-3.22", "-0.93", "1.03", "6.12", "-2.85", "-2.93", "-1.00", "-2.01"),
    "VMG (d)": ("-2.46", "-3.01", "-1.06", "1.10", "2.46", "-2.82", "-2.84", "-0.95", "-1.30"),
    "HS-BNN (d)": ("-2.54", "-3.09", "-2.66", "1.12", "5.52", "-2.81", "-2.89", "-0.95", "-2.33"),
    "deep ensemble, 10 (d)": ("-6.11", "-3.20", "-0.61", "1.17", "5.17", "-3.18", "-3.12", "-0.97", "-0.73"),
    "refined VI (d)": ("-2.94", "-3.08", "-0.75", "1.06", "6.33", "-2.83", "-2.92", "-0.97", "-1.68"),
    "DVI, heteroscedastic (e)": ("-2.41±0.02", "-3.06±0.01", "-1.01±0.06", "1.13", "6.29±0.04", "-2.80",
                                 "-2.85±0.01", "-0.90±0.01", "-0.47±0.03"),
    "DVI, homoscedastic (e)": ("-2.58", "-3.23", "-2.09", "1.01", "5.84", "-2.82", "-2.94", "-0.96", "-1.41"),
}  # fmt: skip
#: (d) as above; (c) cambridge-mlg/DUN, notebook of the regression plots, ± standard deviation.
DEEPER = {
    "PBP-MV, 2 layers (d)": ("-2.54", "-3.04", "-1.01", "1.28", "4.85", "-2.78", "-2.77", "-0.97", "-1.64"),
    "DUN (c)": ("-2.604±0.351", "-3.005±0.212", "-1.037±0.159", "1.151±0.083", "4.245±1.108", "-2.695±0.086",
                "-2.657±0.044", "-1.031±0.119", "-2.420±0.523"),
    "ensemble (c)": ("-2.454±0.275", "-2.886±0.153", "-1.298±0.210", "0.813±1.224", "5.081±0.156", "-2.663±0.055",
                     "-2.561±0.026", "-1.116±0.582", "-2.441±0.189"),
    "mean-field VI (c)": ("-2.573±0.136", "-3.190±0.110", "-1.961±0.648", "1.055±0.084", "3.389±2.891",
                          "-2.877±0.041", "-2.929±0.038", "-1.007±0.063", "-2.238±0.952"),
    "dropout (c)": ("-2.882±1.028", "-3.051±0.308", "-0.975±0.509", "1.231±0.086", "5.429±0.735", "-2.790±0.118",
                    "-2.623±0.036", "-1.003±0.128", "-1.330±0.436"),
}  # fmt: skip
#: (c), ± standard deviation over features.
GAP = {
    "DUN (c)": ("-3.107±0.593", "-4.222±0.818", "-10.730±13.477", "1.029±0.133", "-16.279±19.437", "-2.998±0.325",
                "-3.835±0.998", "-1.417±0.474", "-2.122±0.584"),
    "dropout (c)": ("-4.001±1.814", "-5.170±1.376", "-8.102±13.796", "1.215±0.049", "-523.856±570.116",
                    "-3.178±0.224", "-3.459±0.444", "-1.267±0.677", "-2.344±0.995"),
    "ensemble (c)": ("-3.106±1.481", "-3.631±0.523", "-5.423±7.290", "0.315±2.397", "-4.573±7.496", "-2.904±0.110",
                     "-3.071±0.261", "-1.126±0.137", "-2.568±1.250"),
    "mean-field VI (c)": ("-2.703±0.072", "-3.460±0.177", "-9.093±10.573", "0.942±0.240", "-15.208±43.758",
                          "-2.980±0.184", "-3.083±0.086", "-0.965±0.033", "-2.114±0.399"),
    "SGD (c)": ("-4.217±1.876", "-4.839±1.585", "-15.295±26.058", "0.991±0.131", "-60.470±53.213", "-3.022±0.141",
                "-3.554±0.408", "-2.026±1.130", "-2.442±0.520"),
}  # fmt: skip

Cells = dict[tuple[str, str, str], list[dict[str, Any]]]


def read(paths: list[Path]) -> Cells:
    """The rows of each (kind, set, method), failed ones left out."""
    cells: Cells = defaultdict(list)
    for path in paths:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if "failed" not in row:
                cells[row["kind"], row["set"], row["method"]].append(row)
    return cells


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error, NaN for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def cell(rows: list[dict[str, Any]], key: str, digits: int, usual: int) -> str:
    """Mean ± standard error, with the number of splits where it is not that of the column."""
    if not rows:
        return "—"
    mean, error = mean_and_error([row[key] for row in rows])
    text = f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")
    return text.replace("-", "−") + (f" [{len(rows)}]" if len(rows) != usual else "")


def counts(cells: Cells, kind: str) -> dict[str, int]:
    """The number of splits that most methods of a set have."""
    found: dict[str, int] = {}
    for name in SETS:
        sizes = [len(rows) for (k, n, _), rows in cells.items() if (k, n) == (kind, name)]
        found[name] = statistics.mode(sizes) if sizes else 0
    return found


def by_method(
    cells: Cells, kind: str, key: str, digits: int, published: dict[str, tuple[str, ...]] | None = None
) -> list[list[str]]:
    usual = counts(cells, kind)
    sets = [name for name in ORDER if usual[name]]
    methods = list(dict.fromkeys(m for k, _, m in cells if k == kind))
    table = [["", *sets], ["splits", *(str(usual[n]) for n in sets)]]
    for method in methods:
        table.append([method, *(cell(cells[kind, n, method], key, digits, usual[n]) for n in sets)])
    for source, values in (published or {}).items():
        row = dict(zip(ORDER, values, strict=True))
        table.append([f"*{source}*", *(row[n].replace("-", "−").replace("±", " ± ") for n in sets)])
    return table


def goal(cells: Cells) -> list[list[str]]:
    """Our best method in test log likelihood beside the best published entry with one hidden layer."""
    table = [["data", "best published", "", "best of ours", "", "splits", "at least equal"]]
    for i, name in enumerate(ORDER):
        source, value = max(
            ((s, float(v[i].split("±")[0])) for s, v in SINGLE_LAYER.items()), key=lambda p: p[1]
        )
        ours = [
            (m, *mean_and_error([r["log_likelihood"] for r in rows]), len(rows))
            for (k, n, m), rows in cells.items()
            if (k, n) == ("standard", name) and rows
        ]
        usual = counts(cells, "standard")[name]
        # a method with fewer splits than the others saw other test points
        ours = [row for row in ours if row[3] >= usual]
        if not ours:
            continue
        method, mean, error, number = max(ours, key=lambda row: row[1])
        text = f"{mean:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")
        verdict = "yes" if round(mean, 2) >= value else "no"
        table.append([name, source, f"{value:.2f}".replace("-", "−"), method, text.replace("-", "−"), str(number),
                      verdict])  # fmt: skip
    return table


def goal_in_words(table: list[list[str]]) -> str:
    """The sentence of :func:`goal`: on how many sets, and by how much the others fall short."""
    rows = [dict(zip(table[0], row, strict=False)) | {"best": row[2], "ours": row[4]} for row in table[1:]]
    short = [row for row in rows if row["at least equal"] == "no"]
    by = [
        round(float(r["best"].replace("−", "-")) - float(r["ours"].split("±")[0].replace("−", "-")), 2)
        for r in short
    ]
    gaps = ", ".join(f"{row['data']} falls short by {gap:.2f}" for row, gap in zip(short, by, strict=True))
    return f"At least the best published entry on {len(rows) - len(short)} of {len(rows)} sets" + (
        f"; {gaps}." if short else "."
    )


def paired(cells: Cells, method: str, others: tuple[str, ...]) -> list[list[str]]:
    """Mean differences of the test log likelihood of a method to others over the splits that it has, ± standard error."""
    sets = [name for name in ORDER if cells.get(("standard", name, method))]
    table = [["better than", *(f"{name} [{len(cells['standard', name, method])}]" for name in sets)]]
    for other in others:
        line = [other]
        for name in sets:
            theirs = {row["split"]: row["log_likelihood"] for row in cells["standard", name, other]}
            mine = cells["standard", name, method]
            mean, error = mean_and_error([row["log_likelihood"] - theirs[row["split"]] for row in mine])
            line.append(f"{mean:.2f} ± {error:.2f}".replace("-", "−"))
        table.append(line)
    return table


def worst(cells: Cells) -> list[list[str]]:
    """The smallest log likelihood over the gap splits of energy and naval, by method."""
    table = [["", "energy, mean", "energy, worst", "naval, mean", "naval, worst"]]
    usual = counts(cells, "gap")
    for method in dict.fromkeys(m for k, _, m in cells if k == "gap"):
        row = [method]
        for name in ("energy", "naval"):
            rows = cells["gap", name, method]
            row += [cell(rows, "log_likelihood", 2, usual[name])]
            row += [f"{min(r['log_likelihood'] for r in rows):.2f}".replace("-", "−") if rows else "—"]
        table.append(row)
    return table


def against_nuts(path: Path) -> Iterator[tuple[str, list[list[str]]]]:
    """What the chains say about themselves, and one table per data set of the comparison with them."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    columns = {
        "total variation": "total_variation", "Wasserstein": "wasserstein", "mass in 95 %": "mass",
        "overlap": "overlap", "sd ratio": "sd_ratio", "rank correlation": "rank_correlation",
        "log likelihood": "log_likelihood",
    }  # fmt: skip
    # the controls of short chains have tables of their own (sampling_tables.py)
    rows = [row for row in rows if not row["method"].startswith("MCLMC, ")]
    if rows:
        yield "gold_chains", [
            ["", "chains", "adaptation + draws", "R-hat: max", "median", "below 1.01", "ESS: min", "median",
             "gradients", "CPU seconds", "divergences"],
            *([row["set"], str(row["chains"]), f"{row['warmup']:,} + {row['draws']:,}", f"{row['r_hat']:.3f}",
               f"{row['r_hat_median']:.4f}", f"{row['r_hat_below_1.01']:.0%}", f"{row['ess']:,.0f}",
               f"{row['ess_median']:,.0f}", f"{row['gradients']:,}", f"{row['sampling_seconds']:,.0f}",
               str(row["diverging"])] for row in rows if "warmup" in row),
        ]  # fmt: skip
    for name in dict.fromkeys(row["set"] for row in rows):
        table = [["", *columns]]
        for row in rows:
            if row["set"] == name:
                values = (row.get(key) for key in columns.values())
                table.append(
                    [row["method"], *("—" if v is None else f"{v:.3f}".replace("-", "−") for v in values)]
                )
        yield f"gold_{name}", table


def noise_of_gaps(path: Path) -> Iterator[tuple[str, list[list[str]]]]:
    """Per kind of split and data set, each method with its own noise and by each rule of ``uci_noise.py``."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rules = {"own": "own noise", "mean": "mean", "worst": "worst", "mixture": "mixture"}
    for kind, name in dict.fromkeys((row["kind"], row["set"]) for row in rows):
        table = [
            [
                "",
                "splits",
                *(f"{title}: {what}" for title in rules.values() for what in ("LL", "worst LL", "cov.")),
            ]
        ]
        here = [row for row in rows if (row["kind"], row["set"]) == (kind, name)]
        for method in dict.fromkeys(row["method"] for row in here):
            line: list[str] = []
            for rule in rules:
                found = [row for row in here if (row["method"], row["noise_from"]) == (method, rule)]
                values = [row["log_likelihood"] for row in found]
                line += [f"{value:.2f}".replace("-", "−") for value in (statistics.mean(values), min(values))]
                line += [f"{statistics.mean(row['coverage'] for row in found):.2f}"]
            table.append([method, str(len(found)), *line])
        yield f"uci_noise_{kind}_{name}", table


def write(name: str, rows: list[list[str]]) -> None:
    TABLES.mkdir(parents=True, exist_ok=True)
    with (TABLES / f"{name}.csv").open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows(rows)
    print(f"\n{name}")
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(value.ljust(w) for value, w in zip(row, width, strict=True)))


def main() -> None:
    cells = read([RESULTS / "uci.jsonl"])
    reached = goal(cells)
    write("uci_goal", reached)
    (TABLES / "uci_goal.txt").write_text(goal_in_words(reached) + "\n")
    others = ("rank-1 Gaussian", "MAP", "Kronecker Laplace", "full Laplace", "mixture of Laplace")
    write("uci_rank1_paired", paired(cells, "rank-1 Gaussian, L-BFGS", others))
    write("uci_standard_ll", by_method(cells, "standard", "log_likelihood", 3, SINGLE_LAYER | DEEPER))
    if any(kind == "gap" for kind, _, _ in cells):
        write("uci_gap_ll", by_method(cells, "gap", "log_likelihood", 3, GAP))
        write("uci_gap_worst", worst(cells))
    for kind in dict.fromkeys(kind for kind, _, _ in cells):
        for key, digits in (("rmse", 4), ("crps", 4), ("coverage", 3), ("seconds", 0)):
            write(f"uci_{kind}_{key}", by_method(cells, kind, key, digits))
    for name, table in against_nuts(RESULTS / "gold.jsonl"):
        write(name, table)
    for name, table in noise_of_gaps(RESULTS / "uci_noise.jsonl"):
        write(name, table)


if __name__ == "__main__":
    main()
