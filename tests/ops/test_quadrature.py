# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Gauss and Gauss-Radau rules against dense matrix functions and rules that are known in closed form."""

import numpy as np
import pytest
import torch

from tests.ops.quadrature import bracket, gauss, gauss_radau

FUNCTIONS = {"inverse": torch.reciprocal, "log": torch.log}
SPECTRA = {
    "even": torch.linspace(1.0, 40.0, 24),
    "clustered": torch.cat([torch.ones(20), 1e3 + torch.linspace(0, 1e-3, 4)]),
    "geometric": torch.logspace(0, 8, 24),
    "one": torch.ones(24),
}


def lanczos(spectrum, starts, steps):
    """Coefficients of plain Lanczos on a diagonal matrix, reorthogonalised twice, one start at a time."""
    alphas, betas = [], []
    for start in starts:
        vectors, alpha, beta = [start / start.norm()], [], []
        for _ in range(steps):
            image = spectrum * vectors[-1]
            alpha.append(vectors[-1] @ image)
            V = torch.stack(vectors)
            for _ in range(2):
                image = image - V.mT @ (V @ image)
            size = image.norm()
            ended = size < 100 * torch.finfo(spectrum.dtype).eps * spectrum.max()  # rounding is no direction
            beta.append(torch.zeros(()) if ended else size)
            if ended:
                break
            vectors.append(image / size)
        rest = steps - len(alpha)  # an invariant space: what follows has no weight
        alphas.append(torch.stack(alpha + [spectrum.mean()] * rest))
        betas.append(torch.stack(beta + [torch.zeros(())] * rest))
    return torch.stack(alphas), torch.stack(betas)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", SPECTRA)
def test_brackets_hold_and_tighten(name, function):
    spectrum = SPECTRA[name].double()
    starts = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    weights = (starts / starts.norm(dim=-1, keepdim=True)).square()
    exact = weights @ FUNCTIONS[function](spectrum)
    alpha, beta = lanczos(spectrum, starts, 24)
    before = None
    for k in range(1, 25):
        found = bracket(alpha[:, :k], beta[:, :k], function, spectrum.min())
        slack = 1e-8 * (1 + exact.abs())  # Lanczos of condition 1e8
        assert (found.lower <= exact + slack).all()
        assert (exact <= found.upper + slack).all()
        if before is not None:
            assert (found.lower >= before.lower - slack).all()
            assert (found.upper <= before.upper + slack).all()
        before = found
    assert (before.width < 1e-6).all()


def test_gauss_rule_is_numpys():
    j = torch.arange(1, 8)
    beta = j / (4.0 * j**2 - 1).sqrt()  # Legendre's, on [-1, 1], moved to [1, 3]
    nodes, weights = np.polynomial.legendre.leggauss(7)
    for name, function in FUNCTIONS.items():
        expected = float((weights / 2) @ function(torch.from_numpy(nodes) + 2).numpy())
        assert float(gauss(torch.full((7,), 2.0), beta, name)) == pytest.approx(expected, rel=1e-13)


def test_radau_rule_of_two_points():
    alpha, beta = torch.tensor([2.0]), torch.tensor([1 / 3]).sqrt()
    for name, function in FUNCTIONS.items():
        expected = function(torch.tensor([1.0, 7 / 3])) @ torch.tensor([0.25, 0.75])
        assert torch.allclose(gauss_radau(alpha, beta, name, 1.0), expected, rtol=1e-12)


def test_a_node_of_each_measure():
    spectra = torch.tensor([[1.0, 2.0, 5.0], [0.1, 2.0, 5.0]])
    alpha, beta = (
        torch.cat(c) for c in zip(*(lanczos(s, torch.ones(1, 3), 2) for s in spectra), strict=True)
    )
    both = bracket(alpha, beta, "inverse", spectra[:, 0])
    for i in range(2):
        one = bracket(alpha[i], beta[i], "inverse", float(spectra[i, 0]))
        assert torch.equal(one.lower, both.lower[i])
        assert torch.allclose(one.upper, both.upper[i], rtol=1e-14)


def test_what_is_no_bound_is_refused():
    alpha, beta = lanczos(torch.tensor([1.0, 2.0, 5.0]), torch.ones(1, 3), 3)
    with pytest.raises(ValueError, match=r"node is 1\.5.* eigenvalue of at most 1:"):
        gauss_radau(alpha, beta, "inverse", 1.5)
    with pytest.raises(ValueError, match="must be positive"):
        gauss_radau(alpha, beta, "log", 0.0)
    with pytest.raises(ValueError, match="function must be 'inverse' or 'log'"):
        gauss(alpha, beta, "sqrt")


def test_single_precision_keeps_the_bounds():
    spectrum = torch.cat([torch.ones(20), torch.logspace(0, 4, 4)])
    starts = torch.randn(200, 24, generator=torch.Generator().manual_seed(1))
    weights = (starts / starts.norm(dim=-1, keepdim=True)).square()
    alpha, beta = lanczos(spectrum.float(), starts.float(), 8)
    for name, function in FUNCTIONS.items():
        exact = weights @ function(spectrum)
        found = bracket(alpha, beta, name, 1.0)
        assert found.lower.dtype == torch.float64
        assert ((found.lower <= exact) & (exact <= found.upper)).all()
        assert (found.width < 0.05).all()


def test_rounding_above_the_node_leaves_no_second_bound():
    alpha, beta = lanczos(torch.tensor([1.0, 2.0, 1e9]).float(), torch.ones(2, 3).float(), 2)
    inverse, log = (bracket(alpha, beta, name, 1.0) for name in ("inverse", "log"))
    assert inverse.upper.isposinf().all()
    assert log.lower.isneginf().all()
    assert (inverse.lower < 1.5 / 3 + 1e-9).all()
    assert bracket(alpha, beta, "inverse", 1.0, error=0.0).upper.isfinite().all()
