# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The guide of stored draws: frequencies, quantiles, coherence of sites, files, refusals."""

import copy
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Importance,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import Tensor

from pyro_bnn.diagnostics import diversity, log_weights, to_datatree
from pyro_bnn.diagnostics.ood import functional_variance
from pyro_bnn.infer import (
    ChainResult,
    Mixture_ELBO,
    fit,
    load_guide,
    network_at,
    nuts,
    posterior_draws,
    posterior_predictive,
    save_guide,
)
from pyro_bnn.infer.autoguide import AutoEmpirical, AutoMixture
from pyro_bnn.nn import bayesian_
from tests.common import assert_close

S = 10


def model(x: Tensor, y: Tensor | None = None) -> Tensor:
    """A vector, a scalar, latents in a plate, a simplex, and single precision beside double."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))
    probs = pyro.sample("probs", dist.Dirichlet(torch.ones(3, dtype=torch.float64)))
    with pyro.plate("groups", 3, dim=-1):
        effect = pyro.sample("effect", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    pyro.deterministic("sum", w.sum(-1))
    shift = (probs * effect).sum(-1, keepdim=True)
    mean = (x * w.unsqueeze(-2)).sum(-1) + shift
    with pyro.plate("data", len(x), dim=-1):
        return pyro.sample("obs", dist.Normal(mean, scale.unsqueeze(-1)), obs=y)


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x, x.sum(-1)


def draws(size: int = S) -> dict[str, Tensor]:
    """Every site holds the number of its draw."""
    number = torch.arange(float(size), dtype=torch.float64)
    probs = torch.stack([1 + number, 2 + 0 * number, 3 + number], -1)
    return {
        "effect": number.unsqueeze(-1) + torch.tensor([0.0, 0.25, 0.5], dtype=torch.float64),
        "probs": probs / probs.sum(-1, keepdim=True),
        "scale": 1.0 + number,
        "w": torch.stack([number, -number], -1).float(),
    }


WEIGHTS = torch.arange(1.0, S + 1, dtype=torch.float64) / 55


def guide(weights: Any = WEIGHTS, **options: Any) -> AutoEmpirical:
    return AutoEmpirical(model, draws(), weights=weights, **options).initialize(*data())


def numbers(found: dict[str, Tensor]) -> Tensor:
    """The number of each draw, after a comparison of all its sites with those of one stored draw."""
    index = (found["scale"] - 1).round().long()
    flat = index.reshape(-1)
    for name, value in draws().items():
        own = found[name].reshape(len(flat), *value.shape[1:])
        assert torch.equal(own, value[flat]), name
    return flat


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_draws_come_by_weight_with_all_their_sites(weights: Tensor | None) -> None:
    pyro.set_rng_seed(1)
    found, size, (x, _) = guide(weights), 300, data()
    names = list(draws())
    single = [found(x) for _ in range(200)]
    ways = {
        "sample_posterior": found.sample_posterior((40, 100)),
        "Predictive": Predictive(model, guide=found, num_samples=200, return_sites=names)(x),
        "in parallel": Predictive(model, guide=found, num_samples=size, parallel=True, return_sites=names)(x),
        "call": {n: torch.stack([row[n] for row in single]) for n in names},
    }
    expected = torch.full((S,), 1 / S, dtype=torch.float64) if weights is None else weights
    for way, drawn in ways.items():
        index = numbers(drawn)
        counts = torch.bincount(index, minlength=S) / len(index)
        error = (expected * (1 - expected) / len(index)).sqrt()
        assert float(((counts - expected) / error).abs().max()) < 4.5, way
    generator = torch.Generator().manual_seed(5)
    first = found.sample_posterior((7,), generator=generator)
    again = found.sample_posterior((7,), generator=torch.Generator().manual_seed(5))
    assert torch.equal(numbers(first), numbers(again))
    assert {n: v.dtype for n, v in first.items()} == {n: v.dtype for n, v in draws().items()}


def test_quantiles_invert_the_weighted_distribution_function() -> None:
    levels = [0.0, 0.1, 0.5, 0.9, 1.0]
    for weights in (None, WEIGHTS, torch.tensor([0.0] * 3 + [0.5, 0.0, 0.5] + [0.0] * 4)):
        found = guide(weights).quantiles(levels)
        w = None if weights is None else weights.numpy()
        for name in ("scale", "effect", "w"):
            flat = draws()[name].numpy()
            flat = flat if w is None else flat[w > 0]
            kept = None if w is None else w[w > 0]
            expected = np.quantile(flat, levels, axis=0, weights=kept, method="inverted_cdf")
            np.testing.assert_array_equal(found[name].numpy(), expected, err_msg=name)
        assert_close(found["probs"].sum(-1), torch.ones(5), rtol=1e-12)
        middle = guide(weights).median()
        for name, value in middle.items():  # of one row or five: constraints round in another way
            assert_close(value, found[name][2], rtol=1e-14)
    assert_close(guide(None).median()["scale"], draws()["scale"].median(), rtol=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        guide().quantiles([1.5])


def test_a_decreasing_transform_does_not_turn_quantiles_around() -> None:
    def below() -> None:
        pyro.sample(
            "z",
            dist.TransformedDistribution(dist.Exponential(1.0), dist.transforms.AffineTransform(0.0, -1.0)),
        )

    found = AutoEmpirical(below, {"z": -torch.arange(1.0, 5.0)}).initialize().quantiles([0.25, 1.0])["z"]
    assert found.tolist() == [-4.0, -1.0]


def test_functions_of_draws_take_the_stored_ones() -> None:
    x, y = data()
    found = guide(None, num_chains=2)
    assert all(torch.equal(posterior_draws(found)[n], v) for n, v in draws().items())
    assert numbers(posterior_draws(found, 4)).tolist() == [0, 3, 6, 9]
    prediction = posterior_predictive(model, found, (x, y))
    plain = posterior_predictive(model, draws(), (x, y))
    assert torch.equal(prediction.mean, plain.mean)  # type: ignore[arg-type]
    assert torch.equal(functional_variance(prediction), functional_variance(plain))
    assert to_datatree(model, found, (x, y))["posterior"]["w"].shape == (2, 5, 2)
    by_loop = [dist.Normal(prediction.mean[s], draws()["scale"][s]).log_prob(y) for s in range(S)]  # type: ignore[index]
    assert_close(prediction.log_likelihood, torch.stack(by_loop), rtol=1e-12)
    assert diversity(model, found, (x, y)).member_nll.shape == (2,)


def test_traces_replay_condition_and_block() -> None:
    x, _ = data()
    found = guide()
    trace = poutine.trace(found).get_trace(x)
    replayed = poutine.trace(poutine.replay(found, trace)).get_trace(x)
    assert all(torch.equal(replayed.nodes[n]["value"], trace.nodes[n]["value"]) for n in draws())
    assert [f.name for f in trace.nodes["effect"]["cond_indep_stack"]] == ["groups"]
    assert trace.nodes["_AutoEmpirical_draw"]["infer"]["is_auxiliary"]
    fixed = poutine.condition(found, {"scale": torch.tensor(2.0)})
    assert fixed(x)["scale"] == 2.0


@pytest.mark.parametrize(
    "bound",
    [
        Trace_ELBO,
        TraceMeanField_ELBO,
        TraceEnum_ELBO,
        TraceGraph_ELBO,
        lambda: RenyiELBO(num_particles=2),
        Mixture_ELBO,
    ],
)
def test_bounds_are_refused(bound: Any) -> None:
    svi = SVI(model, guide(), pyro.optim.Adam({"lr": 0.1}), bound())
    with pytest.raises(NotImplementedError, match="AutoEmpirical draws from stored draws and has no density"):
        svi.step(*data())


def test_densities_and_importance_weights_are_refused() -> None:
    x, y = data()
    with pytest.raises(NotImplementedError, match="has no density"):
        Importance(model, guide(), 2).run(x, y)
    with pytest.raises(ValueError, match="AutoEmpirical has no density"):
        log_weights(model, guide(), (x, y))
    assert "log_q" not in to_datatree(model, guide(), (x, y))["sample_stats"]

    def trainable(x: Tensor, y: Tensor) -> None:
        pyro.param("unused", torch.zeros(()))
        model(x, y)

    with pytest.raises(NotImplementedError, match="has no density"):
        fit(trainable, guide(), (x, y), num_steps=1, progress_bar=False)


@pytest.mark.parametrize("initialized", [True, False])
def test_files_keep_precision_weights_statistics_and_chains(tmp_path: Any, initialized: bool) -> None:
    x, y = data()
    samples = {n: v.unflatten(0, (2, 5)) for n, v in draws().items()}
    run = ChainResult(
        samples,
        {"energy": torch.rand(2, 5), "diverging": torch.rand(2, 5) > 0.5},
        weights=torch.tensor([0.7, 0.3]),
    )
    saved = run.guide(model, x, y)
    save_guide(saved, tmp_path / "guide.pt")
    fresh = AutoEmpirical(model, {n: v[:3] for n, v in draws().items()})  # other draws, in another number
    fresh = load_guide(fresh.initialize(x, y) if initialized else fresh, tmp_path / "guide.pt")
    assert fresh.num_chains == 2
    assert torch.equal(fresh.weights, saved.weights)
    for one, other in ((fresh.samples, samples), (fresh.sample_stats, run.sample_stats)):
        assert {n: v.dtype for n, v in one.items()} == {n: v.dtype for n, v in other.items()}
        assert all(torch.equal(one[n], v) for n, v in other.items())
    trees = [to_datatree(model, posterior, (x, y)) for posterior in (run, fresh)]
    for name in ("posterior", "log_likelihood", "sample_stats"):
        assert trees[0][name].to_dataset().equals(trees[1][name].to_dataset()), name
    again = AutoEmpirical(model).initialize(x, y)
    again.load_state_dict(saved.state_dict())
    assert all(torch.equal(again.samples[n], v) for n, v in samples.items())

    def other(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        model(x, y)

    for built in (AutoEmpirical(other), AutoEmpirical(other).initialize(x, y)):
        with pytest.raises(ValueError, match=r"of the sites \['v'\] of the model there are none") as error:
            load_guide(built, tmp_path / "guide.pt")
        assert "guide.pt" in "".join(error.value.__notes__)


def test_files_know_the_names_of_sites(tmp_path: Any) -> None:
    def pair(first: str, second: str) -> Any:
        return lambda: [pyro.sample(name, dist.Normal(0.0, 1.0)) for name in (first, second)]

    saved = AutoEmpirical(pair("a", "b"), {"a": torch.zeros(2), "b": torch.ones(2)}).initialize()
    fresh = AutoEmpirical(pair("b", "a")).initialize()
    fresh.load_state_dict(saved.state_dict())
    assert fresh.get_samples()["a"].tolist() == [0.0, 0.0]
    assert fresh()["b"] == 1.0


def test_a_list_with_another_guide_draws_both_independently(tmp_path: Any) -> None:
    x, y = data()

    def build(stored: Any = None) -> AutoGuideList:
        parts = AutoGuideList(model)
        parts.append(AutoNormal(poutine.block(model, expose=["scale"])))
        parts.append(AutoEmpirical(poutine.block(model, hide=["scale"]), stored))
        return parts

    both = build({n: v for n, v in draws().items() if n != "scale"})
    both(x, y)
    found = posterior_draws(both, 50, x, y)
    assert {n: v.shape[1:] for n, v in found.items()} == {n: v.shape[1:] for n, v in draws().items()}
    assert_close(found["effect"][:, 1] - found["effect"][:, 0], torch.full((50,), 0.25), rtol=0)
    assert set(both.median()) == set(draws())
    save_guide(both, tmp_path / "both.pt")
    loaded = load_guide(build(), tmp_path / "both.pt")
    assert torch.equal(loaded.median()["effect"], both.median()["effect"])
    assert to_datatree(model, loaded, (x, y), num_samples=8)["posterior"]["effect"].shape == (1, 8, 3)


def test_components_of_a_mixture_do_not_meet_draws_of_one_chain_each() -> None:
    """In a list with a mixture, the stored draws of every component are from all chains."""
    x, y = data()
    mixture = AutoMixture(poutine.block(model, expose=["w"]), 2)
    stored = {
        "scale": torch.tensor([1.0, 5.0], dtype=torch.float64).repeat_interleave(100),
        "probs": torch.full((200, 3), 1 / 3, dtype=torch.float64),
        "effect": torch.zeros(200, 3, dtype=torch.float64),
    }
    parts = AutoGuideList(model)
    parts.append(mixture)
    parts.append(AutoEmpirical(poutine.block(model, hide=["w"]), stored, num_chains=2))
    parts(x, y)
    with torch.no_grad():  # the components are the same
        mixture.loc_unconstrained.copy_(mixture.loc_unconstrained[:1].expand(2, -1).clone())
    pyro.set_rng_seed(0)
    report = diversity(model, parts, (x, y), num_samples=100)
    # in the order of the chains the second member would have the larger scales alone, and lose about log 5 nats
    spread = float(report.member_nll[1] - report.member_nll[0])
    assert abs(spread) < 0.3


def test_the_guide_of_a_run_predicts_what_the_run_does() -> None:
    x, y = data()
    run = nuts(model, (x, y), num_samples=5, warmup_steps=5, num_chains=2, progress_bar=False)
    found = run.guide(model, x, y)
    one, other = (posterior_predictive(model, p, (x, y)).log_likelihood for p in (run, found))
    assert torch.equal(one, other)  # type: ignore[arg-type]
    trees = [to_datatree(model, p, (x, y)) for p in (run, found)]
    assert trees[0]["sample_stats"].to_dataset().equals(trees[1]["sample_stats"].to_dataset())
    assert trees[0]["warmup_posterior"]["effect"].shape == (2, 5, 3)


def test_networks_move_with_their_draws() -> None:
    net = bayesian_(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)))

    def regression(x: Tensor, y: Tensor | None = None) -> None:
        mean = net(x).squeeze(-1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    net = net.float()
    x, y = (value.float() for value in data())
    prior = {n: torch.stack([v, v + 1, v + 2]) for n, v in AutoNormal(regression)(x, y).items()}
    found = AutoEmpirical(regression, prior).initialize(x, y)
    assert [tuple(b.shape) for n, b in found.named_buffers() if n.startswith("draws_")] == [(1, 3, 13)]
    means = posterior_predictive(regression, found, x).mean
    for s in range(3):
        one = {n: v[s] for n, v in prior.items()}
        assert_close(means[s], network_at(net, one)(x).squeeze(-1), rtol=1e-6)  # type: ignore[index]
    assert all(torch.equal(found.median()[n], v[1]) for n, v in prior.items())
    assert found.double().get_samples()["0.weight"].dtype == torch.float64
    assert torch.equal(copy.deepcopy(found).get_samples()["0.bias"], found.get_samples()["0.bias"])
    row = found.summary().sites["0.weight"]
    weight = prior["0.weight"].double()
    assert_close(row["location"], weight.mean(0).square().mean().sqrt(), rtol=1e-6)
    assert_close(row["sd"], weight.std(0, correction=0).median(), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": None}, r"of the sites \['w'\] of the model there are none"),
        ({"v": torch.zeros(S)}, r"\['v'\] are no latent sites"),
        ({"w": torch.zeros(S, 3)}, r"'w' have shape \(3,\), the site \(2,\)"),
        ({"scale": -torch.ones(S)}, "'scale' are not all in its support"),
        ({"w": torch.full((S, 2), torch.nan)}, "20 numbers of site 'w' are not finite"),
        ({"w": torch.zeros(S - 1, 2)}, "draws in their first dimension"),
    ],
)
def test_draws_of_something_else_are_refused(change: dict[str, Any], message: str) -> None:
    given = {n: v for n, v in (draws() | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        AutoEmpirical(model, given).initialize(*data())


def test_what_holds_no_draws_says_so() -> None:
    empty = AutoEmpirical(model).initialize(*data())
    for use in (empty.sample_posterior, empty.get_samples, empty.median, lambda: empty(*data())):
        with pytest.raises(RuntimeError, match="AutoEmpirical holds no draws"):
            use()
    assert "no draws" in repr(empty)
    with pytest.raises(TypeError, match=r"draws of type AutoNormal.*posterior_draws"):
        AutoEmpirical(model, AutoNormal(model))


def test_latents_of_some_rows_are_refused() -> None:
    def local(x: Tensor) -> None:
        with pyro.plate("rows", 20, subsample_size=len(x), dim=-1):
            pyro.sample("obs", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    with pytest.raises(
        ValueError, match="'z' is in the plate 'rows', of which the model was run on 4 of 20 rows"
    ):
        AutoEmpirical(local, {"z": torch.zeros(3, 4)}).initialize(torch.ones(4))


def test_draws_of_other_libraries_with_deterministic_sites() -> None:
    given = {n: v.numpy() for n, v in draws().items()} | {"sum": np.zeros(S)}
    found = AutoEmpirical(model, given).initialize(*data())
    assert list(found.samples) == ["w", "scale", "probs", "effect"]
    assert numbers(found.get_samples()).tolist() == list(range(S))
    labels = AutoEmpirical(
        lambda: pyro.sample("k", dist.Categorical(torch.ones(4))), {"k": np.array([3, 0, 2])}
    )
    assert labels.initialize().median()["k"].item() == 2


def test_sites_that_are_summed_over_have_no_draws() -> None:
    def mixed(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        flat = pyro.sample("flat", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(y), dim=-1):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("obs", dist.Normal(loc[k] + flat, 0.1), obs=y)

    given = {"loc": torch.tensor([[-1.0, 1.0]] * 3), "flat": torch.arange(3.0)}
    found = AutoEmpirical(mixed, given).initialize(torch.zeros(4))
    assert set(found(torch.zeros(4))) == {"loc", "flat"}
    assert found.median()["flat"] == 1.0
