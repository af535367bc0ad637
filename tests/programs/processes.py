# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Models as people write them: priors without a density, parameters, hierarchies, mixtures, Pyro's own examples."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_bnn.nn import bayesian_
from tests.programs.batches import normal
from tests.programs.plain import linear
from tests.programs.program import Case, inputs, labels, program


@program
def eight_schools() -> Case:
    def model(data: Tensor) -> Any:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        with pyro.plate("data", len(data)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            return pyro.sample("obs", dist.Normal(mu + tau * eta, data[:, 1]), obs=data[:, 0])

    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]) / 10
    sd = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]) / 10
    return Case(model, (torch.stack([y, sd], -1),), 1, (0,), guide_rows=True)


@program
def flat_prior() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        w = pyro.sample("w", dist.ImproperUniform(constraints.real_vector, (), (3,)))
        return normal((x * w).sum(-1), y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def model_with_parameters() -> Case:
    """A network that is learned, under a Bayesian last layer."""
    features = nn.Sequential(nn.Linear(2, 3), nn.Tanh())

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        h = features(x)
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        return normal((h * w).sum(-1), y)

    return Case(model, (torch.randn(10, 2), torch.randn(10)), 1, (0, 0), net=features)


@program
def pyro_parameter() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        sd = pyro.param("sd", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, sd), obs=y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def mixture_likelihood() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        mix = dist.Categorical(torch.tensor([0.4, 0.6]))
        parts = dist.Normal(torch.stack([f, -f], -1), torch.tensor([0.5, 1.0]))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.MixtureSameFamily(mix, parts), obs=y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def zero_inflated() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.ZeroInflatedPoisson(f.exp(), gate=torch.tensor(0.3)), obs=y)

    return Case(model, (inputs(), labels(10, 4).double()), 1, (0, 0))


@program
def correlated_prior() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        L = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.2, 0.1, 0.7]])
        w = pyro.sample("w", dist.MultivariateNormal(torch.zeros(3), scale_tril=L))
        return normal((x * w).sum(-1), y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def positive_weights() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        w = pyro.sample("w", dist.Gamma(torch.full((3,), 2.0), 2.0).to_event(1))
        return normal((x * w).sum(-1), y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def horseshoe() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        tau = pyro.sample("tau", dist.HalfCauchy(torch.ones(3)).to_event(1))
        w = pyro.sample("w", dist.Normal(torch.zeros(3), tau).to_event(1))
        return normal((x * w).sum(-1), y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def random_walk() -> Case:
    """Latents in a loop, each the mean of the next."""

    def model(y: Tensor | None = None) -> None:
        z: Any = torch.zeros(())
        for t in range(4):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"y_{t}", dist.Normal(z, 0.5), obs=None if y is None else y[t])

    return Case(model, (torch.randn(4),), 0)


@program
def gaussian_process() -> Case:
    """One observation of all points together."""

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
        distance = (x[:, None] - x[None]).square()
        K = scale[..., None, None] * (-0.5 * distance / length[..., None, None]).exp() + 0.3 * torch.eye(
            len(x)
        )
        return pyro.sample("obs", dist.MultivariateNormal(torch.zeros(len(x)), K), obs=y)

    return Case(model, (torch.linspace(-1, 1, 3), torch.randn(3)), 1)


@program
def keyword_arguments() -> Case:
    def model(*, x: Tensor, y: Tensor | None = None) -> Any:
        return normal(linear(x), y)

    def positional(x: Tensor, y: Tensor | None = None) -> Any:
        return model(x=x, y=y)

    return Case(positional, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def empirical_bayes_network() -> Case:
    """A trained scale of the noise beside a Bayesian network."""
    net = bayesian_(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)))
    log_sd = nn.Parameter(torch.tensor(-0.5))

    class Model(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.log_sd = net, log_sd

        def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
            f = self.net(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                return pyro.sample("obs", dist.Normal(f, self.log_sd.exp()), obs=y)

    return Case(Model(), (torch.randn(10, 2), torch.randn(10)), 1, (0, 0))


@program
def nested_model() -> Case:
    """A model that calls another, whose plate is declared outside."""

    def prior(features: int) -> Tensor:
        with pyro.plate("features", features):
            return pyro.sample("w", dist.Normal(0.0, 1.0))

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        w = prior(x.shape[-1])
        return normal((x * w).sum(-1) if w.dim() == 1 else (x * w.unsqueeze(-2)).sum(-1), y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def censored() -> Case:
    """Survival times, some of which are known to be larger only."""

    def model(x: Tensor, seen: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        d = dist.Exponential(f.exp())
        with pyro.plate("data", len(x)):
            pyro.factor(
                "censored", torch.where(seen, torch.zeros(()), -f.exp() * (y if y is not None else 0.0))
            )
            with pyro.poutine.mask(mask=seen):
                return pyro.sample("obs", d, obs=y)

    return Case(model, (inputs(), torch.arange(10) % 3 > 0, torch.rand(10) + 0.1), 2, (0, 0, 0))


@program
def enumerated_latent() -> Case:
    """A discrete latent beside continuous ones, for enumeration."""

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            return pyro.sample("obs", dist.Normal(f + z, 0.5), obs=y)

    refuse = ("Laplace", "Hessian-free", "log evidence", "bound, K = 2")
    data = (inputs(), torch.randn(10))
    return Case(model, data, 1, (0, 0), guide_rows=True, must_refuse=refuse, only=refuse)
