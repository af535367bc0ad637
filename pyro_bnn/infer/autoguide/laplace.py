# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Laplace approximations of any Pyro model."""

import math
from collections.abc import Callable
from typing import Any, Literal, Self

import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor

from pyro_bnn.distributions.precision_normal import DiagonalNormal, FullNormal, PrecisionNormal
from pyro_bnn.infer.autoguide.linearized import LinearizedGuide, MAPReport
from pyro_bnn.infer.curvature import Curvature, CurvatureAccumulator, NotAMinimumError, check_option
from pyro_bnn.infer.packed import check_data
from pyro_bnn.ops.krylov import largest_eigenvalue

Structure = Literal["full", "diagonal"]


class AutoLaplace(LinearizedGuide):
    r"""
    Laplace approximation :math:`q(u) = N(\hat u, P^{-1})` over the packed unconstrained latents of any Pyro model.

    :math:`\hat u` is the MAP in unconstrained space and :math:`P` the curvature of the negative log joint density
    there: the exact Hessian of the prior plus, for the likelihood, its GGN :math:`\sum_n J_n^\top F_n J_n` or its
    exact Hessian. Predictions go through the linearised model, which for the GGN is the model whose exact posterior
    this is (Immer et al., 2021).

    :param callable model: a Pyro model, called as ``model(*args, **kwargs)`` with and without observations.
    :param str structure: ``"full"`` (p × p) or ``"diagonal"``.
    :param str curvature: ``"ggn"`` (always positive semi-definite) or ``"hessian"`` (exact; needs a converged MAP).
    :param callable init_loc_fn: a per-site initialisation function, as for any Pyro autoguide.
    :param int chunk_size: how many reverse passes run at once; memory grows with it, results do not change.
    :raises ValueError: for an unknown structure or curvature.

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
    """

    precision: Tensor | None
    log_joint: Tensor | None

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        structure: Structure = "full",
        curvature: Curvature = "ggn",
        init_loc_fn: Callable[..., Any] = init_to_median,
        chunk_size: int = 256,
    ) -> None:
        check_option("structure", structure, Structure)
        check_option("curvature", curvature, Curvature)
        super().__init__(model, init_loc_fn=init_loc_fn, chunk_size=chunk_size)
        self.structure = structure
        self.curvature = curvature
        self.register_buffer("precision", None)
        self.register_buffer("log_joint", None)

    def laplace_approximation(self, data: Any, *, map_tolerance: float | None = None) -> Self:
        r"""
        Computes the curvature at the point estimate and turns the guide into a Gaussian.

        :param data: one batch (a tuple of arguments of the model) or an iterable of batches, **with observations**
            and covering every data point once. Batches add up: the result does not depend on how data are split.
        :param map_tolerance: the Newton decrement, in posterior standard deviations, above which a warning says
            that the point estimate has not converged; default 0.1 for the exact Hessian and 1 for the GGN.
        :return: the guide itself.
        :raises NotAMinimumError: if the curvature is not positive definite.
        :raises ValueError: for data that are empty, not finite, without observations, or that do not cover the
            plates of the model.
        """
        check_data(data)
        accumulator = CurvatureAccumulator(self.packed, self.loc, self.curvature, chunk_size=self.chunk_size)
        precision = accumulator.matrix(data) if self.structure == "full" else accumulator.diagonal(data)
        value, gradient = self.negative_log_joint(data)
        posterior = self._checked(precision, gradient)
        decrement = posterior.half_solve_transposed(gradient).norm()
        if self.structure == "full":
            inverse = largest_eigenvalue(
                lambda v: posterior.half_solve(posterior.half_solve_transposed(v)), gradient
            )
            smallest = inverse.reciprocal()
        else:
            smallest = precision.min()
        self.map_report = MAPReport(float(value), float(gradient.norm()), float(decrement), float(smallest))
        self.precision = precision
        self.log_joint = -value
        self._posterior = posterior
        self._warn_unconverged(
            map_tolerance if map_tolerance is not None else (0.1 if self.curvature == "hessian" else 1.0)
        )
        return self

    def _checked(self, precision: Tensor, gradient: Tensor) -> PrecisionNormal:
        if not torch.isfinite(precision).all():
            raise NotAMinimumError(
                "the curvature has non-finite entries: check the data and the point estimate"
            )
        if self.structure == "full":
            if torch.linalg.cholesky_ex(precision).info == 0:
                return FullNormal(self.loc.detach().clone(), precision)
            values = torch.linalg.eigvalsh(precision)
        else:
            if (precision > 0).all():
                return DiagonalNormal(self.loc.detach().clone(), precision)
            values = precision
        raise NotAMinimumError(
            f"the {self.curvature} at the point estimate is not positive definite: {int((values <= 0).sum())} of "
            f"{values.shape[0]} {'eigenvalues' if self.structure == 'full' else 'diagonal entries'} are not positive, "
            f"the smallest is {float(values.min()):.3g} (gradient norm {float(gradient.norm()):.3g}). The point is "
            "not a minimum. Call guide.polish(data) in float64, train longer, or use curvature='ggn'."
        )

    def _make_posterior(self) -> dist.TorchDistribution | None:
        if self.precision is None:
            return None
        family = FullNormal if self.structure == "full" else DiagonalNormal
        return family(self.loc.detach().clone(), self.precision)

    def log_evidence(self) -> Tensor:
        r"""
        The Laplace approximation of the log marginal likelihood,
        :math:`\log p(D) \approx -L(\hat u) + \tfrac p2 \log 2\pi - \tfrac12 \log\det P`.

        An approximation, exact for linear-Gaussian models; MacKay (1992).

        :return: a scalar, in nats.
        :raises RuntimeError: before ``laplace_approximation(data)``.
        """
        posterior = self.posterior
        assert isinstance(posterior, PrecisionNormal)
        assert self.log_joint is not None
        p = self.loc.shape[0]
        return self.log_joint + 0.5 * (p * math.log(2 * math.pi) - posterior.log_det_precision)
