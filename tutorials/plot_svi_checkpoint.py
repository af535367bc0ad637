# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Stock SVI, checkpoints and resuming
===================================

Guides and bounds of this project run under :class:`pyro.infer.SVI` like any others. This script trains a mean-field
network with stock SVI and minibatches, once in a loop of its own with a checkpoint written by hand, and once with
:func:`~pyro_bnn.infer.fit`, which saves and restores everything that a run depends on; both are interrupted and
resumed, and the resumed losses are compared with those of a run that was not interrupted.
"""

import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule
from sklearn.datasets import load_diabetes

from pyro_bnn.infer import Checkpoint, Mixture_ELBO, fit, load_guide, posterior_predictive, save_guide
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.nn import bayesian_

SMOKE = "PYRO_BNN_SMOKE" in os.environ
STEPS = 40 if SMOKE else 600
torch.set_num_threads(1)
folder = Path(tempfile.mkdtemp())

features, target = load_diabetes(return_X_y=True)
x = torch.as_tensor(features, dtype=torch.float32)
x = (x - x.mean(0)) / x.std(0)
y = torch.as_tensor(target, dtype=torch.float32)
y = (y - y.mean()) / y.std()
N = len(x)


class Regression(PyroModule):
    """A network as the mean of a Normal with unknown noise; its plate takes minibatches."""

    def __init__(self):
        super().__init__()
        self.net = bayesian_(
            torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1)), packed=True
        )

    def forward(self, x, y=None):
        mean = self.net(x).squeeze(-1)
        sigma = pyro.sample("sigma", dist.LogNormal(mean.new_tensor(-0.5), mean.new_tensor(0.5)))
        with pyro.plate("data", N, subsample_size=x.shape[-2], dim=-1):
            return pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


# %%
# A loop of one's own
# -------------------
#
# What a step depends on: the parameters, which stock SVI keeps in Pyro's global store, the state of the optimiser, and
# random numbers, which choose the minibatch and the draws. All three go into the checkpoint.


def fresh():
    """Model, guide and optimiser as at the start of the script."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = Regression()
    guide = AutoMixture(model, num_components=1, component="normal", init_scale=0.05).initialize(
        x[:64], y[:64]
    )
    return model, guide, pyro.optim.Adam({"lr": 0.01})


def train(svi, losses, stop):
    """Steps of stock SVI on random minibatches."""
    while len(losses) < stop:
        index = torch.randperm(N)[:64]
        losses.append(svi.step(x[index], y[index]) / N)


model, guide, optim = fresh()
whole = []
train(SVI(model, guide, optim, Mixture_ELBO()), whole, STEPS)

model, guide, optim = fresh()
losses = []
train(SVI(model, guide, optim, Mixture_ELBO()), losses, STEPS // 3)
save = {
    "params": pyro.get_param_store().get_state(), "optim": optim.get_state(), "rng": torch.get_rng_state(),
    "losses": losses,
}  # fmt: skip
torch.save(save, folder / "svi.pt")
del model, guide, optim, losses  # the process ends here

model, guide, optim = fresh()
saved = torch.load(folder / "svi.pt", weights_only=False)
pyro.get_param_store().set_state(saved["params"])
optim.set_state(saved["optim"])
svi = SVI(model, guide, optim, Mixture_ELBO())
torch.set_rng_state(saved["rng"])
losses = list(saved["losses"])
train(svi, losses, STEPS)
print(
    f"stock SVI: largest difference of a loss after resuming {max(abs(a - b) for a, b in zip(losses, whole, strict=True)):.2e}"
)

# %%
# fit
# ---
#
# The same with :func:`~pyro_bnn.infer.fit`: the checkpoint is an argument, holds the state of the loader's and every other
# random number generator, the place in the epoch and the state of callbacks, and appears under its name only when it
# is complete. The callback stands for a machine that goes away.

data = torch.utils.data.TensorDataset(x, y)


def run(steps=STEPS, stop_at=None, checkpoint=None):
    """One run of a freshly built model, guide and loader."""
    pyro.set_rng_seed(1)
    model = Regression()
    guide = AutoMixture(model, num_components=1, component="normal", init_scale=0.05)
    loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True, drop_last=True)
    result = fit(
        model, guide, loader, num_steps=steps, optim=0.01, progress_bar=False,
        callbacks=[lambda state: state.step == stop_at],
        checkpoint=checkpoint and Checkpoint(checkpoint, every_steps=STEPS // 10),
    )  # fmt: skip
    return model, guide, result


_, _, uninterrupted = run()
_, _, first = run(stop_at=STEPS // 3, checkpoint=folder / "fit.ckpt")
model, guide, second = run(checkpoint=folder / "fit.ckpt")
print(f"fit: stopped at step {first.num_steps} ({first.stop_reason}), resumed to step {second.num_steps}")
same = torch.equal(
    torch.as_tensor(second.losses), torch.as_tensor(uninterrupted.losses)[-len(second.losses) :]
)
print("fit: the losses of the resumed run equal those of the uninterrupted run bit by bit:", same)

# %%
# The finished posterior
# ----------------------
#
# ``save_guide`` stores a guide of any kind with the shapes it was initialised on; ``load_guide`` makes a fresh one usable
# before it has seen data. No code is stored or run.

save_guide(guide, folder / "guide.pt")
restored = load_guide(AutoMixture(model, num_components=1, component="normal"), folder / "guide.pt")
means = []
for posterior in (guide, restored):
    pyro.set_rng_seed(2)
    means.append(posterior_predictive(model, posterior, (x[:5],), num_samples=20).mean)
print("restored guide predicts the same:", torch.equal(*means))

figure, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
ax.plot(losses, lw=0.8, label="stock SVI, resumed")
ax.plot(uninterrupted.losses / N, lw=0.8, label="fit")
ax.axvline(STEPS // 3, color="k", ls=":", lw=1)
ax.set(xlabel="step", ylabel="loss per data point", ylim=(min(whole) - 0.1, sorted(whole)[int(0.98 * STEPS)]))
ax.legend()
plt.show()
