# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Gaussian latents that are integrated out: rounding errors, what is Gaussian in part of the space only, unusual programs."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal
from torch.utils.data import DataLoader, TensorDataset

from pyro_bnn import bayesian_
from pyro_bnn.infer import log_density, mclmc
from pyro_bnn.nn import lora_

N, D = 10, 2


def wide(likelihood=dist.Normal, rows=300, units=30, noise=0.01):
    """A regression on random tanh units with correlated columns, and its data in float32."""
    torch.manual_seed(0)
    x = torch.randn(rows, 2)
    units_of = torch.tanh(x @ torch.randn(2, units) + torch.randn(units))
    y = torch.sin(2 * x[:, 0]) + noise * torch.randn(rows)

    def model(phi, y):
        like = phi.new_zeros
        t = pyro.sample("t", dist.Normal(like(2), 1.0).to_event(1))
        w = pyro.sample("w", dist.Normal(like(units), 1.0).to_event(1))
        with pyro.plate("data", len(phi)):
            pyro.sample("obs", likelihood(phi @ w + 0.1 * t.sum(), noise * (0.1 * t[0]).exp()), obs=y)

    return model, (units_of.float(), y.float())


def test_float32_loses_no_more_than_float32_does():
    """The precision has a condition number of ten million."""
    model, (phi, y) = wide()
    density = log_density(model, (phi, y), collapse="w")
    u = torch.tensor([0.3, -0.2])
    phi, y = phi.double(), y.double()
    covariance = phi @ phi.mT + (0.01 * (0.1 * u[0]).exp()).square() * torch.eye(len(y))
    mean = (0.1 * u.sum()).expand(len(y))
    expected = MultivariateNormal(mean, covariance).log_prob(y) + Normal(0.0, 1.0).log_prob(u).sum()
    torch.testing.assert_close(density(u), expected, rtol=16 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize(
    "likelihood",
    [
        lambda f, s: dist.Normal(3 * torch.tanh(f / 3), s),
        lambda f, s: dist.Normal(f, s * (1 + 0.05 * f.square())),
        lambda f, s: dist.Normal(f + 0.3 * torch.sin(f), s),
    ],
)
def test_rounding_errors_hide_nothing(likelihood):
    model, data = wide(likelihood, noise=0.05)
    with pytest.raises(ValueError, match="are not Gaussian"):
        log_density(model, data, collapse="w")


def line(act=lambda f, s: f, scale=lambda s: s):
    def model(x, y=None):
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(D), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(act(x @ w, s), scale(s)), obs=y)

    return model


def data():
    return torch.randn(N, D), torch.randn(N)


@pytest.mark.parametrize("low", [True, False])
def test_one_sided_kinks_far_away_are_seen(low):
    x, y = data()
    clamp = {"min" if low else "max": -50.0 if low else 50.0}
    model = line(lambda f, s: f.clamp(**clamp))
    with pytest.raises(ValueError, match="are not Gaussian"):
        log_density(model, (x.abs(), y), collapse="w")


def test_a_singular_precision_is_none():
    """Without a prior the precision of three weights is of rank two, and that of float32 has roots by chance."""

    def model(x, y):
        s = pyro.sample("s", dist.Gamma(2.0, 2.0))
        w = pyro.sample("w", dist.ImproperUniform(dist.constraints.real_vector, (), (x.shape[-1],)))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, s), obs=y)

    for seed in range(8):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float64)
        x, y = torch.randn(N, 2) @ torch.randn(2, 3), torch.randn(N)
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            with pytest.raises(ValueError, match="not positive definite, or singular"):
                log_density(model, (x.to(dtype), y.to(dtype)), collapse="w")


def test_chains_without_a_precision_leave_others_alone():
    def model(x, y):
        s = pyro.sample("s", dist.Normal(0.0, 0.5))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.factor("more", -0.5 * s * w.square())
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(s.expand(len(x)), 1.0), obs=y)

    _, y = data()
    density = log_density(model, (y, y), collapse="w")
    u = torch.tensor([[-3.0], [0.5], [-1.5], [2.0]])
    expected = (
        Normal(0.0, 0.5).log_prob(u[:, 0]) + Normal(u, 1.0).log_prob(y).sum(-1) - 0.5 * (1 + u[:, 0]).log()
    )
    for _ in range(3):
        found = density(u)
        torch.testing.assert_close(found[[1, 3]], expected[[1, 3]])
        assert bool(found[[0, 2]].isnan().all())
    drawn, log_prob = density.complete(u)
    assert log_prob.isfinite().tolist() == drawn.isfinite().all(-1).tolist() == [False, True, False, True]
    assert density.reason == ""


def partly():
    """Not Gaussian for s > 50."""
    return line(lambda f, s: torch.where(s > 50.0, f.clamp(-5.0, 5.0), f), lambda s: 1 + torch.exp(-s))


def test_all_chains_are_compared_in_turn():
    density = log_density(partly(), data(), collapse="w")
    u = torch.zeros(8, 1)
    u[5] = 5.0

    def several():
        for _ in range(64):
            density(u)

    with pytest.raises(ValueError, match="are not Gaussian"):
        several()


def test_drawn_vectors_are_compared():
    density = log_density(partly(), data(), collapse="w")
    density.complete(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="are not Gaussian"):
        density.complete(torch.full((3, 1), 5.0))


def test_shapes_and_types_of_what_is_completed():
    batch = data()
    whole, density = (log_density(line(), batch, collapse=names) for names in (None, "w"))
    for shape in ((0,), (4, 0), (2, 3), ()):
        drawn, log_prob = density.complete(torch.zeros(*shape, 1, dtype=torch.float32))
        assert drawn.shape == (*shape, 3)
        assert drawn.dtype == torch.float32
        assert log_prob.shape == shape
    with torch.inference_mode():
        u = torch.zeros(1)
        drawn, log_prob = density.complete(u)
        torch.testing.assert_close(density(u) + log_prob, whole(drawn))
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 1\)"):
        density.complete(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 3\)"):
        density.restrict(torch.zeros(2, 1))


def test_it_says_what_it_is_made_of():
    x, y = data()
    density = log_density(line(), [(x[:4], y[:4]), (x[4:], y[4:])], collapse="w")
    assert "batches    2" in repr(density)
    with pytest.raises(ValueError, match="without collapse"):
        _ = density.repeated


def test_a_plate_that_loads_parts():
    x, y = data()

    def model(x, y=None):
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(D), 1.0).to_event(1))
        with pyro.plate("data", N, subsample_size=len(x)):
            return pyro.sample("obs", dist.Normal(x @ w, s), obs=y)

    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    u = torch.zeros(1)
    expected = log_density(line(), (x, y), collapse="w")(u)
    torch.testing.assert_close(log_density(model, loader, collapse="w")(u), expected)


@pytest.mark.parametrize("kind", ["frozen", "lora"])
def test_networks_with_frozen_parameters(kind):
    x, y = data()
    net = nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, 1))
    net = bayesian_(net.requires_grad_(False), only="2") if kind == "frozen" else lora_(net, rank=1)

    def model(x, y=None):
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        f = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, s), obs=y)

    names = "2" if kind == "frozen" else "2.lora_B.weight"
    whole, density = (log_density(model, (x, y), collapse=c) for c in (None, names))
    u = 0.3 * torch.randn(2, density.size)
    drawn, log_prob = density.complete(u)
    for _ in range(2):
        torch.testing.assert_close(density(u) + log_prob, whole(drawn))
    assert density.reason == whole.reason == ""


def test_programs_that_cannot_be_batched_are_refused():
    def decides(f, s):
        return f if f.sum().item() < 1e9 else 2 * f

    with pytest.raises(ValueError, match=r"at several values of \['w'\] together"):
        log_density(line(decides), data(), collapse="w")


def test_refusals_of_chains():
    options = {"num_samples": 5, "warmup_steps": 5, "collapse": "w", "progress_bar": False}
    with pytest.raises(ValueError, match="leave collapse out, or use nuts"):
        mclmc(line(), None, data(), **options)

    def model(x, y=None):
        pyro.sample("more", dist.Normal(0.0, 1.0))
        return line()(x, y)

    # positions in two dimensions, and the draws of four latents once packed and once by site
    with pytest.raises(MemoryError, match="num_samples"):
        mclmc(model, None, data(), memory_limit=10 * (2 + 2 * 4) * 8 - 1.0, **options)
