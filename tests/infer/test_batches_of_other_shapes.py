# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Batches that differ in more than the number of rows: sequences of other lengths. What has one number per row is joined along
the rows, what has not is refused. The references are plain torch.
"""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from pyro_bnn.diagnostics import to_datatree
from pyro_bnn.infer import posterior_predictive, predictive_moments
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.model.join import Join
from tests.common import assert_close

SHAPES = [((4, 5), (4, 7)), ((5, 4), (3, 7)), ((4, 4), (7, 7))]


def sequences(rows: int | None, event: bool = True) -> Any:
    def model(x: Any, y: Any = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        f = w[..., None] * x if w.dim() else w * x
        size = {"size": len(x)} if rows is None else {"size": rows, "subsample_size": len(x)}
        if event:
            with pyro.plate("data", **size):
                pyro.sample("obs", dist.Normal(f, 0.5).to_event(1), obs=y)
        else:
            with pyro.plate("data", dim=-1, **size), pyro.plate("time", x.shape[1], dim=-2):
                pyro.sample("obs", dist.Normal((w * x).mT, 0.5), obs=None if y is None else y.T)

    return model


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("event", [True, False])
def test_sequences_of_other_lengths_are_refused_by_name(shapes: Any, declared: bool, event: bool) -> None:
    if not event and not declared and shapes[0][0] == shapes[1][0]:
        pytest.skip("the batches are parts of the plate of times")
    model = sequences(sum(n for n, _ in shapes) if declared else None, event)
    loader = [(torch.randn(shape), torch.randn(shape)) for shape in shapes]
    draws = {"w": torch.randn(3)}
    for function in (posterior_predictive, predictive_moments, to_datatree):
        with pytest.raises(ValueError, match=r"site 'obs' (has values of the shapes|is in the plates)"):
            function(model, draws, loader)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("declared", [True, False])
def test_sequences_of_other_lengths_have_one_density_per_row(shapes: Any, declared: bool) -> None:
    rows = sum(n for n, _ in shapes)
    model = sequences(rows if declared else None)
    loader = [(torch.randn(shape), torch.randn(shape)) for shape in shapes]
    w = torch.randn(3)
    join = Join(
        lambda: AutoLaplace(model).initialize(*loader[0]).packed.rows(torch.zeros(1), (loader[0], {}))
    )
    terms = []
    for x, y in loader:
        trace = pyro.poutine.trace(pyro.condition(model, data={"w": w[0]})).get_trace(x, y)
        join.add({"obs": trace.nodes["obs"]})
        terms.append(Normal(w[:, None, None] * x, 0.5).log_prob(y).sum(-1))
    assert_close(join.densities("obs", terms), torch.cat(terms, 1))
    x, y = (torch.cat([batch[i].flatten() for batch in loader]) for i in (0, 1))
    guide = AutoLaplace(model).initialize(*loader[0]).polish(loader).laplace_approximation(loader)
    exact = MultivariateNormal(torch.zeros(len(x)), torch.outer(x, x) + 0.25 * torch.eye(len(x))).log_prob(y)
    assert_close(guide.log_evidence(), exact)


def test_sequences_of_other_lengths_one_by_one() -> None:
    model, w = sequences(8), torch.randn(3)
    for shape in SHAPES[0]:
        x, y = torch.randn(shape), torch.randn(shape)
        terms = Normal(w[:, None, None] * x, 0.5).log_prob(y).sum(-1)
        found = predictive_moments(model, {"w": w}, [(x, y)])["obs"]
        assert_close(found.log_density, terms.logsumexp(0) - math.log(3))


def test_batches_of_two_plates_at_once_are_refused() -> None:
    def model(x: Any, y: Any) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        rows, columns = x.shape[-2:]
        with pyro.plate("row", 4, rows, dim=-2), pyro.plate("column", 6, columns, dim=-1):
            pyro.sample("obs", dist.Normal(w * x, 0.5), obs=y)

    x, y = torch.randn(4, 6), torch.randn(4, 6)
    blocks = [
        (a, b)
        for u, v in zip(x.split(2), y.split(2), strict=True)
        for a, b in zip(u.split(3, 1), v.split(3, 1), strict=True)
    ]
    for function in (posterior_predictive, predictive_moments, to_datatree):
        with pytest.raises(ValueError, match=r"site 'obs' is in the plates \['row', 'column'\]"):
            function(model, {"w": torch.randn(3)}, blocks)
