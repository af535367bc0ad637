# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Scores of inputs that should be larger away from the training data, one per observation; compare two sets of them with
:func:`~pyro_bnn.diagnostics.metrics.auroc`.

============================  ===========================================================  =======================
score                         what it is                                                   large where
============================  ===========================================================  =======================
:func:`predictive_entropy`    :math:`H[E_z\,p(y\mid z)]`, aleatoric and epistemic          labels are ambiguous, too
:func:`mutual_information`    :math:`H[E_z\,p(y\mid z)] - E_z H[p(y\mid z)]`, BALD         posterior draws disagree
:func:`functional_variance`   :math:`\operatorname{Var}_z f(x)`, summed over classes       posterior draws disagree
============================  ===========================================================  =======================

Each takes predictions under draws (:func:`~pyro_bnn.infer.posterior_predictive`), or the closed-form Gaussian over the
outputs (``guide.linearized_outputs(x)``).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributions as td
from torch import Tensor

from pyro_bnn.diagnostics.scored import as_prediction, check_numbers, need
from pyro_bnn.infer.autoguide.outputs import LinearizedOutputs
from pyro_bnn.infer.predict.sites import SitePrediction, observation_kind, observation_moments
from pyro_bnn.ops.families import of_family

#: Nodes of the quadrature over the logit of a binary observation.
_NODES = 128


def predictive_entropy(
    source: Any, *, site: str | None = None, num_samples: int = 1000, generator: torch.Generator | None = None
) -> Tensor:
    r"""
    The entropy of the predictive distribution of each observation, nats.

    For class labels :math:`-\sum_k \bar p_k \log \bar p_k` with :math:`\bar p = E_z\,p(y \mid z)`. For real observations the
    differential entropy of the Normal with the predictive mean and variance, :math:`\tfrac12 \log 2\pi e \operatorname{Var}[y]`:
    exact for a Normal likelihood in closed form, and an upper bound elsewhere. Elements of an event have entropies of
    their own.

    :param source: a :class:`~pyro_bnn.infer.PosteriorPredictive`, one of its sites, or what
        ``guide.linearized_outputs(x)`` returns.
    :param str site: the observed site, if there are several.
    :param int num_samples: draws of outputs in closed form where an expectation over them has none: labels of more than two
        classes, and likelihoods other than Bernoulli and Normal in its location.
    :param generator: source of random numbers for these.
    :return: one value per observation.

    Example::

        >>> p = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # two draws that contradict each other
        >>> predictive_entropy(SitePrediction(None, p, None, None, None, (), "classes"))
        tensor([0.6931])

    Source: Lakshminarayanan, Pritzel, Blundell (2017), section 3.5.
    """
    return _entropies(source, site, num_samples, generator)[0]


def mutual_information(
    source: Any, *, site: str | None = None, num_samples: int = 1000, generator: torch.Generator | None = None
) -> Tensor:
    r"""
    What an observation would tell of the latents (BALD), nats: the entropy of the predictive distribution less the
    expected entropy of the observation given the latents.

    For real observations both are those of Normals, as in :func:`predictive_entropy`: exact for a Normal likelihood in
    closed form, :math:`\tfrac12\log(1 + v/\sigma^2)`.

    :param source: see :func:`predictive_entropy`.
    :param str site: the observed site, if there are several.
    :param int num_samples: see :func:`predictive_entropy`.
    :param generator: see :func:`predictive_entropy`.
    :return: one value per observation, not negative.

    Example::

        >>> p = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
        >>> mutual_information(SitePrediction(None, p, None, None, None, (), "classes"))
        tensor([0.6931])

    Source: Houlsby et al. (2011), "Bayesian active learning for classification and preference learning".
    """
    total, given = _entropies(source, site, num_samples, generator)
    return (total - given).clamp(min=0)


def functional_variance(source: Any, *, site: str | None = None) -> Tensor:
    """
    The variance of the function over the posterior, of labels summed over the classes.

    Of draws, the variance of the mean of the observation: class probabilities for labels. In closed form, that of the
    location, or of the logits. Elements of an event have variances of their own.

    :param source: see :func:`predictive_entropy`.
    :param str site: the observed site, if there are several.
    :return: one value per observation.

    Example::

        >>> mean = torch.tensor([[1.0], [3.0]])
        >>> functional_variance(SitePrediction(None, mean, torch.ones(2, 1), None, None, ()))
        tensor([1.])
    """
    found = _read(source, site)
    if isinstance(found, LinearizedOutputs):
        return _of_outputs(found)
    mean = check_numbers(need(found.mean, "the mean under each draw"), "mean")
    spread = mean.var(0, correction=0)
    return spread.sum(-1) if found.kind == "classes" else spread


def _of_outputs(found: LinearizedOutputs) -> Tensor:
    """The variance of the location of each element, without that of its scale, or of all parameters where there is none."""
    variance = found.variance.clamp(min=0)
    if found.names[:1] != ("loc",):
        return variance.sum(-1)
    location = variance[..., : found.site.sizes[0]]
    return location if found.site.base.event_shape else location.squeeze(-1)


def _read(source: Any, site: str | None) -> LinearizedOutputs | SitePrediction:
    """The closed form or the draws at one site."""
    if isinstance(source, Mapping) and all(isinstance(v, LinearizedOutputs) for v in source.values()):
        if site not in source and (site is not None or len(source) != 1):
            raise ValueError(f"site={site!r}: choose one of the observed sites {list(source)}.")
        return source[site] if site is not None else next(iter(source.values()))
    return source if isinstance(source, LinearizedOutputs) else as_prediction(source, site)


def _entropies(
    source: Any, site: str | None, num_samples: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """The entropy of the predictive distribution, and the expected entropy given the latents."""
    found = _read(source, site)
    if not isinstance(found, LinearizedOutputs):
        return _of_draws(found)
    base = found.site.base
    if found.names == ("loc",) and of_family(base, td.Normal, td.MultivariateNormal):
        noise = found.site.build(found.mean).variance
        return _gaussian(noise + found.variance.reshape(noise.shape)), _gaussian(noise)
    if found.names == ("logits",) and found.mean.shape[-1] == 1 and of_family(base, td.Bernoulli):
        return _of_logit(found.mean[..., 0], found.variance[..., 0].clamp(min=0).sqrt())
    fn = found.site.build(found.sample((num_samples,), generator=generator))
    mean, variance = observation_moments(fn)
    return _of_draws(SitePrediction(None, mean, variance, None, None, (), observation_kind(fn)))


def _of_draws(found: SitePrediction) -> tuple[Tensor, Tensor]:
    mean = check_numbers(need(found.mean, "the mean under each draw"), "mean")
    if found.kind == "classes":
        return torch.special.entr(mean.mean(0)).sum(-1), torch.special.entr(mean).sum(-1).mean(0)
    if found.kind == "binary":
        return _binary(mean.mean(0)), _binary(mean).mean(0)
    variance = check_numbers(need(found.variance, "the variance under each draw"), "variance")
    return _gaussian(variance.mean(0) + mean.var(0, correction=0)), _gaussian(variance).mean(0)


def _of_logit(mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Of a binary observation whose logit is Gaussian, by Gauss-Hermite quadrature."""
    nodes, weights = (torch.as_tensor(v).to(mean) for v in np.polynomial.hermite_e.hermegauss(_NODES))
    p = torch.sigmoid(mean.unsqueeze(-1) + scale.unsqueeze(-1) * nodes)
    weights = weights / weights.sum()
    return _binary((p * weights).sum(-1)), (_binary(p) * weights).sum(-1)


def _binary(p: Tensor) -> Tensor:
    return torch.special.entr(p) + torch.special.entr(1 - p)


def _gaussian(variance: Tensor) -> Tensor:
    return 0.5 * (2 * math.pi * math.e * variance).log()
