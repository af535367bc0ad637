# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The Gaussian that a linearised model has at an observed site, and the predictive distributions that it gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyro.distributions as dist
import torch
import torch.distributions as td
from torch import Tensor

from pyro_bnn.distributions.equal_mixture import EqualMixture
from pyro_bnn.infer.packed import SiteOutputs
from pyro_bnn.ops.fisher import matrix_square_root


@dataclass
class LinearizedOutputs:
    r"""
    Gaussian over the parameters of an observed site: :math:`\phi(x) \sim N(\hat\phi, J P^{-1} J^\top)`.

    :ivar mean: shape ``shape + (C,)``; for a Normal likelihood with fixed scale C = 1 and it is the location,
        for a Categorical C is the number of classes and it holds the logits.
    :ivar covariance: shape ``shape + (C, C)``.
    :ivar names: which parameters, in order, e.g. ``("loc",)`` or ``("loc", "log_scale")``.
    :ivar site: builds the site's distribution at given parameters.
    """

    mean: Tensor
    covariance: Tensor
    names: tuple[str, ...]
    site: SiteOutputs

    @property
    def variance(self) -> Tensor:
        """Marginal variances of the parameters, shape ``shape + (C,)``."""
        return self.covariance.diagonal(dim1=-2, dim2=-1)

    def sample(self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None) -> Tensor:
        """
        :param sample_shape: leading shape of the draws.
        :param generator: source of random numbers; torch's default if ``None``.
        :return: parameters drawn independently for each element, shape ``sample_shape + shape + (C,)``.
        """
        root = matrix_square_root(self.covariance)
        noise = torch.randn(
            tuple(sample_shape) + self.mean.shape,
            dtype=self.mean.dtype,
            device=self.mean.device,
            generator=generator,
        )
        return self.mean + (root @ noise.unsqueeze(-1)).squeeze(-1)

    def distribution(
        self,
        method: Literal["auto", "probit", "bridge", "monte_carlo"] = "auto",
        *,
        num_samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> td.Distribution:
        r"""
        The predictive distribution.

        ``"auto"``: in closed form where there is one, else ``"monte_carlo"``. Exact for Normal and LogNormal
        likelihoods in their location, :math:`N(\hat\phi, v + \sigma^2)`, and for (low-rank) MultivariateNormal ones,
        :math:`N(\hat\phi, V + \Sigma)`; ``"probit"`` for Bernoulli and Categorical.

        ``"probit"``: Bernoulli logits divided by :math:`\sqrt{1 + \pi v/8}` (MacKay, 1992); for K classes

        .. math:: p_k \propto \Big(\sum_l \exp\frac{\mu_l - \mu_k}{\sqrt{1 + \tfrac\pi8\operatorname{Var}(\phi_k - \phi_l)}}\Big)^{-1}

        (Gibbs, 1997; Lu, Ie, Sha, 2020), which is the former for two classes, and like the softmax does not change when
        a random constant is added to all logits.

        ``"bridge"``: Categorical at the mean of the Dirichlet that the Laplace bridge finds (Hobbhahn et al., 2022).

        ``"monte_carlo"``: any likelihood, an equal mixture over ``num_samples`` draws of the linearised parameters.

        :param str method: see above.
        :param num_samples: draws for ``"monte_carlo"``.
        :param generator: source of random numbers for ``"monte_carlo"``.
        :return: the distribution of the site.
        :raises ValueError: if the likelihood does not have this form.
        """
        logits = self.names == ("logits",)
        if method == "auto":
            closed = self._closed_form()
            if closed is not None:
                return closed
            method = "probit" if logits and self._is_classifier() else "monte_carlo"
        if method == "monte_carlo":
            return EqualMixture(self.site.build(self.sample((num_samples,), generator=generator)))
        if method == "bridge":
            if not logits or self.mean.shape[-1] < 2:
                raise ValueError(
                    f"method='bridge' needs a Categorical likelihood, found {type(self.site.base)}"
                )
            return self.site.build(self.bridge().mean.log())
        if method != "probit":
            raise ValueError(
                f"unknown method {method!r}, expected 'auto', 'probit', 'bridge' or 'monte_carlo'"
            )
        if not logits or not self._is_classifier():
            raise ValueError(
                f"method='probit' needs a Bernoulli or Categorical likelihood, found {type(self.site.base)}"
            )
        return self.site.build(self._probit())

    def _is_classifier(self) -> bool:
        return isinstance(self.site.base, (td.Bernoulli, td.Categorical, td.OneHotCategorical))

    def _closed_form(self) -> td.Distribution | None:
        """The exact predictive of the linearised model, for Gaussian likelihoods in their location."""
        base = self.site.base
        if self.names != ("loc",):
            return None
        if isinstance(base, (td.Normal, td.LogNormal)):
            scale = (self.variance.squeeze(-1) + base.scale.detach().square()).sqrt()
            family = dist.LogNormal if isinstance(base, td.LogNormal) else dist.Normal
            d: td.Distribution = family(self.mean.squeeze(-1), scale)
        elif isinstance(base, (td.MultivariateNormal, td.LowRankMultivariateNormal)):
            d = dist.MultivariateNormal(self.mean, self.covariance + base.covariance_matrix.detach())
        else:
            return None
        return td.Independent(d, self.site.event_dim) if self.site.event_dim else d

    def _probit(self) -> Tensor:
        """Logits that give the approximate class probabilities."""
        variance = self.variance
        if self.mean.shape[-1] == 1:
            return self.mean / (1 + torch.pi / 8 * variance).sqrt()
        spread = variance.unsqueeze(-1) + variance.unsqueeze(-2) - 2 * self.covariance
        gaps = self.mean.unsqueeze(-2) - self.mean.unsqueeze(-1)
        return -(gaps / (1 + torch.pi / 8 * spread.clamp(min=0)).sqrt()).logsumexp(-1)

    def bridge(self) -> td.Dirichlet:
        r"""
        The Dirichlet over class probabilities by the Laplace bridge (Hobbhahn et al., 2022, equation (5)), after
        centring the logits, which does not change the classes' probabilities:
        :math:`\alpha_k = \frac{1}{\Sigma_{kk}}\left(1 - \frac2K + \frac{e^{\mu_k}}{K^2}\sum_l e^{-\mu_l}\right)`.

        :return: a Dirichlet of batch shape ``shape``.
        """
        mean = self.mean - self.mean.mean(-1, keepdim=True)
        rows = self.covariance - self.covariance.mean(-1, keepdim=True)
        variance = (rows - rows.mean(-2, keepdim=True)).diagonal(dim1=-2, dim2=-1)
        K = mean.shape[-1]
        rest = mean.exp() * (-mean).exp().sum(-1, keepdim=True) / K**2
        return td.Dirichlet((1 - 2 / K + rest) / variance)
