# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Curvature and covariance of one linear map from its inputs and output gradients, against its formed Jacobian."""

import pytest
import torch

from pyro_bnn.curvature.linear_maps import (
    MapBlock,
    _chunks,
    eigh_factor,
    independent_covariance,
    kronecker_covariance,
    kronecker_inputs,
    kronecker_outputs,
    pair_block,
    rank_one,
    squared_rows,
    weight_gradients,
)
from pyro_bnn.curvature.patches import (
    ChannelRows,
    OutputPatches,
    PatchInputs,
    column_gram,
    gram,
    patches,
    sizes,
)
from tests.common import assert_close

B, K, OUT, IN = 6, 3, 4, 5


def rows(T, out=OUT, into=IN, columns=K):
    g = torch.randn(columns, B, T, out)
    x = torch.randn(B, T, into)
    return g, x, torch.einsum("knto,nti->nkoi", g, x)


@pytest.mark.parametrize("T", [1, 2, 40])
@pytest.mark.parametrize("columns", [1, 3])
def test_gradients_and_their_squares(T, columns):
    g, x, J = rows(T, columns=columns)
    assert_close(weight_gradients(list(g), x), J, rtol=1e-10, atol=1e-12)
    squares, offset = squared_rows(list(g), x)
    assert_close(squares, J.square().sum((0, 1)), rtol=1e-10)
    assert (offset is None) == (T > 1)
    if offset is not None:
        assert_close(offset, g.square().sum((0, 1, 2)), rtol=1e-10)


def test_factors_by_their_definition():
    g, x, _ = rows(7)
    A, count = kronecker_inputs(x, "expand")
    assert_close(A, torch.einsum("nti,ntj->ij", x, x), rtol=1e-10, atol=1e-12)
    assert count == 7 * B
    A, count = kronecker_inputs(x, "reduce")
    assert_close(A, torch.einsum("ni,nj->ij", x.mean(1), x.mean(1)), rtol=1e-10, atol=1e-12)
    assert count == B
    assert_close(
        kronecker_outputs(g[0], "expand"), torch.einsum("nto,ntp->op", g[0], g[0]), rtol=1e-10, atol=1e-12
    )
    total = g[0].sum(1)
    assert_close(kronecker_outputs(g[0], "reduce"), total.mT @ total, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("T", "out", "columns"), [(1, 4, 3), (3, 4, 3), (40, 4, 3), (40, 2, 1), (12, 4, 3), (1, 1, 1)]
)
def test_covariances_without_the_jacobian(T, out, columns):
    g, x, J = rows(T, out=out, columns=columns)
    variances = torch.rand(out, IN) + 0.1
    J = J.flatten(2)
    expected = (J * variances.flatten()) @ J.mT
    assert_close(independent_covariance(list(g), x, variances), expected, rtol=1e-9, atol=1e-11)
    ro, ri = torch.randn(out, out), torch.randn(IN, IN)
    rotated = J @ torch.kron(ro, ri)
    expected = (rotated * variances.flatten()) @ rotated.mT
    assert_close(kronecker_covariance(list(g), x, (ro, ri), variances), expected, rtol=1e-9, atol=1e-11)


def test_positive_matrices_that_are_outer_products():
    a, b = torch.rand(4) + 0.1, torch.rand(3) + 0.1
    found = rank_one(100 * a[:, None] * b)
    assert found is not None
    assert found[0].shape == (4,)
    assert found[1].shape == (3,)
    assert_close(found[0][:, None] * found[1], 100 * a[:, None] * b, rtol=1e-12)
    for place in ((0, 0), (3, 2), (1, 0), (0, 1)):
        other = a[:, None] * b
        other[place] *= 1 + 1e-6
        assert rank_one(other) is None
    assert rank_one(1e-30 * (a[:, None] + b)) is None


def test_factors_are_decomposed():
    A = torch.randn(5, 3)
    values, vectors = eigh_factor(A @ A.mT)
    assert bool((values >= 0).all())
    assert_close((vectors * values) @ vectors.mT, A @ A.mT, rtol=1e-10, atol=1e-12)
    # what is not symmetric up to rounding counts by its symmetric part
    skew = torch.triu(torch.randn(5, 5), 1)
    values, vectors = eigh_factor(A @ A.mT + 1e-3 * (skew - skew.mT))
    assert_close((vectors * values) @ vectors.mT, A @ A.mT, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("out", "into"), [(1, 1), (3, 8), (2, 9), (4, 17), (1, 24)])
def test_dense_blocks_of_one_map(out, into):
    g, x = torch.randn(K, B, out), torch.randn(B, into)
    block = MapBlock(out, into, x)
    block.add(g, x)
    block.add(2 * g[:, :2], x[:2])
    J = torch.einsum("kno,ni->knoi", g, x).reshape(K * B, -1)
    half = torch.einsum("kno,ni->knoi", 2 * g[:, :2], x[:2]).reshape(2 * K, -1)
    found = block.matrix().reshape(out * into, -1)
    assert_close(found, J.mT @ J + half.mT @ half, rtol=1e-10, atol=1e-11)
    gv, xv = torch.randn(K, B, 2), torch.randn(B, 3)
    other = torch.einsum("kno,ni->knoi", gv, xv).reshape(K * B, -1)
    assert_close(pair_block(g, x, gv, xv).reshape(out * into, -1), J.mT @ other, rtol=1e-10, atol=1e-11)


def test_chunks_cover_everything_once_within_the_limit():
    for total, floats, limit in [(10, 3, 9), (10, 3, 2), (1, 1, 1), (7, 0, 5), (12, 4, 1000), (0, 3, 9)]:
        parts = _chunks(total, floats, limit)
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(total))
        assert all((p.stop - p.start) * floats <= max(limit, floats) for p in parts)
        assert len(parts) <= -(-total // max(1, limit // max(1, floats)))


@pytest.mark.parametrize("d", [5, 255, 256, 300, 513])
def test_outer_products_of_wide_rows(d):
    R = torch.randn(3, d)
    assert_close(gram(R), R.mT @ R, rtol=1e-10, atol=1e-12)
    assert_close(gram(R[:, :7], block=2), R[:, :7].mT @ R[:, :7], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 3, 9), (4, 9, 3), (4, 5, 5), (1, 1, 1)])
def test_outer_products_of_columns(shape):
    C = torch.randn(shape)
    assert_close(column_gram(C), torch.einsum("bit,bjt->ij", C, C), rtol=1e-10, atol=1e-12)


def test_sizes_per_dimension():
    assert sizes(3, 2) == (3, 3)
    assert sizes((2,), 3) == (2, 2, 2)
    assert sizes((1, 2), 2) == (1, 2)
    assert sizes([4], 1) == (4,)


def test_patches_of_a_line_are_its_windows():
    x = torch.arange(7.0).view(1, 1, 7)
    assert_close(patches(x, (2,), 2, 0, 3)[0], [[0.0, 3.0], [2.0, 5.0]])
    assert_close(patches(x, (3,), 3, 1, 1)[0], [[0.0, 0.0, 1.0], [2.0, 3.0, 4.0], [5.0, 6.0, 0.0]])


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_rows_without_inputs_do_not_count(sharing):
    x = torch.randn(4, 3, 2)
    present = torch.tensor(
        [[True, True, True], [True, False, True], [False, False, False], [False, True, False]]
    )
    x = x * present.unsqueeze(-1)
    A, count = kronecker_inputs(x, sharing, present)
    if sharing == "expand":
        rows = x[present]
        assert count == 6
    else:
        rows = torch.stack([x[n][present[n]].mean(0) for n in (0, 1, 3)])
        assert count == 3
    assert_close(A, rows.mT @ rows, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "geometry"),
    [
        ((5, 2, 9), ((3,), 2, 1, 1)),
        ((5, 2, 6, 7), ((2, 3), (1, 2), (0, 1), (2, 1))),
        ((3, 1, 4, 4, 4), ((2, 2, 2), 2, 0, 1)),
    ],
)
def test_patches_are_projected_without_being_formed(shape, geometry):
    x = torch.randn(shape)
    x[0, :, :4] = 0.0
    inputs = PatchInputs(x, geometry)
    formed = inputs()
    v = torch.randn(formed.shape[-1])
    assert_close(inputs.project(v), formed @ v, rtol=1e-9, atol=1e-11)
    u = torch.randn(shape[1])
    rows = ChannelRows(0, 1)
    assert_close(rows.project(x, u), rows(x) @ u, rtol=1e-9, atol=1e-11)
    rows = OutputPatches(0, 1, geometry, formed.shape[1])
    assert_close(rows.project(x, v), formed @ v, rtol=1e-9, atol=1e-11)
    assert inputs.present().tolist() == (formed != 0).any(-1).tolist()
    assert inputs.numel() == formed.numel()
    rows = formed.flatten(0, 1)
    A, count = inputs.gram(torch.float64)
    assert_close(A, rows.mT @ rows, rtol=1e-9, atol=1e-11)
    assert count == len(rows)
