# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Dot plots of the documentation's evidence pages, from the tables that the other scripts make and from the results.

    python benchmarks/evidence_figures.py
"""

import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

ROOT = Path(__file__).parents[1]
RESULTS, TABLES, FIGURES = (
    ROOT / p for p in ("benchmarks/results", "docs/source/tables", "docs/source/figures")
)
DARK, RED, GREY, LIGHT = "#1f4e79", "#b22222", "#8a8a8a", "#c8c8c8"

Interval = tuple[float, float, float]  # a value, and the ends of its whisker


def interval(cell: str) -> Interval | None:
    """``−1.2 ± 0.1`` or ``5.0 (4.8 to 6.1)`` or a number; counts of splits in brackets do not matter."""
    text = cell.replace("−", "-").replace(",", "")
    if not text or text == "—":
        return None
    if " to " in text:
        value, _, ends = text.partition(" (")
        low, _, high = ends.rstrip(")").partition(" to ")
        return float(value), float(low), float(high)
    # a number of splits that is not that of the column stands in brackets
    value, _, error = text.split(" (")[0].split(" [")[0].partition(" ± ")
    return float(value), float(value) - float(error or 0), float(value) + float(error or 0)


def columns(name: str, skip: Sequence[str] = ()) -> dict[str, dict[str, Interval]]:
    """A table by column, then by row, without published rows (in italics) and means over fewer splits (with brackets)."""
    header, *rows = csv.reader((TABLES / name).open())
    found: dict[str, dict[str, Interval]] = defaultdict(dict)
    for label, *cells in rows:
        if label in skip or label.startswith("*"):
            continue
        for column, cell in zip(header[1:], cells, strict=True):
            value = interval(cell) if column not in skip and not cell.endswith("]") else None
            if value is not None:
                found[column][label] = value
    return found


def dots(ax: Axes, values: Mapping[str, Interval], labels: Sequence[str], best: str = "") -> None:
    """One row per label with its whisker, the best one dark; no labels of values outside a clipped axis are lost."""
    pick = {"high": max, "low": min}.get(best)
    top = pick(v[0] for v in values.values()) if pick else None
    for row, label in enumerate(labels):
        if label in values:
            value, low, high = values[label]
            colour = RED if value == top else GREY if label.startswith("laplace-torch") else DARK
            ax.plot([low, high], [row, row], color=colour, lw=1.6, solid_capstyle="butt")
            ax.plot(value, row, "o", color=colour, ms=5)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(axis="both", color=LIGHT, lw=0.5)
    ax.tick_params(length=0, labelsize=8)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)


def panels(data: Mapping[str, Mapping[str, Interval]], *, across: int, size: tuple[float, float], best: str = "",
           low: Mapping[str, float] | None = None, mark: Mapping[str, float] | float | None = None,
           log: bool = False, share: bool = False) -> Figure:  # fmt: skip
    """A panel per column that share their rows; ``low`` cuts an axis, and the rows beyond it are named at its edge."""
    labels = list(dict.fromkeys(label for values in data.values() for label in values))
    down = -(-len(data) // across)
    figure, axes = plt.subplots(
        down, across, figsize=size, sharex=share, sharey=True, squeeze=False, layout="constrained"
    )
    for ax, (title, values) in zip(axes.flat, data.items(), strict=False):
        dots(ax, values, labels, best)
        ax.set_title(title, fontsize=9)
        place = mark.get(title) if isinstance(mark, Mapping) else mark
        if place is not None:
            ax.axvline(place, color="k", lw=0.8, ls="--")
        if log:
            ax.set_xscale("log")
            if min(v[0] for v in values.values()) > 1e-3:
                ax.xaxis.set_major_formatter("{x:g}")
            else:
                ax.xaxis.set_major_locator(LogLocator(numticks=5))
            ax.xaxis.set_minor_formatter(NullFormatter())
        else:
            ax.xaxis.set_major_locator(MaxNLocator(4))
        if low and title in low:
            ax.set_xlim(left=low[title])
            for row, label in enumerate(labels):
                if label in values and values[label][0] < low[title]:
                    ax.annotate(f"◂ {values[label][0]:.1f}", (0.01, row), xycoords=("axes fraction", "data"), fontsize=7,
                                va="center", color=DARK)  # fmt: skip
    for ax in axes.flat[len(data) :]:
        ax.set_visible(False)
    return figure


def save(figure: Figure, name: str) -> None:
    figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def uci() -> None:
    """Log likelihoods and coverage on the UCI sets, beside the best published single-layer entry."""
    published = {
        row[0]: float(row[2].replace("−", "-"))
        for row in list(csv.reader((TABLES / "uci_goal.csv").open()))[1:]
    }
    standard, gap = columns("uci_standard_ll.csv", ["splits"]), columns("uci_gap_ll.csv", ["splits"])
    low = {"naval": 3.0, "kin8nm": 0.7}
    save(panels(standard, across=3, size=(9.5, 8.5), best="high", mark=published, low=low), "uci_standard_ll")
    low = {"energy": -15.0, "naval": -10.0}
    save(panels(gap, across=3, size=(9.5, 8.5), best="high", low=low), "uci_gap_ll")
    for kind in ("standard", "gap"):
        found = columns(f"uci_{kind}_coverage.csv", ["splits"])
        save(panels(found, across=3, size=(9.5, 8.5), mark=0.95), f"uci_{kind}_coverage")


def nuts() -> None:
    """How far every posterior is from long chains."""
    wanted = {"total variation": 0.0, "mass in 95 %": 0.95, "sd ratio": 1.0, "rank correlation": 1.0}
    for column, target in wanted.items():
        data = {name: columns(f"gold_{name}.csv")[column] for name in ("boston", "yacht", "energy")}
        name = column.replace(" %", "").replace(" ", "_")
        log = column == "sd ratio"
        save(panels(data, across=3, size=(9.5, 3.2), mark=target, log=log, share=log), f"nuts_{name}")


def images() -> None:
    """Scores of the image benchmark."""
    for name in ("fashion", "mnist"):
        found = columns(f"images_{name}.csv")
        chosen = {key: found[key] for key in ("NLL", "ECE", "AUROC notMNIST")}
        save(panels(chosen, across=3, size=(9.5, 3.2)), f"images_{name}")


def rank1() -> None:
    """Scores on Fashion-MNIST under the paper's penalty, ablations, and the cost of a step."""
    for study in ("penalty", "ablations"):
        found = columns(f"rank1_fashion_{study}.csv", ["seeds"])
        chosen = {key: found[key] for key in ("NLL", "ECE", "corrupted NLL")}
        size = (9.5, 2.6 if study == "penalty" else 3.4)
        save(panels(chosen, across=3, size=size, best="low"), f"rank1_{study}")
    header, *rows = csv.reader((TABLES / "rank1_speed_training.csv").open())
    steps = {key: {f"{row[0]}, K = {row[1]}": (float(row[header.index(key)]),) * 3 for row in rows}
             for key in ("by hand, x", "through Pyro, x")}  # fmt: skip
    titles = {"by hand, x": "plain torch, steps of the plain network", "through Pyro, x": "through Pyro"}
    save(
        panels({titles[k]: v for k, v in steps.items()}, across=2, size=(9.5, 2.6), share=True), "rank1_speed"
    )


def _structure(label: str) -> tuple[str, bool]:
    """Rows of the same structure stand below each other."""
    return label.removeprefix("laplace-torch: "), label.startswith("laplace-torch")


def laplace() -> None:
    """Costs beside laplace-torch, on three networks."""
    rows = json.loads((RESULTS / "laplace_speed.json").read_text())
    titles = {"mlp": "perceptron", "cnn": "convolutional network", "resnet": "ResNet"}
    for part, title in (("fit", "fit"), ("predict", "predict")):
        data: dict[str, dict[str, Interval]] = {name: {} for name in titles.values()}
        for row in rows:
            found = row.get(part)
            if (
                row.get("network") in titles
                and row.get("library") in ("pyro_bnn", "laplace-torch")
                and isinstance(found, dict)
            ):
                library = "" if row["library"] == "pyro_bnn" else "laplace-torch: "
                value = found["median"], found["smallest"], found["largest"]
                data[titles[row["network"]]][library + row["structure"]] = value
        labels = sorted({label for values in data.values() for label in values}, key=_structure)
        ordered = {
            name: {label: values[label] for label in labels if label in values}
            for name, values in data.items()
        }
        save(panels(ordered, across=3, size=(9.5, 3.0), log=True, share=True), f"laplace_{title}")


def peers() -> None:
    """A step of mean-field inference, and predictions of Laplace approximations, in milliseconds."""
    header, *rows = csv.reader((TABLES / "peers_step.csv").open())
    steps = {row[0]: (float(row[header.index("40 steps, ms")]) / 40,) * 3 for row in rows}
    save(panels({"mean-field step, ms": steps}, across=1, size=(6.5, 2.2), best="low"), "peers_step")
    _, *rows = csv.reader((TABLES / "peers_laplace.csv").open())
    data: dict[str, dict[str, Interval]] = defaultdict(dict)
    for structure, library, _, _, _, milliseconds, _ in rows:
        data[structure][library] = (float(milliseconds.replace(",", "")),) * 3
    save(panels(data, across=3, size=(9.5, 2.0), log=True, share=True), "peers_predict")


def hfl() -> None:
    """Errors of the variances, and coverage between two clusters."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / "hfl_accuracy.json").read_text())
    errors: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    covered: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.get("dtype") == "float64" and row.get("max_relative_error") is not None:
            label = f"{row['data']}, {'GGN' if row['curvature'] == 'ggn' else 'Hessian'}"
            errors[row["method"].replace("_", "-")][label].append(row["max_relative_error"])
        if row["part"] == "coverage" and row["region"] == "between":
            covered[row["data"]][row["posterior"]].append(row["coverage"])
    worst = {method: {k: (max(v),) * 3 for k, v in found.items()} for method, found in errors.items()}
    save(panels(worst, across=3, size=(9.5, 3.2), log=True, share=True), "hfl_accuracy")
    spans = {
        f: {k: (statistics.mean(v), min(v), max(v)) for k, v in found.items()} for f, found in covered.items()
    }
    save(panels(spans, across=2, size=(9.5, 2.6), mark=0.95), "hfl_coverage")
    scale = json.loads((RESULTS / "hfl_scale.json").read_text())
    save(hfl_width(rows, scale), "hfl_width")
    save(hfl_scaling(json.loads((RESULTS / "hfl_speed.json").read_text()), scale), "hfl_scaling")


def hfl_width(rows: list[dict[str, Any]], scale: list[dict[str, Any]]) -> Figure:
    """Certified widths, and the errors they bound, against products: single targets, and blocks of long vectors."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.2), sharey=True, layout="constrained")
    steps = defaultdict(list)
    for row in rows:
        if row["part"] == "certificate" and "steps" in row and row["data"] == "boston":
            steps[row["products"]].append((row["width"], row["error"]))
    for index, (label, colour) in enumerate((("certified width", DARK), ("error", RED))):
        worst = [max(pair[index] for pair in found) for found in steps.values()]
        left.loglog(list(steps), worst, "o-", ms=3, color=colour, label=label)
    left.set_title("boston, one target at a time, 751 latents", fontsize=9)
    for row, marker in zip(scale, "os^vD", strict=False):
        errors = row["errors_by_products"] or [(s["products"], s["largest error"]) for s in row["stops"]]
        share = [number / (row["test"] + 1) for number, _ in errors]
        label = f"{row['parameters']:,} parameters, {row['test']} targets"
        right.semilogy(share, [e for _, e in errors], f"{marker}-", ms=3, color=RED, label=f"{label}: error")
        found = [(stop["products"] / (row["test"] + 1), stop["largest width"]) for stop in row["stops"]]
        right.semilogy(*zip(*found, strict=True), marker, ms=5, color=DARK, label=f"{label}: width")
    right.set_title("convolutional networks, blocks", fontsize=9)
    left.set(xlabel="products", ylabel="relative", ylim=(1e-9, 10))
    right.set(xlabel="products per right-hand side")
    for ax in (left, right):
        ax.axhline(1e-2, color=GREY, lw=0.8, ls="--")
        ax.legend(fontsize=7)
    return figure


def hfl_scaling(speed: list[dict[str, Any]], scale: list[dict[str, Any]]) -> Figure:
    """Seconds and memory against the number of parameters."""
    rows = [row for row in speed if row["part"] == "scaling"]
    dense = [row for row in rows if "seconds_dense" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    p, large = [row["parameters"] for row in rows], [row["parameters"] for row in scale]
    left.loglog(p, [row["seconds_per_target"] for row in rows], "o-", label="HFL, per target")
    certified = [row["cpu_seconds_hfl"] / row["test"] for row in scale]
    left.loglog(large, certified, "D", label="HFL, certified to 1 %, per target")
    left.loglog(
        p, [row["seconds_gradient"] for row in rows], ":", color="grey", label="a gradient of the loss"
    )
    seconds = [row["seconds_dense"] for row in dense]
    left.loglog([row["parameters"] for row in dense], seconds, "s-", label="dense GGN, all targets")
    left.set(xlabel="parameters", ylabel="CPU seconds", ylim=(None, 5e3))
    per_target = [row["megabytes_hfl"] / (row["targets"] + 1) for row in rows]
    right.loglog(p, per_target, "o-", label="HFL, per target, by count")
    right.loglog(large, [row["megabytes_peak"] for row in scale], "D", label="HFL, certified, whole process")
    right.loglog(p, [row["megabytes_dense"] for row in rows], "s--", label="dense")
    right.axhline(16e3, color="grey", lw=0.8, label="16 GB")
    right.set(xlabel="parameters", ylabel="megabytes")
    left.legend(loc="upper left", fontsize=7)
    right.legend(fontsize=7)
    return figure


def workflow() -> None:
    """Cost of training steps and of predictions through this package and by hand."""
    rows = json.loads((RESULTS / "workflow_speed.json").read_text())
    for word, name in (("training", "workflow_training"), ("draws / 100", "workflow_prediction")):
        data: dict[str, dict[str, Interval]] = defaultdict(dict)
        for row in rows:
            if word in row["question"]:
                data[row["network"]][row["variant"].replace("the same with given draws", "given draws")] = (
                    row["ratio"],
                    *row["quartiles"],
                )
        save(panels(data, across=len(data), size=(9.5, 2.8)), name)


def main() -> None:
    matplotlib.use("Agg")
    plt.rcParams |= {"svg.hashsalt": "pyro_bnn", "svg.fonttype": "path", "font.size": 9}
    for draw in (uci, nuts, images, rank1, laplace, peers, hfl, workflow):
        draw()


if __name__ == "__main__":
    main()
