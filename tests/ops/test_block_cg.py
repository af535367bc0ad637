# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_bnn.ops.block_cg import (
    ConjugateBasis,
    _BlockSolve,
    block_conjugate_gradient,
    conjugate_gradient,
    orthonormal_rows,
)
from pyro_bnn.ops.krylov import largest_eigenvalue, nystrom_preconditioner, smallest_eigenvalue
from pyro_bnn.ops.newton import newton_cg
from tests.common import assert_close


def ill_conditioned(p=60, low=-1, high=4):
    """A positive definite matrix with logarithmically spaced eigenvalues."""
    Q = torch.linalg.qr(torch.randn(p, p)).Q
    return (Q * torch.logspace(low, high, p)) @ Q.mT


@pytest.mark.parametrize("solver", [block_conjugate_gradient, conjugate_gradient])
def test_dense_solution(solver):
    P = ill_conditioned()
    rhs = torch.randn(7, 60)
    result = solver(lambda v: v @ P, rhs, tolerance=1e-10)
    assert_close(result.solution, torch.linalg.solve(P, rhs.mT).mT, rtol=1e-5, atol=1e-7)


def test_dependent_right_hand_sides_share_directions():
    P = ill_conditioned()
    basis = torch.randn(2, 60)
    rhs = torch.cat([torch.randn(9, 2) @ basis, torch.zeros(1, 60)])
    result = block_conjugate_gradient(lambda v: v @ P, rhs, tolerance=1e-9)
    assert_close(result.solution, torch.linalg.solve(P, rhs.mT).mT, rtol=1e-5, atol=1e-7)
    two = block_conjugate_gradient(lambda v: v @ P, basis, tolerance=1e-9)
    assert result.products < 1.5 * two.products
    assert (result.solution[-1] == 0).all()


@pytest.mark.parametrize(("tolerance", "allowed"), [(1e-6, 120), (3e-8, 120 + 300)])
def test_as_many_products_as_unknowns_serve_any_number_of_right_hand_sides(tolerance, allowed):
    """
    The recursion of conjugate gradients alone needs thousands here, since rounding makes it forget directions. Residuals
    below rounding times the condition of 1e9 take one more product each.
    """
    P = ill_conditioned(p=120, low=-4, high=5)
    rhs = torch.randn(300, 120)
    basis, products = ConjugateBasis(120), 0
    for block in rhs.split(16):
        result = block_conjugate_gradient(lambda v: v @ P, block, tolerance=tolerance, basis=basis)
        products += result.products
        residual = block - result.solution @ P
        # no solution in this precision has a smaller residual than rounding of P x, at a condition of 1e9
        rounding = 1e9 * torch.finfo(P.dtype).eps
        assert (residual.norm(dim=-1) <= (tolerance + rounding) * block.norm(dim=-1)).all()
    assert products <= allowed
    assert_close(basis.directions @ P @ basis.directions.mT, torch.eye(120), rtol=0, atol=1e-6)
    assert_close(basis.images, basis.directions @ P, rtol=0, atol=1e-8 * basis.images.abs().max())


def test_directions_beyond_the_limit_are_not_kept():
    P = ill_conditioned(p=60, low=0, high=2)
    rhs = torch.randn(12, 60)
    basis = ConjugateBasis(60, limit=60 * 20)
    result = block_conjugate_gradient(lambda v: v @ P, rhs, tolerance=1e-9, basis=basis)
    assert basis.count == 12  # one block of twelve; two would be more than twenty
    assert_close(result.solution, torch.linalg.solve(P, rhs.mT).mT, rtol=1e-5, atol=1e-7)
    # a right-hand side in the span of what is kept needs no product
    again = block_conjugate_gradient(lambda v: v @ P, basis.images[:3], tolerance=1e-9, basis=basis)
    assert again.products == 0
    assert_close(again.solution, basis.directions[:3], rtol=1e-9, atol=1e-9)


def test_early_stops_are_monotone_lower_bounds():
    P = ill_conditioned()
    rhs = torch.randn(4, 60)
    exact = (rhs * torch.linalg.solve(P, rhs.mT).mT).sum(-1)
    previous = torch.zeros(4)
    for iterations in range(1, 15):
        x = block_conjugate_gradient(lambda v: v @ P, rhs, tolerance=1e-12, max_iter=iterations).solution
        value = (rhs * x).sum(-1)
        assert (value >= previous * (1 - 1e-9)).all()
        assert (value <= exact * (1 + 1e-9)).all()
        # the whole covariance is bounded in the Loewner order
        gap = rhs @ (torch.linalg.solve(P, rhs.mT) - x.mT)
        assert torch.linalg.eigvalsh(0.5 * (gap + gap.mT))[0] >= -1e-8 * exact.max()
        previous = value


def test_indefinite_is_reported():
    P = ill_conditioned()
    P = P - 0.2 * torch.eye(60)
    result = block_conjugate_gradient(lambda v: v @ P, torch.randn(3, 60), tolerance=1e-10)
    assert result.indefinite
    assert result.smallest_curvature < 0
    assert_close(smallest_eigenvalue(lambda v: v @ P, P[0]), torch.linalg.eigvalsh(P)[0], rtol=1e-6)


def test_nystrom_preconditioner_saves_iterations():
    P = ill_conditioned(p=200)
    rhs = torch.randn(1, 200)
    M = nystrom_preconditioner(lambda v: v @ P, P[0], 100)
    plain = conjugate_gradient(lambda v: v @ P, rhs, tolerance=1e-8)
    fast = conjugate_gradient(lambda v: v @ P, rhs, tolerance=1e-8, preconditioner=M)
    assert_close(fast.solution, plain.solution, rtol=1e-4, atol=1e-6)
    assert fast.iterations.max() < 0.5 * plain.iterations.max()
    inverse = M(torch.eye(200))
    assert_close(inverse, inverse.mT, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(inverse)[0] > 0


def test_float32_finishes_one_by_one():
    P = ill_conditioned(p=150, low=-1, high=5)
    rhs = torch.randn(8, 150) @ P
    single = P.float()
    result = block_conjugate_gradient(lambda v: v @ single, rhs.float(), tolerance=1e-4)
    assert result.residual.max() <= 1e-4
    exact = (rhs * torch.linalg.solve(P, rhs.mT).mT).sum(-1)
    assert_close((rhs * result.solution).sum(-1), exact, rtol=1e-2)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_right_hand_side_of_negative_curvature_is_enough(sign):
    P = torch.diag(torch.tensor([2.0, sign, 3.0]))
    solve = _BlockSolve(lambda v: v @ P, torch.eye(3)[:2], ConjugateBasis(3), None, 1e-10, 9)
    solve.finish_one_by_one()
    assert solve.indefinite == (sign < 0)
    assert_close(solve.x[0], torch.tensor([0.5, 0.0, 0.0]))


@pytest.mark.parametrize("first", [1.0, 0.0])
def test_the_largest_eigenvalue_whatever_the_first_quotient(first):
    """The search starts from no value that it could mistake for a converged one."""
    P = ill_conditioned(p=20, low=0, high=2)
    start = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    start = start / start.norm()
    if first:  # the first Rayleigh quotient is one
        P = P / (start @ P @ start.mT)
    largest = torch.linalg.eigvalsh(P)[-1]
    assert_close(largest_eigenvalue(lambda v: v @ P, P[0], tolerance=1e-6), largest, rtol=1e-4)


def test_orthonormal_rows():
    rows = torch.randn(3, 20)
    Q = orthonormal_rows(torch.cat([1e6 * rows, rows.sum(0, keepdim=True)]))
    assert_close(Q @ Q.mT, torch.eye(3), rtol=0, atol=1e-10)
    assert_close(rows @ Q.mT @ Q, rows, rtol=0, atol=1e-8)


def test_newton_leaves_a_saddle():
    def terms(u):
        return [0.25 * (u[0] ** 2 - 1) ** 2 + (u[1] - u[0]) ** 2]

    result = newton_cg(terms, torch.tensor([0.0, 1e-3]), tolerance=1e-10)
    assert not result.indefinite
    assert_close(result.point.abs(), torch.ones(2), rtol=1e-6)


def test_newton_resolves_small_negative_curvature_beside_large_ones():
    """A double well of curvature -0.01 in coordinates that are as stiff as 1e8: only exact steps leave its top."""
    Q = torch.linalg.qr(torch.randn(12, 12)).Q
    stiffness = torch.logspace(0, 8, 12)

    def terms(u):
        v = Q @ u
        return [0.0025 * (v[0] ** 2 - 1) ** 2 + 0.5 * (stiffness[1:] * (v[1:] - 1) ** 2).sum()]

    start = Q.mT @ torch.cat([torch.zeros(1), 1 + 0.01 * torch.randn(11)])
    result = newton_cg(terms, start, tolerance=1e-8, dense_limit=12)
    assert not result.indefinite
    assert_close((Q @ result.point).abs(), torch.ones(12), rtol=1e-5)


def test_newton_ends_where_the_value_is_too_small_for_a_number():
    start = torch.full((2,), 1e-170, dtype=torch.float64)
    result = newton_cg(lambda u: [u @ u], start, tolerance=1e-8)
    assert_close(result.point, start)
