# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Curvature over batches: terms of the likelihood that every batch repeats, padding, packed sequences, mixed precision. The
references are dense autograd of plain functions.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence

from pyro_bnn.curvature.linear_maps import eigh_factor
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.ops.notice import CurvatureWarning
from tests.common import assert_close


def network(w, x):
    return torch.tanh(x @ w[:6].reshape(3, 2)) @ w[6:]


def two_tables(x, y, x2, y2, factor=False):
    """A table that is cut into batches, another that is passed whole with each of them, and a factor of the latents."""
    w = pyro.sample("w", dist.Normal(torch.zeros(8), 1.0).to_event(1))
    if factor:
        pyro.factor("target", -2.0 * (w[:6].sum() - 1.0) ** 2)
    with pyro.plate("table", len(x2)):
        pyro.sample("other", dist.Normal(network(w, x2), 0.3), obs=y2)
    with pyro.plate("data", 40, subsample_size=len(x)):
        pyro.sample("obs", dist.Normal(network(w, x), 0.5), obs=y)


def joint(w, x, y, x2, y2, factor=False):
    """The negative log joint density, in plain torch."""
    value = 0.5 * (w**2).sum() + ((network(w, x2) - y2) ** 2).sum() / (2 * 0.3**2)
    value = value + ((network(w, x) - y) ** 2).sum() / (2 * 0.5**2)
    return value + (2.0 * (w[:6].sum() - 1.0) ** 2 if factor else 0.0)


def tables(rows=40):
    torch.manual_seed(0)
    x, x2 = torch.randn(rows, 3), torch.randn(7, 3)
    return x, torch.randn(rows), x2, torch.randn(7)


@pytest.mark.parametrize("batch", [40, 8, 13])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_a_table_that_every_batch_holds_counts_once(batch, curvature):
    x, y, x2, y2 = tables()
    guide = AutoLaplace(two_tables, curvature=curvature).initialize(x[:5], y[:5], x2, y2)
    guide.loc.data.copy_(0.3 * torch.randn(8))
    u = guide.loc.detach().clone()
    if curvature == "hessian":
        guide.polish((x, y, x2, y2))
        u = guide.loc.detach().clone()
        expected = torch.autograd.functional.hessian(lambda w: joint(w, x, y, x2, y2), u)
    else:
        J, J2 = (torch.autograd.functional.jacobian(lambda w, x=x: network(w, x), u) for x in (x, x2))
        expected = torch.eye(8) + J.mT @ J / 0.5**2 + J2.mT @ J2 / 0.3**2
    data = [(a, b, x2, y2) for a, b in zip(x.split(batch), y.split(batch), strict=True)]
    guide.laplace_approximation(data, map_tolerance=float("inf"))
    assert_close(guide.precision, expected, rtol=1e-8, atol=1e-8)
    constant = 8 * 0.5 * torch.log(torch.tensor(2 * torch.pi))
    normal = (
        dist.Normal(0.0, 0.5).log_prob(torch.tensor(0.0)) * 40
        + dist.Normal(0.0, 0.3).log_prob(torch.tensor(0.0)) * 7
    )
    assert_close(guide.log_joint, -joint(u, x, y, x2, y2) - constant + normal, rtol=1e-9)


def test_a_table_without_a_subsampled_plate_counts_once():
    """The plate of the data is told by its size, which follows the batches."""

    def model(x, y, x2, y2):
        w = pyro.sample("w", dist.Normal(torch.zeros(8), 1.0).to_event(1))
        with pyro.plate("table", len(x2)):
            pyro.sample("other", dist.Normal(network(w, x2), 0.3), obs=y2)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(network(w, x), 0.5), obs=y)

    x, y, x2, y2 = tables()
    precisions = []
    for batch in (40, 13):
        data = [(a, b, x2, y2) for a, b in zip(x.split(batch), y.split(batch), strict=True)]
        guide = AutoLaplace(model).initialize(x, y, x2, y2)
        guide.loc.data.copy_(torch.linspace(-1, 1, 8))
        precisions.append(guide.laplace_approximation(data, map_tolerance=float("inf")).precision)
    assert_close(precisions[1], precisions[0], rtol=1e-10)


@pytest.mark.parametrize("rows", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_a_factor_counts_once(rows):
    x, y, x2, y2 = tables(rows)

    def model(x, y, x2, y2):
        w = pyro.sample("w", dist.Normal(torch.zeros(8), 1.0).to_event(1))
        pyro.factor("target", -2.0 * (w[:6].sum() - 1.0) ** 2)
        with pyro.plate("table", len(x2)):
            pyro.sample("other", dist.Normal(network(w, x2), 0.3), obs=y2)
        with pyro.plate("data", rows, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal(network(w, x), 0.5), obs=y)

    data = [(a, b, x2, y2) for a, b in zip(x.split(15), y.split(15), strict=True)]
    guide = AutoLaplace(model, curvature="hessian").initialize(x[:5], y[:5], x2, y2).polish(data)
    u = guide.loc.detach().clone()
    guide.laplace_approximation(data)
    expected = torch.autograd.functional.hessian(lambda w: joint(w, x, y, x2, y2, factor=True), u)
    assert_close(guide.precision, expected, rtol=1e-7, atol=1e-7)


def test_one_large_batch_with_a_table_is_cut_and_the_table_counts_once():
    torch.manual_seed(0)
    x, y = torch.randn(300, 3), torch.randn(300)
    _, _, x2, y2 = tables()

    def model(x, y, x2, y2):
        w = pyro.sample("w", dist.Normal(torch.zeros(8), 1.0).to_event(1))
        with pyro.plate("table", len(x2)):
            pyro.sample("other", dist.Normal(network(w, x2), 0.3), obs=y2)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(network(w, x), 0.5), obs=y)

    guide = AutoLaplace(model, budget=1000).initialize(x, y, x2, y2)
    guide.loc.data.copy_(torch.randn(8))
    guide.laplace_approximation((x, y, x2, y2), map_tolerance=float("inf"))
    u = guide.loc.detach()
    J, J2 = (torch.autograd.functional.jacobian(lambda w, x=x: network(w, x), u) for x in (x, x2))
    assert_close(guide.precision, torch.eye(8) + J.mT @ J / 0.25 + J2.mT @ J2 / 0.09, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", ["time first", "nested"])
def test_rows_are_cut_where_they_are(shape):
    torch.manual_seed(0)
    x, y = torch.randn(90, 3), torch.randn(90)

    def model(data, y=None):
        x = data["x"][0].T if shape == "nested" else data.mean(0)
        w = pyro.sample("w", dist.Normal(torch.zeros(8), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(network(w, x), 0.5), obs=y)

    data = {"x": [x.T, "label"]} if shape == "nested" else torch.stack([x - 1, x, x + 1])
    guide = AutoLaplace(model, budget=1000).initialize(data, y)
    guide.loc.data.copy_(torch.randn(8))
    guide.laplace_approximation((data, y), map_tolerance=float("inf"))
    J = torch.autograd.functional.jacobian(lambda w: network(w, x), guide.loc.detach())
    assert_close(guide.precision, torch.eye(8) + J.mT @ J / 0.25, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_padding_leaves_the_kronecker_factors(sharing):
    """Gradients in padded places are large here, and no gradient of the table."""
    torch.manual_seed(0)
    tokens = torch.randint(1, 5, (12, 6))
    tokens[:, 3:] = 0
    tokens[0, 1:] = 0
    scale = torch.where(tokens == 0, 100.0, 1.0).unsqueeze(-1)
    y = torch.randn(12, 3)

    def outputs(w, tokens=tokens, scale=scale, leaf=None):
        e = F.embedding(tokens, w, padding_idx=0) if leaf is None else leaf
        return torch.tanh(e * scale).sum(1)

    def model(tokens, scale, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(5, 3), 1.0).to_event(2))
        f = outputs(w, tokens, scale)
        with pyro.plate("data", len(tokens)):
            pyro.sample("obs", dist.Normal(f, 1.0).to_event(1), obs=y)

    guide = AutoLaplace(model, structure="kronecker", sharing=sharing).initialize(tokens, scale, y)
    w = 0.01 * torch.randn(5, 3)
    guide.loc.data.copy_(w.reshape(-1))
    # the row of the padding moves the outputs here, and has no gradient
    with pytest.warns(CurvatureWarning, match="padding_idx"):
        guide.laplace_approximation((tokens, scale, y), map_tolerance=float("inf"))
    leaf = F.embedding(tokens, w).requires_grad_()
    g = torch.stack([torch.autograd.grad(outputs(w, leaf=leaf)[:, k].sum(), leaf)[0] for k in range(3)])
    there = tokens != 0
    x = F.one_hot(tokens, 5).to(g) * there.unsqueeze(-1)
    if sharing == "expand":
        G = sum(gk[there].mT @ gk[there] for gk in g)
        A = x[there].mT @ x[there] / there.sum()
    else:
        rows = (g * there.unsqueeze(-1)).sum(2)
        G = sum(gk.mT @ gk for gk in rows)
        mean = x.sum(1) / there.sum(1, keepdim=True)
        A = mean.mT @ mean / 12
    # the table is used as the transpose of a weight: positions run over (3, 5)
    order = torch.arange(15).reshape(5, 3).mT.reshape(-1)
    expected = torch.zeros(15, 15)
    expected[order.unsqueeze(-1), order] = torch.kron(G, A)
    found = guide.posterior.multiply(torch.eye(15)) - torch.eye(15)
    assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_blank_patches_leave_the_kronecker_factors():
    torch.manual_seed(0)
    x = torch.randn(6, 1, 6, 6)
    x[:, :, :3] = 0.0
    conv = nn.Conv2d(1, 2, 3)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 1, 3, 3), 1.0).to_event(4))
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        f = torch.tanh(F.conv2d(x, w, b)).flatten(1).sum(1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, 1.0), obs=y)

    guide = AutoLaplace(model, structure="kronecker").initialize(x, torch.zeros(6))
    w = conv.weight.detach()
    guide.loc.data.copy_(torch.cat([w.reshape(-1), torch.tensor([0.3, -0.2])]))
    guide.laplace_approximation((x, torch.zeros(6)), map_tolerance=float("inf"))
    patches = F.unfold(x, 3).mT  # (6, 16, 9)
    g = 1 - torch.tanh(F.conv2d(x, w, torch.tensor([0.3, -0.2]))).flatten(2).mT ** 2
    there = (patches != 0).any(-1)
    assert 0 < there.sum() < there.numel()
    A = patches[there].mT @ patches[there] / there.sum()
    expected = torch.block_diag(torch.kron(g[there].mT @ g[there], A), g.sum(1).mT @ g.sum(1)) + torch.eye(20)
    assert_close(guide.posterior.multiply(torch.eye(20)), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences(kind):
    torch.manual_seed(0)
    net = kind(2, 3, batch_first=True)
    shapes = {name: p.shape for name, p in net.named_parameters()}
    x, lengths, y = torch.randn(7, 5, 2), torch.tensor([5, 4, 4, 3, 2, 1, 1]), torch.randn(7, 3)

    def last(w, x, lengths):
        states = functional_call(net, w, (pack_padded_sequence(x, lengths, batch_first=True),))[1]
        return (states[0] if isinstance(states, tuple) else states)[0]

    def model(x, lengths, y=None):
        w = {k: pyro.sample(k, dist.Normal(torch.zeros(s), 1.0).to_event(len(s))) for k, s in shapes.items()}
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(last(w, x, lengths), 0.5).to_event(1), obs=y)

    guide = AutoLaplace(model).initialize(x, lengths, y)
    guide.laplace_approximation((x, lengths, y), map_tolerance=float("inf"))
    u = guide.loc.detach().clone()
    J = torch.autograd.functional.jacobian(
        lambda u: last(guide.packed.space.unpack(u), x, lengths), u
    ).reshape(-1, len(u))
    assert_close(guide.precision, torch.eye(len(u)) + J.mT @ J / 0.25, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "structure", ["full", "kronecker", "diagonal", "block", "function_space", "low_rank"]
)
def test_a_float32_network_under_a_double_likelihood(structure):
    torch.manual_seed(0)
    x, y = torch.randn(20, 3).float(), torch.randn(20)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(8).float(), torch.ones(8).float()).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(network(w, x).double(), 0.5), obs=y)

    guide = AutoLaplace(model, structure=structure).initialize(x, y)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    u = guide.loc.detach().double()
    J = torch.autograd.functional.jacobian(lambda w: network(w, x.double()), u)
    if structure in ("full", "block", "function_space", "low_rank"):
        expected = torch.eye(8) + J.mT @ J / 0.25
        assert_close(guide.posterior.multiply(torch.eye(8).float()), expected, rtol=1e-4, atol=1e-4)
        cov = (J @ torch.linalg.inv(expected) * J).sum(-1)
        assert_close(guide.linearized_outputs(x)["obs"].covariance[:, 0, 0], cov, rtol=1e-3)


def test_a_latent_that_lends_its_type():
    """torch's Binomial casts its number of trials to the type of the logits."""
    torch.manual_seed(0)
    n = torch.full((6,), 5.0)
    y = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])

    def model(n, y=None):
        with pyro.plate("data", len(n)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Binomial(n, logits=z), obs=y)

    guide = AutoLaplace(model).initialize(n, y)
    guide.laplace_approximation((n, y), map_tolerance=float("inf"))
    p = torch.sigmoid(guide.loc.detach())
    assert_close(guide.precision, torch.diag(1 + 5 * p * (1 - p)), rtol=1e-9, atol=1e-12)


def test_soft_labels_where_the_model_allows_them():
    torch.manual_seed(0)
    x, y = torch.randn(10, 2), torch.softmax(torch.randn(10, 3), -1)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.OneHotCategorical(logits=x @ w, validate_args=False), obs=y)

    guide = AutoLaplace(model).initialize(x, y)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    u = guide.loc.detach()
    expected = torch.autograd.functional.hessian(
        lambda u: torch.logsumexp(x @ u.reshape(2, 3), -1).sum() + 0.5 * (u**2).sum(), u
    )
    assert_close(guide.precision, expected, rtol=1e-9, atol=1e-10)
    p = torch.softmax(x @ u.reshape(2, 3), -1)
    hard = F.one_hot(y.argmax(-1), 3)  # the density of torch's distribution at such values
    assert_close(guide.map_report.gradient_norm, ((x.mT @ (p - hard)).reshape(-1) + u).norm(), rtol=1e-9)


def test_eigenvalues_of_a_factor_that_float32_does_not_decompose(monkeypatch):
    def eigh(matrix, original=torch.linalg.eigh):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    values, vectors = eigh_factor(torch.diag(torch.tensor([3.0, 0.0, 2.0])).float())
    assert values.dtype == torch.float32
    assert_close((vectors * values) @ vectors.mT, torch.diag(torch.tensor([3.0, 0.0, 2.0])), atol=1e-6)


@pytest.mark.parametrize("structure", ["kronecker", "block", "full", "diagonal"])
def test_a_weight_that_is_used_transposed_keeps_its_order(structure):
    """Of one output the Kronecker structure is exact."""
    torch.manual_seed(0)
    x, y = torch.randn(9, 4), torch.randn(9)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(4, 1), torch.arange(1.0, 5.0).unsqueeze(-1)).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((x @ w).squeeze(-1), 0.5), obs=y)

    guide = AutoLaplace(model, structure=structure).initialize(x, y)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    expected = torch.diag(torch.arange(1.0, 5.0) ** -2) + x.mT @ x / 0.25
    if structure == "diagonal":
        expected = torch.diag(expected.diagonal())
    assert_close(guide.posterior.multiply(torch.eye(4)), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("structure", ["full", "diagonal", "kronecker", "block"])
def test_a_sum_of_two_layers_counts_each_offset_once(structure):
    torch.manual_seed(0)
    x, y = torch.randn(9, 3), torch.randint(4, (9,))
    shapes = {"a": (4, 3), "b": (4,), "c": (4, 3), "d": (4,)}

    def logits(w, x):
        return F.linear(x, w["a"], w["b"]) + F.linear(x.square(), w["c"], w["d"])

    def model(x, y=None):
        w = {k: pyro.sample(k, dist.Normal(torch.zeros(s), 1.0).to_event(len(s))) for k, s in shapes.items()}
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits(w, x)), obs=y)

    guide = AutoLaplace(model, structure=structure).initialize(x, y)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    u = guide.loc.detach().clone()
    J = torch.autograd.functional.jacobian(lambda u: logits(guide.packed.space.unpack(u), x), u)
    p = torch.softmax(logits(guide.packed.space.unpack(u), x), -1)
    root = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    dense = torch.einsum("nip,nij,njq->pq", J, root, J)
    found = guide.posterior.multiply(torch.eye(len(u))) - torch.eye(len(u))
    if structure == "full":
        assert_close(found, dense, rtol=1e-9, atol=1e-10)
    elif structure == "diagonal":
        assert_close(found.diagonal(), dense.diagonal(), rtol=1e-9, atol=1e-10)
    else:  # the offsets' blocks are exact in both
        for name in ("b", "d"):
            s = guide.packed.space.slices[name]
            assert_close(found[s, s], dense[s, s], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("event", [0, 1])
def test_the_empirical_fisher_is_over_observations(coupled, event):
    """One score per observation, also where a network couples them, and where a row of the data holds several."""
    torch.manual_seed(0)
    x, y = torch.randn(11, 3), torch.randn(11, 2)

    def mean(w, x):
        h = torch.tanh(x @ w[:15].reshape(3, 5))
        h = h - h.mean(0) if coupled else h
        return h @ w[15:].reshape(5, 2)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(25), 1.0).to_event(1))
        f = mean(w, x)
        if event:
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(f, 0.5).to_event(1), obs=y)
        else:
            with pyro.plate("task", 2, dim=-1), pyro.plate("data", len(x), dim=-2):
                pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    guide = AutoLaplace(model, curvature="empirical_fisher").initialize(x, y)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))

    def densities(w):
        terms = dist.Normal(mean(w, x), 0.5).log_prob(y)
        return terms.sum(-1) if event else terms.reshape(-1)

    J = torch.autograd.functional.jacobian(densities, guide.loc.detach())
    assert_close(guide.precision, torch.eye(25) + J.mT @ J, rtol=1e-9, atol=1e-10)


def test_the_empirical_fisher_without_masked_observations_whose_score_is_nan():
    torch.manual_seed(0)
    x, y, kept = torch.randn(9, 2), torch.rand(9) + 0.1, torch.arange(9) % 3 > 0

    def likelihood(x, w):
        return dist.Gamma(torch.exp(x @ w), 1.5)

    def model(x, kept, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", likelihood(x, w).mask(kept), obs=y)

    guide = AutoLaplace(model, curvature="empirical_fisher")
    guide.initialize(x, kept, y).laplace_approximation(
        (x, kept, torch.where(kept, y, -1.0)), map_tolerance=float("inf")
    )
    J = torch.autograd.functional.jacobian(
        lambda w: likelihood(x[kept], w).log_prob(y[kept]), guide.loc.detach()
    )
    assert_close(guide.precision, torch.eye(2) + J.mT @ J, rtol=1e-9, atol=1e-10)


def test_an_offset_that_is_the_first_site():
    torch.manual_seed(0)
    x, y = torch.randn(7, 3), torch.randn(7, 2)

    def model(x, y=None):
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(F.linear(x, w, b), 0.5).to_event(1), obs=y)

    guide = AutoLaplace(model, structure="kronecker").initialize(x, y)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    v = torch.eye(8)[:2]
    assert_close(guide.posterior.multiply(v)[:, :2], torch.eye(2) * (1 + 7 / 0.5**2), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layer", ["attention", "group_norm"])
def test_layers_whose_second_derivative_torch_lacks_in_its_fast_form(layer):
    torch.manual_seed(0)
    x, y = torch.randn(5, 4, 6), torch.randn(5)

    def mean(w, x):
        h = x @ w[:36].reshape(6, 6)
        if layer == "attention":
            return F.scaled_dot_product_attention(h, x, h).mean((1, 2))
        return F.group_norm(h.mT, 2).mT.square().mean(1) @ w[:6]

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(36), 0.1).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean(w, x), 3.0), obs=y)

    guide = AutoLaplace(model, curvature="hessian").initialize(x, y)
    guide.laplace_approximation((x, y), map_tolerance=float("inf"))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        u = guide.loc.detach().clone().requires_grad_()
        loss = ((mean(u, x) - y) ** 2).sum() / 18 + (u**2).sum() / 0.02
        (g,) = torch.autograd.grad(loss, u, create_graph=True)
        H = torch.stack([torch.autograd.grad(gi, u, retain_graph=True)[0] for gi in g])
    assert_close(guide.precision, H, rtol=1e-8, atol=1e-8)
