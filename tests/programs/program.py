# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A program: a Pyro model, its network and its data, built anew for every operation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from tests.common import seed


@dataclass
class Case:
    """
    A built program. What it says about itself is what its author knows; operations that do not apply are absent by it.

    :ivar model: called as ``model(*data)`` with observations and as ``model(*inputs)`` without.
    :ivar rows: by argument the dimension that holds the examples, or ``None`` for arguments that are the same for all.
    :ivar take: a batch of the examples at some positions, where ``rows`` cannot say it.
    :ivar separate: whether the model treats examples apart, so that parts of the data are data.
    :ivar noise: whether the model draws random numbers beyond its latents.
    :ivar known: how many observations the plate of the data has, if it is more than the arguments hold.
    :ivar digits: relative error that the arithmetic of the program allows.
    :ivar guide_rows: whether latents belong to examples, so that draws of them fit all examples only together.
    :ivar kron: linear layers by path, each used by one call, for the reference of Kronecker factors.
    :ivar must_refuse: operations (prefixes of names) whose answer cannot be known.
    :ivar only: the operations that apply, for programs of which a reference would know no more.
    :ivar spread: how far from zero, in unconstrained space, latents are put.
    :ivar train: whether the network is in training mode.
    :ivar shares_statistics: whether batch statistics are those of all components together, as documented.
    :ivar guide: a guide that reads the latents of the rows from the rows, without noise.
    :ivar split: the rows of each batch; batches of four by default.
    :ivar hessian: whether the dense Hessian takes seconds at most.
    """

    model: Callable[..., Any]
    data: tuple[Any, ...]
    num_inputs: int
    rows: Sequence[int | None] | None = None
    take: Callable[[Tensor], tuple[Any, ...]] | None = None
    size: int = 0
    net: nn.Module | None = None
    separate: bool = True
    noise: bool = False
    digits: float = 1e-8
    guide_rows: bool = False
    kron: tuple[str, ...] = ()
    must_refuse: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    spread: float = 0.3
    train: bool = False
    hessian: bool = True
    shares_statistics: bool = False
    split: list[Tensor] | None = None
    guide: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.rows is not None:
            pairs = list(zip(self.data, self.rows, strict=True))
            self.size = next(a.shape[d] for a, d in pairs if d is not None)
            self.take = lambda at: tuple(a if d is None else a.index_select(d, at) for a, d in pairs)

    @property
    def inputs(self) -> tuple[Any, ...]:
        return self.data[: self.num_inputs]

    def batches(self, size: int = 4) -> list[tuple[Any, ...]]:
        """The data in batches of some rows, the last of which may be smaller."""
        assert self.take is not None
        return [self.take(part) for part in (self.split or torch.arange(self.size).split(size))]

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Networks in evaluation mode, as curvature and predictions have them."""
        modules = [m for m in (self.net, self.model) if isinstance(m, nn.Module)]
        states = [(m, m.training) for module in modules for m in module.modules()]
        for module in modules:
            module.eval()
        try:
            yield
        finally:
            for module, state in states:
                module.training = state


@dataclass
class Program:
    """A named program; its first words say what kind it is."""

    name: str
    kind: str
    build: Callable[[], Case]

    def make(self) -> Case:
        """A fresh case: same numbers every time."""
        pyro.clear_param_store()
        seed(11)
        case = self.build()
        for module in (case.net, case.model):
            if isinstance(module, nn.Module):
                module.train(case.train)
        return case


PROGRAMS: dict[str, Program] = {}


def program(build: Callable[[], Case]) -> Callable[[], Case]:
    """Registers a program under the name of its function."""
    kind = build.__module__.rsplit(".", 1)[-1]
    assert build.__name__ not in PROGRAMS
    PROGRAMS[build.__name__] = Program(build.__name__, kind, build)
    return build


def inputs(n: int = 10, *shape: int) -> Tensor:
    """Random inputs."""
    return torch.randn(n, *(shape or (3,)))


def labels(n: int = 10, classes: int = 3) -> Tensor:
    """Random class labels."""
    return torch.randint(0, classes, (n,))


def regression(net: Callable[..., Any], noise: float = 0.5) -> Callable[..., Any]:
    """Normal observations around a network of one output."""

    def model(x: Any, y: Tensor | None = None) -> Any:
        f = net(x).squeeze(-1)
        with pyro.plate("data", f.shape[-1]):
            return pyro.sample("obs", dist.Normal(f, noise), obs=y)

    return model


__all__ = ["PROGRAMS", "Case", "Program", "field", "inputs", "labels", "program", "regression"]
