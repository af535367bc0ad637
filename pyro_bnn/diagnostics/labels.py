# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Names of dims and coordinates of the variables of a tree, and datasets of tensors with them."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    import xarray as xr

#: Tensors with the names of their dims, those of draws left out.
Variables = Mapping[str, tuple[Tensor, Sequence[str]]]


class Labels:
    """
    The names of dims.

    :param coords: coordinates by dim, of the user.
    :param dims: the names of the dims of a variable, of the user; of others they are what :meth:`name_sites` is told.
    :ivar dims: by site the names of the dims of one of its values.
    """

    def __init__(self, coords: Mapping[str, Any] | None, dims: Mapping[str, Sequence[str]] | None) -> None:
        self.coords = dict(coords or {})
        self.given = {name: tuple(own) for name, own in (dims or {}).items()}
        self.dims: dict[str, tuple[str, ...]] = {}

    def name_sites(self, found: Mapping[str, tuple[str, ...]]) -> None:
        """Notes the dims of sites; those that the user names have the user's names."""
        self.dims |= found
        for name in found:
            # a variable may not share its name with a dim
            dims = tuple(f"{d}_dim" if d in self.dims else d for d in found[name])
            self.dims[name] = own = self.given.get(name, dims)
            if len(own) != len(dims):
                raise ValueError(f"dims of {name!r}: {len(dims)} names expected, got {list(own)}.")

    def check(self, arguments: Mapping[str, Tensor], every_dim: bool) -> None:
        """Refuses dims of what is no site and no argument of the model, and where every dim is known, coords of others."""
        unknown = sorted(set(self.given) - set(self.dims) - set(arguments))
        if unknown:
            raise ValueError(
                f"dims: {unknown} are no sites and no arguments of the model; there are {sorted(self.dims)}."
            )
        known = {d for dims in (*self.dims.values(), *self.given.values()) for d in dims}
        known |= {dim for name, value in arguments.items() for dim in numbered(name, value.dim())}
        unknown = sorted(set(self.coords) - known - {"chain", "draw"})
        if unknown and every_dim:
            raise ValueError(f"coords: no variable has the dims {unknown}; there are {sorted(known)}.")

    def of(self, values: Mapping[str, Tensor], names: Collection[str] | None = None) -> Variables:
        """The values of some of the sites with their dims."""
        chosen = values if names is None else names
        return {name: (values[name], self.dims[name]) for name in chosen if name in values}

    def dataset(self, variables: Variables, sampled: bool = True) -> "xr.Dataset":
        """A dataset from tensors, with chain and draw first if ``sampled``."""
        import xarray as xr

        lead = ("chain", "draw") if sampled else ()
        sizes: dict[str, int] = {}
        arrays: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
        for name, (value, dims) in variables.items():
            key = in_tree(name)
            if key in arrays:
                raise ValueError(
                    f"two sites are named {key!r} in a tree, where {name!r} is written with dots: rename one."
                )
            shape = value.shape[len(lead) :]
            own = [in_tree(dim) for dim in dims][: len(shape)]
            if taken := {"chain", "draw"} & {key, *own}:
                raise ValueError(
                    f"site {name!r}: {taken.pop()!r} is the name of a dimension of every tree: rename the site or plate of this name."
                )
            if len(own) < len(shape):
                raise ValueError(f"dims of {name!r}: {len(shape)} names expected, got {own}.")
            for i, (dim, size) in enumerate(zip(own, shape, strict=True)):
                if sizes.setdefault(dim, size) != size:  # two plates of one name with different sizes
                    own[i] = f"{key}_dim_{i}"
                    sizes[own[i]] = size
            arrays[key] = (*lead, *own), value.numpy(force=True)
        if sampled and arrays:
            sizes |= dict(zip(lead, next(iter(arrays.values()))[1].shape, strict=False))
        used = {d for dims, _ in arrays.values() for d in dims}
        coords = {d: self._coordinate(d, n) for d, n in sizes.items() if d in used}
        return xr.Dataset(arrays, coords=coords)

    def _coordinate(self, dim: str, size: int) -> Any:
        if dim not in self.coords or dim in ("chain", "draw"):
            return np.arange(size)
        if len(self.coords[dim]) != size:
            raise ValueError(
                f"coords of the dim {dim!r}: {len(self.coords[dim])} values for a size of {size}."
            )
        return self.coords[dim]


def numbered(name: str, count: int) -> tuple[str, ...]:
    """Names of dims that have none."""
    return tuple(f"{name}_dim_{i}" for i in range(count))


def in_tree(name: str) -> str:
    """A name as it stands in a DataTree, where slashes are paths."""
    return name.replace("/", ".")
