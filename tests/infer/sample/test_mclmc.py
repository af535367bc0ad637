# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Chains of Pyro models from guides of every kind, against closed forms and quadrature."""

import math
import os
import signal

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

from pyro_bnn import AutoLaplace, AutoMixture
from pyro_bnn.infer import Checkpoint, log_density, mclmc
from pyro_bnn.infer.autoguide import AutoLaplaceMixture
from pyro_bnn.infer.refine.stacking import leave_one_out, stacking_weights
from pyro_bnn.infer.sample.starts import modes_of, points_of
from pyro_bnn.infer.sample.whitening import prior_units

QUIET = {"progress_bar": False}


def linear(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(x @ w + b, 0.5), obs=y)


def located(y):
    """Location and scale of a few observations, the scale constrained."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mu, sigma), obs=y)


def two_modes(y):
    a = pyro.sample("a", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    pyro.sample("obs", dist.Normal(a.square().sum(-1) + 0.1 * a.sum(-1), 0.2), obs=y)


def line():
    x = torch.randn(12, 2)
    return x, x @ torch.tensor([1.0, -0.5]) + 0.3


def z_score(values, expected):
    """Of values ``(chains, draws)``, chains being independent."""
    chains = values.mean(1)
    return float((chains.mean() - expected) / (chains.std() / math.sqrt(len(chains))))


def test_linear_model_has_its_closed_form():
    x, y = line()
    rows = torch.cat([x, torch.ones(12, 1)], 1)
    covariance = torch.linalg.inv(rows.T @ rows / 0.25 + torch.diag(torch.tensor([0.25, 0.25, 1.0])))
    mean = covariance @ rows.T @ y / 0.25
    modes = [{"w": torch.zeros(2), "b": torch.tensor(0.0)}, {"w": torch.ones(2), "b": torch.tensor(1.0)}]
    run = mclmc(
        linear, modes, (x, y), adjusted=True, num_chains=15, num_samples=150, warmup_steps=120, **QUIET
    )
    assert run.samples["w"].shape == (30, 150, 2)
    draws = torch.cat([run.samples["w"], run.samples["b"].unsqueeze(-1)], -1)
    for i in range(3):
        assert abs(z_score(draws[..., i], mean[i])) < 4
        assert abs(z_score((draws[..., i] - mean[i]).square(), covariance[i, i])) < 4
    assert run.weights is None
    assert run.sample_stats["mode"][:, 0].tolist() == [0] * 15 + [1] * 15
    assert run.info["gradients"] > 30 * 150


def test_constrained_model_agrees_with_quadrature():
    y = torch.tensor([0.3, 1.1, -0.4, 2.0])
    mu, log_sigma = torch.meshgrid(torch.linspace(-9, 9, 901), torch.linspace(-3.5, 3.5, 701), indexing="ij")
    log_p = dist.Normal(0.0, 3.0).log_prob(mu) + dist.Normal(0.0, 1.0).log_prob(log_sigma)
    log_p = log_p + dist.Normal(mu.unsqueeze(-1), log_sigma.exp().unsqueeze(-1)).log_prob(y).sum(-1)
    weight = (log_p - log_p.max()).exp()
    weight = weight / weight.sum()
    guide = AutoNormal(located)
    guide(y)
    run = mclmc(
        located,
        guide,
        y,
        adjusted=True,
        num_chains=30,
        num_samples=150,
        warmup_steps=120,
        start="draws",
        **QUIET,
    )
    for values, grid in (
        (run.samples["mu"], mu),
        (run.samples["mu"].square(), mu.square()),
        (run.samples["sigma"].log(), log_sigma),
        (run.samples["sigma"], log_sigma.exp()),
    ):
        assert abs(z_score(values, (weight * grid).sum())) < 4
    # the recorded log density has the Jacobian of the constraint
    first = {name: value[0, 0] for name, value in run.samples.items()}
    expected = dist.Normal(0.0, 3.0).log_prob(first["mu"]) + dist.Normal(0.0, 1.0).log_prob(
        first["sigma"].log()
    )
    expected = expected + dist.Normal(first["mu"], first["sigma"]).log_prob(y).sum()
    torch.testing.assert_close(run.sample_stats["lp"][0, 0], expected)


def fitted(kind, x, y):
    if kind in ("full", "kronecker", "diagonal", "low_rank"):
        return (
            AutoLaplace(linear, structure=kind)
            .initialize(x, y)
            .laplace_approximation((x, y), map_tolerance=math.inf)
        )
    guide = {"mvn": AutoMultivariateNormal, "rank": AutoLowRankMultivariateNormal, "mean field": AutoNormal}[
        kind
    ](linear, init_scale=0.3)
    guide(x, y)
    return guide


@pytest.mark.parametrize("kind", ["full", "kronecker", "diagonal", "low_rank", "mvn", "rank", "mean field"])
def test_whitening_by_a_guide_is_a_root_of_its_covariance(kind):
    x, y = line()
    guide = fitted(kind, x, y)
    space = log_density(linear, (x, y)).space
    (mode,) = modes_of(guide, space, ((x, y), {}))
    with torch.no_grad():
        root = mode.gaussian().half_solve(torch.eye(3)).T
        torch.testing.assert_close(mode.gaussian().half_solve_transposed(torch.eye(3)), root)
        if kind == "mean field":
            expected = torch.full((3,), 0.3**2).diag()
        elif kind in ("mvn", "rank"):
            expected = guide.get_posterior().covariance_matrix
        else:
            expected = guide.posterior.quadratic_form(torch.eye(3))
    torch.testing.assert_close(root @ root.T, expected, rtol=1e-6, atol=1e-8)
    run = mclmc(linear, guide, (x, y), whiten="guide", num_samples=20, warmup_steps=40, **QUIET)
    assert run.samples["w"].isfinite().all()


def test_modes_of_guides():
    y = torch.tensor([0.3, 1.1])
    space = log_density(located, y).space
    batch = ((y,), {})
    values = {"mu": torch.tensor(0.5), "sigma": torch.tensor(2.0)}
    point = space.pack(values)
    delta = AutoDelta(located, init_loc_fn=lambda site: values[site["name"]])
    delta(y)
    for guide in (values, delta, [delta], (values,)):
        points = points_of(modes_of(guide, space, batch), "mode", 2)
        torch.testing.assert_close(points, point.expand(2, -1))
    mixture = AutoMixture(located, 3, component="normal").initialize(y)
    modes = modes_of([mixture, delta], space, batch)
    centres = points_of(modes, "mode", 1)
    assert centres.shape == (4, 2)
    # components are normal in unconstrained space, their draws spread around their centres
    with torch.no_grad():
        draws = points_of(modes[:3], "draws", 400).reshape(3, 400, 2)
    error = draws.std(1) / 20
    assert ((draws.mean(1) - centres[:3]).abs() < 4.5 * error).all()
    scales = torch.stack([mode.gaussian().scale for mode in modes[:3]])
    assert ((draws.std(1) / scales - 1).abs() < 0.2).all()
    with pytest.raises(ValueError, match=r"whiten='guide'.*AutoDelta"):
        modes[3].gaussian()
    points = AutoMixture(located, 2, component="delta").initialize(y)
    with pytest.raises(ValueError, match="point masses"):
        modes_of(points, space, batch)[0].gaussian()


def test_modes_are_weighted_by_their_evidence():
    y = torch.tensor(2.0)
    modes = [{"a": torch.tensor([1.4, 0.0])}, {"a": torch.tensor([-1.4, 0.0])}]
    guide = AutoLaplaceMixture(two_modes, 2, curvature="hessian").initialize(y).set_modes(modes).polish(y)
    guide.laplace_approximation(y)
    run = mclmc(
        two_modes, guide, y, weights="evidence", num_chains=2, num_samples=10, warmup_steps=20, **QUIET
    )
    evidence = torch.stack([part.log_evidence() for part in guide.components])
    expected = (evidence - evidence.logsumexp(0)).exp().repeat_interleave(2) / 2
    torch.testing.assert_close(run.weights, expected.detach())
    with pytest.raises(ValueError, match=r"weights='evidence'.*dict"):
        mclmc(two_modes, modes, y, weights="evidence", **QUIET)


def test_modes_are_weighted_by_stacking():
    y = torch.tensor([1.0, 1.1, 1.2, 0.9, 1.0, 0.7, 1.3, 1.0])

    def model(y):
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = a[..., 0].square() + 0.4 * a[..., 0] + 0.1 * a[..., 1]
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(mean.unsqueeze(-1) if mean.dim() else mean, 0.2), obs=y)

    modes = [{"a": torch.tensor([0.8, 0.0])}, {"a": torch.tensor([-1.2, 0.0])}]
    run = mclmc(model, modes, y, weights="stacking", num_chains=2, num_samples=200, warmup_steps=80, **QUIET)
    a = run.samples["a"].reshape(2, 400, 2)
    assert (a[0, :, 0] > 0).all()
    assert (a[1, :, 0] < 0).all()
    mean = a[..., 0].square() + 0.4 * a[..., 0] + 0.1 * a[..., 1]
    log_likelihood = dist.Normal(mean.unsqueeze(-1), 0.2).log_prob(y)
    left_out = torch.stack([leave_one_out(rows)[0] for rows in log_likelihood])
    expected = stacking_weights(left_out).repeat_interleave(2) / 2
    torch.testing.assert_close(run.weights, expected.double(), rtol=1e-4, atol=1e-4)


class Killed(Checkpoint):
    """A checkpoint of a process that dies after some saves."""

    def save(self, state, step):
        super().save(state, step)
        if step >= 60:
            raise ConnectionError("the machine is gone")
        return True


@pytest.mark.parametrize("adjusted", [False, True])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, adjusted):
    x, y = line()
    guide = AutoLaplace(linear).initialize(x, y)
    options = {"num_samples": 20, "warmup_steps": 50, "adjusted": adjusted, "num_chains": 2, **QUIET}
    pyro.set_rng_seed(1)
    whole = mclmc(linear, guide, (x, y), **options)
    pyro.set_rng_seed(1)
    path = tmp_path / "chains"
    with pytest.raises(ConnectionError):
        mclmc(linear, guide, (x, y), checkpoint=Killed(path, every_steps=20), **options)
    pyro.set_rng_seed(2)
    again = mclmc(linear, guide, (x, y), checkpoint=path, **options)
    assert torch.equal(again.samples["w"], whole.samples["w"])
    assert torch.equal(again.warmup["b"], whole.warmup["b"])
    assert torch.equal(again.sample_stats["energy_error"], whole.sample_stats["energy_error"])
    for changed, what in (({"num_samples": 30}, "num_samples 20"), ({"thinning": 2}, "thinning 1")):
        with pytest.raises(ValueError, match=f"cannot be continued with {what}"):
            mclmc(linear, guide, (x, y), checkpoint=path, **{**options, **changed})
    with pytest.raises(ValueError, match="other data"):
        mclmc(linear, guide, (x, y + 1), checkpoint=path, **options)


@pytest.mark.parametrize("kind", [AutoDelta, AutoNormal, AutoMultivariateNormal, AutoLaplace])
def test_guides_of_an_ensemble_keep_their_own_modes(kind):
    # parameters of guides of one kind have the same names in the store
    x, y = line()
    guides, own = [], []
    for _ in range(3):
        pyro.clear_param_store()
        guide = kind(linear).initialize(x, y) if kind is AutoLaplace else kind(linear)
        guide(x, y)
        with torch.no_grad():
            for value in guide.parameters():
                value.add_(0.1 * torch.randn_like(value))
        guides.append(guide)
        own.append({name: value.detach().clone() for name, value in guide.named_parameters()})
    space = log_density(linear, (x, y)).space
    modes = modes_of(guides, space, ((x, y), {}))
    starts = points_of(modes, "mode", 2)
    apart = torch.stack([points_of([mode], "mode", 2) for mode in modes]).flatten(0, 1)
    assert torch.equal(starts, apart)
    assert len(starts.unique(dim=0)) == 3
    if kind is AutoDelta:
        assert torch.equal(
            starts[::2], torch.stack([torch.cat([guide.w, guide.b[None]]) for guide in guides])
        )
    else:
        assert torch.equal(starts[::2], torch.stack([space.pack(guide.median(x, y)) for guide in guides]))
    start = "mode" if kind is AutoLaplace else "draws"
    mclmc(linear, guides, (x, y), num_samples=2, warmup_steps=4, start=start, **QUIET)
    for guide, values in zip(guides, own, strict=True):
        for name, value in guide.named_parameters():
            assert torch.equal(value, values[name]), name


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.zeros(3, 2), r"site 'w' must be a tensor of shape \(2, 3\).*found \(3, 2\)"),
        (torch.zeros(4, 2, 3), r"found \(4, 2, 3\)"),
        (1.0, "found float"),
    ],
)
def test_values_of_another_shape_are_no_start(value, found):
    def model():
        return pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))

    with pytest.raises(ValueError, match=found):
        mclmc(model, {"w": value}, (), num_samples=2, **QUIET)


def test_guides_without_modes_are_named():
    x, y = line()
    with pytest.raises(ValueError, match="an empty list has no modes"):
        mclmc(linear, [], (x, y), **QUIET)
    flow = AutoIAFNormal(linear)
    flow(x, y)
    with pytest.raises(ValueError, match="AutoIAFNormal is no guide with one mode"):
        mclmc(linear, flow, (x, y), **QUIET)
    with pytest.raises(ValueError, match="AutoIAFNormal has the posterior"):
        mclmc(linear, flow, (x, y), start="draws", whiten="guide", **QUIET)


def hierarchy(y):
    """A prior whose width is a latent."""
    width = pyro.sample("width", dist.LogNormal(0.0, 1.0))
    z = pyro.sample("z", dist.Normal(torch.zeros(3), width).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(z.sum(), 1.0), obs=y)


@pytest.mark.parametrize("whiten", ["prior", "diagonal"])
def test_a_killed_run_keeps_the_scales_of_its_random_start(tmp_path, whiten):
    # the scales of z are those at a draw of its width, and the second process draws another one
    options = {"num_samples": 10, "warmup_steps": 70, "whiten": whiten, **QUIET}
    y, path = torch.randn(6), tmp_path / "chains"
    pyro.set_rng_seed(1)
    whole = mclmc(hierarchy, None, (y,), **options)
    pyro.set_rng_seed(1)
    with pytest.raises(ConnectionError):
        mclmc(hierarchy, None, (y,), checkpoint=Killed(path, every_steps=20), **options)
    pyro.set_rng_seed(2)
    again = mclmc(hierarchy, None, (y,), checkpoint=path, **options)
    assert torch.equal(again.samples["z"], whole.samples["z"])
    assert torch.equal(again.sample_stats["lp"], whole.sample_stats["lp"])


def test_a_run_that_another_guide_whitens_is_not_continued(tmp_path):
    x, y = line()
    guides = [AutoNormal(linear, init_scale=scale) for scale in (0.1, 0.2)]
    for guide in guides:
        pyro.clear_param_store()  # their parameters have the same names
        guide(x, y)
    options = {
        "num_samples": 2,
        "warmup_steps": 4,
        "whiten": "guide",
        "checkpoint": tmp_path / "run",
        **QUIET,
    }
    mclmc(linear, guides[0], (x, y), **options)
    with pytest.raises(ValueError, match="cannot be continued with guide"):
        mclmc(linear, guides[1], (x, y), **options)


@pytest.mark.parametrize("adjusted", [False, True])
def test_energies_of_single_precision_are_those_of_differences(adjusted):
    # a constant of 3e7, whose neighbours in single precision are 2 away, changes neither decisions nor errors
    def model(constant):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float32), 1.0).to_event(1))
        pyro.factor("constant", constant + 0 * z.sum())

    options = {"num_samples": 30, "warmup_steps": 0, "step_size": 1.2, "momentum_length": 2.0, **QUIET}
    start = {"z": torch.tensor([0.3, -0.8], dtype=torch.float32)}
    runs = []
    for constant in (0.0, 3e7):
        pyro.set_rng_seed(1)
        given = torch.tensor(constant, dtype=torch.float32)
        runs.append(mclmc(model, start, (given,), adjusted=adjusted, **options))
    plain, moved = runs
    assert plain.samples["z"].dtype == torch.float32
    assert torch.equal(plain.samples["z"], moved.samples["z"])
    errors = [run.sample_stats["energy_error"] for run in runs]
    torch.testing.assert_close(*errors, rtol=0, atol=1e-6)
    assert errors[0].abs().max() > 0.01


class Interrupting(Checkpoint):
    """Somebody presses Ctrl-C at a step."""

    when = 0

    def is_due(self, step):
        if step == self.when:
            os.kill(os.getpid(), signal.SIGINT)
        return False


def test_an_interrupted_run_returns_its_draws_and_goes_on(tmp_path):
    x, y = line()
    modes = [{"w": torch.ones(2), "b": torch.tensor(0.0)}]
    options = {"num_samples": 30, "warmup_steps": 40, "thinning": 2, **QUIET}
    pyro.set_rng_seed(1)
    whole = mclmc(linear, modes, (x, y), **options)
    pyro.set_rng_seed(1)
    pressed = Interrupting(tmp_path / "chains")
    pressed.when = 20
    with pytest.raises(KeyboardInterrupt, match="before the first draw"):
        mclmc(linear, modes, (x, y), checkpoint=pressed, **options)
    pressed.when = 59
    part = mclmc(linear, modes, (x, y), checkpoint=pressed, **options)
    assert part.info["stopped_by"] == "interrupted"
    assert torch.equal(part.samples["w"], whole.samples["w"][:, : part.num_draws])
    assert 10 <= part.num_draws < 30
    again = mclmc(linear, modes, (x, y), checkpoint=tmp_path / "chains", **options)
    assert torch.equal(again.samples["w"], whole.samples["w"])
    assert again.info["gradients"] == whole.info["gradients"]


def test_chains_for_arviz_and_as_a_guide():
    pytest.importorskip("arviz")
    from pyro_bnn.diagnostics import to_datatree

    x, y = line()
    modes = [{"w": torch.ones(2), "b": torch.tensor(0.0)}] * 2
    run = mclmc(linear, modes, (x, y), num_samples=30, warmup_steps=40, per_mode=True, **QUIET)
    assert len(run.info["momentum_length"]) == 2
    found = to_datatree(linear, run, (x, y))["sample_stats"]
    assert found["mode"].values.tolist() == [[0] * 30, [1] * 30]
    assert (
        abs(float(found["lp"][1, 3]) - float(run.sample_stats["lp"][1, 3])) < 1e-3
    )  # no site is constrained
    assert run.guide(linear, x, y).num_chains == 2


def test_units_of_the_prior():
    def model(y):
        pyro.sample("a", dist.Normal(2.0, 3.0).expand([2]).to_event(1))
        pyro.sample("tail", dist.Cauchy(1.0, 2.0))
        tau = pyro.sample("tau", dist.LogNormal(1.0, 0.5))
        pyro.sample("w", dist.Normal(0.0, tau))
        pyro.sample("flat", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("obs", dist.Normal(0.0, tau), obs=y)

    y = torch.tensor(0.0)
    values = {"a": torch.zeros(2), "tail": torch.tensor(0.0), "tau": torch.tensor(5.0)}
    values |= {"w": torch.tensor(0.0), "flat": torch.tensor(7.0)}
    space = log_density(model, y).space
    centre, scale = prior_units(model, ((y,), {}), space, space.pack(values).unsqueeze(0))
    found = {n: (centre[0, part], scale[0, part]) for n, part in space.slices.items()}
    assert found["a"][0].tolist() == [2, 2]
    assert found["a"][1].tolist() == [3, 3]
    assert abs(found["w"][1].item() - 5) < 1e-9  # given tau at the point
    assert (found["flat"][0].item(), found["flat"][1].item()) == (0, 1)
    # log tau is normal; 1000 draws
    assert abs(found["tau"][0].item() - 1) < 0.08
    assert abs(found["tau"][1].item() / 0.5 - 1) < 0.15
    # half the distance of the quantiles 0.16 and 0.84 of a Cauchy with scale 2
    assert abs(found["tail"][0].item() - 1) < 0.4
    assert abs(found["tail"][1].item() / (2 * math.tan(0.34 * math.pi)) - 1) < 0.25


def test_chains_from_the_prior():
    x, y = line()
    run = mclmc(linear, None, (x, y), num_chains=3, num_samples=30, warmup_steps=200, **QUIET)
    assert run.info["modes"] == 3
    lp = run.sample_stats["lp"].mean(1)
    assert (lp.max() - lp.min()) < 10  # all came down
    with pytest.raises(ValueError, match="guide is None"):
        mclmc(linear, None, (x, y), weights="evidence", **QUIET)
    with pytest.raises(ValueError, match="whiten='guide'"):
        mclmc(linear, None, (x, y), whiten="guide", **QUIET)


def test_chains_that_are_none_are_named():
    x, y = line()
    modes = [{"w": torch.ones(2), "b": torch.tensor(0.0)}]
    far = {"step_size": 1e12, "momentum_length": 1.0, "warmup_steps": 0}
    with (
        pytest.warns(RuntimeWarning, match=r"chain 0 \(mode 0\), chain 1 \(mode 0\): refused steps"),
        pytest.warns(RuntimeWarning, match="no movement at all"),
    ):
        run = mclmc(linear, modes, (x, y), num_chains=2, num_samples=10, **far, **QUIET)
    assert run.sample_stats["diverging"].all()
    assert run.warmup == {}


def test_refusals():
    x, y = line()
    modes = [{"w": torch.ones(2), "b": torch.tensor(0.0)}]

    def single(y):
        pyro.sample("obs", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    with pytest.raises(ValueError, match="at least two latents, found 1: use nuts"):
        mclmc(single, None, torch.tensor(1.0), **QUIET)
    with pytest.raises(ValueError, match="no value for the sites \\['b'\\]"):
        mclmc(linear, {"w": torch.ones(2)}, (x, y), **QUIET)
    with pytest.raises(ValueError, match=r"start of chain 0 the log density is (-inf|nan)"):
        mclmc(linear, {"w": torch.full((2,), math.inf), "b": torch.tensor(0.0)}, (x, y), **QUIET)
    with pytest.raises(ValueError, match="start='mode': function"):
        mclmc(linear, lambda x, y: None, (x, y), **QUIET)
    with pytest.raises(ValueError, match="warmup_steps=2 finds no step size"):
        mclmc(linear, modes, (x, y), warmup_steps=2, **QUIET)
    with pytest.raises(ValueError, match="whiten must be"):
        mclmc(linear, modes, (x, y), whiten="full", **QUIET)
    with pytest.raises(MemoryError, match="num_samples and warmup_steps: 60 draws of 1 chains"):
        mclmc(linear, modes, (x, y), num_samples=50, warmup_steps=10, memory_limit=1e3, **QUIET)
