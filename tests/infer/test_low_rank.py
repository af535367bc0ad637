# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Curvatures of low rank against dense eigendecompositions relative to the prior."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_bnn.curvature.low_rank import LowRankSum
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.ops.krylov import leading_eigenpairs
from tests.common import assert_close

NOISE, SCALES = 0.4, (0.3, 2.5)


def two_sites(x, y=None):
    """Linear regression whose two coefficient vectors have prior scales far from 1 and from each other."""
    a = pyro.sample("a", dist.Normal(torch.zeros(3), SCALES[0]).to_event(1))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), SCALES[1]).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(x[:, :3] @ a + x[:, 3:] @ b, NOISE), obs=y)


def data(n=24):
    x = torch.randn(n, 5) * torch.tensor([1.0, 3.0, 0.2, 1.0, 0.5])
    return x, torch.randn(n)


def prior():
    return torch.cat([torch.full((3,), SCALES[0] ** -2), torch.full((2,), SCALES[1] ** -2)])


def curvature(x):
    return x.mT @ x / NOISE**2


def truncated(H, D, rank):
    """The prior D plus what the ``rank`` largest eigenvalues of H relative to it make up."""
    S = D.sqrt()
    e, Q = torch.linalg.eigh(H / S / S[:, None])
    kept = (Q[:, -rank:] * e[-rank:]) @ Q[:, -rank:].mT
    return torch.diag(D) + S[:, None] * kept * S


@pytest.mark.parametrize("structure", ["low_rank", "nystrom", "function_space"])
def test_data_are_added_under_priors_of_any_precision(structure):
    x, y = data()
    whole = curvature(x) + torch.diag(prior())

    guide = AutoLaplace(two_sites, structure=structure, rank=5).initialize(x, y)
    guide.loc.data = torch.linspace(-1.0, 1.0, 5)
    for i, part in enumerate([slice(0, 10), slice(10, 13), slice(13, 24)]):
        guide.laplace_approximation((x[part], y[part]), override=i == 0, map_tolerance=float("inf"))
        so_far = curvature(x[: part.stop]) + torch.diag(prior())
        assert_close(guide.posterior.multiply(torch.eye(5)), so_far, rtol=1e-8, atol=1e-9)
    assert_close(guide.posterior.variance, torch.linalg.inv(whole).diagonal(), rtol=1e-8)
    assert_close(guide.posterior.log_det_precision, torch.logdet(whole), rtol=1e-9)
    # and a multiplier of the prior's precision multiplies the prior alone
    tau = torch.tensor(3.7)
    moved = guide.part_store.get()[0].posterior(guide.loc.detach(), tau)
    assert_close(moved.multiply(torch.eye(5)), curvature(x) + 3.7 * torch.diag(prior()), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("structure", ["low_rank", "nystrom"])
def test_the_largest_eigenvalues_relative_to_the_prior_are_kept(structure, rank):
    x, y = data()
    # at most 4 * rank rows are all of them landmarks, whose leading eigenvectors are then exact
    x, y = (x[: 4 * rank], y[: 4 * rank]) if structure == "nystrom" else (x, y)

    guide = AutoLaplace(two_sites, structure=structure, rank=rank).initialize(x, y)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    expected = truncated(curvature(x), prior(), rank)
    assert_close(guide.posterior.multiply(torch.eye(5)), expected, rtol=1e-7, atol=1e-8)
    assert_close(guide.posterior.variance, torch.linalg.inv(expected).diagonal(), rtol=1e-7)


def reduced(rows, method, rank=50, prior=None):
    latent = torch.zeros(rows.shape[1])
    index = torch.arange(rows.shape[1])
    generator = torch.Generator().manual_seed(0)
    total = LowRankSum(
        index, latent, method=method, rank=rank, rows=lambda reserve: iter(rows.split(4)), generator=generator
    )
    (part,) = total.parts(lambda i: torch.ones(len(i)) if prior is None else prior[i])
    return part.tensors["values"], part.tensors["vectors"]


@pytest.mark.parametrize("shape", [(30, 7), (5, 7), (7, 7)])
@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1.0, 1e4, 1e9])
def test_what_counts_as_zero_scales_with_the_rows(scale, shape):
    rows = torch.randn(shape[0], 3) @ torch.randn(3, shape[1])  # of rank 3
    expected = torch.linalg.svdvals(rows)[:3].square() * scale**2
    for method in ("function_space", "nystrom"):
        values, vectors = reduced(scale * rows, method)
        assert vectors.shape == (shape[1], 3)
        assert_close(values.sort(descending=True).values, expected, rtol=1e-8)
        assert_close(vectors.mT @ vectors, torch.eye(3), rtol=0, atol=1e-9)
        assert_close(
            (vectors * values) @ vectors.mT, scale**2 * rows.mT @ rows, rtol=1e-6, atol=1e-9 * scale**2
        )
    values, vectors = reduced(scale * rows, "low_rank", rank=3)
    assert_close(values, expected, rtol=1e-8)
    assert_close((vectors * values) @ vectors.mT, scale**2 * rows.mT @ rows, rtol=1e-6, atol=1e-9 * scale**2)


def test_rows_of_small_but_real_curvature_are_kept():
    rows = torch.diag(torch.tensor([1.0, 1e-5, 1e-7]))
    for n in (3, 12):  # by the matrix's own entries, and by its rows
        padded = torch.cat([rows, torch.zeros(n - 3, 3)])
        values, _ = reduced(padded, "function_space")
        assert_close(values, [1.0, 1e-10, 1e-14], rtol=1e-6)


@pytest.mark.parametrize("method", ["low_rank", "nystrom", "function_space"])
def test_a_prior_that_is_not_positive_is_refused(method):
    with pytest.raises(ValueError, match="diagonal and positive"):
        reduced(torch.randn(3, 2), method, prior=torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize(("p", "rank"), [(6, 3), (40, 5), (40, 40)])
def test_leading_eigenpairs_of_any_scale(p, rank, scale):
    A = torch.randn(p, p)
    matrix = scale * A @ A.mT
    calls = []

    def operator(v):
        calls.append(len(v))
        return v @ matrix

    values, vectors = leading_eigenpairs(
        operator, torch.zeros(p), rank, generator=torch.Generator().manual_seed(1)
    )
    expected = torch.linalg.eigvalsh(matrix).flip(-1)[:rank]
    assert_close(values, expected, rtol=1e-10, atol=1e-12 * scale)
    assert_close(vectors.mT @ vectors, torch.eye(rank), rtol=0, atol=1e-10)
    residual = (matrix @ vectors - vectors * values).norm(dim=0)
    assert bool((residual <= 2e-8 * expected[0]).all())
    assert len(calls) <= (2 if p <= rank + 10 else 40)


def test_leading_eigenpairs_of_zero_and_of_indefinite_maps():
    values, vectors = leading_eigenpairs(torch.zeros_like, torch.zeros(30), 4)
    assert_close(values, torch.zeros(4), rtol=0)
    assert_close(vectors.mT @ vectors, torch.eye(4), rtol=0, atol=1e-10)
    d = torch.linspace(-3.0, 2.0, 30)
    values, _ = leading_eigenpairs(lambda v: v * d, torch.zeros(30), 3)
    assert_close(values, d.flip(-1)[:3], rtol=1e-10)


def test_the_landmarks_are_a_uniform_sample_of_the_rows():
    # each row is a coordinate of its own, so that the features tell which rows were taken
    rows = torch.eye(40)
    taken = torch.zeros(40)
    for seed in range(300):
        total = LowRankSum(
            torch.arange(40),
            torch.zeros(40),
            method="nystrom",
            rank=2,
            rows=lambda reserve: iter([rows[:15], torch.zeros(5, 40), rows[15:]]),
            generator=torch.Generator().manual_seed(seed),
        )
        (part,) = total.parts(lambda i: torch.ones(len(i)))
        taken += part.tensors["vectors"].square().sum(-1)
    # features: 2 of 8 landmarks of 40 rows
    assert_close(taken.sum(), 600.0)
    assert ((taken - 15).abs() < 5 * 15**0.5).all()


def test_rows_are_counted_as_they_come():
    def rows(reserve):
        for _ in range(3):
            reserve(4, None)  # from how many examples is not known
            yield torch.randn(4, 5)

    def total(limit):
        return LowRankSum(
            torch.arange(5), torch.zeros(5), method="function_space", rank=5, rows=rows, memory_limit=limit
        )

    needed = 3 * (12 * 5 + 5**2) * 8
    total(needed).parts(lambda i: torch.ones(len(i)))
    with pytest.raises(MemoryError, match="with 12 rows"):
        total(needed - 1).parts(lambda i: torch.ones(len(i)))


@pytest.mark.parametrize("n", [12, 40])
def test_small_eigenvalues_beside_large_ones_in_single_precision(n: int):
    """Curvatures of 1e6 and of 3 relative to the prior, of which both matter."""
    R = torch.linalg.qr(torch.randn(40, 20)).Q[:n] @ torch.diag(torch.logspace(3, 0.2, 20))
    rows = R.float()
    index, latent = torch.arange(20), torch.zeros(20).float()
    total = LowRankSum(index, latent, method="function_space", rank=0, rows=lambda reserve: iter([rows]))
    (part,) = total.parts(lambda index: torch.ones(20).float())
    x = torch.linalg.svd(R).Vh[min(n, 20) - 1]  # the direction of the smallest curvature
    found = part.posterior(latent).half_solve_transposed(x.float()).square().sum()
    expected = x @ torch.linalg.solve(torch.eye(20) + R.mT @ R, x)
    assert_close(found.double(), expected, rtol=1e-4)
