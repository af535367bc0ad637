# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Jacobians example by example, in blocks: the inputs of linear maps and the gradients in their outputs where the
function is a network, columns by forward products for the few entries that enter in another way.

For B examples with M outputs each, a linear combination of the outputs costs one backward pass for all examples
together, and its gradient in a weight is :math:`\sum_t g_{nt} x_{nt}^\top`, never formed unless asked for.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.curvature.capture import Capture
from pyro_bnn.curvature.linear_maps import Sharing, kronecker_inputs, kronecker_outputs
from pyro_bnn.curvature.uses import ElementwiseUse, Layout, LinearUse, Output, Use, find_layout
from pyro_bnn.ops.jacobian import jacobian, jvp_operator, vjp, wide

#: Gradients in the outputs of a capture, one tensor each.
Gradients = Sequence[Tensor]


class LinearBlock:
    r"""
    Entries that are the weight of one linear map: :math:`J_n^\top c = \sum_t g_{nt} x_{nt}^\top`.

    :param uses: uses with the same index.
    :param B: the number of examples.
    :ivar index: positions, shape ``(out, in)``.
    """

    def __init__(self, uses: Sequence[LinearUse], B: int) -> None:
        self.index = uses[0].index
        self.uses = uses
        self.B = B

    def inputs(self) -> Tensor:
        """
        :return: :math:`x`, shape ``(B, T, in)``, formed anew in each call.
        """
        parts = [use.inputs(self.B) for use in self.uses]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def gradients(self, gradients: Gradients) -> Tensor:
        """
        :param gradients: gradients in the outputs of the capture.
        :return: :math:`g`, shape ``(B, T, out)``.
        """
        parts = [use.gradients(gradients[use.slot], self.B) for use in self.uses]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @cached_property
    def present(self) -> list[Tensor | None]:
        """
        For each use, which of its rows have an input other than zero, bool, in the shape of the rows; ``None`` for all. Rows
        without input (padding) have no gradient in the weight.
        """
        found = [use.present() for use in self.uses]
        return [None if bool(rows.all()) else rows for rows in found]

    def input_factor(self, sharing: Sharing, active: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
        """
        :param sharing: see :data:`~pyro_bnn.curvature.linear_maps.Sharing`.
        :param active: which examples count, bool, shape ``(B,)``.
        :param dtype: the precision of the sum.
        :return: see :func:`~pyro_bnn.curvature.linear_maps.kronecker_inputs`.
        """
        whole = bool(active.all())
        if sharing == "expand" and whole:
            grams = [use.input_gram(dtype) for use in self.uses]
            total = grams[0][0]
            for matrix, _ in grams[1:]:
                total = total + matrix
            rows = zip(grams, self.present, strict=True)
            return total, sum(count if kept is None else int(kept.sum()) for (_, count), kept in rows)
        x, kept = self.inputs().to(dtype), self._placed_present()
        if not whole:
            x, kept = x[active], None if kept is None else kept[active]
        return kronecker_inputs(x, sharing, kept)

    def output_factor(self, gradients: Gradients, sharing: Sharing, *, everywhere: bool = False) -> Tensor:
        """
        :param gradients: gradients in the outputs of the capture.
        :param sharing: see :data:`~pyro_bnn.curvature.linear_maps.Sharing`.
        :param everywhere: whether rows without input count, as they do for an offset of the outputs.
        :return: see :func:`~pyro_bnn.curvature.linear_maps.kronecker_outputs`.
        """
        if sharing == "expand":
            kept = [None] * len(self.uses) if everywhere else self.present
            grams = [use.output_gram(gradients[use.slot], k) for use, k in zip(self.uses, kept, strict=True)]
            total = grams[0]
            for matrix in grams[1:]:
                total = total + matrix
            return total
        g = self.gradients(gradients)
        placed = None if everywhere else self._placed_present()
        return kronecker_outputs(g if placed is None else g * placed.unsqueeze(-1), sharing)

    def _placed_present(self) -> Tensor | None:
        """:attr:`present` of all uses together, shape ``(B, T)``."""
        if all(kept is None for kept in self.present):
            return None
        return torch.cat([use.placed(use.present(), self.B) for use in self.uses], 1)

    def rows(self, gradients: Gradients) -> Tensor:
        """
        :param gradients: gradients in the outputs of the capture.
        :return: the gradient in the entries for each example, shape ``(B, out * in)``.
        """
        return outer(self.gradients(gradients), self.inputs()).reshape(self.B, -1)


class DenseBlock:
    """
    Entries with several kinds of uses, or elementwise ones, whose Jacobian is formed.

    :param uses: uses that together touch these entries.
    :param B: the number of examples.
    :param shared: whether several uses, or one at several places, may touch the same entry.
    :ivar index: positions, shape ``(q,)``, each once.
    """

    def __init__(self, uses: Sequence[Use], B: int, *, shared: bool) -> None:
        self.uses = uses
        self.B = B
        if not shared:
            self.index = uses[0].index.reshape(-1)
            self._places: list[Tensor | None] = [None] * len(uses)
        else:
            self.index, inverse = torch.unique(
                torch.cat([use.index.reshape(-1) for use in uses]), return_inverse=True
            )
            self._places = list(inverse.split([use.index.numel() for use in uses]))

    def rows(self, gradients: Gradients) -> Tensor:
        """See :meth:`LinearBlock.rows`; shape ``(B, q)``."""
        total: Tensor | None = None
        for use, place in zip(self.uses, self._places, strict=True):
            g = gradients[use.slot]
            if isinstance(use, LinearUse):
                part = outer(use.gradients(g, self.B), use.inputs(self.B)).reshape(self.B, -1)
            else:
                assert isinstance(use, ElementwiseUse)
                part = use.jacobian(g, self.B)
            if place is None:
                total = part if total is None else total + part
            else:
                total = part.new_zeros(self.B, len(self.index)) if total is None else total
                total.index_add_(1, place, part)
        assert total is not None
        return total


Block = LinearBlock | DenseBlock


def outer(g: Tensor, x: Tensor) -> Tensor:
    r"""
    :param g: shape ``(..., T, out)``.
    :param x: shape ``(..., T, in)``.
    :return: :math:`\sum_t g_t x_t^\top`, shape ``(..., out, in)``.
    """
    if g.shape[-2] == 1:
        return g.mT * x
    return g.mT @ x


class ExampleJacobian:
    """
    The Jacobian of a captured function, example by example.

    :param capture: the capture in which the function ran, not yet finished.
    :param latent: the vector, shape ``(p,)``.
    :param outputs: the function's value, shape ``(*shape, C)``, with its graph.
    :param layouts: what :attr:`layouts` was for an earlier batch of the same function, to save two backward passes.
    :param generic: further entries whose uses are not to be trusted, bool, shape ``(p,)``.
    :param event_dim: how many of the last dimensions of ``shape`` hold no examples.
    :param differentiable: whether gradients and inputs keep their graph, so that functions of the Jacobian can be
        differentiated in the function's other parameters; the capture must then be differentiable too.
    :ivar Capture capture: what was recorded for these outputs.
    :ivar Tensor flat: the outputs, shape ``(B, M)``.
    :ivar int B: the number of examples.
    :ivar int M: outputs per example.
    :ivar int dim: the dimension of ``shape`` that runs over examples; -1 if everything counts as one example.
    :ivar blocks: the structured part.
    :ivar generic: positions of all other active entries that the outputs may depend on, shape ``(q,)``.
    """

    def __init__(
        self,
        capture: Capture,
        latent: Tensor,
        outputs: Tensor,
        layouts: "Layouts | None" = None,
        *,
        generic: Tensor | None = None,
        event_dim: int = 0,
        differentiable: bool = False,
    ) -> None:
        self._batch_dim = outputs.dim() - 1 - event_dim
        self.differentiable = False  # while layouts are found
        capture = capture.fork()
        if generic is not None:
            capture.generic |= generic
        capture.finish(outputs)
        self.latent = latent
        self._outputs = outputs
        self.capture = capture
        self.layouts = layouts if layouts is not None and self._restore(layouts) else self._find_layouts()
        self.blocks = self._make_blocks()
        mask = capture.generic if capture.active is None else capture.generic & capture.active
        self.generic = mask.nonzero().squeeze(-1)
        self._columns: Tensor | None = None
        if len(self.layouts.slots) == len(capture.outputs):
            kept = sorted(set(self.layouts.slots))
            for use in capture.uses:
                use.slot = kept.index(self.layouts.slots[use.slot])
            capture.outputs = [capture.outputs[slot] for slot in kept]
        self.offsets = self._find_offsets()
        self.differentiable = differentiable

    # ------------------------------------------------------------------ set-up

    def _set_dim(self, dim: int) -> None:
        outputs = self._outputs
        self.dim = dim
        if dim < 0:
            self.flat = outputs.reshape(1, -1)
        else:
            self.flat = outputs.movedim(dim, 0).reshape(outputs.shape[dim], -1)
        self.B, self.M = self.flat.shape

    def _restore(self, layouts: "Layouts") -> bool:
        uses = self.capture.uses
        if len(layouts.found) != len(uses) or self._outputs.dim() - 1 <= layouts.dim:
            return False
        self._set_dim(layouts.dim)
        outputs = self.capture.outputs
        for use, layout in zip(uses, layouts.found, strict=True):
            if layout is not None and not layout.fits(use, outputs[use.slot], self.B):
                return False
        for use, layout in zip(uses, layouts.found, strict=True):
            use.layout = layout
        self._drop_unplaced()
        return True

    def _find_layouts(self) -> "Layouts":
        uses = self.capture.uses
        shape = self._outputs.shape[: self._batch_dim]
        best: Layouts | None = None
        for dim in [d for d in range(len(shape)) if shape[d] > 1 or len(shape) == 1]:
            found = self._try_dim(dim)
            lost = sum(use.index.numel() for use, layout in zip(uses, found, strict=True) if layout is None)
            if best is None or lost < best.lost:
                best = Layouts(dim, found, lost, self._slots)
            if lost == 0:
                break
        if best is None or best.lost > self._outputs.numel():
            best = Layouts(-1, self._try_dim(-1), 0, self._slots)
        self._set_dim(best.dim)
        for use, layout in zip(uses, best.found, strict=True):
            use.layout = layout
        self._drop_unplaced()
        return best

    def _try_dim(self, dim: int) -> "list[Layout | None]":
        self._set_dim(dim)
        self._slots: list[int] = []
        uses = self.capture.uses
        if not uses:
            return []
        if self.B == 1:
            return [_single(use, self.capture.outputs[use.slot]) for use in uses]
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(self.B, generator=generator).to(self.flat)
        mix = torch.randn(self.M, generator=generator).to(self.flat)
        plain = self.gradients(mix.expand(self.B, self.M))
        weighted = self.gradients(weights.unsqueeze(-1) * mix)
        # outputs with the same gradients, such as a linear map's before and after its offset, count as one
        self._slots = list(range(len(plain)))
        for j, b in enumerate(plain):
            for i, a in enumerate(plain[:j]):
                if self._slots[i] == i and a.shape == b.shape and torch.equal(a, b):
                    if torch.equal(weighted[i], weighted[j]):
                        self._slots[j] = i
                    break
        eps = max(
            (torch.finfo(y.dtype).eps for y in self.capture.outputs if y.dtype.is_floating_point), default=0.0
        )
        return [find_layout(use, plain[use.slot], weighted[use.slot], weights, eps=eps) for use in uses]

    def _drop_unplaced(self) -> None:
        capture = self.capture
        lost = [use for use in capture.uses if use.layout is None]
        for use in lost:
            capture.generic[use.index.reshape(-1)] = True
        if lost:
            # a use that shares an entry with a lost one goes with it
            while True:
                keep = [use for use in capture.uses if not bool(capture.generic[use.index].any())]
                if len(keep) == len(capture.uses):
                    break
                for use in capture.uses:
                    if bool(capture.generic[use.index].any()):
                        capture.generic[use.index.reshape(-1)] = True
                capture.uses = keep

    def _make_blocks(self) -> list[Block]:
        groups: dict[Any, list[Use]] = {}
        for use in self.capture.uses:
            flat = use.index.reshape(-1)
            key = (type(use), tuple(use.index.shape), int(flat[0]), int(flat[-1]))
            group = groups.setdefault(key, [])
            if group and not torch.equal(group[0].index, use.index):
                group = groups.setdefault((*key, len(groups)), [])
            if group:
                use.index = group[0].index
            group.append(use)
        count = torch.zeros_like(self.capture.generic, dtype=torch.int32)
        for group in groups.values():
            flat = group[0].index.reshape(-1)
            count.index_add_(0, flat, torch.ones_like(flat, dtype=count.dtype))
        blocks: list[Block] = []
        shared: list[Use] = []
        for group in groups.values():
            if bool((count[group[0].index] > 1).any()):
                shared += group
            elif isinstance(group[0], LinearUse):
                blocks.append(LinearBlock([u for u in group if isinstance(u, LinearUse)], self.B))
            else:
                blocks.append(DenseBlock(group, self.B, shared=False))
        if shared:
            blocks.append(DenseBlock(shared, self.B, shared=True))
        return blocks

    def _find_offsets(self) -> dict[int, DenseBlock]:
        """
        For linear blocks with one row per example, the block of an offset that is added to the same output. Where several
        are, as in a sum of two layers, each belongs to one map.
        """
        plain: dict[int, list[DenseBlock]] = {}
        for block in self.blocks:
            if isinstance(block, DenseBlock) and len(block.uses) == 1:
                (use,) = block.uses
                is_offset = isinstance(use, ElementwiseUse) and use.x is None and use.sign == 1
                if is_offset and use.index.dim() == 1:
                    plain.setdefault(use.slot, []).append(block)
        found = {}
        for block in self.blocks:
            if (
                isinstance(block, LinearBlock)
                and len(block.uses) == 1
                and block.uses[0].rows_per_example == 1
            ):
                offsets = plain.get(block.uses[0].slot, [])
                fitting = [offset for offset in offsets if len(offset.index) == len(block.index)]
                if fitting:
                    found[id(block)] = fitting[0]
                    offsets.remove(fitting[0])
        return found

    # ------------------------------------------------------------------ products

    def gradients(self, cotangent: Tensor) -> Gradients:
        """
        One backward pass.

        :param cotangent: shape ``(B, M)``.
        :return: the gradients in the outputs of the capture.
        """
        return self.pull_back(cotangent, self.capture.outputs, differentiable=self.differentiable)

    def pull_back(
        self, cotangent: Tensor, outputs: Sequence[Output], *, differentiable: bool = False
    ) -> Gradients:
        """
        One backward pass.

        :param cotangent: shape ``(B, M)``.
        :param outputs: where the gradients are wanted.
        :param differentiable: whether they keep their graph.
        :return: one gradient each.
        """
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

    @property
    def columns(self) -> Tensor:
        """Columns of the Jacobian for the generic entries, shape ``(q, B, M)``."""
        if self._columns is None:
            with torch.enable_grad():
                self._columns = self._make_columns()
        return self._columns

    def _make_columns(self) -> Tensor:
        q, size = len(self.generic), self.flat.numel()
        flat = self.flat.reshape(-1)
        columns: Tensor | None = None
        if q == 0:
            columns = flat.new_zeros(0, size)
        elif q <= size:
            columns = self._forward_columns(flat)
        if columns is None:
            rows = (
                vjp(flat, self.latent, torch.eye(size).to(flat), create_graph=True)
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

    def rows(self, cotangents: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        r"""
        :math:`J_n^\top c_{kn}` for all examples, block by block.

        :param cotangents: shape ``(K, B, M)``.
        :return: pairs of positions ``(q,)`` and rows of shape ``(K, B, q)``, over disjoint blocks.
        """
        passes = [self.gradients(c) for c in cotangents]
        for block in self.blocks:
            yield block.index.reshape(-1), torch.stack([block.rows(g) for g in passes])
        if len(self.generic):
            yield self.generic, torch.einsum("qbm,kbm->kbq", self.columns, cotangents)

    def dense(self, cotangents: Tensor) -> Tensor:
        r"""
        :param cotangents: shape ``(K, B, M)``.
        :return: :math:`J_n^\top c_{kn}`, shape ``(K, B, p)``.
        """
        total = cotangents.new_zeros(cotangents.shape[:2] + self.latent.shape)
        for index, part in self.rows(cotangents):
            total[..., index] = part
        return total

    def floats_per_example(self, K: int) -> int:
        """
        Roughly how many numbers per example a pass over K cotangents keeps at once.

        :param K: how many cotangents.
        :return: a number of floats.
        """
        outputs = sum(y.shape.numel() for y in self.capture.outputs) // self.B
        uses = [use for use in self.capture.uses if isinstance(use, LinearUse)]
        largest = max((use.input_numel() for use in uses), default=0) // self.B
        return (K + 4) * outputs + 2 * largest + K * (self.M + len(self.generic))

    def largest_output(self) -> int:
        """
        :return: how many floats per example the largest of the tensors has that gradients are taken in.
        """
        return max((y.shape.numel() for y in self.capture.outputs), default=0) // self.B

    def basis(self) -> Tensor:
        """The cotangents that give the Jacobian itself, shape ``(M, B, M)``."""
        eye = torch.eye(self.M, dtype=self.flat.dtype, device=self.flat.device)
        return eye.unsqueeze(1).expand(self.M, self.B, self.M)


class Layouts:
    """What :class:`ExampleJacobian` found out about a function, for further batches of it."""

    def __init__(self, dim: int, found: "list[Layout | None]", lost: int, slots: list[int]) -> None:
        self.dim = dim
        self.slots = slots
        self.found = found
        self.lost = lost
        #: for :mod:`~pyro_bnn.curvature.guard`: entries whose uses failed a check, the graphs that passed, random numbers
        self.mistaken: Tensor
        self.programs: set[int] = set()
        self.generator: torch.Generator


def _single(use: Use, output: Output) -> Layout | None:
    """Any free dimension will do for a single example."""
    _, dims = use.batch_rows(output.zeros())
    for dim in range(dims):
        if not isinstance(use, ElementwiseUse) or use.allows(dim, dims):
            return Layout(dim)
    return None
