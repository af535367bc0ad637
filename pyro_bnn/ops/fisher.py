# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Fisher information of a likelihood with respect to its own parameters.

The generalised Gauss-Newton (GGN) matrix of a model with outputs :math:`\phi(\theta)` is
:math:`\sum_n J_n^\top F_n J_n`, with :math:`J_n = \partial\phi_n/\partial\theta` and :math:`F_n` the Fisher
information of the observation's distribution in the parameters :math:`\phi_n` (Martens, 2020, section 9).
A :class:`FisherRule` says which real-valued parameters a distribution has, what their Fisher information is,
and how to build the distribution again from parameters that have moved.
"""

from collections.abc import Callable, Mapping

import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution

_RULES: dict[type[Distribution], "FisherRule"] = {}


class FisherRule:
    """
    Parameters and Fisher information of one family of distributions.

    Subclass, implement the three methods, and register with :func:`register_fisher`. Parameters must be
    real-valued (take logarithms of positive ones), so that a linearisation cannot leave their domain.
    """

    def parameters(self, d: Distribution) -> dict[str, Tensor]:
        """
        The parameters of ``d``, differentiable in its arguments.

        :param d: a distribution of the family.
        :return: by name, tensors of shape ``d.batch_shape + (C_name,)``.
        """
        raise NotImplementedError

    def information(self, d: Distribution) -> Tensor:
        """
        The Fisher information in all the parameters, in the order of :meth:`parameters`.

        :param d: a distribution of the family.
        :return: a tensor of shape ``d.batch_shape + (C, C)`` with ``C`` the sum of the ``C_name``.
        """
        raise NotImplementedError

    def build(self, d: Distribution, parameters: Mapping[str, Tensor]) -> Distribution:
        """
        The distribution of ``d``'s family at other parameters.

        :param d: supplies everything that ``parameters`` does not hold.
        :param parameters: tensors of shape ``sample_shape + d.batch_shape + (C_name,)``.
        :return: a distribution of batch shape ``sample_shape + d.batch_shape``.
        """
        raise NotImplementedError


def register_fisher(
    *families: type[Distribution],
) -> Callable[[type[FisherRule]], type[FisherRule]]:
    """
    Class decorator that registers a :class:`FisherRule` for families of distributions and their subclasses.

    :param families: distribution classes.
    :return: the decorator.

    Example::

        >>> import torch.distributions as td
        >>> @register_fisher(td.Exponential)
        ... class ExponentialFisher(FisherRule):
        ...     def parameters(self, d):
        ...         return {"log_rate": d.rate.log().unsqueeze(-1)}
        ...
        ...     def information(self, d):
        ...         return torch.ones(d.batch_shape + (1, 1))
        ...
        ...     def build(self, d, parameters):
        ...         return td.Exponential(parameters["log_rate"].squeeze(-1).exp())
        >>> type(fisher_rule(td.Exponential(1.0))).__name__
        'ExponentialFisher'
    """

    def decorate(rule: type[FisherRule]) -> type[FisherRule]:
        for family in families:
            _RULES[family] = rule()
        return rule

    return decorate


def fisher_rule(d: Distribution) -> FisherRule:
    """
    The registered rule for a distribution: that of the first registered class in its method resolution order.

    :param d: a distribution (not wrapped in ``Independent`` or a mask).
    :return: its rule.
    :raises KeyError: if no class of ``d`` is registered; the message lists what to do.
    """
    for family in type(d).__mro__:
        if family in _RULES:
            return _RULES[family]
    known = ", ".join(sorted(family.__name__ for family in _RULES))
    raise KeyError(
        f"No Fisher information is registered for {type(d).__name__} (known: {known}). Use "
        "curvature='hessian', or register a FisherRule with pyro_bnn.ops.fisher.register_fisher."
    )


def _stack(*entries: Tensor) -> Tensor:
    """A diagonal information matrix (*batch, C, C) from its C diagonal entries (*batch,)."""
    return torch.diag_embed(torch.stack(torch.broadcast_tensors(*entries), -1))


@register_fisher(td.Normal, td.LogNormal)
class NormalFisher(FisherRule):
    r"""Normal (and LogNormal) in :math:`(\mu, \log\sigma)`: :math:`F = \mathrm{diag}(\sigma^{-2}, 2)`."""

    def parameters(self, d: td.Normal) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`FisherRule.parameters`."""
        return {"loc": d.loc.unsqueeze(-1), "log_scale": d.scale.log().unsqueeze(-1)}

    def information(self, d: td.Normal) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        return _stack(d.scale.pow(-2), torch.full_like(d.scale, 2.0))

    def build(self, d: td.Normal, parameters: Mapping[str, Tensor]) -> Distribution:  # type: ignore[override]
        """See :meth:`FisherRule.build`."""
        loc = parameters["loc"].squeeze(-1) if "loc" in parameters else d.loc
        scale = parameters["log_scale"].squeeze(-1).exp() if "log_scale" in parameters else d.scale
        return type(d)(*torch.broadcast_tensors(loc, scale))


@register_fisher(td.Categorical, td.OneHotCategorical)
class CategoricalFisher(FisherRule):
    r"""Categorical in its logits: :math:`F = \mathrm{diag}(\pi) - \pi\pi^\top`."""

    def parameters(self, d: td.Categorical) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`FisherRule.parameters`."""
        return {"logits": d.logits}

    def information(self, d: td.Categorical) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        probs = d.probs
        return torch.diag_embed(probs) - probs.unsqueeze(-1) * probs.unsqueeze(-2)

    def build(self, d: td.Categorical, parameters: Mapping[str, Tensor]) -> Distribution:  # type: ignore[override]
        """See :meth:`FisherRule.build`."""
        family = td.OneHotCategorical if isinstance(d, td.OneHotCategorical) else td.Categorical
        return family(logits=parameters["logits"])


@register_fisher(td.Bernoulli)
class BernoulliFisher(FisherRule):
    r"""Bernoulli in its logit: :math:`F = \pi(1-\pi)`."""

    def parameters(self, d: td.Bernoulli) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`FisherRule.parameters`."""
        return {"logits": d.logits.unsqueeze(-1)}

    def information(self, d: td.Bernoulli) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        return _stack(d.probs * (1 - d.probs))

    def build(self, d: td.Bernoulli, parameters: Mapping[str, Tensor]) -> Distribution:  # type: ignore[override]
        """See :meth:`FisherRule.build`."""
        return td.Bernoulli(logits=parameters["logits"].squeeze(-1))


@register_fisher(td.Poisson)
class PoissonFisher(FisherRule):
    r"""Poisson in its log rate: :math:`F = \lambda`."""

    def parameters(self, d: td.Poisson) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`FisherRule.parameters`."""
        return {"log_rate": d.rate.log().unsqueeze(-1)}

    def information(self, d: td.Poisson) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        return _stack(d.rate)

    def build(self, d: td.Poisson, parameters: Mapping[str, Tensor]) -> Distribution:  # type: ignore[override]
        """See :meth:`FisherRule.build`."""
        return td.Poisson(parameters["log_rate"].squeeze(-1).exp())
