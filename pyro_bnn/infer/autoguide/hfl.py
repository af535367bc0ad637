# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Hessian-free Laplace as a Pyro guide."""

from collections.abc import Callable
from typing import Any, Self

import pyro.distributions as dist
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor

from pyro_bnn.distributions.factor_normal import FactorNormal
from pyro_bnn.infer.autoguide.linearized import LinearizedGuide, MAPReport
from pyro_bnn.infer.curvature import Curvature, check_option
from pyro_bnn.infer.data import iter_batches
from pyro_bnn.infer.hfl import HFLResult, Method, displacements
from pyro_bnn.infer.packed import check_data


class AutoHessianFreeLaplace(LinearizedGuide):
    r"""
    A low-rank Gaussian guide :math:`u = \hat u + W z,\ z\sim N(0, I_r)`, from m displacements of the point estimate.

    Its predictive covariance at the targets is exactly that of the linearised Laplace approximation with the same
    curvature, :math:`J P^{-1} J^\top`, yet no p × p matrix is formed: memory is O(p m). Away from the targets it
    never exceeds the full posterior variance, and underestimates it by the conditional variance given the targets:
    offer targets that cover the inputs you will predict at.

    :param callable model: a Pyro model, called as ``model(*args, **kwargs)`` with and without observations.
    :param str method: ``"cg"`` (the limit of vanishing perturbations; exact up to ``tolerance``) or ``"central"``
        (central differences of perturbed minima).
    :param str curvature: ``"hessian"``, or (``"cg"`` only) ``"ggn"``.
    :param float epsilon: see :func:`pyro_bnn.infer.hfl.displacements`.
    :param float tolerance: relative residual of the solves.
    :param callable init_loc_fn: a per-site initialisation function, as for any Pyro autoguide.
    :param int chunk_size: how many reverse passes run at once; memory grows with it, results do not change.
    :raises ValueError: for an unknown method or curvature, or ``method="central"`` with the GGN.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)
        >>> x, y = torch.eye(2), torch.tensor([1.0, -1.0])
        >>> guide = AutoHessianFreeLaplace(model).initialize(x, y).polish((x, y))
        >>> guide = guide.laplace_approximation((x, y), targets=(x,))
        >>> guide.result.variance  # 1 / (1 / 0.5**2 + 1)
        tensor([0.2000, 0.2000])

    **References**

    [1] McInerney, Kallus (2024), "Hessian-free Laplace in Bayesian deep learning".
    """

    has_density = False

    factor: Tensor | None

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        method: Method = "cg",
        curvature: Curvature = "hessian",
        epsilon: float | None = None,
        tolerance: float | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        chunk_size: int = 256,
    ) -> None:
        check_option("method", method, Method)
        check_option("curvature", curvature, Curvature)
        if method == "central" and curvature != "hessian":
            raise ValueError(
                "method 'central' perturbs the loss itself, whose curvature is the exact Hessian: use "
                "curvature='hessian', or method='cg' for the GGN"
            )
        super().__init__(model, init_loc_fn=init_loc_fn, chunk_size=chunk_size)
        self.method = method
        self.curvature = curvature
        self.epsilon = epsilon
        self.tolerance = tolerance
        self.result: HFLResult | None = None
        self.register_buffer("factor", None)

    def laplace_approximation(
        self, data: Any, targets: Any, *, map_tolerance: float = 0.1, max_iter: int | None = None
    ) -> Self:
        r"""
        Solves for the displacements at the targets and turns the guide into a low-rank Gaussian.

        :param data: one batch (a tuple of arguments of the model) or an iterable of batches, **with observations**
            and covering every data point once.
        :param targets: one batch of arguments of the model at the inputs where the predictive covariance is wanted,
            e.g. ``(x_test,)``; observations are not needed.
        :param map_tolerance: the Newton decrement, in posterior standard deviations, above which a warning says
            that the point estimate has not converged.
        :param max_iter: largest number of products of a solve; default 10 p.
        :return: the guide itself.
        :raises NotAMinimumError: if a solve meets non-positive curvature or a variance is negative.
        :raises ValueError: for data that are empty, not finite, or without observations.
        """
        check_data(data)
        check_data(targets)
        (batch,) = iter_batches(targets)
        result = displacements(
            self.packed,
            self.loc.detach(),
            data,
            batch,
            method=self.method,
            curvature=self.curvature,
            epsilon=self.epsilon,
            tolerance=self.tolerance,
            max_iter=max_iter,
        )
        value, gradient = self.negative_log_joint(data)
        self.result = result
        self.factor = result.factor
        self._posterior = None
        self.map_report = MAPReport(
            float(value), float(gradient.norm()), result.newton_decrement, result.smallest_curvature
        )
        self._warn_unconverged(map_tolerance)
        return self

    def _make_posterior(self) -> dist.TorchDistribution | None:
        if self.factor is None:
            return None
        return FactorNormal(self.loc.detach().clone(), self.factor)
