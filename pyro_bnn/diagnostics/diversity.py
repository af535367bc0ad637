# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Do the components of a mixture differ?"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from pyro_bnn.infer.autoguide.mixture import AutoMixture
from pyro_bnn.infer.data import iter_batches
from pyro_bnn.infer.draws import component_draws
from pyro_bnn.infer.handlers import SubstituteMessenger, observed_names, unscaled_log_prob


@dataclass
class DiversityReport:
    r"""
    How much the components of a mixture differ, in predictions and in the guide.

    :param member_nll: negative log likelihood of each component, per observation, shape ``(K,)``.
    :param mixture_nll: that of the mixture, :math:`-\frac1N\sum_n \log \frac1K \sum_k p_k(y_n)`. Its distance to the
        mean of the members is what the mixture gains; it is 0 if the members have collapsed.
    :param disagreement: for categorical observations the share of the observations on which the most probable labels
        of two components differ; else ``None``. Shape ``(K, K)``.
    :param predictive_kl: mean divergence between the predictive distributions of two components, shape ``(K, K)``, or
        ``None`` if torch has no closed form.
    :param guide_kl: divergence between two components of the guide over all sites that have a density, shape
        ``(K, K)``.
    :param guide_distance: root mean square distance between the locations of two components, shape ``(K, K)``.
    :param site: name of the observed site.
    """

    member_nll: Tensor
    mixture_nll: float
    disagreement: Tensor | None
    predictive_kl: Tensor | None
    guide_kl: Tensor | None
    guide_distance: Tensor
    site: str
    num_observations: int = field(default=0)

    @property
    def gain(self) -> float:
        """The mean NLL of the members minus that of the mixture, in nats per observation."""
        return float(self.member_nll.mean()) - self.mixture_nll

    @property
    def collapsed(self) -> bool:
        """Whether the mixture gains less than 0.1 % over its members (or than 1e-4 nats per observation)."""
        return len(self.member_nll) > 1 and self.gain < max(1e-4, 1e-3 * abs(self.mixture_nll))

    def __str__(self) -> str:
        K = len(self.member_nll)
        lines = [
            f"{K} components on {self.num_observations} observations of {self.site!r}",
            f"  NLL of the members   {self.member_nll.min():.4f} to {self.member_nll.max():.4f}, mean "
            f"{self.member_nll.mean():.4f}",
            f"  NLL of the mixture   {self.mixture_nll:.4f} (gain {self.gain:.4f})",
        ]
        for name, value in (
            ("disagreement", self.disagreement),
            ("predictive KL", self.predictive_kl),
            ("KL in the guide", self.guide_kl),
            ("distance in the guide", self.guide_distance),
        ):
            if value is not None and K > 1:
                off = value[~torch.eye(K, dtype=torch.bool, device=value.device)]
                lines.append(f"  {name:20s} mean {off.mean():.4g}, smallest {off.min():.4g}")
        if self.collapsed:
            lines.append("  The members have collapsed: the mixture predicts like a single one of them.")
        return "\n".join(lines)


@torch.no_grad()
def diversity(
    model: Callable[..., Any], guide: AutoMixture, data: Any, *, num_samples: int = 8, site: str | None = None
) -> DiversityReport:
    """
    Measures whether the components of a mixture differ. They do collapse (BatchEnsemble in particular), and nothing in
    the loss shows it.

    :param model: the model.
    :param guide: a fitted mixture.
    :param data: one batch or an iterable of batches, with observations.
    :param int num_samples: draws per component, over which the predictions of a component are averaged.
    :param str site: the observed site, if there are several.
    :return: a report that prints itself.
    :raises ValueError: if the model has no such observed site.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("obs", dist.Normal(z, 1.0), obs=y)
        >>> y = torch.zeros(5)
        >>> guide = AutoMixture(model, 2, "delta", init_loc_fn=lambda site: torch.tensor(1.0)).initialize(y)
        >>> print(diversity(model, guide, y))  # doctest: +ELLIPSIS
        2 components on 5 observations of 'obs'
          NLL of the members   1.4189 to 1.4189, mean 1.4189
          NLL of the mixture   1.4189 (gain 0.0000)
          ...
          The members have collapsed: the mixture predicts like a single one of them.
    """
    K = guide.num_components
    draws = component_draws(guide, num_samples)
    log_probs: list[Tensor] = []
    labels: list[Tensor] = []
    divergence: Tensor | None = torch.zeros(K, K)
    for args, kwargs in iter_batches(data):
        functions: list[Any] = []
        rows = []
        for k in range(K):
            row = []
            for s in range(num_samples):
                with SubstituteMessenger({name: value[k, s] for name, value in draws.items()}):
                    trace = poutine.trace(model).get_trace(*args, **kwargs)
                name = _observed(trace, site)
                node = trace.nodes[name]
                row.append(unscaled_log_prob(node).flatten())
                functions.append(node["fn"])
            rows.append(torch.stack(row).logsumexp(0) - math.log(num_samples))
        log_probs.append(torch.stack(rows))
        base = functions[0]
        if isinstance(base, Categorical):
            probs = torch.stack([f.probs for f in functions]).unflatten(0, (K, num_samples)).mean(1)
            labels.append(probs.argmax(-1).flatten(1))
            functions = [Categorical(probs=p) for p in probs]
        else:
            functions = functions[::num_samples]
        try:
            if divergence is not None:
                for i, j in itertools.permutations(range(K), 2):
                    divergence[i, j] += kl_divergence(functions[i], functions[j]).sum().cpu()
        except NotImplementedError:
            divergence = None
    log_prob = torch.cat(log_probs, -1)
    N = log_prob.shape[-1]
    disagreement = None
    if labels:
        label = torch.cat(labels, -1)
        disagreement = (label[:, None] != label[None]).double().mean(-1)
    return DiversityReport(
        member_nll=-log_prob.mean(-1),
        mixture_nll=-float((log_prob.logsumexp(0) - math.log(K)).mean()),
        disagreement=disagreement,
        predictive_kl=None if divergence is None else divergence / N,
        guide_kl=_guide_kl(guide),
        guide_distance=_guide_distance(guide),
        site=name,
        num_observations=N,
    )


def _observed(trace: Any, site: str | None) -> str:
    names = observed_names(trace)
    if site is None and len(names) == 1:
        return names[0]
    if site in names:
        return site
    raise ValueError(
        f"site={site!r}, but the observed sites are {names}: name one of them, and pass data with observations."
    )


def _guide_kl(guide: AutoMixture) -> Tensor | None:
    """Closed form over the sites with a density; one row per first component."""
    K = guide.num_components
    total: Tensor | None = None
    functions = [fn for fn in guide.component_distributions().values() if not _is_delta(fn)]
    low_rank = guide._low_rank()
    for fn in [*functions, *([] if low_rank is None else [low_rank])]:
        rows = [kl_divergence(_component(fn, i), _component(fn, j)) for i in range(K) for j in range(K)]
        value = torch.stack(rows).view(K, K)
        total = value if total is None else total + value
    return total


def _is_delta(fn: Any) -> bool:
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def _component(fn: Any, k: int) -> Any:
    """Component k of a distribution of batch shape (K,)."""
    if isinstance(fn, torch.distributions.Independent):
        base = fn.base_dist
        return type(base)(base.loc[k], base.scale[k]).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, torch.distributions.LowRankMultivariateNormal):
        return type(fn)(fn.loc[k], fn.cov_factor[k], fn.cov_diag[k])
    return type(fn)(fn.loc[k], fn.scale[k])


def _guide_distance(guide: AutoMixture) -> Tensor:
    loc = guide.loc.detach()
    return (loc[:, None] - loc[None]).square().mean(-1).sqrt()
