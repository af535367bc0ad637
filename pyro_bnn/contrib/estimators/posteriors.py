# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Posteriors around modes of networks on tables, and their predictions."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_bnn.contrib.estimators.model import ROWS, TabularModel
from pyro_bnn.contrib.estimators.modes import Mode
from pyro_bnn.infer import EarlyStopping, LinearAnnealing, Mixture_ELBO, fit, posterior_predictive
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplaceMixture, AutoMixture
from pyro_bnn.nn import rank1_


@dataclass
class TabularPosterior:
    """
    A fitted posterior and what it predicts.

    :param model: the model.
    :param draws: by site, modes or draws of the posterior in the first dimension.
    :param guide: a Laplace approximation, or a mixture of some, through which predictions go; ``None`` for draws alone.
    :param chains: how many fits the draws are from, one after the other.
    :param data: for Hessian-free Laplace the data, with which it solves for the inputs of every prediction.
    """

    model: TabularModel
    draws: dict[str, Tensor]
    guide: Any = None
    chains: int = 1
    data: tuple[Tensor, ...] = ()

    def at(self, x: Tensor | None) -> Any:
        """The guide for predictions at some inputs, which only Hessian-free Laplace needs, or the draws."""
        if self.guide is None or not self.data:
            return self.draws if self.guide is None else self.guide
        guide = AutoHessianFreeLaplace(self.model, curvature="ggn", tolerance=1e-8).initialize(*self.data)
        guide.loc.data.copy_(self.guide.loc.detach())
        return guide.laplace_approximation(self.data, targets=(x,), map_tolerance=math.inf)

    def pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        """Inputs in pieces that bound memory: Hessian-free Laplace holds a displacement per row and output."""
        return x.split(ROWS // 5 if self.data else ROWS)

    def means(self, x: Tensor) -> Tensor:
        """The mean of a target, or class probabilities, at every mode or draw, shape (S, N, ...)."""
        parts = [posterior_predictive(self.model, self.draws, (some,)).mean for some in self.pieces(x)]
        return torch.cat([part for part in parts if part is not None], 1)

    def variances(self, x: Tensor) -> Tensor:
        """The variance of a target's mean around every mode or draw, shape (S, N) or (S, N, D)."""
        if self.guide is None:
            return torch.zeros((), dtype=torch.float64)
        parts = []
        for some in self.pieces(x):
            guide = self.at(some)
            each = [g.linearized_outputs(some)["obs"] for g in getattr(guide, "components", [guide])]
            parts.append(torch.stack([outputs.variance.squeeze(-1) for outputs in each]))
        return torch.cat(parts, 1)

    def normals(self, x: Tensor, *, noise: bool = True) -> tuple[Tensor, torch.distributions.Normal]:
        """
        The predictive of a regression, with or without the noise, as weights, shape (S,), and Normals, shape (S, N) or (S, N, D).
        """
        mean, variance = self.means(x), self.variances(x)
        variance = variance.expand_as(mean) + (self.model.noise.detach().square() if noise else 0.0)
        normals = torch.distributions.Normal(mean, variance.sqrt(), validate_args=False)
        return self.weights(), normals

    def weights(self) -> Tensor:
        """Those of the modes or draws, shape (S,)."""
        number = len(next(iter(self.draws.values())))
        equal = torch.full((number,), 1 / number, dtype=torch.float64)
        return self.guide.log_weights.exp() if hasattr(self.guide, "log_weights") else equal

    def probabilities(self, x: Tensor) -> Tensor:
        """Of the classes, shape (N, C), or of the second of two, shape (N,)."""
        if self.guide is None:
            return self.means(x).mean(0)
        return torch.cat([self.at(some).predictive(some)["obs"].probs for some in self.pieces(x)])

    def samples(self, x: Tensor, number: int) -> Tensor:
        """Targets drawn jointly for all rows, shape (number, N, ...)."""
        posterior = self.at(x)
        if self.guide is None:
            index = torch.multinomial(self.weights(), number, replacement=True)
            posterior = {name: value[index] for name, value in self.draws.items()}
        found = posterior_predictive(self.model, posterior, (x,), num_samples=number).samples
        assert found is not None
        return found


def fit_posterior(mode: Mode) -> TabularPosterior:
    """The posterior that the settings name, around the mode."""
    model, s = mode.model, mode.settings
    # all start at draws of the prior as it is before the data scale it: wider ones are far from everything
    several = s.method in ("ensemble", "mixture_of_laplace")
    start, *others = [mode.start() for _ in range(s.members if several else 1)]
    first = mode.find(start)
    if s.method in ("laplace", "hfl"):
        return TabularPosterior(model, stacked([first]), first, data=mode.data if s.method == "hfl" else ())
    if s.method == "rank1":
        return rank1(mode, first.median())
    members = [first, *map(mode.follow, others)]
    if s.method == "ensemble":
        posterior = TabularPosterior(model, stacked(members), chains=s.members)
        warn_of_one_mode(posterior.means(mode.data[0]))
        return posterior
    guide = AutoLaplaceMixture(model, s.members, structure=s.structure).initialize(*mode.data)
    guide.set_modes(members).laplace_approximation(mode.data)
    return TabularPosterior(model, stacked(members), guide)


def warn_of_one_mode(means: Tensor) -> None:
    """Warns if the members of an ensemble, shape (S, N, ...), are one function: then it is a point estimate."""
    between, across = (means - means[0]).abs().max(), (means - means.mean(1, keepdim=True)).abs().max()
    if len(means) > 1 and bool(between <= 1e-3 * across):
        warnings.warn(
            f"method='ensemble': the {len(means)} members are the same function (the network is linear, or nearly so at the "
            "scales that the evidence chose), and their variance misses all uncertainty of the weights: pass a number for "
            "prior_scale, or take method='laplace' or 'mixture_of_laplace'.",
            stacklevel=5,
        )


def stacked(guides: Sequence[Any]) -> dict[str, Tensor]:
    """The medians of guides as draws."""
    points = [guide.median() for guide in guides]
    return {name: torch.stack([point[name] for point in points]) for name in points[0]}


def rank1(mode: Mode, start: dict[str, Tensor]) -> TabularPosterior:
    """
    A rank-1 mixture of Gaussians: factors N(1, 0.5²); shared weights and biases have the priors of the mode and start there.
    """
    s, net, scales = mode.settings, mode.make_net(), mode.prior.scales
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(start[f"net.{name}"])
    one = torch.ones((), dtype=torch.float64)
    rank1_(
        net,
        prior=dist.Normal(one, 0.5 * one),
        weight_prior={name: mode.prior.at(name) for name in scales if "weight" in name},
        bias_prior={name: mode.prior.at(name) for name in scales if "bias" in name},
    )
    noise = None if mode.floor is None else mode.model.noise
    model = mode.make_model(net, noise if not s.tune_noise else None)
    if s.tune_noise:
        model.noise = PyroParam(mode.model.noise.clone(), dist.constraints.positive)
    guide = AutoMixture(model, s.members, rest="normal", noise="per_example", init_scale=0.03)
    variational(model, guide, mode)
    draws = guide.sample_posterior((s.members, -(-s.samples // s.members)), by_component=True)
    return TabularPosterior(model, {n: v.flatten(0, 1) for n, v in draws.items()}, chains=s.members)


def variational(model: TabularModel, guide: AutoMixture, mode: Mode) -> None:
    """Maximises the bound, with the KL annealed over the first half of the steps."""
    s, data, callbacks = mode.settings, mode.data, []
    if s.held_out:
        order = torch.randperm(len(data[0]))
        kept = max(1, round(s.held_out * len(order)))
        if kept == len(order):
            raise ValueError(
                f"validation_fraction={s.held_out} of {kept} rows leaves none to fit: take a smaller one"
            )
        held_out = tuple(value[order[:kept]] for value in data)
        data = tuple(value[order[kept:]] for value in data)
        callbacks = [EarlyStopping(held_out, metric="nll", every=max(1, s.steps // 20), patience=5)]
    batches: Any = data
    if len(data[0]) > 2 * ROWS:
        model.num_data = len(data[0])
        batches = DataLoader(TensorDataset(*data), ROWS, shuffle=True, drop_last=True)
    fit(
        model,
        guide,
        batches,
        num_steps=s.steps,
        optim=0.01,
        elbo=Mixture_ELBO(kl_scale=LinearAnnealing(max(1, s.steps // 2))),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, s.steps, 5e-4),
        callbacks=callbacks,
        progress_bar=False,
    )
    model.num_data = None
