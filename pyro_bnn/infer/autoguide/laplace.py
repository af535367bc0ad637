# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Laplace approximations of any Pyro model."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Self

import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor

from pyro_bnn.curvature.accumulate import (
    Accumulated,
    CurvatureAccumulator,
    accumulate_examples,
    accumulate_operators,
    check_option,
)
from pyro_bnn.curvature.capture import Capture
from pyro_bnn.curvature.definite import (
    TOLERANCE,
    blame,
    describe,
    expected_error,
    require_minimum,
    require_resolved,
)
from pyro_bnn.curvature.dense import DENSE_LIMIT, DensePart, FullNormal
from pyro_bnn.curvature.diagonal import DiagonalNormal, DiagonalPart
from pyro_bnn.curvature.fisher_checks import require_scores
from pyro_bnn.curvature.kronecker import KroneckerSum
from pyro_bnn.curvature.linear_maps import Sharing
from pyro_bnn.curvature.low_rank import LowRankSum, Reserve, curvature_rows
from pyro_bnn.curvature.output_covariances import joint_covariance_blocks
from pyro_bnn.curvature.part_store import PartStore
from pyro_bnn.curvature.parts import CurvatureSum, NotAMinimumError, Part
from pyro_bnn.curvature.prior import PriorCurvature, prior_curvature
from pyro_bnn.curvature.selection import Selection, largest, select
from pyro_bnn.curvature.stream import DEFAULT_BUDGET, ExampleStream, count_examples, random_subset
from pyro_bnn.curvature.uses import LinearUse
from pyro_bnn.distributions.precision_normal import BlockNormal, PrecisionNormal
from pyro_bnn.infer.autoguide.linearized import LinearizedGuide, MAPReport
from pyro_bnn.infer.evidence import (
    Per,
    differentiable_evidence,
    optimize_evidence,
    optimize_grid,
    optimize_validation,
    prior_change,
    tau_of,
)
from pyro_bnn.infer.hyperparameters import HyperparameterReport
from pyro_bnn.model.arguments import as_data
from pyro_bnn.model.data import as_batches
from pyro_bnn.ops.distributed import all_reduce_sum, broadcast
from pyro_bnn.ops.jacobian import hvp_operator, wide
from pyro_bnn.ops.memory import available_bytes, readable, require_memory
from pyro_bnn.ops.notice import CurvatureWarning, warn_user

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

    # ------------------------------------------------------------------ fit

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
            ``laplace_approximation(loader)``; or the arguments of the model, as in ``laplace_approximation(x, y)``.
            Batches add up: the result does not depend on how data are split.
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
        data = as_batches(as_data(self.__dict__["_plain_model"], args, kwargs, "laplace_approximation"))
        self.packed.require_function(self.loc, data, hessian=self.curvature == "hessian")
        before = None if override or not self.is_fitted else self.part_store.get()
        with self.packed.continuing(None if override else self._covered if before is not None else {}):
            if before is None:
                self._select(data, generator)
            found, parts, posterior = self._resolved(data, generator, before)
            prior, prior_value = found.prior, found.log_prior
            if self.curvature == "hessian" and self.structure != "full":
                index = torch.cat([part.index for part in parts])
                scale = posterior.variance[index].sqrt()
                require_minimum(
                    self._joint_hessian(index, data, prior), scale, index, self.packed.space, len(self.loc)
                )
            coverage = self.packed.last_coverage
        assert coverage is not None
        value = -found.log_likelihood - prior_value
        gradient = found.gradient + prior.gradient
        if before is not None:
            assert self.log_joint is not None
            assert self.gradient is not None
            # the prior of this call counts in neither value nor gradient
            value = value + prior_value - self.log_joint
            gradient = gradient - prior.gradient + self.gradient
        self._report(posterior, parts, value, gradient)
        self.part_store.set(parts)
        self._covered = coverage.covered
        self.gradient = gradient
        self.log_joint = -value
        self.log_prior = prior_value
        self.prior_gradient = prior.gradient
        self.tau = None
        self._posterior = posterior
        if not coverage.is_partial:  # the gradient of some of the data is not zero at the point estimate
            self._warn_unconverged(
                map_tolerance if map_tolerance is not None else (0.1 if self.curvature == "hessian" else 1.0)
            )
        return self

    def _resolved(
        self, data: Any, generator: torch.Generator | None, before: Sequence[Part] | None
    ) -> tuple[Accumulated, list[Part], PrecisionNormal]:
        """Curvature and posterior, summed in float64 where the guide's own precision does not suffice."""
        dtype = wide(self.loc).dtype
        found, parts = self.curvature_parts(data, generator, before)
        sums = dtype
        if dtype == torch.float32 and self.curvature != "hessian" and self.structure != "diagonal":
            try:
                posterior = self._assemble(parts, None)
                if expected_error(posterior, dtype) <= TOLERANCE:
                    return found, parts, posterior
            except NotAMinimumError:  # by rounding, perhaps
                pass
            sums = torch.float64
            found, parts = self.curvature_parts(data, generator, before, dtype=sums)
        posterior = self._assemble(parts, None)
        error = expected_error(posterior, sums)
        if error > TOLERANCE:
            warn_user(describe(posterior, error), CurvatureWarning)
        return found, parts, posterior

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
        total = self._make_sum(data, generator, dtype)
        if before is not None:
            total.resume(before)
        found = self._accumulate(total, data, generator)
        return found, total.parts(found.prior)

    def _index(self) -> Tensor:
        """Positions of the random entries."""
        if self.active is None:
            return torch.arange(len(self.loc), device=self.loc.device)
        return self.active.nonzero().squeeze(-1)

    def _select(self, data: Any, generator: torch.Generator | None) -> None:
        batch = as_batches(data).first
        if self.sites is not None:  # a few examples show which layer is the last
            batch = next(ExampleStream(self.packed, self.loc).chunks(batch))
        self.active = select(self.packed, self.sites, self.loc.detach(), batch)
        if self.subnetwork is None:
            return
        assert self.subnetwork_size is not None
        if self.subnetwork == "largest_magnitude":
            values = self.loc.detach().abs()
        elif self.subnetwork == "random":
            values = torch.rand(len(self.loc), generator=generator).to(self.loc)
        else:
            total = CurvatureSum([DiagonalPart.zero(self._index(), wide(self.loc.detach()))])
            stream = ExampleStream(self.packed, self.loc, self.active, budget=self.budget)
            found = accumulate_examples(total, stream, data, lambda site: site.cotangents("ggn"))
            (part,) = total.parts(found.prior)
            values = torch.zeros_like(self.loc)
            values[part.index] = (part.tensors["curvature"] + part.prior).reciprocal()
        values = values.detach()
        broadcast([values])  # every process takes the same entries
        self.active = largest(values, self.subnetwork_size, self.active)

    def _make_sum(
        self, data: Any, generator: torch.Generator | None, dtype: torch.dtype | None = None
    ) -> CurvatureSum:
        index, latent = self._index(), wide(self.loc.detach()).to(dtype)
        self._require_memory(index, data)
        if self.structure in ("full", "diagonal", "kronecker", "block"):
            return self.empty_sum(dtype)
        options: dict[str, Any] = {
            "method": self.structure,
            "rank": self.rank,
            "generator": generator,
            "memory_limit": self.memory_limit,
        }
        if self.curvature == "hessian":
            return LowRankSum(index, latent, operator=self._hessian(index, data), **options)
        subset = None
        if self.subset_size is not None:
            subset = random_subset(self._stream(), data, self.subset_size, generator)
        elif self.structure == "function_space":
            options["num_examples"] = count_examples(self._stream(), data)
        # every pass over the data must give the same rows
        seed = int(torch.randint(2**62, (), generator=generator))

        def rows(reserve: Reserve) -> Iterator[Tensor]:
            stream = self._stream()
            chunks = stream.run(data) if subset is None else subset.run(stream)
            cotangents = self._cotangents(torch.Generator().manual_seed(seed))
            return curvature_rows(chunks, cotangents, index, reserve, subset.weight if subset else 1.0)

        return LowRankSum(index, latent, rows=rows, **options)

    def empty_sum(self, dtype: torch.dtype | None = None) -> CurvatureSum:
        """
        :param dtype: the precision of the sum; by default the guide's.
        :return: a sum of curvatures over data, still zero, in the structures "full", "diagonal", "kronecker", "block".
        """
        index, latent = self._index(), wide(self.loc.detach()).to(dtype)
        if self.structure == "kronecker":
            return KroneckerSum(index, latent, self.sharing)
        if self.structure == "diagonal":
            return CurvatureSum([DiagonalPart.zero(index, latent)])
        groups = [index] if self.structure == "full" else self._groups(index)
        return CurvatureSum([DensePart.zero(group, latent) for group in groups])

    def _groups(self, index: Tensor) -> list[Tensor]:
        """The random entries of each site."""
        mask = torch.zeros(len(self.loc), dtype=torch.bool, device=index.device)
        mask[index] = True
        places = torch.arange(len(self.loc), device=index.device)
        groups = [places[s][mask[s]] for s in self.packed.space.slices.values()]
        return [group for group in groups if len(group)]

    def _require_memory(self, index: Tensor, data: Any) -> None:
        """Raises before anything is allocated, and names the structures that would fit."""
        limit = available_bytes(self.loc.device) if self.memory_limit is None else self.memory_limit
        sizes = self._memory(index, data)
        if sizes[self.structure] <= limit:
            return
        order = ("full", "block", "kronecker", "low_rank", "diagonal")
        fitting = [f"structure={name!r} ({readable(sizes[name])})" for name in order if sizes[name] <= limit]
        advice = (
            f"These would fit: {', '.join(fitting)}; or take fewer latents: sites='last_layer', a subnetwork."
            if fitting
            else "No structure over all of these fits: take fewer latents with sites='last_layer' or a subnetwork."
        )
        require_memory(
            sizes[self.structure],
            f"structure={self.structure!r} over {len(index):,} entries",
            self.loc.device,
            advice,
            limit,
        )

    def _memory(self, index: Tensor, data: Any) -> dict[str, float]:
        """Peak bytes of each structure: the sum, its decomposition, and what both need to be computed."""
        q = len(index)
        factors = q
        if self.structure in ("kronecker", "full", "block"):
            kept = self._linear_shapes(data)
            covered = sum(out * into for out, into in kept)
            # offsets and the like are dense blocks of at most DENSE_LIMIT entries
            factors = sum(out**2 + into**2 for out, into in kept) + (q - covered) * min(
                q - covered, DENSE_LIMIT
            )
        numbers = {
            "full": 4 * q**2,
            "block": 4 * sum(len(group) ** 2 for group in self._groups(index)),
            "kronecker": 3 * factors + 2 * q,
            "diagonal": 3 * q,
            "low_rank": 6 * q * (self.rank + 10),
            "nystrom": 10 * q * self.rank,
            "function_space": 3 * q,  # what follows is checked row by row
        }
        itemsize = wide(self.loc.detach()).element_size()
        return {name: float(number * itemsize) for name, number in numbers.items()}

    def _linear_shapes(self, data: Any) -> list[tuple[int, int]]:
        """Shapes of the weights of linear maps, by one pass over two data points."""
        batch = as_batches(data).first
        rows = self.packed.rows(self.loc, batch, 1)
        latent = self.loc.detach().clone().requires_grad_(True)
        with Capture(latent, self.active) as capture:
            few = rows[0].take((*batch, {}), slice(0, 2))[:2] if rows and rows[0].separate else batch
            self.packed.trace(latent, few)
        found = {}
        for use in capture.uses:
            if isinstance(use, LinearUse):
                found[int(use.index.reshape(-1)[0])] = (use.index.shape[0], use.index.shape[1])
        return list(found.values())

    def _stream(self, *, differentiable: bool = False) -> ExampleStream:
        return ExampleStream(
            self.packed, self.loc, self.active, budget=self.budget, differentiable=differentiable
        )

    def _cotangents(self, generator: torch.Generator | None) -> Callable[[Any], Any]:
        kind: Any = self.curvature
        return lambda site: site.cotangents(kind, num_samples=self.num_samples, generator=generator)

    def _accumulate(self, total: CurvatureSum, data: Any, generator: torch.Generator | None) -> Accumulated:
        if isinstance(total, LowRankSum) or self.curvature == "hessian":
            value, gradient = self.negative_log_joint(data)
            latent = self.loc.detach().clone().requires_grad_(True)
            trace = self.packed.trace(latent, as_batches(data).first)
            if self.curvature != "hessian":
                require_scores(self.packed, trace, latent)
            prior = prior_curvature(self.packed, latent, trace, chunk_size=self.chunk_size)
            log_prior = self.packed.log_prior(latent, trace).detach()
            if not isinstance(total, LowRankSum):
                accumulator = CurvatureAccumulator(
                    self.packed, self.loc, "hessian", chunk_size=self.chunk_size
                )
                accumulate_operators(total, accumulator, data)
            return Accumulated(prior, log_prior, -value - log_prior, gradient - prior.gradient)
        return accumulate_examples(total, self._stream(), data, self._cotangents(generator))

    def _hessian(self, index: Tensor, data: Any) -> Callable[[Tensor], Tensor]:
        accumulator = CurvatureAccumulator(self.packed, self.loc, "hessian", chunk_size=self.chunk_size)

        def multiply(v: Tensor) -> Tensor:
            full = v.new_zeros(v.shape[0], len(self.loc))
            full[:, index] = v
            total = torch.zeros_like(v)
            for _, value in accumulator.likelihood_terms(data):
                if value.requires_grad:
                    total = total + hvp_operator(value, accumulator.latent)(full)[:, index]
            return total

        return multiply

    def _joint_hessian(self, index: Tensor, data: Any, prior: PriorCurvature) -> Callable[[Tensor], Tensor]:
        likelihood, own = self._hessian(index, data), prior.restricted(index)

        def multiply(v: Tensor) -> Tensor:
            image = likelihood(v.to(self.loc))
            all_reduce_sum([image])
            return image + own(v)

        return multiply

    # ------------------------------------------------------------------ posterior

    def to_point_estimate(self) -> Self:
        """See :meth:`LinearizedGuide.to_point_estimate`."""
        self.part_store.set([])
        return super().to_point_estimate()

    def _assemble(self, parts: list[Part], tau: Tensor | None) -> PrecisionNormal:
        loc = wide(self.loc.detach()).clone()
        try:
            pieces = [
                (part.index, part.posterior(loc, None if tau is None else tau_of(part, tau)))
                for part in parts
            ]
        except NotAMinimumError as error:
            where = blame(self.packed.space, parts, len(loc))
            if self.curvature == "hessian":
                raise NotAMinimumError(f"curvature={self.curvature!r}: {error}{where}") from None
            raise NotAMinimumError(
                f"curvature={self.curvature!r} is positive semi-definite, but together with the prior it is not "
                f"positive definite in {loc.dtype}: the prior's curvature is not positive, or too small for the "
                f"precision. Use float64 or a narrower prior.{where} ({error})"
            ) from None
        for part, (index, piece) in zip(parts, pieces, strict=True):
            sums = part.tensors.get("curvature", part.prior).dtype
            require_resolved(piece, index, self.packed.space, len(loc), sums)
        if len(pieces) == 1 and torch.equal(pieces[0][0], torch.arange(len(loc), device=loc.device)):
            return pieces[0][1]
        return BlockNormal(loc, pieces)

    def _report(self, posterior: PrecisionNormal, parts: list[Part], value: Tensor, gradient: Tensor) -> None:
        random = torch.zeros_like(gradient)
        index = torch.cat([part.index for part in parts])
        random[index] = gradient[index]
        decrement = posterior.half_solve_transposed(random).norm()
        smallest = float(posterior.smallest_precision)
        self.map_report = MAPReport(float(value), float(random.norm()), float(decrement), smallest)

    def _make_posterior(self) -> dist.TorchDistribution | None:
        parts = self.part_store.get()
        return self._assemble(parts, self.tau) if parts else None

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

    def log_evidence(self, tau: Tensor | None = None, *, data: Any = None) -> Tensor:
        r"""
        The Laplace approximation of the log marginal likelihood,
        :math:`\log p(D) \approx -L(\hat u) + \tfrac p2 \log 2\pi - \tfrac12 \log\det P`.

        An approximation, exact for linear-Gaussian models; MacKay (1992). Latents that stay point estimates count
        with their prior density at the estimate.

        :param tau: multipliers of the prior precision, a scalar or shape ``(p,)``, in which the result is
            differentiable; by default those in use. They are exact for Gaussian priors; other priors are replaced by
            the Gaussian with the same gradient and curvature at the point estimate.
        :param data: with the data of the approximation, the evidence at the present values of the model's parameters,
            differentiable in all of them; see :func:`~pyro_bnn.infer.evidence.differentiable_evidence`.
        :return: a scalar, in nats.
        :raises RuntimeError: before ``laplace_approximation(data)``.
        """
        self.posterior  # noqa: B018  raises before laplace_approximation
        if data is not None:
            return differentiable_evidence(self, data)
        assert self.log_joint is not None
        return self._evidence_of(self.part_store.get(), self.log_joint, self.tau if tau is None else tau)

    def _evidence_of(self, parts: Sequence[Part], log_joint: Tensor, tau: Tensor | None = None) -> Tensor:
        total = log_joint.double()
        for part in parts:
            scale = None if tau is None else tau_of(part, tau)
            log_det = part.posterior(wide(self.loc.detach()), scale).log_det_precision
            total = total + 0.5 * (len(part.index) * math.log(2 * math.pi) - log_det)
            if scale is not None:
                assert self.prior_gradient is not None
                total = total + prior_change(part, self.prior_gradient[part.index], scale)
        return total

    @torch.inference_mode(False)
    @torch.enable_grad()
    def optimize_hyperparameters(
        self,
        data: Any = None,
        *,
        method: Literal["evidence", "validation", "grid"] = "evidence",
        per: Per = "global",
        candidates: Sequence[float] | None = None,
        num_samples: int = 100,
    ) -> HyperparameterReport:
        """
        Tunes multipliers of the prior precision after the fit, the point estimate held fixed.

        :param data: for ``"validation"``, held-out data with observations.
        :param str method: ``"evidence"`` (Newton's method), ``"grid"`` (the best evidence among ``candidates``) or
            ``"validation"`` (the best log predictive density of held-out data among ``candidates``).
        :param str per: ``"global"``, one multiplier for all; ``"layer"``, one for the sites of each module (their names up
            to the last dot); ``"site"``. ``"grid"`` and ``"validation"`` then search one after the other, repeatedly.
        :param candidates: multipliers; 21 values from 1e-4 to 1e4 by default.
        :param int num_samples: draws where the predictive has no closed form.
        :return: the multipliers, which are in use from now on, and the objective of each evaluation. A
            :class:`~pyro_bnn.infer.hyperparameters.HyperparameterWarning` says where they are at the edge of their range.
        :raises ValueError: for an unknown method or missing data.
        """
        check_option("method", method, Literal["evidence", "validation", "grid"])
        check_option("per", per, Per)
        self.posterior  # noqa: B018  raises before laplace_approximation
        grid = [10.0 ** (0.4 * i - 4) for i in range(21)] if candidates is None else list(candidates)
        if method == "validation":
            if data is None:
                raise ValueError("method='validation' needs held-out data, e.g. data=(x_val, y_val)")
            return optimize_validation(self, as_batches(data), grid, per=per, num_samples=num_samples)
        if method == "grid":
            return optimize_grid(self, grid, per=per)
        return optimize_evidence(self, per=per)
