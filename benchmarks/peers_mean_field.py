# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Mean-field variational inference by each library: its divergence, its steps, its predictions."""

import importlib.util
import math
import statistics
import sys
import types
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from peers_work import NEW, Rows, mean_field_problem, mebibytes, median_ratio, mlp, pyro_model
from torch import Tensor, nn

SCALE = 0.05


def analytic_kl(net: nn.Module) -> float:
    """KL(N(m, SCALE) || N(0, 1)), summed over all weights."""
    parts = [p.detach().double() for p in net.parameters()]
    return sum(float((0.5 * (SCALE**2 + p.square() - 1) - math.log(SCALE)).sum()) for p in parts)


def plain_step(x: Tensor, y: Tensor, count: int) -> Callable[[], None]:
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
    cost = median_ratio(lambda: [steps() for _ in range(count)], plain_step(x, y, count), repeat)
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
