# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Rank-1 multi-head attention and embeddings."""

from typing import Any

import torch
import torch.nn.functional as F
from pyro.nn import PyroModule
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn

from pyro_bnn.nn.per_sample import PerSampleMixin, Rank1PerSampleMixin
from pyro_bnn.nn.rank1 import Rank1Mixin, Rank1Options, finish_layer
from pyro_bnn.nn.rank1_conv import _OPTIONS
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


class Rank1Embedding(Rank1Mixin, _Embedding):
    r"""
    An embedding with rank-1 random factors: row i of the table becomes :math:`s_i\, (E_i \circ r)`. In one-hot terms
    this is a linear layer whose inputs are the ``num_embeddings`` indicators; leave ``s`` out by
    ``prior={"r": ...}`` if one factor per symbol is too many.

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

    def _make_rank1(self, options: Rank1Options, prefix: str = "") -> None:
        if options.resolved_form == "additive":
            raise ValueError(
                f"{prefix + type(self).__name__} has no additive form: use another, or skip the layer."
            )
        super()._make_rank1(options, prefix)

    def forward(self, input: Tensor) -> Tensor:
        """
        :param input: indices, shape ``(*batch)``.
        :return: shape ``(*batch, embedding_dim)``.
        """
        weight = self._parameter("weight")
        r, s = self._factor("r"), self._factor("s")
        y = self._lookup(input, weight, 2)
        if self._form == "multiplicative":
            y = y if s is None else y * self._lookup(input, s.unsqueeze(-1), 2)
            return y if r is None else self._combine(y, r)
        total = y
        if r is not None and s is not None:
            for j in range(r.shape[-2]):
                scaled = y * self._lookup(input, s[..., j, :].unsqueeze(-1), 2)
                total = total + self._combine(scaled, r[..., j, :])
        return total

    def _lookup(self, input: Tensor, table: Tensor, event_dim: int) -> Tensor:
        """Rows of a table that may have one copy per sample, ``(F, 1 or B, n, d)``, or leading sample dimensions."""
        if table.dim() == event_dim:
            return F.embedding(input, table, self.padding_idx, self.max_norm, self.norm_type,
                               self.scale_grad_by_freq, self.sparse)  # fmt: skip
        if not self._is_folded():
            lead = table.shape[:-2]
            index = input.expand(torch.broadcast_shapes(lead, input.shape[: len(lead)] or lead))
            flat = table.expand(*index.shape, *table.shape[-2:])
            return flat.gather(-2, index[..., None, None].expand(*index.shape, 1, table.shape[-1])).squeeze(
                -2
            )
        samples, P, n, d = table.shape
        rows = input.shape[0]
        if rows % (samples * P):
            raise ValueError(f"indices of shape {tuple(input.shape)} do not split into {samples} samples.")
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
