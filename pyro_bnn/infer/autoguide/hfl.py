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
from pyro_bnn.infer.autoguide.captured import (
    VarianceBounds,
    bounds_at,
    certificate_at,
    enclosure_of,
    join,
    most_missed,
    site_functionals,
    spread,
)
from pyro_bnn.infer.autoguide.linearized import LinearizedGuide
from pyro_bnn.infer.autoguide.point_estimate import MAPReport
from pyro_bnn.infer.autoguide.remainder import Remainder, precision_of, split
from pyro_bnn.infer.hfl.api import solve
from pyro_bnn.infer.hfl.certificate import Certificate
from pyro_bnn.infer.hfl.checks import check_accuracy, check_sizes
from pyro_bnn.infer.hfl.diagnostics import HFLWarning
from pyro_bnn.infer.hfl.functionals import Functionals
from pyro_bnn.infer.hfl.low_rank import low_rank_factor, unit_scale
from pyro_bnn.infer.hfl.result import HFLResult
from pyro_bnn.infer.hfl.run import Method, solve_for
from pyro_bnn.infer.hfl.sandwich import sandwich
from pyro_bnn.infer.hfl.setup import set_up
from pyro_bnn.infer.hfl.solver import Preconditioner
from pyro_bnn.model.arguments import takes_data
from pyro_bnn.ops.block_cg import ConjugateBasis
from pyro_bnn.ops.enclosure import Enclosure
from pyro_bnn.ops.notice import warn_user
from pyro_bnn.ops.options import require_number

#: What ``laplace_approximation`` makes: the Gaussian, what it is made of, and what bounds the variances of all else.
_BUFFERS = (
    *("factor", "gradients", "displacements", "covariance", "basis", "remainder_precision"),
    *("bound_precision", "directions", "images", "gap"),
)


class AutoHessianFreeLaplace(LinearizedGuide):
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
    factor: Tensor | None
    gradients: Tensor | None
    displacements: Tensor | None
    covariance: Tensor | None
    basis: Tensor | None
    remainder_precision: Tensor | None
    bound_precision: Tensor | None
    directions: Tensor | None
    images: Tensor | None
    gap: Tensor | None

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
        self.result: HFLResult | None = None
        self._covered = ""
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
        """
        (data,) = args
        if self.gradients is None:
            raise RuntimeError(
                "the guide has no targets yet: call laplace_approximation(data, targets) first"
            )
        self._add(data, self._solve(data, targets, options))
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

    @takes_data(after=("validation",), also=(solve,))
    @torch.inference_mode(False)
    @torch.enable_grad()
    def cover(
        self,
        *args: Any,
        validation: Any,
        missed: float = 0.1,
        max_targets: int = 512,
        batch_size: int = 16,
        map_tolerance: float = 0.1,
        **options: Any,
    ) -> Self:
        r"""
        Makes outputs at validation inputs targets, where the guide misses most, until it is certain to miss at most a given
        fraction of the variance of every one of them.

        Solves share all products, so that later targets cost less. What the guide misses at an output is at most
        :math:`1 - v_\text{guide}/v_\text{upper}` (:meth:`variance_bounds`).

        :param args: the data of :meth:`laplace_approximation`, perhaps followed by the validation inputs.
        :param validation: one batch of arguments of the model at inputs that stand for those to come, ``(x_validation,)``;
            observations are not needed. Memory is that of the gradients of all their outputs.
        :param float missed: the fraction that may be missed.
        :param int max_targets: how many are added at most; a warning says where they were not enough.
        :param int batch_size: how many are solved for at once.
        :param map_tolerance: as for :meth:`laplace_approximation`.
        :param options: as for :meth:`laplace_approximation`.
        :return: the guide itself.
        :raises ValueError: where variances cannot be certified, saying why.

        Example::

            >>> import torch, pyro, pyro.distributions as dist
            >>> def model(x, y=None):
            ...     w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            ...     with pyro.plate("data", len(x)):
            ...         return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)
            >>> x, y = torch.randn(20, 3), torch.randn(20)
            >>> guide = AutoHessianFreeLaplace(model, curvature="ggn").initialize(x, y).polish((x, y))
            >>> guide = guide.cover((x, y), (x,), batch_size=1)
            >>> bool(guide.variance_bounds(x)["obs"].captured.min() > 0.9), len(guide.gradients) <= 3
            (True, True)
        """
        (data,) = args
        self._refuse_sandwich()
        require_number("missed", missed, above=0, below=1)
        check_sizes(max_targets=max_targets, batch_size=batch_size)
        options = self._options() | options
        chunk_size = options.pop("chunk_size")
        problem, functionals = set_up(self, data, validation, None, self.curvature, chunk_size=chunk_size)
        basis = ConjugateBasis(len(self.loc))
        if self.directions is not None and self.images is not None:
            basis.append(self.directions, self.images)
        left, captured = max_targets, 0.0
        chosen = spread(len(functionals), min(batch_size, left), self.loc.device)
        while True:
            if self.gradients is not None:
                chosen, captured = self._next(functionals, min(batch_size, left))
            if captured >= 1 - missed or not len(chosen):
                break
            result = solve_for(problem, functionals.subset(chosen), basis=basis, **options)
            left -= len(chosen)
            if basis.keeps_all:  # among them what the guide has
                self.directions = self.images = None
            self._begin(data, result, map_tolerance) if self.gradients is None else self._add(data, result)
        self._covered = f"at least {captured:.4f} of the variance, by {max_targets - left} targets for it"
        if captured < 1 - missed:
            warn_user(
                f"with {max_targets - left} more targets the guide is certain to have {captured:.3g} of the variance of every "
                f"output at the validation inputs, not {1 - missed:.3g}: raise max_targets, or lower tolerance",
                HFLWarning,
            )
        return self

    def _next(self, functionals: Functionals, number: int) -> tuple[Tensor, float]:
        """Which of some functionals to solve for next, and the smallest fraction of a variance that the guide has."""
        enclosure = self._enclosure(self.result)
        bounds = bounds_at(functionals, self.posterior, enclosure, float(self.gap or 0.0))
        flat = VarianceBounds(*(side.reshape(-1) for side in bounds))
        assert self.factor is not None
        chosen = most_missed(functionals.gradients, enclosure, self.factor, flat, number)
        return chosen, float(flat.captured.min())

    @takes_data(one_batch=True)
    @torch.inference_mode(False)
    @torch.enable_grad()
    def variance_bounds(self, *args: Any, least: float = 0.5, **kwargs: Any) -> dict[str, VarianceBounds]:
        r"""
        Bounds of the linearised Laplace variance of outputs at any inputs, from both sides, beside what the guide has there.

        The guide's variance is that of the full :math:`J P^{-1} J^\top` at its targets and less elsewhere. The bounds follow from
        the products of the solves and the curvature of the prior, and need none here; far from all targets the upper one
        tends to the prior's variance.

        :param args: arguments of the model; observations are not needed.
        :param float least: the fraction of a variance below which a warning says that the guide may miss the rest.
        :param kwargs: keyword arguments of the model.
        :return: by observed site, bounds and variance of its parameters, of the shape of the linearised outputs.
        :raises ValueError: where variances cannot be certified, saying why.
        :raises RuntimeError: before ``laplace_approximation(data, targets)``.

        Example::

            >>> import torch, pyro, pyro.distributions as dist
            >>> def model(x, y=None):
            ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            ...     with pyro.plate("data", len(x)):
            ...         return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)
            >>> x, y = torch.eye(2), torch.tensor([1.0, -1.0])
            >>> guide = AutoHessianFreeLaplace(model, curvature="ggn").initialize(x, y).polish((x, y))
            >>> guide = guide.laplace_approximation((x, y), targets=(x[:1],))
            >>> bounds = guide.variance_bounds(x, least=0.0)["obs"]
            >>> bounds.variance.squeeze(-1)  # the second input is no target
            tensor([0.2000, 0.0000])
            >>> bounds.upper.squeeze(-1)  # and might be known by its prior alone
            tensor([0.2000, 1.0000])
        """
        (batch,) = args
        posterior: Any = self.posterior
        self._refuse_sandwich()
        require_number("least", least, least=0)
        enclosure, gap = self._enclosure(self.result), float(self.gap or 0.0)
        found = {
            name: bounds_at(functionals, posterior, enclosure, gap)
            for name, functionals in site_functionals(self.packed, self.loc.detach(), batch, self.chunk_size)
        }
        captured = torch.cat([bounds.captured.reshape(-1) for bounds in found.values()])
        missing = captured < least
        if bool(missing.any()):
            warn_user(
                f"of the variance of {int(missing.sum())} of {len(captured)} outputs the guide is certain to have less than "
                f"{least:.3g}, of one only {float(captured.min()):.3g}: make them targets by add_targets or cover",
                HFLWarning,
            )
        return found

    def _enclosure(self, result: HFLResult | None) -> Enclosure:
        """What is known of the full covariance."""
        precision, directions, images = self.bound_precision, self.directions, self.images
        if precision is None or directions is None or images is None:
            why = "it was fitted by an earlier version" if result is None else result.uncertified
            raise ValueError(f"the guide's variances are not certified: {why}.")
        return enclosure_of(precision, directions, images)

    def _refuse_sandwich(self) -> None:
        if self.robust:
            raise ValueError(
                "robust=True: the guide's covariance is the sandwich, of which no bounds are known: leave robust out"
            )

    def facts(self) -> dict[str, str]:
        """What is certain of the variances, for :meth:`summary`."""
        certificate = None if self.result is None else self.result.certificate
        if certificate is None or self.result is None:
            why = "" if self.result is None else self.result.uncertified
            return {"not certified": why} if why else {}
        if self.robust:
            return {}
        captured = VarianceBounds(certificate.lower, certificate.upper, self.result.variances).captured
        rows = {"captured at the targets": f"at least {float(captured.min()):.4f} of the variance"}
        return rows | ({"captured at the validation inputs": self._covered} if self._covered else {})

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
            self._certify(result)
            if self.method != "probe":
                own["certificate"] = self._certificate(J)
        self.result = replace(result, **own)
        self._posterior = None

    def _certify(self, result: HFLResult) -> None:
        """Keeps what bounds all variances: the prior's precision, and the directions of all solves."""
        certificate = result.certificate
        assert certificate is not None
        self.bound_precision = certificate.precision
        self.directions, self.images = join(result, self.directions, self.images)
        gap = max(certificate.gap, 0.0 if self.gap is None else float(self.gap))
        self.gap = torch.tensor(gap, device=self.loc.device)

    def _certificate(self, rows: Tensor) -> Certificate:
        assert self.bound_precision is not None
        return certificate_at(self.bound_precision, self._enclosure(None), rows, float(self.gap or 0.0))

    @override
    def to_point_estimate(self) -> Self:
        self.result = None
        return super().to_point_estimate()

    def _make_posterior(self) -> dist.TorchDistribution | None:
        if self.factor is None:
            return None
        return FactorNormal(self.loc.detach().clone(), self.factor, self.basis, self.remainder_precision)
