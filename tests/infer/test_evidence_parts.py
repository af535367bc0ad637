# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Parts of a curvature and the evidence as a function of multipliers, against dense matrices."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_bnn.curvature.dense import DensePart
from pyro_bnn.curvature.diagonal import DiagonalPart
from pyro_bnn.curvature.kronecker import KroneckerPart
from pyro_bnn.curvature.low_rank import LowRankPart
from pyro_bnn.curvature.parts import NotAMinimumError
from pyro_bnn.curvature.prior import diagonal_of_diagonal, operator_diagonal
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.infer.evidence import LaplaceEvidence, prior_change, tau_of, train_with_evidence
from pyro_bnn.infer.hyperparameters import validation_score
from tests.common import assert_close

Q = 6


def positive(n):
    A = torch.randn(n, n)
    return A @ A.mT


def dense():
    H, prior = positive(Q), torch.rand(Q) + 0.3
    return DensePart(index=torch.arange(Q), prior=prior, curvature=H), H, torch.diag(prior)


def coupled():
    H, prior = positive(Q), positive(Q) + torch.eye(Q)
    return DensePart(index=torch.arange(Q), prior=prior, curvature=H), H, prior


def diagonal():
    h, prior = torch.rand(Q), torch.rand(Q) + 0.3
    return DiagonalPart(index=torch.arange(Q), prior=prior, curvature=h), torch.diag(h), torch.diag(prior)


def kronecker():
    G, A = positive(2), positive(3)
    so, si = torch.rand(2) + 0.5, torch.rand(3) + 0.5
    prior = (so[:, None] * si).flatten()
    part = KroneckerPart(index=torch.arange(Q), prior=prior, outputs=G, inputs=A * 7, count=torch.tensor(7.0))
    return part, torch.kron(G, A), torch.diag(prior)


def low_rank():
    prior = torch.rand(Q) + 0.3
    vectors, values = torch.linalg.qr(torch.randn(Q, 2)).Q, torch.tensor([5.0, 0.7])
    part = LowRankPart(index=torch.arange(Q), prior=prior, vectors=vectors, values=values)
    half = prior.sqrt()[:, None] * vectors
    return part, half * values @ half.mT, torch.diag(prior)


PARTS = {
    "dense": dense,
    "coupled": coupled,
    "diagonal": diagonal,
    "kronecker": kronecker,
    "low rank": low_rank,
}


@pytest.mark.parametrize("tau", [None, 0.2, 1.0, 30.0])
@pytest.mark.parametrize("name", PARTS)
def test_a_multiplier_multiplies_the_prior(name, tau):
    part, H, D = PARTS[name]()
    loc = torch.randn(Q)
    posterior = part.posterior(loc, None if tau is None else torch.tensor(tau))
    P = H + (1.0 if tau is None else tau) * D
    assert_close(posterior.multiply(torch.eye(Q)), P, rtol=1e-9, atol=1e-11)
    assert_close(posterior.log_det_precision, torch.logdet(P), rtol=1e-9)
    assert_close(posterior.loc, loc, rtol=0)
    values, constant = part.spectrum()
    assert_close(torch.log((tau or 1.0) + values).sum() + constant, torch.logdet(P), rtol=1e-9)
    assert values.shape == (Q,)
    assert_close(constant, torch.logdet(D), rtol=1e-9)


@pytest.mark.parametrize("name", ["dense", "coupled", "diagonal", "low rank"])
def test_a_multiplier_per_entry(name):
    part, H, D = PARTS[name]()
    tau = torch.rand(Q) + 0.5
    root = tau.sqrt()
    P = H + root[:, None] * D * root
    assert_close(part.posterior(torch.zeros(Q), tau).multiply(torch.eye(Q)), P, rtol=1e-9, atol=1e-11)


def test_what_is_no_minimum_is_refused():
    index, one = torch.arange(2), torch.ones(2)
    dense = DensePart(index=index, prior=one, curvature=torch.diag(torch.tensor([-3.0, 1.0])))
    with pytest.raises(NotAMinimumError, match=r"1 of 2 eigenvalues are not positive, the smallest is -2"):
        dense.posterior(torch.zeros(2))
    for bad, values in ((-1.0, "1 of 2"), (-3.0, "1 of 2")):
        part = DiagonalPart(index=index, prior=one, curvature=torch.tensor([bad, 1.0]))
        with pytest.raises(NotAMinimumError, match=f"{values} diagonal entries are not positive"):
            part.posterior(torch.zeros(2))
    eye = torch.eye(2)
    with pytest.raises(NotAMinimumError, match="1 of 2 leading eigenvalues"):
        LowRankPart(index=index, prior=one, vectors=eye, values=torch.tensor([2.0, -1.5])).posterior(one)
    for part in (
        DensePart(index=index, prior=one, curvature=eye * torch.nan),
        DiagonalPart(index=index, prior=one, curvature=one * torch.inf),
    ):
        with pytest.raises(NotAMinimumError, match="non-finite"):
            part.posterior(one)
    flat = torch.tensor([1.0, 0.0])
    for part in (
        DensePart(index=index, prior=flat, curvature=eye),
        DensePart(index=index, prior=torch.diag(flat), curvature=eye),
        DiagonalPart(index=index, prior=flat, curvature=one),
        LowRankPart(index=index, prior=flat, vectors=eye, values=one),
        KroneckerPart(index=index, prior=flat, outputs=eye[:1, :1], inputs=eye, count=torch.tensor(1.0)),
    ):
        with pytest.raises(NotAMinimumError, match=r"not positive \(smallest 0\)"):
            part.spectrum()
    uneven = KroneckerPart(
        index=torch.arange(4) + 3, prior=torch.tensor([1.0, 2.0, 3.0, 4.0]), outputs=eye, inputs=eye,
        count=torch.tensor(1.0),
    )  # fmt: skip
    with pytest.raises(ValueError, match="2 x 2 weight at positions 3 to 6"):
        uneven.posterior(torch.zeros(7))


def test_a_part_takes_its_own_multipliers():
    part, *_ = diagonal()
    assert_close(tau_of(part, torch.tensor(2.0)), 2.0)
    tau = torch.full((9,), 3.0)
    tau[7:] = 5.0
    assert tau_of(part, tau).dim() == 0
    assert_close(tau_of(part, tau), 3.0)
    tau[2] = 4.0
    assert_close(tau_of(part, tau), tau[:Q])
    moving = torch.full((9,), 3.0, requires_grad=True)
    assert tau_of(part, moving).shape == (Q,)
    kron, *_ = kronecker()
    assert tau_of(kron, moving).dim() == 0


@pytest.mark.parametrize("name", ["dense", "coupled", "diagonal"])
def test_the_change_of_a_gaussian_prior(name):
    part, _, D = PARTS[name]()
    u, m, tau = torch.randn(Q), torch.randn(Q), torch.tensor(0.3)
    normal = lambda P: torch.distributions.MultivariateNormal(m, precision_matrix=P).log_prob(u)  # noqa: E731
    assert_close(prior_change(part, D @ (u - m), tau), normal(tau * D) - normal(D), rtol=1e-9)
    if name == "diagonal":
        each = torch.rand(Q) + 0.5
        expected = normal(torch.diag(each) @ D) - normal(D)
        assert_close(prior_change(part, D @ (u - m), each), expected, rtol=1e-9)


NOISE = 0.4


def regression(x, y=None):
    """Two sites of different prior scales and means."""
    a = pyro.sample("a", dist.Normal(torch.full((2,), 0.3), 0.5).to_event(1))
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(x[:, :2] @ a + x[:, 2:] @ b, NOISE), obs=y)


MEAN = torch.tensor([0.3, 0.3, 0.0, 0.0, 0.0], dtype=torch.float64)
PRIOR = torch.tensor([4.0, 4.0, 0.25, 0.25, 0.25], dtype=torch.float64)


def fitted(structure="full", n=20):
    x = torch.randn(n, 5)
    y = x @ torch.tensor([0.5, 0.1, 1.0, -2.0, 0.0]) + NOISE * torch.randn(n)
    guide = AutoLaplace(regression, structure=structure, rank=5).initialize(x, y)
    guide.loc.data = torch.tensor([0.4, 0.2, 1.0, -1.5, 0.1])
    return guide.laplace_approximation((x, y), map_tolerance=float("inf")), x, y


def evidence_by_hand(guide, x, y, tau, structure):
    """log p(y, u) at the guide's point under multiplied priors, plus the Laplace determinant."""
    u = guide.loc.detach()
    H = x.mT @ x / NOISE**2
    keep = {
        "full": torch.ones(5, 5),
        "block": torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)),
        "diagonal": torch.eye(5),
    }[structure]
    P = H * keep + torch.diag(tau * PRIOR)
    likelihood = torch.distributions.Normal(x @ u, NOISE).log_prob(y).sum()
    prior = torch.distributions.Normal(MEAN, (tau * PRIOR).rsqrt()).log_prob(u).sum()
    return likelihood + prior + 0.5 * (5 * math.log(2 * math.pi) - torch.logdet(P))


@pytest.mark.parametrize("structure", ["full", "block", "diagonal"])
@pytest.mark.parametrize("per", ["global", "site"])
def test_the_evidence_in_multipliers_and_its_best(structure, per):
    guide, x, y = fitted(structure)

    def expand(a, b):
        return torch.cat([torch.full((2,), a), torch.full((3,), b)]).double()

    for a, b in ((1.0, 1.0), (0.3, 0.3), (2.0, 0.1)):
        expected = evidence_by_hand(guide, x, y, expand(a, b), structure)
        tau = torch.tensor(a).double() if a == b else expand(a, b)
        assert_close(guide.log_evidence(tau), expected, rtol=1e-9)
    report = guide.optimize_hyperparameters(per=per)
    tau = list(report.tau.values()) * (2 if per == "global" else 1)
    best = evidence_by_hand(guide, x, y, expand(*tau), structure)
    assert_close(guide.log_evidence(), best, rtol=1e-9)
    assert_close(max(report.objective), best, rtol=1e-9)
    for i in range(len(report.tau)):
        for factor in (0.98, 1.02):
            moved = list(tau)
            for k in range(2):
                if per == "global" or k == i:
                    moved[k] *= factor
            assert evidence_by_hand(guide, x, y, expand(*moved), structure) < best
    assert len(report.objective) < 60


@pytest.mark.parametrize("name", ["dense", "diagonal", "kronecker", "low rank"])
def test_derivatives_of_the_evidence_in_log_multipliers(name):
    (first, _, D), (second, _, E) = PARTS[name](), diagonal()

    g = torch.randn(Q)
    evidence = LaplaceEvidence([first, second], torch.tensor(-3.0), g, torch.zeros(Q))
    spectrum = evidence.spectrum([[first], [second]])
    log_tau = torch.tensor([0.4, -0.7], requires_grad=True)
    value = spectrum.value(log_tau)
    expected = -3.0 + 0.5 * 2 * Q * math.log(2 * math.pi)
    for part, prior, t in ((first, D, math.exp(0.4)), (second, E, math.exp(-0.7))):
        P = part.posterior(torch.zeros(Q), torch.tensor(t)).multiply(torch.eye(Q))
        distance = g @ torch.linalg.solve(prior, g)
        expected = expected + 0.5 * (Q * math.log(t) - (t - 1) * distance) - 0.5 * torch.logdet(P)
    assert_close(value, expected, rtol=1e-9)
    (slope,) = torch.autograd.grad(value, log_tau, create_graph=True)
    bend = torch.stack(
        [torch.autograd.grad(s, log_tau, retain_graph=True)[0][i] for i, s in enumerate(slope)]
    )
    found = spectrum.derivatives(log_tau.detach())
    assert_close(found[0], slope, rtol=1e-9)
    assert_close(found[1], bend, rtol=1e-9)


def test_a_grid_looks_at_every_candidate_of_every_group():
    guide, x, y = fitted("diagonal")
    candidates = [1e-3, 0.1, 1.0, 10.0, 1e3]
    report = guide.optimize_hyperparameters(method="grid", candidates=candidates)
    values = [
        float(evidence_by_hand(guide, x, y, torch.full((5,), c).double(), "diagonal")) for c in candidates
    ]
    assert_close(report.objective, values, rtol=1e-9)
    assert report.tau["all"] == candidates[values.index(max(values))]
    by_site = guide.optimize_hyperparameters(method="grid", candidates=candidates, per="site")
    assert len(by_site.objective) % 10 == 0
    table = {
        (a, b): float(
            evidence_by_hand(
                guide, x, y, torch.cat([torch.full((2,), a), torch.full((3,), b)]).double(), "diagonal"
            )
        )
        for a in candidates
        for b in candidates
    }
    assert tuple(by_site.tau.values()) == max(table, key=table.__getitem__)
    with pytest.raises(ValueError, match="candidates is empty"):
        guide.optimize_hyperparameters(method="grid", candidates=[])


def test_validation_sums_the_density_of_what_is_observed():
    guide, x, _ = fitted()
    P = x.mT @ x / NOISE**2 + torch.diag(PRIOR)
    new, target = torch.randn(6, 5), torch.randn(6)
    spread = ((new @ torch.linalg.inv(P) * new).sum(-1) + NOISE**2).sqrt()
    expected = torch.distributions.Normal(new @ guide.loc.detach(), spread).log_prob(target).sum()
    assert_close(validation_score(guide, (new, target)), expected, rtol=1e-9)
    parts = [(new[:2], target[:2]), (new[2:], target[2:])]
    assert_close(validation_score(guide, parts), expected, rtol=1e-9)


def test_training_alternates_as_often_as_it_says():
    guide, x, y = fitted()
    scale = torch.nn.Parameter(torch.tensor(0.0))
    start = guide.loc.detach().clone()
    report = train_with_evidence(
        guide, [(x[:10], y[:10]), (x[10:], y[10:])], epochs=7, update_every=2, burn_in=3, lr=1e-3
    )
    # after epochs 5 and 7, and at the end
    assert len(report.objective) == 3
    moved = (guide.loc.detach() - start).abs()
    few = train_with_evidence(guide, (x, y), epochs=5, update_every=3, burn_in=3, lr=0.0)
    assert len(few.objective) == 1  # two epochs after the burn-in are too few for an update
    assert guide.is_fitted
    assert float(scale.detach()) == 0.0
    assert bool((moved > 1e-3).all())  # Adam moves by about its step size, 14 times
    assert bool((moved < 15e-3).all())
    for epochs in (0, -1, 2.5):
        with pytest.raises(ValueError, match="epochs must be an integer of at least 1"):
            train_with_evidence(guide, (x, y), epochs=epochs)


def test_the_point_estimate_is_trained_on_the_joint_density():
    guide, x, y = fitted(n=10)
    # each point twice, in batches whose gradients agree
    P = 2 * x.mT @ x / NOISE**2 + torch.diag(PRIOR)
    mode = torch.linalg.solve(P, 2 * x.mT @ y / NOISE**2 + PRIOR * MEAN)
    train_with_evidence(guide, [(x, y), (x, y)], epochs=150, update_every=200, lr=2e-2)
    assert_close(guide.loc.detach(), mode, rtol=0, atol=1e-3)


@pytest.mark.parametrize("per", ["site", "layer"])
def test_only_what_is_random_has_a_multiplier(per):
    x = torch.randn(20, 5)
    y = torch.randn(20)
    for sites, names in ((["b"], ["b"]), (torch.tensor([False, True, True, False, False]), ["a", "b"])):
        guide = AutoLaplace(regression, structure="diagonal", sites=sites).initialize(x, y)
        guide.loc.data = torch.tensor([0.4, 0.2, 1.0, -1.5, 0.1])
        guide.laplace_approximation((x, y), map_tolerance=float("inf"))
        assert list(guide.optimize_hyperparameters(per=per).tau) == names
        active = guide.active
        P = (x.mT @ x / NOISE**2).diagonal() + guide.tau.expand(5) * PRIOR
        assert_close(guide.posterior.variance[active], 1 / P[active], rtol=1e-9)
        assert_close(guide.posterior.variance[~active], torch.zeros(5)[~active])


@pytest.mark.parametrize(
    "structure", ["full", "block", "diagonal", "kronecker", "low_rank", "function_space"]
)
def test_latents_that_the_data_do_not_reach_keep_their_prior(structure):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        pyro.sample("unused", dist.Normal(torch.zeros(4), torch.tensor([0.5, 1.0, 2.0, 3.0])).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=x @ w.mT), obs=y)

    x, y = torch.randn(9, 3), torch.randint(0, 2, (9,))
    guide = AutoLaplace(model, structure=structure, rank=10).initialize(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    assert_close(guide.posterior.variance[6:], [0.25, 1.0, 4.0, 9.0], rtol=1e-9)
    assert bool((guide.posterior.variance[:6] < 1).all())


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_the_diagonal_of_a_coupled_map(chunk_size):
    P = positive(7)
    assert_close(operator_diagonal(lambda v: v @ P, P[0], chunk_size), P.diagonal(), rtol=1e-10)
    d = torch.rand(7)
    calls = []
    diagonal = operator_diagonal(lambda v: (calls.append(len(v)), v * d)[1], d, chunk_size)
    assert_close(diagonal, d, rtol=1e-10)
    assert sum(calls) == 2  # products that show that it is diagonal
    assert diagonal_of_diagonal(lambda v: v @ P, P[0]) is None
