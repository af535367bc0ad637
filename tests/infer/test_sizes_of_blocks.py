# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Beside Kronecker factors, blocks of up to 1024 entries are dense, and diagonal beyond; so are offsets of maps."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_bnn.curvature import kronecker
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.ops import memory
from tests.common import assert_close


@pytest.mark.parametrize("q", [1024, 1025])
def test_the_limit_is_what_is_documented(q):
    x = torch.randn(2, q)

    def model(x, y=None):
        b = pyro.sample("b", dist.Normal(torch.zeros(q), 1.0).to_event(1))
        with pyro.plate("data", 2):
            return pyro.sample("obs", dist.Normal((x * b).sum(-1), 0.5), obs=y)

    y = torch.randn(2)
    guide = AutoLaplace(model, structure="kronecker").initialize(x, y)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    form = guide.posterior.quadratic_form(torch.ones(1, q))
    if q == 1024:  # Woodbury
        ones = x.sum(-1)
        expected = q - ones @ torch.linalg.solve(0.25 * torch.eye(2) + x @ x.mT, ones)
    else:
        expected = (1 + x.square().sum(0) / 0.25).reciprocal().sum()
    assert_close(form, expected.reshape(1, 1), rtol=1e-9)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("limit", [2, 3, 4])
def test_offsets_of_a_map(monkeypatch, limit, sharing):
    """
    An offset of three outputs has the map's output factor over all examples, or the diagonal of it; the weight has that of
    the examples with an input, since the others have no gradient in it.
    """
    monkeypatch.setattr(kronecker, "DENSE_LIMIT", limit)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        logits = torch.nn.functional.linear(x, w, b)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    x, y = torch.randn(9, 2), torch.randint(0, 3, (9,))
    x[3], x[5, 0], x[6, 1] = 0.0, 0.0, 0.0
    guide = AutoLaplace(model, structure="kronecker", sharing=sharing).initialize(x, y)
    guide.loc.data = torch.randn(9)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    w, b = guide.loc.detach()[:6].reshape(3, 2), guide.loc.detach()[6:]
    p = torch.softmax(x @ w.mT + b, -1)
    each = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    G = each.sum(0)
    P = torch.eye(3) + (G if limit >= 3 else torch.diag(G.diagonal()))
    rows = torch.cat([torch.zeros(3, 6), torch.eye(3)], 1)
    assert_close(guide.posterior.quadratic_form(rows), torch.linalg.inv(P), rtol=1e-9, atol=1e-12)
    weight = torch.kron(G - each[3], x.mT @ x / 8) + torch.eye(6)
    rows = torch.cat([torch.eye(6), torch.zeros(6, 3)], 1)
    assert_close(guide.posterior.quadratic_form(rows), torch.linalg.inv(weight), rtol=1e-9, atol=1e-12)


def test_a_part_of_an_offset():
    """Entries of an offset that are left out are fixed; the others keep their share of the output factor."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=torch.nn.functional.linear(x, w, b)), obs=y)

    x, y = torch.randn(9, 2), torch.randint(0, 3, (9,))
    chosen = torch.ones(9, dtype=torch.bool)
    chosen[7] = False
    guide = AutoLaplace(model, structure="kronecker", sites=chosen).initialize(x, y)
    guide.loc.data = torch.randn(9)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    w, b = guide.loc.detach()[:6].reshape(3, 2), guide.loc.detach()[6:]
    p = torch.softmax(x @ w.mT + b, -1)
    G = torch.diag(p.sum(0)) - p.mT @ p
    keep = torch.tensor([0, 2])
    expected = torch.zeros(3, 3)
    expected[keep[:, None], keep] = torch.linalg.inv(torch.eye(2) + G[keep[:, None], keep])
    rows = torch.cat([torch.zeros(3, 6), torch.eye(3)], 1)
    assert_close(guide.get_posterior().quadratic_form(rows), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", [[0, 2, 1], [1, 0, 2], [2, 1, 0]])
def test_rows_in_another_order_are_another_map(order):
    """A weight that two batches use with its rows in different orders has no common factors."""

    def model(x, flip, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
        logits = torch.nn.functional.linear(x, w[order] if flip[0] else w)
        with pyro.plate("data", 18, subsample_size=len(x)):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    batches = [(torch.randn(9, 2), torch.full((9,), i), torch.randint(0, 3, (9,))) for i in range(2)]
    guide = AutoLaplace(model, structure="kronecker").initialize(*batches[0])
    with pytest.raises(ValueError, match="in different ways"):
        guide.laplace_approximation(batches, map_tolerance=float("inf"))


def test_entries_that_are_not_recognised_need_memory(monkeypatch):
    """Their columns of the Jacobian, and what forms them, are asked for before they are made."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        v = pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal((x * w).sum(-1) + (x[:, :3] * v.exp()).sum(-1), 0.5), obs=y)

    x, y = torch.randn(5, 4), torch.randn(5)
    guide = AutoLaplace(model).initialize(x, y)
    needed = (3 + 3) * 5 * 8
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed - 1)
    with pytest.raises(MemoryError, match="site 'obs'"):
        guide.laplace_approximation((x, y), map_tolerance=float("inf"))
