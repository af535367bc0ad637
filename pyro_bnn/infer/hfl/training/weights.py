# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The trainable weights of a module as one vector, of which each process has a part where they are sharded."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.ops.distributed import all_reduce_sum, world_size


class ModuleWeights:
    r"""
    Weights and their gradients as vectors of length p, the number of weights of which this process has values.

    Inner products of vectors are :meth:`total` of those of their parts. Entries that several processes have are divided by the
    root of the number of copies in every vector, so that they count once.

    :param module: any module; fully sharded ones keep their weights sharded.
    :ivar names: of the parameters that require a gradient.
    :ivar parameters: these.
    :ivar dtype: of vectors, the finest of the weights.
    :ivar coarsest: what resolves displacements of all weights.
    :raises ValueError: for weights other than float32 and float64, or on a part of the processes.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        reshard(module)
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("the module has no parameter that requires a gradient")
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        for name, p in named:
            if p.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"parameter {name!r} is {str(p.dtype).removeprefix('torch.')}, which does not resolve small "
                    "displacements: use float32 or float64, and no autocast in the runs"
                )
        self.dtype = max((p.dtype for p in self.parameters), key=lambda dtype: dtype.itemsize)
        self.coarsest = min((p.dtype for p in self.parameters), key=lambda dtype: dtype.itemsize)
        self.is_sharded = any(is_distributed(p) for p in self.parameters)
        self.sizes = [local(p).numel() for p in self.parameters]
        self.starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        self._roots = [math.sqrt(self._copies(name, p)) for name, p in named]
        count = torch.tensor(
            [sum(n / root**2 for n, root in zip(self.sizes, self._roots, strict=True))], dtype=torch.float64
        )
        self.count = round(float(self.total(count)))

    def _copies(self, name: str, parameter: Any) -> int:
        """How many processes have the same entries of a parameter, where others have other ones."""
        if not self.is_sharded:
            return 1
        if not is_distributed(parameter):
            return world_size()
        mesh, shards = parameter.device_mesh, 1
        if mesh.size() != world_size():
            raise ValueError(
                f"parameter {name!r} lives on {mesh.size()} of {world_size()} processes: sums over them are not known"
            )
        for dim, placement in enumerate(parameter.placements):
            if placement.is_partial():
                raise ValueError(f"parameter {name!r} is a sum over processes, which is not supported")
            shards *= mesh.size(dim) if placement.is_shard() else 1
        return world_size() // shards

    def total(self, products: Tensor) -> Tensor:
        """Inner products from those of the parts of all processes."""
        if not self.is_sharded:
            return products
        products = products.clone()
        all_reduce_sum([products])
        return products

    def vector(self, tensors: Sequence[Tensor | None], *, dtype: torch.dtype | None = None) -> Tensor:
        """Tensors of the parameters' shapes as a vector; ``None`` is zero."""
        parts = [
            torch.zeros(n, dtype=dtype or self.dtype, device=local(p).device)
            if t is None
            else local(t).detach().reshape(-1).to(dtype or self.dtype) / root
            for t, p, n, root in zip(tensors, self.parameters, self.sizes, self._roots, strict=True)
        ]
        return torch.cat(parts)

    def read(self) -> Tensor:
        """The weights, a copy."""
        return self.vector(self.parameters)

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Sets the weights."""
        reshard(self.module)  # what is gathered would not change
        for i, p in enumerate(self.parameters):
            local(p).copy_(self.part(vector, i))

    def part(self, vector: Tensor, i: int) -> Tensor:
        """What a vector says of this process's part of parameter i, of its shape."""
        p = local(self.parameters[i])
        part = vector[self.starts[i] : self.starts[i] + self.sizes[i]] * self._roots[i]
        return part.reshape(p.shape).to(device=p.device, dtype=p.dtype)

    @torch.no_grad()
    def add_to_gradient(self, vector: Tensor, index: Sequence[int]) -> None:
        """Adds a vector to the gradients of some parameters."""
        for i in index:
            p, part = self.parameters[i], self.part(vector, i)
            if p.grad is None:
                if not bool(part.any()):
                    continue
                p.grad = torch.zeros_like(p)
            local(p.grad).add_(part)

    @contextmanager
    def gradients_aside(self) -> Iterator[None]:
        """Within, gradients are ``None`` at first; afterwards they are what they were before."""
        kept = [p.grad for p in self.parameters]
        try:
            for p in self.parameters:
                p.grad = None
            yield
        finally:
            for p, gradient in zip(self.parameters, kept, strict=True):
                p.grad = gradient


def is_distributed(tensor: Any) -> bool:
    """Whether a tensor is one that processes share."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Any) -> Tensor:
    """The part of a tensor that is this process's."""
    part: Tensor = tensor.to_local() if is_distributed(tensor) else tensor
    return part


def reshard(module: torch.nn.Module) -> None:
    """Fully sharded modules give back what they gathered for their last call."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
