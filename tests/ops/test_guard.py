# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The check of Jacobians finds exactly the entries whose blocks were tampered with."""

import pytest
import torch
import torch.nn.functional as F

from pyro_bnn.ops.capture import Capture
from pyro_bnn.ops.examples import ExampleJacobian
from pyro_bnn.ops.guard import checked_jacobian, mistaken_entries
from tests.common import assert_close

B = 6
#: entries of the weights and offsets of two layers, a gain, and one that is not used
W, A, V, C, GAIN = slice(0, 12), slice(12, 16), slice(16, 24), slice(24, 26), slice(26, 28)


def network(u, x):
    h = torch.tanh(x @ u[W].view(4, 3).mT + u[A])
    return (h @ u[V].view(2, 4).mT + u[C]) * u[GAIN]


def captured(function=network, x=None, scale=1.0):
    x = torch.randn(B, 3) if x is None else x
    latent = (scale * torch.randn(29)).requires_grad_(True)
    with Capture(latent) as capture:
        y = function(latent, x)
    return capture, latent, y


def jacobian_of(*args, **kwargs):
    found = ExampleJacobian(*captured(*args, **kwargs))
    found.layouts.mistaken = torch.zeros(29, dtype=torch.bool)
    found.layouts.generator = torch.Generator().manual_seed(0)
    return found


def check(jacobian):
    return mistaken_entries(jacobian, jacobian.layouts.generator)


def mask(*where):
    found = torch.zeros(29, dtype=torch.bool)
    for part in where:
        found[part] = True
    return found


def tampered(jacobian, where):
    (use,) = [use for use in jacobian.capture.uses if bool((use.index == where.start).any())]
    return use


@pytest.mark.parametrize("scale", [1e-3, 1.0, 5.0])
def test_right_blocks_pass_and_their_graph_is_known(scale):
    for _ in range(5):
        jacobian = jacobian_of(scale=scale)
        assert check(jacobian) is None
        assert len(jacobian.layouts.programs) == 1
        assert check(jacobian) is None
        assert len(jacobian.layouts.programs) == 1


@pytest.mark.parametrize("where", [W, A, V, C, GAIN])
@pytest.mark.parametrize("size", [2.0, 1 + 1e-9, -1.0])
def test_a_wrong_use_is_found(where, size):
    jacobian = jacobian_of()
    use = tampered(jacobian, where)
    if where in (A, C):
        use.sign = size
    elif where == GAIN:
        use.x = size * use.x
    else:
        use.x = use.x * size
    assert check(jacobian).tolist() == mask(where).tolist()
    assert not jacobian.layouts.programs  # a graph that failed is looked at again


def test_one_wrong_example_is_found_half_of_the_time():
    hits = 0
    for seed in range(40):
        torch.manual_seed(seed)
        jacobian = jacobian_of()
        jacobian.layouts.generator.manual_seed(seed)
        use = tampered(jacobian, W)
        use.x = use.x.clone()
        use.x[0, 1] += 0.1
        hits += check(jacobian) is not None
    assert 10 <= hits <= 30


@pytest.mark.parametrize("where", [W, A, V, C])
def test_an_unseen_use_is_found(where):
    jacobian = jacobian_of()
    jacobian.blocks = [b for b in jacobian.blocks if not bool((b.index == where.start).any())]
    wrong = check(jacobian)
    assert bool(wrong[where].all())
    known = torch.zeros(29, dtype=torch.bool)
    for block in jacobian.blocks:
        known[block.index.reshape(-1)] = True
    assert not bool((wrong & known).any())


def test_rows_that_mix_are_found_in_graphs_that_are_known():
    x = torch.randn(B, 3)
    jacobian = jacobian_of(x=x)
    assert check(jacobian) is None
    # the same graph, whose layouts say that the examples are elsewhere
    use = tampered(jacobian, W)
    kept = jacobian.pull_back

    def moved(cotangent, outputs, **options):
        found = list(kept(cotangent, outputs, **options))
        found[use.slot] = found[use.slot].roll(1, 0)
        return tuple(found)

    jacobian.pull_back = moved
    same = [u for u in jacobian.capture.uses if u.slot == use.slot]
    expected = torch.zeros(29, dtype=torch.bool)
    for other in same:
        expected[other.index.reshape(-1)] = True
    assert check(jacobian).tolist() == expected.tolist()


def test_rounding_passes():
    torch.set_default_dtype(torch.float32)
    for _ in range(10):
        jacobian = jacobian_of()
        assert check(jacobian) is None
    use = tampered(jacobian_of(), V)
    jacobian = jacobian_of()
    use = tampered(jacobian, V)
    use.x = use.x * 1.001
    assert check(jacobian).tolist() == mask(V).tolist()


def test_a_gradient_of_zero_shows_nothing():
    jacobian = jacobian_of(lambda u, x: F.relu(network(u, x) - 1e6))
    assert check(jacobian) is None
    assert not jacobian.layouts.programs
    constant = jacobian_of(lambda u, x: x @ torch.ones(3, 2))
    assert check(constant) is None


def hidden(u, x):
    """The rows of the first weight are written into a buffer, which no use shows."""
    w = torch.zeros(4, 3)
    w[:] = u[W].view(4, 3)
    return torch.tanh(x @ w.mT) @ u[V].view(2, 4).mT


def mixing(u, x):
    h = network(u, x)
    return h - h.mean(0)


def reused(u, x):
    """A derivative of the network, in which weights are used once more."""
    x = x.clone().requires_grad_(True)
    y = network(u, x).sum()
    (slope,) = torch.autograd.grad(y, x, create_graph=True)
    return slope


@pytest.mark.parametrize("function", [network, hidden, mixing, reused])
def test_checked_jacobians_are_right(function):
    x = torch.randn(B, 3)
    capture, latent, y = captured(function, x)
    jacobian = checked_jacobian(capture, latent, y)
    expected = torch.autograd.functional.jacobian(lambda u: function(u, x), latent.detach())
    rows = jacobian.dense(jacobian.basis()).movedim(0, 1)
    assert_close(rows.detach(), expected.reshape(rows.shape), rtol=1e-9, atol=1e-11)
    if function is network:
        assert not bool(jacobian.layouts.mistaken.any())
    # a second batch of another size, with what was found in the first
    x = torch.randn(3, 3)
    with Capture(latent) as capture:
        y = function(latent, x)
    again = checked_jacobian(capture, latent, y, jacobian.layouts)
    expected = torch.autograd.functional.jacobian(lambda u: function(u, x), latent.detach())
    rows = again.dense(again.basis()).movedim(0, 1)
    assert_close(rows.detach(), expected.reshape(rows.shape), rtol=1e-9, atol=1e-11)
