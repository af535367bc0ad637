# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Predictions of a guide that is still a point estimate say so, once."""

import warnings
from typing import Any

import pytest
import torch

from pyro_bnn.diagnostics import to_datatree
from pyro_bnn.infer import posterior_draws, posterior_predictive, predictive_moments
from pyro_bnn.infer.autoguide import (
    AutoHessianFreeLaplace,
    AutoLaplace,
    AutoLaplaceMixture,
    PointEstimateWarning,
)
from tests.models import linear_regression

GUIDES = [AutoLaplace, AutoHessianFreeLaplace]


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize("predict", [posterior_predictive, predictive_moments, to_datatree])
def test_a_guide_before_its_approximation(make: Any, predict: Any) -> None:
    model, x, y = linear_regression()
    guide = make(model).initialize(x, y).polish((x, y))
    with pytest.warns(PointEstimateWarning, match=f"{make.__name__} is still a point estimate") as seen:
        predict(model, guide, (x, y), num_samples=3)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(model, guide, (x, y), num_samples=3)  # once is enough
        point = {name: value[None] for name, value in guide.median().items()}
        predict(model, point, (x, y))


@pytest.mark.parametrize("make", GUIDES)
def test_a_fitted_guide_is_silent(make: Any) -> None:
    model, x, y = linear_regression()
    guide = make(model).initialize(x, y).polish((x, y))
    guide.laplace_approximation((x, y), *([(x,)] if make is AutoHessianFreeLaplace else []))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = predictive_moments(model, guide, (x, y), num_samples=20)["obs"]
    assert found.epistemic is not None
    assert float(found.epistemic.min()) > 0


def test_mixtures_of_point_estimates() -> None:
    model, x, y = linear_regression()
    guide = AutoLaplaceMixture(model, 2).initialize(x, y).polish((x, y))
    with pytest.raises(RuntimeError, match="still a point estimate"):
        posterior_predictive(model, guide, (x, y))
    with pytest.warns(PointEstimateWarning):
        guide.sample_posterior((2, 3), by_component=True)


def test_training_is_silent() -> None:
    from pyro.infer import SVI, Trace_ELBO
    from pyro.optim import Adam

    model, x, y = linear_regression()
    guide = AutoLaplace(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step(x, y)
    with pytest.warns(PointEstimateWarning):
        assert torch.equal(*posterior_draws(guide, 2)["w"])
