# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Hessian-free Laplace against dense Laplace approximations at the same point estimate.

Parts:

toy       1-16-1 tanh network on the in-between data, six seeds, 12 targets
uci       boston, concrete, yacht: 50-unit tanh network, split 0, test points as targets
classes   iris and wine: 8-unit tanh network with 3 classes, logits as targets
coverage  coverage of the true function between two clusters of data, two functions, three seeds
gap       "in-between" splits of yacht, concrete, energy and naval: coverage, width, CRPS, NLL
certificate  certified bounds against dense matrices, on these cases and 10,000 linear models (hfl_certificate.py)
regvar    the RegVar score against exact variances: a model where it is a variance, and networks

    PYRO_BNN_DATA=../shared/data python benchmarks/hfl_accuracy.py --out results.json
"""

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hfl_certificate
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_sample
from torch import Tensor

from pyro_bnn.infer import NotAMinimumError, hfl
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.infer.hfl import HFLWarning
from pyro_bnn.ops.jacobian import jacobian
from pyro_bnn.ops.newton import lbfgs, newton_cg

DATA = Path(os.environ.get("PYRO_BNN_DATA", Path(__file__).parents[1] / "../shared/data"))
SEEDS = (0, 1, 2, 4, 5, 6)
SPLITS = 16  # of each gap data set, at most

GAPS = {"yacht": 6, "energy": 8, "concrete": 8, "naval": 16}  # how many splits each has

Rows = Iterator[dict[str, Any]]


def network(inputs: int, hidden: int, noise: float | None, outputs: int = 1):
    """A tanh network with N(0, 1) weights; ``noise=None`` learns the noise, ``outputs > 1`` classifies."""

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        w1 = pyro.sample("w1", dist.Normal(torch.zeros(hidden, inputs), 1.0).to_event(2))
        b1 = pyro.sample("b1", dist.Normal(torch.zeros(hidden), 1.0).to_event(1))
        w2 = pyro.sample("w2", dist.Normal(torch.zeros(outputs, hidden), 1.0).to_event(2))
        b2 = pyro.sample("b2", dist.Normal(torch.zeros(outputs), 1.0).to_event(1))
        scale = pyro.sample("sigma", dist.LogNormal(-1.5, 1.0)) if noise is None else noise
        f = torch.tanh(x @ w1.mT + b1) @ w2.mT + b2
        with pyro.plate("data", len(x)):
            if outputs > 1:
                return pyro.sample("obs", dist.Categorical(logits=f), obs=y)
            return pyro.sample("obs", dist.Normal(f.squeeze(-1), scale), obs=y)

    return model


def fitted(model: Any, data: tuple[Tensor, Tensor], seed: int, curvature: str = "hessian") -> AutoLaplace:
    pyro.set_rng_seed(seed)
    guide = AutoLaplace(model, curvature=curvature, init_loc_fn=init_to_sample).initialize(*data)
    return guide.polish(data)


def same_point(guide: AutoLaplace, data: Any, **options: Any) -> AutoLaplace:
    other = AutoLaplace(guide.model, **options).initialize(*data)
    other.loc.data.copy_(guide.loc.data)
    return other.laplace_approximation(data, map_tolerance=float("inf"))


def compare(
    guide: AutoLaplace, data: Any, targets: Tensor, row: dict[str, Any], central: int | None = None
) -> Rows:
    """Relative errors of every method against the dense Laplace approximation."""
    for curvature in ("hessian", "ggn"):
        try:
            dense = same_point(guide, data, curvature=curvature)
        except NotAMinimumError as error:
            yield {**row, "curvature": curvature, "failed": str(error)}
            continue
        expected = dense.linearized_outputs(targets)["obs"].variance
        for method, options in (("cg", {}), ("central", {}), ("one_sided", {})):
            points = targets if method == "cg" else targets[:central]
            start = time.perf_counter()
            try:
                result = hfl.solve(guide, data, (points,), method=method, curvature=curvature, **options)
            except NotAMinimumError as error:
                yield {**row, "curvature": curvature, "method": method, "failed": str(error)}
                continue
            error = (result.variance / expected[: len(points)] - 1).abs()
            yield {
                **row,
                "method": method,
                "curvature": curvature,
                "parameters": guide.loc.shape[0],
                "functionals": error.numel(),
                "max_relative_error": float(error.max()),
                "median_relative_error": float(error.median()),
                "agreement": result.agreement,
                "gradient_equivalents": result.gradient_equivalents,
                "decrement": result.newton_decrement,
                "smallest_curvature": result.smallest_curvature,
                "seconds": time.perf_counter() - start,
            }


def in_between(seed: int, n: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left = torch.rand(n // 2, generator=generator) * 0.8 - 1.5
    right = torch.rand(n - n // 2, generator=generator) * 0.8 + 0.35
    x = torch.cat([left, right])
    return x[:, None], -torch.sin(3 * x - 0.3) + 0.1 * torch.randn(n, generator=generator)


def toy(smoke: bool) -> Rows:
    targets = torch.linspace(-2, 2, 12)[:, None]
    for seed in SEEDS[:1] if smoke else SEEDS:
        data = in_between(seed)
        guide = fitted(network(1, 16, 0.1), data, seed)
        yield from compare(guide, data, targets, {"data": "toy", "seed": seed, "dtype": "float64"})
        dense = same_point(guide, data, curvature="hessian").linearized_outputs(targets)["obs"].variance
        torch.set_default_dtype(torch.float32)
        single = tuple(v.float() for v in data)
        guide32 = AutoLaplace(network(1, 16, 0.1)).initialize(*single)
        guide32.loc.data.copy_(guide.loc.data)
        for method in ("cg", "central", "one_sided"):
            row = {"data": "toy", "seed": seed, "dtype": "float32", "method": method, "curvature": "hessian"}
            try:
                result = hfl.solve(guide32, single, (targets.float(),), method=method)
            except NotAMinimumError as error:
                yield {**row, "failed": str(error)}
                continue
            error = (result.variance / dense - 1).abs()
            yield {
                **row,
                "max_relative_error": float(error.max()),
                "median_relative_error": float(error.median()),
                "agreement": result.agreement,
                "warned": len(result.warnings),
            }
        torch.set_default_dtype(torch.float64)


def load_uci(name: str, split: int, gap: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Standardised train and test tensors and the targets' standard deviation."""
    path = DATA / "uci" / f"{name}.npz"
    if not path.exists():
        print(f"{path} is missing: set PYRO_BNN_DATA to the folder that holds uci/", file=sys.stderr)
        sys.exit(2)
    raw = np.load(path)
    x, y = torch.from_numpy(raw["x"]).double(), torch.from_numpy(raw["y"]).double()
    test = torch.zeros(len(x), dtype=torch.bool)
    index = raw["gap_test_index" if gap else "test_index"][split]
    test[torch.from_numpy(index[index >= 0]).long()] = True
    mean, scale = x[~test].mean(0), x[~test].std(0)
    x = (x - mean) / torch.where(scale > 1e-8, scale, torch.ones_like(scale))  # naval has constant features
    y_mean, y_scale = y[~test].mean(), y[~test].std()
    y = (y - y_mean) / y_scale
    return x[~test], y[~test], x[test], y[test], float(y_scale)


def uci(smoke: bool) -> Rows:
    for name in ("yacht",) if smoke else ("yacht", "boston", "concrete"):
        x, y, x_test, _, _ = load_uci(name, 0)
        guide = fitted(network(x.shape[1], 8 if smoke else 50, 0.3), (x, y), 0)
        yield from compare(guide, (x, y), x_test, {"data": name, "seed": 0, "dtype": "float64"}, central=24)


def classes(smoke: bool) -> Rows:
    from sklearn.datasets import load_iris, load_wine

    for name, load in (("iris", load_iris), ("wine", load_wine)):
        raw = load()
        order = np.random.default_rng(0).permutation(len(raw.target))
        x = torch.from_numpy(raw.data[order]).double()
        x, y = (x - x.mean(0)) / x.std(0), torch.from_numpy(raw.target[order])
        data = (x[20:], y[20:])
        guide = fitted(network(x.shape[1], 8, None, outputs=3), data, 0)
        yield from compare(guide, data, x[:20], {"data": name, "seed": 0, "dtype": "float64"}, central=8)


def crps(y: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    """The continuous ranked probability score of Gaussian forecasts (Gneiting and Raftery, 2007)."""
    z = (y - mean) / sd
    normal = torch.distributions.Normal(0.0, 1.0)
    return sd * (z * (2 * normal.cdf(z) - 1) + 2 * normal.log_prob(z).exp() - torch.pi**-0.5)


def posteriors(guide: AutoLaplace, data: Any, x_test: Tensor) -> Iterator[tuple[str, Tensor | str]]:
    """Variances of the mean function by all approximations at the same point estimate."""
    yield "MAP", torch.zeros(len(x_test))
    for curvature in ("hessian", "ggn"):
        try:
            # targets are many and alike, and the curvatures span six orders of magnitude
            options = {"preconditioner": "nystrom", "rank": 200, "tolerance": 1e-4, "block_size": 128}
            variance = hfl.variance(guide, data, (x_test,), curvature=curvature, **options)
            yield f"HFL {curvature}", variance.flatten()
        except NotAMinimumError as error:
            yield f"HFL {curvature}", str(error)
        try:
            dense = same_point(guide, data, curvature=curvature)
            yield f"exact {curvature}", dense.linearized_outputs(x_test)["obs"].variance.flatten()
        except NotAMinimumError as error:
            yield f"exact {curvature}", str(error)
    for structure in ("kronecker", "diagonal"):
        try:
            other = same_point(guide, data, structure=structure, curvature="ggn")
            yield structure, other.linearized_outputs(x_test)["obs"].variance.flatten()
        except (ValueError, NotAMinimumError, RuntimeError) as error:
            yield structure, str(error)
    # the last layer alone: the block of w2 and b2 of the GGN, all other weights fixed
    dense = same_point(guide, data, curvature="ggn")
    keep = torch.zeros(guide.loc.shape[0], dtype=torch.bool)
    for name in ("w2", "b2"):
        keep[guide.packed.space.slices[name]] = True
    leaf = guide.loc.detach().clone().requires_grad_(True)
    outputs = guide.packed.outputs(leaf, ((x_test,), {}))[0].outputs.reshape(-1)
    J = jacobian(outputs, leaf)[:, keep]
    yield "last layer", (J * torch.linalg.solve(dense.precision[keep][:, keep], J.mT).mT).sum(-1)


def scores(
    guide: AutoLaplace,
    data: Any,
    x_test: Tensor,
    truth: Tensor,
    noise: float,
    scale: float,
    row: dict[str, Any],
) -> Rows:
    """Coverage, width, CRPS and NLL of every posterior; ``noise=0`` scores the function without noise."""
    leaf = guide.loc.detach().clone().requires_grad_(True)
    mean = guide.packed.outputs(leaf, ((x_test,), {}))[0].outputs.detach().flatten()
    for name, variance in posteriors(guide, data, x_test):
        if name == "MAP" and not noise:
            continue  # a point estimate has no interval for the function itself
        if isinstance(variance, str):
            yield {**row, "posterior": name, "failed": variance}
            continue
        sd = (variance + noise**2).sqrt()
        z = (truth - mean) / sd
        normal = torch.distributions.Normal(mean, sd)
        yield {
            **row,
            "posterior": name,
            "coverage": float((z.abs() < 1.96).double().mean()),
            "width": float(2 * 1.96 * sd.mean() * scale),
            "crps": float(crps(truth, mean, sd).mean() * scale),
            "nll": float(-normal.log_prob(truth).mean() + np.log(scale)),
            "rmse": float((truth - mean).square().mean().sqrt() * scale),
        }


def coverage(smoke: bool) -> Rows:
    functions = {
        "sine": (lambda x: -torch.sin(3 * x - 0.3), 160),
        "quadratic": (lambda x: 0.1 * x**2 - 0.5 * x, 25),
    }
    grid = torch.arange(-2, 2.001, 0.05)
    for name, (function, n) in functions.items():
        for seed in range(1 if smoke else 3):
            x, _ = in_between(seed, n)
            y = function(x[:, 0]) + 0.1 * torch.randn(n, generator=torch.Generator().manual_seed(seed + 100))
            guide = fitted(network(1, 50, 0.1), (x, y), seed)
            between = (grid > -0.7) & (grid < 0.35)
            for region, inside in (("between", between), ("all", torch.ones_like(between))):
                row = {"data": name, "region": region, "seed": seed}
                yield from scores(guide, (x, y), grid[inside, None], function(grid[inside]), 0.0, 1.0, row)


def trained(x: Tensor, y: Tensor, hidden: int, steps: int, seed: int) -> tuple[AutoLaplace, float]:
    """
    A point estimate with a positive definite Hessian and its noise, a guide of the network at that noise.

    The last digits of a MAP in the flat valleys of these posteriors take many minutes; the approximations are all
    compared at the same point, with the gradient there corrected for.
    """
    pyro.set_rng_seed(seed)
    free = AutoLaplace(network(x.shape[1], hidden, None), init_loc_fn=init_to_sample).initialize(x, y)
    optimizer = torch.optim.Adam([free.loc], lr=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        _, free.loc.grad = free.negative_log_joint((x, y))
        optimizer.step()
        schedule.step()
    free.loc.data.copy_(lbfgs(lambda u: free.packed.losses(u, (x, y)), free.loc, max_iter=500))
    noise = float(free.median()["sigma"])
    guide = AutoLaplace(network(x.shape[1], hidden, noise)).initialize(x, y)
    guide.loc.data.copy_(
        torch.cat([free.loc.data[free.packed.space.slices[s]] for s in guide.packed.space.slices])
    )

    def terms(u: Tensor) -> Iterator[Tensor]:
        return guide.packed.losses(u, (x, y))

    point = lbfgs(terms, guide.loc, max_iter=500)
    guide.loc.data.copy_(newton_cg(terms, point, tolerance=1e-4, max_steps=60).point)
    return guide, noise


def gap(
    smoke: bool,
    splits: int = SPLITS,
    sets: Sequence[str] = tuple(GAPS),
    done: frozenset[tuple[str, int]] = frozenset(),
    fixed_noise: float | None = None,
) -> Rows:
    order = [(name, split) for split in range(splits) for name in sets if split < GAPS[name]]
    for name, split in [("yacht", 0)] if smoke else order:
        if (name, split) in done:
            continue
        x, y, x_test, y_test, scale = load_uci(name, split, gap=True)
        if name == "naval":  # every eighth row: a dense Hessian polished on all of them takes hours
            x, y, x_test, y_test = x[::8], y[::8], x_test[::8], y_test[::8]
        start = time.process_time()
        hidden = 8 if smoke else 50
        if fixed_noise is None:
            guide, noise = trained(x, y, hidden, 100 if smoke else 1500, split)
        else:
            guide, noise = fitted(network(x.shape[1], hidden, fixed_noise), (x, y), split), fixed_noise
        mean = guide.packed.outputs(guide.loc, ((x,), {}))[0].outputs.detach().flatten()
        row = {
            "data": name,
            "split": split,
            "noise": noise,
            "n": len(x),
            "n_test": len(x_test),
            "parameters": guide.loc.shape[0],
            "train_rmse": float((y - mean).square().mean().sqrt() * scale),
            "fit_seconds": time.process_time() - start,
        }
        # a split is written when it is complete, so that --resume does not skip half of one
        yield from list(scores(guide, (x, y), x_test, y_test, noise, scale, row))


def table(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Independent means of 40 groups with different prior scales: groups have no covariance."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros(40), torch.linspace(0.1, 2.0, 40)).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(mean[x], 0.5), obs=y)


def regvar(smoke: bool) -> Rows:
    from sklearn.datasets import load_iris

    generator = torch.Generator().manual_seed(0)
    once = torch.arange(40)
    often = torch.cat([once, torch.randint(0, 40, (200,), generator=generator)])
    means = 3 * torch.randn(40, generator=generator)
    cases: list[tuple[str, Any, Any, Tensor]] = [
        ("groups, each seen once", table, (once, means), once),
        ("groups, seen 1 to 12 times", table, (often, means[often]), once),
        ("toy", network(1, 16, 0.1), in_between(0), torch.linspace(-2, 2, 81)[:, None]),
        ("toy, training inputs", network(1, 16, 0.1), in_between(0), in_between(0)[0]),
    ]
    if not smoke:
        raw = load_iris()
        order = np.random.default_rng(0).permutation(len(raw.target))
        x = torch.from_numpy(raw.data[order]).double()
        x, y = (x - x.mean(0)) / x.std(0), torch.from_numpy(raw.target[order])
        cases.append(("iris", network(4, 50, None, outputs=3), (x[40:], y[40:]), x[:40]))
        x, y, x_test, _, _ = load_uci("yacht", 0)
        cases.append(("yacht", network(x.shape[1], 50, 0.3), (x, y), x_test))
    for name, model, data, targets in cases:
        guide = fitted(model, data, 0)
        for curvature in ("ggn",) if smoke else ("ggn", "hessian"):
            m = hfl.variance(guide, data, (targets,), curvature=curvature).numel()
            for epochs in (None,) if smoke or curvature == "hessian" else (None, 100):
                score = hfl.regvar(
                    guide,
                    data if epochs is None else [tuple(v[i::4] for v in data) for i in range(4)],
                    (targets,),
                    curvature=curvature,
                    num_epochs=epochs,
                    calibrate=m,
                )
                yield {
                    "data": name,
                    "curvature": curvature,
                    "epochs": epochs,
                    "functionals": m,
                    "scale": score.scale,
                    "spread_of_log_ratio": score.spread,
                    "rank_correlation": score.rank_correlation,
                }


def main() -> None:
    parts = {
        "certificate": partial(hfl_certificate.certificate, tools=sys.modules[__name__]),
        "toy": toy,
        "uci": uci,
        "classes": classes,
        "coverage": coverage,
        "gap": gap,
        "regvar": regvar,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--splits", type=int, default=SPLITS, help="gap splits of each data set, at most")
    parser.add_argument("--sets", nargs="+", choices=list(GAPS), default=list(GAPS), help="of the gap splits")
    parser.add_argument("--noise", type=float, help="of the gap splits, fixed; default its joint MAP")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep the rows of --out, skip its gap splits")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", HFLWarning)
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    rows: list[dict[str, Any]] = []
    if args.resume and args.out and args.out.exists():
        rows = [
            row
            for row in json.loads(args.out.read_text())
            if row["part"] not in args.parts or row["part"] == "gap"
        ]
    done = frozenset((row["data"], row["split"]) for row in rows if row["part"] == "gap")
    for part in args.parts:
        options = (
            {"splits": args.splits, "sets": args.sets, "done": done, "fixed_noise": args.noise}
            if part == "gap"
            else {}
        )
        for row in parts[part](args.smoke, **options):
            rows.append({"part": part, **row, **versions})
            print({k: v for k, v in rows[-1].items() if k not in versions}, flush=True)
            if args.out:
                args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
