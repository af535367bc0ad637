# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation with statistics of its own for every component of a mixture."""

from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_bnn.nn.sites import SiteModule

_BatchNorm1d: Any = PyroModule[nn.BatchNorm1d]
_BatchNorm2d: Any = PyroModule[nn.BatchNorm2d]
_BatchNorm3d: Any = PyroModule[nn.BatchNorm3d]


class ComponentBatchNormMixin(SiteModule):
    r"""
    Batch normalisation with a mean, a variance, a scale and a shift per component.

    The component of a sample is the value of the uniform site ``component`` of the first such layer, which
    :class:`~pyro_bnn.infer.autoguide.AutoMixture` ties to the index of its components.

    .. warning:: After a per-component normalisation the size of the output factors ``r`` of the layer before it
        cancels, :math:`\mathrm{BN}_k(r z) = \mathrm{sign}(r)\, \mathrm{BN}_k(z)`: their mean is not identified by the
        data, and only their sign and relative noise matter. Normalisation that is shared by the components, the
        default, does not have this property and is what the paper used.
    """

    def _make_component(self, num_components: int, first: Any) -> None:
        self.num_components = num_components
        for name, value in self._own_parameters().items():
            repeated = value.detach().expand(num_components, -1).clone()
            setattr(self, name, nn.Parameter(repeated, requires_grad=value.requires_grad))
        for name in ("running_mean", "running_var"):
            if getattr(self, name) is not None:
                self.register_buffer(name, getattr(self, name).expand(num_components, -1).clone())
        if first is self:
            probs = next(self.parameters()).new_full((num_components,), 1.0 / num_components)
            self._add_site("component", dist.Categorical(probs=probs), "index", event_dim=0)
        else:
            self._redirect_site("component", first, "component")

    def forward(self, x: Tensor) -> Tensor:
        """Takes and returns what the torch layer does."""
        self._check_input_dim(x)
        index = self._value("component").reshape(-1)  # one component per sample
        S = len(index)
        if self._is_folded():
            self._folding.check_rows(self, x.shape)
        y = x.unflatten(0, (S, -1)).transpose(0, 1).flatten(1, 2)  # (B, S * C, ...)
        track = self.training or self.running_mean is None
        mean = var = None
        if self.running_mean is not None:
            mean, var = self.running_mean[index].reshape(-1), self.running_var[index].reshape(-1)
        factor = self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        weight = None if self.weight is None else self.weight[index].reshape(-1)
        bias = None if self.bias is None else self.bias[index].reshape(-1)
        y = F.batch_norm(y, mean, var, weight, bias, track, factor or 0.0, self.eps)
        if self.training and mean is not None and var is not None:
            with torch.no_grad():
                self.running_mean[index] = mean.view(S, -1)
                self.running_var[index] = var.view(S, -1)
        return y.unflatten(1, (S, -1)).transpose(0, 1).flatten(0, 1)


class ComponentBatchNorm1d(ComponentBatchNormMixin, _BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` per component, made by ``rank1_(net, batchnorm="component")``."""


class ComponentBatchNorm2d(ComponentBatchNormMixin, _BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` per component, made by ``rank1_(net, batchnorm="component")``."""


class ComponentBatchNorm3d(ComponentBatchNormMixin, _BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` per component, made by ``rank1_(net, batchnorm="component")``."""


#: Per-component normalisation by torch layer.
COMPONENT_BATCHNORM: dict[type, type] = {
    nn.BatchNorm1d: ComponentBatchNorm1d,
    nn.BatchNorm2d: ComponentBatchNorm2d,
    nn.BatchNorm3d: ComponentBatchNorm3d,
}
