# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Minibatch chains of a linear-Gaussian model as random affine recursions, from the papers' equations in plain matrices.

A batch has the gradient g(u) = H u - m. A step maps w = (u, r, 1) to T w + noise of covariance Q; the second moments S = E[w w^T]
of the chains obey the discrete Lyapunov equation S = E[T S T^T] + Q, with the expectation over batches.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations, permutations
from typing import NamedTuple

import torch
from torch import Tensor


class Affine(NamedTuple):
    """The gradient H u - m of the potential."""

    H: Tensor
    m: Tensor


class Regression(NamedTuple):
    """y ~ N(X u, noise^2), u ~ N(0, I)."""

    x: Tensor
    y: Tensor
    noise: float

    def gradient(self, rows: Sequence[int], weight: float) -> Affine:
        x, y = self.x[list(rows)], self.y[list(rows)]
        scale = weight / self.noise**2
        return Affine(torch.eye(x.shape[1]) + scale * x.T @ x, scale * x.T @ y)

    def full(self) -> Affine:
        return self.gradient(range(len(self.x)), 1.0)

    def posterior(self) -> tuple[Tensor, Tensor]:
        H, m = self.full()
        return torch.linalg.solve(H, m), torch.linalg.inv(H)

    def subsets(self, size: int) -> list[Affine]:
        """Every subset of so many rows, each with the weight N / n."""
        N = len(self.x)
        return [self.gradient(rows, N / size) for rows in combinations(range(N), size)]

    def passes(self, size: int) -> list[list[Affine]]:
        """Every order in which batches of so many rows, the last perhaps smaller, go through the data."""
        found: dict[tuple[frozenset[int], ...], int] = {}
        for order in permutations(range(len(self.x))):
            cut = tuple(frozenset(order[i : i + size]) for i in range(0, len(order), size))
            found[cut] = 1  # each as often as any other
        return [[self.gradient(sorted(rows), float(len(cut))) for rows in cut] for cut in found]


def with_control(batch: Affine, center: Tensor, full: Affine) -> Affine:
    """Baker et al. (2019): the full gradient at the centre and the difference of the batch's."""
    return Affine(batch.H, batch.H @ center - (full.H @ center - full.m))


def transition(
    scheme: str, g: Affine, h: float, friction: float, root: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """T and Q of one step; for "sgld" of w = (u, 1)."""
    p, eye = len(g.m), torch.eye(len(g.m))
    one = torch.ones(1, 1)

    def affine(A: Tensor, b: Tensor) -> Tensor:
        return torch.cat([torch.cat([A, b[:, None]], 1), torch.cat([torch.zeros(1, len(b)), one], 1)])

    def blocks(rows: list[list[Tensor]]) -> Tensor:
        return torch.cat([torch.cat(row, 1) for row in rows])

    none, zero = torch.zeros(p, p), torch.zeros(p)
    if scheme == "sgld":  # Welling and Teh, eq. 4
        M = root @ root.T
        T = affine(eye - h**2 / 2 * M @ g.H, h**2 / 2 * M @ g.m)
        Q = torch.zeros(p + 1, p + 1)
        Q[:p, :p] = h**2 * M
        return T, temperature * Q
    kick = affine(blocks([[eye, none], [-h * root.T @ g.H, eye]]), torch.cat([zero, h * root.T @ g.m]))
    drift = affine(blocks([[eye, h * root], [none, eye]]), torch.zeros(2 * p))
    half = affine(blocks([[eye, h / 2 * root], [none, eye]]), torch.zeros(2 * p))
    Q = torch.zeros(2 * p + 1, 2 * p + 1)
    if scheme == "sghmc":  # Chen et al., algorithm 2: a move, then friction, kick and noise at once
        damp = affine(blocks([[eye, none], [none, (1 - friction * h) * eye]]), torch.zeros(2 * p))
        total = (kick - torch.eye(2 * p + 1) + damp) @ drift
        Q[p : 2 * p, p : 2 * p] = 2 * friction * h * eye
        return total, temperature * Q
    c = torch.tensor(-friction * h).exp()
    damp = affine(blocks([[eye, none], [none, c * eye]]), torch.zeros(2 * p))
    Q[p : 2 * p, p : 2 * p] = (1 - c**2) * eye
    return half @ damp @ half @ kick, temperature * half @ Q @ half.T


def as_map(steps: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The linear map of the second moments, as vectors, by some steps one after the other; the last entry of S is 1."""
    total: Tensor | None = None
    for T, Q in steps:
        own = torch.kron(T, T)
        own[:, -1] += Q.flatten()
        total = own if total is None else own @ total
    assert total is not None
    return total


def stationary(moments: Tensor) -> Tensor:
    """The fixed point of such a map (or of the mean of several), by repeated squaring."""
    n = round(len(moments) ** 0.5)
    power = moments
    for _ in range(60):
        power = power @ power
    found = power[:, -1].reshape(n, n)  # of a chain that starts at zero
    assert torch.allclose((moments @ found.flatten()).reshape(n, n), found, rtol=1e-9, atol=1e-12)
    return found


def covariance(S: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the first p coordinates."""
    mean = S[:p, -1]
    return mean, S[:p, :p] - torch.outer(mean, mean)
