# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""sgmcmc from its door: laws of whole runs, files, schedules, guides, and what it refuses."""

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_bnn.infer import Checkpoint, CyclicalSteps, PolynomialSteps, posterior_predictive, sgmcmc
from pyro_bnn.infer.autoguide import AutoLaplace, AutoLaplaceMixture
from pyro_bnn.infer.sample.minibatch_run import Run
from tests.common import assert_close
from tests.infer.models import NOISE, linear_data, linear_model, linear_posterior
from tests.infer.sample.linear_chains import Regression, as_map, covariance, stationary, transition

sample: Callable[..., Any] = partial(sgmcmc, progress_bar=False)


def fitted(x: Tensor, y: Tensor, **options: Any) -> AutoLaplace:
    return AutoLaplace(linear_model, **options).initialize(x, y).polish((x, y)).laplace_approximation((x, y))


@pytest.mark.parametrize("scheme", ["sgld", "sghmc", "baoa"])
def test_a_run_has_the_law_of_its_recursion(scheme: str) -> None:
    """Two batches in symmetric sweeps, whitened by the guide, centred at its mode: the covariance of the last draws of many chains."""
    x, y = linear_data(6, 2)
    on, parts = Regression(x, y, NOISE), [range(4), range(4, 6)]
    mean, expected = linear_posterior(x, y)
    full, center = on.full(), mean
    root = torch.linalg.cholesky(expected)
    steps = []
    for part in (parts[0], parts[1], parts[1], parts[0]):
        g = on.gradient(part, 2.0)
        g = type(g)(g.H, g.H @ center - (full.H @ center - full.m))
        steps.append(transition(scheme, g, 0.5, 1.0, root))
    S = stationary(as_map(steps))
    data = [(x[list(part)], y[list(part)]) for part in parts]
    run = sample(
        linear_model, fitted(x, y), data, scheme=scheme, step_size=0.5, control_variates=True, num_chains=3000,
        warmup_steps=0, num_samples=6, thinning=8,
    )  # fmt: skip
    draws = run.samples["weight"][:, -1]
    first, second = covariance(S, 2)
    error = (second.diagonal() / len(draws)).sqrt()
    assert bool(((draws.mean(0) - first).abs() < 4.5 * error).all())
    products = (draws - first).unsqueeze(-1) * (draws - first).unsqueeze(-2)
    error = products.std(0) / len(draws) ** 0.5
    assert bool(((products.mean(0) - second).abs() < 4.5 * error).all())


@pytest.mark.parametrize("structure", ["full", "diagonal", "low_rank", "block"])
def test_guides_precondition(structure: Any) -> None:
    """All data, so that BAOA has the posterior itself, whatever the structure."""
    x, y = linear_data(20)
    guide = fitted(x, y, structure=structure, **({"rank": 2} if structure == "low_rank" else {}))
    step, steps = (0.12, 90) if structure == "low_rank" else (0.9, 15)  # one direction has the prior's scale
    run = sample(
        linear_model,
        guide,
        (x, y),
        step_size=step,
        num_chains=3000,
        num_samples=1,
        warmup_steps=steps,
        start="draws",
    )
    mean, expected = linear_posterior(x, y)
    draws = run.samples["weight"][:, -1] - mean
    products = draws.unsqueeze(-1) * draws.unsqueeze(-2)
    z = (products.mean(0) - expected).abs() / (products.std(0) / 3000**0.5)
    assert float(z.max()) < 4.5
    assert float((draws.mean(0).abs() / (draws.std(0) / 3000**0.5)).max()) < 4.5


def test_kronecker_guides_and_networks() -> None:
    """A network, a Kronecker guide, float32: predictions come close to those of the guide's linear layer."""
    torch.set_default_dtype(torch.float32)
    x = torch.linspace(-1, 1, 30)[:, None]
    y = 2 * x[:, 0] + 0.1 * torch.randn(30)
    net = pyro.nn.PyroModule[torch.nn.Linear](1, 1)
    net.weight = pyro.nn.PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))
    net.bias = pyro.nn.PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = net(x).squeeze(-1)
        with pyro.plate("data", 30, subsample_size=len(x)):
            return pyro.sample("obs", dist.Normal(mean, 0.1), obs=y)

    guide = (
        AutoLaplace(model, structure="kronecker")
        .initialize(x, y)
        .polish((x, y))
        .laplace_approximation((x, y))
    )
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    run = sample(
        model,
        guide,
        loader,
        step_size=0.3,
        control_variates=True,
        num_samples=60,
        warmup_steps=20,
        num_chains=20,
    )
    assert run.samples["weight"].dtype == torch.float32
    design = torch.cat([x, torch.ones(30, 1)], 1).double()
    expected = torch.linalg.inv(torch.eye(2).double() + design.T @ design / 0.01)
    draws = torch.cat([run.samples["weight"].flatten(2), run.samples["bias"]], -1).flatten(0, 1).double()
    # squares of 1,200 draws are correlated over 1 / (friction * step_size) steps, worth 180 alone: 3.3 standard errors
    assert_close(draws.T.cov().diagonal(), expected.diagonal(), rtol=0.35)
    predicted = posterior_predictive(model, run, x)
    assert_close(predicted["obs"].mean.mean(0), 2 * x[:, 0], atol=0.1, rtol=0)


def test_modes_have_chains_of_their_own() -> None:
    """A mixture around two modes of different widths: each chain stays, whitened by its own Gaussian."""

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(z.abs() ** 1.5, 0.5), obs=y)

    y = torch.full((8,), 8.0)
    guide = (
        AutoLaplaceMixture(model, 2)
        .initialize(y)
        .set_modes([{"z": torch.tensor(4.0)}, {"z": torch.tensor(-4.0)}])
    )
    guide = guide.polish(y).laplace_approximation(y)
    run = sample(
        model,
        guide,
        y,
        step_size=0.3,
        batch_size=4,
        control_variates=True,
        num_samples=50,
        warmup_steps=20,
        num_chains=3,
    )
    z = run.samples["z"]
    assert z.shape == (6, 50)
    assert bool((z[:3] > 3).all())
    assert bool((z[3:] < -3).all())
    assert run.info["modes"] == 2
    assert run.info["minibatch_gradients"] == 70 * (6 + 2)
    assert run.info["gradients"] == 70 * 4


@pytest.mark.every(2)
@pytest.mark.parametrize("form", ["rows", "loader", "independent"])
@pytest.mark.parametrize("stop", [3, 13])
def test_interrupted_runs_go_on_bit_by_bit(tmp_path: Path, form: str, stop: int, monkeypatch: Any) -> None:
    x, y = linear_data(7)
    guide = fitted(x, y)

    def run(path: Path | None) -> Any:
        generator = torch.Generator().manual_seed(2)
        loader = DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True, generator=generator)
        data, size = (loader, None) if form == "loader" else ((x, y), 2)
        return sample(
            linear_model, guide, data, batch_size=size, num_samples=8, warmup_steps=5, thinning=2, num_chains=2,
            order="independent" if form == "independent" else "symmetric", start="draws", control_variates=True,
            step_size=CyclicalSteps(0.5, cycle_length=6, exploration=0.3),
            checkpoint=None if path is None else Checkpoint(path, every_steps=1),
        )  # fmt: skip

    pyro.set_rng_seed(3)
    whole = run(None)
    pyro.set_rng_seed(3)
    take = Run.take
    with monkeypatch.context() as patch:

        def dies(self: Run, given: Any) -> bool:
            if self.step == stop:
                raise RuntimeError("power cut")
            return take(self, given)

        patch.setattr(Run, "take", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            run(tmp_path / "run.ckpt")
    pyro.set_rng_seed(99)
    resumed = run(tmp_path / "run.ckpt")
    for name in ("samples", "sample_stats", "warmup", "warmup_stats"):
        for key, value in getattr(whole, name).items():
            assert torch.equal(value, getattr(resumed, name)[key]), (name, key)
    assert resumed.info["minibatch_gradients"] == whole.info["minibatch_gradients"]


def test_ctrl_c_ends_a_run_that_goes_on_later(tmp_path: Path) -> None:
    """Without a guide, so that start and scales are random: both are those of the first run."""

    def model(y: Tensor) -> None:
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, s))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(z, 1.0), obs=y)

    def run(stop: int | None, path: Path | None, seed: int) -> Any:
        def steps(t: int) -> float:
            if t == stop:
                signal.raise_signal(signal.SIGINT)
            return 0.02

        pyro.set_rng_seed(seed)
        return sample(model, None, torch.ones(6), step_size=steps, whiten="prior", batch_size=2, num_samples=6, warmup_steps=4,
                      num_chains=2, checkpoint=path)  # fmt: skip

    path = tmp_path / "run.ckpt"
    whole = run(None, None, seed=4)
    with pytest.raises(KeyboardInterrupt, match="interrupted before the first draw"):
        run(2, path, seed=4)
    early = run(7, path, seed=5)
    assert early.info["stopped_by"] == "interrupted"
    assert torch.equal(early.samples["z"], whole.samples["z"][:, :4])
    late = run(None, path, seed=6)
    for name in ("s", "z"):
        assert torch.equal(late.samples[name], whole.samples[name])
        assert torch.equal(late.warmup[name], whole.warmup[name])


def test_files_go_on_with_more_draws_and_refuse_others(tmp_path: Path) -> None:
    x, y = linear_data(7)
    guide, path = fitted(x, y), tmp_path / "run.ckpt"
    run = partial(sample, linear_model, guide, checkpoint=path, num_chains=2, warmup_steps=3)
    short = run((x, y), batch_size=2, num_samples=4, step_size=0.3)
    longer = run((x, y), batch_size=2, num_samples=9, step_size=0.3)
    assert torch.equal(longer.samples["weight"][:, :4], short.samples["weight"])
    with pytest.raises(ValueError, match=r"cannot be continued with.*0.3 first.*0.4 first"):
        run((x, y), batch_size=2, num_samples=9, step_size=0.4)
    with pytest.raises(ValueError, match="cannot be continued with batch_size 2 in the file, 3 here"):
        run((x, y), batch_size=3, num_samples=9, step_size=0.3)
    with pytest.raises(ValueError, match="belongs to another model or other data"):
        run((x, y + 1), batch_size=2, num_samples=9, step_size=0.3)
    with pytest.raises(ValueError, match="holds 9 draws of each chain, more than num_samples=5"):
        run((x, y), batch_size=2, num_samples=5, step_size=0.3)


def test_what_is_kept() -> None:
    """Every second step; of cycles the sampling phases alone; steps and cycles as they were."""
    x, y = linear_data(7)
    steps = CyclicalSteps(0.4, cycle_length=10, exploration=0.6)
    run = sample(
        linear_model,
        fitted(x, y),
        (x, y),
        step_size=steps,
        batch_size=3,
        num_samples=5,
        warmup_steps=10,
        thinning=2,
    )
    kept = [17, 19, 27, 29, 37]  # of steps 16 to 19, 26 to 29, ...
    assert_close(run.sample_stats["step_size"][0], torch.tensor([steps(t) for t in kept]))
    assert run.sample_stats["cycle"][0].tolist() == [1, 1, 2, 2, 3]
    assert_close(run.warmup_stats["step_size"][3], torch.tensor([steps(t) for t in range(1, 10, 2)]))
    assert run.samples["weight"].shape == (4, 5, 3)
    assert run.warmup["weight"].shape == (4, 5, 3)
    assert run.info["steps"] == 38
    assert "SGMCMC (baoa): 4 chains of 5 draws" in repr(run)


def test_the_estimate_of_a_step_is_of_its_batch() -> None:
    """All data and momentum steps: the density where the step took its gradient, the draw of SGHMC, the one before of BAOA."""
    x, y = linear_data(7)

    def density(w: Tensor) -> Tensor:
        likelihood = dist.Normal((x * w[..., None, :]).sum(-1), NOISE).log_prob(y).sum(-1)
        return dist.Normal(0.0, 1.0).log_prob(w).sum(-1) + likelihood

    for scheme, shift in (("sghmc", 0), ("baoa", 1), ("sgld", 1)):
        run = sample(
            linear_model, fitted(x, y), (x, y), scheme=scheme, step_size=0.3, num_samples=6, warmup_steps=0
        )
        found, w = run.sample_stats["log_density_estimate"], run.samples["weight"]
        assert_close(found[:, shift:], density(w)[:, : 6 - shift], rtol=1e-10)
        assert ("kinetic_temperature" in run.sample_stats) == (scheme != "sgld")


def test_prior_scales_and_no_guide() -> None:
    """Without a guide chains start at draws of the prior; steps are in its scales."""

    def model(y: Tensor) -> None:
        wide = pyro.sample("wide", dist.Normal(0.0, 100.0))
        pyro.sample("narrow", dist.Normal(0.0, 0.01))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(1e-6 * wide, 1.0), obs=y)

    run = sample(
        model,
        None,
        torch.zeros(4),
        step_size=0.9,
        whiten="prior",
        num_samples=1,
        warmup_steps=20,
        num_chains=1000,
    )
    for name, sd in (("wide", 100.0), ("narrow", 0.01)):
        assert_close(run.samples[name].std(), sd, rtol=4.5 / 2000**0.5)
    with pytest.raises(ValueError, match="control_variates and whiten='guide' need a guide"):
        sample(model, None, torch.zeros(4), step_size=0.9)


def test_constrained_latents_and_masks_and_pyro_guides() -> None:
    """A positive scale under a mask, whitened by AutoNormal: the mean of log sigma by quadrature."""
    mask = torch.tensor([True, True, False, True, True, True])

    def model(y: Tensor, m: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(y)), pyro.poutine.mask(mask=m):
            pyro.sample("obs", dist.Normal(0.0, sigma), obs=y)

    y = torch.tensor([0.5, -1.0, 50.0, 0.3, 2.0, -0.2])
    guide = AutoNormal(model)
    guide(y, mask)
    with torch.no_grad():
        guide.scales.sigma.fill_(0.3)
    run = sample(
        model,
        guide,
        (y, mask),
        step_size=0.4,
        batch_size=5,
        num_chains=500,
        num_samples=40,
        warmup_steps=30,
        thinning=3,
    )
    u = torch.linspace(-5, 5, 4001)
    log_p = dist.Normal(0.0, 1.0).log_prob(u) + dist.Normal(0.0, u.exp()[:, None]).log_prob(y[mask]).sum(-1)
    weights = log_p.softmax(0)
    means = run.samples["sigma"].log().mean(0)  # chains share batches: errors by time
    expected = (weights * u).sum()
    assert float((means.mean() - expected).abs()) < 5 * float(means.std() / 40**0.5) + 0.02


@pytest.mark.parametrize("scheme", ["sgld", "sghmc", "baoa"])
def test_hot_chains_are_named(scheme: str) -> None:
    """Batches of one row of forty heat; all rows do not. The statistic is what the docs say it is."""
    x, y = linear_data(40)
    run = partial(
        sample, linear_model, fitted(x, y), (x, y), scheme=scheme, step_size=0.4, order="independent", num_chains=2,
        num_samples=150, warmup_steps=30,
    )  # fmt: skip
    with pytest.warns(
        UserWarning, match=r"in chain 0, chain 1 the .* spread too far. Take a smaller step_size"
    ):
        hot = run(batch_size=1)
    cold = run()
    spread = [found.samples["weight"].flatten(0, 1).var(0).sum() for found in (hot, cold)]
    assert float(spread[0]) > 2 * float(spread[1])
    if scheme == "sgld":  # h^2 |R^T g|^2 / 4 p at the draws before, from the posterior of the linear model
        mean, covariance = linear_posterior(x, y)
        offset = cold.samples["weight"][:, :-1] - mean
        expected = 0.04 * ((offset @ torch.linalg.inv(covariance)) * offset).sum(-1) / 3
        assert_close(cold.sample_stats["drift_to_noise"][:, 1:], expected, rtol=1e-6)


# ------------------------------------------------------------------ what is refused


def test_steps_that_are_too_large_name_the_chains() -> None:
    x, y = linear_data(7)
    with pytest.raises(
        ArithmeticError, match=r"chains \[0, 1, 2, 3\] are not finite at step \d+, site 'weight'"
    ) as caught:
        sample(linear_model, fitted(x, y), (x, y), step_size=5.0, batch_size=3, num_samples=2000)
    assert "step sizes of 5 are too large" in str(caught.value)
    assert "Take half of it, or whiten by a guide" in str(caught.value)


def test_gradients_that_are_not_finite_name_the_site() -> None:
    """A root whose slope is not finite beyond one, where chains come soon."""

    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(a + torch.where(z < 1, (1 - z).sqrt(), 0.0), 1.0), obs=y)

    guide, y = AutoDelta(model), torch.zeros(4)
    guide(y)
    with pytest.raises(ArithmeticError, match=r"site 'z' first of chain \d: the gradient.*is not finite"):
        sample(model, guide, y, step_size=0.3, whiten="prior", num_samples=300)


def test_observations_that_are_not_finite_are_refused() -> None:
    x, y = linear_data(7)
    guide = fitted(x, y)
    y = y.clone()
    y[3] = torch.nan
    with pytest.raises(ValueError, match="argument 1 of the model holds 1 non-finite entries"):
        sample(linear_model, guide, (x, y), step_size=0.1, batch_size=2)


def test_moving_supports_are_refused() -> None:
    def model(y: Tensor) -> None:
        top = pyro.sample("top", dist.LogNormal(1.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Uniform(0.0, top), obs=y)

    guide = AutoDelta(model)
    y = torch.rand(5)
    guide(y)
    with pytest.raises(ValueError, match="the support of observed site 'obs' depends on latents"):
        sample(model, guide, y, step_size=0.1, whiten="prior")


def test_guides_without_a_gaussian_are_refused() -> None:
    x, y = linear_data(7)
    guide = AutoDelta(linear_model)
    guide(x, y)
    with pytest.raises(ValueError, match="whiten='guide' needs a Gaussian over all latents, and AutoDelta"):
        sample(linear_model, guide, (x, y), step_size=0.1)
    partial_guide = fitted(x, y, subnetwork="largest_magnitude", subnetwork_size=2)
    with pytest.raises(ValueError, match="AutoLaplace leaves 1 of 3 latents at a point"):
        sample(linear_model, partial_guide, (x, y), step_size=0.1)


def test_draws_that_do_not_fit_into_memory_are_refused() -> None:
    x, y = linear_data(7)
    with pytest.raises(MemoryError, match="1500 draws of 4 chains in 3 dimensions"):
        sample(linear_model, fitted(x, y), (x, y), step_size=0.1, num_samples=1000, memory_limit=2e5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scheme": "hmc"}, "scheme must be 'sgld', 'sghmc' or 'baoa', found 'hmc'"),
        ({"step_size": 0.0}, "step_size must be a number above 0"),
        ({"step_size": lambda t: -1.0}, "the schedule gives -1.0 at step 0"),
        ({"friction": 0.0}, "friction must be a number above 0"),
        ({"scheme": "sghmc", "step_size": 1.5, "friction": 2.0}, "unstable with friction \\* step_size = 3"),
        ({"whiten": "diagonal"}, "whiten must be 'guide' or 'prior', found 'diagonal'"),
        ({"start": "draw"}, "start must be 'mode' or 'draws', found 'draw'"),
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1"),
        ({"thinning": 0}, "thinning must be a whole number of at least 1"),
        ({"num_chains": 0}, "num_chains must be a whole number of at least 1"),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number of at least 0"),
        ({"batch_size": 8}, "batch_size=8 is more than the 7 rows"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], text: str) -> None:
    x, y = linear_data(7)
    with pytest.raises(ValueError, match=text):
        sample(linear_model, fitted(x, y), (x, y), **{"step_size": 0.1, **options})


def test_schedules_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no step of a cycle of 2 steps samples with exploration=0.6"):
        CyclicalSteps(0.1, cycle_length=2, exploration=0.6)
    with pytest.raises(ValueError, match="power must be a number above 0"):
        PolynomialSteps(0.1, power=0)
