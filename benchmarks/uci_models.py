# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""One-hidden-layer regression, its MAP with the evidence's hyperparameters, and the posteriors built on it."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_bnn.infer import (
    ConvergenceTest,
    LinearAnnealing,
    Mixture_ELBO,
    StochasticLBFGS,
    fit,
    posterior_predictive,
)
from pyro_bnn.infer.autoguide import AutoLaplace, AutoMixture
from pyro_bnn.nn import bayesian_, rank1_
from pyro_bnn.ops.newton import lbfgs

NOISE_FLOOR = 1e-3  # in standard deviations of the targets: naval has none to speak of
LAYERS = ("0.weight", "0.bias", "2.weight", "2.bias")
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


@dataclass(frozen=True)
class Settings:
    """
    What a fit may cost.

    :param hidden: hidden units.
    :param activation: "tanh" or "relu".
    :param ard: whether every input has a prior scale of its own.
    :param epochs: epochs of Adam with minibatches before L-BFGS; 0 for none.
    :param rounds: of L-BFGS and an approximation, with an update of the hyperparameters in between.
    :param iterations: of L-BFGS per round.
    :param members: of the ensemble and the mixture.
    :param steps: of variational inference by Adam.
    :param batch: rows per step of Adam.
    :param noise_draws: steps of variational inference by stochastic L-BFGS, of ten iterations each.
    :param large_batch: rows per step of it.
    :param divergence: of its bound, the "sum" over components or the "mean".
    :param keep_noise: whether it keeps the noise of the evidence.
    :param targets: test inputs for which Hessian-free Laplace solves.
    :param draws: of the weights at test time.
    :param settle_noise: whether the noise of a rank-1 mixture is set to its optimum after the steps.
    :param nuts: chains, steps of adaptation and draws per chain.
    :param short: modes, steps of adaptation and steps of the microcanonical chains that start there.
    :param collapse: what is integrated out of them: the output layer.
    """

    hidden: int = 50
    activation: str = "tanh"
    ard: bool = False
    epochs: int = 0
    rounds: int = 10
    iterations: int = 100
    members: int = 5
    steps: int = 800
    batch: int = 1000
    noise_draws: int = 160
    large_batch: int = 2000
    divergence: str = "sum"
    keep_noise: bool = True
    targets: int = 256
    draws: int = 100
    settle_noise: bool = False
    nuts: tuple[int, int, int] = (2, 300, 200)
    short: tuple[int, int, int] = (10, 250, 500)
    collapse: str | None = "net.2"


class Regression(PyroModule):
    """
    A network as the mean of a Normal with one standard deviation.

    :param net: the network.
    :param noise: the standard deviation, or where it starts.
    :param learn_noise: whether it is a parameter.
    """

    def __init__(self, net: nn.Module, noise: float = 1.0, learn_noise: bool = True) -> None:
        super().__init__()
        self.net = net
        log_noise = torch.tensor(math.log(noise))
        if learn_noise:
            self.log_noise = nn.Parameter(log_noise)
        else:
            self.register_buffer("log_noise", log_noise)
        self.size: int | None = None  # of the whole data, while minibatches are in use

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The model."""
        f = self.net(x).squeeze(-1)
        noise = self.log_noise.clamp(min=math.log(NOISE_FLOOR)).exp()
        with pyro.plate("data", self.size or len(x), subsample_size=len(x) if self.size else None):
            return pyro.sample("obs", dist.Normal(f, noise), obs=y)

    @property
    def noise(self) -> float:
        """The standard deviation, in standard deviations of the targets."""
        return max(float(self.log_noise.detach().exp()), NOISE_FLOOR)


class Batches:
    """Shuffled minibatches of tensors in memory."""

    def __init__(self, x: Tensor, y: Tensor, size: int) -> None:
        self.x, self.y, self.size = x, y, size

    def __len__(self) -> int:
        return max(1, len(self.x) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x))
        for i in range(len(self)):
            index = order[i * self.size : (i + 1) * self.size]
            yield self.x[index], self.y[index]


def network(inputs: int, settings: Settings) -> nn.Sequential:
    hidden = nn.Linear(inputs, settings.hidden)
    return nn.Sequential(hidden, ACTIVATIONS[settings.activation](), nn.Linear(settings.hidden, 1))


class Member:
    """
    A network with priors N(0, s²) per layer (per input with ARD), whose scales and noise the evidence chooses.

    :param inputs: number of inputs.
    :param settings: see :class:`Settings`.
    """

    def __init__(self, inputs: int, settings: Settings) -> None:
        first = torch.full((inputs if settings.ard else 1,), inputs**-0.5)
        self.settings = settings
        self.scales = {
            "0.weight": first,
            "0.bias": torch.ones(1),
            "2.weight": torch.full((1,), settings.hidden**-0.5),
            "2.bias": torch.ones(1),
        }
        self.model = Regression(bayesian_(network(inputs, settings), prior=self.priors()))
        self.guide: AutoLaplace | None = None
        self.gradients = 0  # of the potential of all data

    def priors(self) -> dict[str, dist.Normal]:
        """The priors; they see later changes of the scales, whose memory they share."""
        return {name: dist.Normal(torch.zeros_like(s), s) for name, s in self.scales.items()}

    def at(self, loc: Tensor, data: Any, **options: Any) -> AutoLaplace:
        """A Laplace guide at a point estimate, before its approximation."""
        guide = AutoLaplace(self.model, **options).initialize(*data)
        guide.loc.data.copy_(loc)
        return guide

    def fit(self, data: tuple[Tensor, Tensor], seed: int) -> "Member":
        """The state after ``settings.rounds`` rounds."""
        rounds = islice(self.alternate(data, seed), self.settings.rounds)
        self.guide = deque(rounds, maxlen=1).pop()
        return self

    def alternate(self, data: tuple[Tensor, Tensor], seed: int) -> Iterator[AutoLaplace]:
        """
        Alternates L-BFGS on the weights with MacKay's fixed point of the evidence: s² = |w|² / γ with
        γ = n - tr(P⁻¹)/s² effective parameters per group of n weights, and noise² = squared error / (N - Σ γ).

        :param data: training data.
        :param seed: of the initial weights, a draw of the prior.
        :return: an endless iterator over full-GGN approximations at the hyperparameters in use.
        """
        s = self.settings
        pyro.set_rng_seed(seed)
        guide = AutoLaplace(self.model, init_loc_fn=lambda site: site["fn"].sample()).initialize(*data)
        if s.epochs:
            self._adam(guide, data)
        loc = guide.loc.detach().clone()
        while True:
            energy = self.potential(data)
            loc = lbfgs(lambda u, energy=energy: [energy(u)], loc, max_iter=s.iterations)
            found = self.at(loc, data).laplace_approximation(data, map_tolerance=math.inf)
            yield found
            self._update(found, data)

    def potential(self, data: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
        """
        The negative log joint density up to a constant, at the hyperparameters in use, as a plain function of the
        packed vector: on small data an evaluation of the model costs several times as much.
        """
        x, y = data
        hidden, inputs = self.settings.hidden, x.shape[1]
        sizes = {"0.weight": hidden * inputs, "0.bias": hidden, "2.weight": hidden, "2.bias": 1}
        precision = torch.cat(
            [s.pow(-2).expand(sizes[n] // len(s), len(s)).reshape(-1) for n, s in self.scales.items()]
        )
        scale, activation = self.model.noise**-2, self.model.net[1]

        def function(u: Tensor) -> Tensor:
            self.gradients += 1
            w1, b1, w2, b2 = u.split(list(sizes.values()))
            f = activation(torch.addmm(b1, x, w1.view(hidden, inputs).T)) @ w2 + b2
            return 0.5 * (scale * (y - f).square().sum() + (precision * u.square()).sum())

        return function

    def _adam(self, guide: AutoLaplace, data: tuple[Tensor, Tensor]) -> None:
        self.model.size = len(data[0])
        loader = Batches(*data, self.settings.batch)
        steps = self.settings.epochs * len(loader)
        fit(
            self.model,
            guide,
            loader,
            num_epochs=self.settings.epochs,
            optim=0.01,
            progress_bar=False,
            scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, steps),
        )
        self.model.size = None

    @torch.no_grad()
    def _update(self, guide: AutoLaplace, data: tuple[Tensor, Tensor]) -> None:
        variance, values = guide.posterior.variance, guide.median()
        spread = guide.packed.space.unpack(variance)
        total = 0.0
        for name, scale in self.scales.items():
            w, v = values[f"net.{name}"], spread[f"net.{name}"]
            w, v = (w, v) if len(scale) > 1 else (w.reshape(-1, 1), v.reshape(-1, 1))
            effective = (len(w) - v.sum(0) / scale.square()).clamp(min=1e-3)
            scale.copy_((w.square().sum(0) / effective).sqrt().clamp(1e-3, 30.0))
            total += float(effective.sum())
        x, y = data
        with torch.enable_grad():
            f = guide.packed.outputs(guide.loc.detach().requires_grad_(True), ((x,), {}))[0].outputs.detach()
        error = (y - f.squeeze(-1)).square().sum() / max(len(y) - total, 0.1 * len(y))
        self.model.log_noise.copy_(0.5 * error.clamp(min=NOISE_FLOOR**2).log())


def variational(
    model: Regression, guide: AutoMixture, data: tuple[Tensor, Tensor], settings: Settings, lr: float
) -> AutoMixture:
    """Fits a guide and the noise by the ELBO, with the KL annealed over the first half of the steps."""
    loader: Any = data
    if len(data[0]) > 2 * settings.batch:
        model.size = len(data[0])
        loader = Batches(*data, settings.batch)
    steps = settings.steps
    fit(
        model,
        guide,
        loader,
        num_steps=steps,
        optim=lr,
        progress_bar=False,
        elbo=Mixture_ELBO(kl_scale=LinearAnnealing(max(1, steps // 2))),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps, lr / 20),
    )
    model.size = None
    return guide


def settle_noise(model: Regression, guide: AutoMixture, data: tuple[Tensor, Tensor], draws: int) -> None:
    r"""
    Sets the noise to the maximum of the bound given the guide, :math:`\sigma^2 = E_q[\frac1N \sum_n (y_n - f(x_n))^2]`.

    :param model: the model.
    :param guide: its guide.
    :param data: inputs and targets.
    :param draws: of the weights for the expectation.
    """
    found = posterior_predictive(model, guide, data, num_samples=draws, batch_size=2000)
    with torch.no_grad():
        error = (data[1] - found.mean).square().mean()
        model.log_noise.fill_(0.5 * error.clamp(min=NOISE_FLOOR**2).log())


def mean_field(member: Member, data: tuple[Tensor, Tensor]) -> tuple[Regression, AutoMixture]:
    """Mean-field VI under the member's priors, from its MAP."""
    assert member.guide is not None
    s, start = member.settings, member.guide.median()
    net = bayesian_(network(data[0].shape[1], s), prior=member.priors())
    model = Regression(net, member.model.noise)
    guide = AutoMixture(model, 1, init_loc_fn=lambda site: start[site["name"]].clone(), init_scale=0.01)
    return model, variational(model, guide, data, s, 0.01)


def stochastic_lbfgs(
    model: Regression, guide: AutoMixture, data: tuple[Tensor, Tensor], settings: Settings
) -> dict[str, Any]:
    """
    Fits a guide by stochastic L-BFGS, with antithetic draws.

    :return: what the convergence test says of the last half of the steps, and the mean of the last losses.
    """
    loader: Any = data
    if len(data[0]) > settings.large_batch:
        model.size = len(data[0])
        loader = Batches(*data, settings.large_batch)
    steps = settings.noise_draws
    losses = fit(
        model,
        guide,
        loader,
        num_steps=steps,
        optim=partial(StochasticLBFGS, max_iter=10),
        progress_bar=False,
        elbo=Mixture_ELBO(kl=settings.divergence, num_particles=2, antithetic=True),
    ).losses
    model.size = None
    return {
        "bound": ConvergenceTest(window=max(16, steps // 2)).status(losses),
        "loss": float(losses[-steps // 8 :].mean()),
    }


def rank1(
    member: Member,
    data: tuple[Tensor, Tensor],
    family: str,
    components: int = 4,
    *,
    rest: str = "normal",
    learn_noise: bool = True,
) -> tuple[Regression, AutoMixture]:
    """
    A rank-1 mixture before its training; shared weights and biases have the member's priors and start at its MAP. ``rest`` is
    the family of the biases.
    """
    assert member.guide is not None
    s, start = member.settings, member.guide.median()
    priors = member.priors()
    net = network(data[0].shape[1], s)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(start[f"net.{name}"])
    one = torch.ones(())
    factor = dist.Cauchy(one, 0.1 * one) if family == "cauchy" else dist.Normal(one, 0.5 * one)
    rank1_(
        net,
        prior=factor,
        weight_prior={n: p for n, p in priors.items() if "weight" in n},
        bias_prior={n: p for n, p in priors.items() if "bias" in n},
    )
    model = Regression(net, member.model.noise, learn_noise)
    kind = "cauchy" if family == "cauchy" else "normal"
    scale = 0.003 if family == "cauchy" else 0.03
    guide = AutoMixture(model, components, kind, rest=rest, noise="per_example", init_scale=scale)
    return model, guide
