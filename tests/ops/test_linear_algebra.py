# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Matrix-free solvers and their accounts of what they did, against dense matrices."""

import math

import pytest
import torch

from pyro_bnn.infer.hfl.loss import by_chunks
from pyro_bnn.ops.block_cg import (
    ConjugateBasis,
    block_conjugate_gradient,
    conjugate_gradient,
    orthonormal_rows,
)
from pyro_bnn.ops.jacobian import dense, hvp_operator, jacobian, jvp_operator, vjp
from pyro_bnn.ops.krylov import largest_eigenvalue, nystrom_preconditioner, smallest_eigenvalue
from pyro_bnn.ops.newton import (
    _exact_step,
    _spectrum,
    _steihaug,
    hessian_operator,
    lbfgs,
    newton_cg,
    value_and_gradient,
)
from tests.common import assert_close


def spd(values):
    Q = torch.linalg.qr(torch.randn(len(values), len(values))).Q
    return (Q * values) @ Q.mT


class Counted:
    """A matrix as an operator that counts the vectors it is given."""

    def __init__(self, matrix):
        self.matrix, self.calls, self.vectors = matrix, 0, 0

    def __call__(self, v):
        self.calls += 1
        self.vectors += v.shape[0]
        return v @ self.matrix


# ---------------------------------------------------------------------- single right-hand sides


def test_conjugate_gradients_need_one_product_per_distinct_eigenvalue():
    values = torch.tensor([1.0] * 4 + [3.0] * 4 + [10.0] * 4)
    P = spd(values)
    rhs = torch.stack([torch.randn(12), P @ torch.ones(12), torch.zeros(12)])
    operator = Counted(P)
    result = conjugate_gradient(operator, rhs, tolerance=1e-9)
    assert result.iterations.tolist() == [3, 3, 0]
    assert operator.calls == 3
    assert_close(result.solution, torch.linalg.solve(P, rhs.mT).mT, rtol=1e-8, atol=1e-10)
    assert_close(result.residual[2], 0.0)
    assert bool((result.residual <= 1e-9).all())
    assert_close(result.converged, torch.ones(3, dtype=torch.bool))
    # a single direction has its own curvature
    vector = torch.linalg.eigh(P).eigenvectors[:, :1].mT
    one = conjugate_gradient(operator, 5 * vector, tolerance=1e-9)
    assert one.iterations.tolist() == [1]
    assert_close(one.smallest_curvature, [1.0], rtol=1e-10)
    assert math.isinf(float(result.smallest_curvature[2]))


def test_conjugate_gradients_stop_at_their_limits():
    P = spd(torch.logspace(0, 3, 30))
    rhs = torch.randn(2, 30)
    for limit in (1, 5):
        result = conjugate_gradient(lambda v: v @ P, rhs, tolerance=1e-12, max_iter=limit)
        assert result.iterations.tolist() == [limit, limit]
        true = (rhs - result.solution @ P).norm(dim=-1) / rhs.norm(dim=-1)
        assert_close(result.residual, true, rtol=1e-8)
    # relative to the right-hand side, whatever its size
    for scale in (2.0**-27, 2.0**27):
        again = conjugate_gradient(lambda v: v @ P, scale * rhs, tolerance=1e-3)
        assert bool((again.residual <= 1e-3).all())
        assert_close(
            again.iterations, conjugate_gradient(lambda v: v @ P, rhs, tolerance=1e-3).iterations, rtol=0
        )


def test_conjugate_gradients_from_a_start_and_with_the_inverse():
    P = spd(torch.logspace(0, 2, 10))
    rhs = torch.randn(3, 10)
    exact = torch.linalg.solve(P, rhs.mT).mT
    start = exact.clone()
    start[0] += 0.1 * torch.randn(10)
    before = start.clone()
    result = conjugate_gradient(lambda v: v @ P, rhs, tolerance=1e-9, start=start)
    assert result.iterations[0] > 0
    assert result.iterations[1:].tolist() == [0, 0]
    assert_close(start, before, rtol=0)
    assert_close(result.solution, exact, rtol=1e-7)
    inverse = torch.linalg.inv(P)
    result = conjugate_gradient(lambda v: v @ P, rhs, tolerance=1e-9, preconditioner=lambda r: r @ inverse)
    assert result.iterations.tolist() == [1, 1, 1]
    assert_close(result.solution, exact, rtol=1e-8)


def test_conjugate_gradients_report_indefinite_directions_one_by_one():
    P = torch.diag(torch.tensor([2.0, -1.0, 3.0]))
    rhs = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    result = conjugate_gradient(lambda v: v @ P, rhs, tolerance=1e-12)
    assert result.indefinite.tolist() == [False, True, False]
    assert result.converged.tolist() == [True, False, True]
    assert_close(result.solution[1], torch.zeros(3))  # that of the iteration before
    assert_close(result.solution[2], [0.5, 0.0, 1 / 3], rtol=1e-12)
    assert_close(result.smallest_curvature[1], -1.0)
    assert result.iterations.tolist() == [1, 1, 2]


def test_extreme_eigenvalues():
    values = torch.cat([torch.linspace(0.5, 1.0, 19), torch.tensor([7.0])])
    P = spd(values)
    operator = Counted(P)
    assert_close(largest_eigenvalue(operator, P[0], tolerance=1e-12), 7.0, rtol=1e-9)
    assert operator.calls < 30
    assert_close(largest_eigenvalue(lambda v: 1e-6 * v @ P, P[0], tolerance=1e-12), 7e-6, rtol=1e-9)
    assert largest_eigenvalue(torch.zeros_like, P[0]) == 0
    rough = Counted(P)
    assert float(largest_eigenvalue(rough, P[0])) <= 7.0
    assert rough.calls < operator.calls
    limited = Counted(P)
    largest_eigenvalue(limited, P[0], tolerance=0.0, max_iter=5)
    assert limited.calls == 5
    for shift in (0.0, -3.0, 2.0):
        shifted = Counted(P + shift * torch.eye(20))
        assert_close(smallest_eigenvalue(shifted, P[0]), 0.5 + shift, rtol=1e-8)
        assert shifted.calls <= 20
    few = Counted(P)
    assert smallest_eigenvalue(few, P[0], steps=4) >= 0.5
    assert few.calls == 4
    # three distinct eigenvalues end the iteration after as many products
    three = Counted(spd(torch.tensor([1.0, 2.0, 5.0]).repeat(6)))
    assert_close(smallest_eigenvalue(three, three.matrix[0]), 1.0, rtol=1e-9)
    assert three.calls <= 4


# ---------------------------------------------------------------------- blocks


def test_block_conjugate_gradients_account_for_their_products():
    P = spd(torch.logspace(-1, 2, 40))
    values = torch.linalg.eigvalsh(P)
    rhs = torch.randn(5, 40) * torch.tensor([1e-6, 1.0, 1e6, 1.0, 1.0]).unsqueeze(-1)
    operator = Counted(P)
    result = block_conjugate_gradient(operator, rhs, tolerance=1e-8)
    assert result.products == operator.vectors
    assert result.iterations == operator.calls
    assert result.products <= 40
    true = (rhs - result.solution @ P).norm(dim=-1) / rhs.norm(dim=-1)
    assert_close(result.residual, true, rtol=0.1, atol=1e-12)
    assert bool((true <= 1e-8).all())
    assert not result.indefinite
    # all of the space is met in the end
    assert_close(result.smallest_curvature, values[0], rtol=1.0)
    assert values[0] * (1 - 1e-9) <= result.smallest_curvature
    assert 0.1 * values[-1] <= result.largest_curvature <= values[-1] * (1 + 1e-9)
    whole = block_conjugate_gradient(lambda v: v @ P, torch.eye(40), tolerance=1e-8)
    assert (whole.iterations, whole.products) == (1, 40)
    assert_close(whole.smallest_curvature, values[0], rtol=1e-9)
    assert_close(whole.largest_curvature, values[-1], rtol=1e-9)
    assert_close(whole.solution, torch.linalg.inv(P), rtol=1e-8, atol=1e-10)


def test_block_conjugate_gradients_stop_at_their_limit():
    P = spd(torch.logspace(-1, 3, 40))
    rhs = torch.randn(2, 40)
    for limit in (1, 3):
        operator = Counted(P)
        result = block_conjugate_gradient(operator, rhs, tolerance=1e-12, max_iter=limit)
        assert (result.iterations, result.products) == (limit, 2 * limit)
        true = (rhs - result.solution @ P).norm(dim=-1) / rhs.norm(dim=-1)
        assert_close(result.residual, true, rtol=1e-6)
    zero = block_conjugate_gradient(operator, torch.zeros(2, 40))
    assert (zero.iterations, zero.products) == (0, 0)
    assert_close(zero.solution, torch.zeros(2, 40))
    with pytest.raises(ValueError, match="not finite"):
        block_conjugate_gradient(lambda v: v * torch.nan, rhs)


def test_block_conjugate_gradients_with_the_inverse_as_preconditioner():
    P = spd(torch.logspace(-1, 3, 20))
    inverse = torch.linalg.inv(P)
    rhs = torch.randn(3, 20)
    result = block_conjugate_gradient(
        lambda v: v @ P, rhs, tolerance=1e-7, preconditioner=lambda r: r @ inverse
    )
    assert result.iterations == 1
    assert_close(result.solution, rhs @ inverse, rtol=1e-6, atol=1e-8)


def test_the_solution_before_negative_curvature_is_returned():
    P = torch.diag(torch.tensor([1.0, 2.0, -0.5]))
    rhs = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    result = block_conjugate_gradient(lambda v: v @ P, rhs)
    assert result.indefinite
    assert_close(result.smallest_curvature, -0.5, rtol=1e-9)
    assert_close(result.solution, torch.zeros(2, 3))
    assert result.iterations == 1
    # curvature of the size of rounding says nothing
    P[2, 2] = -1e-18
    result = block_conjugate_gradient(lambda v: v @ P, rhs[:1], tolerance=1e-9)
    assert not result.indefinite
    assert_close(result.solution, [[1.0, 0.5, 0.0]], rtol=1e-9)


def rounded(P, digits):
    """Products with noise in the given digit, as those of a network in lower precision."""

    def operator(v):
        exact = v @ P
        generator = torch.Generator().manual_seed(int(1e6 * float(v.abs().sum())) % 2**31)
        return exact * (1 + digits * torch.randn(exact.shape, generator=generator))

    return operator


def test_what_rounding_leaves_over_is_finished_from_the_residual():
    P = spd(torch.logspace(-2, 3, 60))
    rhs = torch.randn(6, 60)
    noisy = Counted(P)
    inner = rounded(P, 1e-9)
    noisy_call = lambda v: (noisy(v), inner(v))[1]  # noqa: E731
    result = block_conjugate_gradient(noisy_call, rhs, tolerance=1e-7, basis=ConjugateBasis(60, limit=0))
    assert result.products == noisy.vectors
    true = (rhs - result.solution @ P).norm(dim=-1) / rhs.norm(dim=-1)
    assert bool((true <= 1e-5).all())
    assert result.smallest_curvature >= 0.9e-2
    exact = torch.linalg.solve(P, rhs.mT).mT
    assert_close((rhs * result.solution).sum(-1), (rhs * exact).sum(-1), rtol=1e-3)


def test_a_restart_mends_what_the_products_spoiled():
    P = spd(torch.logspace(0, 1, 40))
    rhs = torch.randn(3, 40)
    calls, spoiled = [], rounded(P, 1e-5)

    def operator(v):
        calls.append(len(v))
        return spoiled(v) if sum(calls) <= 40 else v @ P  # as long as there are new directions

    result = block_conjugate_gradient(operator, rhs, tolerance=1e-7)
    true = (rhs - result.solution @ P).norm(dim=-1) / rhs.norm(dim=-1)
    assert bool((true <= 1e-7).all())
    assert result.products == sum(calls)
    assert result.iterations == len(calls) - 1  # one restart


def test_right_hand_sides_that_do_not_converge_together_are_finished_one_by_one():
    P = spd(torch.logspace(0, 2, 30))
    rhs = torch.cat([torch.randn(4, 30), torch.zeros(1, 30)])
    counted, noisy = Counted(P), rounded(P, 1e-5)
    operator = lambda v: (counted(v), noisy(v))[1]  # noqa: E731
    result = block_conjugate_gradient(operator, rhs, tolerance=1e-9, max_iter=500)
    # two restarts and the start of the single solves are products, not iterations
    assert counted.calls == result.iterations + 3
    assert result.products == counted.vectors
    assert result.iterations < 500
    exact = torch.linalg.solve(P, rhs.mT).mT
    assert_close(result.solution, exact, rtol=0, atol=1e-2 * float(exact.abs().max()))
    assert_close(result.solution[-1], torch.zeros(30))
    assert_close(result.residual[-1], 0.0)
    assert bool((result.residual <= 1e-9).all())
    assert 0.9 <= result.smallest_curvature <= 10.0
    assert 30.0 <= result.largest_curvature <= 101.0
    assert not result.indefinite


def test_orthonormal_rows_of_any_scale_and_rank():
    rows = torch.randn(3, 10)
    for scale in (1e-100, 1.0, 1e100):
        Q = orthonormal_rows(scale * rows)
        assert_close(Q @ Q.mT, torch.eye(3), rtol=0, atol=1e-12)
        assert_close(rows @ Q.mT @ Q, rows, rtol=1e-9)
    assert orthonormal_rows(torch.zeros(3, 10)).shape == (0, 10)
    assert orthonormal_rows(torch.zeros(1, 10)).shape == (0, 10)
    assert_close(orthonormal_rows(3 * rows[:1]), rows[:1] / rows[:1].norm(), rtol=1e-12)
    assert len(orthonormal_rows(torch.cat([rows, rows[:1] + rows[1:2], torch.zeros(1, 10)]))) == 3
    # nearly parallel rows are two directions as long as rounding tells them apart
    pair = torch.stack([rows[0], rows[0] + 1e-5 * rows[1]])
    assert len(orthonormal_rows(pair)) == 2
    pair[1] = rows[0] * (1 + 1e-15)
    assert len(orthonormal_rows(pair)) == 1


def test_a_basis_keeps_what_there_is_room_for():
    P = spd(torch.logspace(0, 1, 12))
    basis = ConjugateBasis(12, limit=12 * 7)
    assert basis.capacity == 7
    assert ConjugateBasis(12).capacity == 12
    rows = torch.linalg.solve_triangular(torch.linalg.cholesky(P), torch.eye(12), upper=False)  # Q P Q' = 1
    basis.append(rows[:3], rows[:3] @ P)
    basis.append(rows[3:7], rows[3:7] @ P)
    assert basis.count == 7
    assert_close(basis.directions, rows[:7], rtol=0)
    assert_close(basis.images, rows[:7] @ P, rtol=1e-12, atol=1e-13)
    basis.append(rows[7:9], rows[7:9] @ P)
    assert basis.count == 7
    found = basis.conjugate(torch.randn(4, 12))
    assert_close(found @ P @ rows[:9].mT, torch.zeros(4, 9), rtol=0, atol=1e-9)
    # only the latest block beyond the room is remembered
    basis.append(rows[9:11], rows[9:11] @ P)
    found = basis.conjugate(rows[7:8])
    assert_close(found, rows[7:8], rtol=1e-9, atol=1e-12)
    # what is in the span of the others is nothing
    assert_close(basis.conjugate(torch.randn(2, 7) @ rows[:7]), torch.zeros(2, 12), rtol=0)
    rhs = torch.randn(2, 12)
    solution, residual = basis.solve(rhs)
    assert_close(residual, rhs - solution @ P, rtol=1e-9, atol=1e-10)
    assert_close(residual @ rows[:7].mT, torch.zeros(2, 7), rtol=0, atol=1e-10)
    empty = ConjugateBasis(12)
    solution, residual = empty.solve(rhs)
    assert_close(solution, torch.zeros(2, 12))
    residual += 1.0
    assert bool((residual != rhs).all())
    assert_close(empty.conjugate(rhs), rhs, rtol=0)


def test_many_directions_are_kept_in_the_order_they_came():
    basis = ConjugateBasis(300)
    rows = torch.eye(300)
    for block in rows.split(37):
        basis.append(block, 2 * block)
    assert_close(basis.directions, rows, rtol=0)
    assert_close(basis.images, 2 * rows, rtol=0)
    assert basis.conjugate(torch.ones(1, 300)).shape == (1, 300)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_preconditioner_of_full_rank_is_a_multiple_of_the_inverse(weighted):
    P = spd(torch.logspace(0, 3, 15))
    S = torch.logspace(-1, 1, 15) if weighted else None
    operator = Counted(P)
    M = nystrom_preconditioner(operator, P[0], 15, diagonal=S)
    assert operator.vectors == 2 * 15
    root = torch.ones(15) if S is None else S.rsqrt()
    smallest = torch.linalg.eigvalsh(P * root * root[:, None])[0]
    assert_close(M(torch.eye(15)), smallest * torch.linalg.inv(P), rtol=1e-6, atol=1e-9)
    counted = Counted(P)
    nystrom_preconditioner(counted, P[0], 4, passes=3)
    assert counted.vectors == 12


def test_a_preconditioner_of_low_rank_maps_the_largest_eigenvalues_to_the_smallest_captured():
    values = torch.cat([torch.ones(30), torch.tensor([50.0, 400.0, 3000.0])])
    P = spd(values)
    M = nystrom_preconditioner(lambda v: v @ P, P[0], 4, passes=6)(torch.eye(33))
    found = torch.linalg.eigvals(P @ M).real.sort().values
    assert_close(found, torch.ones(33), rtol=1e-6)


# ---------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("chunk_size", [1, 3, 256])
def test_derivatives_of_a_function_of_a_vector(chunk_size):
    A = torch.randn(5, 4)

    def f(u):
        return (A @ u).sin() * u[0]

    u = torch.randn(4, requires_grad=True)
    y = f(u)
    J = torch.autograd.functional.jacobian(f, u.detach())
    assert_close(jacobian(y, u, chunk_size=chunk_size), J, rtol=1e-10, atol=1e-12)
    assert not jacobian(y, u).requires_grad
    assert jacobian(y[:0], u).shape == (0, 4)
    c, v = torch.randn(3, 5), torch.randn(3, 4)
    assert_close(vjp(y, u, c), c @ J, rtol=1e-10, atol=1e-12)
    assert not vjp(y, u, c).requires_grad
    assert vjp(y, u, c, create_graph=True).requires_grad
    assert_close(jvp_operator(y, u)(v), v @ J.mT, rtol=1e-10, atol=1e-12)
    assert not jvp_operator(y, u)(v).requires_grad
    assert jvp_operator(y, u, create_graph=True)(v).requires_grad
    assert_close(dense(jvp_operator(y, u), u, chunk_size=chunk_size), J.mT, rtol=1e-10, atol=1e-12)
    constant = torch.ones(5) + 0 * torch.ones(5, requires_grad=True)
    assert_close(jvp_operator(constant, u)(v), torch.zeros(3, 5))
    H = torch.autograd.functional.hessian(lambda u: f(u).sum(), u.detach())
    assert_close(hvp_operator(f(u).sum(), u)(v), v @ H, rtol=1e-10, atol=1e-12)
    assert not hvp_operator(f(u).sum(), u)(v).requires_grad
    assert_close(hvp_operator((A @ u).sum(), u)(v), torch.zeros(3, 4))  # linear
    assert_close(hvp_operator(torch.tensor(1.0), u)(v), torch.zeros(3, 4))


# ---------------------------------------------------------------------- minimisation


def quartic(u):
    yield (u**4).sum() / 4
    yield -(torch.arange(1.0, 4.0) * u).sum()
    yield torch.tensor(3.0)


@pytest.mark.parametrize("keep_graphs", [False, True])
def test_sums_of_terms(keep_graphs):
    u = torch.randn(3)
    value, gradient = value_and_gradient(quartic, u)
    assert_close(value, (u**4).sum() / 4 - (torch.arange(1.0, 4.0) * u).sum() + 3.0, rtol=1e-12)
    assert_close(gradient, u**3 - torch.arange(1.0, 4.0), rtol=1e-12)
    v = torch.randn(2, 3)
    assert_close(hessian_operator(quartic, u, keep_graphs=keep_graphs)(v), 3 * u**2 * v, rtol=1e-12)
    result = newton_cg(quartic, torch.full((3,), 2.0), tolerance=1e-9, keep_graphs=keep_graphs)
    assert_close(result.point, torch.arange(1.0, 4.0) ** (1 / 3), rtol=1e-9)
    assert result.decrement <= 1e-9
    assert not result.indefinite
    calls = []
    counted = lambda u: (calls.append(1), quartic(u))[1]  # noqa: E731
    again = newton_cg(counted, torch.full((3,), 2.0), tolerance=1e-9, keep_graphs=True)
    assert len(calls) == 2 * again.evaluations - 1  # a graph of the curvature at every point but the last


def test_the_decrement_is_the_distance_before_the_last_step():
    P = spd(torch.logspace(0, 2, 6))
    start = 0.1 * torch.randn(6)  # in the trust region, whose radius is one at least
    terms = lambda u: [0.5 * u @ P @ u]  # noqa: E731
    result = newton_cg(terms, start, tolerance=1e3, cg_tolerance=1e-12)
    assert_close(result.decrement, (start @ P @ start).sqrt(), rtol=1e-9)
    assert_close(result.point, torch.zeros(6), rtol=0, atol=1e-9)
    exact = newton_cg(terms, start, tolerance=1e-7, dense_limit=6)
    assert_close(exact.point, torch.zeros(6), rtol=0, atol=1e-9)
    # one step only
    far = newton_cg(terms, torch.full((6,), 100.0), tolerance=1e-9, max_steps=1)
    assert_close((far.point - 100.0).norm(), 0.1 * 6**0.5 * 100.0, rtol=1e-9)


def test_lbfgs_is_never_worse_than_its_start():
    P = spd(torch.logspace(0, 4, 10))
    terms = lambda u: [0.5 * u @ P @ u, -u.sum()]  # noqa: E731
    exact = torch.linalg.solve(P, torch.ones(10))
    found = lbfgs(terms, torch.randn(10), max_iter=500)
    assert_close(found, exact, rtol=1e-5, atol=1e-7)
    assert_close(lbfgs(terms, exact, max_iter=50), exact, rtol=1e-6)
    calls = []

    def cliff(u):
        calls.append(1)
        yield u.sum() if len(calls) < 2 else u.sum() * torch.nan

    start = torch.randn(10)
    assert_close(lbfgs(cliff, start, max_iter=50), start, rtol=0)


def brute_force(matrix, gradient, radius):
    """The minimum over a fine grid of directions, by the best length of each, of the quadratic model in the plane."""
    angles = torch.linspace(0, 2 * torch.pi, 20_001)
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    slopes, curvatures = directions @ gradient, ((directions @ matrix) * directions).sum(-1)
    inside = torch.where(curvatures > 0, -slopes / curvatures, radius).clamp(0, radius)
    lengths = torch.stack([torch.zeros_like(slopes), inside, torch.full_like(slopes, radius)])
    return (lengths * slopes + 0.5 * lengths.square() * curvatures).min()


@pytest.mark.parametrize("radius", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(
    ("diagonal", "slope"),
    [
        ((1.0, 4.0), (1.0, -2.0)),
        ((-1.0, 2.0), (0.3, 1.0)),
        ((-1.0, 2.0), (0.0, 1.0)),
        ((-1.0, 2.0), (-0.4, 0.0)),
        ((0.0, 1.0), (1.0, 1.0)),
    ],
)
def test_the_exact_step_is_the_minimum_in_the_trust_region(diagonal, slope, radius):
    Q = torch.linalg.qr(torch.randn(2, 2)).Q
    matrix = Q @ torch.diag(torch.tensor(diagonal)) @ Q.mT
    gradient = Q @ torch.tensor(slope)
    step, image, indefinite = _exact_step(*torch.linalg.eigh(matrix), gradient, radius)
    if min(diagonal):  # the sign of a zero eigenvalue is that of a rounding error
        assert indefinite == (min(diagonal) < 0)
    assert_close(image, matrix @ step, rtol=1e-7, atol=1e-9)
    assert step.norm() <= radius * (1 + 1e-9)
    value = gradient @ step + 0.5 * step @ matrix @ step
    assert value <= brute_force(matrix, gradient, radius) + 1e-9
    if min(diagonal) < 0:
        assert_close(step.norm(), radius, rtol=1e-9)


def test_steps_by_conjugate_gradients_stay_in_the_trust_region():
    P = spd(torch.logspace(0, 1, 5))
    gradient = torch.randn(5)
    full = -torch.linalg.solve(P, gradient)
    operator = Counted(P)
    step, image, indefinite, products = _steihaug(operator, gradient, 100.0, 1e-10)
    assert_close(step, full, rtol=1e-6)
    assert_close(image, P @ step, rtol=1e-8)
    assert products == operator.calls
    assert not indefinite
    for radius in (0.5 * float(full.norm()), 1e-3):
        step, image, indefinite, _ = _steihaug(operator, gradient, radius, 1e-10)
        assert_close(step.norm(), radius, rtol=1e-9)
        assert_close(image, P @ step, rtol=1e-8)
        assert not indefinite
    assert_close(step / step.norm(), -gradient / gradient.norm(), rtol=1e-2, atol=1e-3)
    step, image, indefinite, products = _steihaug(lambda v: v @ (P - 20 * torch.eye(5)), gradient, 2.0, 1e-10)
    assert (indefinite, products) == (True, 1)
    assert_close(step, -2.0 * gradient / gradient.norm(), rtol=1e-9)
    assert_close(image, (P - 20 * torch.eye(5)) @ step, rtol=1e-9)
    # loose solves stop early
    assert _steihaug(operator, gradient, 100.0, 0.5)[3] < 5


def test_the_spectrum_of_an_operator_and_products_by_chunks():
    A = torch.randn(150, 150)
    matrix, sizes = A + A.mT, []

    def operator(v):
        sizes.append(len(v))
        return v @ matrix

    values, vectors = _spectrum(operator, torch.zeros(150))
    assert_close(values, torch.linalg.eigvalsh(matrix), rtol=1e-9, atol=1e-9)
    assert_close((vectors * values) @ vectors.mT, matrix, rtol=1e-9, atol=1e-9)
    v = torch.randn(7, 150)
    for chunk_size, expected in ((3, [3, 3, 1]), (7, [7])):
        sizes.clear()
        assert_close(by_chunks(operator, chunk_size)(v), v @ matrix, rtol=1e-12)
        assert sizes == expected
