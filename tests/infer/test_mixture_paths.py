# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A guide of one component is evaluated in three ways (direct, in traces, in plates), which must be the same number."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import Adam
from torch import nn

from pyro_bnn.infer import Mixture_ELBO, fit
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.infer.mixture.check import ComponentLoopWarning
from pyro_bnn.infer.mixture.runs import Step
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.nn import bayesian_, rank1_
from tests.common import assert_close


def network_model(convert: Any) -> Any:
    net = convert(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))

    def model(x, y=None):
        sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 0.5))
        f = net(x).squeeze(-1)
        with pyro.plate("data", 60, subsample_size=len(x)):
            return pyro.sample("obs", dist.Normal(f, sigma), obs=y)

    return model


def everything(x, y=None):
    """Plates, masks, scales, factors, deterministic and constrained sites, several observations."""
    with pyro.plate("groups", 2):
        level = pyro.sample("level", dist.Normal(0.0, 2.0).mask(torch.tensor([True, False])))
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with poutine.scale(scale=0.3):
        slope = pyro.sample("slope", dist.Cauchy(torch.zeros(3), 1.0).to_event(1))
    simplex = pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    pyro.factor("penalty", -(level**2).sum(-1, keepdim=True))
    mean = pyro.deterministic("mean", (x * slope).sum(-1) + level[..., :1])
    with pyro.plate("data", 60, subsample_size=len(x)):
        pyro.sample("obs", dist.StudentT(4.0, mean, rate.sum(-1, keepdim=True)), obs=y)
        with poutine.mask(mask=y > 0):
            pyro.sample("label", dist.Categorical(simplex), obs=(y > 1).long())


CASES = {
    "rank-1": (lambda: network_model(rank1_), {}),
    "full weights": (lambda: network_model(bayesian_), {}),
    "packed": (lambda: network_model(lambda net: bayesian_(net, packed=True)), {}),
    "everything": (lambda: everything, {}),
    "families": (
        lambda: everything,
        {"component": {"slope": "cauchy", "rate": "lognormal", "simplex": "delta", "level": "point"}},
    ),
    "shared scales": (lambda: everything, {"scale": "shared"}),
    "low rank": (lambda: network_model(bayesian_), {"component": {"*.weight": "low_rank", "*": "normal"}}),
}


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize(
    "options", [{}, {"kl": "sum", "likelihood": "log_mixture"}, {"kl": "exact", "entropy_weight": 0.1}]
)
def test_same_loss_and_gradients(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    build, arguments = CASES[name]
    model = build()
    x = torch.randn(20, 3)
    y = x.sum(-1) + 0.1 * torch.randn(20)
    if options.get("likelihood") and name.startswith(("every", "fam", "shar")):
        options = {"kl": "sum"}  # the factor lies outside of the data plate
    guide = AutoMixture(model, 1, **arguments).initialize(x, y)
    parameters = list(guide.parameters())
    found = {}
    for way in ("direct", "traces", "plates"):
        with monkeypatch.context() as patch:
            if way != "direct":
                patch.setattr(Mixture_ELBO, "_is_direct", lambda *_: False)
            if way == "plates":
                patch.setattr(Step, "is_single", False)
            elbo = Mixture_ELBO(kl_scale=0.7, **options)
            with pyro.validation_enabled(False), local_parameters():
                if way == "direct":
                    assert elbo._is_direct(guide, [guide]) == (name != "low rank")
                torch.manual_seed(3)
                loss = elbo(model, guide)(x, y)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found[way] = loss, gradients, elbo.parts
    for way in ("traces", "plates"):
        assert_close(found["direct"][0], found[way][0], rtol=1e-12)
        for a, b in zip(found["direct"][1], found[way][1], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert found["direct"][2] == pytest.approx(found[way][2], rel=1e-12)


def test_statements_are_made_for_who_listens() -> None:
    """Under a handler (as SVI has one, for the parameters) the guide is called."""
    model = network_model(bayesian_)
    x, y = torch.randn(20, 3), torch.randn(20)
    guide = AutoMixture(model, 1).initialize(x, y)
    with pyro.validation_enabled(False), poutine.trace(param_only=True) as capture:
        Mixture_ELBO()(model, guide)(x, y)
    names = {name.rpartition(".")[2] for name in capture.trace.nodes}
    assert {"loc", "scale"} <= names


def test_fit_finds_the_same_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network_model(bayesian_)
    x, y = torch.randn(60, 3), torch.randn(60)
    found = []
    for direct in (True, False):
        if not direct:
            monkeypatch.setattr(Mixture_ELBO, "_is_direct", lambda *_: False)
        pyro.set_rng_seed(0)
        guide = AutoMixture(model, 1)
        result = fit(model, guide, (x, y), num_steps=30, optim=0.01, progress_bar=False)
        found.append((result.losses, guide.loc.detach()))
    assert_close(found[0][0], found[1][0], rtol=1e-9)
    assert_close(found[0][1], found[1][1], rtol=1e-8, atol=1e-10)


def test_model_that_does_not_broadcast_over_components_runs_them_one_by_one() -> None:
    """``x @ weight`` gives a batch shape of three dimensions: said once, and the bound is that of the model."""
    x, y = torch.randn(6, 3), torch.randint(0, 2, (6,))

    def make(product: Any) -> Any:
        def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
            weight = pyro.sample("weight", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Categorical(logits=product(x, weight)), obs=y)

        return model

    wrong = make(lambda x, weight: x @ weight)
    right = make(lambda x, weight: (x.unsqueeze(-2) @ weight).squeeze(-2))
    for model in (wrong, right):
        guide = AutoMixture(model, 4, component="delta").initialize(x, y)
        elbo = Mixture_ELBO()
        if model is wrong:
            with pytest.warns(
                ComponentLoopWarning, match=r"'obs' has batch shape \(4, 1, 6\).*over components"
            ):
                elbo.differentiable_loss(model, guide, x, y)
        # points have no randomness, so the bound is the mean of the members' log joint densities
        loss = elbo.differentiable_loss(model, guide, x, y)
        members = guide.sample_posterior((4, 1), by_component=True)["weight"][:, 0]
        expected = -torch.stack(
            [
                dist.Categorical(logits=x @ w).log_prob(y).sum() + dist.Normal(0.0, 1.0).log_prob(w).sum()
                for w in members
            ]
        ).mean()
        assert_close(loss.detach(), expected.detach(), rtol=1e-12)


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("how", ["direct", "SVI"])
def test_data_of_a_site_that_the_guide_draws_are_refused(how: str, K: int) -> None:
    def model(y, z=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0), obs=z)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    y, z = torch.randn(5), torch.tensor(3.0)
    guide = AutoMixture(model, K).initialize(y)
    elbo = Mixture_ELBO()
    run = elbo(model, guide) if how == "direct" else SVI(model, guide, Adam({"lr": 0.01}), elbo).step
    with pytest.raises(
        ValueError, match="site 'w' is observed in this call of the model, but the guide draws it"
    ):
        run(y, z)
    run(y)
