# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""The search for the mode: where there is none, where the numbers end, and the way back to training."""

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor

from pyro_bnn.curvature.accumulate import NotAMinimumError
from pyro_bnn.infer import fit
from pyro_bnn.infer.autoguide import (
    AutoHessianFreeLaplace,
    AutoLaplace,
    AutoLaplaceMixture,
    AutoMixture,
    UnconvergedMAPWarning,
)
from pyro_bnn.nn import bayesian_
from tests.common import assert_close
from tests.infer.models import linear_data, linear_model, linear_posterior

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)


def schools(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    spread = pyro.sample("spread", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        effect = pyro.sample("effect", dist.Normal(mean, spread))
        pyro.sample("obs", dist.Normal(effect, ERRORS), obs=y)


@pytest.mark.parametrize("curvature", [pytest.param("ggn", marks=pytest.mark.slow), "hessian"])
def test_a_centred_hierarchy_has_no_mode(curvature: Any) -> None:
    guide = AutoLaplace(schools, curvature=curvature).initialize(EFFECTS)
    start = guide.loc.detach().clone()
    with pytest.raises(NotAMinimumError, match=r"no maximum: site 'spread'.*non-centred.*AutoMixture"):
        guide.polish(EFFECTS)
    assert_close(guide.loc.detach(), start)


def test_the_non_centred_one_has() -> None:
    model = poutine.reparam(schools, config={"effect": LocScaleReparam(0.0)})
    guide = AutoLaplace(model, curvature="hessian").initialize(EFFECTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnconvergedMAPWarning)
        guide.polish(EFFECTS).laplace_approximation(EFFECTS)
    assert guide.map_report.newton_decrement < 1e-6


def test_an_error_of_a_trained_point_names_the_sites() -> None:
    guide = AutoLaplace(schools, curvature="hessian").initialize(EFFECTS)
    fit(schools, guide, EFFECTS, num_steps=400, optim=0.05, progress_bar=False)
    with pytest.raises(NotAMinimumError, match=r"sites \['"):
        guide.laplace_approximation(EFFECTS)


def count_runs(guide: AutoLaplace) -> list[int]:
    calls, trace = [0], guide.packed.trace

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return trace(*args, **kwargs)

    guide.packed.trace = counted  # type: ignore[method-assign]
    return calls


def test_single_precision_stops() -> None:
    torch.set_default_dtype(torch.float32)
    x = torch.randn(200, 3)
    y = x.sin().sum(-1) + 0.1 * torch.randn(200)
    net = bayesian_(torch.nn.Sequential(torch.nn.Linear(3, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1)))

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(mean, 0.1), obs=y)

    guide = AutoLaplace(model, curvature="hessian").initialize(x, y)
    calls = count_runs(guide)
    guide.polish((x, y))
    assert calls[0] < 1500
    reported, (value, gradient) = guide.map_report, guide.negative_log_joint(x, y)
    assert reported.newton_decrement < 1e-2
    assert_close(torch.tensor(reported.loss), value, rtol=1e-6)
    assert_close(torch.tensor(reported.gradient_norm), gradient.norm(), rtol=1e-3)
    assert "smallest" not in str(reported)  # which polish does not look for
    guide.laplace_approximation((x, y))
    assert guide.map_report.newton_decrement < 1e-2


@pytest.mark.parametrize("condition", [1e8, 1e10])
def test_points_that_are_not_finite_are_only_trials(condition: float) -> None:
    torch.set_default_dtype(torch.float32)
    x = torch.randn(200, 3) * torch.tensor([1.0, condition**0.25, condition**0.5])
    y = x[:, 0] + torch.randn(200)
    guide = AutoLaplace(linear_model).initialize(x, y).polish(x, y)
    mean, covariance = linear_posterior(x.double(), y.double())
    errors = (guide.loc.detach() - mean) / covariance.diagonal().sqrt()
    assert float(errors.abs().max()) < 0.1


def test_a_kink_is_reported() -> None:
    def model(y: Tensor) -> None:
        level = pyro.sample("level", dist.Laplace(0.0, 0.1))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(level, 1.0), obs=y)

    y = torch.full((5,), 0.5)  # the mode is the kink at zero
    guide = AutoLaplace(model, curvature="hessian").initialize(y)
    guide.loc.data.fill_(0.4)
    with pytest.warns(UnconvergedMAPWarning, match="polish stopped") as caught:
        guide.polish(y)
    assert caught[0].filename == __file__
    assert str(caught[0].message).startswith("polish stopped at a Newton decrement of")  # no saddle
    assert_close(guide.loc.detach(), torch.zeros(1), atol=1e-3)


def test_warnings_point_at_the_users_line() -> None:
    x, y = linear_data()
    guide = AutoLaplace(linear_model).initialize(x, y)
    with pytest.warns(UnconvergedMAPWarning) as caught:
        guide.laplace_approximation(x, y, map_tolerance=0.0)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "make", [AutoLaplace, AutoHessianFreeLaplace, lambda model: AutoLaplaceMixture(model, 2)]
)
def test_fit_goes_on_from_the_point_estimate(make: Any) -> None:
    x, y = linear_data()
    guide = make(linear_model).initialize(x, y)
    targets = ((x,),) if isinstance(guide, AutoHessianFreeLaplace) else ()
    for _ in range(2):
        fit(linear_model, guide, (x, y), num_steps=3, progress_bar=False)
        assert not guide.is_fitted
        guide.laplace_approximation((x, y), *targets, map_tolerance=float("inf"))
        assert guide.is_fitted
    assert not guide.to_point_estimate().is_fitted
    guide.polish(x, y).laplace_approximation((x, y), *targets)
    mean, covariance = linear_posterior(x, y)
    part = guide.components[0] if isinstance(guide, AutoLaplaceMixture) else guide
    assert_close(part.loc.detach(), mean, rtol=1e-7)
    if not targets:
        assert_close(part.posterior.covariance_matrix, covariance, rtol=1e-7)


def test_a_compiled_bound_trains_every_component() -> None:
    x, y = linear_data()
    guide = AutoLaplaceMixture(linear_model, 2).initialize(x, y)
    before = [part.loc.detach().clone() for part in guide.components]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer
        fit(linear_model, guide, (x, y), num_steps=20, elbo=pyro.infer.JitTrace_ELBO(), progress_bar=False)
    for part, start in zip(guide.components, before, strict=True):
        assert float((part.loc.detach() - start).abs().min()) > 0


def test_guides_say_what_they_are() -> None:
    x, y = linear_data()
    guide = AutoLaplace(linear_model, structure="diagonal")
    assert repr(guide) == "AutoLaplace(structure='diagonal', curvature='ggn', not initialised)"
    guide.initialize(x, y)
    assert "3 latents, point estimate" in repr(guide)
    assert "3 latents, Gaussian" in repr(guide.polish(x, y).laplace_approximation(x, y))
    mixture = AutoLaplaceMixture(linear_model, 3).initialize(x, y)
    assert repr(mixture).startswith("AutoLaplaceMixture(3 x AutoLaplace(")
    assert "method='cg'" in repr(AutoHessianFreeLaplace(linear_model))
    assert repr(AutoMixture(linear_model, 2)) == "AutoMixture(2 x 'normal', rest='delta', not initialised)"
    assert "3 latents" in repr(AutoMixture(linear_model, 2).initialize(x, y))


@pytest.mark.parametrize("float64", [False, True])
@pytest.mark.parametrize("words", ["the pump is off", "a dtype of the pump"])
def test_errors_of_the_model_pass_through_the_search(words: str, float64: bool) -> None:
    """Only one about precisions, met in double precision, is explained."""
    torch.set_default_dtype(torch.float32)
    start = torch.zeros(3)

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        if not bool((weight == start).all()) and (weight.dtype == torch.float64) == float64:
            raise RuntimeError(words)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal((x * weight).sum(-1), 0.5), obs=y)

    data = linear_data(6)
    guide = AutoLaplace(model, init_loc_fn=init_to_value(values={"weight": start})).initialize(*data)
    explained = float64 and "dtype" in words
    with pytest.raises(RuntimeError) as found:
        guide.polish(data, float64=float64)
    assert str(found.value).startswith("float64=True: the model mixes precisions" if explained else words)


def test_a_search_in_single_precision_has_the_data_as_they_are() -> None:
    torch.set_default_dtype(torch.float32)

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ weight, 0.5), obs=y)

    x, y = linear_data(20)
    guide = AutoLaplace(model).initialize(x, y).polish((x, y))
    assert guide.loc.dtype == torch.float32
    assert_close(guide.loc.detach(), linear_posterior(x, y)[0], rtol=1e-4, atol=1e-5)
