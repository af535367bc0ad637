# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A guide of low rank that knows how much of any variance it is certain to have."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

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
from pyro_bnn.infer.hfl.api import solve
from pyro_bnn.infer.hfl.certificate import Certificate
from pyro_bnn.infer.hfl.checks import check_accuracy, check_sizes
from pyro_bnn.infer.hfl.diagnostics import HFLWarning
from pyro_bnn.infer.hfl.functionals import Functionals
from pyro_bnn.infer.hfl.loss import Problem
from pyro_bnn.infer.hfl.result import HFLResult
from pyro_bnn.infer.hfl.run import solve_for
from pyro_bnn.infer.hfl.setup import set_proximal, set_up
from pyro_bnn.model.arguments import takes_data
from pyro_bnn.model.data import repeatable_batches
from pyro_bnn.ops.block_cg import ConjugateBasis
from pyro_bnn.ops.enclosure import Enclosure
from pyro_bnn.ops.notice import warn_user
from pyro_bnn.ops.options import require_number

#: Options of solves that are whole numbers.
_SIZES = ("rank", "block_size", "num_probes", "num_epochs", "chunk_size", "max_iter")


class CertifiedGuide(LinearizedGuide):
    """
    Base class of :class:`AutoHessianFreeLaplace`: bounds of variances at any input, and targets until they are close.

    A subclass solves for targets (``_begin``, ``_add``) and has the options of that (``_options``).
    """

    robust: bool
    factor: Tensor | None
    gradients: Tensor | None
    bound_precision: Tensor | None
    directions: Tensor | None
    images: Tensor | None
    gap: Tensor | None

    def __init__(self, model: Callable[..., Any], **options: Any) -> None:
        super().__init__(model, **options)
        self.result: HFLResult | None = None
        self._covered = ""

    def _options(self) -> dict[str, Any]:
        raise NotImplementedError

    def _begin(self, data: Any, result: HFLResult, map_tolerance: float) -> None:
        raise NotImplementedError

    def _add(self, data: Any, result: HFLResult) -> None:
        raise NotImplementedError

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
            >>> from pyro_bnn import AutoHessianFreeLaplace
            >>> guide = AutoHessianFreeLaplace(model, curvature="ggn").initialize(x, y).polish((x, y))
            >>> guide = guide.cover((x, y), (x,), batch_size=1)
            >>> bool(guide.variance_bounds(x)["obs"].captured.min() > 0.9), len(guide.gradients) <= 3
            (True, True)
        """
        (data,) = args
        self._refuse_sandwich()
        require_number("missed", missed, above=0, below=1)
        options = self._options() | options
        check_accuracy(options["epsilon"], options["tolerance"])
        sizes = {name: options[name] for name in _SIZES if name in options}
        check_sizes(max_targets=max_targets, batch_size=batch_size, **sizes)
        loss = {name: options.pop(name) for name in ("chunk_size", "correct_gradient") if name in options}
        problem, functionals = set_up(self, data, validation, None, self.curvature, **loss)
        basis = ConjugateBasis(len(self.loc))
        if self.directions is not None and self.images is not None:
            set_proximal(problem, options["proximal"])
            self._require_same_precision(problem)
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

    def _require_same_precision(self, problem: Problem) -> None:
        """Raises where products with the precision are not those of the directions that the guide has."""
        directions, images = self.directions, self.images
        if directions is None or images is None or not len(directions):
            return
        generator = torch.Generator(device=directions.device).manual_seed(0)
        weights = torch.randn(1, len(directions), generator=generator, device=directions.device).to(
            directions
        )
        known = weights @ images
        changed = float((problem.operator(weights @ directions) - known).norm() / known.norm())
        if not changed <= 10 * torch.finfo(known.dtype).eps ** 0.5:
            raise ValueError(
                f"the precision is not that of the targets before (products with it differ by {changed:.2g} of their size): "
                "other data, another proximal term or another prior. Call laplace_approximation(data, targets) anew."
            )

    def _next(self, functionals: Functionals, number: int) -> tuple[Tensor, float]:
        """Which of some functionals to solve for next, and the smallest fraction of a variance that the guide has."""
        enclosure = self._enclosure(self.result)
        bounds = bounds_at(functionals, self.posterior, enclosure)
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
        :return: by observed site, :class:`VarianceBounds` of its parameters, of the shape of the linearised outputs.
        :raises ValueError: where variances cannot be certified, saying why.
        :raises RuntimeError: before ``laplace_approximation(data, targets)``.

        Example::

            >>> import torch, pyro, pyro.distributions as dist
            >>> def model(x, y=None):
            ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            ...     with pyro.plate("data", len(x)):
            ...         return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)
            >>> x, y = torch.eye(2), torch.tensor([1.0, -1.0])
            >>> from pyro_bnn import AutoHessianFreeLaplace
            >>> guide = AutoHessianFreeLaplace(model, curvature="ggn").initialize(x, y).polish((x, y))
            >>> guide = guide.laplace_approximation((x, y), targets=(x[:1],))
            >>> bounds = guide.variance_bounds(x, least=0.0)["obs"]
            >>> bounds.variance.squeeze(-1).round(decimals=4)  # the second input is no target
            tensor([0.2000, 0.0000])
            >>> bool((bounds.upper > 0.1999).all())  # where the full posterior has 0.2, too
            True
        """
        (batch,) = args
        posterior: Any = self.posterior
        self._refuse_sandwich()
        require_number("least", least, least=0)
        enclosure = self._enclosure(self.result)
        found = {
            name: bounds_at(functionals, posterior, enclosure)
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
        return enclosure_of(precision, directions, images, float(self.gap or 0.0))

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

    def _certify(self, data: Any, result: HFLResult) -> int:
        """
        Keeps what bounds all variances: the prior's precision, and the directions of all solves with the gap of their images;
        returns how many products that took.
        """
        certificate = result.certificate
        assert certificate is not None
        self.bound_precision = certificate.precision
        self.directions, self.images = join(result, self.directions, self.images)
        enclosure = enclosure_of(self.bound_precision, self.directions, self.images, None)
        number = enclosure.measure(self._problem(data, result).operator, 3)
        self.gap = torch.tensor(enclosure.gap or 0.0, device=self.loc.device)
        return number

    def _problem(self, data: Any, result: HFLResult) -> Problem:
        """The loss of which a result has the curvature."""
        known: dict[str, Any] = {"proximal": result.proximal, "tau": self.tau, "chunk_size": self.chunk_size}
        return Problem(self.packed, self.loc, repeatable_batches(data), self.curvature, **known)

    def _certificate(self, rows: Tensor) -> Certificate:
        assert self.bound_precision is not None
        return certificate_at(self.bound_precision, self._enclosure(None), rows)
