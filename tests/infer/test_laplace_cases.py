# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Every structure, curvature, likelihood and layer of a table against dense autograd in float64, with Fisher information
by enumeration and quadrature over the observation.

``python benchmarks/laplace_cases.py`` runs the table and prints its size and the largest errors.
"""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn as nn
from torch.func import functional_call

from pyro_bnn.infer.autoguide import AutoLaplace
from tests.common import assert_close
from tests.contracts.fisher import by_divergence, by_points, counts, gauss, half_line

COVARIANCE = torch.tensor([[0.5, 0.1], [0.1, 0.3]], dtype=torch.float64)
DIAGONAL = torch.tensor([[0.3, 0.0], [0.0, 0.7]], dtype=torch.float64)
CUTS = torch.tensor([-1.0, 0.5], dtype=torch.float64)

#: name -> (number of network outputs, distribution of the observation given them, observations of N points)
LIKELIHOODS = {
    "normal": (1, lambda f: dist.Normal(f[..., 0], 0.3), lambda n: torch.randn(n)),
    "heteroscedastic": (2, lambda f: dist.Normal(f[..., 0], (0.3 * f[..., 1]).exp()), lambda n: torch.randn(n)),
    "vector": (2, lambda f: dist.Normal(f, DIAGONAL.diagonal()).to_event(1), lambda n: torch.randn(n, 2)),
    "multivariate": (2, lambda f: dist.MultivariateNormal(f, COVARIANCE), lambda n: torch.randn(n, 2)),
    "student": (1, lambda f: dist.StudentT(4.0, f[..., 0], 0.5), lambda n: torch.randn(n)),
    "laplace": (1, lambda f: dist.Laplace(f[..., 0], 0.5), lambda n: torch.randn(n)),
    "lognormal": (1, lambda f: dist.LogNormal(f[..., 0], 0.5), lambda n: torch.randn(n).exp()),
    "poisson": (1, lambda f: dist.Poisson(f[..., 0].exp()), lambda n: torch.randint(0, 4, (n,)).double()),
    "negative_binomial": (1, lambda f: dist.NegativeBinomial(3.0, logits=f[..., 0]), lambda n: torch.randint(0, 4, (n,)).double()),
    "gamma": (1, lambda f: dist.Gamma(2.0, f[..., 0].exp()), lambda n: torch.rand(n) + 0.1),
    "beta": (2, lambda f: dist.Beta(f[..., 0].exp(), f[..., 1].exp()), lambda n: 0.1 + 0.8 * torch.rand(n)),
    "bernoulli": (1, lambda f: dist.Bernoulli(logits=f[..., 0]), lambda n: torch.randint(0, 2, (n,)).double()),
    "binomial": (1, lambda f: dist.Binomial(5, logits=f[..., 0]), lambda n: torch.randint(0, 6, (n,)).double()),
    "categorical": (3, lambda f: dist.Categorical(logits=f), lambda n: torch.randint(0, 3, (n,))),
    "ordinal": (1, lambda f: dist.OrderedLogistic(f[..., 0], CUTS), lambda n: torch.randint(0, 3, (n,))),
    "masked": (1, lambda f: dist.Normal(f[..., 0], 0.3).mask(torch.arange(f.shape[-2]) % 3 > 0), lambda n: torch.randn(n)),
}  # fmt: skip


def scalar_gauss(scale):
    """Points of one Normal observation, whose event shape is empty."""
    points = gauss(lambda f: f[..., :1], lambda f: scale(f)[..., None, None] * torch.eye(1))

    def squeezed(f):
        values, weights = points(f)
        return values.squeeze(-1), weights

    return squeezed


def exponentiated(points):
    def moved(f):
        values, weights = points(f)
        return values.exp(), weights

    return moved


CONSTANT = scalar_gauss(lambda f: torch.full(f.shape[:-1], 0.3))
#: name -> points to sum over, in place of the expectation over the observation; None where torch knows the divergence
POINTS = {
    "normal": CONSTANT,
    "heteroscedastic": scalar_gauss(lambda f: (0.3 * f[..., 1]).exp()),
    "vector": gauss(lambda f: f, lambda f: DIAGONAL),
    "multivariate": gauss(lambda f: f, lambda f: torch.linalg.cholesky(COVARIANCE)),
    "student": half_line(LIKELIHOODS["student"][1], start=lambda f: f[..., 0]),
    "laplace": half_line(LIKELIHOODS["laplace"][1], start=lambda f: f[..., 0]),
    "lognormal": exponentiated(scalar_gauss(lambda f: torch.full(f.shape[:-1], 0.5))),
    "gamma": half_line(LIKELIHOODS["gamma"][1]),
    "beta": None,
    "masked": CONSTANT,
    **{
        name: counts(LIKELIHOODS[name][1], size)
        for name, size in {
            "poisson": 150, "negative_binomial": 3000, "bernoulli": 2, "binomial": 6, "categorical": 3, "ordinal": 3,
        }.items()
    },
}  # fmt: skip
#: name -> the real-valued parameters that predictions are given in; the network's outputs by default
PARAMETERS = {
    "heteroscedastic": lambda f: f * torch.tensor([1.0, 0.3]),
    "categorical": lambda f: f.log_softmax(-1),
}


class Last(nn.Module):
    def forward(self, x):
        return x[0][:, -1]


NETWORKS = {
    "mlp": (lambda out: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, out)), (3,)),
    "conv": (lambda out: nn.Sequential(nn.Conv1d(2, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8, out)), (2, 4)),
    "conv2d": (lambda out: nn.Sequential(nn.Conv2d(2, 2, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, out)), (2, 4, 4)),
    "transposed": (lambda out: nn.Sequential(nn.ConvTranspose1d(2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, out)), (2, 3)),
    "lstm": (lambda out: nn.Sequential(nn.LSTM(3, 2, batch_first=True), Last(), nn.Linear(2, out)), (3, 3)),
    "gru": (lambda out: nn.Sequential(nn.GRU(3, 2, batch_first=True), Last(), nn.Linear(2, out)), (3, 3)),
    "norm": (lambda out: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, out)), (3,)),
}  # fmt: skip


#: by quantity, the largest error of each comparison, relative to the largest entry
ERRORS = {}


def compare(quantity, actual, expected, **tolerances):
    error = (actual - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-300)
    ERRORS.setdefault(quantity, []).append(float(error))
    assert_close(actual, expected, **tolerances)


class Case:
    """A network with prior scales that differ by site, at a random point; no structure is exact by accident."""

    def __init__(self, network, likelihood, n=11):
        outputs, family, observe = LIKELIHOODS[likelihood]
        build, shape = NETWORKS[network]
        self.net = build(outputs)
        self.x, self.y = torch.randn(n, *shape), observe(n)
        self.shapes = {name: value.shape for name, value in self.net.named_parameters()}
        self.scales = {name: 0.5 + 0.25 * i for i, name in enumerate(self.shapes)}
        self.family = family
        self.likelihood = likelihood
        self.dim = sum(shape.numel() for shape in self.shapes.values())
        self.point = 0.5 * torch.randn(self.dim)
        self.prior = torch.cat(
            [torch.full((s.numel(),), self.scales[k] ** -2) for k, s in self.shapes.items()]
        )
        self.places = torch.arange(self.dim).split([s.numel() for s in self.shapes.values()])

    def model(self, x, y=None):
        values = {
            k: pyro.sample(k, dist.Normal(torch.zeros(s), self.scales[k]).to_event(len(s)))
            for k, s in self.shapes.items()
        }
        f = functional_call(self.net, values, (x,))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", self.family(f), obs=y)

    def values(self, u):
        parts = u.split([s.numel() for s in self.shapes.values()])
        return {k: part.reshape(s) for (k, s), part in zip(self.shapes.items(), parts, strict=True)}

    def outputs(self, u, x):
        """What the likelihood is given, shape (n, outputs)."""
        return functional_call(self.net, self.values(u), (x,))

    def jacobian(self, x):
        """Of the real-valued parameters of the likelihood, shape (n, C, p)."""
        return torch.autograd.functional.jacobian(
            lambda u: PARAMETERS.get(self.likelihood, lambda f: f)(self.outputs(u, x)), self.point
        )

    def log_prob(self, u):
        return self.family(self.outputs(u, self.x)).log_prob(self.y)

    def information(self):
        """In the network's outputs, shape (n, outputs, outputs)."""
        f, points = self.outputs(self.point, self.x), POINTS[self.likelihood]
        return by_divergence(self.family, f) if points is None else by_points(self.family, f, points)

    def dense(self):
        J = torch.autograd.functional.jacobian(lambda u: self.outputs(u, self.x), self.point)
        return torch.einsum("nci,ncd,ndj->ij", J, self.information(), J)

    def guide(self, **options):
        guide = AutoLaplace(self.model, **options).initialize(self.x, self.y)
        guide.loc.data = self.point.clone()
        return self.approximated(guide)

    def approximated(self, guide):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return guide.laplace_approximation((self.x, self.y))


def check(case, guide, precision):
    """Precision, variances, log determinant, evidence and functional variances of a guide."""
    posterior = guide.posterior
    eye = torch.eye(case.dim)
    compare("precision", posterior.multiply(eye), precision, rtol=1e-8, atol=1e-9)
    covariance = torch.linalg.inv(precision)
    compare("marginal variances", posterior.variance, covariance.diagonal(), rtol=1e-8)
    compare("log determinant", posterior.log_det_precision, torch.logdet(precision), rtol=1e-8)
    joint = (
        pyro.poutine.trace(pyro.condition(case.model, data=guide.packed.space.unpack(case.point)))
        .get_trace(case.x, case.y)
        .log_prob_sum()
    )
    evidence = joint + 0.5 * (case.dim * torch.log(torch.tensor(2 * torch.pi)) - torch.logdet(precision))
    compare("log evidence", guide.log_evidence(), evidence, rtol=1e-8)
    x_new = torch.randn(5, *case.x.shape[1:])
    J = case.jacobian(x_new)
    expected = J @ covariance @ J.mT
    outputs = guide.linearized_outputs(x_new)["obs"]
    blocks = outputs.covariance.reshape(len(x_new), -1, *outputs.covariance.shape[-2:])
    C = blocks.shape[-1]
    for r in range(blocks.shape[1]):
        part = expected[:, r * C : (r + 1) * C, r * C : (r + 1) * C]
        compare("predictive covariances", blocks[:, r], part, rtol=1e-8, atol=1e-11)


def project(case, dense, structure):
    if structure == "full":
        return dense
    if structure == "diagonal":
        return torch.diag(dense.diagonal())
    kept = torch.zeros_like(dense)
    for places in case.places:
        kept[places[:, None], places] = dense[places[:, None], places]
    return kept


BASIC = ("mlp", "conv", "norm")
PAIRS = [(n, k) for n in BASIC for k in LIKELIHOODS] + [
    (n, k) for n in NETWORKS if n not in BASIC for k in ("heteroscedastic", "categorical", "poisson")
]


@pytest.mark.every(3)
@pytest.mark.parametrize(("network", "likelihood"), PAIRS)
def test_exact_structures(network, likelihood):
    case = Case(network, likelihood)
    dense = case.dense()
    for structure in ("full", "block", "diagonal"):
        check(case, case.guide(structure=structure), project(case, dense, structure) + torch.diag(case.prior))
    # of full rank, the others are exact too
    for structure in ("low_rank", "function_space", "nystrom"):
        check(case, case.guide(structure=structure, rank=case.dim), dense + torch.diag(case.prior))


def kronecker_by_definition(case, sharing):
    """Factors from the per-example inputs and output gradients of each linear layer, by hooks and autograd."""
    F = case.information()
    values = case.values(case.point)
    dense, total = case.dense(), torch.zeros(case.dim, case.dim)
    places = dict(zip(case.shapes, case.places, strict=True))
    for name, module in case.net.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv1d)):
            continue
        seen = {}

        def hook(module, inputs, output, seen=seen):
            seen["x"] = inputs[0].detach()
            seen["shape"] = output.shape
            return output + seen["shift"].reshape(output.shape) if "shift" in seen else output

        handle = module.register_forward_hook(hook)
        functional_call(case.net, values, (case.x,))
        size = seen["shape"].numel()

        def shifted(shift, seen=seen):
            seen["shift"] = shift
            return functional_call(case.net, values, (case.x,))

        J = torch.autograd.functional.jacobian(shifted, torch.zeros(size)).reshape(
            len(case.x), -1, *seen["shape"]
        )
        handle.remove()
        g = torch.stack([J[n, :, n] for n in range(len(case.x))])  # (n, C, out[, T])
        x = seen["x"]
        if isinstance(module, nn.Conv1d):
            padded = nn.functional.pad(x, (1, 1))
            x = padded.unfold(2, 3, 1).permute(0, 2, 1, 3).flatten(2)  # (n, T, in * k)
            g = g.permute(0, 1, 3, 2)
        else:
            x, g = x.unsqueeze(1), g.unsqueeze(2)
        live = F.abs().sum((1, 2)) > 0
        x = x[live]
        if sharing == "expand":
            A = torch.einsum("nti,ntj->ij", x, x) / (x.shape[0] * x.shape[1])
            G = torch.einsum("ncto,ncd,ndtp->op", g, F, g)
        else:
            A = torch.einsum("ni,nj->ij", x.mean(1), x.mean(1)) / x.shape[0]
            G = torch.einsum("nco,ncd,ndp->op", g.sum(2), F, g.sum(2))
        at = places[name + ".weight"]
        total[at[:, None], at] = torch.kron(G.contiguous(), A.contiguous())
    for at in places.values():
        if not bool(total[at[:, None], at].any()):
            total[at[:, None], at] = dense[at[:, None], at]
    return total


@pytest.mark.every(3)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(
    "likelihood", ["normal", "heteroscedastic", "vector", "poisson", "categorical", "masked"]
)
@pytest.mark.parametrize("network", BASIC)
def test_kronecker_equals_its_definition(network, likelihood, sharing):
    case = Case(network, likelihood)
    expected = kronecker_by_definition(case, sharing) + torch.diag(case.prior)
    check(case, case.guide(structure="kronecker", sharing=sharing), expected)


@pytest.mark.every(3)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("likelihood", ["heteroscedastic", "categorical", "vector"])
def test_empirical_fisher_equals_per_example_gradients(network, likelihood):
    case = Case(network, likelihood)

    gradients = torch.autograd.functional.jacobian(case.log_prob, case.point)
    dense = gradients.mT @ gradients
    for structure in ("full", "block", "diagonal"):
        guide = case.guide(structure=structure, curvature="empirical_fisher")
        check(case, guide, project(case, dense, structure) + torch.diag(case.prior))


@pytest.mark.every(2)
@pytest.mark.parametrize("likelihood", ["categorical", "heteroscedastic"])
@pytest.mark.parametrize("structure", ["full", "block", "diagonal", "kronecker"])
def test_monte_carlo_fisher_in_distribution(structure, likelihood):
    case = Case("mlp", likelihood, n=6)
    exact = case.guide(structure=structure).posterior.multiply(torch.eye(case.dim))
    guide = case.guide(structure=structure, curvature="mc_fisher", num_samples=200)
    one = [case.approximated(guide).posterior.multiply(torch.eye(case.dim)) for _ in range(25)]
    draws = torch.stack(one)
    error = draws.std(0) / 25**0.5
    assert ((draws.mean(0) - exact).abs() <= 5.5 * error + 1e-9).all()
    spread = draws.diagonal(dim1=1, dim2=2).std(0)
    assert (spread > 0).any()


@pytest.mark.parametrize("structure", ["full", "block", "diagonal", "low_rank"])
def test_exact_hessian_of_the_likelihood(structure):
    case = Case("mlp", "poisson")

    case.prior = case.prior * 0 + 0.2**-2  # wide enough apart from zero that P is positive definite
    case.scales = dict.fromkeys(case.scales, 0.2)
    case.point = 0.1 * case.point
    dense = torch.autograd.functional.hessian(lambda u: -case.log_prob(u).sum(), case.point)
    if structure == "low_rank":  # reduces to the eigenvalues of largest size
        guide = case.guide(structure=structure, curvature="hessian", rank=case.dim)
        check(case, guide, dense + torch.diag(case.prior))
        return
    check(
        case,
        case.guide(structure=structure, curvature="hessian"),
        project(case, dense, structure) + torch.diag(case.prior),
    )


@pytest.mark.parametrize("structure", ["full", "kronecker", "diagonal", "function_space"])
def test_last_layer(structure):
    case = Case("mlp", "categorical")
    guide = AutoLaplace.last_layer(case.model, structure=structure).initialize(case.x, case.y)
    guide.loc.data = case.point.clone()
    guide.laplace_approximation((case.x, case.y), map_tolerance=float("inf"))
    at = torch.arange(case.dim)[16:]
    dense = case.dense()[at[:, None], at]
    if structure == "diagonal":
        dense = torch.diag(dense.diagonal())
    if structure == "kronecker":
        dense = kronecker_by_definition(case, "expand")[at[:, None], at]
    covariance = torch.linalg.inv(dense + torch.diag(case.prior[at]))
    assert_close(guide.posterior.variance[at], covariance.diagonal(), rtol=1e-8)
    assert_close(guide.posterior.variance[:16], torch.zeros(16), rtol=0)
    assert guide.posterior.rank == len(at)
    x_new = torch.randn(4, 3)
    J = case.jacobian(x_new)[..., at]
    assert_close(
        guide.linearized_outputs(x_new)["obs"].covariance, J @ covariance @ J.mT, rtol=1e-8, atol=1e-12
    )


def test_subnetworks():
    case = Case("mlp", "normal")
    variance = 1 / (case.dense().diagonal() + case.prior)
    guide = case.guide(subnetwork="largest_variance", subnetwork_size=7)
    chosen = variance.topk(7).indices.sort().values
    assert_close(guide.active.nonzero().squeeze(-1), chosen, rtol=0)
    expected = torch.linalg.inv((case.dense() + torch.diag(case.prior))[chosen[:, None], chosen])
    assert_close(guide.posterior.variance[chosen], expected.diagonal(), rtol=1e-8)
    assert case.guide(subnetwork="random", subnetwork_size=5).posterior.rank == 5
    mask = torch.zeros(case.dim, dtype=torch.bool)
    mask[[0, 3, 17]] = True
    by_mask = case.guide(sites=mask)
    assert by_mask.posterior.rank == 3
    by_site = case.guide(sites=["2.*"], structure="block")
    assert by_site.posterior.rank == 5
    with pytest.raises(ValueError, match=r"sites names '3\.\*', which matches none"):
        case.guide(sites=["3.*"])
