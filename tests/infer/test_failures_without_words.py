# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Models that fail without a word where they do not broadcast, as a bare ``assert`` does. The reference are loops by Pyro."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_bnn.infer import posterior_predictive, predictive_moments
from tests.common import assert_close

Y = torch.randn(3, 5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def kalman(y: torch.Tensor | None = None) -> None:
    a = pyro.sample("a", dist.Normal(0.5, 0.3))

    def noise(scale: float) -> dist.Distribution:
        return dist.Normal(torch.zeros(1), scale).to_event(1)

    with pyro.plate("data", 3):
        one = torch.eye(1)
        pyro.sample(
            "obs", dist.GaussianHMM(noise(1.0), a * one, noise(0.5), one, noise(0.3), duration=5), obs=y
        )


def asserting(y: torch.Tensor | None = None) -> None:
    a = pyro.sample("a", dist.Normal(0.5, 0.3))
    assert a.shape == ()
    with pyro.plate("data", 3):
        pyro.sample("obs", dist.Normal(a.expand(5, 1), 1.0).to_event(2), obs=y)


@pytest.mark.parametrize("model", [kalman, asserting])
@pytest.mark.parametrize("number", [3, 8, 17])
def test_models_that_fail_without_a_word_run_one_by_one(model, number) -> None:
    draws = {"a": torch.rand(number)}
    terms = []
    for a in draws["a"]:
        trace = poutine.trace(pyro.condition(model, data={"a": a})).get_trace(Y)
        terms.append(trace.nodes["obs"]["fn"].log_prob(Y))
    expected = torch.stack(terms)
    found = posterior_predictive(model, draws, {"y": Y})
    assert not found.vectorized
    assert_close(found.log_likelihood, expected)
    moments = predictive_moments(model, draws, {"y": Y})
    assert_close(moments["obs"].log_density, expected.logsumexp(0) - torch.tensor(float(number)).log())
    with pytest.raises(ValueError, match=r"does not broadcast over posterior draws: \w"):
        posterior_predictive(model, draws, {"y": Y}, vectorize=True)
