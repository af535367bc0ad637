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

from pyro_bnn.infer import hfl, posterior_draws
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoLaplaceMixture, AutoMixture
from pyro_bnn.model.data import Arguments
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


def fitted(x: Tensor, y: Tensor) -> Any:
    return AutoLaplace(linear_model).initialize(x, y).polish(x, y).laplace_approximation(x, y)


ONE_BATCH = [form for form in FORMS if form not in ("batches", "loader")]


@pytest.mark.parametrize("form", ONE_BATCH)
def test_predictions_take_one_batch_in_every_form(form: str) -> None:
    x, y = linear_data()
    guide = fitted(x, y)
    args, kwargs = FORMS[form](x, y)
    _, covariance = linear_posterior(x, y)
    expected = x @ covariance @ x.mT
    assert_close(guide.linearized_outputs(*args, **kwargs)["obs"].variance[:, 0], expected.diagonal())
    joint = guide.joint_covariance(*args, **kwargs)["obs"].reshape(len(x), len(x))
    assert_close(joint, expected)
    assert_close(guide.predictive(*args, **kwargs)["obs"].mean, guide.predictive(x)["obs"].mean)
    draws = guide.functional_samples(3, *args, generator=torch.Generator().manual_seed(1), **kwargs)["obs"]
    again = guide.functional_samples(3, x, generator=torch.Generator().manual_seed(1))["obs"]
    assert_close(draws, again)
    latents = guide.sample_posterior((3,))
    found = guide.observed_distributions(latents, *args, **kwargs)["obs"]
    assert_close(found.mean, latents["weight"] @ x.mT)


@pytest.mark.parametrize("form", ["batches", "loader"])
def test_several_batches_are_no_input_of_one_prediction(form: str) -> None:
    x, y = linear_data()
    guide = fitted(x, y)
    args, _ = FORMS[form](x, y)
    for method in ("predictive", "linearized_outputs", "joint_covariance"):
        with pytest.raises(TypeError, match=f"{method} takes one batch, and found a .*linearized_batches"):
            getattr(guide, method)(*args)


@pytest.mark.parametrize("form", FORMS)
def test_hessian_free_laplace_takes_every_form(form: str) -> None:
    x, y = linear_data()
    args, kwargs = FORMS[form](x, y)
    expected = linear_posterior(x, y)[1]
    guide = AutoHessianFreeLaplace(linear_model).initialize(x, y).polish(x, y)
    targets = torch.eye(x.shape[1], dtype=x.dtype)
    result = hfl.solve(guide, *args, targets=(targets,), tolerance=1e-10, **kwargs)
    assert_close(result.covariance, expected, rtol=1e-7)
    assert_close(
        hfl.covariance(guide, *args, targets=targets, tolerance=1e-10, **kwargs), expected, rtol=1e-7
    )
    by_name = {"targets": None, "functional": lambda latents: latents["weight"]}
    found = hfl.variance(guide, *args, tolerance=1e-10, **by_name, **kwargs)
    assert_close(found, expected.diagonal(), rtol=1e-7)
    score = hfl.regvar(guide, *args, targets=(targets,), num_epochs=None, **kwargs).score
    assert_close(score, hfl.regvar(guide, (x, y), (targets,), num_epochs=None).score)
    guide.laplace_approximation(*args, targets=(targets[:1],), **kwargs)
    guide.add_targets(*args, targets=(targets[1:],), **kwargs)
    assert_close(guide.linearized_outputs(targets)["obs"].variance[:, 0], expected.diagonal(), rtol=1e-5)
    if len(args) == 1 and not kwargs:  # targets and functional may follow data
        assert_close(hfl.solve(guide, *args, (targets,)).covariance, result.covariance, rtol=1e-5)
        assert_close(hfl.variance(guide, *args, None, lambda latents: latents["weight"]), found, rtol=1e-5)


def test_too_many_positions_and_a_stock_guide() -> None:
    x, y = linear_data()
    guide = AutoLaplace(linear_model).initialize(x, y).polish(x, y)
    with pytest.raises(TypeError, match=r"solve: 4 arguments by position.*solve\(x, y, targets="):
        hfl.solve(guide, x, y, (x,), None)
    free = AutoHessianFreeLaplace(linear_model).initialize(x, y)
    with pytest.raises(
        TypeError, match=r"laplace_approximation needs targets. Pass data as one object.*by name"
    ):
        free.laplace_approximation((x, y))
    with pytest.raises(ValueError, match="has no observation here") as caught:
        free.laplace_approximation(x, y)
    assert "read as data and targets" in caught.value.__notes__[-1]
    stock = pyro.infer.autoguide.AutoDelta(linear_model)
    stock(x, y)
    stock.weight = guide.median()["weight"]
    found = hfl.variance(stock, x, y, targets=x)
    assert_close(found, hfl.variance(guide, (x, y), (x,)))


@pytest.mark.parametrize("form", FORMS)
def test_evidence_and_hyperparameters_take_every_form(form: str) -> None:
    x, y = linear_data()
    guide = fitted(x, y)
    args, kwargs = FORMS[form](x, y)
    value = float(guide.log_evidence())
    given = {"data": args[0]} if len(args) == 1 and not kwargs else kwargs
    assert float(guide.log_evidence(None, *(() if "data" in given else args), **given)) == pytest.approx(
        value
    )
    options: Any = {"method": "validation", "candidates": [0.5, 2.0]}
    report = guide.optimize_hyperparameters(*args, **kwargs, **options)
    assert report.objective == pytest.approx(
        fitted(x, y).optimize_hyperparameters((x, y), **options).objective
    )
    with pytest.raises(TypeError, match=r"tau is a tuple.*log_evidence\(data=\(x, y\)\)"):
        guide.log_evidence((x, y))


@pytest.mark.parametrize("form", FORMS)
def test_draws_of_a_guide_that_needs_arguments(form: str) -> None:
    def guide(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("weight", dist.Delta(x.sum(0)).to_event(1))

    x, y = linear_data()
    args, kwargs = FORMS[form](x, y)
    first = x[:9] if form == "batches" else x[:16] if form == "loader" else x
    assert_close(posterior_draws(guide, 2, *args, **kwargs)["weight"], first.sum(0).expand(2, -1))
    if form == "arguments":
        assert_close(posterior_draws(guide, 2, (args, kwargs))["weight"], x.sum(0).expand(2, -1))
        assert_close(posterior_draws(guide, 2, batch=args)["weight"], x.sum(0).expand(2, -1))


@pytest.mark.parametrize("form", FORMS)
def test_guides_start_from_every_form(form: str) -> None:
    x, y = linear_data()
    args, kwargs = FORMS[form](x, y)
    for guide in (AutoMixture(linear_model, 2), AutoLaplace(linear_model)):
        assert guide.initialize(*args, **kwargs).median()["weight"].shape == x.shape[1:]
        assert (
            AutoMixture(linear_model, 2).initialize(Arguments((x, y))).median()["weight"].shape == x.shape[1:]
        )


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_a_model_of_one_container_gives_the_same_at_every_door(kind: Any) -> None:
    """Its second parameter makes the batch inside the container a call of the model, too."""

    def model(batch: Any, labels: Any = None, scale: float = 1.0) -> None:
        x, y = batch.values() if isinstance(batch, dict) else batch
        linear_model(x, y if labels is None else labels)

    x, y = linear_data()
    batch = {"batch": x, "labels": y} if kind is dict else kind((x, y))
    expected = linear_posterior(x, y)[1]
    guide = AutoLaplace(model).initialize(batch).polish(batch).laplace_approximation(batch)
    assert_close(guide.posterior.covariance_matrix, expected, rtol=1e-7)
    variances = (x @ expected @ x.mT).diagonal()
    assert_close(guide.linearized_outputs(batch)["obs"].variance[:, 0], variances, rtol=1e-7)
    assert_close(hfl.variance(guide.to_point_estimate(), batch, batch)[:, 0], variances, rtol=1e-5)


def test_arguments_with_the_names_of_options() -> None:
    def model(x: Tensor, y: Tensor | None = None, tolerance: float = 1.0) -> None:
        linear_model(x * tolerance, y)

    x, y = linear_data()
    guide = AutoLaplace(model).initialize(x, y, tolerance=2.0)
    with pytest.raises(
        TypeError, match=r"polish: \['tolerance'\] are options of polish and arguments of the model"
    ):
        guide.polish(x, y, tolerance=2.0)
    data = {"x": x, "y": y, "tolerance": 2.0}
    guide.polish(data, tolerance=1e-8).laplace_approximation(data)
    assert_close(guide.posterior.covariance_matrix, linear_posterior(2 * x, y)[1], rtol=1e-7)


def test_signatures_are_read_through_handlers() -> None:
    x, y = linear_data()
    guide = AutoLaplace(pyro.poutine.scale(linear_model, 1.0)).initialize(x, y)
    guide.polish(x=x, y=y).laplace_approximation(x, y=y)
    assert_close(guide.posterior.covariance_matrix, linear_posterior(x, y)[1], rtol=1e-7)
    with pytest.raises(TypeError, match=r"polish: the model does not take these arguments \(too many"):
        fitted(x, y).polish(x, y, x)


def test_keyword_only_arguments_beside_others() -> None:
    def model(x: Tensor, *, y: Tensor | None = None) -> None:
        linear_model(x, y)

    x, y = linear_data()
    guide = AutoLaplace(model).initialize(x, y=y).polish(x, y=y).laplace_approximation(x, y=y)
    assert_close(guide.posterior.covariance_matrix, linear_posterior(x, y)[1], rtol=1e-7)
    assert_close(guide.predictive(x, y=y)["obs"].mean, guide.predictive({"x": x})["obs"].mean)
