# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
From fit to ArviZ
=================

The whole workflow on the diabetes data of scikit-learn: fit a mixture guide with early stopping and a checkpoint,
interrupt and resume it, predict, split the uncertainty, export to ArviZ, look at chains of *functions*, compare two
posteriors, and load a saved guide into a fresh object.
"""

import os
import tempfile
import warnings
from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from sklearn.datasets import load_diabetes

from pyro_bnn.diagnostics import (
    elbo_gap,
    evaluate,
    functional_k,
    log_weights,
    pareto_k,
    plots,
    prediction_diagnostics,
    prediction_draws,
    table,
    to_inference_data,
)
from pyro_bnn.diagnostics.functional import plot_diversity, plot_prediction_ranks
from pyro_bnn.infer import (
    Checkpoint,
    EarlyStopping,
    Mixture_ELBO,
    fit,
    load_guide,
    posterior_predictive,
    predictive_moments,
    save_guide,
)
from pyro_bnn.infer.autoguide import AutoLaplace, AutoMixture
from pyro_bnn.nn import bayesian_

SMOKE = "PYRO_BNN_SMOKE" in os.environ
STEPS = 60 if SMOKE else 3000
DRAWS = 80 if SMOKE else 800
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # the matrices are small
pyro.set_rng_seed(0)
warnings.filterwarnings("ignore", module="arviz")

# %%
# Data, standardised, in three parts.

features, target = load_diabetes(return_X_y=True)
features = torch.as_tensor(features)
features = (features - features.mean(0)) / features.std(0)
target = torch.as_tensor(target)
target = (target - target.mean()) / target.std()
order = torch.randperm(len(target))
train, held_out, test = ((features[i], target[i]) for i in (order[:300], order[300:360], order[360:]))


# %%
# One model for all posteriors.


class Regression(PyroModule):
    """A network as the mean of a Normal whose scale is unknown."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, y=None):
        mean = self.net(x).squeeze(-1)
        sigma = pyro.sample("sigma", dist.LogNormal(mean.new_tensor(-0.5), mean.new_tensor(0.5)))
        with pyro.plate("patient", x.shape[0], dim=-1):
            return pyro.sample("progression", dist.Normal(mean, sigma), obs=y)


def network():
    """One hidden layer."""
    return torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.Tanh(), torch.nn.Linear(10, 1))


# %%
# Fit, be interrupted, resume
# ---------------------------
#
# The first run is stopped after a sixth of its steps; the second call finds the checkpoint and continues with the same
# random numbers, so the result is that of an uninterrupted run.

folder = Path(tempfile.mkdtemp())
model = Regression(bayesian_(network(), packed=True))
mixture = AutoMixture(model, num_components=4, component="normal", init_scale=0.05)
stopping = EarlyStopping(held_out, metric="nll", every=max(STEPS // 60, 1), patience=15)
settings = {"num_steps": STEPS, "optim": 0.01, "elbo": Mixture_ELBO()}


def checkpoint():
    """Saves every tenth of the run."""
    return Checkpoint(folder / "run.ckpt", every_steps=STEPS // 10)


first = fit(
    model, mixture, train, **settings, callbacks=[stopping, lambda state: state.step == STEPS // 6],
    checkpoint=checkpoint(),
)  # fmt: skip
print("first run: ", first.num_steps, "steps,", first.stop_reason)
result = fit(
    model, mixture, train, **settings, callbacks=[stopping, lambda state: False], checkpoint=checkpoint()
)
print("second run:", result.num_steps, "steps,", result.stop_reason)

# %%
# A Laplace approximation of the same model, for comparison.

laplace_model = Regression(bayesian_(network()))
laplace = AutoLaplace(laplace_model)
fit(laplace_model, laplace, train, num_steps=STEPS // 2, optim=0.01, progress_bar=False)
laplace.polish(train).laplace_approximation(train)

# %%
# Predict
# -------

predictions = {
    "mixture": posterior_predictive(model, mixture, test, num_samples=DRAWS),
    "laplace": posterior_predictive(laplace_model, laplace, test, num_samples=DRAWS),
}
print(table({name: evaluate(prediction) for name, prediction in predictions.items()}))

moments = predictive_moments(model, mixture, test, num_samples=DRAWS)["progression"]
share = float((moments.epistemic / moments.total).mean())
print(f"epistemic share of the predictive variance: {share:.1%}")

figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
result.plot(ax=axes[0, 0])
plots.plot_calibration(predictions, ax=axes[0, 1]).legend()
plots.plot_pit(predictions["mixture"], ax=axes[1, 0])
plots.plot_intervals(predictions["mixture"], ax=axes[1, 1])

# %%
# ArviZ
# -----
#
# Components are chains. R-hat of the noise scale compares the components; the weights are left out.

exports = {
    "mixture": to_inference_data(model, mixture, train, num_samples=DRAWS, prior_samples=20),
    "laplace": to_inference_data(laplace_model, laplace, train, num_samples=DRAWS),
}
print(az.summary(exports["mixture"], var_names=["sigma"]).to_string())
print(az.compare(exports).to_string())
exports["mixture"].to_netcdf(str(folder / "mixture.nc"))
print("groups on disk:", *(name.strip("/") for name in az.from_netcdf(str(folder / "mixture.nc")).groups()))

# %%
# Chains of functions
# -------------------
#
# Weights of different components have nothing to do with each other. Their predictions do.

functions = prediction_draws(model, mixture, test, num_samples=DRAWS)
diagnostics = prediction_diagnostics(functions)
r_hat = diagnostics["progression_r_hat"].values
print(f"R-hat of predictions: median {np.median(r_hat):.3f}, largest {r_hat.max():.3f}")
figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
plot_prediction_ranks(functions, 0, ax=axes[0]).legend()
plot_diversity(functions, ax=axes[1])

# %%
# How good is the approximation?
# ------------------------------
#
# In weight space importance sampling fails, as it does for every network; for the expectations that are reported it is
# better to look at them.

draws, log_w = log_weights(laplace_model, laplace, train, DRAWS)
means = posterior_predictive(laplace_model, draws, test).mean
print(f"k-hat of the weights: {pareto_k(log_w):.2f}")
print(f"k-hat of predictions: median {np.median(functional_k(log_w, means)):.2f}")
print({name: round(value, 1) for name, value in elbo_gap(log_w).items()})

# %%
# Save and load
# -------------

save_guide(mixture, folder / "mixture.pt")
fresh = load_guide(AutoMixture(model, num_components=4), folder / "mixture.pt")
assert torch.equal(fresh.median()["sigma"], mixture.median()["sigma"])
