# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Rank-1 layers: a shared weight and random vectors that scale its inputs and outputs."""

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_bnn.nn.bayesian import broadcast_linear
from pyro_bnn.nn.priors import PriorLike, check_keys, map_to, resolve_prior
from pyro_bnn.nn.sites import SiteModule

_Linear: Any = PyroModule[nn.Linear]


def default_factor_prior() -> dist.Distribution:
    """
    The prior of rank-1 factors that the paper's CIFAR experiments use, :math:`N(1, 0.1^2)`.

    :return: a scalar distribution.
    """
    one = torch.ones(())
    return dist.Normal(one, 0.1 * one)


class Rank1Linear(SiteModule, _Linear):
    r"""
    A linear layer with rank-1 random factors,

    .. math:: y = ((x \circ s) W^\top) \circ r + b = (W \circ r s^\top)\, x + b,

    equation (1) of [1]: :math:`r` scales the outputs, :math:`s` the inputs, and the bias is added after
    :math:`r`. Factors are the sample sites ``r`` (shape ``(out_features,)``) and ``s`` (``(in_features,)``);
    the bias is a sample site too, so that every component of a mixture has its own. The weight is a shared
    parameter unless ``weight_prior`` makes it a site.

    :param int in_features: number of inputs.
    :param int out_features: number of outputs.
    :param bool bias: whether there is a bias.
    :param prior: prior of the factors in one of the three forms of
        :func:`~pyro_bnn.nn.priors.resolve_prior`, with the names ``"r"`` and ``"s"``; a factor that a dictionary
        leaves out is absent. :math:`N(1, 0.1^2)` by default; ``dist.Cauchy(1., 0.1)`` is the paper's other choice.
    :param weight_prior: prior of ``"weight"``; ``None`` keeps the weight a parameter (to be regularised by weight
        decay).
    :param bias_prior: prior of ``"bias"``, :math:`N(0, 1)` by default. An empty dictionary keeps the bias
        a parameter that all components share.

    **References**

    [1] Dusenberry et al., *Efficient and Scalable Bayesian Neural Nets with Rank-1 Factors*, ICML 2020.

    Example::

        >>> layer = Rank1Linear(3, 2, prior=dist.Normal(1.0, 0.05))
        >>> layer(torch.zeros(7, 3)).shape
        torch.Size([7, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        prior: PriorLike | None = None,
        weight_prior: PriorLike | None = None,
        bias_prior: PriorLike | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        check_keys(prior, ["r", "s"])
        self._make_rank1(prior, weight_prior, bias_prior)

    def _factor_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"r": (self.out_features,), "s": (self.in_features,)}

    def _make_rank1(
        self,
        prior: PriorLike | None,
        weight_prior: PriorLike | None,
        bias_prior: PriorLike | None,
        prefix: str = "",
    ) -> None:
        weight = self._parameters["weight"]
        bias = self._parameters["bias"]
        assert weight is not None
        prior = default_factor_prior() if prior is None else prior
        bias_prior = dist.Normal(torch.zeros(()), torch.ones(())) if bias_prior is None else bias_prior
        self._factors: tuple[str, ...] = ()
        for name, shape in self._factor_shapes().items():
            resolved = resolve_prior(prior, prefix + name, shape)
            if resolved is not None:
                self._add_site(name, map_to(resolved, weight), "factor")
                self._factors = (*self._factors, name)
        if bias is not None:
            resolved = resolve_prior(bias_prior, prefix + "bias", bias.shape)
            if resolved is not None:
                self._add_site("bias", map_to(resolved, bias), "bias")
        if weight_prior is not None:
            resolved = resolve_prior(weight_prior, prefix + "weight", weight.shape)
            if resolved is not None:
                self._add_site("weight", map_to(resolved, weight), "base")

    def forward(self, x: Tensor) -> Tensor:
        """
        :param x: inputs, shape ``(*batch, in_features)``; factors of shape ``(*samples, 1, d)`` align with the
            batch dimensions from the right.
        :return: outputs, shape ``(*samples, *batch, out_features)``.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"{self._pyro_name or 'Rank1Linear'} takes inputs of shape (..., {self.in_features}), found "
                f"{tuple(x.shape)}."
            )
        if "s" in self._factors:
            x = x * self.s
        y = broadcast_linear(x, self.weight)
        if "r" in self._factors:
            y = y * self.r
        bias = self.bias
        return y if bias is None else y + bias

    def extra_repr(self) -> str:
        """The constructor's arguments and the names of the random attributes."""
        return f"{self.in_features}, {self.out_features}, sites={self._site_names()}"
