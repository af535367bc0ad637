# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What batches estimate, against derivatives of the log density written in plain torch."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from pyro_bnn.infer.sample.log_density import evaluator_of
from pyro_bnn.infer.sample.minibatches import Estimator, Minibatches, Stream
from pyro_bnn.model.data import Batches
from tests.common import assert_close
from tests.infer.models import linear_data, linear_model

Density = Callable[[Tensor], Tensor]


def cut(model: Any, data: Any, size: int | None, order: Any = "forward") -> Minibatches:
    batches = Batches(data)
    return Minibatches(evaluator_of(model, batches.first), batches, size, order)


def surveyed(model: Any, data: Any, size: int | None, order: Any = "forward") -> Minibatches:
    found = cut(model, data, size, order)
    point = torch.full((found.packed.space.dim,), 0.3)
    found.check_unbiased(point, *found.survey(point))
    return found


def model_with_terms(x: Tensor, y: Tensor | None = None) -> None:
    """A positive latent, a factor and an observation outside of the plate of the data, a scale, a mask."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    pyro.factor("soft constraint", -w.square().sum())
    pyro.sample("total", dist.Normal(w.sum(), 0.1), obs=torch.tensor(1.0))
    with pyro.plate("data", 7, subsample_size=len(x)), pyro.poutine.scale(scale=0.5):
        pyro.sample("obs", dist.Normal(x @ w, sigma).mask(x[:, 0] > -0.5), obs=y)


def plain_density(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    """The log density of the model with the terms at u = (w, log sigma), without Pyro's statements."""
    w, sigma = u[:2], u[2].exp()
    normal = torch.distributions.Normal
    prior = normal(0.0, 1.0).log_prob(u).sum()  # of log sigma with the Jacobian
    once = -w.square().sum() + normal(w.sum(), 0.1).log_prob(torch.tensor(1.0))
    rows = 0.5 * normal(x @ w, sigma).log_prob(y)[x[:, 0] > -0.5].sum()
    return prior + once + rows


def data_of_terms() -> tuple[Tensor, Tensor]:
    return torch.randn(7, 2), torch.randn(7)


@pytest.mark.parametrize("form", ["rows", "loader"])
def test_the_mean_of_a_pass_is_the_gradient_of_all_data(form: str) -> None:
    """Batches of 3, 3 and 1 row: terms outside of the plate count once, whatever the weight of the rows."""
    x, y = data_of_terms()
    data: Any = (x, y) if form == "rows" else DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)
    found = surveyed(model_with_terms, data, 3 if form == "rows" else None)
    assert found.number == 3
    assert found.once == {"soft constraint", "total"}
    u = torch.randn(2, 3, requires_grad=True)
    expected = torch.stack([plain_density(x, y, row) for row in u])
    (gradient,) = torch.autograd.grad(expected.sum(), u)
    estimate = Estimator(found.evaluator, found.once)
    results = [(w, *estimate(u, w)) for w in found.one_pass()]
    assert_close(torch.stack([v for _, v, _ in results]).mean(0), expected.detach(), rtol=1e-12)
    assert_close(torch.stack([g for _, _, g in results]).mean(0), gradient, rtol=1e-11)
    for w, value, _ in results:  # one by one: the rows of the batch three times
        rows = [plain_density(*w.batch[0], row) for row in u]
        rest = [plain_density(x[:0], y[:0], row) for row in u]
        assert_close(value, torch.stack([3 * a - 2 * b for a, b in zip(rows, rest, strict=True)]).detach())


def test_random_rows_are_unbiased() -> None:
    """The average over random batches, within five standard errors, and no row twice in one."""
    x, y = data_of_terms()
    found = surveyed(model_with_terms, (x, y), 2, "independent")
    u = torch.randn(1, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(plain_density(x, y, u[0]), u)
    estimate = Estimator(found.evaluator, found.once)
    draws = []
    for given in islice(Stream(found.one_pass, [], keeps=False), 400):
        assert given.weight == 3.5
        assert len(given.batch[0][0].unique(dim=0)) == 2
        draws.append(estimate(u, given)[1])
    found_mean, error = torch.cat(draws).mean(0), torch.cat(draws).std(0) / 20
    assert bool(((found_mean - expected[0]).abs() < 5 * error + 1e-12).all())


@pytest.mark.parametrize("form", ["rows", "loader"])
def test_symmetric_passes_are_palindromes(form: str) -> None:
    x, y = linear_data(7)
    data: Any = (x, y) if form == "rows" else DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True)
    found = surveyed(linear_model, data, 2 if form == "rows" else None, "symmetric")
    first, second = ([w.batch[0][1] for w in found.one_pass()] for _ in range(2))
    assert len(first) == 8
    for left, right in zip(first, first[::-1], strict=True):
        assert_close(left, right)
    assert_close(torch.cat(first[:4]).sort().values, y.sort().values)  # all rows, each once
    assert not all(map(torch.equal, first, second))  # another order


def test_a_table_that_every_batch_holds_counts_once() -> None:
    def model(table: Tensor, x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", len(table)):
            pyro.sample("table", dist.Normal(z, 1.0), obs=table)
        with pyro.plate("data", 6, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal(z, 2.0), obs=x)

    table, x = torch.randn(4), torch.randn(6)
    z = torch.tensor([[0.4]])
    expected = -z[0] + (table - z[0]).sum() + (x - z[0]).sum() / 4
    for data in ([(table, part) for part in x.split(4)], [(table, part) for part in x.split(1)]):
        found = surveyed(model, data, None)
        assert found.once == {"table"}
        estimate = Estimator(found.evaluator, found.once)
        assert_close(torch.stack([estimate(z, w)[1][0] for w in found.one_pass()]).mean(0), expected)


def test_rows_that_interact_are_refused() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(z * x.mean(), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"rows cannot be taken apart.*'obs' depends on which rows"):
        surveyed(model, torch.randn(8), 2)


def test_rows_that_interact_from_afar_are_refused() -> None:
    """Only many rows together interact: the check of all data sees it."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(z * (1 + (len(x) > 10)), 1.0), obs=x)

    with pytest.raises(ValueError, match="do not estimate the log density without bias"):
        surveyed(model, torch.randn(24), 4)


def test_local_latents_are_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="Latent site 'z' lies in a plate: if it has a value per row"):
        surveyed(model, torch.randn(8), 2)


def test_batches_that_do_not_cover_the_plate_are_refused() -> None:
    x, y = data_of_terms()
    with pytest.raises(ValueError, match="cover 6 of the 7 elements of plate 'data'"):
        surveyed(model_with_terms, DataLoader(TensorDataset(x, y), batch_size=3, drop_last=True), None)
    with pytest.raises(ValueError, match="cover 5 of the 7 elements of plate 'data'"):
        surveyed(model_with_terms, (x[:5], y[:5]), 2)


@pytest.mark.parametrize("options", [{"drop_last": True, "shuffle": True}, {"sampler": "replacement"}])
def test_passes_that_hold_other_rows_are_refused(options: dict[str, Any]) -> None:
    data = TensorDataset(*linear_data(7))
    if "sampler" in options:
        options = {"sampler": RandomSampler(data, replacement=True)}
    with pytest.raises(ValueError, match="passes of the loader hold other rows"):
        surveyed(linear_model, DataLoader(data, batch_size=3, **options), None)


def test_a_term_that_only_some_batches_repeat_is_refused() -> None:
    def model(x: Tensor, extra: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("extra", -extra * z.square())
        with pyro.plate("data", 6, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(6)
    data = [(part, torch.tensor(e)) for part, e in zip(x.split(2), (1.0, 1.0, 2.0), strict=True)]
    with pytest.raises(ValueError, match="site 'extra' is the same in 2 of 3 batches"):
        surveyed(model, data, None)


def test_sizes_and_orders_that_do_not_fit_are_refused() -> None:
    x, y = linear_data(7)
    with pytest.raises(ValueError, match="batch_size=8 is more than the 7 rows"):
        surveyed(linear_model, (x, y), 8)
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, found 0"):
        cut(linear_model, (x, y), 0)
    with pytest.raises(ValueError, match="batch_size=2 cuts data that are one batch"):
        cut(linear_model, [(x, y), (x, y)], 2)
    with pytest.raises(ValueError, match="order='independent' draws rows at random"):
        cut(linear_model, [(x, y), (x, y)], None, "independent")
    with pytest.raises(ValueError, match="order must be 'symmetric', 'forward' or 'independent'"):
        cut(linear_model, (x, y), 2, "backward")


def test_another_number_of_batches_is_refused() -> None:
    x, y = linear_data(6)
    data = [(x[:3], y[:3]), (x[3:], y[3:])]
    found = surveyed(linear_model, data, None)
    data.append((x[:3], y[:3]))
    with pytest.raises(ValueError, match="had 2 batches in the first pass and 3 in a later one"):
        list(found.one_pass())


@pytest.mark.parametrize("order", ["symmetric", "forward", "independent"])
@pytest.mark.parametrize("stop", [1, 4, 7, 8, 9])
def test_a_stream_goes_on_where_another_stopped(order: Any, stop: int) -> None:
    """Rows in passes of 4 batches, random numbers drawn between them."""
    found = cut(linear_model, linear_data(7), 2, order)
    found.survey(torch.zeros(3))

    def read(stream: Stream, number: int) -> list[Tensor]:
        return [w.batch[0][1] + torch.randn(()) for w in islice(stream, number)]

    torch.manual_seed(1)
    keeps = order != "independent"
    stream = Stream(found.one_pass, [], keeps=keeps)
    whole = read(stream, 20)
    torch.manual_seed(1)
    stream = Stream(found.one_pass, [], keeps=keeps)
    read(stream, stop)
    state = stream.state()
    torch.randn(5)
    resumed = Stream(found.one_pass, [], keeps=keeps)
    resumed.load(state)
    for a, b in zip(read(resumed, 20 - stop), whole[stop:], strict=True):
        assert torch.equal(a, b)
