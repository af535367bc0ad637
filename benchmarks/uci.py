# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
UCI regression with one hidden layer: every posterior of this package on the standard and the "in-between" splits.

One JSON line per data set, kind of split, split and method, appended to the output as soon as it is there; what the
output holds already is not run again. A row's ``settings`` are those that differ from the defaults. Tasks run split by
split, small data sets first, so that an interrupted run has a complete table over fewer splits.

    PYRO_BNN_DATA=../shared/data python benchmarks/uci.py --out benchmarks/results/uci.jsonl --splits 0 1 2
    python benchmarks/uci_tables.py            # the tables of the documentation
"""

import argparse
import json
import multiprocessing
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from chains import chains, mixing
from short_chains import Recipe, short_chains
from torch import Tensor
from uci_data import SETS, Split, load, number_of_splits, scores
from uci_models import Member, Settings, mean_field, rank1, settle_noise, stochastic_lbfgs, variational

from pyro_bnn.infer import posterior_predictive
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace

SMALL = Settings()
#: Microcanonical chains where a gradient costs more: on more than 900 rows.
LARGE = (5, 200, 400)
#: The numbers of rounds were chosen by ``--choose``, on a fifth of the training part of split 0; ARD by the same scores,
#: ``settle_noise`` on those of splits 0 and 2.
SETTINGS = {
    "wine": replace(SMALL, rounds=2, short=LARGE),
    "concrete": replace(SMALL, short=LARGE),
    "kin8nm": replace(SMALL, iterations=150, short=LARGE),
    "power": replace(SMALL, iterations=150, rounds=7, short=LARGE),
    "naval": replace(SMALL, iterations=150, settle_noise=True, short=LARGE),
    "protein": replace(
        SMALL, hidden=100, epochs=20, iterations=50, rounds=4, short=(5, 300, 300), collapse=None
    ),
}
#: Chosen by ``--choose --kinds gap``: with more rounds, smaller noise and fewer constraints, networks extrapolate wildly.
GAP_ROUNDS = 2
SMOKE: dict[str, Any] = {"hidden": 8, "rounds": 2, "iterations": 20, "members": 2, "steps": 40, "noise_draws": 16, "targets": 16,
                         "draws": 20, "nuts": (2, 10, 10), "short": (2, 40, 40)}  # fmt: skip
#: Methods that do not run on all sets.
ONLY = {"NUTS": ("yacht", "boston", "energy")}


class Prediction(NamedTuple):
    """
    Predictions (1/S) sum_s N(mean_s, variance_s), in standardised units.

    :param mean: shape (S, N).
    :param variance: shape (S, N).
    :param noise: the part of the variances that is noise, shape (S, 1).
    """

    mean: Tensor
    variance: Tensor
    noise: Tensor

    @property
    def epistemic(self) -> Tensor:
        """The variance of the function, shape (N,)."""
        return self.mean.var(0, correction=0) + (self.variance - self.noise).mean(0)


class Fits:
    """
    Everything that one split's methods share.

    :param split: the data.
    :param settings: see :class:`Settings`.
    :param seed: of the first member.
    """

    def __init__(self, split: Split, settings: Settings, seed: int) -> None:
        self.data, self.x_test = (split.x, split.y), split.x_test
        self.settings, self.seed = settings, seed
        self.extra: dict[str, Any] = {}
        self.member_seconds = 0.0

    @cached_property
    def first(self) -> Member:
        """The MAP with its hyperparameters."""
        start = time.process_time()
        member = Member(self.data[0].shape[1], self.settings).fit(self.data, self.seed)
        self.member_seconds = time.process_time() - start
        return member

    @cached_property
    def members(self) -> list[Member]:
        """The members of the ensemble."""
        start = time.process_time()
        rest = [
            Member(self.data[0].shape[1], self.settings).fit(self.data, self.seed + k)
            for k in range(1, self.settings.members)
        ]
        self.rest_seconds = time.process_time() - start
        return [self.first, *rest]

    def prepare(self, method: str) -> list[Member]:
        """Fits the members that a method uses, whose seeds and seconds are not the method's own."""
        first = self.first
        return self.members if method in USES_ALL_MEMBERS else [first]

    def function(self, guide: AutoLaplace) -> Tensor:
        """The network's outputs at the point estimate."""
        latent = guide.loc.detach().requires_grad_(True)
        return guide.packed.outputs(latent, ((self.x_test,), {}))[0].outputs.detach().squeeze(-1)

    def linearized(self, guide: Any) -> Prediction:
        """The closed-form predictive of the linearised network."""
        found = guide.linearized_outputs(self.x_test)["obs"].distribution()
        noise = torch.tensor([[guide.packed.model.noise**2]])
        return Prediction(found.mean.detach()[None], found.variance.detach()[None], noise)

    def points(self, members: list[Member]) -> Prediction:
        """The members' networks with their noise."""
        mean = torch.stack([self.function(m.guide) for m in members])
        noise = torch.tensor([m.model.noise for m in members]).square()
        return Prediction(mean, noise[:, None].expand_as(mean), noise[:, None])

    def structure(self, **options: Any) -> Prediction:
        """Another structure at the first member's MAP, its prior precision by its own evidence per site."""
        guide = self.first.at(self.first.guide.loc.detach(), self.data, **options)
        guide.laplace_approximation(self.data, map_tolerance=float("inf"))
        report = guide.optimize_hyperparameters(per="site")
        self.extra = {"tau": {k: round(v, 6) for k, v in report.tau.items()}}
        return self.linearized(guide)

    def sampled(self, model: Any, posterior: Any) -> Prediction:
        """Predictions under draws of the weights."""
        found = posterior_predictive(
            model, posterior, (self.x_test,), num_samples=self.settings.draws, batch_size=2000
        )
        return Prediction(found.mean, found.variance.expand_as(found.mean), found.variance[:, :1])

    # ------------------------------------------------------------------ methods

    def map(self) -> Prediction:
        """The MAP."""
        self.extra = {"noise": self.first.model.noise, "evidence": float(self.first.guide.log_evidence())}
        return self.points([self.first])

    def ensemble(self) -> Prediction:
        """A deep ensemble of MAPs."""
        return self.points(self.members)

    def full(self) -> Prediction:
        """The full-GGN Laplace approximation."""
        self.extra = {"newton_decrement": self.first.guide.map_report.newton_decrement}
        return self.linearized(self.first.guide)

    def mixture_of_laplace(self) -> Prediction:
        """Full-GGN Laplace approximations around the ensemble's members."""
        # the members differ in their hyperparameters, so that there is no one model for an AutoLaplaceMixture
        parts = [self.linearized(member.guide) for member in self.members]
        return Prediction(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def hfl(self) -> Prediction:
        """Hessian-free Laplace with the GGN, exact at the targets."""
        order = torch.randperm(len(self.x_test), generator=torch.Generator().manual_seed(0))
        targets = self.x_test[order[: self.settings.targets]]
        guide = AutoHessianFreeLaplace(self.first.model, curvature="ggn", tolerance=1e-6)
        guide.initialize(*self.data).loc.data.copy_(self.first.guide.loc.detach())
        guide.laplace_approximation(self.data, targets=(targets,), map_tolerance=float("inf"))
        self.extra = {"targets": len(targets), "products": guide.result.products}
        return self.linearized(guide)

    def mean_field(self) -> Prediction:
        """Mean-field variational inference."""
        model, guide = mean_field(self.first, self.data)
        self.extra = {"noise": model.noise}
        return self.sampled(model, guide)

    def rank1_adam(self, family: str) -> Prediction:
        """A rank-1 mixture after 800 steps of Adam, the noise fitted by the bound."""
        model, guide = rank1(self.first, self.data, family)
        variational(model, guide, self.data, self.settings, 0.01)
        if self.settings.settle_noise:
            settle_noise(model, guide, self.data, self.settings.draws)
        self.extra = {"noise": model.noise}
        return self.sampled(model, guide)

    def rank1_lbfgs(self, family: str) -> Prediction:
        """A rank-1 mixture by stochastic L-BFGS."""
        # biases have no noise per example, and one pair of draws would not do for their scales
        learn_noise = not self.settings.keep_noise
        model, guide = rank1(self.first, self.data, family, rest="delta", learn_noise=learn_noise)
        self.extra = {"noise": model.noise} | stochastic_lbfgs(model, guide, self.data, self.settings)
        return self.sampled(model, guide)

    def nuts(self) -> Prediction:
        """NUTS under the evidence's prior and noise."""
        number, _, draws = self.settings.nuts
        packed, self.extra = chains(self.first, self.data, self.settings.nuts, seed=self.seed)
        sites = self.first.guide.packed.space.unpack(packed.flatten(0, 1))
        found = posterior_predictive(self.first.model, sites, (self.x_test,))
        self.extra |= mixing(found.mean.reshape(number, draws, -1))
        return Prediction(found.mean, found.variance.expand_as(found.mean), found.variance[:, :1])

    def microcanonical(self, recipe: Recipe | None = None) -> Prediction:
        """Short microcanonical chains under the evidence's prior and noise."""
        number, warmup, steps = self.settings.short
        # scores compare all pairs of draws
        recipe = recipe or Recipe(modes=number, warmup=warmup, steps=steps, draws=500 // number).with_options(
            collapse=self.settings.collapse
        )
        run, report = short_chains(self.first, self.data, recipe, self.seed + 100)
        found = posterior_predictive(self.first.model, run, (self.x_test,), batch_size=500)
        self.extra = report | mixing(found.mean.reshape(report["chains"], -1, found.mean.shape[-1]))
        return Prediction(found.mean, found.variance.expand_as(found.mean), found.variance[:, :1])


METHODS: dict[str, Callable[[Fits], Prediction]] = {
    "MAP": Fits.map,
    "full Laplace": Fits.full,
    "Kronecker Laplace": lambda fits: fits.structure(structure="kronecker"),
    "diagonal Laplace": lambda fits: fits.structure(structure="diagonal"),
    "last-layer Laplace": lambda fits: fits.structure(sites="last_layer"),
    "HFL": Fits.hfl,
    "deep ensemble": Fits.ensemble,
    "mixture of Laplace": Fits.mixture_of_laplace,
    "mean-field VI": Fits.mean_field,
    "rank-1 Gaussian": lambda fits: fits.rank1_adam("normal"),
    "rank-1 Cauchy": lambda fits: fits.rank1_adam("cauchy"),
    "rank-1 Gaussian, L-BFGS": lambda fits: fits.rank1_lbfgs("normal"),
    "rank-1 Cauchy, L-BFGS": lambda fits: fits.rank1_lbfgs("cauchy"),
    "NUTS": Fits.nuts,
    "MCLMC": Fits.microcanonical,
}
USES_ALL_MEMBERS = ("deep ensemble", "mixture of Laplace")


def choose(
    name: str, kind: str, number: int, overrides: dict[str, Any], rounds: int = 10
) -> Iterator[dict[str, Any]]:
    """Scores of the full Laplace approximation on held-out rows of the training part, round by round."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    split = load(name, kind, number, validate=True)
    member = Member(split.x.shape[1], replace(SETTINGS.get(name, SMALL), **overrides))
    start = time.process_time()
    for done, guide in enumerate(islice(member.alternate((split.x, split.y), 0), rounds), 1):
        found = guide.predictive(split.x_test)["obs"]
        row = {
            "set": name,
            "kind": kind,
            "split": number,
            "rounds": done,
            "validation": True,
            "noise": member.model.noise,
            **overrides,
        }
        row |= scores(found.mean.detach()[None], found.variance.detach()[None], split.y_test, split.scale)
        row |= {"evidence": float(guide.log_evidence()), "seconds": round(time.process_time() - start, 2)}
        yield row


def run(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of one split."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    name, kind, number = task["set"], task["kind"], task["split"]
    split = load(name, kind, number, validate=task["validate"])
    settings = SETTINGS.get(name, SMALL)
    if kind == "gap":
        settings = replace(settings, rounds=GAP_ROUNDS)
    settings = replace(settings, **task["overrides"])
    fits = Fits(split, settings, seed=1000 * number)
    for method in task["methods"]:
        pyro.clear_param_store()
        fits.prepare(method)
        fits.extra = {}
        start = time.process_time()
        row = {"set": name, "kind": kind, "split": number, "method": method}
        pyro.set_rng_seed(number)
        try:
            found = METHODS[method](fits)
            row |= scores(found.mean, found.variance, split.y_test, split.scale)
        except Exception as error:  # a row that says so is a result; the other methods go on
            row["failed"] = f"{type(error).__name__}: {error}"
        seconds = time.process_time() - start + fits.member_seconds
        if method in USES_ALL_MEMBERS:
            seconds += fits.rest_seconds
        row |= {
            "seconds": round(seconds, 2),
            "n": len(split.x),
            "n_test": len(split.x_test),
            **fits.extra,
            "settings": {k: v for k, v in asdict(settings).items() if v != getattr(SMALL, k)},
            "seed": fits.seed,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        if task["validate"]:
            row["validate"] = True
        yield row


def compact(row: dict[str, Any]) -> str:
    """A line of JSON without spaces, numbers with six digits."""
    short = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
    return json.dumps(short, separators=(",", ":"))


def rows_of(task: dict[str, Any]) -> int:
    """Runs a task in a worker process and appends its rows; short writes to a file opened for appending are atomic."""
    count = 0
    for row in run(task):
        text = compact(row)
        if task["out"]:
            with open(task["out"], "a") as stream:
                stream.write(text + "\n")
        value = row.get("log_likelihood")
        shown = (
            row["failed"]
            if value is None
            else f"{value:8.3f} rmse {row['rmse']:.4g} cov {row['coverage']:.3f}"
        )
        print(f"{row['set']:9s}{row['kind']:9s}{row['split']:3d}  {row['method']:20s}{shown} {row['seconds']:.1f} s",
              flush=True)  # fmt: skip
        count += 1
    return count


def overrides_of(args: argparse.Namespace) -> dict[str, Any]:
    given = {}
    for item in args.override:
        name, _, value = item.partition("=")
        given[name] = value if name in ("activation", "divergence") else json.loads(value)
    return (SMOKE if args.smoke else {}) | given


def tasks(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    done = set()
    if args.out and args.out.exists():
        for line in args.out.read_text().splitlines():
            row = json.loads(line)
            if "log_likelihood" in row:  # else it failed, and is tried again
                done.add((row["set"], row["kind"], row["split"], row["method"]))
    overrides = overrides_of(args)
    splits = args.splits if args.splits is not None else range(20)
    for split in splits:
        for kind in args.kinds:
            for name in args.sets:
                if split >= number_of_splits(name, kind):
                    continue
                wanted = [
                    m
                    for m in args.methods
                    if (name, kind, split, m) not in done and name in ONLY.get(m, SETS)
                ]
                if wanted:
                    yield {"set": name, "kind": kind, "split": split, "methods": wanted, "overrides": overrides,
                           "validate": args.validate, "out": args.out and str(args.out)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="yacht, one split of each kind, small fits")
    parser.add_argument("--out", type=Path, help="append the rows to this file of JSON lines")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--kinds", nargs="+", choices=("standard", "gap"), default=["standard", "gap"])
    parser.add_argument("--splits", nargs="+", type=int, help="their numbers; all by default")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument(
        "--validate", action="store_true", help="score a fifth of the training part, for choosing settings"
    )
    parser.add_argument(
        "--choose", action="store_true", help="validation scores round by round, to choose the number"
    )
    parser.add_argument("--override", nargs="*", default=[], help="settings, e.g. activation=relu ard=false")
    args = parser.parse_args()
    if args.smoke:
        args.sets, args.splits = ["yacht"], [0]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.choose:
        cases = [(n, k, s) for n in args.sets for k in args.kinds for s in args.splits or [0]]
        for case in cases:
            for row in choose(*case, overrides_of(args)):
                print(json.dumps(row), flush=True)
                if args.out:
                    with args.out.open("a") as stream:
                        stream.write(json.dumps(row) + "\n")
        return
    todo = list(tasks(args))
    if args.workers == 1:
        for task in todo:
            rows_of(task)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        for future in as_completed([pool.submit(rows_of, task) for task in todo]):
            future.result()


if __name__ == "__main__":
    main()
