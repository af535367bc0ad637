# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Which ArviZ functions run on which posterior, in both generations of ArviZ.

    python benchmarks/arviz_matrix.py --write DIR             # with pyro_bnn: one netCDF file per posterior
    python benchmarks/arviz_matrix.py --check DIR --out FILE  # with any ArviZ, torch is not needed

The second command runs every function of the installed generation on every file and writes what it found.
"""

import argparse
import importlib.metadata
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xarray as xr


def arviz_generation() -> int:
    return int(importlib.metadata.version("arviz").partition(".")[0])


def posteriors() -> dict[str, Any]:
    """One exported tree per posterior that the project makes, on a small regression network."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import MCMC, NUTS
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
        def __init__(self, convert: Callable[[Any], Any]) -> None:
            super().__init__()
            layers = [torch.nn.Linear(1, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)]
            self.net = convert(torch.nn.Sequential(*layers))
            self.sigma = PyroSample(dist.LogNormal(torch.tensor(-1.0), torch.tensor(0.5)))

        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            mean, sigma = self.net(x).squeeze(-1), self.sigma
            with pyro.plate("data", len(x)):
                return pyro.sample("obs", dist.Normal(mean, sigma), obs=y)

    def fitted(model: Any, guide: Any, elbo: Any = None) -> Any:
        fit(model, guide, (x, y), num_steps=600, optim=0.02, elbo=elbo, progress_bar=False)
        return guide

    trees = {}

    def export(name: str, model: Any, posterior: Any, **kwargs: Any) -> None:
        trees[name] = to_datatree(
            model, posterior, (x, y), num_samples=400, prior_samples=50, weights=True, **kwargs
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
    return trees


def old_checks() -> dict[str, Callable[[Any], Any]]:
    """Functions of ArviZ 0.x, on ``InferenceData``."""
    import arviz as az

    one = {"var_names": ["sigma"]}
    return {
        "summary": lambda d: az.summary(d, **one),
        "ess": az.ess,
        "rhat": az.rhat,
        "loo": lambda d: az.loo(d, pointwise=True),
        "waic": az.waic,
        "compare": lambda d: az.compare({"a": d, "b": d}),
        "loo_pit": lambda d: az.loo_pit(d, y="obs"),
        "plot_trace": lambda d: az.plot_trace(d, **one),
        "plot_posterior": lambda d: az.plot_posterior(d, **one),
        "plot_forest": lambda d: az.plot_forest(d, **one),
        "plot_pair": lambda d: az.plot_pair(d, var_names=["sigma", next(iter(d.posterior))]),
        "plot_rank": lambda d: az.plot_rank(d, **one),
        "plot_ppc": az.plot_ppc,
        "plot_loo_pit": lambda d: az.plot_loo_pit(d, y="obs"),
        "plot_khat": lambda d: az.plot_khat(az.loo(d, pointwise=True)),
        "plot_compare": lambda d: az.plot_compare(az.compare({"a": d, "b": d})),
    }


def new_checks(plots: bool = True) -> dict[str, Callable[[Any], Any]]:
    """Functions of ArviZ 1.x (or of arviz-stats alone), on ``DataTree``."""
    import arviz_stats as stats

    one = {"var_names": ["sigma"]}

    def approximate(tree: xr.DataTree) -> Any:
        sample = tree["sample_stats"]
        log_p = sample["lp"].stack(__sample__=("chain", "draw")).values
        log_q = sample["log_q"].stack(__sample__=("chain", "draw")).values
        return stats.loo_approximate_posterior(tree, log_p=log_p, log_q=log_q)

    checks: dict[str, Callable[[Any], Any]] = {
        "summary": lambda d: stats.summary(d, **one),
        "ess": lambda d: stats.ess(d, **one),
        "rhat": lambda d: stats.rhat(d, **one),
        "loo": lambda d: stats.loo(d, pointwise=True),
        "compare": lambda d: stats.compare({"a": d, "b": d}),
        "loo_pit": stats.loo_pit,
        "loo_approximate_posterior": approximate,
        "psense_summary": lambda d: stats.psense_summary(d, **one),
    }
    if plots:
        import arviz_plots as az_plots

        checks |= {
            "plot_trace": lambda d: az_plots.plot_trace(d, **one),
            "plot_trace_dist": lambda d: az_plots.plot_trace_dist(d, **one),
            "plot_dist": lambda d: az_plots.plot_dist(d, **one),
            "plot_forest": lambda d: az_plots.plot_forest(d, **one),
            "plot_pair": lambda d: az_plots.plot_pair(
                d, var_names=["sigma", next(iter(d["posterior"].data_vars))]
            ),
            "plot_rank": lambda d: az_plots.plot_rank(d, **one),
            "plot_ppc_dist": az_plots.plot_ppc_dist,
            "plot_ppc_pit": az_plots.plot_ppc_pit,
            "plot_ppc_interval": az_plots.plot_ppc_interval,
            "plot_loo_pit": az_plots.plot_loo_pit,
            "plot_khat": lambda d: az_plots.plot_khat(stats.loo(d, pointwise=True)),
            "plot_compare": lambda d: az_plots.plot_compare(stats.compare({"a": d, "b": d})),
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path)
    parser.add_argument("--check", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    if options.write:
        options.write.mkdir(parents=True, exist_ok=True)
        for name, tree in posteriors().items():
            tree.to_netcdf(options.write / f"{name}.nc")
    if options.check:
        rows = []
        old = arviz_generation() == 0
        checks = old_checks() if old else new_checks()
        for path in sorted(options.check.glob("*.nc")):
            if old:
                import arviz

                data: Any = arviz.from_netcdf(path)
            else:
                data = xr.open_datatree(path)
            found = {name: attempt(check, data) for name, check in checks.items()}
            rows.append({"arviz": importlib.metadata.version("arviz"), "posterior": path.stem, **found})
            failed = {name: text for name, text in found.items() if text != "ok"}
            print(f"{path.stem}: {len(found) - len(failed)} of {len(found)} ok {failed or ''}")
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
