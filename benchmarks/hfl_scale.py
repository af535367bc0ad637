# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Hessian-free Laplace variances for a convolutional network with a million parameters, checked in function space.

A network with 1.0 million weights is trained on n Fashion-MNIST images; the posterior is the Laplace approximation
with the GGN of these images at the trained weights. Variances of the predicted class's logit at the test images come from block
conjugate gradients with GGN-vector products, which know nothing of the network's structure. They stop where the certified
relative width of every variance is below the tolerance; the table says how many products that took, and how many an error of
that size needs, which only the check knows. The prior is the preconditioner, so that the number of block iterations is at most
about the rank n (K - 1) of the likelihood's part over the block size. The check forms the n K × n K kernel of the same network
from its layers (Hadamard products of activations and output gradients) and solves with it: exact, and possible only because n
is small.

Wider layers with seeded weights that were not trained (``--steps 0``) have 1e7 and 1e8 parameters:

    PYRO_BNN_DATA=../shared/data python benchmarks/hfl_scale.py --steps-of --test 100 --out results.json
    python benchmarks/hfl_scale.py --steps 0 --hidden 6300 --train 200 --test 16 --out results.json
    python benchmarks/hfl_scale.py --steps 0 --hidden 63400 --train 200 --test 2 --block 1 --chunk 1 --out results.json

A run replaces the row of its number of parameters and preconditioner in the file.
"""

import argparse
import json
import math
import os
import platform
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer.autoguide import init_to_value
from torch import Tensor
from torch.func import functional_call, jacrev, vmap

from pyro_bnn.infer import hfl
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.infer.hfl import run
from pyro_bnn.infer.hfl.direct import cg
from pyro_bnn.infer.hfl.task import Found, Task

DATA = Path(os.environ.get("PYRO_BNN_DATA", Path(__file__).parents[1] / "../shared/data")) / "images"
CLASSES = 10


class Network(torch.nn.Module):
    """Two strided convolutions and two dense layers."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 16, 5, stride=2, padding=2)
        self.conv2 = torch.nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.fc1 = torch.nn.Linear(32 * 7 * 7, hidden)
        self.fc2 = torch.nn.Linear(hidden, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """What the dense layers see, shape ``(n, 1568)``."""
        return torch.tanh(self.conv2(torch.tanh(self.conv1(x)))).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """The logits, shape ``(n, 10)``."""
        return self.fc2(torch.tanh(self.fc1(self.features(x))))


def prior_scale(shape: torch.Size) -> float:
    return 2.0 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1


def bayesian(network: Network):
    """The network as an ordinary Pyro model with a N(0, 4 / fan-in) prior."""
    shapes = {name: p.shape for name, p in network.named_parameters()}

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        weights = {
            name: pyro.sample(name, dist.Normal(0.0, prior_scale(shape)).expand(shape).to_event(len(shape)))
            for name, shape in shapes.items()
        }
        logits = functional_call(network, weights, (x,))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    return model


def kernel(network: Network, x: Tensor, other: Tensor) -> Tensor:
    """The prior kernel of all logits, J S J' with S the prior covariance, shape (n K, m K), layer by layer."""

    def parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h = network.features(x)
        a = torch.tanh(network.fc1(h))
        slope = network.fc2.weight * (1 - a.square())[:, None]  # (n, K, hidden)
        convolution = {n: p.detach() for n, p in network.named_parameters() if n.startswith("conv")}

        def logits(weights: dict[str, Tensor], image: Tensor) -> Tensor:
            return functional_call(network, weights, (image[None],))[0]

        rows = []
        for chunk in x.split(50):
            J = vmap(jacrev(logits), in_dims=(None, 0))(convolution, chunk)
            rows.append(
                torch.cat([(J[n] * prior_scale(p.shape)).flatten(2) for n, p in convolution.items()], -1)
            )
        return h, a, slope, torch.cat(rows)

    with torch.no_grad():
        h, a, g, J = parts(x)
        h2, a2, g2, J2 = (h, a, g, J) if other is x else parts(other)
        n, m = len(x), len(other)
        w1, w2 = prior_scale(network.fc1.weight.shape) ** 2, prior_scale(network.fc2.weight.shape) ** 2
        total = (J.flatten(0, 1) @ J2.flatten(0, 1).T).reshape(n, CLASSES, m, CLASSES).double()
        slopes = (g.flatten(0, 1) @ g2.flatten(0, 1).T).reshape(n, CLASSES, m, CLASSES)
        total += (w1 * (h @ h2.T) + 0.01)[:, None, :, None] * slopes
        total += (w2 * (a @ a2.T) + 0.01)[:, None, :, None] * torch.eye(CLASSES)[None, :, None]
        return total.reshape(n * CLASSES, m * CLASSES)


def function_space(network: Network, x: Tensor, x_test: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """GGN and prior variances of the chosen logits at the test inputs; the former by an n K × n K solve."""
    with torch.no_grad():
        probs = network(x).softmax(-1).double()
    # F = R R' with R = diag(sqrt(p)) - p sqrt(p)'
    root = torch.diag_embed(probs.sqrt()) - probs[:, :, None] * probs.sqrt()[:, None, :]
    n = len(x)

    def weigh(K: Tensor) -> Tensor:
        return (root.mT @ K.reshape(n, CLASSES, -1)).reshape(n * CLASSES, -1)

    index = torch.arange(len(x_test)) * CLASSES + chosen
    inner = weigh(weigh(kernel(network, x, x)).T.contiguous())
    inner.diagonal().add_(1.0)
    cross = weigh(kernel(network, x, x_test)[:, index])
    own = torch.cat(
        [
            kernel(network, x_test[i : i + 50], x_test[i : i + 50]).diagonal().reshape(-1, CLASSES)
            for i in range(0, len(x_test), 50)
        ]
    ).flatten()[index]
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), cross, upper=False)
    return own - half.square().sum(0), own


class Watch:
    """
    The products of a solve by conjugate gradients, and what they know of the variances.

    In exact arithmetic b'x is the sum over blocks Q of directions, which are conjugate to each other if all targets share one Krylov space,
    of (bQ')(QPQ')^-1(Qb').
    """

    def __init__(self) -> None:
        self.seconds = self.watching = 0.0
        self.number = 0
        self.steps: list[tuple[int, Tensor]] = []  # products so far, and the lower bounds they give

    def __call__(self, task: Task) -> Found:
        rows, operator = task.functionals.gradients, task.problem.operator
        self.number, self.within = task.solver.products, True
        known = torch.zeros(len(rows), dtype=torch.float64)

        def counted(v: Tensor) -> Tensor:
            nonlocal known
            start = time.process_time()
            image = operator(v)
            middle = time.process_time()
            self.number += len(v)
            # directions of one block are orthonormal, and vectors that check others are not
            gram = v @ v.mT
            if self.within and bool((gram - torch.eye(len(v))).abs().max() < 1e-2):
                share, gram = (rows @ v.mT).double(), (v @ image.mT).double()
                known = known + (share * torch.linalg.solve(gram, share.mT).mT).sum(-1)
                self.steps.append((self.number, known))
            self.seconds += middle - start
            self.watching += time.process_time() - middle
            return image

        task.problem.operator = counted  # type: ignore[method-assign]
        start = time.process_time()
        found = cg(task)
        self.seconds_cg = time.process_time() - start - self.watching
        self.seconds_products = self.seconds
        self.within = False
        self.shared = len(rows) < task.solver.block_size
        return found


def stop_of(result: hfl.HFLResult, exact: Tensor) -> dict[str, Any]:
    """Where a solve stopped: products, certified width, and the error that it may not know."""
    assert result.certificate is not None
    return {
        "iterations": result.iterations,
        "products": result.products,
        "largest width": result.certificate.width,
        "median width": float(result.certificate.widths.median()),
        "largest error": float((result.variance.double() / exact - 1).abs().max()),
    }


def load(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images and labels, of shapes (n, 1, 28, 28) and (n,)."""
    path = DATA / "fashion_mnist.npz"
    if not path.exists():
        print(f"{path} is missing: set PYRO_BNN_DATA to the folder that holds images/", file=sys.stderr)
        sys.exit(2)
    raw = np.load(path)

    def part(name: str, number: int) -> tuple[Tensor, Tensor]:
        x = ((torch.from_numpy(raw[f"x_{name}"][:number]).float() / 255 - 0.2860) / 0.3530).unsqueeze(1)
        return x, torch.from_numpy(raw[f"y_{name}"][:number]).long()

    return *part("train", args.train), *part("test", args.test)


def train(network: Network, x: Tensor, y: Tensor, steps: int) -> None:
    """MAP training by Adam."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = torch.randint(0, len(x), (100,))
        penalty = sum((p / prior_scale(p.shape)).square().sum() for p in network.parameters()) / 2
        loss = F.cross_entropy(network(x[batch]), y[batch]) + penalty / len(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.zero_grad()
    network.requires_grad_(False)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    pyro.set_rng_seed(0)
    x, y, x_test, y_test = load(args)
    network = Network(args.hidden)
    start = time.perf_counter()
    train(network, x, y, args.steps)
    predicted = network(x_test)
    chosen = predicted.argmax(-1)
    accuracy = float((chosen == y_test).float().mean())
    number = sum(p.numel() for p in network.parameters())
    print(
        f"{number} parameters, test accuracy {accuracy:.3f}, {time.perf_counter() - start:.0f} s", flush=True
    )

    start = time.perf_counter()
    exact, prior = function_space(network, x, x_test, chosen)
    exact_seconds = time.perf_counter() - start
    reduction = float((prior / exact).median())
    print(f"function space: {exact_seconds:.0f} s; prior over posterior variance {reduction:.3g}", flush=True)

    weights = {name: p.detach() for name, p in network.named_parameters()}
    guide = AutoLaplace(bayesian(network), init_loc_fn=init_to_value(values=weights)).initialize(x, y)
    del weights
    network.to("meta")  # its weights are the guide's from now on

    def logit(latents: dict[str, Tensor], inputs: Tensor, classes: Tensor) -> Tensor:
        return functional_call(network, latents, (inputs,)).gather(-1, classes[:, None]).squeeze(-1)

    def solve(max_iter: int | None = None) -> Any:
        return hfl.solve(
            guide,
            (x, y),
            (x_test, chosen),
            logit,
            curvature="ggn",
            tolerance=args.tolerance,
            preconditioner=args.preconditioner,
            rank=args.rank,
            block_size=args.block or args.test + 1,  # the targets and the gradient, for the Newton decrement
            chunk_size=args.chunk,
            max_iter=max_iter,
        )

    run.METHODS["cg"] = watch = Watch()
    start, cpu_start = time.perf_counter(), time.process_time()
    result = solve()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    run.METHODS["cg"] = cg
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(result)
    stops = [stop_of(result, exact)]
    for max_iter in range(result.iterations - 1, 0, -1) if args.steps_of else ():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hfl.HFLWarning)  # that it stopped early
            stops.insert(0, stop_of(solve(max_iter), exact))
    row = {
        "parameters": number,
        "hidden": args.hidden,
        "train": args.train,
        "test": args.test,
        "steps": args.steps,
        "block": args.block or args.test + 1,
        "accuracy": accuracy if args.steps else None,
        "median_prior_over_posterior_variance": reduction,
        "preconditioner": args.preconditioner,
        "rank": args.rank if args.preconditioner == "nystrom" else None,
        "tolerance": args.tolerance,
        **what_was_found(result, exact),
        **what_it_took(watch, exact, args.tolerance),
        "products": result.products,
        "stops": stops,
        "seconds_hfl": seconds,
        "cpu_seconds_hfl": cpu_seconds,
        "megabytes_peak": peak / 1e6,
        "vectors_peak": peak / 4 / number,
        "seconds_function_space": exact_seconds,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "seed": 0,
    }
    print(json.dumps(row, indent=1))
    if args.out:
        write(args.out, row)


def what_was_found(result: hfl.HFLResult, exact: Tensor) -> dict[str, Any]:
    """Errors and bounds against the solve in function space."""
    assert result.certificate is not None
    assert result.lower is not None
    assert result.upper is not None
    error = (result.variance.double() / exact - 1).abs()
    inside = (result.lower.double() <= exact) & (exact <= result.upper.double())
    return {
        "max_relative_error": float(error.max()),
        "median_relative_error": float(error.median()),
        "sd_min": float(exact.sqrt().min()),
        "sd_max": float(exact.sqrt().max()),
        "certified_width": result.certificate.width,
        "contained": int(inside.sum()),
        "gap": result.certificate.gap,
        "residual": result.residual,
        "iterations": result.iterations,
        "newton_decrement": result.newton_decrement,
    }


def what_it_took(watch: Watch, exact: Tensor, tolerance: float) -> dict[str, Any]:
    """The products of an error below the tolerance, of which only the check knows, and seconds."""
    errors = [(number, float((known / exact - 1).abs().max())) for number, known in watch.steps]
    needed = [number for number, error in errors if error <= tolerance]
    return {
        "products_of_an_error_below_the_tolerance": min(needed) if needed else None,
        "errors_by_products": errors if watch.shared else [],
        "cpu_seconds_cg": watch.seconds_cg,
        "cpu_seconds_products_of_cg": watch.seconds_products,
    }


def write(path: Path, row: dict[str, Any]) -> None:
    """Adds a row to a file, in place of one of the same run."""
    keys = ("parameters", "preconditioner", "rank", "train", "test")
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [old for old in rows if any(old.get(key) != row[key] for key in keys)]
    path.write_text(json.dumps(sorted([*rows, row], key=lambda row: row["parameters"]), indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--block", type=int, help="right-hand sides that share a Krylov space; default all")
    parser.add_argument("--chunk", type=int, default=4, help="products at once")
    parser.add_argument("--tolerance", type=float, default=1e-2, help="certified relative width")
    parser.add_argument(
        "--hidden", type=int, default=640, help="units of the widest layer: 640 are a million weights"
    )
    parser.add_argument("--preconditioner", choices=["prior", "nystrom"], default="prior")
    parser.add_argument("--rank", type=int, default=64, help="of the Nyström preconditioner")
    parser.add_argument("--steps-of", action="store_true", help="also the widths of every earlier stop")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if args.smoke:
        args.train, args.test, args.steps, args.hidden = 60, 8, 20, 32
    return args


if __name__ == "__main__":
    main()
