# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
A check of example-wise Jacobians against ordinary backward passes.

A Jacobian in blocks rests on two beliefs about the program: that every use of an entry was seen, and that the rows of each
use belong to one example each. Three things are looked at, each before the batch is used:

* **rows**, in every batch: the gradients of a random combination of the outputs of a random half of the examples must
  vanish in all rows of the other half;
* **the score**, in every batch for which it is given: :math:`\sum_n J_n^\top c_n` from the blocks must be the gradient in
  the vector that autograd finds for the scores :math:`c_n` of all examples. That gradient is wanted anyhow, so that this
  costs little;
* **a random combination** of the outputs of a random half, :math:`\sum_{n\in S} J_n^\top c_n` in the same way: once for
  each autograd graph, told apart by the names of its nodes, and in every batch whose scores show too little, which are those
  where more than half of the examples have a score of zero beside the largest, as an interpolating fit does.

Both sides of a comparison come from one and the same backward pass, and are compared through a random linear functional per
block, or two more where terms cancel by chance. What none of them sees are uses whose gradient is zero for the combinations
that were tried, or within their rounding, or, where no scores are given, that a graph known by the names of its nodes has for
some batches only.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.curvature.blocks import Block, Gradients, LinearBlock
from pyro_bnn.curvature.capture import Capture
from pyro_bnn.curvature.jacobian import ExampleJacobian, Layouts
from pyro_bnn.curvature.operations import COPIES, MOVES
from pyro_bnn.curvature.uses import ElementwiseUse, Output
from pyro_bnn.ops.graph import graph_nodes
from pyro_bnn.ops.jacobian import wide

#: The relative precision of a product on tensor cores.
_TF32 = 2.0**-10

#: Parts of the vector as places in the graph, with the positions of their entries.
Roots = Sequence[tuple[Output, Tensor]]


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


class CheckedJacobian(ExampleJacobian):
    r"""
    A Jacobian that was compared with ordinary backward passes.

    :ivar gradient: :math:`\sum_n J_n^\top c_n` for the scores c by autograd, on the active entries, shape ``(p,)``.
    :ivar mistakes: what was found wrong on the way and is generic here.
    """

    gradient: Tensor
    mistakes: Sequence[Suspects] = ()


def checked_jacobian(
    capture: Capture,
    latent: Tensor,
    outputs: Tensor,
    layouts: Layouts | None = None,
    *,
    score: Callable[[CheckedJacobian], Tensor] | None = None,
    event_dim: int = 0,
    differentiable: bool = False,
) -> CheckedJacobian:
    """
    The Jacobian of a captured function, example by example, checked; entries that fail the check are differentiated
    output by output, which is right for whatever autograd can differentiate. Arguments are those of
    :class:`~pyro_bnn.curvature.jacobian.ExampleJacobian`; ``score`` gives the combination of outputs whose gradient is wanted,
    shape ``(B, M)``.
    """
    mistaken = torch.zeros_like(capture.generic) if layouts is None else layouts.mistaken
    generator = torch.Generator().manual_seed(0) if layouts is None else layouts.generator
    attempts = [None] if layouts is None else [layouts, None]
    options: Any = {"event_dim": event_dim, "differentiable": differentiable}
    failed: list[Suspects] = []
    while True:
        attempt = attempts.pop(0) if attempts else None
        found = CheckedJacobian(capture, latent, outputs, attempt, generic=mistaken, **options)
        found.layouts.mistaken, found.layouts.generator = mistaken, generator
        wrong = mistaken_entries(found, generator, None if score is None else score(found))
        if wrong is None:
            generic = found.capture.generic
            found.mistakes = [s for s in failed if bool((s.entries & generic).any())]
            return found
        failed.append(suspects(found.capture, found.flat, wrong))
        if not attempts:  # also with its own layouts
            mistaken = mistaken | wrong


@torch.no_grad()
def mistaken_entries(
    jacobian: CheckedJacobian, generator: torch.Generator, score: Tensor | None = None
) -> Tensor | None:
    """Entries whose blocks are not right, bool, shape ``(p,)``; with a score, shape ``(B, M)``, the gradient is set."""
    if not jacobian.flat.requires_grad:
        jacobian.gradient = wide(torch.zeros_like(jacobian.latent.detach()))
        return None
    wrong = _tried(jacobian, generator, score)
    if wrong is None and score is not None:
        capture = jacobian.capture
        wrong, gradient, _ = _compared(jacobian, _roots(capture), score, None, generator)
        jacobian.gradient = gradient if capture.active is None else gradient.where(capture.active, 0.0)
    return wrong


def _tried(jacobian: ExampleJacobian, generator: torch.Generator, score: Tensor | None) -> Tensor | None:
    """The entries that random outputs of a random half of the examples show to be wrong."""
    capture, flat, layouts = jacobian.capture, jacobian.flat, jacobian.layouts
    # nothing is believed about a part that is generic as a whole
    roots = [(output, index) for output, index in _roots(capture) if not bool(capture.generic[index].all())]
    if not roots:
        return None
    order = torch.randperm(jacobian.B, generator=generator)
    chosen = (order < (jacobian.B + 1) // 2).to(flat.device)
    noise = torch.randn(jacobian.B, jacobian.M, generator=generator).to(flat)
    cotangent = noise * chosen.unsqueeze(-1)
    program = hash(tuple(node.name() for node in graph_nodes(flat)))
    if program in layouts.programs and (score is None or _shows(score, _precision(jacobian))):
        return _misplaced(jacobian, jacobian.pull_back(cotangent, capture.outputs), ~chosen)
    wrong, expected, gradients = _compared(jacobian, roots, cotangent, chosen, generator)
    misplaced = _misplaced(jacobian, gradients, ~chosen)
    if misplaced is not None:
        return misplaced if wrong is None else wrong | misplaced
    # a gradient of zero shows nothing
    if wrong is None and all(bool(expected[index].any()) for _, index in roots):
        layouts.programs.add(program)
    return wrong


def _shows(score: Tensor, eps: float) -> bool:
    """Whether half of the examples have a score that is not lost beside the largest."""
    size = score.abs().amax(-1)
    return 2 * int((size > min(1e3 * eps, 1e-3) * size.max()).sum()) >= len(size)


def _compared(
    jacobian: ExampleJacobian,
    roots: Roots,
    cotangent: Tensor,
    chosen: Tensor | None,
    generator: torch.Generator,
) -> tuple[Tensor | None, Tensor, Gradients]:
    """
    Entries whose blocks do not give the gradient of a combination of the outputs of chosen examples (all by default); that
    gradient by autograd, shape ``(p,)``; and the gradients in the outputs of the capture.
    """
    outputs = jacobian.capture.outputs
    found = jacobian.pull_back(cotangent, [*outputs, *(output for output, _ in roots)])
    gradients, in_roots = found[: len(outputs)], found[len(outputs) :]
    expected = wide(torch.zeros_like(jacobian.latent.detach()))
    for (_, index), g in zip(roots, in_roots, strict=True):
        expected.index_add_(0, index.reshape(-1), g.reshape(-1).to(expected.dtype))
    wrong, eps = _unseen(jacobian, roots, expected), _precision(jacobian)
    for block in jacobian.blocks:
        # the terms of a random functional may cancel by chance, and rounding errors show then; not in three of three
        if not any(_agrees(block, gradients, chosen, expected, eps, generator) for _ in range(3)):
            wrong[block.index.reshape(-1)] = True
    return (wrong if bool(wrong.any()) else None), expected, gradients


def _misplaced(jacobian: ExampleJacobian, gradients: Gradients, others: Tensor) -> Tensor | None:
    """Entries with a use whose gradient does not vanish for examples that should have none."""
    uses = jacobian.capture.uses
    index = others.nonzero().squeeze(-1)
    if not len(index) or not uses:
        return None
    placed = [use.placed_rows(gradients[use.slot], jacobian.B).unsqueeze(-1) for use in uses]
    # uses of one output mostly share their rows
    rows = {(r.data_ptr(), r.shape, r.stride()): r for r in placed}
    sizes = [torch.linalg.vector_norm(r, dim=tuple(range(1, r.dim()))) for r in rows.values()]
    if not bool(torch.stack(sizes)[:, index].any()):
        return None
    wrong = torch.zeros_like(jacobian.capture.generic)
    share = min(1e3 * _precision(jacobian), 0.1)
    for use, r in zip(uses, placed, strict=True):
        r = r.index_select(0, index)
        if r.numel() and not bool(r.abs().max() <= share * gradients[use.slot].abs().max()):
            wrong[use.index.reshape(-1)] = True
    return wrong if bool(wrong.any()) else None


def _unseen(jacobian: ExampleJacobian, roots: Roots, expected: Tensor) -> Tensor:
    """Entries of which no use was seen, in a part of the vector where they have a gradient."""
    capture = jacobian.capture
    known = capture.generic.clone() if capture.active is None else capture.generic | ~capture.active
    wrong = torch.zeros_like(known)
    if int(known.sum()) + sum(block.index.numel() for block in jacobian.blocks) == len(known):
        return wrong  # blocks have no entry in common
    for block in jacobian.blocks:
        known[block.index.reshape(-1)] = True
    unseen = (expected != 0) & ~known
    if bool(unseen.any()):
        for _, index in roots:
            wrong[index.reshape(-1)] |= bool(unseen[index].any())
    return wrong & ~known


def _roots(capture: Capture) -> Roots:
    """Where the ordinary gradient is taken: the parts of the vector with active entries."""
    if capture.roots is not None:
        return capture.roots
    latent = capture.latent
    return [(Output(latent), torch.arange(len(latent), device=latent.device))]


def _precision(jacobian: ExampleJacobian) -> float:
    """The relative precision of the products in a backward pass."""
    dtypes = {jacobian.flat.dtype, *(output.dtype for output in jacobian.capture.outputs)}
    eps = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
    tensor_cores = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return max(eps, _TF32) if jacobian.flat.is_cuda and torch.float32 in dtypes and tensor_cores else eps


def _agrees(
    block: Block,
    gradients: Gradients,
    chosen: Tensor | None,
    expected: Tensor,
    eps: float,
    generator: torch.Generator,
) -> bool:
    """Whether a random functional of a block's sum over the chosen examples is that of the expected gradient."""

    def draw(n: int) -> Tensor:
        return torch.randn(n, generator=generator).to(expected)

    if isinstance(block, LinearBlock):
        u, v = draw(block.index.shape[0]), draw(block.index.shape[1])
        wanted = u @ expected[block.index] @ v
        products = [
            use.contracted(gradients[use.slot], u, block.B) * use.projected(v, block.B) for use in block.uses
        ]
        terms = torch.cat(products, 1)
    else:
        u = draw(len(block.index))
        wanted = u @ expected[block.index]
        terms = (block.rows(gradients) @ u).unsqueeze(-1)
    if chosen is not None:
        terms = terms * chosen.unsqueeze(-1)
    found = terms.sum()
    error = (found - wanted).abs()
    # rounding errors of a sum, and of the products in it
    tolerance = min(300 * eps, 0.1) * terms.norm()
    if bool((error <= tolerance) | ~(found.isfinite() | wanted.isfinite())):
        return True  # mostly, and the rest takes time
    tolerance = tolerance + min(10 * eps, 0.02) * terms.abs().sum()
    for use in block.uses:
        if isinstance(use, ElementwiseUse):
            # what cancels within an example, as one offset of all logits does, is known to the rounding of what cancels
            g = gradients[use.slot]
            cancelled = (g if use.x is None else g * use.x).abs().sum()
            tolerance = tolerance + min(10 * eps, 0.02) * cancelled * u.abs().max()
    return bool(error <= tolerance)


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
