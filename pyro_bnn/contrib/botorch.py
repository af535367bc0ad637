# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Bayesian neural networks as surrogate models of BoTorch; needs the package ``botorch``.

:func:`surrogate` makes the BoTorch model that fits a posterior. Its posteriors have gradients in the inputs, and the
covariances of the q points of a batch, so that acquisition functions and ``optimize_acqf`` work as they do with Gaussian
processes.
"""

from collections.abc import Callable
from typing import Any

from botorch.models.model import Model

from pyro_bnn.contrib.surrogates.base import Arguments, rows_alone
from pyro_bnn.contrib.surrogates.draws import DrawsModel
from pyro_bnn.contrib.surrogates.gaussian import LaplaceMixtureModel, LaplaceModel
from pyro_bnn.infer.autoguide import AutoLaplaceMixture, AutoMixture
from pyro_bnn.infer.autoguide.linearized import LinearizedGuide

__all__ = ["DrawsModel", "LaplaceMixtureModel", "LaplaceModel", "surrogate"]


def surrogate(
    posterior: Any,
    model: Callable[..., Any] | None = None,
    *,
    site: str | None = None,
    num_outputs: int = 1,
    num_samples: int = 64,
    seed: int = 0,
    arguments: Arguments = rows_alone,
    input_transform: Any = None,
    outcome_transform: Any = None,
) -> Model:
    r"""
    The BoTorch model of a posterior over the latents of a Pyro model whose rows are the points that BoTorch asks for.

    ============================================================== ============================ ============================
    posterior                                                      BoTorch model                posterior at X
    ============================================================== ============================ ============================
    :class:`~pyro_bnn.infer.autoguide.AutoLaplace`, Hessian-free   :class:`LaplaceModel`        Gaussian, in closed form
    :class:`~pyro_bnn.infer.autoguide.AutoLaplaceMixture`          :class:`LaplaceMixtureModel` mixture of Gaussians
    any other guide, MCMC, draws by site                           :class:`DrawsModel`          ensemble of fixed draws
    ============================================================== ============================ ============================

    :param posterior: see the table; it has been fitted to transformed inputs and outcomes if there are transforms.
    :param callable model: the Pyro model; needed where the posterior is none of the Laplace guides.
    :param str site: the observed site that is optimised, if there are several.
    :param int num_outputs: how many numbers an observation of a row has.
    :param int num_samples: draws of :class:`DrawsModel`; mixture guides take equally many of each component, and one of each
        of a deep ensemble.
    :param int seed: of these draws.
    :param callable arguments: makes the positional arguments of the Pyro model from rows, shape ``(N, d)``; by default the
        rows alone.
    :param input_transform: a BoTorch input transform.
    :param outcome_transform: a BoTorch outcome transform, which has seen the outcomes.
    :return: the BoTorch model.
    :raises ValueError: for a guide that is not fitted, or a missing model or site.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from botorch.acquisition import LogExpectedImprovement
        >>> from pyro_bnn.infer.autoguide import AutoLaplace
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(torch.zeros(2).to(x), 1.0).to_event(1))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)
        >>> x, y = torch.eye(2).double(), torch.tensor([1.0, -1.0]).double()
        >>> guide = AutoLaplace(model).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
        >>> acquisition = LogExpectedImprovement(surrogate(guide), best_f=1.0)
        >>> acquisition(torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]]).double()).argmax()
        tensor(0)
    """
    options: dict[str, Any] = {
        "site": site,
        "num_outputs": num_outputs,
        "arguments": arguments,
        "input_transform": input_transform,
        "outcome_transform": outcome_transform,
    }
    if isinstance(posterior, LinearizedGuide):
        return LaplaceModel(posterior, **options)
    if isinstance(posterior, AutoLaplaceMixture):
        return LaplaceMixtureModel(posterior, **options)
    if model is None and isinstance(posterior, AutoMixture):
        model = posterior.model
    if model is None:
        raise ValueError(
            f"surrogate: the Pyro model is needed beside {type(posterior).__name__}, whose draws it runs with: "
            "surrogate(posterior, model)."
        )
    return DrawsModel(model, posterior, num_samples=num_samples, seed=seed, **options)
