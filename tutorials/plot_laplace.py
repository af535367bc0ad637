# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Laplace for any likelihood
==========================

A Laplace approximation needs a likelihood and a prior, and a Pyro model states both. Three models that ask for more
than one noise scale or a softmax: a network with a noise of its own at every point, counts, and a network beside
ordinary latent variables. Then model comparison by the evidence.
"""

import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

from pyro_bnn.infer import fit
from pyro_bnn.infer.autoguide import AutoLaplace

SMOKE = "PYRO_BNN_SMOKE" in os.environ
STEPS = 20 if SMOKE else 1000
N = 40 if SMOKE else 120
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
pyro.set_rng_seed(0)

# %%
# One network for all: a hidden layer with tanh, priors scaled by the fan-in.


def network(x, outputs, hidden=12, depth=1):
    """A multilayer perceptron whose weights are sample sites."""
    h = x
    for layer in range(depth):
        shape = (hidden, h.shape[-1])
        w = pyro.sample(f"w{layer}", dist.Normal(torch.zeros(shape), 2.0 / shape[1] ** 0.5).to_event(2))
        b = pyro.sample(f"b{layer}", dist.Normal(torch.zeros(hidden), 1.0).to_event(1))
        h = torch.tanh(h @ w.mT + b)
    w = pyro.sample("w_out", dist.Normal(torch.zeros(outputs, hidden), 2.0 / hidden**0.5).to_event(2))
    b = pyro.sample("b_out", dist.Normal(torch.zeros(outputs), 1.0).to_event(1))
    return h @ w.mT + b


def fitted(model, x, y, **options):
    """MAP by Adam, then by Newton's method, then the curvature there."""
    guide = AutoLaplace(model, init_loc_fn=pyro.infer.autoguide.init_to_sample, **options).initialize(x, y)
    fit(model, guide, (x, y), num_steps=STEPS, optim=0.01, progress_bar=False)
    if not SMOKE:
        guide.polish((x, y), max_iter=500)
    return guide.laplace_approximation((x, y), map_tolerance=float("inf"))


# %%
# A noise scale that depends on the input
# ---------------------------------------
# Two outputs: the mean, and the logarithm of the noise. The Fisher information of a Normal in the two is
# :math:`\mathrm{diag}(\sigma^{-2}, 2)`; nothing else changes.


def heteroscedastic(x, y=None):
    """A Normal whose mean and log scale are outputs of the network."""
    f = network(x, 2)
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(f[..., 0], (f[..., 1] - 1.0).exp()), obs=y)


x = torch.sort(torch.rand(N, 1) * 4 - 2, dim=0).values
y = torch.sin(2 * x[:, 0]) + 0.05 * (1.5 + x[:, 0]).clamp(min=0.3) ** 2 * torch.randn(N)
grid = torch.linspace(-3.5, 3.5, 101).unsqueeze(-1)
guide = fitted(heteroscedastic, x, y)
outputs = guide.linearized_outputs(grid)["obs"]
predictive = outputs.distribution("monte_carlo", num_samples=500)

figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
mean, sd = outputs.mean[:, 0], outputs.variance[:, 0].sqrt()
axis.fill_between(grid[:, 0], mean - 2 * predictive.variance.sqrt(), mean + 2 * predictive.variance.sqrt(),
                  alpha=0.2, label="observations")  # fmt: skip
axis.fill_between(grid[:, 0], mean - 2 * sd, mean + 2 * sd, alpha=0.4, label="function")
axis.plot(grid[:, 0], mean)
axis.plot(x[:, 0], y, ".k", ms=3)
axis.set(title="noise that grows with x", ylim=(-4, 4))
axis.legend()

# %%
# Counts
# ------
# A Poisson likelihood with the network as its log rate; the Kronecker structure. Draws of the linearised function
# are coherent: one draw of the weights gives the whole curve.


def counts(x, y=None):
    """A Poisson whose log rate is the output of the network."""
    log_rate = network(x, 1).squeeze(-1)
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Poisson(log_rate.exp()), obs=y)


y_counts = dist.Poisson((1.0 + torch.sin(2 * x[:, 0])).exp()).sample()
guide = fitted(counts, x, y_counts, structure="kronecker")
curves = guide.functional_samples(30, grid)["obs"].squeeze(-1).exp()
figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
axis.plot(grid[:, 0], curves.mT, "C0", alpha=0.3, lw=1)
axis.plot(x[:, 0], y_counts, ".k", ms=3)
axis.set(title="rates of counts: 30 functions", ylim=(0, 20))

# %%
# A network beside ordinary latent variables
# ------------------------------------------
# Groups with offsets of unknown scale, and a shared nonlinear trend that a network describes. The posterior is one
# Gaussian over everything in unconstrained space: the network's weights, the offsets, their scale and the noise.

group = torch.arange(N) % 4
offsets = torch.tensor([-0.8, 0.3, 0.9, -0.2])
y_groups = torch.sin(2 * x[:, 0]) + offsets[group] + 0.15 * torch.randn(N)


def grouped(x, group, y=None):
    """A trend by the network, an offset for each group, and noise."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("groups", 4):
        offset = pyro.sample("offset", dist.Normal(0.0, scale))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))
    f = network(x, 1).squeeze(-1) + offset[group]
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(f, noise), obs=y)


guide = AutoLaplace(grouped, init_loc_fn=pyro.infer.autoguide.init_to_sample).initialize(x, group, y_groups)
fit(grouped, guide, (x, group, y_groups), num_steps=STEPS, optim=0.01, progress_bar=False)
guide.polish((x, group, y_groups), max_iter=500)
guide.laplace_approximation((x, group, y_groups), map_tolerance=float("inf"))
low, middle, high = guide.quantiles([0.025, 0.5, 0.975])["offset"]
figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
axis.errorbar(range(4), middle, torch.stack([middle - low, high - middle]), fmt="o", label="95% interval")
axis.plot(range(4), offsets, "k_", ms=14, label="truth")
axis.set(title="offsets of four groups", xticks=range(4))
axis.legend()
print("noise, 95% interval:", guide.quantiles([0.025, 0.975])["noise"].tolist(), "truth 0.15")

# %%
# Depth and width by the evidence
# -------------------------------
# The log evidence of the heteroscedastic data under networks of several sizes, each with the precision of its prior
# tuned by the evidence too. It is an approximation at one mode: compare differences of many nats, not of a few.

results = {}
for depth in (1, 2):
    for hidden in (2,) if SMOKE else (2, 6, 12):

        def model(x, y=None, hidden=hidden, depth=depth):
            """The heteroscedastic model with a network of another size."""
            f = network(x, 2, hidden, depth)
            with pyro.plate("data", len(x)):
                return pyro.sample("obs", dist.Normal(f[..., 0], (f[..., 1] - 1.0).exp()), obs=y)

        guide = fitted(model, x, y)
        guide.optimize_hyperparameters(per="site")
        results[depth, hidden] = float(guide.log_evidence())
for (depth, hidden), value in results.items():
    print(f"depth {depth}, width {hidden:2d}: log evidence {value:8.1f}")

figure, axis = plt.subplots(figsize=(5, 3))
for depth in (1, 2):
    sizes = [hidden for d, hidden in results if d == depth]
    axis.plot(sizes, [results[depth, hidden] for hidden in sizes], "o-", label=f"depth {depth}")
axis.set(xlabel="width", ylabel="log evidence")
axis.legend()
figure.tight_layout()
