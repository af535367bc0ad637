# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""L-BFGS on losses with noise, against dense BFGS matrices, Newton's solution and scipy."""

import math

import pytest
import torch
from scipy.optimize import rosen, rosen_der

from pyro_bnn.infer import StochasticLBFGS
from tests.common import assert_close

A = torch.diag(torch.logspace(-2, 4, 7, dtype=torch.float64)) + 0.1
B = torch.linspace(-1, 1, 7, dtype=torch.float64)


class Recorder:
    """A closure that remembers where it was evaluated, and what it found."""

    def __init__(self, function, x):
        self.function, self.x, self.points, self.values = function, x, [], []

    def __call__(self):
        self.x.grad = None
        value = self.function(self.x)
        value.backward()
        self.points.append(self.x.detach().clone())
        self.values.append(float(value.detach()))
        return value


def quadratic(x, shift=0.0):
    return 0.5 * x @ A @ x - (B + shift) @ x


def test_condition_number_of_a_million():
    x = torch.ones(7, requires_grad=True)
    optimizer = StochasticLBFGS([x])
    for _ in range(10):
        optimizer.step(Recorder(quadratic, x))
    assert_close(
        x.detach(), torch.linalg.solve(A, B), rtol=1e-5
    )  # the root of what rounding hides in the value


def test_directions_are_those_of_dense_matrices():
    """The first trial of each iteration against the textbook's recursion of the inverse, from its scaled identity."""
    x = torch.ones(7, requires_grad=True)
    optimizer = StochasticLBFGS([x], max_iter=1)
    pairs, last = [], None
    for _ in range(6):
        seen = Recorder(quadratic, x)
        optimizer.step(seen)
        start, gradient = seen.points[0], A @ seen.points[0] - B
        if last is not None:
            pairs.append((start - last, A @ (start - last)))
            s, y = pairs[-1]
            inverse = s @ y / (y @ y) * torch.eye(7)
            for s, y in pairs:
                left = torch.eye(7) - torch.outer(s, y) / (s @ y)
                inverse = left @ inverse @ left.T + torch.outer(s, s) / (s @ y)
            assert_close(seen.points[1] - start, -inverse @ gradient, rtol=1e-8)
        last = start


def test_memory_holds_no_difference_between_draws():
    """Every step shifts the gradient by noise; curvature that compares two draws would see the shift."""
    noise = torch.Generator().manual_seed(0)
    x = torch.ones(7, requires_grad=True)
    optimizer = StochasticLBFGS([x], max_iter=3, history_size=8)
    for _ in range(5):
        shift = torch.randn(7, generator=noise)
        optimizer.step(Recorder(lambda u, shift=shift: quadratic(u, shift), x))
    memory = optimizer.state[x]
    assert 0 < len(memory["steps"]) <= 8
    for step, change in zip(memory["steps"], memory["changes"], strict=True):
        assert_close(change, A @ step, rtol=1e-6)


def test_iterations_meet_the_weak_wolfe_conditions():
    x = torch.tensor([-1.2, 1.0, 0.5], requires_grad=True)

    def function(u):
        return (100 * (u[1:] - u[:-1] ** 2) ** 2 + (1 - u[:-1]) ** 2).sum()

    optimizer = StochasticLBFGS([x], max_iter=1)
    for _ in range(60):
        before = x.detach().clone()
        optimizer.step(Recorder(function, x))
        step, old, new = x.detach() - before, before.numpy(), x.detach().numpy()
        slope = float(torch.from_numpy(rosen_der(old)) @ step)
        if float(step.abs().max()) < 1e-9:
            break
        assert rosen(new) <= rosen(old) + 1e-4 * slope
        assert float(torch.from_numpy(rosen_der(new)) @ step) >= 0.9 * slope
    assert_close(x.detach(), torch.ones(3), atol=1e-6)


def test_points_without_a_value_are_too_far():
    x = torch.tensor([0.05], requires_grad=True)
    optimizer = StochasticLBFGS([x], lr=5.0, max_iter=50)
    optimizer.step(Recorder(lambda u: (u - u.log()).sum(), x))  # NaN for negative numbers
    assert_close(x.detach(), torch.ones(1), atol=1e-5)


def test_where_nothing_improves_it_stays():
    x = torch.tensor([2.0], requires_grad=True)
    seen = Recorder(lambda u: u.sum() + (math.inf if u.item() != 2.0 else 0.0), x)
    StochasticLBFGS([x]).step(seen)
    assert x.item() == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr"),
        ({"max_iter": 0}, "max_iter"),
        ({"history_size": 0}, "history_size"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        StochasticLBFGS([torch.zeros(1, requires_grad=True)], **settings)


def test_groups_and_missing_closures_are_refused():
    a, b = (torch.zeros(1, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match="2 groups"):
        StochasticLBFGS([{"params": [a]}, {"params": [b]}])
    with pytest.raises(ValueError, match="closure"):
        StochasticLBFGS([a]).step()


def test_parameters_are_those_before_the_step_after_an_error():
    x = torch.ones(7, requires_grad=True)
    seen = Recorder(quadratic, x)

    def closure():
        if len(seen.values) == 6:
            raise KeyboardInterrupt
        return seen()

    with pytest.raises(KeyboardInterrupt):
        StochasticLBFGS([x]).step(closure)
    assert torch.equal(x.detach(), torch.ones(7, dtype=torch.float64))


def test_a_search_that_ends_far_away_keeps_what_was_better():
    """A loss that has no minimum along its line: it falls by steps that no trial satisfies."""
    x = torch.tensor([0.0], requires_grad=True)
    seen = Recorder(lambda u: -u.sum() if u.item() < 3.0 else u.sum() + math.inf, x)
    StochasticLBFGS([x], max_iter=1).step(seen)
    assert -x.item() == min(seen.values)
    assert x.item() > 2.0


def test_gradients_that_are_not_finite_are_too_far():
    """A root that falls from 1.5 to 0, where its slope is infinite; the first trial hits it."""
    x = torch.tensor([1.5], requires_grad=True)
    seen = Recorder(
        lambda u: (
            u.abs().sqrt().sum() if u.item() == 0.5 or u.item() == 1.5 else u.clamp(min=0.0).sqrt().sum()
        ),
        x,
    )
    optimizer = StochasticLBFGS([x], lr=1.5 / (0.5 / 1.5**0.5), max_iter=1)
    optimizer.step(seen)
    assert seen.points[1].item() == pytest.approx(0.0, abs=1e-12)
    assert 0.0 < x.item() < 1.5
    x.data.zero_()
    with pytest.raises(FloatingPointError, match="gradient"):
        optimizer.step(Recorder(lambda u: u.sqrt().sum(), x))


def test_frozen_parameters_stay():
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = StochasticLBFGS([x, y])

    def closure():
        optimizer.zero_grad()
        loss = ((x * torch.tensor([1.0, 100.0]) - y) ** 2).sum() + (y - 3).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    x.requires_grad_(False)
    before = x.clone()
    optimizer.step(closure)
    assert torch.equal(x, before)


def test_low_precision_ends_at_the_optimum():
    """Where the memory predicts a decrease that rounding hides, it is dropped; the loss stays at most its rounding away."""
    data = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float32) + torch.tensor(
        [1.0, -2.0]
    )
    scale = torch.tensor([1.0, 0.01])
    x = torch.zeros(2, dtype=torch.float32, requires_grad=True)
    optimizer = StochasticLBFGS([x])
    for _ in range(40):
        optimizer.step(Recorder(lambda u: 0.5 * ((data - u) / scale).square().sum(), x))
    best = 0.5 * ((data.double() - data.double().mean(0)) / scale).square().sum()
    found = 0.5 * ((data.double() - x.detach().double()) / scale).square().sum()
    assert float(found - best) < 4 * torch.finfo(torch.float32).eps * float(best)


@pytest.mark.parametrize("other", [torch.float32, torch.complex128])
def test_several_types_are_refused(other):
    with pytest.raises(ValueError, match="one real type"):
        StochasticLBFGS(
            [
                torch.zeros(1, dtype=torch.float64, requires_grad=True),
                torch.zeros(1, dtype=other, requires_grad=True),
            ]
        )
