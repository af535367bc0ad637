# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Converting a trained network
============================

A torch network that somebody trained already, with its own code and its own loss, becomes Bayesian without training
from scratch: as a Laplace approximation around its weights, or with rank-1 factors that are fine-tuned while the
weights stay frozen. The network is a small residual CNN on scikit-learn's digits.
"""

import copy
import os
import time

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from pyro_bnn.diagnostics import metrics, table
from pyro_bnn.infer import Mixture_ELBO, fit, posterior_predictive
from pyro_bnn.infer.autoguide import AutoLaplace, AutoMixture
from pyro_bnn.nn import FanInNormal, bayesian_, init_to_trained, rank1_

SMOKE = "PYRO_BNN_SMOKE" in os.environ
EPOCHS = 2 if SMOKE else 30
STEPS = 10 if SMOKE else 300
torch.set_num_threads(1)
pyro.set_rng_seed(0)

images, labels = load_digits(return_X_y=True)
images = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8.0 - 1.0
labels = torch.as_tensor(labels)
x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=0.5, random_state=0)
held_out = (x_train[:200], y_train[:200])
x_train, y_train = x_train[200:], y_train[200:]
N = len(x_train)

# %%
# Someone else's network
# ----------------------
#
# With an ordinary ``forward`` and an ordinary training loop. It has no validation set and no early stopping, and ends
# overconfident, as such networks do.


class ResidualCNN(nn.Module):
    """Two convolutions around a skip connection and a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        h = F.relu(self.stem(x))
        h = F.relu(h + self.second(F.relu(self.first(h))))
        return self.head(F.max_pool2d(h, 2).flatten(1))


net = ResidualCNN()
optimizer = torch.optim.Adam(net.parameters(), 0.005)
start = time.process_time()
for _ in range(EPOCHS):
    for index in torch.randperm(N).split(64):
        optimizer.zero_grad()
        F.cross_entropy(net(x_train[index]), y_train[index]).backward()
        optimizer.step()
seconds = {"as trained": time.process_time() - start}
with torch.no_grad():
    trained_logits = net(x_test)
log_probs = {"as trained": trained_logits.log_softmax(-1)}

# %%
# A model around it
# -----------------


def classifier(net):
    """Digits given images."""

    def model(x, y=None):
        logits = net(x)
        with pyro.plate("data", N, subsample=torch.arange(len(x))):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    return model


# %%
# Laplace
# -------
#
# ``bayesian_`` turns the weights into sample sites in place and remembers their values; ``init_to_trained`` starts a
# guide there. The network was trained without a prior, so that its weights are no MAP of this model, which the Newton
# decrement tells; ``map_tolerance`` silences the warning. The curvature at a point is defined all the same. The evidence
# is not: it takes the point for the minimum, and the precision of the prior that it prefers can be far off. 200 images
# that were held out choose a multiplier of that precision better.

batches = list(zip(x_train.split(300), y_train.split(300), strict=True))


def laplace(name, method, **options):
    """A Laplace approximation around the trained weights."""
    start = time.process_time()
    model = classifier(bayesian_(copy.deepcopy(net), prior=FanInNormal()))
    guide = AutoLaplace(model, init_loc_fn=init_to_trained, **options).initialize(x_train[:10], y_train[:10])
    guide.laplace_approximation(batches, map_tolerance=float("inf"))
    guide.optimize_hyperparameters(None if method == "evidence" else held_out, method=method)
    print(f"{name}: {guide.map_report.newton_decrement:.1f} standard deviations from the minimum, prior precision "
          f"times {float(guide.tau.max()):.3g}")  # fmt: skip
    log_probs[name] = guide.predictive(x_test)["obs"].logits.detach().log_softmax(-1)
    seconds[name] = time.process_time() - start
    return guide


last_layer = {"structure": "full", "sites": "last_layer"}
laplace("last layer, evidence", "evidence", **last_layer)
laplace("last layer, held out", "validation", **last_layer)
kronecker = laplace("Kronecker, held out", "validation", structure="kronecker")
unchanged = kronecker.linearized_outputs(x_test)["obs"].mean  # a Categorical normalises its logits
print(f"largest change of a log probability: {float((unchanged - log_probs['as trained']).abs().max()):.1e}")

# %%
# Rank-1 factors on frozen weights
# --------------------------------
#
# ``rank1_`` with ``freeze_base=True`` trains factors and biases alone. With all factors at 1 the network computes what it
# did before.

start = time.process_time()
tuned = rank1_(copy.deepcopy(net), prior=dist.Normal(1.0, 0.3), freeze_base=True)
model = classifier(tuned)
guide = AutoMixture(model, num_components=4, init_scale=0.1)
before = sum(p.numel() for p in net.parameters())
fit(model, guide, (x_train, y_train), num_steps=STEPS, optim=0.005, elbo=Mixture_ELBO(), progress_bar=False)
print(f"{sum(p.numel() for p in guide.parameters())} new numbers beside {before} frozen ones")
prediction = posterior_predictive(model, guide, (x_test, y_test), num_samples=8 if SMOKE else 32)
log_probs["rank-1 (K = 4)"] = prediction.mean.mean(0).log()
seconds["rank-1 (K = 4)"] = time.process_time() - start

# %%
# Scores on the test half
# -----------------------
#
# Seconds are those of training for the first row, and of what came on top for the others.

rows = {}
for name, value in log_probs.items():
    probs = value.exp().unsqueeze(0)
    rows[name] = {
        "nll": metrics.nll(value.gather(1, y_test[:, None]).T),
        "accuracy": metrics.accuracy(probs, y_test),
        "ece": metrics.ece(probs, y_test),
        "brier": metrics.brier(probs, y_test),
        "seconds": seconds[name],
    }
print(table(rows, digits=4))

# %%
# The confidence of wrong answers. Low values alone prove nothing (the precision that the evidence chose makes all answers
# unsure, which the NLL above punishes); together with a good NLL they do.

figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
for name, value in log_probs.items():
    confidence, answer = value.exp().max(-1)
    wrong = confidence[answer != y_test].sort(descending=True).values
    ax.plot(range(1, len(wrong) + 1), wrong, "o-", ms=3, label=name)
ax.set(xlabel="wrong answers, most confident first", ylabel="confidence")
ax.legend()
plt.show()
