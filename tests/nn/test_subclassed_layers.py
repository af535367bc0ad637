# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Layers whose classes are not torch's own: subclasses, and linear layers with the inputs in front."""

import copy
import pickle
import warnings
from typing import Any

import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bnn.nn import bayesian_, rank1_
from tests.infer.component_oracle import check_bound, classifier, standard_priors


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.linear(x, self.weight, self.bias)


class SamePadding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, groups=self.groups)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Renamed(nn.Linear):
    """Nothing but a name."""


class Conv1D(nn.Module):
    """The linear layer of GPT-2."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Adapted(nn.Linear):
    """A low-rank adapter beside the weight."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m)
        self.down, self.up = nn.Parameter(torch.randn(2, n)), nn.Parameter(torch.randn(m, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.up @ self.down, self.bias)


NETWORKS = {
    "linear": (lambda: nn.Sequential(Doubled(5, 6), nn.Tanh(), nn.Linear(6, 3)), (5,)),
    "renamed": (lambda: nn.Sequential(Renamed(5, 6), nn.Tanh(), Renamed(6, 3)), (5,)),
    "inputs first": (lambda: nn.Sequential(Conv1D(6, 5), nn.Tanh(), Conv1D(3, 6)), (5,)),
    "padded": (
        lambda: nn.Sequential(SamePadding(2, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)),
        (2, 3, 3),
    ),
    "groups": (
        lambda: nn.Sequential(SamePadding(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)),
        (2, 3, 3),
    ),
    "standardised": (
        lambda: nn.Sequential(Standardised(2, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)),
        (2, 3, 3),
    ),
    "adapter": (lambda: nn.Sequential(Adapted(5, 6), nn.Tanh(), nn.Linear(6, 3)), (5,)),
}


@pytest.mark.parametrize("conversion", ["rank1", "bayesian"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_bound_of_their_own_forward(name: str, conversion: str) -> None:
    """All components in one run, each with the forward that the class has."""
    plain, shape = NETWORKS[name][0](), NETWORKS[name][1]
    x, y = torch.randn(4, *shape), torch.randint(0, 3, (4,))
    prior = dist.Normal(0.0, 1.0)
    convert: Any = rank1_ if conversion == "rank1" else lambda net: bayesian_(net, prior=prior)
    if name == "adapter" and conversion == "rank1":
        with pytest.warns(UserWarning, match=r"leaves out \[\"0 \(\w*Adapted\): \['down', 'up'\]"):
            rank1_(copy.deepcopy(plain))
        convert = lambda net: rank1_(net, skip=["0.down", "0.up"])  # noqa: E731
    check_bound(
        plain,
        convert,
        lambda net: classifier(net, lambda net, x: net(x)),
        lambda call: dist.Categorical(logits=call(x)).log_prob(y).sum(),
        (x, y),
        standard_priors if conversion == "rank1" else lambda name: prior,
    )


@pytest.mark.parametrize("convert", [rank1_, bayesian_])
def test_copies_and_files(convert: Any) -> None:
    net = convert(nn.Sequential(Doubled(5, 6), nn.Tanh(), Conv1D(3, 6)))
    x = torch.randn(4, 5)
    torch.manual_seed(0)
    expected = net(x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.manual_seed(0)
        assert torch.equal(other(x), expected)
        assert isinstance(other[0], Doubled)


def test_forms_that_no_weight_can_express_are_refused() -> None:
    with pytest.raises(
        ValueError, match="0 has a forward method of its own, which takes no additive factors"
    ):
        rank1_(nn.Sequential(Doubled(5, 6)), form="additive")


def test_skipped_attention_keeps_its_projection() -> None:
    """What a skipped module holds may be read by it: its parts of other classes stay too."""
    net = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rank1_(net, skip=nn.MultiheadAttention)
    assert type(net[0].out_proj).__name__ == "PyroNonDynamicallyQuantizableLinear"
