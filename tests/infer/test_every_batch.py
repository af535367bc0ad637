# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Every operation that reads data checks the observations of every batch, with one text."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_bnn.diagnostics import log_weights, to_datatree
from pyro_bnn.infer import (
    EarlyStopping,
    Mixture_ELBO,
    fit,
    hfl,
    load_guide,
    nuts,
    posterior_predictive,
    predictive_moments,
    save_guide,
)
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoLaplaceMixture, AutoMixture
from pyro_bnn.infer.evidence import differentiable_evidence, train_with_evidence

X = torch.linspace(-1.0, 1.0, 24, dtype=torch.float64).reshape(12, 2)


def counts(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("data", 12, subsample_size=len(x)):
        return pyro.sample("obs", dist.Poisson((x * w).sum(-1).exp()), obs=y)


def classes(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2, 3, dtype=x.dtype), 1.0).to_event(2))
    with pyro.plate("data", 12, subsample_size=len(x)):
        return pyro.sample("obs", dist.Categorical(logits=(x.unsqueeze(-1) * w).sum(-2)), obs=y)


def batches(y, last=4):
    """Three batches of four rows; the third may have fewer observations than rows."""
    return [(X[:4], y[:4]), (X[4:8], y[4:8]), (X[8:], y[8 : 8 + last])]


Y = torch.tensor([0.0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2], dtype=torch.float64)
HALF = Y.clone()
HALF[9] = 0.5
LABELS = Y.long()
NEGATIVE = LABELS.clone()
NEGATIVE[9] = -1
BAD = {
    "a fraction": (counts, Y, batches(HALF), r"'obs': 1 of 4 observations, \[0.5\] among them, lie outside"),
    "a label": (classes, LABELS, batches(NEGATIVE), r"'obs': 1 of 4 observations, \[-1\] among them, lie"),
    "one for all": (counts, Y, batches(Y, 1), r"'obs': the observation has shape \(1,\), .* count 4 times"),
}


def fitted(model, y, **options):
    return AutoLaplace(model, **options).initialize(X, y).polish((X, y)).laplace_approximation((X, y))


def point(model, y, **options):
    return AutoLaplace(model, **options).initialize(X, y).polish((X, y))


def hessian_free(model, y):
    return AutoHessianFreeLaplace(model).initialize(X, y).polish((X, y))


def mixture(model, y):
    return AutoMixture(model, 2).initialize(X, y)


def draws(model, y):
    return fitted(model, y).sample_posterior((6,))


OPERATIONS = {
    "polish": lambda m, y, d: AutoLaplace(m).initialize(X, y).polish(d),
    "polish in float64": lambda m, y, d: AutoLaplace(m).initialize(X, y).polish(d, float64=True),
    "polish of a mixture": lambda m, y, d: AutoLaplaceMixture(m, 2).initialize(X, y).polish(d),
    "negative log joint": lambda m, y, d: point(m, y).negative_log_joint(d),
    "full": lambda m, y, d: point(m, y).laplace_approximation(d),
    "diagonal": lambda m, y, d: point(m, y, structure="diagonal").laplace_approximation(d),
    "low rank": lambda m, y, d: point(m, y, structure="low_rank").laplace_approximation(d),
    "hessian": lambda m, y, d: point(m, y, curvature="hessian").laplace_approximation(d),
    "more data": lambda m, y, d: fitted(m, y).laplace_approximation(d, override=False),
    "hfl": lambda m, y, d: hfl.solve(point(m, y), d, functional=lambda z: z["w"].sum()),
    "hfl with the GGN": lambda m, y, d: hfl.solve(point(m, y), d, (X,), curvature="ggn"),
    "HFL guide": lambda m, y, d: hessian_free(m, y).laplace_approximation(d, (X,)),
    "evidence": lambda m, y, d: fitted(m, y).log_evidence(data=d),
    "differentiable evidence": lambda m, y, d: differentiable_evidence(fitted(m, y), d),
    "evidence in training": lambda m, y, d: train_with_evidence(point(m, y), d, epochs=1),
    "validation": lambda m, y, d: fitted(m, y).optimize_hyperparameters(d, method="validation"),
    "predictive of draws": lambda m, y, d: posterior_predictive(m, draws(m, y), d),
    "predictive of a guide": lambda m, y, d: posterior_predictive(m, fitted(m, y), d, num_samples=6),
    "moments": lambda m, y, d: predictive_moments(m, draws(m, y), d),
    "export": lambda m, y, d: to_datatree(m, draws(m, y), d),
    "export of a guide": lambda m, y, d: to_datatree(m, fitted(m, y), d, num_samples=6),
    "weights": lambda m, y, d: log_weights(m, mixture(m, y), d, num_samples=6),
    "fit": lambda m, y, d: fit(m, AutoNormal(m), d, num_epochs=1, progress_bar=False),
    "fit of a mixture": lambda m, y, d: fit(m, mixture(m, y), d, num_epochs=1, progress_bar=False),
    "held out": lambda m, y, d: fit(
        m, AutoNormal(m), (X, y), num_steps=2, callbacks=EarlyStopping(d, every=1), progress_bar=False
    ),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_only_the_third_batch_is_bad(operation, bad):
    model, y, data, message = BAD[bad]
    with pytest.raises(ValueError, match=message) as caught:
        OPERATIONS[operation](model, y, data)
    assert "Pass one value per element" in str(caught.value) or "mask what is missing" in str(caught.value)


def test_nuts_checks_all_rows():
    with pytest.raises(ValueError, match=r"'obs': 1 of 12 observations, \[0.5\] among them"):
        nuts(counts, (X, HALF), num_samples=1, warmup_steps=1, progress_bar=False)


def test_rows_beyond_those_that_show_the_structure():
    """One batch of which only a late row is wrong, after an initialisation on good data."""
    x, y = X.repeat(50, 1), Y.repeat(50)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Poisson((x @ w).exp()), obs=y)

    bad = y.clone()
    bad[-1] = -1.0
    for run in (
        lambda guide: guide.polish((x, bad)),
        lambda guide: guide.laplace_approximation((x, bad)),
        lambda guide: hfl.solve(guide, (x, bad), (x[:2],)),
    ):
        with pytest.raises(ValueError, match=r"\[-1.0\] among them, lie outside the support"):
            run(AutoLaplace(model).initialize(x, y))


def test_validation_off_and_masks_stay_off():
    """What the user has switched off, or masked, is not looked at in later batches either."""

    def unchecked(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
        with pyro.plate("data", 12, subsample_size=len(x)):
            return pyro.sample("obs", dist.Poisson((x @ w).exp(), validate_args=False), obs=y)

    def masked(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
        seen = True if y is None else y != 0.5
        with pyro.plate("data", 12, subsample_size=len(x)), pyro.poutine.mask(mask=seen):
            return pyro.sample("obs", dist.Poisson((x @ w).exp()), obs=y)

    for model in (unchecked, masked):
        guide = AutoLaplace(model).initialize(X, Y).polish(batches(HALF))
        guide.laplace_approximation(batches(HALF))
        hfl.solve(guide, batches(HALF), (X,))
        assert torch.isfinite(guide.log_evidence())


def test_loaded_guides_check_too(tmp_path):
    """A guide that was initialised on stand-in zeros knows that its sites are validated."""
    save_guide(point(counts, Y), tmp_path / "guide.pt")
    guide = load_guide(AutoLaplace(counts), tmp_path / "guide.pt")
    with pytest.raises(ValueError, match=r"\[0.5\] among them, lie outside"):
        guide.laplace_approximation(batches(HALF))


def test_trial_points_may_put_observations_outside():
    """The support of a uniform distribution moves with its latent; only the start must hold the data."""

    def model(y):
        w = pyro.sample("w", dist.Normal(torch.tensor(3.0, dtype=y.dtype), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Uniform(0.0, w), obs=y)

    y = torch.tensor([0.5, 1.9], dtype=torch.float64)
    # -(w - 3)^2 / 2 - 2 log w has its maximum at 2
    guide = AutoLaplace(model, curvature="hessian").initialize(y).polish((y,))
    assert guide.loc.item() == pytest.approx(2.0, abs=1e-5)


def test_the_bound_of_later_batches():
    """Stock evaluation of the bound, without fit."""
    guide = mixture(counts, Y)
    loss = Mixture_ELBO()(counts, guide)
    for batch in batches(Y, 1)[:2]:
        loss(*batch)
    with pytest.raises(ValueError, match="count 4 times"):
        loss(*batches(Y, 1)[2])
