# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What two processes agree on is what one with all the data has; here both run in one, from message to message."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_bnn.curvature.accumulate import CurvatureAccumulator
from pyro_bnn.infer import hfl
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.infer.evidence import differentiable_evidence
from pyro_bnn.ops import distributed
from pyro_bnn.ops.newton import hessian_operator, newton_cg, value_and_gradient
from tests.common import assert_close
from tests.infer.models import NOISE, linear_data


class Message(BaseException):
    """A process waits for the other one."""

    def __init__(self, value: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.value, self.combine = value, combine


class World:
    """
    In the place of :mod:`torch.distributed`. A process runs from its start to the first message that both do not have yet; then
    both begin again and read it.
    """

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self) -> None:
        self.rank, self.at, self.agreed = 0, 0, []  # type: int, int, list[Tensor]

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def get_world_size(self) -> int:
        return 2

    def get_rank(self) -> int:
        return self.rank

    def get_backend(self) -> str:
        return "gloo"

    def all_reduce(self, tensor: Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> None:
        self._meet(tensor, torch.add if op == torch.distributed.ReduceOp.SUM else torch.maximum)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        self._meet(tensor, lambda first, second: (first, second)[source])

    def _meet(self, tensor: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        if self.at == len(self.agreed):
            raise Message(tensor.clone(), combine)
        tensor.copy_(self.agreed[self.at])
        self.at += 1

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """The results of both processes."""
        while True:
            results, waiting = [], []
            for self.rank in range(2):
                self.at = 0
                pyro.set_rng_seed(self.rank)
                try:
                    results.append(function(self.rank))
                except Message as message:
                    waiting.append(message)
            if not waiting:
                return results
            first, second = waiting
            self.agreed.append(first.combine(first.value, second.value))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    found = World()
    monkeypatch.setattr(distributed, "td", found)
    return found


SCALE = 0.7
#: Of unequal size.
PARTS = (slice(0, 9), slice(9, 24))


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    return linear_data(24)


def part(rank: int) -> tuple[Tensor, Tensor]:
    x, y = data()
    return x[PARTS[rank]], y[PARTS[rank]]


class Model(PyroModule):
    """Linear regression with a parameter: the standard deviation of the prior."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(SCALE))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), self.scale).to_event(1))
        with pyro.plate("data", 24, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal((x * weight).sum(-1), NOISE), obs=y)


def posterior() -> tuple[Tensor, Tensor]:
    """The mean and covariance in closed form."""
    x, y = data()
    covariance = torch.linalg.inv(torch.eye(3) / SCALE**2 + x.mT @ x / NOISE**2)
    return covariance @ x.mT @ y / NOISE**2, covariance


def evidence(scale: Tensor) -> Tensor:
    x, y = data()
    covariance = NOISE**2 * torch.eye(24) + scale**2 * x @ x.mT
    return torch.distributions.MultivariateNormal(torch.zeros(24), covariance).log_prob(y)


def guide_at_the_mode(process: int, model: Model | None = None, **options: Any) -> AutoLaplace:
    guide = AutoLaplace(model or Model(), **options).initialize(*part(process))
    with torch.no_grad():
        guide.loc.copy_(posterior()[0])
    return guide


def test_sums_of_terms(world: World) -> None:
    """Value, gradient, products with the Hessian, and the minimum that both processes walk to."""
    factors = torch.tensor([[1.0, 2.0], [3.0, 0.5]])

    def terms(rank: int) -> Callable[[Tensor], list[Tensor]]:
        return lambda u: [(factors[rank] * (u - rank).square()).sum(), torch.zeros(())]

    start = torch.tensor([2.0, -1.0])
    expected = sum((factors[r] * (start - r).square()).sum() for r in range(2))
    for value, gradient in world.run(lambda rank: value_and_gradient(terms(rank), start)):
        assert_close(value, expected)
        assert_close(gradient, sum(2 * factors[r] * (start - r) for r in range(2)))
    for keep in (True, False):
        world.agreed.clear()
        products = world.run(
            lambda rank, keep=keep: hessian_operator(terms(rank), start, keep_graphs=keep)(torch.eye(2))
        )
        for found in products:
            assert_close(found, torch.diag(2 * factors.sum(0)))
    world.agreed.clear()
    for result in world.run(lambda rank: newton_cg(terms(rank), start, tolerance=1e-9)):
        assert_close(result.point, factors[1] / factors.sum(0), rtol=1e-6)


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
@pytest.mark.parametrize("what", ["matrix", "diagonal", "products", "products by batches"])
def test_curvature_has_the_likelihood_of_both_and_one_prior(world: World, kind: Any, what: str) -> None:
    def found(rank: int) -> Tensor:
        guide = guide_at_the_mode(rank, curvature=kind)
        accumulator = CurvatureAccumulator(guide.packed, guide.loc, kind)
        if what in ("matrix", "diagonal"):
            return getattr(accumulator, what)(part(rank))
        batches = [(a[None], b[None]) for a, b in zip(*part(rank), strict=True)]
        return accumulator.operator(part(rank) if what == "products" else batches)(torch.eye(3))

    precision = torch.linalg.inv(posterior()[1])
    for value in world.run(found):
        assert_close(value, precision.diagonal() if what == "diagonal" else precision, rtol=1e-9)


@pytest.mark.parametrize(
    ("structure", "curvature"), [("full", "ggn"), ("full", "hessian"), ("low_rank", "ggn")]
)
def test_laplace_approximation(world: World, structure: str, curvature: str) -> None:
    """The covariance and the evidence of all the data, and the gradient of the latter in the scale of the prior."""

    def found(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        model, options = Model(), {"structure": structure, "curvature": curvature, "rank": 3}
        guide = guide_at_the_mode(rank, model, **options)
        guide.laplace_approximation(part(rank))
        covariance = guide.posterior.quadratic_form(torch.eye(3))
        if structure == "low_rank":
            return covariance, guide.log_evidence().detach(), torch.zeros(())
        value = differentiable_evidence(guide, part(rank))
        (slope,) = torch.autograd.grad(value, model.scale)
        return covariance, value.detach(), slope

    scale = torch.tensor(SCALE, requires_grad=True)
    expected = evidence(scale)
    (slope,) = torch.autograd.grad(expected, scale)
    for covariance, value, derivative in world.run(found):
        assert_close(covariance, posterior()[1], rtol=1e-6, atol=1e-9)
        assert_close(value, expected.detach(), rtol=1e-7)
        if structure != "low_rank":
            assert_close(derivative, slope, rtol=1e-6)


def test_structures_whose_terms_do_not_add_up_are_refused(world: World) -> None:
    def found(rank: int) -> None:
        guide_at_the_mode(rank, structure="nystrom", rank=3).laplace_approximation(part(rank))

    with pytest.raises(ValueError, match="does not add up over processes"):
        world.run(found)


@pytest.mark.parametrize(("method", "curvature"), [("cg", "ggn"), ("cg", "hessian"), ("central", "ggn")])
def test_hessian_free_solves(world: World, method: str, curvature: str) -> None:
    """Variances, and the sandwich, of functionals with the data of both and one prior."""
    targets = torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, -1.0]])

    def found(rank: int) -> hfl.HFLResult:
        options: Any = {"check": False} if method == "central" else {"robust": True}
        guide = guide_at_the_mode(rank)
        return hfl.solve(
            guide, part(rank), (targets,), method=method, curvature=curvature, tolerance=1e-10, **options
        )

    mean, covariance = posterior()
    x, y = data()
    scores = x * ((y - x @ mean) / NOISE**2)[:, None]
    for result in world.run(found):
        assert_close(result.variances, (targets @ covariance * targets).sum(-1), rtol=1e-6)
        if method == "cg":
            half = targets @ covariance @ scores.mT
            assert_close(result.sandwich, half @ half.mT, rtol=1e-6)


def test_the_score_is_that_of_the_outputs_of_both(world: World) -> None:
    targets = torch.tensor([[1.0, 2.0, -1.0]])

    def found(rank: int) -> Tensor:
        guide = guide_at_the_mode(rank)
        return hfl.regvar(guide, part(rank), (targets,), calibrate=0, num_epochs=None, tolerance=1e-10).score

    mean, covariance = posterior()
    x, _ = data()
    slope = ((x @ mean).sign()[:, None] * x).mean(0)
    for score in world.run(found):
        assert_close(score, (targets @ covariance @ slope).abs(), rtol=1e-6)


def test_kronecker_factors_add_up(world: World) -> None:
    """Sums of outer products of inputs and of gradients over both, the former over the number of all rows."""

    def classes(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        with pyro.plate("data", 24, subsample_size=len(x)):
            pyro.sample("obs", dist.Categorical(logits=torch.nn.functional.linear(x, w)), obs=y)

    x, _ = data()
    y = (x[:, 0] > 0).long()
    point = 0.3 * torch.arange(6.0) - 1

    def found(rank: int) -> Tensor:
        mine = x[PARTS[rank]], y[PARTS[rank]]
        guide = AutoLaplace(classes, structure="kronecker").initialize(*mine)
        guide.loc.data = point.clone()
        guide.laplace_approximation(mine, map_tolerance=float("inf"))
        return guide.posterior.multiply(torch.eye(6))

    p = torch.softmax(x @ point.reshape(2, 3).mT, -1)
    G = torch.diag(p.sum(0)) - p.mT @ p
    for precision in world.run(found):
        assert_close(precision, torch.kron(G, x.mT @ x / 24) + torch.eye(6), rtol=1e-9, atol=1e-12)
