# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The snippets of docs/source/migrate.rst and from_laplace_torch.rst, which show what stands between the marks."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_bnn.infer import dusenberry2020, fit, posterior_predictive
from pyro_bnn.infer.autoguide import AutoLaplace, AutoMixture
from pyro_bnn.nn import FanInNormal, bayesian_, init_to_trained

x = torch.linspace(-1, 1, 24, dtype=torch.float64).unsqueeze(-1)
y = torch.sin(3 * x.squeeze(-1))
x_test = torch.linspace(-1, 1, 5, dtype=torch.float64).unsqueeze(-1)


def small_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))


def regression(net: Any, noise: float = 0.1, num_data: int = 24) -> Any:
    """What stands behind ``Regression(net)`` in the snippets."""

    class Regression(PyroModule):
        def __init__(self, net: Any) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
            f = self.net(x).squeeze(-1)
            with pyro.plate("data", num_data, subsample=torch.arange(x.shape[0])):
                return pyro.sample("obs", dist.Normal(f, noise), obs=y)

    return Regression(net)


def test_from_laplace_torch() -> None:
    net, train_loader = small_network(), [(x[:12], y[:12]), (x[12:], y[12:])]
    trained = [p.detach().clone() for p in net.parameters()]
    Regression = regression
    # [laplace-torch]
    model = Regression(bayesian_(net, prior=FanInNormal()))
    guide = AutoLaplace(model, structure="kronecker", init_loc_fn=init_to_trained).initialize(x[:8], y[:8])
    guide.laplace_approximation(train_loader, map_tolerance=float("inf"))
    guide.optimize_hyperparameters()
    predictive = guide.predictive(x_test)["obs"]  # a distribution: predictive.mean, predictive.variance
    # [end laplace-torch]
    assert torch.allclose(torch.cat([p.flatten() for p in trained]).sum(), guide.loc.detach().sum())
    assert bool((predictive.variance > 0.1**2).all())


def test_from_tyxe() -> None:
    net, Regression = small_network(), regression
    # [tyxe]
    model = Regression(bayesian_(net, prior=dist.Normal(0.0, 1.0)))
    guide = AutoMixture(model, num_components=1, component="normal", init_loc_fn=init_to_trained)
    fit(model, guide, (x, y), num_steps=100, optim=0.01)
    prediction = posterior_predictive(model, guide, (x_test,), num_samples=32)
    mean, sd = prediction.mean.mean(0), prediction.mean.std(0)
    # [end tyxe]
    assert mean.shape == sd.shape == (5,)
    assert bool((sd > 0).all())


def test_from_edward2() -> None:
    net, Regression, N, T, loader = small_network(), regression, 24, 20, [(x[:12], y[:12]), (x[12:], y[12:])]
    # [edward2]
    preset = dusenberry2020(num_data=N)
    model = Regression(preset.convert_(net))
    guide = preset.guide(model, num_components=4)
    fit(model, guide, loader, num_steps=T, elbo=preset.elbo(num_steps=T))
    # [end edward2]
    assert guide.sample_posterior((8,))["net.0.r"].shape[0] == 8


def test_from_plain_pyro() -> None:
    net, Regression = small_network(), regression
    # [pyro]
    model = Regression(bayesian_(net, prior=dist.Normal(0.0, 1.0), packed=True))  # one site for all weights
    guide = AutoMixture(model, num_components=1, component="normal")
    result = fit(model, guide, (x, y), num_steps=200, optim=0.01)
    samples = posterior_predictive(model, guide, (x_test,), num_samples=100).samples
    # [end pyro]
    assert samples.shape == (100, 5)
    assert result.losses[-20:].mean() < result.losses[:20].mean()
