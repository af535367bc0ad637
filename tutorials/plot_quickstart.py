# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Quickstart
==========

A network learns to tell two cultivars of wine apart. Then it is asked about 48 wines of a third one, which it has never
seen. The MAP, that is the trained network by itself, is more
than 95 % sure of its answer for most of them. Five posteriors over the
weights of the same network answer the same question, and differ.
"""

import os
import time
import warnings

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_sample
from pyro.nn import PyroModule
from sklearn.datasets import load_wine

from pyro_bnn.diagnostics import metrics, table, to_datatree
from pyro_bnn.infer import Mixture_ELBO, fit, posterior_predictive
from pyro_bnn.infer.autoguide import (
    AutoHessianFreeLaplace,
    AutoLaplace,
    AutoLaplaceMixture,
    AutoMixture,
    PointEstimateWarning,
)
from pyro_bnn.nn import FanInNormal, bayesian_, rank1_

SMOKE = "PYRO_BNN_SMOKE" in os.environ
STEPS = 30 if SMOKE else 1500
DRAWS = 40 if SMOKE else 400
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # the network is small: threads cost more than they bring
pyro.set_rng_seed(0)

# %%
# Data
# ----
#
# Two measurements of 178 wines from three cultivars (scikit-learn's ``load_wine``), so that everything can be seen in
# a plane. Of the 130 wines of the first two cultivars 60 train, 30 choose the width of the prior, 40 test. The third
# cultivar takes no part before the end.

measurements, cultivar = (torch.tensor(values) for values in load_wine(return_X_y=True))
features = measurements[:, [6, 9]]  # flavanoids, colour intensity
order = torch.randperm(130, generator=torch.Generator().manual_seed(0))
known, label = features[cultivar < 2][order], cultivar[cultivar < 2][order]
center, scale = known[:60].mean(0), known[:60].std(0)
known, unseen = (known - center) / scale, (features[cultivar == 2] - center) / scale
train, validation, test = zip(known.split([60, 30, 40]), label.split([60, 30, 40]), strict=True)


# %%
# One model
# ---------
#
# An ordinary Pyro model: a network, a plate, an observation. ``bayesian_`` makes all weights of a torch network random.


class Classifier(PyroModule):
    """A network as the logits of a class."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, y=None):
        logits = self.net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)


def network():
    """Two inputs, two hidden layers of 16 smooth rectified units, two classes."""
    return torch.nn.Sequential(
        torch.nn.Linear(2, 16), torch.nn.SiLU(), torch.nn.Linear(16, 16), torch.nn.SiLU(), torch.nn.Linear(16, 2)
    )  # fmt: skip


answers, seconds = {}, {}
line = [torch.linspace(-3.7, 2.7, 70), torch.linspace(-2.2, 6.0, 70)]
plane = torch.cartesian_prod(*line)
start = time.perf_counter()


def ask(name, probabilities):
    """Keeps the class probabilities on the plane, for the test wines and for the unseen ones, and the time so far."""
    seconds[name] = time.perf_counter() - start
    answers[name] = [probabilities(x).detach() for x in (plane, test[0], unseen)]


def by_draws(model, guide):
    """Class probabilities, averaged over draws of the weights."""
    return lambda x: posterior_predictive(model, guide, (x,), num_samples=DRAWS).mean.mean(0)


def point_estimate():
    """Inside, no warning says what is known here: all draws of a MAP are the same."""
    return warnings.catch_warnings(action="ignore", category=PointEstimateWarning)


def linearized(guide):
    """Class probabilities of the network linearised in its weights, in closed form."""
    return lambda x: guide.predictive(x)["obs"].probs


# %%
# MAP
# ---
#
# A Laplace guide is a Delta until it is told otherwise: fitting it gives the MAP. The validation rows choose the width
# of the prior by the MAP's log likelihood; all other methods take that width.

maps, losses = {}, {}
for width in (2.0, 4.0, 8.0):
    model = Classifier(bayesian_(network(), prior=FanInNormal(width)))
    maps[width] = model, AutoLaplace(model, init_loc_fn=init_to_sample)
    fit(*maps[width], train, num_steps=STEPS, optim=0.01)
    maps[width][1].polish(train)
    with point_estimate():
        losses[width] = metrics.nll(posterior_predictive(*maps[width], validation, num_samples=1))
width = min(losses, key=losses.get)
print("validation NLL:", {width: round(loss, 3) for width, loss in losses.items()})

model, laplace = maps[width]
start += (time.perf_counter() - start) * 2 / 3  # the time of one of the three
with point_estimate():
    ask("MAP", by_draws(model, laplace))

# %%
# Laplace
# -------
#
# A Gaussian around the MAP with the curvature of all weights, here the full generalised Gauss-Newton matrix. Predictions
# go through the linearised network.

start = time.perf_counter() - seconds["MAP"]  # the MAP is a part of the method
laplace.laplace_approximation(train)
print(laplace.map_report)
ask("Laplace", linearized(laplace))

# %%
# Hessian-free Laplace
# --------------------
#
# The same Gaussian without its matrix: products with the curvature, and a conjugate-gradient solve for the points where
# we are going to ask. It is made for networks whose matrix does not fit; here it must lie on top of Laplace.

start = time.perf_counter() - seconds["MAP"]
hfl = AutoHessianFreeLaplace(model, curvature="ggn").initialize(*train)
hfl.load_state_dict({"loc": laplace.state_dict()["loc"]})
hfl.laplace_approximation(train, targets=(torch.cat([plane[::20], test[0], unseen]),))
print(f"{hfl.result.products} products with the curvature")
ask("Hessian-free Laplace", linearized(hfl))

# %%
# Rank-1 mixture
# --------------
#
# The weight matrices are shared; four components have Gaussian factors on their rows and columns.

start = time.perf_counter()
prior = FanInNormal(width)
rank1_model = Classifier(rank1_(network(), prior=dist.Normal(1.0, 0.5), weight_prior=prior))
rank1 = AutoMixture(rank1_model, num_components=4, rest="normal")
fit(rank1_model, rank1, train, num_steps=STEPS, optim=0.02, elbo=Mixture_ELBO())
ask("rank-1 mixture", by_draws(rank1_model, rank1))

# %%
# Deep ensemble
# -------------
#
# The first model under a mixture of five Deltas: five MAPs from five random starts, fitted together.

start = time.perf_counter()
ensemble = AutoMixture(model, num_components=5, component="delta", init_loc_fn=init_to_sample)
fit(model, ensemble, train, num_steps=STEPS, optim=0.01, elbo=Mixture_ELBO())
ask("deep ensemble", by_draws(model, ensemble))

# %%
# Mixture of Laplace approximations
# ---------------------------------
#
# A Gaussian around each member of the ensemble.

mixture = AutoLaplaceMixture.from_modes(model, ensemble, train, train)
ask("mixture of Laplace", by_draws(model, mixture))

# %%
# How sure are they?
# ------------------
#
# Colours are the two cultivars that were learned; where a colour is full, the answer is given with more than 95 %.
# Crosses are the wines of the third cultivar, which is neither.

ORDER = ["MAP", "deep ensemble", "rank-1 mixture", "Laplace", "Hessian-free Laplace", "mixture of Laplace"]
sure = {name: (answers[name][2].amax(-1) > 0.95).double().mean() for name in ORDER}
fig, axes = plt.subplots(2, 3, figsize=(10, 7), sharex=True, sharey=True, layout="constrained")
levels = [0, 0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95, 1]
for ax, name in zip(axes.flat, ORDER, strict=True):
    shade = answers[name][0][:, 1].reshape(70, 70).T
    filled = ax.contourf(*line, shade, levels=levels, cmap="RdBu", vmin=0, vmax=1)
    for c, colour in enumerate(("#7f0000", "#08306b")):
        ax.plot(*train[0][train[1] == c].T, "o", color=colour, ms=5, mec="w", mew=0.6)
    ax.plot(*unseen.T, "x", color="k", ms=6, mew=1.4)
    ax.set_title(f"{name}\nsure of {sure[name]:.0%} of the unseen wines", fontsize=11)
    ax.set(xticks=[], yticks=[])
fig.supxlabel("flavanoids", fontsize=10)
fig.supylabel("colour intensity", fontsize=10)
bar = fig.colorbar(filled, ax=axes, shrink=0.6, ticks=[0.05, 0.5, 0.95])
bar.ax.set_yticklabels(["95 % cultivar 1", "no idea", "95 % cultivar 2"], fontsize=9)
fig.savefig("quickstart.png", dpi=110)
plt.show()

# %%
# On wines like those it was trained on the network by itself is good: the MAP and the ensemble have a negative log
# likelihood of about 0.2 on the test wines, the others up to 0.28. The difference is on the unseen ones. ``> 0.95`` is the
# share of unseen wines that get an answer with more than 95 %, ``AUROC`` how well the confidence tells test wines from
# unseen ones (0.5: not at all).

rows = {}
for name in ORDER:
    _, known_probs, unseen_probs = answers[name]
    rows[name] = {
        "test NLL": -known_probs[range(len(test[1])), test[1]].log().mean(),
        "accuracy": metrics.accuracy(known_probs, test[1]),
        "unseen > 0.95": float(sure[name]),
        "AUROC": metrics.auroc(-known_probs.amax(-1), -unseen_probs.amax(-1)),
        "seconds": seconds[name],
    }
print(table(rows, digits=2))

# %%
# 40 test wines cannot tell methods apart whose likelihoods differ by a few hundredths, and this is one split: a picture of
# what posteriors are for, not a benchmark (:doc:`/evidence` has those). The setup was chosen for the picture, the width of
# the prior by the validation wines.
#
# ArviZ
# -----
#
# Every posterior exports to ArviZ, with the log likelihood of each training row under each draw.

tree = to_datatree(model, laplace, train, num_samples=DRAWS)
tree.to_netcdf("quickstart.nc", engine="h5netcdf")
print("quickstart.nc holds", ", ".join(tree.children))
