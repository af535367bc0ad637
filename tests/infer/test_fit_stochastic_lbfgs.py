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

from pyro_bnn.infer import Checkpoint, LinearAnnealing, Mixture_ELBO, StochasticLBFGS, fit
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.nn import bayesian_
from tests.common import assert_close
from tests.infer.models import linear_data, linear_model, linear_posterior


def pairs(**settings):
    return Mixture_ELBO(num_particles=2, antithetic=True, **settings)


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
            noise = ((weight - guide.loc) / guide.scale).detach()[0]
            draws.setdefault(step[0], []).append(noise)
            scales.setdefault(step[0], []).append(elbo.current_kl_scale())
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((x * weight).sum(-1), 1.0), obs=y)

    def count(state):
        step[0] = state.step
        return False

    guide = AutoMixture(model, 1)
    elbo = Mixture_ELBO(kl_scale=LinearAnnealing(4))
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
