# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Fisher information of the distributions of :mod:`torch.distributions`, in real-valued parameters.

Positive parameters enter by their logarithm, so that :math:`F_{\log a} = a^2 F_a`. Sources: the textbook formulas
for exponential families (F is the covariance of the sufficient statistic in natural parameters); Lange, Little,
Taylor (1989), appendix B, for the Student t distribution. Weibull and Gumbel variables are functions of an exponential
variable w, whose moments :math:`E[w^k \log w] = \Gamma'(k + 1)` give theirs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution
from torch.special import polygamma
from typing_extensions import override

from pyro_bnn.ops.fisher.rule import FisherRule, add_rule, register_fisher

#: A Fisher matrix ``(*batch, C, C)``; or, as numbers or tensors ``(*batch,)``, its diagonal, or its lower triangle row by row.
Information = Callable[[Any], Tensor | Sequence[Tensor | float]]


@dataclass(frozen=True, eq=False)
class ArgumentsRule(FisherRule):
    """
    A family that is made again from its arguments.

    :ivar family: the class.
    :ivar names: its parameters: arguments, or ``"log_"`` and an argument.
    :ivar entries: see :data:`Information`.
    :ivar fixed: arguments that are no parameters.
    :ivar factor: a factor of the information; that of any matrix by default.
    :ivar cheap: the information in some of the parameters alone, where it costs less.
    """

    family: type[Distribution]
    names: tuple[str, ...]
    entries: Information
    fixed: tuple[str, ...] = ()
    factor: Callable[[Any], Tensor] | None = None
    cheap: Mapping[tuple[str, ...], Information] = field(default_factory=dict)

    @override
    def parameters(self, d: Distribution) -> dict[str, Tensor]:
        found = {}
        for name in self.names:
            value = getattr(d, name.removeprefix("log_"))
            value = value.log() if name.startswith("log_") else value
            found[name] = value if value.dim() > len(d.batch_shape) else value.unsqueeze(-1)
        return found

    @override
    def information(self, d: Distribution) -> Tensor:
        return self._matrix(d, self.names, self.entries)

    @override
    def block(self, d: Distribution, names: Sequence[str]) -> Tensor:
        cheap = self.cheap.get(tuple(names))
        return super().block(d, names) if cheap is None else self._matrix(d, names, cheap)

    def _matrix(self, d: Distribution, names: Sequence[str], information: Information) -> Tensor:
        entries = information(d)
        if isinstance(entries, Tensor):
            return entries
        like = getattr(d, names[0].removeprefix("log_"))
        cells = [torch.as_tensor(e, dtype=like.dtype, device=like.device) for e in entries]
        cells = [cell.expand(d.batch_shape) for cell in cells]
        C = len(names)
        if len(cells) == C > 1:
            return torch.diag_embed(torch.stack(cells, -1))
        whole = [cells[max(i, j) * (max(i, j) + 1) // 2 + min(i, j)] for i in range(C) for j in range(C)]
        return torch.stack(whole, -1).unflatten(-1, (C, C))

    @override
    def root(self, d: Distribution, names: Sequence[str]) -> Tensor:
        return super().root(d, names) if self.factor is None else self.factor(d)

    @override
    def build(self, d: Distribution, parameters: Mapping[str, Tensor]) -> Distribution:
        arguments = {name: getattr(d, name) for name in self.fixed}
        for name in self.names:
            argument = name.removeprefix("log_")
            arguments[argument] = value = getattr(d, argument)
            if name in parameters:
                new = parameters[name] if value.dim() > len(d.batch_shape) else parameters[name].squeeze(-1)
                arguments[argument] = new.exp() if name.startswith("log_") else new
        return self.family(**arguments)


def register(family: type[Distribution], *names: str, information: Information, **more: Any) -> None:
    """Registers the :class:`ArgumentsRule` of a family."""
    add_rule(ArgumentsRule(family, names, information, **more), family)


def softmax_information(d: Any) -> Tensor:
    r""":math:`F = \mathrm{diag}(\pi) - \pi\pi^\top` in the logits of one draw."""
    return torch.diag_embed(d.probs) - d.probs.unsqueeze(-1) * d.probs.unsqueeze(-2)


def softmax_root(d: Any) -> Tensor:
    r"""
    C - 1 columns, since the information has that rank: :math:`F = \mathrm{diag}(\sqrt\pi)(I - qq^\top)
    \mathrm{diag}(\sqrt\pi)` with :math:`q = \sqrt\pi`, and the columns of a Householder reflection that takes q to the
    last coordinate span the rest of the space.
    """
    q = d.probs.sqrt()
    if q.shape[-1] == 1:
        return torch.zeros_like(q).unsqueeze(-1)
    v = q.clone()
    v[..., -1] += 1
    reflection = torch.diag_embed(torch.ones_like(q)) - v.unsqueeze(-1) * (v / v[..., -1:]).unsqueeze(-2)
    return q.unsqueeze(-1) * reflection[..., :-1]


def gamma_information(d: Any) -> list[Tensor]:
    r""":math:`F = \begin{pmatrix} a^2\psi_1(a) & -a \\ -a & a\end{pmatrix}` in :math:`(\log a, \log b)`."""
    a = d.concentration
    return [a.square() * polygamma(1, a), -a, a]


def beta_information(d: td.Beta) -> list[Tensor]:
    r""":math:`F_{aa} = a^2(\psi_1(a) - \psi_1(a+b))`, :math:`F_{ab} = -ab\,\psi_1(a+b)`."""
    a, b = d.concentration1, d.concentration0
    total = polygamma(1, a + b)
    return [a.square() * (polygamma(1, a) - total), -a * b * total, b.square() * (polygamma(1, b) - total)]


def gumbel_information(d: td.Gumbel) -> list[Tensor | float]:
    """The last entry is that of the logarithm of the scale."""
    return [d.scale.pow(-2), (np.euler_gamma - 1) / d.scale, (1 - np.euler_gamma) ** 2 + np.pi**2 / 6]


def weibull_information(d: td.Weibull) -> list[Tensor | float]:
    """In the scale and the shape k, which is the reciprocal of a Gumbel distribution's scale."""
    k = d.concentration
    return [k.square(), (np.euler_gamma - 1) * k, (1 - np.euler_gamma) ** 2 + np.pi**2 / 6]


def student_information(d: td.StudentT) -> list[Tensor | float]:
    """Lange, Little, Taylor (1989)."""
    nu = d.df
    trigamma = polygamma(1, nu / 2) - polygamma(1, (nu + 1) / 2)
    df = 0.25 * trigamma - (nu + 5) / (2 * nu * (nu + 1) * (nu + 3))
    loc, cross = (nu + 1) / ((nu + 3) * d.scale.square()), -2 * nu / ((nu + 1) * (nu + 3))
    return [nu.square() * df, 0.0, loc, cross, 0.0, 2 * nu / (nu + 3)]


def binomial_information(d: td.Binomial) -> list[Tensor]:
    r""":math:`F = n\pi(1-\pi)`."""
    return [d.total_count * d.probs * (1 - d.probs)]


#: Terms of the series of a count's information.
_MAX_TERMS = 100_000


def count_information(d: td.NegativeBinomial) -> Tensor:
    r""":math:`F_{rr} = E[\psi_1(r) - \psi_1(r+y)] = \sum_{j\ge 0} P(y > j)/(r+j)^2`."""
    r = d.total_count
    total, tail = torch.zeros_like(r), torch.ones_like(r)
    mean, mass, j = float(d.mean.max()), tail, 0
    # beyond the mean the probabilities decrease geometrically; the tail itself ends at its rounding error
    while j <= mean or float(mass.max()) > torch.finfo(r.dtype).eps:
        if max(j, mean) >= _MAX_TERMS:
            raise ValueError(
                f"NegativeBinomial with a mean of {mean:,.0f}: the series of its Fisher information has more than "
                f"{_MAX_TERMS:,} terms. Use curvature='hessian', 'mc_fisher' or 'empirical_fisher', or a total_count that does "
                "not depend on latents."
            )
        mass = d.log_prob(torch.full_like(r, float(j))).exp()
        tail = (tail - mass).clamp(min=0)
        total = total + tail / (r + j).square()
        j += 1
    return total


def negative_binomial_information(d: td.NegativeBinomial) -> list[Tensor]:
    r"""In :math:`(\log r, \text{logit}\,\pi)` for r failures; :math:`r\pi` but for :math:`r^2` times the series."""
    r, cross = d.total_count, d.total_count * d.probs
    return [r.square() * count_information(d), cross, cross]


register(td.Normal, "loc", "log_scale", information=lambda d: (d.scale.pow(-2), 2.0))
register(td.LogNormal, "loc", "log_scale", information=lambda d: (d.scale.pow(-2), 2.0))
register(td.Laplace, "loc", "log_scale", information=lambda d: (d.scale.pow(-2), 1.0))
register(td.Cauchy, "loc", "log_scale", information=lambda d: (0.5 * d.scale.pow(-2), 0.5))
register(td.Gumbel, "loc", "log_scale", information=gumbel_information)
register(td.StudentT, "log_df", "loc", "log_scale", information=student_information)
register(td.HalfNormal, "log_scale", information=lambda d: (2.0,))
register(td.Exponential, "log_rate", information=lambda d: (1.0,))
register(td.Gamma, "log_concentration", "log_rate", information=gamma_information)
register(td.InverseGamma, "log_concentration", "log_rate", information=gamma_information)
register(td.Weibull, "log_scale", "log_concentration", information=weibull_information)
# its scale ends the support and has no Fisher information
register(td.Pareto, "log_alpha", information=lambda d: (1.0,), fixed=("scale",))
register(td.Beta, "log_concentration1", "log_concentration0", information=beta_information)
register(td.Poisson, "log_rate", information=lambda d: (d.rate,))
register(td.Geometric, "logits", information=lambda d: (1 - d.probs,))
register(td.Bernoulli, "logits", information=lambda d: (d.probs * (1 - d.probs),))
register(td.Binomial, "logits", information=binomial_information, fixed=("total_count",))
register(
    td.NegativeBinomial,
    "log_total_count",
    "logits",
    information=negative_binomial_information,
    cheap={("logits",): lambda d: (d.total_count * d.probs,)},  # without the series
)
register(td.Categorical, "logits", information=softmax_information, factor=softmax_root)
register(td.OneHotCategorical, "logits", information=softmax_information, factor=softmax_root)
register(
    td.Multinomial,
    "logits",
    information=lambda d: d.total_count * softmax_information(d),
    factor=lambda d: d.total_count**0.5 * softmax_root(d),
    fixed=("total_count",),
)


def covariance_information(precision: Tensor, directions: Tensor) -> Tensor:
    r"""
    Fisher information of a zero-mean Gaussian in parameters of its covariance,
    :math:`F_{ab} = \frac12\operatorname{tr}(\Sigma^{-1}\,\partial_a\Sigma\,\Sigma^{-1}\,\partial_b\Sigma)`, shape
    ``(..., q, q)``, from :math:`\Sigma^{-1}`, ``(..., d, d)``, and :math:`\partial_a\Sigma`, ``(..., q, d, d)``.
    """
    images = precision.unsqueeze(-3) @ directions
    return 0.5 * torch.einsum("...aij,...bji->...ab", images, images)


class GaussianFisher(FisherRule):
    r"""Gaussians in :math:`\mu` and parameters of the covariance: :math:`F_{\mu\mu} = \Sigma^{-1}`, no cross terms."""

    def directions(self, d: Any) -> Tensor:
        """The derivatives of the covariance in its q parameters, shape ``(..., q, d, d)``."""
        raise NotImplementedError

    @override
    def information(self, d: Any) -> Tensor:
        precision, directions = d.precision_matrix, self.directions(d)
        size = precision.shape[-1]
        total = size + directions.shape[-3]
        F = precision.new_zeros(precision.shape[:-2] + (total, total))
        F[..., :size, :size] = precision
        F[..., size:, size:] = covariance_information(precision, directions)
        return F

    @override
    def block(self, d: Any, names: Sequence[str]) -> Tensor:
        if list(names) == ["loc"]:
            return d.precision_matrix.expand(d.batch_shape + d.precision_matrix.shape[-2:])
        return super().block(d, names)


@register_fisher(td.MultivariateNormal)
class MultivariateNormalFisher(GaussianFisher):
    r"""
    Multivariate Normal in :math:`\mu` and, row by row, the entries of the Cholesky factor of the covariance, the
    logarithms of those on its diagonal.
    """

    @override
    def parameters(self, d: td.MultivariateNormal) -> dict[str, Tensor]:  # type: ignore[override]
        i, j = _triangle(d.scale_tril)
        logs = d.scale_tril.diagonal(dim1=-2, dim2=-1).log()
        return {"loc": d.loc, "scale_tril": torch.where(i == j, logs[..., i], d.scale_tril[..., i, j])}

    @override
    def directions(self, d: td.MultivariateNormal) -> Tensor:
        tril = d.scale_tril
        i, j = _triangle(tril)
        change = tril.new_zeros(tril.shape[:-2] + (len(i),) + tril.shape[-2:])
        each = torch.arange(len(i), device=tril.device)
        change[..., each, i, j] = torch.where(i == j, tril[..., i, j], 1.0)
        half = change @ tril.unsqueeze(-3).mT
        return half + half.mT

    @override
    def build(self, d: td.MultivariateNormal, parameters: Mapping[str, Tensor]) -> Distribution:  # type: ignore[override]
        tril = d.scale_tril
        if "scale_tril" in parameters:
            entries = parameters["scale_tril"]
            i, j = _triangle(tril)
            tril = entries.new_zeros(entries.shape[:-1] + tril.shape[-2:])
            tril[..., i, j] = torch.where(i == j, entries.exp(), entries)
        return td.MultivariateNormal(parameters.get("loc", d.loc), scale_tril=tril)


def _triangle(matrix: Tensor) -> Tensor:
    """Rows and columns of the lower triangle, row by row."""
    return torch.tril_indices(*matrix.shape[-2:], device=matrix.device)


@register_fisher(td.LowRankMultivariateNormal)
class LowRankMultivariateNormalFisher(GaussianFisher):
    r"""
    :math:`N(\mu, WW^\top + \operatorname{diag} D)` in :math:`(\mu, W, \log D)`, W row by row. F may be singular in W,
    whose columns can be rotated.
    """

    @override
    def parameters(self, d: td.LowRankMultivariateNormal) -> dict[str, Tensor]:  # type: ignore[override]
        return {"loc": d.loc, "cov_factor": d.cov_factor.flatten(-2), "log_cov_diag": d.cov_diag.log()}

    @override
    def directions(self, d: td.LowRankMultivariateNormal) -> Tensor:
        W, D = d.cov_factor, d.cov_diag
        unit = torch.eye(W.shape[-2], dtype=W.dtype, device=W.device)
        # d Sigma / d W[i, r] = e_i w_r^T + w_r e_i^T
        half = torch.einsum("ia,...br->...irab", unit, W).flatten(-4, -3)
        return torch.cat([half + half.mT, torch.diag_embed(D.unsqueeze(-1) * unit)], -3)

    @override
    def build(self, d: td.LowRankMultivariateNormal, parameters: Mapping[str, Tensor]) -> Distribution:  # type: ignore[override]
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

    @override
    def parameters(self, d: dist.OrderedLogistic) -> dict[str, Tensor]:  # type: ignore[override]
        cuts = d.cutpoints
        steps = torch.cat([cuts[..., :1], cuts.diff(dim=-1).log()], -1)
        return {"predictor": d.predictor.unsqueeze(-1), "steps": steps}

    @override
    def information(self, d: dist.OrderedLogistic) -> Tensor:  # type: ignore[override]
        cuts = d.cutpoints
        cumulative = torch.sigmoid(cuts - d.predictor.unsqueeze(-1))
        density = cumulative * (1 - cumulative)
        # rows: cumulative probabilities; columns: predictor, then v, with c_k = v_0 + sum_{0<j<=k} exp(v_j)
        widths = torch.cat([torch.ones_like(cuts[..., :1]), cuts.diff(dim=-1)], -1).unsqueeze(-2)
        by_step = torch.ones_like(widths).mT.mul(widths).tril().expand(density.shape + cuts.shape[-1:])
        slopes = density.unsqueeze(-1) * torch.cat([-torch.ones_like(by_step[..., :1]), by_step], -1)
        edge = torch.zeros_like(slopes[..., :1, :])
        gradient = torch.cat([slopes, edge], -2) - torch.cat([edge, slopes], -2)
        return gradient.mT @ (gradient / d.probs.unsqueeze(-1))

    @override
    def build(self, d: dist.OrderedLogistic, parameters: Mapping[str, Tensor]) -> Distribution:  # type: ignore[override]
        predictor = parameters["predictor"].squeeze(-1) if "predictor" in parameters else d.predictor
        cuts = d.cutpoints
        if "steps" in parameters:
            steps = parameters["steps"]
            cuts = torch.cat([steps[..., :1], steps[..., 1:].exp()], -1).cumsum(-1)
        return dist.OrderedLogistic(predictor, cuts, validate_args=False)
