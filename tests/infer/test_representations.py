# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What guides, results and reports say of themselves, in ten lines at most, and the numbers of a guide's summary."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_bnn.diagnostics import diversity
from pyro_bnn.diagnostics.quality import CalibrationRanks
from pyro_bnn.infer import fit, hfl, nuts, posterior_predictive, predictive_moments
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoLaplaceMixture, AutoMixture
from pyro_bnn.ops.described import Described
from tests.common import assert_close
from tests.infer.models import linear_data, linear_model, linear_posterior


def fitted(guide: Any, x: Tensor, y: Tensor, **options: Any) -> Any:
    return guide.initialize(x, y).polish(x, y).laplace_approximation(x, y, **options)


def shown_objects() -> dict[str, Any]:
    x, y = linear_data()
    laplace = fitted(AutoLaplace(linear_model), x, y)
    free = fitted(AutoHessianFreeLaplace(linear_model, method="central"), x, y, targets=x[:3])
    free.result.warnings.append("a <note>")
    mixture = AutoMixture(linear_model, 2).initialize(x, y)
    prediction = posterior_predictive(linear_model, laplace, (x, y), num_samples=5)
    moments = predictive_moments(linear_model, laplace, (x, y), num_samples=5)
    return {
        "fit": fit(linear_model, mixture, (x, y), num_steps=40, progress_bar=False),
        "laplace": laplace,
        "mixture of laplace": fitted(AutoLaplaceMixture(linear_model, 2), x, y),
        "hfl guide": free,
        "mixture": mixture,
        "not initialised": AutoMixture(linear_model),
        "map report": laplace.map_report,
        "hyperparameters": laplace.optimize_hyperparameters(),
        "evidence": laplace._evidence(),
        "outputs": laplace.linearized_outputs(x)["obs"],
        "hfl": free.result,
        "score": hfl.regvar(laplace, (x, y), (x,), num_epochs=None, calibrate=3),
        "prediction": prediction,
        "site prediction": prediction["obs"],
        "moments": moments,
        "site moments": moments["obs"],
        "diversity": diversity(linear_model, mixture, (x, y)),
        "nuts": nuts(linear_model, (x, y), num_samples=3, warmup_steps=3, num_chains=2, progress_bar=False),
        "ranks": CalibrationRanks({"w": torch.arange(10).numpy()[:, None]}, 9),
    }


def test_everything_says_what_it_is_in_ten_lines() -> None:
    for name, value in shown_objects().items():
        text = repr(value)
        assert len(text.splitlines()) <= 10, (name, text)
        assert "tensor(" not in text, (name, text)
        assert len(str(value)) < 2000, name
        html = value._repr_html_()
        assert html.startswith("<table>"), name
        assert "<note>" not in html, name  # escaped
        if isinstance(value, Described):
            assert value.described()[0] in html.replace("&#x27;", "'"), name


def test_long_descriptions_are_cut_and_printed_whole() -> None:
    report = hfl.RegVarScore(torch.ones(2), torch.Size([2]))
    report.described = lambda: ("title", {str(i): "row" for i in range(20)})  # type: ignore[method-assign]
    assert repr(report).splitlines()[-1] == "  ... 12 more: print() shows them"
    assert len(repr(report).splitlines()) == 10
    assert len(str(report).splitlines()) == 21


@pytest.mark.parametrize("structure", ["full", "diagonal", "function_space"])
def test_the_summary_of_a_laplace_guide(structure: Any) -> None:
    x, y = linear_data()
    guide = AutoLaplace(linear_model, structure=structure)
    assert guide.summary().facts == {"state": "not initialised: call guide.initialize(*args)"}
    assert "sd" not in guide.initialize(x, y).polish(x, y).summary().sites["weight"]
    summary = guide.laplace_approximation(x, y).summary()
    mean, covariance = linear_posterior(x, y)
    if structure == "diagonal":
        covariance = covariance.inverse().diagonal().reciprocal().diag()
    row = summary.sites["weight"]
    assert (row["shape"], row["latents"]) == ((3,), 3)
    assert row["location"] == pytest.approx(float(mean.square().mean().sqrt()))
    assert row["sd"] == pytest.approx(float(covariance.diagonal().sqrt().median()), rel=1e-5)
    assert row["sd / prior sd"] == pytest.approx(row["sd"], rel=1e-5)  # the prior is standard normal
    assert summary.facts["log evidence"] == f"{float(guide.log_evidence()):.6g} nats"
    guide.optimize_hyperparameters()
    tau = guide.tau.max()
    again = guide.summary().sites["weight"]
    assert again["sd / prior sd"] == pytest.approx(again["sd"] * float(tau) ** 0.5, rel=1e-5)
    assert "multiplier" in str(guide.summary())


def test_the_summary_counts_what_is_random() -> None:
    x, y = linear_data()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 2.0))
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ weight + shift, 0.5), obs=y)

    found = fitted(AutoLaplace(model, sites=["weight"]), x, y).summary().sites
    assert (found["weight"]["random"], found["shift"]["random"]) == (3, 0)
    assert found["shift"]["sd"] is None


def test_the_summaries_of_mixtures() -> None:
    x, y = linear_data()
    laplace = fitted(AutoLaplaceMixture(linear_model, 2), x, y)
    row = laplace.summary().sites["weight"]
    assert row["sd between modes"] < 1e-5  # there is one mode
    assert row["sd within"] == pytest.approx(
        float(linear_posterior(x, y)[1].diagonal().sqrt().median()), rel=1e-2
    )
    for component in ("normal", "low_rank", "delta"):
        guide = AutoMixture(linear_model, 2, component, init_scale=0.25, rank=1).initialize(x, y)
        guide.loc.data = torch.tensor([[1.0], [3.0]]).expand(2, 3).clone()
        row = guide.summary().sites["weight"]
        # the mean of the locations is 2, and both are 1 away from it
        assert_close(torch.tensor([row["location"], row["sd between"]]), torch.tensor([5.0**0.5, 1.0]))
        expected: Any = {"normal": pytest.approx(0.25), "delta": None}
        if component == "low_rank":
            factor, scale = guide.cov_factor.detach(), guide.scale.detach()
            spread = (scale.square() + factor.square().sum(-1)).sqrt()
            expected["low_rank"] = pytest.approx(float(spread.flatten().median()))
        assert row["sd within"] == expected[component]
        assert row["family"] == component
