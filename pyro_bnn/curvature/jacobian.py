# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Jacobians example by example, in blocks: the inputs of linear maps and the gradients in their outputs where the
function is a network, columns by forward products for the few entries that enter in another way.

For B examples with M outputs each, a linear combination of the outputs costs one backward pass for all examples
together, and its gradient in a weight is :math:`\sum_t g_{nt} x_{nt}^\top`, never formed unless asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.curvature.blocks import Block, DenseBlock, Gradients, LinearBlock
from pyro_bnn.curvature.capture import Capture
from pyro_bnn.curvature.uses import ElementwiseUse, Layout, LinearUse, Output, Use, find_layout
from pyro_bnn.ops.jacobian import jacobian, jvp_operator, vjp, wide


@dataclass
class Layouts:
    """
    What :class:`ExampleJacobian` found out about a function, for further batches of it: where its examples are, where those
    of each use are (``None`` if it has no place for them; ``lost`` entries in all), and which outputs are one.
    For :mod:`~pyro_bnn.curvature.guard`: entries whose uses failed a check, the graphs that passed, random numbers.
    """

    dim: int
    found: list[Layout | None]
    lost: int
    slots: list[int]
    programs: set[int] = field(default_factory=set)
    mistaken: Tensor = field(init=False)
    generator: torch.Generator = field(init=False)


class ExampleJacobian:
    """
    The Jacobian of a captured function, example by example, from its ``outputs``, shape ``(*shape, C)``, with their graph, whose
    last ``event_dim`` dimensions of ``shape`` hold no examples. ``layouts`` of an earlier batch save two backward passes; uses of
    ``generic`` entries, bool, shape ``(p,)``, are not trusted. If ``differentiable``, as the capture must then be, gradients
    and inputs keep their graph.

    :ivar capture: what was recorded for these outputs.
    :ivar flat: the outputs, shape ``(B, M)``: B examples with M outputs each.
    :ivar dim: the dimension of ``shape`` that runs over examples; -1 if everything counts as one example.
    :ivar blocks: the structured part.
    :ivar offsets: by the id of a linear block with one row per example, the block of an offset of the same output.
    :ivar generic: positions of all other active entries that the outputs may depend on, shape ``(q,)``.
    """

    def __init__(
        self,
        capture: Capture,
        latent: Tensor,
        outputs: Tensor,
        layouts: Layouts | None = None,
        *,
        generic: Tensor | None = None,
        event_dim: int = 0,
        differentiable: bool = False,
    ) -> None:
        self._batch_dim = outputs.dim() - 1 - event_dim
        self.differentiable = False  # while layouts are found
        self.capture = capture = capture.fork()
        if generic is not None:
            capture.generic |= generic
        capture.finish(outputs)
        self.latent = latent
        self._outputs = outputs
        self.layouts = layouts if layouts is not None and self._fits(layouts) else self._find_layouts()
        self._use(self.layouts)
        self.blocks = self._make_blocks()
        mask = capture.generic if capture.active is None else capture.generic & capture.active
        self.generic = mask.nonzero().squeeze(-1)
        self._merge_outputs(self.layouts.slots)
        self.offsets = self._find_offsets()
        self.differentiable = differentiable

    # ------------------------------------------------------------------ set-up

    def _set_dim(self, dim: int) -> None:
        outputs = self._outputs
        self.dim = dim
        self.flat = (
            outputs.reshape(1, -1) if dim < 0 else outputs.movedim(dim, 0).reshape(outputs.shape[dim], -1)
        )
        self.B, self.M = self.flat.shape

    def _fits(self, layouts: Layouts) -> bool:
        uses, outputs = self.capture.uses, self.capture.outputs
        if len(layouts.found) != len(uses) or self._outputs.dim() - 1 <= layouts.dim:
            return False
        self._set_dim(layouts.dim)
        pairs = zip(uses, layouts.found, strict=True)
        return all(layout is None or layout.fits(use, outputs[use.slot], self.B) for use, layout in pairs)

    def _find_layouts(self) -> Layouts:
        shape = self._outputs.shape[: self._batch_dim]
        best: Layouts | None = None
        for dim in [d for d in range(len(shape)) if shape[d] > 1 or len(shape) == 1]:
            found = self._try_dim(dim)
            if best is None or found.lost < best.lost:
                best = found
            if not found.lost:
                break
        if best is None or best.lost > self._outputs.numel():
            best = self._try_dim(-1)
        return best

    def _try_dim(self, dim: int) -> Layouts:
        self._set_dim(dim)
        uses, outputs = self.capture.uses, self.capture.outputs
        slots: list[int] = []
        if self.B == 1 or not uses:
            found = [_single(use, outputs[use.slot]) for use in uses]
        else:
            generator = torch.Generator().manual_seed(0)
            weights = torch.randn(self.B, generator=generator).to(self.flat)
            mix = torch.randn(self.M, generator=generator).to(self.flat)
            plain = self.gradients(mix.expand(self.B, self.M))
            weighted = self.gradients(weights.unsqueeze(-1) * mix)
            eps = max((torch.finfo(y.dtype).eps for y in outputs if y.dtype.is_floating_point), default=0.0)
            found = [find_layout(use, plain[use.slot], weighted[use.slot], weights, eps=eps) for use in uses]
            slots = _same_outputs(plain, weighted)
        lost = sum(use.index.numel() for use, layout in zip(uses, found, strict=True) if layout is None)
        return Layouts(dim, found, lost, slots)

    def _use(self, layouts: Layouts) -> None:
        self._set_dim(layouts.dim)
        for use, layout in zip(self.capture.uses, layouts.found, strict=True):
            use.layout = layout
            if layout is None:
                self.capture.generic[use.index.reshape(-1)] = True
        self.capture.drop_generic()

    def _merge_outputs(self, slots: list[int]) -> None:
        """Outputs that were found to be one are."""
        capture = self.capture
        if len(slots) == len(capture.outputs):
            kept = sorted(set(slots))
            for use in capture.uses:
                use.slot = kept.index(slots[use.slot])
            capture.outputs = [capture.outputs[slot] for slot in kept]

    def _make_blocks(self) -> list[Block]:
        groups = self._groups()
        count = torch.zeros_like(self.capture.generic, dtype=torch.int32)
        for group in groups:
            flat = group[0].index.reshape(-1)
            count.index_add_(0, flat, torch.ones_like(flat, dtype=count.dtype))
        blocks: list[Block] = []
        shared: list[Use] = []
        for group in groups:
            if bool((count[group[0].index] > 1).any()):
                shared += group
            elif isinstance(group[0], LinearUse):
                blocks.append(LinearBlock([use for use in group if isinstance(use, LinearUse)], self.B))
            else:
                blocks.append(DenseBlock(group, self.B, shared=False))
        return [*blocks, DenseBlock(shared, self.B, shared=True)] if shared else blocks

    def _groups(self) -> list[list[Use]]:
        """Uses of the same kind and entries."""
        groups: dict[Any, list[Use]] = {}
        for use in self.capture.uses:
            flat = use.index.reshape(-1)
            key: Any = (type(use), tuple(use.index.shape), int(flat[0]), int(flat[-1]))
            group = groups.setdefault(key, [])
            if group and not torch.equal(group[0].index, use.index):
                group = groups.setdefault((*key, len(groups)), [])
            if group:
                use.index = group[0].index
            group.append(use)
        return list(groups.values())

    def _find_offsets(self) -> dict[int, DenseBlock]:
        """Where several offsets are added to an output, as in a sum of two layers, each belongs to one map."""
        plain: dict[int, list[DenseBlock]] = {}
        for block in self.blocks:
            use = block.uses[0]
            if isinstance(block, DenseBlock) and len(block.uses) == 1 and _is_offset(use):
                plain.setdefault(use.slot, []).append(block)
        found = {}
        for block in self.blocks:
            if (
                not isinstance(block, LinearBlock)
                or len(block.uses) > 1
                or not block.uses[0].rows_per_example
            ):
                continue
            offsets = plain.get(block.uses[0].slot, [])
            offset = next((offset for offset in offsets if len(offset.index) == len(block.index)), None)
            if offset is not None:
                found[id(block)] = offset
                offsets.remove(offset)
        return found

    # ------------------------------------------------------------------ products

    def gradients(self, cotangent: Tensor) -> Gradients:
        """The gradients in the outputs of the capture for a cotangent ``(B, M)``: one backward pass."""
        return self.pull_back(cotangent, self.capture.outputs, differentiable=self.differentiable)

    def pull_back(
        self, cotangent: Tensor, outputs: Sequence[Output], *, differentiable: bool = False
    ) -> Gradients:
        """The gradients in any places of the graph for a cotangent ``(B, M)``: one backward pass."""
        if not outputs:
            return ()
        found = torch.autograd.grad(
            self.flat,
            [output.edge for output in outputs],
            cotangent.to(self.flat.dtype),
            retain_graph=True,
            create_graph=differentiable,
            allow_unused=True,
        )
        full = (output.zeros() if g is None else g for g, output in zip(found, outputs, strict=True))
        dtype = wide(self.latent).dtype
        return tuple((g if differentiable else g.detach()).to(dtype) for g in full)

    @cached_property
    def columns(self) -> Tensor:
        """Columns of the Jacobian for the generic entries, shape ``(q, B, M)``."""
        with torch.enable_grad():
            q, flat = len(self.generic), self.flat.reshape(-1)
            columns = self._forward_columns(flat) if 0 < q <= len(flat) else None
            if not q:
                columns = flat.new_zeros(0, len(flat))
            elif columns is None:
                rows = (
                    vjp(flat, self.latent, torch.eye(len(flat)).to(flat), create_graph=True)
                    if self.differentiable
                    else jacobian(flat, self.latent)
                )
                columns = rows.index_select(1, self.generic).mT
        return wide(columns if self.differentiable else columns.detach()).reshape(q, self.B, self.M)

    def _forward_columns(self, flat: Tensor) -> Tensor | None:
        try:
            product = jvp_operator(flat, self.latent, create_graph=self.differentiable)
            parts = []
            for chunk in self.generic.split(64):
                basis = self.latent.new_zeros(len(chunk), self.latent.shape[0])
                basis[torch.arange(len(chunk)), chunk] = 1.0
                parts.append(product(basis))
            return torch.cat(parts)
        except RuntimeError:
            return None  # an operation without second derivatives

    def dense(self, cotangents: Tensor) -> Tensor:
        r""":math:`J_n^\top c_{kn}`, shape ``(K, B, p)``, for cotangents ``(K, B, M)``."""
        p = len(self.latent)
        rows = Pulled(self, cotangents).placed_rows(torch.arange(p, device=self.latent.device), p)
        return rows.reshape(*cotangents.shape[:2], p)

    def floats_per_example(self, K: int) -> int:
        """Roughly how many numbers per example a pass over K cotangents keeps at once."""
        outputs = sum(y.shape.numel() for y in self.capture.outputs) // self.B
        uses = [use for use in self.capture.uses if isinstance(use, LinearUse)]
        largest = max((use.input_numel() for use in uses), default=0) // self.B
        return (K + 4) * outputs + 2 * largest + K * (self.M + len(self.generic))

    def largest_output(self) -> int:
        """How many floats per example the largest of the tensors has that gradients are taken in."""
        return max((y.shape.numel() for y in self.capture.outputs), default=0) // self.B

    def basis(self) -> Tensor:
        """The cotangents that give the Jacobian itself, shape ``(M, B, M)``."""
        eye = torch.eye(self.M, dtype=self.flat.dtype, device=self.flat.device)
        return eye.unsqueeze(1).expand(self.M, self.B, self.M)


class Pulled:
    r"""
    The products :math:`J_n^\top c_{kn}` with K cotangents, shape ``(K, B, M)``, for each block of a Jacobian.

    :ivar gradients: those in the outputs of the capture, by cotangent.
    """

    def __init__(
        self, jacobian: ExampleJacobian, cotangents: Tensor, gradients: Sequence[Gradients] | None = None
    ) -> None:
        self.jacobian = jacobian
        self.cotangents = cotangents
        self.gradients = [jacobian.gradients(c) for c in cotangents] if gradients is None else gradients

    def __len__(self) -> int:
        """K."""
        return len(self.cotangents)

    def split(self, size: int) -> Iterator["Pulled"]:
        """The same, a few cotangents at a time."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Pulled(self.jacobian, self.cotangents[part], self.gradients[part])

    def outputs(self, block: LinearBlock) -> list[Tensor]:
        """Gradients in the outputs of a map, K of shape ``(B, T, out)``."""
        return [block.gradients(gradients) for gradients in self.gradients]

    def rows(self, block: Block) -> Tensor:
        """The products in a block's entries, shape ``(K, B, q)``."""
        return torch.stack([block.rows(gradients) for gradients in self.gradients])

    def generic_rows(self) -> Tensor:
        """The products in the generic entries, shape ``(K, B, q)``."""
        return torch.einsum("qbm,kbm->kbq", self.jacobian.columns, self.cotangents)

    def placed_rows(self, place: Tensor, size: int) -> Tensor:
        """The products, shape ``(K * B, size)``, with each entry of the vector at its ``place``, if that is not -1."""
        jac = self.jacobian
        rows = self.cotangents.new_zeros(len(self) * jac.B, size)
        sources: list[tuple[Tensor, Callable[[], Tensor]]] = [
            (block.index.reshape(-1), partial(self.rows, block)) for block in jac.blocks
        ]
        if len(jac.generic):
            sources.append((jac.generic, self.generic_rows))
        for index, values in sources:
            columns = place[index]
            keep = columns >= 0
            if bool(keep.any()):
                rows[:, columns[keep]] = values().reshape(len(rows), -1)[:, keep].to(rows.dtype)
        return rows


def _is_offset(use: Use) -> bool:
    """Whether entries are added, one for each place in the last dimension."""
    return isinstance(use, ElementwiseUse) and use.x is None and use.sign == 1 and use.index.dim() == 1


def _same_outputs(plain: Gradients, weighted: Gradients) -> list[int]:
    """Outputs with the same gradients, such as a linear map's before and after its offset, as the first of them."""
    slots = list(range(len(plain)))
    for j, b in enumerate(plain):
        for i, a in enumerate(plain[:j]):
            if slots[i] == i and a.shape == b.shape and torch.equal(a, b):
                if torch.equal(weighted[i], weighted[j]):
                    slots[j] = i
                break
    return slots


def _single(use: Use, output: Output) -> Layout | None:
    """Any free dimension will do for a single example."""
    _, dims = use.batch_rows(output.zeros())
    return next((Layout(dim) for dim in range(dims) if use.allows(dim, dims)), None)
