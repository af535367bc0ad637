# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Weights of several posteriors that predict best together."""

import math

import torch
from torch import Tensor

from pyro_bnn.ops.options import require_number


def stacking_weights(log_densities: Tensor, *, tolerance: float = 1e-8) -> Tensor:
    r"""
    The weights with which a mixture of K predictive densities scores best at N points,

    .. math:: \max_w \frac1N\sum_n \log\sum_k w_k p_k(y_n), \qquad w_k \ge 0,\ \sum_k w_k = 1.

    The problem is concave. It is solved by Newton's method on barriers :math:`\mu\sum_k\log w_k` with :math:`\mu\to0`, and the
    result is certified: with :math:`g_k = \frac1N\sum_n p_k(y_n)/\sum_j w_j p_j(y_n)`, Jensen's inequality bounds what any
    other weights can gain by :math:`\log\max_k g_k` (:func:`stacking_gap`). Where several weights are best, as for two equal
    columns, equal ones share.

    :param Tensor log_densities: :math:`\log p_k(y_n)` at points that posterior k has not seen (held-out data, leave-one-out), in
        nats, shape ``(K, N)``; minus infinity where a density is zero.
    :param float tolerance: the largest gap, in nats per point.
    :return: the weights, shape ``(K,)``.
    :raises ValueError: for another shape, for NaN or plus infinity, or for a point at which all densities are zero.
    :raises RuntimeError: if the gap stays above the tolerance.

    Example::

        >>> import pyro.distributions as dist
        >>> y = torch.tensor([-1.0, -1.0, -1.0, 1.0])
        >>> log_densities = torch.stack([dist.Normal(m, 0.1).log_prob(y) for m in (-1.0, 1.0)])
        >>> stacking_weights(log_densities)
        tensor([0.7500, 0.2500])

    **References**

    Yao, Vehtari, Simpson, Gelman, *Using stacking to average Bayesian predictive distributions*, Bayesian Analysis 2018, eq. 4.
    """
    require_number("tolerance", tolerance, above=0)
    ratios = _ratios(log_densities)
    weights = _interior_point(ratios, tolerance)
    gap = math.log(float(_gradient(ratios, weights).max()))
    if not gap <= tolerance:
        raise RuntimeError(
            f"stacking_weights: the best weights are missed by at most {gap:.2g} nats per point, more than tolerance={tolerance:g}. "
            "Raise the tolerance, or leave out posteriors that are almost the same."
        )
    return weights.to(log_densities.dtype)


def stacking_gap(log_densities: Tensor, weights: Tensor) -> float:
    r"""
    What the best weights can gain on given ones, at most: :math:`\log\max_k g_k` of :func:`stacking_weights`.

    :param Tensor log_densities: shape ``(K, N)``, nats.
    :param Tensor weights: shape ``(K,)``; they sum to one.
    :return: nats per point; zero where the weights are the best ones.
    :raises ValueError: as :func:`stacking_weights`, and for weights that are none.

    Example::

        >>> log_densities = torch.tensor([[0.0, -1.0], [-1.0, 0.0]])
        >>> stacking_gap(log_densities, torch.tensor([0.5, 0.5]))
        0.0
    """
    ratios = _ratios(log_densities)
    weights = weights.double()
    if weights.shape != ratios.shape[:1] or bool((weights < 0).any()) or abs(float(weights.sum()) - 1) > 1e-5:
        raise ValueError(
            f"weights must be {len(ratios)} numbers of at least 0 that sum to 1, one per row of log_densities, found {weights.tolist()}."
        )
    return max(0.0, math.log(float(_gradient(ratios, weights / weights.sum()).max())))


def _ratios(log_densities: Tensor) -> Tensor:
    """Densities ``(K, N)`` relative to the largest at each point."""
    values = torch.as_tensor(log_densities).detach().double()
    if values.dim() != 2 or 0 in values.shape:
        raise ValueError(
            f"log_densities has shape {tuple(values.shape)}, expected (K, N): one row per posterior, one column per point."
        )
    largest = values.amax(0)
    for name, wrong in (("NaN", values.isnan().any(0)), ("not finite", ~largest.isfinite())):
        if bool(wrong.any()):
            where = int(wrong.nonzero()[0])
            raise ValueError(
                f"log_densities: those of point {where} are {values[:, where].tolist()} ({name}), expected finite numbers, or minus "
                "infinity for some of the posteriors: look at the predictions there."
            )
    return (values - largest).exp()


def _gradient(ratios: Tensor, weights: Tensor) -> Tensor:
    """The derivative of the mean log density in each weight, shape ``(K,)``; weighted, they sum to one."""
    return (ratios / (weights @ ratios)).mean(-1)


def _interior_point(ratios: Tensor, tolerance: float) -> Tensor:
    """
    Minimises the sum of the weights less the mean log density on w > 0; at the optimum the weights sum to one by themselves.
    A primal-dual method: every direction decreases the barrier function, so that halving its step does.
    """
    size = len(ratios)
    w = torch.full((size,), 1 / size, dtype=ratios.dtype, device=ratios.device)
    z = torch.ones_like(w)  # multipliers of w > 0: w z = mu on the path

    def barrier(at: Tensor, mu: float) -> float:
        return float(at.sum() - (at @ ratios).log().mean() - mu * at.log().sum())

    for _ in range(200):
        if math.log(float(_gradient(ratios, w / w.sum()).max())) <= 0.1 * tolerance:
            break
        mu = 0.1 * float(w @ z) / size
        scaled = ratios / (w @ ratios)
        slope = 1 - scaled.mean(-1) - mu / w
        hessian = scaled @ scaled.mT / ratios.shape[1]
        step = torch.linalg.solve(hessian + torch.diag(z / w), -slope)
        change = (mu - z * step) / w - z
        length = min(1.0, _room(w, step))
        before, expected = barrier(w, mu), 1e-4 * float(slope @ step)
        while barrier(w + length * step, mu) > before + length * expected + 1e-14 * abs(before):
            length *= 0.5
            if length < 1e-12:
                break
        w, z = w + length * step, z + min(1.0, _room(z, change)) * change
    return w / w.sum()


def _room(values: Tensor, step: Tensor) -> float:
    """How far positive numbers can go along a step and stay positive: 0.99 of the way to the first zero."""
    shrinking = step < 0
    return 0.99 * float((-values[shrinking] / step[shrinking]).min()) if bool(shrinking.any()) else math.inf
