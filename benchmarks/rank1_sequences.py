# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
An LSTM classifier on simulated event sequences: deterministic, BatchEnsemble, rank-1, deep ensemble.

A latent state follows an autoregression; at each of 24 time steps one of 20 events is drawn from a softmax whose logits
depend on the state; the binary outcome depends on the end of the path and is noisy. The Bayes rate is not
reached by any method with 2000 sequences, so overfitting and calibration matter. Reported: NLL, ECE, accuracy.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from rank1_fashion import cosine, he_weights
from rank1_images import Batches, scores
from torch import Tensor, nn

from pyro_bnn.infer import LinearAnnealing, Mixture_ELBO, fit
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.model.handlers import SubstituteMessenger
from pyro_bnn.nn import FanInNormal, bayesian_, rank1_

NUM_EVENTS, LENGTH = 20, 24


def simulate(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Event sequences and outcomes; the emission matrix is the same for every seed."""
    fixed = torch.Generator().manual_seed(1234)
    emission = 1.5 * torch.randn(3, NUM_EVENTS, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(number, 3, generator=generator)
    events, risk = [], torch.zeros(number)
    for _ in range(LENGTH):
        state = 0.9 * state + 0.43 * torch.randn(number, 3, generator=generator)
        events.append(torch.multinomial((state @ emission).softmax(-1), 1, generator=generator)[:, 0])
        risk = 0.8 * risk + 0.5 * (state[:, 0] * state[:, 1])
    outcome = (torch.rand(number, generator=generator) < torch.sigmoid(2.0 * risk)).long()
    return torch.stack(events, 1), outcome


class Classifier(nn.Module):
    """Embedding, LSTM, linear head on the last hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_EVENTS, 16)
        self.lstm = nn.LSTM(16, 32, batch_first=True)
        self.head = nn.Linear(32, 2)

    def forward(self, events: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(events))[0][:, -1])


NORMAL = dist.Normal(1.0, 0.3)
METHODS: dict[str, dict[str, Any]] = {
    "deterministic": {"K": 1, "component": "delta"},
    "batch ensemble": {"K": 4, "component": "delta", "factors": NORMAL},
    "rank-1 Gaussian": {"K": 4, "component": "normal", "factors": NORMAL},
    "rank-1 Cauchy": {"K": 4, "component": "cauchy", "factors": dist.Cauchy(1.0, 0.1)},
    "deep ensemble": {"K": 4, "component": "delta"},
    "rank-1 Cauchy, noise per example": {
        "K": 4,
        "component": "cauchy",
        "factors": dist.Cauchy(1.0, 0.1),
        "init_scale": 0.003,
        "noise": "per_example",
    },
}


def run(name: str, settings: dict[str, Any], seed: int, steps: int, train: int) -> dict[str, Any]:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    x, y = simulate(train, seed)
    x_test, y_test = simulate(4000, 10_000 + seed)
    net: Any = Classifier()
    prior = FanInNormal(2.0)
    if "factors" in settings:
        rank1_(net, prior=settings["factors"], weight_prior=prior)
    else:
        bayesian_(net, prior=prior)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = net(x)
        with pyro.plate("data", train, subsample=torch.arange(len(x))):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    K = settings["K"]
    guide = AutoMixture(model, K, settings["component"], init_scale=settings.get("init_scale", 0.0316),
                        noise=settings.get("noise", "shared"), init_loc_fn=he_weights)  # fmt: skip
    guide.initialize(x[:100], y[:100])
    elbo = Mixture_ELBO(kl_scale=LinearAnnealing(int(0.8 * steps)))
    start = time.perf_counter()
    fit(model, guide, Batches(x, y, 100), num_steps=steps, optim=5e-3, elbo=elbo, progress_bar=False,
        callbacks=cosine(steps, 5e-3))  # fmt: skip
    seconds = time.perf_counter() - start
    number = K * (1 if settings["component"] == "delta" else 8)
    draws = {n: v.unsqueeze(1) for n, v in guide.sample_posterior((number,)).items()}
    with torch.no_grad(), SubstituteMessenger(draws):
        log_p = net(x_test).log_softmax(-1)
    log_p = log_p.logsumexp(0) - math.log(number) if log_p.dim() == 3 else log_p
    return {
        "method": name, "seed": seed, "train": train, "steps": steps, "seconds": seconds, "draws": number,
        **scores(log_p, y_test),
        "parameters": sum(p.numel() for m in (net, guide) for p in m.parameters()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument(
        "--out", type=Path, help="append the rows to this JSON; those that are there are skipped"
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    rows = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    done = {(row["method"], row["seed"]) for row in rows}
    for seed in range(1 if args.smoke else args.seeds):
        for name, settings in METHODS.items():
            if (name, seed) in done:
                continue
            row = run(name, settings, seed, 5 if args.smoke else args.steps, 500 if args.smoke else 2000)
            rows.append(row | {"threads": torch.get_num_threads(), "torch": torch.__version__,
                               "pyro": pyro.__version__, "python": platform.python_version()})  # fmt: skip
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            if args.out:
                args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
