# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A random subset of the data that stands for all of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace

from pyro_bnn.curvature.stream import ExampleStream, SiteExamples
from pyro_bnn.model.data import Batch, iter_batches


@dataclass
class Subset:
    """
    Some of the examples.

    :ivar batches: arguments of the model that hold them.
    :ivar weight: how many examples of the data each of them stands for.
    """

    batches: list[Batch]
    weight: float

    def run(self, stream: ExampleStream) -> Iterator[tuple[Trace, list[SiteExamples]]]:
        """See :meth:`~pyro_bnn.curvature.stream.ExampleStream.run_batch`."""
        for batch in self.batches:
            yield from stream.run_batch(batch, scored=True)


def count_examples(stream: ExampleStream, data: Any) -> int | None:
    """How many examples batches hold, or ``None`` if the model does not treat them separately."""
    sizes = [rows and rows.size for rows in (stream.rows(batch, 0) for batch in iter_batches(data))]
    return None if None in sizes else sum(size for size in sizes if size)


def random_subset(
    stream: ExampleStream, data: Any, size: int, generator: torch.Generator | None = None
) -> Subset:
    """
    A uniform sample of the examples without replacement, or all of them if there are no more, by two passes over the data in
    which the model does not run; raises :exc:`ValueError` if the model does not treat examples separately.
    """
    total = count_examples(stream, data)
    if total is None:
        raise ValueError(
            "subset_size needs a model that treats its examples separately: parts of a batch must have the outputs that they "
            "have in the whole batch."
        )
    if total <= size:
        return Subset(list(iter_batches(data)), 1.0)
    found: list[Batch] = []
    chosen = torch.randperm(total, generator=generator)[:size].sort().values
    start = 0
    for batch in iter_batches(data):
        rows = stream.rows(batch, 0)
        assert rows is not None
        mine = chosen[(chosen >= start) & (chosen < start + rows.size)] - start
        if len(mine):
            found.append(rows.take((*batch, {}), mine)[:2])
        start += rows.size
    return Subset(found, total / size)
