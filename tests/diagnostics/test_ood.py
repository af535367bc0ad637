# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Scores of inputs out of distribution against enumeration, closed forms and quadrature."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from pyro_bnn.diagnostics import functional_variance, metrics, mutual_information, predictive_entropy
from pyro_bnn.infer import posterior_predictive, predictive_moments
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.infer.predict.predictive import SitePrediction
from tests.common import assert_close
from tests.infer.models import NOISE, linear_data, linear_model, linear_posterior

X_OUT = 5 * torch.eye(3, dtype=torch.float64)


def classes(x: Tensor, y: Tensor | None = None) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[1], 3), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Categorical(logits=x @ weight), obs=y)


def binary(x: Tensor, y: Tensor | None = None) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=x @ weight), obs=y)


def fitted(model: Any, x: Tensor, y: Tensor) -> AutoLaplace:
    guide = AutoLaplace(model).initialize(x, y).polish(x, y)
    return guide.laplace_approximation(x, y)


def test_labels_by_enumeration() -> None:
    p = torch.rand(7, 4, 3).softmax(-1)
    found = SitePrediction(None, p, None, None, None, ("data",), "classes")
    for n in range(4):
        average = [sum(float(p[s, n, k]) for s in range(7)) / 7 for k in range(3)]
        entropy = -sum(q * math.log(q) for q in average)
        given = sum(-float(p[s, n, k]) * math.log(p[s, n, k]) for s in range(7) for k in range(3)) / 7
        # the mutual information of the label and the number of the draw, from their joint table
        information = sum(
            float(p[s, n, k]) / 7 * math.log(float(p[s, n, k]) / average[k])
            for s in range(7)
            for k in range(3)
        )
        assert float(predictive_entropy(found)[n]) == pytest.approx(entropy)
        assert float(mutual_information(found)[n]) == pytest.approx(information)
        assert entropy - given == pytest.approx(information)
        spread = sum(float(p[:, n, k].var(correction=0)) for k in range(3))
        assert float(functional_variance(found)[n]) == pytest.approx(spread)


def test_closed_forms_of_a_normal() -> None:
    x, y = linear_data()
    guide = fitted(linear_model, x, y)
    covariance = linear_posterior(x, y)[1]
    v = (X_OUT @ covariance @ X_OUT.mT).diagonal()
    outputs = guide.linearized_outputs(X_OUT)
    exact = torch.as_tensor([stats.norm(0, s).entropy() for s in (v + NOISE**2).sqrt().tolist()])
    assert_close(predictive_entropy(outputs), exact)
    assert_close(mutual_information(outputs), 0.5 * torch.log1p(v / NOISE**2))
    assert_close(functional_variance(outputs), v)
    # draws estimate the same: a standard error of a variance is its size times sqrt(2 / S)
    prediction = posterior_predictive(linear_model, guide, X_OUT, num_samples=20_000)
    for score in (functional_variance, mutual_information, predictive_entropy):
        assert_close(score(prediction), score(outputs), rtol=0.05, atol=0.02)
    with pytest.raises(ValueError, match="choose one of the observed sites"):
        predictive_entropy(outputs, site="other")


@pytest.mark.parametrize("vectors", [False, True])
def test_the_variance_of_the_function_is_that_of_the_location_alone(vectors: bool) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
        slope = pyro.sample("slope", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        f, scale = x @ weight, (0.1 * x @ slope).exp()
        root = scale[:, None, None] * torch.tensor([[1.0, 0.0], [0.5, 1.0]], dtype=x.dtype)
        with pyro.plate("data", len(x)):
            joint = dist.MultivariateNormal(f, scale_tril=root)
            pyro.sample("obs", joint if vectors else dist.Normal(f, scale.unsqueeze(-1)).to_event(1), obs=y)

    x, y = linear_data()
    guide = AutoLaplace(model).initialize(x, torch.stack([y, -y], -1))
    guide.laplace_approximation((x, torch.stack([y, -y], -1)), map_tolerance=math.inf)
    draws = guide.sample_posterior((20_000,), generator=torch.Generator().manual_seed(0))
    expected = (X_OUT @ draws["weight"]).var(0)
    assert_close(functional_variance(guide.linearized_outputs(X_OUT)), expected, rtol=0.05, atol=0.0)


def test_a_binary_label_by_quadrature() -> None:
    x, _ = linear_data()
    y = (x.sum(-1) > 0).to(x.dtype)
    guide = fitted(binary, x, y)
    outputs = guide.linearized_outputs(X_OUT)
    mean, sd = outputs["obs"].mean[:, 0], outputs["obs"].variance[:, 0].sqrt()

    def average(function: Any, n: int) -> float:
        density = stats.norm(float(mean[n]), float(sd[n])).pdf
        low, high = float(mean[n] - 12 * sd[n]), float(mean[n] + 12 * sd[n])
        return float(
            integrate.quad(lambda f: density(f) * function(1 / (1 + math.exp(-f))), low, high, limit=200)[0]
        )

    def entropy(p: float) -> float:
        return -sum(q * math.log(q) if q > 0 else 0.0 for q in (p, 1 - p))

    for n in range(3):
        total, given = entropy(average(lambda p: p, n)), average(entropy, n)
        assert float(predictive_entropy(outputs)[n]) == pytest.approx(total, rel=1e-6)
        assert float(mutual_information(outputs)[n]) == pytest.approx(total - given, rel=1e-5)
    assert_close(functional_variance(outputs), sd.square())


def test_classes_in_closed_form_are_those_of_many_draws() -> None:
    x, _ = linear_data()
    guide = fitted(classes, x, x.argmax(-1))
    outputs = guide.linearized_outputs(X_OUT)
    prediction = posterior_predictive(classes, guide, X_OUT, num_samples=4000)
    moments = predictive_moments(classes, guide, X_OUT, draws=prediction.draws)["obs"]
    assert_close(predictive_entropy(prediction), moments.total)
    assert_close(mutual_information(prediction), moments.epistemic)
    generator = torch.Generator().manual_seed(0)
    for score in (predictive_entropy, mutual_information):
        assert_close(score(outputs, num_samples=4000, generator=generator), score(prediction), atol=0.03)
    logits = outputs["obs"].covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert_close(functional_variance(outputs), logits)


def test_points_far_away_are_told_apart() -> None:
    x, y = linear_data()
    guide = fitted(linear_model, x, y)
    for score in (predictive_entropy, mutual_information, functional_variance):
        inside, outside = (score(guide.linearized_outputs(at)) for at in (0.1 * x, 10 * x))
        assert metrics.auroc(inside, outside) > 0.95


def test_what_has_no_moments_is_refused() -> None:
    found = SitePrediction(torch.zeros(3, 2), None, None, None, None, ("data",))
    for score in (predictive_entropy, mutual_information, functional_variance):
        with pytest.raises(ValueError, match="the mean under each draw"):
            score(found)
    with pytest.raises(ValueError, match="mean"):
        functional_variance(SitePrediction(None, torch.full((3, 2), torch.nan), None, None, None, ("data",)))
