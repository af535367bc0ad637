# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Recordings against the computations themselves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_bnn.ops.replay import Bound, StaleError, UnrecordableError
from pyro_bnn.ops.tape import record
from tests.common import assert_close


def gradient_of(fn: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def compute(u: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        u = u.detach().requires_grad_()
        with torch.enable_grad():
            value = fn(u, *data)
        return value.detach(), torch.autograd.grad(value, u)[0]

    return compute


def check(fn: Callable[..., Tensor], u: Tensor, *data: Tensor, **options: Any) -> Bound:
    """A replay gives what the computation gives, at other variables and other data."""
    compute = gradient_of(fn)
    replay = record(compute, (u,), data, **options)
    for scale in (1.0, -0.7):
        others = data if options else tuple(x * (1 + scale) for x in data)
        bound = Bound(replay, others)
        for shift in (0.3, -0.2):
            for found, expected in zip(bound(u + shift), compute(u + shift, *others), strict=True):
                assert_close(found, expected, rtol=1e-12, atol=0)
    return bound


def in_place(u: Tensor, x: Tensor) -> Tensor:
    total = torch.tensor(0.0)
    total += (u * x).sum()
    table = torch.zeros(3)
    table[1:] = u[1:].exp()
    h = torch.outer(u, x)
    h *= h.sigmoid()
    h[0] = 0.0
    return total + (table * x).sum() + h.tanh().sum()


def masks_in_place(u: Tensor, x: Tensor) -> Tensor:
    mask = torch.ones(3)
    mask[0] = 0.0
    scaled = x.clone()
    scaled.mul_(mask)
    return (scaled * u).sin().sum()


def derivative_inside(u: Tensor, x: Tensor) -> Tensor:
    t = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad((u * t.sin()).sum(), t, create_graph=True)
    return (slope**2).sum() + u.sum()


@pytest.mark.parametrize("fn", [in_place, masks_in_place, derivative_inside])
def test_replays_give_what_computations_give(fn: Callable[..., Tensor]) -> None:
    check(fn, torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 0.3, -0.4]))
    check(fn, torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 0.3, -0.4]), data_stay=True)


def test_layers_with_two_axes_of_variables() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.LayerNorm(5), nn.Linear(5, 2))
    rows = torch.randn(2, 4, 3)
    check(lambda u, x: net(u + x).logsumexp(-1).sum(), rows, torch.randn(4, 3))


def test_what_depends_on_no_variable_is_computed_once() -> None:
    x, seen = torch.rand(3), []

    def compute(u: Tensor, x: Tensor) -> tuple[Tensor]:
        seen.append(1)
        return (u * (x.exp().log1p().sqrt().sum() + torch.ones(3).cumsum(0).sum()),)

    replay = record(compute, (torch.ones(()),), (x,))
    assert replay.operations == 1
    assert_close(Bound(replay, (x,))(torch.tensor(2.0))[0], compute(torch.tensor(2.0), x)[0])
    assert len(seen) == 2


def test_tensors_from_outside_are_read_at_every_call() -> None:
    weight, bias, x = torch.rand(3), torch.tensor(0.5).expand(3), torch.rand(3)
    compute = gradient_of(lambda u, x: (u * weight.exp() + (bias + x).square()).sum())
    u = torch.rand(3)
    bound = Bound(record(compute, (u,), (x,)), (x,))
    weight.data.mul_(2)  # without a trace in the version of the tensor
    bias[:1].fill_(3.0)
    for found, expected in zip(bound(u), compute(u, x), strict=True):
        assert_close(found, expected, rtol=1e-12, atol=0)


def test_results_belong_to_the_caller() -> None:
    x, u = torch.ones(2), torch.tensor([1.0, 2.0])
    bound = Bound(record(lambda u, x: (u.view(2), x * 2, u[:1]), (u,), (x,)), (x,))
    for part in bound(u):
        part.zero_()
    assert u.tolist() == [1, 2]
    assert bound(u)[1].tolist() == [2, 2]


def test_decisions_by_values_are_refused() -> None:
    u, x = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 2.0])
    flag = torch.tensor(True)
    with pytest.raises(UnrecordableError, match="depends on the variables"):
        record(lambda u, x: (u * 2 if u.sum() > 3 else u,), (u,), (x,))
    with pytest.raises(UnrecordableError, match="depends on the variables"):
        record(lambda u, x: (u[u > 0].sum(),), (u,), (x,))
    with pytest.raises(UnrecordableError, match="depends on the data"):
        record(lambda u, x: (u * int(x.max()),), (u,), (x,))
    stays = record(lambda u, x: (u * int(x.max()),), (u,), (x,), data_stay=True)
    assert Bound(stays, (x,))(u)[0].tolist() == [2, -2]
    outside = Bound(record(lambda u, x: (u if flag else -u,), (u,), (x,)), (x,))
    assert outside(u)[0].tolist() == [1, -1]
    flag.fill_(False)
    with pytest.raises(StaleError):
        outside(u)


def test_random_numbers_and_foreign_tensors_are_refused() -> None:
    u, counter = torch.ones(2), torch.zeros(())
    with pytest.raises(UnrecordableError, match="random"):
        record(lambda u: (u + torch.rand(2),), (u,))
    unused = Bound(record(lambda u: (torch.rand(2), u * 2)[1:], (u,)), ())
    assert unused(u)[0].tolist() == [2, 2]

    def counts(u: Tensor) -> tuple[Tensor]:
        counter.add_(1)
        return (u * 2,)

    with pytest.raises(UnrecordableError, match="not its own"):
        record(counts, (u,))

    def reaches(u: Tensor) -> tuple[Tensor]:
        return (u * torch.from_numpy((u * 2).numpy()),)

    with pytest.raises(UnrecordableError, match="does not show"):
        record(reaches, (u,))
