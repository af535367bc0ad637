# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
What importance weights and refinement by the forward divergence bring to Laplace approximations of small networks.

Networks 1-H-1 with tanh units and standard normal priors, 40 inputs in [-2, 2], an approximation at the mode.

    python benchmarks/refine.py [--smoke] [--out FILE.json]
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bnn import AutoLaplace
from pyro_bnn.infer import forward_kl, importance_weights

LIKELIHOODS: dict[str, Callable[[Tensor], Any]] = {
    "regression": lambda f: dist.Normal(f, 0.2),
    "classification": lambda f: dist.Bernoulli(logits=2 * f),
}
STRUCTURES = ("full", "kronecker", "diagonal")


def network(hidden: int, likelihood: Callable[[Tensor], Any]) -> Callable[..., Any]:
    def normal(*shape: int) -> Any:
        return dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        w1, b1 = pyro.sample("w1", normal(1, hidden)), pyro.sample("b1", normal(hidden))
        w2 = pyro.sample("w2", normal(hidden, 1))
        f = (torch.tanh(x @ w1 + b1) @ w2).squeeze(-1)
        with pyro.plate("data", x.shape[-2]):
            return pyro.sample("obs", likelihood(f), obs=y)

    return model


def targets(kind: str, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    noise, signal = torch.randn(len(x)), torch.sin(2 * x.squeeze(-1))
    return signal + 0.2 * noise if kind == "regression" else (signal + 0.5 * noise > 0).double()


def rows(widths: tuple[int, ...], num_samples: int) -> Iterator[dict[str, Any]]:
    x = torch.linspace(-2, 2, 40).unsqueeze(-1)
    for kind, likelihood in LIKELIHOODS.items():
        data = (x, targets(kind, x))
        for hidden in widths:
            model = network(hidden, likelihood)
            for structure in STRUCTURES:
                start = time.process_time()
                guide = AutoLaplace(model, structure=structure).initialize(*data).polish(data)
                guide.laplace_approximation(data)
                seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
                options: dict[str, Any] = {"num_samples": num_samples}
                found = importance_weights(
                    model, guide, data, space="functions", generator=seeds[0], **options
                )
                result = forward_kl(model, guide, data, generator=seeds[1], **options)
                row = {"kind": kind, "latents": 3 * hidden, "structure": structure}
                row |= {"functions_k_hat": found.k_hat, "functions_effective": found.effective_sample_size}
                for name, quality in (("before", result.before), ("after", result.after)):
                    row |= {
                        f"{name}_k_hat": quality.k_hat,
                        f"{name}_effective": quality.effective_sample_size,
                    }
                    row[f"{name}_elbo"] = quality.elbo
                row |= {"improved": result.improved, "rounds": len(result.rounds) - 1}
                yield row | {"seconds": round(time.process_time() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="one width, few draws")
    parser.add_argument("--out", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = []
    for row in rows((2,) if args.smoke else (2, 5, 10), 100 if args.smoke else 2000):
        print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        found.append({k: float(v) if isinstance(v, Tensor) else v for k, v in row.items()})
        if args.out:
            args.out.write_text(json.dumps({"torch": torch.__version__, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
