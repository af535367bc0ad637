# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Log densities against formulas in plain torch and runs of Pyro's handlers."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_bnn.infer import LogDensity, log_density, nuts
from pyro_bnn.infer.sample.evaluation import ChangedModelError
from pyro_bnn.infer.sample.nuts import RecordingNUTS
from pyro_bnn.nn import bayesian_
from tests.common import assert_close

Plain = Callable[[Tensor], Tensor]


def handlers(model: Callable[..., Any], density: LogDensity, *args: Any) -> Plain:
    """The density by Pyro's handlers: the sum of a conditioned trace and the Jacobians of the maps to the support."""

    def log_prob(u: Tensor) -> Tensor:
        with poutine.block():
            prototype = poutine.trace(model).get_trace(*args)
        values, total = {}, torch.zeros(())
        for name, part in density.space.slices.items():
            transform = td.biject_to(prototype.nodes[name]["fn"].support)
            shape = transform.inv(prototype.nodes[name]["value"]).shape
            raw = u[part].reshape(shape)
            values[name] = transform(raw)
            total = total + transform.log_abs_det_jacobian(raw, values[name]).sum()
        return total + poutine.trace(poutine.condition(model, values)).get_trace(*args).log_prob_sum()

    return log_prob


def check(density: LogDensity, plain: Plain, chains: int = 5, rtol: float = 1e-10) -> None:
    """Value and gradient of one vector and of several at once."""
    rows = torch.randn(chains, density.size, dtype=density.dtype)
    values, gradients = density.value_and_gradient(rows)
    for row, value, gradient in zip(rows, values, gradients, strict=True):
        leaf = row.clone().requires_grad_()
        expected = plain(leaf)
        (slope,) = torch.autograd.grad(expected, leaf)
        size = float(slope.abs().max())
        for found in ((value, gradient), density.value_and_gradient(row)):
            assert_close(found[0], expected.detach(), rtol=rtol, atol=rtol)
            assert_close(found[1], slope, rtol=rtol, atol=rtol * size)
        assert_close(density(row), expected.detach(), rtol=rtol, atol=rtol)


def regression(net: nn.Module | None = None) -> tuple[Callable[..., Any], Tensor, Tensor]:
    """A network of 3-4-1 with a latent noise; the model counts its runs."""
    net = bayesian_(
        net or nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), prior=dist.Normal(0.0, 1.0)
    )

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        model.runs += 1  # type: ignore[attr-defined]
        noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
        f = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, noise), obs=y)

    model.runs = 0  # type: ignore[attr-defined]
    x = torch.randn(20, 3)
    return model, x, x.sum(-1).sin()


def by_hand(x: Tensor, y: Tensor) -> Plain:
    """The density of :func:`regression` in plain torch; noise = exp(u), with the log Jacobian u."""

    def log_prob(u: Tensor) -> Tensor:
        log_noise, w1, b1, w2, b2 = u.split([1, 12, 4, 4, 1])
        f = ((x @ w1.reshape(4, 3).T + b1).tanh() @ w2 + b2) / log_noise.exp()
        likelihood = -0.5 * (y / log_noise.exp() - f).square().sum() - len(y) * (
            log_noise + 0.5 * math.log(2 * math.pi)
        )
        weights = -0.5 * u[1:].square().sum() - 10.5 * math.log(2 * math.pi)
        scale = -0.5 * (log_noise / 0.5).square() - math.log(0.5 * math.sqrt(2 * math.pi))
        return (likelihood + weights + scale).squeeze()

    return log_prob


def test_a_network_by_hand() -> None:
    model, x, y = regression()
    density = log_density(model, (x, y))
    check(density, by_hand(x, y))
    assert not density.reason


def test_the_model_hardly_ever_runs() -> None:
    model, x, y = regression()
    density = log_density(model, (x, y))
    rows = torch.randn(6, density.size)
    density.value_and_gradient(rows)
    before, made = model.runs, density.gradients  # type: ignore[attr-defined]
    for _ in range(200):
        density.value_and_gradient(rows)
    assert model.runs - before <= 8  # type: ignore[attr-defined]
    assert density.gradients - made == 1200


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=dtype), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)

    x = torch.randn(50, 3, dtype=dtype)
    density = log_density(model, (x, x.sum(-1)))
    assert density.dtype == dtype
    for given in (torch.float32, torch.float64):
        value, gradient = density.value_and_gradient(torch.ones(2, 3, dtype=given))
        assert value.dtype == gradient.dtype == given
    check(density, handlers(model, density, x, x.sum(-1)), rtol=1e-5 if dtype == torch.float32 else 1e-10)


def test_constraints_masks_scales_factors_and_a_literal_in_place() -> None:
    def model(x: Tensor, seen: Tensor, y: Tensor) -> None:
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
        order = pyro.sample("order", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        corr = pyro.sample("corr", dist.LKJCholesky(2, 1.5))
        rate = pyro.sample("rate", dist.Beta(2.0, 3.0).mask(torch.tensor(True)))
        total = torch.tensor(0.0)
        for value in order:
            total += value.sin()
        pyro.factor("penalty", total)
        with poutine.scale(scale=0.3), pyro.plate("groups", 2):
            effect = pyro.sample("effect", dist.StudentT(4.0, order, 1.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=seen):
            mean = x @ shares + (corr @ effect).sum() * rate
            pyro.sample("obs", dist.Laplace(mean, 0.5), obs=y)

    args = torch.randn(12, 3), torch.arange(12) % 3 > 0, torch.randn(12)
    density = log_density(model, args)
    check(density, handlers(model, density, *args))


def test_inference_mode() -> None:
    y = torch.tensor([0.3, 1.0])
    for model in (conditional, counting):
        with torch.inference_mode():
            density, rows = log_density(model, y), torch.ones(2, 1)
            found = density.value_and_gradient(rows)[0]
        assert_close(found, torch.stack([handlers(model, density, y)(row.clone()) for row in rows]))


def test_autograd_goes_through_once() -> None:
    model, x, y = regression()
    density = log_density(model, (x, y))
    rows = torch.randn(3, density.size, requires_grad=True)
    weights = torch.tensor([1.0, -2.0, 0.5])
    (slope,) = torch.autograd.grad(density(rows) @ weights, rows)
    assert_close(slope, weights[:, None] * density.value_and_gradient(rows)[1])
    with pytest.raises(ValueError, match=r"\(22,\) or \(C, 22\)"):
        density(torch.zeros(4))


# ---------------------------------------------------------------- what changes


def test_parameters_may_change_between_calls() -> None:
    frozen = nn.Linear(2, 2)
    prior_scale = torch.tensor(1.0)

    def model(x: Tensor, y: Tensor) -> None:
        noise = pyro.param("noise", torch.tensor(0.5), constraint=dist.constraints.positive)
        w = pyro.sample("w", dist.Normal(torch.zeros(2), prior_scale).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(frozen(x).tanh() @ w, noise), obs=y)

    x, y = torch.randn(8, 2), torch.randn(8)
    density = log_density(model, (x, y))
    plain = handlers(model, density, x, y)
    check(density, plain)
    with torch.no_grad():
        pyro.get_param_store()["noise"].unconstrained().add_(0.3)
        frozen.weight.data.mul_(1.7)
        prior_scale.fill_(2.0)
    check(density, plain)
    frozen.load_state_dict({k: v + 0.1 for k, v in frozen.state_dict().items()})
    check(density, plain)
    frozen.weight = nn.Parameter(torch.eye(2))
    pyro.get_param_store()["noise"] = torch.tensor(0.9)
    check(density, plain)
    assert not density.reason


def test_numbers_that_change_are_found_out() -> None:
    state = {"noise": 0.5}

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(z, state["noise"]), obs=y)

    density = log_density(model, torch.ones(4))

    def ask(times: int) -> None:
        for _ in range(times):
            density(torch.ones(1))

    ask(5)
    state["noise"] = 1.0
    with pytest.raises(ChangedModelError, match="replaced by another"):
        ask(20)


def test_a_decision_far_out_that_torch_does_not_show() -> None:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        width = 1.0 if abs(z.detach().numpy()) < 8 else 2.0
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(z, width), obs=y)

    density = log_density(model, torch.ones(4))
    near, far = torch.ones(1), torch.full((1,), 9.0)
    for _ in range(3):
        density(near)
    with pytest.raises(ChangedModelError, match="numpy"):
        density(far)
    first = log_density(model, torch.ones(4))
    assert_close(first(far), handlers(model, first, torch.ones(4))(far))
    assert "does not show" in first.reason


def test_networks_are_in_evaluation_mode_and_keep_their_statistics() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).train()
    with torch.no_grad():
        net(5 * torch.randn(50, 3))
    model, x, y = regression(net)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    density = log_density(model, (x, y))
    net.eval()
    plain = handlers(model, density, x, y)
    net.train()
    rows = torch.randn(2, density.size)
    values = density(rows)
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net.eval()
    assert_close(values, torch.stack([plain(row) for row in rows]), rtol=1e-10)


# ---------------------------------------------------------------- where no recording can be trusted


def conditional(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    slope = 2.0 if z > 0.5 else -1.0
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(slope * z, 1.0), obs=y)


COUNTER = torch.zeros(())


def counting(y: Tensor) -> None:
    COUNTER.add_(1)
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(z**2, 1.0), obs=y)


def through_numpy(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    width = float(z.detach().numpy() ** 2)
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(z, 1.0 + width), obs=y)


@pytest.mark.parametrize(
    ("model", "why"),
    [(conditional, "depends on the variables"), (counting, "not its own"), (through_numpy, "other latents")],
)
def test_models_that_run_in_every_evaluation(model: Callable[..., Any], why: str) -> None:
    y = torch.tensor([0.3, 1.0])
    density = log_density(model, y)
    check(density, handlers(model, density, y))
    assert why in density.reason
    assert why in repr(density)


def test_a_model_that_differentiates_has_a_recording_per_chain() -> None:
    def model(t: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        t = t.clone().requires_grad_()
        (slope,) = torch.autograd.grad((w[0] * (w[1] * t).sin()).sum(), t, create_graph=True)
        with pyro.plate("data", len(t)):
            pyro.sample("obs", dist.Normal(slope, 0.5), obs=y)

    args = torch.linspace(-1, 1, 5), torch.randn(5)
    density = log_density(model, args)
    check(density, handlers(model, density, *args))
    assert "every chain" in density.reason


def test_values_that_are_not_finite_stay_in_their_row() -> None:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 0.1).to_event(1))
        covariance = torch.eye(2) + z[0] * (1 - torch.eye(2))  # not positive definite beyond one
        top = pyro.deterministic("top", 3 + z[1])
        pyro.sample("obs", dist.MultivariateNormal(torch.zeros(2), covariance), obs=y)
        pyro.sample("within", dist.Uniform(0.0, top), obs=torch.tensor(2.5))

    y = torch.tensor([0.5, -0.3])
    density = log_density(model, y)
    rows = torch.tensor([[0.1, 0.0], [1.5, 0.0], [-0.4, 1.0], [0.2, -1.0], [torch.inf, 0.0]])
    value, gradient = density.value_and_gradient(rows)
    assert value.isfinite().tolist() == [True, False, True, False, False]
    assert value[1].isnan()
    assert value[3] == -torch.inf
    plain = handlers(model, density, y)
    assert_close(value[[0, 2]], torch.stack([plain(rows[i]) for i in (0, 2)]), rtol=1e-10)
    assert gradient[[0, 2]].isfinite().all()
    assert density.value_and_gradient(rows[1])[0].isnan()


# ---------------------------------------------------------------- data


def sized(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("penalty", -w.square().square().sum())
    with pyro.plate("data", 10, subsample_size=len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)


def test_batches_are_added_and_the_prior_counts_once() -> None:
    x, y = torch.randn(10, 2), torch.randn(10)
    whole = log_density(sized, (x, y))
    parts = log_density(sized, DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True))
    rows = torch.randn(3, 2)
    for found, expected in zip(parts.value_and_gradient(rows), whole.value_and_gradient(rows), strict=True):
        assert_close(found, expected, rtol=1e-10)
    check(whole, handlers(sized, whole, x, y))
    assert whole.repeated == parts.repeated == {"penalty"}
    for incomplete in ((x[:6], y[:6]), [(x[:6], y[:6]), (x[6:8], y[6:8])]):
        with pytest.raises(ValueError, match="of the 10 elements of plate 'data'"):
            log_density(sized, incomplete)


def test_minibatches() -> None:
    x, y = torch.randn(10, 2), torch.randn(10)
    density = log_density(sized, (x, y))

    def plain(w: Tensor, at: slice, factor: float) -> Tensor:
        normal = td.Normal(x[at] @ w, 0.5).log_prob(y[at]).sum()
        return td.Normal(0.0, 1.0).log_prob(w).sum() - w.pow(4).sum() + factor * normal

    rows = torch.randn(3, 2)
    for start in (0, 5, 3, 1):
        at = slice(start, start + 5)
        value, gradient = density.batch_value_and_gradient(rows, (x[at], y[at]), 0.5 + start)
        for row, v, g in zip(rows, value, gradient, strict=True):
            leaf = row.clone().requires_grad_()
            expected = plain(leaf, at, 0.5 + start)
            assert_close(v, expected.detach(), rtol=1e-10)
            assert_close(g, torch.autograd.grad(expected, leaf)[0], rtol=1e-10, atol=1e-9)
    assert not density.reason


@pytest.mark.parametrize("hidden", [False, True])
def test_minibatches_whose_values_decide(hidden: bool) -> None:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        top = float(y.numpy().max()) if hidden else float(y.max())
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(z * top, 1.0), obs=y)

    y = torch.tensor([1.0, 2.0, 3.0, 4.0])
    density = log_density(model, y)
    check(density, handlers(model, density, y))
    assert not density.reason  # of these data
    u = torch.tensor([0.5])
    for part in (y[:2], y[2:], y[1:3]):
        value, _ = density.batch_value_and_gradient(u, (part,), 1.0)
        assert_close(value, handlers(model, density, part)(u), rtol=1e-10)
    assert ("a way that torch does not show" if hidden else "the data") in density.reason


def test_latents_of_rows_are_exact_in_one_batch() -> None:
    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=y)

    y = torch.randn(6)
    density = log_density(model, y)
    assert density.size == 7
    check(density, handlers(model, density, y))
    with pytest.raises(ValueError, match="'z' has a value per row"):
        log_density(model, [(y[:3],), (y[3:],)])


# ---------------------------------------------------------------- refusals


def test_refusals_name_the_site() -> None:
    def discrete(y: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("obs", dist.Normal(k, 1.0), obs=y)

    def nested(y: Tensor) -> None:
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        z = pyro.sample("z", dist.Uniform(torch.zeros(()), top))
        pyro.sample("obs", dist.Normal(z, 1.0), obs=y)

    def noisy(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(z + torch.randn(()), 1.0), obs=y)

    y = torch.tensor(0.5)
    for model, why in ((discrete, r"\['k'\] are discrete"), (nested, "support of the latent site 'z'"),
                       (noisy, "not a function of its latents")):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            log_density(model, y)
    with pytest.raises(ValueError, match="no observed site"):
        log_density(regression()[0], torch.randn(4, 3))


def test_the_vector_of_a_guide() -> None:
    model, x, y = regression()
    guide = AutoMultivariateNormal(model)
    guide(x, y)
    density = log_density(model, (x, y), guide=guide)
    draws = guide.get_posterior().sample((3,))
    assert_close(density(draws), torch.stack([by_hand(x, y)(row) for row in draws]), rtol=1e-10)

    def other(x: Tensor, y: Tensor) -> None:
        pyro.sample("more", dist.Normal(0.0, 1.0))
        model(x, y)

    with pytest.raises(ValueError, match="packed vector of the guide"):
        log_density(other, (x, y), guide=guide)


def test_integers_and_no_chains() -> None:
    model, x, y = regression()
    density = log_density(model, (x, y))
    u = torch.arange(density.size)
    value, gradient = density.value_and_gradient(u)
    assert value.dtype == gradient.dtype == density.dtype
    assert_close(value, by_hand(x, y)(u.to(density.dtype)), rtol=1e-10)
    assert density.numpy()(u.numpy())[0] == value
    none, rows = density.value_and_gradient(torch.zeros(0, density.size))
    assert none.shape == (0,)
    assert rows.shape == (0, density.size)


# ---------------------------------------------------------------- NUTS


def test_nuts_has_pyros_potential() -> None:
    model, x, y = regression()
    density = log_density(model, (x, y))
    kernel = RecordingNUTS(model, density=density)
    kernel.setup(0, x, y)
    params, potential, transforms, _ = initialize_model(model, (x, y))
    assert kernel.transforms.keys() == transforms.keys()
    moved = {name: torch.randn_like(value) for name, value in params.items()}
    assert_close(kernel.potential_fn(moved), potential(moved), rtol=1e-10)
    before = model.runs  # type: ignore[attr-defined]
    options = {"num_samples": 10, "warmup_steps": 10, "num_chains": 1, "max_tree_depth": 5}
    run = nuts(model, (x, y), **options, progress_bar=False)
    assert model.runs - before < 60 < run.sample_stats["tree_depth"].exp2().sum()  # type: ignore[attr-defined]


def test_nuts_takes_what_has_no_packed_vector() -> None:
    """An adaptation with the kernel's own arguments, and a density that decides by its latents."""
    for options in ({}, {"max_plate_nesting": 1}):
        run = nuts(conditional, torch.ones(5), num_samples=20, warmup_steps=20, num_chains=1,
                   progress_bar=False, **options)  # fmt: skip
        assert run.samples["z"].shape == (1, 20)
