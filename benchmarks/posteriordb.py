# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Seven posteriors of posteriordb (Magnusson et al.) by microcanonical chains, beside what approximations give there.

A row is one method on one posterior. z-scores compare means and standard deviations of all reference parameters with those of the
gold-standard draws, in standard errors of both: with an effective sample size S of a parameter (of its squared distance from the
mean) :math:`\mathrm{se}(\text{mean}) = s/\sqrt S` and :math:`\mathrm{se}(s) = s\sqrt{(\kappa - 1)/(4 S)}`, :math:`\kappa` the kurtosis
of the draws. Approximations are compared in standard deviations of the reference: their error is no Monte Carlo error.

    PYRO_BNN_DATA=../shared/data python benchmarks/posteriordb.py --out benchmarks/results/posteriordb.jsonl
"""

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor
from uci_data import DATA

from pyro_bnn.infer import fit, mclmc
from pyro_bnn.infer.autoguide import AutoLaplace, AutoLaplaceMixture
from pyro_bnn.infer.predict.draws import posterior_draws

CHAINS, DRAWS = 4, 2000


def flat(*shape: int) -> Any:
    """An improper flat prior."""
    return dist.ImproperUniform(constraints.real, (), shape)


def normal(name: str, scale: float, *shape: int) -> Tensor:
    return pyro.sample(name, dist.Normal(torch.zeros(shape), scale).to_event(len(shape)))


def observe(mean: Tensor, scale: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mean, scale), obs=y)


def eight_schools(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0 * torch.ones(())))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(mu + tau * z, sigma), obs=y)


def regression(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", flat(x.shape[1]))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    observe(x @ beta, sigma, y)


def kidiq(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", flat(x.shape[1]))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5 * torch.ones(())))
    observe(x @ beta, sigma, y)


def blr(x: Tensor, y: Tensor) -> None:
    beta = normal("beta", 10.0, x.shape[1])
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0 * torch.ones(())))
    observe(x @ beta, sigma, y)


def autoregression(x: Tensor, y: Tensor) -> None:
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = normal("beta", 10.0, x.shape[1])
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5 * torch.ones(())))
    observe(alpha + x @ beta, sigma, y)


def arma(shift: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5 * torch.ones(())))
    # err_t + theta err_(t-1) = y_t - mu - phi y_(t-1), with mu in the place of y_0: one triangular solve for all t
    before = torch.cat([mu.reshape(1), y[:-1]])
    matrix = torch.eye(len(y)) + theta * shift
    error = torch.linalg.solve_triangular(matrix, (y - mu - phi * before).unsqueeze(-1), upper=False)
    observe(y - error.squeeze(-1), sigma, y)


def gaussian_process(x: Tensor, k: Tensor) -> None:
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0 * torch.ones(())))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0 * torch.ones(())))
    z = normal("z", 1.0, len(x))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Poisson(latent_function(x, rho, alpha, z).exp()), obs=k)


def latent_function(x: Tensor, rho: Tensor, alpha: Tensor, z: Tensor) -> Tensor:
    """The function L z, batched over the leading dimensions of the parameters."""
    squares = (x.unsqueeze(-1) - x).square()
    rho, alpha = rho[..., None, None], alpha[..., None, None]
    kernel = alpha.square() * (-0.5 * squares / rho.square()).exp() + 1e-10 * torch.eye(len(x))
    return (torch.linalg.cholesky(kernel) @ z.unsqueeze(-1)).squeeze(-1)


def standard(draws: dict[str, Tensor], data: Any) -> dict[str, Tensor]:
    """Sites under the names of the reference."""
    return {n: v for n, v in draws.items() if n in ("beta", "sigma", "alpha", "mu", "phi", "theta")}


def of_schools(draws: dict[str, Tensor], data: Any) -> dict[str, Tensor]:
    mu, tau = draws["mu"], draws["tau"]
    return {"mu": mu, "tau": tau, "theta": mu[..., None] + tau[..., None] * draws["z"]}


def of_process(draws: dict[str, Tensor], data: Any) -> dict[str, Tensor]:
    rho, alpha = draws["rho"], draws["alpha"]
    return {"rho": rho, "alpha": alpha, "f": latent_function(data[0], rho, alpha, draws["z"])}


def tensors(data: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in data.items()}


def ones_and(*columns: Tensor) -> Tensor:
    return torch.stack([torch.ones_like(columns[0]), *columns], -1)


def _schools(d: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return d["sigma"], d["y"]


def _kidiq(d: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return ones_and(d["mom_hs"], d["mom_iq"]), d["kid_score"]


def _mesquite(d: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    logs = (d[n].log() for n in ("diam1", "diam2", "canopy_height", "total_height", "density"))
    return ones_and(*logs, d["group"]), d["weight"].log()


def _lags(d: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    y, lags = d["y"], int(d["K"])
    return torch.stack([y[lags - k : len(y) - k] for k in range(1, lags + 1)], -1), y[lags:]


def _arma(d: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.diag(torch.ones(len(d["y"]) - 1), -1), d["y"]


#: By posterior: the model, its arguments from the data, and the reference's parameters from draws.
POSTERIORS: dict[str, tuple[Callable[..., None], Callable[..., Any], Callable[..., Any]]] = {
    "eight_schools-eight_schools_noncentered": (eight_schools, _schools, of_schools),
    "kidiq-kidscore_momhsiq": (kidiq, _kidiq, standard),
    "sblrc-blr": (blr, lambda d: (d["X"], d["y"]), standard),
    "mesquite-logmesquite": (regression, _mesquite, standard),
    "arK-arK": (autoregression, _lags, standard),
    "arma-arma11": (arma, _arma, standard),
    "gp_pois_regr-gp_pois_regr": (gaussian_process, lambda d: (d["x"], d["k"]), of_process),
}


class Case:
    """One posterior: model, data, reference."""

    def __init__(self, name: str, entry: dict[str, Any]) -> None:
        self.name, self.reference = name, entry["reference"]
        self.model, arguments, self.quantities = POSTERIORS[name]
        self.data = arguments(tensors(entry["data"]))

    def named(self, draws: dict[str, Tensor]) -> dict[str, Tensor]:
        """Draws ``(chains, draws)`` of every parameter of the reference, from those of the sites."""
        found = {}
        for site, value in self.quantities(draws, self.data).items():
            if value.dim() == 2:
                found[site] = value
            else:
                found |= {f"{site}[{i + 1}]": value[..., i] for i in range(value.shape[-1])}
        lacking = set(self.reference) - set(found)
        assert not lacking, f"{self.name}: no draws of {sorted(lacking)}"
        return {name: found[name] for name in self.reference}

    def compare(self, draws: dict[str, Tensor], *, chains: bool) -> dict[str, float]:
        """The worst of all parameters: z-scores of chains, or errors in standard deviations."""
        rows = [self._one(self.reference[n], v.double(), chains) for n, v in self.named(draws).items()]
        row = {"mean_error": max(r["mean_error"] for r in rows), "sd_ratio_min": min(r["sd_ratio"] for r in rows),
               "sd_ratio_max": max(r["sd_ratio"] for r in rows)}  # fmt: skip
        if chains:
            row |= {k: max(r[k] for r in rows) for k in ("z_mean", "z_sd", "r_hat")}
            row["ess"] = min(r["ess"] for r in rows)
        return row

    @staticmethod
    def _one(reference: dict[str, float], value: Tensor, chains: bool) -> dict[str, float]:
        mean, sd = value.mean(), value.std()
        row = {
            "mean_error": float((mean - reference["mean"]).abs()) / reference["sd"],
            "sd_ratio": float(sd) / reference["sd"],
        }
        if not chains:
            return row
        squares = (value - mean).square()
        kurtosis = max(float(squares.square().mean() / squares.mean().square()), 1.5)
        size, size_of_squares = (float(effective_sample_size(v, 0, 1)) for v in (value, squares))
        n = reference["draws"]
        error = math.sqrt(float(sd) ** 2 / size + reference["sd"] ** 2 / n)
        error_of_sd = float(sd) * math.sqrt((kurtosis - 1) / 4 * (1 / size_of_squares + 1 / n))
        return row | {
            "z_mean": abs(float(mean) - reference["mean"]) / error,
            "z_sd": abs(float(sd) - reference["sd"]) / error_of_sd,
            "r_hat": float(split_gelman_rubin(value)),
            "ess": min(size, size_of_squares),
        }


def laplace(case: Case) -> AutoLaplace:
    """The Laplace approximation with the Hessian at the joint mode in unconstrained space."""
    guide = AutoLaplace(case.model, curvature="hessian").initialize(*case.data)
    guide.polish(*case.data)
    return guide.laplace_approximation(*case.data)


def of_guide(guide: Any, case: Case, number: int = 10_000) -> dict[str, Tensor]:
    return {n: v.unsqueeze(0).detach() for n, v in posterior_draws(guide, number, *case.data).items()}


def mixture(case: Case) -> Any:
    guide = AutoLaplaceMixture(case.model, 5, curvature="hessian").initialize(*case.data)
    guide.polish(*case.data)
    return guide.laplace_approximation(*case.data)


def mean_field(case: Case) -> Any:
    mode = laplace(case).median()
    guide = AutoNormal(case.model, init_loc_fn=init_to_value(values=mode), init_scale=0.1)
    guide(*case.data)
    fit(case.model, guide, case.data, num_steps=4000, optim=0.02, progress_bar=False)
    return guide


def chains_of(case: Case, guide: Any, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    settings = {"num_samples": DRAWS, "warmup_steps": 2000, "num_chains": CHAINS, "progress_bar": False}
    run = mclmc(case.model, guide, case.data, **(settings | options))
    report = {"gradients": run.info["gradients"], "diverging": int(run.sample_stats["diverging"].sum())}
    if "acceptance_rate" in run.sample_stats:
        report["acceptance"] = float(run.sample_stats["acceptance_rate"].mean())
    return run.samples, report


METHODS: dict[str, Callable[[Case], Any]] = {
    "Laplace": lambda case: (of_guide(laplace(case), case), None),
    "mixture of Laplace": lambda case: (of_guide(mixture(case), case), None),
    "mean field": lambda case: (of_guide(mean_field(case), case), None),
    "adjusted, from Laplace": lambda case: chains_of(case, laplace(case), adjusted=True, start="draws", whiten="guide"),
    "adjusted, from scratch": lambda case: chains_of(case, None, adjusted=True, whiten="diagonal"),
    "unadjusted, from Laplace": lambda case: chains_of(case, laplace(case), start="draws", whiten="guide", thinning=10),
    "unadjusted, from scratch": lambda case: chains_of(case, None, whiten="diagonal", thinning=10),
}  # fmt: skip


def run(case: Case, method: str) -> dict[str, Any]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    start = time.process_time()
    row: dict[str, Any] = {"posterior": case.name, "method": method, "parameters": len(case.reference)}
    try:
        draws, report = METHODS[method](case)
        row |= case.compare(draws, chains=report is not None) | (report or {})
    except Exception as error:  # a row that says so is a result
        row["failed"] = f"{type(error).__name__}: {error}"[:300]
    return row | {"seconds": round(time.process_time() - start, 2), "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="append rows to this file; what it holds is not run again")
    parser.add_argument("--posteriors", nargs="+", choices=list(POSTERIORS), default=list(POSTERIORS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    args = parser.parse_args()
    path = DATA / "posteriordb.json"
    if not path.exists():
        print(f"{path} is missing: set PYRO_BNN_DATA to the folder that holds it", file=sys.stderr)
        sys.exit(2)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    entries = json.loads(path.read_text())
    lines = args.out.read_text().splitlines() if args.out and args.out.exists() else []
    done = {(row["posterior"], row["method"]) for row in map(json.loads, lines)}
    for name in args.posteriors:
        for method in args.methods:
            if (name, method) in done:
                continue
            row = run(Case(name, entries[name]), method)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            if args.out:
                with args.out.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
