# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Certified bounds of Hessian-free Laplace variances against dense matrices that are written down here."""

import warnings
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_bnn.infer import hfl
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.infer.hfl import HFLWarning
from tests.common import assert_close

P_ = 30  # latents of the linear models
FEATURES = {
    "even": torch.ones(P_),
    "scaled": torch.logspace(2, -3, P_),
    "clustered": torch.where(torch.arange(P_) % 2 == 0, 30.0, 0.1),
    "few": torch.where(torch.arange(P_) < 4, 100.0, 0.0),
}


class Linear:
    """A linear model with priors of several widths, at a point away from its mode, and its dense precision."""

    def __init__(self, features="scaled", dtype=torch.float64, noise=0.5, prior=None):
        generator = torch.Generator().manual_seed(0)
        self.dtype = dtype
        x = torch.randn(60, P_, generator=generator, dtype=torch.float64) * FEATURES[features].double()
        self.x = x.to(dtype)
        self.y = torch.randn(60, generator=generator, dtype=torch.float64).to(dtype)
        self.scale = torch.linspace(0.05, 3.0, P_, dtype=torch.float64)
        self.prior = prior or dist.Normal(torch.zeros(P_, dtype=dtype), self.scale.to(dtype)).to_event(1)
        self.noise = noise
        self.precision = x.mT @ x / noise**2 + torch.diag(self.scale**-2)
        targets = torch.randn(5, P_, generator=generator, dtype=torch.float64)
        dependent = targets[:1] - 3 * targets[1:2]
        self.targets = torch.cat([targets, dependent, dependent, torch.zeros(1, P_), x[:2]])
        self.covariance = self.targets @ torch.linalg.solve(self.precision, self.targets.mT)

    def model(self, x, y=None):
        w = pyro.sample("w", self.prior)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ w, self.noise), obs=y)

    def solve(self, targets=None, data=None, **options):
        guide = AutoLaplace(self.model, curvature="ggn").initialize(self.x, self.y)
        guide.loc.data.fill_(0.1)
        targets = self.targets if targets is None else targets
        options = {"curvature": "ggn", "map_tolerance": float("inf"), **options}
        data = (self.x, self.y) if data is None else data
        return hfl.solve(guide, data, targets=(targets.to(self.dtype),), **options)


def assert_contains(result, exact):
    """With the slack of rounding in the reference only."""
    exact = exact.reshape(result.shape)
    slack = 1e-10 * exact.max()
    assert (result.lower.double() <= exact + slack).all()
    assert (exact <= result.upper.double() + slack).all()


def is_below(A, B):
    gap = torch.linalg.eigvalsh(0.5 * ((B - A) + (B - A).mT).double())
    return bool(gap[0] >= -1e-9 * torch.linalg.eigvalsh(B.double())[-1])


@pytest.mark.every(3)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("block_size", [1, 3, 64])
@pytest.mark.parametrize("preconditioner", [None, "prior", "nystrom", "diagonal"])
def test_bounds_contain_the_dense_variance_and_are_as_narrow_as_asked(features, block_size, preconditioner):
    case = Linear(features)
    options = {"block_size": block_size, "preconditioner": preconditioner, "rank": 6}
    result = case.solve(tolerance=0.02, **options)
    assert_contains(result, case.covariance.diagonal())
    assert result.certificate.width <= 0.02
    assert result.certificate.gap < 1e-6
    low, high = result.certificate.joint
    assert is_below(low, case.covariance)
    assert is_below(case.covariance, high)
    assert is_below(result.covariance, high)
    assert (result.upper.flatten()[7] == 0) & (result.lower.flatten()[7] == 0)  # a target that is constant
    assert not result.warnings


def test_no_more_products_than_the_width_takes():
    case = Linear("scaled")
    products = [case.solve(case.targets[:1], tolerance=tolerance).products for tolerance in (0.5, 0.01, 1e-8)]
    assert products[0] < products[1] < products[2]
    by_residual = case.solve(case.targets[:1])
    assert by_residual.products >= products[1]
    assert by_residual.certificate.width < 1e-6


@pytest.mark.parametrize("method", ["cg", "probe", "one_sided", "central", "paired"])
@pytest.mark.parametrize("tolerance", [None, 0.1])
def test_every_method(method, tolerance):
    case = Linear("even")
    options = {"num_epochs": 30, "num_probes": 4} if method in ("paired", "probe") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HFLWarning)  # what a few probes miss, what few epochs leave
        result = case.solve(case.targets[:6], method=method, tolerance=tolerance, **options)
    exact = case.covariance.diagonal()[:6]
    assert_contains(result, exact)
    if method != "probe":
        low, high = result.certificate.joint
        assert is_below(low, case.covariance[:6, :6])
        assert is_below(case.covariance[:6, :6], high)
        assert result.certificate.width < 0.3
    else:
        with pytest.raises(ValueError, match="method='probe' bounds no covariances"):
            result.combination_bounds(torch.ones(6))


def test_stops_of_any_kind_are_bracketed_and_brackets_nest():
    case = Linear("clustered")
    previous = None
    for max_iter in (1, 2, 3, 5, 8):
        with (
            pytest.warns(HFLWarning, match="wide, relative to the lower one")
            if max_iter < 5
            else nullcontext()
        ):
            result = case.solve(max_iter=max_iter, tolerance=1e-3, preconditioner=lambda r: r)
        assert_contains(result, case.covariance.diagonal())
        if previous is not None:
            slack = 1e-9 * result.upper.max()
            assert (result.lower >= previous.lower - slack).all()
            assert (result.upper <= previous.upper + slack).all()
        previous = result


def test_combinations_and_further_functionals():
    case = Linear("scaled")
    result = case.solve(tolerance=0.05)
    weights = torch.randn(200, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = ((weights @ case.covariance) * weights).sum(-1)
    low, high = result.combination_bounds(weights)
    assert (low <= exact * (1 + 1e-9)).all()
    assert (exact <= high * (1 + 1e-9)).all()
    assert (low > 0.5 * exact).float().mean() > 0.5
    rows = torch.randn(50, P_, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    variances = (rows * torch.linalg.solve(case.precision, rows.mT).mT).sum(-1)
    low, high = result.certificate.bounds(rows)
    assert (low <= variances * (1 + 1e-9)).all()
    assert (variances <= high * (1 + 1e-9)).all()
    assert (high < rows.square() @ case.scale.square()).all()  # than the prior's


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("tolerance", [None, 0.05])
def test_single_precision(features, tolerance):
    case = Linear(features, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HFLWarning)
        result = case.solve(tolerance=tolerance)
    # the dense precision of the numbers that the model has
    x, noise, scale = case.x.double(), case.noise, case.scale.float().double()
    precision = x.mT @ x / noise**2 + torch.diag(scale**-2)
    targets = case.targets.float().double()
    covariance = targets @ torch.linalg.solve(precision, targets.mT)
    assert result.certificate.gap > 0
    assert_contains(result, covariance.diagonal())
    low, high = result.certificate.joint
    assert is_below(low, covariance)
    assert is_below(covariance, high)


def test_batches_and_a_proximal_term():
    case = Linear("even")
    whole = case.solve(tolerance=0.02)
    parts = [(case.x[i::4], case.y[i::4]) for i in range(4)]
    streamed = case.solve(tolerance=0.02, data=parts)
    assert_contains(streamed, case.covariance.diagonal())
    assert_close(streamed.upper, whole.upper, rtol=1e-6)
    moved = case.solve(tolerance=0.02, proximal=3.0)
    precision = case.precision + 3.0 * torch.eye(P_, dtype=torch.float64)
    assert_contains(moved, (case.targets * torch.linalg.solve(precision, case.targets.mT).mT).sum(-1))


def test_a_classifier_by_its_dense_matrix():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (20,), generator=generator)

    def logits(u, x):
        w1, w2 = u[:12].reshape(4, 3), u[12:24].reshape(3, 4)
        return torch.tanh(x @ w1.mT) @ w2.mT

    def model(x, y=None):
        a = pyro.sample("a", dist.Normal(torch.zeros(12), 2.0).to_event(1))
        b = pyro.sample("b", dist.Normal(torch.zeros(12), 0.5).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=logits(torch.cat([a, b]), x)), obs=y)

    guide = AutoLaplace(model, curvature="ggn").initialize(x, y)
    u = torch.randn(24, generator=generator, dtype=torch.float64)
    guide.loc.data.copy_(u)
    J = torch.func.jacrev(logits)(u, x)
    prob = logits(u, x).softmax(-1)
    F = torch.diag_embed(prob) - prob[:, :, None] * prob[:, None]
    P = torch.einsum("nia,nij,njb->ab", J, F, J) + torch.diag(
        torch.cat([torch.full((12,), 0.25), torch.full((12,), 4.0)])
    )
    new = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    G = torch.func.jacrev(lambda u: logits(u, new).log_softmax(-1))(u).reshape(15, 24)
    exact = (G * torch.linalg.solve(P, G.mT).mT).sum(-1)
    for preconditioner in (None, "nystrom", guide.laplace_approximation((x, y), map_tolerance=float("inf"))):
        options = {
            "preconditioner": preconditioner,
            "rank": 4,
            "block_size": 2,
            "map_tolerance": float("inf"),
        }
        result = hfl.solve(guide, (x, y), (new,), curvature="ggn", tolerance=1e-3, **options)
        assert_contains(result, exact)
        assert result.shape == (5, 3)
        assert result.certificate.width <= 1e-3


PRIORS = {
    "flat": (
        lambda: dist.ImproperUniform(dist.constraints.real_vector, (), (P_,)),
        "prior of 'w' has no positive curvature",
    ),
    "no slope": (
        lambda: dist.Laplace(torch.zeros(P_), 1.0).to_event(1),
        "prior of 'w' has no positive curvature",
    ),
    "heavy": (
        lambda: dist.StudentT(1.0, torch.full((P_,), 9.0), 1.0).to_event(1),
        "not strongly log-concave there",
    ),
    "coupled": (
        lambda: dist.MultivariateNormal(torch.zeros(P_), torch.eye(P_) + 0.5),
        "prior couples latents",
    ),
}


@pytest.mark.parametrize("name", PRIORS)
def test_what_is_not_certified_says_why(name):
    prior, reason = PRIORS[name]
    case = Linear("even", prior=prior())
    result = case.solve(tolerance=1e-3)
    assert result.lower is None
    assert result.upper is None
    assert reason in result.uncertified
    assert reason in str(result)
    assert result.residual <= 1e-3  # which the tolerance is of, here
    with pytest.raises(ValueError, match=f"not certified: .*{reason}"):
        result.combination_bounds(torch.ones(10))
    if name != "coupled":
        assert case.solve(tolerance=1e-3, proximal=1.0).certificate.width <= 1e-3


@pytest.mark.parametrize(("dtype", "narrow"), [(torch.float32, 1e-3), (torch.float64, 1e-6)])
@pytest.mark.parametrize("correlation", [0.0, 0.05])
def test_couplings_that_are_small_beside_a_narrow_prior(dtype, narrow, correlation):
    covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=dtype)

    def model(x, y=None):
        a = pyro.sample("a", dist.Normal(x.new_zeros(3), x.new_tensor(narrow)).to_event(1))
        b = pyro.sample("b", dist.MultivariateNormal(x.new_zeros(2), covariance))
        noise = pyro.sample("noise", dist.LogNormal(x.new_tensor(0.0), x.new_tensor(100.0)))  # terms cancel
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ torch.cat([a, b]), noise), obs=y)

    x = torch.eye(5, dtype=dtype)
    guide = AutoLaplace(model).initialize(x, x[0])
    guide.loc.data.zero_()
    options = {"curvature": "ggn", "tolerance": 0.01, "map_tolerance": float("inf")}
    result = hfl.solve(guide, (x, x[0]), functional=lambda z: z["b"], **options)
    exact = torch.linalg.inv(torch.linalg.inv(covariance.double()) + torch.eye(2)).diagonal()
    assert_close(result.variance.double(), exact, rtol=0.01, atol=0.0)
    if correlation:
        assert "prior couples latents" in result.uncertified
        with pytest.raises(ValueError, match=r"prior couples latents with each other .site .b."):
            hfl.log_evidence(guide, (x, x[0]))
    else:
        assert result.certificate is not None
        assert (result.lower.double() <= exact * (1 + 1e-6)).all()
        assert (exact <= result.upper.double() * (1 + 1e-6)).all()


def test_the_exact_hessian_is_not_certified():
    result = Linear("even").solve(curvature="hessian")
    assert result.certificate is None
    assert "exact Hessian" in result.uncertified


def test_priors_that_are_gaussian_in_real_space_and_those_that_are_curved_enough():
    """The curvature at the point counts: LogNormal is Gaussian there, Student's t is curved near its centre."""
    x = torch.linspace(-1, 1, 12, dtype=torch.float64)
    y = x.sin()

    def model(x, y=None):
        a = pyro.sample("a", dist.LogNormal(x.new_zeros(()), 0.5))
        b = pyro.sample("b", dist.StudentT(3.0, x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(a * x + b, 0.3), obs=y)

    guide = AutoLaplace(model, curvature="ggn").initialize(x, y)
    a, b = 0.2, 0.3
    guide.loc.data.copy_(torch.tensor([a, b]))
    slope = torch.tensor(a, dtype=torch.float64).exp()
    J = torch.stack([slope * x, torch.ones_like(x)], -1)  # a = exp(u)
    # -log t = 2 log(1 + b^2 / 3): second derivative (4 / 3) (1 - b^2 / 3) / (1 + b^2 / 3)^2
    curved = 4 / 3 * (1 - b**2 / 3) / (1 + b**2 / 3) ** 2
    P = J.mT @ J / 0.09 + torch.diag(torch.tensor([4.0, curved], dtype=torch.float64))
    result = hfl.solve(guide, (x, y), (x[:3],), curvature="ggn", map_tolerance=float("inf"))
    assert_contains(result, (J[:3] * torch.linalg.solve(P, J[:3].mT).mT).sum(-1))
    assert_close(result.upper, result.lower, rtol=1e-6)


def test_more_targets_than_memory_keeps(monkeypatch):
    """Directions beyond what is kept: bounds follow the recursion, within one block and over several."""
    from pyro_bnn.infer.hfl import solver

    case = Linear("scaled")

    def small(p):
        return ConjugateBasis(p, limit=8 * p)

    ConjugateBasis = solver.ConjugateBasis
    monkeypatch.setattr(solver, "ConjugateBasis", small)
    for block_size in (3, 64):
        result = case.solve(tolerance=0.05, block_size=block_size)
        assert_contains(result, case.covariance.diagonal())
        assert result.certificate.width <= 0.05
        low, high = result.certificate.joint
        assert is_below(low, case.covariance)
        assert is_below(case.covariance, high)


@pytest.mark.parametrize("preconditioner", ["prior", "nystrom"])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e3])
def test_single_precision_where_variances_differ_by_twelve_magnitudes(preconditioner, size):
    generator = torch.Generator().manual_seed(0)
    precision = torch.logspace(-2, 14, 8, dtype=torch.float64)
    x = (size * torch.randn(1, 8, generator=generator, dtype=torch.float64)).float()
    scale = precision.rsqrt().float()

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(8, dtype=torch.float32), scale).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    y = torch.zeros(1, dtype=torch.float32)
    guide = AutoLaplace(model, curvature="ggn").initialize(x, y)
    targets = torch.cat([torch.eye(8)[[0, 3, 7]], torch.ones(1, 8)]).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HFLWarning)  # float32 resolves no such curvatures to 1 %
        result = hfl.solve(
            guide,
            (x, y),
            functional=lambda z: targets @ z["w"],
            curvature="ggn",
            preconditioner=preconditioner,
        )
    white = x.double() * scale.double()
    rows = targets.double() * scale.double()
    exact = rows @ torch.linalg.solve(white.mT @ white + torch.eye(8, dtype=torch.float64), rows.mT)
    sd = exact.diagonal().sqrt()
    assert sd.max() / sd.min() > 1e6
    assert (result.lower.double() <= exact.diagonal() * (1 + 1e-6)).all()
    assert (result.upper.double() >= exact.diagonal() * (1 - 1e-6)).all()
    for gap in (exact - result.certificate.joint[0].double(), result.certificate.joint[1].double() - exact):
        assert torch.linalg.eigvalsh(gap / sd / sd[:, None])[0] > -1e-6
