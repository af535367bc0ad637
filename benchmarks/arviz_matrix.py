# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Which ArviZ functions run on which posterior, in both generations of ArviZ.

    python benchmarks/arviz_matrix.py --write DIR             # with pyro_bnn: one netCDF file per posterior
    python benchmarks/arviz_matrix.py --check DIR --out FILE  # with any ArviZ, torch is not needed
    python benchmarks/arviz_matrix.py --table FILE [FILE]     # the table of the documentation

The second command runs every function of the installed generation on every file and writes what it found. It fails if a
posterior is missing, and if a function does something else than ``WHY_NOT`` says.
"""

import argparse
import importlib.metadata
import json
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xarray as xr

POSTERIORS = (
    "rank-1 mixture",
    "mixture of Gaussians",
    "deep ensemble",
    "Laplace",
    "Hessian-free Laplace",
    "AutoNormal (SVI)",
    "AutoDiagonalNormal (SVI)",
    "guide function (SVI)",
    "independent fits",
    "MCMC",
    "nuts",
    "subsampled plate",
    "two observed sites",
    "classification",
)

SMOOTHING = {
    "plot_psense_dist",
    "plot_psense_quantities",
    "loo",
    "compare",
    "loo_pit",
    "psense_summary",
    "plot_loo_pit",
    "plot_khat",
    "plot_compare",
}

#: Cells that cannot be "ok": functions of ArviZ 1.x, posteriors, and the reason.
WHY_NOT: list[tuple[set[str], set[str], str]] = [
    (
        {"plot_rank"},
        {
            "Laplace",
            "Hessian-free Laplace",
            "AutoNormal (SVI)",
            "AutoDiagonalNormal (SVI)",
            "guide function (SVI)",
            "MCMC",
            "subsampled plate",
            "two observed sites",
            "classification",
        },
        "ArviZ compares ranks between chains, and this posterior is one chain",
    ),
    (
        {"loo_approximate_posterior"},
        {"rank-1 mixture", "deep ensemble", "Hessian-free Laplace"},
        "point masses and singular Gaussians have no density",
    ),
    (
        {"loo_approximate_posterior"},
        {"MCMC", "nuts"},
        "the draws are of the posterior itself, not of an approximation with a density",
    ),
    (
        SMOOTHING,
        {"deep ensemble"},
        "importance ratios of four point masses have no tail to smooth",
    ),
]


def why_not(function: str, posterior: str, old: bool) -> str | None:
    """Why a function cannot run on a posterior; ``None`` if it can."""
    if old:
        return None
    reasons = [text for functions, names, text in WHY_NOT if function in functions and posterior in names]
    return reasons[0] if reasons else None


def versions() -> dict[str, str]:
    """The versions of Python and of every package that has a say."""
    found = {"python": platform.python_version()}
    names = ("torch", "pyro-ppl", "arviz", "arviz-base", "arviz-stats", "arviz-plots", "xarray", "matplotlib")
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def arviz_generation() -> int:
    return int(importlib.metadata.version("arviz").partition(".")[0])


def posteriors() -> dict[str, Any]:
    """One exported tree per posterior that the project makes, on small models."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
    from pyro.nn import PyroModule, PyroSample

    from pyro_bnn.diagnostics import to_datatree
    from pyro_bnn.infer import Mixture_ELBO, fit, nuts
    from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoMixture
    from pyro_bnn.nn import bayesian_, rank1_

    pyro.set_rng_seed(0)
    x = torch.linspace(-1, 1, 20)[:, None]
    y = torch.sin(3 * x[:, 0]) + 0.1 * torch.randn(20)

    class Model(PyroModule):
        def __init__(self, convert: Callable[[Any], Any], full_size: int | None = None) -> None:
            super().__init__()
            layers = [torch.nn.Linear(1, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)]
            self.net = convert(torch.nn.Sequential(*layers))
            self.sigma = PyroSample(dist.LogNormal(torch.tensor(-1.0), torch.tensor(0.5)))
            self.full_size = full_size

        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            mean, sigma = self.net(x).squeeze(-1), self.sigma
            size = len(x) if self.full_size is None else self.full_size
            with pyro.plate("data", size, subsample_size=len(x)):
                return pyro.sample("obs", dist.Normal(mean, sigma), obs=y)

    class TwoSites(Model):
        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None, count: Any = None) -> Any:
            mean, sigma = self.net(x).squeeze(-1), self.sigma
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
                pyro.sample("count", dist.Poisson(mean.exp()), obs=count)

    class Classes(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            layers = [torch.nn.Linear(1, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)]
            self.net = bayesian_(torch.nn.Sequential(*layers))
            self.sigma = PyroSample(dist.LogNormal(torch.tensor(0.0), torch.tensor(0.3)))

        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            logits = self.net(x) / self.sigma[..., None]
            with pyro.plate("data", len(x)):
                return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    def line(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(slope * x.squeeze(-1), sigma), obs=y)

    def line_guide(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        positive = dist.constraints.positive
        for name, family in (("slope", dist.Normal), ("sigma", dist.LogNormal)):
            loc = pyro.param(f"{name}_loc", torch.tensor(0.0))
            pyro.sample(name, family(loc, pyro.param(f"{name}_scale", torch.tensor(0.1), positive)))

    def fitted(model: Any, guide: Any, elbo: Any = None, data: Any = (x, y)) -> Any:
        fit(model, guide, data, num_steps=600, optim=0.02, elbo=elbo, progress_bar=False)
        return guide

    trees = {}

    def export(name: str, model: Any, posterior: Any, data: Any = (x, y)) -> None:
        trees[name] = to_datatree(
            model, posterior, data, num_samples=400, prior_samples=50, weights=True, attrs=versions()
        )

    model = Model(rank1_)
    export("rank-1 mixture", model, fitted(model, AutoMixture(model, 4), Mixture_ELBO()))
    model = Model(bayesian_)
    export("mixture of Gaussians", model, fitted(model, AutoMixture(model, 4), Mixture_ELBO()))
    export("deep ensemble", model, fitted(model, AutoMixture(model, 4, component="delta"), Mixture_ELBO()))
    laplace = fitted(model, AutoLaplace(model)).polish((x, y))
    export("Laplace", model, laplace.laplace_approximation((x, y)))
    hfl = fitted(model, AutoHessianFreeLaplace(model)).polish((x, y))
    hfl.laplace_approximation((x, y), (x,))
    export("Hessian-free Laplace", model, hfl)
    export("AutoNormal (SVI)", model, fitted(model, AutoNormal(model)))
    export("AutoDiagonalNormal (SVI)", model, fitted(model, AutoDiagonalNormal(model)))
    svi = SVI(line, line_guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(600):
        svi.step(x, y)
    export("guide function (SVI)", line, line_guide)
    export("independent fits", model, [fitted(model, AutoNormal(model)) for _ in range(3)])
    kernel = NUTS(model, max_tree_depth=4)
    mcmc = MCMC(kernel, num_samples=60, warmup_steps=30, disable_progbar=True)
    mcmc.run(x, y)
    export("MCMC", model, mcmc)
    run = nuts(
        model,
        (x, y),
        guide=laplace,
        num_samples=60,
        warmup_steps=30,
        num_chains=2,
        progress_bar=False,
        max_tree_depth=4,
    )
    export("nuts", model, run)
    model, batches = Model(bayesian_, 20), [(x[:12], y[:12]), (x[12:], y[12:])]
    export("subsampled plate", model, fitted(model, AutoNormal(model), data=batches), batches)
    two, both = TwoSites(bayesian_), (x, y, torch.poisson(y.exp()))
    export("two observed sites", two, fitted(two, AutoNormal(two), data=both), both)
    classes, labelled = Classes(), (x, (y > 0).long() + (x[:, 0] > 0.5))
    export("classification", classes, fitted(classes, AutoNormal(classes), data=labelled), labelled)
    return trees


ONE = {"var_names": ["sigma"]}


def pair(data: Any) -> dict[str, Any]:
    """Two variables, with few elements."""
    sizes = {str(name): variable.size for name, variable in data["posterior"].data_vars.items()}
    return {"var_names": ["sigma", min((name for name in sizes if name != "sigma"), key=lambda n: sizes[n])]}


def old_checks() -> dict[str, Callable[[Any], Any]]:
    """Functions of ArviZ 0.x, on ``InferenceData``."""
    import arviz as az

    obs = {"var_name": "obs"}
    return {
        "summary": lambda d: az.summary(d, **ONE),
        "ess": az.ess,
        "rhat": az.rhat,
        "hdi": az.hdi,
        "loo": lambda d: az.loo(d, pointwise=True, **obs),
        "waic": lambda d: az.waic(d, **obs),
        "compare": lambda d: az.compare({"a": d, "b": d}, **obs),
        "loo_pit": lambda d: az.loo_pit(d, y="obs"),
        "plot_trace": lambda d: az.plot_trace(d, **ONE),
        "plot_posterior": lambda d: az.plot_posterior(d, **ONE),
        "plot_forest": lambda d: az.plot_forest(d, **ONE),
        "plot_pair": lambda d: az.plot_pair(d, **pair(d)),
        "plot_rank": lambda d: az.plot_rank(d, **ONE),
        "plot_ess": lambda d: az.plot_ess(d, **ONE),
        "plot_autocorr": lambda d: az.plot_autocorr(d, **ONE),
        "plot_ppc": az.plot_ppc,
        "plot_loo_pit": lambda d: az.plot_loo_pit(d, y="obs"),
        "plot_khat": lambda d: az.plot_khat(az.loo(d, pointwise=True, **obs)),
        "plot_compare": lambda d: az.plot_compare(az.compare({"a": d, "b": d}, **obs)),
    }


def new_checks(plots: bool = True) -> dict[str, Callable[[Any], Any]]:
    """Functions of ArviZ 1.x (or of arviz-stats alone), on ``DataTree``."""
    import arviz_stats as stats

    obs = {"var_name": "obs"}

    def approximate(tree: xr.DataTree) -> Any:
        sample = tree["sample_stats"]
        log_p = sample["lp"].stack(__sample__=("chain", "draw")).values
        log_q = sample["log_q"].stack(__sample__=("chain", "draw")).values
        return stats.loo_approximate_posterior(tree, log_p=log_p, log_q=log_q, **obs)

    checks: dict[str, Callable[[Any], Any]] = {
        "summary": lambda d: stats.summary(d, **ONE),
        "ess": lambda d: stats.ess(d, **ONE),
        "rhat": lambda d: stats.rhat(d, **ONE),
        "hdi": lambda d: stats.hdi(d, **ONE),
        "loo": lambda d: stats.loo(d, pointwise=True, **obs),
        "compare": lambda d: stats.compare({"a": d, "b": d}, **obs),
        "loo_pit": lambda d: stats.loo_pit(d, var_names="obs"),
        "loo_approximate_posterior": approximate,
        "psense_summary": lambda d: stats.psense_summary(d, **ONE),
    }
    if plots:
        import arviz_plots as az_plots

        checks |= {
            "plot_trace": lambda d: az_plots.plot_trace(d, **ONE),
            "plot_trace_dist": lambda d: az_plots.plot_trace_dist(d, **ONE),
            "plot_dist": lambda d: az_plots.plot_dist(d, **ONE),
            "plot_forest": lambda d: az_plots.plot_forest(d, **ONE),
            "plot_pair": lambda d: az_plots.plot_pair(d, **pair(d)),
            "plot_rank": lambda d: az_plots.plot_rank(d, **ONE),
            "plot_ess": lambda d: az_plots.plot_ess(d, **ONE),
            "plot_autocorr": lambda d: az_plots.plot_autocorr(d, **ONE),
            "plot_ppc_dist": az_plots.plot_ppc_dist,
            "plot_ppc_pit": az_plots.plot_ppc_pit,
            "plot_ppc_interval": az_plots.plot_ppc_interval,
            "plot_loo_pit": lambda d: az_plots.plot_loo_pit(d, var_names="obs"),
            "plot_khat": lambda d: az_plots.plot_khat(stats.loo(d, pointwise=True, **obs)),
            "plot_compare": lambda d: az_plots.plot_compare(stats.compare({"a": d, "b": d}, **obs)),
            "plot_prior_posterior": lambda d: az_plots.plot_prior_posterior(d, **ONE),
            "plot_psense_dist": lambda d: az_plots.plot_psense_dist(d, **ONE),
            "plot_psense_quantities": lambda d: az_plots.plot_psense_quantities(d, **ONE),
        }
    return checks


def attempt(check: Callable[[Any], Any], data: Any) -> str:
    """``"ok"``, or the first line of what went wrong."""
    from matplotlib import pyplot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check(data)
        except Exception as error:
            return f"{type(error).__name__}: {error}".partition("\n")[0][:160]
        finally:
            pyplot.close("all")
    return "ok"


def check_folder(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """A row per posterior, and everything that is not as it should be."""
    old = arviz_generation() == 0
    checks = old_checks() if old else new_checks()
    missing = [name for name in POSTERIORS if not (folder / f"{name}.nc").exists()]
    wrong = [f"{folder} lacks the posterior {name!r}" for name in missing]
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.nc")):
        if old:
            import arviz

            data: Any = arviz.from_netcdf(path)
        else:
            data = xr.open_datatree(path)
        written = {name: str(data.attrs[name]) for name in versions() if name in data.attrs}
        found = {name: attempt(check, data) for name, check in checks.items()}
        rows.append({"posterior": path.stem, "written": written, "checked": versions(), "cells": found})
        for name, text in found.items():
            reason = why_not(name, path.stem, old)
            if (text == "ok") == (reason is not None):
                wrong.append(f"{path.stem}, {name}: {text}; expected: {reason or 'ok'}")
        print(f"{path.stem}: {sum(text == 'ok' for text in found.values())} of {len(found)} ok")
    return rows, wrong


def table(files: list[Path]) -> str:
    """The matrices of the documentation, functions by posteriors, as list tables."""
    lines: list[str] = []
    for path in files:
        rows = {row["posterior"]: row for row in json.loads(path.read_text())}
        first = rows[POSTERIORS[0]]
        used = ", ".join(f"{k} {v}" for k, v in first["checked"].items())
        old = first["checked"]["arviz"].startswith("0")
        reasons: list[str] = []
        lines += [f".. list-table:: ArviZ {first['checked']['arviz']} ({used})", "   :header-rows: 1", ""]
        head = ["function", *map(str, range(1, len(POSTERIORS) + 1))]
        body = []
        for function in first["cells"]:
            marks = []
            for name in POSTERIORS:
                if rows[name]["cells"][function] == "ok":
                    marks.append("✓")
                    continue
                reason = why_not(function, name, old) or rows[name]["cells"][function]
                if reason not in reasons:
                    reasons.append(reason)
                marks.append("abcdefgh"[reasons.index(reason)])
            body.append([f"``{function}``", *marks])
        for row in [head, *body]:
            lines += [f"   {'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(row)]
        lines.append("")
        lines += [f"| {'abcdefgh'[i]}: {reason}." for i, reason in enumerate(reasons)] + [""]
    names = ", ".join(f"{i} {name}" for i, name in enumerate(POSTERIORS, 1))
    return "\n".join([f"Posteriors: {names}.", "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path)
    parser.add_argument("--check", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, nargs="+")
    options = parser.parse_args()
    if options.table:
        print(table(options.table), end="")
        return
    import matplotlib

    matplotlib.use("Agg")
    if options.write:
        options.write.mkdir(parents=True, exist_ok=True)
        trees = posteriors()
        assert set(trees) == set(POSTERIORS)
        for name, tree in trees.items():
            tree.to_netcdf(options.write / f"{name}.nc")
    if options.check:
        rows, wrong = check_folder(options.check)
        if options.out and rows:
            options.out.write_text(json.dumps(rows, indent=1) + "\n")
        if wrong:
            sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
