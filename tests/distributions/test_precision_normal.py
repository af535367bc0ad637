# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Every representation of a precision against a dense Gaussian of torch."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_bnn.curvature.dense import FullNormal
from pyro_bnn.curvature.diagonal import DiagonalNormal
from pyro_bnn.curvature.kronecker import KroneckerNormal
from pyro_bnn.curvature.low_rank import LowRankNormal
from pyro_bnn.distributions.precision_normal import BlockNormal
from tests.common import assert_close


def positive(n):
    A = torch.randn(n, n)
    return A @ A.mT + torch.eye(n)


def full():
    P = positive(5)
    return FullNormal(torch.randn(5), P), P


def diagonal():
    precision = torch.rand(5) + 0.2
    return DiagonalNormal(torch.randn(5), precision), torch.diag(precision)


def kronecker(constant=False):
    so, si = torch.rand(2) + 0.5, torch.rand(3) + 0.5
    if constant:
        so, si = torch.full((2,), 0.7), torch.full((3,), 1.9)
    qo, qi = torch.linalg.qr(torch.randn(2, 2)).Q, torch.linalg.qr(torch.randn(3, 3)).Q
    values = torch.rand(2, 3) + 0.1
    Q, S = torch.kron(qo, qi), torch.diag(torch.kron(so, si))
    return KroneckerNormal(torch.randn(6), (so, si), (qo, qi), values), S @ Q @ torch.diag(
        values.flatten()
    ) @ Q.mT @ S


def low_rank():
    scale, Q, e = torch.rand(5) + 0.5, torch.linalg.qr(torch.randn(5, 2)).Q, torch.tensor([3.0, -0.4])
    S = torch.diag(scale)
    return LowRankNormal(torch.randn(5), scale, Q, e), S @ (torch.eye(5) + Q @ torch.diag(e) @ Q.mT) @ S


def blocks():
    (first, P), (second, D) = full(), diagonal()
    index = torch.tensor([7, 0, 3, 9, 5]), torch.tensor([1, 2, 8, 4, 6])
    loc, dense = torch.randn(10), torch.zeros(10, 10)
    for i, part, matrix in zip(index, (first, second), (P, D), strict=True):
        part.loc = loc[i]
        dense[i[:, None], i] = matrix
    return BlockNormal(loc, list(zip(index, (first, second), strict=True))), dense


CASES = {
    "full": full,
    "diagonal": diagonal,
    "kronecker": kronecker,
    "constant scales": lambda: kronecker(constant=True),
    "low rank": low_rank,
    "blocks": blocks,
}


@pytest.mark.parametrize("name", CASES)
def test_every_representation_is_its_dense_matrix(name):
    d, P = CASES[name]()
    p = len(P)
    dense = MultivariateNormal(d.loc, precision_matrix=P)
    covariance = torch.linalg.inv(P)
    x = torch.randn(2, 4, p)
    assert_close(d.multiply(x), x @ P, rtol=1e-10, atol=1e-12)
    assert_close(d.multiply(x[0, 0]), P @ x[0, 0], rtol=1e-10, atol=1e-12)
    R = d.half_solve(torch.eye(p)).mT
    assert_close(R @ R.mT, covariance, rtol=1e-9, atol=1e-12)
    assert_close(d.half_solve(x), x @ R.mT, rtol=1e-9, atol=1e-12)
    assert_close(d.half_solve_transposed(x), x @ R, rtol=1e-9, atol=1e-12)
    assert_close(d.variance, covariance.diagonal(), rtol=1e-10)
    assert_close(d.mean, d.loc, rtol=0)
    assert_close(d.log_det_precision, torch.logdet(P), rtol=1e-10)
    assert_close(d.smallest_precision, torch.linalg.eigvalsh(P)[0], rtol=1e-3)
    assert_close(d.log_prob(x), dense.log_prob(x), rtol=1e-10)
    assert_close(d.entropy(), dense.entropy(), rtol=1e-10)
    assert_close(d.quadratic_form(x), x @ covariance @ x.mT, rtol=1e-9, atol=1e-12)
    assert d.rank == p


@pytest.mark.parametrize("name", CASES)
def test_draws_have_the_mean_and_the_covariance(name):
    d, P = CASES[name]()
    covariance = torch.linalg.inv(P)
    draws = d.rsample((3, 20_000)).reshape(-1, len(P))
    n = len(draws)
    spread = covariance.diagonal()
    assert ((draws.mean(0) - d.loc).abs() < 5 * (spread / n).sqrt()).all()
    error = ((spread * spread[:, None] + covariance.square()) / n).sqrt()
    assert ((draws.mT.cov() - covariance).abs() < 5 * error).all()
    one, two = (d.rsample((4,), generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert_close(one, two, rtol=0)


def test_entries_that_no_part_covers_are_fixed():
    part = DiagonalNormal(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 9.0]))
    d = BlockNormal(torch.tensor([1.0, 5.0, 2.0]), [(torch.tensor([0, 2]), part)])
    assert d.rank == 2
    assert_close(d.variance, [0.25, 0.0, 1 / 9])
    assert_close(d.rsample((7,))[:, 1], torch.full((7,), 5.0), rtol=0)
    x = torch.tensor([0.5, -3.0, 2.5])
    expected = torch.distributions.Normal(part.loc, part.precision.rsqrt()).log_prob(x[[0, 2]]).sum()
    assert_close(d.log_prob(x), expected, rtol=1e-12)
    assert_close(d.entropy(), 1 + math.log(2 * math.pi) - 0.5 * math.log(36.0), rtol=1e-12)
    assert_close(d.smallest_precision, 4.0)


def test_expanded_draws_are_separate():
    d, _ = full()
    draws = d.expand([3]).rsample((2,))
    assert draws.shape == (2, 3, 5)
    assert len(draws.reshape(6, 5).unique(dim=0)) == 6
    assert d.expand([3]).log_prob(draws).shape == (2, 3)
    assert_close(d.expand([3]).log_prob(draws), d.log_prob(draws), rtol=1e-12)
