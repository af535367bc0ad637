# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""First-order runs in two processes for test_hfl_first_order_distributed.py: ``RANK WORLD STORE RESULT KIND``."""

import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from pyro_bnn.infer import hfl

NOISE, PRECISION, N = 0.5, 2.0, 24
TARGETS = torch.tensor([[1.0, 0.0, -1.0], [0.5, 2.0, 0.0], [-1.0, 1.0, 1.0]], dtype=torch.float64)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    return x, torch.sin(x.sum(-1, keepdim=True)) + 0.3 * torch.randn(
        N, 1, generator=generator, dtype=torch.float64
    )


def linear() -> nn.Module:
    return nn.Linear(3, 1)


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def loss(net: Any, x: Tensor, y: Tensor) -> Tensor:
    """Of a batch; N times it is on average the negative log joint density, but for the prior."""
    out: Tensor = 0.5 * ((net(x) - y) / NOISE).square().mean()
    return out


def joint(build: Callable[[], nn.Module]) -> Callable[[Tensor], Tensor]:
    """The negative log joint density of all data as a function of all weights in one vector."""
    net = build()
    x, y = data()

    def value(theta: Tensor) -> Tensor:
        return N * loss(net_at(net, theta), x, y) + 0.5 * PRECISION * theta.square().sum()

    return value


def net_at(net: nn.Module, theta: Tensor) -> Callable[[Tensor], Tensor]:
    """A network as a function of all its weights."""
    sizes = [p.numel() for p in net.parameters()]
    parts = {
        name: part.view_as(p)
        for (name, p), part in zip(net.named_parameters(), theta.split(sizes), strict=True)
    }
    return lambda x: torch.func.functional_call(net, parts, (x,))


def mode(build: Callable[[], nn.Module]) -> Tensor:
    """A minimum, by Newton's method with a dense Hessian from where L-BFGS ends."""
    value = joint(build)
    torch.manual_seed(1)
    theta = 0.5 * torch.randn(sum(p.numel() for p in build().parameters()))
    leaf = theta.requires_grad_(True)
    optimizer = torch.optim.LBFGS([leaf], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        out = value(leaf)
        out.backward()
        return out

    optimizer.step(closure)
    theta = leaf.detach()
    for _ in range(5):
        H = torch.autograd.functional.hessian(value, theta)
        theta = theta - torch.linalg.solve(H, torch.autograd.functional.jacobian(value, theta))
    return theta


def reference(build: Callable[[], nn.Module], targets: Tensor = TARGETS) -> Tensor:
    """The Laplace covariance of the outputs, by a dense Hessian."""
    theta = mode(build)
    J = torch.autograd.functional.jacobian(lambda t: net_at(build(), t)(targets).squeeze(-1), theta)
    return J @ torch.linalg.solve(torch.autograd.functional.hessian(joint(build), theta), J.mT)


def at_mode(build: Callable[[], nn.Module]) -> nn.Module:
    net = build()
    nn.utils.vector_to_parameters(mode(build), net.parameters())
    return net


def batches(rank: int, world: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    rows = TensorDataset(*data())
    sampler: Any = DistributedSampler(rows, world, rank) if world > 1 else None
    for epoch in range(epochs):
        if sampler is not None:
            sampler.set_epoch(epoch)
        yield from DataLoader(rows, batch_size=12 // world, sampler=sampler, shuffle=world == 1)


def wrapped(kind: str, net: Any, world: int) -> Any:
    """As a user would."""
    if kind == "ddp":
        return DistributedDataParallel(net)
    if kind == "ddp, views":
        return DistributedDataParallel(net, gradient_as_bucket_view=True)
    mesh: Any = None
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("copies", "shards"))
    elif kind == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
    options: dict[str, Any] = {"mesh": mesh}
    if isinstance(net, nn.Sequential):
        fully_shard(net[0], **options)
    return fully_shard(net, **options)


def runs(rank: int, world: int, kind: str, build: Callable[[], nn.Module], **options: Any) -> hfl.HFLResult:
    """The variances of the outputs, from a loop of one's own."""
    net = at_mode(build)
    if world > 1:
        net = wrapped(kind, net, world)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=PRECISION / N)
    runs = hfl.FirstOrder(net, lambda net: net(TARGETS), optimizer, scale=N, **options)
    for run in runs:
        for x, y in batches(rank, world, run.epochs(3)):
            optimizer.zero_grad()
            loss(net, x, y).backward()
            optimizer.step()
    return runs.result()


def everything(rank: int, world: int, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, build, options in (
        ("linear", linear, {"curvature": "ggn", "method": "central", "sweeps": 3}),
        ("linear, one sweep", linear, {"curvature": "ggn", "method": "gradients", "sweeps": 0}),
        ("deep", deep, {"method": "paired", "sweeps": 12, "tolerance": 1e-6}),
    ):
        result = runs(rank, world, kind, build, **options)
        found[name] = result.covariance
        found[f"{name}: latents"] = torch.tensor(result.num_latents)
        if result.lower is not None and result.upper is not None:
            found[f"{name}: bounds"] = torch.stack([result.lower, result.upper])
    return found


def main(rank: int, world: int, store: str, result: str, kind: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=180)
    )
    torch.save(everything(rank, world, kind), f"{result}.{rank}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5])
