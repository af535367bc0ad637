# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""How far the predictive distributions of two posteriors are apart, point by point."""

from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

#: The method of the row that compares two halves of the reference.
HALVES = "NUTS, half of the chains"


def mixture_on_grid(mean: Tensor, variance: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Density and distribution function of one point's (1/S) sum_s N(mean_s, variance_s), shape of the grid."""
    z = (grid - mean[:, None]) / variance[:, None].sqrt()
    density = torch.exp(-0.5 * z.square()) / (2 * torch.pi * variance[:, None]).sqrt()
    return density.mean(0), torch.special.ndtr(z).mean(0)


def distances(
    p: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor], points: int = 801, level: float = 0.95
) -> dict[str, Tensor]:
    r"""
    Compares two mixtures of Gaussians per point, by quadrature on a grid over both.

    :param p: mean and variance, shapes (S, N).
    :param q: likewise, the reference.
    :param points: of the grid.
    :param level: of the central intervals.
    :return: shape (N,) each: total variation :math:`\frac12\int|p - q|`; Wasserstein distance :math:`\int|P - Q|` in
        standard deviations of q; the probability under q of p's central interval; and the overlap of both intervals
        over their union.
    """
    found: dict[str, list[Tensor]] = {k: [] for k in ("total_variation", "wasserstein", "mass", "overlap")}
    for n in range(p[0].shape[1]):
        parts = [(m[:, n], v[:, n]) for m, v in (p, q)]
        low = min(float((m - 6 * v.sqrt()).min()) for m, v in parts)
        high = max(float((m + 6 * v.sqrt()).max()) for m, v in parts)
        grid = torch.linspace(low, high, points, dtype=p[0].dtype)
        (f, F), (g, G) = (mixture_on_grid(m, v, grid) for m, v in parts)
        reference_mean, reference_variance = parts[1]
        sd = (reference_variance.mean() + reference_mean.var(correction=0)).sqrt()
        found["total_variation"].append(0.5 * torch.trapezoid((f - g).abs(), grid))
        found["wasserstein"].append(torch.trapezoid((F - G).abs(), grid) / sd)
        (a, b), (c, d) = (interval(cdf, grid, level) for cdf in (F, G))
        ends = [torch.searchsorted(grid, end).clamp(max=points - 1) for end in (a, b)]
        found["mass"].append(G[ends[1]] - G[ends[0]])
        found["overlap"].append(
            (torch.min(b, d) - torch.max(a, c)).clamp(min=0) / (torch.max(b, d) - torch.min(a, c))
        )
    return {k: torch.stack(v) for k, v in found.items()}


def interval(cdf: Tensor, grid: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """The central interval of a distribution function on a grid, interpolated linearly."""
    ends = []
    for probability in ((1 - level) / 2, (1 + level) / 2):
        i = int(torch.searchsorted(cdf, probability).clamp(1, len(grid) - 1))
        share = (probability - cdf[i - 1]) / (cdf[i] - cdf[i - 1]).clamp(min=1e-12)
        ends.append(grid[i - 1] + share * (grid[i] - grid[i - 1]))
    return ends[0], ends[1]


def agreement(found: Any, reference: Any) -> dict[str, float]:
    """
    Means over points of :func:`distances`, and the agreement of the variances of the function.

    :param found: a prediction with ``mean``, ``variance`` and ``epistemic``.
    :param reference: likewise.
    :return: also the geometric mean of the ratio of epistemic standard deviations and their rank correlation over
        points, both left out for point estimates.
    """
    each = distances((found.mean, found.variance), (reference.mean, reference.variance))
    row = {k: float(v.mean()) for k, v in each.items()}
    mine, other = found.epistemic, reference.epistemic
    if bool((mine > 1e-12).all()):
        row["sd_ratio"] = float((0.5 * (mine / other).log()).mean().exp())
        row["rank_correlation"] = float(spearmanr(mine.numpy(), other.numpy()).statistic)
    return row
