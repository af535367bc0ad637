# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Every posterior of this package against long runs of NUTS on the same model and data.

The model is a network of 50 tanh units with the prior scales and the noise that the evidence chose (``uci.py``), both
fixed from there on, so that all posteriors approximate one distribution. Each chain starts at another mode and runs in coordinates in which the Laplace approximation there is a standard normal. Mean-field
variational inference and the rank-1 mixtures fit their noise by the bound.

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

import pyro
import torch
from gold_distances import agreement
from pyro.infer import MCMC, NUTS
from torch import Tensor
from uci import METHODS, SMALL, SMOKE, Fits, Prediction
from uci_data import load, scores
from uci_models import Member

from pyro_bnn.diagnostics.quality import split_r_hat
from pyro_bnn.infer import posterior_predictive
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.ops.newton import lbfgs

SETS = ("yacht", "boston", "energy")


class SharedFits(Fits):
    """Members that differ in their modes only: they have the first member's prior scales and noise."""

    @cached_property
    def members(self) -> list[Member]:
        """The members of the ensemble."""
        start = time.process_time()
        members = [self.first]
        for k in range(1, self.settings.members):
            member = Member(self.data[0].shape[1], self.settings).fit(self.data, self.seed + k)
            with torch.no_grad():
                for name, scale in member.scales.items():
                    scale.copy_(self.first.scales[name])
                member.model.log_noise.copy_(self.first.model.log_noise)
            member.guide = self.settle(member)
            members.append(member)
        self.rest_seconds = time.process_time() - start
        return members

    def settle(self, member: Member) -> AutoLaplace:
        """The approximation at the mode that the member is nearest to."""
        guide = member.guide
        energy = member.potential(self.data)
        loc = lbfgs(lambda u: [energy(u)], guide.loc, max_iter=10 * self.settings.iterations)
        return member.at(loc, self.data).laplace_approximation(self.data, map_tolerance=math.inf)


def chain(member: Member, data: tuple[Tensor, Tensor], steps: tuple[int, int], seed: int) -> dict[str, Any]:
    """
    One chain of NUTS from a member's mode.

    :param steps: steps of adaptation of the step size, and draws.
    :return: packed draws, shape (draws, p), and statistics.
    """
    warmup, draws = steps
    guide, energy = member.guide, member.potential(data)
    loc = guide.loc.detach()
    root = torch.linalg.inv(torch.linalg.cholesky(guide.precision)).T
    pyro.set_rng_seed(seed)
    count = 0

    def whitened(z: dict[str, Tensor]) -> Tensor:
        nonlocal count
        count += 1
        return energy(loc + root @ z["z"])

    start = time.process_time()
    kernel = NUTS(potential_fn=whitened, adapt_mass_matrix=False, max_tree_depth=8)
    mcmc = MCMC(
        kernel, draws, warmup_steps=warmup, initial_params={"z": torch.zeros(len(loc))}, disable_progbar=True
    )
    mcmc.run()
    return {
        "draws": loc + mcmc.get_samples()["z"] @ root.T,
        "gradients": count,
        "step_size": float(kernel.step_size),
        "diverging": len(mcmc.diagnostics()["divergences"]["chain 0"]),
        "seconds": time.process_time() - start,
    }


def reference(
    fits: SharedFits, chains: int, steps: tuple[int, int], cache: Path | None
) -> tuple[Prediction, dict[str, Any]]:
    """The predictions of all chains, and what the chains say about themselves."""
    found = []
    for k in range(chains):
        member = fits.members[k % len(fits.members)]
        path = cache and cache.with_name(f"{cache.name}_{k}.pt")
        if path and path.exists():
            run = torch.load(path)
        else:
            run = chain(member, fits.data, steps, seed=k)
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(run, path)
        found.append(run)
        print(f"chain {k}: {run['gradients']} gradients, {run['seconds']:.0f} s", flush=True)
    draws = torch.stack([run["draws"] for run in found])
    sites = fits.first.guide.packed.space.unpack(draws.flatten(0, 1))
    p = posterior_predictive(fits.first.model, sites, (fits.x_test,))
    r_hat = split_r_hat(p.mean.reshape(*draws.shape[:2], -1))
    prediction = Prediction(p.mean, p.variance.expand_as(p.mean), p.variance[:, :1])
    return prediction, {
        "chains": chains,
        "warmup": steps[0],
        "draws": steps[1],
        "r_hat": float(r_hat.max()),
        "r_hat_median": float(r_hat.median()),
        "r_hat_below_1.01": float((r_hat < 1.01).double().mean()),
        "gradients": sum(run["gradients"] for run in found),
        "diverging": sum(run["diverging"] for run in found),
        "seconds": round(sum(run["seconds"] for run in found), 1),
    }


def part(prediction: Prediction, rows: slice) -> Prediction:
    return Prediction(*(value[rows] for value in prediction))


def run(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    split = load(name, "standard", 0)
    settings = replace(SMALL, draws=400, targets=10_000)
    chains, steps = args.chains, (args.warmup, args.draws)
    if args.smoke:
        settings, chains, steps = replace(SMALL, **SMOKE), 2, (10, 20)
    fits = SharedFits(split, settings, seed=0)
    gold, report = reference(fits, chains, steps, args.cache and args.cache / name)
    row = {"set": name, "n": len(split.x), "n_test": len(split.x_test), "noise": fits.first.model.noise}
    halves = (
        len(gold.mean) // 2
    )  # the chains of the first half started at other modes than those of the second
    yield row | {
        "method": "NUTS, half of the chains",
        **agreement(part(gold, slice(halves)), part(gold, slice(halves, None))),
        **scores(gold.mean, gold.variance, split.y_test, split.scale),
        **report,
    }
    for method, predict in METHODS.items():
        if method == "NUTS":
            continue
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        start = time.process_time()
        found = predict(fits)
        yield row | {
            "method": method,
            **agreement(found, gold),
            **scores(found.mean, found.variance, split.y_test, split.scale),
            "seconds": round(time.process_time() - start + fits.member_seconds, 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="yacht, a small network, two short chains")
    parser.add_argument("--out", type=Path, help="write the rows to this file of JSON lines")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--cache", type=Path, help="keep the chains in this folder and take them from there")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in SETS[:1] if args.smoke else args.sets:
        for row in run(name, args):
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            if args.out:
                with args.out.open("a") as stream:
                    stream.write(json.dumps(row | {"torch": torch.__version__}) + "\n")


if __name__ == "__main__":
    main()
