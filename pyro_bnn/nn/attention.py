# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Rank-1 multi-head attention and embeddings."""

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from pyro.nn import PyroModule
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn

from pyro_bnn.nn.bayesian import broadcast_linear
from pyro_bnn.nn.conv import _OPTIONS
from pyro_bnn.nn.per_sample import PerSampleMixin, Rank1PerSampleMixin
from pyro_bnn.nn.rank1 import Rank1Mixin, Rank1Options, finish_layer
from pyro_bnn.nn.sites import SiteModule

_Attention: Any = PyroModule[nn.MultiheadAttention]
_Embedding: Any = PyroModule[nn.Embedding]
_OutProjection: Any = PyroModule[nn.modules.linear.NonDynamicallyQuantizableLinear]


class _OverridableProjection(SiteModule, _OutProjection):
    """The output projection of an attention layer, whose parameters the layer replaces."""

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, parameters held by the attention layer"


class AttentionMixin(PerSampleMixin):
    """Attention holds the parameters of its output projection itself, because its forward reads them itself."""

    def _take_out_projection(self) -> None:
        out = self._modules["out_proj"]
        assert out is not None
        to_pyro_module_(out)
        out.__class__ = _OverridableProjection
        self.register_parameter("out_proj_weight", out._parameters.pop("weight"))
        self.register_parameter("out_proj_bias", out._parameters.pop("bias", None))

    def _run(self, parameters: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        out = self._modules["out_proj"]
        assert out is not None
        parameters.setdefault("in_proj_bias", None)
        own = {
            "weight": parameters.get("out_proj_weight", self._parameters.get("out_proj_weight")),
            "bias": parameters.get("out_proj_bias", self._parameters.get("out_proj_bias")),
        }
        out.__dict__["_overrides"] = own
        try:
            return super()._run(parameters, *args, **kwargs)
        finally:
            out.__dict__["_overrides"] = None

    def _batch_dim(self, index: int | str, value: Tensor) -> int:
        if index in (5, "attn_mask"):
            return 0 if value.dim() == 3 else value.dim()
        if index in (3, "key_padding_mask"):
            return 0
        return 0 if self.batch_first else 1

    def _output_batch_dim(self, path: tuple[int, ...], value: Tensor) -> int:
        return 0 if path != (0,) or self.batch_first else 1


class Rank1MultiheadAttention(AttentionMixin, Rank1PerSampleMixin, _Attention):
    r"""
    Multi-head attention whose projections have rank-1 random factors: sites ``r_in`` and ``s_in`` on the joint
    projection of query, key and value (``r_q``, ``s_q``, ``r_k``, ... if ``kdim`` or ``vdim`` differ), ``r_out`` and
    ``s_out`` on the output projection, and the sites ``in_proj_bias`` and ``out_proj_bias``.

    The arguments are those of :class:`torch.nn.MultiheadAttention`, and by keyword those of
    :class:`~pyro_bnn.nn.Rank1Options`.
    """

    _torch_layer = nn.MultiheadAttention

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = {key: kwargs.pop(key) for key in _OPTIONS if key in kwargs}
        super().__init__(*args, **kwargs)
        finish_layer(self, options)

    def _groups(self) -> dict[str, tuple[str, int, int]]:
        templates = self._parameter_templates()
        names = {"_in": "in_proj_weight", "_q": "q_proj_weight", "_k": "k_proj_weight", "_v": "v_proj_weight"}
        names["_out"] = "out_proj_weight"
        return {k: (n, *templates[n].shape) for k, n in names.items() if n in templates}

    def _biases(self) -> dict[str, str]:
        return {"in_proj_bias": "in_proj_bias", "out_proj_bias": "out_proj_bias"}

    def _make_rank1(self, options: Rank1Options, prefix: str = "") -> None:
        self._take_out_projection()
        super()._make_rank1(options, prefix)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        """
        The arguments are those of :class:`torch.nn.MultiheadAttention`. Factors per example and the additive form run
        attention that is written out, everything else the torch layer with the weights of each sample.

        :return: as for the torch layer.
        """
        masks = {
            "key_padding_mask": key_padding_mask,
            "attn_mask": attn_mask,
            "need_weights": need_weights,
            "average_attn_weights": average_attn_weights,
            "is_causal": is_causal,
        }
        if not self._needs_rows():
            return super().forward(query, key, value, **masks)
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask: pass the mask too.")
        batched = query.dim() == 3
        inputs = [t if batched else t.unsqueeze(0) for t in (query, key, value)]
        if batched and not self.batch_first:
            inputs = [t.transpose(0, 1) for t in inputs]
        q, k, v = self._project(inputs[0], inputs[1], inputs[2], query is key is value)
        padding = key_padding_mask if batched or key_padding_mask is None else key_padding_mask.unsqueeze(0)
        y, weights = self._attend(q, k, v, padding, attn_mask, need_weights)
        y = self._map(y, *self._ordered("_out", self._bias_value("out_proj_bias")))
        if batched and not self.batch_first:
            y = y.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return (y, weights) if batched else (y[0], None if weights is None else weights[0])

    def _ordered(self, suffix: str, bias: Tensor | None) -> tuple[Any, ...]:
        weight, r, s = self._group_values(suffix)
        return weight, bias, r, s

    def _project(self, query: Tensor, key: Tensor, value: Tensor, shared: bool) -> list[Tensor]:
        bias = self._bias_value("in_proj_bias")
        biases = [None] * 3 if bias is None else bias.chunk(3, -1)
        if not self._qkv_same_embed_dim:
            groups = zip((query, key, value), ("_q", "_k", "_v"), biases, strict=True)
            return [self._map(x, *self._ordered(suffix, b)) for x, suffix, b in groups]
        weight, r, s = self._group_values("_in")
        if shared:
            return list(self._map(query, weight, bias, r, s).chunk(3, -1))
        rs = [None] * 3 if r is None else r.chunk(3, -1)
        parts = zip((query, key, value), weight.chunk(3, -2), biases, rs, strict=True)
        return [self._map(x, w, b, r_part, s) for x, w, b, r_part in parts]

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Scaled dot-product attention of shape ``(N, L, E)``, and its weights ``(N, heads, L, S)``."""
        N, L, _ = q.shape
        mask: Any = 0.0
        if attn_mask is not None:
            mask = _additive(attn_mask, q)
            if mask.dim() == 3:  # one mask per example and head
                mask = mask.repeat(N * self.num_heads // len(mask), 1, 1).view(N, -1, *mask.shape[1:])
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q)
            mask = mask + padding.repeat(N // len(padding), 1)[:, None, None]
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(N, 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(N, 1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if isinstance(mask, Tensor):  # nothing masks what was appended
            mask = F.pad(mask, (0, k.shape[1] - mask.shape[-1]))
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            fused = mask.expand(N, self.num_heads, L, k.shape[2]) if isinstance(mask, Tensor) else None
            y = F.scaled_dot_product_attention(q, k, v, fused, dropout)
            return y.transpose(1, 2).flatten(2), None
        weights = F.dropout((q @ k.mT / math.sqrt(q.shape[-1]) + mask).softmax(-1), dropout)
        return (weights @ v).transpose(1, 2).flatten(2), weights


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as a term of the scores."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)
    return mask.to(like.dtype)


def renormed(table: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """
    The rows of an embedding's table as its ``max_norm`` leaves them, without changing the table.

    :param table: shape ``(..., n, d)``.
    :param max_norm: the largest norm of a row.
    :param norm_type: the p of the norm.
    :return: the same shape.
    """
    norm = table.norm(norm_type, -1, keepdim=True)
    return torch.where(norm > max_norm, table * (max_norm / (norm + 1e-7)), table)


def with_row(table: Tensor, index: int, row: Tensor) -> Tensor:
    """
    A table of which one row is given.

    :param table: shape ``(..., n, d)``.
    :param index: the row.
    :param row: shape ``(d,)``.
    :return: the shape of ``table``.
    """
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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = {key: kwargs.pop(key) for key in _OPTIONS if key in kwargs}
        super().__init__(*args, **kwargs)
        finish_layer(self, options)

    def _groups(self) -> dict[str, tuple[str, int, int]]:
        return {"": ("weight", self.embedding_dim, self.num_embeddings)}

    def _biases(self) -> dict[str, str]:
        return {}

    def forward(self, input: Tensor) -> Tensor:
        """
        :param input: indices, shape ``(*batch)``.
        :return: shape ``(*batch, embedding_dim)``.
        """
        if self._is_folded() and self._axis == 1 and input.dim() > 1:
            return self._embed(input.transpose(0, 1)).transpose(0, 1)
        return self._embed(input)

    def _embed(self, input: Tensor) -> Tensor:
        weight = self._parameter("weight")
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

    def _read_from_outside(self, name: str) -> Any:
        value = super()._read_from_outside(name)
        if name != "weight" or self.padding_idx is None:
            return value
        return with_row(value, self.padding_idx, self._padding_row())

    def _row_factor(self, r: Tensor) -> Tensor:
        return r.unsqueeze(-2)

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
