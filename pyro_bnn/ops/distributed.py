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
            flat = torch.cat([t.reshape(-1) for t in group]).to(message_device(group[0].device))
            td.all_reduce(flat)
            for target, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                target.copy_(part.view_as(target))


def message_device(device: torch.device) -> torch.device:
    """
    Where the backend can send a tensor from: NCCL sends from GPUs only.

    :param device: where the tensor is.
    :return: that device, or the present GPU.
    """
    if td.get_backend() == "nccl" and device.type != "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def is_same(value: int) -> bool:
    """
    Compares a number between processes.

    :param value: an integer.
    :return: whether all processes pass the same.
    """
    if world_size() == 1:
        return True
    pair = torch.tensor([value, -value], device=message_device(torch.device("cpu")))
    td.all_reduce(pair, op=td.ReduceOp.MAX)
    return int(pair[0]) == -int(pair[1])


def any_process(value: bool) -> bool:
    """
    Tells whether something holds in any process.

    :param value: whether it holds here.
    :return: whether it holds anywhere, the same in all processes.
    """
    if world_size() == 1:
        return value
    flag = torch.tensor([int(value)], device=message_device(torch.device("cpu")))
    td.all_reduce(flag, op=td.ReduceOp.MAX)
    return bool(flag)


def shared_generator(device: torch.device) -> torch.Generator | None:
    """
    A source of random numbers that gives all processes the same ones.

    :param device: where the numbers are drawn.
    :return: a generator seeded by process 0; ``None``, torch's own, if there is one process only.
    """
    if world_size() == 1:
        return None
    return torch.Generator(device=device).manual_seed(_shared_seed())


def _shared_seed() -> int:
    seed = torch.randint(2**62, (1,)).to(message_device(torch.device("cpu")))
    td.broadcast(seed, 0)
    return int(seed)


def all_reduce_mean(tensors: Sequence[Tensor]) -> None:
    """
    Averages tensors over all processes, in place.

    :param tensors: tensors of the same shapes in every process.
    """
    size = world_size()
    if size > 1:
        all_reduce_sum(tensors)
        torch._foreach_div_(list(tensors), size)


def share_statistics(tensors: Sequence[Tensor]) -> None:
    """
    Averages running statistics over all processes, in place and in two messages per type. What all processes agree on
    stays as it is to the last bit; of integers (counters) those of process 0 count.

    :param tensors: tensors of the same shapes in every process.
    """
    if world_size() == 1:
        return
    with torch.no_grad():
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            group = [t for t in tensors if t.dtype == dtype]
            own = torch.cat([t.reshape(-1) for t in group]).to(message_device(group[0].device))
            flat = own.clone()
            td.broadcast(flat, 0)
            if dtype.is_floating_point:
                deviation = own - flat
                td.all_reduce(deviation)
                flat += deviation / world_size()
            for target, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                target.copy_(part.view_as(target))


def broadcast(tensors: Sequence[Tensor]) -> None:
    """
    Copies tensors from process 0 to all others, in place.

    :param tensors: tensors of the same shapes in every process.
    """
    if world_size() > 1:
        with torch.no_grad():
            for tensor in tensors:
                value = tensor.detach().to(message_device(tensor.device), copy=True)
                td.broadcast(value, 0)
                tensor.copy_(value)


def share_random_state() -> None:
    """Gives all processes the random numbers of process 0, so that they draw the same latents."""
    if world_size() > 1:
        torch.manual_seed(_shared_seed())
