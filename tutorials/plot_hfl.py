# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Hessian-free Laplace
====================

The Laplace variance of a prediction is how far it moves when the fit is pulled a little towards it: minimise
:math:`L(\theta) - \lambda f_\theta(x)` instead of :math:`L(\theta)`, and :math:`(f_{\theta_\lambda}(x) -
f_{\hat\theta}(x))/\lambda` is its variance. No Hessian is formed. This script computes variances of predictions and of
other quantities with certified bounds, turns them into a guide that knows what it misses, and shows when the cheap score of one
fine-tuning run is no variance.
"""

import os
import warnings

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
# Variances of all predictions on a grid, to 1 %. The generalised Gauss-Newton matrix is at least the prior's precision, and from
# that alone follow bounds from both sides, whatever a solve has found so far; it stops when they are as close as ``tolerance``. The
# result prints them with its other diagnostics: how far the point estimate is from the minimum, and the cost.

result = hfl.solve(exact, (x, y), (grid,), curvature="ggn", tolerance=0.01)
print(result)
full = AutoLaplace(model, curvature="ggn").initialize(x, y)
full.loc.data.copy_(exact.loc.data)
ggn = full.laplace_approximation((x, y)).linearized_outputs(grid)["obs"].variance
print("the dense variance lies between them:", bool(((result.lower <= ggn) & (ggn <= result.upper)).all()))

# %%
# What is known of one prediction after k products: the truth is between the bounds from the first product on.

target, steps = grid[len(grid) // 3 :][:1], range(1, 9)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", hfl.HFLWarning)  # that the solves stop early
    known = [hfl.solve(exact, (x, y), (target,), curvature="ggn", tolerance=1e-6, max_iter=k) for k in steps]
figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
axis.fill_between(
    steps, [float(r.lower.sqrt()) for r in known], [float(r.upper.sqrt()) for r in known], alpha=0.3
)
axis.axhline(float(ggn[len(grid) // 3].sqrt()), color="k", lw=1)
axis.set(xlabel="iterations", ylabel="bounds of the sd of f(x)")

# %%
# The exact Hessian has no bound that is known beforehand, and the result says so. Its solves stop at a small residual.

result = hfl.solve(exact, (x, y), (grid,))
print(result.uncertified)
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
# As a guide the displacements make a Gaussian of low rank, exact at its targets and a lower bound elsewhere. It bounds from above
# what it misses, and adds targets until that is little everywhere on a validation set.

guide = AutoHessianFreeLaplace(model, curvature="ggn").initialize(x, y)
guide.loc.data.copy_(exact.loc.data)
guide.laplace_approximation((x, y), (grid[:: len(grid) // 2],))
few = guide.variance_bounds(grid, least=0.0)["obs"]
guide.cover((x, y), (grid,), missed=0.05, batch_size=2)
more = guide.variance_bounds(grid)["obs"]
print(guide.summary())

figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
axis.plot(grid, ggn.sqrt(), "k", lw=3, alpha=0.3, label="dense GGN")
axis.plot(grid, few.variance.sqrt(), label="guide, three targets")
axis.plot(grid, few.upper.sqrt(), "C0:", label="upper bound")
axis.plot(grid, more.variance.sqrt(), "C1--", label=f"guide, {len(guide.gradients)} targets")
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
