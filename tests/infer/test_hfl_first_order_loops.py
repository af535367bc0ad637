# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What loops and networks keep outside of the weights, and functionals and optimisers that are not what they seem."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_bnn.infer import hfl
from tests.common import assert_close
from tests.infer.first_order_script import TARGETS, N, at_mode, data, linear, loss, reference
from tests.infer.test_hfl_first_order import outputs, plain, prior, rows, sgd


class Counting(nn.Module):
    """Puts a new tensor in the place of a buffer in every call, on which its output depends."""

    def __init__(self) -> None:
        super().__init__()
        self.net = at_mode(linear)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls = self.calls + 1.0
        return self.net(x)


def test_buffers_that_are_replaced_are_put_back() -> None:
    net = Counting()
    optimizer = sgd(net)
    runs = hfl.FirstOrder(net, outputs, optimizer, scale=N)
    for run in runs:
        assert net.calls == 0
        plain(net, optimizer, run.epochs(2))
    assert net.calls == 0
    assert_close(runs.result().covariance, reference(linear), rtol=1e-6)


def test_optimizers_that_are_attached_within_runs_are_put_back() -> None:
    net = at_mode(linear)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=2.0 / N)
    runs = hfl.FirstOrder(net, outputs, scale=N, method="paired")
    for run in runs:
        runs.attach(optimizer)
        plain(net, optimizer, run.epochs(2))
    assert not optimizer.state


def test_runs_that_were_left_in_the_middle() -> None:
    """Their iterator is still held: the next one starts from the point estimate, and the end of the old one changes nothing."""
    net = at_mode(linear)
    optimizer, theta = sgd(net), nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    runs = hfl.FirstOrder(net, outputs, optimizer, scale=N)
    left = iter(runs)
    while not next(left).is_training:
        plain(net, optimizer, 1)
    plain(net, optimizer, 3)
    for number, run in enumerate(runs):
        if number == 1:
            del left
        plain(net, optimizer, run.epochs(2))
    assert torch.equal(nn.utils.parameters_to_vector(net.parameters()), theta)
    assert_close(runs.result().covariance, reference(linear), rtol=1e-6)


def go(net: nn.Module, optimizer: Any, functional: Any, loop: Any = plain, **options: Any) -> hfl.HFLResult:
    runs = hfl.FirstOrder(net, functional, optimizer, scale=N, **options)
    for run in runs:
        loop(net, optimizer, run.epochs(2))
    return runs.result()


def test_a_small_functional_that_is_partly_detached_beside_a_large_one() -> None:
    net = at_mode(linear)

    def both(net: Any) -> Tensor:
        out = net(TARGETS[:2])
        return torch.cat([1e3 * out[:1], out[1:] + 3 * net(TARGETS[2:]).detach()])

    with pytest.raises(ValueError, match=r"element 1 of the functional moves .* detached"):
        go(net, sgd(net), both)


def test_a_functional_with_a_kink_at_a_target_is_not_detached() -> None:
    """Half-way between: the difference to both sides is no derivative of either side, at a distance of a tenth of a step or more."""
    net = at_mode(linear)
    g = torch.cat([TARGETS[0], torch.ones(1)])
    exact = g @ torch.linalg.solve(covariance_inverse(), g)
    value = net(TARGETS[:1]).detach() - 3e-4 * exact.sqrt()
    result = go(net, sgd(net), lambda net: (net(TARGETS[:1]) - value).relu())
    assert_close(result.variances[0], exact, rtol=1e-6)


def covariance_inverse() -> Tensor:
    X = torch.cat([data()[0], torch.ones(N, 1)], -1)
    return X.mT @ X / 0.25 + 2.0 * torch.eye(4)


def test_functionals_that_jump() -> None:
    net = at_mode(linear)
    for functional in (
        lambda net: net(TARGETS).round(),
        lambda net: torch.cat([net(TARGETS), net(TARGETS).round()]),
    ):
        with pytest.raises(ValueError, match=r"3 of . elements of the functional change .* zero gradient"):
            go(net, sgd(net), functional)
    result = go(net, sgd(net), lambda net: torch.cat([net(TARGETS), 0 * net(TARGETS)]))
    assert_close(result.variances, torch.cat([reference(linear).diagonal(), torch.zeros(3)]), rtol=1e-6)


def test_shuffled_rows_in_a_single_batch() -> None:
    """At the minimum its gradient is nothing but rounding, which depends on the order of the rows; random inputs are more."""
    net = at_mode(linear)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def whole(noise: float) -> Any:
        def loop(net: Any, optimizer: Any, epochs: int) -> None:
            for x, y in rows(epochs, N, shuffle=True):
                optimizer.zero_grad()
                (loss(net, x + noise * torch.randn_like(x), y) + prior(net)).backward()
                optimizer.step()

        return loop

    assert_close(go(net, optimizer, outputs, whole(0.0)).covariance, reference(linear), rtol=1e-6)
    with pytest.raises(ValueError, match="no function of the weights"):
        go(net, optimizer, outputs, whole(1e-6))


def test_gradients_that_are_normalised() -> None:
    """Two steps do not show it by their norms: their images do."""
    net = at_mode(linear)

    def loop(net: Any, optimizer: Any, epochs: int) -> None:
        for x, y in rows(epochs, N // 2):
            optimizer.zero_grad()
            loss(net, x, y).backward()
            for p in net.parameters():
                p.grad /= p.grad.norm()
            optimizer.step()

    with pytest.raises(ValueError, match="not those of one loss"):
        go(net, sgd(net), outputs, loop)


def test_parameters_outside_of_the_module() -> None:
    net, noise = at_mode(linear), nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([*net.parameters(), noise], lr=0.01)

    def loop(net: Any, optimizer: Any, epochs: int) -> None:
        for x, y in rows(epochs):
            optimizer.zero_grad()
            (loss(net, x, y) / noise.square() + noise.log()).backward()
            optimizer.step()

    with pytest.raises(ValueError, match=r"shape \(\) that is none of the trained ones"):
        go(net, optimizer, outputs, loop)
    assert noise == 1


def test_weights_of_two_precisions() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.shift = at_mode(linear).float(), nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.float()).double() + self.shift

    net = Mixed()
    X = torch.cat([data()[0], torch.ones(N, 2)], -1)
    A = torch.cat([TARGETS, torch.ones(3, 2)], -1)
    exact = A @ torch.linalg.solve(X.mT @ X / 0.25 + 2.0 * torch.eye(5), A.mT)
    result = go(net, sgd(net), outputs, sweeps=8, tolerance=1e-3)
    assert result.epsilon == 1e-2
    assert_close(result.covariance, exact, rtol=1e-3)


def test_paired_runs_of_a_functional_without_a_slope() -> None:
    import pyro
    import pyro.distributions as dist
    from pyro.infer.autoguide import AutoDelta

    x, y = data()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)

    P = x.mT @ x / 0.25 + torch.eye(3)
    guide = AutoDelta(model, init_loc_fn=lambda _: torch.linalg.solve(P, x.mT @ y[:, 0] / 0.25))
    guide(x, y[:, 0])
    A = torch.cat([torch.zeros(1, 3), TARGETS])
    found = hfl.solve(guide, (x, y[:, 0]), functional=lambda z: A @ z["w"], method="paired")
    assert_close(found.variances, (A @ torch.linalg.solve(P, A.mT)).diagonal(), rtol=1e-6)
