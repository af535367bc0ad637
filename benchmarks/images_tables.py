# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Turns the results of ``images.py`` into the tables of the documentation and the figure of rotated images.

    python benchmarks/images_tables.py
"""

import statistics
from typing import Any

from rank1_tables import ROOT, read, spread, write

OTHERS = {"fashion": ("mnist", "notmnist"), "mnist": ("fashion", "notmnist")}
NAMES = {"fashion": "Fashion-MNIST", "mnist": "MNIST", "notmnist": "notMNIST"}
ANGLES = tuple(range(0, 181, 30))


#: The methods of the figure: more lines than these cannot be told apart.
DRAWN = ("MAP", "deep ensemble", "rank-1 (K = 4)", "Laplace, last layer, tuned", "Laplace, Kronecker, tuned",
         "Laplace, diagonal, tuned")  # fmt: skip


def cells(rows: list[dict[str, Any]], keys: list[str], digits: int) -> list[list[str]]:
    """One line per method: means over seeds, with the standard deviation where there are several."""
    methods = dict.fromkeys(row["method"] for row in rows)
    return [
        [method, *(spread([row for row in rows if row["method"] == method], key, digits) for key in keys)]
        for method in methods
    ]


def draw(rows: list[dict[str, Any]]) -> None:
    """NLL and ECE against the angle, means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, (key, name) in zip(axes, (("nll", "NLL"), ("ece", "ECE")), strict=True):
        for method, marker in zip(DRAWN, "osD^vx", strict=True):
            mine = [row for row in rows if row["method"] == method]
            if mine:
                curve = [statistics.mean(row[f"rotated_{a}_{key}"] for row in mine) for a in ANGLES]
                axis.plot(ANGLES, curve, marker=marker, markersize=5, linewidth=1.5, label=method)
        axis.set(xlabel="rotation in degrees", ylabel=name, xticks=ANGLES, ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    plt.rcParams["svg.hashsalt"] = "rotated"  # the same file from the same rows
    figure.savefig(ROOT / "docs/source/figures/rotated_mnist.svg", metadata={"Date": None})


def main() -> None:
    rows = read("images")
    for data, others in OTHERS.items():
        mine = [row for row in rows if row["data"] == data]
        keys = ["nll", "accuracy", "ece", "brier"]
        header = ["", "NLL", "accuracy", "ECE", "Brier"]
        for other in others:
            keys += [f"confidence_{other}", f"auroc_{other}"]
            header += [f"confidence on {NAMES[other]}", f"AUROC {NAMES[other]}"]
        seconds = [line[1] for line in cells(mine, ["seconds"], 0)]
        table = [[*line, time] for line, time in zip(cells(mine, keys, 3), seconds, strict=True)]
        write(f"images_{data}", [*header, "CPU seconds to fit"], table)
    turned = [row for row in rows if "rotated_0_nll" in row]
    for key, name in (("nll", "NLL"), ("ece", "ECE")):
        table = cells(turned, [f"rotated_{angle}_{key}" for angle in ANGLES], 2)
        write(f"images_rotated_{key}", [f"{name} at", *(f"{angle}°" for angle in ANGLES)], table)
    draw(turned)


if __name__ == "__main__":
    main()
