# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The pieces of the Hessian-free Laplace approximation, each against dense matrices of plain autograd."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_bnn.curvature.parts import NotAMinimumError
from pyro_bnn.infer import hfl
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.infer.hfl.diagnostics import HFLWarning
from pyro_bnn.infer.hfl.functionals import Functionals
from pyro_bnn.infer.hfl.loss import Problem
from pyro_bnn.infer.hfl.low_rank import low_rank_factor, unit_scale
from pyro_bnn.infer.hfl.nystrom import inverse_root, probe
from pyro_bnn.infer.hfl.paired import fine_tune
from pyro_bnn.infer.hfl.perturbation import _newton, agree, perturb, slopes
from pyro_bnn.infer.hfl.regvar import regvar_score
from pyro_bnn.infer.hfl.result import HFLResult
from pyro_bnn.infer.hfl.sandwich import score_responses
from pyro_bnn.infer.hfl.solver import Solver
from pyro_bnn.infer.hfl.task import Found, Task
from pyro_bnn.ops.newton import hessian_operator, value_and_gradient
from tests.common import assert_close

N, D = 12, 5
SCALE = torch.tensor([0.5, 2.0, 1.0, 0.7, 3.0], dtype=torch.float64)


def counts(x, y=None):
    """Poisson counts: the Hessian and the GGN differ through the curved predictor."""
    w = pyro.sample("w", dist.Normal(torch.zeros(D), SCALE).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Poisson((torch.tanh(x @ w) + 1).exp()), obs=y)


def data():
    x = torch.randn(N, D)
    return x, torch.randint(0, 9, (N,)).double()


def negative_log_joint(u, x, y):
    """By hand, without constants that the gradient does not see."""
    f = torch.tanh(x @ u) + 1
    likelihood = (y * f - f.exp() - torch.lgamma(y + 1)).sum()
    return 0.5 * (u / SCALE).square().sum() - likelihood


def linearized_loss(u, u0, x, y):
    f0, J = torch.tanh(x @ u0) + 1, (1 - torch.tanh(x @ u0) ** 2)[:, None] * x
    f = f0 + J @ (u - u0)
    return 0.5 * (u / SCALE).square().sum() - (y * f - f.exp()).sum()


def problem_of(curvature="hessian", u=None, batches=None, **options):
    x, y = data()
    guide = AutoLaplace(counts).initialize(x, y)
    u = 0.3 * torch.randn(D) if u is None else u
    batches = (
        (x, y)
        if batches is None
        else [(x[i : i + batches], y[i : i + batches]) for i in range(0, N, batches)]
    )
    return Problem(guide.packed, u, batches, curvature, **options), u, x, y


def test_an_unknown_curvature_is_refused():
    with pytest.raises(ValueError, match="unknown curvature 'Hessian', expected one of"):
        problem_of("Hessian")


@pytest.mark.parametrize("batches", [None, 5])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_the_loss_and_its_derivatives(curvature, corrected, batches):
    problem, u, x, y = problem_of(
        curvature, batches=batches, proximal=0.7, correct_gradient=corrected, chunk_size=2
    )
    loss = negative_log_joint if curvature == "hessian" else lambda v, x, y: linearized_loss(v, u, x, y)
    gradient = torch.autograd.functional.jacobian(lambda v: negative_log_joint(v, x, y), u)
    constant = D / 2 * math.log(2 * math.pi) + SCALE.log().sum()
    assert_close(problem.value, negative_log_joint(u, x, y) + constant, rtol=1e-10)
    assert_close(problem.gradient, gradient, rtol=1e-9)
    assert problem.gradient_evaluations == 1
    H = torch.autograd.functional.hessian(lambda v: loss(v, x, y), u)
    v = torch.randn(5, D)
    assert_close(problem.operator(v), v @ H + 0.7 * v, rtol=1e-9, atol=1e-10)
    offsets = 0.5 * torch.randn(3, D)
    expected = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda w: loss(w, x, y), u + o)
            + 0.7 * o
            - (gradient if corrected else 0)
            for o in offsets
        ]
    )
    assert_close(problem.gradients(offsets), expected, rtol=1e-8, atol=1e-9)
    assert problem.gradient_evaluations == 4
    # a batch counts for several of its size
    some = slice(2, 5)

    def scaled(w):
        prior = 0.5 * (w / SCALE).square().sum()
        return prior + 4 * (loss(w, x[some], y[some]) - prior)

    found = problem.batch_gradients(offsets, ((x[some], y[some]), {}), 4.0)
    expected = torch.stack(
        [
            torch.autograd.functional.jacobian(scaled, u + o) + 0.7 * o - (gradient if corrected else 0)
            for o in offsets
        ]
    )
    assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("corrected", [False, True])
def test_the_perturbed_loss(corrected):
    problem, u, x, y = problem_of(proximal=0.3, correct_gradient=corrected)
    functional = lambda v: (v**3).sum() + v[0]  # noqa: E731
    terms = problem.perturbed(functional, 0.2)

    def expected(o):
        extra = 0.15 * o.square().sum() - 0.2 * functional(u + o)
        return negative_log_joint(u + o, x, y) + extra - (problem.gradient @ o if corrected else 0)

    o = 0.4 * torch.randn(D)
    value, gradient = value_and_gradient(terms, o)
    zero, _ = value_and_gradient(terms, torch.zeros(D))
    assert_close(value - zero, expected(o) - expected(torch.zeros(D)), rtol=1e-9)
    assert_close(gradient, torch.autograd.functional.jacobian(expected, o), rtol=1e-8, atol=1e-9)
    H = torch.autograd.functional.hessian(expected, o)
    assert_close(hessian_operator(terms, o, keep_graphs=False)(torch.eye(D)), H, rtol=1e-8, atol=1e-9)


# ---------------------------------------------------------------------- functionals


@pytest.mark.parametrize("linearized", [False, True])
def test_functionals_and_their_first_order(linearized):
    u = torch.randn(D)
    A = torch.randn(6, D)
    f = lambda v: (A @ v).sin().view(2, 3)  # noqa: E731
    J = torch.autograd.functional.jacobian(lambda v: f(v).flatten(), u)
    some = Functionals(f, u, linearized=linearized, chunk_size=4)
    assert some.shape == (2, 3)
    assert len(some) == 6
    assert_close(some.values, f(u).flatten(), rtol=1e-12)
    d = torch.randn(9, D)
    assert_close(some.responses(d), d @ J.mT, rtol=1e-10, atol=1e-12)  # before the rows are formed
    assert_close(some.gradients, J, rtol=1e-10, atol=1e-12)
    assert_close(some.responses(d), d @ J.mT, rtol=1e-10, atol=1e-12)
    weights = torch.randn(3, 6)
    assert_close(some.transposed(weights), weights @ J, rtol=1e-10, atol=1e-12)
    v = u + 0.3 * torch.randn(D)
    expected = f(u).flatten() + J @ (v - u) if linearized else f(v).flatten()
    assert_close(some.at(v).detach(), expected, rtol=1e-10)
    few = some.subset(torch.tensor([4, 1]))
    assert_close(few.at(v).detach(), expected[[4, 1]], rtol=1e-10)
    assert_close(few.gradients, J[[4, 1]], rtol=1e-10, atol=1e-12)
    assert_close(few.values, some.values[[4, 1]], rtol=0)
    constant = Functionals(lambda v: torch.ones(2), u)
    assert_close(constant.gradients, torch.zeros(2, D))
    with pytest.raises(ValueError, match="1 of 2 functionals are not finite"):
        Functionals(lambda v: torch.stack([v[0], v[0] / 0.0]), u)
    for odd in (lambda v: 3.0, lambda v: v.argmax()):
        with pytest.raises(TypeError, match="expected a tensor of floating-point numbers"):
            Functionals(odd, u)


@pytest.mark.parametrize("linearized", [False, True])
def test_slopes_elsewhere(linearized):
    problem, u, _, _ = problem_of()
    f = lambda v: torch.stack([v[0] ** 2 * v[1], v.sum().sin(), v[2] ** 3])  # noqa: E731
    some = Functionals(f, u, linearized=linearized)
    offsets, index = torch.randn(4, D), torch.tensor([2, 0, 0, 1])
    at = torch.zeros_like(offsets) if linearized else offsets
    expected = torch.stack(
        [torch.autograd.functional.jacobian(f, u + o)[j] for o, j in zip(at, index, strict=True)]
    )
    assert_close(slopes(some, problem, offsets, index), expected, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------- solves


def gaussian_problem(p=D, n=30, noise=0.5, intercept=0.0):
    """A linear model, whose posterior is known for good."""
    x, y = torch.randn(n, p), torch.randn(n) + intercept
    if intercept:
        x[:, -1] = 1.0
    scale = torch.linspace(0.5, 2.0, p)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(p), scale).to_event(1))
        with pyro.plate("data", n, subsample_size=len(x), subsample=torch.arange(len(x))):
            return pyro.sample("obs", dist.Normal(x @ w, noise), obs=y)

    P = x.mT @ x / noise**2 + torch.diag(scale**-2)
    mean = torch.linalg.solve(P, x.mT @ y / noise**2)
    guide = AutoLaplace(model).initialize(x, y)
    return Problem(guide.packed, mean, (x, y), "hessian"), P, x, y


def test_solves_account_for_themselves():
    problem, P, _, _ = gaussian_problem()
    calls = []
    base = problem._base
    problem._base = lambda v: (calls.append(len(v)), base(v))[1]
    solver = Solver(problem, tolerance=1e-9, block_size=2)
    rhs = torch.randn(5, D)
    assert_close(solver(rhs), torch.linalg.solve(P, rhs.mT).mT, rtol=1e-7)
    assert solver.products == sum(calls) == D  # no more than there are unknowns
    assert solver.iterations == len(calls)
    values = torch.linalg.eigvalsh(P)
    assert values[0] * (1 - 1e-9) <= solver.smallest_curvature <= values[-1]
    assert values[0] <= solver.largest_curvature <= values[-1] * (1 + 1e-9)
    assert 0 <= solver.residual <= 1e-9
    kept = solver.residual
    solver(torch.randn(1, D), tolerance=0.5)
    assert solver.residual == kept
    loose = Solver(problem, tolerance=1e-12, max_iter=1)
    loose(rhs[:1])
    assert loose.iterations == 1
    assert loose.residual > 1e-9
    with pytest.raises(ValueError, match="2 of 5 gradients to solve for are not finite"):
        solver(rhs.index_fill(0, torch.tensor([1, 3]), torch.nan))


def test_preconditioners_are_what_their_names_say():
    problem, P, _, _ = gaussian_problem()
    r = torch.randn(3, D)
    prior = torch.linspace(0.5, 2.0, D) ** -2
    for proximal in (0.0, 0.4):
        problem.proximal = proximal
        by_prior = Solver(problem, tolerance=1e-6, preconditioner="prior").preconditioner
        assert_close(by_prior(r), r / (prior + proximal), rtol=1e-9)
        diagonal = Solver(problem, tolerance=1e-6, preconditioner="diagonal").preconditioner
        assert_close(diagonal(r), r / (P.diagonal() + proximal), rtol=1e-9)
    problem.proximal = 0.0
    nystrom = Solver(problem, tolerance=1e-6, preconditioner="nystrom", rank=64)
    assert nystrom.products == 2 * D
    S = prior.rsqrt()
    smallest = torch.linalg.eigvalsh(P * S * S[:, None])[0]
    assert_close(nystrom.preconditioner(r), smallest * torch.linalg.solve(P, r.mT).mT, rtol=1e-6)
    assert Solver(problem, tolerance=1e-6).preconditioner is None
    own = Solver(problem, tolerance=1e-6, preconditioner=lambda r: 2 * r).preconditioner
    assert_close(own(r), 2 * r, rtol=0)
    with pytest.raises(ValueError, match="unknown preconditioner 'jacobi'"):
        Solver(problem, tolerance=1e-6, preconditioner="jacobi")


def test_the_prior_preconditioner_is_positive_where_the_prior_is_flat():
    def model(y=None):
        a = pyro.sample("a", dist.Normal(0.0, 0.1))
        b = pyro.sample("b", dist.StudentT(1.0, 0.0, 1.0))  # not log-concave beyond 1
        with pyro.plate("data", 3):
            pyro.sample("obs", dist.Normal(a + b, 1.0), obs=y)

    y = torch.ones(3)
    guide = AutoLaplace(model).initialize(y)
    problem = Problem(guide.packed, torch.tensor([0.0, 5.0]), (y,), "hessian")
    found = Solver(problem, tolerance=1e-6, preconditioner="prior").preconditioner
    assert_close(found(torch.ones(1, 2)), [[0.01, 100.0]], rtol=1e-9)


# ---------------------------------------------------------------------- perturbations


@pytest.mark.parametrize("central", [False, True])
def test_perturbations_of_a_quadratic_are_exact(central):
    problem, P, _, _ = gaussian_problem()
    G = torch.randn(4, D)
    some = Functionals(lambda v: G @ v, problem.latent)
    exact = torch.linalg.solve(P, G.mT).mT
    solver = Solver(problem, tolerance=1e-9)
    found = perturb(Task(problem, some, solver, epsilon=1e-2), 1.1 * exact, central=central)
    assert_close(found.displacements, exact, rtol=1e-5, atol=1e-8)
    assert_close(found.responses, G @ exact.mT, rtol=1e-5, atol=1e-8)
    assert found.residual < 1e-4


def test_one_minimum_by_newtons_method_is_counted():
    problem, P, _, _ = gaussian_problem()
    G = torch.randn(2, D)
    task = Task(problem, Functionals(lambda v: G @ v, problem.latent), Solver(problem, tolerance=1e-9))
    before = problem.gradient_evaluations
    point, decrement = _newton(task, 1, 0.1, 1e-4)
    assert_close(point, 0.1 * torch.linalg.solve(P, G[1]), rtol=1e-4, atol=1e-8)
    assert decrement <= 1e-7
    assert problem.gradient_evaluations - before >= 2  # at the start, and after every step


def test_differences_are_those_of_the_perturbed_minima():
    problem, _, _, _ = gaussian_problem()
    G = torch.randn(2, D)
    f = lambda v: G @ v + 0.1 * (v**2).sum()  # noqa: E731
    some = Functionals(f, problem.latent)
    P = problem.operator(torch.eye(D))
    pilot = torch.linalg.solve(P, some.gradients.mT).mT
    eps = 0.2
    shift = eps / (some.gradients * pilot).sum(-1).sqrt()

    def minimum(j, s):
        # L - s f_j is quadratic: its minimum solves a linear system
        H = P - s * 0.2 * torch.eye(D)
        g = problem.gradient - problem.gradient - s * some.gradients[j]
        return -torch.linalg.solve(H, g)

    solver = Solver(problem, tolerance=1e-10)
    task = Task(problem, some, solver, epsilon=eps)
    found = perturb(task, pilot, central=True)
    for j in range(2):
        plus, minus = minimum(j, shift[j]), minimum(j, -shift[j])
        u = problem.latent
        assert_close(found.displacements[j], (plus - minus) / (2 * shift[j]), rtol=1e-4)
        assert_close(found.responses[j], (f(u + plus) - f(u + minus)) / (2 * shift[j]), rtol=1e-4)
    found = perturb(task, pilot, central=False)
    for j in range(2):
        plus = minimum(j, shift[j])
        assert_close(found.displacements[j], plus / shift[j], rtol=1e-4)
        assert_close(found.responses[j], (f(u + plus) - f(u)) / shift[j], rtol=1e-4)


def test_agreement_is_the_largest_relative_difference():
    problem, P, _, _ = gaussian_problem()
    G = torch.randn(20, D)
    some = Functionals(lambda v: G @ v, problem.latent)
    exact = torch.linalg.solve(P, G.mT).mT
    responses = G @ exact.mT
    solver = Solver(problem, tolerance=1e-10)
    factors = torch.ones(20)
    factors[0], factors[1], factors[-1] = (
        1.25,
        50.0,
        0.9,
    )  # the second is not among the eight that are looked at
    variances = responses.diagonal() * factors
    found = agree(Task(problem, some, solver, epsilon=1e-3), exact, variances, central=True)
    assert_close(found, 0.2, rtol=1e-4)


def test_responses_become_variances_and_a_factor():
    J, P = torch.randn(4, D), torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    exact = torch.linalg.solve(P, J.mT).mT
    K = J @ exact.mT
    found = Found.from_responses(J, exact, K)
    variances, factor, half, antisymmetry = found.variances, found.factor, found.half, found.antisymmetry
    assert_close(variances, K.diagonal(), rtol=1e-12)
    assert_close(half @ half.mT, K, rtol=1e-7, atol=1e-9)
    assert_close(half, J @ factor, rtol=1e-12)
    assert antisymmetry < 1e-12
    assert found.gradients is J
    assert found.displacements is exact
    sd = K.diagonal().sqrt()
    skew = torch.zeros(4, 4)
    skew[0, 1], skew[1, 0] = 0.02, -0.02
    antisymmetry = Found.from_responses(J, exact, K + skew * sd[:, None] * sd).antisymmetry
    assert_close(antisymmetry, 0.02, rtol=1e-9)
    with pytest.raises(NotAMinimumError, match=r"1 of 4 variances are negative \(smallest -3\)"):
        Found.from_responses(J, exact, K - torch.diag(torch.tensor([0.0, float(K[1, 1]) + 3.0, 0.0, 0.0])))
    assert_close(unit_scale(torch.tensor([4.0, 0.0])), [2.0, 1.0])


def test_a_factor_has_the_covariance_that_is_asked_for():
    J = torch.randn(3, 8)
    D_ = torch.randn(3, 8)  # displacements that are not exact
    A = torch.randn(3, 3)
    C = A @ A.mT
    W = low_rank_factor(J, D_, C, 0.0)
    assert W.shape == (8, 3)
    assert_close(J @ W @ W.mT @ J.mT, C, rtol=1e-8, atol=1e-10)
    # directions of the responses below their noise are left out, and the others keep theirs
    Q, R = torch.linalg.qr(torch.randn(3, 3)).Q, torch.linalg.qr(torch.randn(3, 3)).Q
    J = torch.linalg.qr(torch.randn(8, 3)).Q.mT
    D_ = (R @ torch.diag(torch.tensor([1.0, 0.5, 0.01])) @ Q.mT) @ J
    for noise, rank in ((0.0, 3), (0.1, 2), (0.7, 1)):
        W = low_rank_factor(J, D_, C, noise)
        kept = Q[:, :rank] @ Q[:, :rank].mT
        assert W.shape == (8, rank)
        assert_close(J @ W @ W.mT @ J.mT, kept @ C @ kept, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("p", [1, 3])
def test_many_functionals_of_few_latents_in_single_precision(p: int):
    """With P = I the factor is a root of the identity; rounding has no directions of its own."""
    J = torch.nn.functional.normalize(torch.randn(210, p), dim=-1).float()
    W = low_rank_factor(J, J, J @ J.mT, 1.2e-7)
    assert W.shape == (p, p)
    assert_close(W @ W.mT, torch.eye(p).float(), rtol=1e-6, atol=1e-6)


def test_functionals_that_depend_on_each_other_count_once():
    """With P = I and a functional twice, the factor has the covariance and no directions of rounding."""
    J = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    J = torch.cat([J, J[:1], -J[1:2]])
    W = low_rank_factor(J, J, J @ J.mT, 0.0)
    assert W.shape == (8, 3)
    assert_close(W @ W.mT, torch.linalg.pinv(J) @ J, rtol=1e-8, atol=1e-9)


# ---------------------------------------------------------------------- probes, scores, sandwich


def test_probes_know_what_each_of_them_misses():
    problem, P, _, _ = gaussian_problem(p=6)
    J = torch.randn(9, 6) * torch.logspace(0, -2, 9).unsqueeze(-1)
    some = Functionals(lambda v: J @ v, problem.latent)
    K = J @ torch.linalg.solve(P, J.mT)
    R = 4
    task = Task(problem, some, Solver(problem, tolerance=1e-11), num_probes=R)
    found = probe(task, seed=3)
    Z = torch.randn(R, 9, generator=torch.Generator().manual_seed(3))
    assert_close(found.gradients, Z @ J, rtol=1e-9)
    assert_close(found.displacements, torch.linalg.solve(P, (Z @ J).mT).mT, rtol=1e-7)
    gram = Z @ K @ Z.mT
    nystrom = K @ Z.mT @ torch.linalg.solve(gram, Z @ K)
    assert_close(found.half @ found.half.mT, nystrom, rtol=1e-6, atol=1e-9)
    assert_close(J @ found.factor, found.half, rtol=1e-8, atol=1e-10)
    # z' (K - K without z) z is the reciprocal of the entry of the inverse
    missed = 1 / torch.linalg.inv(gram).diagonal()
    traces = gram.diagonal()
    fraction = missed.sum() / traces.sum()
    assert_close(found.captured, 1 - fraction, rtol=1e-6)
    error = (missed - fraction * traces).std() / traces.mean() / R**0.5
    assert_close(found.captured_error, error, rtol=1e-5)
    # more probes than there are directions lose nothing and gain nothing
    many = probe(Task(problem, some, Solver(problem, tolerance=1e-11), num_probes=8))
    assert_close(many.half @ many.half.mT, K, rtol=1e-5, atol=1e-9)
    assert many.captured > 1 - 1e-6


def test_the_rank_of_probes_does_not_depend_on_their_scales():
    A = torch.randn(4, 3)
    S = torch.logspace(-12, 0, 4)
    full = torch.randn(4, 4)
    full = full @ full.mT + torch.eye(4)
    root = inverse_root(full * S * S[:, None])
    assert root.shape == (4, 4)
    assert_close(root @ root.mT * S * S[:, None], torch.linalg.inv(full), rtol=1e-7)
    assert inverse_root(A @ A.mT * S * S[:, None]).shape == (4, 3)


def test_a_probe_that_finds_nothing_is_left_out():
    A = torch.randn(3, 3)
    gram = torch.zeros(4, 4)
    gram[:3, :3] = A @ A.mT
    root = inverse_root(gram)
    assert_close(root @ root.mT, torch.linalg.pinv(gram, hermitian=True), rtol=1e-8, atol=1e-10)
    assert inverse_root(torch.zeros(2, 2)).shape[0] == 2


def two_sites(x, y=None, z=None):
    """Two observations of the same points, in a subsampled plate, and one of groups of them."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("data", 6, subsample_size=len(x), subsample=torch.arange(len(x))):
        pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)
        pyro.sample("other", dist.StudentT(3.0, (x @ w).sin(), 1.0), obs=z)
    with pyro.plate("groups", 2):
        pyro.sample("total", dist.Normal(w[:2].exp(), 1.0), obs=torch.tensor([0.3, 1.0]))


def test_scores_of_the_same_points_add_up():
    x, y, z = torch.randn(6, 3), torch.randn(6), torch.randn(6)
    guide = AutoLaplace(two_sites).initialize(x, y, z)
    u, d = torch.randn(3), torch.randn(300, 3)

    def pointwise(u):
        first = torch.distributions.Normal(x @ u, 0.5).log_prob(y)
        second = torch.distributions.StudentT(3.0, (x @ u).sin(), 1.0).log_prob(z)
        groups = torch.distributions.Normal(u[:2].exp(), 1.0).log_prob(torch.tensor([0.3, 1.0]))
        return torch.cat([first + second, groups])

    expected = torch.autograd.functional.jacobian(pointwise, u) @ d.mT
    assert_close(score_responses(guide.packed, u, (x, y, z), d), expected, rtol=1e-9, atol=1e-11)
    halves = [(x[:4], y[:4], z[:4]), (x[4:], y[4:], z[4:])]
    found = score_responses(guide.packed, u, halves, d)
    rows = torch.tensor([0, 1, 2, 3, 6, 7, 4, 5])  # the groups are counted with the first batch
    assert_close(found, expected[rows], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("twin", [False, True])
def test_the_calibrated_score(twin):
    problem, P, x, _ = gaussian_problem()
    J = torch.randn(7, D)
    some = Functionals(lambda v: J @ v, problem.latent)
    leaf = problem.latent.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad((x @ leaf).abs().mean(), leaf)
    direction = torch.linalg.solve(P, slope)
    solver = Solver(problem, tolerance=1e-11, preconditioner="nystrom")
    found = regvar_score(problem, some, solver, epsilon=1e-3, num_epochs=None, twin=twin, calibrate=5, seed=2)
    limit = (J @ direction).abs()
    assert_close(found.score, limit, rtol=1e-7)
    chosen = torch.randperm(7, generator=torch.Generator().manual_seed(2))[:5]
    exact = (J @ torch.linalg.solve(P, J.mT)).diagonal()[chosen]
    ratio = (exact / limit[chosen]).log()
    assert_close(found.scale, ratio.mean().exp(), rtol=1e-6)
    assert_close(found.spread, ratio.std(), rtol=1e-6)
    assert_close(found.rank_correlation, stats.spearmanr(exact, limit[chosen]).statistic, rtol=1e-6)
    assert_close(found.calibrated, found.scale * found.score, rtol=0)
    one = regvar_score(problem, some, solver, epsilon=1e-3, num_epochs=None, twin=twin, calibrate=1)
    assert (one.spread, one.rank_correlation) == (0.0, 1.0)
    none = regvar_score(problem, some, solver, epsilon=1e-3, num_epochs=None, twin=twin, calibrate=0)
    with pytest.raises(ValueError, match="not calibrated"):
        _ = none.calibrated
    tuned = regvar_score(problem, some, solver, epsilon=1e-3, num_epochs=400, twin=twin, calibrate=0)
    assert_close(tuned.score, limit, rtol=0.02, atol=0.02 * float(limit.max()))


def test_the_regulariser_pulls_the_outputs_towards_zero():
    problem, P, x, y = gaussian_problem(intercept=6.0)
    J = torch.randn(4, D)
    some = Functionals(lambda v: (J @ v).square(), problem.latent)
    u, batches = problem.latent, [(x[i : i + 10], y[i : i + 10]) for i in range(0, 30, 10)]
    leaf = u.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad((x @ leaf).abs().mean(), leaf)
    step = torch.linalg.solve(P, slope)
    solver = Solver(problem, tolerance=1e-11, preconditioner="nystrom")
    shift = 5.0 / float((slope @ step).sqrt())
    moved = (J @ (u - shift * step)).square()  # no output changes its sign on the way
    assert bool(((x @ (u - shift * step)).sign() == (x @ u).sign()).all())
    expected = (moved - (J @ u).square()).abs() / shift
    against = ((J @ (u + shift * step)).square() - (J @ u).square()).abs() / shift
    assert ((expected - against).abs() / expected).max() > 0.02
    found = regvar_score(problem, some, solver, epsilon=5.0, num_epochs=400, twin=False, calibrate=0)
    assert_close(found.score, expected, rtol=1e-2)
    problem.data = batches  # the mean over all outputs, whatever the sizes of batches
    limit = regvar_score(problem, some, solver, epsilon=5.0, num_epochs=None, twin=False, calibrate=0)
    assert_close(limit.score, (2 * (J @ u) * (J @ step)).abs(), rtol=1e-7)


def test_fine_tuning_ends_in_the_minimum_and_counts_its_gradients():
    problem, P, x, y = gaussian_problem()
    solver = Solver(problem, tolerance=1e-9, preconditioner="nystrom")
    pull = torch.randn(2, D)
    before = problem.gradient_evaluations
    found = fine_tune(problem, solver, 2, lambda o, batch: -pull, num_epochs=200)
    assert problem.gradient_evaluations - before == 2 * 200
    assert_close(found, torch.linalg.solve(P, pull.mT).mT, rtol=1e-3, atol=1e-4)
    # on batches, in rounds that take their noise out
    problem.data = [(x[i : i + 10], y[i : i + 10]) for i in range(0, 30, 10)]
    rough = fine_tune(problem, solver, 2, lambda o, batch: -pull, num_epochs=40, rounds=1)
    exact = torch.linalg.solve(P, pull.mT).mT
    before = problem.gradient_evaluations
    fine = fine_tune(problem, solver, 2, lambda o, batch: -pull, num_epochs=40, rounds=4)
    assert (fine - exact).norm() < 0.2 * (rough - exact).norm() + 1e-6
    # 10 epochs in each of 4 rounds, twice as many gradients in three of them, and one of all data after each
    assert problem.gradient_evaluations - before == 2 * (10 + 3 * 2 * 10) + 4 * 2


def test_one_run_that_diverges_is_found_among_others():
    problem, P, _, _ = gaussian_problem()
    solver = Solver(problem, tolerance=1e-10)
    concave = 1e4 * float(torch.linalg.eigvalsh(P)[-1])

    def push(offsets, batch):
        return torch.stack([torch.zeros_like(offsets[0]), 1 - concave * offsets[1]])

    with pytest.raises(NotAMinimumError, match="diverges at every step size"):
        fine_tune(problem, solver, 2, push, num_epochs=200)


def result(**options):
    values = {
        "method": "cg", "curvature": "ggn", "shape": torch.Size([2, 1]), "mean": torch.zeros(2),
        "gradients": torch.zeros(2, 3), "displacements": torch.zeros(2, 3), "variances": torch.tensor([4.0, 9.0]),
        "factor": torch.zeros(3, 2), "half": torch.tensor([[2.0, 0.0], [0.0, 3.0]]), "antisymmetry": 0.01,
        "newton_decrement": 0.02, "smallest_curvature": 1.5, "residual": 1e-7,
    }  # fmt: skip
    return HFLResult(**{**values, **options})


def test_a_result_prints_what_it_knows():
    plain = result(products=7, gradient_evaluations=3, iterations=2)
    assert plain.gradient_equivalents == 17
    assert result(products=7).gradient_equivalents == 14
    assert_close(plain.variance, [[4.0], [9.0]])
    assert_close(plain.covariance, [[4.0, 0.0], [0.0, 9.0]])
    text = str(plain)
    for part in (
        "2 of 3 latents", "2 to 3", "0.02 sd", "1.5", "1e-07", "0.01 sd",
        "17 gradient equivalents (2 iterations, 7 products, 3 gradients)",
    ):  # fmt: skip
        assert part in text
    for part in ("epsilon", "captured", "proximal", "sandwich"):
        assert part not in text
    full = str(
        result(
            epsilon=0.003,
            agreement=0.04,
            proximal=0.5,
            captured=0.9,
            captured_error=0.05,
            sandwich=torch.diag(torch.tensor([16.0, 36.0])),
            warnings=["careful"],
        )
    )
    for part in ("0.003 sd", "0.04", "0.5", "0.9000 +- 0.0500", "median  ", "  2\n", "warning: careful"):
        assert part in full
    assert "none" in str(result(mean=torch.zeros(0), variances=torch.zeros(0)))


@pytest.mark.parametrize(
    ("options", "limits", "text"),
    [
        ({"newton_decrement": 0.1}, {}, None),
        ({"newton_decrement": 0.11}, {}, "0.11 posterior standard deviations away"),
        ({"newton_decrement": math.nan}, {}, "nan posterior"),
        ({"smallest_curvature": 1e-8}, {"largest_curvature": 4e5}, None),
        ({"smallest_curvature": 1e-8}, {"largest_curvature": 5e5}, "curvatures range from 1e-08 to 5e.05"),
        ({"residual": 0.99e-5}, {}, None),
        ({"residual": 1.1e-5}, {}, "relative residual of 1.1e-05, not 1e-06"),
        ({"residual": 1.1e-5, "method": "probe"}, {}, "relative residual of 1.1e-05, not 1e-06"),
        ({"residual": 0.1, "method": "central"}, {}, None),
        ({"residual": 0.11, "method": "one_sided"}, {}, "stopped 0.11 epsilon short"),
        ({"residual": 0.14, "method": "paired"}, {}, None),
        ({"residual": 0.15, "method": "paired"}, {}, "too small by 0.022"),
        ({"agreement": 0.01}, {}, None),
        ({"agreement": 0.011}, {}, "epsilon / 3 differ by 0.011"),
        ({"antisymmetry": 0.05}, {}, None),
        ({"antisymmetry": 0.051}, {}, "antisymmetric by 0.051"),
    ],
)
def test_what_a_result_warns_of(options, limits, text):
    found = result(**options)
    limits = {"tolerance": 1e-6, "largest_curvature": 2.0, "map_tolerance": 0.1, **limits}
    if text is None:
        found.warn(**limits)
        assert found.warnings == []
        return
    with pytest.warns(HFLWarning, match=text):
        found.warn(**limits)
    assert len(found.warnings) == 1


def test_a_solve_counts_what_it_did():
    _, P, x, y = gaussian_problem()

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(D), torch.linspace(0.5, 2.0, D)).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)

    guide = AutoLaplace(model).initialize(x, y)
    guide.loc.data = torch.linalg.solve(P, x.mT @ y / 0.25)
    found = hfl.solve(guide, (x, y), (x[:3],), robust=True)
    assert found.gradient_evaluations == 1
    assert found.products <= D
    assert (found.epsilon, found.agreement, found.captured, found.proximal) == (None, None, None, 0.0)
    K = x[:3] @ torch.linalg.solve(P, x[:3].mT)
    assert_close(found.variances, K.diagonal(), rtol=1e-6)
    residual = (y - x @ guide.loc.detach()) / 0.25
    scores = residual[:, None] * x
    S = torch.linalg.solve(P, x[:3].mT)
    assert_close(found.sandwich, S.mT @ scores.mT @ scores @ S, rtol=1e-5)
    assert_close(found.mean, x[:3] @ guide.loc.detach(), rtol=1e-9)
    central = hfl.solve(guide, (x, y), (x[:3],), method="central")
    assert central.epsilon == 1e-3
    assert central.agreement < 1e-4
    assert hfl.solve(guide, (x, y), (x[:3],), method="one_sided", check=False).agreement is None
    biased = hfl.solve(guide, (x, y), (x[:3],), proximal=2.0)
    assert biased.proximal == 2.0
    K = x[:3] @ torch.linalg.solve(P + 2 * torch.eye(D), x[:3].mT)
    assert_close(biased.variances, K.diagonal(), rtol=1e-6)
