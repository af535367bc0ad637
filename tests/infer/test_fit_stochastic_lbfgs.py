# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""fit with several iterations per draw of the noise."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_bnn.infer import Checkpoint, LinearAnnealing, Mixture_ELBO, NonFiniteLossError, StochasticLBFGS, fit
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.nn import bayesian_, rank1_
from tests.common import assert_close
from tests.infer.models import linear_data, linear_model, linear_posterior


def pairs(**settings):
    return Mixture_ELBO(num_particles=100, antithetic=True, **settings)


@pytest.mark.parametrize("batches", [1, 4])
def test_mean_field_optimum_in_closed_form(batches):
    """The optimal locations are the posterior means, the scales the roots of the inverse precisions' diagonal."""
    pyro.set_rng_seed(0)
    x, y = linear_data(400)
    mean, covariance = linear_posterior(x, y)

    def model(x, y=None):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 400, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal((x * weight).sum(-1), 0.5), obs=y)

    guide = AutoMixture(model, 1, init_scale=0.3).initialize(x, y)
    data = (x, y) if batches == 1 else list(zip(x.chunk(batches), y.chunk(batches), strict=True))
    elbo = Mixture_ELBO(num_particles=100, antithetic=True)
    fit(model, guide, data, num_steps=8, optim=StochasticLBFGS, elbo=elbo, progress_bar=False)
    scale = covariance.inverse().diagonal().rsqrt()
    spread = scale if batches == 1 else 0.5 / 100**0.5  # a batch has its own optimum
    tolerance = 1e-3 if batches == 1 else 4.0
    assert float(((guide.median()["weight"] - mean) / spread).abs().max()) < tolerance
    # 50 independent squares of the noise stand for their mean; a batch has 7 % of noise of its own
    error = (1 / 100 + (0 if batches == 1 else 0.07**2)) ** 0.5
    assert float((guide.scale.detach()[0] / scale).log().abs().max()) < 4 * error


def test_stock_guides_and_bounds():
    pyro.set_rng_seed(0)
    x, y = linear_data(60)
    guide = AutoNormal(linear_model)
    elbo = Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1)
    fit(linear_model, guide, (x, y), num_steps=10, optim=StochasticLBFGS, elbo=elbo, progress_bar=False)
    mean, covariance = linear_posterior(x, y)
    error = (guide.median()["weight"] - mean) / covariance.diagonal().sqrt()
    assert float(error.abs().max()) < 5 / 200**0.5


def test_one_draw_per_step():
    """The noise of all evaluations of a step is the same, that of different steps is not, and schedules wait for steps."""
    pyro.set_rng_seed(0)
    x, y = linear_data(10)
    draws, scales, step = {}, {}, [0]

    def model(x, y=None):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        if guide.prototype_trace is not None and torch.is_grad_enabled():
            noise = ((weight - guide.loc) / guide.scale).detach().reshape(-1, 3)[0]
            draws.setdefault(step[0], []).append(noise)
            scales.setdefault(step[0], []).append(elbo.current_kl_scale())
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((x * weight).sum(-1), 1.0), obs=y)

    def count(state):
        step[0] = state.step
        parts = elbo.parts
        whole = parts["kl_scale"] * parts["kl"] - parts["expected_log_likelihood"] - parts["log_prior"]
        assert abs(whole - state.loss) < 1e-9 * abs(whole)  # those of the loss that is shown
        return False

    guide = AutoMixture(model, 1)
    elbo = pairs(kl_scale=LinearAnnealing(4))
    fit(
        model,
        guide,
        (x, y),
        num_steps=4,
        optim=StochasticLBFGS,
        elbo=elbo,
        callbacks=count,
        progress_bar=False,
    )
    assert len(draws) == 4
    assert all(len(found) >= 3 for found in draws.values())
    for number, found in draws.items():
        for noise in found[-3:]:  # the first step has trial runs, too
            assert_close(noise.reshape(-1), found[-1].reshape(-1), atol=1e-9)
        assert set(scales[number]) == {scales[number][-1]}
    assert len({float(found[-1].sum()) for found in draws.values()}) == 4
    assert elbo.step == 4
    assert len({s[-1] for s in scales.values()}) == 4


def test_statistics_of_batches_count_once_per_step():
    pyro.set_rng_seed(0)
    x = torch.randn(20, 3)
    net = bayesian_(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double(), only="2")

    def model(x, y=None):
        f = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, 0.3), obs=y)

    guide = AutoMixture(model, 1)
    fit(model, guide, (x, x.sum(-1)), num_steps=5, optim=StochasticLBFGS, elbo=pairs(), progress_bar=False)
    assert int(net[1].num_batches_tracked) == 5


def test_resumed_runs_take_the_same_steps(tmp_path):
    x, y = linear_data(40)
    found = []
    for parts in ([12], [5, 12]):
        pyro.set_rng_seed(1)
        guide = AutoMixture(linear_model, 2).initialize(x, y)
        for until in parts:
            path = Checkpoint(tmp_path / f"{len(parts)}.pt", every_steps=1)
            optim = partial(StochasticLBFGS, max_iter=3, history_size=4)
            fit(
                linear_model,
                guide,
                (x, y),
                num_steps=until,
                optim=optim,
                elbo=pairs(),
                checkpoint=path,
                progress_bar=False,
            )
            pyro.set_rng_seed(99)  # what follows must not matter
        found.append(torch.cat([p.detach().reshape(-1) for p in guide.parameters()]))
    assert torch.equal(*found)


def test_clipping_is_refused():
    x, y = linear_data(10)
    with pytest.raises(ValueError, match="clip_grad_norm"):
        fit(
            linear_model,
            AutoMixture(linear_model, 1),
            (x, y),
            num_steps=1,
            optim=StochasticLBFGS,
            clip_grad_norm=1.0,
        )


def test_a_singular_matrix_at_a_trial_is_too_far():
    """Where a factorisation fails the loss is infinite; the run goes on and finds the optimum."""
    pyro.set_rng_seed(0)
    y = torch.randn(300, 2) @ torch.tensor([[1.0, 0.9], [0.0, 0.3]])
    failed = [0]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.correlation = nn.Parameter(torch.tensor(0.0))

        def forward(self, y):
            off = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
            try:
                root = torch.linalg.cholesky(torch.eye(2) + self.correlation * off)
            except torch.linalg.LinAlgError:
                failed[0] += 1
                raise
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            with pyro.plate("data", len(y)):
                pyro.sample("obs", dist.MultivariateNormal(mean, scale_tril=root), obs=y)

    model = Model()
    optim = partial(StochasticLBFGS, lr=1000.0)  # a first trial far out
    fit(
        model,
        AutoMixture(model, 1, "delta"),
        y,
        num_steps=10,
        optim=optim,
        elbo=Mixture_ELBO(),
        progress_bar=False,
    )
    assert failed[0] > 0
    rho = model.correlation.detach()
    off = 1 - torch.eye(2)
    precision = 300 * (torch.eye(2) + rho * off).inverse()
    mean = torch.linalg.solve(torch.eye(2) + precision, precision @ y.mean(0))  # of the joint mode

    def potential(r):
        return -dist.MultivariateNormal(mean, torch.eye(2) + r * off).log_prob(y).sum()

    slope = torch.autograd.functional.jacobian(potential, rho)
    curvature = torch.autograd.functional.hessian(potential, rho)
    assert abs(float(slope / curvature)) < 1e-4  # the distance to the mode


def test_few_draws_are_refused():
    """The optimal scale for one draw is that over its absolute noise; see the loss of three hundred rows for what counts."""
    x, y = linear_data(60)
    few = [(AutoMixture(linear_model, 2), Mixture_ELBO(num_particles=98, antithetic=True), 49),
           (AutoNormal(linear_model), Trace_ELBO(), 1)]  # fmt: skip
    for guide, elbo, number in few:
        with pytest.raises(ValueError, match=f"average over {number} independent draws"):
            fit(linear_model, guide, (x, y), num_steps=1, optim=StochasticLBFGS, elbo=elbo)
    net = rank1_(nn.Linear(3, 1).double())

    def model(x, y=None):
        f = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    elbo = Mixture_ELBO(num_particles=2, antithetic=True)
    guide = AutoMixture(model, 2, noise="per_example")  # sixty rows, one pair
    fit(model, guide, (x, y), num_steps=1, optim=StochasticLBFGS, elbo=elbo, progress_bar=False)


def test_guides_without_reparametrised_draws_are_refused():
    def model(y):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.0))))

    with pytest.raises(ValueError, match="site 'z' of the guide has no reparametrised draws"):
        fit(
            model,
            guide,
            torch.ones(5),
            num_steps=1,
            optim=StochasticLBFGS,
            elbo=Trace_ELBO(num_particles=100),
        )


class Normalizer(nn.Module):
    """Subtracts a running mean that its own batches move."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


@pytest.mark.parametrize("make", [Normalizer, lambda: nn.utils.spectral_norm(nn.Linear(3, 3))])
def test_losses_of_a_step_are_one_function_of_the_parameters(make):
    """Buffers that the loss depends on: every step ends no higher than it began, by an evaluation of the test's own."""
    pyro.set_rng_seed(0)
    x = torch.randn(80, 3) + 5
    part = make().double()
    net = nn.Sequential(part, nn.Linear(3, 1)).double()
    values = {}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, y):
            f = self.net(x).squeeze(-1)
            if torch.is_grad_enabled():
                key = tuple(float(p.detach().sum()) for p in self.net.parameters())
                values.setdefault((step[0], key), set()).add(round(float(f.detach().sum()), 9))
            sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.1))
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(f, sigma), obs=y)

    step = [0]

    def count(state):
        step[0] = state.step
        return False

    model = Model()
    guide = AutoMixture(model, 1, "delta")
    fit(model, guide, (x, x.sum(-1)), num_steps=4, optim=StochasticLBFGS, elbo=Mixture_ELBO(), callbacks=count,
        progress_bar=False)  # fmt: skip
    later = {key: found for key, found in values.items() if key[0] > 0}
    assert len(later) > 10
    assert all(len(found) == 1 for found in later.values())


def test_random_numbers_of_the_models_own_are_refused():
    x, y = linear_data(60)
    own = torch.Generator().manual_seed(0)

    def model(x, y=None):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            shift = 0.1 * torch.randn(len(x), generator=own)
            pyro.sample("obs", dist.Normal((x * weight).sum(-1) + shift, 0.5), obs=y)

    elbo = Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1)
    with pytest.raises(ValueError, match="two evaluations of the loss"):
        fit(
            model,
            AutoNormal(model),
            (x, y),
            num_steps=3,
            optim=StochasticLBFGS,
            elbo=elbo,
            progress_bar=False,
        )


def test_gradients_that_are_not_finite_end_the_run_by_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.v = nn.Parameter(torch.zeros(2))

        def forward(self, y):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(y)):
                pyro.sample("obs", dist.Normal(z, 1 + self.v.square().sum().sqrt()), obs=y)

    model = Model()
    with pytest.raises(NonFiniteLossError, match=r"gradient is not finite, in \['model.v'\]"):
        fit(
            model,
            AutoMixture(model, 1, "delta"),
            torch.ones(5),
            num_steps=3,
            optim=StochasticLBFGS,
            progress_bar=False,
        )
    assert torch.equal(model.v.detach(), torch.zeros(2))


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_an_error_at_a_trial_is_too_far_unless_every_point_has_it(error):
    y = torch.linspace(-1, 1, 30) + 2.0

    class Model(nn.Module):
        def __init__(self, limit):
            super().__init__()
            self.a, self.limit, self.refused = nn.Parameter(torch.tensor(0.0)), limit, 0

        def forward(self, y):
            if self.a.item() not in (0.0,) and abs(self.a.item()) > self.limit:
                self.refused += 1
                raise error("out of range")
            z = pyro.sample("z", dist.Normal(0.0, 1e-3))
            with pyro.plate("data", len(y)):
                pyro.sample("obs", dist.Normal(z + self.a, 1.0), obs=y)

    model = Model(3.0)
    optim = partial(StochasticLBFGS, lr=10.0)
    fit(model, AutoMixture(model, 1, "delta"), y, num_steps=3, optim=optim, progress_bar=False)
    assert model.refused > 0
    assert abs(model.a.item() - 2.0) < 1e-3
    model = Model(-1.0)
    with pytest.raises(error, match="out of range") as found:
        fit(model, AutoMixture(model, 1, "delta"), y, num_steps=3, optim=StochasticLBFGS, progress_bar=False)
    assert any("line search" in note for note in found.value.__notes__)
    assert model.a.item() == 0.0
