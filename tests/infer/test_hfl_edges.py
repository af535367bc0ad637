# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Hessian-free Laplace where something is zero: the curvature of a prior, the variance of a functional."""

import copy
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_bnn.curvature.diagonal import DiagonalNormal
from pyro_bnn.infer import hfl
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.infer.hfl.low_rank import low_rank_factor, unit_scale
from pyro_bnn.infer.hfl.nystrom import inverse_root
from pyro_bnn.infer.hfl.paired import _descend, fine_tune
from pyro_bnn.infer.hfl.setup import set_up
from pyro_bnn.infer.hfl.solver import Solver
from tests.common import assert_close

NOISE = 0.5


@pytest.fixture(scope="module")
def flat():
    """A linear model with a flat prior at its mode: the guide, the data and the covariance."""
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    x, y = torch.randn(20, 3), torch.randn(20)

    def model(x, y=None):
        w = pyro.sample("w", dist.ImproperUniform(dist.constraints.real_vector, (), (3,)))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ w, NOISE), obs=y)

    guide = AutoLaplace(model).initialize(x, y)
    guide.loc.data.copy_(torch.linalg.lstsq(x, y[:, None]).solution[:, 0])
    return guide, (x, y), NOISE**2 * torch.linalg.inv(x.mT @ x)


@pytest.mark.parametrize("preconditioner", ["prior", "nystrom", "diagonal"])
def test_preconditioners_of_models_with_flat_priors(flat, preconditioner):
    guide, data, covariance = flat
    targets = torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, -1.0]])
    result = hfl.solve(guide, data, (targets,), preconditioner=preconditioner, tolerance=1e-10)
    assert_close(result.variances, (targets @ covariance * targets).sum(-1), rtol=1e-8)


def test_inverse_roots_are_those_of_the_pseudo_inverse():
    half = torch.randn(5, 2) * torch.tensor([1e-3, 1.0, 1e3, 1.0, 1.0])[:, None]
    half[3] = 0.0
    gram = half @ half.mT
    root = inverse_root(gram)
    assert root.shape == (5, 2)
    assert bool(root.isfinite().all())
    assert (root[3] == 0).all()
    # whatever the scales: G R R' G = G
    scale = gram.diagonal().clamp(min=1e-300).sqrt()
    assert_close(
        gram @ root @ root.mT @ gram / scale / scale[:, None], gram / scale / scale[:, None], atol=1e-9
    )


def test_a_functional_without_variance_has_none_under_the_low_rank_guide():
    J, D = torch.randn(4, 6), torch.randn(4, 6)
    P = torch.randn(6, 6)
    P = P @ P.mT + torch.eye(6)
    J[2] = 0.0
    D = torch.linalg.solve(P, J.mT).mT
    C = J @ D.mT
    sd = unit_scale(C.diagonal())
    assert_close(sd[2], 1.0)
    W = low_rank_factor(J / sd[:, None], D / sd[:, None], C / sd / sd[:, None], 0.0)
    assert W.shape == (6, 3)
    assert_close(J @ W @ W.mT @ J.mT, C, atol=1e-9)
    more = torch.randn(9, 6)  # more functionals than latents
    DD = torch.linalg.solve(P, more.mT).mT
    W = low_rank_factor(more, DD, more @ DD.mT, 0.0)
    assert_close(W @ W.mT, torch.linalg.inv(P), rtol=1e-7, atol=1e-10)
    # what the responses do not resolve is left out
    assert low_rank_factor(J, D, C, 2 * float(torch.linalg.matrix_norm(C, 2))).shape == (6, 0)


def test_a_run_at_the_minimum_stays_there(flat):
    """Without a push, with all data in one batch, whatever the number of rounds."""
    guide, data, _ = flat
    problem, _ = set_up(guide, data, (torch.eye(3),), None, "ggn", chunk_size=256)
    solver = Solver(problem, tolerance=1e-8)
    for rounds in (1, 2):
        offsets = fine_tune(
            problem, solver, 2, lambda o, batch: torch.zeros_like(o), num_epochs=6, rounds=rounds
        )
        assert_close(offsets, torch.zeros(2, 3), atol=1e-12)


def test_a_push_moves_the_minimum_by_the_inverse_curvature(flat):
    guide, (x, y), covariance = flat
    batches = [(x[i::4], y[i::4]) for i in range(4)]
    problem, _ = set_up(guide, batches, (torch.eye(3),), None, "ggn", chunk_size=256)
    solver = Solver(problem, tolerance=1e-8)
    push = torch.tensor([[1.0, 0.0, -2.0], [0.0, 3.0, 0.5]])
    offsets = fine_tune(problem, solver, 2, lambda o, batch: push, num_epochs=60, rounds=3)
    expected = -push @ covariance
    assert_close(offsets, expected, rtol=0, atol=0.01 * float(expected.abs().max()))


def test_the_residual_is_the_worst_and_curvatures_are_those_met(flat):
    guide, data, covariance = flat
    problem, _ = set_up(guide, data, (torch.eye(3),), None, "ggn", chunk_size=256)
    P, rhs = torch.linalg.inv(covariance), torch.randn(3, 3)
    rhs[1] = 0.0
    solver = Solver(problem, tolerance=1e-12, max_iter=1, block_size=2)
    found = solver(rhs)
    left = (rhs - found @ P).norm(dim=-1) / rhs.norm(dim=-1).clamp(min=1e-300)
    assert left.max() > 1e-3
    assert_close(solver.residual, left.max(), rtol=1e-6)
    values = torch.linalg.eigvalsh(P)
    assert values[0] * (1 - 1e-9) <= solver.smallest_curvature <= solver.largest_curvature
    assert solver.largest_curvature <= values[-1] * (1 + 1e-9)
    whole = Solver(problem, tolerance=1e-10)
    assert_close(whole(torch.eye(3)), covariance, rtol=1e-8, atol=1e-12)
    assert whole.products == 3
    assert_close(whole.smallest_curvature, values[0], rtol=1e-6)
    assert_close(whole.largest_curvature, values[-1], rtol=1e-6)
    before = whole.residual
    whole(rhs, tolerance=0.5)  # to another tolerance than the solver's
    assert whole.residual == before
    with pytest.raises(ValueError, match="1 of 2 gradients to solve for are not finite"):
        solver(torch.tensor([[1.0, 0.0, 0.0], [0.0, torch.nan, 0.0]]))


def test_a_guide_is_a_preconditioner_of_models_of_its_size(flat):
    guide, data, covariance = flat
    fitted = copy.deepcopy(guide).laplace_approximation(data)
    problem, _ = set_up(guide, data, (torch.eye(3),), None, "ggn", chunk_size=256)
    solver = Solver(problem, tolerance=1e-10, preconditioner=fitted, block_size=1)
    assert_close(solver(torch.eye(3)), covariance, rtol=1e-8, atol=1e-12)
    assert solver.iterations == 3  # the preconditioned matrix is the identity
    other = LinearPrior(torch.zeros(4))
    with pytest.raises(ValueError, match="has 4 latents, expected 3"):
        Solver(problem, tolerance=1e-10, preconditioner=other)


class LinearPrior:
    """A guide, as far as a solver looks at it."""

    def __init__(self, loc):
        self.posterior = DiagonalNormal(loc, torch.ones_like(loc))


def test_the_residual_of_paired_runs_is_what_is_left_in_the_metric_of_the_curvature(flat):
    r"""In a quadratic loss :math:`r_j = P d_j - g_j`, and the variance is too small by :math:`r_j^\top P^{-1} r_j`."""
    guide, (x, y), covariance = flat
    batches = [(x[i::2], y[i::2]) for i in range(2)]
    targets = torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, -1.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hfl.HFLWarning)
        result = hfl.solve(guide, batches, (targets,), method="paired", num_epochs=1)
    left = result.displacements @ torch.linalg.inv(covariance) - targets
    missing = (left @ covariance * left).sum(-1)
    assert_close(result.variances, (targets @ covariance * targets).sum(-1) - missing, rtol=1e-6)
    expected = (missing / result.variances).sqrt()
    assert expected.max() > 0.05
    assert_close(result.residual, expected.max(), rtol=0.05)


def test_steps_shrink_where_a_batch_is_more_curved_than_all_the_data(flat):
    """Of 20 batches of one row one has nearly all the curvature, and counts twenty times when it is seen."""
    guide, (x, y), _ = flat
    x, y = x.clone(), y.clone()
    x[0] *= 30
    batches = list(zip(x.split(1), y.split(1), strict=True))
    problem, _ = set_up(guide, batches, (torch.eye(3),), None, "ggn", chunk_size=256)
    solver = Solver(problem, tolerance=1e-8)

    def push(offsets, batch):
        return torch.ones_like(offsets)

    rate = 0.3 / float(torch.linalg.eigvalsh(problem.operator(torch.eye(3)))[-1])
    start = torch.zeros(1, 3)
    found = [_descend(problem, solver, rate / 2**k, start, None, push, 4) is None for k in (0, 3, 6, 9)]
    assert found == sorted(found, reverse=True)  # diverges from some rate on
    assert found[0]
    assert not found[-1]
    offsets = fine_tune(problem, solver, 1, push, num_epochs=4)
    assert float(offsets.norm()) < 10 * (1 + float(problem.latent.norm()))


def test_the_regulariser_of_a_score_follows_the_outputs():
    """A weight beside zero is pulled to zero and not beyond, so that the score is less than that of a constant pull."""
    x, share, epsilon = torch.randn(10), 0.3, 0.1
    P = 1 + x @ x / NOISE**2
    weight = share * epsilon / P.sqrt()
    y = x * weight * P / (x @ x / NOISE**2)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x * w, NOISE), obs=y)

    guide = AutoLaplace(model).initialize(x, y).polish((x, y))
    assert_close(guide.loc.detach(), weight.reshape(1), rtol=1e-6)
    targets = torch.tensor([1.0, -2.0])
    linear = targets.abs() * x.abs().mean() / P
    options = {"calibrate": 0, "tolerance": 1e-10}
    assert_close(hfl.regvar(guide, (x, y), (targets,), num_epochs=None, **options).score, linear, rtol=1e-6)
    found = hfl.regvar(guide, (x, y), (targets,), num_epochs=60, epsilon=epsilon, **options).score
    # the outputs change sign around the minimum, and so does the pull
    assert (found < 0.5 * linear).all()
    assert (found > 0.05 * linear).all()
