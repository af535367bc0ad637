# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Hessian-free Laplace
====================

The Laplace variance of a prediction is how far it moves when the fit is pulled a little towards it: minimise
:math:`L(\theta) - \lambda f_\theta(x)` instead of :math:`L(\theta)`, and :math:`(f_{\theta_\lambda}(x) -
f_{\hat\theta}(x))/\lambda` is its variance. No Hessian is formed. This script computes variances of predictions and of
other quantities, turns them into a guide, and shows when the cheap score of one fine-tuning run is no variance.
"""

import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_sample

from pyro_bnn.infer import hfl
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace

SMOKE = "PYRO_BNN_SMOKE" in os.environ
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # the network is small: threads cost more than they bring
pyro.set_rng_seed(0)

# %%
# An ordinary Pyro model, data in two clusters, and a point estimate. The exact Hessian wants a true minimum, which
# ``polish`` finds.

HIDDEN = 6 if SMOKE else 16


def model(x, y=None):
    """A tanh network with standard normal weights."""
    w1 = pyro.sample("w1", dist.Normal(torch.zeros(HIDDEN, 1), 1.0).to_event(2))
    b1 = pyro.sample("b1", dist.Normal(torch.zeros(HIDDEN), 1.0).to_event(1))
    w2 = pyro.sample("w2", dist.Normal(torch.zeros(HIDDEN), 1.0).to_event(1))
    f = torch.tanh(x @ w1.mT + b1) @ w2
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(f, 0.1), obs=y)


x = torch.cat([torch.rand(15) * 0.8 - 1.5, torch.rand(15) * 0.8 + 0.35]).unsqueeze(-1)
y = -torch.sin(3 * x.squeeze(-1) - 0.3) + 0.1 * torch.randn(30)
grid = torch.linspace(-2.2, 2.0, 41 if SMOKE else 121).unsqueeze(-1)

exact = AutoLaplace(model, curvature="hessian", init_loc_fn=init_to_sample).initialize(x, y)
exact.polish((x, y)).laplace_approximation((x, y))

# %%
# Variances of all predictions on a grid. The result prints its own diagnostics: how far the point estimate is from the
# minimum, the smallest curvature met, what the solves left over, and the cost.

result = hfl.solve(exact, (x, y), (grid,))
print(result)
dense = exact.linearized_outputs(grid)["obs"].variance
print(
    f"largest relative difference from the dense Hessian: {float((result.variance / dense - 1).abs().max()):.1e}"
)

# %%
# The paper's own estimator perturbs the loss for real. The knob is epsilon, in posterior standard deviations, and the
# result says whether epsilon and epsilon / 3 agree.

some = grid[:: 20 if SMOKE else 10]
for method in ("one_sided", "central"):
    print(hfl.solve(exact, (x, y), (some,), method=method))

# %%
# Any function of the latents has a variance: here the mean of the curve over the gap, and the difference between its
# ends, with their covariance.


def summary(latents, x):
    """The mean of the curve and its rise."""
    f = torch.tanh(x @ latents["w1"].mT + latents["b1"]) @ latents["w2"]
    return torch.stack([f.mean(), f[-1] - f[0]])


gap = torch.linspace(-0.7, 0.35, 50).unsqueeze(-1)
functional = hfl.solve(exact, (x, y), (gap,), summary, robust=True)
print("mean over the gap and rise across it:", functional.mean)
print("standard deviations:", functional.variance.sqrt())
print("sandwich standard deviations, robust to the noise model:", functional.sandwich.diagonal().sqrt())

# %%
# As a guide the displacements make a Gaussian of low rank, exact at its targets and a lower bound elsewhere. Targets
# can be added later, and only the new ones are solved for.

guide = AutoHessianFreeLaplace(model).initialize(x, y)
guide.loc.data.copy_(exact.loc.data)
few = guide.laplace_approximation((x, y), (grid[::20],)).linearized_outputs(grid)["obs"].variance.squeeze(-1)
more = guide.add_targets((x, y), (grid[10::20],)).linearized_outputs(grid)["obs"].variance.squeeze(-1)

figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
axis.plot(grid, dense.sqrt(), "k", lw=3, alpha=0.3, label="dense Hessian")
axis.plot(grid, few.sqrt(), label=f"guide, {len(grid[::20])} targets")
axis.plot(grid, more.sqrt(), "--", label="targets added")
axis.plot(x, torch.zeros_like(x), "k|")
axis.set(xlabel="x", ylabel="sd of f(x)")
axis.legend()

# %%
# One fine-tuning run with the regulariser mean :math:`|f|` gives a score for all inputs at once. Its limit is the posterior
# covariance of f(x) with the mean absolute training output, which is not the variance of f(x): it has zeros where the
# variance has none. Calibrating solves tell: a spread of 0.1 would mean variances within about 10 percent.

score = hfl.regvar(exact, (x, y), (grid,), num_epochs=None, calibrate=len(grid))
print(score)
figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
axis.semilogy(grid, dense, "k", lw=3, alpha=0.3, label="variance")
axis.semilogy(grid, score.calibrated, label="RegVar score, calibrated")
axis.set(xlabel="x", ylabel="variance of f(x)")
axis.legend()
plt.show()
