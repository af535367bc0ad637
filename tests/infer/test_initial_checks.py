# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""The first batch is checked by initialize as by fit, and errors name the site or argument."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_bnn.infer import fit, nuts
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoLaplaceMixture, AutoMixture
from tests.infer.models import linear_data, linear_model


def of(family: Callable[[Tensor], Any]) -> Callable[..., Any]:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[-1], 4), 1.0).to_event(2))
        logits = x @ weight
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", family(logits), obs=y)

    return model


bernoulli = of(lambda f: dist.Bernoulli(logits=f[:, 0]))
categorical = of(lambda f: dist.Categorical(logits=f))
poisson = of(lambda f: dist.Poisson(f[:, 0].exp()))
X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(6, 2)
ONES = torch.ones(6)

WRONG: dict[str, tuple[Any, tuple[Any, ...], type[Exception], str]] = {
    "integer labels": (bernoulli, (X, ONES.long()), ValueError, r"'obs'.*Bernoulli.*torch.int64.*y.to"),
    "boolean labels": (bernoulli, (X, ONES.bool()), ValueError, r"'obs'.*Bernoulli.*torch.bool"),
    "binary labels": (bernoulli, (X, 2 * ONES), ValueError, r"'obs': 6 of 6 observations, \[2.0"),
    "too large classes": (categorical, (X, 4 * ONES.long()), ValueError, r"'obs': 6 of 6 observations, \[4"),
    "negative classes": (categorical, (X, -ONES.long()), ValueError, r"'obs'.*\[-1.*0 to C - 1"),
    "negative counts": (poisson, (X, -ONES), ValueError, r"'obs'.*support.*Poisson"),
    "lengths": (bernoulli, (X, ONES[:4]), ValueError, r"'obs'.*shape \(4,\).*\(6,\)"),
    "columns": (bernoulli, (X, ONES[:, None]), ValueError, r"'obs'.*shape \(6, 1\).*\(6,\)"),
    "empty": (bernoulli, (X[:0], ONES[:0]), ValueError, "argument 0 of the model is empty"),
    "numpy": (bernoulli, (X.numpy(), ONES.numpy()), TypeError, "argument 0 of the model is a numpy array"),
    "numpy targets": (linear_model, (X, np.ones(6)), TypeError, r"'obs'.*numpy.ndarray.*as_tensor"),
    "no observation": (bernoulli, (X,), ValueError, "no observed site.*'obs'"),
    "not finite": (bernoulli, (X / 0, ONES), ValueError, "argument 0.*non-finite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_guides_check_the_first_batch(case: str) -> None:
    model, args, error, message = WRONG[case]
    for make in (AutoLaplace, AutoHessianFreeLaplace, lambda model: AutoLaplaceMixture(model, 2)):
        guide = make(model)
        with pytest.raises(error, match=message):
            guide.initialize(*args)
        assert guide.prototype_trace is None
    for make in (AutoLaplace, AutoNormal, lambda model: AutoMixture(model, 1)):
        with pytest.raises(error, match=message):
            fit(model, make(model), args, num_steps=1, progress_bar=False)
    if case != "no observation":
        with pytest.raises(error, match=message):
            nuts(model, args, num_samples=1, warmup_steps=1, num_chains=1, progress_bar=False)


def test_masked_observations_may_have_any_value() -> None:
    def model(x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> Any:
        with poutine.mask(mask=torch.ones(len(x), dtype=torch.bool) if mask is None else mask):
            return categorical(x, y)

    labels = torch.tensor([0, 1, 2, 3, -100, -100])
    keep = labels >= 0
    guide = AutoLaplace(poutine.block(model, hide=[])).initialize(X, labels.clamp(min=0), keep)
    assert len(guide.loc) == 8
    with pytest.raises(ValueError, match=r"'obs': 2 of 6 observations, \[-100"):
        AutoLaplace(model).initialize(X, labels)


def test_networks_without_latent_sites_say_how_to_get_them() -> None:
    net = nn.Linear(2, 1)

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        level = pyro.param("level", torch.zeros(()))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(net(x).squeeze(-1) + level, 1.0), obs=y)

    for make in (AutoLaplace, AutoNormal, lambda model: AutoMixture(model, 2)):
        with pytest.raises(ValueError, match=r"samples no latent site.*bayesian_\(net\).*rank1_\(net\)"):
            fit(model, make(model), (X, ONES), num_steps=1, progress_bar=False)
    with pytest.raises(ValueError, match="bayesian_"):
        AutoLaplace(model).initialize(X, ONES)
    assert fit(model, lambda x, y: None, (X, ONES), num_steps=1, progress_bar=False).num_steps == 1


@pytest.mark.parametrize(
    "make", [AutoLaplace, AutoHessianFreeLaplace, lambda model: AutoLaplaceMixture(model, 2)]
)
def test_discrete_latents_are_named(make: Callable[..., Any]) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> Any:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            group = pyro.sample("group", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            return pyro.sample("obs", dist.Normal(x @ weight + group, 1.0), obs=y)

    with pytest.raises(
        ValueError, match=r"'group' \(Bernoulli\) is discrete.*MixtureSameFamily.*TraceEnum_ELBO"
    ):
        make(model).initialize(X, ONES)


def test_a_failed_start_can_be_repeated() -> None:
    x, y = linear_data()
    guide = AutoLaplace(linear_model)
    with pytest.raises(ValueError, match="shape"):
        guide.initialize(x, y[:5])
    guide.initialize(x, y)
    assert len(guide.loc) == 3
