# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Cost of Laplace approximations, in epochs of forward + backward passes of the same network on the same data in batches
of 128 in the same process; beside laplace-torch where it is installed.

    python benchmarks/laplace_speed.py --out results.json
    python benchmarks/laplace_speed.py --networks cnn --structures diagonal --out results.json
    python benchmarks/laplace_speed.py --smoke

Each cost is the median over repetitions of (time / time of an epoch measured right before it), so that a machine
whose load changes slowly changes little. ``--clock cpu`` counts processor seconds instead of seconds, for machines that
are shared; with one thread the two agree where nothing else runs. laplace-torch's slow rows are run once, and on
a share of data and new points (``n`` and ``predicted`` of a row), which leaves the ratios as they are. Rows of an earlier run in the same file stay unless they are measured again.

``--parts``: ``fit`` (the approximation), ``tune`` (100 evaluations of the evidence in one prior precision), ``predict``
(linearised prediction of 1,000 points), ``memory`` (how far the resident memory of a process of its own rises during the
fit and during the prediction, by the kernel's high-water mark, which is reset before), ``budget`` (the same for smaller
budgets), ``batch`` (the full structure's prediction by batch size) and ``bound`` (a forward pass and nine backward passes
to the outputs of the layers, written by hand: what the exact curvature of ten classes needs before any product is formed).
"""

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pyro_bnn.infer.autoguide import AutoLaplace

SIZES = {"mlp": 10_000, "cnn": 5_000, "resnet": 1_000}
STRUCTURES: dict[str, dict[str, Any]] = {
    "kronecker": {"structure": "kronecker"},
    "diagonal": {"structure": "diagonal"},
    "last-layer full": {"structure": "full", "sites": "last_layer"},
    "last-layer kronecker": {"structure": "kronecker", "sites": "last_layer"},
    "kronecker, Monte-Carlo Fisher": {"structure": "kronecker", "curvature": "mc_fisher"},
}
PEER: dict[str, dict[str, Any]] = {
    "kronecker": {"subset_of_weights": "all", "hessian_structure": "kron"},
    "diagonal": {"subset_of_weights": "all", "hessian_structure": "diag"},
    "last-layer full": {"subset_of_weights": "last_layer", "hessian_structure": "full"},
    "last-layer kronecker": {"subset_of_weights": "last_layer", "hessian_structure": "kron"},
    "kronecker, Monte-Carlo Fisher": {
        "subset_of_weights": "all",
        "hessian_structure": "kron",
        "backend_kwargs": {"stochastic": True},
    },
}
LIBRARIES = ("pyro_bnn", "laplace-torch")
PARTS = ("fit", "tune", "predict", "memory", "budget", "batch", "bound")
#: In how large batches laplace-torch predicts: its Jacobians cost more per point in larger ones.
PEER_BATCH = 16


class Residual(nn.Module):
    """Two convolutions around a skip connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.skip(x) + self.second(torch.relu(self.first(x))))


def network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    if name == "mlp":
        layers = [nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)]
        return nn.Sequential(*layers), (784,)
    if name == "cnn":
        return nn.Sequential(
            nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
        ), (1, 28, 28)  # fmt: skip
    if name == "small":
        return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4)), (
            16,
        )
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    ), (3, 32, 32)  # fmt: skip


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Problem:
    """A network with Gaussian weights, and data for it."""

    def __init__(self, name: str, n: int, n_new: int) -> None:
        pyro.set_rng_seed(0)
        self.net, shape = network(name)
        outputs = self.net[-1].out_features  # type: ignore[index]
        self.x, self.y = torch.randn(n, *shape), torch.randint(0, int(outputs), (n,))
        self.x_new = torch.randn(n_new, *shape)
        self.shapes = {k: v.shape for k, v in self.net.named_parameters()}
        self.trained = {k: v.detach().clone() for k, v in self.net.named_parameters()}

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The network with standard normal weights, and one class per point."""
        values = {
            k: pyro.sample(k, dist.Normal(torch.zeros(s), 1.0).to_event(len(s)))
            for k, s in self.shapes.items()
        }
        logits = functional_call(self.net, values, (x,))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    def epoch(self) -> None:
        """The unit of time."""
        for start in range(0, len(self.x), 128):
            self.net.zero_grad()
            part = slice(start, start + 128)
            F.cross_entropy(self.net(self.x[part]), self.y[part]).backward()

    def guide(self, **arguments: Any) -> AutoLaplace:
        """A guide whose point estimate is the network as initialised: costs do not depend on its values."""
        guide = AutoLaplace(self.model, **arguments).initialize(self.x[:4], self.y[:4])
        guide.loc.data.copy_(guide.packed.space.pack(self.trained))
        return guide

    def works(self, library: str, structure: str, **options: Any) -> dict[str, Callable[[], Any]]:
        """What is measured, by part; ``fit`` comes first."""
        if library == "pyro_bnn":
            guide = self.guide(**STRUCTURES[structure], **options)
            data, candidates = (self.x, self.y), [10 ** (0.02 * i - 1) for i in range(100)]
            return {
                "fit": lambda: guide.laplace_approximation(data, map_tolerance=float("inf")),
                "tune": lambda: guide.optimize_hyperparameters(method="grid", candidates=candidates),
                "predict": lambda: guide.linearized_outputs(self.x_new),
            }
        from laplace import Laplace
        from torch.utils.data import DataLoader, TensorDataset

        loader = DataLoader(TensorDataset(self.x, self.y), batch_size=128)
        fitted: list[Any] = []

        def fit() -> None:
            fitted[:] = [Laplace(self.net, "classification", **PEER[structure])]
            fitted[0].fit(loader)

        def predict() -> None:
            for part in self.x_new.split(PEER_BATCH):
                fitted[0]._glm_predictive_distribution(part)

        return {
            "fit": fit,
            "tune": lambda: fitted[0].optimize_prior_precision(method="marglik", n_steps=100),
            "predict": predict,
        }


def measure(
    unit: Callable[[], None], work: Callable[[], Any], repeat: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Ratios of the work's time to that of a unit right before it."""
    if repeat > 1:
        work()
    unit()
    ratios, seconds = [], []
    for _ in range(repeat):
        start = clock()
        unit()
        middle = clock()
        work()
        seconds.append(clock() - middle)
        ratios.append(seconds[-1] / (middle - start))
    return {
        "median": statistics.median(ratios),
        "smallest": min(ratios),
        "largest": max(ratios),
        "seconds": statistics.median(seconds),
        "repetitions": repeat,
    }


def resident(field: str) -> float:
    """``VmRSS`` or ``VmHWM`` of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def rise(work: Callable[[], Any]) -> float:
    """By how many MB the resident memory rises while work runs."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present size
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def memory_of(library: str, name: str, structure: str, n: int, n_new: int, budget: int | None) -> None:
    """Prints the rises of fit and prediction; runs in a process of its own."""
    options = {} if budget is None else {"budget": budget}
    small = Problem(name, 32, 32).works(library, structure)
    small["fit"]()  # loads code and libraries
    small["predict"]()
    works = Problem(name, n, n_new).works(library, structure, **options)
    print(json.dumps({"fit": rise(works["fit"]), "predict": rise(works["predict"])}))


def memory(library: str, name: str, structure: str, options: argparse.Namespace, budget: int | None) -> Any:
    n, n_new = sizes(name, options)
    arguments = [library, name, structure, str(n), str(n_new), str(budget or 0), str(options.threads)]
    run = subprocess.run(
        [sys.executable, __file__, "--memory-of", *arguments], capture_output=True, text=True, check=False
    )
    if run.returncode:
        print(run.stderr[-500:])
        return None
    return json.loads(run.stdout.splitlines()[-1])


def sizes(name: str, options: argparse.Namespace) -> tuple[int, int]:
    return (200, 50) if options.smoke else (SIZES[name], 1000)


def compare(name: str, structure: str, library: str, options: argparse.Namespace) -> dict[str, Any]:
    n, n_new = sizes(name, options)
    if library != "pyro_bnn":
        n, n_new = round(n * options.peer_share), round(n_new * options.peer_share)
    problem = Problem(name, n, n_new)
    works = problem.works(library, structure)
    repeat = 1 if options.smoke else (options.repeat if library == "pyro_bnn" else options.peer_repeat)
    row: dict[str, Any] = {
        "network": name,
        "structure": structure,
        "library": library,
        "n": n,
        "predicted": n_new,
    }
    if {"fit", "tune", "predict"} & set(options.parts):
        for part, work in works.items():
            if part in options.parts:
                row[part] = measure(problem.epoch, work, repeat, CLOCKS[options.clock])
            elif part == "fit":
                work()
    if options.smoke and (name, structure) != ("mlp", "kronecker"):
        return row  # starting a process takes longer than the rest
    if "memory" in options.parts:
        row["memory, MB"] = memory(library, name, structure, options, None)
    if "budget" in options.parts and library == "pyro_bnn":
        row["memory by budget, MB"] = {
            str(2**k): memory(library, name, structure, options, 2**k)
            for k in ((18,) if options.smoke else (18, 22, 27))
        }
    return row


def bound(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The fastest of several sizes of batches."""
    problem = Problem(name, *sizes(name, options))
    found: list[Tensor] = []
    for module in problem.net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(lambda module, inputs, output: found.append(output))

    def passes(size: int) -> None:
        for part in problem.x.split(size):
            found.clear()
            outputs = problem.net(part)
            for cotangent in torch.randn(9, *outputs.shape):
                torch.autograd.grad(outputs, found, cotangent, retain_graph=True)

    def epoch() -> None:
        problem.epoch()
        found.clear()

    repeat = 1 if options.smoke else options.repeat
    results = {
        size: measure(epoch, lambda size=size: passes(size), repeat, CLOCKS[options.clock])  # type: ignore[misc]
        for size in ((64,) if options.smoke else (64, 256, 2000))
        if size <= len(problem.x)
    }
    size = min(results, key=lambda size: results[size]["median"])
    return {"network": name, "structure": "lower bound", "library": "by hand", "n": len(problem.x),
            "batch": size, "fit": results[size]}  # fmt: skip


def by_batch_size(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds per point of the full structure over all weights, by the number of points predicted at once."""
    problem = Problem("small", 500, 4000)
    guide = problem.guide(structure="full")
    guide.laplace_approximation((problem.x, problem.y), map_tolerance=float("inf"))
    clock, found = CLOCKS[options.clock], {}
    for size in (50, 100) if options.smoke else (125, 250, 500, 1000, 2000, 4000):
        x = problem.x_new[:size]
        guide.linearized_outputs(x)
        seconds = []
        for _ in range(options.repeat):
            start = clock()
            guide.linearized_outputs(x)
            seconds.append(clock() - start)
        found[str(size)] = 1e6 * statistics.median(seconds) / size
    parameters = len(guide.loc)
    return {"network": "small", "structure": "full", "library": "pyro_bnn", "n": 500, "parameters": parameters,
            "microseconds per point by batch size": found}  # fmt: skip


def main() -> None:
    if "--memory-of" in sys.argv:
        library, name, structure, *numbers = sys.argv[sys.argv.index("--memory-of") + 1 :]
        n, n_new, budget, threads = map(int, numbers)
        torch.set_num_threads(threads)
        warnings.simplefilter("ignore")
        memory_of(library, name, structure, n, n_new, budget or None)
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="small data, to see that everything runs")
    parser.add_argument("--networks", nargs="+", choices=tuple(SIZES), default=tuple(SIZES))
    parser.add_argument("--structures", nargs="+", choices=tuple(STRUCTURES), default=tuple(STRUCTURES))
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--peer-repeat", type=int, default=1)
    parser.add_argument(
        "--peer-share", type=float, default=1.0, help="share of data and new points for laplace-torch"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    libraries = list(options.libraries)
    versions = {k: importlib.metadata.version(k) for k in ("torch", "pyro-ppl")}
    if "laplace-torch" in libraries:
        try:
            import laplace  # noqa: F401

            versions["laplace-torch"] = importlib.metadata.version("laplace-torch")
        except (ImportError, RuntimeError) as error:
            print(f"laplace-torch is left out: {error}")
            libraries.remove("laplace-torch")
    common = {"versions": versions, "threads": options.threads, "clock": options.clock, "seed": 0}
    rows = [
        (name, structure, library)
        for name in options.networks
        for structure in options.structures
        for library in libraries
    ]
    for key in rows if set(options.parts) - {"batch", "bound"} else ():
        store({**compare(*key, options), **common}, options.out)
    if "bound" in options.parts:
        for name in options.networks:
            store({**bound(name, options), **common}, options.out)
    if "batch" in options.parts:
        store({**by_batch_size(options), **common}, options.out)


def store(row: dict[str, Any], out: Path | None) -> None:
    """Prints a row and merges it into those of the file."""
    print(json.dumps(row), flush=True)
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(out.read_text()) if out.exists() else []
    for old in rows:
        if all(old[k] == row[k] for k in ("network", "structure", "library")):
            old.update(row)
            break
    else:
        rows.append(row)
    out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
