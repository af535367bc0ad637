# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Fisher information by definition, :math:`E_y[\nabla\log p(y\mid f)\,\nabla\log p(y\mid f)^\top]`, without a rule of the
package: over all values of a discrete observation, by quadrature over a continuous one, or as the Hessian of torch's
closed form of the Kullback-Leibler divergence.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: From the distribution's parameters f (n, C): values (Q, n, ...) and their probabilities (Q, n).
Points = Callable[[Tensor], tuple[Tensor, Tensor]]


def counts(family: Callable[[Tensor], Any], size: int) -> Points:
    """The values 0, 1, ..., size - 1 with their probabilities."""

    def points(f: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.arange(float(size), dtype=f.dtype).unsqueeze(-1).expand(size, len(f))
        return values, family(f).log_prob(values).exp()

    return points


def gauss(loc: Callable[[Tensor], Tensor], root: Callable[[Tensor], Tensor]) -> Points:
    """
    Gauss-Hermite points, exact for scores that are polynomials of degree up to 9 in the observation.

    :param loc: from f to means (n, d).
    :param root: from f to square roots of covariances, (n, d, d) or (d, d).
    """
    z, w = (torch.as_tensor(v) for v in np.polynomial.hermite_e.hermegauss(10))
    w = w / w.sum()

    def points(f: Tensor) -> tuple[Tensor, Tensor]:
        mean = loc(f)
        d = mean.shape[-1]
        grid = torch.cartesian_prod(*[z] * d).reshape(-1, 1, d)
        weights = torch.cartesian_prod(*[w] * d).reshape(-1, 1, d).prod(-1)
        return mean + (root(f) @ grid.unsqueeze(-1)).squeeze(-1), weights.expand(-1, len(f))

    return points


def half_line(density: Callable[[Tensor], Any], *, start: Callable[[Tensor], Tensor] | None = None) -> Points:
    """
    Double-exponential quadrature over the positive numbers, or over the two half-lines from ``start``.

    :param density: from f to a distribution of batch shape (n,).
    :param start: from f to a point (n,) where the density may have a kink; zero and one half-line by default.
    """
    t = torch.arange(-4.5, 3.5, 1 / 32, dtype=torch.float64)
    distance = (torch.pi / 2 * t.sinh()).exp().unsqueeze(-1)
    width = distance * torch.pi / 2 * t.cosh().unsqueeze(-1) / 32

    def points(f: Tensor) -> tuple[Tensor, Tensor]:
        if start is None:
            values, widths = distance.expand(-1, len(f)), width
        else:
            values = torch.cat([start(f) - distance, start(f) + distance])
            widths = torch.cat([width, width])
        return values, widths * density(f).log_prob(values).exp()

    return points


def by_points(family: Callable[[Tensor], Any], f: Tensor, points: Points) -> Tensor:
    """
    :param family: from f to the distribution of n observations, each of which depends on its own row.
    :param f: shape (n, C).
    :param points: where to evaluate.
    :return: the information in f, shape (n, C, C).
    """
    f = f.detach()
    values, weights = points(f)
    moved = f.expand(len(values), *f.shape).clone().requires_grad_(True)
    log_prob = family(moved).log_prob(values)
    (scores,) = torch.autograd.grad(log_prob.sum(), moved)
    scores = torch.where(weights.unsqueeze(-1) > 0, scores, 0.0)
    assert (weights.sum(0) - 1).abs().max() < 1e-9, "the points miss some of the probability"
    return torch.einsum("qni,qnj,qn->nij", scores, scores, weights)


def by_divergence(family: Callable[[Tensor], Any], f: Tensor) -> Tensor:
    """
    :param family: see :func:`by_points`; torch must know the divergence between its members.
    :param f: shape (n, C).
    :return: the Hessian of KL(p_f || p_g) in g at g = f, shape (n, C, C).
    """
    rows = [
        torch.autograd.functional.hessian(
            lambda g, row=row: torch.distributions.kl_divergence(family(row), family(g.unsqueeze(0))).sum(),
            row[0],
        )
        for row in f.detach().split(1)
    ]
    return torch.stack(rows)
