# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""A layer that a checkpoint runs again in the backward pass would draw anew: it says so."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyro_bnn.nn import bayesian_, rank1_

# the run that sets the guide up needs no gradients
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


class Net(nn.Module):
    def __init__(self, inside: Any, reentrant: bool) -> None:
        super().__init__()
        self.first, self.inside, self.reentrant = nn.Linear(2, 3), inside, reentrant

    def forward(self, x: Tensor) -> Tensor:
        out: Any = checkpoint(self.inside, self.first(x), use_reentrant=self.reentrant)
        return out.sum(-1)


def step(net: nn.Module) -> None:
    x, y = torch.randn(6, 2), torch.randn(6)

    def model(x: Tensor, y: Tensor) -> None:
        f = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    SVI(model, AutoDelta(model), pyro.optim.SGD({"lr": 0.1}), Trace_ELBO()).step(x, y)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("convert", [bayesian_, rank1_, lambda net: bayesian_(net, packed=True)])
def test_a_checkpointed_layer_is_named(convert: Callable[[nn.Module], nn.Module], reentrant: bool) -> None:
    net = convert(Net(nn.Linear(3, 1), reentrant))
    with pytest.raises(RuntimeError, match=r"inside.*torch\.utils\.checkpoint"):
        step(net)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_without_priors_is_exact(reentrant: bool) -> None:
    step(bayesian_(Net(nn.Tanh(), reentrant)))
