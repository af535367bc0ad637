# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Where the components of a mixture start."""

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor
from torch.distributions import biject_to

from pyro_bnn.nn.priors import unwrap
from pyro_bnn.nn.sites import SITE_KEY


def site_hint(site: Any) -> dict[str, Any]:
    """
    What a layer of this package says of its sample site.

    :param site: a node of a trace.
    :return: ``role`` and ``init``, or an empty dictionary for other sites.
    """
    return site["infer"].get(SITE_KEY, {})


def init_component(site: Any) -> Tensor:
    """
    The default initial location of a mixture component, called once per component.

    Rank-1 factors and weights start at independent draws around their prior location with the prior's scale, so
    that components differ; biases and shared weights at the value of the network that was converted; flat priors, which have
    no draws, at zero in unconstrained space; all other sites at their prior median.

    :param site: a sample site.
    :return: a value of the site.

    Example::

        >>> import torch
        >>> from pyro_bnn import AutoMixture, rank1_
        >>> net = rank1_(torch.nn.Linear(3, 2))
        >>> guide = AutoMixture(net, 2, init_loc_fn=init_component).initialize(torch.zeros(1, 3))
        >>> guide.num_components
        2
    """
    hint = site_hint(site)
    role, init = hint.get("role"), hint.get("init")
    if role in ("bias", "base") and init is not None:
        return init.expand(site["fn"].shape()).clone()
    if isinstance(unwrap(site["fn"]), dist.ImproperUniform):  # which has no draws
        transform = biject_to(site["fn"].support)
        return transform(torch.zeros(transform.inverse_shape(site["fn"].shape())))
    if role not in ("factor", "weight"):
        return init_to_median(site)
    base = unwrap(site["fn"])
    if isinstance(base, torch.distributions.Cauchy):
        # a draw would start some factors far in the tails
        return base.loc + base.scale * torch.randn_like(base.loc)
    if isinstance(base, torch.distributions.HalfCauchy):
        return base.scale * torch.exp(0.1 * torch.randn_like(base.scale))
    return site["fn"].sample()


def init_to_random_sign(
    site: Any = None, *, probability: float = 0.5, fallback: Callable[[Any], Tensor] = init_component
) -> Any:
    """
    Rank-1 factors start at :math:`+1` with the given probability and at :math:`-1` otherwise, as in the reference
    implementation of Dusenberry et al. (ICML 2020), which takes 0.5 for CIFAR and 0.75 for ImageNet.

    With the prior :math:`N(1, 0.1^2)` an element at :math:`-1` costs 200 nats, and training pulls it to :math:`+1`:
    random signs are early diversity and not part of the posterior.

    :param site: a sample site; without one, the function with its options is returned.
    :param float probability: the probability of :math:`+1`.
    :param callable fallback: initialisation of all other sites.
    :return: the initial value.

    Example::

        >>> from pyro_bnn.infer.autoguide import AutoMixture
        >>> guide = AutoMixture(lambda: None, 4, init_loc_fn=init_to_random_sign(probability=0.75))
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability must lie between 0 and 1, found {probability!r}.")
    if site is None:
        return lambda site: init_to_random_sign(site, probability=probability, fallback=fallback)
    if site_hint(site).get("role") != "factor":
        return fallback(site)
    ones = torch.ones_like(site["fn"].sample())
    return torch.where(torch.rand_like(ones) < probability, ones, -ones)


def init_to_normal(
    site: Any = None,
    *,
    loc: float = 1.0,
    scale: float = 0.1,
    fallback: Callable[[Any], Tensor] = init_component,
) -> Any:
    """
    Rank-1 factors start at draws of a Normal distribution.

    :param site: a sample site; without one, the function with its options is returned.
    :param float loc: its mean.
    :param float scale: its standard deviation.
    :param callable fallback: initialisation of all other sites.
    :return: the initial value.

    Example::

        >>> import torch
        >>> from pyro_bnn import AutoMixture, rank1_
        >>> net = rank1_(torch.nn.Linear(3, 2))
        >>> guide = AutoMixture(net, 2, init_loc_fn=init_to_normal(scale=0.5)).initialize(torch.zeros(1, 3))
        >>> guide.median()["s"].shape
        torch.Size([3])
    """
    if site is None:
        return lambda site: init_to_normal(site, loc=loc, scale=scale, fallback=fallback)
    if site_hint(site).get("role") != "factor":
        return fallback(site)
    return loc + scale * torch.randn_like(site["fn"].sample())


def dropout_scale(rate: float) -> float:
    r"""
    The standard deviation of multiplicative Gaussian noise with the variance of dropout,
    :math:`\sigma = \sqrt{p / (1 - p)}` (Srivastava et al. 2014, section 10): an ``init_scale`` for factors.

    :param float rate: the dropout rate :math:`p`.
    :return: :math:`\sigma`.

    Example::

        >>> round(dropout_scale(1e-3), 5)
        0.03164
    """
    if not 0.0 < rate < 1.0:
        raise ValueError(f"rate must lie strictly between 0 and 1, found {rate!r}.")
    return math.sqrt(rate / (1.0 - rate))
