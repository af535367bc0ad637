# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Trees on disk, written group by group and draws by draws."""

import errno
import importlib.util
import math
import os
import shutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pyro_bnn.infer.train.files import Replacement, reserve

if TYPE_CHECKING:
    import xarray as xr

#: Bytes of a chunk of a netCDF variable, at least one draw.
CHUNK_BYTES = 2**20
#: HDF5 does not take chunks of 4 GiB; larger ones are left to its own choice.
_LARGEST_CHUNK = 2**31
#: Bytes that HDF5 may need for the description of a variable, and of a file.
_HEADER_BYTES = 2**15


class TreeWriter:
    """
    Writes datasets to the groups of a file, each in one piece or in blocks along ``draw``.

    The file appears under its name when it is closed, with the attribute ``complete``; until then, after an error (a
    full disk) and after a kill the name holds what was there before. Used as a context, it closes at the end.

    :param path: a netCDF file, or a Zarr store if the name ends in ``.zarr``; what is there is replaced.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self.zarr = self.path.suffix == ".zarr"
        needed = "zarr" if self.zarr else "h5netcdf"
        if importlib.util.find_spec(needed) is None:
            raise ImportError(
                f"Writing {self.path.name} needs the package {needed}: pip install 'pyro-bnn[storage]'."
            )
        if self.path.exists() and self.path.is_dir() != self.zarr:
            kind = "folder" if self.path.is_dir() else "file"
            raise ValueError(
                f"path: {self.path} is a {kind}. Choose another name, which ends in .zarr for a Zarr store."
            )
        self._written: dict[str, int] = {}
        self._attrs: dict[Any, Any] = {}
        self._new: Replacement | None = Replacement(self.path)
        self._file = self._new.path
        self._write_root("w", {})

    def _write_root(self, mode: Literal["w", "a"], attrs: Mapping[Any, Any]) -> None:
        import xarray as xr

        root = xr.Dataset(attrs=attrs)
        if self.zarr:
            root.to_zarr(self._file, mode=mode, consolidated=False)
        else:
            self._file.touch()
            reserve(self._file, 2 * _HEADER_BYTES)
            root.to_netcdf(self._file, mode=mode, engine="h5netcdf")

    def set_attrs(self, attrs: Mapping[Any, Any]) -> None:
        """Sets the attributes of the file, which are written at the end."""
        self._attrs = dict(attrs)

    def append_all(self, groups: "Mapping[str, xr.Dataset]") -> None:
        """Writes several groups, see :meth:`append`."""
        for name, group in groups.items():
            self.append(name, group)

    def append(self, name: str, group: "xr.Dataset") -> None:
        """Writes a group, or appends to it along ``draw`` if it has been written before; empty ones are left out."""
        if not group.data_vars:
            return
        first = name not in self._written
        encoding = _chunks(group) if first and "draw" in group.dims else {}
        if first:
            self._written[name] = _rounding(group, encoding)
        if self.zarr:
            along = None if first else "draw"
            group.to_zarr(self._file, mode="a", group=name, consolidated=False, append_dim=along)
            return
        reserve(self._file, group.nbytes + self._written[name] + len(group.variables) * _HEADER_BYTES)
        if first:
            group.to_netcdf(
                self._file,
                mode="a",
                group=name,
                engine="h5netcdf",
                unlimited_dims=["draw"] if "draw" in group.dims else [],
                encoding=encoding,
            )
        else:
            self._extend(name, group)

    def _extend(self, name: str, group: "xr.Dataset") -> None:
        import h5netcdf

        with h5netcdf.File(self._file, "a") as file:
            target = file[name]
            start = target.dimensions["draw"].size
            stop = start + group.sizes["draw"]
            target.resize_dimension("draw", stop)
            for key, variable in group.variables.items():
                if "draw" in variable.dims:
                    index = tuple(slice(start, stop) if d == "draw" else slice(None) for d in variable.dims)
                    target.variables[key][index] = variable.values

    def close(self) -> None:
        """Marks the file as complete and moves it to its place."""
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        new, self._new = self._new, None
        if new is None:
            return
        if error is not None:
            new.__exit__(kind, error, trace)
            return
        with new:
            self._write_root("a", self._attrs | {"complete": 1})

    def open(self) -> "xr.DataTree":
        """The tree in the file, read when its values are used; closes the writer."""
        import xarray as xr

        self.close()
        if self.zarr:
            return xr.open_datatree(self.path, engine="zarr", consolidated=False)
        return xr.open_datatree(self.path, engine="h5netcdf")


def _chunks(group: "xr.Dataset") -> dict[str, dict[str, tuple[int, ...]]]:
    """Chunks of whole draws of a chain."""
    encoding = {}
    for name, variable in group.data_vars.items():
        if variable.dims[:2] == ("chain", "draw"):
            rest = variable.shape[2:]
            size = max(1, math.prod(rest) * variable.dtype.itemsize)
            if 0 < size < _LARGEST_CHUNK and all(rest):
                draws = max(1, min(group.sizes["draw"], CHUNK_BYTES // size))
                encoding[str(name)] = {"chunksizes": (1, draws, *rest)}
    return encoding


def _rounding(group: "xr.Dataset", encoding: dict[str, dict[str, tuple[int, ...]]]) -> int:
    """Bytes that blocks of draws may take beyond their values: chunks that are begun are written whole."""
    return sum(
        group.sizes["chain"] * math.prod(found["chunksizes"]) * group[name].dtype.itemsize
        for name, found in encoding.items()
    )


def write_tree(tree: "xr.DataTree", path: str | PathLike[str]) -> None:
    """
    Writes a tree group by group to netCDF (with h5netcdf), or to Zarr if the name ends in ``.zarr``.

    Groups leave the tree as they are written, so that memory shrinks while the file grows. To write a posterior that
    does not fit into memory at all, see ``path`` of :func:`~pyro_bnn.diagnostics.to_datatree`.

    :param tree: a tree made by :func:`~pyro_bnn.diagnostics.to_datatree`; it is empty afterwards.
    :param path: the file, which appears when it is complete.
    :raises OSError: if the disk has no room for the tree, which is whole then, as is a file that was there before.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> import tempfile
        >>> from pyro_bnn import to_datatree
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_tree(to_datatree(model, {"w": torch.randn(4)}, (x, x)), f"{folder}/tree.nc")
    """
    folder = Path(os.path.realpath(path)).parent
    folder.mkdir(parents=True, exist_ok=True)
    space = shutil.disk_usage(folder).free
    if space < tree.nbytes:
        raise OSError(errno.ENOSPC, f"the tree takes {tree.nbytes} bytes, the disk has {space}", str(path))
    with TreeWriter(path) as writer:
        writer.set_attrs(tree.attrs)
        for name in list(tree.children):
            group = tree[name].to_dataset()
            del tree[name]
            writer.append(name, group)
            del group
