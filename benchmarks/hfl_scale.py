# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Hessian-free Laplace variances for a convolutional network with a million parameters, checked in function space.

A network with 1.0 million weights is trained on n Fashion-MNIST images; the posterior is the Laplace approximation
with the GGN of these images at the trained weights. Variances of the predicted
class's logit at the test images come from block conjugate gradients with GGN-vector products, which know nothing of
the network's structure. They stop where the certified relative width of every variance is below the tolerance; the table says
how many products that took, and how many an error of that size needs, which only the check knows. The prior is the
preconditioner, so that the number of block iterations is at most about the
rank n (K - 1) of the likelihood's part over the block size. The check forms the n K × n K kernel of the same network from its layers (Hadamard products of
activations and output gradients) and solves with it: exact, and possible only because n is small.

    PYRO_BNN_DATA=../shared/data python benchmarks/hfl_scale.py --out results.json
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
from torch import Tensor
from torch.func import functional_call, jacrev, vmap

from pyro_bnn.infer import hfl
from pyro_bnn.infer.autoguide import AutoLaplace

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
            name: pyro.sample(name, dist.Normal(torch.zeros(shape), prior_scale(shape)).to_event(len(shape)))
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


def stop_of(result: hfl.HFLResult, exact: Tensor) -> dict[str, float]:
    """Where a solve stopped: products, certified width, and the error that it may not know."""
    return {
        "iterations": result.iterations,
        "products": result.products,
        "largest width": result.certificate.width,
        "median width": float(result.certificate.widths.median()),
        "largest error": float((result.variance.double() / exact - 1).abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--chunk", type=int, default=4, help="products at once")
    parser.add_argument("--tolerance", type=float, default=1e-2, help="certified relative width")
    parser.add_argument(
        "--hidden", type=int, default=640, help="units of the widest layer: 640 are a million weights"
    )
    parser.add_argument("--preconditioner", choices=["prior", "nystrom"], default="prior")
    parser.add_argument("--rank", type=int, default=64, help="of the Nyström preconditioner")
    parser.add_argument("--steps-of", action="store_true", help="also the errors of every earlier stop")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hidden = args.hidden
    if args.smoke:
        args.train, args.test, args.steps, hidden = 60, 8, 20, 32
    path = DATA / "fashion_mnist.npz"
    if not path.exists():
        print(f"{path} is missing: set PYRO_BNN_DATA to the folder that holds images/", file=sys.stderr)
        sys.exit(2)
    raw = np.load(path)
    pyro.set_rng_seed(0)

    def images(name: str, number: int) -> Tensor:
        return ((torch.from_numpy(raw[name][:number]).float() / 255 - 0.2860) / 0.3530).unsqueeze(1)

    x, y = images("x_train", args.train), torch.from_numpy(raw["y_train"][: args.train]).long()
    x_test, y_test = images("x_test", args.test), torch.from_numpy(raw["y_test"][: args.test]).long()
    network = Network(hidden)
    model = bayesian(network)
    start = time.perf_counter()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(args.steps):
        batch = torch.randint(0, len(x), (100,))
        penalty = sum((p / prior_scale(p.shape)).square().sum() for p in network.parameters()) / 2
        loss = F.cross_entropy(network(x[batch]), y[batch]) + penalty / len(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.requires_grad_(False)
    guide = AutoLaplace(model).initialize(x, y)
    with torch.no_grad():
        guide.loc.copy_(torch.cat([p.flatten() for p in network.parameters()]))
    print(f"{guide.loc.shape[0]} parameters", flush=True)
    train_seconds = time.perf_counter() - start
    accuracy = float((network(x_test).argmax(-1) == y_test).float().mean())
    chosen = network(x_test).argmax(-1)
    print(f"loss {float(loss.detach()):.3f}, test accuracy {accuracy:.3f}, {train_seconds:.0f} s", flush=True)

    start = time.perf_counter()
    exact, prior = function_space(network, x, x_test, chosen)
    exact_seconds = time.perf_counter() - start
    reduction = float((prior / exact).median())
    print(f"function space: {exact_seconds:.0f} s; prior over posterior variance {reduction:.3g}", flush=True)

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
            block_size=args.test + 1,  # the targets and the gradient, for the Newton decrement
            chunk_size=args.chunk,
            max_iter=max_iter,
        )

    start, cpu_start = time.perf_counter(), time.process_time()
    result = solve()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    print(result)
    lower, upper = result.lower.double(), result.upper.double()
    contained = int(((lower <= exact) & (exact <= upper)).sum())
    stops = [stop_of(result, exact)]
    for max_iter in range(result.iterations - 1, 0, -1) if args.steps_of else ():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hfl.HFLWarning)  # that it stopped early
            stops.insert(0, stop_of(solve(max_iter), exact))
    needed = [stop["products"] for stop in stops if stop["largest error"] <= args.tolerance]
    error = (result.variance.double() / exact - 1).abs()
    row = {
        "parameters": guide.loc.shape[0],
        "train": args.train,
        "test": args.test,
        "accuracy": accuracy,
        "max_relative_error": float(error.max()),
        "median_relative_error": float(error.median()),
        "sd_min": float(exact.sqrt().min()),
        "sd_max": float(exact.sqrt().max()),
        "median_prior_over_posterior_variance": reduction,
        "preconditioner": args.preconditioner,
        "rank": args.rank if args.preconditioner == "nystrom" else None,
        "tolerance": args.tolerance,
        "certified_width": result.certificate.width,
        "contained": contained,
        "gap": result.certificate.gap,
        "products_of_an_error_below_the_tolerance": min(needed) if needed else None,
        "stops": stops,
        "residual": result.residual,
        "iterations": result.iterations,
        "products": result.products,
        "seconds_hfl": seconds,
        "cpu_seconds_hfl": cpu_seconds,
        "megabytes_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "seconds_function_space": exact_seconds,
        "newton_decrement": result.newton_decrement,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "seed": 0,
    }
    print(json.dumps(row, indent=1))
    if args.out:
        args.out.write_text(json.dumps([row], indent=1) + "\n")


if __name__ == "__main__":
    main()
