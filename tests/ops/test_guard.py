# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The check of Jacobians finds exactly the entries whose blocks were tampered with."""

import pytest
import torch
import torch.nn.functional as F

from pyro_bnn.curvature.capture import Capture
from pyro_bnn.curvature.guard import CheckedJacobian, checked_jacobian, mistaken_entries, suspects
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
    found = CheckedJacobian(*captured(*args, **kwargs))
    found.layouts.mistaken = torch.zeros(29, dtype=torch.bool)
    found.layouts.generator = torch.Generator().manual_seed(0)
    return found


def check(jacobian, score=None):
    return mistaken_entries(jacobian, jacobian.layouts.generator, score)


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


def known(jacobian):
    """The same with a graph that passed before."""
    assert check(jacobian) is None
    assert len(jacobian.layouts.programs) == 1
    return jacobian


@pytest.mark.parametrize("where", [W, A, V, C, GAIN])
def test_scores_find_a_wrong_use_in_a_graph_that_is_known(where):
    jacobian = known(jacobian_of())
    use = tampered(jacobian, where)
    if where in (A, C):
        use.sign = 1 + 1e-9
    else:
        use.x = (1 + 1e-9) * use.x
    assert check(jacobian) is None  # rows are where they were
    assert check(jacobian, torch.randn(B, 2)).tolist() == mask(where).tolist()


@pytest.mark.parametrize("where", [W, A, V, C])
def test_scores_find_an_unseen_use_in_a_graph_that_is_known(where):
    jacobian = known(jacobian_of())
    jacobian.blocks = [b for b in jacobian.blocks if not bool((b.index == where.start).any())]
    assert check(jacobian) is None
    assert bool(check(jacobian, torch.randn(B, 2))[where].all())


def test_scores_find_one_wrong_example_always():
    for seed in range(20):
        torch.manual_seed(seed)
        jacobian = known(jacobian_of())
        use = tampered(jacobian, W)
        use.x = use.x.clone()
        use.x[0, 1] += 0.1
        assert check(jacobian, torch.randn(B, 2)) is not None


@pytest.mark.parametrize(("zeros", "looks"), [(B, True), (B // 2 + 1, True), (B // 2, False), (0, False)])
def test_scores_that_show_little_are_not_relied_on(zeros, looks):
    """What is wrong are rows whose score is zero; only a random combination of the outputs shows them."""
    jacobian = known(jacobian_of())
    use = tampered(jacobian, W)
    use.x = use.x.clone()
    use.x[:zeros] *= 2
    score = torch.randn(B, 2)
    score[:zeros] = 0.0
    assert (check(jacobian, score) is not None) == looks
    score[:zeros] = 1e-15
    assert (check(jacobian, score) is not None) == looks


def test_the_gradient_is_that_of_autograd_on_active_entries():
    x, score = torch.randn(B, 3), torch.randn(B, 2)
    latent = torch.randn(29).requires_grad_(True)

    def function(u, x):  # an entry on its own, which is generic, beside blocks
        return network(u, x) * u[28].exp()

    (expected,) = torch.autograd.grad((function(latent, x) * score).sum(), latent)
    for active in (None, mask(W, slice(25, 29))):
        with Capture(latent, active) as capture:
            y = function(latent, x)
        found = checked_jacobian(capture, latent, y, score=lambda _: score)
        kept = expected if active is None else expected.where(active, torch.zeros(()))
        assert len(found.generic) == 1
        assert_close(found.gradient, kept, rtol=1e-10, atol=1e-12)


def test_the_gradient_of_what_depends_on_nothing_is_zero():
    jacobian = jacobian_of(lambda u, x: x @ torch.ones(3, 2))
    assert check(jacobian, torch.ones(B, 2)) is None
    assert_close(jacobian.gradient, torch.zeros(29))


MAPS = {
    "conv1d": lambda u, x: F.conv1d(x[:, :2, 0], u[:24].view(3, 2, 4), stride=2, padding=1),
    "conv2d": lambda u, x: F.conv2d(x, u[:24].view(2, 3, 2, 2), u[24:26], padding=(1, 0), dilation=(1, 2)),
    "grouped": lambda u, x: F.conv2d(x[:, :2], u[:24].view(4, 1, 3, 2), groups=2),
    "transposed": lambda u, x: F.conv_transpose2d(
        x, u[:24].view(3, 2, 2, 2), u[24:26], stride=2, output_padding=1
    ),
    "two kernels": lambda u, x: torch.cat(
        [
            F.conv2d(x, u[:24].view(2, 3, 4, 1)).flatten(1),
            F.conv2d(x, u[:24].view(2, 3, 2, 2)).flatten(1),
            F.linear(x[:, :, :2, :2].flatten(1), u[:24].view(2, 12)),
        ],
        1,
    ),
    "two transposed kernels": lambda u, x: torch.cat(
        [
            F.conv_transpose2d(x, u[:24].view(3, 2, 4, 1)).flatten(1),
            F.conv_transpose2d(x, u[:24].view(3, 2, 2, 2)).flatten(1),
        ],
        1,
    ),
}


@pytest.mark.parametrize("name", MAPS)
def test_convolutions_pass_and_their_mistakes_are_found(name):
    jacobian = known(
        jacobian_of(lambda u, x: torch.tanh(MAPS[name](u, x)).flatten(1), torch.randn(B, 3, 5, 6))
    )
    score = torch.randn(B, jacobian.M)
    assert check(jacobian, score) is None
    use = jacobian.capture.uses[0]
    of = use if isinstance(use.x, torch.Tensor) else use.x
    of.x = of.x.clone()
    of.x[0, 0] += 1e-6
    assert bool(check(jacobian, score)[:12].all())


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def test_suspects_are_named():
    def function(u, x):
        a, b = u[W].view(4, 3), u[V].view(2, 4)
        h = F.layer_norm(F.linear(x, a, u[A]) + F.linear(x, Square.apply(a)), (4,))
        return F.linear(h, b) * u[GAIN]

    jacobian = jacobian_of(function)
    found = suspects(jacobian.capture, jacobian.flat, mask(W))
    assert (found.nodes, found.functions) == (["SquareBackward"], ["linear"])
    found = suspects(jacobian.capture, jacobian.flat, mask(A, GAIN))
    assert (found.nodes, found.functions) == ([], ["linear", "mul"])


def test_rounding_passes():
    torch.set_default_dtype(torch.float32)
    for _ in range(10):
        jacobian = jacobian_of()
        assert check(jacobian) is None
        assert check(jacobian, torch.randn(B, 2)) is None
    jacobian = jacobian_of()
    use = tampered(jacobian, V)
    use.x = use.x * 1.001
    assert check(jacobian).tolist() == mask(V).tolist()


def test_functionals_that_cancel_by_chance_pass():
    """Units that are alike, as after training from a symmetric start: a random functional of some is a hundredth of its terms."""

    for seed in range(400):
        latent = torch.cat([torch.randn(3).repeat(4), torch.full((17,), 0.4)]).requires_grad_(True)
        with Capture(latent) as capture:
            y = network(latent, torch.rand(1, 3))
        jacobian = CheckedJacobian(capture, latent, y)
        jacobian.layouts.mistaken = torch.zeros(29, dtype=torch.bool)
        assert mistaken_entries(jacobian, torch.Generator().manual_seed(seed)) is None


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
