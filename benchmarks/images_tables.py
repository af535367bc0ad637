# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Turns the results of ``images.py`` into the table of the documentation.

    python benchmarks/images_tables.py
"""

from rank1_tables import read, write


def main() -> None:
    rows = [row for row in read("images") if row["data"] == "fashion"]
    keys = (
        "nll",
        "accuracy",
        "ece",
        "brier",
        "confidence_mnist",
        "auroc_mnist",
        "confidence_notmnist",
        "auroc_notmnist",
    )
    header = ["", "NLL", "accuracy", "ECE", "Brier", "confidence on MNIST", "AUROC MNIST", "confidence on notMNIST",
              "AUROC notMNIST", "CPU seconds to fit"]  # fmt: skip
    table = [[row["method"], *(f"{row[key]:.3f}" for key in keys), f"{row['seconds']:.0f}"] for row in rows]
    write("images_fashion", header, table)


if __name__ == "__main__":
    main()
