# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Hierarchical priors: which inputs matter?
=========================================

A rank-1 layer multiplies each of its inputs by a random factor :math:`s_i`. A prior of these factors whose scale is
itself unknown turns a layer into a test of relevance: centred at 0, factors of useless inputs can go to 0 for a small
price, while those of useful inputs pay once for being large. Three ways to treat the scale: fixed, a latent with a
hyperprior (the horseshoe), and a parameter that the bound optimises (empirical Bayes).
"""

import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

from pyro_bnn.diagnostics import evaluate, table
from pyro_bnn.infer import Mixture_ELBO, fit, posterior_predictive
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.nn import FanInNormal, HierarchicalPrior, LearnedScalePrior, Rank1Linear

SMOKE = "PYRO_BNN_SMOKE" in os.environ
STEPS = 20 if SMOKE else 1500
DRAWS = 20 if SMOKE else 200
torch.set_num_threads(1)
pyro.set_rng_seed(0)

# %%
# Data: twelve inputs, of which the first three matter.

N, D = 150, 12
x = torch.randn(2 * N, D)
y = torch.sin(1.5 * x[:, 0]) + 0.7 * x[:, 1] * x[:, 2] + 0.2 * torch.randn(2 * N)
train, test = (x[:N], y[:N]), (x[N:], y[N:])


# %%
# The model
# ---------
#
# Both layers have random factors on their inputs alone (a dictionary of priors without ``r``). What differs is the prior
# of those of the first layer.


class Regression(PyroModule):
    """A hidden layer with factors on its inputs, and a linear output."""

    def __init__(self, prior):
        super().__init__()
        self.hidden = Rank1Linear(D, 20, prior={"s": prior}, weight_prior=FanInNormal())
        self.out = Rank1Linear(20, 1, prior={"s": dist.Normal(1.0, 0.1)}, weight_prior=FanInNormal())

    def forward(self, x, y=None):
        mean = self.out(torch.tanh(self.hidden(x))).squeeze(-1)
        sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 0.5))
        with pyro.plate("data", x.shape[-2], dim=-1):
            return pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


PRIORS = {
    "fixed N(0, 1)": lambda: dist.Normal(0.0, 1.0),
    "half-Cauchy scale": lambda: HierarchicalPrior(dist.HalfCauchy(1.0), loc=0.0),
    "a learned scale each": lambda: LearnedScalePrior(1.0, per_element=True, loc=0.0),
}

rows, factors = {}, {}
for name, prior in PRIORS.items():
    model = Regression(prior())
    guide = AutoMixture(model, num_components=1, component="normal", rest="normal", init_scale=0.05)
    fit(
        model,
        guide,
        train,
        num_steps=STEPS,
        optim=0.01,
        elbo=Mixture_ELBO(num_particles=2),
        progress_bar=False,
    )
    rows[name] = evaluate(posterior_predictive(model, guide, test, num_samples=DRAWS))
    draws = guide.sample_posterior((DRAWS,))
    # the scale of a factor and of its column of the weight trade: their product is what acts
    effect = draws["hidden.s"].squeeze(-2).abs() * draws["hidden.weight"].norm(dim=-2)
    factors[name] = effect.reshape(DRAWS, D).quantile(torch.tensor([0.05, 0.5, 0.95]), dim=0)
    for site, value in draws.items():
        if "scale" in site:
            print(f"{name}: {site} has posterior median {float(value.median()):.3f}")
learned = torch.nn.functional.softplus(model.hidden.s_prior_scale_raw.detach())  # the last model
print("learned scales:", [round(v, 2) for v in learned.tolist()])

# %%
# Scores on data that were not seen. In the run of this page a learned scale for each factor has the best NLL and gives its
# three largest scales to the three relevant inputs, but does not shut off all others; one half-Cauchy scale for the whole
# layer cannot tell inputs apart, ends wide, and is worse than the fixed prior.

print(table(rows))

# %%
# The norm of the column of effective weights that belongs to each input, :math:`|s_i| \, \lVert W_{:, i} \rVert`, median
# and 90 % interval.

figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), sharey=True, layout="constrained")
for ax, (name, (low, middle, high)) in zip(axes, factors.items(), strict=True):
    ax.errorbar(range(D), middle, torch.stack([middle - low, high - middle]), fmt="o")
    ax.axvspan(-0.5, 2.5, color="0.9", zorder=0)
    ax.set(title=name, xlabel="input (grey: relevant)")
axes[0].set_ylabel("norm of effective weights")
plt.show()
