# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Precisions that float32 does not resolve: an unscaled column beside an intercept, against the closed form in float64."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.infer.autoguide.laplace_curvature import LaplaceCurvature
from pyro_bnn.ops.notice import CurvatureWarning
from tests.common import assert_close


@pytest.fixture(autouse=True)
def _single_precision():
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


def regression(shift, prior_scale=10.0, noise=0.1):
    """One output, so that the Kronecker structure is exact."""
    torch.manual_seed(0)
    x = torch.stack([torch.ones(200), shift + 15 * torch.randn(200)], -1)
    y = 0.01 * x[:, 1]

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(1, 2), prior_scale).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((x @ w.T).squeeze(-1), noise), obs=y)

    wide = x.double()
    precision = wide.mT @ wide / noise**2 + torch.eye(2).double() / prior_scale**2
    return model, x, y, precision


def fit(model, x, y, **options):
    guide = AutoLaplace(model, **options).initialize(x, y)
    return guide.laplace_approximation(
        (x, y), map_tolerance=float("inf"), generator=torch.Generator().manual_seed(0)
    )


STRUCTURES = ["full", "kronecker", "block", "function_space", "low_rank", "nystrom"]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shift", [0.0, 100.0, 1000.0])
def test_variances_are_right_to_a_percent_without_a_warning(structure, shift):
    model, x, y, precision = regression(shift)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide = fit(model, x, y, structure=structure, rank=2)
    covariance = torch.linalg.inv(precision)
    assert guide.posterior.variance.dtype == torch.float32
    assert_close(guide.posterior.variance, covariance.diagonal(), rtol=0.01)
    means = x.double() @ covariance * x.double()
    found = guide.linearized_outputs(x)["obs"].covariance[:, 0, 0]
    assert_close(found, means.sum(-1), rtol=0.01)
    assert_close(guide.posterior.log_det_precision, torch.logdet(precision), rtol=1e-3)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_float64_sums_do_not_mend_is_said(structure):
    model, x, y, precision = regression(1e5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        guide = fit(model, x, y, structure=structure, rank=2)
    said = [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)]
    close = torch.allclose(
        guide.posterior.variance.double(), torch.linalg.inv(precision).diagonal(), rtol=0.01
    )
    assert close or any("condition number" in message for message in said)


def test_draws_and_files_of_a_posterior_that_was_summed_in_float64(tmp_path):
    model, x, y, precision = regression(1000.0)
    for structure in ("kronecker", "low_rank"):
        guide = fit(model, x, y, structure=structure, rank=2)
        draws = guide.sample_posterior((4000,))["w"]
        assert draws.dtype == torch.float32
        mean = (draws.squeeze(1).double() @ torch.tensor([1.0, 1000.0]).double()).var()
        at = torch.tensor([1.0, 1000.0]).double()
        assert_close(mean, at @ torch.linalg.inv(precision) @ at, rtol=0.1)
        fresh = AutoLaplace(model, structure=structure, rank=2).initialize(x, y)
        torch.save(guide.state_dict(), tmp_path / "guide.pt")
        fresh.load_state_dict(torch.load(tmp_path / "guide.pt"))
        assert_close(fresh.posterior.variance, guide.posterior.variance)
        assert_close(fresh.log_evidence(), guide.log_evidence(), rtol=1e-6)


def test_a_hessian_that_float32_does_not_resolve_is_said():
    model, x, y, _ = regression(3000.0)
    with pytest.warns(CurvatureWarning, match="condition number"):
        fit(model, x, y, curvature="hessian")


def test_a_narrow_prior_costs_nothing(monkeypatch):
    calls = []
    original = LaplaceCurvature.parts
    monkeypatch.setattr(LaplaceCurvature, "parts", lambda *a, **k: calls.append(1) or original(*a, **k))
    model, x, y, _ = regression(0.0, prior_scale=0.1, noise=1.0)
    fit(model, x, y, structure="kronecker")
    assert len(calls) == 1
