# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The Gaussian that a linearised model has at an observed site, and the predictive distributions that it gives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from typing_extensions import override

from pyro_bnn.distributions.joint_normal import JointNormal, block_diagonal, cholesky
from pyro_bnn.distributions.mixture import EqualMixture
from pyro_bnn.model.packed import SiteOutputs
from pyro_bnn.ops.described import Described, first_of, shape_of, span_of
from pyro_bnn.ops.families import of_family
from pyro_bnn.ops.square_root import symmetric_root


def require_slopes(name: str, found: Tensor, outputs: Tensor) -> None:
    """Raises where what a Jacobian gives is not finite, although the parameters of the site are."""
    if not bool(found.isfinite().all()) and bool(outputs.isfinite().all()):
        bad = int((~found.isfinite()).sum())
        raise ValueError(
            f"site {name!r}: its parameters have no finite derivative in the latents at some data points ({bad} of "
            f"{found.numel()} numbers): a root or norm at zero has none. Predict by draws through the model itself, with "
            "guide.sample_posterior."
        )


@dataclass(repr=False)
class LinearizedOutputs(Described):
    r"""
    Gaussian over the parameters of an observed site: :math:`\phi(x) \sim N(\hat\phi, J P^{-1} J^\top)`.

    :ivar mean: shape ``shape + (C,)``; for a Normal likelihood with fixed scale C = 1 and it is the location,
        for a Categorical C is the number of classes and it holds the logits.
    :ivar covariance: shape ``shape + (C, C)``.
    :ivar names: which parameters, in order, e.g. ``("loc",)`` or ``("loc", "log_scale")``.
    :ivar site: builds the site's distribution at given parameters.
    :ivar joint: :attr:`event_covariance`, or a function that computes it; only of sites with event dimensions.
    :ivar differentiable: whether mean and covariance have their graph to the arguments of the model, and distributions keep it.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> from pyro_bnn import AutoLaplace
        >>> guide = AutoLaplace(model).initialize(x, x).polish((x, x)).laplace_approximation((x, x))
        >>> outputs = guide.linearized_outputs(x)["obs"]
        >>> outputs.mean.shape, outputs.covariance.shape, outputs.names
        (torch.Size([3, 1]), torch.Size([3, 1, 1]), ('loc',))
    """

    mean: Tensor
    covariance: Tensor
    names: tuple[str, ...]
    site: SiteOutputs
    joint: Tensor | Callable[[], Tensor] | None = None
    differentiable: bool = False

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        base = type(self.site.base).__name__
        return f"Gaussian over the parameters of site {self.site.name!r} ({base})", {
            "parameters": first_of(self.names) if self.names else "none depends on the latents",
            "mean": f"{shape_of(self.mean)}: {span_of(self.mean)}",
            "standard deviation": span_of(self.variance.clamp(min=0).sqrt()),
        }

    @property
    def variance(self) -> Tensor:
        """Marginal variances of the parameters, shape ``shape + (C,)``."""
        return self.covariance.diagonal(dim1=-2, dim2=-1)

    @property
    def event_size(self) -> int:
        """E, how many elements an observation has: the size of the site's event dimensions in ``shape``."""
        shape = self.mean.shape[:-1]
        return shape[len(shape) - self.site.event_dim :].numel()

    @property
    def event_covariance(self) -> Tensor:
        """
        The covariance of all parameters of an observation, the elements of its event dimensions one after the other: they
        are functions of the same latents. Shape ``batch_shape + (E C, E C)``.
        """
        if self.event_size == 1 or not self.mean.shape[-1]:
            shape = self.mean.shape[: self.mean.dim() - 1 - self.site.event_dim]
            return self.covariance.reshape(shape + self.covariance.shape[-2:])
        if self.joint is None:
            raise ValueError(
                f"site {self.site.name!r} has observations of {self.event_size} elements, whose joint covariance is not known: "
                "take the outputs from guide.linearized_outputs."
            )
        if not isinstance(self.joint, Tensor):
            self.joint = self.joint()
        return self.joint

    def sample(self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None) -> Tensor:
        """
        :param sample_shape: leading shape of the draws.
        :param generator: source of random numbers; torch's default if ``None``.
        :return: parameters drawn independently for each observation and jointly for the elements of its event dimensions,
            shape ``sample_shape + shape + (C,)``.
        """
        root = symmetric_root(self.event_covariance)
        noise = torch.randn(
            tuple(sample_shape) + root.shape[:-1],
            dtype=self.mean.dtype,
            device=self.mean.device,
            generator=generator,
        )
        moves = (root @ noise.unsqueeze(-1)).squeeze(-1)
        return self.mean + moves.reshape(tuple(sample_shape) + self.mean.shape)

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
        :math:`N(\hat\phi, V + \Sigma)`; ``"probit"`` for Bernoulli and Categorical. The elements of an observation
        (``to_event``) are independent given the latents, not given the input: Gaussian likelihoods have their joint
        covariance, and labels are predicted by ``"monte_carlo"``.

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
        if method not in ("auto", "probit", "bridge", "monte_carlo"):
            raise ValueError(
                f"unknown method {method!r}, expected 'auto', 'probit', 'bridge' or 'monte_carlo'"
            )
        if method == "auto":
            closed = self._closed_form()
            if closed is not None:
                return closed
            method = "probit" if self._is_classifier() and self.event_size == 1 else "monte_carlo"
        if method == "monte_carlo":
            return EqualMixture(self.site.build(self.sample((num_samples,), generator=generator)))
        self._require_labels(method)
        return self.site.build(self._probit() if method == "probit" else self.bridge().mean.log())

    def _require_labels(self, method: str) -> None:
        """Refuses a likelihood that has no approximation by a method for single labels."""
        if self.event_size > 1:
            raise ValueError(
                f"method={method!r} gives the probabilities of each label by itself, but an observation of site "
                f"{self.site.name!r} has {self.event_size} labels (to_event), which are correlated through the latents: use "
                "method='monte_carlo', or declare them independent observations (a plate) in the model."
            )
        bridge = method == "bridge"
        fits = self.names == ("logits",) and self.mean.shape[-1] > 1 if bridge else self._is_classifier()
        if not fits:
            needed = "Categorical" if bridge else "Bernoulli or Categorical"
            raise ValueError(f"method={method!r} needs a {needed} likelihood, found {type(self.site.base)}")

    def _is_classifier(self) -> bool:
        return self.names == ("logits",) and of_family(
            self.site.base, td.Bernoulli, td.Categorical, td.OneHotCategorical
        )

    @property
    def noise(self) -> Tensor | None:
        """
        The covariance of each element's noise given its location, shape ``shape + (C, C)``, of Gaussian likelihoods in which
        nothing else depends on the latents; ``None`` of others.
        """
        base: Any = self.site.base
        if self.names != ("loc",):
            return None
        if of_family(base, td.Normal, td.LogNormal):
            noise = base.scale.square()[..., None, None]
        elif of_family(base, td.MultivariateNormal, td.LowRankMultivariateNormal):
            noise = base.covariance_matrix
        else:
            return None
        return noise if self.differentiable else noise.detach()

    def _closed_form(self) -> td.Distribution | None:
        """The exact predictive of the linearised model, for Gaussian likelihoods in their location."""
        noise, base = self.noise, self.site.base
        if noise is None:
            return None
        logs, vectors = isinstance(base, td.LogNormal), bool(base.event_shape)
        mean = self.mean if vectors else self.mean.squeeze(-1)
        if self.event_size == 1 and not vectors:
            scale = (self.variance + noise.squeeze(-1)).sqrt().squeeze(-1)
            d: td.Distribution = (dist.LogNormal if logs else dist.Normal)(mean, scale)
            return td.Independent(d, self.site.event_dim) if self.site.event_dim else d
        covariance = self._joint_covariance(noise)
        if self.site.event_dim + vectors == 1 and not logs:
            return dist.MultivariateNormal(mean, scale_tril=cholesky(covariance))
        return JointNormal(mean, covariance, self.site.event_dim + vectors, log=logs)

    def _joint_covariance(self, noise: Tensor) -> Tensor:
        """The covariance of an observation: that of its parameters, and its elements' noise, shape batch + (E C, E C)."""
        joint = self.event_covariance
        E, C = self.event_size, self.mean.shape[-1]
        blocks = noise.expand(self.mean.shape + (C,)).reshape(joint.shape[:-2] + (E, C, C))
        return joint + block_diagonal(blocks)

    def log_density(
        self, value: Tensor, *, num_samples: int = 100, generator: torch.Generator | None = None
    ) -> Tensor:
        """
        The log predictive density of observations, in which those that the model masks have no part.

        :param value: observations of the site; anything stands in place of masked ones.
        :param num_samples: see :meth:`distribution`.
        :param generator: see :meth:`distribution`.
        :return: shape ``batch_shape``, zero where all of an observation is masked; nats.
        """
        site = self.site
        observed = site.weight > 0
        value = value.expand(observed.shape + site.base.event_shape)
        if bool(observed.all()):
            return self.distribution(num_samples=num_samples, generator=generator).log_prob(value)
        # values that the distribution can take, without a part in the density
        with torch.random.fork_rng(devices=()):
            filler = site.build(self.mean).sample().to(value.dtype)
        some = observed.reshape(observed.shape + (1,) * len(site.base.event_shape))
        value = torch.where(some, value, filler)
        events = observed.reshape(observed.shape[: observed.dim() - site.event_dim] + (-1,))
        partly = events.any(-1) & ~events.all(-1)
        if not bool(partly.any()):
            density = self.distribution(num_samples=num_samples, generator=generator).log_prob(value)
            return torch.where(events.any(-1), density, 0.0)
        noise = self.noise
        if noise is not None:
            return self._gaussian_density(value, events, noise)
        parts = site.build(self.sample((num_samples,), generator=generator))
        base = parts.base_dist if isinstance(parts, td.Independent) else parts
        return EqualMixture(td.Independent(MaskedDistribution(base, observed), site.event_dim)).log_prob(
            value
        )

    def _gaussian_density(self, value: Tensor, events: Tensor, noise: Tensor) -> Tensor:
        """The density of the observed elements alone, ``events`` of shape batch + (E,)."""
        covariance = self._joint_covariance(noise)
        keep = events.repeat_interleave(self.mean.shape[-1], -1)
        flat, loc = value.reshape(keep.shape), self.mean.reshape(keep.shape)
        logs = flat.log() if isinstance(self.site.base, td.LogNormal) else None
        rest = torch.where(keep, (flat if logs is None else logs) - loc, 0.0)
        # elements that are left out: independent, at their mean, with a density of one there
        pairs = keep.unsqueeze(-1) & keep.unsqueeze(-2)
        alone = torch.eye(keep.shape[-1], dtype=covariance.dtype, device=covariance.device) / (2 * torch.pi)
        d = dist.MultivariateNormal(
            torch.zeros_like(rest), scale_tril=cholesky(torch.where(pairs, covariance, alone))
        )
        density = d.log_prob(rest)
        return density if logs is None else density - torch.where(keep, logs, 0.0).sum(-1)

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
