# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Weights of chains against dense weighted means, wherever draws are read."""

import math
from pathlib import Path

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_bnn.diagnostics import (
    compare_with_nuts,
    diversity,
    prediction_draws,
    to_datatree,
)
from pyro_bnn.diagnostics.metrics import nll
from pyro_bnn.infer import ChainResult, NUTSResult, posterior_draws, posterior_predictive, predictive_moments
from pyro_bnn.infer.autoguide import AutoEmpirical
from pyro_bnn.infer.predict.weighted import systematic_index
from pyro_bnn.infer.sample.nuts import RecordingNUTS
from tests.common import assert_close

#: Shares of which the 12 draws below can be taken without rounding: 2, 1 and 0.5 times.
WEIGHTS = [1 / 2, 1 / 4, 1 / 8, 1 / 8]


def model(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))
    with pyro.plate("data", len(x), dim=-1):
        return pyro.sample("obs", dist.Normal((x * w.unsqueeze(-2)).sum(-1), scale.unsqueeze(-1)), obs=y)


def data(n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return x, x.sum(-1) + 0.3


def chains(weights: object = WEIGHTS, draws: int = 8) -> ChainResult:
    """Four chains of different modes; draws of a chain come twice, so that half of them stand for the chain."""
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(4, draws // 2, 2, generator=generator, dtype=torch.float64) + torch.arange(4.0).view(
        4, 1, 1
    )
    scale = 0.5 + torch.rand(4, draws // 2, generator=generator, dtype=torch.float64)
    samples = {"w": w.repeat_interleave(2, 1), "scale": scale.repeat_interleave(2, 1)}
    energy = torch.arange(4.0 * draws, dtype=torch.float64).reshape(4, draws)
    return ChainResult(samples, {"energy": energy}, weights=weights, info={"method": "chains by hand"})  # type: ignore[arg-type]


def dense(run: ChainResult) -> tuple[dict[str, Tensor], Tensor]:
    """All draws and the weight of each, by a loop."""
    C, S = run.samples["scale"].shape
    given = WEIGHTS if run.weights is None else run.weights.tolist()
    rows = [(c, s, given[c] / S) for c in range(C) for s in range(S)]
    stacked = {n: torch.stack([v[c, s] for c, s, _ in rows]) for n, v in run.samples.items()}
    return stacked, torch.tensor([w for *_, w in rows], dtype=torch.float64)


def test_the_index_of_weighted_draws_rounds_the_count_of_each_run_of_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 7, 40, 1000):
        weights = torch.rand(40, generator=generator, dtype=torch.float64) ** 4
        weights[torch.tensor([0, 13, 39])] = 0.0
        weights /= weights.sum()
        index = systematic_index(weights, size)
        counts = torch.bincount(index, minlength=40).double()
        assert counts.sum() == size
        assert bool((counts[weights == 0] == 0).all())
        # the count of any run of draws, not of single ones alone, is off by less than one
        differences = torch.cat([torch.zeros(1), (counts - size * weights).cumsum(0)])
        assert float(differences.max() - differences.min()) < 1 + 1e-9
        assert torch.equal(index, index.sort().values)


def test_equal_weights_are_no_weights() -> None:
    run, plain = chains([0.25] * 4), chains(None)
    x, y = data()
    for number in (None, 8):
        ours, theirs = posterior_draws(run, number), posterior_draws(plain, number)
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    flat = {n: v.flatten(0, 1) for n, v in plain.samples.items()}
    assert all(torch.equal(v, posterior_draws(flat, 8)[n]) for n, v in posterior_draws(plain, 8).items())
    assert run.get_samples(group_by_chain=True)["w"].shape == (4, 8, 2)
    tree = to_datatree(model, run, (x, y))
    assert tree["posterior"]["w"].shape == (4, 8, 2)
    assert "weights" not in tree["sample_stats"]


def test_predictions_moments_and_scores_are_dense_weighted_means() -> None:
    run = chains()
    x, y = data()
    draws, weights = dense(run)
    mean = draws["w"] @ x.mT
    log_likelihood = dist.Normal(mean, draws["scale"].unsqueeze(-1)).log_prob(y)
    expected = weights @ mean
    aleatoric = (weights @ draws["scale"].square()).expand(len(x))
    epistemic = weights @ (mean - expected).square()
    density = torch.logsumexp(log_likelihood + weights.log().unsqueeze(-1), 0)
    for posterior in (
        run,
        run.guide(model),
        run.guide(model, x, y),
        AutoEmpirical(model, draws, weights=weights),
    ):
        found = predictive_moments(model, posterior, (x, y))["obs"]
        assert_close(found.mean, expected, rtol=1e-12)
        assert_close(found.aleatoric, aleatoric, rtol=1e-12)
        assert_close(found.epistemic, epistemic, rtol=1e-12)
        assert_close(found.log_density, density, rtol=1e-12)
        prediction = posterior_predictive(model, posterior, (x, y))
        assert_close(nll(prediction), -density.mean(), rtol=1e-12)
        assert prediction.mean is not None
        assert_close(prediction.mean.mean(0), expected, rtol=1e-12)
        assert_close(posterior.get_samples()["w"].mean(0), weights @ draws["w"], rtol=1e-12)


def test_few_draws_of_weighted_chains_have_the_shares_of_their_chains() -> None:
    run = chains([0.7, 0.3, 0.0, 0.0], draws=100)
    drawn = posterior_draws(run, 10)["scale"]
    own = [set(chain.tolist()) for chain in run.samples["scale"]]
    assert [sum(value in chain for value in drawn.tolist()) for chain in own] == [7, 3, 0, 0]
    assert len(set(drawn.tolist())) == 10
    with pytest.raises(ValueError, match="num_samples=401, but there are 400 draws only"):
        posterior_draws(run, 401)


def test_the_export_is_that_of_the_weighted_posterior() -> None:
    run = chains()
    x, y = data()
    draws, weights = dense(run)
    guide = run.guide(model, x, y)
    trees = [to_datatree(model, posterior, (x, y)) for posterior in (run, guide)]
    for name in ("posterior", "log_likelihood", "sample_stats", "observed_data"):
        assert trees[0][name].to_dataset().equals(trees[1][name].to_dataset()), name
    tree = trees[0]
    assert tree["posterior"]["w"].shape == (1, 32, 2)
    assert_close(tree["posterior"]["w"].values.mean((0, 1)), weights @ draws["w"], rtol=1e-12)
    stats = tree["sample_stats"]
    np.testing.assert_allclose(stats["weights"].values, WEIGHTS)
    chain, draw = stats["source_chain"].values[0], stats["source_draw"].values[0]
    np.testing.assert_array_equal(tree["posterior"]["w"].values[0], run.samples["w"].numpy()[chain, draw])
    np.testing.assert_array_equal(stats["energy"].values[0], run.sample_stats["energy"].numpy()[chain, draw])
    assert np.bincount(chain).tolist() == [16, 8, 4, 4]
    # ArviZ's own numbers of the tree are those of the weighted posterior
    row = az.summary(tree["posterior"].to_dataset()[["scale"]], round_to="none", kind="stats").iloc[0]
    mean = weights @ draws["scale"]
    variance = weights @ (draws["scale"] - mean).square()
    assert_close(float(row["mean"]), float(mean), rtol=1e-9)
    assert_close(float(row["sd"]), float((variance * 32 / 31).sqrt()), rtol=1e-9)
    # side by side on request, as they are
    plain = to_datatree(model, run.reweighted(None), (x, y))
    np.testing.assert_array_equal(plain["posterior"]["w"].values, run.samples["w"].numpy())
    part = to_datatree(model, run.reweighted(None), (x, y), num_samples=8)
    np.testing.assert_array_equal(
        part["sample_stats"]["energy"].values, run.sample_stats["energy"].numpy()[:, [0, 7]]
    )
    assert dict(prediction_draws(model, run, x).sizes) == {"chain": 1, "draw": 32, "data": 5}


def test_the_log_density_of_a_tree_is_that_of_the_latents_themselves() -> None:
    """Samplers record the one of the unconstrained latents, here with the Jacobian of the scale."""
    x, y = data()
    plain = chains(None)
    recorded = torch.zeros(4, 8, dtype=torch.float64)
    for c in range(4):
        for s in range(8):
            w, scale = plain.samples["w"][c, s], plain.samples["scale"][c, s]
            prior = dist.Normal(0.0, 1.0).log_prob(w).sum() + dist.LogNormal(0.0, 1.0).log_prob(scale)
            recorded[c, s] = prior + dist.Normal(x @ w, scale).log_prob(y).sum() + scale.log()
    run = ChainResult(plain.samples, {"lp": recorded}, plain.samples, {"lp": recorded})
    tree = to_datatree(model, run, (x, y))
    np.testing.assert_array_equal(tree["sample_stats"]["lp_unconstrained"].values, recorded.numpy())
    np.testing.assert_array_equal(tree["warmup_sample_stats"]["lp_unconstrained"].values, recorded.numpy())
    expected = recorded - plain.samples["scale"].log()
    np.testing.assert_allclose(tree["sample_stats"]["lp"].values, expected.numpy(), rtol=1e-12)
    assert "lp" not in to_datatree(model, run)["sample_stats"]


def test_without_data_the_statistics_are_exported_too() -> None:
    run = chains(None)
    tree = to_datatree(model, run)
    np.testing.assert_array_equal(tree["sample_stats"]["energy"].values, run.sample_stats["energy"].numpy())


def test_chains_with_weights_are_not_handed_out_without_them() -> None:
    with pytest.raises(ValueError, match=r"get_samples\(group_by_chain=True\).*reweighted\(None\)"):
        chains().get_samples(group_by_chain=True)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.5], r"weights of shape \(2,\): expected \(4,\), one of each chain"),
        ([0.5, 0.5, 0.5, 0.5], "sum to 2: pass weights / weights.sum"),
        ([1.5, -0.5, 0.0, 0.0], "at least 0, found -0.5"),
        ([float("nan"), 0.5, 0.25, 0.25], "at least 0"),
    ],
)
def test_weights_that_are_none_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chains(weights)
    with pytest.raises(ValueError, match=message):
        chains().reweighted(weights)


def test_shapes_that_do_not_fit_are_refused() -> None:
    w = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"sample_stats: \{'energy': \(5,\)\}.*\(2, 5\)"):
        ChainResult({"w": w}, {"energy": torch.zeros(5)})
    with pytest.raises(ValueError, match=r"samples: \{'v': \(5, 2\)\}"):
        ChainResult({"w": w, "v": w.mT})
    with pytest.raises(ValueError, match="samples holds no site"):
        ChainResult({})


def test_results_show_their_method_weights_and_numbers() -> None:
    run = chains()
    assert "chains by hand: 4 chains of 8 draws" in repr(run)
    assert "0.5, 0.25, 0.125, 0.125" in repr(run)
    other = ChainResult(run.samples, info={"method": "MCLMC", "gradients": 15334, "step_size": 0.25})
    assert "15,334" in other._repr_html_()
    assert "step size  0.25" in str(other)
    assert "NUTS: 4 chains of 8 draws" in repr(NUTSResult(run.samples, {}, {}, {}))
    assert isinstance(NUTSResult(run.samples, {}, {}, {}).reweighted(WEIGHTS), NUTSResult)


def test_the_diversity_of_chains_counts_them_by_weight() -> None:
    run = chains()
    x, y = data()
    log_p = torch.stack(
        [
            torch.stack([dist.Normal(x @ w, s).log_prob(y) for w, s in zip(ws, ss, strict=True)]).logsumexp(0)
            - math.log(len(ws))
            for ws, ss in zip(run.samples["w"], run.samples["scale"], strict=True)
        ]
    )
    for posterior in (run, run.guide(model, x, y)):
        report = diversity(model, posterior, (x, y))
        assert_close(report.member_nll, -log_p.mean(-1), rtol=1e-12)
        weights = torch.tensor(WEIGHTS, dtype=torch.float64)
        mixture = torch.logsumexp(log_p + weights.log().unsqueeze(-1), 0)
        assert_close(report.mixture_nll, -float(mixture.mean()), rtol=1e-12)
        assert_close(report.gain, float(weights @ -log_p.mean(-1) + mixture.mean()), rtol=1e-12)


def test_guides_of_pyros_runs() -> None:
    x, y = data()
    kernel = RecordingNUTS(model)
    mcmc = MCMC(kernel, num_samples=6, warmup_steps=3, disable_progbar=True)
    pyro.set_rng_seed(0)
    mcmc.run(x, y)
    guide = AutoEmpirical(model, mcmc).initialize(x, y)
    drawn = mcmc.get_samples()
    assert all(torch.equal(guide.get_samples()[n], v) for n, v in drawn.items())
    trees = [to_datatree(model, posterior, (x, y)) for posterior in (mcmc, guide)]
    assert trees[0]["log_likelihood"].to_dataset().equals(trees[1]["log_likelihood"].to_dataset())


def test_a_list_of_runs_is_one_chain_of_each(tmp_path: Path) -> None:
    x, y = data()
    runs = [chains(), chains([0.0, 0.0, 1.0, 0.0], draws=6), chains(None, draws=10).guide(model, x, y)]
    tree = to_datatree(model, runs, (x, y), path=tmp_path / "tree.nc", block_size=5)
    assert dict(tree["posterior"].sizes)["draw"] == 24  # of the shortest
    for number, run in enumerate(runs):
        expected = posterior_draws(run, 24)["scale"]
        np.testing.assert_array_equal(tree["posterior"]["scale"].values[number], expected.numpy())
    tree.close()
    with pytest.raises(ValueError, match=r"guides or stored draws.*\['ChainResult', 'AutoNormal'\]"):
        to_datatree(model, [chains(), AutoNormal(model)], (x, y))


def test_streamed_exports_of_weighted_chains(tmp_path: Path) -> None:
    x, y = data()
    whole = to_datatree(model, chains(), (x, y), num_samples=16)
    parts = to_datatree(model, chains(), (x, y), num_samples=16, path=tmp_path / "tree.nc", block_size=5)
    for name in ("posterior", "log_likelihood", "sample_stats"):
        assert whole[name].to_dataset().equals(parts[name].to_dataset().load()), name
    parts.close()


def test_a_comparison_with_nuts_takes_all_stored_draws() -> None:
    x, y = data()
    found = compare_with_nuts(model, chains(None), (x, y), num_samples=10, warmup_steps=3, num_chains=2)
    assert {"w", "scale", "obs_mean"} == set(found["quantity"].values)


def test_draws_without_chains_are_refused() -> None:
    with pytest.raises(ValueError, match=r"samples of shape \(5,\), expected \(chains, draws\)"):
        ChainResult({"w": torch.zeros(5)})
