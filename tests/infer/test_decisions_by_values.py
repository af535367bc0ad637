# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Models in which Python decides by values: their draws and components run one by one, as a loop of plain Pyro does."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from torch.testing import assert_close

from pyro_bnn.infer import ComponentLoopWarning, Mixture_ELBO, posterior_predictive
from pyro_bnn.infer.autoguide import AutoMixture


def branch(f: torch.Tensor) -> torch.Tensor:
    return f if f.sum() > 0 else -2 * f


def loop(f: torch.Tensor) -> torch.Tensor:
    for _ in range(int(f.abs().max().clamp(max=3).item())):
        f = f / 2
    return f


def scaled(f: torch.Tensor) -> torch.Tensor:
    return f * float(f.square().mean())


def model_of(decide: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        f = decide((x * w).sum(-1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, 1.0), obs=y)

    return model


@pytest.mark.parametrize("decide", [branch, loop, scaled])
def test_predictions(decide: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x, w = torch.randn(20, 3) + 1, torch.randn(40, 3)
    w[:2] = w[:2].abs()  # the draws that are compared take the same branch
    model = model_of(decide)
    expected = torch.stack(
        [
            poutine.trace(poutine.condition(model, data={"w": value})).get_trace(x).nodes["obs"]["fn"].mean
            for value in w
        ]
    )
    found = posterior_predictive(model, {"w": w}, (x,))
    assert not found.vectorized
    assert_close(found.mean, expected)
    with pytest.raises(ValueError, match=r"line \d+ of test_decisions_by_values.py decides by a value"):
        posterior_predictive(model, {"w": w}, (x,), vectorize=True)


def test_components() -> None:
    x, y = torch.randn(20, 3) + 1, torch.randn(20)
    model = model_of(branch)
    guide = AutoMixture(model, 2, init_scale=1e-9).initialize(x, y)
    with torch.no_grad():
        for parameter in guide.parameters():
            if parameter.shape[-1:] == (3,) and parameter.dim() > 1:
                parameter.abs_()
    elbo = Mixture_ELBO()
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 1e-12}), elbo)
    with pytest.warns(ComponentLoopWarning, match="decides by a value that depends on the draws"):
        svi.step(x, y)


def test_gates_that_open_later() -> None:
    """Rows interact through a parameter that is zero at first: found when the comparison is made again."""
    gate = torch.nn.Parameter(torch.zeros(()))

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        f = (x * w).sum(-1)
        f = f + gate * f.reshape(-1, len(x)).mean(0)  # of all components
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, 1.0), obs=y)

    x, y = torch.randn(20, 3), torch.randn(20)
    guide = AutoMixture(model, 2).initialize(x, y)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 1e-12}), Mixture_ELBO())
    svi.step(x, y)
    gate.data.fill_(1.0)

    def train() -> None:
        for _ in range(16):
            svi.step(x, y)

    with pytest.warns(ComponentLoopWarning, match="site 'obs' depends on which components run together"):
        train()


def test_numbers_that_no_draw_decides() -> None:
    """Lengths and the like are read from the data: the draws run together."""

    def model(x: torch.Tensor, lengths: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        longest = int(lengths.max())
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((x * w).sum(-1) * longest, 1.0))

    x, w = torch.randn(8, 3), torch.randn(9, 3)
    found = posterior_predictive(model, {"w": w}, (x, torch.tensor([2, 3])))
    assert found.vectorized
    assert_close(found.mean, 3 * w @ x.T)
