# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Every posterior of this package against long runs of NUTS on the same model and data.

The model is a network of 50 tanh units on the first standard split, with the prior scales and the noise of
``HYPERPARAMETERS``, which the evidence chose (``uci.py``) once: all posteriors approximate one distribution, which is the
same on every machine (the search of the evidence ends elsewhere where sums are rounded in another way). Mean-field
variational inference and the rank-1 mixtures fit their noise by the bound. How the chains run is in ``chains.py``; they
start at draws of the prior and need the extra ``gold``. Their predictions are kept in ``results/``, so that another method is
compared in minutes; ``--chains`` runs them anew.

    PYRO_BNN_DATA=../shared/data python benchmarks/gold.py --out benchmarks/results/gold.jsonl
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from chains import MISSING, available, chains, mixing
from gold_distances import HALVES, agreement
from short_chains import Recipe
from torch import Tensor
from uci import METHODS, SMALL, SMOKE, Fits, Prediction
from uci_data import Split, load, scores
from uci_models import Member, Settings

from pyro_bnn.infer import posterior_predictive
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.ops.newton import lbfgs

#: Chains, steps of adaptation and draws per chain; boston has the largest noise and mixes best.
SHAPES = {"boston": (4, 900, 2500), "energy": (4, 900, 5000), "yacht": (3, 900, 10000)}
#: Standard deviations of the noise, in those of the targets, and of the priors by site.
HYPERPARAMETERS = {
    "boston": (0.202, {"0.weight": 0.255, "0.bias": 0.883, "2.weight": 2.67, "2.bias": 1.37}),
    "energy": (0.0446, {"0.weight": 0.461, "0.bias": 0.910, "2.weight": 1.53, "2.bias": 1.04}),
    "yacht": (0.0174, {"0.weight": 0.422, "0.bias": 2.04, "2.weight": 1.55, "2.bias": 2.46}),
}
#: On yacht, whose noise is smallest, chains adapt step sizes of 0.006 to 0.02 and diverge with the larger ones.
SAMPLER: dict[str, dict[str, Any]] = {"yacht": {"depth": 8, "max_step": 0.006}}
#: Draws of the reference that are kept and enter distances and scores, evenly spaced; R-hat is that of all.
REFERENCE_DRAWS = 1500
RESULTS = Path(__file__).parent / "results"
BASE = Recipe()
#: The recipe of ``MCLMC`` and its controls: some 21,000 steps each, but for short ones and adjusted ones.
RECIPES = {
    "MCLMC": BASE,
    "MCLMC, 10,000 gradients": replace(BASE, warmup=200, steps=400, draws=100),
    "MCLMC, output layer not integrated out": BASE.with_options(collapse=None),
    "MCLMC, whitened by the prior": BASE.with_options(whiten="prior"),
    "MCLMC, whitened by Laplace": replace(BASE, laplace=True).with_options(whiten="guide", collapse=None),
    "MCLMC, energy variance 0.0005": BASE.with_options(energy_variance=0.0005),
    "MCLMC, energy variance 0.02": BASE.with_options(energy_variance=0.02),
    "MCLMC, energy variance 0.2": BASE.with_options(energy_variance=0.2),
    "MCLMC, modes near prior draws": replace(BASE, spread=1.0),
    "MCLMC, at Laplace draws": replace(BASE, laplace=True).with_options(start="draws"),
    "MCLMC, 1 mode": replace(BASE, modes=1, warmup=1000, steps=20_000, draws=1500),
    "MCLMC, 1 mode, 10 chains": replace(BASE, modes=1, chains=10),
    "MCLMC, 5 modes": replace(BASE, modes=5, warmup=1000, steps=3400, draws=300),
    "MCLMC, 5 modes, 2 chains each": replace(BASE, modes=5, chains=2),
    "MCLMC, 20 modes": replace(BASE, modes=20, warmup=300, steps=700, draws=70),
    "MCLMC, 5 modes of 300 steps": replace(BASE, modes=5, warmup=150, steps=150, draws=150),
    "MCLMC, 5 modes of 1,000 steps": replace(BASE, modes=5, warmup=300, steps=700, draws=350),
    "MCLMC, adjusted": replace(BASE, warmup=200, steps=100, draws=100).with_options(adjusted=True),
}


class SharedFits(Fits):
    """
    Members that differ in their modes only.

    :param name: of the set, whose prior scales and noise they have.
    """

    def __init__(self, name: str, split: Split, settings: Settings, seed: int) -> None:
        super().__init__(split, settings, seed)
        self.noise, self.scales = HYPERPARAMETERS[name]

    @cached_property
    def first(self) -> Member:
        """The first member."""
        start = time.process_time()
        member = self.member(0)
        self.member_seconds = time.process_time() - start
        return member

    @cached_property
    def members(self) -> list[Member]:
        """The members of the ensemble."""
        start = time.process_time()
        rest = [self.member(k) for k in range(1, self.settings.members)]
        self.rest_seconds = time.process_time() - start
        return [self.first, *rest]

    def member(self, k: int) -> Member:
        """The mode that is nearest to where a search of the evidence ends."""
        member = Member(self.data[0].shape[1], self.settings).fit(self.data, self.seed + k)
        with torch.no_grad():
            for name, scale in member.scales.items():
                scale.fill_(self.scales[name])
            member.model.log_noise.fill_(math.log(self.noise))
        member.guide = self.settle(member)
        return member

    def settle(self, member: Member) -> AutoLaplace:
        """The approximation at the mode that the member is nearest to."""
        guide = member.guide
        energy = member.potential(self.data)
        loc = lbfgs(lambda u: [energy(u)], guide.loc, max_iter=10 * self.settings.iterations)
        return member.at(loc, self.data).laplace_approximation(self.data, map_tolerance=math.inf)


def reference(
    fits: SharedFits, shape: tuple[int, int, int], cache: Path | None, options: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Predictions of evenly spaced draws of all chains, and what the chains say about themselves."""
    draws, report = chains(fits.first, fits.data, shape, cache=cache, **options)
    report |= options
    sites = fits.first.guide.packed.space.unpack(draws.flatten(0, 1))
    found = posterior_predictive(fits.first.model, sites, (fits.x_test,))
    report |= mixing(found.mean.reshape(*draws.shape[:2], -1))
    return found.mean[:: math.ceil(len(found.mean) / REFERENCE_DRAWS)], report


def kept_reference(
    name: str, fits: SharedFits, args: argparse.Namespace
) -> tuple[Prediction, dict[str, Any]]:
    """The reference from the file that keeps it, or of chains that are run, which takes an hour of a core for each set."""
    path = RESULTS / f"gold_reference_{name}.npz"
    if args.smoke or args.chains or not path.exists():
        if not (available() or args.smoke):
            raise SystemExit(f"{MISSING}; Pyro's NUTS would take days for the chains")
        shape = (2, 20, 20) if args.smoke else SHAPES[name]
        mean, report = reference(fits, shape, args.cache and args.cache / name, SAMPLER.get(name, {}))
        if not args.smoke:
            np.savez_compressed(path, mean=mean.float().numpy(), report=json.dumps(report))
    else:
        found = np.load(path)
        mean, report = torch.from_numpy(found["mean"]).double(), json.loads(str(found["report"]))
    variance = torch.full_like(mean, fits.noise**2)
    return Prediction(mean, variance, variance[:, :1]), report


def predict_once(method: str, fits: SharedFits, path: Path | None) -> tuple[Prediction, dict[str, Any]]:
    """A method's prediction, its CPU seconds and what it says about itself, from a file if there is one."""
    if path and path.exists():
        values, report = torch.load(path)
        return Prediction(*values), report if isinstance(report, dict) else {"seconds": round(report, 2)}
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    fits.extra = {}
    _ = fits.first  # its seconds are added below
    start = time.process_time()
    found = fits.microcanonical(RECIPES[method]) if method in RECIPES else METHODS[method](fits)
    report = {"seconds": round(time.process_time() - start + fits.member_seconds, 2)}
    if "gradients" in fits.extra:
        report |= fits.extra
    if path:
        torch.save((tuple(found), report), path)
    return found, report


def part(prediction: Prediction, rows: slice) -> Prediction:
    return Prediction(*(value[rows] for value in prediction))


def run(name: str, args: argparse.Namespace, done: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    split = load(name, "standard", 0)
    settings = replace(SMALL, draws=400, targets=10_000)
    if args.smoke:
        settings = replace(SMALL, **SMOKE)
        args.methods = [m for m in args.methods if m not in RECIPES]
    fits = SharedFits(name, split, settings, seed=0)
    thinned, report = kept_reference(name, fits, args)
    row = {"set": name, "n": len(split.x), "n_test": len(split.x_test), "noise": fits.first.model.noise}
    halves = len(thinned.mean) // 2
    if (name, HALVES) not in done:
        yield row | {
            "method": HALVES,
            **agreement(part(thinned, slice(halves)), part(thinned, slice(halves, None))),
            **scores(thinned.mean, thinned.variance, split.y_test, split.scale),
            **report,
        }
    for method in METHODS | RECIPES:
        if method == "NUTS" or (name, method) in done or method not in args.methods:
            continue
        found, costs = predict_once(method, fits, args.cache and args.cache / f"{name} {method}.pt")
        # the NUTS reference has as many draws: more of a method's would cost time only
        few = part(found, slice(None, None, math.ceil(len(found.mean) / REFERENCE_DRAWS)))
        yield row | {
            "method": method,
            **agreement(few, thinned),
            **scores(few.mean, few.variance, split.y_test, split.scale),
            **costs,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="yacht, a small network, two short chains; needs no extra"
    )
    parser.add_argument(
        "--out", type=Path, help="append the rows to this file of JSON lines; what it holds is not run again"
    )
    parser.add_argument("--sets", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS | RECIPES, default=[*(METHODS | RECIPES)], help="which rows"
    )
    parser.add_argument(
        "--chains",
        action="store_true",
        help="run the reference's chains anew, in place of the predictions in results/",
    )
    parser.add_argument(
        "--cache", type=Path, help="keep chains and predictions in this folder and take them from there"
    )
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    done = set()
    if args.out and args.out.exists():
        rows = [json.loads(line) for line in args.out.read_text().splitlines()]
        done = {(row["set"], row["method"]) for row in rows}
    for name in ["yacht"] if args.smoke else args.sets:
        for row in run(name, args, done):
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            if args.out:
                with args.out.open("a") as stream:
                    stream.write(json.dumps(row | {"torch": torch.__version__}) + "\n")


if __name__ == "__main__":
    main()
