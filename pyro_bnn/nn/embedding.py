# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Rank-1 embeddings, and tables of which some rows are given."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from pyro.nn import PyroModule
from torch import Tensor, nn
from typing_extensions import override

from pyro_bnn.nn.bayesian import broadcast_linear
from pyro_bnn.nn.rank1 import Rank1Mixin

_Embedding: Any = PyroModule[nn.Embedding]


def renormed(table: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """The rows of a table ``(..., n, d)`` as the ``max_norm`` of an embedding leaves them; the table stays as it is."""
    norm = table.norm(norm_type, -1, keepdim=True)
    return torch.where(norm > max_norm, table * (max_norm / (norm + 1e-7)), table)


def with_row(table: Tensor, index: int, row: Tensor) -> Tensor:
    """A table ``(..., n, d)`` of which one row ``(d,)`` is given."""
    here = torch.arange(table.shape[-2], device=table.device) == index % table.shape[-2]
    return torch.where(here.unsqueeze(-1), row, table)


class Rank1Embedding(Rank1Mixin, _Embedding):
    r"""
    An embedding with rank-1 random factors: row i of the table becomes :math:`s_i\, (E_i \circ r)`. In one-hot terms
    this is a linear layer whose inputs are the ``num_embeddings`` indicators; leave ``s`` out by
    ``prior={"r": ...}`` if one factor per symbol is too many.

    The additive form, :math:`E^\top (x + s) + r` with the indicators :math:`x`, shifts all rows by one random vector.

    The arguments are those of :class:`torch.nn.Embedding`, and by keyword those of
    :class:`~pyro_bnn.nn.Rank1Options`.

    Example::

        >>> Rank1Embedding(10, 3)(torch.tensor([[1, 2]])).shape
        torch.Size([1, 2, 3])
    """

    @override
    def _groups(self) -> dict[str, tuple[str, int, int]]:
        return {"": ("weight", self.embedding_dim, self.num_embeddings)}

    @override
    def _biases(self) -> list[str]:
        return []

    def forward(self, input: Tensor) -> Tensor:
        """
        :param input: indices, shape ``(*batch)``.
        :return: shape ``(*batch, embedding_dim)``.
        """
        if self._is_folded() and self._axis == 1 and input.dim() > 1:
            return self._embed(input.transpose(0, 1)).transpose(0, 1)
        return self._embed(input)

    def _embed(self, input: Tensor) -> Tensor:
        weight = self._value("weight")
        if self.max_norm is not None and not isinstance(weight, nn.Parameter):
            weight = renormed(weight, self.max_norm, self.norm_type)
        if self._is_folded():
            input = self._folding.whole(input)
            self._folding.check_rows(self, input.shape)
        y = self._scaled(input, self._lookup(input, weight, 2), weight)
        if self.padding_idx is None:
            return y
        return torch.where((input == self.padding_idx).unsqueeze(-1), self._padding_row(), y)

    def _padding_row(self) -> Tensor:
        """The row of the padding symbol, which is not random."""
        spec = self._sites.get("weight")
        table = self.read("weight") if spec is None or spec.init is None else spec.init
        return table[self.padding_idx].detach()

    @override
    def _read_from_outside(self, name: str) -> Any:
        value = super()._read_from_outside(name)
        if name != "weight" or self.padding_idx is None:
            return value
        return with_row(value, self.padding_idx, self._padding_row())

    @override
    def _row_factor(self, r: Tensor) -> Tensor:
        return r.unsqueeze(-2)

    @override
    def _column_factor(self, s: Tensor) -> Tensor:
        return s.unsqueeze(-1)

    def _scaled(self, input: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """Rows of the table with their factors."""
        r, s = self._factor("r"), self._factor("s")
        if self._form == "additive":
            # the indicators of the symbols are shifted by s, which adds the same vector to every symbol
            y = y if s is None else self._combine(y, broadcast_linear(s, weight.mT), operator.add)
            return y if r is None else self._combine(y, r, operator.add)
        if self._form == "multiplicative":
            return self._scaled_rows(input, y, r, s)
        total = y
        for r_j, s_j in self._pairs(r, s):
            total = total + self._scaled_rows(input, y, r_j, s_j)
        return total

    def _scaled_rows(self, input: Tensor, y: Tensor, r: Tensor | None, s: Tensor | None) -> Tensor:
        y = y if s is None else y * self._lookup(input, s.unsqueeze(-1), 2)
        return y if r is None else self._combine(y, r)

    def _lookup(self, input: Tensor, table: Tensor, event_dim: int) -> Tensor:
        """Rows of a table that may have one copy per sample, ``(F, 1 or B, n, d)``, or leading sample dimensions."""
        if isinstance(table, nn.Parameter):
            return F.embedding(input, table, self.padding_idx, self.max_norm, self.norm_type,
                               self.scale_grad_by_freq)  # fmt: skip
        if table.dim() == event_dim:
            return F.embedding(input, table)
        if not self._is_folded():
            lead = table.shape[:-2]
            index = input.expand(torch.broadcast_shapes(lead, input.shape[: len(lead)] or lead))
            flat = table.expand(*index.shape, *table.shape[-2:])
            return flat.gather(-2, index[..., None, None].expand(*index.shape, 1, table.shape[-1])).squeeze(
                -2
            )
        samples, P, n, d = table.shape
        rows = input.shape[0]
        if P > 1 and rows > samples * P:
            table = table.repeat_interleave(rows // (samples * P), dim=1)
            P = table.shape[1]
        index = input.reshape(samples, rows // samples, -1)
        if P == 1:
            offsets = torch.arange(samples, device=input.device)[:, None, None] * n
            y = F.embedding(index + offsets, table.reshape(samples * n, d))
        else:
            offsets = torch.arange(samples * P, device=input.device).view(samples, P, 1) * n
            y = F.embedding(index + offsets, table.reshape(samples * P * n, d))
        return y.view(*input.shape, d)
