# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Plain programs: one network or linear predictor, one table, every likelihood."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from pyro_bnn.nn import bayesian_, rank1_
from tests.programs.program import Case, inputs, labels, program, regression


def linear(x: Tensor, scale: float = 1.0) -> Tensor:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), scale).to_event(1))
    return (x * w).sum(-1)


def table(likelihood: Any, y: Tensor, **options: Any) -> Case:
    """A linear predictor and a likelihood."""

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", likelihood(f), obs=y)

    return Case(model, (inputs(len(y)), y), 1, (0, 0), **options)


def perceptron(outputs: int = 1, features: int = 3, width: int = 3) -> nn.Module:
    return bayesian_(nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, outputs)))


def network(likelihood: Any, y: Tensor, outputs: int, features: int = 2) -> Case:
    """A perceptron and a likelihood of its outputs."""
    net = perceptron(outputs, features)

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", likelihood(f), obs=y)

    return Case(model, (torch.randn(len(y), features), y), 1, (0, 0), net=net, kron=("0", "2"))


@program
def linear_regression() -> Case:
    return table(lambda f: dist.Normal(f, 0.5), torch.randn(10))


@program
def seventy_rows() -> Case:
    return table(lambda f: dist.Normal(f, 0.5), torch.randn(70))


@program
def one_row() -> Case:
    return table(lambda f: dist.Normal(f, 0.5), torch.randn(1))


@program
def logistic_regression() -> Case:
    return table(lambda f: dist.Bernoulli(logits=f), labels(10, 2).double())


@program
def logistic_integer_labels() -> Case:
    """Torch's Bernoulli has no density at integers."""
    refuse = (
        "bound",
        "log-mixture",
        "one step",
        "Laplace",
        "Hessian-free",
        "log evidence",
        "posterior predictive",
        "export",
    )
    return table(lambda f: dist.Bernoulli(logits=f), labels(10, 2), must_refuse=refuse, only=refuse)


@program
def poisson_regression() -> Case:
    return table(lambda f: dist.Poisson(f.exp()), labels(10, 4).double())


@program
def negative_binomial() -> Case:
    return table(lambda f: dist.NegativeBinomial(3.0, logits=f - 1), labels(10, 4).double())


@program
def binomial_of_rows() -> Case:
    def model(x: Tensor, total: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Binomial(total, logits=f), obs=y)

    total = torch.arange(10.0) % 3 + 2
    return Case(model, (inputs(), total, torch.minimum(labels(10, 4).double(), total)), 2, (0, 0, 0))


@program
def student_t() -> Case:
    return table(lambda f: dist.StudentT(4.0, f, 0.5), torch.randn(10))


@program
def double_exponential() -> Case:
    return table(lambda f: dist.Laplace(f, 0.5), torch.randn(10), must_refuse=())


@program
def gamma_regression() -> Case:
    return table(lambda f: dist.Gamma(2.0, f.exp()), torch.rand(10) + 0.2)


@program
def lognormal_regression() -> Case:
    return table(lambda f: dist.LogNormal(f, 0.5), torch.rand(10) + 0.2)


@program
def beta_regression() -> Case:
    return table(lambda f: dist.Beta(f.exp() * 2, 3.0), 0.1 + 0.8 * torch.rand(10))


@program
def net_regression() -> Case:
    return network(lambda f: dist.Normal(f[..., 0], 0.5), torch.randn(10), 1)


@program
def net_classification() -> Case:
    return network(lambda f: dist.Categorical(logits=f), labels(10), 3)


@program
def net_heteroscedastic() -> Case:
    return network(lambda f: dist.Normal(f[..., 0], (0.3 * f[..., 1]).exp()), torch.randn(10), 2)


@program
def net_multi_output() -> Case:
    return network(lambda f: dist.Normal(f, 0.5).to_event(1), torch.randn(10, 2), 2)


@program
def net_multivariate() -> Case:
    L = torch.tensor([[0.6, 0.0], [0.2, 0.4]])
    return network(lambda f: dist.MultivariateNormal(f, scale_tril=L), torch.randn(10, 2), 2)


@program
def net_seventy_labels() -> Case:
    return network(lambda f: dist.Categorical(logits=f), labels(70), 3)


@program
def packed_weights() -> Case:
    net = bayesian_(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), packed=True)
    return Case(regression(net), (torch.randn(10, 2), torch.randn(10)), 1, (0, 0), net=net)


@program
def rank_one() -> Case:
    net = rank1_(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)))
    return Case(regression(net), (torch.randn(10, 2), torch.randn(10)), 1, (0, 0), net=net)


@program
def latent_noise() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        sigma = pyro.sample("sigma", dist.LogNormal(-0.5, 0.5))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, sigma), obs=y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def groups() -> Case:
    def model(x: Tensor, group: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        tau = pyro.sample("tau", dist.LogNormal(0.0, 0.3))
        with pyro.plate("groups", 3):
            effect = pyro.sample("effect", dist.Normal(0.0, tau))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f + effect[..., group], 0.5), obs=y)

    return Case(model, (inputs(), torch.arange(10) % 3, torch.randn(10)), 2, (0, 0, 0))


@program
def groups_not_centred() -> Case:
    def model(x: Tensor, group: Tensor, y: Tensor | None = None) -> Any:
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("groups", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        effect = tau[..., None] * z if tau.dim() else tau * z
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x[..., 0] + effect[..., group], 0.5), obs=y)

    return Case(model, (inputs(), torch.arange(10) % 3, torch.randn(10)), 2, (0, 0, 0))


@program
def two_tasks() -> Case:
    net = perceptron(2, 2)

    def model(x: Tensor, y: Tensor | None = None, label: Tensor | None = None) -> Any:
        f = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("value", dist.Normal(f[..., 0], 0.5), obs=y)
            pyro.sample("label", dist.Bernoulli(logits=f[..., 1]), obs=label)

    return Case(model, (torch.randn(10, 2), torch.randn(10), labels(10, 2).double()), 1, (0, 0, 0), net=net)


@program
def autoregressive() -> Case:
    def model(past: Tensor, y: Tensor | None = None) -> Any:
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 0.5).to_event(1))
        with pyro.plate("time", len(past)):
            return pyro.sample("obs", dist.Normal((past * a).sum(-1), 0.5), obs=y)

    series = torch.randn(12).cumsum(0)
    return Case(model, (torch.stack([series[1:-1], series[:-2]], -1), series[2:]), 1, (0, 0))


@program
def simplex_weights() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal((x * w).sum(-1), 0.5), obs=y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def textbook_network() -> Case:
    class Net(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = PyroModule[nn.Linear](3, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

        def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                return pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    return Case(Net(), (inputs(), torch.randn(10)), 1, (0, 0))


@program
def matrix_product() -> Case:
    """Pyro's habit x @ w, which does not broadcast over draws."""

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ w + b, 0.5), obs=y)

    return Case(model, (inputs(), torch.randn(10)), 1, (0, 0))


@program
def ordinal() -> Case:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        f = linear(x)
        cut = torch.tensor([-1.0, 0.5])
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.OrderedLogistic(f, cut), obs=y)

    return Case(model, (inputs(), labels()), 1, (0, 0))
