# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Galerkin projections against dense solves."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pyro_bnn.curvature.accumulate import NotAMinimumError
from pyro_bnn.infer.hfl.ritz import RayleighRitz
from tests.common import assert_close


def problem(m: int = 3, p: int = 12) -> tuple[Tensor, Tensor]:
    """Gradients, and a curvature with eigenvalues from 1e-2 to 1e2."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(p, p))[0]
    return torch.randn(m, p), basis @ torch.diag(torch.logspace(-2, 2, p)) @ basis.mT


def dense(G: Tensor, P: Tensor, D: Tensor) -> Tensor:
    """The displacements of the projection, by the formula."""
    return G @ D.mT @ torch.linalg.solve(D @ P @ D.mT, D)


def test_displacements_are_the_best_in_the_span() -> None:
    G, P = problem()
    D = torch.randn(5, 12)
    ritz = RayleighRitz(G)
    ritz.add(D[:2], D[:2] @ P)
    ritz.add(D[2:], D[2:] @ P)
    expected = dense(G, P, D)
    assert_close(ritz.displacements, expected, rtol=1e-8, atol=1e-10)
    assert_close(ritz.covariance, G @ expected.mT, rtol=1e-8, atol=1e-10)
    assert_close(ritz.variances, (G * expected).sum(-1), rtol=1e-8)
    assert_close(ritz.remainders, G - expected @ P, rtol=1e-8, atol=1e-9)
    assert_close(ritz.directions @ P @ ritz.directions.mT, torch.eye(5), atol=1e-9)
    assert_close(ritz.images, ritz.directions @ P, rtol=1e-8, atol=1e-9)


def test_the_error_is_the_square_of_that_of_the_displacement() -> None:
    """Displacements that are 20 % off in the norm of the curvature give a variance that is 4 % off at most."""
    G, P = problem(1)
    d = torch.linalg.solve(P, G[0])
    root = torch.linalg.cholesky(P)
    exact = G[0] @ d
    error = torch.linalg.solve(root.mT, torch.randn(12))
    error *= 0.2 * exact.sqrt() / (error @ P @ error).sqrt()
    ritz = RayleighRitz(G)
    ritz.add((d + error)[None], ((d + error) @ P)[None])
    missing = 1 - float(ritz.variances / exact)
    assert 0.005 < missing <= 0.04


def test_residuals_as_directions_are_a_krylov_method() -> None:
    """Exact after p / m blocks, by lower bounds that grow."""
    G, P = problem()
    exact = (G * torch.linalg.solve(P, G.mT).mT).sum(-1)
    ritz, found = RayleighRitz(G), []
    while len(rows := ritz.rest()):
        ritz.add(rows, rows @ P)
        found.append(ritz.variances)
    assert len(found) <= 5
    assert all((b >= a - 1e-9).all() for a, b in pairwise(found))
    assert (found[1] < 0.99 * exact).any()
    assert_close(found[-1], exact, rtol=1e-7)
    assert ritz.missing <= 1e-8
    assert ritz.has_settled(1e-3)


def test_what_images_do_not_resolve_is_left_out() -> None:
    """Nearly dependent directions whose images have errors of one part in a million: no variance is exceeded by much."""
    G, P = problem()
    exact = (G * torch.linalg.solve(P, G.mT).mT).sum(-1)
    D = torch.randn(1, 12) + 1e-5 * torch.randn(6, 12)
    noise = 1e-6 * torch.randn(6, 12) * (D @ P).norm(dim=-1)[:, None] / 12**0.5
    ritz = RayleighRitz(G)
    ritz.add(D, D @ P + noise)
    assert 1e-8 < ritz.noise < 1e-4
    assert (ritz.variances <= 1.001 * exact).all()


def test_dependent_rows_are_measured_once() -> None:
    G, P = problem()
    ritz = RayleighRitz(torch.cat([G, G[:2] + G[1:]]))
    rows = ritz.fresh(ritz.gradients)
    assert rows.shape == (3, 12)
    assert_close(rows @ rows.mT, torch.eye(3), atol=1e-10)
    ritz.add(rows, rows @ P)
    assert_close(ritz.displacements[:3], dense(G, P, G), rtol=1e-8, atol=1e-10)
    assert ritz.fresh(G).shape == (0, 12)


def test_sums_over_processes_give_the_same() -> None:
    """Rows are cut in two parts; the total sums what both say."""
    G, P = problem()
    D = torch.randn(5, 12)
    whole = RayleighRitz(G)
    whole.add(D, D @ P)
    halves = torch.cat([G, torch.zeros(3, 4)], -1)
    more = torch.cat([D, torch.zeros(5, 4)], -1)
    images = torch.cat([D @ P, torch.zeros(5, 4)], -1)
    part = RayleighRitz(halves / 2**0.5, total=lambda products: 2 * products)
    part.add(more / 2**0.5, images / 2**0.5)
    assert_close(part.covariance, whole.covariance, rtol=1e-9)
    assert_close(part.remainders[:, :12] * 2**0.5, whole.remainders, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("where", ["one direction", "a combination"])
def test_negative_curvature_is_no_minimum(where: str) -> None:
    P = torch.diag(torch.tensor([1.0, 1.0, -0.5]))
    if where == "one direction":
        D = torch.eye(3)
    else:
        D = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    with pytest.raises(NotAMinimumError, match="not a minimum"):
        RayleighRitz(torch.eye(3)).add(D, D @ P)


def test_short_directions_are_judged_by_their_angle() -> None:
    """Images with errors of one part in a million do not hide the negative curvature along a short step."""
    P = torch.diag(torch.tensor([1.0, 1.0, -0.5]))
    ritz = RayleighRitz(torch.eye(3))
    ritz.add(torch.eye(3)[:2], torch.tensor([[1.0, 1e-6, 0.0], [0.0, 1.0, 0.0]]))
    assert ritz.noise > 1e-7
    step = 1e-4 * torch.eye(3)[2:]
    with pytest.raises(NotAMinimumError, match="not curved upwards"):
        ritz.add(step, step @ P)
    with pytest.raises(NotAMinimumError, match="not curved upwards"):
        ritz.add(step, 0 * step)


def test_steps_move_by_epsilon_deviations() -> None:
    G, P = problem()
    ritz = RayleighRitz(G)
    D = torch.randn(2, 12)
    steps = ritz.steps(D, 0.1, (D @ P * D).sum(-1))
    assert_close((steps @ P * steps).sum(-1).sqrt(), torch.full((2,), 0.1))
    ritz.add(D[:1], D[:1] @ P)
    steps = ritz.steps(7 * D[:1], 0.1)  # like the latest
    assert_close((steps @ P * steps).sum(-1).sqrt(), torch.full((1,), 0.1))
