# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Exports are whole or not there: full disks, limits, killed writers, links, permissions."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from pyro_bnn.diagnostics import to_datatree, write_tree
from pyro_bnn.diagnostics.storage import TreeWriter
from pyro_bnn.infer.train.files import Replacement
from tests.common import small_disk
from tests.infer.models import linear_data, linear_model

SUFFIXES = [".nc", ".zarr"]


def export(path: Path, num_samples: int, *, block_size: int = 20, **options: Any) -> xr.DataTree:
    x, y = linear_data(17)
    draws = {"weight": torch.randn(num_samples, 3)}
    return to_datatree(linear_model, draws, (x, y), path=path, block_size=block_size, weights=True, **options)


def opened(path: Path) -> xr.DataTree:
    if path.suffix == ".zarr":
        return xr.open_datatree(path, engine="zarr", consolidated=False)
    return xr.open_datatree(path, engine="h5netcdf")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_full_disk_is_an_error_and_keeps_the_old_file(suffix: str, tmp_path: Path) -> None:
    with small_disk(tmp_path, "2m"):
        path = tmp_path / f"tree{suffix}"
        with export(path, 40) as tree:
            before = tree["log_likelihood"]["obs"].values
            assert tree.attrs["complete"] == 1
        with pytest.raises(OSError, match=f"what was there before is unchanged.*tree{suffix}"):
            export(path, 20_000, block_size=200)
        assert names(tmp_path) == [path.name]
        with opened(path) as tree:
            np.testing.assert_array_equal(tree["log_likelihood"]["obs"].values, before)
        with export(path, 60) as tree:  # the disk is usable again
            assert tree["log_likelihood"].sizes["draw"] == 60
        whole = xr.DataTree.from_dict({"posterior": xr.Dataset({"z": ("draw", np.zeros(300_000))})})
        with pytest.raises(OSError, match="takes 2400000 bytes"):
            write_tree(whole, path)
        assert whole["posterior"]["z"].size == 300_000
        with opened(path) as tree:
            assert tree["log_likelihood"].sizes["draw"] == 60


@pytest.mark.parametrize("step", [690, pytest.param(230, marks=pytest.mark.slow)])
def test_every_size_of_disk(step: int, tmp_path: Path) -> None:
    """Whatever write is the first that does not fit, it is an error of the operating system and nothing worse."""
    outcomes = set()
    for kilobytes in range(100, 1500, step):
        folder = tmp_path / str(kilobytes)
        folder.mkdir()
        with small_disk(folder, f"{kilobytes}k"):
            try:
                export(folder / "tree.nc", 400).close()
            except OSError:
                assert names(folder) == []
                outcomes.add("full")
            else:
                outcomes.add("whole")
    assert outcomes == {"full", "whole"}


WRITER = """
import resource, sys, torch
from pathlib import Path
from tests.diagnostics.test_files import export
torch.set_num_threads(1)
path, limit = Path(sys.argv[1]), int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
print("begin", flush=True)
export(path, 20_000, block_size=100).close()
print("end", flush=True)
"""


def start(path: Path, limit: int = 0) -> subprocess.Popen[bytes]:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRITER, str(path), str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)


def test_limit_of_the_file_size(tmp_path: Path) -> None:
    path = tmp_path / "tree.nc"
    export(path, 40).close()
    before = path.read_bytes()
    process = start(path, 10**6)
    out, err = process.communicate()
    assert process.returncode == 1  # an exception, no signal
    assert b"File too large; what was there before is unchanged" in err
    assert b"end" not in out
    assert path.read_bytes() == before
    assert names(tmp_path) == ["tree.nc"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_killed_writer(suffix: str, tmp_path: Path) -> None:
    """Nothing appears under the name; what is left is removed by the next writer of the file, when nobody works on it."""
    path = tmp_path / f"tree{suffix}"
    process = start(path)
    assert process.stdout is not None
    process.stdout.readline()
    while not any(tmp_path.iterdir()):
        time.sleep(0.01)
    time.sleep(0.3)
    other = Replacement(path)
    assert process.poll() is None
    assert len(names(tmp_path)) == 2  # each writer leaves the other alone
    process.kill()
    process.communicate()
    assert not path.exists()
    other.discard()
    assert len(names(tmp_path)) == 1
    with export(path, 20) as tree:
        assert tree["log_likelihood"].sizes["draw"] == 20
    assert names(tmp_path) == [path.name]


def test_killed_between_the_moves_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "tree.zarr"
    export(path, 20).close()
    left = tmp_path / ".tree.zarr.abcdef.tmp" / "before"
    left.mkdir(parents=True)
    path.rename(left / path.name)
    Replacement(path).discard()
    assert names(tmp_path) == [path.name]
    with opened(path) as tree:
        assert tree["log_likelihood"].sizes["draw"] == 20


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_error_of_the_model(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"tree{suffix}"
    calls = 0

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise FileNotFoundError("a file of the model")
        linear_model(x, y)

    with pytest.raises(FileNotFoundError, match="a file of the model"):
        to_datatree(model, {"weight": torch.randn(90, 3)}, linear_data(17), path=path, block_size=20)
    assert names(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_permissions_and_links(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    target, link = folder / f"target{suffix}", tmp_path / f"link{suffix}"
    link.symlink_to(target)
    old = os.umask(0o027)
    try:
        export(link, 20).close()
    finally:
        os.umask(old)
    assert link.is_symlink()
    assert names(folder) == [target.name]
    assert target.stat().st_mode & 0o777 == (0o750 if suffix == ".zarr" else 0o640)
    if suffix == ".nc":
        target.chmod(0o604)
    with export(link, 40) as tree:
        assert tree["log_likelihood"].sizes["draw"] == 40
    assert link.is_symlink()
    if suffix == ".nc":
        assert target.stat().st_mode & 0o777 == 0o604


def test_written_over_while_it_is_open(tmp_path: Path) -> None:
    with export(tmp_path / "tree.nc", 40) as old, export(tmp_path / "tree.nc", 60) as new:
        assert old["log_likelihood"].load().sizes["draw"] == 40
        assert new["log_likelihood"].load().sizes["draw"] == 60


def test_names_of_the_wrong_kind(tmp_path: Path) -> None:
    (tmp_path / "folder.nc").mkdir()
    (tmp_path / "file.zarr").touch()
    for name, kind in (("folder.nc", "folder"), ("file.zarr", "file")):
        with pytest.raises(ValueError, match=f"{name} is a {kind}"):
            TreeWriter(tmp_path / name)
