# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Running a model in double precision for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.model.data import Batches, as_batches
from pyro_bnn.model.parameters import local_parameters


@contextmanager
def double_precision(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """
    A context in which the floating-point parameters and buffers of modules, and torch's default, are float64. The
    tensors that were there before are put back at the end, also when an exception strikes.

    Example::

        >>> net = torch.nn.Linear(2, 1).float()
        >>> with double_precision([net]):
        ...     net.weight.dtype
        torch.float64
        >>> net.weight.dtype
        torch.float32
    """
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    default = torch.get_default_dtype()
    with local_parameters():
        try:
            torch.set_default_dtype(torch.float64)
            for module in modules:
                for tensor in (*module.parameters(), *module.buffers()):
                    if tensor.is_floating_point() and id(tensor) not in kept:
                        kept[id(tensor)] = (tensor, tensor.data)
                        tensor.data = tensor.data.double()
            yield
        finally:
            torch.set_default_dtype(default)
            for tensor, data in kept.values():
                tensor.data = data


def doubled(data: Any) -> Batches:
    """Batches in double precision."""
    return as_batches(data).map(lambda x: x.double() if x.is_floating_point() else x)
