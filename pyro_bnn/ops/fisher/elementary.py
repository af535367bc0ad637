# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Fisher information of distributions with one or two elementary parameters, those that are positive by their logarithm.

Weibull and Gumbel variables are functions of an exponential variable w, whose moments
:math:`E[w^k \log w] = \Gamma'(k + 1)` give theirs; :math:`\gamma` is Euler's constant.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution

from pyro_bnn.ops.fisher.rule import FisherRule, register_fisher
from pyro_bnn.ops.fisher.rules import GammaFisher, _arguments, _stack, _symmetric

#: The information in the logarithm of the shape of a Weibull or the scale of a Gumbel distribution.
_SHAPE = (1 - np.euler_gamma) ** 2 + np.pi**2 / 6


class ElementaryFisher(FisherRule):
    """
    A family that is made again from its arguments; subclass with :meth:`information`.

    :cvar family: a class of :mod:`torch.distributions`.
    :cvar names: by argument, the parameter; those named ``log_...`` are logarithms.
    """

    family: ClassVar[type[Distribution]]
    names: ClassVar[dict[str, str]]

    def parameters(self, d: Distribution) -> dict[str, Tensor]:
        """See :meth:`FisherRule.parameters`."""
        values = {name: getattr(d, argument) for argument, name in self.names.items()}
        return {k: (v.log() if k.startswith("log_") else v).unsqueeze(-1) for k, v in values.items()}

    def build(self, d: Distribution, parameters: Mapping[str, Tensor]) -> Distribution:
        """See :meth:`FisherRule.build`."""
        values = _arguments(d, parameters, **self.names)
        return self.family(**dict(zip(self.names, values, strict=True)))


@register_fisher(td.Exponential)
class ExponentialFisher(ElementaryFisher):
    r"""Exponential in its log rate: :math:`F = 1`."""

    family, names = td.Exponential, {"rate": "log_rate"}

    def information(self, d: td.Exponential) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        return _stack(torch.ones_like(d.rate))


@register_fisher(td.Geometric)
class GeometricFisher(ElementaryFisher):
    r"""Geometric in its logit: :math:`F = 1 - \pi`."""

    family, names = td.Geometric, {"logits": "logits"}

    def information(self, d: td.Geometric) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        return _stack(1 - d.probs)


@register_fisher(td.HalfNormal)
class HalfNormalFisher(ElementaryFisher):
    r"""Half-normal in :math:`\log\sigma`: :math:`F = 2`."""

    family, names = td.HalfNormal, {"scale": "log_scale"}

    def information(self, d: td.HalfNormal) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        return _stack(torch.full_like(d.scale, 2.0))


@register_fisher(td.Cauchy)
class CauchyFisher(ElementaryFisher):
    r"""Cauchy in :math:`(\mu, \log\gamma)`: :math:`F = \frac12\mathrm{diag}(\gamma^{-2}, 1)`."""

    family, names = td.Cauchy, {"loc": "loc", "scale": "log_scale"}

    def information(self, d: td.Cauchy) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        return 0.5 * _stack(d.scale.pow(-2), torch.ones_like(d.scale))


@register_fisher(td.Gumbel)
class GumbelFisher(ElementaryFisher):
    r"""Gumbel in :math:`(\mu, \log\beta)`: :math:`F_{\mu\mu} = \beta^{-2}`, cross term :math:`(\gamma - 1)/\beta`."""

    family, names = td.Gumbel, {"loc": "loc", "scale": "log_scale"}

    def information(self, d: td.Gumbel) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        shape = torch.full_like(d.scale, _SHAPE)
        return _symmetric(d.scale.pow(-2), (np.euler_gamma - 1) / d.scale, shape)


@register_fisher(td.Weibull)
class WeibullFisher(ElementaryFisher):
    r"""Weibull in :math:`(\log\lambda, \log k)`: :math:`F_{\lambda\lambda} = k^2`, cross term :math:`(\gamma - 1) k`."""

    family, names = td.Weibull, {"scale": "log_scale", "concentration": "log_concentration"}

    def information(self, d: td.Weibull) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        k = d.concentration
        return _symmetric(k.square(), (np.euler_gamma - 1) * k, torch.full_like(k, _SHAPE))


@register_fisher(td.InverseGamma)
class InverseGammaFisher(ElementaryFisher):
    """Inverse gamma: the information of the gamma distribution of the reciprocal."""

    family, names = td.InverseGamma, {"concentration": "log_concentration", "rate": "log_rate"}

    def information(self, d: td.InverseGamma) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        return GammaFisher().information(td.Gamma(d.concentration, d.rate, validate_args=False))


@register_fisher(td.Pareto)
class ParetoFisher(ElementaryFisher):
    r"""Pareto in :math:`\log\alpha`: :math:`F = 1`. Its scale ends the support and has no Fisher information."""

    family, names = td.Pareto, {"scale": "scale", "alpha": "log_alpha"}

    def parameters(self, d: Distribution) -> dict[str, Tensor]:
        """See :meth:`FisherRule.parameters`."""
        return {"log_alpha": super().parameters(d)["log_alpha"]}

    def information(self, d: td.Pareto) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        return _stack(torch.ones_like(d.alpha))
