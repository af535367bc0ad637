# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
In-between uncertainty
======================

Data in two clusters with a gap. A posterior over functions must be certain where there are data and uncertain
between the clusters as well as outside. One model, six answers: the MAP, the full Laplace approximation,
Hessian-free Laplace (which must lie on top of it), a rank-1 mixture, a deep ensemble, and a long run of NUTS as the
reference.
"""

import os
import time

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.nn import PyroModule

from pyro_bnn.infer import Mixture_ELBO, fit, posterior_predictive
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoMixture
from pyro_bnn.nn import bayesian_, rank1_

SMOKE = "PYRO_BNN_SMOKE" in os.environ
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # the network is small: threads cost more than they bring
pyro.set_rng_seed(0)

NOISE = 0.1
HIDDEN = 16

# %%
# Data: :math:`-\sin(3x - 0.3)` with noise of standard deviation 0.1, 15 points in each cluster.

x = torch.cat([torch.rand(15) * 0.8 - 1.5, torch.rand(15) * 0.8 + 0.35]).unsqueeze(-1)
y = -torch.sin(3 * x.squeeze(-1) - 0.3) + NOISE * torch.randn(30)
grid = torch.linspace(-2.2, 2.0, 121).unsqueeze(-1)


# %%
# The model is an ordinary Pyro model around a network; which weights are random is the network's affair.


class Regression(PyroModule):
    """A network as the mean of a Normal with known noise."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, y=None):
        f = self.net(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            return pyro.sample("obs", dist.Normal(f, NOISE), obs=y)


def network():
    """One hidden layer of tanh units."""
    return torch.nn.Sequential(torch.nn.Linear(1, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, 1))


model = Regression(bayesian_(network(), prior=dist.Normal(0.0, 1.0)))
results, seconds = {}, {}


def record(name, start, mean, sd):
    """Keeps a method's mean and epistemic standard deviation on the grid."""
    results[name], seconds[name] = (mean.detach(), sd.detach()), time.process_time() - start


# %%
# MAP and full Laplace
# --------------------
#
# The guide is a Delta until ``laplace_approximation``; ``polish`` takes the MAP to the last digits, which the exact
# Hessian needs.

start = time.process_time()
laplace = AutoLaplace(model, curvature="hessian", init_loc_fn=pyro.infer.autoguide.init_to_sample)
fit(model, laplace, (x, y), num_steps=50 if SMOKE else 1000, optim=0.02)
laplace.polish((x, y))
point = {name: value[None] for name, value in laplace.median().items()}  # one draw: the MAP itself
with torch.no_grad():
    record("MAP", start, posterior_predictive(model, point, (grid,)).mean[0], torch.zeros(len(grid)))

laplace.laplace_approximation((x, y))
print(laplace.map_report)
outputs = laplace.linearized_outputs(grid)["obs"]
record("full Laplace", start, outputs.mean.squeeze(-1), outputs.variance.squeeze(-1).sqrt())

# %%
# Hessian-free Laplace
# --------------------
#
# The same MAP, but no Hessian: one conjugate-gradient solve per target input, 24 targets on the line.

start = time.process_time()
hfl = AutoHessianFreeLaplace(model).initialize(x, y)
hfl.load_state_dict({"loc": laplace.state_dict()["loc"]})
hfl.laplace_approximation((x, y), targets=(grid[::5],))
outputs = hfl.linearized_outputs(grid)["obs"]
record("Hessian-free Laplace", start, outputs.mean.squeeze(-1), outputs.variance.squeeze(-1).sqrt())
ratio = results["Hessian-free Laplace"][1] / results["full Laplace"][1]
print(f"HFL over full Laplace, standard deviations on the grid: {ratio.min():.6f} to {ratio.max():.6f}")

# %%
# Rank-1 mixture and deep ensemble
# --------------------------------
#
# The rank-1 model shares the weight matrices, which have a Gaussian prior, between four components of the factors and
# biases.
# The deep ensemble is the same model as above under a mixture of Deltas.

start = time.process_time()
rank1_model = Regression(rank1_(network(), prior=dist.Normal(1.0, 0.5), weight_prior=dist.Normal(0.0, 1.0)))
rank1_guide = AutoMixture(rank1_model, num_components=4, rest="normal")
fit(rank1_model, rank1_guide, (x, y), num_steps=50 if SMOKE else 3000, optim=0.01, elbo=Mixture_ELBO())
prediction = posterior_predictive(rank1_model, rank1_guide, (grid,), num_samples=400)
record("rank-1 mixture (K = 4)", start, prediction.mean.mean(0), prediction.mean.std(0))

start = time.process_time()
ensemble = AutoMixture(
    model, num_components=8, component="delta", init_loc_fn=pyro.infer.autoguide.init_to_sample
)
fit(model, ensemble, (x, y), num_steps=50 if SMOKE else 3000, optim=0.02, elbo=Mixture_ELBO())
prediction = posterior_predictive(model, ensemble, (grid,), num_samples=400)
record("deep ensemble (8)", start, prediction.mean.mean(0), prediction.mean.std(0))

# %%
# NUTS, the reference
# -------------------

start = time.process_time()
mcmc = MCMC(
    NUTS(model, jit_compile=True, ignore_jit_warnings=True, max_tree_depth=7),
    num_samples=10 if SMOKE else 250,
    warmup_steps=10 if SMOKE else 250,
    disable_progbar=True,
)
mcmc.run(x, y)
prediction = posterior_predictive(model, mcmc, (grid,))
record("NUTS", start, prediction.mean.mean(0), prediction.mean.std(0))

# %%
# All six
# -------
#
# Bands are two standard deviations of the function (epistemic, without the noise). Between the clusters and outside
# every band but the MAP's must open up.

fig, axes = plt.subplots(2, 3, figsize=(11, 6), sharex=True, sharey=True, layout="constrained")
line = grid.squeeze(-1)
for ax, (name, (mean, sd)) in zip(axes.flat, results.items(), strict=True):
    ax.fill_between(line, mean - 2 * sd, mean + 2 * sd, alpha=0.3, lw=0)
    ax.plot(line, mean, lw=1.5)
    ax.plot(line, -torch.sin(3 * line - 0.3), "k--", lw=0.8)
    ax.plot(x.squeeze(-1), y, "k.", ms=4)
    ax.set(title=name, ylim=(-3, 3))
fig.savefig("in_between.png", dpi=110)
plt.show()

gap = (line > -0.5) & (line < 0.2)
data = (line.unsqueeze(-1) - x.squeeze(-1)).abs().amin(-1) < 0.05
print("mean standard deviation at the data and in the gap, and seconds of the processor:")
for name, (_, sd) in results.items():
    print(f"  {name:24s} {sd[data].mean():.3f}  {sd[gap].mean():.3f}  {seconds[name]:6.1f}")
