# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Samplers of other libraries on the log density of a model whose posterior is Gaussian."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_bnn.infer import LogDensity, log_density
from tests.common import assert_close
from tests.infer.models import linear_data, linear_model, linear_posterior


@pytest.fixture
def target() -> tuple[LogDensity, Tensor, Tensor]:
    x, y = linear_data()
    return log_density(linear_model, (x, y)), *linear_posterior(x, y)


@pytest.fixture
def jax() -> Any:
    found = pytest.importorskip("jax")
    before = found.config.read("jax_enable_x64")
    found.config.update("jax_enable_x64", True)
    yield found
    found.config.update("jax_enable_x64", before)


def require_moments(draws: Any, mean: Tensor, covariance: Tensor, size: float) -> None:
    """Means within five standard errors by an effective number of draws, standard deviations within those of as many."""
    found, sd = torch.as_tensor(np.array(draws)).reshape(-1, len(mean)), covariance.diagonal().sqrt()
    assert ((found.mean(0) - mean).abs() < 5 * sd / size**0.5).all()
    assert ((found.std(0) / sd - 1).abs() < 5 / (2 * size) ** 0.5).all()


def test_arrays(target: tuple[LogDensity, Tensor, Tensor]) -> None:
    density, mean, covariance = target
    log_prob, z = density.numpy(), np.array([[0.3, -1.0, 2.0], [1.0, 0.5, 0.1]])
    values, gradients = log_prob(z)
    assert values.shape == (2,)
    precision = torch.linalg.inv(covariance)
    away = torch.as_tensor(z) - mean
    assert_close(gradients, -(away @ precision), rtol=1e-9)
    assert_close(values[1] - values[0], -0.5 * ((away @ precision) * away).sum(-1).diff()[0], rtol=1e-9)
    value, gradient = log_prob(z[0])
    assert isinstance(value, float)
    assert value == values[0]
    assert_close(gradient, gradients[0])
    assert log_prob(z.astype(np.float32))[1].dtype == np.float32


def test_jax_transformations(jax: Any, target: tuple[LogDensity, Tensor, Tensor]) -> None:
    density, mean, covariance = target
    log_prob, z = density.jax(), jax.numpy.array([[0.3, -1.0, 2.0], [1.0, 0.5, 0.1], [0.0, 0.0, 0.0]])
    gradients = -((torch.as_tensor(np.array(z)) - mean) @ torch.linalg.inv(covariance))
    before = density.gradients
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(log_prob)))(z)
    assert density.gradients - before == len(z)  # all chains in one pass
    assert_close(np.array(slope), gradients, rtol=1e-9)
    assert_close(np.array(value), density.value_and_gradient(torch.as_tensor(np.array(z)))[0])
    chained = jax.grad(lambda a: log_prob(2 * a) ** 2)(z[0] / 2)
    assert_close(np.array(chained), 4 * float(value[0]) * gradients[0], rtol=1e-9)
    assert_close(float(log_prob(z[1])), float(value[1]))


def test_nuts_of_numpyro(jax: Any, target: tuple[LogDensity, Tensor, Tensor]) -> None:
    infer = pytest.importorskip("numpyro").infer
    density, mean, covariance = target
    log_prob = density.jax()
    run = infer.MCMC(
        infer.NUTS(potential_fn=lambda u: -log_prob(u)), num_warmup=60, num_samples=100, progress_bar=False
    )
    run.run(jax.random.key(0), init_params=jax.numpy.asarray(mean.numpy()))
    require_moments(run.get_samples(), mean, covariance, 50)


def test_nuts_of_blackjax(jax: Any, target: tuple[LogDensity, Tensor, Tensor]) -> None:
    blackjax = pytest.importorskip("blackjax")
    density, mean, covariance = target
    kernel = blackjax.nuts(
        density.jax(), step_size=0.6, inverse_mass_matrix=jax.numpy.asarray(covariance.numpy())
    )
    state, draws = kernel.init(jax.numpy.asarray(mean.numpy())), []
    step = jax.jit(kernel.step)
    for i in range(100):
        state, _ = step(jax.random.key(i), state)
        draws.append(state.position)
    require_moments(draws, mean, covariance, 50)


def test_nutpie(target: tuple[LogDensity, Tensor, Tensor]) -> None:
    nutpie = pytest.importorskip("nutpie")
    compiled = pytest.importorskip("nutpie.compiled_pyfunc")
    density, mean, covariance = target
    p, log_prob = density.size, density.numpy()
    model = compiled.from_pyfunc(
        p, lambda: log_prob, lambda *_: lambda u: {"u": u}, [np.dtype("float64")], [(p,)], ["u"]
    )
    tree = nutpie.sample(model, draws=100, tune=200, chains=2, seed=1, progress_bar=False)
    require_moments(tree.posterior["u"].values, mean, covariance, 100)
