# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Errors of newcomers' programs lead to the fix."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_bnn.diagnostics import diversity, to_datatree
from pyro_bnn.infer import NotAMinimumError, hfl, log_density, posterior_draws, posterior_predictive
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoMixture
from pyro_bnn.nn import bayesian_
from tests.infer.models import linear_data, linear_model


def network_model() -> Callable[..., None]:
    net = bayesian_(torch.nn.Linear(3, 1))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        f = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    return model


NUMPY: dict[str, Any] = {
    "posterior_predictive": lambda model, guide, x, y: posterior_predictive(model, guide, (x, y)),
    "polish": lambda model, guide, x, y: guide.polish(x, y),
    "laplace": lambda model, guide, x, y: guide.laplace_approximation((x, y)),
    "linearized": lambda model, guide, x, y: guide.linearized_outputs(x),
    "predictive": lambda model, guide, x, y: guide.predictive((x,)),
    "datatree": lambda model, guide, x, y: to_datatree(model, guide, (x, y)),
    "diversity": lambda model, guide, x, y: diversity(
        model, AutoMixture(model, 2).initialize(*linear_data()), (x, y)
    ),
    "targets": lambda model, guide, x, y: hfl.variance(guide, linear_data(), (x,)),
    "one array": lambda model, guide, x, y: guide.predictive(x),
}


@pytest.mark.parametrize("case", NUMPY)
def test_numpy_arrays_are_named_at_every_door(case: str) -> None:
    x, y = linear_data()
    model = network_model()
    guide = AutoLaplace(model).initialize(x, y)
    if case not in ("polish", "laplace", "targets"):
        guide.polish(x, y).laplace_approximation(x, y)
    with pytest.raises(
        TypeError, match=r"argument 0 of the model is a numpy array of shape \(40, 3\).*torch.as_tensor"
    ):
        NUMPY[case](model, guide, x.numpy(), y.numpy())


def test_models_may_take_arrays() -> None:
    def model(x: Any, y: Any = None) -> None:
        linear_model(torch.as_tensor(x), None if y is None else torch.as_tensor(y))

    x, y = linear_data()
    guide = AutoLaplace(model).initialize(x.numpy(), y.numpy()).polish(x.numpy(), y.numpy())
    guide.laplace_approximation((x.numpy(), y.numpy()))
    assert guide.predictive(x.numpy())["obs"].mean.shape == y.shape


def test_a_mixture_checks_its_first_batch() -> None:
    x, y = linear_data()
    with pytest.raises(
        ValueError, match=r"'obs': the observation has shape \(30,\), its distribution has shape \(40,\)"
    ):
        AutoMixture(linear_model).initialize(x, y[:30])
    with pytest.raises(ValueError, match="argument 0 of the model is empty"):
        AutoMixture(linear_model).initialize(x[:0], y[:0])
    with pytest.raises(ValueError, match="argument 'y' of the model holds 1 non-finite"):
        AutoMixture(linear_model).initialize(x=x, y=torch.cat([y[1:], torch.tensor([torch.nan])]))

    def plain(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x.sum(-1), 1.0), obs=y)

    with pytest.raises(ValueError, match=r"AutoMixture: the model samples no latent site.*bayesian_\(net\)"):
        AutoMixture(plain).initialize(x, y)


def test_draws_of_nothing() -> None:
    with pytest.raises(ValueError, match="mapping without sites: pass draws by the names"):
        posterior_draws({}, 3)


def hierarchy(y: Any) -> None:
    y = torch.as_tensor(y)
    spread = pyro.sample("spread", dist.HalfCauchy(5.0))
    with pyro.plate("groups", len(y)):
        effect = pyro.sample("effect", dist.Normal(0.0, spread))
        pyro.sample("obs", dist.Normal(effect, 10.0), obs=y)


def test_a_scale_that_training_drives_to_zero_is_named() -> None:
    y = torch.tensor([28.0, 8.0, -3.0, 7.0])
    for make in (AutoLaplace, AutoHessianFreeLaplace):
        guide = make(hierarchy).initialize(y)  # type: ignore[operator]
        guide.loc.data.copy_(torch.tensor([-4.0, 0.1, 0.05, 0.0, 0.02]))  # on the way to zero
        options = {"targets": y} if make is AutoHessianFreeLaplace else {"map_tolerance": float("inf")}
        with pytest.raises(
            NotAMinimumError, match=r"'spread' is the scale of other sites.*no maximum.*non-centred"
        ) as e:
            guide.laplace_approximation(y, **options)
        with pytest.raises(NotAMinimumError):  # arrays, which this model takes, are not to blame
            guide.laplace_approximation(y.numpy(), **options)
        if make is AutoLaplace:
            assert "or use curvature='ggn'" not in str(e.value)  # which it is


def test_a_container_that_fits_in_no_way_says_both() -> None:
    x, y = linear_data()
    for guide in (AutoLaplace(linear_model), AutoMixture(linear_model)):
        with pytest.raises(AttributeError, match="dict") as caught:
            guide.initialize({"X": x, "y": y})
        assert any("unexpected keyword argument 'X'" in note for note in caught.value.__notes__)


@pytest.mark.filterwarnings("ignore:Singular sample")  # of torch
@pytest.mark.parametrize("door", ["guide", "log_density"])
def test_supports_without_a_bijection_are_named(door: str) -> None:
    def model(y: Tensor | None = None) -> None:
        precision = pyro.sample("precision", dist.Wishart(torch.tensor(5.0), torch.eye(2)))
        with pyro.plate("data", 1 if y is None else len(y)):
            pyro.sample("obs", dist.MultivariateNormal(torch.zeros(2), precision_matrix=precision), obs=y)

    y = torch.ones(3, 2)
    with pytest.raises(
        NotImplementedError, match=r"'precision' \(Wishart\): torch has no bijection.*LKJCholesky"
    ):
        AutoLaplace(model).initialize(y) if door == "guide" else log_density(model, (y,))
