# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Laplace approximations of any Pyro model."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Self

import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor
from typing_extensions import override

from pyro_bnn.curvature.accumulate import Accumulated, check_option
from pyro_bnn.curvature.definite import require_minimum
from pyro_bnn.curvature.dense import FullNormal
from pyro_bnn.curvature.diagonal import DiagonalNormal
from pyro_bnn.curvature.linear_maps import Sharing
from pyro_bnn.curvature.output_covariances import joint_covariance_blocks
from pyro_bnn.curvature.part_store import PartStore
from pyro_bnn.curvature.parts import CurvatureSum, Part
from pyro_bnn.curvature.selection import Selection, select
from pyro_bnn.curvature.stream import DEFAULT_BUDGET, ExampleStream
from pyro_bnn.distributions.precision_normal import PrecisionNormal
from pyro_bnn.infer.autoguide.laplace_curvature import LaplaceCurvature
from pyro_bnn.infer.autoguide.linearized import LinearizedGuide
from pyro_bnn.infer.autoguide.point_estimate import MAPReport
from pyro_bnn.infer.evidence import LaplaceEvidence, differentiable_evidence
from pyro_bnn.infer.hyperparameters import Groups, HyperparameterReport, Per, search, validation_score
from pyro_bnn.model.arguments import is_container, takes_data
from pyro_bnn.model.data import Batch, as_batches

Structure = Literal["full", "block", "kronecker", "diagonal", "low_rank", "nystrom", "function_space"]
LikelihoodCurvature = Literal["ggn", "mc_fisher", "empirical_fisher", "hessian"]
Subnetwork = Literal["largest_variance", "largest_magnitude", "random"]


class AutoLaplace(LinearizedGuide):
    r"""
    Laplace approximation :math:`q(u) = N(\hat u, P^{-1})` over the packed unconstrained latents of any Pyro model.

    :math:`\hat u` is the MAP in unconstrained space and :math:`P` the curvature of the negative log joint density
    there: the exact Hessian of the prior plus, for the likelihood, its GGN :math:`\sum_n J_n^\top F_n J_n`, an
    estimate of it, or its exact Hessian. Predictions go through the linearised model, which for the GGN is the model
    whose exact posterior this is (Immer et al., 2021).

    ============== ======================================================================== =====================
    structure      what is kept of the likelihood's curvature                               memory
    ============== ======================================================================== =====================
    full           everything                                                               :math:`p^2`
    block          the blocks of single sites, exactly                                      :math:`\sum p_s^2`
    kronecker      for weights of linear maps :math:`G\otimes A` (Martens, Grosse, 2015)    :math:`\sum o^2+i^2`
                   [4, 5]; for other entries dense blocks of up to 1024, else diagonals
    diagonal       the diagonal, exactly                                                    :math:`p`
    low_rank       the ``rank`` leading eigenpairs relative to the prior                    :math:`p r`
    nystrom        its projection on ``rank`` features of a random subset of the data       :math:`p r`
                   (Deng et al., 2022) [6]
    function_space everything, through the outputs: exact where N C is less than p; with    :math:`p N C` or
                   ``subset_size=M``, of a random subset of M points times N / M [2]        :math:`p M C`
    ============== ======================================================================== =====================

    The prior is added exactly in all of them.

    :param callable model: a Pyro model, called as ``model(*args, **kwargs)`` with and without observations.
    :param str structure: see the table.
    :param str curvature: ``"ggn"`` (exact over outputs), ``"mc_fisher"`` (scores at ``num_samples`` observations drawn
        from the model), ``"empirical_fisher"`` (scores at the data) or ``"hessian"`` (exact; needs a converged MAP).
    :param sites: which latents are random: ``None`` (all), names or patterns of sites, ``callable(name) -> bool``, a
        bool mask over the packed vector, or ``"last_layer"``. The others stay at the point estimate.
    :param str subnetwork: choose ``subnetwork_size`` of them by ``"largest_variance"`` under the diagonal
        approximation (Daxberger et al., 2021, "Bayesian deep learning via subnetwork inference"),
        ``"largest_magnitude"`` or at ``"random"``.
    :param int subnetwork_size: how many entries.
    :param int rank: of ``"low_rank"`` and ``"nystrom"``.
    :param int subset_size: for ``"function_space"``, how many data points, drawn at random without replacement, stand
        for all of them: the Gaussian process is conditioned on these alone, each counted N / M times. Predictions cost
        O(M C) kernel rows; with M = N the posterior is exact. By default all. The value and gradient of the log
        joint, in the evidence and the convergence check, are those of all the data.
    :param str sharing: how Kronecker factors treat weights that are used several times per example, ``"expand"`` or
        ``"reduce"`` (Eschenhagen et al., 2023).
    :param int num_samples: draws per data point for ``"mc_fisher"``.
    :param callable init_loc_fn: a per-site initialisation function, as for any Pyro autoguide.
    :param int chunk_size: how many reverse passes run at once; memory grows with it, results do not change.
    :param int budget: how many numbers a chunk of data may keep; larger batches are split where the model treats
        data points separately; results do not change.
    :param float memory_limit: bytes that the curvature may take; by default what is free.
    :raises ValueError: for unknown or contradictory options.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)
        >>> x, y = torch.eye(2), torch.tensor([1.0, -1.0])
        >>> guide = AutoLaplace(model).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
        >>> guide.posterior.variance  # 1 / (1 / 0.5**2 + 1)
        tensor([0.2000, 0.2000])

    **References**

    [1] MacKay (1992), "A practical Bayesian framework for backpropagation networks".

    [2] Immer, Korzepa, Bauer (2021), "Improving predictions of Bayesian neural nets via local linearization".

    [3] Daxberger et al. (2021), "Laplace redux: effortless Bayesian deep learning".

    [4] Ritter, Botev, Barber (2018), "A scalable Laplace approximation for neural networks".

    [5] Eschenhagen et al. (2023), "Kronecker-factored approximate curvature for modern neural network architectures".

    [6] Deng, Zhou, Zhu (2022), "Accelerated linearized Laplace approximation for Bayesian deep learning".
    """

    _shown = ("structure", "curvature")

    log_joint: Tensor | None
    _covered: dict[str, int] = {}  # noqa: RUF012 (never changed in place)
    log_prior: Tensor | None
    active: Tensor | None
    tau: Tensor | None
    prior_gradient: Tensor | None
    gradient: Tensor | None

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        structure: Structure = "full",
        curvature: LikelihoodCurvature = "ggn",
        sites: Selection = None,
        subnetwork: Subnetwork | None = None,
        subnetwork_size: int | None = None,
        rank: int = 50,
        subset_size: int | None = None,
        sharing: Sharing = "expand",
        num_samples: int = 1,
        init_loc_fn: Callable[..., Any] = init_to_median,
        chunk_size: int = 256,
        budget: int = DEFAULT_BUDGET,
        memory_limit: float | None = None,
    ) -> None:
        check_option("structure", structure, Structure)
        check_option("curvature", curvature, LikelihoodCurvature)
        check_option("sharing", sharing, Sharing)
        if subnetwork is not None:
            check_option("subnetwork", subnetwork, Subnetwork)
        if (subnetwork is None) != (subnetwork_size is None):
            raise ValueError("subnetwork and subnetwork_size go together: pass both or neither")
        if curvature == "hessian" and structure in ("kronecker", "nystrom", "function_space"):
            raise ValueError(
                f"structure={structure!r} needs a Gauss-Newton or Fisher matrix; for the exact Hessian use "
                "structure='full', 'block', 'diagonal' or 'low_rank'."
            )
        if subset_size is not None and (structure != "function_space" or subset_size < 1):
            raise ValueError(
                f"subset_size={subset_size} with structure={structure!r}: it is a positive number of data points and "
                "goes with structure='function_space' only."
            )
        super().__init__(model, init_loc_fn=init_loc_fn, chunk_size=chunk_size, budget=budget)
        self.structure = structure
        self.curvature = curvature
        self.sites = sites
        self.subnetwork = subnetwork
        self.subnetwork_size = subnetwork_size
        self.rank = rank
        self.subset_size = subset_size
        self.sharing = sharing
        self.num_samples = num_samples
        self.memory_limit = memory_limit
        self.part_store = PartStore()
        for name in ("log_joint", "log_prior", "active", "tau", "prior_gradient", "gradient"):
            self.register_buffer(name, None)

    @classmethod
    def last_layer(cls, model: Callable[..., Any], **options: Any) -> Self:
        """
        A Laplace approximation of the last layer only, in any structure; the layers before it are features.

        :param callable model: a Pyro model.
        :param options: of the constructor.
        :return: the guide.
        """
        return cls(model, sites="last_layer", **options)

    @property
    def at_mode(self) -> LaplaceCurvature:
        """The curvature at the present point estimate."""
        return LaplaceCurvature(
            self.packed, self.loc, self.active, self.structure, self.curvature, self.rank, self.subset_size,
            self.sharing, self.num_samples, self.chunk_size, self.budget, self.memory_limit,
        )  # fmt: skip

    @override
    def _stream(self, *, differentiable: bool = False) -> ExampleStream:
        return self.at_mode.stream(differentiable=differentiable)

    # ------------------------------------------------------------------ fit

    @takes_data()
    @torch.inference_mode(False)
    @torch.enable_grad()
    def laplace_approximation(
        self,
        *args: Any,
        map_tolerance: float | None = None,
        override: bool = True,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Self:
        r"""
        Computes the curvature at the point estimate and turns the guide into a Gaussian.

        :param args: one batch (a tuple of arguments of the model) or an iterable of batches, **with observations**
            and covering every data point once, as in ``laplace_approximation((x, y))`` or
            ``laplace_approximation(loader)``; or the arguments of the model, as in ``laplace_approximation(x, y)`` (see
            :mod:`pyro_bnn.model.arguments`). Batches add up: the result does not depend on how data are split.
        :param map_tolerance: the Newton decrement, in posterior standard deviations, above which a warning says
            that the point estimate has not converged; default 0.1 for the exact Hessian and 1 for the others.
        :param bool override: ``False`` adds the curvature of these data, at the same point estimate, to what is
            already there (continual learning); the prior counts once. Parts of a plate of the full size may come one
            after the other in this way, the first with ``override=False`` as well.
        :param generator: source of random numbers for ``"mc_fisher"``, ``"nystrom"``, ``"low_rank"`` and random
            subnetworks.
        :param kwargs: keyword arguments of the model.
        :return: the guide itself.
        :raises NotAMinimumError: if the curvature is not positive definite, or if the point is a saddle that the exact
            Hessian shows and the structure does not; the message names the sites.
        :raises MemoryError: if the structure does not fit; raised before it is allocated.
        :raises ValueError: for data that are empty, not finite, without observations, or that do not cover the
            plates of the model; for a model that is no function of its latents, because it draws hidden sites,
            subsamples or masks anew in every run; for a likelihood that depends on latents without a gradient to them.
        """
        data = as_batches(*args)
        few = self.packed.require_function(self.loc, data, hessian=self.curvature == "hessian")
        before = None if override or not self.is_fitted else self.part_store.get()
        with self.packed.continuing(None if override else self._covered if before is not None else {}):
            if before is None:
                self._select(data, few, generator)
            found, parts, posterior = self.at_mode.resolved(data, generator, before)
            if self.curvature == "hessian" and self.structure != "full":
                index = self.at_mode.index
                scale = posterior.variance[index].sqrt()
                hessian = self.at_mode.joint_hessian(data, found.prior)
                require_minimum(hessian, scale, index, self.packed.space, len(self.loc))
            coverage = self.packed.last_coverage
        assert coverage is not None
        value, gradient = self._joint(found, resumed=before is not None)
        self.map_report = self._report(posterior, parts, value, gradient)
        self.part_store.set(parts)
        self._covered = coverage.covered
        self.gradient = gradient
        self.log_joint = -value
        self.log_prior = found.log_prior
        self.prior_gradient = found.prior.gradient
        self.tau = None
        self._posterior = posterior
        if map_tolerance is None:
            map_tolerance = 0.1 if self.curvature == "hessian" else 1.0
        if not coverage.is_partial:  # the gradient of some of the data is not zero at the point estimate
            self.map_report.warn_beyond(map_tolerance)
        return self

    def _joint(self, found: Accumulated, *, resumed: bool) -> tuple[Tensor, Tensor]:
        """The negative log joint density and its gradient, with those of earlier data, whose prior counts, if resumed."""
        value, gradient = -found.log_likelihood, found.gradient
        if not resumed:
            return value - found.log_prior, gradient + found.prior.gradient
        assert self.log_joint is not None
        assert self.gradient is not None
        return value - self.log_joint, gradient + self.gradient

    def curvature_parts(
        self,
        data: Any,
        generator: torch.Generator | None = None,
        before: Sequence[Part] | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> tuple[Accumulated, list[Part]]:
        """
        The curvature at the point estimate and the present values of the model's parameters; the guide stays as it is.

        :param data: one batch or an iterable of batches, with observations.
        :param generator: source of random numbers.
        :param before: curvature of earlier data to be added.
        :param dtype: the precision of sums over data; by default the guide's.
        :return: values and gradients of log prior and log likelihood, and the parts of the curvature.
        """
        return self.at_mode.parts(data, generator, before, dtype)

    def empty_sum(self, dtype: torch.dtype | None = None) -> CurvatureSum:
        """
        :param dtype: the precision of the sum; by default the guide's.
        :return: a sum of curvatures over data, still zero, in the structures "full", "diagonal", "kronecker", "block".
        """
        return self.at_mode.empty_sum(dtype)

    def _select(self, data: Any, few: Batch, generator: torch.Generator | None) -> None:
        """Chooses the random latents; a few examples show which layer is the last."""
        self.active = select(self.packed, self.sites, self.loc.detach(), few)
        if self.subnetwork is not None and self.subnetwork_size is not None:
            self.active = self.at_mode.subnetwork(self.subnetwork, self.subnetwork_size, data, generator)

    # ------------------------------------------------------------------ posterior

    @override
    def to_point_estimate(self) -> Self:
        self.part_store.set([])
        return super().to_point_estimate()

    def _report(
        self, posterior: PrecisionNormal, parts: list[Part], value: Tensor, gradient: Tensor
    ) -> MAPReport:
        random = torch.zeros_like(gradient)
        index = torch.cat([part.index for part in parts])
        random[index] = gradient[index]
        decrement = posterior.half_solve_transposed(random).norm()
        return MAPReport(
            float(value), float(random.norm()), float(decrement), float(posterior.smallest_precision)
        )

    @override
    def _make_posterior(self) -> PrecisionNormal | None:
        parts = self.part_store.get()
        return self.at_mode.gaussian(parts, self.tau) if parts else None

    @property
    def precision(self) -> Tensor:
        """
        The posterior precision of the structures "full", shape ``(p, p)``, and "diagonal", shape ``(p,)``.

        :raises RuntimeError: before ``laplace_approximation(data)``.
        :raises ValueError: for other structures or a part of the latents.
        """
        posterior = self.posterior
        if not isinstance(posterior, (FullNormal, DiagonalNormal)):
            raise ValueError(
                f"structure={self.structure!r} forms no precision matrix of all latents: use posterior.multiply"
            )
        return posterior.precision

    def joint_covariance_batches(self, data: Any) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        r"""
        :meth:`joint_covariance` over a loader, block by block, so that memory stays that of two batches' Jacobians:
        :math:`J_i P^{-1} J_j^\top` for :math:`j \le i`. Jacobians are formed again for each block.

        :param data: an iterable of batches in a fixed order (``shuffle=False``); observations are not needed.
        :return: an iterator over i, j and the block by observed site, shape ``shape_i + (C,) + shape_j + (C,)``.
        """
        return joint_covariance_blocks(self, data)

    # ------------------------------------------------------------------ evidence

    @takes_data(optional=True)
    def log_evidence(self, tau: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        r"""
        The Laplace approximation of the log marginal likelihood,
        :math:`\log p(D) \approx -L(\hat u) + \tfrac p2 \log 2\pi - \tfrac12 \log\det P`.

        An approximation, exact for linear-Gaussian models; MacKay (1992). Latents that stay point estimates count
        with their prior density at the estimate.

        :param tau: multipliers of the prior precision, a scalar or shape ``(p,)``, in which the result is
            differentiable; by default those in use. They are exact for Gaussian priors; other priors are replaced by
            the Gaussian with the same gradient and curvature at the point estimate.
        :param args: with the data of the approximation, as in ``log_evidence(data=loader)`` or ``log_evidence(x=x, y=y)``,
            the evidence at the present parameters of the model, differentiable in all of them; see
            :func:`~pyro_bnn.infer.evidence.differentiable_evidence`.
        :return: a scalar, in nats.
        :raises RuntimeError: before ``laplace_approximation(data)``.
        """
        if is_container(tau):
            raise TypeError(
                f"log_evidence: tau is a {type(tau).__name__}, not a tensor. Name data, log_evidence(data=(x, y))."
            )
        self.posterior  # noqa: B018  raises before laplace_approximation
        if args and args[0] is not None:
            return differentiable_evidence(self, args[0])
        return self._evidence().value(self.tau if tau is None else tau)

    def _evidence(self) -> LaplaceEvidence:
        assert self.log_joint is not None
        assert self.prior_gradient is not None
        return LaplaceEvidence(
            self.part_store.get(), self.log_joint, self.prior_gradient, self.loc, self.curvature == "hessian"
        )

    @takes_data(optional=True)
    @torch.inference_mode(False)
    @torch.enable_grad()
    def optimize_hyperparameters(
        self,
        *args: Any,
        method: Literal["evidence", "validation", "grid"] = "evidence",
        per: Per = "global",
        candidates: Sequence[float] | None = None,
        num_samples: int = 100,
        **kwargs: Any,
    ) -> HyperparameterReport:
        """
        Tunes multipliers of the prior precision after the fit, the point estimate held fixed.

        :param args: for ``"validation"``, held-out data with observations, or the arguments of the model.
        :param str method: ``"evidence"`` (Newton's method), ``"grid"`` (the best evidence among ``candidates``) or
            ``"validation"`` (the best log predictive density of held-out data among ``candidates``).
        :param str per: ``"global"``, one multiplier for all; ``"layer"``, one for the sites of each module (their names up
            to the last dot); ``"site"``. ``"grid"`` and ``"validation"`` then search one after the other, repeatedly.
        :param candidates: multipliers; 21 values from 1e-4 to 1e4 by default.
        :param int num_samples: draws where the predictive has no closed form.
        :param kwargs: keyword arguments of the model.
        :return: the multipliers, which are in use from now on, and the objective of each evaluation. A
            :class:`~pyro_bnn.infer.hyperparameters.HyperparameterWarning` says where they are at the edge of their range.
        :raises ValueError: for an unknown method or missing data.
        """
        check_option("method", method, Literal["evidence", "validation", "grid"])
        check_option("per", per, Per)
        self.posterior  # noqa: B018  raises before laplace_approximation
        grid = [10.0 ** (0.4 * i - 4) for i in range(21)] if candidates is None else list(candidates)
        groups = Groups(self.packed.space.slices, self.loc, self.active, per)
        if method == "evidence":
            report = self._evidence().maximise(groups)
        elif method == "grid":
            report = self._evidence().best_of(grid, groups)
        else:
            report = self._validate(args[0] if args else None, grid, groups, num_samples)
        self._multiply_prior(groups.found(report))
        return report

    def _validate(
        self, data: Any, candidates: Sequence[float], groups: Groups, num_samples: int
    ) -> HyperparameterReport:
        if data is None:
            raise ValueError("method='validation' needs held-out data, e.g. data=(x_val, y_val)")
        if not self.packed.observed:
            raise ValueError(
                "method='validation' scores observations, and the model has none, only pyro.factor statements: use "
                "method='evidence'."
            )
        batches = as_batches(data)

        def score(tau: Tensor) -> float:
            self._multiply_prior(groups.expand(tau))
            return validation_score(self, batches, num_samples=num_samples)

        return search(groups, candidates, score)

    def _multiply_prior(self, tau: Tensor) -> None:
        self.tau = tau.detach().clone().to(self.loc)
        self._posterior = None
