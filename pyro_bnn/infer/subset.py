# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A random subset of the data that stands for all of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace

from pyro_bnn.infer.data import Batch, batch_size, iter_batches, slice_batch
from pyro_bnn.infer.examples import ExampleStream, SiteExamples


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
        """
        :param stream: runs the model.
        :return: see :meth:`~pyro_bnn.infer.examples.ExampleStream.run_batch`.
        """
        for batch in self.batches:
            yield from stream.run_batch(batch)


def count_examples(data: Any) -> int | None:
    """
    :param data: one batch or an iterable of batches.
    :return: how many examples there are, or ``None`` if a batch has no tensor with dimensions.
    """
    sizes = [batch_size(batch) for batch in iter_batches(data)]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def random_subset(
    stream: ExampleStream, data: Any, size: int, generator: torch.Generator | None = None
) -> Subset:
    """
    A uniform sample of the examples without replacement, by two passes over the data in which the model does not run.

    :param stream: tells whether the model treats examples separately.
    :param data: one batch or an iterable of batches, with observations.
    :param size: how many examples; all of them if there are no more.
    :param generator: source of random numbers.
    :return: the subset.
    :raises ValueError: if the model does not treat examples separately.
    """
    total = count_examples(data)
    if total is not None and total <= size:
        return Subset(list(iter_batches(data)), 1.0)
    found: list[Batch] = []
    chosen = torch.empty(0, dtype=torch.long)
    start = 0
    for batch in iter_batches(data):
        length = batch_size(batch)
        if total is None or length is None or (start == 0 and not stream.can_split(batch)):
            raise ValueError(
                "subset_size needs a model that treats its examples separately: a plate of the length of the first "
                "argument (at least five) that holds every observed site and no latent one."
            )
        if start == 0:
            chosen = torch.randperm(total, generator=generator)[:size].sort().values
        mine = chosen[(chosen >= start) & (chosen < start + length)] - start
        if len(mine):
            found.append(slice_batch(batch, length, mine))
        start += length
    return Subset(found, (total or 0) / size)
