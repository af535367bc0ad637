# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Rank-1 networks on Fashion-MNIST against a deterministic network, BatchEnsemble, mean-field VI and a deep ensemble.

Every method trains the same multilayer perceptron (784-200-200-10) with the same optimiser, number of steps, fresh
batch and prior N(0, 16 / fan-in) of the weights. That scale, and the priors and initial scales of the factors, were
chosen with 10,000 images of the training set that are not among the first 50,000; nothing was chosen by a test set. Reported are NLL, accuracy, ECE (15
bins), Brier score, the AUROC of the predictive entropy against MNIST and notMNIST, and the first three on corrupted
test images (noise, blur, contrast, rotation, five severities each).

    PYRO_BNN_DATA=../shared/data python benchmarks/rank1_fashion.py --out results.json
"""

import argparse
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from pyro_bnn.infer import Mixture_ELBO, fit
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.infer.autoguide.initialization import init_component, site_hint
from pyro_bnn.infer.handlers import SubstituteMessenger
from pyro_bnn.infer.schedules import LinearAnnealing
from pyro_bnn.nn import FanInNormal, bayesian_, rank1_

DATA = Path(os.environ.get("PYRO_BNN_DATA", Path(__file__).parents[1] / "../shared/data")) / "images"
WIDTHS = (784, 200, 200, 10)
GAIN = 4.0
L2: float | None = None  # the paper's penalty of a mean loss, in place of the fan-in prior


def load(name: str) -> dict[str, np.ndarray]:
    path = DATA / name
    if not path.exists():
        print(
            f"{path} is missing: set PYRO_BNN_DATA to the folder that holds images/{name}.", file=sys.stderr
        )
        sys.exit(2)
    return dict(np.load(path))


def scaled(images: np.ndarray) -> Tensor:
    """Flattened images with the mean and standard deviation of the Fashion-MNIST training set removed."""
    return (torch.from_numpy(images).float().flatten(1) / 255.0 - 0.2860) / 0.3530


class Batches:
    """Shuffled batches of tensors in memory."""

    def __init__(self, x: Tensor, y: Tensor, size: int) -> None:
        self.x, self.y, self.size = x, y, size

    def __len__(self) -> int:
        return len(self.x) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x))
        for i in range(len(self)):
            index = order[i * self.size : (i + 1) * self.size]
            yield self.x[index], self.y[index]


def corrupt(images: Tensor, kind: str, severity: int, generator: torch.Generator) -> Tensor:
    """Corrupts images with values in [0, 1], shape (n, 28, 28); severities 1 to 5."""
    level = severity - 1
    if kind == "noise":
        sd = (0.04, 0.08, 0.12, 0.18, 0.26)[level]
        return (images + sd * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    if kind == "contrast":
        c = (0.75, 0.6, 0.45, 0.3, 0.15)[level]
        mean = images.mean((1, 2), keepdim=True)
        return mean + c * (images - mean)
    if kind == "blur":
        sd = (0.5, 0.8, 1.1, 1.5, 2.0)[level]
        t = torch.arange(-6, 7).float()
        kernel = torch.exp(-0.5 * (t / sd) ** 2)
        kernel = kernel / kernel.sum()
        y = F.conv2d(images[:, None], kernel.view(1, 1, 1, -1), padding=(0, 6))
        return F.conv2d(y, kernel.view(1, 1, -1, 1), padding=(6, 0))[:, 0]
    angle = math.radians((8, 16, 24, 35, 50)[level])
    theta = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])
    grid = F.affine_grid(theta.expand(len(images), 2, 3), [len(images), 1, 28, 28], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


CORRUPTIONS = ("noise", "blur", "contrast", "rotation")


def ece(probs: Tensor, y: Tensor, bins: int = 15) -> float:
    confidence, label = probs.max(-1)
    correct = (label == y).double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    total = 0.0
    for b in range(bins):
        mine = index == b
        if mine.any():
            total += abs(float(correct[mine].mean() - confidence[mine].double().mean())) * float(
                mine.double().mean()
            )
    return total


def scores(log_probs: Tensor, y: Tensor) -> dict[str, float]:
    probs = log_probs.exp()
    return {
        "nll": float(-log_probs.gather(1, y[:, None]).mean()),
        "accuracy": float((probs.argmax(-1) == y).float().mean()),
        "ece": ece(probs, y),
        "brier": float((probs - F.one_hot(y, 10)).square().sum(-1).mean()),
    }


def he_weights(site: Any) -> Tensor:
    """Weights start at He et al.'s (2015) draws, whatever their prior; everything else at the default."""
    if site_hint(site).get("role") == "weight":
        value = site["fn"].sample()
        return (
            torch.randn_like(value) * math.sqrt(2 / value.shape[-1])
            if value.dim() > 1
            else torch.zeros_like(value)
        )
    return init_component(site)


def weight_prior(num_data: int) -> Any:
    if L2 is None:
        return FanInNormal(GAIN, bias_scale=0.3)
    return dist.Normal(0.0, 1 / math.sqrt(2 * num_data * L2))


class Method:
    """A network, a model and a guide."""

    def __init__(self, name: str, num_steps: int, num_data: int, **settings: Any) -> None:
        self.name, self.settings = name, settings
        self.net: Any = nn.Sequential(
            *itertools.chain.from_iterable(
                (nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(WIDTHS)
            )
        )[:-1]
        K = settings.get("num_components", 1)
        factors = settings.get("factors")
        kl = settings.get("kl", "mean")
        if factors is None:
            bayesian_(self.net, prior=weight_prior(num_data))
            component: Any = settings["component"]
            scale = settings.get("init_scale", 0.01)
        else:
            rank1_(
                self.net,
                prior=factors,
                weight_prior=weight_prior(num_data),
                bias_prior=dist.Normal(0.0, 0.3),
            )
            component, scale = settings["component"], settings.get("init_scale", 0.0316)
        schedule = LinearAnnealing(int(0.8 * num_steps))
        self.elbo = Mixture_ELBO(settings.get("likelihood", "average"), kl, kl_scale=schedule)

        def model(x: Tensor, y: Tensor | None = None) -> Tensor:
            logits = self.net(x)
            with pyro.plate("data", num_data, subsample=torch.arange(len(x))):
                return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

        self.model = model
        for module in self.net.modules():
            if isinstance(module, nn.Linear) and factors is not None:
                nn.init.kaiming_normal_(module._sites["weight"].init)
        self.guide = AutoMixture(model, K, component, init_scale=scale, init_loc_fn=he_weights)
        self.stochastic = component != "delta"
        self.num_components = K

    def num_parameters(self) -> int:
        """Trainable numbers of network and guide together."""
        return sum(p.numel() for m in (self.net, self.guide) for p in m.parameters())

    def draws(self, per_component: int) -> dict[str, Tensor]:
        """Draws with a singleton for the data plate."""
        number = self.num_components * (per_component if self.stochastic else 1)
        return {k: v.unsqueeze(1) for k, v in self.guide.sample_posterior((number,)).items()}

    @torch.no_grad()
    def log_probs(self, x: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """Log of the mean probabilities over the draws."""
        out = []
        for part in x.split(500):
            with SubstituteMessenger(draws):
                logits = self.net(part)
            each = logits.log_softmax(-1)
            out.append(each.logsumexp(0) - math.log(len(each)) if each.dim() == 3 else each)
        return torch.cat(out)


def cosine(num_steps: int, lr: float) -> Any:
    """A callback that warms the learning rate up and lets it fall like a cosine."""

    def callback(state: Any) -> None:
        t = state.step / num_steps
        for group in state.optimizer.param_groups:
            group["lr"] = lr * min(1.0, state.step / 200) * 0.5 * (1 + math.cos(math.pi * min(t, 1.0)))

    return callback


CAUCHY, NORMAL = (dist.Cauchy(1.0, 0.1), dist.Normal(1.0, 0.5))
METHODS: dict[str, dict[str, Any]] = {
    "deterministic": {"component": "delta", "num_components": 1},
    "batch ensemble": {"component": "delta", "num_components": 4, "factors": NORMAL},
    "mean-field VI": {"component": "normal", "num_components": 1},
    "rank-1 Gaussian": {"component": "normal", "num_components": 4, "factors": NORMAL, "init_scale": 0.1},
    "rank-1 Cauchy": {"component": "cauchy", "num_components": 4, "factors": CAUCHY, "init_scale": 0.003},
    "deep ensemble": {"component": "delta", "num_components": 4},
}
_GAUSS = METHODS["rank-1 Gaussian"]
ABLATIONS: dict[str, dict[str, Any]] = {
    "r only": {**_GAUSS, "factors": {"r": NORMAL}},
    "s only": {**_GAUSS, "factors": {"s": NORMAL}},
    **{f"K = {k}": {**_GAUSS, "num_components": k} for k in (1, 2, 8)},
    "log-mixture, mean KL": {**_GAUSS, "likelihood": "log_mixture"},
    "log-mixture, sum KL": {**_GAUSS, "likelihood": "log_mixture", "kl": "sum"},
    "average, sum KL": {**_GAUSS, "kl": "sum"},
}


def run(
    name: str,
    settings: dict[str, Any],
    data: dict[str, Tensor],
    seed: int,
    epochs: int,
    batch: int,
    samples: int,
) -> dict[str, Any]:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    batches = Batches(data["x"], data["y"], batch)
    num_steps = epochs * len(batches)
    method = Method(name, num_steps, len(data["x"]), **settings)
    method.guide.initialize(data["x"][:batch], data["y"][:batch])
    lr = 2e-3
    start = time.perf_counter()
    result = fit(
        method.model, method.guide, batches, num_steps=num_steps, optim=lr, elbo=method.elbo,
        callbacks=cosine(num_steps, lr), progress_bar=False,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    draws = method.draws(samples)
    row: dict[str, Any] = {
        "method": name, "seed": seed, "train": len(data["x"]), "l2": L2, "epochs": epochs, "batch": batch, "seconds": seconds,
        "parameters": method.num_parameters(), "final_loss": float(result.losses[-20:].mean()),
        "draws": next(iter(draws.values())).shape[0], **{f"part_{k}": v for k, v in method.elbo.parts.items()},
    }  # fmt: skip
    test = method.log_probs(data["x_test"], draws)
    row |= scores(test, data["y_test"])
    members = [method.log_probs(data["x_test"][:2000], {k: v[i : i + 1] for k, v in draws.items()})
               for i in range(min(8, row["draws"]))]  # fmt: skip
    labels = torch.stack([m.argmax(-1) for m in members])
    pairs = list(itertools.combinations(range(len(labels)), 2))
    row["disagreement"] = (
        float(np.mean([(labels[i] != labels[j]).float().mean() for i, j in pairs])) if pairs else 0.0
    )
    row["member_nll"] = float(np.mean([scores(m, data["y_test"][:2000])["nll"] for m in members]))
    entropy = {"test": -(test.exp() * test).sum(-1)}
    for other in ("mnist", "notmnist"):
        out = method.log_probs(data[other], draws)
        entropy[other] = -(out.exp() * out).sum(-1)
        target = np.r_[np.zeros(len(test)), np.ones(len(out))]
        row[f"auroc_{other}"] = float(roc_auc_score(target, torch.cat([entropy["test"], entropy[other]])))
    generator = torch.Generator().manual_seed(0)
    corrupted: dict[str, list[float]] = {"nll": [], "accuracy": [], "ece": []}
    n = len(data["corrupt"])
    for kind, severity in itertools.product(CORRUPTIONS, range(1, 6)):
        x = (corrupt(data["corrupt"], kind, severity, generator).flatten(1) - 0.2860) / 0.3530
        s = scores(method.log_probs(x, draws), data["y_test"][:n])
        for key, values in corrupted.items():
            values.append(s[key])
            row[f"{kind}_{severity}_{key}"] = s[key]
    row |= {f"corrupted_{key}": float(np.mean(values)) for key, values in corrupted.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a subset, one epoch, one seed")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    parser.add_argument("--only", nargs="*", help="names of methods; no ablations then")
    parser.add_argument(
        "--l2", type=float, help="penalty of the mean loss (the paper has 1e-4) in place of the prior"
    )
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--train", type=int, default=20_000, help="number of training images")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ablation-seeds", type=int, default=1)
    parser.add_argument("--samples", type=int, default=8, help="draws per component at test time")
    args = parser.parse_args()
    fashion, mnist, notmnist = (load(f"{n}.npz") for n in ("fashion_mnist", "mnist", "notmnist_test"))
    limit, test = (2000, 500) if args.smoke else (args.train, None)
    small = 200 if args.smoke else 2000
    data = {
        "x": scaled(fashion["x_train"][:limit]),
        "y": torch.from_numpy(fashion["y_train"][:limit]).long(),
        "x_test": scaled(fashion["x_test"][:test]),
        "y_test": torch.from_numpy(fashion["y_test"][:test]).long(),
        "mnist": scaled(mnist["x_test"][: 2 * small]),
        "notmnist": scaled(notmnist["x_test"][: 2 * small]),
        "corrupt": torch.from_numpy(fashion["x_test"][:small]).float() / 255.0,
    }
    versions = {"python": platform.python_version(), "torch": torch.__version__, "pyro": pyro.__version__}
    rows: list[dict[str, Any]] = []
    epochs, seeds = (1, 1) if args.smoke else (args.epochs, args.seeds)
    # the first seed of everything comes first, so that an interrupted run still has every row
    jobs = [(n, s, 0) for n, s in METHODS.items()]
    for seed in range(1 if args.smoke else args.ablation_seeds):
        jobs += [(n, s, seed) for n, s in ABLATIONS.items()]
    jobs += [(n, s, seed) for seed in range(1, seeds) for n, s in METHODS.items()]
    if args.only:
        jobs = [(n, METHODS[n], seed) for seed in range(seeds) for n in args.only]
    globals()["L2"] = args.l2
    for name, settings, seed in jobs:
        row = run(name, settings, data, seed, epochs, args.batch, args.samples)
        row |= {"threads": torch.get_num_threads(), **versions}
        rows.append(row)
        shown = (
            "nll",
            "accuracy",
            "ece",
            "brier",
            "auroc_mnist",
            "auroc_notmnist",
            "corrupted_nll",
            "disagreement",
        )
        print(f"{name:22s} seed {seed} {row['seconds']:6.0f} s " + " ".join(f"{k} {row[k]:.4f}" for k in shown),
              flush=True)  # fmt: skip
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
