# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Modes of networks on tables, at hyperparameters that the evidence chooses."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor, nn

from pyro_bnn.contrib.estimators.model import ROWS, ScaledPrior, TabularModel
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.nn import bayesian_
from pyro_bnn.ops.newton import lbfgs, newton_cg, value_and_gradient

Method = Literal["laplace", "mixture_of_laplace", "rank1", "ensemble", "hfl"]
#: L-BFGS iterations between two updates of the hyperparameters, and at most at fixed ones.
ROUND, LONG = 100, 2000
#: Nats per 50 iterations of L-BFGS that are worth going on for.
LEAST = 0.01
#: So many latents get exact Newton steps, which cost next to nothing there.
FEW = 200
#: Between which values the evidence chooses scales of priors.
SCALES = (1e-3, 30.0)
#: The smallest noise, in standard deviations of the targets: data may have none to speak of.
NOISE_FLOOR = 1e-3


@dataclass(frozen=True)
class Settings:
    """
    What a fit does.

    :param method: the posterior.
    :param structure: of the Laplace approximations.
    :param tune_prior: whether the evidence chooses the scales of the priors.
    :param tune_noise: whether it chooses the noise.
    :param members: modes of an ensemble or a mixture, components of a rank-1 posterior.
    :param samples: draws kept of a rank-1 posterior.
    :param max_iter: updates of the hyperparameters.
    :param tol: the gain in log evidence per row that is worth another one.
    :param steps: of variational inference.
    :param held_out: the fraction of rows that stops them early, or 0.
    """

    method: Method
    structure: Any
    tune_prior: bool
    tune_noise: bool
    members: int
    samples: int
    max_iter: int
    tol: float
    steps: int
    held_out: float


class Mode:
    """
    A mode of the joint density, and hyperparameters at a fixed point of the evidence.

    :param make_net: makes a plain network.
    :param make_model: makes the model of a network whose weights are random, given its noise.
    :param gain: of the priors at the start.
    :param noise: at the start, shape ``()`` or ``(D,)``; ``None`` for labels.
    :param data: inputs, targets, perhaps weights.
    :param settings: see :class:`Settings`.
    """

    def __init__(
        self,
        make_net: Callable[[], nn.Module],
        make_model: Callable[..., TabularModel],
        gain: float,
        noise: Tensor | None,
        data: tuple[Tensor, ...],
        settings: Settings,
    ) -> None:
        self.make_net, self.make_model, self.data, self.settings = make_net, make_model, data, settings
        self.prior = ScaledPrior(gain)
        net = bayesian_(make_net(), prior=self.prior)
        left = [name for name, _ in net.named_parameters()]
        if left:
            raise ValueError(
                f"network: its parameters {left} are in layers that have no priors (normalisation layers, parameters outside "
                "of layers), so that no posterior is over them: leave such layers out."
            )
        self.model = make_model(net, noise)
        self.floor = None if noise is None else NOISE_FLOOR * self.model.y_scale
        self.rows = float(data[2].sum()) if len(data) > 2 else len(data[0])
        self.history: list[float] = []
        self.converged = False
        self.path = [[value.clone() for value in self._tuned()]]

    def start(self) -> AutoLaplace:
        """A guide at a draw of the prior."""
        guide = AutoLaplace(self.model, structure=self.settings.structure, init_loc_fn=init_to_sample)
        return guide.initialize(*self.data)

    def descend(self, guide: AutoLaplace, iterations: int) -> None:
        """Moves a point estimate downhill."""
        terms = self.terms(guide)
        few = len(guide.loc) <= FEW
        point = lbfgs(terms, guide.loc, max_iter=iterations, least_progress=0.5 if few else LEAST)
        if few:
            point = newton_cg(terms, point, tolerance=1e-8, dense_limit=FEW).point
        guide.loc.data.copy_(point)

    def terms(self, guide: AutoLaplace) -> Callable[[Tensor], Iterable[Tensor]]:
        """
        The negative log joint density of packed vectors, by the plain network and without Pyro's handlers, which take most of
        the time on small data, if its gradient is that of the model.
        """

        def traced(latent: Tensor) -> Iterator[Tensor]:
            return guide.packed.losses(latent, self.data)

        plain = self.potential(guide)
        here = guide.loc.detach()
        try:
            found, expected = value_and_gradient(plain, here)[1], value_and_gradient(traced, here)[1]
        except (RuntimeError, KeyError):  # a network that cannot be called with other parameters
            return traced
        return plain if bool((found - expected).norm() <= 1e-8 * (1 + expected.norm())) else traced

    def potential(self, guide: AutoLaplace) -> Callable[[Tensor], list[Tensor]]:
        """The negative log joint density up to a constant, at the hyperparameters in use."""
        net, model, (x, y, *weights) = self.make_net().eval(), self.model, self.data
        x, slices = model.standardized(x), guide.packed.space.slices
        sites = {name: (slices[f"net.{name}"], p.shape) for name, p in net.named_parameters()}
        precision = torch.cat(
            [self.prior.scales[n].pow(-2).expand(shape.numel()) for n, (_, shape) in sites.items()]
        )

        def function(u: Tensor) -> list[Tensor]:
            values = {name: u[where].view(shape) for name, (where, shape) in sites.items()}
            loss = model.loss(torch.func.functional_call(net, values, (x,)), y)
            total = loss.sum() if not weights else weights[0] @ loss
            return [total + 0.5 * (precision * u.square()).sum()]

        return function

    def settle(self, guide: AutoLaplace) -> AutoLaplace:
        """Moves a point estimate to its mode at the hyperparameters in use."""
        self.descend(guide, LONG)
        return guide

    def follow(self, guide: AutoLaplace) -> AutoLaplace:
        """
        Moves another start to its mode along the hyperparameters that :meth:`find` went through: the final ones, which
        trust the data, would leave it in the nearest of many wiggly modes.
        """
        *passed, last = self.path
        for values in passed:
            self._set(values)
            self.descend(guide, ROUND)
        self._set(last)
        return self.settle(guide)

    def _tuned(self) -> list[Tensor]:
        """The hyperparameters, which are changed in place."""
        return [*self.prior.scales.values(), *([] if self.floor is None else [self.model.noise])]

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for mine, value in zip(self._tuned(), values, strict=True):
            mine.copy_(value)

    def approximate(self, guide: AutoLaplace) -> AutoLaplace:
        """The Laplace approximation at a point estimate."""
        return guide.laplace_approximation(self.data, map_tolerance=math.inf)

    def find(self, guide: AutoLaplace) -> AutoLaplace:
        """
        Alternates L-BFGS on the weights with MacKay's fixed point of the evidence, until the evidence gains no more.

        :param guide: where to start.
        :return: the Laplace approximation at the mode.
        """
        s = self.settings
        self.converged = not (s.tune_prior or s.tune_noise)
        for _ in range(0 if self.converged else s.max_iter):
            self.descend(guide, ROUND)
            self.history.append(float(self.approximate(guide).log_evidence()))
            self.converged = len(self.history) > 1 and self.history[-1] - self.history[-2] < s.tol * self.rows
            if self.converged:
                break
            self.update(guide)
            self.path.append([value.clone() for value in self._tuned()])
            guide.to_point_estimate()
        self.approximate(self.settle(guide.to_point_estimate()))
        self.history.append(float(guide.log_evidence()))
        return guide

    @torch.no_grad()
    def update(self, guide: AutoLaplace) -> None:
        r"""
        One step of MacKay's fixed point (1992): :math:`s^2 = |w|^2 / \gamma` with
        :math:`\gamma = n - \operatorname{tr}(P^{-1}) / s^2` for every parameter of n entries, and
        :math:`\sigma_d^2 = \sum_n (y_{nd} - f_{nd})^2 / (N - \gamma_d)` with
        :math:`\gamma_d = \sum_n \operatorname{Var} f_{nd} / \sigma_d^2` for every output.
        """
        if self.settings.tune_noise:
            self._update_noise(guide)
        if not self.settings.tune_prior:
            return
        spread, values = guide.packed.space.unpack(guide.posterior.variance), guide.median()
        for name, scale in self.prior.scales.items():
            w, v = values[f"net.{name}"], spread[f"net.{name}"]
            effective = (w.numel() - v.sum() / scale.square()).clamp(min=1e-3)
            scale.copy_((w.square().sum() / effective).sqrt().clamp(*SCALES))

    def _update_noise(self, guide: AutoLaplace) -> None:
        x, y, *weights = self.data
        found = [guide.linearized_outputs(some)["obs"] for some in x.split(ROWS)]
        f = torch.cat([outputs.mean for outputs in found]).reshape(y.shape)
        variance = torch.cat([outputs.variance for outputs in found]).reshape(y.shape)
        w = weights[0].reshape(-1, *[1] * (y.dim() - 1)) if weights else torch.ones(())
        error, effective = (w * (y - f).square()).sum(0), (w * variance).sum(0) / self.model.noise.square()
        noise = (error / (self.rows - effective).clamp(min=0.1 * self.rows)).sqrt()
        self.model.noise.copy_(noise.maximum(self.floor))
