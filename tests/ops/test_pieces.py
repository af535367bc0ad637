# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The small pieces that larger results stand on, each against its definition."""

import math

import pytest
import torch
import torch.nn.functional as F

from pyro_bnn.curvature.capture import Capture
from pyro_bnn.curvature.dense import FullNormal
from pyro_bnn.curvature.diagonal import DiagonalNormal
from pyro_bnn.curvature.jacobian import ExampleJacobian, Pulled
from pyro_bnn.curvature.kronecker import KroneckerNormal
from pyro_bnn.curvature.linear_maps import (
    dense_covariance,
    independent_covariance,
    kronecker_covariance,
    kronecker_inputs,
    squared_rows,
)
from pyro_bnn.curvature.low_rank import LowRankNormal, LowRankSum
from pyro_bnn.curvature.parts import indefinite, lowest_entry, lowest_pair, places
from pyro_bnn.curvature.uses import ElementwiseUse, find_layout
from pyro_bnn.distributions.precision_normal import BlockNormal
from pyro_bnn.ops import memory
from pyro_bnn.ops.families import reparametrised
from pyro_bnn.ops.fisher import matrix_square_root
from pyro_bnn.ops.krylov import largest_eigenvalue, leading_eigenpairs, nystrom_preconditioner, ritz_pairs
from pyro_bnn.ops.newton import _exact_step, _spectrum, _steihaug, lbfgs
from pyro_bnn.ops.options import require_choice, require_count, require_number
from pyro_bnn.ops.square_root import symmetric_root
from tests.common import assert_close


def symmetric(values):
    Q = torch.linalg.qr(torch.randn(len(values), len(values))).Q
    return (Q * torch.as_tensor(values)) @ Q.mT


# ---------------------------------------------------------------- curvatures that are not positive


def test_the_lowest_entry_of_a_diagonal():
    value, where = lowest_entry(torch.tensor([2.0, -3.0, 0.0, 1.0, -1.0]))
    assert value == -3.0
    assert where.tolist() == [0.0, 1.0, 1.0, 0.0, 1.0]
    assert lowest_entry(torch.tensor([2.0, 1e-300])) is None
    assert lowest_entry(-torch.eye(2)) is None
    assert math.isnan(lowest_entry(torch.tensor([1.0, math.nan]))[0])


@pytest.mark.parametrize("lowest", [-0.2, 0.0, 1e-13, -1e-9])
def test_the_lowest_pair_is_relative_to_the_diagonal(lowest):
    """Of D C D for a C of unit diagonal with a given lowest eigenvalue, whatever D."""
    eps = torch.finfo(torch.float64).eps
    b = (1 - lowest) * torch.ones(())  # eigenvalues of [[1, b], [b, 1]]: 1 - b, 1 + b
    C = torch.eye(3)
    C[0, 2] = C[2, 0] = b
    scale = torch.tensor([1e4, 1.0, 1e-3])
    found = lowest_pair(C * scale * scale[:, None])
    if lowest > 64 * eps:
        assert found is None
        return
    value, direction = found
    assert_close(value, lowest, rtol=1e-6, atol=8 * eps)
    assert_close(direction.abs(), torch.tensor([0.5**0.5, 0.0, 0.5**0.5]), atol=1e-9)


def test_places_and_what_is_said_of_eigenvalues():
    assert places(torch.tensor([4, 0, 2]), 6).tolist() == [1, -1, 2, -1, 0, -1]
    message = str(indefinite(torch.tensor([1.0, 0.0, -2.5, 3.0]), "eigenvalues"))
    assert "2 of 4 eigenvalues are not positive, the smallest is -2.5" in message


def test_condition_numbers():
    P = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]])
    given_before = [torch.linalg.inv(P[: i + 1, : i + 1])[i, i].reciprocal() for i in range(3)]
    ratios = torch.diagonal(P) / torch.stack(given_before)
    full = FullNormal(torch.zeros(3), P)
    assert_close(full.condition_number(), ratios.max())
    scaled = torch.tensor([1.0, 1e3, 1e-2])
    assert_close(FullNormal(torch.zeros(3), P * scaled * scaled[:, None]).condition_number(), ratios.max())
    diagonal = DiagonalNormal(torch.zeros(2), torch.tensor([1.0, 1e6]))
    assert diagonal.condition_number() == 1.0
    blocks = BlockNormal(torch.zeros(5), [(torch.tensor([0, 1]), diagonal), (torch.tensor([2, 3, 4]), full)])
    assert_close(blocks.condition_number(), ratios.max())
    assert BlockNormal(torch.zeros(2), []).condition_number() == 1.0
    eyes = torch.eye(1), torch.eye(2)
    kronecker = KroneckerNormal(
        torch.zeros(2), (torch.ones(1), torch.ones(2)), eyes, torch.tensor([[8.0, 2.0]])
    )
    assert_close(kronecker.condition_number(), 4.0)
    for p, values, expected, to_prior in (
        (5, [3.0, 0.5], 4.0, 4.0),
        (5, [3.0, -0.4], 4.0 / 0.6, 4.0 / 0.6),
        (2, [3.0, 1.0], 2.0, 4.0),
        (3, [], 1.0, 1.0),
    ):
        Q = torch.eye(p)[:, : len(values)]
        d = LowRankNormal(torch.zeros(p), torch.ones(p), Q, torch.tensor(values))
        assert_close(d.condition_number(), expected)
        assert_close(d.condition_number(to_prior=True), to_prior)
    for d in (full, diagonal, blocks, kronecker):
        assert reparametrised(d)


@pytest.mark.parametrize("size", [1.0, 1e-14])
def test_rows_of_examples_are_found_at_any_scale(size):
    """The second gradient is the first times the weights, or it is not, however small both are."""
    use, weights = ElementwiseUse(torch.arange(3)), torch.randn(4)
    plain = size * torch.randn(5, 4, 3)
    layout = find_layout(use, plain, plain * weights[:, None], weights, eps=1e-16)
    assert layout.dim == 1
    assert find_layout(use, plain, size * torch.randn(5, 4, 3), weights, eps=1e-16) is None
    one_wrong = plain * weights[:, None]
    one_wrong[2, 1, 0] += 0.01 * size
    assert find_layout(use, plain, one_wrong, weights, eps=1e-16) is None
    assert find_layout(use, plain, plain * math.nan, weights, eps=1e-16) is None
    none = torch.empty(4, 0)
    assert find_layout(ElementwiseUse(torch.arange(0)), none, none, weights, eps=1e-16).dim == 0
    # two rows for each example, next to each other or one after all the others
    twice = size * torch.randn(8, 3)
    for weight, major in ((weights.repeat_interleave(2), True), (weights.repeat(2), False)):
        layout = find_layout(use, twice, twice * weight[:, None], weights, eps=1e-16)
        assert (layout.dim, layout.major) == (0, major)


# ---------------------------------------------------------------- eigenvalues


def test_largest_eigenvalues():
    P = symmetric([0.0, 1.0, 2.0, 9.0])
    assert_close(largest_eigenvalue(lambda v: v @ P, P[0], tolerance=1e-12), 9.0, rtol=1e-9)
    few = [float(largest_eigenvalue(lambda v: v @ P, P[0], tolerance=0.0, max_iter=n)) for n in (1, 2, 4, 60)]
    assert few == sorted(few)
    assert_close(few[-1], 9.0, rtol=1e-12)
    assert largest_eigenvalue(torch.zeros_like, P[0]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ritz_pairs_of_a_singular_map_are_its_eigenpairs(dtype):
    """A map of three eigenvalues has three directions, and what rounding leaves of a fourth is none."""
    P = symmetric([5.0] * 3 + [-1.0] * 4 + [0.0] * 33).to(dtype)
    values, vectors = ritz_pairs(lambda v: v @ P, P[0], steps=30)
    assert len(values) == 3
    small = 50 * torch.finfo(dtype).eps
    assert_close(values, torch.tensor([-1.0, 0.0, 5.0]), atol=5 * small)
    assert_close(vectors @ vectors.mT, torch.eye(3), atol=5 * small)
    assert_close(vectors @ P, values[:, None] * vectors, atol=20 * small)
    # a few steps: Ritz values from within
    P = symmetric(torch.linspace(-3.0, 4.0, 40)).to(dtype)
    values, vectors = ritz_pairs(lambda v: v @ P, P[0], steps=7)
    assert len(values) == 7
    assert_close(vectors @ P @ vectors.mT, torch.diag(values), atol=50 * small)
    assert float(values[0]) >= -3.0 - small
    assert float(values[-1]) <= 4.0 + small


def test_leading_eigenpairs_reach_their_tolerance():
    P = symmetric(torch.logspace(0, -6, 50) * 7)
    for rank, oversampling in ((1, 0), (6, 2), (50, 10), (60, 10)):
        values, vectors = leading_eigenpairs(
            lambda v: v @ P, P[0], rank, oversampling=oversampling, tolerance=1e-9, max_rounds=200
        )
        r = min(rank, 50)
        assert values.shape == (r,)
        assert vectors.shape == (50, r)
        assert_close(values, torch.logspace(0, -6, 50)[:r] * 7, rtol=0, atol=1e-8)
        assert_close(vectors.mT @ vectors, torch.eye(r), atol=1e-9)
        assert (P @ vectors - vectors * values).norm(dim=0).max() <= 7e-9 + 1e-14


def test_a_preconditioner_of_all_directions_is_the_inverse():
    """M^-1 = mu P^-1 with the smallest eigenvalue mu of S^-1/2 P S^-1/2."""
    S = torch.tensor([1.0, 100.0, 0.01, 4.0, 9.0])
    P = symmetric([1.0, 2.0, 3.0, 5.0, 40.0]) * S.sqrt() * S.sqrt()[:, None]
    for rank in (5, 9):
        found = nystrom_preconditioner(lambda v: v @ P, P[0], rank, diagonal=S)(torch.eye(5))
        assert_close(found, torch.linalg.inv(P), rtol=1e-8, atol=1e-12)
        plain = nystrom_preconditioner(lambda v: v @ P, P[0], rank)(torch.eye(5))
        mu = torch.linalg.eigvalsh(P)[0]
        assert_close(plain, mu * torch.linalg.inv(P), rtol=1e-6, atol=1e-9)
    # few directions: the largest eigenvalues come down to the smallest that was captured, the rest stays
    P = symmetric([1.0] * 20 + [50.0, 400.0, 3000.0])
    M = nystrom_preconditioner(lambda v: v @ P, P[0], 3, passes=6)(torch.eye(23))
    values = torch.linalg.eigvals(M @ P).real.sort().values
    assert_close(values, torch.tensor([1.0] * 20 + [50.0] * 3), rtol=1e-3)


# ---------------------------------------------------------------- linear maps and rows


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("into", [1, 3])
@pytest.mark.parametrize("K", [1, 2])
def test_covariances_of_linear_maps(T, into, K):
    """J P^-1 J' for J = sum_t g_t x_t', by forming J."""
    B, out = 5, 2
    g, x = [torch.randn(B, T, out) for _ in range(K)], torch.randn(B, T, into)
    variances = torch.rand(out, into) + 0.1
    J = torch.stack([torch.einsum("bto,bti->boi", gk, x).flatten(1) for gk in g], 1)
    assert_close(
        independent_covariance(g, x, variances), (J * variances.flatten()) @ J.mT, rtol=1e-9, atol=1e-12
    )
    ro, ri = torch.randn(out, out), torch.randn(into, into)
    R = torch.kron(ro, ri)
    expected = ((J @ R) * variances.flatten()) @ (J @ R).mT
    assert_close(kronecker_covariance(g, x, (ro, ri), variances), expected, rtol=1e-9, atol=1e-12)
    squares, offset = squared_rows(g, x)
    assert_close(squares.flatten(), J.square().sum((0, 1)), rtol=1e-9)
    if T == 1:
        assert_close(offset, sum(gk.square().sum((0, 1)) for gk in g), rtol=1e-9)
        full = torch.randn(out * into + 1, out * into + 1)
        S, places = full @ full.mT, torch.randperm(out * into + 1)[: out * into].reshape(out, into)
        at = places.flatten()
        assert_close(dense_covariance(g, x, S, places), J @ S[at[:, None], at] @ J.mT, rtol=1e-9, atol=1e-12)
    present = torch.rand(B, T) > 0.5
    present[0] = False
    x = x * present.unsqueeze(-1)
    rows = x[present]
    gram, count = kronecker_inputs(x, "expand", present)
    assert_close(gram, rows.mT @ rows)
    assert count == len(rows)
    means = torch.stack([x[b][present[b]].mean(0) for b in range(B) if bool(present[b].any())])
    gram, count = kronecker_inputs(x, "reduce", present)
    assert_close(gram, means.mT @ means)
    assert count == len(means)


@pytest.mark.parametrize("chosen", [[1, 4, 9], [8, 9], [3], []])
def test_rows_of_some_entries(chosen):
    """Products with the Jacobian in entries of which a block has all, some or none, in any order."""
    u, x = torch.randn(12, requires_grad=True), torch.randn(5, 4)

    def f(u):  # two entries enter in no way that is recognised
        return F.linear(x, u[:8].view(2, 4), u[8:10]).sin() * u[10:].exp()

    with Capture(u) as capture:
        y = f(u)
    jacobian, cotangents = ExampleJacobian(capture, u, y), torch.randn(3, 5, 2)
    J = torch.autograd.functional.jacobian(f, u)
    expected = torch.einsum("kbm,bmp->kbp", cotangents, J).reshape(15, 12)
    for order in (chosen, [*chosen, 11][::-1]):
        at = torch.tensor(order, dtype=torch.long)
        found = Pulled(jacobian, cotangents).placed_rows(places(at, 12), len(at))
        assert_close(found, expected[:, at], rtol=1e-9, atol=1e-12)
    pieces = list(Pulled(jacobian, cotangents).split(2))
    assert [len(piece) for piece in pieces] == [2, 1]
    at = torch.arange(12)
    whole = torch.cat([piece.placed_rows(places(at, 12), 12) for piece in pieces])
    assert_close(whole, expected, rtol=1e-9, atol=1e-12)
    assert_close(jacobian.dense(cotangents).reshape(15, 12), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["function_space", "nystrom", "low_rank"])
def test_memory_of_rows_is_asked_for_once(method):
    """Of 10 rows from 10 examples in two chunks; what does not fit is refused before the first is there."""
    rows, prior = torch.randn(10, 3), torch.rand(3) + 0.5
    formed = []

    def stream(reserve):
        for part in rows.split(5):
            reserve(5, 5)
            formed.append(len(part))
            yield part

    def total(limit):
        return LowRankSum(
            torch.arange(3),
            torch.zeros(3),
            method=method,
            rank=3,
            rows=stream,
            num_examples=10,
            memory_limit=limit,
        ).parts(lambda index: prior)[0]

    # ten rows, and their decomposition in float64; four landmarks for each feature
    number = 10 if method == "function_space" else 12
    needed = 8 * number * 3 + 8 * (2 * number * 3 + 3 * 3**2)
    part = total(needed)
    scaled = rows / prior.sqrt()
    assert_close((part.vectors * part.values) @ part.vectors.mT, scaled.mT @ scaled, rtol=1e-9, atol=1e-12)
    formed.clear()
    if method != "low_rank":  # which keeps no rows
        with pytest.raises(MemoryError, match=f"with {number} rows"):
            total(needed - 1)
        assert not formed


# ---------------------------------------------------------------- steps in a trust region


@pytest.mark.parametrize("values", [[1.0, 2.0, 30.0], [-2.0, 0.5, 3.0], [0.0, 1.0, 2.0], [-3.0, -1.0, 2.0]])
@pytest.mark.parametrize("radius", [0.1, 1.0, 50.0])
@pytest.mark.parametrize("blind", [False, True])
def test_exact_steps_satisfy_the_conditions_of_a_minimum(values, radius, blind):
    """(H + s) x = -g with H + s positive semidefinite, |x| <= r, and |x| = r where s > 0."""
    H = symmetric(values)
    g = torch.randn(3)
    if blind:  # the gradient does not see the lowest curvature
        lowest = torch.linalg.eigh(H).eigenvectors[:, 0]
        g = g - (g @ lowest) * lowest
    step, image, indefinite = _exact_step(*_spectrum(lambda v: v @ H, g), g, radius)
    assert indefinite == (min(values) <= 0)
    assert_close(image, H @ step, atol=1e-9)
    assert float(step.norm()) <= radius * (1 + 1e-9)
    shift = -float((g + image) @ step) / float(step @ step)
    assert shift >= max(0.0, -min(values)) - 1e-6
    if shift > 1e-6:
        assert_close(step.norm(), radius, rtol=1e-6)
    assert_close(image + shift * step, -g, atol=1e-5)


@pytest.mark.parametrize("values", [[1.0, 2.0, 30.0, 4.0], [-2.0, 0.5, 3.0, 1.0]])
@pytest.mark.parametrize("radius", [0.1, 1.0, 50.0])
def test_steps_by_conjugate_gradients(values, radius):
    """Newton's step where it is inside; else to the edge, and no worse than the best step along the gradient."""
    H, g = symmetric(values), torch.randn(4)
    step, image, negative, products = _steihaug(lambda v: v @ H, g, radius, 1e-12)
    assert_close(image, H @ step, atol=1e-9)
    newton = -torch.linalg.solve(H, g)
    if min(values) > 0 and float(newton.norm()) < radius:
        assert not negative
        assert products == 4
        assert_close(step, newton, rtol=1e-7)
    else:
        assert_close(step.norm(), radius, rtol=1e-9)
    if negative:
        assert min(values) < 0
    along = torch.linspace(0, radius, 200)[:, None] * -g / g.norm()
    cauchy = (along @ g + 0.5 * ((along @ H) * along).sum(-1)).min()
    assert g @ step + 0.5 * step @ image <= cauchy * (1 - 1e-4) + 1e-12
    assert _steihaug(lambda v: v @ H, 0 * g, radius, 1e-3)[3] == 0


def test_a_search_never_ends_above_its_start():
    def terms(u):
        return [(u - 3).square().sum(), torch.zeros(())]

    assert_close(lbfgs(terms, torch.zeros(4), max_iter=100), torch.full((4,), 3.0), rtol=1e-9)
    start = torch.full((4,), 3.0)
    assert_close(lbfgs(terms, start, max_iter=1), start)


# ---------------------------------------------------------------- memory and options


def test_available_memory_is_the_least_of_the_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path / path.lstrip("/"))
    cpu = torch.device("cpu")
    assert memory.available_bytes(cpu) == math.inf
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  99 kB\nMemAvailable:      300 kB\nHugePages: 0\n\n")
    assert memory.available_bytes(cpu) == 300 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert memory.available_bytes(cpu) == 300 * 1024
    (group / "memory.max").write_text("200000\n")
    assert memory.available_bytes(cpu) == 300 * 1024  # the use is not known
    (group / "memory.current").write_text("150000\n")
    assert memory.available_bytes(cpu) == 50_000
    assert memory.available_bytes(torch.device("meta")) == math.inf
    memory.require_memory(50_000, "it", cpu, "")
    with pytest.raises(MemoryError, match=r"it needs about 50 kB but 50 kB are available on cpu\. Less\."):
        memory.require_memory(50_001, "it", cpu, "Less.")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (999, "999 bytes"), (1000, "1 kB"), (2.5e6, "2.5 MB"), (1e9, "1 GB"), (1.234e11, "123 GB"), (1e12, "1,000 GB"),
        (9.87654e12, "9,877 GB"),
    ],
)  # fmt: skip
def test_sizes_are_readable(size, text):
    assert memory.readable(size) == text


def test_numbers_at_the_ends_of_their_ranges():
    def refused(check, *args, **kwargs):
        with pytest.raises(ValueError, match=r"^x must be"):
            check("x", *args, **kwargs)

    require_count("x", 1)
    require_count("x", 0, 0)
    for value in (0, True, 1.0, "1", None):
        refused(require_count, value)
    refused(require_count, 2, 3)
    require_number("x", 1e-300, above=0)
    require_number("x", 0, least=0)
    require_number("x", torch.tensor(0.5), above=0, below=1)
    require_number("x", 1e300)
    refused(require_number, 0, above=0)
    refused(require_number, -1e-300, least=0)
    refused(require_number, 1.0, below=1)
    for value in (math.nan, math.inf, -math.inf, "1", None, torch.ones(1)):
        refused(require_number, value)
    with pytest.raises(ValueError, match=r"^x must be a number of at least 1, found 0\.$"):
        require_number("x", 0, least=1)
    with pytest.raises(ValueError, match=r"^x must be a number above 0 and below 1, found 2\.$"):
        require_number("x", 2, above=0, below=1)
    require_choice("x", "b", "a", "b")
    with pytest.raises(ValueError, match="x must be 'a', 'b' or 'c', found 'd'"):
        require_choice("x", "d", "a", "b", "c")


@pytest.mark.parametrize("shape", [(), (2,), (3, 1), (1, 3)])
@pytest.mark.parametrize("C", [1, 2, 4])
def test_roots_of_matrices_in_any_batch(shape, C):
    half = torch.randn(*shape, C, max(1, C - 1))
    matrix = half @ half.mT
    root = matrix_square_root(matrix)
    assert_close(root @ root.mT, matrix, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("B", [2, 3])
def test_examples_lie_in_the_first_dimension_that_keeps_them_apart(B):
    x, u = torch.randn(B, 3, 4), torch.randn(8, requires_grad=True)
    for mixes, dim in ((False, 0), (True, 1)):
        with Capture(u) as capture:
            y = F.linear(x, u.view(2, 4)).sin()
            y = y + y.mean(0) if mixes else y
        jacobian = ExampleJacobian(capture, u, y)
        assert (jacobian.dim, jacobian.B) == (dim, (B, 3)[dim])
        assert not len(jacobian.generic)


def test_the_symmetric_root_is_smooth_where_eigenvalues_meet():
    half = torch.randn(2, 3, 3)
    half[1] = torch.linalg.qr(half[1]).Q  # three equal eigenvalues
    half.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda h: symmetric_root(h @ h.mT), half)
    assert torch.autograd.gradcheck(symmetric_root, torch.rand(2, 1, 1).add(0.5).requires_grad_(True))
    root = symmetric_root((half @ half.mT).detach())
    assert_close(root @ root, (half @ half.mT).detach(), rtol=1e-9, atol=1e-12)
    assert_close(root, root.mT, atol=1e-12)
    # what has no variance stays without
    flat = torch.diag(torch.tensor([4.0, 0.0])).requires_grad_(True)
    (slope,) = torch.autograd.grad(symmetric_root(flat).sum(), flat)
    assert_close(slope, torch.tensor([[0.25, 0.5], [0.5, 0.0]]), atol=1e-9)


@pytest.mark.parametrize("C", [1, 2])
def test_the_symmetric_root_of_nothing_has_no_slope(C):
    nothing = torch.zeros(C, C, requires_grad=True)
    root = symmetric_root(nothing)
    (slope,) = torch.autograd.grad(root.sum(), nothing)
    assert not root.any()
    assert not slope.any()
    assert symmetric_root(torch.full((1, 1), torch.nan)).isnan().all()
