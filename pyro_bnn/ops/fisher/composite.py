# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Fisher information of distributions that are made of others: mixtures and transformed distributions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution
from typing_extensions import override

from pyro_bnn.ops.families import was_given
from pyro_bnn.ops.fisher.rule import MonteCarloFisher, add_rule, fisher_rule


class CompositeFisher(MonteCarloFisher):
    """
    A distribution made of others, in the parameters of these, named ``"part.parameter"``, and perhaps tensors of its own;
    by Monte Carlo.

    :param parts: by name, the distributions that one is made of; their batch shapes begin with its own.
    :param assemble: the distribution made of its parts and own parameters, batch shapes ``sample_shape + ...``.
    :param own: its own real-valued parameters, by names without a dot, shape ``d.batch_shape + (C_name,)``.
    """

    def __init__(
        self,
        parts: Callable[[Any], Mapping[str, Distribution]],
        assemble: Callable[[Any, Mapping[str, Any], Mapping[str, Tensor]], Distribution],
        own: Callable[[Any], Mapping[str, Tensor]] = lambda d: {},
    ) -> None:
        super().__init__()
        self.parts, self.assemble, self.own = parts, assemble, own

    @override
    def parameters(self, d: Distribution) -> dict[str, Tensor]:
        found = {k: v.expand(d.batch_shape + v.shape[-1:]) for k, v in self.own(d).items()}
        for part, inner in self.parts(d).items():
            base, _ = _without_events(inner)
            for name, value in fisher_rule(base).parameters(base).items():
                whole = value.expand(base.batch_shape + value.shape[-1:])
                found[f"{part}.{name}"] = whole.flatten(len(d.batch_shape))
        return found

    @override
    def build(self, d: Distribution, parameters: Mapping[str, Tensor]) -> Distribution:
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


#: Arguments of elementwise transforms, and whether any real number will do.
_ARGUMENTS: dict[type[td.Transform], dict[str, bool]] = {
    td.AffineTransform: {"loc": True, "scale": False},
    td.PowerTransform: {"exponent": False},
}


class TransformedFisher(CompositeFisher):
    r"""
    :math:`y = T(z)` in the parameters of the distribution of z, whose Fisher information an invertible T leaves as it
    is; in arguments of affine and power transforms too, then by Monte Carlo. Non-zero arguments enter by the
    logarithm of their size.
    """

    def __init__(self) -> None:
        super().__init__(_attributes("base_dist"), _transformed, _arguments)

    @override
    def block(self, d: td.TransformedDistribution, names: Sequence[str]) -> Tensor:  # type: ignore[override]
        inner = [name.removeprefix("base.") for name in names if name.startswith("base.")]
        base, bijective = d.base_dist, all(transform.bijective for transform in d.transforms)
        of_base = len(inner) == len(names) and base.batch_shape == d.batch_shape
        if of_base and bijective and not isinstance(base, td.Independent):
            return fisher_rule(base).block(base, inner)
        return super().block(d, names)


def _flat(transforms: Sequence[td.Transform]) -> list[td.Transform]:
    """The transforms one after the other, compositions taken apart."""
    found: list[td.Transform] = []
    for transform in transforms:
        found += _flat(transform.parts) if isinstance(transform, td.ComposeTransform) else [transform]
    return found


def _steps(d: td.TransformedDistribution) -> Iterator[tuple[int, td.Transform, torch.Size]]:
    """The transforms with their numbers and the shapes of what they are applied to."""
    shape = d.base_dist.batch_shape + d.base_dist.event_shape
    for i, transform in enumerate(_flat(d.transforms)):
        yield i, transform, shape
        shape = torch.Size(transform.forward_shape(shape))


def _arguments(d: td.TransformedDistribution) -> dict[str, Tensor]:
    """The tensors among the arguments of transforms, flattened after the batch."""
    found = {}
    for i, transform, shape in _steps(d):
        for name, any_real in _ARGUMENTS.get(type(transform), {}).items():
            value = getattr(transform, name)
            if isinstance(value, Tensor):
                value = value if any_real else value.abs().log()
                found[f"{name}_{i}"] = value.expand(shape).unsqueeze(-1).flatten(len(d.batch_shape))
    return found


def _transformed(
    d: td.TransformedDistribution, parts: Mapping[str, Any], own: Mapping[str, Tensor]
) -> Distribution:
    transforms: list[td.Transform] = []
    for i, transform, shape in _steps(d):
        moved = {}
        for name, any_real in _ARGUMENTS.get(type(transform), {}).items():
            if f"{name}_{i}" in own:
                new = own[f"{name}_{i}"]
                new = new.reshape(new.shape[:-1] + shape[len(d.batch_shape) :])
                moved[name] = new if any_real else new.exp() * getattr(transform, name).detach().sign()
        if moved and isinstance(transform, td.AffineTransform):
            given = {"loc": transform.loc, "scale": transform.scale} | moved
            transforms.append(td.AffineTransform(**given, event_dim=transform.event_dim))
        elif moved:
            transforms.append(td.PowerTransform(moved["exponent"]))
        else:
            transforms.append(transform.with_cache(0))
    return td.TransformedDistribution(parts["base"], transforms, validate_args=False)


def _mixture_parts(d: td.MixtureSameFamily) -> dict[str, Distribution]:
    mixture, batch = d.mixture_distribution, d.component_distribution.batch_shape[:-1]
    mixture = mixture if mixture.batch_shape == batch else mixture.expand(batch)
    return {"mixture": mixture, "component": d.component_distribution}


def _diagonal_parts(d: dist.MixtureOfDiagNormals) -> dict[str, Distribution]:
    mixture = td.Categorical(logits=d.component_logits, validate_args=False)
    component = dist.Normal(d.locs, d.coord_scale, validate_args=False).to_event(1)
    return {"mixture": mixture, "component": component}


def _mixture(d: Any, parts: Mapping[str, Any], own: Mapping[str, Tensor]) -> Distribution:
    # also of Gaussians with diagonal covariances, whose own class cannot draw in batches
    return dist.MixtureSameFamily(parts["mixture"], parts["component"], validate_args=False)


def _gate_logits(d: dist.ZeroInflatedDistribution) -> dict[str, Tensor]:
    # of a gate given as a probability the property would be clamped
    logits = d.gate_logits if was_given(d, "gate_logits") else torch.logit(d.gate)
    return {"gate_logits": logits.unsqueeze(-1)}


def _zero_inflated(d: Any, parts: Mapping[str, Any], own: Mapping[str, Tensor]) -> Distribution:
    gate = own["gate_logits"].squeeze(-1)
    return dist.ZeroInflatedDistribution(parts["base"], gate_logits=gate, validate_args=False)


def _folded(d: Any, parts: Mapping[str, Any], own: Mapping[str, Tensor]) -> Distribution:
    return dist.FoldedDistribution(parts["base"], validate_args=False)


def _masked(d: dist.MaskedMixture, parts: Mapping[str, Any], own: Mapping[str, Tensor]) -> Distribution:
    mask: Any = d.mask
    zero, one = parts["component0"], parts["component1"]
    return dist.MaskedMixture(mask.expand(zero.batch_shape), zero, one.expand(zero.batch_shape))


def _attributes(*names: str) -> Callable[[Any], dict[str, Distribution]]:
    """Parts that are attributes, as they are named there but for ``_dist``."""
    return lambda d: {name.removesuffix("_dist"): getattr(d, name) for name in names}


_base = _attributes("base_dist")
add_rule(TransformedFisher(), td.TransformedDistribution, dist.TransformedDistribution, subclasses=False)
add_rule(CompositeFisher(_mixture_parts, _mixture), td.MixtureSameFamily)
add_rule(CompositeFisher(_diagonal_parts, _mixture), dist.MixtureOfDiagNormals)
add_rule(CompositeFisher(_base, _zero_inflated, _gate_logits), dist.ZeroInflatedDistribution)
add_rule(CompositeFisher(_base, _folded), dist.FoldedDistribution)
add_rule(CompositeFisher(_attributes("component0", "component1"), _masked), dist.MaskedMixture)
