# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
What a training step, a prediction and an export cost, as ratios to plain torch in the same process.

    python benchmarks/workflow_speed.py [--smoke] [--out FILE.json]

Steps of the variants are interleaved with steps of the baseline, so that other work on the machine hits both;
reported are medians of ratios over rounds and their quartiles.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import Tensor
from workflow_baselines import Model, by_hand, data_of, hand_step, network, plain_step, textbook

from pyro_bnn.diagnostics import to_datatree
from pyro_bnn.infer import Mixture_ELBO, posterior_draws, posterior_predictive
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.infer.train.loop import Run
from pyro_bnn.model.data import as_batch
from pyro_bnn.model.handlers import SubstituteMessenger
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.nn import bayesian_, rank1_

NETWORKS = {
    "13-50-50-1": ([13, 50, 50, 1], 506),
    "784-400-400-10": ([784, 400, 400, 10], 128),
}


#: For prediction only: draws cost the same for any number of points.
LARGER_BATCHES = {"784-400-400-10, 1024 points": ([784, 400, 400, 10], 1024)}


class Repeated:
    """A step that comes with its own loop, for a setting around all repetitions."""

    def __init__(self, steps: Callable[[int], None]) -> None:
        self.steps = steps

    def __call__(self) -> None:
        """One step."""
        self.steps(1)


def fit_step(model: Any, guide: Any, elbo: Any, data: tuple[Any, ...]) -> Callable[[], Any]:
    """The step that fit takes, its bookkeeping included."""
    run = Run(model, guide, data, elbo)
    run.prepare(1e-3)
    batch = as_batch(data)

    def steps(count: int) -> None:
        with pyro.validation_enabled(False), local_parameters():
            for _ in range(count):
                run.take_step(batch)

    return Repeated(steps)


def svi_step(model: Any, guide: Any, elbo: Any, data: tuple[Any, ...]) -> Callable[[], Any]:
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    return lambda: svi.step(*data)


def compare(
    variants: dict[str, Callable[[], Any]],
    baseline: Callable[[], Any],
    rounds: int,
    steps: int,
) -> list[dict[str, Any]]:
    """Ratios of times, round by round."""
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    base: list[float] = []
    for step in (baseline, *variants.values()):
        for _ in range(3):
            step()
    for _ in range(rounds):
        before = clock(baseline, steps)
        for name, step in variants.items():
            ratios[name].append(clock(step, steps))
        after = clock(baseline, steps)
        base.append((before + after) / 2)
        for name in variants:
            ratios[name][-1] /= base[-1]
    return [
        {
            "variant": name,
            "ratio": round(float(np.median(values)), 3),
            "quartiles": [round(float(q), 3) for q in np.quantile(values, [0.25, 0.75])],
            "baseline_ms": round(1e3 * float(np.median(base)), 3),
        }
        for name, values in ratios.items()
    ]


def clock(step: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    if isinstance(step, Repeated):
        step.steps(repeats)
    else:
        for _ in range(repeats):
            step()
    return (time.perf_counter() - start) / repeats


def training(name: str, rounds: int, steps: int) -> list[dict[str, Any]]:
    sizes, rows = NETWORKS[name]
    data = data_of(sizes, rows)

    def bayes(**kwargs: Any) -> Model:
        return Model(bayesian_(network(sizes), **kwargs), sizes[-1])

    variants = {}
    with local_parameters():
        model: Any = Model(textbook(network(sizes)), sizes[-1])
        guide: Any = AutoNormal(model)
        variants["fit, AutoNormal, site per tensor"] = fit_step(model, guide, Trace_ELBO(), data)
        model = bayes(packed=True)
        variants["fit, AutoMixture(1), packed"] = fit_step(model, AutoMixture(model, 1), Mixture_ELBO(), data)
        model = bayes(packed=True)
        guide = AutoMixture(model, 1)
        variants["fit, AutoMixture(1), packed, TraceMeanField_ELBO"] = fit_step(
            model, guide, TraceMeanField_ELBO(), data
        )
        model = bayes(packed=True)
        variants["fit, AutoDiagonalNormal, packed"] = fit_step(
            model, AutoDiagonalNormal(model), Trace_ELBO(), data
        )
        model = Model(rank1_(network(sizes)), sizes[-1])
        variants["fit, rank-1, AutoMixture(1)"] = fit_step(model, AutoMixture(model, 1), Mixture_ELBO(), data)
    variants["by hand, mean field"] = hand_step(sizes, *data)
    pyro.clear_param_store()
    model = Model(textbook(network(sizes)), sizes[-1])
    variants["stock SVI, AutoNormal"] = svi_step(model, AutoNormal(model), Trace_ELBO(), data)
    found = compare(variants, plain_step(sizes, *data), rounds, steps)
    pyro.clear_param_store()
    return [{"question": "training step / plain torch step", "network": name, **row} for row in found]


def prediction(name: str, rounds: int, draws: int) -> list[dict[str, Any]]:
    sizes, rows = {**NETWORKS, **LARGER_BATCHES}[name]
    x, y = data_of(sizes, rows)
    plain = network(sizes)

    @torch.no_grad()
    def baseline() -> None:
        for _ in range(draws):
            plain(x)

    packed = Model(bayesian_(network(sizes), packed=True), sizes[-1])
    separate = Model(bayesian_(network(sizes)), sizes[-1])
    rank1 = Model(rank1_(network(sizes)), sizes[-1])
    stock = Model(textbook(network(sizes)), sizes[-1])
    guides = {
        "packed": AutoMixture(packed, 1),
        "separate": AutoMixture(separate, 1),
        "rank1": AutoMixture(rank1, 1),
    }
    for guide in guides.values():
        guide.initialize(x, y)
    stock_guide = AutoNormal(stock)
    with local_parameters():
        stock_guide(x, y)
    given = {name: posterior_draws(guide, draws) for name, guide in guides.items()}

    def run(model: Any, guide: Any) -> Any:
        return lambda: posterior_predictive(model, guide, (x,), num_samples=draws)

    variants = {
        "posterior_predictive, packed": run(packed, guides["packed"]),
        "by hand, draws not kept": by_hand(plain, guides["packed"], x, draws, False),
        "by hand, draws kept": by_hand(plain, guides["packed"], x, draws, True),
        "posterior_predictive, site per tensor": run(separate, guides["separate"]),
        "posterior_predictive, rank-1": run(rank1, guides["rank1"]),
        "the same with given draws, packed": run(packed, given["packed"]),
        "the same with given draws, site per tensor": run(separate, given["separate"]),
        "the same with given draws, rank-1": run(rank1, given["rank1"]),
        "posterior_predictive, textbook Pyro network": run(stock, stock_guide),
        "stock Predictive, textbook Pyro network": lambda: Predictive(
            stock, guide=stock_guide, num_samples=draws
        )(x),
    }
    found = compare(variants, baseline, rounds, 1)
    pyro.clear_param_store()  # stock Predictive leaves the guide's parameters there, under names that recur
    return [
        {"question": f"{draws} draws / {draws} deterministic passes", "network": name, **row} for row in found
    ]


def rank1_draws(
    draws: int, points: int
) -> tuple[Tensor, Tensor, Model, dict[str, Tensor], torch.nn.Sequential]:
    """Data, the larger network with rank-1 layers, draws of its factors, and the plain network."""
    sizes = NETWORKS["784-400-400-10"][0]
    x, y = data_of(sizes, points)
    rank1 = Model(rank1_(network(sizes)), sizes[-1])
    guide = AutoMixture(rank1, 1)
    guide.initialize(x[:10], y[:10])
    return x, y, rank1, posterior_draws(guide, draws), network(sizes)


def export(draws: int, points: int, rounds: int) -> list[dict[str, Any]]:
    """
    Export with pointwise log likelihoods, against the forward passes that it needs: deterministic ones of the plain
    network, and those of the model's network under the same draws without any export.
    """
    x, y, rank1, samples, plain = rank1_draws(draws, points)
    batches = list(zip(x.split(256), y.split(256), strict=True))

    @torch.no_grad()
    def deterministic() -> None:
        for _ in range(draws):
            for part, _ in batches:
                plain(part)

    @torch.no_grad()
    def forward() -> None:
        posterior = {n: v[:, None] for n, v in samples.items()}
        for part, _ in batches:
            for start in range(0, draws, 4):
                with SubstituteMessenger({n: v[start : start + 4] for n, v in posterior.items()}):
                    rank1.net(part)

    variants = {
        "to_datatree": lambda: to_datatree(rank1, samples, batches, predictions=False),
        "the model's network alone, four draws at a time": forward,
    }
    rows = compare(variants, deterministic, rounds, 1)
    return [
        {
            "question": f"export of {draws} draws, {points} points",
            "network": "784-400-400-10",
            "rounds": rounds,
            **r,
        }
        for r in rows
    ]


def long_export(draws: int, points: int) -> list[dict[str, Any]]:
    """
    One export of many draws at many points. The deterministic passes that it needs are spread over its duration: after
    every batch of the export a tenth as many passes over the same batch as there are draws, times ten.
    """
    x, y, rank1, samples, plain = rank1_draws(draws, points)
    passes: list[float] = []
    ratios: list[float] = []

    class Batches:
        """Batches of the data; the time that their consumer takes for each is compared with plain passes over it."""

        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for part in zip(x.split(256), y.split(256), strict=True):
                start = time.perf_counter()
                yield part
                mine, start = time.perf_counter() - start, time.perf_counter()
                with torch.no_grad():
                    for _ in range(draws // 10):
                        plain(part[0])
                passes.append(time.perf_counter() - start)
                ratios.append(mine / (10 * passes[-1]))

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    tree = to_datatree(rank1, samples, Batches(), predictions=False)
    own = time.perf_counter() - start - sum(passes)
    held = sum(array.nbytes for group in tree.children.values() for array in group.data_vars.values())
    return [
        {
            "question": f"export of {draws} draws, {points} points",
            "network": "784-400-400-10",
            "variant": "to_datatree, in one go",
            "ratio": round(own / (10 * sum(passes)), 3),
            "quartiles": [round(float(q), 3) for q in np.quantile(ratios, [0.25, 0.75])],
            "baseline_ms": round(1e4 * sum(passes)),
            "rounds": 1,
            "peak_MiB_above_start": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
            "tree_MiB": held // 2**20,
        }
    ]


#: The order of the questions in the results, by first word.
PLACES = ("training", "10", "100", "export")

#: ``long_export`` is the export of 1,000 draws; for 10,000 points it takes ten minutes.
PARTS = ["training", "prediction", "export", "long_export"]


def write_tables(rows: list[dict[str, Any]], folder: Path) -> None:
    """Tables for the documentation, one per question."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, word in (("training", "training"), ("prediction", "deterministic"), ("export", "export")):
        chosen = [row for row in rows if word in row["question"]]
        variants = list(dict.fromkeys(row["variant"] for row in chosen))
        column = "question" if file == "export" else "network"
        names = list(dict.fromkeys(row[column] for row in chosen))
        lines = [
            ".. list-table::",
            "   :header-rows: 1",
            "",
            "   * - variant",
            *(f"     - {name}" for name in names),
        ]
        for variant in variants:
            lines.append(f"   * - {variant}")
            for name in names:
                found = [row for row in chosen if (row["variant"], row[column]) == (variant, name)]
                low, high = found[0]["quartiles"] if found else (0, 0)
                lines.append(
                    f"     - {found[0]['ratio']:.2f} ({low:.2f} to {high:.2f})" if found else "     -"
                )
        (folder / f"{file}.rst").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tables", type=Path, help="folder for reST tables")
    parser.add_argument("--parts", nargs="+", default=["training", "prediction", "export"], choices=PARTS)
    parser.add_argument("--points", type=int, default=10_000, help="points of long_export")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--networks", nargs="+", help="names of networks, all by default; for prediction")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pyro.set_rng_seed(0)
    rounds = 2 if options.smoke else options.rounds
    rows = []
    parts = options.parts
    draws = 10 if options.smoke else 100
    if "training" in parts:
        for name, steps in (
            ("13-50-50-1", 5 if options.smoke else 40),
            ("784-400-400-10", 2 if options.smoke else 8),
        ):
            rows += training(name, rounds, steps)
    if "prediction" in parts:
        for name in options.networks or [*NETWORKS, *LARGER_BATCHES]:
            times = rounds if name == "13-50-50-1" else max(2, rounds // 5)
            rows += [row | {"rounds": times} for row in prediction(name, times, draws)]
    if "export" in parts:
        rows += export(draws, 512 if options.smoke else 1024, 1 if options.smoke else 3)
    if "long_export" in parts:
        rows += long_export(20 if options.smoke else 1000, 512 if options.smoke else options.points)
    meta = {
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "threads": options.threads,
        "seed": 0,
        "rounds": rounds,
    }
    rows = [{**meta, **row} for row in rows]
    for row in rows:
        low, high = row["quartiles"]
        print(
            f"{row['network']:15} {row['question']:34} {row['variant']:50} {row['ratio']:7.2f} [{low:.2f}, {high:.2f}]"
        )
    if options.out:  # what this run did not ask stays
        asked = {(row["question"], row["network"]) for row in rows}
        old = json.loads(options.out.read_text()) if options.out.exists() else []
        kept = [row for row in old if (row["question"], row["network"]) not in asked]
        rows = sorted(kept + rows, key=lambda row: list(PLACES).index(row["question"].split()[0]))
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    if options.tables:
        write_tables(rows, options.tables)


if __name__ == "__main__":
    main()
