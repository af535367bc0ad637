# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Latents with a value per row under :func:`fit`: right with all rows, refused in batches. The reference is conjugacy."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)

from pyro_bnn.infer import fit
from pyro_bnn.infer.autoguide import AutoLaplace, AutoMixture
from tests.common import assert_close

Y = 2.0 * torch.arange(8.0, dtype=torch.float64)
EXACT = Y * 100.0 / (100.0 + 0.01)
GUIDES = [AutoNormal, AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoStructured, AutoLaplace]


def declared(y: Any) -> None:
    with pyro.plate("data", 8, subsample_size=len(y)):
        e = pyro.sample("e", dist.Normal(0.0, 10.0))
        pyro.sample("obs", dist.Normal(e, 0.1), obs=y)


def undeclared(y: Any) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        e = pyro.sample("e", dist.Normal(0.0, 10.0))
        pyro.sample("obs", dist.Normal(e, scale), obs=y)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda g: g.__name__)
@pytest.mark.parametrize("model", [declared, undeclared])
def test_batches_are_refused_by_name(guide: Any, model: Any) -> None:
    batches = [(Y[:4],), (Y[4:],)]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(Y), 4)
    other = guide(model) if guide is AutoLaplace else in_list(guide, model)
    for made, data in ((guide(model), batches), (other, loader)):
        with pytest.raises(ValueError, match="site 'e' is latent with a value per row"):
            fit(model, made, data, num_steps=2, progress_bar=False)


def in_list(guide: Any, model: Any) -> Any:
    parts = AutoGuideList(model)
    parts.append(guide(poutine.block(model, expose=["e"])))
    if model is undeclared:
        parts.append(AutoNormal(poutine.block(model, expose=["scale"])))
    return parts


def test_a_part_of_the_rows_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="4 of 8"):
        fit(declared, AutoNormal(declared), (Y[:4],), num_steps=2, progress_bar=False)


@pytest.mark.parametrize(
    "guide",
    [pytest.param(AutoNormal, marks=pytest.mark.slow), AutoDelta, AutoDiagonalNormal],
    ids=lambda g: g.__name__,
)
def test_all_rows_in_one_batch(guide: Any) -> None:
    made = guide(declared)
    fit(declared, made, (Y,), num_steps=1000, optim=0.15, progress_bar=False)
    assert_close(made.median()["e"].detach(), EXACT, atol=0.2, rtol=0.0)


@pytest.mark.parametrize(
    "guide", [pytest.param(AutoNormal, marks=pytest.mark.slow), AutoDelta], ids=lambda g: g.__name__
)
def test_rows_that_the_plate_chooses(guide: Any) -> None:
    """Pyro's own way: the model has all data, and the plate takes some rows."""

    def model(y: Any) -> None:
        with pyro.plate("data", 8, subsample_size=4) as index:
            e = pyro.sample("e", dist.Normal(0.0, 10.0))
            pyro.sample("obs", dist.Normal(e, 0.1), obs=y[index])

    made = guide(model, create_plates=lambda y: pyro.plate("data", 8, subsample_size=4))
    fit(model, made, (Y,), num_steps=1300, optim=0.15, progress_bar=False)
    with pyro.plate("data", 8):
        pass
    found = made.locs.e if guide is AutoNormal else made.e
    assert_close(found.detach(), EXACT, atol=0.3, rtol=0.0)


def test_latents_of_a_table_that_every_batch_holds() -> None:
    """A value per group, with as many groups as there are rows in a batch."""

    def model(index: Any, y: Any) -> None:
        with pyro.plate("group", 4):
            g = pyro.sample("g", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 8, subsample_size=len(y)):
            pyro.sample("obs", dist.Normal(g[index], 0.1), obs=y)

    index = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    guide = AutoNormal(model)
    fit(
        model, guide, [(index[:4], Y[:4]), (index[4:], Y[4:])], num_steps=1000, optim=0.15, progress_bar=False
    )
    assert_close(guide.median()["g"].detach(), torch.full((4,), 7.0), atol=0.3, rtol=0.0)


def test_a_guide_that_looks_at_the_rows() -> None:
    def amortised(y: Any) -> None:
        with pyro.plate("data", 8, subsample_size=len(y)):
            pyro.sample("e", dist.Normal(pyro.param("slope", torch.tensor(0.5)) * y, 0.1))

    fit(declared, amortised, [(Y[:4],), (Y[4:],)], num_steps=500, optim=0.02, progress_bar=False)
    assert_close(pyro.param("slope").detach(), torch.tensor(1.0), atol=0.02, rtol=0.0)


def test_mixtures_refuse_as_before() -> None:
    with pytest.raises(ValueError, match="AutoMixture does not support"):
        fit(declared, AutoMixture(declared, 1), [(Y[:4],), (Y[4:],)], num_steps=2, progress_bar=False)
