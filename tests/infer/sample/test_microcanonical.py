# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The microcanonical kernel against its continuous dynamics, its volume, closed-form moments and another library."""

import math

import pytest
import torch

from pyro_bnn.infer.sample.microcanonical import (
    Target,
    adjusted_transition,
    langevin_step,
    leapfrog,
    normalized,
    refresh,
    turn,
)
from pyro_bnn.infer.sample.whitening import Dense, Gaussians, Scales

DOUBLE = torch.float64


def quartic(position):
    """A coupled potential that is no Gaussian, with its gradient by hand: U = sum z^4 / 4 + z^2 / 2 + z_1 z_2."""
    rolled = position.roll(1, -1) + position.roll(-1, -1)
    value = -(position**4 / 4 + position**2).sum(-1) - 0.5 * (position * rolled).sum(-1)
    return value, -(position**3 + 2 * position) - rolled


def target(density=quartic, scale=1.0):
    return Target(density, Scales(torch.tensor(scale, dtype=DOUBLE)))


def chains_at(generator, count, dim, on=None):
    on = target() if on is None else on
    draw = torch.randn(2, count, dim, dtype=DOUBLE, generator=generator)
    return on.start(draw[0], normalized(draw[1]))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


def path(on, chains, step, num_steps):
    total = torch.zeros(len(chains.position), dtype=DOUBLE)
    for _ in range(num_steps):
        chains, error = leapfrog(on, chains, torch.full_like(total, step))
        total += error
    return chains, total


class TestTurn:
    def test_is_the_flow_of_the_direction(self, generator):
        # dn/dt = (g - n (n.g)) / (p - 1), integrated by many small Runge-Kutta steps
        direction = normalized(torch.randn(5, 4, dtype=DOUBLE, generator=generator))
        gradient = 3 * torch.randn(5, 4, dtype=DOUBLE, generator=generator)

        def slope(state):  # the last entry is the work of the force
            n, force = state[:, :-1], (state[:, :-1] * gradient).sum(-1, keepdim=True)
            return torch.cat([(gradient - n * force) / 3, force], -1)

        state, h = torch.cat([direction, torch.zeros(5, 1, dtype=DOUBLE)], -1), 0.7 / 200
        for _ in range(200):
            a = slope(state)
            b = slope(state + h / 2 * a)
            c = slope(state + h / 2 * b)
            state = state + h / 6 * (a + 2 * b + 2 * c + slope(state + h * c))
        n, work = state[:, :-1], state[:, -1]
        turned, kinetic = turn(direction, gradient, torch.full((5,), 0.7, dtype=DOUBLE))
        torch.testing.assert_close(turned, n, rtol=0, atol=1e-9)
        # kinetic energy grows as the force along the path works
        torch.testing.assert_close(kinetic, work, rtol=0, atol=1e-8)

    @pytest.mark.parametrize("dim", [2, 3])
    def test_volume_on_the_sphere_is_the_kinetic_energy(self, generator, dim):
        direction = normalized(torch.randn(1, dim, dtype=DOUBLE, generator=generator))
        gradient = 2 * torch.randn(1, dim, dtype=DOUBLE, generator=generator)
        step = torch.tensor([0.8], dtype=DOUBLE)
        jacobian = torch.autograd.functional.jacobian(
            lambda n: turn(normalized(n), gradient, step)[0][0], direction
        )[:, 0]
        image, kinetic = turn(direction, gradient, step)
        tangent = torch.linalg.svd(direction)[2][1:]  # orthonormal, orthogonal to the direction
        image_tangent = torch.linalg.svd(image)[2][1:]
        volume = torch.linalg.det(image_tangent @ jacobian @ tangent.T).abs()
        torch.testing.assert_close(volume.log(), -kinetic[0], rtol=0, atol=1e-10)

    def test_strong_forces(self):
        # straight against the force, and with a force that turns at once: finite, of length one
        direction = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        gradient = torch.tensor([[1e-3, 0.0, 0.0], [1e6, 0.0, 0.0], [1e6, 0.0, 0.0]])
        turned, kinetic = turn(direction, gradient, torch.ones(3))
        torch.testing.assert_close(turned, torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
        expected = torch.tensor([-1e-3, 1e6, 1e6 - 2 * math.log(2)])
        torch.testing.assert_close(kinetic, expected, rtol=1e-5, atol=1e-7)

    def test_no_force(self):
        direction = torch.tensor([[0.6, 0.8]])
        turned, kinetic = turn(direction, torch.zeros(1, 2), torch.ones(1))
        assert torch.equal(turned, direction)
        assert kinetic.item() == 0


class TestLeapfrog:
    def test_energy_error_is_of_third_order_per_step_and_second_per_path(self, generator):
        chains = chains_at(generator, 50, 5)
        one = [path(target(), chains, h, 1)[1].abs().mean() for h in (0.02, 0.01)]
        assert 2.9 < math.log2(one[0] / one[1]) < 3.1
        far = [path(target(), chains, h, n)[1].abs().mean() for h, n in ((0.02, 50), (0.01, 100))]
        assert 1.9 < math.log2(far[0] / far[1]) < 2.1

    def test_is_reversible(self, generator):
        chains = chains_at(generator, 4, 6)
        end, error = path(target(), chains, 0.4, 7)
        back, back_error = path(target(), end._replace(direction=-end.direction), 0.4, 7)
        torch.testing.assert_close(back.position, chains.position, rtol=0, atol=1e-10)
        torch.testing.assert_close(back.direction, -chains.direction, rtol=0, atol=1e-10)
        torch.testing.assert_close(back_error, -error, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("dim", [2, 3])
    def test_energy_error_is_potential_minus_log_volume(self, generator, dim):
        # dense Jacobian of the map on R^p x sphere: the identity behind the Metropolis adjustment
        chains = chains_at(generator, 1, dim)
        step = torch.tensor([0.5], dtype=DOUBLE)

        def image(flat):
            z, n = flat.reshape(2, 1, dim)
            start = target().start(z, normalized(n))
            first = leapfrog(target(), start, step)[0]
            end = leapfrog(target(), first, step)[0]
            return torch.cat([end.position[0], end.direction[0]])

        flat = torch.cat([chains.position[0], chains.direction[0]])
        end = image(flat)
        jacobian = torch.autograd.functional.jacobian(image, flat)

        def basis(n):
            return torch.block_diag(torch.eye(dim, dtype=DOUBLE), torch.linalg.svd(n.reshape(1, -1))[2][1:])

        log_volume = torch.linalg.slogdet(basis(end[dim:]) @ jacobian @ basis(flat[dim:]).T)[1]
        potential = quartic(flat[:dim])[0] - quartic(end[:dim])[0]
        _, error = path(target(), chains, 0.5, 2)
        torch.testing.assert_close(error[0], potential - log_volume, rtol=0, atol=1e-10)

    def test_a_linear_change_of_variables_with_its_whitening_changes_nothing(self, generator):
        root = torch.linalg.cholesky(torch.eye(4, dtype=DOUBLE) + 0.5)

        def changed(position):  # density of x = root z where z has the quartic one
            value, gradient = quartic(torch.linalg.solve_triangular(root, position.T, upper=False).T)
            return value, torch.linalg.solve_triangular(root.T, gradient.T, upper=True).T

        plain = chains_at(generator, 3, 4)
        white = Target(changed, Gaussians([Dense(root)]))
        moved = white.start(plain.position @ root.T, plain.direction)
        for _ in range(5):
            noise = torch.randn(3, 4, dtype=DOUBLE, generator=generator)
            step = torch.full((3,), 0.3, dtype=DOUBLE)
            plain, error, _ = langevin_step(target(), plain, step, 4 * step, noise)
            moved, moved_error, _ = langevin_step(white, moved, step, 4 * step, noise)
            torch.testing.assert_close(moved.position, plain.position @ root.T, rtol=0, atol=1e-11)
            torch.testing.assert_close(moved_error, error, rtol=0, atol=1e-11)

    def test_chains_together_are_chains_alone(self, generator):
        together = chains_at(generator, 4, 3)
        alone = [type(together)(*(value[[i]] for value in together)) for i in range(4)]
        step = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=DOUBLE)
        for _ in range(6):
            noise = torch.randn(4, 3, dtype=DOUBLE, generator=generator)
            together, _, _ = langevin_step(target(), together, step, 5 * step, noise)
            alone = [
                langevin_step(target(), one, step[[i]], 5 * step[[i]], noise[[i]])[0]
                for i, one in enumerate(alone)
            ]
        torch.testing.assert_close(
            together.position, torch.cat([one.position for one in alone]), rtol=0, atol=1e-13
        )


def test_refreshed_directions_keep_the_cosine_of_their_length(generator):
    # E[n . n'] is exp(-h / L) up to O(1 / p)
    direction = normalized(torch.randn(2000, 400, dtype=DOUBLE, generator=generator))
    noise = torch.randn(2000, 400, dtype=DOUBLE, generator=generator)
    ones = torch.ones(2000, dtype=DOUBLE)
    cosine = (refresh(direction, noise, 0.7 * ones, ones) * direction).sum(-1)
    error = cosine.std() / math.sqrt(2000)
    assert (cosine.mean() - math.exp(-0.7)).abs() < 4 * error + 1 / 400


def test_a_step_that_leaves_the_finite_numbers_is_refused(generator):
    def walled(position):
        value, gradient = quartic(position)
        return value.where(position[:, 0] < 1, torch.tensor(math.nan, dtype=DOUBLE)), gradient

    on = target(walled)
    start = on.start(
        torch.tensor([[0.9, 0.0], [0.0, 0.0]], dtype=DOUBLE), torch.tensor([[1.0, 0.0]] * 2, dtype=DOUBLE)
    )
    noise = torch.randn(2, 2, dtype=DOUBLE, generator=generator)
    step = torch.full((2,), 0.3, dtype=DOUBLE)
    moved, error, refused = langevin_step(on, start, step, step, noise)
    assert refused.tolist() == [True, False]
    assert torch.equal(moved.position[0], start.position[0])
    assert torch.equal(moved.direction[0], normalized(noise)[0])
    assert error[0] == 0
    assert not torch.equal(moved.position[1], start.position[1])


def gaussian(position):
    return -0.5 * position.square().sum(-1), -position


def second_moments(step, num_steps, generator, count=2000, dim=4):
    """Mean square of the coordinates over unadjusted chains that start at exact draws, and its standard error."""
    on = target(gaussian)
    chains = chains_at(generator, count, dim, on)
    size = torch.full((count,), step, dtype=DOUBLE)
    total = torch.zeros(count, dtype=DOUBLE)
    for t in range(2 * num_steps):
        noise = torch.randn(count, dim, dtype=DOUBLE, generator=generator)
        chains, _, _ = langevin_step(on, chains, size, torch.full_like(size, 2.0), noise)
        if t >= num_steps:
            total += chains.position.square().mean(-1) / num_steps
    return total.mean().item(), (total.std() / math.sqrt(count)).item()


def test_unadjusted_bias_falls_with_the_square_of_the_step(generator):
    (coarse, coarse_error), (fine, fine_error) = (
        second_moments(h, int(50 / h), generator, count=3000, dim=2) for h in (1.4, 0.7)
    )
    assert coarse - 1 > 10 * coarse_error  # clearly biased
    order = math.log2((coarse - 1) / (fine - 1))
    order_error = math.hypot(coarse_error / (coarse - 1), fine_error / (fine - 1)) / math.log(2)
    assert abs(order - 2) < 4 * order_error + 0.2  # next order
    assert order_error < 0.2


def adjusted_draws(density, step, num_draws, generator, count=400, dim=3, burn=100):
    on = target(density)
    chains = chains_at(generator, count, dim, on)
    size = torch.full((count,), step, dtype=DOUBLE)
    kept, rate = [], 0.0
    for t in range(burn + num_draws):
        noise = torch.randn(count, dim, dtype=DOUBLE, generator=generator)
        level = torch.rand(count, dtype=DOUBLE, generator=generator)
        steps = int(torch.randint(1, 4, (), generator=generator))
        chains, _, accepted = adjusted_transition(on, chains, size, steps, noise, level)
        if t >= burn:
            kept.append(chains.position)
            rate += accepted.double().mean().item() / num_draws
    return torch.stack(kept), rate


@pytest.mark.parametrize("step", [1.2, 2.5])
def test_adjusted_chains_are_exact_with_large_steps(generator, step):
    # a Student t with 9 degrees of freedom in 3 dimensions: variance 9 / 7, E|x|^4 = 15 * 81 / 35
    def student(position):
        inner = 1 + position.square().sum(-1) / 9
        return -6 * inner.log(), -12 / 9 * position / inner.unsqueeze(-1)

    draws, rate = adjusted_draws(student, step, 300, generator)
    assert 0.3 < rate < 0.99
    for values, expected in (
        (draws.mean(-1), 0.0),
        (draws.square().mean(-1), 9 / 7),
        ((draws[..., 0] * draws[..., 1]), 0.0),
        (draws.square().sum(-1).square().clamp(max=40), _clamped_fourth_moment()),
    ):
        chain = values.mean(0)  # chains are independent but for the common numbers of steps
        error = chain.std() / math.sqrt(len(chain))
        assert (chain.mean() - expected).abs() < 4 * error


def _clamped_fourth_moment():
    """E min(|x|^4, 40) for the t distribution above, by quadrature of the radius's density."""
    radius = torch.linspace(0, 400, 4_000_001, dtype=DOUBLE)
    weight = radius.square() * (1 + radius.square() / 9).pow(-6)
    return (weight * radius.pow(4).clamp(max=40)).sum().item() / weight.sum().item()


def test_unadjusted_steps_of_that_size_are_visibly_biased(generator):
    mean, error = second_moments(1.2, 50, generator)
    assert abs(mean - 1) > 6 * error
    draws, _ = adjusted_draws(gaussian, 1.2, 200, generator, dim=4)
    chain = draws.square().mean(-1).mean(0)
    assert (chain.mean() - 1).abs() < 4 * chain.std() / math.sqrt(len(chain))


def test_against_blackjax(generator):
    jax = pytest.importorskip("jax")
    blackjax = pytest.importorskip("blackjax")
    from blackjax.mcmc import integrators

    def log_density(z):
        rolled = jax.numpy.roll(z, 1) + jax.numpy.roll(z, -1)
        return -(z**4 / 4 + z**2).sum() - 0.5 * (z * rolled).sum()

    scale = 0.7
    with jax.enable_x64() if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        key = jax.random.key(0)
        chains = chains_at(generator, 1, 5, target(scale=scale))
        state = integrators.new_integrator_state(
            log_density,
            jax.numpy.array(chains.position[0].numpy()),
            jax.numpy.array(chains.direction[0].numpy()),
        )
        step = integrators.with_isokinetic_maruyama(
            integrators.isokinetic_velocity_verlet(log_density, scale**2)
        )
        state, kinetic = step(state, 0.4, 3.0, key)
        halves = [
            torch.tensor(jax.random.normal(k, (5,), dtype=float).tolist(), dtype=DOUBLE)
            for k in jax.random.split(key)
        ]
        expected = [torch.tensor(value.tolist(), dtype=DOUBLE) for value in (state.position, state.momentum)]
        energy = float(kinetic) - float(state.logdensity) + chains.log_density.item()
    half, length = torch.tensor([0.2], dtype=DOUBLE), torch.tensor([3.0], dtype=DOUBLE)
    own = chains._replace(direction=refresh(chains.direction, halves[0].unsqueeze(0), half, length))
    own, error = leapfrog(target(scale=scale), own, 2 * half)
    own = own._replace(direction=refresh(own.direction, halves[1].unsqueeze(0), half, length))
    torch.testing.assert_close(own.position[0], expected[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(own.direction[0], expected[1], rtol=0, atol=1e-10)
    assert abs(error.item() - energy) < 1e-10
    assert blackjax.mclmc is not None
