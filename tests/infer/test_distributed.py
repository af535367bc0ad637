# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyro
import torch

from tests.common import assert_close
from tests.infer.distributed_script import everything
from tests.infer.models import linear_data, linear_posterior

SCRIPT = Path(__file__).with_name("distributed_script.py")


def run_world(folder: Path, size: int) -> list[dict[str, Any]]:
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(r), str(size), str(folder / "store"), str(folder / "out")],
            env=env,
        )
        for r in range(size)
    ]
    assert [p.wait(timeout=300) for p in processes] == [0] * size
    return [torch.load(folder / f"out.{r}") for r in range(size)]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Training steps, curvature in every structure, Laplace posteriors, evidence, Hessian-free solves."""
    first, second = run_world(tmp_path, 2)
    single = everything(0, 1)
    for name, value in single.items():
        assert torch.equal(first[name], second[name]), name  # the processes never drift apart
        if not name.startswith("shared"):
            assert_close(first[name], value, rtol=1e-6, atol=1e-12)
    pyro.set_rng_seed(0)
    x, y = linear_data(40)
    _, covariance = linear_posterior(x, y)
    assert_close(first["ggn covariance"], covariance, rtol=1e-6)
