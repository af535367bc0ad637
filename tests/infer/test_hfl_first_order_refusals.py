# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Loops whose steps do not follow the gradient of a function, each by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_bnn.curvature.accumulate import NotAMinimumError
from pyro_bnn.infer import hfl
from tests.infer.first_order_script import N, at_mode, data, deep, linear, loss, net_at
from tests.infer.test_hfl_first_order import outputs, plain, rows, sgd


def go(net: nn.Module, optimizer: Any, loop: Callable[..., None] = plain, **options: Any) -> hfl.HFLResult:
    runs = hfl.FirstOrder(net, options.pop("functional", outputs), optimizer, **{"scale": N, **options})
    try:
        for run in runs:
            loop(net, optimizer, run.epochs(2))
    finally:
        runs.restore()
    return runs.result()


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.Dropout(0.5), "Dropout '1' was in training mode"),
        (nn.BatchNorm1d(1, dtype=torch.float64), "BatchNorm1d '1' was in training mode"),
    ],
)
def test_layers_in_training_mode(layer: nn.Module, text: str) -> None:
    net = nn.Sequential(at_mode(linear), layer)
    with pytest.raises(ValueError, match=text):
        go(net, sgd(net))


def test_random_losses() -> None:
    net = at_mode(linear)

    def noisy(net: nn.Module, optimizer: Any, epochs: int) -> None:
        for x, y in rows(epochs):
            optimizer.zero_grad()
            loss(net, nn.functional.dropout(x), y).backward()
            optimizer.step()

    with pytest.raises(ValueError, match="no function of the weights"):
        go(net, sgd(net), noisy)


def test_batches_of_unequal_size() -> None:
    net = at_mode(deep)
    with pytest.raises(ValueError, match="same size"):
        go(net, sgd(net), lambda *args: plain(*args, 7, shuffle=True))


@pytest.mark.parametrize("kind", ["norm", "value"])
def test_clipped_gradients(kind: str) -> None:
    def clipped(net: nn.Module, optimizer: Any, epochs: int) -> None:
        for x, y in rows(epochs):
            optimizer.zero_grad()
            loss(net, x, y).backward()
            if kind == "norm":
                nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
            else:
                nn.utils.clip_grad_value_(net.parameters(), 1e-3)
            optimizer.step()

    net = at_mode(deep)
    with pytest.raises(ValueError, match="clipped"):
        go(net, sgd(net), clipped)


def test_one_batch_again_and_again_is_not_clipped() -> None:
    net = at_mode(linear)

    def repeated(net: nn.Module, optimizer: Any, epochs: int) -> None:
        for _ in range(epochs):
            plain(net, optimizer, 5, N)

    go(net, sgd(net), repeated)


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        (lambda p: torch.optim.AdamW(p), "weight decay of AdamW is not the gradient of a prior"),
        (
            lambda p: torch.optim.Adam(p, weight_decay=0.1, decoupled_weight_decay=True),
            "weight decay of Adam",
        ),
        (lambda p: torch.optim.SGD(p, maximize=True), "SGD maximises"),
        (lambda p: torch.optim.ASGD(p), "ASGD shrinks weights"),
    ],
)
def test_optimizers_without_a_loss(optimizer: Callable[[Any], Any], text: str) -> None:
    net = at_mode(linear)
    with pytest.raises(ValueError, match=text):
        go(net, optimizer(net.parameters()))


def test_a_scaler_that_leaves_its_factor() -> None:
    net = at_mode(linear)
    optimizer = sgd(net)
    optimizer.grad_scale = torch.ones(())  # what GradScaler sets for fused optimisers
    with pytest.raises(ValueError, match="factor of GradScaler"):
        go(net, optimizer)


def test_an_optimizer_that_moves_weights_without_gradients() -> None:
    class Drift(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.mul_(0.99)
            return super().step(closure)

    net = at_mode(linear)
    with pytest.raises(ValueError, match="moved weights whose gradients are None"):
        go(net, Drift(net.parameters(), lr=0.01))


def test_an_optimizer_that_evaluates_twice() -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            return super().step(closure)

    def loop(net: nn.Module, optimizer: Any, epochs: int) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(net, *data())
            value.backward()
            return value

        optimizer.step(closure)

    net = at_mode(linear)
    with pytest.raises(ValueError, match="several times in a step"):
        go(net, Twice(net.parameters(), lr=0.01), loop)


def test_weights_that_no_optimizer_has() -> None:
    net = at_mode(deep)
    with pytest.raises(ValueError, match=r"parameter '0\.weight' requires a gradient and is in no optimiser"):
        go(net, sgd(net[2]))
    with pytest.raises(ValueError, match="took no step"):
        go(net, sgd(net), lambda *_: None)


def test_runs_that_see_other_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    net = at_mode(deep)
    with pytest.raises(ValueError, match="do not see the same batches"):
        go(net, sgd(net), lambda *args: plain(*args, shuffle=True, generator=generator))


def test_runs_of_other_lengths_or_rates() -> None:
    def longer(net: nn.Module, optimizer: Any, epochs: int) -> None:
        counts.append(1)
        plain(net, optimizer, epochs if epochs == 1 else epochs + len(counts))

    counts: list[int] = []
    net = at_mode(deep)
    with pytest.raises(ValueError, match="runs that are compared take the same"):
        go(net, sgd(net), longer)
    optimizer = sgd(net)
    rates = iter(range(1, 1000))

    def annealed(net: nn.Module, optimizer: Any, epochs: int) -> None:
        optimizer.param_groups[0]["lr"] = 1e-3 / next(rates)
        plain(net, optimizer, epochs)

    with pytest.raises(ValueError, match="learning rates differ"):
        go(net, optimizer, annealed)


def test_functionals() -> None:
    net = at_mode(deep)
    for functional, text in (
        (lambda net: net(torch.ones(1, 3)).detach(), "has no gradient"),
        (lambda net: net(torch.ones(1, 3)).argmax(), "tensor of real numbers"),
        (lambda net: net(torch.ones(1, 3)) + 3 * net[0](torch.ones(1, 3)).sum().detach(), "detached"),
        (lambda net: net(torch.ones(1, 3)).clamp(max=-1e9) + float("nan") * net[2].bias, "not finite"),
    ):
        with pytest.raises(ValueError, match=text):
            go(net, sgd(net), functional=functional)


def test_a_functional_of_weights_that_the_loss_does_not_have() -> None:
    net: Any = nn.ModuleDict({"used": at_mode(linear), "unused": nn.Linear(3, 1)})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def loop(net: Any, optimizer: Any, epochs: int) -> None:
        plain(net["used"], optimizer, epochs)

    with pytest.raises(ValueError, match=r"'unused\.weight' and the loss does not"):
        go(net, optimizer, loop, functional=lambda net: net["unused"](torch.ones(1, 3)))


def test_saddles() -> None:
    """Along a direction of negative curvature."""
    net = deep()
    torch.manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=2.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    theta = nn.utils.parameters_to_vector(net.parameters()).detach()
    H = torch.autograd.functional.hessian(lambda t: N * loss(net_at(net, t), *data()), theta)
    values, vectors = torch.linalg.eigh(H)
    assert values[0] < -1
    direction = vectors[:, 0]

    def along(net: nn.Module) -> Tensor:
        return (nn.utils.parameters_to_vector(net.parameters()) @ direction)[None]

    with pytest.raises(NotAMinimumError, match="not a minimum"):
        go(net, optimizer, functional=along, method="gradients")


def test_priors_that_exceed_the_loss() -> None:
    net = at_mode(linear)
    with pytest.raises(ValueError, match="scale or prior_precision is wrong"):
        go(net, sgd(net), curvature="ggn", prior_precision=1e4)
    with pytest.raises(ValueError, match="expected positive numbers"):
        go(net, sgd(net), curvature="ggn", prior_precision={"nothing": 1.0})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with pytest.warns(hfl.HFLWarning, match="away from the minimum"):  # without the prior it is another one
        result = go(net, optimizer, curvature="ggn")
    assert result.upper is None
    assert "pass prior_precision" in result.uncertified


def test_options() -> None:
    net = linear()
    for options, text in (
        ({"scale": 0.0}, "scale must be positive"),
        ({"scale": float("nan")}, "scale must be positive"),
        ({"epsilon": -1.0}, "epsilon must be positive"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"method": "cg"}, "method"),
        ({"curvature": "fisher"}, "curvature"),
        ({"sweeps": -1}, "sweeps"),
        ({"proximal": -1.0}, "proximal must not be negative"),
    ):
        with pytest.raises(ValueError, match=text):
            hfl.FirstOrder(net, outputs, **{"scale": N, **options})
    with pytest.raises(ValueError, match="is bfloat16"):
        hfl.FirstOrder(linear().bfloat16(), outputs, scale=N)
    with pytest.raises(ValueError, match="no parameter that requires"):
        hfl.FirstOrder(linear().requires_grad_(False), outputs, scale=N)


def test_sparse_gradients() -> None:
    net = nn.Sequential(nn.Embedding(4, 1, sparse=True))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def loop(net: nn.Module, optimizer: Any, epochs: int) -> None:
        optimizer.zero_grad()
        net(torch.tensor([0, 1])).square().sum().backward()
        optimizer.step()

    with pytest.raises(ValueError, match="sparse"):
        go(net, optimizer, loop, functional=lambda net: net[0].weight[:1].sum()[None])
