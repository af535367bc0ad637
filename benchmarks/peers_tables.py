# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Turns the results of ``peers.py`` into the tables of the documentation.

    python benchmarks/peers_tables.py
"""

from typing import Any

from rank1_tables import read, write


def interval(cost: dict[str, Any]) -> str:
    return f"{cost['median']:.1f} ({cost['smallest']:.1f} to {cost['largest']:.1f})"


def milliseconds(cost: dict[str, Any]) -> str:
    return f"{cost['median'] * cost['unit_ms']:,.0f}"


def main() -> None:
    rows = read("peers")
    write(
        "peers_kl",
        ["library", "reported", "over the analytic sum", "spread of an evaluation"],
        [[r["library"], f"{r['value']:,.2f}", f"{r['ratio']:.6f}", f"{r['spread']:.1f}"]
         for r in rows if r.get("work") == "kl"],
    )  # fmt: skip
    errors: dict[str, list[str]] = {}
    for r in rows:
        if r.get("work") == "evidence":
            errors.setdefault(r["library"], ["", "", ""])[0] = f"{r['error']:.0e}"
        elif r.get("work") == "variance":
            column = 1 if r["problem"] == "linear" else 2
            errors.setdefault(r["library"], ["", "", ""])[column] = f"{r['largest_relative_error']:.0e}"
    write(
        "peers_laplace_correct",
        [
            "library",
            "log evidence, absolute",
            "variance, linear, relative",
            "variance, tanh network, relative",
        ],
        [[name, *values] for name, values in errors.items()],
    )
    predict = {r["library"]: interval(r) for r in rows if r.get("work") == "predict"}
    write(
        "peers_step",
        ["library", "step, in plain steps", "40 steps, ms", "peak memory, MiB", "20 draws, in 20 plain passes"],
        [[r["library"], interval(r), milliseconds(r), f"{r['peak_mib']:.0f}", predict.get(r["library"], "")]
         for r in rows if r.get("work") == "step"],
    )  # fmt: skip
    table = [
        [
            r["structure"],
            r["library"],
            *(text for cost in (r["fit"], r["predict"]) for text in (interval(cost), milliseconds(cost))),
            f"{r['peak_mib']:.0f}",
        ]
        for r in rows
        if r.get("work") == "laplace"
    ]
    table += [
        [r["job"].split(" ", 2)[2], ", ".join(r["job"].split(" ", 2)[:2]), r["skipped"], "", "", "", ""]
        for r in rows
        if "skipped" in r and r["job"].startswith("laplace-torch")
    ]
    write(
        "peers_laplace",
        ["structure", "library", "fit, epochs", "ms", "predict 500, epochs", "ms", "peak memory, MiB"],
        sorted(table),
    )


if __name__ == "__main__":
    main()
