# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Microcanonical dynamics of a batch of chains, as functions of tensors.

A chain has a position u in R^p and a direction n of length one in whitened coordinates z, with u = R z. In continuous time
(Robnik et al., 2023, eq. 8) dz = n dt and dn = -(1 - n n^T) grad U / (p - 1) dt: the speed is constant, U + (p - 1) log(speed of
the equivalent Hamiltonian system) is conserved, and positions are distributed as exp(-U).
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Whitener(Protocol):
    """A square root R of a covariance, one for each chain."""

    def forward(self, direction: Tensor) -> Tensor:
        """R applied to the rows, shape ``(C, p)``."""

    def transposed(self, gradient: Tensor) -> Tensor:
        """R^T applied to the rows, shape ``(C, p)``."""


class Chains(NamedTuple):
    """
    The state of C chains: positions and whitened directions ``(C, p)``, log densities ``(C,)``, float64, whitened gradients of the
    log density ``(C, p)``.
    """

    position: Tensor
    direction: Tensor
    log_density: Tensor
    gradient: Tensor

    def where(self, keep: Tensor, other: "Chains") -> "Chains":
        """These chains where ``keep``, shape ``(C,)``, and the others elsewhere."""
        return Chains(*(pick(keep, own, old) for own, old in zip(self, other, strict=True)))


#: Values ``(C,)`` and gradients ``(C, p)`` of a log density at C points.
ValueAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]


class Target:
    """A log density in whitened coordinates."""

    def __init__(self, value_and_gradient: ValueAndGradient, whitener: Whitener) -> None:
        self.value_and_gradient, self.whitener = value_and_gradient, whitener

    def __call__(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """
        The log densities ``(C,)``, float64, and whitened gradients ``(C, p)`` at positions ``(C, p)``: energy errors are small
        differences of log densities, which of many data have too few digits in single precision.
        """
        value, gradient = self.value_and_gradient(position.double())
        return value, self.whitener.transposed(gradient.to(position))

    def start(self, position: Tensor, direction: Tensor) -> Chains:
        """Chains at positions, one gradient each."""
        return Chains(position, direction, *self(position))


def pick(keep: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Rows of one tensor where ``keep``, shape ``(C,)``, and of another elsewhere."""
    return torch.where(keep.reshape(keep.shape + (1,) * (own.dim() - 1)), own, other)


def normalized(x: Tensor) -> Tensor:
    """Rows ``(C, p)`` of length one."""
    return x / x.norm(dim=-1, keepdim=True)


def turn(direction: Tensor, gradient: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    r"""
    The exact flow of the directions ``(C, p)`` under constant gradients of the log density ``(C, p)`` for times ``(C,)``, and the
    change of kinetic energy ``(C,)``, minus the log volume of the flow (Steeg and Galstyan, 2021; Robnik et al., 2023):
    with d = h |g| / (p - 1) and c the cosine of direction and gradient, (p - 1) (d + log(s^2 + (1 + c) (1 - s^2) / 2)), s = exp(-d).
    """
    dims = direction.shape[-1] - 1
    length = gradient.norm(dim=-1, keepdim=True)
    ascent = gradient / length.clamp(min=torch.finfo(gradient.dtype).tiny)
    delta = step.unsqueeze(-1) * length / dims
    # half the squared distances keep the digits that 1 + c and 1 - c lose where the cosine is close to -1 and 1
    toward = 0.5 * (direction + ascent).square().sum(-1, keepdim=True)
    away = 0.5 * (direction - ascent).square().sum(-1, keepdim=True)
    shrink, lost, lost_twice = (-delta).exp(), -(-delta).expm1(), -(-2 * delta).expm1()
    turned = ascent * lost * (1 + shrink + (toward - away) / 2 * lost) + 2 * shrink * direction
    change = -0.5 * lost_twice * away
    log_growth = torch.where(
        change > -0.5, change.log1p(), (shrink.square() + 0.5 * toward * lost_twice).log()
    )
    return normalized(turned), (dims * (delta + log_growth)).squeeze(-1)


def leapfrog(target: Target, chains: Chains, step: Tensor) -> tuple[Chains, Tensor]:
    """
    One step of sizes ``(C,)``: half a turn, a move, half a turn; one gradient each. The second value is the energy error ``(C,)``:
    the change of the potential and of the kinetic energy, zero for the continuous dynamics.
    """
    direction, first = turn(chains.direction, chains.gradient, 0.5 * step)
    position = chains.position + step.unsqueeze(-1) * target.whitener.forward(direction)
    value, gradient = target(position)
    direction, second = turn(direction, gradient, 0.5 * step)
    return Chains(position, direction, value, gradient), chains.log_density - value + first + second


def refresh(direction: Tensor, noise: Tensor, step: Tensor, length: Tensor) -> Tensor:
    r"""
    Directions ``(C, p)`` that forget themselves over paths of lengths ``(C,)``: :math:`n + \nu\epsilon`, normalised, with
    :math:`\nu^2 = (e^{2h/L} - 1) / p` (Robnik and Seljak, 2023).
    """
    strength = ((2 * step / length).expm1() / direction.shape[-1]).sqrt()
    return normalized(direction + strength.unsqueeze(-1) * noise)


def is_sound(chains: Chains, error: Tensor) -> Tensor:
    """
    Whether each chain, shape ``(C,)``, is finite, and its energy error no more than 100 for each square root of its dimensions,
    far beyond what any step size in use makes.
    """
    finite = [value.isfinite().reshape(len(error), -1).all(-1) for value in chains]
    return torch.stack(finite).all(0) & (error.abs() <= 100 * math.sqrt(chains.position.shape[-1]))


def langevin_step(
    target: Target, chains: Chains, step: Tensor, length: Tensor, noise: Tensor
) -> tuple[Chains, Tensor, Tensor]:
    """
    One unadjusted step of each chain and a partial refreshment of its direction; the energy errors ``(C,)``, and whether the step
    was refused ``(C,)``: then the chain stays, leaves in a new direction, and its energy error is zero.
    """
    moved, error = leapfrog(target, chains, step)
    sound = is_sound(moved, error)
    moved = moved._replace(direction=refresh(moved.direction, noise, step, length))
    stayed = chains._replace(direction=normalized(noise))
    return moved.where(sound, stayed), error.where(sound, torch.zeros_like(error)), ~sound


def adjusted_transition(
    target: Target, chains: Chains, step: Tensor, num_steps: int, noise: Tensor, level: Tensor
) -> tuple[Chains, Tensor, Tensor]:
    """
    One Metropolis-adjusted transition (Robnik et al., 2025): a new direction for each chain, a path of ``num_steps`` steps, its end
    accepted with probability exp(-energy error) by the uniform numbers ``level``, shape ``(C,)``. The energy errors ``(C,)``
    (infinite where the path left the finite numbers), and whether the end was accepted ``(C,)``.
    """
    end = chains = chains._replace(direction=normalized(noise))
    total = torch.zeros_like(chains.log_density)
    for _ in range(num_steps):
        end, error = leapfrog(target, end, step)
        total = total + error
    finite = is_sound(end, torch.where(total.isfinite(), torch.zeros_like(total), total))
    total = total.where(finite, torch.full_like(total, math.inf))
    accepted = level < (-total).exp()
    return end.where(accepted, chains), total, accepted
