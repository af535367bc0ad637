# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Rank-1 multi-head attention."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from pyro.nn import PyroModule
from torch import Tensor, nn
from typing_extensions import override

from pyro_bnn.nn.per_sample import PerSampleMixin, Rank1PerSampleMixin
from pyro_bnn.nn.sites import SiteModule

_Attention: Any = PyroModule[nn.MultiheadAttention]
_OutProjection: Any = PyroModule[nn.modules.linear.NonDynamicallyQuantizableLinear]


class _OverridableProjection(SiteModule, _OutProjection):
    """The output projection of an attention layer, which holds its parameters, because its forward reads them itself."""

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, parameters held by the attention layer"


class AttentionMixin(PerSampleMixin):
    """Attention that holds the parameters of its output projection, and where it has its batch."""

    out_proj: Any

    @override
    def _prepare(self) -> None:
        out = self.out_proj
        given = dict(out.named_parameters())
        for name in ("weight", "bias"):
            self.register_parameter(f"out_proj_{name}", given.get(name))
        self.out_proj = _OverridableProjection(out.in_features, out.out_features, device="meta").train(
            out.training
        )
        for name in ("weight", "bias"):
            delattr(self.out_proj, name)

    @override
    def _run(self, parameters: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        names = ("in_proj_bias", "out_proj_weight", "out_proj_bias")
        parameters = {name: self.read(name) for name in names if name not in parameters} | parameters
        with self.out_proj._replacing({name: parameters[f"out_proj_{name}"] for name in ("weight", "bias")}):
            return super()._run(parameters, *args, **kwargs)

    @override
    def _rows_dim(self, place: int | str, value: Tensor) -> int:
        if place in (5, "attn_mask"):
            return 0 if value.dim() == 3 else value.dim()
        return 0 if place in (3, "key_padding_mask", "rest") or self.batch_first else 1


class Rank1MultiheadAttention(AttentionMixin, Rank1PerSampleMixin, _Attention):
    r"""
    Multi-head attention whose projections have rank-1 random factors: sites ``r_in`` and ``s_in`` on the joint
    projection of query, key and value (``r_q``, ``s_q``, ``r_k``, ... if ``kdim`` or ``vdim`` differ), ``r_out`` and
    ``s_out`` on the output projection, and the sites ``in_proj_bias`` and ``out_proj_bias``.

    The arguments are those of :class:`torch.nn.MultiheadAttention`, and by keyword those of
    :class:`~pyro_bnn.nn.Rank1Options`.

    Example::

        >>> import torch
        >>> attention = Rank1MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.zeros(3, 5, 8)
        >>> attention(x, x, x)[0].shape
        torch.Size([3, 5, 8])
    """

    _torch_layer = nn.MultiheadAttention

    @override
    def _groups(self) -> dict[str, tuple[str, int, int]]:
        shapes: dict[str, Any] = self._shapes()
        names = {"_in": "in_proj_weight", "_q": "q_proj_weight", "_k": "k_proj_weight", "_v": "v_proj_weight"}
        names["_out"] = "out_proj_weight"
        return {suffix: (name, *shapes[name]) for suffix, name in names.items() if name in shapes}

    @override
    def _biases(self) -> list[str]:
        return ["in_proj_bias", "out_proj_bias"]

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
        y = self._map(y, *self._values_of_group("_out", "out_proj_bias"))
        if batched and not self.batch_first:
            y = y.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return (y, weights) if batched else (y[0], None if weights is None else weights[0])

    def _project(self, query: Tensor, key: Tensor, value: Tensor, shared: bool) -> list[Tensor]:
        bias = self._value("in_proj_bias")
        biases = [None] * 3 if bias is None else bias.chunk(3, -1)
        if not self._qkv_same_embed_dim:
            groups = zip((query, key, value), ("_q", "_k", "_v"), biases, strict=True)
            return [
                self._map(x, w, b, r, s)
                for x, name, b in groups
                for w, _, r, s in [self._values_of_group(name)]
            ]
        weight, _, r, s = self._values_of_group("_in")
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
