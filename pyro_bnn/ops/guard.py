# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
A check of example-wise Jacobians against an ordinary backward pass.

A Jacobian in blocks rests on two beliefs about the program: that every use of an entry was seen, and that the rows of each
use belong to one example each. Both are checked with random combinations c of the outputs of a random half S of the
examples. Then the gradients in all rows of other examples must vanish, in every batch. And
:math:`\sum_{n\in S} J_n^\top c_n` from the blocks must be the gradient in the vector that autograd finds; as that depends
on the program alone, it is looked at once for each autograd graph, told apart by the names of its nodes. Both sides come
from one and the same backward pass, and are compared through one random linear functional per block, so that the check costs
little more than that pass.
"""

import torch
from torch import Tensor

from pyro_bnn.ops.capture import Capture
from pyro_bnn.ops.examples import Block, ExampleJacobian, Gradients, Layouts, LinearBlock
from pyro_bnn.ops.graph import graph_nodes
from pyro_bnn.ops.jacobian import wide
from pyro_bnn.ops.uses import ElementwiseUse, Output

#: The relative precision of a product on tensor cores.
_TF32 = 2.0**-10


def checked_jacobian(
    capture: Capture,
    latent: Tensor,
    outputs: Tensor,
    layouts: Layouts | None = None,
    *,
    event_dim: int = 0,
    differentiable: bool = False,
) -> ExampleJacobian:
    """
    The Jacobian of a captured function, example by example, checked; entries that fail the check are differentiated
    output by output, which is right for whatever autograd can differentiate.

    :param capture: see :class:`~pyro_bnn.ops.examples.ExampleJacobian`; so are the other arguments.
    :param latent: the vector, shape ``(p,)``.
    :param outputs: the function's value, shape ``(*shape, C)``.
    :param layouts: those of an earlier batch; ``layouts.mistaken`` holds the entries that have failed so far.
    :param event_dim: how many of the last dimensions of ``shape`` hold no examples.
    :param differentiable: whether the Jacobian keeps its graph.
    :return: the Jacobian.
    """
    mistaken = torch.zeros_like(capture.generic) if layouts is None else layouts.mistaken
    generator = torch.Generator().manual_seed(0) if layouts is None else layouts.generator
    attempts = [None] if layouts is None else [layouts, None]
    while True:
        attempt = attempts.pop(0) if attempts else None
        found = ExampleJacobian(
            capture,
            latent,
            outputs,
            attempt,
            generic=mistaken,
            event_dim=event_dim,
            differentiable=differentiable,
        )
        found.layouts.mistaken, found.layouts.generator = mistaken, generator
        wrong = mistaken_entries(found, generator)
        if wrong is None:
            return found
        if not attempts:  # also with its own layouts
            mistaken = mistaken | wrong


@torch.no_grad()
def mistaken_entries(jacobian: ExampleJacobian, generator: torch.Generator) -> Tensor | None:
    """
    :param jacobian: of a batch.
    :param generator: source of random numbers, on the CPU.
    :return: entries whose blocks are not right, bool, shape ``(p,)``, or ``None``.
    """
    capture, flat, layouts = jacobian.capture, jacobian.flat, jacobian.layouts
    roots = _roots(capture)
    if not flat.requires_grad or not roots:
        return None
    order = torch.randperm(jacobian.B, generator=generator)
    chosen = (order < (jacobian.B + 1) // 2).to(flat.device)
    noise = torch.randn(jacobian.B, jacobian.M, generator=generator).to(flat)
    cotangent = noise * chosen.unsqueeze(-1)
    program = hash(tuple(node.name() for node in graph_nodes(flat)))
    if program in layouts.programs:
        gradients = jacobian.pull_back(cotangent, capture.outputs)
        return _misplaced(jacobian, gradients, ~chosen)
    found = jacobian.pull_back(cotangent, [*capture.outputs, *(output for output, _ in roots)])
    gradients, in_roots = found[: len(capture.outputs)], found[len(capture.outputs) :]
    expected = wide(torch.zeros_like(jacobian.latent.detach()))
    for (_, index), g in zip(roots, in_roots, strict=True):
        expected.index_add_(0, index.reshape(-1), g.reshape(-1).to(expected.dtype))
    wrong = _unseen(jacobian, roots, expected)
    for block in jacobian.blocks:
        if not _agrees(block, gradients, chosen, expected, _precision(jacobian), generator):
            wrong[block.index.reshape(-1)] = True
    if bool(wrong.any()):
        return wrong
    if all(bool(expected[index].any()) for _, index in roots):  # a gradient of zero shows nothing
        layouts.programs.add(program)
    return None


def _misplaced(jacobian: ExampleJacobian, gradients: Gradients, others: Tensor) -> Tensor | None:
    """Entries with a use whose gradient does not vanish for examples that should have none."""
    uses = jacobian.capture.uses
    index = others.nonzero().squeeze(-1)
    if not len(index) or not uses:
        return None
    rows = [use.placed_rows(gradients[use.slot], jacobian.B).index_select(0, index) for use in uses]
    if not bool(torch.stack([r.any() for r in rows]).any()):
        return None
    wrong = torch.zeros_like(jacobian.capture.generic)
    share = min(1e3 * _precision(jacobian), 0.1)
    for use, r in zip(uses, rows, strict=True):
        if r.numel() and not bool(r.abs().max() <= share * gradients[use.slot].abs().max()):
            wrong[use.index.reshape(-1)] = True
    return wrong if bool(wrong.any()) else None


def _unseen(jacobian: ExampleJacobian, roots: list[tuple[Output, Tensor]], expected: Tensor) -> Tensor:
    """Entries of which no use was seen, in a part of the vector where they have a gradient."""
    capture = jacobian.capture
    known = capture.generic.clone() if capture.active is None else capture.generic | ~capture.active
    for block in jacobian.blocks:
        known[block.index.reshape(-1)] = True
    unseen = (expected != 0) & ~known
    wrong = torch.zeros_like(known)
    if bool(unseen.any()):
        for _, index in roots:
            wrong[index.reshape(-1)] |= bool(unseen[index].any())
    return wrong & ~known


def _roots(capture: Capture) -> list[tuple[Output, Tensor]]:
    """Where the ordinary gradient is taken: the parts of the vector with entries about which something is believed."""
    latent = capture.latent
    if capture.roots is None:
        everything = torch.arange(len(latent), device=latent.device)
        return [] if bool(capture.generic.all()) else [(Output(latent), everything)]
    return [(output, index) for output, index in capture.roots if not bool(capture.generic[index].all())]


def _precision(jacobian: ExampleJacobian) -> float:
    """The relative precision of the products in a backward pass."""
    dtypes = {jacobian.flat.dtype, *(output.dtype for output in jacobian.capture.outputs)}
    eps = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
    tensor_cores = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return max(eps, _TF32) if jacobian.flat.is_cuda and torch.float32 in dtypes and tensor_cores else eps


def _agrees(
    block: Block,
    gradients: Gradients,
    chosen: Tensor,
    expected: Tensor,
    eps: float,
    generator: torch.Generator,
) -> bool:
    """Whether a random functional of a block's sum over the chosen examples is that of the expected gradient."""
    if isinstance(block, LinearBlock):
        out, into = block.index.shape
        u, v = (torch.randn(n, generator=generator).to(expected) for n in (out, into))
        wanted = (u @ expected[block.index]) @ v
        terms = torch.cat([
            (use.gradients(gradients[use.slot], block.B) @ u.to(gradients[use.slot]))
            * use.projected(v.to(gradients[use.slot]), block.B)
            for use in block.uses
        ], 1)  # fmt: skip
    else:
        u = torch.randn(len(block.index), generator=generator).to(expected)
        wanted = u @ expected[block.index]
        terms = (block.rows(gradients) @ u).unsqueeze(-1)
    terms = terms * chosen.unsqueeze(-1)
    found = terms.sum()
    # what cancels within an example, as one offset of all logits does, is known to the rounding of what cancels
    cancelled = [
        (gradients[use.slot] if use.x is None else gradients[use.slot] * use.x).abs().sum()
        for use in block.uses
        if isinstance(use, ElementwiseUse)
    ]
    # rounding errors of a sum, and of the products in it
    tolerance = min(300 * eps, 0.1) * terms.square().sum().sqrt() + min(10 * eps, 0.02) * terms.abs().sum()
    tolerance = tolerance + min(10 * eps, 0.02) * sum(cancelled, found.new_zeros(())) * u.abs().max()
    error = (found - wanted).abs()
    return bool((error <= tolerance) | ~(found.isfinite() | wanted.isfinite()))
