# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
The operations of a computation, recorded once, to be replayed without the Python code that issued them.

Recorded is what torch dispatches below autograd and batching, derivatives among it. What depends on no input is not computed
again; what depends on the data alone is computed once for data that stay; what depends on tensors that the computation reads
from outside is computed again when their values have changed.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_bnn.ops.replay import (
    DATA,
    FIXED,
    OUTSIDE,
    VARIABLE,
    Outside,
    Program,
    Replay,
    Tensors,
    UnrecordableError,
    address,
    tensor_of,
)


class _Recording:
    """
    The methods of :class:`_Recorder`. torch's documentation ("Extending PyTorch") has modes for what happens below autograd and
    batching in the module that they are imported from, and nowhere else. Of a function that a mode defines itself torch makes one that the compiler skips, and
    for that imports the compiler, which takes seconds.
    """

    def __init__(self, inputs: Sequence[tuple[int, Tensor]]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.known: dict[int, fx.Node] = {}
        self.outside: dict[int, Outside] = {}
        #: addresses of what is computed here or is an input
        self.inner = {address(tensor) for _, tensor in inputs}
        self.inputs = [self._know(x, self.graph.placeholder("input"), level) for level, x in inputs]

    def _know(self, tensor: Tensor, node: fx.Node, level: int = FIXED) -> fx.Node:
        node.meta.update(tensor=tensor, level=level)  # kept alive: identity and address stay its own
        self.known[id(tensor)] = node
        return node

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor; one that was not made here comes from outside."""
        if id(tensor) in self.known:
            return self.known[id(tensor)]
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise UnrecordableError("it uses sparse or nested tensors")
        if tensor.numel() and address(tensor) in self.inner:
            raise UnrecordableError("it reaches a value that it computes by a way that torch does not show")
        node = self._know(tensor, self.graph.placeholder("outside"), OUTSIDE)
        entries = tensor.detach()
        for dim in (d for d in range(tensor.dim()) if tensor.stride(d) == 0):
            entries = entries.narrow(dim, 0, min(1, tensor.shape[dim]))
        self.outside[id(tensor)] = Outside(node, tensor, entries, entries.clone())
        return node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to_node = lambda x: self.node_of(x) if isinstance(x, Tensor) else x  # noqa: E731
        nodes, named = fx.node.map_aggregate((args, kwargs), to_node)
        out = func(*args, **kwargs)
        if func is torch.ops.aten.lift_fresh.default:
            self._literal(args[0])
            return out
        node = self.graph.call_function(func, nodes, named)
        node.meta["level"] = FIXED
        if isinstance(out, Tensor):
            self._made(out, node)
        elif isinstance(out, (tuple, list)):
            for i, part in enumerate(out):
                if isinstance(part, Tensor):
                    self._made(part, self.graph.call_function(operator.getitem, (node, i)))
        return out

    def _literal(self, tensor: Tensor) -> None:
        """A tensor that was just made of numbers: a copy of what it is now, as it may be changed in place."""
        known = self.outside.pop(id(tensor), None)
        if known is None:
            return
        known.node.meta.update(tensor=tensor.clone(), level=FIXED)
        self._know(tensor, self.graph.call_function(torch.ops.aten.clone.default, (known.node,)))
        self.inner.add(address(tensor))

    def _made(self, tensor: Tensor, node: fx.Node) -> None:
        if id(tensor) in self.known:  # an operation in place returns its argument
            node.meta.update(tensor=tensor, level=FIXED)
            return
        held = {address(tensor_of(a)) for a in node.all_input_nodes if tensor_of(a) is not None}
        if node.target is operator.getitem:
            held = {address(tensor_of(a)) for n in node.all_input_nodes for a in n.all_input_nodes}
        if address(tensor) not in held:
            self.inner.add(address(tensor))
        self._know(tensor, node)


class _Recorder(_Recording, TorchDispatchMode):
    """Writes the operations of a block into a graph."""


def record(
    compute: Callable[..., Tensors], variables: Tensors, data: Tensors = (), *, data_stay: bool = False
) -> Replay:
    """
    Runs a computation once and returns what replays it.

    :param compute: called as ``compute(*variables, *data)``; returns tensors.
    :param variables: inputs that change from call to call.
    :param data: inputs that mostly stay; with ``data_stay`` they always do.
    :return: a replay, for data of the same shapes.
    :raises UnrecordableError: if a value that depends on the inputs decides what is computed, if random numbers are drawn, or
        if tensors change that are not the computation's own.

    Example::

        >>> from pyro_bnn.ops.replay import Bound
        >>> x = torch.arange(3.0)
        >>> slope = record(lambda u, x: ((u * x).sum(), x.exp().sum() * u), (torch.ones(()),), (x,))
        >>> Bound(slope, (x + 1,))(torch.tensor(2.0))[0]
        tensor(12.)
    """
    copies = tuple(x.detach().clone() for x in data)  # what is reached by other names is not the data
    before = [x.clone() for x in copies]
    level = FIXED if data_stay else DATA
    recorder = _Recorder([*((VARIABLE, x) for x in variables), *((level, x) for x in copies)])
    with recorder:
        found = compute(*variables, *copies)
    outputs = [recorder.node_of(x) for x in found]
    outside = list(recorder.outside.values())
    pairs = [*zip(copies, before, strict=True), *((o.entries, o.before) for o in outside)]
    if not all(_same(x, y) for x, y in pairs):  # not all operations say what they change
        raise UnrecordableError("it changes tensors that are not its own")
    return Replay(Program(recorder.graph, recorder.inputs, outside, outputs), len(variables))


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or (
        a.is_floating_point() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    )
