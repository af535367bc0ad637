# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Time and memory of rank-1 networks, as ratios to the deterministic network in the same process.

For each network: a training step of the deterministic network in plain torch; of a hand-written rank-1 network in plain
torch (no Pyro, closed-form divergence, shared noise); and a step of ``infer.fit``, from one callback to the next. Then
prediction by ``infer.posterior_predictive`` with S draws, and by the converted network alone under the same draws in
chunks, against S deterministic passes. The measurements of one round are interleaved and the medians of the ratios
over the rounds are reported, with their quartiles.

    python benchmarks/rank1_speed.py --out results.json
"""

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bnn.infer import Mixture_ELBO, fit, posterior_predictive
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.model.handlers import SubstituteMessenger
from pyro_bnn.nn import rank1_


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


class Block(nn.Module):
    """A basic block of the CIFAR ResNets (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet20() -> nn.Module:
    widths = [16] * 4 + [32] * 3 + [64] * 3
    blocks = [Block(a, b, 2 if a != b else 1) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


class HandRank1(nn.Module):
    """Rank-1 factors around the layers of a network, written by hand: means, scales, a draw, a divergence."""

    def __init__(self, layer: nn.Module, K: int) -> None:
        super().__init__()
        weight, self.transposed = layer.weight, False
        self.K, self.weight, self.layer = K, weight, [layer]
        out, inputs = weight.shape[:2]
        self.mean = nn.ParameterList([nn.Parameter(torch.ones(K, 1, n)) for n in (out, inputs)])
        self.rho = nn.ParameterList([nn.Parameter(torch.full((K, 1, n), -3.4)) for n in (out, inputs)])
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().expand(K, 1, -1).clone())
        self.kl: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        scale = [F.softplus(rho) for rho in self.rho]
        r, s = (m + sd * torch.randn_like(sd) for m, sd in zip(self.mean, scale, strict=True))
        self.kl = sum(
            ((0.1 / sd).log() + (sd.square() + (m - 1).square()) / 0.02 - 0.5).sum()
            for m, sd in zip(self.mean, scale, strict=True)
        )
        layer = self.layer[0]
        post = (1,) * (self.weight.dim() - 2)
        K, shape = self.K, x.shape[1:]
        y = (x.view(K, -1, *shape) * s.view(K, 1, -1, *post)).view(-1, *shape)
        if post:
            y = F.conv2d(y, self.weight, None, layer.stride, layer.padding)
        else:
            y = F.linear(y, self.weight)
        y = y.view(K, -1, *y.shape[1:]) * r.view(K, 1, -1, *post)
        if self.bias is not None:
            y = y + self.bias.view(K, 1, -1, *post)
        return y.flatten(0, 1)


def by_hand(net: nn.Module, K: int) -> nn.Module:
    for name, child in list(net.named_children()):
        if isinstance(child, (nn.Linear, nn.Conv2d)):
            setattr(net, name, HandRank1(child, K))
        else:
            by_hand(child, K)
    return net


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MLP 784-400-400-10": (mlp, (784,), 128),
    "CNN 32-64-128": (cnn, (1, 28, 28), 64),
    "ResNet-20": (resnet20, (3, 32, 32), 16),
}
NUM_DATA = 50_000


def deterministic_step(make: Callable[[], nn.Module], x: Tensor, y: Tensor) -> Callable[[], None]:
    net = make()
    optim = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optim.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optim.step()

    return step


def hand_step(make: Callable[[], nn.Module], x: Tensor, y: Tensor, K: int) -> Callable[[], None]:
    net = by_hand(make(), K)
    optim = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
    layers = [m for m in net.modules() if isinstance(m, HandRank1)]

    def step() -> None:
        optim.zero_grad()
        logits = net(x.repeat(K, *(1,) * (x.dim() - 1)))
        loss = F.cross_entropy(logits, y.repeat(K)) + sum(layer.kl for layer in layers) / K / NUM_DATA
        loss.backward()
        optim.step()

    return step


def pyro_parts(make: Callable[[], nn.Module], x: Tensor, y: Tensor, K: int, **options: Any) -> Any:
    # the biases are shared in no network; their MAP terms are those of the recommended model
    net = rank1_(make(), **options)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = net(x)
        with pyro.plate("data", NUM_DATA, subsample=torch.arange(len(x))):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    guide = AutoMixture(model, K).initialize(x, y)
    return net, model, guide


def fit_steps(
    make: Callable[[], nn.Module], x: Tensor, y: Tensor, K: int, base: Callable[[], None], rounds: int, warm: int,
    **options: Any,
) -> list[tuple[float, float]]:  # fmt: skip
    """Times of steps of ``fit`` and of ``base``, which runs between them."""
    _, model, guide = pyro_parts(make, x, y, K, **options)
    times: list[tuple[float, float]] = []
    last = [0.0]

    def callback(state: Any) -> None:
        now = TIMER()
        times.append((now - last[0], clock(base)))
        last[0] = TIMER()

    last[0] = TIMER()
    fit(
        model, guide, (x, y), num_steps=rounds + warm, optim=1e-4, elbo=Mixture_ELBO(max_plate_nesting=1),
        callbacks=callback, progress_bar=False,
    )  # fmt: skip
    return times[warm:]


#: the clock: wall time, or on a machine that others use the CPU time of this process
TIMER = time.perf_counter


def clock(fn: Callable[[], Any]) -> float:
    start = TIMER()
    fn()
    return TIMER() - start


def ratios(
    base: Callable[[], Any], others: dict[str, Callable[[], Any]], rounds: int, warm: int = 2
) -> dict[str, Any]:
    for fn in (base, *others.values()):
        for _ in range(warm):
            fn()
    collected: dict[str, list[float]] = {name: [] for name in others}
    times = []
    for _ in range(rounds):
        before = clock(base)
        for name, fn in others.items():
            mine = clock(fn)
            after = clock(base)
            collected[name].append(mine / (0.5 * (before + after)))
            before = after
            times.append(after)
    out: dict[str, Any] = {"baseline_ms": 1e3 * statistics.median(times)}
    for name, values in collected.items():
        out |= summary(name, values)
    return out


def summary(name: str, values: list[float]) -> dict[str, float]:
    low, mid, high = statistics.quantiles(values, n=4)
    return {name: mid, f"{name}_low": low, f"{name}_high": high}


def training(make: Callable[[], nn.Module], x: Tensor, y: Tensor, K: int, rounds: int) -> dict[str, Any]:
    base = deterministic_step(make, x, y)
    row = ratios(base, {"hand": hand_step(make, x, y, K)}, rounds, warm=3)
    for name, options in (("pyro", {}), ("pyro_scale", {"apply": "scale"}), ("pyro_materialise", {"apply": "materialise"})):  # fmt: skip
        times = fit_steps(make, x, y, K, base, rounds, 3, **options)
        # a step of the baseline lies on either side of each but the first
        pairs = itertools.pairwise(times)
        row |= summary(name, [2 * mine / (before + after) for (_, before), (mine, after) in pairs])
    return row


def prediction(
    make: Callable[[], nn.Module], x: Tensor, y: Tensor, S: int, rounds: int, **options: Any
) -> dict[str, Any]:
    plain = make().eval()
    net, model, guide = pyro_parts(make, x, y, 4, **options)
    net.eval()
    with torch.no_grad():
        sampled = guide.sample_posterior((S,))
        draws = {name: value.unsqueeze(1) for name, value in sampled.items()}

        def base() -> None:
            for _ in range(S):
                plain(x)

        def chunks(size: int) -> Callable[[], None]:
            def run() -> None:
                for part in range(0, S, size):
                    with SubstituteMessenger({n: v[part : part + size] for n, v in draws.items()}):
                        net(x)

            return run

        def predictive() -> None:
            posterior_predictive(model, guide, (x,), draws=sampled)

        others = {
            "posterior_predictive": predictive,
            **{f"chunks_of_{n}": chunks(n) for n in (1, 4, 20) if n <= S},
        }
        return ratios(base, others, rounds, warm=1)


def peak_resident() -> float:
    """Peak resident size of this process in MiB; ``getrusage`` would include that of the parent before exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def peak_memory(which: str, name: str, K: int, steps: int = 3) -> None:
    """Runs in a process of its own; prints the peak resident size in MiB before and after training steps."""
    make, shape, batch = NETWORKS[name]
    x, y = torch.randn(batch, *shape), torch.randint(10, (batch,))
    before = peak_resident()
    if which == "hand":
        step = hand_step(make, x, y, K)
        for _ in range(steps):
            step()
    else:
        fit_steps(make, x, y, K, lambda: None, steps, 0)
    print(json.dumps([before, peak_resident()]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="three rounds, small batches, no memory rows")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu on a machine that is shared"
    )
    parser.add_argument("--prediction-rounds", type=int, default=5)
    parser.add_argument("--networks", nargs="*", help="parts of names; all by default")
    parts = ("training", "prediction", "memory")
    parser.add_argument("--parts", nargs="*", default=parts, choices=parts)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.memory:
        peak_memory(args.memory[0], args.memory[1], int(args.memory[2]))
        return
    globals()["TIMER"] = time.process_time if args.clock == "cpu" else time.perf_counter
    rounds = 3 if args.smoke else args.rounds
    rows: list[dict[str, Any]] = []
    common = {"clock": args.clock, "threads": args.threads, "torch_version": torch.__version__, "pyro_version": pyro.__version__, "seed": 0,
              "python": platform.python_version(), "rounds": rounds}  # fmt: skip

    def add(row: dict[str, Any]) -> None:
        rows.append(common | row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        if args.out:  # rows of an earlier run stay unless this one measures them again
            key = lambda r: (r["what"], r["network"], r.get("K"), r.get("which"))  # noqa: E731
            old = json.loads(args.out.read_text()) if args.out.exists() else []
            kept = [r for r in old if key(r) not in {key(r) for r in rows}]
            args.out.write_text(json.dumps(kept + rows, indent=1) + "\n")

    for name, (make, shape, batch) in NETWORKS.items():
        if args.networks and not any(part.lower() in name.lower() for part in args.networks):
            continue
        batch = 8 if args.smoke else batch
        x, y = torch.randn(batch, *shape), torch.randint(10, (batch,))
        if "training" in args.parts:
            for K in (1, 4):
                row = training(make, x, y, K, rounds)
                add({"what": "training step", "network": name, "K": K, "batch": batch, **row,
                     "pyro_over_hand": row["pyro"] / row["hand"]})  # fmt: skip
        if "prediction" in args.parts:
            S = 8 if args.smoke else 100
            times = min(rounds, args.prediction_rounds)
            row = {"rounds": times, **prediction(make, x, y, S, times)}
            add({"what": f"prediction, S = {S}", "network": name, "batch": batch, **row})
        if "memory" in args.parts and not args.smoke:
            for which in ("hand", "pyro"):
                command = [sys.executable, "-W", "ignore", __file__, "--memory", which, name, "4", "--threads",
                           str(args.threads)]  # fmt: skip
                before, after = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
                add({"what": "peak memory, training, K = 4", "network": name, "which": which, "batch": batch,
                     "MiB": after, "MiB_above_start": after - before})  # fmt: skip


if __name__ == "__main__":
    main()
