# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What warm-up finds, against closed forms and what the chains do afterwards."""

import math

import pytest
import torch

from pyro_bnn.infer.sample.adaptation import (
    AcceptanceTuner,
    EnergyTuner,
    Moments,
    Path,
    first_steps,
    pooled,
    spread,
)
from tests.infer.sample.densities import DOUBLE


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(5)


def test_modes_share_what_their_chains_found():
    values = torch.arange(6.0, dtype=DOUBLE)
    assert pooled(values, 3).tolist() == [0.5, 2.5, 4.5]
    assert spread(torch.tensor([1.0, 2.0]), 4).tolist() == [1, 1, 2, 2]


class TestEnergyTuner:
    @pytest.mark.parametrize("start", [1e-3, 0.3, 30.0])
    def test_finds_the_step_of_a_known_law(self, generator, start):
        # errors with variance dim * (h / h_k)^6 * target have their target at h_k
        right = torch.tensor([0.2, 1.5], dtype=DOUBLE)
        tuner = EnergyTuner.start(torch.full((2,), start), 0.02)
        for _ in range(400):
            noise = torch.randn(6, dtype=DOUBLE, generator=generator)
            size = spread(tuner.step / right, 6) ** 3
            tuner.update(size * noise * math.sqrt(10 * 0.02), torch.zeros(6, dtype=torch.bool), 10)
        # an error tells log h to a third of a standard deviation of log chi, 1.1 / 3
        assert ((tuner.finish() / right).log().abs() < 0.12).all()

    def test_forgets_where_it_started(self, generator):
        tuner = EnergyTuner.start(torch.tensor([1e-3]), 0.02)
        for t in range(300):
            size = 1e9 if t < 20 else 1.0  # a start far outside, with huge forces
            errors = size * tuner.step**3 * math.sqrt(0.2) * torch.randn(4, dtype=DOUBLE, generator=generator)
            tuner.update(errors, torch.zeros(4, dtype=torch.bool), 10)
        assert abs(float(tuner.finish().log())) < 0.15

    def test_one_chain_beyond_all_bounds_does_not_speak_for_the_others(self):
        # one of eight errors says "at most 0.5 too long", seven say "by a factor of e^0.3 too short"
        errors = torch.full((8,), math.exp(-0.9 - 1.2704 / 2), dtype=DOUBLE)
        errors[0] = 1e9
        refused = torch.zeros(8, dtype=torch.bool)
        for wrong in (refused, torch.arange(8) == 0):
            tuner = EnergyTuner.start(torch.tensor([1.0]), 1.0)
            tuner.update(errors, wrong, 1)
            assert abs(float(tuner.log) + 0.3 * (0.5 - 7 * 0.3) / 8) < 1e-6


def test_acceptance_tuner_reaches_its_target(generator):
    # acceptance exp(-h^2 / s_k) is 0.7 at h^2 = -s_k log 0.7
    scale = torch.tensor([0.5, 8.0], dtype=DOUBLE)
    tuner = AcceptanceTuner.start(torch.tensor([1.0, 1.0]), 0.7)
    for _ in range(600):
        rate = (-spread(tuner.step.square() / scale, 4)).exp()
        noise = 0.1 * torch.randn(4, dtype=DOUBLE, generator=generator)
        tuner.update((rate + noise).clamp(0, 1))
    torch.testing.assert_close(tuner.finish(), (-scale * math.log(0.7)).sqrt(), rtol=0.1, atol=0)


def test_factors_of_sites_and_the_length_that_follows(generator):
    # sites of 2 and 3 latents, with standard deviations and curvatures that do not belong to one Gaussian
    site = torch.tensor([0, 0, 1, 1, 1])
    moments = Moments.start(2, torch.device("cpu"))
    positions = torch.randn(4000, 2, 5, dtype=DOUBLE, generator=generator) * torch.where(site == 0, 0.1, 3.0)
    gradients = torch.randn(4000, 2, 5, dtype=DOUBLE, generator=generator) * torch.where(site == 0, 40.0, 1.0)
    for x, g in zip(positions, gradients, strict=True):
        moments.update(x, g, site)
    expected = torch.tensor([math.sqrt(0.1 / 40), math.sqrt(3.0)], dtype=DOUBLE)
    torch.testing.assert_close(moments.factors(), expected, rtol=0.02, atol=0)
    z = (positions / expected[site]).square().sum(-1).mean().sqrt()
    assert abs(moments.length(expected) / (3 * float(z)) - 1) < 1e-9
    assert Moments(torch.ones(1), torch.zeros(1)).factors().item() == 1


def test_autocorrelation_time_of_autoregressions(generator):
    # x' = a x + noise has the time (1 + a) / (1 - a)
    coefficients = torch.tensor([0.5, 0.5, 0.8, 0.8], dtype=DOUBLE).unsqueeze(-1)
    position = torch.randn(4, 120, dtype=DOUBLE, generator=generator)
    path = Path.start(position, 2, 1000)
    steps = torch.tensor([0.1, 0.3], dtype=DOUBLE)
    for _ in range(1000):
        noise = torch.randn(4, 120, dtype=DOUBLE, generator=generator)
        position = coefficients * position + (1 - coefficients.square()).sqrt() * noise
        path.update(position, steps)
    times = path.autocorrelation_time()
    torch.testing.assert_close(times, torch.tensor([3.0, 9.0], dtype=DOUBLE), rtol=0.06, atol=0)
    torch.testing.assert_close(path.length(), 0.4 * times * steps)
    path.count = 60  # six to twenty of these times: too short for the second
    assert path.length().isnan().tolist() == [False, True]
    assert path.values.shape == (4, 1000, 100)
    assert Path.start(position, 2, 5).length().isnan().all()


class TestFirstSteps:
    def test_only_grows_smaller_until_the_error_is_small(self):
        seen = []

        def errors_at(step):
            seen.append(step.clone())
            return step**6, step < 50

        found = first_steps(errors_at, torch.tensor([100.0, 0.1]), 0.02, 5)
        assert found[1] == 0.05
        assert 0.05 < 2 * found[0] < 0.1 ** (1 / 6)
        assert len(seen) < 30

    def test_says_when_there_is_none(self):
        with pytest.raises(ArithmeticError, match="not finite around a starting point"):
            first_steps(lambda step: (step, torch.zeros(1, dtype=torch.bool)), torch.ones(1), 0.02, 5)
