# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Settings of rank-1 networks that belong together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import nn

from pyro_bnn.infer.autoguide.initialization import dropout_scale, init_component, init_to_random_sign
from pyro_bnn.infer.autoguide.mixture import AutoMixture
from pyro_bnn.infer.mixture.elbo import Mixture_ELBO
from pyro_bnn.infer.mixture.schedules import LinearAnnealing
from pyro_bnn.nn import FanInNormal, rank1_


@dataclass(frozen=True)
class Rank1Preset:
    r"""
    How to convert a network, build its guide and its bound. The three steps are methods, so that a model, which lies
    between the first and the second, stays the user's own::

        preset = default_preset()
        preset.convert_(net)
        guide = preset.guide(model, num_components=4)
        fit(model, guide, loader, num_steps=T, elbo=preset.elbo(T))

    :param prior: prior of the factors.
    :param weight_prior: prior of the shared weights.
    :param bias_prior: prior of the biases.
    :param clip: see :class:`~pyro_bnn.nn.Rank1Options`.
    :param component: family of the components.
    :param init_loc_fn: initial locations.
    :param init_scale: initial scale.
    :param noise: noise shared by the batch or per example.
    :param likelihood: see :class:`~pyro_bnn.infer.Mixture_ELBO`.
    :param kl: see :class:`~pyro_bnn.infer.Mixture_ELBO`.
    :param annealing: the fraction of the steps over which the KL rises linearly to its full weight.

    Example::

        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> _ = default_preset().convert_(net)
        >>> type(net[0]).__name__
        'Rank1Linear'
    """

    prior: Any
    weight_prior: Any
    bias_prior: Any
    clip: float | None
    component: str
    init_loc_fn: Callable[[Any], torch.Tensor]
    init_scale: float
    noise: str
    likelihood: str
    kl: str
    annealing: float

    def convert_(self, net: nn.Module, **options: Any) -> Any:
        """
        Converts a network in place.

        :param net: the network.
        :param options: see :func:`~pyro_bnn.nn.rank1_`; they win over the preset. With ``freeze_base=True`` the weights
            are fixed and have no prior.
        :return: ``net``.
        """
        mine = {"prior": self.prior, "bias_prior": self.bias_prior, "clip": self.clip}
        if not options.get("freeze_base"):
            mine["weight_prior"] = self.weight_prior
        return rank1_(net, **{**mine, **options})

    def guide(self, model: Callable[..., Any], num_components: int = 4, **options: Any) -> AutoMixture:
        """
        Builds the guide.

        :param model: the model.
        :param int num_components: number of components.
        :param options: see :class:`~pyro_bnn.infer.autoguide.AutoMixture`; they win over the preset.
        :return: the guide, not initialised.
        """
        mine = {"component": self.component, "init_loc_fn": self.init_loc_fn, "init_scale": self.init_scale}
        return AutoMixture(model, num_components, **{**mine, "noise": self.noise, **options})

    def elbo(self, num_steps: int, **options: Any) -> Mixture_ELBO:
        """
        Builds the bound.

        :param int num_steps: number of optimisation steps of the whole run.
        :param options: see :class:`~pyro_bnn.infer.Mixture_ELBO`; they win over the preset.
        :return: the bound.
        """
        schedule = LinearAnnealing(max(1, round(self.annealing * num_steps)))
        mine: dict[str, Any] = {"likelihood": self.likelihood, "kl": self.kl, "kl_scale": schedule}
        return Mixture_ELBO(**{**mine, **options})


def dusenberry2020(num_data: int, *, family: str = "normal", l2: float = 1e-4) -> Rank1Preset:
    r"""
    The settings of the CIFAR experiments of Dusenberry et al. (ICML 2020) as their published code has them: factors
    :math:`N(1, 0.1^2)`, random signs with probability 0.5, initial scale from a dropout rate of :math:`10^{-3}`, noise
    per example, clipping at 10, the sum of the components' divergences, annealed over 80 % of the run, shared batch
    normalisation. The penalty :math:`\lambda \sum w^2` of a mean loss is the prior :math:`N(0, 1/(2 N \lambda))` on
    weights and biases; scales and shifts of normalisation layers stay parameters without a penalty.

    The settings of the paper's Cauchy networks are not published. ``family="cauchy"`` takes the prior Cauchy(1, 0.1) and
    the initial scale :math:`\sqrt{10^{-5}}`: Cauchy noise does not average out over the inputs of a layer, so that it
    has to be smaller than Gaussian noise by about the square root of their number. Predict with several draws per component.

    :param int num_data: :math:`N`, the number of training examples.
    :param str family: ``"normal"`` or ``"cauchy"``.
    :param float l2: :math:`\lambda`.
    :raises ValueError: for any other family.
    :return: the preset.

    Example::

        >>> round(float(dusenberry2020(50_000).weight_prior.scale), 3)
        0.316
    """
    if family not in ("normal", "cauchy"):
        raise ValueError(f"family must be 'normal' or 'cauchy', found {family!r}.")
    one = torch.ones(())
    made: Any = dist.Normal if family == "normal" else dist.Cauchy
    penalty = dist.Normal(0 * one, one / (2 * num_data * l2) ** 0.5)
    return Rank1Preset(
        prior=made(one, 0.1 * one),
        weight_prior=penalty,
        bias_prior=penalty,
        clip=10.0,
        component=family,
        init_loc_fn=init_to_random_sign(probability=0.5),
        init_scale=dropout_scale(1e-3 if family == "normal" else 1e-5),
        noise="per_example",
        likelihood="average",
        kl="sum",
        annealing=0.8,
    )


def default_preset() -> Rank1Preset:
    """
    The settings that this project recommends: those of the rank-1 Gaussian mixture in ``benchmarks/rank1_fashion.py``,
    where they were chosen on held-out images of one data set, but for the prior of the biases, N(0, 1) instead of N(0, 0.3²).

    They differ from those of the paper in the prior of the factors, N(1, 0.5) instead of N(1, 0.1), under which members
    hardly differ; in the initial factors (draws of the prior instead of random signs, which a prior centred at 1 pulls
    back); in the divergence (the mean over components, which bounds the evidence of the mixture more tightly than the
    sum); and in weights with the prior N(0, 16/fan-in). That prior is wide: on scikit-learn's digits it was better than
    ``weight_prior=FanInNormal()``, on the 221 rows of its diabetes data worse.

    :return: the preset.

    Example::

        >>> default_preset().kl
        'mean'
    """
    one = torch.ones(())
    return Rank1Preset(
        prior=dist.Normal(one, 0.5 * one),
        weight_prior=FanInNormal(gain=4.0),
        bias_prior=dist.Normal(0 * one, one),
        clip=None,
        component="normal",
        init_loc_fn=init_component,
        init_scale=0.1,
        noise="shared",
        likelihood="average",
        kl="mean",
        annealing=0.8,
    )
