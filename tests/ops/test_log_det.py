# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

from itertools import pairwise

import pytest
import torch

from pyro_bnn.ops.lanczos import lanczos
from pyro_bnn.ops.log_det import Plan, Probes, Sketch, Split
from tests.common import assert_close


def matrix(p, values, seed=0):
    """A symmetric matrix with some eigenvalues and zeros, float64."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(p, len(values), generator=generator, dtype=torch.float64)).Q
    return vectors * torch.as_tensor(values, dtype=torch.float64) @ vectors.mT


DECAY = 1e3 / torch.arange(1, 31, dtype=torch.float64) ** 2
SPECTRA = {
    "decay": DECAY,
    "flat": torch.full((30,), 3.0),
    "full rank": torch.linspace(1e-6, 50.0, 60),
    "stiff": torch.logspace(-6, 6, 30),
    "zero": torch.zeros(1),
}


def split_of(A, rank, dtype=torch.float64, seed=0):
    B = A.to(dtype)
    sketch = Sketch(lambda v: v @ B, B.diagonal(), torch.Generator().manual_seed(seed))
    sketch.grow(rank)
    return Split(lambda v: v @ B, B.diagonal(), sketch.rows())


def remainder_of(A, split):
    """N of a split, from its definition by dense matrices."""
    U, values = split.vectors.double(), split.values
    M = torch.eye(len(A), dtype=torch.float64) + U.mT @ torch.diag(values) @ U
    root = torch.linalg.cholesky(torch.linalg.inv(M))
    e, Q = torch.linalg.eigh(M)
    root = Q / e.sqrt() @ Q.mT
    return root @ (A - U.mT @ torch.diag(values) @ U) @ root


@pytest.mark.parametrize("rank", [0, 7])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_brackets_hold_for_every_probe_at_every_step(spectrum, rank):
    A = matrix(60, SPECTRA[spectrum])
    split = split_of(A, rank)
    values, vectors = torch.linalg.eigh(remainder_of(A, split))
    z = torch.randn(20, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = (z @ vectors).square() @ torch.log1p(values.clamp(min=0))
    widths = []
    rounding = 1e-12 * (1 + SPECTRA[spectrum].max())  # of the reference
    for steps in (1, 2, 4, 8, 16, 60):
        found = lanczos(split.remainder, z, max_steps=steps)
        assert bool((found.lower <= exact + rounding).all())
        assert bool((exact <= found.upper + rounding).all())
        widths.append(float((found.upper - found.lower).mean()))
    assert widths[-1] <= 1e-6 * (1 + float(exact.mean()))
    assert all(later <= earlier * 1.001 + 1e-8 for earlier, later in pairwise(widths))


@pytest.mark.parametrize("spectrum", ["decay", "flat", "full rank"])
def test_brackets_in_float32_allow_for_rounding(spectrum):
    A = matrix(60, SPECTRA[spectrum]).float().double()
    split = split_of(A, 7, torch.float32)
    values, vectors = torch.linalg.eigh(remainder_of(A, split))
    z = torch.randn(20, 60, generator=torch.Generator().manual_seed(1)).float()
    exact = (z.double() @ vectors).square() @ torch.log1p(values.clamp(min=0))
    for steps in (2, 8, 40):
        found = lanczos(split.remainder, z, max_steps=steps)
        assert bool((found.lower <= exact).all())
        assert bool((exact <= found.upper).all())
    assert float((found.upper - found.lower).max()) < 2e-2


def test_functions_of_the_map_are_applied_to_the_probes():
    A = matrix(60, SPECTRA["full rank"])
    z = torch.randn(3, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = lanczos(lambda v: v @ A, z, max_steps=60)
    expected = z - torch.linalg.solve(torch.eye(60, dtype=torch.float64) + A, z.mT).mT
    assert_close(found.apply(lambda x: x / (1 + x)), expected, rtol=1e-9, atol=1e-9)
    assert_close(found.gauss(lambda x: x), ((z @ A) * z).sum(-1), rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_sketch_is_below_the_map_and_exact_beyond_its_rank(dtype):
    A = matrix(60, DECAY)
    B = A.to(dtype)
    sketch = Sketch(lambda v: v @ B, B.diagonal(), torch.Generator().manual_seed(0))
    for rank in (5, 12, 40, 100):
        sketch.grow(rank)
        rows = sketch.rows().double()
        lowest = float(torch.linalg.eigvalsh(A - rows.mT @ rows)[0])
        assert lowest > -1e3 * torch.finfo(dtype).eps * float(DECAY[0])
    assert sketch.rank == 60
    if dtype == torch.float64:
        assert_close(rows.mT @ rows, A, rtol=0, atol=1e-9)


def test_known_traces_are_those_of_the_remainder():
    A = matrix(60, DECAY)
    split = split_of(A, 9)
    N = remainder_of(A, split)
    U = split.vectors
    half = torch.eye(60, dtype=torch.float64) - U.mT @ torch.diag(1 - (1 + split.values).rsqrt()) @ U
    assert_close(split.trace, N.trace(), rtol=1e-9)
    assert_close(split.slopes, (half @ N @ half).diagonal(), rtol=1e-8, atol=1e-9)
    z = torch.eye(60, dtype=torch.float64)
    assert_close(split.remainder(z), N, rtol=0, atol=1e-10 * 1e3)


def test_standard_errors_are_calibrated_and_estimates_unbiased():
    A = matrix(50, 1e2 / torch.arange(1, 41, dtype=torch.float64))
    one = torch.eye(50, dtype=torch.float64)
    split = split_of(A, 6)
    exact = float(torch.linalg.slogdet(one + A)[1])
    shrunk = one - torch.linalg.inv(one + A)
    groups = torch.arange(50) % 3 - 1  # the first of three is left out
    traces = torch.stack([shrunk.diagonal()[groups == g].sum() for g in (0, 1)])
    C = torch.randn(50, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    C = C + C.mT
    scores, of_traces, pairs = [], [], []
    for seed in range(100):
        probes = Probes(split, seed=seed, width=1e-9, solve=True)
        probes.run(24)
        found = probes.log_det()
        scores.append((found.value - exact) / found.error)
        value, error = probes.traces(groups)
        of_traces.append((value - traces) / error)
        X, Y = probes.pairs()
        pairs.append(((X @ C) * Y).sum() + (shrunk * C).sum())
    for found in (torch.tensor(scores)[:, None], torch.stack(of_traces)):
        assert bool((found.mean(0).abs() < 4 / 100**0.5).all())
        # Student's t with 23 degrees of freedom has a standard deviation of 1.05, and its estimate an error of 7 %
        assert bool(((found.std(0) > 0.75) & (found.std(0) < 1.35)).all())
    error = torch.stack(pairs)
    assert abs(float(error.mean())) < 4 * float(error.std()) / 100**0.5


def test_the_control_variate_lowers_the_error():
    A = matrix(200, 0.3 * torch.ones(150))
    split = split_of(A, 0)
    probes = Probes(split)
    probes.run(16)
    r = probes.readings
    plain = float((0.5 * (r.lower + r.upper)).std()) / 4
    found = probes.log_det()
    assert found.error < 1e-3 * plain  # log(1 + x) is proportional to x where there is one x
    assert abs(found.value - 150 * torch.log1p(torch.tensor(0.3)).item()) < 1e-2


def test_ranks_and_probes_are_chosen_for_a_tolerance():
    A = matrix(300, 1e4 / torch.arange(1, 201, dtype=torch.float64) ** 1.5)
    exact = float(torch.linalg.slogdet(torch.eye(300, dtype=torch.float64) + A)[1])
    ranks = []
    for tolerance in (30.0, 0.3):
        plan = Plan(tolerance)
        rows, first, _ = plan.start(lambda v: v @ A, A.diagonal())
        found = plan.finished(first).log_det()
        assert 0.5 * (found.upper - found.lower) + found.error < 1.2 * tolerance
        assert abs(found.value - exact) < 4 * found.error + found.upper - found.lower + 1e-9
        ranks.append(len(rows))
    assert ranks[0] < ranks[1]
    plan = Plan(0.3, rank=20, num_probes=12)
    rows, first, products = plan.start(lambda v: v @ A, A.diagonal())
    assert (len(rows), len(plan.finished(first)), products) == (20, 12, 20)
