# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What the estimators for scikit-learn share: arguments, fits and predictions of arrays."""

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from pyro_bnn.contrib.estimators.model import TabularModel, isolated, network, require_rowwise
from pyro_bnn.contrib.estimators.modes import SCALES, Method, Mode, Settings
from pyro_bnn.contrib.estimators.posteriors import TabularPosterior, fit_posterior
from pyro_bnn.curvature.accumulate import check_option
from pyro_bnn.diagnostics import to_datatree
from pyro_bnn.infer.autoguide.laplace import Structure
from pyro_bnn.ops.notice import logger
from pyro_bnn.ops.options import require_count, require_number

try:
    from sklearn.utils.validation import validate_data
except ImportError:  # before scikit-learn 1.6
    from pyro_bnn.contrib.estimators.validation import validate_data

if TYPE_CHECKING:
    import xarray as xr

Evidence = Literal["evidence"]


def merged(x: Tensor, y: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """
    The same rows once, with the sum of their weights; data without repeated rows and weights as they are. A row that comes
    twice and one of weight 2 are then the same numbers in the same order.

    :param x: inputs, shape (N, d).
    :param y: targets, shape ``(N, ...)``.
    :param weights: of the rows, shape (N,), or nothing.
    """
    table = torch.cat([x, y.reshape(len(y), -1).to(x.dtype)], 1).numpy()
    _, first, groups = np.unique(table, axis=0, return_index=True, return_inverse=True)
    if len(first) < 2 or (len(first) == len(x) and not weights):
        return x, y, *weights
    total = torch.zeros(len(first), dtype=torch.float64)
    counts = weights[0] if weights else torch.ones(len(x), dtype=torch.float64)
    total.index_add_(0, torch.as_tensor(groups).reshape(-1), counts)
    return x[torch.as_tensor(first)], y[torch.as_tensor(first)], total


class BayesianNetwork(BaseEstimator):
    """What both estimators share."""

    _likelihood: str
    posterior_: TabularPosterior

    def __init__(
        self,
        hidden: Sequence[int] = (50,),
        activation: Literal["tanh", "relu"] = "tanh",
        *,
        network: Callable[[int, int], nn.Module] | None = None,
        method: Method = "laplace",
        structure: Structure = "full",
        prior_scale: float | Evidence = "evidence",
        n_members: int = 5,
        n_samples: int = 200,
        max_iter: int = 20,
        tol: float = 1e-2,
        n_steps: int = 1000,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        random_state: Any = None,
    ) -> None:
        self.hidden = hidden
        self.activation = activation
        self.network = network
        self.method = method
        self.structure = structure
        self.prior_scale = prior_scale
        self.n_members = n_members
        self.n_samples = n_samples
        self.max_iter = max_iter
        self.tol = tol
        self.n_steps = n_steps
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.random_state = random_state

    # ------------------------------------------------------------------ fit

    def _settings(self, noise: Any = None) -> Settings:
        """The arguments, checked."""
        check_option("method", self.method, Method)
        check_option("structure", self.structure, Structure)
        for name in ("n_members", "n_samples", "max_iter", "n_steps"):
            require_count(name, getattr(self, name))
        require_number("tol", self.tol, least=0)
        tune_prior = isinstance(self.prior_scale, str) and self.prior_scale == "evidence"
        if not tune_prior:
            require_number("prior_scale", self.prior_scale, above=0)
        if self.early_stopping and not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction must be between 0 and 1, found {self.validation_fraction!r}"
            )
        return Settings(
            method=self.method,
            structure=self.structure,
            tune_prior=tune_prior,
            tune_noise=noise == "evidence",
            members=self.n_members,
            samples=self.n_samples,
            max_iter=self.max_iter,
            tol=self.tol,
            steps=self.n_steps,
            held_out=self.validation_fraction if self.early_stopping else 0.0,
        )

    def _net(self, outputs: int) -> nn.Module:
        """A new network for the data at hand."""
        if self.network is None:
            return network(self.n_features_in_, outputs, self.hidden, self.activation).double()
        net = copy.deepcopy(self.network(self.n_features_in_, outputs))  # which may return the same one twice
        if not isinstance(net, nn.Module):
            raise TypeError(
                f"network(in_features, out_features) must return a torch.nn.Module, found {type(net).__name__}"
            )
        x = torch.linspace(-1, 1, 2 * self.n_features_in_, dtype=torch.float64).view(2, -1)
        found = net.double().eval()(x)
        if tuple(found.shape) != (2, outputs):
            raise ValueError(
                f"network({self.n_features_in_}, {outputs}) gives outputs of shape {tuple(found.shape)} for 2 rows, expected "
                f"(2, {outputs})"
            )
        require_rowwise(net, x, found)
        return net.train()

    def _fit(self, data: tuple[Tensor, ...], outputs: int, settings: Settings, noise: Tensor | None) -> Self:
        """Fits the posterior to tensors."""
        gain = 1.0 if settings.tune_prior else float(self.prior_scale)
        options: dict[str, Any] = {} if noise is None else {"event_dim": data[1].dim() - 1}

        def make_model(net: nn.Module, scale: Any) -> TabularModel:
            return TabularModel(net, self._likelihood, data, noise=scale, **options)

        seed = check_random_state(self.random_state).randint(2**31 - 1)
        with isolated(seed), torch.inference_mode(False):
            data = tuple(value.clone() for value in data)  # what is made in inference mode has no gradients
            noise = None if noise is None else noise.clone()
            mode = Mode(partial(self._net, outputs), make_model, gain, noise, data, settings)
            self.posterior_ = fit_posterior(mode)
        self.model_ = self.posterior_.model
        self.prior_scales_ = {name: float(scale) for name, scale in mode.prior.scales.items()}
        edges = {name: scale for name, scale in self.prior_scales_.items() if scale in SCALES}
        if edges and settings.tune_prior:
            logger.info(
                "%s: scales of priors at the ends of their range %s: %s", type(self).__name__, SCALES, edges
            )
        self.log_evidence_ = mode.history[-1]
        self.n_iter_ = max(1, len(mode.history) - 1)
        if not mode.converged:
            warnings.warn(
                f"{type(self).__name__}: the evidence still rises by more than tol={self.tol} per row after "
                f"max_iter={self.max_iter} updates of the hyperparameters: raise max_iter or tol.",
                ConvergenceWarning,
                stacklevel=3,
            )
        return self

    def _weighted(self, X: Any, y: Any, sample_weight: Any) -> tuple[Any, ...]:
        """Inputs and targets without rows of weight zero, and the weights if there are any."""
        if sample_weight is None:
            return X, y
        weights = np.asarray(sample_weight, dtype=np.float64)
        weights = np.full(len(X), weights) if weights.ndim == 0 else weights
        if weights.shape != (len(X),):
            raise ValueError(f"sample_weight has shape {weights.shape}, expected ({len(X)},)")
        if not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise ValueError(
                "sample_weight must be finite and not negative: it is a factor of the log likelihood of a row"
            )
        keep = weights > 0
        if keep.sum() < 2:
            raise ValueError(
                f"sample_weight is zero in all rows but {keep.sum()} sample(s), while a minimum of 2 is required"
            )
        return X[keep], y[keep], weights[keep]

    # ------------------------------------------------------------------ predictions

    def _inputs(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return torch.tensor(validate_data(self, X, reset=False, dtype=np.float64))

    def _samples(self, X: Any, n_samples: int, random_state: Any) -> NDArray[Any]:
        require_count("n_samples", n_samples)
        x = self._inputs(X)
        with isolated(check_random_state(random_state).randint(2**31 - 1)):
            return self.posterior_.samples(x, n_samples).movedim(0, -1).numpy()

    def _targets(self, y: Any) -> Tensor:
        raise NotImplementedError

    def to_datatree(
        self, X: ArrayLike | None = None, y: ArrayLike | None = None, *, random_state: Any = 0, **options: Any
    ) -> "xr.DataTree":
        """
        Exports the posterior to ArviZ's schema, in the units of the data.

        :param X: inputs, shape (n_rows, n_features); ``None`` exports the draws alone (not for ``method="hfl"``, whose
            posterior is that at some inputs).
        :param y: targets; with them the tree has their log likelihood.
        :param random_state: a seed, or a :class:`numpy.random.RandomState`.
        :param options: of :func:`~pyro_bnn.diagnostics.to_datatree`, e.g. ``num_samples`` or ``weights=True``.
        :return: an :class:`xarray.DataTree`.
        """
        check_is_fitted(self)
        if X is None and self.posterior_.data:
            raise ValueError("method='hfl' has a posterior at the inputs that it is asked for: pass X")
        x = None if X is None else self._inputs(X)
        data = (x,) if y is None else (x, self._targets(y))
        with isolated(check_random_state(random_state).randint(2**31 - 1)):
            posterior = self.posterior_.at(x)
            if isinstance(posterior, dict):
                options.setdefault("num_chains", self.posterior_.chains)
            return to_datatree(self.model_, posterior, None if x is None else data, **options)
