# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Discretisations of Langevin dynamics with one gradient per step, as functions of tensors.

Positions u, momenta r in whitened coordinates, a constant preconditioner M = R R^T, potential U = -log p, step h, friction a:

    du = R r dt,   dr = -R^T grad U dt - a r dt + sqrt(2 a) dW.

M does not depend on u, so that no correction by its divergence is needed (Ma, Chen and Fox, 2015): exp(-U(u) - |r|^2 / 2) is
stationary for every M.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bnn.infer.sample.microcanonical import Whitener


class Chains(NamedTuple):
    """Positions and whitened momenta of C chains, ``(C, p)``."""

    position: Tensor
    momentum: Tensor


class Step(NamedTuple):
    """The size h of a step, the friction, and the temperature: 1 samples, 0 descends without noise."""

    size: float
    friction: float
    temperature: float = 1.0


#: The gradient ``(C, p)`` of the potential, or an estimate of it, at positions ``(C, p)``.
Gradient = Callable[[Tensor], Tensor]

#: Moves all chains by one step.
Scheme = Callable[[Chains, Gradient, Step, Whitener], Chains]


def sgld(chains: Chains, gradient: Gradient, step: Step, whitener: Whitener) -> Chains:
    """
    Stochastic gradient Langevin dynamics (Welling and Teh, 2011, eq. 4, with their step h^2), preconditioned:
    u - h^2/2 M g(u) + h R n. Momenta stay as they are.
    """
    u, h = chains.position, step.size
    noise = math.sqrt(step.temperature) * torch.randn_like(u)
    move = h * noise - 0.5 * h**2 * whitener.transposed(gradient(u))
    return chains._replace(position=u + whitener.forward(move))


def sghmc(chains: Chains, gradient: Gradient, step: Step, whitener: Whitener) -> Chains:
    """
    Stochastic gradient Hamiltonian Monte Carlo (Chen, Fox and Guestrin, 2014, algorithm 2 and eq. 15 with the noise estimate
    zero; their learning rate is h^2, their velocity h r, their alpha a h): a step of the position, then one of the momentum.
    """
    h, decay = step.size, step.friction * step.size
    u = chains.position + whitener.forward(h * chains.momentum)
    noise = math.sqrt(2 * decay * step.temperature) * torch.randn_like(u)
    return Chains(u, (1 - decay) * chains.momentum - h * whitener.transposed(gradient(u)) + noise)


def baoa(chains: Chains, gradient: Gradient, step: Step, whitener: Whitener) -> Chains:
    """
    A kick, half a drift, an exact Ornstein-Uhlenbeck step of the momentum, half a drift: the positions of BAOAB (Leimkuhler and
    Matthews, 2013), whose two half kicks between drifts are at one position, at one gradient per step. Kicks by the batches of a
    pass forward, then backward, are a palindrome, the symmetric splitting of Paulin et al. (2024).
    """
    h, decay = step.size, math.exp(-step.friction * step.size)
    kicked = chains.momentum - h * whitener.transposed(gradient(chains.position))
    noise = math.sqrt(-math.expm1(-2 * step.friction * h) * step.temperature) * torch.randn_like(kicked)
    momentum = decay * kicked + noise
    return Chains(chains.position + whitener.forward(0.5 * h * (kicked + momentum)), momentum)


#: By the names that users write.
SCHEMES: dict[str, Scheme] = {"sgld": sgld, "sghmc": sghmc, "baoa": baoa}
