# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Every guide on every case: derive from :class:`GuideContract` and define ``build`` and ``finish``.

The cases are small models of different kinds. Each test compares numbers: draws with the density that scores them,
exported log likelihoods with the model's own, a loaded guide with the saved one.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor

from pyro_bnn.diagnostics import to_datatree, to_inference_data
from pyro_bnn.infer import fit, load_guide, posterior_predictive, save_guide
from pyro_bnn.model.handlers import latent_names
from tests.common import assert_close

N = 12


def _inputs() -> Tensor:
    return torch.randn(N, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _weights() -> Tensor:
    return pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))


def _dot(x: Tensor, w: Tensor) -> Tensor:
    return (x * w).sum(-1)


def linear_gaussian(x: Tensor, y: Tensor | None = None) -> Any:
    f = _dot(x, _weights())
    with pyro.plate("data", len(x), dim=-1):
        return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)


def logistic(x: Tensor, y: Tensor | None = None) -> Any:
    f = _dot(x, _weights())
    with pyro.plate("data", len(x), dim=-1):
        return pyro.sample("obs", dist.Bernoulli(logits=f), obs=y)


def poisson(x: Tensor, y: Tensor | None = None) -> Any:
    f = _dot(x, _weights())
    with pyro.plate("data", len(x), dim=-1):
        return pyro.sample("obs", dist.Poisson(f.exp()), obs=y)


def heteroscedastic(x: Tensor, y: Tensor | None = None) -> Any:
    w = pyro.sample("w", dist.Normal(torch.zeros(2, 2, dtype=torch.float64), 1.0).to_event(2))
    f = (x.unsqueeze(-2) * w.unsqueeze(-3)).sum(-1) if w.dim() == 2 else (x[:, None] * w).sum(-1)
    with pyro.plate("data", len(x), dim=-1):
        return pyro.sample("obs", dist.Normal(f[..., 0], (0.3 * f[..., 1]).exp()), obs=y)


def hierarchical(x: Tensor, y: Tensor | None = None) -> Any:
    f = _dot(x, _weights())
    tau = pyro.sample("tau", dist.LogNormal(x.new_zeros(()), 0.5))
    with pyro.plate("groups", 3, dim=-1):
        effect = pyro.sample("effect", dist.Normal(0.0, tau))
    f = f + effect[..., torch.arange(len(x)) % 3]
    with pyro.plate("data", len(x), dim=-1):
        return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)


def subsampled(x: Tensor, y: Tensor | None = None) -> Any:
    f = _dot(x, _weights())
    with pyro.plate("data", N, subsample=torch.arange(len(x)), dim=-1):
        return pyro.sample("obs", dist.Normal(f, 0.5), obs=y)


def multi_output(x: Tensor, y: Tensor | None = None) -> Any:
    f = _dot(x, _weights())
    with pyro.plate("data", len(x), dim=-1):
        return pyro.sample("obs", dist.Normal(torch.stack([f, -f], -1), 0.5).to_event(1), obs=y)


#: name -> (model, observations of N points)
CASES: dict[str, tuple[Callable[..., Any], Callable[[], Tensor]]] = {
    "linear-Gaussian": (linear_gaussian, lambda: torch.randn(N)),
    "logistic": (logistic, lambda: torch.randint(0, 2, (N,)).double()),
    "Poisson": (poisson, lambda: torch.randint(0, 4, (N,)).double()),
    "heteroscedastic": (heteroscedastic, lambda: torch.randn(N)),
    "hierarchical": (hierarchical, lambda: torch.randn(N)),
    "subsampled plate": (subsampled, lambda: torch.randn(N)),
    "multi-output": (multi_output, lambda: torch.randn(N, 2)),
}


@pytest.mark.parametrize("case", list(CASES))
class GuideContract:
    """The contract. Subclasses are collected by pytest, this class is not (its name does not begin with Test)."""

    #: whether the guide has a density that integrates to one
    has_density = True
    #: whether the guide has parameters that a bound can train
    trains = True

    def build(self, model: Callable[..., Any]) -> Any:
        """A guide that is not initialised."""
        raise NotImplementedError

    def finish(self, guide: Any, x: Tensor, y: Tensor) -> Any:
        """Turns a trained guide into its final form."""
        return guide

    def fitted(self, case: str) -> tuple[Any, Any, Tensor, Tensor]:
        """Model, guide after a few steps, and data."""
        model, observe = CASES[case]
        x, y = _inputs(), observe()
        guide = self.build(model)
        guide.initialize(x, y)
        if self.trains:
            fit(model, guide, (x, y), num_steps=5, optim=0.05, progress_bar=False)
        return model, self.finish(guide, x, y), x, y

    def test_stock_svi_and_predictive(self, case: str) -> None:
        model, observe = CASES[case]
        x, y = _inputs(), observe()
        guide = self.build(model).initialize(x, y)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        if self.trains:
            before = {name: p.detach().clone() for name, p in guide.named_parameters()}
            assert all(np.isfinite(svi.step(x, y)) for _ in range(3))
            assert any(not torch.equal(before[name], p) for name, p in guide.named_parameters())
        guide = self.finish(guide, x, y)
        if not self.trains:
            with pytest.raises(NotImplementedError, match="no density"):
                svi.step(x, y)
        drawn = Predictive(model, guide=guide, num_samples=4)(x)["obs"]
        assert drawn.shape == (4,) + y.shape

    def test_draws_have_the_shape_of_the_sites_and_follow_the_seed(self, case: str) -> None:
        model, guide, x, y = self.fitted(case)
        trace = poutine.trace(model).get_trace(x, y)
        shapes = {n: trace.nodes[n]["value"].shape for n in latent_names(trace)}
        pyro.set_rng_seed(4)
        first = guide.sample_posterior((2, 3))
        assert {n: first[n].shape for n in shapes} == {n: (2, 3) + s for n, s in shapes.items()}
        pyro.set_rng_seed(4)
        second = guide.sample_posterior((2, 3))
        assert all(torch.equal(first[n], second[n]) for n in shapes)
        middle = guide.median()
        assert {n: middle[n].shape for n in shapes} == shapes

    def test_a_saved_guide_is_the_same_in_a_fresh_object(self, case: str, tmp_path: Any) -> None:
        model, guide, *_ = self.fitted(case)
        save_guide(guide, tmp_path / "guide.pt")
        fresh = load_guide(self.build(model), tmp_path / "guide.pt")
        draws = []
        for g in (guide, fresh):
            pyro.set_rng_seed(5)
            draws.append(g.sample_posterior((3,)))
        for name in draws[0]:
            assert_close(draws[1][name], draws[0][name], rtol=0)

    def test_exported_log_likelihood_is_that_of_the_draws(self, case: str) -> None:
        model, guide, x, y = self.fitted(case)
        prediction = posterior_predictive(model, guide, (x, y), num_samples=3)
        assert prediction.log_likelihood is not None
        assert prediction.log_likelihood.shape == (3, N)
        tree = to_datatree(model, guide, (x, y), num_samples=6)
        assert tree["log_likelihood"]["obs"].dims[:2] == ("chain", "draw")
        assert tree["observed_data"]["obs"].shape == y.shape
        scores = tree["log_likelihood"]["obs"].values.reshape(-1, N)
        assert np.isfinite(scores).all()
        if not hasattr(guide, "observed_distributions"):
            # through the network, without the scale of a subsampled plate
            for s in range(3):
                values = {n: v[s] for n, v in prediction.draws.items()}
                trace = poutine.trace(poutine.condition(model, values)).get_trace(x, y)
                expected = trace.nodes["obs"]["fn"].log_prob(y)
                assert_close(prediction.log_likelihood[s], expected, rtol=1e-10)
        assert to_inference_data(model, guide, (x, y), num_samples=6) is not None

    def test_density_scores_its_own_draws(self, case: str) -> None:
        if not self.has_density:
            pytest.skip("the guide has no density")
        _, guide, x, y = self.fitted(case)
        trace = poutine.trace(guide).get_trace(x, y)
        values = {
            n: site["value"]
            for n, site in trace.iter_stochastic_nodes()
            if not site["infer"].get("is_auxiliary")
        }
        trace.compute_log_prob()
        total = trace.log_prob_sum()
        assert torch.isfinite(total)
        replayed = poutine.trace(poutine.replay(guide, trace)).get_trace(x, y)
        assert_close(replayed.log_prob_sum(), total, rtol=1e-10)
        assert all(torch.equal(replayed.nodes[n]["value"], v) for n, v in values.items())
