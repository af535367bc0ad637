# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Fashion-MNIST and MNIST with a network of LeNet's size: MAP, deep ensemble, rank-1 mixture, Laplace approximations, and
Hessian-free Laplace.

Every posterior sees the same training images and has the same number of steps, batch size and optimiser; the prior of
the weights is N(0, 16 / fan-in), as in the study ``prior`` of ``rank1_fashion.py``. Laplace approximations
are around the first member of the ensemble, with the GGN over all training images, and the closed-form probit
predictive; "tuned" ones multiply the prior precision by the value that the evidence prefers. Hessian-free Laplace
solves for the last layer at the features of some training images and is a lower bound at others; the row has the largest
relative difference of a variance from the dense curvature on test images. ``--methods "HFL, probe"`` takes all layers by random solves, which is work for a GPU.

Reported are accuracy, NLL, ECE (15 bins), Brier score, the mean confidence and the AUROC of the confidence against
two sets of other images, and on MNIST the scores under rotation by 0 to 180 degrees.

    PYRO_BNN_DATA=../shared/data python benchmarks/images.py --out benchmarks/results/images.json
    python benchmarks/images.py --smoke
    python benchmarks/images.py --large --device cuda --out large.json

Resumable: rows that are in the file already are not run again, and modes are kept beside it.
"""

import argparse
import json
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from rank1_fashion import cosine
from rank1_images import Batches, load
from torch import Tensor, nn

from pyro_bnn.diagnostics import metrics
from pyro_bnn.infer import default_preset, fit, hfl, posterior_predictive
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, init_component
from pyro_bnn.nn import FanInNormal, bayesian_

PRIOR = FanInNormal(gain=4.0, bias_scale=0.3)
STANDARD = {"fashion": (0.2860, 0.3530), "mnist": (0.1307, 0.3081)}
OTHERS = {"fashion": ("mnist", "notmnist"), "mnist": ("fashion", "notmnist")}
ANGLES = tuple(range(0, 181, 30))
Predictor = Callable[[Tensor], Tensor]
clock = time.process_time  # processor seconds: with one thread the time that an idle machine would take


def lenet() -> nn.Sequential:
    """44,426 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def he_init(site: Any) -> Tensor:
    """Weights start at He et al.'s (2015) draws, whatever their prior, and biases at zero."""
    value = site["fn"].sample()
    if site["name"].endswith("weight"):
        return torch.randn_like(value) * math.sqrt(2 / math.prod(value.shape[1:]))
    return torch.zeros_like(value) if site["name"].endswith("bias") else init_component(site)


def classifier(net: Any, num_data: int) -> Callable[..., Tensor]:
    """Labels given the logits of a network."""

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = net(x)
        with pyro.plate("data", num_data, subsample=torch.arange(len(x), device=x.device)):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    return model


def rotate(images: Tensor, degrees: float) -> Tensor:
    """
    :param images: values in [0, 1], shape (n, 1, 28, 28).
    :param degrees: the angle.
    :return: rotated images with black corners.
    """
    a = math.radians(degrees)
    theta = images.new_tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0]])
    grid = F.affine_grid(theta.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class Task:
    """One data set, standardised by the constants of its training images, and its companions."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        files = {"fashion": "fashion_mnist.npz", "mnist": "mnist.npz", "notmnist": "notmnist_test.npz"}
        mine = load(files[name])
        mean, sd = STANDARD[name]
        self.name, self.device = name, torch.device(options.device)

        def images(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).float().unsqueeze(1).to(self.device) / 255.0

        def labels(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).long().to(self.device)

        self.x = (images(mine["x_train"][: options.train]) - mean) / sd
        self.y = labels(mine["y_train"][: options.train])
        self.x_test = (images(mine["x_test"][: options.test]) - mean) / sd
        self.y_test = labels(mine["y_test"][: options.test])
        self.others = {
            other: (images(load(files[other])["x_test"][: options.others]) - mean) / sd
            for other in OTHERS[name]
        }
        self.rotated: dict[int, Tensor] = {}
        if name == "mnist":
            some = images(mine["x_test"][: options.rotated])
            self.rotated = {angle: (rotate(some, angle) - mean) / sd for angle in ANGLES}

    def batches(self, size: int = 500) -> list[tuple[Tensor, Tensor]]:
        """The training images once, in order."""
        return list(zip(self.x.split(size), self.y.split(size), strict=True))


class Runner:
    """Fits what several methods share once: modes are kept on disk."""

    def __init__(self, task: Task, seed: int, options: argparse.Namespace) -> None:
        self.task, self.seed, self.options = task, seed, options
        self.num_steps = options.epochs * (len(task.x) // options.batch)
        self.seconds = 0.0

    def fit(self, model: Any, guide: Any, elbo: Any = None) -> None:
        """The training run that all methods share."""
        task, options = self.task, self.options
        data = Batches(task.x, task.y, options.batch)
        fit(
            model, guide, data, num_steps=self.num_steps, optim=options.lr, elbo=elbo, progress_bar=False,
            callbacks=cosine(self.num_steps, options.lr),
        )  # fmt: skip

    def mode(self, member: int, **settings: Any) -> AutoLaplace:
        """A point estimate: ``member`` of the deep ensemble, as a Laplace guide that has no curvature yet."""
        task = self.task
        path = self.options.modes / f"{task.name}_{self.seed}_{member}.pt"
        pyro.set_rng_seed(1000 * self.seed + member)
        net = bayesian_(lenet().to(task.device), prior=PRIOR)
        model = classifier(net, len(task.x))
        guide = AutoLaplace(model, init_loc_fn=he_init, **settings)
        guide.initialize(task.x[: self.options.batch], task.y[: self.options.batch])
        if path.exists():
            saved = torch.load(path, weights_only=True)
            guide.loc.data.copy_(saved["loc"])
        else:
            start = clock()
            self.fit(model, guide)
            saved = {"loc": guide.loc.data, "seconds": clock() - start}
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(saved, path)
        self.seconds += saved["seconds"]
        return guide

    # ------------------------------------------------------------------ methods

    def map(self) -> tuple[Predictor, dict[str, Any]]:
        """A point estimate."""
        return self._at_mode(self.mode(0)), {}

    def _at_mode(self, guide: AutoLaplace) -> Predictor:
        values = guide.median()
        model = guide.packed.model

        def predict(x: Tensor) -> Tensor:
            with torch.no_grad():
                logits = pyro.poutine.condition(model, values)
                trace = pyro.poutine.trace(logits).get_trace(x)
                return trace.nodes["obs"]["fn"].logits.log_softmax(-1)

        return predict

    def ensemble(self) -> tuple[Predictor, dict[str, Any]]:
        """Several of them."""
        members = [self._at_mode(self.mode(m)) for m in range(self.options.members)]

        def predict(x: Tensor) -> Tensor:
            return torch.stack([member(x) for member in members]).logsumexp(0) - math.log(len(members))

        return predict, {"members": len(members)}

    def rank1(self) -> tuple[Predictor, dict[str, Any]]:
        """A mixture of Gaussians over rank-1 factors."""
        task, batch = self.task, self.options.batch
        pyro.set_rng_seed(1000 * self.seed + 500)
        preset = default_preset()
        net = preset.convert_(lenet().to(task.device), bias_prior=dist.Normal(0.0, 0.3))
        model = classifier(net, len(task.x))
        guide = preset.guide(model, num_components=4, init_loc_fn=he_init)
        guide.initialize(task.x[:batch], task.y[:batch])
        start = clock()
        self.fit(model, guide, preset.elbo(self.num_steps))
        self.seconds += clock() - start
        draws = guide.sample_posterior((4 * self.options.draws,))

        def predict(x: Tensor) -> Tensor:
            return posterior_predictive(model, draws, (x,)).mean.mean(0).log()

        weights = sum(p.numel() for m in (net, guide) for p in m.parameters())
        return predict, {"draws": 4 * self.options.draws, "parameters": weights}

    def laplace(self, tuned: bool, **settings: Any) -> tuple[Predictor, dict[str, Any]]:
        """A Laplace approximation around the first point estimate."""
        guide = self.mode(0, **settings)
        start = clock()
        guide.laplace_approximation(self.task.batches(), map_tolerance=float("inf"))
        report: dict[str, Any] = {"newton_decrement": guide.map_report.newton_decrement}  # type: ignore[union-attr]
        if tuned:
            guide.optimize_hyperparameters()
            report["prior_precision_multiplier"] = float(guide.tau.max())  # type: ignore[union-attr]
        report["log_evidence"] = float(guide.log_evidence())
        report["approximation_seconds"] = clock() - start
        self.seconds += report["approximation_seconds"]

        def predict(x: Tensor) -> Tensor:
            predictive: Any = guide.predictive(x)["obs"]
            return predictive.logits.detach()

        return predict, report

    def hfl_last_layer(self) -> tuple[Predictor, dict[str, Any]]:
        """Solves for the last layer, checked against its dense curvature."""
        task = self.task
        mode = self.mode(0)
        values = mode.median()
        body = lenet().to(task.device)[:-1]
        body.load_state_dict({name: values[name] for name in body.state_dict()})
        start = clock()
        with torch.no_grad():
            features = torch.cat([body(part) for part in task.x.split(500)]).double()
        head = bayesian_(nn.Linear(84, 10).to(task.device).double(), prior=PRIOR)
        model = classifier(head, len(features))
        guide = AutoHessianFreeLaplace(model).initialize(features[:10], task.y[:10])
        point = {"weight": values["11.weight"].double(), "bias": values["11.bias"].double()}
        guide.loc.data.copy_(guide.packed.space.pack(point))
        targets = features[torch.randperm(len(features))[: self.options.targets]]
        # one block of all right-hand sides: there are more of them than latents, so that two iterations finish
        guide.laplace_approximation(
            (features, task.y), (targets,), map_tolerance=float("inf"), block_size=10 * len(targets)
        )
        seconds = clock() - start
        self.seconds += seconds
        exact = AutoLaplace(model).initialize(features[:10], task.y[:10])
        exact.loc.data.copy_(guide.loc.data)
        exact.laplace_approximation((features, task.y), map_tolerance=float("inf"))
        with torch.no_grad():
            some = body(task.x_test[:500]).double()
        mine, dense = (g.linearized_outputs(some)["obs"].variance for g in (guide, exact))
        report = {
            "approximation_seconds": seconds, "targets": len(targets), "products": guide.result.products,  # type: ignore[union-attr]
            "largest_relative_difference_from_dense": float((mine / dense - 1).abs().max()),
        }  # fmt: skip

        def predict(x: Tensor) -> Tensor:
            with torch.no_grad():
                z = body(x).double()
            predictive: Any = guide.predictive(z)["obs"]
            return predictive.logits.detach()

        return predict, report

    def hfl_probe(self) -> tuple[Predictor, dict[str, Any]]:
        """Random solves for all layers."""
        mode = self.mode(0)
        guide = AutoHessianFreeLaplace(
            mode.packed.model, method="probe", curvature="ggn", tolerance=1e-2, preconditioner="diagonal"
        )
        guide.initialize(self.task.x[:10], self.task.y[:10])
        guide.loc.data.copy_(mode.loc.data)
        start = clock()
        targets = self.task.x_test[: self.options.targets]
        guide.laplace_approximation(
            self.task.batches(),
            (targets,),
            map_tolerance=float("inf"),
            num_probes=self.options.probes,
            max_iter=self.options.iterations,
        )
        seconds = clock() - start
        self.seconds += seconds

        def predict(x: Tensor) -> Tensor:
            predictive: Any = guide.predictive(x)["obs"]
            return predictive.logits.detach()

        return predict, {"approximation_seconds": seconds, "captured": guide.result.captured}  # type: ignore[union-attr]


LAST = {"structure": "full", "sites": "last_layer"}
METHODS: dict[str, Callable[[Runner], tuple[Predictor, dict[str, Any]]]] = {
    "MAP": Runner.map,
    "Laplace, last layer": lambda run: run.laplace(False, **LAST),
    "Laplace, last layer, tuned": lambda run: run.laplace(True, **LAST),
    "HFL, last layer": Runner.hfl_last_layer,
    "rank-1 (K = 4)": Runner.rank1,
    "deep ensemble": Runner.ensemble,
    "Laplace, Kronecker, tuned": lambda run: run.laplace(True, structure="kronecker"),
    "Laplace, diagonal, tuned": lambda run: run.laplace(True, structure="diagonal"),
    "Laplace, Kronecker": lambda run: run.laplace(False, structure="kronecker"),
    "Laplace, diagonal": lambda run: run.laplace(False, structure="diagonal"),
    "HFL, probe": Runner.hfl_probe,
}


def scores(log_probs: Tensor, y: Tensor) -> dict[str, float]:
    """
    :param log_probs: shape (n, 10).
    :param y: labels.
    :return: NLL, accuracy, ECE and Brier score.
    """
    probs = log_probs.exp().unsqueeze(0)
    return {
        "nll": float(-log_probs.gather(1, y[:, None]).mean()),
        "accuracy": metrics.accuracy(probs, y),
        "ece": metrics.ece(probs, y),
        "brier": metrics.brier(probs, y),
    }


def evaluate(task: Task, predict: Predictor) -> dict[str, float]:
    def all_of(x: Tensor) -> Tensor:
        return torch.cat([predict(part) for part in x.split(250)])

    start = clock()
    test = all_of(task.x_test)
    row = scores(test, task.y_test)
    row["predict_seconds_per_1000"] = (clock() - start) * 1000 / len(test)
    confidence = test.exp().amax(-1)
    row["confidence"] = float(confidence.mean())
    for name, x in task.others.items():
        other = all_of(x).exp().amax(-1)
        row[f"confidence_{name}"] = float(other.mean())
        row[f"auroc_{name}"] = metrics.auroc(-confidence, -other)
    for angle, x in task.rotated.items():
        for key, value in scores(all_of(x), task.y_test[: len(x)]).items():
            row[f"rotated_{angle}_{key}"] = value
    return row


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    for seed in range(options.seeds):
        for name in options.data:
            for method in options.methods:
                yield name, seed, method


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a few hundred images, one epoch")
    parser.add_argument("--large", action="store_true", help="all images, 40 epochs, 5 seeds, all methods")
    parser.add_argument("--out", type=Path, help="JSON file of rows; those in it are not run again")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", nargs="*", default=["fashion", "mnist"], choices=["fashion", "mnist"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS)[:-1], choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--train", type=int, default=10_000, help="training images")
    parser.add_argument("--test", type=int, default=5_000, help="test images")
    parser.add_argument("--others", type=int, default=1_000, help="images of each other set")
    parser.add_argument("--rotated", type=int, default=500, help="test images that are rotated")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--draws", type=int, default=2, help="draws of each component at test time")
    parser.add_argument(
        "--targets", type=int, default=400, help="images that Hessian-free Laplace solves for"
    )
    parser.add_argument("--probes", type=int, default=64, help="random solves of 'HFL, probe'")
    parser.add_argument(
        "--iterations",
        type=int,
        default=100,
        help="of a random solve; fewer give lower bounds of the variances",
    )
    options = parser.parse_args()
    if options.smoke:
        options.train, options.test, options.others, options.rotated, options.epochs = 400, 100, 100, 20, 1
        options.methods, options.members, options.targets, options.probes = list(METHODS), 2, 100, 4
        options.iterations = 3
    if options.large:
        options.train, options.test, options.rotated, options.others = 60_000, 10_000, 10_000, 10_000
        options.epochs, options.seeds, options.methods = 40, 5, list(METHODS)
    if options.device != "cpu":
        globals()["clock"] = time.perf_counter
    options.modes = (
        options.out or Path("benchmarks/results/scratch/images_smoke.json")
    ).parent / "scratch/image_modes"
    if options.smoke:
        for path in options.modes.glob("*.pt"):
            path.unlink()
    warnings.simplefilter("ignore", hfl.HFLWarning)
    rows: list[dict[str, Any]] = []
    if options.out and options.out.exists():
        rows = json.loads(options.out.read_text())
    done = {(row["data"], row["seed"], row["method"]) for row in rows}
    common = {
        "train": options.train, "epochs": options.epochs, "batch": options.batch, "threads": torch.get_num_threads(),
        "device": options.device, "python": platform.python_version(), "torch": torch.__version__,
        "pyro": pyro.__version__,
    }  # fmt: skip
    for name, seed, method in jobs(options):
        if (name, seed, method) in done:
            continue
        task = Task(name, options)
        runner = Runner(task, seed, options)
        predict, report = METHODS[method](runner)
        row = {"data": name, "seed": seed, "method": method, "seconds": 0.0, **report}
        row["seconds"] = runner.seconds
        row |= evaluate(task, predict)
        rows.append({**row, **common})
        shown = " ".join(f"{k} {row[k]:.4f}" for k in ("nll", "accuracy", "ece", "brier"))
        print(f"{name:8s} seed {seed} {method:28s} {row['seconds']:6.0f} s {shown}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
