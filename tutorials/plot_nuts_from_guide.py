# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
NUTS from a guide
=================

A long run of NUTS is the reference against which approximations are judged, and on small networks it is affordable.
Part of its cost is finding out where the posterior is and how it is shaped, of which a fitted guide knows something
already: chains start at draws of the guide, with its covariance as the mass matrix to start from.
"""

import os
import time

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_sample
from pyro.nn import PyroModule

from pyro_bnn.diagnostics import prediction_diagnostics, prediction_draws, to_inference_data
from pyro_bnn.infer import nuts, posterior_predictive
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.nn import bayesian_

SMOKE = "PYRO_BNN_SMOKE" in os.environ
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
pyro.set_rng_seed(0)
x = torch.linspace(-1.5, 1.5, 30).unsqueeze(-1)
y = torch.sin(2 * x.squeeze(-1)) + 0.15 * torch.randn(30)


class Regression(PyroModule):
    """A network as the mean of a Normal with unknown noise."""

    def __init__(self):
        super().__init__()
        net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        self.net = bayesian_(net, prior=dist.Normal(0.0, 1.0))

    def forward(self, x, y=None):
        f = self.net(x).squeeze(-1)
        sigma = pyro.sample("sigma", dist.LogNormal(-2.0, 0.5))
        with pyro.plate("data", x.shape[0], dim=-1):
            return pyro.sample("obs", dist.Normal(f, sigma), obs=y)


model = Regression()

# %%
# The guide: a Laplace approximation at the MAP.

guide = AutoLaplace(model, init_loc_fn=init_to_sample).initialize(x, y)
guide.polish((x, y)).laplace_approximation((x, y))
print(guide.map_report)

# %%
# Two runs with the same number of steps, one from the prior and one from the guide. ``nuts`` records step sizes, tree
# depths and divergences of every draw; the export takes them to ArviZ.

settings = {
    "num_samples": 10 if SMOKE else 100, "warmup_steps": 10 if SMOKE else 80, "num_chains": 2, "progress_bar": False,
    "max_tree_depth": 3 if SMOKE else 6, "jit_compile": True, "ignore_jit_warnings": True,
}  # fmt: skip
runs = {}
for name, start_from in (("from the prior", None), ("from the guide", guide)):
    start = time.process_time()
    run = runs[name] = nuts(model, (x, y), guide=start_from, **settings)
    r_hat = prediction_diagnostics(prediction_draws(model, run, (x, y)))["obs_r_hat"]
    steps = [int((2.0 ** stats["tree_depth"]).sum()) for stats in (run.warmup_stats, run.sample_stats)]
    print(
        f"{name}: {time.process_time() - start:.0f} s of processor time, at most {steps[0]} leapfrog steps in warm-up "
        f"and {steps[1]} afterwards, {int(run.sample_stats['diverging'].sum())} divergences, largest R-hat of a "
        f"prediction {float(r_hat.max()):.3f}"
    )

# %%
# The weights of a network are not identified: hidden units permute and change sign together, so that R-hat of weights
# says little. R-hat of predictions is the one to look at. In the run of this page the guide saved little in warm-up and
# an eighth of the steps afterwards, with the lower R-hat and, because steps are longer, some divergences; neither run is
# long enough for a reference, which should have R-hat of all predictions below 1.01.
#
# How good was the guide?
# -----------------------
#
# Standard deviations of the mean function, at the data and beyond them. (:func:`~pyro_bnn.diagnostics.compare_with_nuts`
# does both, run and comparison, for any guide.)

grid = torch.linspace(-3, 3, 101).unsqueeze(-1)
line = grid.squeeze(-1)
outputs = guide.linearized_outputs(grid)["obs"]
prediction = posterior_predictive(model, runs["from the guide"], (grid,))
ratio = outputs.variance[:, 0].sqrt() / prediction.mean.std(0)
for name, part in (("at the data", line.abs() <= 1.5), ("outside", line.abs() > 1.5)):
    print(f"Laplace over NUTS, standard deviation {name}: {ratio[part].min():.2f} to {ratio[part].max():.2f}")
exported = to_inference_data(model, runs["from the guide"], (x, y))
print(az.summary(exported, var_names=["sigma"]).to_string())

figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
mean, sd = prediction.mean.mean(0), prediction.mean.std(0)
ax.fill_between(line, mean - 2 * sd, mean + 2 * sd, alpha=0.3, label="NUTS")
mean, sd = outputs.mean[:, 0], outputs.variance[:, 0].sqrt()
ax.plot(line, mean + 2 * sd, "C1", label="Laplace")
ax.plot(line, mean - 2 * sd, "C1")
ax.plot(x, y, "k.")
ax.set(xlabel="x", ylabel="mean of y, two standard deviations", ylim=(-4, 4))
ax.legend()
plt.show()
