# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A data-parallel run for test_distributed.py: ``python distributed_script.py RANK WORLD STORE RESULT``."""

import sys
from datetime import timedelta
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_bnn.curvature.accumulate import CurvatureAccumulator
from pyro_bnn.infer import Mixture_ELBO, fit, hfl
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoMixture
from pyro_bnn.infer.initialize import initialize_guide
from tests.infer.models import NOISE, linear_data, linear_posterior


def model(x: Tensor, y: Tensor | None = None) -> None:
    """Linear regression on 40 points, of which any part may be passed."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", 40, subsample_size=len(x)):
        pyro.sample("obs", dist.Normal((x * weight).sum(-1), NOISE), obs=y)


def training_part(rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    """The part of this process in two global batches of 20 points."""
    pyro.set_rng_seed(0)
    x, y = linear_data(40)
    parts = [(x[i : i + 20], y[i : i + 20]) for i in (0, 20)]
    return [(a.chunk(world)[rank], b.chunk(world)[rank]) for a, b in parts]


def train(rank: int, world: int) -> dict[str, Tensor]:
    """Fits on batches of 20 points, of which every process passes its part."""
    loader = training_part(rank, world)

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
            model, guide, loader, num_epochs=6, optim=0.05, elbo=elbo, kl_scale=kl_scale, progress_bar=False
        )
        found[f"{name} losses"] = result.losses
        for key, value in guide.named_parameters():
            found[f"{name} {key}"] = value.detach()
    # a callback that stops one process stops all of them at the same step
    result = fit(
        model,
        AutoNormal(model),
        loader,
        num_epochs=20,
        progress_bar=False,
        callbacks=lambda state: rank == world - 1 and state.step == 3,
    )
    assert (result.stop_reason == "callback") == (rank == world - 1)
    found["stopped at"] = torch.tensor(result.num_steps)
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


def network(x: Tensor, y: Tensor | None = None) -> None:
    """A small tanh network over 40 points, of which any part may be passed."""
    first = pyro.sample("first", dist.Normal(torch.zeros(4, 3), 1.0).to_event(2))
    bias = pyro.sample("bias", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    second = pyro.sample("second", dist.Normal(torch.zeros(1, 4), 0.5).to_event(2))
    f = torch.nn.functional.linear(torch.tanh(torch.nn.functional.linear(x, first, bias)), second).squeeze(-1)
    with pyro.plate("data", 40, subsample_size=len(x)):
        pyro.sample("obs", dist.Normal(f, NOISE), obs=y)


def network_part(rank: int, world: int) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Inputs of which all are targets, and two batches of this process."""
    pyro.set_rng_seed(0)
    x, y = torch.randn(40, 3), torch.randn(40)
    mine = x.chunk(world)[rank], y.chunk(world)[rank]
    return x[:5], mine[0], list(zip(mine[0].chunk(2), mine[1].chunk(2), strict=True))


def laplace(rank: int, world: int) -> dict[str, Tensor]:
    """Polishing, every structure that adds up, and their evidence."""
    targets, _, batches = network_part(rank, world)
    pyro.set_rng_seed(1)
    guide = AutoLaplace(network).initialize(*batches[0])
    with torch.no_grad():
        guide.loc.copy_(0.5 * torch.sin(torch.arange(20.0)))
    mode = guide.polish(batches).loc.detach()
    found = {"loc": mode}
    for structure in ("full", "block", "kronecker", "diagonal", "low_rank"):
        pyro.set_rng_seed(1)
        guide = AutoLaplace(network, structure=structure, rank=6).initialize(*batches[0])
        with torch.no_grad():
            guide.loc.copy_(mode)
        guide.laplace_approximation(batches)
        found[f"{structure} variances"] = guide.posterior.variance
        found[f"{structure} evidence"] = guide.log_evidence().detach()
        found[f"{structure} loss"] = guide.negative_log_joint(batches)[0]
        found[f"{structure} variance"] = guide.linearized_outputs(targets)["obs"].covariance
    for subnetwork in ("random", "largest_variance", "largest_magnitude"):
        pyro.set_rng_seed(1 + rank)  # the choice is that of the first process
        guide = AutoLaplace(network, subnetwork=subnetwork, subnetwork_size=8).initialize(*batches[0])
        with torch.no_grad():
            guide.loc.copy_(mode)
        guide.laplace_approximation(batches)
        assert guide.active is not None
        found[f"{subnetwork} entries"] = guide.active
        found[f"{subnetwork} variances"] = guide.posterior.variance
    return found


def hessian_free(rank: int, world: int) -> dict[str, Tensor]:
    """Hessian-free Laplace with either curvature, by solves and by perturbation, its guide, the sandwich and the score."""
    targets, _, batches = network_part(rank, world)
    pyro.set_rng_seed(1)
    guide = AutoHessianFreeLaplace(network, tolerance=1e-10).initialize(*batches[0])
    with torch.no_grad():
        guide.loc.copy_(0.5 * torch.sin(torch.arange(20.0)))
    guide.polish(batches)
    found = {}
    for name, options in {
        "cg": {"robust": True},
        "cg, ggn": {"curvature": "ggn", "preconditioner": "nystrom"},
        "one-sided, ggn": {"method": "one_sided", "curvature": "ggn", "check": False},
        "central, ggn": {"method": "central", "curvature": "ggn", "check": False},
        "probe": {"method": "probe", "num_probes": 5},
    }.items():
        result = hfl.solve(guide, batches, (targets,), tolerance=1e-10, **options)
        found[f"{name} variances"] = result.variances
        if result.sandwich is not None:
            found[f"{name} sandwich"] = result.sandwich
    found["score"] = hfl.regvar(
        guide, batches, (targets,), calibrate=0, num_epochs=None, tolerance=1e-10
    ).score
    guide.laplace_approximation(batches, (targets,))
    found["guide covariance"] = guide.covariance
    return found


def wrapped(rank: int, world: int) -> dict[str, Tensor]:
    """torch's DistributedDataParallel around the bound as a module, in a loop of one's own."""
    batches = training_part(rank, world)
    found = {}
    for name, guide, elbo in (
        ("normal", AutoNormal(model), Trace_ELBO()),
        ("mixture", AutoMixture(model, 2), Mixture_ELBO()),
    ):
        pyro.set_rng_seed(1)
        initialize_guide(model, guide, (batches[0], {}))
        module: Any = elbo(model, guide)
        if world > 1:
            module = torch.nn.parallel.DistributedDataParallel(module)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for step in range(6):
            torch.manual_seed(step)
            optimizer.zero_grad()
            module(*batches[step % 2]).backward()
            optimizer.step()
        for key, value in guide.named_parameters():
            found[f"wrapped {name} {key}"] = value.detach()
    return found


def statistics(rank: int, world: int) -> dict[str, Tensor]:
    """Batch normalisation, a counter and a constant of the network, after a run with a checkpoint."""
    pyro.set_rng_seed(0)
    net: Any = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    net.register_buffer("third", torch.tensor(1 / 3 + rank))
    for parameter in net.parameters():
        parameter.requires_grad_(False).add_(rank)

    def shifted(x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 40, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal((net[0](x) * weight).sum(-1) + net(x).squeeze(-1), NOISE), obs=y)

    found = {}
    fit(shifted, AutoNormal(shifted), training_part(rank, world), num_epochs=3, progress_bar=False)
    for name, value in net.state_dict().items():
        found[f"statistics {name}"] = value
    return found


def everything(rank: int, world: int) -> dict[str, Tensor]:
    """All of the above."""
    parts = (train, curvature, laplace, hessian_free, wrapped, statistics)
    return {name: value for part in parts for name, value in part(rank, world).items()}


def main(rank: int, world: int, store: str, result: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    torch.save(everything(rank, world), f"{result}.{rank}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
