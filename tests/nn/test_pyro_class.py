# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Networks become PyroModules as Pyro makes them, those of abstract classes and forwarding wrappers too."""

import copy
import pickle
from abc import ABC, abstractmethod
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn

from pyro_bnn.nn import bayesian_, rank1_
from pyro_bnn.nn.pyro_class import to_pyro_
from tests.infer.component_oracle import check_bound, classifier, standard_priors
from tests.nn.architectures import SharedModule, VisionTransformer


class Abstract(nn.Module, ABC):
    @abstractmethod
    def features(self, x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Concrete(Abstract):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x))


class Wrapper(nn.Module):
    """Forwards attributes to what it wraps, as PEFT's wrapper of trained heads does."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__["_modules"]
        return modules[name] if name in modules else getattr(modules["wrapped"], name)

    def forward(self, x: Tensor) -> Tensor:
        return self.wrapped(x)


@pytest.mark.parametrize("conversion", ["rank1", "bayesian"])
@pytest.mark.parametrize("make", [Concrete, lambda: Wrapper(Concrete())])
def test_bound_of_abstract_classes_and_wrappers(make: Any, conversion: str) -> None:
    x, y, prior = torch.randn(4, 5), torch.randint(0, 3, (4,)), dist.Normal(0.0, 1.0)
    check_bound(
        make(),
        rank1_ if conversion == "rank1" else lambda net: bayesian_(net, prior=prior),
        lambda net: classifier(net, lambda net, x: net(x)),
        lambda call: dist.Categorical(logits=call(x)).log_prob(y).sum(),
        (x, y),
        standard_priors if conversion == "rank1" else lambda name: prior,
    )


def test_copies_of_abstract_classes() -> None:
    net = bayesian_(Concrete())
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert isinstance(other, Concrete)
        assert isinstance(other, PyroModule)
        assert type(other) is type(net)
        assert other.head.weight.shape == (3, 6)


@pytest.mark.parametrize("make", [VisionTransformer, SharedModule])
def test_names_are_those_that_pyro_gives(make: Any) -> None:
    ours, theirs = make(), make()
    to_pyro_(ours)
    to_pyro_module_(theirs)
    pairs = list(zip(ours.named_modules(), theirs.named_modules(), strict=True))
    assert len(pairs) > 1
    for (path, module), (_, other) in pairs:
        assert type(module) is type(other), path
        assert module._pyro_name == other._pyro_name
        assert module._pyro_context is ours._pyro_context
