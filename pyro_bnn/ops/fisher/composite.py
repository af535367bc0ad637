# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Fisher information of distributions that are made of others: mixtures and transformed distributions."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution

from pyro_bnn.ops.fisher.rule import FisherRule, MonteCarloFisher, fisher_rule, register_fisher


class CompositeFisher(MonteCarloFisher):
    """
    A distribution made of others, in the parameters of these and perhaps tensors of its own; by Monte Carlo.

    Subclass and implement :meth:`parts` and :meth:`assemble`.
    """

    def parts(self, d: Distribution) -> dict[str, Distribution]:
        """
        :param d: a distribution of the family.
        :return: by name, the distributions that it is made of; their batch shapes begin with that of ``d``.
        """
        raise NotImplementedError

    def own(self, d: Distribution) -> dict[str, Tensor]:
        """
        :param d: a distribution of the family.
        :return: its own real-valued parameters, by names without a dot, shape ``d.batch_shape + (C_name,)``.
        """
        return {}

    def assemble(
        self, d: Distribution, parts: Mapping[str, Distribution], own: Mapping[str, Tensor]
    ) -> Distribution:
        """
        :param d: supplies everything else.
        :param parts: see :meth:`parts`, batch shapes ``sample_shape + ...``.
        :param own: see :meth:`own`, shapes ``sample_shape + ...``.
        :return: the distribution made of them.
        """
        raise NotImplementedError

    def parameters(self, d: Distribution) -> dict[str, Tensor]:
        """See :meth:`FisherRule.parameters`; those of a part are named ``"part.parameter"``."""
        found = {k: v.expand(d.batch_shape + v.shape[-1:]) for k, v in self.own(d).items()}
        for part, inner in self.parts(d).items():
            base, _ = _without_events(inner)
            for name, value in fisher_rule(base).parameters(base).items():
                whole = value.expand(base.batch_shape + value.shape[-1:])
                found[f"{part}.{name}"] = whole.flatten(len(d.batch_shape))
        return found

    def build(self, d: Distribution, parameters: Mapping[str, Tensor]) -> Distribution:
        """See :meth:`FisherRule.build`."""
        everything = self.complete(d, parameters)
        parts = {}
        for part, inner in self.parts(d).items():
            base, event_dim = _without_events(inner)
            rule = fisher_rule(base)
            moved = {}
            for name, old in rule.parameters(base).items():
                new = everything[f"{part}.{name}"]
                shape = base.batch_shape[len(d.batch_shape) :] + old.shape[-1:]
                moved[name] = new.reshape(new.shape[:-1] + shape)
            built = rule.build(base, moved)
            parts[part] = td.Independent(built, event_dim, validate_args=False) if event_dim else built
        return self.assemble(d, parts, {k: everything[k] for k in self.own(d)})


def _without_events(d: Distribution) -> tuple[Distribution, int]:
    """A distribution without ``Independent`` around it, and how many batch dimensions that declared."""
    event_dim = 0
    while isinstance(d, td.Independent):
        event_dim += d.reinterpreted_batch_ndims
        d = d.base_dist
    return d, event_dim


@register_fisher(td.MixtureSameFamily)
class MixtureSameFamilyFisher(CompositeFisher):
    """Mixtures in their logits and the parameters of all components."""

    def parts(self, d: td.MixtureSameFamily) -> dict[str, Distribution]:  # type: ignore[override]
        """See :meth:`CompositeFisher.parts`."""
        mixture = d.mixture_distribution
        batch = d.component_distribution.batch_shape[:-1]
        return {
            "mixture": mixture if mixture.batch_shape == batch else mixture.expand(batch),
            "component": d.component_distribution,
        }

    def assemble(
        self, d: Distribution, parts: Mapping[str, Distribution], own: Mapping[str, Tensor]
    ) -> Distribution:
        """See :meth:`CompositeFisher.assemble`."""
        return td.MixtureSameFamily(parts["mixture"], parts["component"], validate_args=False)  # type: ignore[arg-type]


#: Arguments of elementwise transforms, and whether any real number will do.
_ARGUMENTS: dict[type[td.Transform], dict[str, bool]] = {
    td.AffineTransform: {"loc": True, "scale": False},
    td.PowerTransform: {"exponent": False},
}


@register_fisher(td.TransformedDistribution, subclasses=False)
class TransformedFisher(CompositeFisher):
    r"""
    :math:`y = T(z)` in the parameters of the distribution of z, whose Fisher information an invertible T leaves as it
    is; in arguments of affine and power transforms too, then by Monte Carlo. Non-zero arguments enter by the
    logarithm of their size.
    """

    def parts(self, d: td.TransformedDistribution) -> dict[str, Distribution]:  # type: ignore[override]
        """See :meth:`CompositeFisher.parts`."""
        return {"base": d.base_dist}

    def own(self, d: td.TransformedDistribution) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`CompositeFisher.own`."""
        found = {}
        shape = d.base_dist.batch_shape + d.base_dist.event_shape
        for i, transform in enumerate(_flat(d.transforms)):
            for name, any_real in _ARGUMENTS.get(type(transform), {}).items():
                value = getattr(transform, name)
                if isinstance(value, Tensor):
                    value = value if any_real else value.abs().log()
                    found[f"{name}_{i}"] = value.expand(shape).unsqueeze(-1).flatten(len(d.batch_shape))
            shape = transform.forward_shape(shape)
        return found

    def assemble(
        self,
        d: td.TransformedDistribution,  # type: ignore[override]
        parts: Mapping[str, Distribution],
        own: Mapping[str, Tensor],
    ) -> Distribution:
        """See :meth:`CompositeFisher.assemble`."""
        transforms: list[td.Transform] = []
        shape = d.base_dist.batch_shape + d.base_dist.event_shape
        for i, transform in enumerate(_flat(d.transforms)):
            moved = {}
            for name, any_real in _ARGUMENTS.get(type(transform), {}).items():
                old = getattr(transform, name)
                if f"{name}_{i}" in own:
                    new = own[f"{name}_{i}"]
                    new = new.reshape(new.shape[:-1] + shape[len(d.batch_shape) :])
                    moved[name] = new if any_real else new.exp() * old.detach().sign()
            if moved and isinstance(transform, td.AffineTransform):
                loc, scale = moved.get("loc", transform.loc), moved.get("scale", transform.scale)
                transforms.append(td.AffineTransform(loc, scale, event_dim=transform.event_dim))
            elif moved:
                transforms.append(td.PowerTransform(moved["exponent"]))
            else:
                transforms.append(transform.with_cache(0))
            shape = transform.forward_shape(shape)
        return td.TransformedDistribution(parts["base"], transforms, validate_args=False)

    def block(self, d: td.TransformedDistribution, names: Sequence[str]) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.block`."""
        inner = [name.removeprefix("base.") for name in names if name.startswith("base.")]
        base = d.base_dist
        if len(inner) < len(names) or base.batch_shape != d.batch_shape:
            return super().block(d, names)
        if not all(transform.bijective for transform in d.transforms):
            return super().block(d, names)
        base, _ = _without_events(base)
        return fisher_rule(base).block(base, inner) if base is d.base_dist else super().block(d, names)


def _flat(transforms: Sequence[td.Transform]) -> list[td.Transform]:
    """The transforms one after the other, compositions taken apart."""
    found: list[td.Transform] = []
    for transform in transforms:
        found += _flat(transform.parts) if isinstance(transform, td.ComposeTransform) else [transform]
    return found


@register_fisher(td.Multinomial)
class MultinomialFisher(FisherRule):
    r"""Multinomial in its logits: n times the information of a categorical distribution."""

    def _one(self, d: td.Multinomial) -> td.Categorical:
        return td.Categorical(logits=d.logits, validate_args=False)

    def parameters(self, d: td.Multinomial) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`FisherRule.parameters`."""
        return {"logits": d.logits}

    def information(self, d: td.Multinomial) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        one = self._one(d)
        return d.total_count * fisher_rule(one).information(one)

    def root(self, d: td.Multinomial, names: Sequence[str]) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.root`."""
        one = self._one(d)
        return d.total_count**0.5 * fisher_rule(one).root(one, names)

    def build(self, d: td.Multinomial, parameters: Mapping[str, Tensor]) -> Distribution:  # type: ignore[override]
        """See :meth:`FisherRule.build`."""
        return td.Multinomial(d.total_count, logits=parameters["logits"], validate_args=False)


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
