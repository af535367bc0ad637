# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The parameters of observed sites as differentiable functions of the latents, with their Fisher information."""

from dataclasses import dataclass

import pyro
import torch
import torch.distributions as td
from torch import Tensor

from pyro_bnn.model.handlers import Site, subsample_scale, unwrap
from pyro_bnn.ops.fisher import FisherRule, MonteCarloFisher, fisher_rule, score
from pyro_bnn.ops.graph import graph_nodes
from pyro_bnn.ops.jacobian import wide


@dataclass
class SiteOutputs:
    r"""
    The parameters :math:`\phi` of one observed site as a function of the packed latent vector.

    :ivar str name: the observed site.
    :ivar base: its distribution without ``Independent`` and masks; batch shape ``shape``.
    :ivar rule: the Fisher rule of ``base``.
    :ivar names: the parameters that depend on the latents, e.g. ``("loc",)``.
    :ivar outputs: those parameters, shape ``shape + (C,)``, with an autograd graph.
    :ivar weight: factor of each element's information (``poutine.scale``, 0 where masked), shape ``shape``.
    :ivar int event_dim: how many rightmost dimensions of ``shape`` are event dimensions of the site.
    """

    name: str
    base: td.Distribution
    rule: FisherRule
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    outputs: Tensor
    weight: Tensor
    event_dim: int

    @property
    def information(self) -> Tensor:
        """Weighted Fisher information in the active parameters, shape ``shape + (C, C)``, detached."""
        with torch.no_grad():
            block = self.rule.block(self.base, self.names)
            return block * self.weight[..., None, None]

    def differentiable_information(self) -> Tensor:
        """The same as :attr:`information`, with the graph to the parameters of the model."""
        return self.rule.block(self.base, self.names) * self.weight[..., None, None]

    @property
    def root(self) -> Tensor:
        """A factor R of the weighted information, ``R @ R.mT``, shape ``shape + (C, K)``, detached."""
        with torch.no_grad():
            root = self.rule.root(self.base, self.names)
            return root * self.weight.sqrt()[..., None, None]

    def differentiable_root(self) -> Tensor:
        r"""
        A factor whose square is :attr:`information` to first order in the parameters of the model: from
        :math:`F = R R^\top`, :math:`R + \tfrac12 (F - \bar F) R^{+\top}` with everything but F held fixed. Shape ``shape + (C, K)``.
        """
        root, information = self.root, self.differentiable_information()
        if not information.requires_grad:
            return root
        inverse = torch.linalg.pinv(root, rtol=1e3 * torch.finfo(root.dtype).eps)
        return root + 0.5 * (information - information.detach()) @ inverse.mT

    def scores(self, value: Tensor) -> Tensor:
        """
        The weighted gradient of the log density in the active parameters at observations ``shape + event shape`` of ``base``,
        zero where the site is masked; shape ``shape + (C,)``, detached.
        """
        value = value.expand(self.base.batch_shape + self.base.event_shape)
        # as in the model's run, where values may be what the user allows
        with pyro.validation_enabled(False):
            found = score(self.rule, self.base, self.names, value)
        return torch.where(self.weight[..., None] > 0, found * self.weight[..., None], 0.0)

    def build(self, outputs: Tensor) -> td.Distribution:
        """The site's distribution at other parameters, ``sample_shape + shape + (C,)``; they lead its batch shape."""
        parts = dict(zip(self.names, outputs.split(self.sizes, -1), strict=True))
        shape = outputs.shape[:-1]
        d = self.rule.build(self.base, parts) if parts else self.base.expand(shape)
        return td.Independent(d, self.event_dim) if self.event_dim else d


def depends_on(value: Tensor, latent: Tensor) -> bool:
    """
    Whether a tensor was computed from another, which requires a gradient, by its autograd graph; parameters of the model
    that require gradients do not count.
    """
    if value is latent:
        return True
    return any(
        node is latent.grad_fn or getattr(node, "variable", None) is latent for node in graph_nodes(value)
    )


def site_outputs(name: str, site: Site, latent: Tensor) -> SiteOutputs:
    """The parameters of an observed site of a run at ``latent``; a ``KeyError`` if it has no Fisher information."""
    base, mask, event_dim = unwrap(site["fn"])
    try:
        rule = fisher_rule(base)
    except KeyError as error:
        raise KeyError(f"observed site {name!r}: {error.args[0]}") from None
    everything = rule.parameters(base)
    if any(wide(v) is not v for v in everything.values()):  # a network in half precision
        base = rule.build(base, {k: wide(v) for k, v in everything.items()})
        everything = rule.parameters(base)
    parameters = {k: v for k, v in everything.items() if depends_on(v, latent)}
    if isinstance(rule, MonteCarloFisher):
        _check_dependence(name, site, rule, base, latent)
    shape = base.batch_shape
    outputs = [v.expand(shape + v.shape[-1:]) for v in parameters.values()]
    like = next(iter(everything.values()))
    weight = torch.full(shape, 1.0, dtype=like.dtype, device=like.device)
    for factor in (site["scale"] / subsample_scale(site), mask, site["mask"]):
        if isinstance(factor, Tensor) and factor.dim() and factor is not mask:
            factor = factor.reshape(factor.shape + (1,) * event_dim)
        if factor is not None:
            weight = weight * factor
    return SiteOutputs(
        name=name,
        base=base,
        rule=rule,
        names=tuple(parameters),
        sizes=tuple(v.shape[-1] for v in outputs),
        outputs=torch.cat(outputs, -1) if outputs else like.new_zeros(shape + (0,)),
        weight=weight,
        event_dim=event_dim,
    )


def _check_dependence(name: str, site: Site, rule: FisherRule, base: td.Distribution, latent: Tensor) -> None:
    """Raises if a distribution depends on latents through more than the parameters that its rule knows."""
    everything = rule.parameters(base)
    rest = rule.build(base, {k: v.detach() for k, v in everything.items()})
    if depends_on(rest.log_prob(site["value"].detach()), latent):
        raise ValueError(
            f"observed site {name!r}: {type(base).__name__} depends on latents through more than its parameters "
            f"{', '.join(everything)}, e.g. through a transform: use curvature='hessian', or register a "
            "FisherRule with pyro_bnn.ops.fisher.register_fisher."
        )
