# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch
import torch.nn.functional as F

from pyro_bnn.curvature.linear_maps import MapBlock, pair_block, squared_rows
from pyro_bnn.curvature.patches import patch_gram, patches

GEOMETRIES = list(
    itertools.product([(3, 3), (5, 2), (1, 1), (2, 4)], [1, 2, (2, 3)], [0, (1, 2)], [1, (2, 1)])
)


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), GEOMETRIES)
def test_patches_give_the_convolution(kernel, stride, padding, dilation):
    torch.manual_seed(0)
    x, weight = (
        torch.randn(3, 2, 11, 10, dtype=torch.float64),
        torch.randn(4, 2, *kernel, dtype=torch.float64),
    )
    expected = F.conv2d(x, weight, None, stride, padding, dilation)
    found = patches(x, kernel, stride, padding, dilation) @ weight.flatten(1).mT
    torch.testing.assert_close(found.mT.reshape(expected.shape), expected)


@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), GEOMETRIES)
def test_outer_products_without_patches(kernel, stride, padding, dilation, batch):
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 11, 10, dtype=torch.float64)
    rows = patches(x, kernel, stride, padding, dilation).flatten(0, 1)
    found, count = patch_gram(x, kernel, stride, padding, dilation)
    torch.testing.assert_close(found, rows.mT @ rows, rtol=1e-12, atol=1e-11)
    assert count == len(rows)


@pytest.mark.parametrize("shape", [(9,), (5, 4, 6)])
def test_outer_products_in_one_and_three_dimensions(shape):
    torch.manual_seed(0)
    x = torch.randn(30, 2, *shape, dtype=torch.float64)
    geometry = ((2,) * len(shape), 1, 1, 2)
    rows = patches(x, *geometry).flatten(0, 1)
    found, count = patch_gram(x, *geometry)
    torch.testing.assert_close(found, rows.mT @ rows, rtol=1e-12, atol=1e-11)
    assert count == len(rows)


def test_dense_blocks_equal_products_of_jacobians():
    torch.manual_seed(0)
    (gu, gv), (xu, xv) = (
        (torch.randn(3, 50, d, dtype=torch.float64) for d in (4, 2)),
        (torch.randn(50, d, dtype=torch.float64) for d in (19, 6)),
    )
    ju = torch.einsum("kno,ni->knoi", gu, xu).reshape(150, -1)
    jv = torch.einsum("kno,ni->knoi", gv, xv).reshape(150, -1)
    block = MapBlock(4, 19, xu)
    block.add(gu[:, :20], xu[:20])
    block.add(gu[:, 20:], xu[20:])
    torch.testing.assert_close(block.matrix().reshape(76, 76), ju.mT @ ju)
    torch.testing.assert_close(pair_block(gu, xu, gv, xv).reshape(76, 12), ju.mT @ jv)


@pytest.mark.parametrize("positions", [1, 5])
def test_squared_rows_equal_squared_jacobians(positions):
    torch.manual_seed(0)
    g = torch.randn(3, 20, positions, 4, dtype=torch.float64)
    x = torch.randn(20, positions, 6, dtype=torch.float64)
    expected = torch.einsum("knto,nti->knoi", g, x).square().sum((0, 1))
    found, offset = squared_rows(list(g), x)
    torch.testing.assert_close(found, expected)
    if positions == 1:
        torch.testing.assert_close(offset, g.square().sum((0, 1, 2)))
