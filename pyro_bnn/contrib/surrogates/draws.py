# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Posterior draws as an ensemble."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from botorch.posteriors import Posterior
from botorch.posteriors.ensemble import EnsemblePosterior
from torch import Tensor

from pyro_bnn.contrib.surrogates.base import Arguments, Surrogate, check_rows, only_site, rows_alone
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.infer.predict.draws import component_draws, posterior_draws
from pyro_bnn.infer.predict.runs import ModelRunner
from pyro_bnn.infer.predict.sites import observation_moments
from pyro_bnn.infer.predict.together import predicted_names
from pyro_bnn.model.data import Batch
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.model.parameters import local_parameters


class DrawsModel(Surrogate):
    """
    The ensemble of the means of the observations under fixed posterior draws: any guide, MCMC or draws, any likelihood.

    :param callable model: the Pyro model.
    :param posterior: see :func:`~pyro_bnn.infer.posterior_predictive`.
    :param int num_samples: see :func:`surrogate`.
    :param int seed: of the draws.
    :param str site: the observed site; needed if there are several.
    :param num_outputs: see :func:`surrogate`.
    :param arguments: see :func:`surrogate`.
    :param input_transform: see :func:`surrogate`.
    :param outcome_transform: see :func:`surrogate`.
    :param outputs: the numbers of the outputs; all by default.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        posterior: Any,
        *,
        num_samples: int = 64,
        seed: int = 0,
        site: str | None = None,
        num_outputs: int = 1,
        arguments: Arguments = rows_alone,
        input_transform: Any = None,
        outcome_transform: Any = None,
        outputs: Sequence[int] | None = None,
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            draws = _draws(posterior, num_samples)
        super().__init__(
            num_outputs,
            outputs=outputs,
            model=model,
            posterior=draws,
            site=site,
            arguments=arguments,
            input_transform=input_transform,
            outcome_transform=outcome_transform,
        )
        self.site = site
        self._arguments = arguments
        self._runner = (ModelRunner(model, draws),)
        self._compared = False

    def forward(self, X: Tensor) -> Tensor:
        """
        :param X: transformed points, shape ``batch + (q, d)``.
        :return: the mean of the observation under each draw, shape ``batch + (S, q, m)``, of all outputs.
        """
        first = X.reshape(-1, *X.shape[-2:])[0]
        mean = self._means(X.reshape(-1, X.shape[-1]))
        if not self._compared:
            with torch.no_grad():
                check_rows(self.site, X, mean.movedim(0, 1), self._means(first).movedim(0, 1))
            self._compared = X.dim() > 2
        mean = mean.reshape(mean.shape[:1] + X.shape[:-1] + (-1,)).movedim(0, -3)
        self._require_outputs(mean.shape[-1])
        return mean.to(X.dtype)

    def _means(self, rows: Tensor) -> Tensor:
        """The mean of the observation of rows under each draw, shape ``(S, N) + shape``."""
        (runner,) = self._runner
        dtype = next((v.dtype for v in runner.draws.values() if v.is_floating_point()), rows.dtype)

        def read(sites: Any, lead: torch.Size) -> dict[str, tuple[str, Tensor, int]]:
            name = only_site(predicted_names(sites, runner.draws), self.site)
            fn = sites[name]["fn"]
            mean = observation_moments(fn)[0]
            if mean is None:
                raise ValueError(f"site {name!r} is {type(fn).__name__}, which has no mean.")
            return {"mean": (name, mean, mean.dim() - len(fn.batch_shape))}

        runner.differentiable = torch.is_grad_enabled() and rows.requires_grad
        batch: Batch = (tuple(self._arguments(rows.to(dtype))), {})
        with evaluation_mode(runner.model), local_parameters(), torch.random.fork_rng():
            return runner.run(batch, read)["mean"]

    def _joint(self, X: Tensor, observation_noise: bool | Tensor) -> Posterior:
        if observation_noise is not False:
            raise NotImplementedError(
                "DrawsModel is the ensemble of the means of the observations, without their noise: leave observation_noise out."
            )
        return EnsemblePosterior(self(X))

    def _untransform(self, posterior: Any, X: Tensor) -> Posterior:
        return EnsemblePosterior(self.outcome_transform.untransform(posterior.values, X=X)[0])


def _draws(posterior: Any, num_samples: int) -> dict[str, Tensor]:
    """Draws by site, ``(S,) + shape``: of each component of a mixture equally many, one if they are point masses."""
    if not isinstance(posterior, AutoMixture):
        return posterior_draws(posterior, None if isinstance(posterior, Mapping) else num_samples)
    number = 1 if posterior.component == "delta" else max(1, num_samples // posterior.num_components)
    return {name: value.detach().flatten(0, 1) for name, value in component_draws(posterior, number).items()}
