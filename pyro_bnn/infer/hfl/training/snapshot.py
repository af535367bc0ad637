# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Where a training loop starts from: weights, buffers, optimisers, random numbers."""

import copy
import random
import sys
from collections.abc import Sequence
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from pyro_bnn.infer.hfl.training.weights import ModuleWeights


class Snapshot:
    """
    All that runs of a loop may change, as it was at first.

    :ivar point: the weights, shape ``(p,)``.
    """

    def __init__(self, weights: ModuleWeights, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.weights = weights
        self.point = weights.read()
        self._buffers = [(name, b, b.detach().clone()) for name, b in weights.module.named_buffers()]
        self._optimizers: list[tuple[ReferenceType[torch.optim.Optimizer], dict[str, Any]]] = []
        for optimizer in optimizers:
            self.add(optimizer)
        self._random = _random_state()

    def add(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimiser that is to be restored, too, as long as something else holds it."""
        self._optimizers.append((ref(optimizer), copy.deepcopy(optimizer.state_dict())))

    @torch.no_grad()
    def restore(self, *, random_state: bool, offset: Tensor | None = None) -> None:
        """Everything as it was, gradients ``None``, and the weights plus an offset of shape ``(p,)``."""
        self.weights.write(self.point if offset is None else self.point + offset)
        for p in self.weights.parameters:
            p.grad = None
        for path, buffer, value in self._buffers:
            owner, name = self.weights.module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
            if getattr(owner, name) is not buffer:  # a forward pass may put another tensor in its place
                setattr(owner, name, buffer)
            buffer.copy_(value)
        for found, state in self._optimizers:
            optimizer = found()
            if optimizer is not None:
                optimizer.load_state_dict(copy.deepcopy(state))
        if random_state:
            _set_random_state(self._random)


def _random_state() -> dict[str, Any]:
    found: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        found["numpy"] = sys.modules["numpy"].random.get_state()
    return found


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(state["numpy"])
