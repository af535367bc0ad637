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
from tests.infer.distributed_script import everything, training_part
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


def expected_variance() -> torch.Tensor:
    """Running variances of two parts, each by hand, averaged."""
    total: torch.Tensor | float = 0.0
    for r in range(2):
        running = torch.ones(3)
        for _ in range(3):
            for x, _ in training_part(r, 2):
                for _ in range(2):  # the model normalises each batch twice
                    running = 0.9 * running + 0.1 * x.var(0)
        total = total + running / 2
    return torch.as_tensor(total)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Training steps, curvature in every structure, Laplace posteriors, evidence, Hessian-free solves."""
    first, second = run_world(tmp_path, 2)
    single = everything(0, 1)
    for name, value in single.items():
        assert torch.equal(first[name], second[name]), name  # the processes never drift apart
        # the variance within the parts of a batch is not that of the batch
        if not name.startswith("shared") and name != "statistics 0.running_var":
            assert_close(first[name], value, rtol=1e-6, atol=1e-12)
    assert_close(first["statistics 0.running_var"], expected_variance())
    pyro.set_rng_seed(0)
    x, y = linear_data(40)
    _, covariance = linear_posterior(x, y)
    assert_close(first["ggn covariance"], covariance, rtol=1e-6)
