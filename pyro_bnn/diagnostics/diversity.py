# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Do the components of a mixture differ?"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuideList
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Cauchy,
    LowRankMultivariateNormal,
    Normal,
    kl_divergence,
)
from typing_extensions import override

from pyro_bnn.diagnostics.chains import num_components
from pyro_bnn.diagnostics.scored import check_numbers, need, observed_only
from pyro_bnn.infer.autoguide.mixture import AutoMixture
from pyro_bnn.infer.predict.draws import Draws, component_draws, posterior_draws
from pyro_bnn.infer.predict.predictive import PosteriorPredictive, SitePrediction, posterior_predictive
from pyro_bnn.infer.predict.weighted import WeightedChains
from pyro_bnn.ops.described import Described
from pyro_bnn.ops.options import require_count


@dataclass(repr=False)
class DiversityReport(Described):
    r"""
    How much the components of a mixture differ, in predictions and in the guide.

    :param member_nll: negative log likelihood of each component, per observation, shape ``(K,)``.
    :param mixture_nll: that of the mixture, :math:`-\frac1N\sum_n \log \sum_k \pi_k p_k(y_n)`. Its distance to the
        weighted mean of the members is what the mixture gains; it is 0 if the members have collapsed.
    :param disagreement: for categorical and binary observations the share of the observations on which the most probable
        labels of two components differ; else ``None``. Shape ``(K, K)``.
    :param predictive_kl: divergence between the predictive distributions of two components, per observation, shape
        ``(K, K)``: exact for labels, elsewhere that of Normals with the same means and variances; ``None`` if there is
        no finite variance.
    :param guide_kl: divergence between two components of the guide over all sites that have a density, shape
        ``(K, K)``, or ``None`` without such sites.
    :param guide_distance: root mean square distance between the locations of two components in unconstrained space,
        shape ``(K, K)``; ``None`` for guides other than :class:`~pyro_bnn.infer.autoguide.AutoMixture`.
    :param site: name of the observed site.
    :param num_observations: N.
    :param weights: :math:`\pi_k`, shape ``(K,)``; ``None`` if the members count equally.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> from pyro_bnn import AutoMixture, diversity
        >>> report = diversity(model, AutoMixture(model, 2).initialize(x, x), (x, x), num_samples=8)
        >>> report.member_nll.shape, report.predictive_kl.shape
        (torch.Size([2]), torch.Size([2, 2]))
    """

    member_nll: Tensor
    mixture_nll: float
    disagreement: Tensor | None
    predictive_kl: Tensor | None
    guide_kl: Tensor | None
    guide_distance: Tensor | None
    site: str
    num_observations: int = 0
    weights: Tensor | None = None

    @property
    def gain(self) -> float:
        """The (weighted) mean NLL of the members minus that of the mixture, in nats per observation."""
        return float(self._mean_nll()) - self.mixture_nll

    def _mean_nll(self) -> Tensor:
        if self.weights is None:
            return self.member_nll.mean()
        counted = self.weights > 0
        return self.weights[counted] @ self.member_nll[counted]

    @property
    def collapsed(self) -> bool:
        """Whether the mixture gains less than 0.1 % over its members (or than 1e-4 nats per observation)."""
        return len(self.member_nll) > 1 and self.gain < max(1e-4, 1e-3 * abs(self.mixture_nll))

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        K, nll = len(self.member_nll), self.member_nll
        rows = {
            "NLL of the members": f"{nll.min():.4f} to {nll.max():.4f}, mean {self._mean_nll():.4f}",
            "NLL of the mixture": f"{self.mixture_nll:.4f} (gain {self.gain:.4f})",
        }
        pairs = {
            "disagreement": self.disagreement,
            "predictive KL": self.predictive_kl,
            "KL in the guide": self.guide_kl,
            "distance in the guide": self.guide_distance,
        }
        for name, value in pairs.items():
            if value is not None and K > 1:
                off = value[~torch.eye(K, dtype=torch.bool, device=value.device)]
                rows[name] = f"mean {off.mean():.4g}, smallest {off.min():.4g}"
        if self.collapsed:
            rows["The members have collapsed: the mixture predicts like a single one of them."] = ""
        return f"{K} components on {self.num_observations} observations of {self.site!r}", rows


@torch.no_grad()
def diversity(
    model: Callable[..., Any],
    guide: Any,
    data: Any,
    *,
    num_samples: int | None = None,
    site: str | None = None,
) -> DiversityReport:
    """
    Measures whether the components of a mixture, or the chains of a sampler, differ. Components do collapse (BatchEnsemble in
    particular), and nothing in the loss shows it.

    :param model: the model; the networks that it calls run in evaluation mode.
    :param guide: a fitted :class:`~pyro_bnn.infer.autoguide.AutoMixture`, an
        :class:`~pyro.infer.autoguide.AutoGuideList` with one, or an
        :class:`~pyro_bnn.infer.autoguide.AutoLaplaceMixture`; or stored chains, a :class:`~pyro_bnn.infer.ChainResult` or a
        :class:`~pyro_bnn.infer.autoguide.AutoEmpirical`, which are the components. Weights of components and chains count.
    :param data: one batch or an iterable of batches, with observations; masked ones do not count.
    :param int num_samples: draws per component, over which the predictions of a component are averaged; by default 8, and all
        of stored chains.
    :param str site: the observed site, if there are several.
    :return: a report that prints itself.
    :raises ValueError: if the model has no such observed site, the guide no components, or a density is NaN.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("obs", dist.Normal(z, 1.0), obs=y)
        >>> y = torch.zeros(5)
        >>> guide = AutoMixture(model, 2, init_scale=1e-6, init_loc_fn=lambda site: torch.tensor(1.0)).initialize(y)
        >>> print(diversity(model, guide, y))  # doctest: +ELLIPSIS
        2 components on 5 observations of 'obs'
          NLL of the members     1.4189 to 1.4189, mean 1.4189
          NLL of the mixture     1.4189 (gain ...0.0000)
          ...
          The members have collapsed: the mixture predicts like a single one of them.
    """
    draws, log_weights, mixture = _members_of(guide, num_samples)
    K, number = next(iter(draws.values())).shape[:2]
    prediction = posterior_predictive(model, {n: v.flatten(0, 1) for n, v in draws.items()}, data)
    name = _observed(prediction, site)
    found = _observed_part(prediction[name])
    log_prob = need(found.log_likelihood, "log_likelihood").unflatten(0, (K, number)).flatten(2)
    check_numbers(log_prob, "log_likelihood", infinite=True)
    log_prob = log_prob.logsumexp(1) - math.log(number)
    own = isinstance(mixture, AutoMixture)
    return DiversityReport(
        member_nll=-log_prob.mean(-1),
        mixture_nll=-float((log_prob + log_weights.to(log_prob).unsqueeze(-1)).logsumexp(0).mean()),
        disagreement=_disagreement(found, K),
        predictive_kl=_predictive_kl(found, K, log_prob.shape[-1]),
        guide_kl=_guide_kl(mixture) if own else None,
        guide_distance=_guide_distance(mixture) if own else None,
        site=name,
        num_observations=log_prob.shape[-1],
        weights=None if bool((log_weights == log_weights[0]).all()) else log_weights.exp().to(log_prob),
    )


def _members_of(guide: Any, num_samples: int | None) -> tuple[Draws, Tensor, Any]:
    """Draws of each component, by site of shape ``(K, n) + site shape``, the logarithms of their weights, and the mixture."""
    if isinstance(guide, WeightedChains):
        size = guide.num_draws if num_samples is None else num_samples
        require_count("num_samples", size)
        if size > guide.num_draws:
            raise ValueError(f"num_samples={size}, but there are {guide.num_draws} draws in each chain only.")
        weights = guide.draw_weights.unflatten(0, (guide.num_chains, -1))
        if not bool((weights == weights[:, :1]).all()):
            raise ValueError("diversity compares chains, but the draws of a chain have weights of their own.")
        index = torch.linspace(0, guide.num_draws - 1, size, dtype=torch.float64).long()
        return {n: v[:, index.to(v.device)] for n, v in guide.samples.items()}, weights.sum(1).log(), guide
    size = 8 if num_samples is None else num_samples
    parts = list(guide) if isinstance(guide, AutoGuideList) else [guide]
    mixture = _mixture(guide, parts)
    K = mixture.num_components
    draws = component_draws(mixture, size)
    part: Any
    for part in parts:
        if part is not mixture:  # drawn for each component
            stored = isinstance(part, WeightedChains)  # in the order of their chains
            drawn = part.sample_posterior((K * size,)) if stored else posterior_draws(part, K * size)
            draws |= {n: v.unflatten(0, (K, size)) for n, v in drawn.items()}
    equal = torch.full((K,), -math.log(K), dtype=torch.float64)
    return draws, equal if getattr(mixture, "equal_weights", True) else mixture.log_weights.detach(), mixture


def _mixture(guide: Any, parts: list[Any]) -> Any:
    mixtures = [part for part in parts if num_components(part) is not None]
    if len(mixtures) == 1:
        return mixtures[0]
    raise ValueError(
        f"diversity compares the components of one mixture, but the guide, of type {type(guide).__name__}, holds {len(mixtures)}: pass an "
        "AutoMixture, an AutoGuideList with one, an AutoLaplaceMixture, or stored chains."
    )


def _observed(prediction: PosteriorPredictive, site: str | None) -> str:
    names = [name for name, found in prediction.items() if found.log_likelihood is not None]
    if site not in names and (site is not None or len(names) != 1):
        raise ValueError(
            f"site={site!r}, but the observed sites are {names}: name one of them, and pass data with observations."
        )
    return site or names[0]


def _observed_part(found: SitePrediction) -> SitePrediction:
    """A prediction without its masked entries, whose dimensions are flattened if there are any."""
    given = {name: getattr(found, name) for name in ("mean", "variance", "log_likelihood")}
    kept: dict[str, Any] = {
        n: None if value is None else observed_only(value, found.mask, 1) for n, value in given.items()
    }
    return replace(found, samples=None, **kept)


def _members(value: Tensor, K: int, keep: int = 0) -> Tensor:
    """The mean of each component over its draws, shape (K, everything else but the last ``keep`` dimensions, ...)."""
    mean = value.unflatten(0, (K, -1)).mean(1)
    return mean.reshape(K, -1, *mean.shape[mean.dim() - keep :])


def _disagreement(found: SitePrediction, K: int) -> Tensor | None:
    if found.kind == "numeric" or found.mean is None:
        return None
    classes = found.kind == "classes"
    probs = _members(found.mean, K, keep=int(classes))
    labels = probs.argmax(-1) if classes else probs > 0.5
    return (labels[:, None] != labels[None]).double().mean(-1)


def _predictive_kl(found: SitePrediction, K: int, num_observations: int) -> Tensor | None:
    mean, variance = found.mean, found.variance
    if mean is None or variance is None:
        return None
    make: Callable[..., Any] = {"classes": Categorical, "binary": Bernoulli}.get(found.kind, Normal)
    parameters = [_members(mean, K, keep=int(found.kind == "classes"))]
    if found.kind == "numeric":
        between = mean.unflatten(0, (K, -1)).var(1, correction=0).reshape(K, -1)
        scale = (_members(variance, K) + between).sqrt()
        if not (scale.isfinite() & (scale > 0)).all():
            return None
        parameters.append(scale)
    p, q = (make(*(t.unsqueeze(dim).expand(K, K, *t.shape[1:]) for t in parameters)) for dim in (1, 0))
    return kl_divergence(p, q).sum(-1) / num_observations


def _guide_kl(guide: AutoMixture) -> Tensor | None:
    """Closed form, in unconstrained space, over the sites with a density; one row per first component."""
    pairs: list[Tensor] = []
    for site, loc, scale in guide._blocks():
        if scale is not None and site.kind != "low_rank":
            make = Cauchy if site.kind == "cauchy" else Normal
            p, q = (make(loc.unsqueeze(dim), scale.unsqueeze(dim)) for dim in (1, 0))
            pairs.append(kl_divergence(p, q).flatten(2).sum(-1) if site.raw_shape else kl_divergence(p, q))
    joint = guide._low_rank()
    if joint is not None:
        parts = (joint.loc, joint.cov_factor, joint.cov_diag)
        first, second = (LowRankMultivariateNormal(*(t.unsqueeze(dim) for t in parts)) for dim in (1, 0))
        pairs.append(kl_divergence(first, second))
    return torch.stack(pairs).sum(0) if pairs else None


def _guide_distance(guide: AutoMixture) -> Tensor:
    if not guide._mixed:
        return torch.zeros(guide.num_components, guide.num_components)
    loc = guide.loc.detach()
    return (loc[:, None] - loc[None]).square().mean(-1).sqrt()
