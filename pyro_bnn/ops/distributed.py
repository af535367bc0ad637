# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Data-parallel sums over the processes of torch.distributed; without it every function is the identity.

All processes pass tensors of the same shapes, which change in place.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as td
from torch import Tensor


def world_size() -> int:
    """The number of processes; 1 where :mod:`torch.distributed` is not initialised."""
    return td.get_world_size() if td.is_available() and td.is_initialized() else 1


def rank() -> int:
    """The number of this process; 0 where :mod:`torch.distributed` is not initialised."""
    return td.get_rank() if world_size() > 1 else 0


def _message_device(device: torch.device) -> torch.device:
    """Where the backend can send a tensor from: NCCL sends from GPUs only."""
    if td.get_backend() == "nccl" and device.type != "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


@torch.no_grad()
def _messages(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """One vector for each type of the tensors, which have its values once the next is asked for; none for one process."""
    for kind in dict.fromkeys((t.dtype, t.device) for t in tensors) if world_size() > 1 else ():
        group = [t for t in tensors if (t.dtype, t.device) == kind]
        flat = torch.cat([t.reshape(-1) for t in group]).to(_message_device(group[0].device))
        yield flat
        for target, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
            target.copy_(part.view_as(target))


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Sums tensors over all processes, in one message per type."""
    for flat in _messages(tensors):
        td.all_reduce(flat)


def all_reduce_mean(tensors: Sequence[Tensor]) -> None:
    """Averages tensors over all processes."""
    for flat in _messages(tensors):
        td.all_reduce(flat)
        flat /= world_size()


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Copies tensors from process 0 to all others."""
    for flat in _messages(tensors):
        td.broadcast(flat, 0)


def share_statistics(tensors: Sequence[Tensor]) -> None:
    """
    Averages running statistics over all processes. What all processes agree on stays as it is to the last bit; of
    integers (counters) those of process 0 count.
    """
    for flat in _messages(tensors):
        own = flat.clone()
        td.broadcast(flat, 0)
        if flat.is_floating_point():
            deviation = own - flat
            td.all_reduce(deviation)
            flat += deviation / world_size()


def is_same(value: int) -> bool:
    """Whether all processes pass the same number."""
    both = torch.tensor([value, -value])
    for flat in _messages([both]):
        td.all_reduce(flat, op=td.ReduceOp.MAX)
    return int(both[0]) == -int(both[1])


def any_process(value: bool) -> bool:
    """Whether something holds in any process, the same in all processes."""
    flag = torch.tensor([int(value)])
    for flat in _messages([flag]):
        td.all_reduce(flat, op=td.ReduceOp.MAX)
    return bool(flag)


def shared_generator(device: torch.device) -> torch.Generator | None:
    """A generator seeded by process 0, which gives all processes the same numbers; ``None``, torch's own, for one process."""
    if world_size() == 1:
        return None
    return torch.Generator(device=device).manual_seed(_shared_seed())


def _shared_seed() -> int:
    seed = torch.randint(2**62, (1,))
    broadcast([seed])
    return int(seed)


def share_random_state() -> None:
    """Gives all processes the random numbers of process 0, so that they draw the same latents."""
    if world_size() > 1:
        torch.manual_seed(_shared_seed())
