# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What a guide of low rank is certain to have of variances, against dense matrices that are written down here."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace
from pyro_bnn.infer.hfl import HFLWarning
from tests.common import assert_close

NOISE, HIDDEN = 0.1, 8


def f(u, x):
    w1, b1, w2 = u.split([HIDDEN, HIDDEN, HIDDEN])
    return torch.tanh(x * w1 + b1) @ w2


def model(x, y=None):
    w1 = pyro.sample("w1", dist.Normal(torch.zeros(HIDDEN), 2.0).to_event(1))
    b1 = pyro.sample("b1", dist.Normal(torch.zeros(HIDDEN), 1.0).to_event(1))
    w2 = pyro.sample("w2", dist.Normal(torch.zeros(HIDDEN), 0.7).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(f(torch.cat([w1, b1, w2]), x), NOISE), obs=y)


GRID = torch.linspace(-3, 3, 41, dtype=torch.float64)[:, None]


def fitted(**options):
    """A guide at some point, and the dense variances of f there."""
    x = torch.cat([torch.linspace(-2, -1, 10), torch.linspace(0.5, 1.5, 10)])[:, None]
    data = (x, x.squeeze(-1).sin())
    guide = AutoHessianFreeLaplace(model, curvature="ggn", **options).initialize(*data)
    u = torch.randn(3 * HIDDEN)
    guide.loc.data.copy_(u)
    J = torch.func.jacrev(f)(u, x)
    prior = torch.cat([torch.full((HIDDEN,), scale**-2) for scale in (2.0, 1.0, 0.7)])
    covariance = torch.linalg.inv(J.mT @ J / NOISE**2 + torch.diag(prior))

    def variance(inputs):
        G = torch.func.jacrev(f)(u, inputs)
        return ((G @ covariance) * G).sum(-1)

    return guide, data, variance


FAR = {"map_tolerance": float("inf")}


@pytest.mark.parametrize(
    "options", [{}, {"tolerance": 0.05}, {"method": "central"}, {"remainder": "isotropic"}]
)
def test_bounds_hold_at_all_inputs(options):
    guide, data, variance = fitted(**options)
    guide.laplace_approximation(data, (GRID[::10],), **FAR)
    bounds = guide.variance_bounds(GRID, least=0.0)["obs"]
    exact = variance(GRID)[:, None]
    assert bounds.lower.shape == bounds.upper.shape == bounds.variance.shape == (41, 1)
    assert (bounds.lower <= exact * (1 + 1e-9)).all()
    assert (exact <= bounds.upper * (1 + 1e-9)).all()
    assert_close(bounds.variance, guide.linearized_outputs(GRID)["obs"].variance, rtol=1e-9)
    if "remainder" not in options:
        assert (bounds.captured <= bounds.variance / exact * (1 + 1e-6)).all()
        assert (bounds.captured[::10] > 0.9).all()
        assert float(bounds.captured.min()) < 0.9


def test_a_guide_that_misses_most_warns():
    guide, data, _ = fitted()
    guide.laplace_approximation(data, (GRID[20:21],), **FAR)
    with pytest.warns(HFLWarning, match=r"of the variance of \d+ of 41 outputs .* less than 0.5"):
        guide.variance_bounds(GRID)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide.variance_bounds(GRID[20:21])


@pytest.mark.parametrize("tolerance", [None, 0.05])
def test_added_targets_tighten_the_bounds(tolerance):
    guide, data, variance = fitted(tolerance=tolerance)
    guide.laplace_approximation(data, (GRID[::20],), **FAR)
    few = guide.variance_bounds(GRID, least=0.0)["obs"]
    guide.add_targets(data, (GRID[::5],))
    many = guide.variance_bounds(GRID, least=0.0)["obs"]
    exact = variance(GRID)[:, None]
    for bounds in (few, many):
        assert (bounds.lower <= exact * (1 + 1e-9)).all()
        assert (exact <= bounds.upper * (1 + 1e-9)).all()
    # but for the error of images, which is measured: directions that nearly depend on each other enlarge it
    assert (many.upper <= few.upper * (1 + 1e-9 + 4 * float(guide.gap))).all(), guide.gap
    assert float(guide.gap) < 1e-6
    if tolerance is None:  # displacements that are exact span more and more
        assert (many.captured >= few.captured - 1e-6).all()
    certificate = guide.result.certificate
    targets = torch.cat([GRID[::20], GRID[::5]])
    assert (certificate.lower <= variance(targets) * (1 + 1e-9)).all()
    assert (variance(targets) <= certificate.upper * (1 + 1e-9)).all()
    assert len(guide.result.variances) == len(certificate.lower) == len(targets)


@pytest.mark.parametrize("method", ["cg", "central", "probe"])
@pytest.mark.parametrize("before", [False, True])
def test_targets_are_added_until_enough_is_captured(method, before):
    guide, data, variance = fitted(method=method)
    if before:
        guide.laplace_approximation(data, (GRID[20:22],), **FAR)
    guide.cover(data, (GRID,), missed=0.05, batch_size=3, **FAR)
    exact, has = variance(GRID), guide.linearized_outputs(GRID)["obs"].variance.squeeze(-1)
    assert (has >= 0.95 * exact).all()
    assert (has <= exact * (1 + 1e-4)).all()
    assert len(guide.gradients) < 20  # of 41
    summary = str(guide.summary())
    assert "captured at the targets" in summary
    assert "captured at the validation inputs" in summary
    products = guide.result.products
    guide.cover(data, (GRID,), missed=0.05, **FAR)  # nothing to do
    assert guide.result.products == products


def test_cover_takes_the_options_of_solves():
    guide, data, variance = fitted()
    guide.cover(data, (GRID[::10],), correct_gradient=False, preconditioner="nystrom", rank=5, **FAR)
    assert (guide.linearized_outputs(GRID[::10])["obs"].variance[:, 0] >= 0.9 * variance(GRID[::10])).all()
    with pytest.raises(ValueError, match=r"tolerance must be a number above 0 and below 1, found 1.5"):
        guide.cover(data, (GRID,), tolerance=1.5, **FAR)
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1, found 0"):
        guide.cover(data, (GRID,), rank=0, **FAR)


def test_not_enough_targets_are_told():
    guide, data, _ = fitted()
    with pytest.warns(HFLWarning, match="with 2 more targets the guide is certain to have .* not 0.99"):
        guide.cover(data, (GRID,), missed=0.01, max_targets=2, **FAR)
    assert len(guide.gradients) == 2


def test_bounds_are_saved_with_the_guide():
    guide, data, _ = fitted(tolerance=0.05)
    guide.laplace_approximation(data, (GRID[::8],), **FAR)
    expected = guide.variance_bounds(GRID, least=0.0)["obs"]
    other = AutoHessianFreeLaplace(model, curvature="ggn").initialize(*data)
    other.load_state_dict(guide.state_dict())
    found = other.variance_bounds(GRID, least=0.0)["obs"]
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=1e-12)
    other.add_targets(data, (GRID[1::8],))
    assert (other.variance_bounds(GRID, least=0.0)["obs"].upper <= expected.upper * (1 + 1e-9)).all()
    guide.to_point_estimate()
    with pytest.raises(RuntimeError, match="still a point estimate"):
        guide.variance_bounds(GRID)


def test_what_has_no_bounds_says_why():
    guide, data, _ = fitted(robust=True)
    guide.laplace_approximation(data, (GRID[::8],), **FAR)
    with pytest.raises(ValueError, match="the sandwich"):
        guide.variance_bounds(GRID)
    with pytest.raises(ValueError, match="the sandwich"):
        guide.cover(data, (GRID,))
    exact = AutoHessianFreeLaplace(model).initialize(*data)
    exact.polish(data).laplace_approximation(data, (GRID[::8],))
    assert "exact Hessian" in str(exact.summary())
    with pytest.raises(ValueError, match="not certified: the exact Hessian"):
        exact.variance_bounds(GRID)
    with pytest.raises(ValueError, match="not certified: the exact Hessian"):
        exact.cover(data, (GRID,))
    with pytest.raises(ValueError, match="missed must be a number"):
        fitted()[0].cover(data, (GRID,), missed=1.5)


def test_directions_that_are_not_all_kept(monkeypatch):
    from pyro_bnn.infer.hfl import solver

    basis = solver.ConjugateBasis
    monkeypatch.setattr(solver, "ConjugateBasis", lambda p: basis(p, limit=4 * p))
    guide, data, variance = fitted(tolerance=0.02)
    guide.laplace_approximation(data, (GRID[::4],), **FAR)
    bounds = guide.variance_bounds(GRID, least=0.0)["obs"]
    exact = variance(GRID)[:, None]
    assert (bounds.lower <= exact * (1 + 1e-9)).all()
    assert (exact <= bounds.upper * (1 + 1e-9)).all()
    assert float(bounds.captured[::4].min()) > 0.9


def test_targets_of_another_precision_are_refused():
    guide, (x, y), variance = fitted()
    guide.laplace_approximation((x, y), (GRID[:2],), **FAR)
    calls = (
        lambda: guide.add_targets((torch.cat([x, x]), torch.cat([y, y])), (GRID[30:31],), **FAR),
        lambda: guide.add_targets((x, y), (GRID[30:31],), proximal=1.0, **FAR),
        lambda: guide.cover((x[1:], y[1:]), (GRID,), **FAR),
        lambda: guide.cover((x, y), (GRID,), proximal=1.0, **FAR),
    )
    for call in calls:
        with pytest.raises(ValueError, match="the precision is not that of the targets before"):
            call()
    assert guide.gradients.shape[0] == 2  # as it was
    guide.add_targets([(x[:5], y[:5]), (x[5:], y[5:])], (GRID[30:31],), **FAR)  # the same data in parts
    bounds, exact = guide.variance_bounds(GRID, least=0.0)["obs"], variance(GRID)[:, None]
    assert ((bounds.lower <= exact * (1 + 1e-9)) & (exact <= bounds.upper * (1 + 1e-9))).all()
