# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Data-parallel sums over the processes of torch.distributed; without it every function is the identity."""

from collections.abc import Sequence

import torch
import torch.distributed as td
from torch import Tensor


def world_size() -> int:
    """The number of processes; 1 where :mod:`torch.distributed` is not initialised."""
    return td.get_world_size() if td.is_available() and td.is_initialized() else 1


def rank() -> int:
    """The number of this process; 0 where :mod:`torch.distributed` is not initialised."""
    return td.get_rank() if world_size() > 1 else 0


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """
    Sums tensors over all processes, in place and in one message per type.

    :param tensors: tensors of the same shapes in every process.
    """
    if world_size() == 1:
        return
    with torch.no_grad():
        for dtype in {t.dtype for t in tensors}:
            group = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in group])
            td.all_reduce(flat)
            for target, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                target.copy_(part.view_as(target))


def all_reduce_mean(tensors: Sequence[Tensor]) -> None:
    """
    Averages tensors over all processes, in place.

    :param tensors: tensors of the same shapes in every process.
    """
    size = world_size()
    if size > 1:
        all_reduce_sum(tensors)
        torch._foreach_div_(list(tensors), size)


def broadcast(tensors: Sequence[Tensor]) -> None:
    """
    Copies tensors from process 0 to all others, in place.

    :param tensors: tensors of the same shapes in every process.
    """
    if world_size() > 1:
        with torch.no_grad():
            for tensor in tensors:
                value = tensor.detach().clone()
                td.broadcast(value, 0)
                tensor.copy_(value)


def share_random_state(device: torch.device) -> None:
    """
    Gives all processes the random numbers of process 0, so that they draw the same latents.

    :param device: a device that the backend can send from.
    """
    if world_size() > 1:
        seed = torch.randint(2**62, (1,)).to(device)
        td.broadcast(seed, 0)
        torch.manual_seed(int(seed))
