# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Pyro's messenger guides run the model: their density is that of the latents alone."""

import pyro
import pyro.distributions as dist
import pyro.infer.autoguide as autoguide
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_bnn.diagnostics import log_weights
from tests.common import assert_close


def model(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    pyro.factor("penalty", -w.square().sum())
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)


@pytest.mark.parametrize(
    "kind",
    [
        autoguide.AutoNormalMessenger,
        autoguide.AutoHierarchicalNormalMessenger,
        autoguide.AutoRegressiveMessenger,
    ],
)
def test_weights_under_a_messenger_guide(kind: type) -> None:
    x, y = torch.randn(10, 2), torch.randn(10)
    guide = kind(model)
    guide(x, y)
    draws, weights = log_weights(model, guide, (x, y), num_samples=5)
    q = poutine.trace(guide).get_trace(x, y).nodes["w"]["fn"]
    for w, weight in zip(draws["w"], weights, strict=True):
        log_p = dist.Normal(0.0, 1.0).log_prob(w).sum() - w.square().sum()
        log_p = log_p + dist.Normal(x @ w, 0.5).log_prob(y).sum()
        assert_close(weight, log_p - q.log_prob(w), rtol=1e-5)
