# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
The laws of minibatch chains of a linear-Gaussian model against the discrete Lyapunov equation, within Monte Carlo error.

Many chains run from the posterior mode through the sampler's own steps, streams and schedules; the gradient of a batch is written
by hand for all chains at once. Second moments of w = (u, r, 1) are compared with those of the recursions of linear_chains, each
entry within 4.5 of its standard errors.
"""

from functools import reduce
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_bnn.infer.sample.log_density import evaluator_of
from pyro_bnn.infer.sample.minibatch_run import ControlVariates, Plan, Run
from pyro_bnn.infer.sample.minibatches import Minibatches, Stream, Weighted
from pyro_bnn.infer.sample.records import Records
from pyro_bnn.infer.sample.steps import CyclicalSteps, PolynomialSteps, as_schedule
from pyro_bnn.infer.sample.whitening import Dense, Gaussians
from pyro_bnn.model.data import Batches
from tests.infer.models import NOISE, linear_data, linear_model
from tests.infer.sample.linear_chains import (
    Affine,
    Regression,
    as_map,
    stationary,
    transition,
    with_control,
)

FRICTION = 0.9
SCHEMES = ["sgld", "sghmc", "baoa"]


def problem(size: int = 6) -> Regression:
    torch.manual_seed(1)
    return Regression(*linear_data(size, 2), NOISE)


def by_hand(points: Tensor, given: Weighted) -> tuple[Tensor, Tensor]:
    """The gradient of the log density of linear_model by a batch, at all points."""
    x, y = given.batch[0]
    return points.new_zeros(len(points)), given.weight * (y - points @ x.T) @ x / NOISE**2 - points


def chains(
    on: Regression, data: Any, scheme: str, step_size: Any, count: int, draws: int, **options: Any
) -> tuple[Run, Minibatches]:
    """A run of so many chains from the mode, of so many steps, all of which are kept."""
    batches = Batches(data)
    batched = Minibatches(
        evaluator_of(linear_model, batches.first),
        batches,
        options.get("batch_size"),
        options.get("order", "forward"),
    )
    mode = on.posterior()[0]
    batched.prepare(mode)
    estimate: Any = by_hand
    if options.get("control"):
        center = mode + 0.3
        full = by_hand(center[None], Weighted(((on.x, on.y), {}), 1.0))
        estimate = ControlVariates(by_hand, center[None], *full)
    plan = Plan(scheme, as_schedule(step_size), FRICTION, draws, 0, 1)
    start = mode.expand(count, -1)
    root = options.get("root", torch.eye(2))
    run = Run(
        plan,
        estimate,
        batched.packed.space,
        Gaussians([Dense(root)]),
        start,
        Stream(batched.one_pass, [], keeps=False),
        Records(draws, start, None),
    )
    return run, batched


def state(run: Run) -> Tensor:
    """w = (u, r, 1) of all chains, or (u, 1)."""
    parts = [run.chains.position, run.chains.momentum][: 1 if run.plan.scheme == "sgld" else 2]
    return torch.cat([*parts, torch.ones(len(parts[0]), 1)], 1)


def assert_moments(rows: Tensor, expected: Tensor) -> None:
    """The mean of rows w w^T, of vectors w or as they are, within their errors."""
    products = rows.unsqueeze(-1) * rows.unsqueeze(-2) if rows.dim() == 2 else rows
    error = products.std(0) / len(products) ** 0.5
    z = (products.mean(0) - expected).abs() / error.clamp(min=1e-12)
    assert float(z.max()) < 4.5, f"z = {z}"


def steps_of(on: list[Affine], scheme: str, h: float, root: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [transition(scheme, g, h, FRICTION, root) for g in on]


ROOT = torch.tensor([[0.25, 0.0], [0.1, 0.3]], dtype=torch.float64)


@pytest.mark.every(2)
@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("order", ["forward", "symmetric"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_passes_through_a_fixed_partition(scheme: str, order: str, control: bool) -> None:
    """Batches of 3, 2 and 1 rows, each three times its sum; the law after whole passes and within one."""
    on = problem()
    parts = [range(3), range(3, 5), range(5, 6)]
    data = [(on.x[list(part)], on.y[list(part)]) for part in parts]
    batches = [on.gradient(part, 3.0) for part in parts]
    if control:
        center = on.posterior()[0] + 0.3
        batches = [with_control(g, center, on.full()) for g in batches]
    passed = batches if order == "forward" else [*batches, *batches[::-1]]
    steps = steps_of(passed, scheme, 0.5, ROOT)
    S = stationary(as_map(steps))
    run, _ = chains(on, data, scheme, 0.5, 5000, 130, order=order, control=control, root=ROOT)
    stream = iter(run.stream)
    for _ in range(20 * len(passed)):
        run.take(next(stream))
    assert_moments(state(run), S)
    for T, Q in steps[:2]:
        run.take(next(stream))
        S = T @ S @ T.T + Q
    assert_moments(state(run), S)


@pytest.mark.every(3)
@pytest.mark.parametrize("order", ["independent", "forward", "symmetric"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_random_batches(scheme: str, order: str) -> None:
    """Rows drawn anew for every step or pass; all chains share them, so that errors are those of means over blocks of time."""
    on = problem()
    each = {
        "independent": lambda: [[g] for g in on.subsets(2)],
        "forward": lambda: on.passes(2),
        "symmetric": lambda: [[*cut, *cut[::-1]] for cut in on.passes(2)],
    }[order]()
    length = len(each[0])
    maps = [[as_map([step]) for step in steps_of(cut, scheme, 0.6, ROOT)] for cut in each]
    S = stationary(torch.stack([reduce(lambda a, b: b @ a, cut) for cut in maps]).mean(0)).flatten()
    phases = []
    for k in range(length):  # after 1, 2, ... steps of a pass
        phases.append(torch.stack([reduce(lambda a, b: b @ a, cut[: k + 1]) for cut in maps]).mean(0) @ S)
    expected = torch.stack(phases).mean(0)
    run, _ = chains(on, (on.x, on.y), scheme, 0.6, 200, 1300, batch_size=2, order=order, root=ROOT)
    stream, blocks = iter(run.stream), []
    for _ in range(60):
        run.take(next(stream))
    for _ in range(20):
        products = []
        for _ in range(60):
            run.take(next(stream))
            w = state(run)
            products.append(w.T @ w / len(w))
        blocks.append(torch.stack(products).mean(0))
    n = blocks[0].shape[0]
    assert_moments(torch.stack(blocks), expected.reshape(n, n))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("schedule", ["polynomial", "cyclical", "function"])
def test_schedules(scheme: str, schedule: str) -> None:
    """Steps of changing sizes, from the start on; in cycles the law in both phases, exploration without noise."""
    on = problem()
    steps = {
        "polynomial": PolynomialSteps(0.9, scale=5, power=1.0),
        "cyclical": CyclicalSteps(0.9, cycle_length=8, exploration=0.4),
        "function": as_schedule(lambda t: 0.9 if t % 2 else 0.3),
    }[schedule]
    run, _ = chains(on, (on.x, on.y), scheme, steps, 5000, 22, root=ROOT)
    stream = iter(run.stream)
    start = torch.cat([on.posterior()[0], torch.zeros(2), torch.ones(1)])
    S = torch.outer(start, start)
    S[2:4, 2:4] += torch.eye(2)
    if scheme == "sgld":
        S = S[[0, 1, 4]][:, [0, 1, 4]]
    for t in range(22):
        size = {
            "polynomial": 0.9 * (1 + t / 5) ** -0.5,
            "cyclical": 0.9 * torch.cos(torch.tensor(torch.pi * (t % 8) / 16)).item(),
            "function": 0.9 if t % 2 else 0.3,
        }[schedule]
        temperature = float(schedule != "cyclical" or t % 8 >= 4)
        T, Q = transition(scheme, on.full(), size, FRICTION, ROOT, temperature)
        S = T @ S @ T.T + Q
        run.take(next(stream))
        if t in (3, 10, 15, 21):
            assert_moments(state(run), S)
    kept = run.records.stats["cycle"][: run.records.count, 0].tolist()
    if schedule == "cyclical":  # steps 4 to 7, 12 to 15 and 20, 21
        assert kept == [0] * 4 + [1] * 4 + [2] * 2
    else:
        assert len(kept) == 22
