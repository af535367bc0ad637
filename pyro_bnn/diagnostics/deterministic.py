# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Values of deterministic sites under posterior draws, collected over the batches of the data."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.infer.data import Batch, batch_size, slice_batch
from pyro_bnn.infer.vectorize import FAILURES, ModelRunner


class DeterministicValues:
    """
    Collects the values of sites batch by batch and joins them: along the dimension of the examples where a site has one,
    once where it is the same in all batches. Other sites are left out with a warning.

    :param names: the sites.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.parts: dict[str, list[Tensor]] = {name: [] for name in names}
        self.axes: dict[str, int] = {}
        self.first: Batch | None = None
        self.batches = 0

    def add(self, runner: ModelRunner, batch: Batch, readings: Mapping[Any, Tensor]) -> None:
        """
        Takes a batch's values.

        :param runner: what ran the model.
        :param batch: the arguments of the model.
        :param readings: values under ``("value", name)``, shape ``(S,) + value shape``; sites may be missing.
        """
        self.batches += 1
        if self.batches == 2 and self.first is not None:  # a single batch has nothing to be joined with
            shapes = {name: parts[0].shape[1:] for name, parts in self.parts.items() if parts}
            self.axes = example_axes(runner, self.first, shapes)
        self.first = batch if self.batches == 1 else None
        for name, parts in self.parts.items():
            if ("value", name) in readings:
                parts.append(readings["value", name])

    def joined(self) -> dict[str, Tensor]:
        """The values of all batches by site, shape ``(S,) + value shape``."""
        found, left_out = {}, []
        for name, parts in self.parts.items():
            axis = self.axes.get(name)
            if len(parts) < self.batches:
                left_out.append(name)
            elif len(parts) == 1:
                found[name] = parts[0]
            elif axis is not None:
                found[name] = torch.cat(parts, axis + 1)
            elif all(_same(part, parts[0]) for part in parts[1:]):
                found[name] = parts[0]
            else:
                left_out.append(name)
        if left_out:
            warnings.warn(
                f"The deterministic sites {left_out} are left out: they are not in every run of the model, or their values "
                "depend on the batch.",
                stacklevel=2,
            )
        return found


def example_axes(runner: ModelRunner, batch: Batch, shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    """
    The dimension of the examples of each site that has one: the one that shrinks when the model runs on fewer of them.

    :param runner: what runs the model.
    :param batch: the arguments of the model.
    :param shapes: of the values of deterministic sites in a run on the whole batch.
    :return: positions in the shape of the value, by site.
    """
    size = batch_size(batch)
    if not shapes or size is None or size < 2:
        return {}
    try:
        fewer = runner.single(slice_batch(batch, size, slice(0, size - 1)), 0)
    except FAILURES:  # a model that needs all of its examples has one batch
        return {}
    axes: dict[str, int] = {}
    for name, shape in shapes.items():
        if name in fewer and len(shorter := fewer[name]["value"].shape) == len(shape):
            changed = [i for i, sizes in enumerate(zip(shape, shorter, strict=True)) if len(set(sizes)) > 1]
            if changed:
                axes[name] = changed[0]
    return axes


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two values differ by rounding only."""
    if a.shape != b.shape:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    finite = a.isfinite()
    scale = float(a[finite].abs().max()) if finite.any() else 0.0
    tolerance = scale * 1e3 * torch.finfo(a.dtype).eps
    return torch.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True)
