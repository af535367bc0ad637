# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
The same work by pyro_bnn and by other libraries: is the number right, and what does it cost?

Correctness, in float64 where the library allows it:

* ``kl``: the divergence of a mean-field posterior from its prior, against the analytic sum over all weights;
* ``evidence``: the log evidence of a linear regression, against the closed form;
* ``variance``: predictive variances of a linear regression and of a tanh network, against dense matrices.

Cost, on a multilayer perceptron 784-100-100-10 with random data:

* ``step``: a step of mean-field variational inference with 128 examples, in steps of the plain network;
* ``predict``: the mean probabilities of 500 examples over 20 draws of that posterior, in 20 passes of the plain network;
* ``laplace``: fitting a Laplace approximation to 1,000 examples and predicting 500, in epochs of the plain network.

Every job is a process of its own, so that memory (peak above that after imports) is its own, and a library that does
not import is left out by name. laplace-torch imports torchvision through torchmetrics and fails beside PyPI's
torchvision where torch is a CPU build: uninstall torchvision there. torch-uncertainty needs lightning and
torchvision for its trainer; its layers are loaded without them. TyXe is not on PyPI: its last sources run from
``PYTHONPATH``, with the function of Pyro that they miss put back.

    pip install -e '.[peers]' && pip install --no-deps torch-uncertainty && pip uninstall torchvision
    python benchmarks/peers.py --out benchmarks/results/peers.json
    python benchmarks/peers.py --smoke
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import resource
import statistics
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BACKENDS = ("CurvlinopsGGN", "BackPackGGN", "AsdlGGN")
LAPLACE = {
    "Kronecker": ("kronecker", None, "all", "kron"),
    "diagonal": ("diagonal", None, "all", "diag"),
    "last layer, full": ("full", "last_layer", "last_layer", "full"),
}
SCALE, ALPHA, SIGMA = 0.05, 2.0, 0.3
NEW = torch.randn(500, 784, generator=torch.Generator().manual_seed(1))
Rows = list[dict[str, Any]]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))


def median_ratio(work: Callable[[], Any], unit: Callable[[], Any], repeat: int) -> dict[str, float]:
    """The work in units that are measured right before it, and the unit in milliseconds."""
    unit(), work()
    ratios, units = [], []
    for _ in range(repeat):
        start = time.perf_counter()
        unit()
        middle = time.perf_counter()
        work()
        units.append(middle - start)
        ratios.append((time.perf_counter() - middle) / units[-1])
    return {
        "median": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios),
        "unit_ms": 1e3 * statistics.median(units),
    }  # fmt: skip


def mebibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---------------------------------------------------------------------- mean-field variational inference


def mean_field_problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    net = mlp()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0.0, 0.1)
    return net, torch.randn(128, 784), torch.randint(0, 10, (128,))


def analytic_kl(net: nn.Module) -> float:
    """KL(N(m, SCALE) || N(0, 1)), summed over all weights."""
    parts = [p.detach().double() for p in net.parameters()]
    return sum(float((0.5 * (SCALE**2 + p.square() - 1) - math.log(SCALE)).sum()) for p in parts)


def plain_step(net: nn.Module, x: Tensor, y: Tensor, count: int) -> Callable[[], None]:
    net = mlp()
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, fused=True)

    def steps() -> None:
        for _ in range(count):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()

    return steps


def plain_passes(count: int) -> Callable[[], None]:
    net = mlp()

    def passes() -> None:
        with torch.no_grad():
            for _ in range(count):
                net(NEW)

    return passes


@torch.no_grad()
def mean_probability(net: Callable[[Tensor], Tensor], draws: int) -> Tensor:
    """Of a network that draws its weights anew in every pass."""
    return torch.stack([net(NEW).softmax(-1) for _ in range(draws)]).mean(0)


def mean_field_rows(
    library: str, kls: list[float], steps: Callable[[], None], predict: Callable[[int], Tensor], small: bool
) -> Rows:
    """
    The divergence that a library reports, the time of its steps (40 of them are one piece of work), and that of predictions.

    :param predict: mean probabilities of the new examples over a number of draws.
    """
    net, x, y = mean_field_problem()
    count = 2 if small else 40
    value = statistics.mean(kls)
    before = mebibytes()
    repeat, draws = (2, 2) if small else (15, 20)
    cost = median_ratio(lambda: [steps() for _ in range(count)], plain_step(net, x, y, count), repeat)
    after = mebibytes()
    found = predict(draws)
    assert found.shape == (len(NEW), 10)
    torch.testing.assert_close(found.sum(-1), torch.ones(len(NEW)))
    prediction = median_ratio(lambda: predict(draws), plain_passes(draws), repeat)
    return [
        {"work": "kl", "library": library, "value": value, "expected": analytic_kl(net), "ratio": value / analytic_kl(net),
         "spread": statistics.stdev(kls) if len(kls) > 1 else 0.0, "evaluations": len(kls)},
        {"work": "step", "library": library, **cost, "peak_mib": after - before},
        {"work": "predict", "library": library, "draws": draws, **prediction, "peak_mib": mebibytes() - after},
    ]  # fmt: skip


def pyro_model(net: Any, num_data: int = 128) -> Callable[..., Any]:
    import pyro
    import pyro.distributions as dist

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        logits = net(x)
        with pyro.plate("data", num_data, subsample=torch.arange(len(x))):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    return model


def ours_mean_field(small: bool, packed: bool) -> Rows:
    import pyro.distributions as dist

    from pyro_bnn.infer import Mixture_ELBO, posterior_predictive
    from pyro_bnn.infer.autoguide import AutoMixture
    from pyro_bnn.nn import bayesian_, init_to_trained

    net, x, y = mean_field_problem()
    model = pyro_model(bayesian_(net, prior=dist.Normal(0.0, 1.0), packed=packed))
    guide = AutoMixture(model, 1, "normal", init_loc_fn=init_to_trained, init_scale=SCALE).initialize(x, y)
    elbo = Mixture_ELBO(max_plate_nesting=1)
    module = elbo(model, guide)
    module(x, y)
    kls = [float(elbo.parts["kl"])]
    optimizer = torch.optim.Adam(module.parameters(), 1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        module(x, y).backward()
        optimizer.step()

    def predict(draws: int) -> Tensor:
        return posterior_predictive(model, guide, (NEW,), num_samples=draws).mean.mean(0)

    return mean_field_rows("pyro_bnn, packed" if packed else "pyro_bnn", kls, step, predict, small)


def pyro_mean_field(small: bool) -> Rows:
    import pyro
    import pyro.distributions as dist
    from pyro import poutine
    from pyro.infer import SVI, Predictive, TraceMeanField_ELBO
    from pyro.infer.autoguide import AutoNormal
    from pyro.nn import PyroSample
    from pyro.nn.module import to_pyro_module_

    net: Any
    net, x, y = mean_field_problem()
    means = {name: p.detach().clone() for name, p in net.named_parameters()}
    to_pyro_module_(net)
    for module in net.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, PyroSample(dist.Normal(torch.zeros(p.shape), 1.0).to_event(p.dim())))
    model = pyro_model(net)
    guide = AutoNormal(model, init_loc_fn=lambda site: means[site["name"]], init_scale=SCALE)
    guide(x, y)
    elbo = TraceMeanField_ELBO()
    hidden = poutine.mask(model, mask=True)

    def prior_only(x: Tensor, y: Tensor) -> Any:
        with poutine.block(hide=["obs", "data"]):
            return hidden(x, y)

    pyro.set_rng_seed(0)
    kls = [elbo.loss(prior_only, guide, x, y) for _ in range(10)]
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), elbo)

    def predict(draws: int) -> Tensor:
        sampled = Predictive(net, guide=guide, num_samples=draws, return_sites=("_RETURN",))
        return sampled(NEW)["_RETURN"].softmax(-1).mean(0)

    return mean_field_rows("Pyro AutoNormal", kls, lambda: svi.step(x, y), predict, small)


def tyxe_mean_field(small: bool) -> Rows:

    import pyro
    import pyro.distributions as dist

    # Pyro 1.9 no longer has this function, and TyXe's guides need it
    pyro.util.deep_getattr = lambda value, name: reduce(getattr, name.split("."), value)
    import tyxe
    from pyro.infer import TraceMeanField_ELBO

    net, x, y = mean_field_problem()
    means = tyxe.guides.PretrainedInitializer.from_net(net)
    bnn = tyxe.VariationalBNN(
        net,
        tyxe.priors.IIDPrior(dist.Normal(0.0, 1.0)),
        tyxe.likelihoods.Categorical(len(x)),
        lambda model: tyxe.guides.AutoNormal(model, init_loc_fn=means, init_scale=SCALE),
    )
    # what ``VariationalBNN.fit`` makes for every call of it
    elbo = TraceMeanField_ELBO()
    pyro.set_rng_seed(0)
    kls = [elbo.loss(bnn.net, bnn.net_guide, x) for _ in range(10)]
    svi = pyro.infer.SVI(bnn.model, bnn.guide, pyro.optim.Adam({"lr": 1e-4}), elbo)

    def predict(draws: int) -> Tensor:
        return bnn.predict(NEW, num_predictions=draws).softmax(-1)

    return mean_field_rows("TyXe", kls, lambda: svi.step((x,), y), predict, small)


def bayesian_torch_mean_field(small: bool) -> Rows:
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

    net, x, y = mean_field_problem()
    means = [p.detach().clone() for p in net.parameters()]
    dnn_to_bnn(
        net,
        {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0,
         "posterior_rho_init": math.log(math.expm1(SCALE)), "type": "Reparameterization", "moped_enable": False},
    )  # fmt: skip
    rho = math.log(math.expm1(SCALE))
    with torch.no_grad():
        for layer, pair in zip(
            [net[0], net[2], net[4]], zip(means[::2], means[1::2], strict=True), strict=True
        ):
            layer.mu_weight.copy_(pair[0])
            layer.mu_bias.copy_(pair[1])
            layer.rho_weight.fill_(rho)
            layer.rho_bias.fill_(rho)
    kls = [float(get_kl_loss(net))]
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (F.cross_entropy(net(x), y) + get_kl_loss(net) / len(x)).backward()
        optimizer.step()

    return mean_field_rows("bayesian-torch", kls, step, lambda draws: mean_probability(net, draws), small)


def torch_uncertainty_mean_field(small: bool) -> Rows:
    spec = importlib.util.find_spec("torch_uncertainty")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("torch_uncertainty is not installed")
    # the package's own __init__ imports its trainer, and with it lightning and torchvision
    package = types.ModuleType("torch_uncertainty")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["torch_uncertainty"] = package
    from torch_uncertainty.layers.bayesian.bayes_linear import BayesLinear

    source, x, y = mean_field_problem()
    rho = math.log(math.expm1(SCALE))
    net = mlp()
    for i in (0, 2, 4):
        layer = BayesLinear(
            net[i].in_features, net[i].out_features, prior_sigma_1=1.0, prior_sigma_2=1.0, prior_pi=1.0
        )
        with torch.no_grad():
            layer.weight_mu.copy_(source[i].weight)
            layer.bias_mu.copy_(source[i].bias)
            layer.weight_sigma.fill_(rho)
            layer.bias_sigma.fill_(rho)
        net[i] = layer

    def divergence() -> Tensor:
        """What its ``KLDiv`` computes: the mean over layers of a one-sample estimate."""
        layers = [net[i] for i in (0, 2, 4)]
        return sum(layer.log_variational_posterior - layer.log_prior for layer in layers) / len(layers)

    kls = []
    for _ in range(10):
        net(x)
        kls.append(float(divergence()))
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        (loss + divergence() / len(x)).backward()
        optimizer.step()

    return mean_field_rows("torch-uncertainty", kls, step, lambda draws: mean_probability(net, draws), small)


# ---------------------------------------------------------------------- Laplace: is it right?


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


# ---------------------------------------------------------------------- Laplace: what does it cost?


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


JOBS: dict[str, Callable[[bool], Rows]] = {
    "pyro_bnn mean field": lambda small: ours_mean_field(small, packed=False),
    "pyro_bnn mean field, packed": lambda small: ours_mean_field(small, packed=True),
    "Pyro AutoNormal": pyro_mean_field,
    "TyXe": tyxe_mean_field,
    "bayesian-torch": bayesian_torch_mean_field,
    "torch-uncertainty": torch_uncertainty_mean_field,
    "pyro_bnn correctness": ours_correct,
    "Pyro AutoLaplaceApproximation": pyro_correct,
}
for _backend in BACKENDS:
    JOBS[f"laplace-torch {_backend} correctness"] = lambda small, b=_backend: laplace_torch_correct(small, b)  # type: ignore[misc]
for _structure in LAPLACE:
    JOBS[f"pyro_bnn {_structure}"] = lambda small, s=_structure: ours_laplace(small, s)  # type: ignore[misc]
    for _backend in BACKENDS:
        JOBS[f"laplace-torch {_backend} {_structure}"] = (  # type: ignore[misc]
            lambda small, s=_structure, b=_backend: laplace_torch_laplace(small, s, b)
        )


def run_job(name: str, options: argparse.Namespace) -> Rows:
    """Runs a job in a process of its own."""
    command = [sys.executable, __file__, "--job", name, "--threads", str(options.threads)]
    try:
        done = subprocess.run(
            command + ["--smoke"] * options.smoke,
            capture_output=True,
            text=True,
            timeout=options.timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [{"job": name, "skipped": f"did not finish in {options.timeout} s"}]
    if done.returncode:
        return [{"job": name, "skipped": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}]
    return [{"job": name, **row} for row in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="few examples and repetitions")
    parser.add_argument("--out", type=Path, help="JSON file of rows; jobs in it are not run again")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for a job")
    parser.add_argument("--only", nargs="*", default=list(JOBS), choices=list(JOBS), help="names of jobs")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    if options.job:
        print(json.dumps(JOBS[options.job](options.smoke)))
        return
    rows: Rows = json.loads(options.out.read_text()) if options.out and options.out.exists() else []
    done = {row["job"] for row in rows}
    common: dict[str, Any] = {"threads": options.threads, "python": sys.version.split()[0]}
    for name in ("torch", "pyro-ppl", "laplace-torch", "curvlinops-for-pytorch", "backpack-for-pytorch",
                 "bayesian-torch", "torch-uncertainty"):  # fmt: skip
        try:
            common[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            common[name] = None
    for name in options.only:
        if name in done:
            continue
        found = run_job(name, options)
        rows += [{**row, **common} for row in found]
        for row in found:
            print({k: v for k, v in row.items() if k != "job"} | {"job": name}, flush=True)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
