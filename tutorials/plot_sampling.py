# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
From an ensemble to chains
==========================

An ensemble is a handful of modes. Short microcanonical chains start at each of them, all in one batch, and turn the ensemble into
draws of the posterior: with R-hat, an export for ArviZ, and predictions like those of any other posterior.
"""

import os

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

from pyro_bnn.diagnostics import mixing, to_inference_data
from pyro_bnn.infer import mclmc, posterior_predictive
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.nn import bayesian_

SMOKE = "PYRO_BNN_SMOKE" in os.environ
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
pyro.set_rng_seed(0)

# %%
# Two clusters of points, and a network as the mean of a Normal with unknown noise.

x = torch.cat([torch.rand(20) - 1.6, torch.rand(20) + 0.4]).unsqueeze(-1)
y = torch.sin(3 * x.squeeze(-1)) + 0.1 * torch.randn(40)
grid = torch.linspace(-2.4, 2.2, 101).unsqueeze(-1)
HIDDEN = 5 if SMOKE else 20


class Regression(PyroModule):
    """A network as the mean of a Normal with unknown noise."""

    def __init__(self):
        super().__init__()
        net = torch.nn.Sequential(torch.nn.Linear(1, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, 1))
        scales = {"0.weight": 2.0, "0.bias": 2.0, "2.weight": HIDDEN**-0.5, "2.bias": 1.0}
        self.net = bayesian_(net, prior={name: dist.Normal(0.0, scale) for name, scale in scales.items()})

    def forward(self, x, y=None):
        f = self.net(x).squeeze(-1)
        sigma = pyro.sample("sigma", dist.LogNormal(-2.0, 0.5))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(f, sigma), obs=y)


model = Regression()

# %%
# The ensemble: five modes, with Laplace approximations around them, which show what a Gaussian at each mode says; chains need the modes
# alone. Searches start from half a draw of the prior, with a noise that asks for a fit. From much smaller weights a model with an unknown
# noise ends at the constant function that takes all data for noise; where the noise is known, small weights are the better start.


def small(site):
    """Half a draw of the prior, and a small noise."""
    value = site["fn"].sample()
    return torch.full_like(value, 0.1) if site["name"] == "sigma" else 0.5 * value


guides = []
for seed in range(2 if SMOKE else 5):
    pyro.set_rng_seed(seed)
    guide = AutoLaplace(model, init_loc_fn=small).initialize(x, y)
    guides.append(guide.polish((x, y), max_iter=30 if SMOKE else 500).laplace_approximation((x, y)))

# %%
# Two chains for each mode. Step size, scales and momentum length are found in the warm-up, from all chains together; the result says what it cost.
# The weights of the output layer, ``net.2``, are Gaussian given all else: they are integrated out, and drawn in the end. The noise need not be known.

pyro.set_rng_seed(0)
steps = {"warmup_steps": 30, "num_samples": 10} if SMOKE else {"warmup_steps": 600, "num_samples": 200}
run = mclmc(
    model,
    guides,
    (x, y),
    num_chains=2,
    thinning=10,
    collapse="net.2",
    energy_variance=0.005,
    progress_bar=False,
    **steps,
)
print(run)

# %%
# R-hat of weights says nothing, since hidden units permute and change sign; that of predictions does. Between all chains, and between those of
# one mode:

print(mixing(model, run, (grid,)))
print(mixing(model, run, (grid,), groups="mode"))

# %%
# The export for ArviZ holds the draws, the warm-up, the statistics and the predictions. The noise is identified:

exported = to_inference_data(model, run, (x, y))
print(az.summary(exported, var_names=["sigma"]).to_string())

# %%
# Members agree in the gap more than they should, Laplace approximations open up as their local slopes say, and chains know what the functions
# that fit the points do there. ``run.guide(model, x, y)`` is a guide for whatever takes one.

centres = [guide.median() for guide in guides]
modes = {name: torch.stack([centre[name] for centre in centres]) for name in centres[0]}
members = posterior_predictive(model, modes, (grid,)).mean
chains = posterior_predictive(model, run, (grid,)).mean
figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), sharey=True, layout="constrained")
line = grid.squeeze(-1)
axes[0].plot(line, members.T, "C0", lw=1)
for guide in guides:
    found = guide.linearized_outputs(grid)["obs"]
    mean, sd = found.mean[:, 0].detach(), found.variance[:, 0].sqrt().detach()
    axes[1].fill_between(line, mean - 2 * sd, mean + 2 * sd, color="C0", alpha=0.15, lw=0)
axes[2].plot(line, chains[:: max(1, len(chains) // 60)].T, "C0", lw=0.5, alpha=0.6)
for ax, title in zip(axes, ("ensemble", "Laplace at each member", "chains"), strict=True):
    ax.plot(x, y, "k.", ms=4)
    ax.set(title=title, ylim=(-3, 3), xlabel="x")
plt.show()
