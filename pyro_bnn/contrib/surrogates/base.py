# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What the surrogate models of BoTorch have in common: transforms, outputs, and the check that rows are points."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from botorch.models.model import Model
from botorch.posteriors import GPyTorchPosterior, Posterior
from botorch.posteriors.ensemble import EnsemblePosterior
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from linear_operator import to_linear_operator
from torch import Tensor

from pyro_bnn.model.plates import close

#: Makes the positional arguments of a Pyro model from rows, shape (N, d).
Arguments = Callable[[Tensor], Sequence[Any]]


def rows_alone(rows: Tensor) -> Sequence[Any]:
    """Rows as the only argument."""
    return (rows,)


class Surrogate(Model):
    """What all have in common: transforms, outputs, and one posterior of several outputs of which some are wanted."""

    input_transform: Any
    outcome_transform: Any

    def __init__(self, num_outputs: int, *, outputs: Sequence[int] | None, **options: Any) -> None:
        super().__init__()
        self._options = {"num_outputs": num_outputs, **options}
        self._all_outputs = num_outputs
        self._outputs = list(range(num_outputs) if outputs is None else outputs)
        for name in ("input_transform", "outcome_transform"):
            if options[name] is not None:
                setattr(self, name, options[name])
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Module mode alone: the posterior has been fitted, to transformed inputs."""
        return torch.nn.Module.train(self, mode)

    def eval(self) -> Self:
        """See :meth:`train`."""
        return self.train(False)

    @property
    def num_outputs(self) -> int:
        """The number of outputs."""
        return len(self._outputs)

    @property
    def batch_shape(self) -> torch.Size:
        """The batch shape of the model."""
        return torch.Size()

    def subset_output(self, idcs: list[int]) -> Self:
        """
        :param idcs: numbers of outputs.
        :return: the model of these outputs.
        """
        return type(self)(**self._options, outputs=[self._outputs[i] for i in idcs])

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Model:
        """:raises NotImplementedError: always: the weights of components or draws would change."""
        raise NotImplementedError(
            f"{type(self).__name__} has no exact posterior given further observations: fit the guide again with them, or use "
            "AutoLaplace, whose linearised Gaussian has one."
        )

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Any = None,
    ) -> Posterior:
        """
        :param X: points, shape ``batch_shape + (q, d)``.
        :param output_indices: the outputs that are wanted; by default all.
        :param observation_noise: whether to add the noise of the likelihood, or its variances in the space of transformed
            outcomes, shape ``batch_shape + (q, m)``.
        :param posterior_transform: a BoTorch posterior transform.
        :return: the joint posterior of the means of the observations at the q points of each batch.
        :raises ValueError: if the rows of the Pyro model are not the points, or it is not Gaussian in its mean.
        """
        X = self.transform_inputs(X)
        found: Any = self._joint(X, observation_noise)
        if hasattr(self, "outcome_transform"):
            found = self._untransform(found, X)
        outputs = self._outputs if output_indices is None else [self._outputs[i] for i in output_indices]
        found = _selected(found, outputs)
        return found if posterior_transform is None else posterior_transform(posterior=found, X=X)

    def _require_outputs(self, number: int) -> None:
        """Raises where an observation of a row has another number of entries than was said."""
        if number != self._all_outputs:
            raise ValueError(
                f"an observation of a row has {number} numbers, and the surrogate was made for {self._all_outputs}: pass "
                f"num_outputs={number}."
            )

    def _joint(self, X: Tensor, observation_noise: bool | Tensor) -> Posterior:
        """The posterior of all outputs at transformed points."""
        raise NotImplementedError

    def _untransform(self, posterior: Any, X: Tensor) -> Posterior:
        """The posterior of what was transformed."""
        return self.outcome_transform.untransform_posterior(posterior, X=X)


def only_site(names: Iterable[str], wanted: str | None) -> str:
    """The observed site that is wanted, or the only one."""
    known = list(names)
    if wanted is None and len(known) != 1:
        raise ValueError(f"the model has the observed sites {known}: choose one by site=.")
    if wanted is not None and wanted not in known:
        raise ValueError(f"site={wanted!r} is no observed site; the model has {known}.")
    return known[0] if wanted is None else wanted


def check_rows(site: str | None, X: Tensor, found: Tensor, alone: Tensor) -> None:
    """Raises where outputs at all points, rows first, are not one for each, or not those of the first points alone."""
    rows = X.shape[:-1].numel()
    # of all, where some outputs happen to be near zero
    size = float(found.detach().abs().max()) if found.numel() else 0.0
    if found.dim() < 1 or found.shape[0] != rows or not close(found[: len(alone)], alone, floor=size):
        raise ValueError(
            f"site {site!r} has outputs of shape {tuple(found.shape)} at {rows} rows: the first dimension must be that of the "
            "rows, and what a row gives must not depend on the others."
        )


def multivariate(mean: Tensor, covariance: Tensor) -> MultivariateNormal:
    """Over q points and m outputs, ``batch + (q, m)``, with the outputs of a point one after the other."""
    lazy = to_linear_operator(covariance)
    if mean.shape[-1] == 1:
        return MultivariateNormal(mean.squeeze(-1), lazy)
    return MultitaskMultivariateNormal(mean, lazy)


def _selected(posterior: Any, outputs: Sequence[int]) -> Any:
    """The posterior of some outputs."""
    m = posterior.mean.shape[-1]
    if list(outputs) == list(range(m)):
        return posterior
    if isinstance(posterior, EnsemblePosterior):
        return EnsemblePosterior(posterior.values[..., outputs])
    if not isinstance(posterior, GPyTorchPosterior):
        raise NotImplementedError(
            f"{type(posterior).__name__}, which the outcome transform made, has no posterior of some outputs: transform the "
            "objective instead of the outcomes."
        )
    mean, covariance = posterior.mean, posterior.distribution.covariance_matrix
    q = mean.shape[-2]
    blocks = covariance.reshape(covariance.shape[:-2] + (q, m, q, m))[..., outputs, :, :][..., outputs]
    size = q * len(outputs)
    distribution = multivariate(mean[..., outputs], blocks.reshape(covariance.shape[:-2] + (size, size)))
    return type(posterior)(distribution)
