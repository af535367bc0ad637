# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
The same work by pyro_bnn and by other libraries: is the number right, and what does it cost?

Correctness, in float64 where the library allows it:

* ``kl``: the divergence of a mean-field posterior from its prior, against the analytic sum over all weights;
* ``evidence``: the log evidence of a linear regression, against the closed form;
* ``variance``: predictive variances of a linear regression and of a tanh network, against dense matrices.

Cost, on a multilayer perceptron 784-100-100-10 with random data:

* ``step``: a step of mean-field variational inference with 128 examples, in steps of the plain network;
* ``predict``: the mean probabilities of 500 examples over 20 draws of that posterior, in 20 passes of the plain network;
* ``laplace``: fitting a Laplace approximation to 1,000 examples and predicting 500, in epochs of the plain network.

Every job is a process of its own, so that memory (peak above that after imports) is its own, and a library that does
not import is left out by name. laplace-torch imports torchvision through torchmetrics and fails beside PyPI's
torchvision where torch is a CPU build: uninstall torchvision there. torch-uncertainty needs lightning and
torchvision for its trainer; its layers are loaded without them. TyXe is not on PyPI: its last sources run from
``PYTHONPATH``, with the function of Pyro that they miss put back.

    pip install -e '.[peers]' && pip install --no-deps torch-uncertainty && pip uninstall torchvision
    python benchmarks/peers.py --out benchmarks/results/peers.json
    python benchmarks/peers.py --smoke
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers_correct import laplace_torch_correct, ours_correct, pyro_correct
from peers_laplace import LAPLACE, laplace_torch_laplace, ours_laplace
from peers_mean_field import (
    bayesian_torch_mean_field,
    ours_mean_field,
    pyro_mean_field,
    torch_uncertainty_mean_field,
    tyxe_mean_field,
)
from peers_work import Rows

BACKENDS = ("CurvlinopsGGN", "BackPackGGN", "AsdlGGN")

JOBS: dict[str, Callable[[bool], Rows]] = {
    "pyro_bnn mean field": lambda small: ours_mean_field(small, packed=False),
    "pyro_bnn mean field, packed": lambda small: ours_mean_field(small, packed=True),
    "Pyro AutoNormal": pyro_mean_field,
    "TyXe": tyxe_mean_field,
    "bayesian-torch": bayesian_torch_mean_field,
    "torch-uncertainty": torch_uncertainty_mean_field,
    "pyro_bnn correctness": ours_correct,
    "Pyro AutoLaplaceApproximation": pyro_correct,
}
for _backend in BACKENDS:
    JOBS[f"laplace-torch {_backend} correctness"] = lambda small, b=_backend: laplace_torch_correct(small, b)  # type: ignore[misc]
for _structure in LAPLACE:
    JOBS[f"pyro_bnn {_structure}"] = lambda small, s=_structure: ours_laplace(small, s)  # type: ignore[misc]
    for _backend in BACKENDS:
        JOBS[f"laplace-torch {_backend} {_structure}"] = (  # type: ignore[misc]
            lambda small, s=_structure, b=_backend: laplace_torch_laplace(small, s, b)
        )


def run_job(name: str, options: argparse.Namespace) -> Rows:
    """Runs a job in a process of its own."""
    command = [sys.executable, __file__, "--job", name, "--threads", str(options.threads)]
    try:
        done = subprocess.run(
            command + ["--smoke"] * options.smoke,
            capture_output=True,
            text=True,
            timeout=options.timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [{"job": name, "skipped": f"did not finish in {options.timeout} s"}]
    if done.returncode:
        return [{"job": name, "skipped": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}]
    return [{"job": name, **row} for row in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="few examples and repetitions")
    parser.add_argument("--out", type=Path, help="JSON file of rows; jobs in it are not run again")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for a job")
    parser.add_argument("--only", nargs="*", default=list(JOBS), choices=list(JOBS), help="names of jobs")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    if options.job:
        print(json.dumps(JOBS[options.job](options.smoke)))
        return
    rows: Rows = json.loads(options.out.read_text()) if options.out and options.out.exists() else []
    done = {row["job"] for row in rows}
    common: dict[str, Any] = {"threads": options.threads, "python": sys.version.split()[0]}
    for name in ("torch", "pyro-ppl", "laplace-torch", "curvlinops-for-pytorch", "backpack-for-pytorch",
                 "bayesian-torch", "torch-uncertainty"):  # fmt: skip
        try:
            common[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            common[name] = None
    for name in options.only:
        if name in done:
            continue
        found = run_job(name, options)
        rows += [{**row, **common} for row in found]
        for row in found:
            print({k: v for k, v in row.items() if k != "job"} | {"job": name}, flush=True)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
