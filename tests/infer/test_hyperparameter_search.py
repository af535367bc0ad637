# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Which entries share a multiplier, the search over candidates, and where its ends are said."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_bnn.curvature.dense import DensePart
from pyro_bnn.curvature.diagonal import DiagonalPart
from pyro_bnn.curvature.guard import _shows
from pyro_bnn.curvature.selection import largest
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.infer.hyperparameters import (
    LIMIT,
    Groups,
    HyperparameterReport,
    HyperparameterWarning,
    search,
    warn_of_edges,
    warn_of_runaways,
)

SLICES = {"a.w": slice(0, 3), "a.b": slice(3, 5), "c": slice(5, 6)}


def warned(call, *args):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = call(*args)
    assert all(w.category is HyperparameterWarning for w in found)
    return result, [str(w.message) for w in found]


def test_entries_of_groups():
    loc, tau = torch.zeros(6), torch.tensor([2.0, 3.0, 5.0])
    whole = Groups(SLICES, loc, None, "global")
    assert len(whole) == 1
    assert whole.expand(tau[:1]).shape == ()
    layers = Groups(SLICES, loc, None, "layer")
    assert list(layers.masks) == ["a", "c"]
    assert layers.expand(tau[:2]).tolist() == [2.0] * 5 + [3.0]
    sites = Groups(SLICES, loc, None, "site")
    assert sites.expand(tau).tolist() == [2.0] * 3 + [3.0] * 2 + [5.0]
    active = torch.tensor([True, False, True, False, False, True])
    some = Groups(SLICES, loc, active, "site")
    assert list(some.masks) == ["a.w", "c"]
    assert some.expand(tau[:2]).tolist() == [2.0, 1.0, 2.0, 1.0, 1.0, 3.0]
    assert some.found(HyperparameterReport({"a.w": 2.0, "c": 3.0}, [])).tolist() == [
        2.0,
        1.0,
        2.0,
        1.0,
        1.0,
        3.0,
    ]


def test_parts_of_groups():
    sites = Groups(SLICES, torch.zeros(6), None, "site")

    def diagonal(*index):
        at = torch.tensor(index)
        return DiagonalPart(index=at, prior=1.0 + at, curvature=10.0 * at)

    first, second = diagonal(0, 1, 2), diagonal(3, 5)
    split = sites.split([first, second])
    assert split[0] == [first]
    assert [p.tensors["curvature"].tolist() for p in split[1]] == [[30.0]]
    assert [p.tensors["prior"].tolist() for p in split[2]] == [[6.0]]
    dense = DensePart(index=torch.tensor([2, 3]), prior=torch.ones(2), curvature=torch.eye(2))
    assert sites.split([first, dense]) is None
    assert Groups(SLICES, torch.zeros(6), None, "layer").split([dense]) == [[dense], []]
    assert Groups(SLICES, torch.zeros(6), None, "global").split([dense, first]) == [[dense, first]]


def test_a_search_goes_through_the_groups_until_nothing_changes():
    groups = Groups({"a": slice(0, 1), "b": slice(1, 2)}, torch.zeros(2), None, "site")
    candidates, asked = [0.1, 1.0, 10.0, 100.0], []

    def score(tau):
        a, b = tau.log10().tolist()
        asked.append((a, b))
        return -2 * (a - 1) ** 2 - (b - a) ** 2

    report, said = warned(search, groups, candidates, score)
    assert report.tau == pytest.approx({"a": 10.0, "b": 10.0})
    assert not said
    # a and then b move in the first round, nothing does in the second
    assert len(report.objective) == len(asked) == 2 * 2 * 4
    assert max(report.objective) == pytest.approx(0.0, abs=1e-12)
    one = Groups({"a": slice(0, 1)}, torch.zeros(1), None, "global")
    asked.clear()
    report, _ = warned(
        search, one, candidates, lambda tau: (asked.append(tau), -float((tau.log10() - 1) ** 2))[1]
    )
    assert len(asked) == 4
    with pytest.raises(ValueError, match="candidates is empty"):
        search(groups, [], score)


@pytest.mark.parametrize(
    ("tau", "candidates", "words"),
    [
        (0.1, [0.1, 1.0, 10.0], "the smallest"),
        (10.0, [10.0, 1.0, 0.1], "the largest"),
        (10.0 * (1 - 1e-7), [0.1, 1.0, 10.0], "the largest"),
        (1.0, [0.1, 1.0, 10.0], ""),
        (10.0 * (1 - 1e-5), [0.1, 1.0, 10.0], ""),
        (0.1 * (1 + 1e-5), [0.1, 1.0, 10.0], ""),
        (0.1, [0.1, 1.0], ""),
    ],
)
def test_ends_of_candidates_are_said(tau, candidates, words):
    _, said = warned(warn_of_edges, HyperparameterReport({"all": tau}, [1.0]), candidates)
    assert len(said) == bool(words)
    assert all(words in text for text in said)


@pytest.mark.parametrize(
    ("tau", "bends", "is_said"),
    [
        (1.0, [-1.0], False),
        (1.0, None, False),
        (1.0, [-0.0101], False),
        (1.0, [-0.0099], True),
        (1.0, [float("nan")], True),
        (1.1e-8, [-1.0], False),
        (1.0005e-8, None, True),
        (0.9e8, None, False),
        (0.9995e8, [-1.0], True),
        (float(torch.tensor(LIMIT).exp()), None, True),
        (float(torch.tensor(-LIMIT).exp()), None, True),
    ],
)
def test_an_evidence_without_a_maximum_is_said(tau, bends, is_said):
    _, said = warned(warn_of_runaways, HyperparameterReport({"all": tau}, [-5.0, -3.5]), bends)
    assert len(said) == is_said
    assert all("gain over tau = 1: 1.5 nats" in text for text in said)


def test_the_largest_of_some():
    values = torch.tensor([3.0, 1.0, -2.0, 5.0])
    assert largest(values, 2, None).tolist() == [True, False, False, True]
    assert largest(values, 9, None).tolist() == [True] * 4
    within = torch.tensor([True, True, True, False])
    assert largest(values, 2, within).tolist() == [True, True, False, False]
    assert largest(values, 4, within).tolist() == [True, True, True, False]


def test_scores_that_show_half_of_the_examples():
    score = torch.tensor([[1.0, 0.0], [0.0, -2.0], [0.0, 0.0], [0.0, 0.0]])
    assert _shows(score, 1e-16)
    assert not _shows(score[1:], 1e-16)
    assert not _shows(torch.cat([score, 0 * score[:1]]), 1e-16)
    for small, eps, seen in (
        (3e-13, 1e-16, True),
        (1e-13, 1e-16, False),
        (3e-3, 1e-3, True),
        (1e-3, 1e-3, False),
    ):
        assert _shows(torch.tensor([[2.0], [small], [0.0], [0.0]]), eps) is seen


def test_a_joint_search_says_that_it_ran_off():
    """Sites that are coupled are searched together; one that sits at its prior mean has no best multiplier."""
    x = torch.randn(12, 2)

    def model(x, y=None):
        a, b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "ab")
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x[:, 0] * a + x[:, 1] * b, 0.5), obs=y)

    y = x @ torch.tensor([2.0, 0.0])
    guide = AutoLaplace(model).initialize(x, y)
    guide.loc.data = torch.tensor([2.0, 0.0])
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    with pytest.warns(HyperparameterWarning, match="no maximum in the multiplier .* of 'b'"):
        report = guide.optimize_hyperparameters(per="site")
    assert report.tau["a"] < 1 < 1e6 < report.tau["b"]
