# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Graphs of operations, simplified, sorted by how rarely they must run, and replayed; ``tape`` records them."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

Tensors = tuple[Tensor, ...]

#: What a value depends on at most: on nothing, tensors from outside, the data, the variables.
FIXED, OUTSIDE, DATA, VARIABLE = range(4)

_aten = torch.ops.aten
#: Operations that hand a value to Python.
_NUMBERS = (_aten._local_scalar_dense.default, _aten.equal.default)
#: Operations whose results depend on nothing but the shape and type of their first argument.
_FILLS = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
#: Operations that copy their argument, and those that give it back beside this number.
_COPIES = {"clone", "_to_copy", "lift_fresh_copy", "_unsafe_view"}
_NEUTRAL = {"mul": 1, "div": 1, "pow": 1, "add": 0, "sub": 0}
#: Operations that torch, or a tensor, offers by the same name with the same arguments: of a small one most of the time is the
#: call, and these calls take less.
_NATIVE = {
    "abs", "add", "addmm", "bmm", "cat", "div", "exp", "expm1", "gather", "log", "log1p", "logsumexp", "mm", "mul", "neg",
    "permute", "pow", "reciprocal", "relu", "rsqrt", "sigmoid", "sqrt", "squeeze", "sub", "sum", "t", "tanh", "transpose",
    "unsqueeze", "where",
}  # fmt: skip
_METHODS = {"view", "expand"}


class UnrecordableError(Exception):
    """The operations of a computation are not all that there is to it; the text says why, ``level`` on what that depends."""

    def __init__(self, reason: str, level: int = FIXED) -> None:
        super().__init__(reason)
        self.level = level


class StaleError(Exception):
    """A tensor from outside, by whose value Python decided what is computed, has changed: the recording is of no use."""


class Outside(NamedTuple):
    """A tensor from outside: its node, its entries without those that an expanded tensor repeats, and what they were."""

    node: fx.Node
    tensor: Tensor
    entries: Tensor
    before: Tensor


def address(tensor: Tensor) -> int:
    """Where the memory of a tensor begins; that of its views is the same."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() if storage.nbytes() else -1


def tensor_of(node: fx.Node) -> Any:
    """The tensor that a node stood for when it was recorded, ``None`` if it is none."""
    return node.meta.get("tensor")


def _base(node: fx.Node) -> str:
    """The name of an operation without namespace and overload."""
    target: Any = node.target
    if node.op != "call_function" or target is operator.getitem:
        return ""
    return str(target.name()).partition("::")[2].partition(".")[0]


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _targets(node: fx.Node) -> list[fx.Node]:
    """The arguments to which an operation writes."""
    # torch says nowhere else which they are
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    infos = [(a.name, a.alias_info) for a in schema.arguments]
    found: list[fx.Node] = []
    fx.node.map_arg(
        [given.get(name) for name, info in infos if info is not None and info.is_write],
        lambda n: found.append(n) or n,  # type: ignore[func-returns-value]
    )
    return found


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_conj(), tensor.is_neg()


def _place(tensor: Tensor) -> Any:
    """What two tensors have in common that show the same memory in the same way."""
    return (address(tensor), tensor.storage_offset(), *_form(tensor)) if tensor.numel() else object()


def _unchanged(node: fx.Node) -> fx.Node | None:
    """The argument of which an operation gives a copy, entry by entry and with the same strides."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or tensor_of(first) is None:
        return None
    number = node.args[1] if len(node.args) > 1 else None
    is_neutral = type(number) in (int, float) and number == _NEUTRAL.get(_base(node))
    is_copy = is_neutral or _base(node) in _COPIES
    return first if is_copy and _form(tensor_of(first)) == _form(tensor_of(node)) else None


class Program:
    """
    A recorded graph, simplified, with the level of every node in ``node.meta["level"]``.

    :param graph: its operations; every node that is a tensor holds what it was in ``node.meta["tensor"]``.
    :param inputs: its placeholders for variables and data.
    :param outside: what it reads beside these.
    :param outputs: the nodes that are wanted.
    """

    def __init__(
        self, graph: fx.Graph, inputs: list[fx.Node], outside: list[Outside], outputs: list[fx.Node]
    ) -> None:
        self.graph, self.inputs, self.outside = graph, inputs, outside
        nodes = list(graph.nodes)
        self.writing = {n for n in nodes if _targets(n)}
        #: memory that operations write to: what touches it keeps its order and is never replaced
        self.written = {address(tensor_of(a)) for n in self.writing for a in _targets(n)}
        if self.written & {address(tensor_of(n)) for n in (*inputs, *(o.node for o in outside))}:
            raise UnrecordableError("it changes tensors that are not its own")
        self._touched = {n: self._touches(n) for n in nodes}
        self._raise_levels(nodes)
        self.reads_outside = self._refuse_reads(nodes)
        replaced = self._simplify(nodes)
        self.outputs = [replaced.get(n, n) for n in outputs]
        self._remove_dead()
        if any(map(_is_random, graph.nodes)):
            raise UnrecordableError("it draws random numbers")

    def _touches(self, node: fx.Node) -> set[int]:
        """The written memory that an operation reads, writes or gives out."""
        held = (tensor_of(n) for n in (node, *node.all_input_nodes)) if self.written else ()
        return {address(t) for t in held if t is not None} & self.written

    def _raise_levels(self, nodes: list[fx.Node]) -> None:
        """What depends on a node has at least its level, and all that touches the same written memory has one level."""
        shared = dict.fromkeys(self.written, FIXED)
        changed = True
        while changed:
            changed = False
            for node in nodes:
                memory = self._touched[node]
                below = () if _base(node) in _FILLS and not memory else node.all_input_nodes
                levels = [node.meta["level"], *(n.meta["level"] for n in below), *(shared[m] for m in memory)]
                changed = changed or max(levels) != min(levels[0], *(shared[m] for m in memory), max(levels))
                node.meta["level"] = max(levels)
                shared |= dict.fromkeys(memory, max(levels))

    def _refuse_reads(self, nodes: list[fx.Node]) -> bool:
        """
        Refuses values of inputs that are handed to Python, or decide the shape of others: these may decide what is computed.
        Whether there are such values from outside.
        """
        read = [n for node in nodes if _decides(node) for n in node.all_input_nodes]
        if (level := max((n.meta["level"] for n in read), default=FIXED)) >= DATA:
            what = "the variables" if level == VARIABLE else "the data"
            raise UnrecordableError(f"it decides by a value that depends on {what}", level)
        return level == OUTSIDE

    def _simplify(self, nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Replaces operations that give back what they take, and those that are there already; returns by what."""
        seen: dict[Any, fx.Node] = {}
        replaced: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            if self._touched[node] or tensor_of(node) is None or _is_random(node):
                continue
            if _base(node) in _FILLS:
                node.args = ()  # its value is known
            place, key = _place(tensor_of(node)), (node.target, repr(node.args), repr(node.kwargs))
            other = _unchanged(node) or seen.get(place) or (seen.get(key) if node.args else None) or node
            if other is not node:
                node.replace_all_uses_with(other)
                replaced[node] = other
            seen |= {place: other, key: other}
        return replaced

    def _remove_dead(self) -> None:
        for node in reversed(list(self.graph.nodes)):
            if node.op == "call_function" and not node.users and node not in self.writing | {*self.outputs}:
                self.graph.erase_node(node)


def _decides(node: fx.Node) -> bool:
    """Whether an operation hands a value to Python, or gives a tensor whose shape depends on values."""
    if node.target in _NUMBERS:
        return True
    if _base(node) in ("index", "_unsafe_index"):
        indices: Any = node.args[1]
        return any(tensor_of(i).dtype in (torch.bool, torch.uint8) for i in indices if i is not None)
    return torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ())


class _Stage:
    """
    The operations of one level as a function.

    :ivar needs: the nodes whose values it takes, ``first`` before all others.
    :ivar gives: those whose values it returns.
    """

    def __init__(
        self, nodes: list[fx.Node], level: int, outputs: Iterable[fx.Node], first: Sequence[fx.Node] = ()
    ) -> None:
        own = [n for n in nodes if n.op == "call_function" and n.meta["level"] == level]
        inner = set(own)
        asked = [a for n in own for a in n.all_input_nodes] + [n for n in outputs if level == VARIABLE]
        self.needs = [*first, *dict.fromkeys(a for a in asked if a not in inner and a not in first)]
        later = [n for n in own if n in outputs or any(user not in inner for user in n.users)]
        self.gives = list(outputs) if level == VARIABLE else [n for n in later if tensor_of(n) is not None]
        self.size = len(own)
        graph = fx.Graph()
        env = {n: graph.placeholder(f"given{i}") for i, n in enumerate(self.needs)}
        for node in own:
            env[node] = _native(graph.node_copy(node, env.__getitem__), _base(node))
        lent = {address(tensor_of(n)) for n in self.needs}
        found = [env[n] for n in self.gives]
        if level == VARIABLE:  # what is returned belongs to the caller
            pairs = zip(self.gives, found, strict=True)
            found = [
                graph.call_method("clone", (v,)) if address(tensor_of(n)) in lent else v for n, v in pairs
            ]
        graph.output(tuple(found))
        self.run = fx.GraphModule(torch.nn.Module(), graph).forward


def _native(node: fx.Node, name: str) -> fx.Node:
    """The same operation by a function or method that takes less time to call."""
    if str(getattr(node.target, "namespace", "")) == "aten":
        if name in _NATIVE:
            node.target = getattr(torch, name)
        elif name in _METHODS and not node.kwargs:
            node.op, node.target = "call_method", name
    return node


class Replay:
    """
    What a recording computes, for other variables and for other data of the same shapes.

    :param Program program: the recording.
    :param int num_variables: how many of its inputs are variables.
    :ivar int operations: how many there are per call at data that stay.
    """

    def __init__(self, program: Program, num_variables: int) -> None:
        nodes, outputs = list(program.graph.nodes), program.outputs
        self._data = program.inputs[num_variables:]
        self._rare = [_Stage(nodes, level, outputs) for level in (OUTSIDE, DATA)]
        self._last = _Stage(nodes, VARIABLE, outputs, program.inputs[:num_variables])
        self._lent = self._last.needs[num_variables:]
        self.run, self.operations = self._last.run, self._last.size
        needed = {n for stage in (*self._rare, self._last) for n in stage.needs}
        self._fixed = {n: tensor_of(n).detach() for n in needed if n.meta["level"] == FIXED}
        read = [o for o in program.outside if o.node in needed or program.reads_outside]
        self._outside = {o.node: o.tensor for o in read}
        self._entries = [o.entries for o in read]
        self._reads_outside = program.reads_outside
        for node in nodes:  # whose values, but for these, are not needed any more
            node.meta.pop("tensor", None)
        self.age = 0
        self._renew()

    @property
    def outside(self) -> list[Tensor]:
        """The tensors from outside that it reads."""
        return list(self._outside.values())

    def refresh(self) -> None:
        """
        Looks at the tensors from outside; what depends on those that have changed is computed anew.

        :raises StaleError: if one has changed whose value decided what is computed.
        """
        if all(map(torch.equal, self._entries, self._before)):
            return
        if self._reads_outside:
            raise StaleError
        self._renew()

    def _renew(self) -> None:
        self.age += 1
        self._before = [x.clone() for x in self._entries]
        self._held = self._fixed | {n: x.detach() for n, x in self._outside.items()}
        self._held |= self._results(self._rare[0], self._held)

    def _results(self, stage: _Stage, held: dict[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
        return dict(zip(stage.gives, stage.run(*(held[n] for n in stage.needs)), strict=True))

    def lend(self, data: Tensors) -> Tensors:
        """What the data, and all that changes more rarely, give to every call."""
        held = self._held | dict(zip(self._data, data, strict=True))
        held |= self._results(self._rare[1], held)
        return tuple(held[n] for n in self._lent)


class Bound:
    """
    A replay at some data, of the shapes of those with which it was made.

    :param Replay replay: the replay.
    :param data: the data; their values stay.
    """

    def __init__(self, replay: Replay, data: Tensors) -> None:
        self.replay, self.data = replay, data
        self._age = 0
        self._lent: Tensors = ()

    @torch.no_grad()
    def __call__(self, *variables: Tensor) -> Tensors:
        """What the computation returns, detached."""
        replay = self.replay
        replay.refresh()
        if self._age != replay.age:
            self._lent, self._age = replay.lend(self.data), replay.age
        return replay.run(*variables, *self._lent)
