# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Blocks of a Jacobian, example by example: the entries of one vector that are used in the same way."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from pyro_bnn.curvature.linear_maps import Sharing, kronecker_inputs, kronecker_outputs
from pyro_bnn.curvature.uses import ElementwiseUse, LinearUse, Use

#: Gradients in the outputs of a capture, one tensor each.
Gradients = Sequence[Tensor]


class LinearBlock:
    r"""
    Entries, at positions ``index`` of shape ``(out, in)``, that are the weight of one linear map, used once or several
    times: :math:`J_n^\top c = \sum_t g_{nt} x_{nt}^\top` for each of B examples.
    """

    def __init__(self, uses: Sequence[LinearUse], B: int) -> None:
        self.index = uses[0].index
        self.uses = uses
        self.B = B

    def inputs(self) -> Tensor:
        """:math:`x`, shape ``(B, T, in)``, formed anew in each call."""
        return _joined([use.inputs(self.B) for use in self.uses])

    def gradients(self, gradients: Gradients) -> Tensor:
        """:math:`g`, shape ``(B, T, out)``, from the gradients in the outputs of the capture."""
        return _joined([use.gradients(gradients[use.slot], self.B) for use in self.uses])

    def with_offset(self, offset: "DenseBlock | None") -> tuple[Tensor, Tensor]:
        """Positions and inputs; an offset of the outputs counts as the weight of one more input, which is 1."""
        index, x = self.index, self.inputs()
        if offset is not None:
            index = torch.cat([index, offset.index.unsqueeze(-1)], 1)
            x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        return index, x

    @cached_property
    def present(self) -> list[Tensor | None]:
        """
        For each use, which of its rows have an input other than zero, bool, in the shape of the rows; ``None`` for all. Rows
        without input (padding) have no gradient in the weight.
        """
        found = [use.present() for use in self.uses]
        return [None if bool(rows.all()) else rows for rows in found]

    def input_factor(self, sharing: Sharing, active: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
        """:func:`~pyro_bnn.curvature.linear_maps.kronecker_inputs` of the examples that count, bool, shape ``(B,)``."""
        whole = bool(active.all())
        if sharing == "expand" and whole:
            grams, counts = zip(*(use.input_gram(dtype) for use in self.uses), strict=True)
            rows = zip(counts, self.present, strict=True)
            return _total(grams), sum(count if kept is None else int(kept.sum()) for count, kept in rows)
        x, kept = self.inputs().to(dtype), self._placed_present()
        if not whole:
            x, kept = x[active], None if kept is None else kept[active]
        return kronecker_inputs(x, sharing, kept)

    def output_factor(self, gradients: Gradients, sharing: Sharing, *, everywhere: bool = False) -> Tensor:
        """
        :func:`~pyro_bnn.curvature.linear_maps.kronecker_outputs`; rows without input count ``everywhere``, as they do for an
        offset of the outputs.
        """
        if sharing == "expand":
            kept = [None] * len(self.uses) if everywhere else self.present
            pairs = zip(self.uses, kept, strict=True)
            return _total([use.output_gram(gradients[use.slot], k) for use, k in pairs])
        g = self.gradients(gradients)
        placed = None if everywhere else self._placed_present()
        return kronecker_outputs(g if placed is None else g * placed.unsqueeze(-1), sharing)

    def _placed_present(self) -> Tensor | None:
        """:attr:`present` of all uses together, shape ``(B, T)``."""
        if all(kept is None for kept in self.present):
            return None
        return torch.cat([use.placed(use.present(), self.B) for use in self.uses], 1)

    def rows(self, gradients: Gradients) -> Tensor:
        """The gradient in the entries for each example, shape ``(B, out * in)``."""
        return outer(self.gradients(gradients), self.inputs()).reshape(self.B, -1)


class DenseBlock:
    """
    Entries, at positions ``index`` of shape ``(q,)``, each once, with several kinds of uses, or elementwise ones, whose
    Jacobian is formed; if ``shared``, several uses, or one at several places, may touch the same entry.
    """

    def __init__(self, uses: Sequence[Use], B: int, *, shared: bool) -> None:
        self.uses = uses
        self.B = B
        self.index = uses[0].index.reshape(-1)
        self._places: Sequence[Tensor] | None = None
        if shared:
            every = [use.index.reshape(-1) for use in uses]
            self.index, inverse = torch.unique(torch.cat(every), return_inverse=True)
            self._places = inverse.split([len(index) for index in every])

    def rows(self, gradients: Gradients) -> Tensor:
        """The gradient in the entries for each example, shape ``(B, q)``."""
        parts = [self._rows_of(use, gradients[use.slot]) for use in self.uses]
        if self._places is None:
            return _total(parts)
        total = parts[0].new_zeros(self.B, len(self.index))
        for place, part in zip(self._places, parts, strict=True):
            total.index_add_(1, place, part)
        return total

    def _rows_of(self, use: Use, g: Tensor) -> Tensor:
        if isinstance(use, LinearUse):
            return outer(use.gradients(g, self.B), use.inputs(self.B)).reshape(self.B, -1)
        assert isinstance(use, ElementwiseUse)
        return use.jacobian(g, self.B)


Block = LinearBlock | DenseBlock


def outer(g: Tensor, x: Tensor) -> Tensor:
    r""":math:`\sum_t g_t x_t^\top`, shape ``(..., out, in)``, from shapes ``(..., T, out)`` and ``(..., T, in)``."""
    return g.mT * x if g.shape[-2] == 1 else g.mT @ x


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), 1)


def _total(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
