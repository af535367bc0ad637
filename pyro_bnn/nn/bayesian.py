# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Layers whose full weights are random."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_bnn.nn.priors import FanInNormal, PriorLike, place_prior, resolve_prior
from pyro_bnn.nn.sites import SiteModule, module_path

_Linear: Any = PyroModule[nn.Linear]


def broadcast_linear(x: Tensor, weight: Tensor) -> Tensor:
    r"""
    :math:`y_o = \sum_i W_{oi} x_i` for a weight with leading batch dimensions, which align with those of ``x``
    from the right as in every broadcasting operation.

    :param x: inputs, shape ``(*batch_x, in)``.
    :param weight: weights, shape ``(out, in)`` or ``(*batch_w, out, in)``, e.g. ``(S, 1, out, in)`` for S draws
        against a data plate.
    :return: outputs, shape ``broadcast(batch_x, batch_w) + (out,)``.

    Example::

        >>> broadcast_linear(torch.zeros(7, 3), torch.zeros(5, 1, 2, 3)).shape
        torch.Size([5, 7, 2])
    """
    if weight.dim() == 2:
        return F.linear(x, weight)
    batch = weight.shape[:-2]
    if all(n == 1 or stride == 0 for n, stride in zip(batch, weight.stride(), strict=False)):
        # one weight, expanded over the samples
        y = F.linear(x, weight[(0,) * len(batch)])
        return y.expand(torch.broadcast_shapes(x.shape[:-1], batch) + y.shape[-1:])
    if weight.shape[-3] == 1:
        # one weight for all rows of the last batch dimension: a batched matrix product
        if x.dim() == 1:
            x = x.unsqueeze(0)
        return torch.matmul(x, weight.squeeze(-3).mT)
    return torch.matmul(weight, x.unsqueeze(-1)).squeeze(-1)


def linear_per_sample(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """Activations ``(F * B, ..., in)`` by weights ``(F, out, in)`` and a bias ``(out,)`` or ``(F, 1, out)``."""
    samples = len(weights)
    rows = x.reshape(samples, -1, x.shape[-1])
    if bias is None:
        y = torch.bmm(rows, weights.mT)
    else:
        y = torch.baddbmm(bias.expand(samples, 1, -1), rows, weights.mT)
    return y.view(*x.shape[:-1], y.shape[-1])


def fan_in(module: nn.Module, shape: torch.Size) -> int | None:
    """The number of inputs that enter one output by a parameter of a layer; ``None`` for vectors."""
    if len(shape) < 2:
        return None
    if isinstance(module, nn.Embedding):
        return 1
    if getattr(module, "weight_is_transposed", False):
        return shape[0]
    if getattr(module, "transposed", False):
        return math.prod(shape) // shape[1] // getattr(module, "groups", 1)
    return math.prod(shape[1:])


class BayesianMixin(SiteModule):
    """Makes the parameters of a torch layer sample sites."""

    def _make_bayesian(self, prior: PriorLike, prefix: str = "", keep_frozen: bool = False) -> None:
        for name, value in self._own_parameters().items():
            if keep_frozen and not value.requires_grad:
                continue
            resolved = resolve_prior(prior, prefix + name, value.shape, fan_in=fan_in(self, value.shape))
            if resolved is not None:
                placed = place_prior(resolved, self, name, value.shape, value)
                self._add_site(name, placed, "weight", event_dim=value.dim())

    def _site_keys(self) -> list[str]:
        """Names that priors may use."""
        return list(self._own_parameters())

    def _full_value(self, name: str) -> Tensor:
        """The value of a parameter, with one dimension of samples in front if they differ in a folded call."""
        value = self._value(name)
        if not self._is_folded() or value is None or value.dim() == self._event_dim(name):
            return value
        if value.shape[1] > 1:
            raise ValueError(
                f"{module_path(self)} has a value of {name!r} per example, which full weights do not support."
            )
        return value.squeeze(1)


class BayesianLinear(BayesianMixin, _Linear):
    r"""
    A linear layer :math:`y = W x + b` whose weight and bias are sample sites and may have leading sample
    dimensions.

    :param int in_features: number of inputs.
    :param int out_features: number of outputs.
    :param bool bias: whether there is a bias.
    :param prior: prior of ``"weight"`` and ``"bias"`` in one of the three forms of
        :func:`~pyro_bnn.nn.priors.resolve_prior`; :class:`~pyro_bnn.nn.priors.FanInNormal` by default. A
        parameter that a dictionary or callable leaves out stays an ordinary parameter.

    Example::

        >>> layer = BayesianLinear(3, 2)
        >>> layer(torch.zeros(7, 3)).shape
        torch.Size([7, 2])
    """

    takes_shared_input = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        prior: PriorLike | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._make_bayesian(FanInNormal() if prior is None else prior)

    def forward(self, x: Tensor) -> Tensor:
        """
        :param x: inputs, shape ``(*batch, in_features)``.
        :return: outputs, shape ``(*samples, *batch, out_features)``.
        """
        if not self._is_folded():
            y = broadcast_linear(x, self.read("weight"))
            bias = self.read("bias")
            return y if bias is None else y + bias
        if self._axis == 1 and x.dim() >= 3:
            return self._folded(x.transpose(0, 1)).transpose(0, 1)
        return self._folded(x)

    def _folded(self, x: Tensor) -> Tensor:
        folding = self._folding
        weight, bias = self._full_value("weight"), self._full_value("bias")
        shared_input = folding.is_shared_input(self, x)
        if weight.dim() == 2 and (bias is None or bias.dim() == 1):
            y = F.linear(x, weight, bias)
            return folding.repeat(y) if shared_input else y
        if shared_input:
            x = x.expand(folding.num_samples, *x.shape).flatten(0, 1)
        else:
            x = folding.whole(x)
            folding.check_rows(self, x.shape)
        bias = bias if bias is None or bias.dim() == 1 else bias.unsqueeze(1)
        return linear_per_sample(x, weight.expand(folding.num_samples, -1, -1), bias)

    def extra_repr(self) -> str:
        """The constructor's arguments and the names of the random attributes."""
        return f"{self.in_features}, {self.out_features}, sites={list(self._sites)}"
