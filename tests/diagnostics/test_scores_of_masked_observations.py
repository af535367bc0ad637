# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Observations that a model masks are not scored, whatever stands in their place."""

from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

from pyro_bnn.diagnostics import metrics, to_datatree, to_inference_data
from pyro_bnn.diagnostics.diversity import diversity
from pyro_bnn.infer import posterior_predictive, predictive_moments
from pyro_bnn.infer.autoguide import AutoLaplace, AutoMixture
from pyro_bnn.infer.predict.predictive import SitePrediction
from tests.common import assert_close

OBSERVED = torch.tensor([True, False, True, True, False, True])


def numeric(filler: float) -> tuple[SitePrediction, SitePrediction]:
    """A prediction with masked entries, and the same without them."""
    samples, mean, y = torch.randn(50, 6), torch.randn(50, 6), torch.randn(6)
    whole = SitePrediction(samples, mean, mean.exp(), y, -mean.square(), ("data",), "numeric", OBSERVED)
    kept = replace(
        whole,
        **{
            name: getattr(whole, name)[:, OBSERVED]
            for name in ("samples", "mean", "variance", "log_likelihood")
        },
        observed=y[OBSERVED],
        mask=None,
    )
    y = torch.where(OBSERVED, y, filler)
    return replace(whole, observed=y, log_likelihood=whole.log_likelihood * OBSERVED), kept


@pytest.mark.parametrize("filler", [99.0, torch.nan, -100.0])
def test_numbers(filler: float) -> None:
    whole, kept = numeric(filler)
    assert metrics.evaluate(whole) == metrics.evaluate(kept)
    for found, expected in zip(
        metrics.calibration_curve(whole), metrics.calibration_curve(kept), strict=True
    ):
        assert_close(found, expected)
    assert metrics.pit(whole).shape == (4,)
    assert_close(metrics.rmse(whole, torch.zeros(6)), metrics.rmse(kept, torch.zeros(4)))


@pytest.mark.parametrize("filler", [-100, 0, 7])
def test_labels(filler: int) -> None:
    probs, labels = torch.softmax(torch.randn(9, 6, 3), -1), torch.randint(3, (6,))
    masked = torch.where(OBSERVED, labels, filler)
    found = SitePrediction(None, probs, None, masked, None, ("data",), "classes", OBSERVED)
    for score in (metrics.accuracy, metrics.brier, metrics.ece):
        assert_close(score(found), score(probs[:, OBSERVED], labels[OBSERVED]))
    binary = SitePrediction(None, probs[..., 0], None, (masked > 0).double(), None, (), "binary", OBSERVED)
    assert_close(metrics.brier(binary), metrics.brier(probs[:, OBSERVED, 0], (labels[OBSERVED] > 0).long()))


def test_masks_of_several_dimensions() -> None:
    """Steps of sequences, and tasks of a vector of observations, each with a mask of its own."""
    mask = torch.rand(5, 4) < 0.6
    mask[0] = False
    mean, y = torch.randn(8, 5, 4), torch.where(mask, torch.randn(5, 4), torch.nan)
    for log_likelihood in (mean, mean.sum(-1)):  # of each step; of each vector
        found = SitePrediction(mean, mean, None, y, log_likelihood, (), "numeric", mask)
        assert_close(metrics.rmse(found), metrics.rmse(mean[:, mask], y[mask]))
        kept = log_likelihood[:, mask if log_likelihood.dim() == 3 else mask.any(-1)]
        assert_close(metrics.nll(found), metrics.nll(kept))
    # a mask of whole vectors
    rows = torch.tensor([True, True, False, True, False])
    found = SitePrediction(mean, mean, None, mean[0], mean.sum(-1), (), "numeric", rows)
    assert_close(metrics.crps(found), metrics.crps(mean[:, rows], mean[0, rows]))


def test_masks_that_leave_nothing_or_do_not_fit() -> None:
    whole, _ = numeric(0.0)
    for score in (metrics.rmse, metrics.nll, metrics.interval_width):
        with pytest.raises(ValueError, match="all observations are masked"):
            score(replace(whole, mask=torch.zeros(6, dtype=torch.bool)))
        with pytest.raises(ValueError, match=r"mask of the prediction has shape \(3,\)"):
            score(replace(whole, mask=OBSERVED[:3]))


X, Y = torch.linspace(-1, 1, 8, dtype=torch.float64), torch.linspace(0, 1, 8, dtype=torch.float64).sin()
MASK = torch.tensor([1, 1, 0, 1, 0, 0, 1, 0]).bool()
FORMS = ["poutine", "inside", "obs_mask", "steps", "tasks", "rows of tasks"]


def masked_model(form: str) -> Any:
    """Regression with a mask among the arguments, in each of the ways in which Pyro takes it."""

    def model(x, mask, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        f = w[..., :1] * x + w[..., 1:]
        if form in ("steps", "tasks", "rows of tasks"):
            f = f.unsqueeze(-1) * torch.tensor([1.0, -0.5, 2.0])
        d = dist.Normal(f, 0.5)
        with pyro.plate("data", len(x), dim=-2 if form == "steps" else -1):
            if form == "poutine":
                with poutine.mask(mask=mask):
                    return pyro.sample("obs", d, obs=y)
            if form == "inside":
                return pyro.sample("obs", d.mask(mask), obs=y)
            if form == "obs_mask":
                return pyro.sample("obs", d, obs=y, obs_mask=mask)
            if form == "steps":
                with pyro.plate("steps", 3, dim=-1), poutine.mask(mask=mask):
                    return pyro.sample("obs", d, obs=y)
            d = d.mask(mask).to_event(1) if form == "tasks" else d.to_event(1).mask(mask)
            return pyro.sample("obs", d, obs=y)

    return model


def case(form: str) -> tuple[Any, str, Any, Any, Any]:
    """A model, its observed site, data with fillers, the mask, and the means under draws by plain algebra."""
    tasks = form in ("steps", "tasks", "rows of tasks")
    mask = torch.rand(8, 3) < 0.6 if form in ("steps", "tasks") else MASK
    y = Y[:, None] * torch.tensor([1.0, 2.0, 3.0]) if tasks else Y
    whole = mask[:, None].expand(8, 3) if form == "rows of tasks" else mask
    data = (X, mask, torch.where(whole, y, 99.0))
    return masked_model(form), "obs_observed" if form == "obs_mask" else "obs", data, whole, y


def expected(draws: Any, form: str, whole: Any, y: Any) -> dict[str, float]:
    f = draws[:, :1] * X + draws[:, 1:]
    f = f if y.dim() == 1 else f.unsqueeze(-1) * torch.tensor([1.0, -0.5, 2.0])
    each = torch.distributions.Normal(f, 0.5).log_prob(y) * whole
    points = whole
    if form in ("tasks", "rows of tasks"):
        each, points = each.sum(-1), whole.any(-1)
    density = each.logsumexp(0) - torch.tensor(float(len(draws))).log()
    return {
        "rmse": float((f.mean(0) - y)[whole].square().mean().sqrt()),
        "nll": float(-density[points].mean()),
    }


@pytest.mark.parametrize("form", FORMS)
def test_masks_of_models(form: str) -> None:
    model, site, data, whole, y = case(form)
    draws = {"w": torch.randn(20, 2)}
    if form == "obs_mask":
        draws["obs_unobserved"] = torch.randn(20, 8)
    right = expected(draws["w"], form, whole, y)
    batches = [tuple(t[:3] for t in data), tuple(t[3:] for t in data)]
    sources: list[Any] = [posterior_predictive(model, draws, data), to_datatree(model, draws, data)]
    if form != "obs_mask":  # whose unobserved values are latents of the rows
        sources.append(posterior_predictive(model, draws, batches))
    for source in sources:
        assert_close(metrics.nll(source, site=site), right["nll"])
        prediction = metrics.as_prediction(source, site)
        if prediction.mean is not None:
            assert_close(metrics.rmse(prediction), right["rmse"])
        assert_close(metrics.crps(prediction), metrics.crps(prediction.samples[:, whole], y[whole]))


@pytest.mark.parametrize("form", [f for f in FORMS if f != "obs_mask"])
def test_masks_under_linearised_guides(form: str) -> None:
    """The model is linear, so that the linearised predictive is that of plain algebra."""
    model, _, data, whole, y = case(form)
    guide = AutoLaplace(model).initialize(*data).polish(data).laplace_approximation(data)
    found = posterior_predictive(model, guide, data, num_samples=30)
    right = expected(found.draws["w"], form, whole, y)
    assert_close(metrics.rmse(found), right["rmse"], rtol=1e-6)
    assert_close(metrics.nll(found), right["nll"], rtol=1e-6)


def test_a_batch_without_masked_entries() -> None:
    model, _, _, _, _ = case("poutine")
    mask = torch.arange(8) != 6  # in the second batch only
    y = torch.where(mask, Y, 99.0)
    draws = {"w": torch.randn(20, 2)}
    batches = [(X[:5], mask[:5], y[:5]), (X[5:], mask[5:], y[5:])]
    right = expected(draws["w"], "poutine", mask, Y)
    assert_close(metrics.rmse(posterior_predictive(model, draws, batches)), right["rmse"])
    moments = predictive_moments(model, draws, batches)["obs"]
    assert torch.equal(moments.mask, mask)


def test_diversity_of_masked_observations() -> None:
    model, _, data, whole, _ = case("poutine")
    guide = AutoMixture(model, 2, init_scale=1e-6).initialize(*data)
    report = diversity(model, guide, data, num_samples=2)
    assert report.num_observations == int(whole.sum())
    draws = guide.sample_posterior((2, 1), by_component=True)["w"].flatten(0, 1)
    f = draws[:, :1] * X + draws[:, 1:]
    each = torch.distributions.Normal(f, 0.5).log_prob(Y)[:, whole].mean(-1)
    assert_close(report.member_nll, -each, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_leave_one_out_of_masked_observations(form: str) -> None:
    """ArviZ counts what the tree holds, which is what was observed."""
    arviz = pytest.importorskip("arviz")
    model, site, data, whole, y = case(form)
    draws = {"w": 0.02 * torch.randn(400, 2)}
    if form == "obs_mask":
        draws["obs_unobserved"] = torch.randn(400, 8)
    tree = to_inference_data(model, draws, data)
    points = whole.any(-1) if form in ("tasks", "rows of tasks") else whole
    found = arviz.loo(tree, var_name=site, pointwise=True)
    assert found.n_data_points == int(points.sum())
    f = draws["w"][:, :1] * X + draws["w"][:, 1:]
    f = f if y.dim() == 1 else f.unsqueeze(-1) * torch.tensor([1.0, -0.5, 2.0])
    each = torch.distributions.Normal(f, 0.5).log_prob(y) * whole
    each = each.sum(-1) if form in ("tasks", "rows of tasks") else each
    dataset = arviz.convert_to_dataset({"obs": each[None][:, :, points].numpy()})
    alone = arviz.InferenceData(posterior=tree.posterior, log_likelihood=dataset)
    assert_close(found.elpd_loo, arviz.loo(alone).elpd_loo)
