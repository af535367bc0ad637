# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""One step of each scheme against its matrices; the stationary laws of these against closed forms and scipy."""

import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor

from pyro_bnn.infer.sample import schemes
from pyro_bnn.infer.sample.schemes import SCHEMES, Chains, Step
from tests.common import assert_close
from tests.infer.sample.linear_chains import Affine, as_map, covariance, stationary, transition


class Root:
    def __init__(self, root: Tensor) -> None:
        self.root = root

    def forward(self, direction: Tensor) -> Tensor:
        return direction @ self.root.T

    def transposed(self, gradient: Tensor) -> Tensor:
        return gradient @ self.root


def target(p: int = 2) -> Affine:
    A = torch.randn(p, p)
    return Affine(A @ A.T + torch.eye(p), torch.randn(p))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_is_its_matrices(scheme: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The affine map of a step from its values at a basis, and its noise from the columns of its factor."""
    p, g, root = 2, target(), torch.randn(2, 2)
    step = Step(0.3, 1.7, temperature)
    noise = torch.zeros(2 * p + 1, p)
    monkeypatch.setattr(schemes.torch, "randn_like", lambda x: noise[: len(x)])

    def run(u: Tensor, r: Tensor) -> Tensor:
        out = SCHEMES[scheme](Chains(u, r), lambda u: u @ g.H.T - g.m, step, Root(root))
        return torch.cat([out.position, out.momentum], 1)

    basis = torch.cat([torch.zeros(1, 2 * p), torch.eye(2 * p)])
    moved = run(basis[:, :p], basis[:, p:])
    noise[:p] = torch.eye(p)
    factor = (run(torch.zeros(p, p), torch.zeros(p, p)) - moved[0]).T
    T, Q = transition(scheme, g, 0.3, 1.7, root, temperature)
    size = len(T) - 1
    assert_close((moved[1:] - moved[0]).T[:size, :size], T[:size, :size], rtol=1e-12, atol=1e-12)
    assert_close(moved[0][:size], T[:size, -1], rtol=1e-12, atol=1e-12)
    assert_close((factor @ factor.T)[:size, :size], Q[:size, :size], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("noise", [0.0, 3.0])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_stationary_variances_have_the_closed_forms_of_the_docs(scheme: str, noise: float) -> None:
    """A Gaussian of precision lam, gradients with independent noise of variance V, the same at every position."""
    h, friction, lam = 0.4, 0.8, torch.tensor([0.7, 3.0])
    excess = {
        "sgld": (1 + h**2 * noise / 4) / (1 - h**2 * lam / 4),
        "sghmc": (1 + h * noise / (2 * friction)) / (1 - h**2 * lam / (4 - 2 * friction * h)),
        "baoa": 1 + h**2 * noise / (4 * torch.tanh(torch.tensor(friction * h / 2)) * (1 - h**2 * lam / 4)),
    }[scheme]
    eye = torch.eye(2)
    T, Q = transition(scheme, Affine(lam.diag(), torch.zeros(2)), h, friction, eye)
    # the columns: how the state answers to a unit of each coordinate of the gradient
    answers = [transition(scheme, Affine(lam.diag(), e), h, friction, eye)[0][:-1, -1] for e in eye]
    G = torch.stack(answers, 1)
    S = solve_discrete_lyapunov(T[:-1, :-1].numpy(), (Q[:-1, :-1] + noise * G @ G.T).numpy())
    assert_close(torch.as_tensor(S)[:2, :2], (excess / lam).diag(), rtol=1e-10, atol=1e-12)
    if not noise:  # the other way of the tests' references
        found = covariance(stationary(as_map([(T, Q)])), 2)[1]
        assert_close(found, (excess / lam).diag(), rtol=1e-9, atol=1e-12)
