# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
A network inside a larger model
===============================

Counts of events in clinics: each count has an exposure, depends on two covariates in a way that nobody can write down,
and each clinic has an effect of its own,

.. math::

   y_n \sim \mathrm{Poisson}\bigl(e_n \exp(f_w(x_n) + a_{g(n)})\bigr), \qquad a_g \sim N(0, \tau),\quad
   \tau \sim \mathrm{HalfNormal}(1),\quad w \sim p(w).

The network is one term of the linear predictor; offset, effects, their scale and the likelihood are plain Pyro. The
posterior of everything at once is a Laplace approximation, a mixture guide, or NUTS, without an edit of the model.
"""

import os
import time
import warnings

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_sample
from pyro.nn import PyroModule

from pyro_bnn.diagnostics import to_inference_data
from pyro_bnn.infer import Mixture_ELBO, fit, nuts, posterior_predictive
from pyro_bnn.infer.autoguide import AutoLaplace, AutoMixture
from pyro_bnn.nn import FanInNormal, bayesian_

SMOKE = "PYRO_BNN_SMOKE" in os.environ
STEPS = 40 if SMOKE else 2000
DRAWS = 40 if SMOKE else 500
GROUPS, N = 12, 300
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
pyro.set_rng_seed(1)

# %%
# Simulated data, so that the truth is known.

x = torch.rand(N, 2) * 4 - 2
group = torch.arange(N) % GROUPS
exposure = torch.rand(N) * 4 + 1
effects = 0.5 * torch.randn(GROUPS)
effects -= effects.mean()  # the network has an intercept of its own


def surface(x):
    """The true log rate without the effects."""
    return torch.sin(1.5 * x[:, 0]) + 0.4 * x[:, 1] * (x[:, 0] > 0)


y = dist.Poisson(exposure * (surface(x) + effects[group]).exp()).sample()


# %%
# The model
# ---------


class Counts(PyroModule):
    """A network, effects of groups and an exposure under a Poisson."""

    def __init__(self, net, groups):
        super().__init__()
        self.net, self.groups = net, groups

    def forward(self, x, group, exposure, y=None):
        log_rate = self.net(x).squeeze(-1)
        if self.groups:
            tau = pyro.sample("tau", dist.HalfNormal(x.new_ones(())))
            with pyro.plate("clinic", self.groups, dim=-1):
                effect = pyro.sample("effect", dist.Normal(0.0, tau))
            # draws may carry leading dimensions: index the last one
            log_rate = log_rate + effect[..., group]
        with pyro.plate("visit", len(x), dim=-1):
            return pyro.sample("count", dist.Poisson(exposure * log_rate.exp()), obs=y)


def network():
    """Two inputs, eight tanh units, one output; prior scaled by the fan-in."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    return bayesian_(net, prior=FanInNormal(gain=1.5))


data = (x, group, exposure, y)
model = Counts(network(), GROUPS)
draws, exports, seconds = {}, {}, {}

# %%
# Laplace: one Gaussian over the weights, the effects and log τ, correlations included.

start = time.perf_counter()
laplace = AutoLaplace(model, init_loc_fn=init_to_sample)
fit(model, laplace, data, num_steps=STEPS, optim=0.01, progress_bar=False)
if not SMOKE:
    laplace.polish(data)
laplace.laplace_approximation(data, map_tolerance=float("inf"))
draws["Laplace"] = laplace.sample_posterior((DRAWS,))
seconds["Laplace"] = time.perf_counter() - start
print(laplace.map_report)

# %%
# A mixture of two Gaussians, every site random.

start = time.perf_counter()
mixture = AutoMixture(model, num_components=2, component="normal", init_scale=0.05)
fit(model, mixture, data, num_steps=STEPS, optim=0.01, elbo=Mixture_ELBO(num_particles=2), progress_bar=False)
draws["mixture (2)"] = mixture.sample_posterior((DRAWS,))
seconds["mixture (2)"] = time.perf_counter() - start

# %%
# NUTS as the reference, started from the Laplace guide and with its covariance as mass matrix.

start = time.perf_counter()
run = nuts(
    model, data, guide=laplace, num_samples=10 if SMOKE else 150, warmup_steps=10 if SMOKE else 100, num_chains=2,
    progress_bar=False, max_tree_depth=3 if SMOKE else 6, jit_compile=True, ignore_jit_warnings=True,
)  # fmt: skip
draws["NUTS"] = run.get_samples()
seconds["NUTS"] = time.perf_counter() - start

# %%
# Effects of the clinics
# ----------------------
#
# The network's output bias and the mean of the effects can trade, so effects are compared about their mean.

covered, intervals = {}, {}
for name, sample in draws.items():
    centred = sample["effect"] - sample["effect"].mean(-1, keepdim=True)
    intervals[name] = torch.quantile(centred, torch.tensor([0.05, 0.5, 0.95]), dim=0)
    low, _, high = intervals[name]
    covered[name] = int(((low < effects) & (effects < high)).sum())
    print(
        f"{name:12s} {seconds[name]:6.1f} s; 90 % intervals cover {covered[name]} of {GROUPS} effects, "
        f"mean width {float((high - low).mean()):.3f}; tau {float(sample['tau'].mean()):.3f}"
    )
print(f"true standard deviation of the effects: {float(effects.std()):.3f}")

# %%
# Would a model without effects do?
# ---------------------------------
#
# The same class without groups, exported like the first, and compared by leave-one-out cross-validation. Dimensions are
# named after the plates. The column ``warning`` is true where importance sampling is less reliable for some counts.

plain = Counts(network(), 0)
plain_laplace = AutoLaplace(plain, init_loc_fn=init_to_sample)
fit(plain, plain_laplace, data, num_steps=STEPS, optim=0.01, progress_bar=False)
if not SMOKE:
    plain_laplace.polish(data)
plain_laplace.laplace_approximation(data, map_tolerance=float("inf"))
coords = {"clinic": [f"clinic {g}" for g in range(GROUPS)]}
exports["with effects"] = to_inference_data(model, laplace, data, num_samples=DRAWS, coords=coords)
exports["without"] = to_inference_data(plain, plain_laplace, data, num_samples=DRAWS)
with warnings.catch_warnings(action="ignore", category=UserWarning):  # the column says it
    print(az.compare(exports).to_string())
print(az.summary(exports["with effects"], var_names=["tau", "effect"], kind="stats").head(4).to_string())

# %%
# Rates with their uncertainty
# ----------------------------
#
# A new clinic has an effect that was not observed: integrating over it, by drawing it from its prior under each draw of
# τ, is one line. Its rate is more uncertain than that of a clinic in the data.

grid = torch.stack([torch.linspace(-2, 2, 60), torch.full((60,), 1.0)], -1)
ones = torch.ones(60)
known = posterior_predictive(
    model, laplace, (grid, torch.zeros(60, dtype=torch.long), ones), num_samples=DRAWS
)
sample = dict(draws["Laplace"])
sample["effect"] = torch.randn(DRAWS, GROUPS) * sample["tau"].unsqueeze(-1)
new = posterior_predictive(model, sample, (grid, torch.zeros(60, dtype=torch.long), ones))

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for shift, (name, (low, middle, high)) in enumerate(intervals.items()):
    place = torch.arange(GROUPS) + 0.2 * (shift - 1)
    left.errorbar(place, middle, torch.stack([middle - low, high - middle]), fmt="o", ms=3, label=name)
left.plot(range(GROUPS), effects, "k_", ms=16, label="truth")
left.set(xlabel="clinic", ylabel="effect", title="90 % intervals of the effects")
left.margins(y=0.2)
left.legend(ncols=4, loc="upper center", fontsize=9)
for name, prediction, colour in (("a new clinic", new, "C1"), ("clinic 0", known, "C0")):
    low, middle, high = torch.quantile(prediction.mean, torch.tensor([0.05, 0.5, 0.95]), dim=0)
    right.fill_between(grid[:, 0], low, high, alpha=0.3, color=colour, label=name)
    right.plot(grid[:, 0], middle, color=colour)
right.plot(grid[:, 0], (surface(grid) + effects[0]).exp(), "k--", label="truth, clinic 0")
right.set(xlabel="first covariate (second: 1)", ylabel="events per unit of exposure", ylim=(0, 12))
right.legend()
plt.show()
