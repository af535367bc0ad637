# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
The presets of rank-1 networks on the small data sets that ship with scikit-learn.

``digits``: 8 x 8 images, 1,000 for training and 500 for testing, a perceptron 64-64-64-10. ``diabetes``: 10 inputs, 221
rows for training and 221 for testing, a perceptron 10-50-1 with an unknown noise scale. Every seed has its own split.
Reported: NLL, and accuracy and ECE or the root mean squared error, of mixtures of four with 8 draws per component, and of
a MAP network, five modes and chains from them under the prior N(0, 1 / fan-in).

    python benchmarks/rank1_presets.py --out results.json
"""

import argparse
import itertools
import json
import math
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import sklearn
import torch
from rank1_fashion import FromPreset, Posterior, cosine
from rank1_images import Batches, scores
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn

from pyro_bnn.diagnostics import diversity
from pyro_bnn.infer import default_preset, dusenberry2020, fit, mclmc
from pyro_bnn.model.handlers import SubstituteMessenger
from pyro_bnn.nn import FanInNormal

TRAIN, TEST = {"digits": 1000, "diabetes": 221}, {"digits": 500, "diabetes": 221}
RATE = {"digits": 5e-3, "diabetes": 1e-2}


class Chains(Posterior):
    """Short microcanonical chains from the components of point masses, the output layer of a regression integrated out."""

    def draws(self, model: Any, guide: Any, data: tuple[Tensor, Tensor], task: str, steps: int) -> Any:
        """Draws of all latents, 50 of each chain, and how many gradients they took."""
        run = mclmc(
            model,
            guide,
            data,
            warmup_steps=steps,
            num_samples=min(50, steps),
            thinning=max(1, 2 * steps // 50),
            energy_variance=0.005,
            collapse="2" if task == "diabetes" else None,
            progress_bar=False,
        )
        return run.get_samples(), run.info["gradients"]


def methods(task: str) -> dict[str, Any]:
    default, paper = default_preset(), dusenberry2020(TRAIN[task])
    return {
        "MAP": Posterior("delta"),
        "five modes": Posterior("delta", 5),
        "MCLMC": Chains("delta", 5),
        "default preset": FromPreset(default),
        "default, weights N(0, 1/fan-in)": FromPreset(replace(default, weight_prior=FanInNormal())),
        "dusenberry2020": FromPreset(paper),
        "dusenberry2020, weights N(0, 1/fan-in)": FromPreset(
            replace(paper, weight_prior=FanInNormal(), bias_prior=default.bias_prior)
        ),
    }


def split(task: str, seed: int) -> list[Tensor]:
    """Standardised training inputs, training targets, test inputs, test targets."""
    source = load_digits() if task == "digits" else load_diabetes()
    x, y = torch.tensor(source.data).float(), torch.tensor(source.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[: TRAIN[task]], order[-TEST[task] :]
    x = (x - x[train].mean(0)) / x[train].std(0).clamp(min=1e-3)
    if task == "diabetes":
        y = ((y - y[train].mean()) / y[train].std()).float()
    return [x[train], y[train], x[test], y[test]]


def run(task: str, method: Any, seed: int, steps: int) -> dict[str, Any]:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    x, y, x_test, y_test = split(task, seed)
    if task == "digits":
        net: Any = nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        )
    else:
        net = nn.Sequential(nn.Linear(10, 50), nn.Tanh(), nn.Linear(50, 1))
    net = method.convert_(net, FanInNormal())

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        f = net(x)
        if task == "diabetes":
            f, sigma = f.squeeze(-1), pyro.sample("sigma", dist.LogNormal(-0.5, 0.5))
        with pyro.plate("data", TRAIN[task], subsample=torch.arange(len(x))):
            likelihood = dist.Categorical(logits=f) if task == "digits" else dist.Normal(f, sigma)
            return pyro.sample("obs", likelihood, obs=y)

    guide = method.guide(model)
    batches = Batches(x, y, 100 if task == "digits" else len(x))
    guide.initialize(*next(iter(batches)))
    start, rate = time.process_time(), RATE[task]
    fit(model, guide, batches, num_steps=steps, optim=rate, elbo=method.elbo(steps), callbacks=cosine(steps, rate),
        progress_bar=False)  # fmt: skip
    row: dict[str, Any] = {"cpu_seconds": time.process_time() - start, "steps": steps}
    if guide.num_components > 1 and seed == 0:
        row["report"] = str(diversity(model, guide, (x_test, y_test)))
    number = guide.num_components * (1 if guide.component == "delta" else 8)
    draws = guide.sample_posterior((number,))
    if isinstance(method, Chains):
        draws, row["gradients"] = method.draws(model, guide, (x, y), task, steps)
        number = len(next(iter(draws.values())))
        row["cpu_seconds"] = time.process_time() - start
    sigma = draws.pop("sigma", torch.zeros(())).unsqueeze(-1)
    with torch.no_grad(), SubstituteMessenger({k: v.unsqueeze(1) for k, v in draws.items()}):
        f = net(x_test)
    f = f.expand(number, *f.shape[-2:])
    if task == "digits":
        return row | scores(f.log_softmax(-1).logsumexp(0) - math.log(number), y_test)
    f = f.squeeze(-1)
    log_p = dist.Normal(f, sigma).log_prob(y_test).logsumexp(0) - math.log(number)
    return row | {"nll": -float(log_p.mean()), "rmse": float((f.mean(0) - y_test).square().mean().sqrt())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="ten steps, one seed")
    parser.add_argument(
        "--out", type=Path, help="append the rows to this JSON; those that are there are skipped"
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of methods")
    parser.add_argument("--tasks", nargs="*", default=list(TRAIN), choices=list(TRAIN))
    args = parser.parse_args()
    rows = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    done = {(row["task"], row["method"], row["seed"], row["steps"]) for row in rows}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "pyro": pyro.__version__,
                "scikit-learn": sklearn.__version__}  # fmt: skip
    for seed, task in itertools.product(range(1 if args.smoke else args.seeds), args.tasks):
        for name, method in methods(task).items():
            if (task, name, seed, args.steps) in done or (args.only and name not in args.only):
                continue
            row = {"task": task, "method": name, "seed": seed}
            row |= run(task, method, seed, 10 if args.smoke else args.steps)
            rows.append(row | {"threads": torch.get_num_threads(), **versions})
            print(
                {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if k != "report"},
                flush=True,
            )
            if args.out:
                args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
