# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Priors of factors and weights whose scale is random, learned, or optimal in closed form."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution
from typing_extensions import override

from pyro_bnn.nn.priors import map_distribution, unwrap
from pyro_bnn.nn.sites import is_called, once_per_call

_FAMILIES: dict[str, Callable[..., Any]] = {
    "normal": dist.Normal,
    "cauchy": dist.Cauchy,
    "laplace": dist.Laplace,
    "lognormal": dist.LogNormal,
}


def _family(name: str) -> Callable[..., Any]:
    if name not in _FAMILIES:
        raise ValueError(f"unknown family {name!r}; choose from {list(_FAMILIES)}.")
    return _FAMILIES[name]


class ScalePrior:
    """
    A prior with a given family and location whose scale is found elsewhere; see the derived classes. It takes the
    place of a distribution wherever this package takes a prior.

    :param loc: the location, 1 for multiplicative factors and 0 for weights.
    :param str family: ``"normal"``, ``"cauchy"``, ``"laplace"`` or ``"lognormal"`` (whose location is that of the
        logarithm).
    """

    def __init__(self, loc: float = 1.0, family: str = "normal") -> None:
        self.family, self._make = family, _family(family)
        self.loc = float(loc)

    def for_site(self, layer: Any, name: str, shape: torch.Size, like: Tensor) -> "ScalePrior":
        """The prior of one site of a layer, a copy that knows its shape, on the device and of the type of ``like``."""
        new = copy.copy(self)
        new._shape = torch.Size(shape)
        return new

    #: whether the scale has the shape of the site; a scale for the whole site may have batch dimensions instead
    per_element = False
    _shape = torch.Size()

    def make_prior(self, layer: Any, name: str) -> Any:
        """The prior in the present call of the layer, a distribution whose event shape is that of the site."""
        scale = self._scale(layer, name)
        ndim = len(self._shape)
        if not self.per_element:
            scale = scale[(..., *(None,) * ndim)]
        loc = scale.new_full((), self.loc)
        shape = torch.broadcast_shapes(scale.shape, self._shape)
        return self._make(loc, scale).expand(shape).to_event(ndim)

    def _scale(self, layer: Any, name: str) -> Tensor:
        raise ValueError(f"{type(self).__name__} has no scale.")


class HierarchicalPrior(ScalePrior):
    r"""
    A prior whose scale is a sample site with a hyperprior,

    .. math:: r_i \mid \tau \sim \mathrm{family}(\mu, \tau), \qquad \tau \sim p(\tau).

    :param scale_prior: :math:`p(\tau)`, a scalar distribution on the positive reals: ``dist.HalfCauchy(0.1)``,
        ``dist.HalfNormal(0.1)``, or with ``variance=True`` ``dist.InverseGamma(2., 0.01)``.
    :param bool variance: whether the hyperprior is that of :math:`\tau^2`.
    :param str level: ``"site"``, one :math:`\tau` per factor; ``"layer"``, one per layer; ``"global"``, one for the
        network. The sites are called ``"<layer>.<name>_scale"``, ``"<layer>.factor_scale"`` and ``"factor_scale"``
        (``_variance`` in place of ``_scale`` for variances).
    :param loc: see :class:`ScalePrior`.
    :param family: see :class:`ScalePrior`.

    A Normal family under a HalfCauchy is the horseshoe [1], under an InverseGamma variance a multivariate Student-t.

    **References**

    [1] Carvalho, Polson, Scott, *The horseshoe estimator for sparse signals*, Biometrika 2010.

    Example::

        >>> from pyro import poutine
        >>> from pyro_bnn.nn import Rank1Linear
        >>> layer = Rank1Linear(3, 2, prior=HierarchicalPrior(dist.HalfCauchy(0.1), level="layer"))
        >>> sorted(dict(poutine.trace(layer).get_trace(torch.zeros(1, 3)).iter_stochastic_nodes()))
        ['bias', 'factor_scale', 'r', 's']
    """

    def __init__(
        self,
        scale_prior: Distribution,
        *,
        variance: bool = False,
        level: str = "layer",
        loc: float = 1.0,
        family: str = "normal",
    ) -> None:
        super().__init__(loc, family)
        if level not in ("site", "layer", "global"):
            raise ValueError(f"level must be 'site', 'layer' or 'global', found {level!r}.")
        if tuple(scale_prior.batch_shape + scale_prior.event_shape):
            raise ValueError(
                f"scale_prior must be a scalar distribution, found shape "
                f"{tuple(scale_prior.batch_shape + scale_prior.event_shape)}."
            )
        self.scale_prior: Any = scale_prior
        self.variance, self.level = variance, level

    @override
    def for_site(self, layer: Any, name: str, shape: torch.Size, like: Tensor) -> "ScalePrior":
        new: Any = super().for_site(layer, name, shape, like)
        new.map(lambda t: t.to(like.device, like.dtype))
        return new

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Applies a function to the tensors of the hyperprior."""
        self.scale_prior = map_distribution(self.scale_prior, fn)

    @override
    def _scale(self, layer: Any, name: str) -> Tensor:
        quantity = "variance" if self.variance else "scale"
        full = f"{name if self.level == 'site' else 'factor'}_{quantity}"
        if not is_called(layer):
            value = self.scale_prior.sample()
        elif self.level == "global":
            value = once_per_call(layer, full, lambda _: pyro.sample(full, self.scale_prior), below="")
        else:
            value = once_per_call(layer, full, lambda name: pyro.sample(name, self.scale_prior))
        return value.sqrt() if self.variance else value


class LearnedScalePrior(ScalePrior):
    r"""
    Empirical Bayes: the scale of the prior is a parameter that the bound optimises together with the guide. With
    one scale per element the optimum is :math:`\tau_i^2 = \sigma_i^2 + (\mu_i - \mu)^2`, and the divergence becomes
    :math:`\frac12 \log(1 + (\mu_i - \mu)^2/\sigma_i^2)`.

    :param float init: initial scale.
    :param bool per_element: one scale per element rather than one per site.
    :param loc: see :class:`ScalePrior`.
    :param family: see :class:`ScalePrior`.

    Example::

        >>> from pyro_bnn.nn import Rank1Linear
        >>> layer = Rank1Linear(3, 2, prior=LearnedScalePrior(0.2))
        >>> sorted(name for name, _ in layer.named_parameters() if "scale" in name)
        ['r_prior_scale_raw', 's_prior_scale_raw']
    """

    def __init__(
        self, init: float = 0.1, *, per_element: bool = False, loc: float = 1.0, family: str = "normal"
    ) -> None:
        super().__init__(loc, family)
        if not init > 0:
            raise ValueError(f"init must be positive, found {init!r}.")
        self.init, self.per_element = float(init), per_element

    @override
    def for_site(self, layer: Any, name: str, shape: torch.Size, like: Tensor) -> "ScalePrior":
        """Adds the parameter ``<name>_prior_scale_raw`` to the layer."""
        raw = math.log(math.expm1(self.init))
        value = torch.full(shape if self.per_element else (), raw, device=like.device, dtype=like.dtype)
        layer.register_parameter(f"{name}_prior_scale_raw", nn.Parameter(value))
        return super().for_site(layer, name, shape, like)

    @override
    def _scale(self, layer: Any, name: str) -> Tensor:
        return F.softplus(getattr(layer, f"{name}_prior_scale_raw"))


class ClosedFormPrior(ScalePrior):
    r"""
    Empirical Bayes in closed form [1]: :math:`r_i \mid v \sim N(\mu, v)` with :math:`v \sim
    \mathrm{InverseGamma}(\alpha, \beta)` at its optimum given the guide, for every site and component,

    .. math:: v^* = \frac{\sum_{i=1}^n (\sigma_i^2 + (\mu_i - \mu)^2) + 2 \beta}{n + 2 \alpha + 2},

    which :class:`~pyro_bnn.infer.Mixture_ELBO` inserts: its divergence is
    :math:`\mathrm{KL}(q \,\|\, N(\mu, v^*)) - \log \mathrm{InverseGamma}(v^*)`. The guide must be Normal. The formula
    of the reference implementation uses second moments about 0 instead of :math:`\mu`, which for multiplicative
    factors gives :math:`v^* \approx 1` whatever the data say; this one is the minimiser. Everywhere else (prior
    draws, other bounds) :math:`v` has its prior mode.

    :param float concentration: :math:`\alpha`.
    :param float rate: :math:`\beta`; the defaults have mean 0.1, as in [1].
    :param float loc: :math:`\mu`.

    Example::

        >>> import torch
        >>> from pyro_bnn.nn import Rank1Linear
        >>> layer = Rank1Linear(3, 2, prior=ClosedFormPrior())
        >>> layer(torch.zeros(5, 3)).shape
        torch.Size([5, 2])

    **References**

    [1] Wu et al., *Deterministic variational inference for robust Bayesian neural networks*, ICLR 2019, section 4.
    """

    def __init__(self, concentration: float = 2.01, rate: float = 0.101, *, loc: float = 1.0) -> None:
        super().__init__(loc, "normal")
        if not (concentration > 0 and rate > 0):
            raise ValueError(
                f"concentration and rate must be positive, found {concentration!r} and {rate!r}."
            )
        self.concentration, self.rate = float(concentration), float(rate)
        self._mode = torch.tensor(self.rate / (self.concentration + 1)).sqrt()

    @override
    def for_site(self, layer: Any, name: str, shape: torch.Size, like: Tensor) -> "ScalePrior":
        new: Any = super().for_site(layer, name, shape, like)
        new._mode = like.new_tensor(self.rate / (self.concentration + 1)).sqrt()
        return new

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Applies a function to the tensors of the prior."""
        self._mode = fn(self._mode)

    @override
    def _scale(self, layer: Any, name: str) -> Tensor:
        return self._mode

    @override
    def make_prior(self, layer: Any, name: str) -> Any:
        prior = super().make_prior(layer, name)
        return _ClosedFormNormal(prior.base_dist.loc, prior.base_dist.scale, self).to_event(len(self._shape))

    def divergence(self, mean: Tensor, variance: Tensor) -> Tensor:
        """The divergence with the optimal variance from means and variances of shape ``(*batch, *shape)``; shape ``batch``."""
        ndim = len(self._shape)
        second = (variance + (mean - self.loc).square()).flatten(-ndim).sum(-1)
        n = self._shape.numel()
        v = (second + 2 * self.rate) / (n + 2 * self.concentration + 2)
        entropy_part = variance.log().flatten(-ndim).sum(-1)
        kl = 0.5 * (n * v.log() - entropy_part + second / v - n)
        return kl - dist.InverseGamma(v.new_tensor(self.concentration), v.new_tensor(self.rate)).log_prob(v)


class _ClosedFormNormal(dist.Normal):
    """A Normal that remembers the prior whose variance it stands for."""

    def __init__(
        self, loc: Tensor, scale: Tensor, source: ClosedFormPrior, validate_args: Any = None
    ) -> None:
        self.source = source
        super().__init__(loc, scale, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(_ClosedFormNormal, _instance)
        new.source = self.source
        return super().expand(batch_shape, new)


def closed_form_source(prior: Any) -> ClosedFormPrior | None:
    """The closed-form prior behind the distribution of a model site; ``None`` for every other distribution."""
    base = unwrap(prior)
    return base.source if isinstance(base, _ClosedFormNormal) else None
