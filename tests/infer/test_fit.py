# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import os
import signal
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch.utils.data import DataLoader, TensorDataset

from pyro_bnn.infer.train.loop import fit
from pyro_bnn.infer.train.state import FitState, NonFiniteLossError
from tests.common import assert_close
from tests.infer.models import TextbookNet, linear_data, linear_model, linear_posterior

quiet = partial(fit, progress_bar=False)


def test_posterior_of_linear_regression() -> None:
    x, y = linear_data()
    guide = AutoMultivariateNormal(linear_model)
    quiet(linear_model, guide, (x, y), num_steps=1000, optim=0.03)
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    quiet(linear_model, guide, (x, y), num_steps=300, optim=0.005, elbo=elbo)
    mean, covariance = linear_posterior(x, y)
    posterior = guide.get_posterior()
    assert_close(posterior.mean, mean, atol=0.02, rtol=0)
    assert_close(
        posterior.covariance_matrix, covariance, atol=0.1 * float(covariance.diagonal().max()), rtol=0
    )


def test_same_steps_as_svi() -> None:
    """The loop is plain stochastic optimisation of the bound: SVI takes the same steps."""
    x, y = linear_data()

    def build() -> AutoDelta:
        # the guide's parameter is the very tensor given here
        return AutoDelta(linear_model, init_loc_fn=init_to_value(values={"weight": torch.zeros(3)}))

    reference = build()
    svi = SVI(linear_model, reference, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    expected = [svi.step(x, y) for _ in range(20)]

    guide = build()
    result = quiet(linear_model, guide, (x, y), num_steps=20, optim=pyro.optim.Adam({"lr": 0.01}))
    assert_close(result.losses, expected, rtol=1e-10)
    assert_close(guide.median()["weight"], reference.median()["weight"], rtol=1e-10)


@pytest.mark.parametrize("form", ["tuple", "mapping", "loader", "list", "dict loader", "stream"])
def test_forms_of_data(form: str) -> None:
    x, y = linear_data(40)
    rows = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
    data, epochs, steps = {
        "tuple": ((x, y), 3, 3),
        "mapping": ({"x": x, "y": y}, 3, 3),
        "loader": (DataLoader(TensorDataset(x, y), batch_size=10, shuffle=True), 3, 12),
        "list": ([(x[:20], y[:20]), (x[20:], y[20:])], 3, 6),
        "dict loader": (DataLoader(rows, batch_size=20), 3, 6),
        "stream": (iter([(x[:20], y[:20]), (x[20:], y[20:])]), 1, 2),
    }[form]
    result = quiet(linear_model, AutoNormal(linear_model), data, num_epochs=epochs)
    assert (result.num_steps, result.stop_reason) == (steps, "num_epochs")


def test_second_model_starts_afresh() -> None:
    """Pyro's store would hand the values of the first guide to the second."""
    x, y = linear_data()
    fits = []
    for _ in range(2):
        pyro.set_rng_seed(0)
        guide = AutoNormal(linear_model)
        quiet(linear_model, guide, (x, y), num_steps=50, optim=0.1)
        fits.append(guide.median()["weight"])
    assert_close(fits[0], fits[1], rtol=0)
    assert float(fits[0].abs().max()) > 1
    assert not list(pyro.get_param_store().keys())


def test_plain_functions_keep_their_params() -> None:
    x, y = linear_data()

    def guide(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        loc = pyro.param("loc", torch.zeros(3))
        scale = pyro.param("scale", torch.ones(3), constraint=dist.constraints.positive)
        pyro.sample("weight", dist.Normal(loc, scale).to_event(1))

    for _ in range(2):  # the second run continues the first
        quiet(linear_model, guide, (x, y), num_steps=400, optim=0.02)
    mean, _ = linear_posterior(x, y)
    assert_close(pyro.param("loc").detach(), mean, atol=0.1, rtol=0)
    assert float(pyro.param("scale").detach().max()) < 0.3


def test_continues_a_fitted_guide() -> None:
    x, y = linear_data()
    guide = AutoDiagonalNormal(linear_model)
    first = quiet(linear_model, guide, (x, y), num_steps=500, optim=0.05)
    second = quiet(linear_model, guide, (x, y), num_steps=5, optim=1e-6)
    assert float(second.losses.mean()) < float(first.losses[:5].mean()) / 2


def test_validation_is_on_for_the_first_step_only() -> None:
    x, y = linear_data()
    seen = []

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        seen.append(pyro.settings.get("validate_poutine"))
        linear_model(x, y)

    with pyro.validation_enabled(False):
        quiet(model, AutoNormal(model), (x, y), num_steps=3)
        assert not pyro.settings.get("validate_poutine")
    assert seen[-3:] == [True, False, False]
    assert pyro.settings.get("validate_poutine")


def test_non_finite_loss_names_the_site_and_restores() -> None:
    x, y = linear_data()

    def model(x: torch.Tensor, y: torch.Tensor | None, broken: bool = False) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            mean = (x * weight).sum(-1)
            pyro.sample("good", dist.Normal(mean, 1.0), obs=y)
            pyro.sample("bad", dist.Normal(mean / (0 if broken else 1), 1.0), obs=y)

    seen = {}

    def record(state: FitState) -> None:
        if state.step == 100:  # the state before step 101 is the last snapshot
            seen.update({n: p.detach().clone() for n, p in state.parameters.items()})

    data = [(x, y, False)] * 120 + [(x, y, True)]
    guide = AutoNormal(model)
    with pytest.raises(NonFiniteLossError, match=r"step 121.*site 'bad'") as info:
        quiet(model, guide, data, num_epochs=1, callbacks=record)
    assert info.value.result.num_steps == 120
    found = dict(guide.named_parameters())
    assert seen
    for name, value in seen.items():
        assert_close(found[name.removeprefix("guide.")].detach(), value, rtol=0)


def test_diverging_parameters_are_restored() -> None:
    x, y = linear_data()
    guide = AutoNormal(linear_model)
    with pytest.raises(NonFiniteLossError, match="weight"):
        quiet(linear_model, guide, (x, y), num_steps=100, optim=1e4)
    assert all(bool(torch.isfinite(p).all()) for p in guide.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: [], "empty iterable"),
        (lambda x, y: DataLoader(TensorDataset(x[:0], y[:0])), "empty iterable"),
        (lambda x, y: (x, torch.full_like(y, torch.nan)), "argument 1.*40 non-finite"),
        (lambda x, y: (x,), "no observed site.*'obs'"),
        (lambda x, y: (x, y[:, None]), r"'obs'.*\(40, 1\).*\(40,\)"),
        (lambda x, y: (x, y[:-1]), r"'obs'.*\(39,\).*\(40,\)"),
    ],
    ids=["empty list", "empty loader", "nan", "missing observation", "column", "too short"],
)
def test_bad_data(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quiet(linear_model, AutoNormal(linear_model), change(*linear_data()), num_steps=1)


def test_network_called_inside_the_plate() -> None:
    """The weights become one draw per point."""
    x, y = linear_data()

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(x @ weight.mT, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"'obs'.*\(40, 40\).*\['weight'\] are inside that plate"):
        quiet(model, AutoNormal(model), (x, y), num_steps=1)


def test_guide_initialised_without_observations() -> None:
    x, y = linear_data()
    guide = AutoNormal(linear_model)
    guide(x)
    with pytest.raises(ValueError, match=r"samples \['obs'\].*without observations"):
        quiet(linear_model, guide, (x, y), num_steps=1)


def test_one_observation_missing_of_two() -> None:
    x, y = linear_data()

    def model(x, y, z=None):
        linear_model(x, y)
        pyro.sample("other", dist.Normal(0.0, 1.0), obs=z)

    guide = AutoNormal(model)
    guide(x, y, torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"samples \['other'\]"):
        quiet(model, guide, (x, y), num_steps=1)


def test_wrong_shape_of_inputs_is_described() -> None:
    x, y = linear_data()
    net = TextbookNet()
    with pytest.raises(RuntimeError) as info:
        quiet(net, AutoNormal(net), (x[:, :2], y), num_steps=1)
    assert "argument 0 of shape (40, 2)" in info.value.__notes__[0]


def test_callback_stops() -> None:
    result = quiet(
        linear_model,
        AutoNormal(linear_model),
        linear_data(),
        num_steps=50,
        callbacks=lambda state: state.step == 7,
    )
    assert (result.num_steps, result.stop_reason) == (7, "callback")


def test_interrupt_ends_after_the_step() -> None:
    def interrupt(state: FitState) -> None:
        if state.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    result = quiet(linear_model, AutoNormal(linear_model), linear_data(), num_steps=50, callbacks=interrupt)
    assert (result.num_steps, result.stop_reason) == (5, "interrupted")


def test_optimiser_must_hold_every_parameter() -> None:
    x, y = linear_data()
    guide = AutoNormal(linear_model)
    guide(x, y)
    params = list(guide.parameters())
    with pytest.raises(ValueError, match="leaves out 1"):
        quiet(linear_model, guide, (x, y), num_steps=1, optim=torch.optim.Adam(params[:1]))


@pytest.mark.parametrize("limits", [{}, {"num_steps": 1, "num_epochs": 1}, {"num_steps": 0}])
def test_limits(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"num_epochs|num_steps must be a whole number"):
        quiet(linear_model, AutoNormal(linear_model), linear_data(), **limits)


def test_params_of_a_guide_function_survive_an_error() -> None:
    """The last good state of a guide function, whose parameters are in Pyro's store."""
    x, y = linear_data()

    def guide(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        loc = pyro.param("loc", torch.zeros(3))
        pyro.sample("weight", dist.Normal(loc, 0.1).to_event(1))

    seen = []

    def record(state: FitState) -> None:
        seen.append(state.parameters["param.loc"].detach().clone())
        if state.step == 7:
            raise KeyError("boom")

    with pytest.raises(KeyError) as info:
        quiet(linear_model, guide, (x, y), num_steps=20, optim=0.05, callbacks=record)
    assert info.value.__notes__ == ["fit stopped after 7 steps; the parameters are those of that step."]
    assert_close(pyro.param("loc").detach(), seen[-1], rtol=0)
    assert float(seen[-1].abs().max()) > 0.1


def test_scheduler_objects() -> None:
    x, y = linear_data()
    guide = AutoNormal(linear_model)
    guide(x, y)
    optimizer = torch.optim.Adam(guide.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    quiet(linear_model, guide, (x, y), num_steps=3, optim=optimizer, scheduler=scheduler)
    assert_close(optimizer.param_groups[0]["lr"], 0.125)
    with pytest.raises(ValueError, match="another optimiser"):
        quiet(linear_model, guide, (x, y), num_steps=3, scheduler=scheduler)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (partial(torch.optim.LBFGS, lr=0.1), "polish"),
        (
            pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {}, "gamma": 0.9}),
            "scheduler=",
        ),
        ("adam", "not str"),
    ],
    ids=["LBFGS", "scheduler of pyro", "string"],
)
def test_optimisers_that_cannot_be_used(optim, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        quiet(linear_model, AutoNormal(linear_model), linear_data(), num_steps=1, optim=optim)
