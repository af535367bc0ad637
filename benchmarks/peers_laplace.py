# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Laplace approximations by each library: what fitting and predicting cost."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peers_work import Rows, mean_field_problem, mebibytes, median_ratio, mlp, pyro_model
from torch import Tensor, nn

LAPLACE = {
    "Kronecker": ("kronecker", None, "all", "kron"),
    "diagonal": ("diagonal", None, "all", "diag"),
    "last layer, full": ("full", "last_layer", "last_layer", "full"),
}


def laplace_problem(small: bool) -> tuple[nn.Sequential, Tensor, Tensor, Tensor, Callable[[], None]]:
    net, _, _ = mean_field_problem()
    n = 128 if small else 1000
    x, y, new = torch.randn(n, 784), torch.randint(0, 10, (n,)), torch.randn(100 if small else 500, 784)
    base = mlp()

    def epoch() -> None:
        for part in zip(x.split(128), y.split(128), strict=True):
            base.zero_grad()
            F.cross_entropy(base(part[0]), part[1]).backward()

    return net, x, y, new, epoch


def laplace_rows(
    library: str, structure: str, fit: Callable[[], Any], predict: Callable[[], Any], small: bool
) -> Rows:
    *_, epoch = laplace_problem(small)
    repeat = 1 if small else 3
    before = mebibytes()
    row: dict[str, Any] = {"work": "laplace", "library": library, "structure": structure}
    row["fit"] = median_ratio(fit, epoch, repeat)
    row["predict"] = median_ratio(predict, epoch, repeat)
    return [{**row, "peak_mib": mebibytes() - before}]


def ours_laplace(small: bool, structure: str) -> Rows:
    import pyro.distributions as dist

    from pyro_bnn.infer.autoguide import AutoLaplace
    from pyro_bnn.nn import bayesian_, init_to_trained

    net, x, y, new, _ = laplace_problem(small)
    kind, sites, _, _ = LAPLACE[structure]
    model = pyro_model(bayesian_(net, prior=dist.Normal(0.0, 1.0)), len(x))
    options: Any = {"structure": kind, "sites": sites}
    guide = AutoLaplace(model, init_loc_fn=init_to_trained, **options).initialize(x[:4], y[:4])
    batches = list(zip(x.split(128), y.split(128), strict=True))
    return laplace_rows(
        "pyro_bnn", structure, lambda: guide.laplace_approximation(batches, map_tolerance=float("inf")),
        lambda: [guide.linearized_outputs(part) for part in new.split(250)], small,
    )  # fmt: skip


def laplace_torch_laplace(small: bool, structure: str, backend: str) -> Rows:
    import laplace.curvature
    from laplace import Laplace
    from torch.utils.data import DataLoader, TensorDataset

    net, x, y, new, _ = laplace_problem(small)
    _, _, subset, kind = LAPLACE[structure]
    loader = DataLoader(TensorDataset(x, y), batch_size=128)
    fitted: list[Any] = []

    def fit() -> None:
        made = getattr(laplace.curvature, backend)
        fitted[:] = [
            Laplace(net, "classification", subset_of_weights=subset, hessian_structure=kind, backend=made)
        ]
        fitted[0].fit(loader)

    def predict() -> None:
        for part in new.split(50):
            fitted[0]._glm_predictive_distribution(part)

    return laplace_rows(f"laplace-torch, {backend}", structure, fit, predict, small)
