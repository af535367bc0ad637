# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What is said of precisions that are badly conditioned, flat or indefinite, and of searches that run to an edge."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_bnn.curvature.definite import (
    blame,
    describe,
    expected_error,
    main_sites,
    require_finite_mode,
    require_minimum,
    require_resolved,
)
from pyro_bnn.curvature.dense import DensePart, FullNormal
from pyro_bnn.curvature.diagonal import DiagonalNormal, DiagonalPart
from pyro_bnn.curvature.kronecker import KroneckerNormal
from pyro_bnn.curvature.low_rank import LowRankNormal
from pyro_bnn.curvature.parts import NotAMinimumError
from pyro_bnn.distributions.precision_normal import BlockNormal
from pyro_bnn.infer.hyperparameters import (
    HyperparameterReport,
    HyperparameterWarning,
    warn_of_edges,
    warn_of_runaways,
)
from pyro_bnn.model.latent_space import LatentSpace
from pyro_bnn.ops.krylov import ritz_pairs
from tests.common import assert_close


def sites():
    pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("b", dist.LogNormal(0.0, 1.0))
    pyro.sample("c", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def space():
    return LatentSpace(pyro.poutine.trace(sites).get_trace())


def test_condition_numbers_of_every_structure():
    loc = torch.zeros(2)
    r = 0.8
    full = FullNormal(loc, torch.tensor([[100.0, 10 * r], [10 * r, 1.0]]))  # scales do not count
    assert_close(full.condition_number(), 1 / (1 - r**2), rtol=1e-9)
    assert DiagonalNormal(loc, torch.tensor([1.0, 1e6])).condition_number() == 1.0
    eye = torch.eye(2)
    kron = KroneckerNormal(
        torch.zeros(4), (torch.ones(2), torch.ones(2)), (eye, eye), torch.tensor([[8.0, 2.0], [1.0, 40.0]])
    )
    assert kron.condition_number() == 40.0
    low = LowRankNormal(torch.zeros(3), torch.ones(3), torch.eye(3)[:, :2], torch.tensor([9.0, 3.0]))
    assert low.condition_number() == 10.0  # the rest is the prior
    whole = LowRankNormal(torch.zeros(3), torch.ones(3), torch.eye(3), torch.tensor([9.0, 3.0, 4.0]))
    assert whole.condition_number() == 2.5
    assert whole.condition_number(to_prior=True) == 10.0
    below = LowRankNormal(torch.zeros(3), torch.ones(3), torch.eye(3)[:, :2], torch.tensor([9.0, -0.5]))
    assert below.condition_number() == 20.0
    assert LowRankNormal(loc, torch.ones(2), torch.zeros(2, 0), torch.zeros(0)).condition_number() == 1.0
    parts = BlockNormal(
        torch.zeros(4), [(torch.tensor([0, 1]), full), (torch.tensor([2, 3]), DiagonalNormal(loc, loc + 1))]
    )
    assert_close(parts.condition_number(), 1 / (1 - r**2), rtol=1e-9)
    eps = torch.finfo(torch.float32).eps
    assert_close(expected_error(kron, torch.float32), 10 * 40 * eps, rtol=1e-9)
    rounding = 40.0**0.5 * torch.finfo(torch.float64).eps
    assert_close(
        expected_error(kron, torch.float64), max(400 * torch.finfo(torch.float64).eps, rounding), rtol=1e-9
    )
    assert_close(expected_error(whole, torch.float32), 10 * 10 * eps, rtol=1e-9)
    assert "condition number 40" in describe(kron, 0.123)
    assert "about 12 %" in describe(kron, 0.123)


def test_the_sites_of_a_direction():
    direction = torch.tensor([0.5, 0.5, 0.1, 0.6, 0.2, 0.1])  # shares: a 0.54, b 0.01, c 0.45
    assert main_sites(space(), direction) == ["a", "c"]
    assert main_sites(space(), direction, share=0.001) == ["a", "c", "b"]
    assert main_sites(space(), direction, share=0.001, most=1) == ["a"]
    assert main_sites(space(), 1e-3 * direction, share=0.5) == ["a"]


def test_blame_names_the_direction_of_lowest_curvature():
    index = torch.arange(6)
    curvature = torch.zeros(6, 6)
    curvature[3, 4] = curvature[4, 3] = 2.0  # couples two entries of c beyond their precision
    part = DensePart(index=index, prior=torch.ones(6), curvature=curvature)
    assert blame(space(), [part], 6) == " The curvature is lowest along a direction of the sites ['c']."
    flat = curvature / 2  # exactly singular
    part = DensePart(index=index, prior=torch.ones(6), curvature=flat)
    assert "flat, up to rounding, along a direction of the sites ['c']" in blame(space(), [part], 6)
    part = DensePart(index=index, prior=torch.ones(6), curvature=0.9 * flat)
    assert blame(space(), [part], 6) == ""
    part = DiagonalPart(index=torch.tensor([0, 2]), prior=torch.ones(2), curvature=torch.tensor([1.0, -3.0]))
    assert "sites ['b']" in blame(space(), [part], 6)
    good = DiagonalPart(index=torch.tensor([0, 2]), prior=torch.ones(2), curvature=torch.ones(2))
    assert blame(space(), [good, part], 6) == blame(space(), [part], 6)
    assert blame(space(), [good], 6) == ""
    broken = DensePart(index=index, prior=torch.ones(6), curvature=torch.zeros(6, 6))
    broken.tensors["curvature"][5, 5] = torch.nan
    assert blame(space(), [broken], 6) == ""  # what is not finite is said otherwise


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 64), (torch.float32, 8)])
def test_precisions_that_are_positive_by_rounding_only(dtype, limit):
    eps = torch.finfo(dtype).eps

    def posterior(pivot):
        P = torch.eye(3, dtype=dtype)
        d = FullNormal(torch.zeros(3, dtype=dtype), P)
        d.cholesky = torch.diag(torch.tensor([1.0, 1.0, pivot**0.5], dtype=dtype))
        return d

    index = torch.tensor([0, 2, 4])
    require_resolved(posterior(1.1 * limit * eps), index, space(), 6)
    with pytest.raises(NotAMinimumError, match=r"flat along a direction of the sites \['c'\]"):
        require_resolved(posterior(0.9 * limit * eps), index, space(), 6)
    require_resolved(DiagonalNormal(torch.zeros(3), torch.ones(3)), index, space(), 6)


def test_saddles_that_a_structure_does_not_see():
    P = torch.eye(4)
    P[0, 3] = P[3, 0] = 1.5
    index = torch.tensor([0, 2, 3, 5])
    scale = torch.tensor([1.0, 10.0, 1.0, 0.1])
    whole = P / scale / scale[:, None]
    with pytest.raises(NotAMinimumError, match=r"sites \['[ac]', '[ac]'\] the curvature is -0.5 times"):
        require_minimum(lambda v: v @ whole, scale, index, space(), 6)
    P[0, 3] = P[3, 0] = 0.99
    whole = P / scale / scale[:, None]
    require_minimum(lambda v: v @ whole, scale, index, space(), 6)
    P[0, 3] = P[3, 0] = 1.0
    whole = P / scale / scale[:, None]
    require_minimum(lambda v: v @ whole, scale, index, space(), 6)  # flat is no saddle


def test_searches_that_run_to_the_edge_of_a_support():
    start = torch.zeros(6)
    point = torch.tensor([100.0, -300.0, -24.0, 0.0, 0.0, 500.0])
    require_finite_mode(space(), start, point)  # real sites may be anywhere
    point[2] = -26.0
    with pytest.raises(
        NotAMinimumError, match=r"site 'b' runs off .*unconstrained value -26, smallest value 5.11e-12"
    ):
        require_finite_mode(space(), start, point)
    start[2] = -14.0
    require_finite_mode(space(), start, point)  # it began far away
    point[1] = torch.nan
    with pytest.raises(NotAMinimumError, match="site 'a' ran off to values that are not finite"):
        require_finite_mode(space(), start, point)


@pytest.mark.parametrize(
    ("tau", "candidates", "text"),
    [
        (1.0, [0.1, 1.0, 10.0], None),
        (10.0, [0.1, 1.0, 10.0], "'all': 10, the largest"),
        (0.1, [10.0, 1.0, 0.1], "'all': 0.1, the smallest"),
        (10.0, [1.0, 10.0], None),
    ],
)
def test_the_edges_of_a_grid(tau, candidates, text):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn_of_edges(HyperparameterReport({"all": tau}, [0.0]), candidates)
    assert len(seen) == (text is not None)
    if text is not None:
        assert seen[0].category is HyperparameterWarning
        assert text in str(seen[0].message)


@pytest.mark.parametrize(
    ("tau", "bend", "warned"),
    [
        (1.0, -1.0, False),
        (1.0, -0.011, False),
        (1.0, -0.009, True),
        (1.0, 0.5, True),
        (1.0, None, False),
        (1e-8, -1.0, True),
        (1.1e-8, -1.0, False),
        (1e8, None, True),
        (0.9e8, -1.0, False),
    ],
)
def test_evidences_without_a_maximum(tau, bend, warned):
    report = HyperparameterReport({"first": 1.0, "second": tau}, [1.0, 3.5])
    bends = None if bend is None else [-1.0, bend]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn_of_runaways(report, bends)
    assert len(seen) == warned
    if warned:
        assert "of 'second': " in str(seen[0].message)
        assert "gain over tau = 1: 2.5 nats" in str(seen[0].message)


@pytest.mark.parametrize("steps", [3, 8, 100])
def test_ritz_pairs(steps):
    A = torch.randn(8, 8)
    P = A + A.mT
    values, vectors = ritz_pairs(lambda v: v @ P, P[0], steps=steps)
    n = min(steps, 8)
    assert values.shape == (n,)
    assert vectors.shape == (n, 8)
    assert_close(vectors @ vectors.mT, torch.eye(n), rtol=0, atol=1e-9)
    assert_close((vectors @ P * vectors).sum(-1), values, rtol=1e-8, atol=1e-9)
    assert bool((values[1:] >= values[:-1]).all())
    exact = torch.linalg.eigvalsh(P)
    if n == 8:
        assert_close(values, exact, rtol=1e-8, atol=1e-9)
    else:
        assert exact[0] <= values[0]
        assert values[-1] <= exact[-1]
    assert math.isfinite(float(values.sum()))
