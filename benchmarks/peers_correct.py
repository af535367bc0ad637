# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Laplace approximations by each library: log evidence and variances against closed forms and dense matrices."""

from typing import Any

import torch
from peers_work import Rows
from torch import Tensor, nn

ALPHA, SIGMA = 2.0, 0.3


def linear_problem() -> tuple[Tensor, Tensor, Tensor, Tensor, float, Tensor]:
    """Data, the MAP, the log evidence, and the variances at new inputs, in closed form."""
    g = torch.Generator().manual_seed(0)
    X, new = (torch.randn(n, 5, generator=g, dtype=torch.float64) for n in (40, 15))
    y = X @ torch.randn(5, generator=g, dtype=torch.float64) + SIGMA * torch.randn(
        40, generator=g, dtype=torch.float64
    )
    covariance = torch.linalg.inv(X.T @ X / SIGMA**2 + ALPHA * torch.eye(5))
    prior = torch.distributions.MultivariateNormal(
        torch.zeros(40).double(), X @ X.T / ALPHA + SIGMA**2 * torch.eye(40)
    )
    variance = ((new @ covariance) * new).sum(-1)
    return X, y, covariance @ X.T @ y / SIGMA**2, new, float(prior.log_prob(y)), variance


def tanh_problem() -> tuple[Tensor, Tensor, nn.Sequential, Tensor, Tensor]:
    """Data, a network near its MAP, and the dense GGN variances at new inputs."""
    torch.manual_seed(0)
    x, new = torch.rand(30, 1).double() * 3 - 1.5, torch.linspace(-2, 2, 15).double().unsqueeze(-1)
    y = torch.sin(2 * x) + SIGMA * torch.randn(30, 1)
    net = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 1)).double()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (net(x) - y).square().sum() / (2 * SIGMA**2)
        value = value + 0.5 * ALPHA * sum(p.square().sum() for p in net.parameters())
        value.backward()
        return value

    optimizer.step(loss)

    def jacobian(inputs: Tensor) -> Tensor:
        rows = [
            torch.autograd.grad(out, list(net.parameters()), retain_graph=True)
            for out in net(inputs).squeeze(-1).unbind()
        ]
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])

    J = jacobian(x)
    J_new = jacobian(new)
    covariance = torch.linalg.inv(J.T @ J / SIGMA**2 + ALPHA * torch.eye(J.shape[1]))
    return x, y, net, new, ((J_new @ covariance) * J_new).sum(-1)


def correct_rows(library: str, evidence: float | None, linear: Tensor | None, network: Tensor | None) -> Rows:
    *_, expected, variance = linear_problem()
    rows: Rows = []
    if evidence is not None:
        rows.append({"work": "evidence", "library": library, "value": evidence, "expected": expected,
                     "error": abs(evidence - expected)})  # fmt: skip
    for name, found, exact in (
        ("linear", linear, variance),
        ("tanh network", network, tanh_problem()[-1] if network is not None else None),
    ):
        if found is not None and exact is not None:
            error = float((found.detach().double().reshape(-1) / exact - 1).abs().max())
            rows.append(
                {"work": "variance", "library": library, "problem": name, "largest_relative_error": error}
            )
    return rows


def ours_correct(small: bool) -> Rows:
    import pyro
    import pyro.distributions as dist

    from pyro_bnn.infer.autoguide import AutoLaplace
    from pyro_bnn.nn import bayesian_, init_to_trained

    def fitted(net: Any, x: Tensor, y: Tensor) -> AutoLaplace:
        net = bayesian_(net.double(), prior=dist.Normal(0.0, ALPHA**-0.5))

        def model(x: Tensor, y: Tensor | None = None) -> Any:
            f = net(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                return pyro.sample("obs", dist.Normal(f, SIGMA), obs=y)

        guide = AutoLaplace(model, init_loc_fn=init_to_trained).initialize(x, y)
        return guide.laplace_approximation((x, y), map_tolerance=float("inf"))

    torch.set_default_dtype(torch.float64)
    X, y, mode, new, _, _ = linear_problem()
    net = nn.Linear(5, 1, bias=False)
    net.weight.data.copy_(mode)
    linear = fitted(net, X, y)
    x, targets, tanh, points, _ = tanh_problem()
    network = fitted(tanh, x, targets.squeeze(-1))
    return correct_rows(
        "pyro_bnn", float(linear.log_evidence()), linear.linearized_outputs(new)["obs"].variance,
        network.linearized_outputs(points)["obs"].variance,
    )  # fmt: skip


def laplace_torch_correct(small: bool, backend: str) -> Rows:
    import laplace.curvature
    from laplace import Laplace
    from torch.utils.data import DataLoader, TensorDataset

    made = getattr(laplace.curvature, backend)

    def fitted(net: Any, x: Tensor, y: Tensor) -> Any:
        found = Laplace(
            net, "regression", subset_of_weights="all", hessian_structure="full", backend=made, sigma_noise=SIGMA,
            prior_precision=ALPHA,
        )  # fmt: skip
        found.fit(DataLoader(TensorDataset(x, y), batch_size=16))
        return found

    torch.set_default_dtype(torch.float64)
    X, y, mode, new, _, _ = linear_problem()
    net = nn.Sequential(nn.Linear(5, 1, bias=False)).double()
    net[0].weight.data.copy_(mode)
    linear = fitted(net, X, y.unsqueeze(-1))
    x, targets, tanh, points, _ = tanh_problem()
    network = fitted(tanh, x, targets)
    return correct_rows(
        f"laplace-torch, {backend}", float(linear.log_marginal_likelihood()),
        linear._glm_predictive_distribution(new)[1], network._glm_predictive_distribution(points)[1],
    )  # fmt: skip


def pyro_correct(small: bool) -> Rows:
    import pyro
    import pyro.distributions as dist
    from pyro.infer import Trace_ELBO
    from pyro.infer.autoguide import AutoLaplaceApproximation

    torch.set_default_dtype(torch.float64)
    X, y, mode, new, _, _ = linear_problem()

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        w = pyro.sample("w", dist.Normal(torch.zeros(5), ALPHA**-0.5).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ w, SIGMA), obs=y)

    guide = AutoLaplaceApproximation(model, init_loc_fn=lambda site: mode.clone())
    guide(X, y)
    gaussian = guide.laplace_approximation(X, y)
    covariance = gaussian.get_posterior().covariance_matrix
    # the ELBO of an exact posterior is the evidence, whatever is drawn
    evidence = -Trace_ELBO().loss(model, gaussian, X, y)
    return correct_rows("Pyro AutoLaplaceApproximation", evidence, ((new @ covariance) * new).sum(-1), None)
