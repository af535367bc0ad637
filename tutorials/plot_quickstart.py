# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Quickstart
==========

Five posteriors of one Pyro model on real data (disease progression of 442 diabetes patients from ten measurements),
compared by their predictions and exported to ArviZ.
"""

import os
import time
import warnings

import arviz as az
import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_sample
from pyro.nn import PyroModule
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from tqdm.auto import tqdm

from pyro_bnn.diagnostics import metrics, plots, to_datatree, to_inference_data
from pyro_bnn.infer import Mixture_ELBO, fit, posterior_predictive
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoMixture, PointEstimateWarning
from pyro_bnn.nn import FanInNormal, bayesian_, rank1_

SMOKE = "PYRO_BNN_SMOKE" in os.environ
STEPS = 30 if SMOKE else 2500
DRAWS = 40 if SMOKE else 400
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # the network is small: threads cost more than they bring
pyro.set_rng_seed(1)

# %%
# Data
# ----
#
# Half of the patients train, half test. Inputs and target are standardised with the training half's mean and standard
# deviation.

features, target = load_diabetes(return_X_y=True)
split = train_test_split(features, target, test_size=0.5, random_state=0)
x_train, x_test, y_train, y_test = (torch.as_tensor(part, dtype=torch.get_default_dtype()) for part in split)
x_test = (x_test - x_train.mean(0)) / x_train.std(0)
x_train = (x_train - x_train.mean(0)) / x_train.std(0)
y_test = (y_test - y_train.mean()) / y_train.std()
y_train = (y_train - y_train.mean()) / y_train.std()
train, test = (x_train, y_train), (x_test, y_test)


# %%
# One model
# ---------
#
# An ordinary Pyro model: a network, a noise scale with a prior, a plate. ``bayesian_`` and ``rank1_`` decide which of
# the network's weights are random.


class Regression(PyroModule):
    """A network as the mean of a Normal with unknown noise."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, y=None):
        f = self.net(x).squeeze(-1)
        sigma = pyro.sample("sigma", dist.LogNormal(-0.5, 0.5))
        with pyro.plate("data", x.shape[0]):
            return pyro.sample("obs", dist.Normal(f, sigma), obs=y)


def network():
    """Ten inputs, 50 tanh units, one output."""
    return torch.nn.Sequential(torch.nn.Linear(10, 50), torch.nn.Tanh(), torch.nn.Linear(50, 1))


model = Regression(bayesian_(network(), prior=FanInNormal()))
rank1_model = Regression(rank1_(network(), prior=dist.Normal(1.0, 0.1), weight_prior=FanInNormal()))

predictions, trees, rows = {}, {}, {}


def evaluate(name, model, guide, start):
    """Predicts the test split, scores it, and exports the posterior with the training split's log likelihood."""
    prediction = posterior_predictive(model, guide, test, num_samples=DRAWS)
    elapsed = time.perf_counter() - start
    predictions[name] = prediction
    rows[name] = {
        "RMSE": metrics.rmse(prediction),
        "NLL": metrics.nll(prediction),
        "CRPS": metrics.crps_normal(prediction.mean, prediction.variance, y_test),
        "50 %": metrics.interval_coverage(prediction, level=0.5),
        "90 %": metrics.interval_coverage(prediction, level=0.9),
        "seconds": elapsed,
        "parameters": sum(p.numel() for p in [*model.parameters(), *guide.parameters()]),
    }
    trees[name] = to_inference_data(model, guide, train, num_samples=DRAWS)


progress = tqdm(total=5, desc="posteriors", unit="posterior")

# %%
# MAP
# ---
#
# :class:`~pyro_bnn.infer.autoguide.AutoLaplace` is a Delta until it is told otherwise: fitting it gives the MAP, and
# ``polish`` takes that to the last digits.

start = time.perf_counter()
laplace = AutoLaplace(model, init_loc_fn=init_to_sample)
result = fit(model, laplace, train, num_steps=STEPS, optim=0.02)
laplace.polish(train)
map_seconds = time.perf_counter() - start
with warnings.catch_warnings():
    warnings.simplefilter(
        "ignore", PointEstimateWarning
    )  # it says that all draws are the same, which a MAP is
    evaluate("MAP", model, laplace, start)
trees.pop("MAP")  # equal draws have no leave-one-out estimate
progress.update()

# %%
# Laplace
# -------
#
# A Gaussian around the MAP with the curvature of all 602 latents, noise scale included. Predictions go through the
# linearised network.

laplace.laplace_approximation(train)
print(f"\n{laplace.map_report}\nlog evidence: {laplace.log_evidence():.2f}")
evaluate("Laplace", model, laplace, start)
progress.update()

# %%
# Hessian-free Laplace
# --------------------
#
# The same idea with the exact Hessian, but only through products with it: one conjugate-gradient solve per input at
# which we want to predict. Every second input is enough here: the covariance of the network's outputs has low rank.

start = time.perf_counter() - map_seconds  # the MAP is part of the method
hfl = AutoHessianFreeLaplace(model, tolerance=1e-5).initialize(*train)
hfl.load_state_dict({"loc": laplace.state_dict()["loc"]})
targets = torch.cat([x_train, x_test])[:: 20 if SMOKE else 2]
hfl.laplace_approximation(train, targets=(targets,))
print(f"\n{hfl.result.products} products, rank {hfl.factor.shape[1]}")
evaluate("HFL", model, hfl, start)
progress.update()

# %%
# Rank-1 mixture
# --------------
#
# The weight matrices are shared, with a prior; four components have Gaussian factors on their rows and columns.

start = time.perf_counter()
rank1 = AutoMixture(rank1_model, num_components=4, rest="normal")
fit(rank1_model, rank1, train, num_steps=STEPS, optim=0.01, elbo=Mixture_ELBO())
evaluate("rank-1 (K = 4)", rank1_model, rank1, start)
progress.update()

# %%
# Deep ensemble
# -------------
#
# The first model again, under a mixture of four Deltas over all weights.

start = time.perf_counter()
ensemble = AutoMixture(model, num_components=4, component="delta", init_loc_fn=init_to_sample)
fit(model, ensemble, train, num_steps=STEPS, optim=0.01, elbo=Mixture_ELBO())
evaluate("ensemble (4)", model, ensemble, start)
progress.update()
progress.close()

# %%
# Scores on the test split
# ------------------------
#
# Lower is better; coverages should be 50 % and 90 %. The last column is the mean difference in NLL to the MAP with its
# standard error over test points, paired. The data are noisy and the prior is strong, so the differences are small; the
# members of the ensemble in particular all find nearly the same function as the MAP.

table = pd.DataFrame(rows).T
log_score = {
    name: torch.logsumexp(p.log_likelihood, 0) - torch.tensor(float(len(p.log_likelihood))).log()
    for name, p in predictions.items()
}
difference = {name: log_score["MAP"] - score for name, score in log_score.items()}
table["NLL - MAP"] = [f"{d.mean():+.4f} ± {d.std() / len(d) ** 0.5:.4f}" for d in difference.values()]
table["parameters"] = table["parameters"].astype(int)
formats = {
    "RMSE": "{:.3f}",
    "NLL": "{:.4f}",
    "CRPS": "{:.3f}",
    "50 %": "{:.1%}",
    "90 %": "{:.1%}",
    "seconds": "{:.1f}",
}
print("\n" + table.to_string(formatters={k: v.format for k, v in formats.items()}))

# %%
# ArviZ
# -----
#
# Every posterior exports to what the installed ArviZ reads, with the log likelihood of each training point under each
# draw: summaries, leave-one-out cross-validation and model comparison follow. The comparison leaves out the MAP and the
# ensemble: a handful of point estimates cannot tell how they would change without an observation.

print("\n", az.summary(trees["Laplace"], var_names=["sigma"], kind="stats"))
print("\n", az.loo(trees["Laplace"]))
comparison = az.compare({name: tree for name, tree in trees.items() if name != "ensemble (4)"})
print("\n", comparison.to_string())

# %%
# The file holds one posterior with all its groups; any ArviZ opens it again.

tree = to_datatree(model, laplace, train, num_samples=DRAWS)
tree.to_netcdf("quickstart.nc", engine="h5netcdf")
print("\nquickstart.nc holds", ", ".join(tree.children))
print(az.summary(az.from_netcdf("quickstart.nc"), var_names=["sigma"], kind="stats"))

# %%
# Intervals and calibration
# -------------------------

fig, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
for ax, (name, prediction) in zip(axes.flat, predictions.items(), strict=False):
    plots.plot_intervals(prediction, level=0.9, ax=ax)
    ax.set(title=f"{name}: 90 % intervals", ylim=(-3.5, 3.5))
plots.plot_calibration(predictions, ax=axes.flat[5])
axes.flat[5].set_title("calibration")
axes.flat[5].legend()
fig.savefig("quickstart.png", dpi=110)
plt.show()
