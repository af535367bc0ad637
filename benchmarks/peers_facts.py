# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
What the documentation says of laplace-torch, found by running it: one row per fact, with what is found and what would be right.

Needs laplace-torch (extra ``peers``); see ``peers.py`` for its installation beside a CPU build of torch.

    python benchmarks/peers_facts.py --out benchmarks/results/peers_facts.json
"""

import argparse
import importlib.metadata
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Row = dict[str, Any]


class Twice(nn.Module):
    """A network that uses a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (N, 2)."""
        return self.last(self.shared(self.shared(self.first(x).tanh()).tanh()).tanh())


def classes(n: int = 60, outputs: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=g)
    return x, (x[:, 0] > 0).long() + (outputs > 2) * (x[:, 1] > 0).long()


def regression(n: int = 60) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=g)
    return x, torch.sin(x[:, :1]) + 0.3 * torch.randn(n, 1, generator=g)


def trained(
    net: nn.Module, data: tuple[Tensor, Tensor], loss: Callable[..., Tensor], steps: int = 200
) -> nn.Module:
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net(data[0]), data[1]).backward()
        optimizer.step()
    return net


def classifier(outputs: int = 2) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs))
    return trained(net, classes(outputs=outputs), nn.functional.cross_entropy)


def regressor() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    return trained(net, regression(), nn.functional.mse_loss)


def laplace(net: nn.Module, kind: str, data: tuple[Tensor, Tensor], structure: str, **options: Any) -> Any:
    from laplace import Laplace

    options = {"subset_of_weights": "all"} | options
    found = Laplace(net, kind, hessian_structure=structure, **options)
    found.fit(DataLoader(TensorDataset(*data), batch_size=20))
    return found


def jacobian(net: nn.Module, x: Tensor) -> Tensor:
    """Shape (N, C, p)."""
    parameters = list(net.parameters())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(out, parameters, retain_graph=True)])
        for out in net(x).flatten()
    ]
    return torch.stack(rows).unflatten(0, (len(x), -1))


def layer_used_twice() -> Row:
    """Traces of the Kronecker factors of a layer used twice over those of the GGN."""
    torch.manual_seed(0)
    data = classes()
    net = trained(Twice(), data, nn.functional.cross_entropy, 20)
    found = laplace(net, "classification", data, "kron")
    J = jacobian(net, data[0])
    p = net(data[0]).softmax(-1)
    H = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    ggn = torch.einsum("ncp,nck,nkp->p", J, H, J)
    start = sum(q.numel() for q in net.first.parameters())
    exact = float(ggn[start : start + 72].sum())
    factors = found.H_facs.kfacs if hasattr(found, "H_facs") else found.H.kfacs
    names = [name for name, _ in net.named_parameters()]
    mine = [k for name, k in zip(names, factors, strict=True) if name.startswith("shared")]
    trace = sum(float(torch.stack([f.trace() for f in k]).prod()) for k in mine)
    return {"found": trace / exact, "right": 1.0}


def empirical_fisher() -> Row:
    """The trace of the empirical Fisher of a regression at sigma = 0.3 over that of the sum of outer products."""
    from laplace.curvature import CurvlinopsEF

    data, sigma = regression(), 0.3
    net = regressor()
    found = laplace(net, "regression", data, "full", backend=CurvlinopsEF, sigma_noise=sigma)
    J = jacobian(net, data[0])[:, 0]
    rows = J * ((net(data[0]) - data[1]) / sigma**2).detach()
    trace = float(found.H.trace()) * float(found._H_factor)
    return {"found": trace / float(rows.square().sum()), "right": 1.0, "2 sigma^2": 2 * sigma**2}


def grid_search() -> Row:
    """The prior precision that the grid search returns, and that of the smallest validation NLL."""
    x, y = classes(200)
    y = torch.where(torch.rand(200, generator=torch.Generator().manual_seed(1)) < 0.2, 1 - y, y)
    train, held = (x[:60], y[:60]), (x[60:], y[60:])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    trained(net, train, nn.functional.cross_entropy)
    found = laplace(net, "classification", train, "full")
    loader = DataLoader(TensorDataset(*held), batch_size=140)
    grid = torch.logspace(-4, 4, 21)
    scores = []
    for value in grid:
        found.prior_precision = value
        scores.append(float(nn.functional.nll_loss(found(held[0], link_approx="probit").log(), held[1])))
    found.optimize_prior_precision(
        pred_type="glm", method="gridsearch", val_loader=loader, link_approx="probit", grid_size=21,
        log_prior_prec_min=-4, log_prior_prec_max=4,
    )  # fmt: skip
    chosen = float(found.prior_precision)
    return {
        "found": chosen,
        "right": float(grid[min(range(21), key=scores.__getitem__)]),
        "nll_found": scores[int((grid.log() - torch.tensor(chosen).log()).abs().argmin())],
        "nll_right": min(scores),
    }


def functional_samples() -> Row:
    """The correlation of function draws at two inputs."""
    found = laplace(regressor(), "regression", regression(), "full", sigma_noise=0.3)
    x = torch.tensor([[2.0, -1.0, 1.0], [-2.0, 1.0, -1.0]])
    J = jacobian(found.model, x)[:, 0]
    covariance = J @ found.posterior_covariance @ J.T
    torch.manual_seed(0)
    draws = found.functional_samples(x, n_samples=4000).squeeze(-1)
    exact = covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt()
    return {"found": float(torch.corrcoef(draws.T)[0, 1]), "right": float(exact)}


def generator() -> Row:
    """Whether two calls with generators of one seed are equal."""
    found = laplace(classifier(), "classification", classes(), "full")
    x = classes()[0][:3]
    first, second = (
        found(x, pred_type="nn", link_approx="mc", n_samples=5, generator=torch.Generator().manual_seed(0))
        for _ in range(2)
    )
    return {"found": bool(torch.equal(first, second)), "right": True}


def probit() -> Row:
    """
    The largest change of the probit probabilities when a random constant of variance 100 is added to all logits, which no
    softmax sees.
    """
    found = laplace(classifier(3), "classification", classes(outputs=3), "full")
    x = classes()[0][:10]
    before = found(x, link_approx="probit")
    own = found._glm_predictive_distribution
    found._glm_predictive_distribution = lambda *a, **k: (lambda f, v: (f, v + 100))(*own(*a, **k))
    return {"found": float((found(x, link_approx="probit") - before).abs().max()), "right": 0.0}


def ends_interpreter() -> Row:
    """Whether fitting Kronecker factors of a bfloat16 network calls ``exit``."""
    x, y = classes()
    try:
        laplace(classifier().bfloat16(), "classification", (x.bfloat16(), y), "kron")
    except SystemExit:
        return {"found": "exit", "right": "a fit or an exception"}
    return {"found": "a fit", "right": "a fit or an exception"}


def inference_mode() -> Row:
    """Whether a fit in inference mode works."""
    try:
        with torch.inference_mode():
            laplace(classifier(), "classification", classes(), "full")
    except RuntimeError as error:
        return {"found": str(error).partition("\n")[0][:120], "right": "a fit"}
    return {"found": "a fit", "right": "a fit"}


def leftovers() -> Row:
    """What a fit leaves in the user's model."""
    net = classifier().train()
    before = set(vars(net))
    laplace(net, "classification", classes(), "full")
    return {
        "found": [f"training={net.training}", *sorted(set(vars(net)) - before)],
        "right": ["training=True"],
    }


def checkpoint() -> Row:
    """The shape of the data in the state of a last-layer approximation."""
    found = laplace(classifier(), "classification", classes(), "kron", subset_of_weights="last_layer")
    data = found.state_dict().get("data")
    return {
        "found": list(data[0].shape if isinstance(data, (tuple, list)) else getattr(data, "shape", [])),
        "right": [],
    }


FACTS: dict[str, Callable[[], Row]] = {
    f.__name__: f
    for f in (layer_used_twice, empirical_fisher, grid_search, functional_samples, generator, probit, ends_interpreter,
              inference_mode, leftovers, checkpoint)
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="the first fact alone")
    parser.add_argument("--out", type=Path, help="JSON file of rows")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        version = importlib.metadata.version("laplace-torch")
    except importlib.metadata.PackageNotFoundError:
        print("laplace-torch is not installed (pip install 'pyro-bnn[peers]')", file=sys.stderr)
        return
    rows = []
    for name, fact in list(FACTS.items())[: 1 if options.smoke else None]:
        try:
            row = fact()
        except Exception as error:  # a fact of another version of the library; the other facts go on
            row = {"failed": f"{type(error).__name__}: {error}"}
        rows.append({"fact": name, "what": " ".join((fact.__doc__ or "").split()), **row,
                     "laplace-torch": version, "torch": torch.__version__, "threads": 1, "seed": 0})  # fmt: skip
        print(
            {
                k: v
                for k, v in rows[-1].items()
                if k not in ("what", "laplace-torch", "torch", "threads", "seed")
            },
            flush=True,
        )
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
