# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Bayesian neural networks as scikit-learn estimators."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor, nn

from pyro_bnn.contrib.estimators.base import BayesianNetwork, Evidence, merged, validate_data
from pyro_bnn.contrib.estimators.model import isolated, spread
from pyro_bnn.contrib.estimators.modes import Method
from pyro_bnn.distributions.mixture import marginal_quantile
from pyro_bnn.infer.autoguide.laplace import Structure
from pyro_bnn.ops.options import require_number

__all__ = ["BayesianClassifier", "BayesianRegressor"]


class BayesianRegressor(RegressorMixin, BayesianNetwork):
    r"""
    A Bayesian neural network for regression: :math:`y = f(x) + \varepsilon`, with Gaussian noise for every output.

    Inputs and targets are standardised inside; results are in the units of the targets. Weights have the priors
    :math:`N(0, s^2)`, one :math:`s` for every weight and bias, which starts at :math:`g / \sqrt{\text{fan in}}` (biases:
    :math:`g`). The mode is found by L-BFGS in double precision; noise and scales are those of MacKay's fixed point of the
    evidence (1992).

    ========================= ==========================================================================================
    method                    posterior
    ========================= ==========================================================================================
    ``"laplace"``             a Gaussian around the mode, predictions by the linearised network in closed form
                              (:class:`~pyro_bnn.infer.autoguide.AutoLaplace`)
    ``"mixture_of_laplace"``  an equal mixture of them around ``n_members`` modes
                              (:class:`~pyro_bnn.infer.autoguide.AutoLaplaceMixture`)
    ``"ensemble"``            the ``n_members`` modes alone, from other draws of the prior
    ``"rank1"``               a mixture of Gaussians over rank-1 factors of the weights, by variational inference from the
                              mode on; ``n_samples`` draws are kept (:func:`~pyro_bnn.nn.rank1_`)
    ``"hfl"``                 the variances of ``"laplace"`` without its covariance of the weights: predictions solve for
                              their inputs (:class:`~pyro_bnn.infer.autoguide.AutoHessianFreeLaplace`)
    ========================= ==========================================================================================

    :param hidden: the units of each hidden layer; ``()`` for a linear model.
    :param str activation: ``"tanh"`` or ``"relu"``.
    :param callable network: ``callable(in_features, out_features)`` that returns a :class:`torch.nn.Module`, in the place of
        ``hidden`` and ``activation``; all of its parameters must be in layers that :func:`~pyro_bnn.nn.bayesian_` converts. It
        is copied, and runs in evaluation mode: dropout is off.
    :param str method: see the table.
    :param str structure: of the curvature, see :class:`~pyro_bnn.infer.autoguide.AutoLaplace`; ``"full"`` takes memory
        :math:`p^2` in the number of weights, ``"kronecker"`` or ``"diagonal"`` are for large networks. All methods use it for
        the evidence.
    :param prior_scale: :math:`g`, or ``"evidence"`` to tune all :math:`s`, from :math:`g = 1`, within 0.001 and 30.
    :param noise: the standard deviation of the noise in the units of the targets, a number or one per output, or
        ``"evidence"``.
    :param int n_members: modes or components, where the method has several.
    :param int n_samples: draws that ``"rank1"`` keeps, rounded up to a multiple of ``n_members``.
    :param int max_iter: largest number of updates of the hyperparameters, with 100 iterations of L-BFGS before each.
    :param float tol: an update that gains less log evidence per row, in nats, is the last one.
    :param int n_steps: of variational inference (``"rank1"``).
    :param bool early_stopping: whether rows held out stop variational inference (:class:`~pyro_bnn.infer.EarlyStopping`);
        the other methods stop by the evidence.
    :param float validation_fraction: of rows held out for it.
    :param random_state: a seed, a :class:`numpy.random.RandomState`, or ``None`` for numpy's global one. Nothing else that is global changes.
    :ivar model_: the :class:`~pyro_bnn.supervised.SupervisedModel`, of data in their own units, whose network is ``model_.net``.
    :ivar noise_: the standard deviation of the noise, shape ``()`` or (n_outputs,).
    :ivar prior_scales_: :math:`s` by parameter.
    :ivar log_evidence_: of the (first) mode, in nats.
    :ivar n_iter_: updates of the hyperparameters.
    :raises ValueError: for data that are sparse or not finite, or options out of range.

    Example::

        >>> x = np.linspace(-2, 2, 40)[:, None]
        >>> y = np.sin(2 * x[:, 0]) + 0.1 * np.random.RandomState(0).randn(40)
        >>> reg = BayesianRegressor(hidden=(10,), random_state=0).fit(x, y)
        >>> mean, sd = reg.predict([[0.0], [10.0]], return_std=True)
        >>> bool(abs(mean[0]) < 0.2), bool(sd[1] > 3 * sd[0])
        (True, True)
        >>> lower, upper = reg.predict_interval([[0.0]], level=0.9)
        >>> bool(lower[0] < mean[0] < upper[0])
        True
    """

    _likelihood = "regression"

    def __init__(
        self,
        hidden: Sequence[int] = (50,),
        activation: Literal["tanh", "relu"] = "tanh",
        *,
        network: Callable[[int, int], nn.Module] | None = None,
        method: Method = "laplace",
        structure: Structure = "full",
        prior_scale: float | Evidence = "evidence",
        noise: float | Sequence[float] | Evidence = "evidence",
        n_members: int = 5,
        n_samples: int = 200,
        max_iter: int = 20,
        tol: float = 1e-2,
        n_steps: int = 1000,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        random_state: Any = None,
    ) -> None:
        super().__init__(
            hidden, activation, network=network, method=method, structure=structure, prior_scale=prior_scale,
            n_members=n_members, n_samples=n_samples, max_iter=max_iter, tol=tol, n_steps=n_steps,
            early_stopping=early_stopping, validation_fraction=validation_fraction, random_state=random_state,
        )  # fmt: skip
        self.noise = noise

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """
        Fits the network, its hyperparameters and its posterior.

        :param X: inputs, shape (n_rows, n_features).
        :param y: targets, shape (n_rows,) or (n_rows, n_outputs).
        :param sample_weight: factors of the rows' log likelihoods, shape (n_rows,); a weight of 2 is the row twice.
        :return: the estimator itself.
        """
        rows, targets = validate_data(
            self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, ensure_min_samples=2
        )
        settings = self._settings("evidence" if isinstance(self.noise, str) else self.noise)
        arrays = self._weighted(rows, targets, sample_weight)
        data = merged(*(torch.tensor(np.asarray(value, dtype=np.float64)) for value in arrays))
        scale = spread(*data[1:])
        if not bool(((scale > 1e-100) & (scale < 1e100)).all()):
            raise ValueError(
                f"y has the standard deviation {scale.numpy()}, whose powers are no numbers in double precision: pass y in "
                "other units."
            )
        outputs = 1 if targets.ndim == 1 else targets.shape[1]
        self._fit(data, outputs, settings, self._noise(*data[1:]))
        self.noise_ = self.model_.noise.detach().numpy()
        return self

    def _noise(self, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """The noise at the start, one per output."""
        if isinstance(self.noise, str):
            if self.noise != "evidence":
                raise ValueError(f"noise must be 'evidence' or positive, found {self.noise!r}")
            return spread(y, weights)
        noise = torch.tensor(np.asarray(self.noise, dtype=np.float64))
        if noise.shape not in (y.shape[1:], ()) or not bool((noise > 0).all() and noise.isfinite().all()):
            raise ValueError(f"noise must be positive, one number or one per output, found {self.noise!r}")
        return noise.expand(y.shape[1:]).clone()

    def _targets(self, y: Any) -> Tensor:
        return torch.tensor(np.asarray(y, dtype=np.float64))

    def predict(self, X: ArrayLike, return_std: bool | Literal["epistemic"] = False) -> Any:
        """
        Predicts the mean of the targets.

        :param X: inputs, shape (n_rows, n_features).
        :param return_std: ``True`` for the standard deviation of a target too, ``"epistemic"`` for that of its mean :math:`f(x)`,
            without the noise.
        :return: the mean, shape (n_rows,) or (n_rows, n_outputs), or the mean and the standard deviation.
        """
        if not (isinstance(return_std, bool | np.bool_) or str(return_std) == "epistemic"):
            raise ValueError(f"return_std must be False, True or 'epistemic', found {return_std!r}")
        x = self._inputs(X)
        with isolated(0), torch.no_grad():
            if not return_std:
                return torch.tensordot(self.posterior_.weights(), self.posterior_.means(x), 1).numpy()
            weights, normals = self.posterior_.normals(x, noise=str(return_std) != "epistemic")
            mean = torch.tensordot(weights, normals.mean, 1)
            moments = normals.variance + (normals.mean - mean).square()
            return mean.numpy(), torch.tensordot(weights, moments, 1).sqrt().numpy()

    def predict_interval(self, X: ArrayLike, level: float = 0.95) -> tuple[NDArray[Any], NDArray[Any]]:
        """
        Predicts the central interval of a target: its quantiles at (1 - level) / 2 and (1 + level) / 2, of mixtures by bisection.

        :param X: inputs, shape (n_rows, n_features).
        :param float level: the probability of the interval.
        :return: lower and upper limits, shape (n_rows,) or (n_rows, n_outputs).
        """
        require_number("level", level, above=0, below=1)
        x = self._inputs(X)
        with isolated(0), torch.no_grad():
            weights, normals = self.posterior_.normals(x)
            lower, upper = (
                marginal_quantile(normals, q, weights).numpy() for q in ((1 - level) / 2, (1 + level) / 2)
            )
        return lower, upper

    def sample_y(self, X: ArrayLike, n_samples: int = 1, random_state: Any = 0) -> NDArray[Any]:
        """
        Draws targets: one draw of the function for all rows, and noise for each.

        :param X: inputs, shape (n_rows, n_features).
        :param int n_samples: the number of draws.
        :param random_state: a seed, or a :class:`numpy.random.RandomState`.
        :return: shape (n_rows, n_samples) or (n_rows, n_outputs, n_samples).
        """
        return self._samples(X, n_samples, random_state)


class BayesianClassifier(ClassifierMixin, BayesianNetwork):
    r"""
    A Bayesian neural network for classification into two or more classes.

    Everything is as in :class:`BayesianRegressor`, without noise: the network gives the logits of the classes, one for two of
    them. Class probabilities are averages over the posterior: for Laplace approximations by the probit approximation
    (:meth:`~pyro_bnn.infer.autoguide.LinearizedOutputs.distribution`), else over modes or draws.

    :param hidden: see :class:`BayesianRegressor`, as all parameters.
    :param activation: as there.
    :param network: as there.
    :param method: as there.
    :param structure: as there.
    :param prior_scale: as there.
    :param n_members: as there.
    :param n_samples: as there.
    :param max_iter: as there.
    :param tol: as there.
    :param n_steps: as there.
    :param early_stopping: as there.
    :param validation_fraction: as there.
    :param random_state: as there.
    :ivar classes_: the labels, sorted; columns of probabilities are in this order.

    Example::

        >>> from sklearn.datasets import load_iris
        >>> from sklearn.pipeline import make_pipeline
        >>> X, y = load_iris(return_X_y=True)
        >>> clf = BayesianClassifier(hidden=(5,), random_state=0).fit(X, y)
        >>> clf.score(X, y) > 0.95, clf.predict_proba(X[:2]).shape
        (True, (2, 3))
        >>> far = clf.predict_proba(X[:1] + 100.0)  # nothing like the data
        >>> bool(far.max() < clf.predict_proba(X[:1]).max())
        True
    """

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """
        Fits the network, its hyperparameters and its posterior.

        :param X: inputs, shape (n_rows, n_features).
        :param y: labels of any type, shape (n_rows,).
        :param sample_weight: factors of the rows' log likelihoods, shape (n_rows,); a weight of 2 is the row twice.
        :return: the estimator itself.
        """
        rows, targets = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        check_classification_targets(targets)
        settings = self._settings()
        rows, targets, *weights = self._weighted(rows, targets, sample_weight)
        self.classes_, labels = np.unique(targets, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"{type(self).__name__} needs at least two classes, and the data have 1 class: {self.classes_[0]!r}"
            )
        data = merged(torch.tensor(rows), torch.tensor(labels), *(torch.tensor(w) for w in weights))
        return self._fit(data, 1 if self._likelihood == "binary" else len(self.classes_), settings, None)

    @property
    def _likelihood(self) -> str:  # type: ignore[override]
        return "binary" if len(self.classes_) == 2 else "classification"

    def _targets(self, y: Any) -> Tensor:
        y = np.asarray(y)
        unknown = set(np.unique(y)) - set(self.classes_)
        if unknown:
            raise ValueError(
                f"y has labels {sorted(unknown)} that fit has not seen: the classes are {list(self.classes_)}"
            )
        return torch.tensor(np.searchsorted(self.classes_, y))

    def predict_proba(self, X: ArrayLike) -> NDArray[Any]:
        """
        Predicts the probabilities of the classes.

        :param X: inputs, shape (n_rows, n_features).
        :return: shape (n_rows, n_classes), in the order of ``classes_``.
        """
        x = self._inputs(X)
        with isolated(0), torch.no_grad():
            p = self.posterior_.probabilities(x)
            return (p if p.dim() == 2 else torch.stack([1 - p, p], -1)).detach().numpy()

    def predict_log_proba(self, X: ArrayLike) -> NDArray[Any]:
        """
        The logarithm of :meth:`predict_proba`.

        :param X: inputs, shape (n_rows, n_features).
        :return: shape (n_rows, n_classes).
        """
        return np.log(self.predict_proba(X))

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """
        Predicts the most probable class.

        :param X: inputs, shape (n_rows, n_features).
        :return: labels, shape (n_rows,).
        """
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def sample_y(self, X: ArrayLike, n_samples: int = 1, random_state: Any = 0) -> NDArray[Any]:
        """
        Draws labels: one draw of the function for all rows, and a label of each given it.

        :param X: inputs, shape (n_rows, n_features).
        :param int n_samples: the number of draws.
        :param random_state: a seed, or a :class:`numpy.random.RandomState`.
        :return: labels, shape (n_rows, n_samples).
        """
        index = self._samples(X, n_samples, random_state).astype(int)
        return self.classes_[index]
