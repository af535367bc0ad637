# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Turns the results of ``images.py`` into the tables of the documentation.

    python benchmarks/images_tables.py
"""

from rank1_tables import read, write

OTHERS = {"fashion": ("mnist", "notmnist"), "mnist": ("fashion", "notmnist")}
NAMES = {"fashion": "Fashion-MNIST", "mnist": "MNIST", "notmnist": "notMNIST"}
ANGLES = tuple(range(0, 181, 30))


def main() -> None:
    rows = read("images")
    for data, others in OTHERS.items():
        mine = [row for row in rows if row["data"] == data]
        keys = ["nll", "accuracy", "ece", "brier"]
        header = ["", "NLL", "accuracy", "ECE", "Brier"]
        for other in others:
            keys += [f"confidence_{other}", f"auroc_{other}"]
            header += [f"confidence on {NAMES[other]}", f"AUROC {NAMES[other]}"]
        table = [
            [row["method"], *(f"{row[key]:.3f}" for key in keys), f"{row['seconds']:.0f}"] for row in mine
        ]
        write(f"images_{data}", [*header, "CPU seconds to fit"], table)
    turned = [row for row in rows if "rotated_0_nll" in row]
    for key, name in (("nll", "NLL"), ("ece", "ECE")):
        write(
            f"images_rotated_{key}",
            [f"{name} at", *(f"{angle}°" for angle in ANGLES)],
            [[row["method"], *(f"{row[f'rotated_{a}_{key}']:.2f}" for a in ANGLES)] for row in turned],
        )


if __name__ == "__main__":
    main()
