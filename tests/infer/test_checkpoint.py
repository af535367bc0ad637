# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import contextlib
import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch.utils.data import DataLoader, TensorDataset

from pyro_bnn.infer import Checkpoint, FitState, fit
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.infer.train.files import atomic_save
from tests.infer.models import linear_data, linear_model

SCRIPT = Path(__file__).with_name("resume_script.py")
quiet = partial(fit, linear_model, progress_bar=False)


def run_script(folder: Path, name: str, kill_after: tuple[int, float] | None = None) -> bool:
    """Runs the script; kills it that many steps and seconds after it has begun. Tells whether it finished."""
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    arguments = [str(folder / f"{name}.ckpt"), str(folder / f"{name}.pt")]
    process = subprocess.Popen([sys.executable, str(SCRIPT), *arguments], stdout=subprocess.PIPE, env=env)
    assert process.stdout is not None
    for number, _ in enumerate(process.stdout):
        if kill_after is not None and number == kill_after[0]:
            time.sleep(kill_after[1])
            process.kill()
    process.stdout.close()
    code = process.wait()
    assert code in (0, -9)
    return code == 0


@pytest.mark.slow
def test_killed_at_random_points_and_resumed(tmp_path: Path) -> None:
    """kill -9 anywhere, start again: the same losses and parameters, bit by bit."""
    assert run_script(tmp_path, "whole")
    chance = random.Random(0)
    kills = 0
    while not run_script(tmp_path, "killed", (chance.randrange(60, 160), chance.uniform(0, 0.01))):
        kills += 1
    assert kills >= 2
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["killed.ckpt", "killed.pt", "whole.ckpt", "whole.pt"]  # nothing left of killed writes
    whole, killed = torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "killed.pt")
    assert torch.equal(whole["losses"], killed["losses"])
    assert torch.equal(whole["random"], killed["random"])
    for name, value in whole["guide"].items():
        assert torch.equal(value, killed["guide"][name])


@pytest.mark.every(2)
@pytest.mark.parametrize("form", ["tensors", "loader", "loader with generator", "mixture"])
@pytest.mark.parametrize("stop", [1, 7, 10, 23])
def test_stopped_and_resumed(tmp_path: Path, form: str, stop: int) -> None:
    """In one process: every source of random numbers, at and inside the ends of epochs (5 batches)."""
    x, y = linear_data(40)

    def train(path: Path | None, stop: int | None) -> tuple[Any, Any]:
        pyro.set_rng_seed(5)
        generator = torch.Generator().manual_seed(3) if form == "loader with generator" else None
        loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, generator=generator)
        # the bound of a mixture runs the model once before its first step
        guide: Any = AutoMixture(linear_model, 2) if form == "mixture" else AutoNormal(linear_model)

        def callback(state: FitState) -> bool:
            np.random.rand()  # noqa: NPY002
            random.random()
            return state.step == stop

        result = quiet(
            guide,
            (x, y) if form == "tensors" else loader,
            num_steps=31,
            callbacks=callback,
            checkpoint=path,
        )
        return result, [*guide.parameters(), torch.rand(2), torch.tensor([np.random.rand(), random.random()])]  # noqa: NPY002

    expected, values = train(None, None)
    first, _ = train(tmp_path / "run", stop)
    assert first.num_steps == stop
    second, resumed = train(tmp_path / "run", None)
    assert torch.equal(second.losses, expected.losses)
    assert all(torch.equal(a, b) for a, b in zip(values, resumed, strict=True))
    again, _ = train(tmp_path / "run", None)
    assert (again.num_steps, again.stop_reason) == (31, "num_steps")


def test_plain_tensors_only(tmp_path: Path) -> None:
    quiet(AutoNormal(linear_model), linear_data(), num_steps=3, checkpoint=tmp_path / "run")
    state = torch.load(tmp_path / "run", weights_only=True)
    assert state["step"] == 3
    assert sorted(state["tensors"]) == [
        "guide.locs.weight_unconstrained",
        "guide.scales.weight_unconstrained",
    ]


def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    guide = AutoNormal(linear_model)
    quiet(guide, linear_data(), num_steps=5, checkpoint=path)
    before = path.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        result = quiet(guide, linear_data(), num_steps=8, checkpoint=path)
    assert result.num_steps == 8
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore:The checkpoint .* could not be written:RuntimeWarning")
def test_really_full_disk(tmp_path: Path) -> None:
    """A file system of 64 kB, filled while the run goes on: the checkpoint of before is there, whole, and is resumed."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if not hasattr(os, "geteuid") or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        guide, path = AutoNormal(linear_model), tmp_path / "run"
        quiet(guide, linear_data(), num_steps=5, checkpoint=path)
        good = torch.load(path, weights_only=True)
        with (tmp_path / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(bytes(512))
        with pytest.warns(RuntimeWarning, match="could not be written"):
            quiet(guide, linear_data(), num_steps=8, checkpoint=Checkpoint(path, every_steps=1))
        after = torch.load(path, weights_only=True)
        assert after["step"] == 5
        assert all(torch.equal(value, after["tensors"][n]) for n, value in good["tensors"].items())
        assert sorted(f.name for f in tmp_path.iterdir()) == ["ballast", "run"]
        (tmp_path / "ballast").unlink()
        assert quiet(AutoNormal(linear_model), linear_data(), num_steps=8, checkpoint=path).num_steps == 8
        assert torch.load(path, weights_only=True)["step"] == 8
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_interrupted_write_leaves_no_trace(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            raise KeyboardInterrupt

    atomic_save({"a": 1}, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        atomic_save({"a": Bomb()}, tmp_path / "run")
    assert torch.load(tmp_path / "run", weights_only=True)["a"] == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_file_of_another_guide(tmp_path: Path) -> None:
    quiet(AutoNormal(linear_model), linear_data(), num_steps=2, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match=r"another model or guide.*'guide.loc'"):
        quiet(AutoDiagonalNormal(linear_model), linear_data(), num_steps=2, checkpoint=tmp_path / "run")
    fresh = Checkpoint(tmp_path / "run", resume=False)
    assert (
        quiet(AutoDiagonalNormal(linear_model), linear_data(), num_steps=2, checkpoint=fresh).num_steps == 2
    )


def test_intervals(tmp_path: Path) -> None:
    steps = []

    class Counting(Checkpoint):
        def save(self, state: dict[str, Any], step: int) -> bool:
            steps.append(step)
            return super().save(state, step)

    quiet(
        AutoNormal(linear_model),
        linear_data(),
        num_steps=25,
        checkpoint=Counting(tmp_path / "a", every_steps=10),
    )
    assert steps == [10, 20, 25]
    steps.clear()
    quiet(
        AutoNormal(linear_model),
        linear_data(),
        num_steps=5,
        checkpoint=Counting(tmp_path / "b", every_seconds=0),
    )
    assert steps == [1, 2, 3, 4, 5]
