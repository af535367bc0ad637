# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Bounds of inverses from products, against dense inverses, and against the rules for one vector."""

import pytest
import torch

from pyro_bnn.ops.block_cg import ConjugateBasis, block_conjugate_gradient
from pyro_bnn.ops.enclosure import Enclosure, gaining, residual_error
from pyro_bnn.ops.inner import inner
from pyro_bnn.ops.krylov import nystrom_below
from tests.common import assert_close
from tests.ops.quadrature import bracket


def rotated(values):
    Q = torch.linalg.qr(torch.randn(len(values), len(values))).Q
    return (Q * values) @ Q.mT


SPECTRA = {  # of what is added to the prior precision
    "even": lambda p: torch.linspace(0.0, 50.0, p),
    "clustered": lambda p: torch.where(torch.arange(p) % 3 == 0, 1e4, 1.0),
    "low rank": lambda p: torch.where(torch.arange(p) < 5, 1e6, 0.0),
    "condition 1e12": lambda p: torch.logspace(-4, 8, p),
    "nothing": torch.zeros,
}


def problem(spectrum, p=40):
    """A matrix, the diagonal that it exceeds, which spans two orders of magnitude, and dependent right-hand sides."""
    prior = torch.logspace(-1, 1, p)[torch.randperm(p)]
    P = rotated(SPECTRA[spectrum](p)) + torch.diag(prior)
    rows = torch.randn(4, p)
    return P, prior, torch.cat([rows, rows[:1] - 2 * rows[1:2], torch.zeros(1, p), torch.eye(p)[:1]])


def is_below(A, B, P):
    """Whether B - A is positive semi-definite, up to the rounding of solutions with P."""
    rounding = 10 * torch.finfo(P.dtype).eps * float(torch.linalg.cond(P)) + 1e-12
    return bool(torch.linalg.eigvalsh(B - A)[0] >= -rounding * torch.linalg.eigvalsh(B)[-1])


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("directions", [0, 1, 7, 40])
def test_any_span_encloses_the_inverse(spectrum, directions):
    P, prior, _ = problem(spectrum)
    values, vectors = torch.linalg.eigh(P)
    Q = torch.linalg.qr(torch.randn(40, directions)).Q.mT @ (vectors / values.sqrt()) @ vectors.mT  # QPQ' = 1
    enclosure = Enclosure(lambda r: r / prior)
    for start in range(0, directions, 3):  # piece by piece
        enclosure.extend(Q[: start + 3], Q[: start + 3] @ P)
    eye = torch.eye(40)
    low, high, inverse = enclosure.solve(eye)[0], enclosure.above(eye), torch.linalg.inv(P)
    assert_close(enclosure.solve(eye)[1], eye - low @ P, rtol=0, atol=1e-7 * P.norm() ** 0.5)
    assert is_below(low, inverse, P)
    assert is_below(inverse, high, P)
    assert is_below(high, torch.diag(1 / prior), P)
    assert_close(enclosure.above(eye, diagonal=True), high.diagonal().clamp(min=0), rtol=0, atol=1e-12)
    if directions == 40 and spectrum != "condition 1e12":
        assert_close(low, inverse, rtol=0, atol=1e-8)
        assert_close(high, inverse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spectrum", ["even", "low rank", "nothing"])
@pytest.mark.parametrize("error", [1e-9, 1e-5, 1e-3, 0.3])
@pytest.mark.parametrize("directions", [1, 20, 40])
def test_errors_of_images_widen_the_bounds(spectrum, error, directions):
    P, prior, rows = problem(spectrum)
    values, vectors = torch.linalg.eigh(P)
    Q = torch.linalg.qr(torch.randn(40, directions)).Q.mT @ (vectors / values.sqrt()) @ vectors.mT
    noise = torch.randn(directions, 40) * prior.sqrt()
    images = Q @ P + error * noise / noise.norm(dim=-1, keepdim=True)
    enclosure = Enclosure(lambda r: r / prior)
    enclosure.extend(Q, images)
    assert enclosure.measure(lambda v: v @ P, 3) == min(3, directions)
    assert enclosure.gap > error * 0.9
    assert enclosure.measure(lambda v: v @ P, 3) == 0  # it is known
    rows = torch.cat(
        [rows, 10 * Q @ P]
    )  # what the span explains whole, where differences of large numbers would be left
    high = enclosure.above(rows)
    assert is_below(rows @ torch.linalg.solve(P, rows.mT), high, P)
    assert (enclosure.above(rows, diagonal=True) <= (rows.square() / prior).sum(-1) * (1 + 1e-12)).all()


def test_errors_that_are_alike_do_not_cancel():
    maps = (lambda v: 2 * v, lambda r: r, torch.ones(4, 3), lambda w: w @ torch.full((4, 3), 2.5))
    assert residual_error(*maps, torch.ones(4), number=2) > 0.5
    assert residual_error(*maps, torch.ones(4), number=4) == pytest.approx(3**0.5)  # |0.5| of each, twice


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_beyond_the_directions_have_the_bound_of_the_prior(dtype):
    """However large they are beside the numbers' range, and whatever the directions know."""
    eye = torch.eye(2, dtype=dtype)
    enclosure = Enclosure(lambda r: r)
    enclosure.extend(eye[:1] / 2**0.5, eye[:1] * 2**0.5)
    for size in (3e3, 1e6, 1e9):
        assert_close(
            enclosure.above(size * eye[1:], diagonal=True), torch.tensor([size**2], dtype=dtype), rtol=1e-5
        )
        assert_close(enclosure.above(size * eye[1:]), torch.tensor([[size**2]], dtype=dtype), rtol=1e-4)


@pytest.mark.parametrize("size", [0.0, -1e-9, 2e-308])
def test_directions_without_curvature_say_nothing(size):
    eye = torch.eye(3)
    enclosure = Enclosure(lambda r: r)
    enclosure.extend(torch.stack([eye[0] / 2**0.5, eye[1]]), torch.stack([eye[0] * 2**0.5, size * eye[1]]))
    enclosure.measure(lambda v: v * torch.tensor([2.0, size, 1.0]), 2)
    assert_close(enclosure.above(eye), torch.diag(torch.tensor([0.5, 1.0, 1.0])), rtol=1e-9, atol=1e-9)


def test_the_joint_bound_has_room_for_the_rounding_of_its_entries():
    """Parallel residuals: of some combination nothing is left but rounding."""
    features = torch.tensor([[-0.014057976489239293, -0.0014437830684990998]])
    rows = torch.tensor(
        [[0.325796331701863, -1.2525331543017826], [-0.10217220330579906, -0.6224634064902412]]
    )
    q = torch.tensor([[0.3234115656466589, -3.1456962598087395]])
    P = features.mT @ features + 0.1 * torch.eye(2)
    enclosure = Enclosure(lambda r: r / 0.1)
    enclosure.extend(q, q @ P)
    enclosure.measure(lambda v: v @ P, 3)
    gap = enclosure.above(rows) - rows @ torch.linalg.solve(P, rows.mT)
    assert torch.linalg.eigvalsh(gap)[0] >= -1e-13


def test_directions_that_rounding_made_are_left_out():
    enclosure = Enclosure(lambda r: r)
    P, q = torch.eye(3) * 2, torch.eye(3)[:1] / 2**0.5
    enclosure.follow(q, q @ P)
    enclosure.follow(q * (1 + 1e-13), q @ P)
    enclosure.follow(q * 1e9, q @ P * 1e9)  # of no unit P-norm
    assert len(enclosure.directions) == 0
    assert_close(enclosure.above(torch.eye(3)), torch.eye(3))


@pytest.mark.parametrize("recursion", [False, True])
def test_one_vector_has_the_radau_rule(recursion):
    """In coordinates where the prior is the identity the node is one."""
    P, prior, rows = problem("even")
    g, white = rows[:1], prior.rsqrt()
    scaled = P * white * white[:, None]
    vectors, alpha, beta = [(g * white)[0] / (g * white).norm()], [], []
    for _ in range(12):
        image = scaled @ vectors[-1]
        alpha.append(vectors[-1] @ image)
        V = torch.stack(vectors)
        for _ in range(2):
            image = image - V.mT @ (V @ image)
        beta.append(image.norm())
        vectors.append(image / image.norm())
    for k in (1, 2, 5, 12):
        expected = bracket(torch.stack(alpha[:k]), torch.stack(beta[:k]), "inverse", 1.0)
        basis = ConjugateBasis(40, limit=40 * (1 if recursion else 40))
        enclosure = Enclosure(lambda r: r / prior)
        options = {"tolerance": 1e-14, "preconditioner": lambda r: r / prior}
        x = block_conjugate_gradient(
            lambda v: v @ P, g, max_iter=k, basis=basis, enclosure=enclosure, **options
        ).solution
        if not recursion:
            enclosure.extend(basis.directions, basis.images)
        rest = g - x @ P
        low = (g * x).sum() + (x * rest).sum()
        found = torch.stack([low, low + enclosure.above(rest, diagonal=True)[0]]) / (g * white).square().sum()
        assert_close(found, torch.stack(list(expected)), rtol=1e-9)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("preconditioner", ["none", "prior", "diagonal"])
@pytest.mark.parametrize("kept", [40, 12, 1])
def test_solves_stop_when_the_bounds_have_met(spectrum, preconditioner, kept):
    P, prior, rows = problem(spectrum)
    maps = {"none": None, "prior": lambda r: r / prior, "diagonal": lambda r: r / P.diagonal()}
    basis, enclosure = ConjugateBasis(40, limit=40 * kept), Enclosure(lambda r: r / prior)
    exact = rows @ torch.linalg.solve(P, rows.mT)
    found = block_conjugate_gradient(
        lambda v: v @ P,
        rows,
        tolerance=0.05,
        basis=basis,
        enclosure=enclosure,
        preconditioner=maps[preconditioner],
    )
    assert_close(
        found.remainder, rows - found.solution @ P, rtol=0, atol=1e-7 * rows.norm() * P.norm() ** 0.5
    )
    low = found.solution @ (rows + found.remainder).mT
    low = 0.5 * (low + low.mT)
    high = low + enclosure.above(found.remainder)
    assert is_below(low, exact, P)
    assert is_below(exact, high, P)
    width = (high - low).diagonal()
    if kept == 1 and spectrum == "condition 1e12":  # too much for a three-term recursion
        return  # it ends without
    assert (width <= 0.05 * low.diagonal() + 1e-12).all()
    # and no sooner than they had to: a looser tolerance needs fewer products, or the same
    basis, enclosure = ConjugateBasis(40, limit=40 * kept), Enclosure(lambda r: r / prior)
    loose = block_conjugate_gradient(
        lambda v: v @ P,
        rows,
        tolerance=5.0,
        basis=basis,
        enclosure=enclosure,
        preconditioner=maps[preconditioner],
    )
    assert loose.products <= found.products


def test_a_tolerance_for_each():
    P, prior, rows = problem("condition 1e12")
    tolerance = torch.tensor([1e9, 0.02] + [1e9] * 5)
    enclosure = Enclosure(lambda r: r / prior)
    found = block_conjugate_gradient(
        lambda v: v @ P, rows, tolerance=tolerance, enclosure=enclosure, preconditioner=lambda r: r / prior
    )
    low = (found.solution * (rows + found.remainder)).sum(-1)
    width = enclosure.above(found.remainder, diagonal=True) / low
    assert float(width[1]) < 0.02
    all_of_them = block_conjugate_gradient(
        lambda v: v @ P,
        rows,
        tolerance=0.02,
        enclosure=Enclosure(lambda r: r / prior),
        preconditioner=lambda r: r / prior,
    )
    assert found.products <= all_of_them.products


def test_directions_of_earlier_solves_serve_the_bounds_of_later_ones():
    P, prior, rows = problem("low rank")
    basis, enclosure = ConjugateBasis(40), Enclosure(lambda r: r / prior)
    options = {
        "basis": basis,
        "enclosure": enclosure,
        "preconditioner": lambda r: r / prior,
        "tolerance": 1e-3,
    }
    first = block_conjugate_gradient(lambda v: v @ P, rows, **options)
    again = block_conjugate_gradient(lambda v: v @ P, rows[:2] + rows[2:4], **options)
    assert first.products > 0
    assert again.products == 0


@pytest.mark.parametrize("largest", [1e2, 1e5, 1e8, 1e11])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_nystrom_bound_in_single_precision_stays_below_what_it_approximates(largest, rank):
    features = torch.randn(20, 6) * torch.logspace(0, -4, 6)[torch.randperm(6)] * largest**0.5 / 4
    prior = torch.logspace(-1, 2, 6)[torch.randperm(6)].float()
    features = (features * prior.double().sqrt()).float()
    inverse = nystrom_below(lambda v: (v @ features.mT) @ features + v * prior, prior, rank)
    bound = inverse(torch.eye(6, dtype=torch.float32)).double()
    P = features.double().mT @ features.double() + torch.diag(prior.double())
    root = torch.linalg.cholesky(P)
    sizes = torch.linalg.eigvalsh(
        root.mT @ (0.5 * (bound + bound.mT)) @ root
    )  # of the bound beside the inverse
    assert sizes[0] >= 1 - 1e-5
    assert largest > 1e2 or rank < 6 or sizes[-1] < 3  # close to it where all is captured


def test_inner_products_of_long_vectors():
    a = torch.rand(2, 2**22 + 5, dtype=torch.float32)
    exact = a.double() @ a.double().mT
    assert_close(inner(a, a), exact.float(), rtol=1e-6, atol=0)
    assert inner(a, a[:1]).shape == (2, 1)
    assert inner(a.double(), a.double()).dtype == torch.float64


def test_an_inverse_that_rounds_to_zero_is_bounded():
    features = torch.tensor([[822.302551, 8.71134363e-03], [-1287.49976, -4.19501960e-03]]).float()
    prior = torch.tensor([0.1, 10.0]).float()
    inverse = nystrom_below(lambda v: (v @ features.mT) @ features + v * prior, prior, 2)
    exact = torch.linalg.inv(features.double().mT @ features.double() + torch.diag(prior.double()))
    assert inverse(torch.eye(2, dtype=torch.float32))[0, 0] >= exact[0, 0]


def test_steps_along_dependent_directions_are_not_taken_where_they_lose():
    P, _, rows = problem("even")
    Q = torch.randn(1, 40)
    Q = Q / (Q @ P @ Q.mT).sqrt()
    twice = torch.cat([Q, Q])  # conjugate only in the belief of who keeps them
    steps = rows @ twice.mT @ twice
    taken, left = gaining(rows, steps, rows - steps @ P)
    assert_close(left, rows - taken @ P, rtol=0, atol=1e-10)
    values = (taken * (rows + left)).sum(-1)
    assert (values >= 0).all()
    assert (values == 0).any()
    inverse = torch.linalg.inv(P)
    rest = ((left @ inverse) * left).sum(-1)
    assert (rest <= ((rows @ inverse) * rows).sum(-1) * (1 + 1e-10)).all()
