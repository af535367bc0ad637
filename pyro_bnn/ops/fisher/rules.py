# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Fisher information of the distributions of :mod:`torch.distributions`, in real-valued parameters.

Positive parameters enter by their logarithm, so that :math:`F_{\log a} = a^2 F_a`. Sources: the textbook formulas
for exponential families (F is the covariance of the sufficient statistic in natural parameters); Lange, Little,
Taylor (1989), appendix B, for the Student t distribution.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution
from torch.special import polygamma

from pyro_bnn.ops.fisher.rule import FisherRule, register_fisher


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
        family = td.LogNormal if isinstance(d, td.LogNormal) else td.Normal
        return family(*torch.broadcast_tensors(loc, scale))


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

    def root(self, d: td.Categorical, names: Sequence[str]) -> Tensor:  # type: ignore[override]
        r"""
        See :meth:`FisherRule.root`; C - 1 columns, since the information has that rank:
        :math:`F = \mathrm{diag}(\sqrt\pi)(I - qq^\top)\mathrm{diag}(\sqrt\pi)` with :math:`q = \sqrt\pi`, and the
        columns of a Householder reflection that takes q to the last coordinate span the rest of the space.
        """
        q = d.probs.sqrt()
        if q.shape[-1] == 1:
            return torch.zeros_like(q).unsqueeze(-1)
        v = q.clone()
        v[..., -1] += 1
        reflection = torch.diag_embed(torch.ones_like(q)) - v.unsqueeze(-1) * (v / v[..., -1:]).unsqueeze(-2)
        return q.unsqueeze(-1) * reflection[..., :-1]

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


@register_fisher(td.Laplace)
class LaplaceFisher(FisherRule):
    r"""Laplace in :math:`(\mu, \log b)`: :math:`F = \mathrm{diag}(b^{-2}, 1)`."""

    def parameters(self, d: td.Laplace) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`FisherRule.parameters`."""
        return {"loc": d.loc.unsqueeze(-1), "log_scale": d.scale.log().unsqueeze(-1)}

    def information(self, d: td.Laplace) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        return _stack(d.scale.pow(-2), torch.ones_like(d.scale))

    def build(self, d: td.Laplace, parameters: Mapping[str, Tensor]) -> Distribution:  # type: ignore[override]
        """See :meth:`FisherRule.build`."""
        return td.Laplace(*_arguments(d, parameters, loc="loc", scale="log_scale"))


@register_fisher(td.StudentT)
class StudentTFisher(FisherRule):
    r"""Student t in :math:`(\log\nu, \mu, \log\sigma)`; Lange, Little, Taylor (1989)."""

    def parameters(self, d: td.StudentT) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`FisherRule.parameters`."""
        return {
            "log_df": d.df.log().unsqueeze(-1),
            "loc": d.loc.unsqueeze(-1),
            "log_scale": d.scale.log().unsqueeze(-1),
        }

    def information(self, d: td.StudentT) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        nu, scale = d.df, d.scale
        trigamma = polygamma(1, nu / 2) - polygamma(1, (nu + 1) / 2)
        df = 0.25 * trigamma - (nu + 5) / (2 * nu * (nu + 1) * (nu + 3))
        cross = -2 * nu / ((nu + 1) * (nu + 3))
        F = _stack(nu.square() * df, (nu + 1) / ((nu + 3) * scale.square()), 2 * nu / (nu + 3))
        F[..., 0, 2] = F[..., 2, 0] = cross
        return F

    def build(self, d: td.StudentT, parameters: Mapping[str, Tensor]) -> Distribution:  # type: ignore[override]
        """See :meth:`FisherRule.build`."""
        return td.StudentT(*_arguments(d, parameters, df="log_df", loc="loc", scale="log_scale"))


@register_fisher(td.Gamma)
class GammaFisher(FisherRule):
    r"""Gamma in :math:`(\log a, \log b)`: :math:`F = \begin{pmatrix} a^2\psi_1(a) & -a \\ -a & a\end{pmatrix}`."""

    def parameters(self, d: td.Gamma) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`FisherRule.parameters`."""
        return {
            "log_concentration": d.concentration.log().unsqueeze(-1),
            "log_rate": d.rate.log().unsqueeze(-1),
        }

    def information(self, d: td.Gamma) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        a = d.concentration
        return _symmetric(a.square() * polygamma(1, a), -a, a)

    def build(self, d: td.Gamma, parameters: Mapping[str, Tensor]) -> Distribution:  # type: ignore[override]
        """See :meth:`FisherRule.build`."""
        return td.Gamma(*_arguments(d, parameters, concentration="log_concentration", rate="log_rate"))


@register_fisher(td.Beta)
class BetaFisher(FisherRule):
    r"""Beta in :math:`(\log a, \log b)`: :math:`F_{aa} = a^2(\psi_1(a) - \psi_1(a+b))`, :math:`F_{ab} = -ab\,\psi_1(a+b)`."""

    def parameters(self, d: td.Beta) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`FisherRule.parameters`."""
        return {
            "log_concentration1": d.concentration1.log().unsqueeze(-1),
            "log_concentration0": d.concentration0.log().unsqueeze(-1),
        }

    def information(self, d: td.Beta) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        a, b = d.concentration1, d.concentration0
        total = polygamma(1, a + b)
        return _symmetric(
            a.square() * (polygamma(1, a) - total), -a * b * total, b.square() * (polygamma(1, b) - total)
        )

    def build(self, d: td.Beta, parameters: Mapping[str, Tensor]) -> Distribution:  # type: ignore[override]
        """See :meth:`FisherRule.build`."""
        return td.Beta(
            *_arguments(
                d, parameters, concentration1="log_concentration1", concentration0="log_concentration0"
            )
        )


@register_fisher(td.Binomial)
class BinomialFisher(FisherRule):
    r"""Binomial in its logit: :math:`F = n\pi(1-\pi)`."""

    def parameters(self, d: td.Binomial) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`FisherRule.parameters`."""
        return {"logits": d.logits.unsqueeze(-1)}

    def information(self, d: td.Binomial) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        return _stack(d.total_count * d.probs * (1 - d.probs))

    def build(self, d: td.Binomial, parameters: Mapping[str, Tensor]) -> Distribution:  # type: ignore[override]
        """See :meth:`FisherRule.build`."""
        return td.Binomial(d.total_count, logits=parameters["logits"].squeeze(-1))


@register_fisher(td.NegativeBinomial)
class NegativeBinomialFisher(FisherRule):
    r"""
    Negative binomial with r failures in :math:`(\log r, \text{logit}\,\pi)`:
    :math:`F = \begin{pmatrix} r^2 \sum_{j\ge0} P(y>j)/(r+j)^2 & r\pi \\ r\pi & r\pi\end{pmatrix}`. The series is
    summed only where :math:`r` depends on latents.
    """

    def parameters(self, d: td.NegativeBinomial) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`FisherRule.parameters`."""
        return {"log_total_count": d.total_count.log().unsqueeze(-1), "logits": d.logits.unsqueeze(-1)}

    def information(self, d: td.NegativeBinomial) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        r, probs = d.total_count, d.probs
        cross = r * probs
        return _symmetric(r.square() * self._count_information(d), cross, cross)

    def block(self, d: td.NegativeBinomial, names: Sequence[str]) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.block`."""
        if list(names) == ["logits"]:
            return _stack(d.total_count * d.probs)
        return super().block(d, names)

    def _count_information(self, d: td.NegativeBinomial) -> Tensor:
        r""":math:`F_{rr} = E[\psi_1(r) - \psi_1(r+y)] = \sum_{j\ge 0} P(y > j)/(r+j)^2`."""
        r = d.total_count
        total, tail = torch.zeros_like(r), torch.ones_like(r)
        mean, mass, j = float(d.mean.max()), tail, 0
        # beyond the mean the probabilities decrease geometrically; the tail itself ends at its rounding error
        while (j <= mean or float(mass.max()) > torch.finfo(r.dtype).eps) and j < _MAX_TERMS:
            mass = d.log_prob(torch.full_like(r, float(j))).exp()
            tail = (tail - mass).clamp(min=0)
            total = total + tail / (r + j).square()
            j += 1
        return total

    def build(self, d: td.NegativeBinomial, parameters: Mapping[str, Tensor]) -> Distribution:  # type: ignore[override]
        """See :meth:`FisherRule.build`."""
        count = (
            parameters["log_total_count"].squeeze(-1).exp()
            if "log_total_count" in parameters
            else d.total_count
        )
        logits = parameters["logits"].squeeze(-1) if "logits" in parameters else d.logits
        count, logits = torch.broadcast_tensors(count, logits)
        return td.NegativeBinomial(count, logits=logits)


_MAX_TERMS = 100_000


def _arguments(d: Distribution, parameters: Mapping[str, Tensor], **names: str) -> Any:
    """Arguments of a distribution, of which some have moved; those named ``log_...`` are exponentiated."""
    values = []
    for argument, name in names.items():
        value = getattr(d, argument)
        if name in parameters:
            value = parameters[name].squeeze(-1)
            value = value.exp() if name.startswith("log_") else value
        values.append(value)
    return tuple(torch.broadcast_tensors(*values))


def _symmetric(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The matrices [[a, b], [b, c]], shape (*batch, 2, 2)."""
    a, b, c = torch.broadcast_tensors(a, b, c)
    return torch.stack([torch.stack([a, b], -1), torch.stack([b, c], -1)], -2)


def covariance_information(precision: Tensor, directions: Tensor) -> Tensor:
    r"""
    Fisher information of a zero-mean Gaussian in parameters of its covariance,
    :math:`F_{ab} = \frac12\operatorname{tr}(\Sigma^{-1}\,\partial_a\Sigma\,\Sigma^{-1}\,\partial_b\Sigma)`.

    :param precision: :math:`\Sigma^{-1}`, shape ``(..., d, d)``.
    :param directions: :math:`\partial_a\Sigma`, shape ``(..., q, d, d)``.
    :return: shape ``(..., q, q)``.
    """
    images = precision.unsqueeze(-3) @ directions
    return 0.5 * torch.einsum("...aij,...bji->...ab", images, images)


def _location_and_covariance(precision: Tensor, directions: Tensor) -> Tensor:
    """The information in (location, covariance parameters), which is block-diagonal."""
    d, q = precision.shape[-1], directions.shape[-3]
    F = precision.new_zeros(precision.shape[:-2] + (d + q, d + q))
    F[..., :d, :d] = precision
    F[..., d:, d:] = covariance_information(precision, directions)
    return F


@register_fisher(td.MultivariateNormal)
class MultivariateNormalFisher(FisherRule):
    r"""
    Multivariate Normal in :math:`\mu` and, row by row, the entries of the Cholesky factor of the covariance, the
    logarithms of those on its diagonal: :math:`F_{\mu\mu} = \Sigma^{-1}`.
    """

    def parameters(self, d: td.MultivariateNormal) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`FisherRule.parameters`."""
        tril = d.scale_tril
        i, j = torch.tril_indices(tril.shape[-1], tril.shape[-1], device=tril.device)
        logs = tril.diagonal(dim1=-2, dim2=-1).log()
        entries = torch.where(i == j, logs[..., i], tril[..., i, j])
        return {"loc": d.loc, "scale_tril": entries}

    def information(self, d: td.MultivariateNormal) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        tril = d.scale_tril
        size = tril.shape[-1]
        i, j = torch.tril_indices(size, size, device=tril.device)
        change = tril.new_zeros(tril.shape[:-2] + (len(i), size, size))
        change[..., torch.arange(len(i), device=tril.device), i, j] = torch.where(
            i == j, tril[..., i, j], torch.ones_like(tril[..., i, j])
        )
        half = change @ tril.unsqueeze(-3).mT
        return _location_and_covariance(d.precision_matrix, half + half.mT)

    def block(self, d: td.MultivariateNormal, names: Sequence[str]) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.block`."""
        if list(names) == ["loc"]:
            return d.precision_matrix.expand(d.batch_shape + d.precision_matrix.shape[-2:])
        return super().block(d, names)

    def build(self, d: td.MultivariateNormal, parameters: Mapping[str, Tensor]) -> Distribution:  # type: ignore[override]
        """See :meth:`FisherRule.build`."""
        loc, tril = parameters.get("loc", d.loc), d.scale_tril
        if "scale_tril" in parameters:
            entries = parameters["scale_tril"]
            size = tril.shape[-1]
            i, j = torch.tril_indices(size, size, device=tril.device)
            tril = entries.new_zeros(entries.shape[:-1] + (size, size))
            tril[..., i, j] = torch.where(i == j, entries.exp(), entries)
        return td.MultivariateNormal(loc, scale_tril=tril)


@register_fisher(td.LowRankMultivariateNormal)
class LowRankMultivariateNormalFisher(FisherRule):
    r"""
    :math:`N(\mu, WW^\top + \operatorname{diag} D)` in :math:`(\mu, W, \log D)`, W row by row:
    :math:`F_{\mu\mu} = \Sigma^{-1}`. F may be singular in W, whose columns can be rotated.
    """

    def parameters(self, d: td.LowRankMultivariateNormal) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`FisherRule.parameters`."""
        return {"loc": d.loc, "cov_factor": d.cov_factor.flatten(-2), "log_cov_diag": d.cov_diag.log()}

    def information(self, d: td.LowRankMultivariateNormal) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        W, D = d.cov_factor, d.cov_diag
        size, _rank = W.shape[-2:]
        unit = torch.eye(size, dtype=W.dtype, device=W.device)
        # d Sigma / d W[i, r] = e_i w_r^T + w_r e_i^T
        half = torch.einsum("ia,...br->...irab", unit, W).flatten(-4, -3)
        directions = torch.cat([half + half.mT, torch.diag_embed(D.unsqueeze(-1) * unit)], -3)
        return _location_and_covariance(d.precision_matrix, directions)

    def block(self, d: td.LowRankMultivariateNormal, names: Sequence[str]) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.block`."""
        if list(names) == ["loc"]:
            return d.precision_matrix.expand(d.batch_shape + d.precision_matrix.shape[-2:])
        return super().block(d, names)

    def build(self, d: td.LowRankMultivariateNormal, parameters: Mapping[str, Tensor]) -> Distribution:  # type: ignore[override]
        """See :meth:`FisherRule.build`."""
        factor, diagonal = d.cov_factor, d.cov_diag
        if "cov_factor" in parameters:
            factor = parameters["cov_factor"].unflatten(-1, factor.shape[-2:])
        if "log_cov_diag" in parameters:
            diagonal = parameters["log_cov_diag"].exp()
        return td.LowRankMultivariateNormal(parameters.get("loc", d.loc), factor, diagonal)


@register_fisher(dist.OrderedLogistic)
class OrderedLogisticFisher(FisherRule):
    r"""
    Ordered logistic in the predictor :math:`f` and :math:`v = (c_1, \log(c_2 - c_1), \dots)` for cut points c:
    with :math:`\pi_k = \sigma(c_k - f) - \sigma(c_{k-1} - f)`, :math:`F = \sum_k \nabla\pi_k\nabla\pi_k^\top/\pi_k`.
    """

    def parameters(self, d: dist.OrderedLogistic) -> dict[str, Tensor]:  # type: ignore[override]
        """See :meth:`FisherRule.parameters`."""
        cuts = d.cutpoints
        steps = (cuts[..., 1:] - cuts[..., :-1]).log()
        return {"predictor": d.predictor.unsqueeze(-1), "steps": torch.cat([cuts[..., :1], steps], -1)}

    def information(self, d: dist.OrderedLogistic) -> Tensor:  # type: ignore[override]
        """See :meth:`FisherRule.information`."""
        cuts = d.cutpoints
        cumulative = torch.sigmoid(cuts - d.predictor.unsqueeze(-1))
        density = cumulative * (1 - cumulative)
        K = cuts.shape[-1]
        # rows: cumulative probabilities; columns: predictor, then v, with c_k = v_0 + sum_{0<j<=k} exp(v_j)
        widths = torch.cat([torch.ones_like(cuts[..., :1]), cuts[..., 1:] - cuts[..., :-1]], -1)
        lower = torch.ones(K, K, dtype=cuts.dtype, device=cuts.device).tril()
        by_step = lower * widths.unsqueeze(-2)
        by_step = by_step.expand(density.shape + (K,))
        slopes = density.unsqueeze(-1) * torch.cat([-torch.ones_like(by_step[..., :1]), by_step], -1)
        edge = torch.zeros_like(slopes[..., :1, :])
        gradient = torch.cat([slopes, edge], -2) - torch.cat([edge, slopes], -2)
        return gradient.mT @ (gradient / d.probs.unsqueeze(-1))

    def build(self, d: dist.OrderedLogistic, parameters: Mapping[str, Tensor]) -> Distribution:  # type: ignore[override]
        """See :meth:`FisherRule.build`."""
        predictor = parameters["predictor"].squeeze(-1) if "predictor" in parameters else d.predictor
        cuts = d.cutpoints
        if "steps" in parameters:
            steps = parameters["steps"]
            cuts = torch.cat([steps[..., :1], steps[..., 1:].exp()], -1).cumsum(-1)
        return dist.OrderedLogistic(predictor, cuts, validate_args=False)
