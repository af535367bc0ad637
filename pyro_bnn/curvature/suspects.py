# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Names what uses entries of a vector in another way than a capture has seen."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_bnn.curvature.capture import COPIES, MOVES, Capture
from pyro_bnn.ops.graph import graph_nodes

#: Names of autograd's nodes for functions that keep entries as they are, in lower case.
_MOVES = {name.replace("_", "").lower() for name in MOVES | COPIES} | {
    "asstrided", "index", "reshapealias", "slice", "tocopy", "unsafesplit", "unsafeview"
}  # fmt: skip


@dataclass
class Suspects:
    """
    What made blocks wrong.

    :ivar entries: those of the blocks, bool, shape ``(p,)``.
    :ivar nodes: names of nodes of the autograd graph that use the entries and were not seen.
    :ivar functions: names of the functions that were seen to use them.
    """

    entries: Tensor
    nodes: Sequence[str]
    functions: Sequence[str]


def suspects(capture: Capture, value: Tensor, entries: Tensor) -> Suspects:
    """What made the blocks of a captured function's value that cover ``entries``, bool, shape ``(p,)``, wrong."""
    consumers: dict[Any, list[Any]] = defaultdict(list)  # of one result of a node, and of any
    for node in graph_nodes(value):
        for key in node.next_functions:
            consumers[key].append(node)
            consumers[key[0]].append(node)
    todo = [
        consumer
        for output, index in capture.roots or ()
        if bool(entries[index].any())
        for consumer in consumers[output.key]
    ]
    names = set()
    while todo:
        node = todo.pop()
        if _leads_to(node, capture.seen, consumers):
            continue
        if _moves(node):
            todo += consumers[node]
        else:
            names.add(node.name())
    functions = {use.function for use in capture.uses if bool(entries[use.index].any())}
    return Suspects(entries, sorted(names), sorted(functions))


def _leads_to(node: Any, seen: set[object], consumers: dict[Any, list[Any]]) -> bool:
    """Whether a node made the output of a use that was seen, or one that was only moved before it was seen."""
    if node in seen:
        return True
    while len(consumers[node]) == 1 and _moves(consumers[node][0]):
        node = consumers[node][0]
        if node in seen:
            return True
    return False


def _moves(node: Any) -> bool:
    return re.sub(r"Backward\d*$", "", node.name()).lower() in _MOVES
