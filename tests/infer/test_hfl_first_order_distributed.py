# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""First-order runs of two processes, replicated and sharded, against dense Hessians of one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.common import assert_close
from tests.infer.first_order_script import deep, linear, reference

SCRIPT = Path(__file__).with_name("first_order_script.py")


def run_world(folder: Path, kind: str, size: int = 2) -> list[dict[str, Any]]:
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    arguments = [str(folder / "store"), str(folder / "out"), kind]
    processes = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(rank), str(size), *arguments], env=env)
        for rank in range(size)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0] * size
    return [torch.load(folder / f"out.{rank}") for rank in range(size)]


@pytest.mark.parametrize(
    "kind",
    [
        "ddp",
        "fsdp",
        pytest.param("ddp, views", marks=pytest.mark.slow),
        pytest.param("hsdp", marks=pytest.mark.slow),
    ],
)
def test_two_processes_have_the_covariance_of_all_data(kind: str, tmp_path: Path) -> None:
    first, second = run_world(tmp_path, kind)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    exact = reference(linear)
    assert_close(first["linear"], exact, rtol=1e-7)
    assert int(first["linear: latents"]) == 4
    assert_close(first["deep"], reference(deep), rtol=1e-4)  # differences over one part in a thousand
    assert int(first["deep: latents"]) == 26
    for name in ("linear", "linear, one sweep"):
        lower, upper = first[f"{name}: bounds"].squeeze(-1)
        assert (lower <= exact.diagonal() * (1 + 1e-9)).all()
        assert (exact.diagonal() * (1 - 1e-9) <= upper).all()
    assert_close(*first["linear: bounds"], rtol=1e-5)
