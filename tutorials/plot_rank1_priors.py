# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Which prior of a factor induces which prior of a weight
=======================================================

A rank-1 network multiplies a shared weight :math:`w \sim N(0, \sigma^2)` by random factors. Integrated over a factor
:math:`r`, the effective weight has the density

.. math:: p(w') = \int N(w' \mid 0, r^2 \sigma^2)\, p(r)\, dr,

a scale mixture of Normal distributions (equation 3 of Dusenberry et al., ICML 2020, with :math:`s = 1`). So the prior
of the factor chooses the family of the prior of the weight: a Normal factor keeps light tails, a Cauchy factor gives a
density of horseshoe type with a spike and heavy tails, and an inverse-gamma :math:`r^2` gives Student's t. This script
draws from the hierarchy and compares with the closed forms where there are any; it reproduces the simulation of
the paper's figure 1.
"""

# %%
# Draws of the hierarchy
# ----------------------

import math
import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from scipy.special import exp1

SMOKE = "PYRO_BNN_SMOKE" in os.environ
NUM_DRAWS = 200_000 if SMOKE else 4_000_000
pyro.set_rng_seed(0)

PRIORS = {
    "N(1, 0.1): the default": dist.Normal(1.0, 0.1),
    "N(0, 1)": dist.Normal(0.0, 1.0),
    "Cauchy(0, 1): horseshoe": dist.Cauchy(0.0, 1.0),
    "half-Cauchy(1): horseshoe": dist.HalfCauchy(1.0),
    "r^2 ~ InverseGamma(3/2, 3/2): Student t(3)": dist.InverseGamma(1.5, 1.5),
    "LogNormal(0, 1/2)": dist.LogNormal(0.0, 0.5),
}


def draws(prior, num):
    """Effective weights."""
    factor = prior.sample((num,))
    if isinstance(prior, dist.InverseGamma):
        factor = factor.sqrt()
    return factor * torch.randn(num)


grid = torch.linspace(-4.0, 4.0, 161)
width = float(grid[1] - grid[0])
densities, tails = {}, {}
for name, prior in PRIORS.items():
    w = draws(prior, NUM_DRAWS)
    densities[name] = torch.histc(w, bins=160, min=-4.0, max=4.0) / NUM_DRAWS / width
    tails[name] = float((w.abs() > 4.0).double().mean())

# %%
# Closed forms
# ------------
# Three of the densities are known: Student's t; :math:`K_0(|w|)/\pi`, that of the product of two standard Normals; and
# the horseshoe, :math:`e^{w^2/2} E_1(w^2/2) / \sqrt{2 \pi^3}` with the exponential integral :math:`E_1` (Carvalho, Polson
# and Scott 2010 bound it by logarithms). A Cauchy and a half-Cauchy factor give the same, because the sign of the factor
# does not matter to a symmetric weight.

middle = (grid[1:] + grid[:-1]) / 2
half_square = middle.double() ** 2 / 2
horseshoe = half_square.exp() * torch.from_numpy(exp1(half_square.numpy())) / math.sqrt(2 * math.pi**3)
CLOSED_FORMS = {
    "N(0, 1)": torch.special.modified_bessel_k0(middle.abs()) / math.pi,
    "Cauchy(0, 1): horseshoe": horseshoe,
    "half-Cauchy(1): horseshoe": horseshoe,
    "r^2 ~ InverseGamma(3/2, 3/2): Student t(3)": dist.StudentT(3.0).log_prob(middle).exp(),
}
away = middle.abs() > 0.2  # closer to the spike the density changes within a bin
print("largest distance of the histogram to the closed form, relative")
for name, density in CLOSED_FORMS.items():
    distance = float((densities[name] / density - 1)[away].abs().max())
    print(f"  {name:44s} {distance:.3f}")
print("\nmass beyond 4 prior standard deviations of the weight")
for name, tail in tails.items():
    print(f"  {name:44s} {tail:.2e}")

# %%
# The figure
# ----------

figure, axes = plt.subplots(1, 2, figsize=(10, 4))
for name, density in densities.items():
    axes[0].plot(middle, density, lw=1.3)
    axes[1].semilogy(middle, density.clamp_min(1e-6), label=name, lw=1.3)
for name, density in CLOSED_FORMS.items():
    axes[1].semilogy(middle, density, "k:", lw=0.8, label="closed forms" if name == "N(0, 1)" else None)
axes[0].set_ylim(0, 1.2)
axes[0].set_title("density of the effective weight")
axes[1].set_ylim(1e-5, 5)
axes[1].set_title("the same, logarithmic: tails")
for ax in axes:
    ax.set_xlabel("w' / σ")
axes[1].legend(fontsize=8, loc="lower center")
figure.tight_layout()
plt.show()
