# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The terms of the bound of mixtures, what they add up to, and when it is a bound."""

import math

import pytest
import torch

from pyro_bnn.infer import Mixture_ELBO
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.infer.mixture.terms import information, per_component
from tests.common import assert_close
from tests.infer.models import linear_data, linear_model


def test_terms_are_summed_over_the_plates_of_the_model():
    value = torch.randn(2, 3, 4, 5)
    assert_close(per_component(value, 2, 3, 2), value.sum((-2, -1)), rtol=1e-12)
    assert_close(per_component(value[0], 2, 3, 2), value[0].sum((-2, -1))[None], rtol=1e-12)
    assert_close(per_component(value[0, 0], 2, 3, 2), value[0, 0].sum().expand(1, 3), rtol=1e-12)
    assert_close(per_component(value[0, 0, 0], 2, 3, 2), value[0, 0, 0].sum().expand(1, 3), rtol=1e-12)
    assert_close(per_component(value[..., 0], 2, 3, 1), value[..., 0].sum(-1), rtol=1e-12)
    assert_close(per_component(value[..., 0, 0], 2, 3, 0), value[..., 0, 0], rtol=0)
    assert_close(per_component(value[0, :, 0, 0], 2, 3, 0), value[0, :, 0, 0][None], rtol=0)
    assert_close(per_component(torch.tensor(2.0), 2, 3, 0), torch.full((1, 3), 2.0), rtol=0)
    assert_close(per_component(value[:, :1, :1], 2, 3, 2), value[:, :1, 0].sum(-1).expand(2, 3), rtol=1e-12)
    assert_close(per_component(value, 1, 1, 2), value.sum().reshape(1, 1), rtol=1e-12)


class Densities:
    """The part of a mixture that gives the densities of the components at draws (S, K, D)."""

    def __init__(self, loc):
        self.loc = loc

    def component_log_prob(self, values):
        return torch.distributions.Normal(self.loc, 1.0).log_prob(values["z"].unsqueeze(-2)).sum(-1)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_the_information_between_the_index_and_the_sites(K):
    """Of draws z_k of each component: log K + mean_k log q_k(z_k) / sum_j q_j(z_k), summed over mixtures before."""
    loc = torch.randn(K, 3)
    z = loc + torch.randn(5, K, 3)
    q = torch.stack(
        [torch.distributions.Normal(loc[j], 1.0).log_prob(z).sum(-1) for j in range(K)], -1
    )  # at (s, k, j)
    total = sum((2 * q[s, k, k]) - torch.logsumexp(2 * q[s, k], -1) for s in range(5) for k in range(K)) / (
        5 * K
    )
    both = information([Densities(loc), Densities(loc)], {"z": z})
    assert_close(both, math.log(K) + total, rtol=1e-9, atol=1e-12)
    far = 1e3 * torch.arange(K).unsqueeze(-1) + torch.zeros(K, 3)
    assert_close(
        information([Densities(far)], {"z": far.expand(2, K, 3)}), math.log(K), rtol=1e-12, atol=1e-12
    )
    assert_close(information([Densities(0 * loc)], {"z": z}), 0.0, atol=1e-12)
    assert information([], {}) == 0.0


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({}, True),
        ({"kl_scale": 1.5}, True),
        ({"kl_scale": 0.99}, False),
        ({"kl_scale": lambda step: 1.0}, True),
        ({"kl_scale": lambda step: 0.5 + step}, False),
        ({"entropy_weight": 0.1}, False),
        ({"likelihood": "log_mixture", "kl": "sum"}, True),
        ({"likelihood": "log_mixture", "kl": "mean"}, False),
        ({"likelihood": "average", "kl": "exact"}, True),
    ],
)
def test_when_it_is_a_bound(options, bound):
    assert Mixture_ELBO(**options).is_bound is bound


@pytest.mark.parametrize(
    "options",
    [{}, {"kl": "exact"}, {"entropy_weight": 0.3, "kl": "exact"}, {"kl_scale": 0.2, "num_particles": 2}],
)
def test_the_loss_is_the_sum_of_its_parts(options):
    x, y = linear_data(8)
    guide = AutoMixture(linear_model, 2)
    elbo = Mixture_ELBO(**options)
    loss = elbo.loss(linear_model, guide, x, y)
    assert elbo.step == 0
    parts = elbo.parts
    assert parts["kl_scale"] == options.get("kl_scale", 1.0)
    expected = parts["kl_scale"] * parts["kl"] - parts["expected_log_likelihood"] - parts["log_prior"]
    assert_close(loss, expected - options.get("entropy_weight", 0.0) * parts["entropy"], rtol=1e-12)
    assert (parts["entropy"] != 0) == ("entropy_weight" in options)
    value = elbo.loss_and_grads(linear_model, guide, x, y)
    assert elbo.step == 1
    assert math.isfinite(value)
    gradients = [p.grad.clone() for p in guide.parameters()]
    assert all(bool((g != 0).any()) for g in gradients)
    for name in ("kl_scale", "entropy_weight"):
        Mixture_ELBO(**{name: 0})
        with pytest.raises(ValueError, match=name):
            Mixture_ELBO(**{name: -1e-9})
