# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_bnn.infer.autoguide import AutoLaplace, AutoMixture
from pyro_bnn.infer.autoguide.laplace_mixture import LaplaceMixture
from tests.common import assert_close
from tests.models import in_between_data, tanh_network


def test_mixture_around_the_components_of_an_ensemble():
    x, y = in_between_data()
    model = tanh_network(hidden=3)
    modes = AutoMixture(model, num_components=3, component="delta").initialize(x, y)
    modes.loc.data.normal_()
    mixture = LaplaceMixture.from_modes(model, modes, (x, y), (x, y), weights="evidence")
    assert len(mixture.guides) == 3
    for k, guide in enumerate(mixture.guides):
        for name, component in modes.component_distributions().items():
            assert_close(guide.median()[name], component.mean[k].detach(), rtol=1e-12)
    evidences = torch.stack([guide.log_evidence() for guide in mixture.guides])
    assert_close(mixture.log_weights, evidences - evidences.logsumexp(0), rtol=1e-10, atol=1e-12)
    # with equal weights: moments by the law of total variance
    equal = LaplaceMixture(mixture.guides)
    draws = equal.sample_posterior((30_000,))["w2"]
    means = torch.stack([guide.median()["w2"] for guide in equal.guides])
    assert draws.shape == (30_000, 3)
    assert_close(draws.mean(0), means.mean(0), atol=0.05, rtol=0)
    outputs = equal.observed_draws(20_000, x[:4])["obs"][..., 0]
    parts = [guide.linearized_outputs(x[:4])["obs"] for guide in equal.guides]
    mean = torch.stack([part.mean[:, 0] for part in parts])
    variance = torch.stack([part.variance[:, 0] for part in parts])
    assert_close(outputs.var(0), variance.mean(0) + mean.var(0, correction=0), rtol=0.06)
    point = mixture.guides[0].loc.detach()
    expected = (
        torch.stack([guide.posterior.log_prob(point) for guide in equal.guides]).logsumexp(0)
        - torch.tensor(3.0).log()
    )
    assert_close(equal.log_prob(point), expected, rtol=1e-10)


def test_bad_input():
    x, y = in_between_data()
    model = tanh_network(hidden=3)
    with pytest.raises(ValueError, match="after laplace_approximation"):
        LaplaceMixture([AutoLaplace(model).initialize(x, y)])
    normal = AutoMixture(model, num_components=2, component="normal").initialize(x, y)
    with pytest.raises(ValueError, match="no point masses"):
        LaplaceMixture.from_modes(model, normal, (x, y), (x, y))
