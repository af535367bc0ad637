# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A data-parallel run for test_distributed.py: ``python distributed_script.py RANK WORLD STORE RESULT``."""

import sys

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_bnn.infer import Mixture_ELBO, fit
from pyro_bnn.infer.autoguide import AutoLaplace, AutoMixture
from pyro_bnn.infer.curvature import CurvatureAccumulator
from tests.infer.models import NOISE, linear_data, linear_posterior


def model(x: Tensor, y: Tensor | None = None) -> None:
    """Linear regression on 40 points, of which any part may be passed."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", 40, subsample_size=len(x)):
        pyro.sample("obs", dist.Normal((x * weight).sum(-1), NOISE), obs=y)


def train(rank: int, world: int) -> dict[str, Tensor]:
    """Fits on batches of 20 points, of which every process passes its part."""
    pyro.set_rng_seed(0)
    x, y = linear_data(40)
    parts = [(x[i : i + 20], y[i : i + 20]) for i in (0, 20)]
    loader = [(a.chunk(world)[rank], b.chunk(world)[rank]) for a, b in parts]

    def seed(step: int) -> float:
        """Called before every loss: the same draws in runs with any number of processes."""
        torch.manual_seed(step)
        return 1.0

    found = {}
    for name, guide, elbo, kl_scale in (
        ("normal", AutoNormal(model), Trace_ELBO(), seed),
        ("mixture", AutoMixture(model, 2), Mixture_ELBO(), seed),
        ("shared", AutoNormal(model), Trace_ELBO(), None),
    ):
        pyro.set_rng_seed(1 + rank)
        result = fit(
            model, guide, loader, num_epochs=20, optim=0.05, elbo=elbo, kl_scale=kl_scale, progress_bar=False
        )
        found[f"{name} losses"] = result.losses
        for key, value in guide.named_parameters():
            found[f"{name} {key}"] = value.detach()
    return found


def curvature(rank: int, world: int) -> dict[str, Tensor]:
    """Curvature of the full data, of which every process passes its part."""
    pyro.set_rng_seed(0)
    x, y = linear_data(40)
    part = x.chunk(world)[rank], y.chunk(world)[rank]
    found = {}
    for kind in ("ggn", "hessian"):
        guide = AutoLaplace(model, curvature=kind)
        guide.initialize(*part)
        with torch.no_grad():
            guide.loc.copy_(linear_posterior(x, y)[0])
        accumulator = CurvatureAccumulator(guide.packed, guide.loc, kind)
        found[f"{kind} matrix"] = accumulator.matrix(part)
        found[f"{kind} diagonal"] = accumulator.diagonal(part)
        found[f"{kind} products"] = accumulator.operator(part)(torch.eye(3))
        found[f"{kind} batched products"] = accumulator.operator(
            [(a[None], b[None]) for a, b in zip(*part, strict=True)]
        )(torch.eye(3))
        guide.laplace_approximation(part)
        found[f"{kind} covariance"] = guide.get_posterior().covariance_matrix
        found[f"{kind} evidence"] = guide.log_evidence().detach()
    return found


def main(rank: int, world: int, store: str, result: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = train(rank, world) | curvature(rank, world)
    torch.save(found, f"{result}.{rank}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
