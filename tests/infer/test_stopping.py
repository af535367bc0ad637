# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import math
from functools import partial

import numpy as np
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn import PyroModule
from scipy.signal import lfilter

from pyro_bnn.infer import ConvergenceTest, EarlyStopping, FitState, LinearAnnealing, Mixture_ELBO, fit
from pyro_bnn.infer.autoguide import AutoMixture
from tests.common import assert_close
from tests.infer.models import NOISE, TextbookNet, linear_data, linear_model

quiet = partial(fit, progress_bar=False)


@pytest.mark.parametrize("correlation", [pytest.param(0.0, marks=pytest.mark.slow), 0.95])
def test_false_alarm_rate(correlation: float) -> None:
    """
    On stationary losses the rate of each false alarm in any of 20 checks stays below alpha, also where the noise
    remembers a tenth of the window (39 losses of 400).
    """
    rng = np.random.default_rng(0)
    test = ConvergenceTest(window=400, alpha=0.05)
    runs = 400
    alarms = {"falling": 0, "diverging": 0}
    for _ in range(runs):
        noise = lfilter([1.0], [1.0, -correlation], rng.standard_t(5, size=20 * 400 + 200))[200:]
        found = {test.check(noise[j * 400 : (j + 1) * 400], j + 1) for j in range(20)}
        for wrong in alarms:
            alarms[wrong] += wrong in found
    # three binomial standard deviations above alpha
    assert max(alarms.values()) / runs < 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)


def test_power() -> None:
    rng = np.random.default_rng(1)
    test = ConvergenceTest(window=400)
    noise = rng.normal(size=(200, 400))
    trend = np.linspace(0, 1.5, 400)
    falling = [test.check(row - trend, 3) == "falling" for row in noise]
    rising = [test.check(row + trend, 3) == "diverging" for row in noise]
    assert np.mean(falling) > 0.9
    assert np.mean(rising) > 0.9


def test_converged_run_stops_and_diverging_run_stops() -> None:
    x, y = linear_data()
    guide = AutoNormal(linear_model)
    test = ConvergenceTest(window=100)
    result = quiet(linear_model, guide, (x, y), num_steps=20000, optim=0.02, callbacks=test)
    assert result.stop_reason == "converged"
    assert result.num_steps < 5000
    assert test.status(result.losses.numpy()) == "converged"

    noise = torch.Generator().manual_seed(0)
    state = FitState(0, 0, 0.0, [], None, None, None, None, None, {})  # type: ignore[arg-type]
    rising = ConvergenceTest(window=100)
    stopped = False
    while not stopped:
        state.step += 1
        state.losses.append(0.05 * state.step + float(torch.randn((), generator=noise)))
        stopped = rising(state)
    assert rising.stop_reason == "diverging"


@pytest.mark.parametrize("metric", ["elbo", "nll"])
def test_early_stopping_restores_the_best(metric: str) -> None:
    """A network of the wrong data overfits, so that the loss held out has a minimum."""
    x, y = linear_data(8, 6)
    held_out = linear_data(100, 6)
    noisy = y + 3 * torch.randn(8)
    stopping = EarlyStopping(held_out, metric=metric, every=10, patience=3)
    seen = {}

    def record(state: FitState) -> None:
        seen[state.step] = {n: p.detach().clone() for n, p in state.parameters.items()}

    init = init_to_value(values={"weight": torch.zeros(6)})
    guide = AutoDelta(linear_model, init_loc_fn=init)
    run = quiet(linear_model, guide, (x, noisy), num_steps=5000, optim=0.05, callbacks=[stopping, record])
    assert run.stop_reason == "early stopping"
    values = [value for _, value in stopping.history]
    best = values.index(min(values))
    assert 0 < best == len(values) - 4
    for name, value in seen[int(stopping.history[best][0])].items():
        assert torch.equal(dict(guide.named_parameters())[name.removeprefix("guide.")], value)


def test_held_out_loss_ignores_the_schedule() -> None:
    """During annealing the loss held out is that of the end: here -E_q[log p(y | w)] + 0.5 KL(q || p), in closed form."""
    x, y = linear_data(10)
    held_out = linear_data(7)
    for anneal_in_elbo in (True, False):
        schedule = LinearAnnealing(10**6, final=0.5)
        guide = AutoMixture(linear_model, 1)
        stopping = EarlyStopping(held_out, every=3, num_samples=600)
        options = {"elbo": Mixture_ELBO(kl_scale=schedule)} if anneal_in_elbo else {"kl_scale": schedule}
        seen = {}

        def record(state: FitState, seen=seen, guide=guide) -> None:
            (fn,) = guide.component_distributions().values()
            seen[state.step] = fn.base_dist.loc[0].detach().clone(), fn.base_dist.scale[0].detach().clone()

        quiet(linear_model, guide, (x, y), num_steps=3, callbacks=[stopping, record], **options)
        loc, sd = seen[3]
        kl = (0.5 * (sd**2 + loc**2 - 1) - sd.log()).sum()
        residual = (held_out[1] - held_out[0] @ loc) ** 2 + (held_out[0] ** 2) @ sd**2
        nll = (0.5 * residual / NOISE**2 + math.log(NOISE * math.sqrt(2 * math.pi))).sum()
        assert_close(stopping.history[0][1], nll + 0.5 * kl, rtol=0.02)


def test_held_out_data_leave_the_model_as_it_was() -> None:
    """No running statistics from data held out, and no dropout."""
    torch.set_default_dtype(torch.float32)
    x, y = linear_data(30)
    net = TextbookNet()
    net.norm = torch.nn.BatchNorm1d(3)

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        net(net.norm(x), y)

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> None:
            model(x, y)

    module = Model()
    stopping = EarlyStopping((x + 100, y), every=1)
    quiet(module, AutoDelta(module), (x, y), num_steps=2, callbacks=stopping)
    assert float(net.norm.running_mean.abs().max()) < 1
    assert net.norm.training


@pytest.mark.parametrize("metric", ["elbo", "nll"])
def test_early_stopping_without_observations(metric: str) -> None:
    x, y = linear_data(10)
    with pytest.raises(ValueError, match=r"data held out: .*'obs'"):
        quiet(
            linear_model,
            AutoNormal(linear_model),
            (x, y),
            num_steps=10,
            callbacks=EarlyStopping(x, metric=metric, every=5),
        )


def test_values_that_are_not_finite_do_not_win() -> None:
    """A first evaluation of nan is worse than any later number."""
    x, y = linear_data(10)
    stopping = EarlyStopping((x, y), every=1, patience=5)
    values = iter([math.nan, 3.0, 2.0, math.nan, 4.0, 4.0, 4.0, 4.0])
    stopping.evaluate = lambda state: next(values)  # type: ignore[method-assign]
    result = quiet(linear_model, AutoNormal(linear_model), (x, y), num_steps=50, callbacks=stopping)
    assert (result.num_steps, result.stop_reason) == (8, "early stopping")
    assert stopping.best


def test_kl_scale_of_any_bound() -> None:
    """A fixed guide: the loss is linear in the factor, with the KL as slope."""
    x, y = linear_data(10)
    guide = AutoNormal(linear_model)
    guide(x, y)
    losses = {}
    for scale in (0.5, 1.0, 2.0):
        torch.manual_seed(0)
        elbo = Trace_ELBO()
        run = quiet(linear_model, guide, (x, y), num_steps=1, optim=0.0, elbo=elbo, kl_scale=scale)
        losses[scale] = float(run.losses[0])
    assert_close(losses[2.0] - losses[1.0], 2 * (losses[1.0] - losses[0.5]), rtol=1e-9)
    torch.manual_seed(0)
    plain = quiet(linear_model, guide, (x, y), num_steps=1, optim=0.0)
    assert_close(plain.losses[0], losses[1.0])

    mixture = AutoMixture(linear_model, 1)  # analytic: the slope is KL(q || N(0, 1))
    mixture.initialize(x, y)
    values = []
    for scale in (1.0, 3.0):
        torch.manual_seed(1)
        elbo = TraceMeanField_ELBO()
        run = quiet(linear_model, mixture, (x, y), num_steps=1, optim=0.0, elbo=elbo, kl_scale=scale)
        values.append(float(run.losses[0]))
    (fn,) = mixture.component_distributions().values()
    loc, sd = fn.base_dist.loc[0], fn.base_dist.scale[0]
    kl = (0.5 * (sd**2 + loc**2 - 1) - sd.log()).sum()
    assert_close((values[1] - values[0]) / 2, kl.detach(), rtol=1e-8)


def test_schedule_of_kl_scale_and_learning_rate() -> None:
    x, y = linear_data(10)
    seen, rates = [], []

    def schedule(step: int) -> float:
        seen.append(step)
        return 1.0

    quiet(
        linear_model,
        AutoNormal(linear_model),
        (x, y),
        num_steps=4,
        optim=1.0,
        kl_scale=schedule,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        callbacks=lambda state: rates.append(state.optimizer.param_groups[0]["lr"]),
    )
    assert seen == [0, 1, 2, 3]
    assert rates == [0.5, 0.25, 0.125, 0.0625]


def test_plateau_scheduler_sees_the_loss() -> None:
    rates: list[float] = []
    quiet(
        linear_model,
        AutoNormal(linear_model),
        linear_data(10),
        num_steps=300,
        optim=0.1,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=20),
        callbacks=lambda state: rates.append(state.optimizer.param_groups[0]["lr"]),
    )
    assert rates[-1] < rates[0]


def test_gradient_clipping() -> None:
    """Plain SGD with clipping moves by at most lr x the limit."""
    x, y = linear_data(10)
    guide = AutoDelta(linear_model)
    guide(x, y)
    before = guide.median()["weight"].clone()
    quiet(
        linear_model,
        guide,
        (x, 100 * y),
        num_steps=1,
        optim=partial(torch.optim.SGD, lr=1.0),
        clip_grad_norm=0.25,
    )
    assert_close((guide.median()["weight"] - before).norm(), 0.25, rtol=1e-4)


def test_autocast() -> None:
    torch.set_default_dtype(torch.float32)  # autocast leaves float64 alone
    x, y = linear_data(64)
    net = TextbookNet()
    guide = AutoDelta(net)
    result = quiet(net, guide, (x, y), num_steps=300, optim=0.05, autocast=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in guide.parameters())
    exact = AutoDelta(net)
    reference = quiet(net, exact, (x, y), num_steps=300, optim=0.05)
    assert_close(result.losses[-1], reference.losses[-1], rtol=0.05)

    def fragile(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        """Differences of large numbers, which bfloat16 cannot hold."""
        shift = (x @ torch.full((3, 1), 1e4)).squeeze(-1)
        linear_model(x, None if y is None else y + shift - x.sum(-1) * 1e4)

    with pytest.raises(ValueError, match="full precision"):
        quiet(fragile, AutoDelta(fragile), (x, y), num_steps=1, autocast=torch.bfloat16)
    with pytest.raises(ValueError, match="underflow"):
        quiet(net, guide, (x, y), num_steps=1, autocast=torch.float16)
    torch.set_default_dtype(torch.float64)
    x, y = linear_data(10)
    with pytest.raises(ValueError, match="no parameter is float32"):
        quiet(linear_model, AutoDelta(linear_model), (x, y), num_steps=1, autocast=torch.bfloat16)


def test_progress_bar_shows_parts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = linear_data(10)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    fit(linear_model, AutoMixture(linear_model, 2), (x, y), num_steps=3, elbo=Mixture_ELBO())
    shown = capsys.readouterr().err
    assert "expected_log_likelihood=" in shown
    assert "kl=" in shown
    assert "step/s" in shown


def test_plot() -> None:
    result = quiet(linear_model, AutoNormal(linear_model), linear_data(10), num_steps=20)
    ax = result.plot(smooth=5)
    assert_close(ax.lines[1].get_ydata()[0], result.losses[:5].mean())
    ax.figure.clear()


def test_early_stopping_leaves_the_schedule_of_the_bound_where_it_is():
    x, y = linear_data(20)
    guide = AutoMixture(linear_model, 2)
    elbo = Mixture_ELBO(kl_scale=LinearAnnealing(100))
    seen = []
    look = EarlyStopping((x, y), every=2, num_samples=4)
    fit(linear_model, guide, (x, y), num_steps=8, elbo=elbo, progress_bar=False,
        callbacks=[look, lambda state: seen.append((elbo.step, elbo.parts["kl_scale"])) or False])  # fmt: skip
    assert seen == [(n + 1, pytest.approx((n + 1) / 100, abs=0.011)) for n in range(8)]
