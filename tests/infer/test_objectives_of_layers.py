# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""All objectives on every layer, prior and family, against a loop over components without sample dimensions."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from pyro_bnn.infer import Mixture_ELBO
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.model.handlers import SubstituteMessenger
from pyro_bnn.nn import rank1_
from tests.common import assert_close
from tests.nn.test_layer_contract import CASES, B, flat

FAMILIES = {
    "normal": dist.Normal(1.0, 0.1),
    "cauchy": dist.Cauchy(1.0, 0.1),
    "lognormal": dist.LogNormal(0.0, 0.1),
    "delta": dist.Normal(1.0, 0.1),
}
K = 2


@pytest.mark.every(5)
@pytest.mark.parametrize(
    ("family", "form"),
    [*((f, "multiplicative") for f in FAMILIES), ("normal", "residual"), ("normal", "additive")],
)
@pytest.mark.parametrize("name", list(CASES))
def test_six_objectives(name, family, form):
    plain, args = CASES[name]()
    net = rank1_(plain, prior=FAMILIES[family], form=form, rank=3 if form == "residual" else 1)
    inner = flat(net(*args))[0].dim() - 1

    def model(*args, y=None):
        f = flat(net(*args))[0]
        f = f.flatten(f.dim() - inner).mean(-1)
        with pyro.plate("data", 10 * B, subsample=torch.arange(B)):
            pyro.sample("obs", dist.Normal(f, 0.7), obs=y)

    y = torch.randn(B)
    rest = "delta" if family == "delta" else "normal"
    guide = AutoMixture(model, K, family, rest=rest, init_scale=0.05).initialize(*args, y=y)
    priors = {n: s["fn"] for n, s in guide.prototype_trace.iter_stochastic_nodes()}
    # all objectives draw alike
    pyro.set_rng_seed(7)
    _, trace = Mixture_ELBO(max_plate_nesting=1)._get_trace(model, guide, args, {"y": y})
    values = {n: trace.nodes[n]["value"].reshape(K, *s["value"].shape)
              for n, s in guide.prototype_trace.iter_stochastic_nodes()}  # fmt: skip
    each = []
    for k in range(K):
        with SubstituteMessenger({n: v[k] for n, v in values.items()}):
            f = flat(net(*args))[0]
        each.append(dist.Normal(f.flatten(1).mean(-1), 0.7).log_prob(y))
    each = torch.stack(each)
    components = {} if family == "delta" else guide.component_distributions()
    for likelihood in ("average", "log_mixture"):
        for kl in ("mean", "sum", "exact"):
            elbo = Mixture_ELBO(likelihood, kl, max_plate_nesting=1)
            pyro.set_rng_seed(7)
            loss = elbo.loss(model, guide, *args, y=y)
            fit = each.sum(-1).mean() if likelihood == "average" else (each.logsumexp(0) - math.log(K)).sum()
            if family == "delta":
                log_prior = sum(priors[n].log_prob(values[n]) for n in priors).mean()
                assert_close(loss, -10 * fit - log_prior, rtol=1e-9)
                continue
            kls = torch.stack(
                [
                    sum(kl_divergence(_component(components[n], k), priors[n]) for n in priors)
                    for k in range(K)
                ]
            )
            log_q = torch.stack(
                [sum(_component(components[n], j).log_prob(values[n]) for n in priors) for j in range(K)], -1
            )
            information = math.log(K) + log_q.log_softmax(-1).diagonal().mean()
            divergence = {"mean": kls.mean(), "sum": kls.sum(), "exact": kls.mean() - information}[kl]
            assert_close(loss, divergence - 10 * fit, rtol=1e-9)


def _component(fn, k):
    base = fn.base_dist if isinstance(fn, torch.distributions.Independent) else fn
    return type(base)(base.loc[k], base.scale[k]).to_event(base.loc.dim() - 1)
