# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Reading autograd graphs."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def graph_nodes(value: Tensor) -> Iterator[Any]:
    """The nodes of a tensor's autograd graph, each once."""
    todo: list[Any] = [value.grad_fn]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        todo += [following for following, _ in node.next_functions]


def leaves(value: Tensor) -> list[Tensor]:
    """The leaf tensors that a value was computed from and that require gradients, each once."""
    if value.grad_fn is None:
        return [value] if value.requires_grad else []
    return [node.variable for node in graph_nodes(value) if hasattr(node, "variable")]


class FirstOrderSum:
    """
    A sum of terms with graphs, of which only values and gradients in their leaves are kept: a sum over batches whose
    memory is that of one.

    :param fixed: tensors that are not differentiated in.
    """

    def __init__(self, *fixed: Tensor) -> None:
        self._fixed = {id(tensor) for tensor in fixed}
        self._gradients: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, term: Tensor, *, retain_graph: bool = False) -> None:
        """Adds a scalar, whose graph is freed unless further terms need it."""
        found = [leaf for leaf in leaves(term) if id(leaf) not in self._fixed]
        if not found:
            return
        how: dict[str, Any] = {"materialize_grads": True, "retain_graph": retain_graph}
        for leaf, new in zip(found, torch.autograd.grad(term, found, **how), strict=True):
            old = self._gradients.get(id(leaf))
            self._gradients[id(leaf)] = (leaf, new if old is None else old[1] + new)

    def gradients(self) -> list[Tensor]:
        """The gradients, one tensor per leaf, in the order in which the leaves were found."""
        return [gradient for _, gradient in self._gradients.values()]

    def attach(self, value: Tensor) -> Tensor:
        """The sum's value with these gradients, once differentiable."""
        for leaf, gradient in self._gradients.values():
            value = value + (gradient * (leaf - leaf.detach())).sum()
        return value
