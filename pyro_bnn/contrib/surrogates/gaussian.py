# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Linearised networks as Gaussian processes, and mixtures of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributions as td
import torch.nn.functional as F
from botorch.models.model import FantasizeMixin
from botorch.posteriors import GPyTorchPosterior
from botorch.posteriors.fully_bayesian import MCMC_DIM, GaussianMixturePosterior
from torch import Tensor

from pyro_bnn.contrib.surrogates.base import (
    Arguments,
    Surrogate,
    check_rows,
    multivariate,
    only_site,
    rows_alone,
)
from pyro_bnn.distributions.joint_normal import block_diagonal, cholesky
from pyro_bnn.infer.autoguide import AutoLaplaceMixture
from pyro_bnn.infer.autoguide.linearized import LinearizedGuide
from pyro_bnn.ops.families import of_family

#: Likelihoods whose first parameter is the mean of the observation.
_GAUSSIAN = (td.Normal, td.MultivariateNormal, td.LowRankMultivariateNormal)


@dataclass
class Observed:
    """
    What the linearised Gaussian was conditioned on: n values, with basis functions W, shape ``batch + (n, r)``, the residuals at
    the prior mean, ``batch + (n,)``, and the covariance of their noise, ``batch + (n, n)``.
    """

    basis: Tensor
    residual: Tensor
    noise: Tensor

    def joined(self, other: "Observed") -> "Observed":
        """Both."""
        shapes = [(o.basis.shape[:-2], o.residual.shape[:-1], o.noise.shape[:-2]) for o in (self, other)]
        b, r, n = (torch.broadcast_shapes(*pair) for pair in zip(*shapes, strict=True))
        first, second = self.noise.shape[-1], other.noise.shape[-1]
        noise = F.pad(self.noise, (0, second, 0, second)).expand(n + (first + second,) * 2)
        noise = noise + F.pad(other.noise, (first, 0, first, 0))
        basis = [o.basis.expand(b + o.basis.shape[-2:]) for o in (self, other)]
        residual = [o.residual.expand(r + o.residual.shape[-1:]) for o in (self, other)]
        return Observed(torch.cat(basis, -2), torch.cat(residual, -1), noise)

    def given(self, basis: Tensor) -> tuple[Tensor, Tensor]:
        """What observing adds to the mean, ``batch + (m,)``, and to the covariance, of outputs with ``basis``, ``batch + (m, r)``."""
        root = cholesky(self.basis @ self.basis.mT + self.noise)
        half = torch.linalg.solve_triangular(root, self.basis @ basis.mT, upper=False)  # (n, m)
        white = torch.linalg.solve_triangular(root, self.residual.unsqueeze(-1), upper=False)
        return (half.mT @ white).squeeze(-1), -(half.mT @ half)


class LaplaceModel(Surrogate, FantasizeMixin):  # type: ignore[misc]  # the mixin's posterior takes anything
    r"""
    The Gaussian process of a linearised network: mean :math:`\phi(x; \hat u)`, covariance
    :math:`J(x) P^{-1} J(x')^\top`, over all q points and m outputs of a batch.

    :meth:`condition_on_observations` is exact for the linearised model: a network that is linear in its weights is the Gaussian
    process with this covariance.

    :param guide: a fitted :class:`~pyro_bnn.infer.autoguide.AutoLaplace` or
        :class:`~pyro_bnn.infer.autoguide.AutoHessianFreeLaplace` with a Gaussian likelihood. It is not copied.
    :param site: see :func:`surrogate`.
    :param num_outputs: see :func:`surrogate`.
    :param arguments: see :func:`surrogate`.
    :param input_transform: see :func:`surrogate`.
    :param outcome_transform: see :func:`surrogate`.
    :param outputs: the numbers of the outputs; all by default.
    """

    likelihood = None  # the noise is that of the Pyro model

    def __init__(
        self,
        guide: LinearizedGuide,
        *,
        site: str | None = None,
        num_outputs: int = 1,
        arguments: Arguments = rows_alone,
        input_transform: Any = None,
        outcome_transform: Any = None,
        outputs: Sequence[int] | None = None,
        observed: Observed | None = None,
    ) -> None:
        guide.posterior  # noqa: B018  raises before laplace_approximation
        self.site = only_site(guide.packed.observed, site)
        super().__init__(
            num_outputs,
            outputs=outputs,
            guide=guide,
            site=self.site,
            arguments=arguments,
            input_transform=input_transform,
            outcome_transform=outcome_transform,
            observed=observed,
        )
        self._guide = (guide,)  # in a tuple it is no submodule, whose posterior every ``to`` would make anew
        self._arguments = arguments
        self._observed = observed
        self._locations = 0  # parameters of an element that are its mean, found by the first call
        self._compared = False

    @property
    def batch_shape(self) -> torch.Size:
        """That of the observations that the model was conditioned on."""
        seen = self._observed
        return (
            torch.Size()
            if seen is None
            else torch.broadcast_shapes(seen.basis.shape[:-2], seen.residual.shape[:-1])
        )

    def _functions(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """The mean, ``batch + (q, m)``, and basis functions, ``batch + (q m, r)``, at points, of all outputs."""
        (guide,), rows = self._guide, X.reshape(-1, X.shape[-1])
        arguments = self._arguments(rows.to(guide.loc.dtype))
        mean, basis = guide.basis_functions(*arguments, differentiable=_has_graph(X))[self.site]
        self._check(X, mean)
        mean, basis = mean[..., : self._locations], basis[..., : self._locations, :]
        mean = mean.reshape(X.shape[:-1] + (-1,))
        self._require_outputs(mean.shape[-1])
        basis = basis.reshape(X.shape[:-2] + (mean.shape[-2:].numel(), basis.shape[-1]))
        return mean.to(X.dtype), basis.to(X.dtype)

    @torch.no_grad()
    def _check(self, X: Tensor, mean: Tensor) -> None:
        """By the first points: the likelihood, the rows, and that points have the same mean in other company."""
        first = X.reshape(-1, *X.shape[-2:])[0]
        if self._compared or (self._locations and X.dim() < 3):
            return
        (guide,) = self._guide
        alone = guide.linearized_outputs(*self._arguments(first.to(guide.loc.dtype)))[self.site]
        names, sizes, base = alone.names, alone.site.sizes, alone.site.base
        if not of_family(base, *_GAUSSIAN) or names[:1] != ("loc",):
            raise ValueError(
                f"site {self.site!r} is {type(base).__name__}, whose mean is no linear function of the linearised parameters "
                f"{names}: LaplaceModel needs a Normal or MultivariateNormal likelihood. Use DrawsModel(model, guide)."
            )
        check_rows(self.site, X, mean, alone.mean)
        self._locations = sizes[0]
        self._compared = X.dim() > 2

    def _noise(self, X: Tensor) -> Tensor:
        """The covariance of the noise at points, ``batch + (q m, q m)``, of all outputs."""
        (guide,), rows = self._guide, X.reshape(-1, X.shape[-1])
        arguments = self._arguments(rows.to(guide.loc.dtype))
        noise = guide.linearized_outputs(*arguments, differentiable=_has_graph(X))[self.site].noise
        if noise is None:
            raise ValueError(
                f"the noise of site {self.site!r} depends on the latents, so that observations are not Gaussian: give "
                "observation_noise= (posterior) or noise= (condition_on_observations), variances of shape batch + (q, m)."
            )
        noise = block_diagonal(noise.reshape((len(rows), -1) + noise.shape[-2:]))
        return block_diagonal(noise.reshape(X.shape[:-1] + noise.shape[-2:])).to(X.dtype)

    def _joint(self, X: Tensor, observation_noise: bool | Tensor) -> GPyTorchPosterior:
        mean, covariance = self.moments(X, observation_noise)
        return GPyTorchPosterior(multivariate(mean, covariance))

    def moments(self, X: Tensor, observation_noise: bool | Tensor) -> tuple[Tensor, Tensor]:
        """Mean, ``batch + (q, m)``, and covariance, ``batch + (q m, q m)``."""
        mean, basis = self._functions(X)
        covariance = basis @ basis.mT
        if self._observed is not None:
            shift, change = self._observed.given(basis)
            mean = mean + shift.reshape(shift.shape[:-1] + mean.shape[-2:])
            covariance = covariance + change
            shape = torch.broadcast_shapes(mean.shape[:-2], covariance.shape[:-2])
            mean = mean.expand(shape + mean.shape[-2:])
            covariance = covariance.expand(shape + covariance.shape[-2:])
        if isinstance(observation_noise, Tensor):
            covariance = covariance + torch.diag_embed(observation_noise.expand(mean.shape).flatten(-2))
        elif observation_noise:
            covariance = covariance + self._noise(X)
        return mean, covariance

    def condition_on_observations(
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> "LaplaceModel":
        r"""
        The model given further observations: the exact posterior of the linearised network, whose precision grows by
        :math:`J^\top \Sigma^{-1} J`. The linearisation stays where it is; where observations move the network far, fit again.

        :param X: points, shape ``batch + (n, d)``.
        :param Y: observations, ``batch' + (n, m)``, whose batch may have more dimensions on the left (fantasies).
        :param noise: variances in the space of transformed outcomes, in the shape of Y; by default those of the likelihood.
        :return: the conditioned model, of the batch shape of Y.
        :raises ValueError: if the noise of the likelihood depends on the latents and none is given.
        """
        X = self.transform_inputs(X)
        if hasattr(self, "outcome_transform"):
            transform = self.outcome_transform
            whole = self._outputs == list(range(self._all_outputs))
            Y, _ = (transform if whole else transform.subset_output(self._outputs))(Y, X=X)
        mean, basis = self._functions(X)
        points = torch.arange(mean.shape[-2], device=X.device).unsqueeze(-1)
        keep = (points * mean.shape[-1] + torch.tensor(self._outputs, device=X.device)).reshape(-1)
        if noise is None:
            covariance = self._noise(X)[..., keep[:, None], keep]
        else:
            covariance = torch.diag_embed(noise.flatten(-2))
        new = Observed(basis[..., keep, :], (Y - mean[..., self._outputs]).flatten(-2), covariance)
        seen = new if self._observed is None else self._observed.joined(new)
        return type(self)(**(self._options | {"observed": seen}), outputs=self._outputs)


class LaplaceMixtureModel(Surrogate):
    """
    The mixture of the Gaussian processes of several linearised networks, one for each mode. Acquisition functions take it
    for an ensemble of models in an additional batch dimension, whose values they average: exact for expected improvement.

    :param guide: a fitted :class:`~pyro_bnn.infer.autoguide.AutoLaplaceMixture` with equal weights and a Gaussian likelihood.
    :param site: see :func:`surrogate`.
    :param num_outputs: see :func:`surrogate`.
    :param arguments: see :func:`surrogate`.
    :param input_transform: see :func:`surrogate`.
    :param outcome_transform: see :func:`surrogate`.
    :param outputs: the numbers of the outputs; all by default.
    :raises ValueError: if the components have different weights: BoTorch counts the models of an ensemble equally.
    """

    _is_ensemble = True  # BoTorch's mark of models whose members are in the last batch dimension

    def __init__(
        self, guide: AutoLaplaceMixture, *, outputs: Sequence[int] | None = None, **options: Any
    ) -> None:
        if not guide.equal_weights:
            raise ValueError(
                f"the components of the guide have weights={guide.weights!r}, and BoTorch counts the models of an ensemble "
                "equally: use AutoLaplaceMixture(..., weights='equal')."
            )
        inner = {name: options[name] for name in ("site", "arguments", "num_outputs") if name in options}
        members = [LaplaceModel(component, **inner) for component in guide.components]
        transforms = {name: options.get(name) for name in ("input_transform", "outcome_transform")}
        super().__init__(outputs=outputs, guide=guide, **({"num_outputs": 1} | inner | transforms))
        self._members = tuple(members)

    @property
    def batch_shape(self) -> torch.Size:
        """One dimension for the components."""
        return torch.Size((len(self._members),))

    def _joint(self, X: Tensor, observation_noise: bool | Tensor) -> GPyTorchPosterior:
        moments = [member.moments(X, observation_noise) for member in self._members]
        mean, covariance = (torch.stack(parts, MCMC_DIM) for parts in zip(*moments, strict=True))
        return GaussianMixturePosterior(multivariate(mean, covariance))


def _has_graph(X: Tensor) -> bool:
    """Whether gradients in some points are wanted."""
    return torch.is_grad_enabled() and X.requires_grad
