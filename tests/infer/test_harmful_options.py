# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Options that would give a wrong number, or never end, are refused by name."""

import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_bnn.infer import Mixture_ELBO, fit, hfl, posterior_predictive, predictive_moments
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoMixture
from tests.models import linear_regression


@pytest.fixture(scope="module")
def fitted():
    torch.set_default_dtype(torch.float64)
    model, x, y = linear_regression()
    return model, AutoLaplace(model).initialize(x, y).polish((x, y)), (x, y)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tolerance", 1.0),
        ("tolerance", 3.0),
        ("tolerance", 0.0),
        ("tolerance", torch.nan),
        ("epsilon", 0.0),
        ("epsilon", -1e-3),
        ("epsilon", torch.inf),
        ("proximal", -1.0),
        ("proximal", torch.nan),
    ],
)
def test_accuracy_of_hessian_free_laplace(name, value, fitted):
    model, guide, data = fitted
    for call in (
        lambda: hfl.solve(guide, data, data[:1], **{name: value}),
        lambda: AutoHessianFreeLaplace(model, **{name: value}),
        *([] if name == "proximal" else [lambda: hfl.regvar(guide, data, data[:1], **{name: value})]),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be a number"):
            call()


@pytest.mark.parametrize("name", ["rank", "block_size", "num_probes", "num_epochs", "chunk_size", "max_iter"])
@pytest.mark.parametrize("value", [0, -1, 2.5, torch.inf])
def test_sizes_of_hessian_free_laplace(name, value, fitted):
    _, guide, data = fitted
    with pytest.raises(ValueError, match=f"^{name} must be a whole number of at least 1"):
        hfl.solve(guide, data, data[:1], **{name: value})
    if name in ("num_epochs", "chunk_size"):
        with pytest.raises(ValueError, match=f"^{name} must be a whole number of at least 1"):
            hfl.regvar(guide, data, data[:1], **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": torch.inf}, "num_steps must be a whole number"),
        ({"num_steps": 2.5}, "num_steps must be a whole number"),
        ({"num_epochs": 0}, "num_epochs must be a whole number"),
        ({"num_steps": 2, "clip_grad_norm": -1.0}, "clip_grad_norm must be a number above 0"),
        ({"num_steps": 2, "clip_grad_norm": 0.0}, "clip_grad_norm must be a number above 0"),
        ({"num_steps": 2, "clip_grad_norm": torch.nan}, "clip_grad_norm must be a number above 0"),
        ({"num_steps": 2, "kl_scale": -1.0}, "kl_scale must be a number of at least 0"),
        ({"num_steps": 2, "kl_scale": torch.nan}, "kl_scale must be a number of at least 0"),
        (
            {"num_steps": 2, "kl_scale": lambda step: -1.0},
            "kl_scale at step 0 must be a number of at least 0",
        ),
    ],
)
def test_training(options, message):
    model, x, y = linear_regression()
    for guide in (AutoMixture(model, 1), AutoNormal(model)):
        with pytest.raises(ValueError, match=message):
            fit(model, guide, (x, y), progress_bar=False, **options)


def test_objective():
    for options in ({"kl_scale": -0.1}, {"entropy_weight": -1.0}, {"kl_scale": torch.inf}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be a number of at least 0"):
            Mixture_ELBO(**options)
    assert Mixture_ELBO(kl_scale=0.0).current_kl_scale() == 0.0  # the start of a schedule


@pytest.mark.parametrize("predict", [posterior_predictive, predictive_moments])
def test_more_draws_than_memory_holds(predict, fitted):
    model, guide, data = fitted
    with pytest.raises(MemoryError, match="num_samples=100000000000 needs about"):
        predict(model, guide, data, num_samples=10**11)
    one = {"w": torch.zeros(3).expand(10**10, 3)}  # takes no memory itself
    with pytest.raises(MemoryError, match="the predictions of site 'obs' under 10000000000 draws"):
        predict(model, one, data)
    for number in (0, -1, 2.5, torch.inf):
        with pytest.raises(ValueError, match="num_samples must be a whole number"):
            predict(model, guide, data, num_samples=number)


@pytest.mark.parametrize("name", ["likelihood", "kl", "batch"])
def test_choices_of_bounds(name):
    with pytest.raises(ValueError, match=f"^{name} must be "):
        Mixture_ELBO(**{name: "both"})


def test_curvature_of_a_solve(fitted):
    _, guide, data = fitted
    with pytest.raises(ValueError, match="unknown curvature 'fisher'"):
        hfl.solve(guide, data, data[:1], curvature="fisher")
