# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Rank-1 networks on Fashion-MNIST against a deterministic network, BatchEnsemble, mean-field VI and a deep ensemble.

Studies (``--studies``), each with its own number of seeds:

    penalty    the paper's L2 penalty 1e-4 of the mean loss: here the deterministic network overfits
    ablations  factors r, s or both; K = 1, 2, 4, 8; average or log-mixture likelihood; mean or sum of the KL
    cauchy     what makes the Cauchy family underfit
    prior      a prior N(0, 16 / fan-in) of the weights that was chosen on held-out images
    large      the penalty with all 60,000 training images
    cnn        the penalty with a convolutional network whose rank-1 overhead is under 3 %
    choice     presets compared on held-out training images, never on the test set
    presets    the presets on the test set

Every method of a study has the same network, optimiser (Adam, warm-up and cosine), number of steps and fresh batch, and
the KL is annealed over 80 % of the steps. Reported are NLL, accuracy, ECE (15 bins), Brier score, the AUROC of
the predictive entropy against MNIST and notMNIST, and the first three on corrupted test images (noise, blur, contrast,
rotation, five severities each). Rows are appended to ``--out`` as they finish; rows that are there are skipped.

    PYRO_BNN_DATA=../shared/data python benchmarks/rank1_fashion.py --out results.json
"""

import argparse
import itertools
import json
import math
import platform
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from rank1_images import Batches, Images, scores
from torch import Tensor, nn

from pyro_bnn.diagnostics import diversity
from pyro_bnn.diagnostics.metrics import auroc
from pyro_bnn.infer import Mixture_ELBO, Rank1Preset, default_preset, dusenberry2020, fit
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.infer.autoguide.initialization import init_component, site_hint
from pyro_bnn.infer.mixture.schedules import LinearAnnealing
from pyro_bnn.model.handlers import SubstituteMessenger
from pyro_bnn.nn import FanInNormal, bayesian_, rank1_

WIDTHS = (784, 200, 200, 10)
LEARNING_RATE = 2e-3


def mlp() -> nn.Sequential:
    """784-200-200-10."""
    pairs = itertools.pairwise(WIDTHS)
    return nn.Sequential(*itertools.chain.from_iterable((nn.Linear(a, b), nn.ReLU()) for a, b in pairs))[:-1]


def cnn() -> nn.Sequential:
    """Four convolutions with stride 2 and global average pooling."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 28, 28))]
    for a, b, size in ((1, 16, 5), (16, 64, 3), (64, 128, 3), (128, 128, 3)):
        layers += [nn.Conv2d(a, b, size, stride=2, padding=size // 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def he_weights(site: Any) -> Tensor:
    """Full weights start at He et al.'s (2015) draws, whatever their prior; everything else at the default."""
    if site_hint(site).get("role") == "weight":
        value = site["fn"].sample()
        if value.dim() == 1:
            return torch.zeros_like(value)
        return torch.randn_like(value) * math.sqrt(2 / value[0].numel())
    return init_component(site)


@dataclass(frozen=True)
class Posterior:
    """
    A method. ``factors`` is the prior of rank-1 factors, ``None`` for full weights.
    """

    component: str
    num_components: int = 1
    factors: Any = None
    init_scale: float = 0.01
    clip: float | None = None
    noise: str = "shared"
    likelihood: str = "average"
    kl: str = "mean"
    init: Any = he_weights
    #: the KL is multiplied by this after annealing
    temperature: float = 1.0
    #: learning rate of the scales as a multiple of that of all else
    scale_rate: float = 1.0

    def convert_(self, net: nn.Module, weights: Any) -> Any:
        """Makes the network random; ``weights`` is the prior of weights."""
        if self.factors is None:
            return bayesian_(net, prior=weights)
        for layer in net.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.kaiming_normal_(layer.weight)
        biases = weights if isinstance(weights, dist.Normal) else dist.Normal(0.0, 0.3)
        return rank1_(net, prior=self.factors, weight_prior=weights, bias_prior=biases, clip=self.clip)

    def guide(self, model: Any) -> AutoMixture:
        """The guide of a model."""
        return AutoMixture(model, self.num_components, self.component, init_scale=self.init_scale,
                           init_loc_fn=self.init, noise=self.noise)  # fmt: skip

    def elbo(self, num_steps: int) -> Mixture_ELBO:
        """The bound, annealed."""
        annealing = LinearAnnealing(int(0.8 * num_steps))
        return Mixture_ELBO(
            self.likelihood, self.kl, kl_scale=lambda step: self.temperature * annealing(step)
        )


@dataclass(frozen=True)
class FromPreset:
    """A preset of the library with four components, as a user would take it."""

    preset: Rank1Preset

    def convert_(self, net: nn.Module, weights: Any) -> Any:
        """The preset has its own prior of the weights."""
        return self.preset.convert_(net)

    def guide(self, model: Any) -> AutoMixture:
        """The guide of a model."""
        return self.preset.guide(model, 4)

    def elbo(self, num_steps: int) -> Mixture_ELBO:
        """The bound, annealed."""
        return self.preset.elbo(num_steps)


GAUSS = Posterior("normal", 4, dist.Normal(1.0, 0.5), 0.1)
CAUCHY = Posterior("cauchy", 4, dist.Cauchy(1.0, 0.1), 0.003)
METHODS = {
    "deterministic": Posterior("delta"),
    "rank-1 Gaussian": GAUSS,
    "deep ensemble": Posterior("delta", 4),
    "batch ensemble": Posterior("delta", 4, dist.Normal(1.0, 0.5)),
    "mean-field VI": Posterior("normal"),
    "rank-1 Cauchy": replace(CAUCHY, noise="per_example"),
}
ABLATIONS = {
    "log-mixture, mean KL": replace(GAUSS, likelihood="log_mixture"),
    "r only": replace(GAUSS, factors={"r": dist.Normal(1.0, 0.5)}),
    "s only": replace(GAUSS, factors={"s": dist.Normal(1.0, 0.5)}),
    **{f"K = {k}": replace(GAUSS, num_components=k) for k in (1, 2, 8)},
    "log-mixture, sum KL": replace(GAUSS, likelihood="log_mixture", kl="sum"),
    "average, sum KL": replace(GAUSS, kl="sum"),
}
CAUCHYS = {
    "Gaussian": GAUSS,
    "Cauchy": CAUCHY,
    "initial scale 3e-4": replace(CAUCHY, init_scale=3e-4),
    "prior scale 0.01": replace(CAUCHY, factors=dist.Cauchy(1.0, 0.01)),
    "noise per example": replace(CAUCHY, noise="per_example"),
    "Gaussian, noise per example": replace(GAUSS, noise="per_example"),
    "KL x 0.1": replace(CAUCHY, temperature=0.1),
    "clip 2": replace(CAUCHY, clip=2.0),
    "initial scale 3e-4, rate of scales x 10": replace(CAUCHY, init_scale=3e-4, scale_rate=10.0),
    "Gaussian, rate of scales x 10": replace(GAUSS, scale_rate=10.0),
}
PAPER, DEFAULT = dusenberry2020(5000), default_preset()
PRESETS = {"default preset": FromPreset(DEFAULT), "dusenberry2020": FromPreset(PAPER)}
CANDIDATES = {
    **PRESETS,
    "default, noise per example": FromPreset(replace(DEFAULT, noise="per_example")),
    "default, the paper's L2": FromPreset(
        replace(DEFAULT, weight_prior=PAPER.weight_prior, bias_prior=PAPER.bias_prior)
    ),
    "default, factors N(1, 0.1)": FromPreset(
        replace(DEFAULT, prior=PAPER.prior, init_scale=PAPER.init_scale)
    ),
    "default, sum KL": FromPreset(replace(DEFAULT, kl="sum")),
    "dusenberry2020, mean KL": FromPreset(replace(PAPER, kl="mean")),
}


@dataclass(frozen=True)
class Study:
    """Data, training and methods. ``l2`` is the penalty of a mean loss; ``None`` the fan-in prior."""

    methods: dict[str, Any]
    seeds: int
    l2: float | None = 1e-4
    net: Any = mlp
    train: int = 5000
    test: int | None = None
    small: int = 500
    epochs: int = 12
    batch: int = 128
    validation: bool = False
    learning_rate: float = LEARNING_RATE

    def weight_prior(self) -> Any:
        """The prior of weights and biases."""
        if self.l2 is None:
            return FanInNormal(4.0, bias_scale=0.3)
        return dist.Normal(0.0, 1 / math.sqrt(2 * self.train * self.l2))

    def smoke(self) -> "Study":
        """The same study at a size that takes seconds."""
        return replace(self, seeds=1, train=512, test=200, small=20, epochs=1)


STUDIES = {
    "penalty": Study(METHODS, 3),
    "ablations": Study(ABLATIONS, 2),
    "cauchy": Study(CAUCHYS, 1, train=10_000, validation=True),
    "prior": Study(METHODS, 2, l2=None),
    "large": Study(METHODS, 1, train=60_000, epochs=10, batch=256),
    "choice": Study(CANDIDATES, 1, validation=True),
    "presets": Study(PRESETS, 2),
    "cnn": Study(METHODS, 1, net=cnn, train=4000, test=3000, small=200),
}


@dataclass
class Trained:
    """A trained network with its guide."""

    net: Any
    guide: AutoMixture
    model: Any
    info: dict[str, Any] = field(default_factory=dict)

    def draws(self, per_component: int) -> dict[str, Tensor]:
        """Draws with a singleton for the data plate."""
        each = 1 if self.guide.component == "delta" else per_component
        number = self.guide.num_components * each
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
            group["lr"] = (
                group.get("multiple", 1.0)
                * lr
                * min(1.0, state.step / 200)
                * 0.5
                * (1 + math.cos(math.pi * min(t, 1.0)))
            )

    return callback


def train(study: Study, method: Any, data: Images, seed: int) -> Trained:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    batches = Batches(data.x, data.y, study.batch)
    num_steps = study.epochs * len(batches)
    net = method.convert_(study.net(), study.weight_prior())

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = net(x)
        with pyro.plate("data", len(data.x), subsample=torch.arange(len(x))):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    guide = method.guide(model)
    guide.initialize(data.x[: study.batch], data.y[: study.batch])
    elbo = method.elbo(num_steps)
    named = [(n, p) for module in (net, guide) for n, p in module.named_parameters()]
    scales = [p for n, p in named if n.startswith("scale")]
    groups = [{"params": [p for n, p in named if not n.startswith("scale")]}]
    groups += [{"params": scales, "multiple": getattr(method, "scale_rate", 1.0)}] if scales else []
    optimizer = torch.optim.Adam(groups, lr=study.learning_rate, fused=True)
    start, cpu = time.perf_counter(), time.process_time()
    result = fit(model, guide, batches, num_steps=num_steps, optim=optimizer, elbo=elbo,
                 callbacks=cosine(num_steps, study.learning_rate), progress_bar=False)  # fmt: skip
    info = {
        "train": len(data.x), "l2": study.l2, "epochs": study.epochs, "batch": study.batch, "steps": num_steps,
        "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu,
        "parameters": sum(p.numel() for m in (net, guide) for p in m.parameters()),
        "final_loss": float(result.losses[-20:].mean()), **{f"part_{k}": v for k, v in elbo.parts.items()},
    }  # fmt: skip
    if scales:
        quantiles = guide.scale.detach().flatten()[:100_000].quantile(torch.tensor([0.1, 0.5, 0.9]))
        info["scales"] = quantiles.tolist()
    return Trained(net, guide, model, info)


def evaluate(trained: Trained, data: Images, per_component: int) -> dict[str, Any]:
    draws = trained.draws(per_component)
    number = next(iter(draws.values())).shape[0]
    test = trained.log_probs(data.x_test, draws)
    row: dict[str, Any] = {"draws": number, **scores(test, data.y_test)}
    row["train_nll"] = scores(trained.log_probs(data.x[:2000], draws), data.y[:2000])["nll"]
    n = min(2000, len(data.x_test))
    members = [
        trained.log_probs(data.x_test[:n], {k: v[i : i + 1] for k, v in draws.items()})
        for i in range(min(8, number))
    ]
    labels = torch.stack([m.argmax(-1) for m in members])
    pairs = list(itertools.combinations(range(len(labels)), 2))
    row["disagreement"] = float(np.mean([(labels[i] != labels[j]).float().mean() for i, j in pairs] or [0.0]))
    row["member_nll"] = float(np.mean([scores(m, data.y_test[:n])["nll"] for m in members]))
    inside = -(test.exp() * test).sum(-1)
    for name, images in data.others.items():
        out = trained.log_probs(images, draws)
        row[f"auroc_{name}"] = auroc(inside, -(out.exp() * out).sum(-1))
    found: dict[str, list[float]] = {"nll": [], "accuracy": [], "ece": []}
    for (kind, severity), images in data.corrupted.items():
        each = scores(trained.log_probs(images, draws), data.y_test[: len(images)])
        for key, values in found.items():
            values.append(each[key])
            row[f"{kind}_{severity}_{key}"] = each[key]
    return row | {f"corrupted_{key}": float(np.mean(v)) for key, v in found.items() if v}


def report(trained: Trained, data: Images) -> dict[str, Any]:
    """The diversity report of a mixture on 2,000 test images."""
    if trained.guide.num_components == 1:
        return {}
    found = diversity(trained.model, trained.guide, (data.x_test[:2000], data.y_test[:2000]))
    return {"report": str(found), "report_gain": found.gain, "report_mixture_nll": found.mixture_nll,
            "report_member_nll": found.member_nll.tolist()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="512 images, one epoch, one seed")
    parser.add_argument("--out", type=Path, help="append the rows to this JSON")
    parser.add_argument("--studies", nargs="*", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--only", nargs="*", help="names of methods")
    parser.add_argument("--seeds", type=int, help="number of seeds in place of the study's")
    parser.add_argument("--samples", type=int, default=4, help="draws per component at test time")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if args.out and args.out.exists():
        rows = json.loads(args.out.read_text())
    done = {(row["study"], row["method"], row["seed"]) for row in rows}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "pyro": pyro.__version__}
    studies = {name: STUDIES[name].smoke() if args.smoke else STUDIES[name] for name in args.studies}
    seeds = {name: args.seeds or study.seeds for name, study in studies.items()}
    # the first seed of everything comes first, so that an interrupted run still has every row
    for seed, name in itertools.product(range(max(seeds.values())), studies):
        study = studies[name]
        methods = {m: p for m, p in study.methods.items() if not args.only or m in args.only}
        todo = [m for m in methods if seed < seeds[name] and (name, m, seed) not in done]
        data = Images.read(study.train, study.test or 10_000, study.small, study.validation) if todo else None
        for method in todo:
            assert data is not None
            trained = train(study, methods[method], data, seed)
            row = {"study": name, "method": method, "seed": seed, **trained.info}
            row |= evaluate(trained, data, args.samples)
            row |= report(trained, data) if seed == 0 and not study.validation else {}
            rows.append(row | {"threads": torch.get_num_threads(), **versions})
            shown = ("nll", "accuracy", "ece", "brier", "corrupted_nll", "disagreement", "train_nll")
            print(f"{name} {method:22s} seed {seed} {row['cpu_seconds']:6.0f} s "
                  + " ".join(f"{k} {row[k]:.4f}" for k in shown if k in row), flush=True)  # fmt: skip
            if args.out:
                args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
