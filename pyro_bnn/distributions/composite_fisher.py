# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Fisher information of Pyro's distributions that are made of others."""

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution

from pyro_bnn.ops.fisher import register_fisher
from pyro_bnn.ops.fisher_composite import CompositeFisher, TransformedFisher

register_fisher(dist.TransformedDistribution, subclasses=False)(TransformedFisher)


@register_fisher(dist.ZeroInflatedDistribution)
class ZeroInflatedFisher(CompositeFisher):
    """Zero-inflated counts, and any other zero-inflated distribution, in the logit of the gate and the parameters below."""

    def parts(self, d: dist.ZeroInflatedDistribution) -> dict[str, Distribution]:  # type: ignore[override]
        """See :meth:`CompositeFisher.parts`."""
        return {"base": d.base_dist}

    def own(self, d: dist.ZeroInflatedDistribution) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`CompositeFisher.own`."""
        given = d.__dict__.get("gate_logits")
        return {"gate_logits": (torch.logit(d.gate) if given is None else given).unsqueeze(-1)}

    def assemble(
        self, d: Distribution, parts: Mapping[str, Distribution], own: Mapping[str, Tensor]
    ) -> Distribution:
        """See :meth:`CompositeFisher.assemble`."""
        gate = own["gate_logits"].squeeze(-1)
        return dist.ZeroInflatedDistribution(parts["base"], gate_logits=gate, validate_args=False)


@register_fisher(dist.MixtureOfDiagNormals)
class MixtureOfDiagNormalsFisher(CompositeFisher):
    """Mixtures of Gaussians with diagonal covariances; rebuilt as ``MixtureSameFamily``, which can draw in batches."""

    def parts(self, d: dist.MixtureOfDiagNormals) -> dict[str, Distribution]:  # type: ignore[override]
        """See :meth:`CompositeFisher.parts`."""
        return {
            "mixture": td.Categorical(logits=d.component_logits, validate_args=False),
            "component": dist.Normal(d.locs, d.coord_scale, validate_args=False).to_event(1),
        }

    def assemble(
        self, d: Distribution, parts: Mapping[str, Distribution], own: Mapping[str, Tensor]
    ) -> Distribution:
        """See :meth:`CompositeFisher.assemble`."""
        return dist.MixtureSameFamily(parts["mixture"], parts["component"], validate_args=False)


@register_fisher(dist.FoldedDistribution)
class FoldedFisher(CompositeFisher):
    """The size of a variable, in the parameters of its distribution."""

    def parts(self, d: dist.FoldedDistribution) -> dict[str, Distribution]:  # type: ignore[override]
        """See :meth:`CompositeFisher.parts`."""
        return {"base": d.base_dist}

    def assemble(
        self, d: Distribution, parts: Mapping[str, Distribution], own: Mapping[str, Tensor]
    ) -> Distribution:
        """See :meth:`CompositeFisher.assemble`."""
        return dist.FoldedDistribution(parts["base"], validate_args=False)


@register_fisher(dist.MaskedMixture)
class MaskedMixtureFisher(CompositeFisher):
    """One of two distributions for each element, in the parameters of both."""

    def parts(self, d: dist.MaskedMixture) -> dict[str, Distribution]:  # type: ignore[override]
        """See :meth:`CompositeFisher.parts`."""
        return {"component0": d.component0, "component1": d.component1}

    def assemble(
        self,
        d: dist.MaskedMixture,  # type: ignore[override]
        parts: Mapping[str, Distribution],
        own: Mapping[str, Tensor],
    ) -> Distribution:
        """See :meth:`CompositeFisher.assemble`."""
        mask: Any = d.mask
        zero, one = parts["component0"], parts["component1"]
        return dist.MaskedMixture(mask.expand(zero.batch_shape), zero, one.expand(zero.batch_shape))
