# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
A check of example-wise Jacobians against an ordinary backward pass.

A Jacobian in blocks rests on beliefs about the program: that every use of an entry was seen, and that the rows of each
use belong to one example each. For random combinations of the outputs of a random half S of the examples,
:math:`\sum_{n\in S} J_n^\top c_n` from the blocks must be the gradient that autograd finds. An unseen use, or a row that
counts for an example outside S, breaks that with probability one. Both sides come from one and the same backward pass, and
are compared through one random linear functional per block, so that the check costs little more than that pass.
"""

import torch
from torch import Tensor

from pyro_bnn.ops.capture import Capture
from pyro_bnn.ops.examples import Block, ExampleJacobian, Gradients, Layouts, LinearBlock
from pyro_bnn.ops.jacobian import wide
from pyro_bnn.ops.uses import Output

#: The relative precision of a product on tensor cores.
_TF32 = 2.0**-10


def checked_jacobian(
    capture: Capture,
    latent: Tensor,
    outputs: Tensor,
    layouts: Layouts | None = None,
    *,
    differentiable: bool = False,
) -> ExampleJacobian:
    """
    The Jacobian of a captured function, example by example, checked; entries that fail the check are differentiated
    output by output, which is right for whatever autograd can differentiate.

    :param capture: see :class:`~pyro_bnn.ops.examples.ExampleJacobian`; so are the other arguments.
    :param latent: the vector, shape ``(p,)``.
    :param outputs: the function's value, shape ``(*shape, C)``.
    :param layouts: those of an earlier batch; ``layouts.mistaken`` holds the entries that have failed so far.
    :param differentiable: whether the Jacobian keeps its graph.
    :return: the Jacobian.
    """
    mistaken = torch.zeros_like(capture.generic) if layouts is None else layouts.mistaken
    generator = torch.Generator().manual_seed(0) if layouts is None else layouts.generator
    attempts = [None] if layouts is None else [layouts, None]
    while True:
        attempt = attempts.pop(0) if attempts else None
        found = ExampleJacobian(
            capture, latent, outputs, attempt, generic=mistaken, differentiable=differentiable
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
    capture, flat = jacobian.capture, jacobian.flat
    known = _known(jacobian)
    roots = _roots(capture, known)
    if not flat.requires_grad or not roots:
        return None
    order = torch.randperm(jacobian.B, generator=generator)
    weights = (order < (jacobian.B + 1) // 2).to(flat)
    cotangent = torch.randn(jacobian.B, jacobian.M, generator=generator).to(flat) * weights.unsqueeze(-1)
    targets = [*capture.outputs, *(output for output, _ in roots)]
    gradients = jacobian.pull_back(cotangent, targets)
    of_uses = gradients[: len(capture.outputs)]
    expected = wide(torch.zeros_like(jacobian.latent.detach()))
    for (_, index), g in zip(roots, gradients[len(of_uses) :], strict=True):
        expected.index_add_(0, index.reshape(-1), g.reshape(-1).to(expected.dtype))
    wrong = torch.zeros_like(known)
    for block in jacobian.blocks:
        if not _agrees(block, of_uses, wide(weights), expected, _precision(jacobian), generator):
            wrong[block.index.reshape(-1)] = True
    # entries of which no use was seen have no gradient
    unseen = (expected != 0) & ~known
    if bool(unseen.any()):
        for _, index in roots:
            if bool(unseen[index].any()):
                wrong[index.reshape(-1)] = True
        wrong &= ~capture.generic
    return wrong if bool(wrong.any()) else None


def _known(jacobian: ExampleJacobian) -> Tensor:
    """Entries that are in a block or generic, or not of interest."""
    capture = jacobian.capture
    known = capture.generic.clone() if capture.active is None else capture.generic | ~capture.active
    for block in jacobian.blocks:
        known[block.index.reshape(-1)] = True
    return known


def _roots(capture: Capture, known: Tensor) -> list[tuple[Output, Tensor]]:
    """Where the ordinary gradient is taken: the parts of the vector that hold entries about which something is believed."""
    latent = capture.latent
    if capture.roots is None:
        everything = torch.arange(len(latent), device=latent.device)
        return [] if bool(capture.generic.all()) else [(Output(latent), everything)]
    return [(output, index) for output, index in capture.roots if not bool(capture.generic[index].all())]


def _precision(jacobian: ExampleJacobian) -> float:
    """The relative precision of the products in a backward pass."""
    dtypes = {jacobian.flat.dtype, *(output.dtype for output in jacobian.capture.outputs)}
    eps = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
    if jacobian.flat.is_cuda and torch.float32 in dtypes:
        if torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32:
            eps = max(eps, _TF32)
    return eps


def _agrees(
    block: Block,
    gradients: Gradients,
    weights: Tensor,
    expected: Tensor,
    eps: float,
    generator: torch.Generator,
) -> bool:
    """Whether a random functional of a block's sum over the examples of weight one is that of the expected gradient."""
    if isinstance(block, LinearBlock):
        out, into = block.index.shape
        u, v = (torch.randn(n, generator=generator).to(weights) for n in (out, into))
        wanted = (u.to(expected) @ expected[block.index]) @ v.to(expected)
        terms = torch.cat([
            (use.gradients(gradients[use.slot], block.B) @ u.to(gradients[use.slot]))
            * use.projected(v.to(gradients[use.slot]), block.B)
            for use in block.uses
        ], 1)  # fmt: skip
    else:
        u = torch.randn(len(block.index), generator=generator).to(weights)
        wanted = u.to(expected) @ expected[block.index]
        terms = (block.rows(gradients) @ u.to(expected.dtype)).unsqueeze(-1)
    terms = terms * weights.unsqueeze(-1)
    found = terms.sum()
    # rounding errors of a sum, and of the products in it
    tolerance = min(300 * eps, 0.1) * terms.square().sum().sqrt() + min(10 * eps, 0.02) * terms.abs().sum()
    error = (found - wanted).abs()
    return bool((error <= tolerance) | ~(found.isfinite() | wanted.isfinite()))
