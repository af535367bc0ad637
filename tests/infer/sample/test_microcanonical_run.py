# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Runs of microcanonical chains on densities with known moments."""

import math
from dataclasses import replace

import pytest
import torch

from pyro_bnn.infer.sample.microcanonical_run import Plan, Run, Units
from pyro_bnn.infer.sample.records import Records
from pyro_bnn.infer.sample.whitening import Scales
from tests.infer.sample.densities import DOUBLE, Density, gaussian, student

PLAN = Plan(300, 300, 1, False, 0.02, 0.8, None, None, "prior", False)


def made(function, plan=PLAN, chains=4, dim=5, num_modes=1, seed=0, points=None):
    torch.manual_seed(seed)
    points = torch.randn(chains, dim, dtype=DOUBLE) if points is None else points
    records = Records(plan.warmup_draws + plan.num_samples, points, None)
    centre, scale = torch.zeros(num_modes, dim, dtype=DOUBLE), torch.ones(num_modes, dim, dtype=DOUBLE)
    units = Units(Scales(scale), centre, scale, torch.arange(dim))  # every latent a site
    return Run(plan, Density(function), units, points, records)


def went(run):
    run.go(False, lambda: None, lambda step: False)
    return run


def draws(run):
    return run.records.part(run.plan.warmup_draws, run.records.count)


def z_scores(values, expected):
    """Of the mean of ``(C, n, ...)`` by the spread of the means of chains."""
    chains = values.mean(1)
    return (chains.mean(0) - expected) / (chains.std(0) / math.sqrt(len(chains)))


WIDE = torch.tensor([0.01, 0.09, 1.0, 4.0, 25.0], dtype=DOUBLE)


@pytest.mark.every(2)
@pytest.mark.parametrize("whiten", ["prior", "diagonal"])
@pytest.mark.parametrize("adjusted", [False, True])
def test_warm_up_reaches_what_it_aims_at(whiten, adjusted):
    plan = replace(PLAN, adjusted=adjusted, whiten=whiten, warmup_steps=400, num_samples=200)
    run = went(made(gaussian(torch.diag(WIDE)), plan, chains=8))
    _, stats = draws(run)
    if adjusted:
        assert abs(stats["acceptance_rate"].mean() - 0.8) < 0.1
    else:
        ratio = stats["energy_error"].square() / (5 * 0.02)
        assert abs((ratio.log().mean() + 1.2704) / 6) < 0.2  # h within a fifth
    if whiten == "diagonal":
        ratio = (run.factors / WIDE.sqrt()).log()
        assert (ratio - ratio.mean()).abs().max() < math.log(2)


def test_adjusted_chains_have_the_moments_of_the_target():
    # the same target probability as NUTS's default, steps too large for unadjusted chains
    plan = replace(PLAN, adjusted=True, num_samples=200, warmup_steps=200, target_accept_prob=0.6)
    run = went(made(student(8.0, 3), plan, chains=60, dim=3))
    position, _ = draws(run)
    assert z_scores(position, 0.0).abs().max() < 4
    assert z_scores(position.square(), 8 / 6).abs().max() < 4
    assert z_scores(position.abs().clamp(max=1), _clamped(8.0)).abs().max() < 4


def _clamped(degrees):
    """E min(|t|, 1) of a Student t, by quadrature."""
    t = torch.linspace(0, 400, 2_000_001, dtype=DOUBLE)
    weight = (1 + t.square() / degrees).pow(-(degrees + 1) / 2)
    return ((weight * t.clamp(max=1)).sum() / weight.sum()).item()


def test_unadjusted_chains_come_close_to_a_gaussian_with_correlations():
    root = torch.randn(5, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    covariance = root @ root.T + torch.eye(5, dtype=DOUBLE)
    run = went(made(gaussian(covariance), replace(PLAN, num_samples=800, energy_variance=0.001), chains=20))
    position, _ = draws(run)
    found = torch.einsum("cni,cnj->cij", position, position) / position.shape[1]
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - covariance).abs() < 4 * error + 0.01 * covariance.diagonal().mean()).all()


def test_each_mode_has_its_own_step_and_chains_their_own_path():
    # two modes, of widths 1 and 100, far from each other: a mixture that no chain crosses
    centre = torch.tensor([-1e4, 1e4], dtype=DOUBLE)
    width = torch.tensor([1.0, 100.0], dtype=DOUBLE)

    def both(position):
        k = (position[:, 0] > 0).long()
        shifted = (position - centre[k].unsqueeze(-1)) / width[k].unsqueeze(-1)
        return -0.5 * shifted.square().sum(-1), -shifted / width[k].unsqueeze(-1)

    points = centre.repeat_interleave(3).unsqueeze(-1).expand(6, 4).contiguous()
    plan = replace(PLAN, per_mode=True, whiten=None)
    run = made(both, plan, dim=4, num_modes=2, points=points)
    run.units.centre.copy_(points[::3])
    went(run)
    ratio = run.step_size[1] / run.step_size[0]
    assert 70 < ratio < 140
    assert 50 < run.length[1] / run.length[0] < 200
    position, _ = draws(run)
    spread = (position - points.unsqueeze(1)).reshape(2, 3, -1).square().mean(-1).sqrt()
    assert ((spread / width.unsqueeze(-1)).log().abs() < 0.3).all()


def test_thinned_draws_are_some_of_all_draws():
    plain = went(made(student(5.0, 3), replace(PLAN, num_samples=60, warmup_steps=60), dim=3))
    thinned = went(made(student(5.0, 3), replace(PLAN, num_samples=20, warmup_steps=60, thinning=3), dim=3))
    (every, stats), (third, some) = draws(plain), draws(thinned)
    assert torch.equal(third, every[:, 2::3])
    assert torch.equal(some["energy_error"], stats["energy_error"][:, 2::3])
    assert torch.equal(thinned.records.positions[:20], plain.records.positions[2:60:3])
    assert thinned.density.gradients == plain.density.gradients


@pytest.mark.every(2)
@pytest.mark.parametrize("adjusted", [False, True])
@pytest.mark.parametrize("stop", [5, 18, 37, 55, 90, 110])
def test_resumed_runs_take_the_same_steps(adjusted, stop):
    # stopped in every part of the warm-up and while sampling, and continued by an object that knows nothing
    plan = replace(PLAN, num_samples=30, warmup_steps=100, adjusted=adjusted, whiten="diagonal")
    whole = went(made(student(5.0, 3), plan, dim=3, num_modes=2))
    first = made(student(5.0, 3), plan, dim=3, num_modes=2)
    states = []
    first.go(False, lambda: None, lambda step: step == stop and states.append(first_state(first)))
    torch.manual_seed(99)
    second = made(student(5.0, 3), plan, dim=3, num_modes=2, points=torch.zeros(4, 3, dtype=DOUBLE), seed=7)
    second.load(states[0])
    went(second)
    assert torch.equal(second.records.positions, whole.records.positions)
    for name, value in whole.records.stats.items():
        assert torch.equal(second.records.stats[name].nan_to_num(-1), value.nan_to_num(-1)), name
    assert second.gradients == whole.gradients


def first_state(run):
    """What a checkpoint holds at a moment, cut from the run that goes on."""
    import io

    file = io.BytesIO()
    torch.save(run.state(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_refused_steps_are_counted_and_the_chain_lives_on():
    def hole(position):
        value, gradient = gaussian(torch.eye(3, dtype=DOUBLE))(position)
        return value.where(position[:, 0] < 1.5, torch.tensor(math.nan, dtype=DOUBLE)), gradient

    plan = replace(PLAN, step_size=0.7, momentum_length=2.0, warmup_steps=0)
    run = went(made(hole, plan, dim=3, points=torch.zeros(4, 3, dtype=DOUBLE)))
    position, stats = draws(run)
    assert 0 < stats["diverging"].mean() < 0.2
    assert position.isfinite().all()
    assert (position[..., 0] < 1.5).all()
    # a Gaussian that is cut at 1.5
    assert position[..., 0].std() > 0.5


def test_gradients_are_counted():
    run = went(
        made(student(5.0, 3), replace(PLAN, step_size=0.5, momentum_length=1.0, warmup_steps=10), dim=3)
    )
    assert run.gradients == run.density.gradients == 4 * (1 + 310)
