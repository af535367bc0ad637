# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Hessian-free Laplace as a Pyro guide."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Self

import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor
from typing_extensions import override

from pyro_bnn.curvature.accumulate import Curvature, check_option
from pyro_bnn.distributions.factor_normal import FactorNormal
from pyro_bnn.infer.autoguide.certified import CertifiedGuide
from pyro_bnn.infer.autoguide.point_estimate import MAPReport
from pyro_bnn.infer.autoguide.remainder import Remainder, precision_of, split
from pyro_bnn.infer.hfl.api import solve
from pyro_bnn.infer.hfl.checks import check_accuracy, check_sizes
from pyro_bnn.infer.hfl.evidence import HFLEvidence, log_evidence, optimize_hyperparameters
from pyro_bnn.infer.hfl.low_rank import low_rank_factor, unit_scale
from pyro_bnn.infer.hfl.result import HFLResult
from pyro_bnn.infer.hfl.run import Method
from pyro_bnn.infer.hfl.sandwich import sandwich
from pyro_bnn.infer.hfl.solver import Preconditioner
from pyro_bnn.infer.hyperparameters import Groups, HyperparameterReport
from pyro_bnn.model.arguments import takes_data
from pyro_bnn.ops.options import require_number

#: What ``laplace_approximation`` makes: the Gaussian, what it is made of, and what bounds the variances of all else.
_BUFFERS = (
    *("tau", "factor", "gradients", "displacements", "covariance", "basis", "remainder_precision"),
    *("bound_precision", "directions", "images", "gap"),
)


class AutoHessianFreeLaplace(CertifiedGuide):
    r"""
    A low-rank Gaussian guide :math:`u = \hat u + W z,\ z\sim N(0, I_r)`, from m displacements of the point estimate.

    Its predictive covariance at the targets is exactly that of the linearised Laplace approximation with the same
    curvature, :math:`J P^{-1} J^\top`, yet no p × p matrix is formed: memory is O(p m). Away from the targets it
    never exceeds the full posterior variance, and underestimates it by the conditional variance given the targets:
    offer targets that cover the inputs you will predict at, or add some later with :meth:`add_targets`. Where variances can
    be certified (:func:`pyro_bnn.infer.hfl.solve`), :meth:`variance_bounds` tells at any input how much of the full variance
    the guide is certain to have, and :meth:`cover` adds targets until that is enough on a validation set.

    :param callable model: a Pyro model, called as ``model(*args, **kwargs)`` with and without observations.
    :param str method: ``"cg"`` (the limit of vanishing perturbations; exact up to ``tolerance``), ``"central"``,
        ``"one_sided"``, ``"paired"`` or ``"probe"``; see :func:`pyro_bnn.infer.hfl.solve`.
    :param str curvature: ``"hessian"``, or ``"ggn"`` (the linearised model).
    :param float epsilon: see :func:`pyro_bnn.infer.hfl.solve`.
    :param float tolerance: see :func:`pyro_bnn.infer.hfl.solve`.
    :param proximal: see :func:`pyro_bnn.infer.hfl.solve`.
    :param preconditioner: see :func:`pyro_bnn.infer.hfl.solve`.
    :param bool robust: whether the covariance at the targets is the infinitesimal-jackknife sandwich instead.
    :param str remainder: ``"isotropic"`` or ``"diagonal"`` gives the dimensions that no target informs a Gaussian of
        their own, so that the guide has a proper density and ELBOs and importance weights mean something; variances
        at the targets stay exact, those elsewhere are no longer lower bounds. Default: none.
    :param callable init_loc_fn: a per-site initialisation function, as for any Pyro autoguide.
    :param int chunk_size: how many reverse passes run at once; memory grows with it, results do not change.
    :raises ValueError: for an unknown method, curvature or remainder.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)
        >>> x, y = torch.eye(2), torch.tensor([1.0, -1.0])
        >>> guide = AutoHessianFreeLaplace(model).initialize(x, y).polish((x, y))
        >>> guide = guide.laplace_approximation((x, y), targets=(x,))
        >>> guide.linearized_outputs(x)["obs"].variance.squeeze(-1)  # 1 / (1 / 0.5**2 + 1)
        tensor([0.2000, 0.2000])

    **References**

    [1] McInerney, Kallus (2024), "Hessian-free Laplace in Bayesian deep learning".
    """

    _shown = ("method", "curvature", "remainder")

    curvature: Curvature
    tau: Tensor | None
    displacements: Tensor | None
    covariance: Tensor | None
    basis: Tensor | None
    remainder_precision: Tensor | None

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        method: Method = "cg",
        curvature: Curvature = "hessian",
        epsilon: float | None = None,
        tolerance: float | None = None,
        proximal: float | Literal["auto"] = 0.0,
        preconditioner: Preconditioner | None = None,
        robust: bool = False,
        remainder: Remainder | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        chunk_size: int = 256,
    ) -> None:
        if method == "regvar":
            raise ValueError(
                "method='regvar' is a score, which makes no guide: use method='probe', or hfl.regvar"
            )
        check_option("method", method, Method)
        check_option("curvature", curvature, Curvature)
        if remainder is not None:
            check_option("remainder", remainder, Remainder)
        check_accuracy(epsilon, tolerance)
        check_sizes(chunk_size=chunk_size)
        if proximal != "auto":
            require_number("proximal", proximal, least=0)
        super().__init__(model, init_loc_fn=init_loc_fn, chunk_size=chunk_size)
        self.method = method
        self.curvature = curvature
        self.epsilon = epsilon
        self.tolerance = tolerance
        self.proximal = proximal
        self.preconditioner = preconditioner
        self.robust = robust
        self.remainder = remainder
        self.has_density = remainder is not None
        for name in _BUFFERS:
            self.register_buffer(name, None)

    @takes_data(after=("targets",), also=(solve,))
    @torch.inference_mode(False)
    @torch.enable_grad()
    def laplace_approximation(
        self, *args: Any, targets: Any, map_tolerance: float = 0.1, **options: Any
    ) -> Self:
        r"""
        Solves for the displacements at the targets and turns the guide into a low-rank Gaussian.

        :param args: one batch (a tuple of arguments of the model) or an iterable of batches, **with observations**
            and covering every data point once, as in ``laplace_approximation((x, y), (x_test,))``; or the arguments of the
            model, as in ``laplace_approximation(x, y, targets=(x_test,))`` (see :mod:`pyro_bnn.model.arguments`).
        :param targets: one batch of arguments of the model at the inputs where the predictive covariance is wanted,
            e.g. ``(x_test,)``, named or after data; observations are not needed.
        :param map_tolerance: the Newton decrement, in posterior standard deviations, above which a warning says
            that the point estimate has not converged.
        :param options: further options of :func:`pyro_bnn.infer.hfl.solve`, e.g. ``max_iter`` or ``num_probes``, and keyword
            arguments of the model.
        :return: the guide itself.
        :raises NotAMinimumError: if a solve meets negative curvature or a variance is negative.
        :raises ValueError: for data that are empty, not finite, or without observations.
        """
        (data,) = args
        self._begin(data, self._solve(data, targets, options), map_tolerance)
        return self

    def _begin(self, data: Any, result: HFLResult, map_tolerance: float) -> None:
        """A new Gaussian from a first result."""
        value, gradient = self.negative_log_joint(data)
        self.bound_precision = self.directions = self.images = self.gap = None
        self._covered = ""
        self._finish(data, result, result.gradients, result.displacements, result.responses())
        self.map_report = MAPReport(
            float(value), float(gradient.norm()), result.newton_decrement, result.smallest_curvature
        )
        self.map_report.warn_beyond(map_tolerance)

    @takes_data(after=("targets",), also=(solve,))
    @torch.inference_mode(False)
    @torch.enable_grad()
    def add_targets(self, *args: Any, targets: Any, **options: Any) -> Self:
        """
        Solves for further targets only; the guide becomes exact at them as well, and nowhere less exact. With
        probes, ``result`` then describes the added targets, the guide all of them.

        :param args: the data of :meth:`laplace_approximation`.
        :param targets: one batch of arguments of the model, named or after data.
        :param options: as for :meth:`laplace_approximation`.
        :return: the guide itself.
        :raises RuntimeError: before ``laplace_approximation(data, targets)``.
        :raises ValueError: if variances are certified and the precision is not that of the targets before (other data, another
            proximal term).
        """
        (data,) = args
        if self.gradients is None:
            raise RuntimeError(
                "the guide has no targets yet: call laplace_approximation(data, targets) first"
            )
        result = self._solve(data, targets, options)
        if self.directions is not None:
            self._require_same_precision(self._problem(data, result))
        self._add(data, result)
        return self

    def _add(self, data: Any, result: HFLResult) -> None:
        """The Gaussian of all targets, those of a further result included."""
        J, D, K = self.gradients, self.displacements, self.covariance
        assert J is not None
        assert D is not None
        assert K is not None
        cross = 0.5 * (J @ result.displacements.mT + D @ result.gradients.mT)
        J, D = torch.cat([J, result.gradients]), torch.cat([D, result.displacements])
        K = torch.cat([torch.cat([K, cross], 1), torch.cat([cross.mT, result.responses()], 1)])
        old = self.result
        if old is not None:  # a guide loaded from a state dict has none
            result = result.after(old)
        self._finish(data, result, J, D, K)

    def _solve(self, data: Any, targets: Any, options: dict[str, Any]) -> HFLResult:
        if not self.packed.observed:
            raise ValueError(
                "the model has no observed site, only pyro.factor statements, so that there is nothing to predict at "
                "targets: use hfl.solve(guide, data, functional=lambda sites: ...) with functions of the latent sites."
            )
        options = self._options() | options
        return solve(self, data, targets, curvature=self.curvature, **options)

    def _options(self) -> dict[str, Any]:
        """Those of :func:`~pyro_bnn.infer.hfl.solve` that the guide has; of the point estimate it warns itself."""
        names = ("method", "epsilon", "tolerance", "proximal", "preconditioner", "chunk_size")
        return {name: getattr(self, name) for name in names} | {"map_tolerance": float("inf")}

    def _finish(self, data: Any, result: HFLResult, J: Tensor, D: Tensor, K: Tensor) -> None:
        """The factor from gradients, displacements and covariance, and the remainder."""
        self.gradients, self.displacements, self.covariance = J, D, K
        sd = unit_scale(K.diagonal())
        scores = sandwich(self.packed, self.loc, data, D) if self.robust else None
        wanted = K if scores is None else scores
        scaled = J / sd[:, None]
        factor = low_rank_factor(scaled, D / sd[:, None], wanted / sd / sd[:, None], result.antisymmetry)
        if self.remainder is not None:
            factor, self.basis = split(factor, scaled)
            self.remainder_precision = precision_of(self, data, self.basis, result.proximal)
        self.factor = factor
        own: dict[str, Any] = {"gradients": J, "displacements": D, "factor": factor, "sandwich": scores}
        if self.method != "probe":  # whose result is about the last targets alone
            own |= {"half": J @ factor, "variances": K.diagonal().clone()}
            own |= {} if len(result.variances) == len(J) else {"shape": torch.Size([len(J)])}
        if result.certificate is not None:
            own["products"] = result.products + self._certify(data, result)
            if self.method != "probe":
                own["certificate"] = self._certificate(J)
        self.result = replace(result, **own)
        self._posterior = None

    # ------------------------------------------------------------------ evidence

    @takes_data(also=(log_evidence,))
    def log_evidence(self, *args: Any, **options: Any) -> HFLEvidence:
        """
        The Laplace approximation of the log marginal likelihood, with a bracket and a standard error; see
        :func:`pyro_bnn.infer.hfl.log_evidence`. It takes the GGN, whatever the guide's own curvature.

        :param args: the data, as for :meth:`laplace_approximation`; no targets.
        :param options: of :func:`pyro_bnn.infer.hfl.log_evidence`.
        :return: an :class:`~pyro_bnn.infer.hfl.HFLEvidence`, for the multipliers of the prior precision that are in use.
        """
        return log_evidence(self, *args, **options)

    @takes_data(also=(optimize_hyperparameters,))
    def optimize_hyperparameters(self, *args: Any, **options: Any) -> HyperparameterReport:
        """
        Tunes multipliers of the prior precision by the evidence, the point estimate held fixed; see
        :func:`pyro_bnn.infer.hfl.optimize_hyperparameters`.

        They are in use from now on, and all displacements change with them: the guide is a point estimate again until
        :meth:`laplace_approximation` is called. Training it further forgets them.

        :param args: the data, as for :meth:`laplace_approximation`; no targets.
        :param options: of :func:`pyro_bnn.infer.hfl.optimize_hyperparameters`.
        :return: the multipliers and the evidence at each step.
        """
        report = optimize_hyperparameters(self, *args, **options)
        groups = Groups(self.packed.space.slices, self.loc, None, options.get("per", "global"))
        self.to_point_estimate()
        self.tau = groups.found(report)
        return report

    @override
    def to_point_estimate(self) -> Self:
        self.result = None
        return super().to_point_estimate()

    def _make_posterior(self) -> dist.TorchDistribution | None:
        if self.factor is None:
            return None
        return FactorNormal(self.loc.detach().clone(), self.factor, self.basis, self.remainder_precision)
