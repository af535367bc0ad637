# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""How the batches of a data set fit together: along which dimension of each site, and with which weight."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.model.handlers import Site, is_deterministic
from pyro_bnn.model.plates import DataPlate, Rows, close, plates_of, site_shape


class Join:
    r"""
    Joins what the sites of a model say batch by batch.

    A site in the data plate is joined along the plate's dimension, and its densities are summed; a site outside counts once
    where it is the same in every batch. The data plate is the one whose size differs between batches or from its full size;
    if neither does, the one that follows when the model runs on fewer rows.
    """

    def __init__(self, find: Callable[[], list[Rows]]) -> None:
        self._find = find
        self.shapes: dict[str, list[torch.Size]] = {}
        self.plates: dict[str, list[dict[int, DataPlate]]] = {}
        self.deterministic: set[str] = set()
        self.known: Rows | None = None
        self.sizes: list[dict[str, int]] = []  # by batch and plate
        self.num_batches = 0

    def add(self, sites: Mapping[str, Site], ndims: Mapping[str, int] | None = None) -> None:
        """Notes the sites of a batch; ``ndims`` are the numbers of batch dimensions under one draw, where this run has more."""
        self.num_batches += 1
        self.sizes.append({})
        for name, site in sites.items():
            if is_deterministic(site):
                continue
            shape, plates = site_shape(site), plates_of(site)
            if ndims is not None and name in ndims:
                own = len(site["fn"].batch_shape) - ndims[name]
                shape = shape[own:]
                plates = {i - own: plate for i, plate in plates.items() if i >= own}
            self.shapes.setdefault(name, []).append(shape)
            self.plates.setdefault(name, []).append(plates)
            self.sizes[-1] |= {plate.name: plate.size for plate in plates.values()}

    def add_value(self, name: str, shape: torch.Size) -> None:
        """Notes the shape of a deterministic site in the batch that was added last: its plates do not tell."""
        self.deterministic.add(name)
        self.shapes.setdefault(name, []).append(shape)

    def differing(self, name: str) -> list[int]:
        """The dimensions in which the values of a site differ in size between batches."""
        shapes = self.shapes[name]
        if len({len(shape) for shape in shapes}) > 1:
            raise ValueError(
                f"site {name!r} has values of {sorted({len(s) for s in shapes})} dimensions in the batches."
            )
        return [i for i in range(len(shapes[0])) if len({shape[i] for shape in shapes}) > 1]

    @cached_property
    def names(self) -> set[str]:
        """The data plates that the batches themselves show: of differing sizes, or smaller than what they stand for."""
        found = set()
        for name, runs in self.plates.items():
            axes = self.differing(name)
            found |= {plates[axis].name for plates in runs for axis in axes if axis in plates}
            found |= {p.name for plates in runs for p in plates.values() if p.size < p.full_size}
        return found

    @cached_property
    def rows(self) -> Rows | None:
        """What the first batch shows when fewer of its rows run; ``None`` if nothing follows."""
        found = self._find()
        if len({rows.plates for rows in found if rows.plates}) > 1:
            names = sorted({name for rows in found for name in rows.plates})
            raise ValueError(
                f"the batches could be parts of any of the plates {names}, which all follow the sizes of the "
                "arguments: write the plate along which the data are cut as pyro.plate(name, N, subsample_size=len(x)), "
                "with the size N of the whole data, or pass the data in one batch."
            )
        return found[0] if found else None

    def know(self, rows: Rows) -> None:
        """The batches are pieces of one, cut in this way."""
        self.known = rows

    def axis(self, name: str) -> int | None:
        """The dimension of the rows in one value of a site, from the left; ``None`` outside the data plate."""
        if self.known is not None:
            return self.known.axes.get(name)
        if self.num_batches == 1:
            return None
        axes = self.differing(name)
        if name in self.deterministic:
            if len(axes) == 1 and self._are_rows([shape[axes[0]] for shape in self.shapes[name]]):
                return axes[0]
            return self.rows.axes.get(name) if self.rows is not None else None
        plates = self.plates[name][0]
        names = self.names or (self.rows.plates if plates and self.rows is not None else frozenset())
        found = [i for i, plate in plates.items() if plate.name in names]
        if len(found) > 1:
            shown, runs = found, self.plates[name]
            found = [i for i in shown if any(p[i].size < p[i].full_size for p in runs if i in p)]
            if len(found) != 1:
                raise ValueError(
                    f"site {name!r} is in the plates {[plates[i].name for i in shown]}, and the batches are parts of each of them or of "
                    "any: they are joined along one plate. Pass all the data in one batch, with batch_size= to save memory."
                )
        if found:
            return found[0]
        if not self.names and self.rows is not None and name in self.rows.axes:
            return self.rows.axes[name]
        return axes[0] if axes and not plates else None  # the rows are a dimension of the event

    def _are_rows(self, sizes: list[int]) -> bool:
        """Whether these are the sizes of a data plate in all batches."""
        return any([run.get(name) for run in self.sizes] == sizes for name in self.names)

    def cat(self, name: str, values: list[Tensor], lead: int = 1, *, random: bool = False) -> Tensor:
        """
        Joins the values of a site, per batch ``lead dims + value shape + rest``. Of draws (``random``) the first are as good as
        others outside the data plate; other values must be the same there.
        """
        if len(values) == 1:
            return values[0]
        axis = self.axis(name)
        if axis is None or values[0].dim() <= lead + axis:
            alike = len({value.shape for value in values}) == 1
            if not alike or not (random or all(close(values[0], value) for value in values[1:])):
                raise ValueError(
                    f"site {name!r} has no dimension of the rows, and other values in each batch: put it in the plate of "
                    "the data, or predict the batches one by one."
                )
            return values[0]
        dim = lead + axis
        if len({(*value.shape[:dim], *value.shape[dim + 1 :]) for value in values}) > 1:
            raise ValueError(
                f"site {name!r} has values of the shapes {[tuple(v.shape[lead:]) for v in values[:3]]} in the batches, with the rows in "
                f"dimension {axis}: they differ in others too and are no array together. Predict the batches one by one, or pad the "
                "observations to one size and mask what was added."
            )
        return torch.cat(values, dim)

    def densities(self, name: str, terms: list[Tensor], lead: int = 1) -> Tensor:
        """
        Joins pointwise log densities as :meth:`cat` does; where the rows of a batch have one density together, as the
        dimensions of an event, those of the batches are summed.
        """
        axis = self.axis(name) if len(terms) > 1 else None
        together = terms[0].dim() <= lead + (axis or 0)
        if together and (axis is not None or not all(close(terms[0], term) for term in terms[1:])):
            return torch.stack(terms).sum(0)
        return self.cat(name, terms, lead)

    def total(self, name: str, terms: list[Tensor]) -> Any:
        """
        The log density of a site in the joint density of all the data: the sum over batches, and the factor
        :math:`N / n` where the plate stands for more rows N than the n that were seen. The terms are summed within the batches,
        with scale, mask and the factors of subsampled plates.
        """
        axis = self.subsampled(name) if self.num_batches == 1 else self.axis(name)
        if axis is None:
            return terms[0] if all(close(terms[0], term) for term in terms[1:]) else torch.stack(terms).sum(0)
        plates = [plates.get(axis) for plates in self.plates[name]]
        if any(plate is None for plate in plates):
            return torch.stack(terms).sum(0)
        present = [plate for plate in plates if plate is not None]
        # a site need not be there in every batch in which its plate is
        seen = sum(sizes.get(present[0].name, 0) for sizes in self.sizes)
        full = max(plate.full_size for plate in present)
        each = torch.stack([t / plate.factor for t, plate in zip(terms, present, strict=True)]).sum(0)
        return each * max(1.0, full / seen) if any(p.size != p.full_size for p in present) else each

    def subsampled(self, name: str) -> int | None:
        """The dimension of a plate that does not have its full size."""
        return next((i for i, p in self.plates[name][0].items() if p.size != p.full_size), None)
