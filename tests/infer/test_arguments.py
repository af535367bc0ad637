# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Data are one object, or the arguments of the model, wherever a guide takes them."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_bnn.infer.autoguide import AutoLaplace, AutoLaplaceMixture
from tests.common import assert_close
from tests.infer.models import linear_data, linear_model, linear_posterior

FORMS: dict[str, Any] = {
    "tuple": lambda x, y: (((x, y),), {}),
    "list": lambda x, y: (([x, y],), {}),
    "mapping": lambda x, y: (({"x": x, "y": y},), {}),
    "batches": lambda x, y: (([(x[:9], y[:9]), (x[9:], y[9:])],), {}),
    "loader": lambda x, y: ((DataLoader(TensorDataset(x, y), batch_size=16),), {}),
    "arguments": lambda x, y: ((x, y), {}),
    "keywords": lambda x, y: ((), {"x": x, "y": y}),
    "mixed": lambda x, y: ((x,), {"y": y}),
    "named data": lambda x, y: ((), {"data": (x, y)}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mixture", [False, True])
def test_every_form_gives_the_same(form: str, mixture: bool) -> None:
    x, y = linear_data()
    args, kwargs = FORMS[form](x, y)
    guide: Any = AutoLaplaceMixture(linear_model, 2) if mixture else AutoLaplace(linear_model)
    guide.initialize(*((x, y) if form == "named data" else args), **({} if form == "named data" else kwargs))
    guide.polish(*args, **kwargs).laplace_approximation(*args, **kwargs)
    mean, covariance = linear_posterior(x, y)
    part = guide.components[1] if mixture else guide
    assert_close(part.loc.detach(), mean, rtol=1e-7)
    assert_close(part.posterior.covariance_matrix, covariance, rtol=1e-7)


def test_models_without_arguments_and_with_keyword_only_ones() -> None:
    x, y = linear_data()

    def closed() -> None:
        linear_model(x, y)

    def keyword(*, x: Tensor, y: Tensor) -> None:
        linear_model(x, y)

    expected = linear_posterior(x, y)[1]
    guide = AutoLaplace(closed).initialize().polish().laplace_approximation()
    assert_close(guide.posterior.covariance_matrix, expected, rtol=1e-7)
    guide = AutoLaplace(keyword).initialize(x=x, y=y).polish(x=x, y=y).laplace_approximation(x=x, y=y)
    assert_close(guide.posterior.covariance_matrix, expected, rtol=1e-7)


def test_a_container_that_the_model_takes_is_its_argument() -> None:
    def model(pair: tuple[Tensor, Tensor]) -> None:
        linear_model(*pair)

    x, y = linear_data()
    guide = AutoLaplace(model).initialize((x, y)).polish(((x, y),)).laplace_approximation(((x, y),))
    assert_close(guide.posterior.covariance_matrix, linear_posterior(x, y)[1], rtol=1e-7)


@pytest.mark.parametrize("method", ["polish", "laplace_approximation"])
def test_unknown_and_ambiguous_arguments_are_named(method: str) -> None:
    x, y = linear_data()
    guide = AutoLaplace(linear_model).initialize(x, y)
    with pytest.raises(TypeError, match=rf"{method}: \['tolernce'\] are no options of {method}"):
        getattr(guide, method)(x, y, tolernce=1.0)
    with pytest.raises(TypeError, match=rf"{method}: a tuple and the keywords \['z'\]"):
        getattr(guide, method)((x, y), z=1.0)


def test_models_with_other_names() -> None:
    def model(data: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data)):
            pyro.sample("obs", dist.Normal(level, 1.0), obs=data)

    y = torch.randn(5)
    for kwargs in ({"data": y}, {}):
        args = () if kwargs else (y,)
        guide = (
            AutoLaplace(model).initialize(y).polish(*args, **kwargs).laplace_approximation(*args, **kwargs)
        )
        assert_close(guide.posterior.variance, torch.tensor([1 / 6]), rtol=1e-9)
