# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Laplace variances from loops of one's own, against closed forms and dense Hessians of plain torch."""

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_bnn.curvature.accumulate import NotAMinimumError
from pyro_bnn.infer import hfl
from tests.common import assert_close
from tests.infer.first_order_script import (
    NOISE,
    PRECISION,
    TARGETS,
    N,
    at_mode,
    data,
    deep,
    joint,
    linear,
    loss,
    reference,
)

dense = cache(reference)
DECAY = PRECISION / N


def rows(epochs: int, size: int = 6, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(epochs):
        yield from DataLoader(TensorDataset(*data()), batch_size=size, **options)


def sgd(net: nn.Module, lr: float = 0.02) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=DECAY)


def plain(
    net: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, size: int = 6, **options: Any
) -> None:
    for x, y in rows(epochs, size, **options):
        optimizer.zero_grad()
        loss(net, x, y).backward()
        optimizer.step()


def prior(net: nn.Module) -> Tensor:
    """The negative log prior, for a loss that has it."""
    return 0.5 * DECAY * torch.stack([p.square().sum() for p in net.parameters()]).sum()


def outputs(net: Callable[[Tensor], Tensor]) -> Tensor:
    return net(TARGETS)


def test_a_linear_network_in_closed_form() -> None:
    """With a bias: the covariance is that of Bayesian linear regression, and bounds contain it and meet."""
    x, _ = data()
    X = torch.cat([x, torch.ones(N, 1)], -1)
    A = torch.cat([TARGETS, torch.ones(3, 1)], -1)
    exact = A @ torch.linalg.inv(X.mT @ X / NOISE**2 + PRECISION * torch.eye(4)) @ A.mT
    net = at_mode(linear)
    optimizer = sgd(net)
    runs = hfl.FirstOrder(net, outputs, optimizer, scale=N, curvature="ggn", method="gradients")
    for run in runs:
        plain(net, optimizer, run.epochs(5), shuffle=True)
    result = runs.result()
    assert_close(result.covariance, exact, rtol=1e-8)
    assert_close(result.variance, exact.diagonal()[:, None], rtol=1e-8)
    assert result.shape == (3, 1)
    assert (result.lower[:, 0] <= exact.diagonal()).all()
    assert (exact.diagonal() <= result.upper[:, 0]).all()
    assert result.certificate.width < 1e-5
    weights = torch.tensor([1.0, -2.0, 0.5])
    low, high = result.combination_bounds(weights)
    assert low <= weights @ exact @ weights <= high
    assert_close(
        result.factor @ result.factor.mT @ A.mT,
        torch.linalg.solve(X.mT @ X / NOISE**2 + PRECISION * torch.eye(4), A.mT),
        rtol=1e-6,
        atol=1e-10,
    )
    assert result.newton_decrement < 1e-6
    assert "3 of 4 latents" in str(result)


@pytest.mark.every(2)
@pytest.mark.parametrize("method", ["central", "paired", "gradients"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_network_against_its_dense_hessian(method: Any, kind: Any) -> None:
    net = at_mode(deep)
    optimizer = kind(net.parameters(), lr=1e-3, weight_decay=DECAY)
    before = [p.detach().clone() for p in net.parameters()]
    runs = hfl.FirstOrder(net, outputs, optimizer, scale=N, method=method, sweeps=12, tolerance=1e-6)
    kinds = []
    for run in runs:
        kinds.append(run.is_training)
        plain(net, optimizer, run.epochs(3), shuffle=True)
    assert sum(kinds) == {"central": 6, "paired": 4, "gradients": 0}[method]
    result = runs.result()
    assert_close(result.covariance, dense(deep), rtol=1e-4)  # ε is 1e-3
    assert result.upper is None
    assert "no bound" in result.uncertified
    assert result.num_latents == 26
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def few_directions(runs: hfl.FirstOrder) -> Iterator[hfl.TrainingRun]:
    """Its runs; at the end it warns that the last directions have changed much, as the first ones do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "variances may be too small", hfl.HFLWarning)
        yield from runs
    assert "variances may be too small" in runs.result().warnings[-1]


def test_runs_minimise_the_loss_with_the_pull() -> None:
    """Alone, without sweeps: what the first directions miss is found by gradient descent, to the square of its error."""
    found = {}
    for method in ("gradients", "central"):
        net = at_mode(deep)
        optimizer = sgd(net, lr=0.1)
        runs = hfl.FirstOrder(net, lambda net: net(TARGETS[:1]), optimizer, scale=N, method=method, sweeps=0)
        for run in few_directions(runs):
            plain(net, optimizer, run.epochs(300), N)
        found[method] = runs.result()
    exact = dense(deep)[0, 0]
    assert found["gradients"].variances[0] < 0.8 * exact
    assert_close(found["central"].variances[0], exact, rtol=1e-3)


def closure_loop(net: nn.Module, optimizer: torch.optim.Optimizer, epochs: int) -> None:
    """As Lightning's automatic optimisation: gradients are made within the step."""
    for x, y in rows(epochs, shuffle=True):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            value = loss(net, x, y)
            optimizer.zero_grad()
            value.backward()
            return value.detach()

        optimizer.step(closure=closure)


def accumulated(net: nn.Module, optimizer: torch.optim.Optimizer, epochs: int) -> None:
    for i, (x, y) in enumerate(rows(epochs, 3, shuffle=True)):
        (loss(net, x, y) / 2).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)


def scaled(net: nn.Module, optimizer: torch.optim.Optimizer, epochs: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in rows(epochs, shuffle=True):
        optimizer.zero_grad()
        scaler.scale(loss(net, x, y)).backward()
        scaler.step(optimizer)
        scaler.update()


def scheduled(net: nn.Module, optimizer: torch.optim.Optimizer, epochs: int) -> None:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(epochs):
        plain(net, optimizer, 1, shuffle=True)
        scheduler.step()


@pytest.mark.parametrize("loop", [closure_loop, accumulated, scaled, scheduled])
def test_loops(loop: Callable[..., None]) -> None:
    net = at_mode(linear)
    optimizer = sgd(net)
    runs = hfl.FirstOrder(net, outputs, optimizer, scale=N, method="paired", curvature="ggn")
    for run in runs:
        loop(net, optimizer, run.epochs(3))
    assert_close(runs.result().covariance, dense(linear), rtol=1e-7)


def test_gradients_of_a_closure_are_pulled() -> None:
    """One functional, no sweeps: the displacement comes from the runs, in which the gradients are made within the step."""
    net = at_mode(linear)
    optimizer = sgd(net, lr=0.05)
    runs = hfl.FirstOrder(net, lambda net: net(TARGETS[:1]), optimizer, scale=N, sweeps=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(net, *data())
        value.backward()
        return value

    for run in few_directions(runs):
        for _ in range(run.epochs(200)):
            optimizer.step(closure)
    assert_close(runs.result().variances[0], dense(linear)[0, 0], rtol=1e-4)


def test_line_searches_see_the_value_of_the_perturbed_loss() -> None:
    net = at_mode(deep)
    optimizer = torch.optim.LBFGS(
        net.parameters(), max_iter=60, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(net, *data()) + prior(net)
        value.backward()
        return value

    runs = hfl.FirstOrder(net, lambda net: net(TARGETS[:1]), optimizer, scale=N, sweeps=0, epsilon=1e-2)
    for run in few_directions(runs):
        for _ in range(run.epochs(3)):
            optimizer.step(closure)
    assert_close(runs.result().variances[0], dense(deep)[0, 0], rtol=1e-2)


def test_several_optimizers_made_within_the_run() -> None:
    """As Lightning's configure_optimizers; and a network whose first layer is fixed."""
    net = at_mode(deep)
    runs = hfl.FirstOrder(net, outputs, scale=N, sweeps=12, tolerance=1e-6)
    for run in runs:
        both = [runs.attach(sgd(part, lr=1e-3)) for part in (net[0], net[2])]
        for x, y in rows(run.epochs(2), shuffle=True):
            for optimizer in both:
                optimizer.zero_grad()
            loss(net, x, y).backward()
            for optimizer in both:
                optimizer.step()
    assert_close(runs.result().covariance, dense(deep), rtol=1e-4)
    net[0].requires_grad_(False)
    optimizer = sgd(net[2])
    last = hfl.FirstOrder(net, outputs, optimizer, scale=N, curvature="ggn", prior_precision=PRECISION)
    for run in last:
        plain(net, optimizer, run.epochs(2))
    with torch.no_grad():
        X = torch.cat([torch.tanh(net[0](data()[0])), torch.ones(N, 1)], -1)
        A = torch.cat([torch.tanh(net[0](TARGETS)), torch.ones(3, 1)], -1)
    exact = A @ torch.linalg.inv(X.mT @ X / NOISE**2 + PRECISION * torch.eye(6)) @ A.mT
    assert_close(last.result().covariance, exact, rtol=1e-6)


def test_float32() -> None:
    net = at_mode(deep).float()
    optimizer = sgd(net, lr=1e-3)
    runs = hfl.FirstOrder(net, lambda net: net(TARGETS.float()), optimizer, scale=N, sweeps=8, tolerance=1e-3)
    for run in runs:
        for x, y in rows(run.epochs(2), shuffle=True):
            optimizer.zero_grad()
            loss(net, x.float(), y.float()).backward()
            optimizer.step()
    assert_close(runs.result().variances.double(), dense(deep).diagonal(), rtol=0.01)


def test_low_precision_is_noticed() -> None:
    """Weights that are rounded to bfloat16 in the forward pass, as under autocast."""
    net = at_mode(deep).float()
    optimizer = sgd(net)
    runs = hfl.FirstOrder(
        net, lambda net: net(TARGETS.float()), optimizer, scale=N, method="gradients", sweeps=0
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            for run in runs:
                for x, y in rows(run.epochs(1)):
                    optimizer.zero_grad()
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        value = loss(net, x.float(), y.float())
                    value.backward()
                    optimizer.step()
        except NotAMinimumError:  # noise may also have a negative sign
            return
    assert any("too small for the precision" in str(warning.message) for warning in said)


def test_everything_is_as_it_was() -> None:
    net = nn.Sequential(at_mode(linear), nn.BatchNorm1d(1).eval())
    net[1].requires_grad_(False)
    optimizer = torch.optim.Adam(net[0].parameters(), lr=1e-3)
    plain(net, optimizer, 1)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    moments = [v["exp_avg"].clone() for v in optimizer.state.values()]
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    runs = hfl.FirstOrder(net, outputs, optimizer, scale=N, sweeps=0, proximal=1.0)
    with pytest.raises(RuntimeError, match="no result yet"):
        runs.result()
    for number, run in enumerate(runs):
        assert run.number == number + 1
        plain(net, optimizer, run.epochs(1), shuffle=True)
        net[1].running_mean += 1.0
        if run.is_training:
            break
    runs.restore()
    assert torch.equal(torch.randn(3), expected)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(torch.equal(v["exp_avg"], m) for v, m in zip(optimizer.state.values(), moments, strict=True))
    before = net[0].weight.detach().clone()
    plain(net, optimizer, 1)  # the hooks do nothing outside of a run
    assert not torch.equal(net[0].weight, before)
    assert runs.attach(optimizer) is optimizer  # is attached already, once
    assert len(runs._handles) == 2
    runs.detach()


def test_a_proximal_term_is_part_of_the_curvature() -> None:
    net = at_mode(deep)
    optimizer = sgd(net, lr=0.1)
    runs = hfl.FirstOrder(net, lambda net: net(TARGETS[:1]), optimizer, scale=N, sweeps=0, proximal=3.0)
    for run in few_directions(runs):
        plain(net, optimizer, run.epochs(200), N)
    theta = nn.utils.parameters_to_vector(net.parameters()).detach()
    P = torch.autograd.functional.hessian(joint(deep), theta) + 3.0 * torch.eye(26)
    g = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(net(TARGETS[:1]).sum(), list(net.parameters()))]
    )
    assert_close(runs.result().variances[0], g @ torch.linalg.solve(P, g), rtol=1e-4)
