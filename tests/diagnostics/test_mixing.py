# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""R-hat and effective sample sizes of predictions, against ArviZ's numbers of predictions made by loops."""

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from scipy.stats import norm, rankdata
from torch import Tensor

from pyro_bnn.diagnostics import mixing
from pyro_bnn.infer import ChainResult

X = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)


def model(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    first, second = (v.unsqueeze(-1) for v in w.unbind(-1))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("obs", dist.Normal(first + second.exp() * x, 0.1), obs=y)
        pyro.sample("count", dist.Poisson((first * x).exp()))


def run(weights: list[float] | None = None) -> ChainResult:
    """Autocorrelated chains, two around each of two modes."""
    noise = torch.randn(4, 300, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    w = torch.zeros_like(noise)
    for t in range(1, 300):
        w[:, t] = 0.7 * w[:, t - 1] + 0.2 * noise[:, t]
    modes = torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64).view(4, 1, 1)
    return ChainResult({"w": w + modes}, weights=weights)  # type: ignore[arg-type]


def by_loop(found: ChainResult) -> dict[str, np.ndarray]:
    """The means of the observations under each draw, shape (chains, draws, N)."""
    rows = [[(a + b.exp() * X, (a * X).exp()) for a, b in chain] for chain in found.samples["w"]]
    return {
        name: np.array([[pair[i].numpy() for pair in chain] for chain in rows])
        for i, name in enumerate(("obs", "count"))
    }


def split_rank_r_hat(values: np.ndarray) -> float:
    """Split R-hat of normal scores of ranks, and of the folded values, whichever is larger."""
    half = values.shape[1] // 2
    split = np.concatenate([values[:, :half], values[:, -half:]])

    def r_hat(v: np.ndarray) -> float:
        z = norm.ppf((rankdata(v).reshape(v.shape) - 0.375) / (v.size + 0.25))
        between, within = half * z.mean(1).var(ddof=1), z.var(1, ddof=1).mean()
        return float(np.sqrt(((half - 1) / half * within + between / half) / within))

    return max(r_hat(split), r_hat(np.abs(split - np.median(split))))


def test_numbers_are_those_of_arviz_and_of_the_definition() -> None:
    found = run([0.4, 0.4, 0.1, 0.1])
    report = mixing(model, found, X)
    for name, values in by_loop(found).items():
        for n in range(len(X)):
            if np.ptp(values[..., n]) == 0:  # the count at x = 0
                continue
            expected = split_rank_r_hat(values[..., n])
            np.testing.assert_allclose(report.values[f"{name}_r_hat"][n], expected, rtol=1e-9)
            for kind in ("bulk", "tail"):
                size = az.ess(xr.Dataset({"f": (("chain", "draw"), values[..., n])}), method=kind)["f"]
                np.testing.assert_allclose(report.values[f"{name}_ess_{kind}"][n], size, rtol=1e-9)
    assert report.largest_r_hat > 1.5
    assert "not mixed, or explore different modes" in repr(report)
    assert "R-hat of &#x27;obs&#x27;" in report._repr_html_()


def test_chains_are_compared_within_groups() -> None:
    found = run([0.4, 0.4, 0.1, 0.1])
    report = mixing(model, found, X, groups=["left", "left", "right", "right"])
    values = by_loop(found)["obs"]
    assert list(report.values["group"].values) == ["left", "right"]
    for label, part in (("left", values[:2]), ("right", values[2:])):
        expected = [split_rank_r_hat(part[..., n]) for n in range(len(X))]
        np.testing.assert_allclose(report.values["obs_r_hat"].sel(group=label), expected, rtol=1e-9)
    modes = torch.tensor([[0], [0], [1], [1]]).expand(-1, 300)
    named = ChainResult(found.samples, {"mode": modes, "step": torch.arange(1200).reshape(4, 300)})
    other = mixing(model, named, X, groups="mode")
    np.testing.assert_array_equal(other.values["obs_r_hat"].values, report.values["obs_r_hat"].values)
    for name, message in (
        ("step", "changes within chains"),
        ("modes", r"no statistic of the chains.*\['mode', 'step'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            mixing(model, named, X, groups=name)
    with pytest.raises(ValueError, match="groups='mode' is a statistic of a result"):
        mixing(model, {"w": found.samples["w"].flatten(0, 1)}, X, groups="mode", num_chains=4)
    assert report.largest_r_hat < mixing(model, found, X).largest_r_hat - 0.4
    assert "in 2 groups" in repr(report)


def test_chains_without_weight_are_left_out() -> None:
    found = run([0.5, 0.5, 0.0, 0.0])
    ours = mixing(model, found, X)
    theirs = mixing(model, {"w": found.samples["w"][:2].flatten(0, 1)}, X, num_chains=2)
    assert ours.values.identical(theirs.values)
    assert mixing(model, found, X, groups=[0, 1, 1, 1]).predictions.sizes["chain"] == 2
    guide = found.guide(model)
    assert mixing(model, guide, X).values.identical(ours.values)


def test_what_cannot_be_compared() -> None:
    found = run()
    with pytest.raises(ValueError, match="groups: 3 labels for 4 chains"):
        mixing(model, found, X, groups=[0, 0, 1])
    with pytest.raises(ValueError, match="groups: 3 labels for 1 chains"):
        mixing(model, {"w": found.samples["w"][0]}, X, groups=[0, 0, 1])
    alone = mixing(model, {"w": found.samples["w"][0]}, X)
    assert np.isnan(alone.largest_r_hat)
    assert "R-hat needs chains to compare" in repr(alone)
    weights = torch.arange(1200, dtype=torch.float64)
    guide = found.guide(model).set_draws(found, weights=weights / weights.sum())
    with pytest.raises(ValueError, match="weights of their own"):
        mixing(model, guide, X)
