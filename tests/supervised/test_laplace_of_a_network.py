# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""One call for a trained network, beside dense Jacobians of plain torch, optimisers of scipy and a second process."""

import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

import pyro_bnn
from pyro_bnn.curvature.mode import UnconvergedMAPWarning
from pyro_bnn.infer import load_guide, save_guide
from tests.common import assert_close

ROOT = Path(__file__).parents[2]
FAR = {"map_tolerance": math.inf}  # networks of random weights are no modes


class Stream(IterableDataset[Any]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.rows = list(zip(x, y, strict=True))

    def __iter__(self) -> Any:
        return iter(self.rows)


def network(outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, outputs))


def data(n: int = 30) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 2)
    return x, torch.sin(x[:, 0]) + 0.3 * torch.randn(n)


def trained(net: nn.Module, x: Tensor, y: Tensor, steps: int = 150) -> nn.Module:
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(net(x), y.unsqueeze(-1)).backward()
        optimizer.step()
    return net


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def rows(net: nn.Module, x: Tensor) -> Tensor:
    """The Jacobian of the outputs, shape (N, C, p)."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    found = jacrev(lambda p: functional_call(net, p, (x,)))(parameters)
    return torch.cat([value.flatten(2) for value in found.values()], -1)


def log_evidence(
    u: Tensor, J: Tensor, residual: Tensor, mask: Tensor, tau: Tensor, noise: float, curvature: str
) -> float:
    """Under the prior N(0, 1 / tau), tau of shape (p,), by dense linear algebra; the curvature has the entries of a mask."""
    root = J / noise if curvature == "ggn" else residual.unsqueeze(-1) * J / noise**2  # scores
    precision = mask * (root.mT @ root) + tau.diag()
    likelihood = -0.5 * (residual / noise).square().sum() - len(J) * math.log(noise * math.sqrt(2 * math.pi))
    prior = 0.5 * (tau.log() - math.log(2 * math.pi) - tau * u**2).sum()
    return float(likelihood + prior + len(u) / 2 * math.log(2 * math.pi) - 0.5 * torch.logdet(precision))


def held_out_density(J: Tensor, new: Tensor, residual: Tensor, tau: float, noise: float) -> float:
    covariance = torch.linalg.inv(J.mT @ J / noise**2 + tau * torch.eye(J.shape[1]))
    scale = ((new @ covariance) * new).sum(-1).add(noise**2).sqrt()
    return float(torch.distributions.Normal(0.0, scale).log_prob(residual).sum())


@pytest.mark.parametrize(
    ("structure", "curvature"), [("full", "ggn"), ("block", "ggn"), ("full", "empirical_fisher")]
)
def test_prior_and_noise_at_the_joint_optimum_of_the_evidence(structure: Any, curvature: Any) -> None:
    """One multiplier for all, or one for each of two layers, and the noise, by a search of scipy's."""
    x, y = data()
    net = trained(network(), x, y)
    sizes = [p.numel() for p in net.parameters()]
    sites = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    per, layers, mask = "global", torch.zeros_like(sites), torch.ones(len(sites), len(sites))
    if structure == "block":
        per, layers, mask = "layer", sites // 2, (sites == sites[:, None]).double()
    options: Any = {"structure": structure, "prior": dist.Normal(0.0, 1.0), "curvature": curvature, **FAR}
    guide = pyro_bnn.laplace(net, (x, y), likelihood="regression", per=per, **options)
    pieces = weights(net), rows(net, x)[:, 0], y - net(x).detach()[:, 0], mask

    def loss(z: Any) -> float:
        return -log_evidence(*pieces, torch.as_tensor(z[1:]).exp()[layers], math.exp(z[0]), curvature)

    best = minimize(loss, np.zeros(2 + int(layers.max())), tol=1e-10)
    assert guide.tau is not None
    assert_close(guide.model.noise.detach(), math.exp(best.x[0]), rtol=2e-5)
    assert_close(guide.tau.expand(len(layers)), torch.as_tensor(best.x[1:]).exp()[layers], rtol=2e-5)
    assert_close(guide.log_evidence(), -best.fun, rtol=1e-9)


def test_layers_that_the_structure_couples_share_the_search_for_the_noise() -> None:
    x, y = data()
    net = trained(network(), x, y)
    found = [
        pyro_bnn.laplace(net, (x, y), likelihood="regression", structure="full", per=per, **FAR)
        for per in ("global", "layer")
    ]
    assert_close(found[1].model.noise.detach(), found[0].model.noise.detach())
    assert [len(guide.tau.unique()) for guide in found if guide.tau is not None] == [1, 2]
    assert float(found[1].log_evidence()) > float(found[0].log_evidence())


def test_prior_and_noise_by_held_out_data() -> None:
    """The best of a grid of multipliers, each with the noise that is best for it."""
    x, y = data(12)
    net = trained(network(), x, y)
    held_out = data(20)
    quotients = [0.001, 0.01, 0.1, 1.0, 10.0, 100.0]
    guide = pyro_bnn.laplace(
        net, (x, y), likelihood="regression", structure="full", prior=dist.Normal(0.0, 1.0), validation=held_out,
        candidates=quotients,
    )  # fmt: skip
    start = float((y - net(x).detach()[:, 0]).square().mean().sqrt())
    x_new, y_new = held_out
    pieces = rows(net, x)[:, 0], rows(net, x_new)[:, 0], y_new - net(x_new).detach()[:, 0]

    def best(quotient: float) -> tuple[float, float, float]:
        def loss(z: Any) -> float:  # the quotient of multiplier and precision of the noise is fixed
            rho = (start / math.exp(z[0])) ** 2
            return -held_out_density(*pieces, quotient * rho, math.exp(z[0]))

        found = minimize(loss, [math.log(start)], tol=1e-9)
        noise = math.exp(found.x[0])
        return -float(found.fun), quotient * (start / noise) ** 2, noise

    score, tau, noise = max(map(best, quotients))
    assert guide.tau is not None
    assert_close(guide.tau, tau, rtol=1e-4)
    assert_close(guide.model.noise.detach(), noise, rtol=1e-5)
    assert_close(guide.predictive(held_out[0])["obs"].log_prob(held_out[1]).sum(), score, rtol=1e-9)


def test_noise_of_vectors_by_held_out_data() -> None:
    """Residuals in units of their joint covariance have a mean square of 1."""
    x = torch.randn(30, 2)
    y, y_new = torch.randn(30, 3), torch.randn(12, 3)
    net = network(3)
    guide = pyro_bnn.laplace(
        net,
        (x, y),
        likelihood="regression",
        structure="full",
        validation=(x[:12], y_new),
        candidates=[1.0, 10.0],
    )
    J, noise = rows(net, x), float(guide.model.noise.detach())
    prior = torch.cat(
        [torch.full((s.numel(),), float(s.shape[1]) if s.dim() > 1 else 1.0) for s in net.parameters()]
    )
    assert guide.tau is not None
    precision = torch.einsum("ncp,ncq->pq", J, J) / noise**2 + (guide.tau * prior).diag()
    covariance = J[:12] @ torch.linalg.inv(precision) @ J[:12].mT + noise**2 * torch.eye(3)
    residual = (y_new - net(x[:12]).detach()).unsqueeze(-1)
    distance = (residual.mT @ torch.linalg.solve(covariance, residual)).squeeze()
    assert_close(distance.mean() / 3, 1.0, rtol=1e-6)
    assert_close(guide.predictive(x[:12])["obs"].covariance_matrix, covariance, rtol=1e-6, atol=1e-12)


def test_the_network_is_unchanged_and_its_outputs_are_kept() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))
    x, y = torch.randn(40, 3), torch.arange(40) % 3
    net(x)  # statistics of a training step
    net[4].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    guide = pyro_bnn.laplace(net, (x, y), likelihood="classification", **FAR)
    assert type(net) is nn.Sequential
    assert type(net[0]) is nn.Linear
    assert all(module.training for module in net.modules())
    for name, value in net.state_dict().items():
        assert_close(value, before[name], rtol=0)
    assert sorted(guide.median()) == ["net.0.bias", "net.0.weight", "net.4.weight"]
    assert not guide.model.net[4].bias.requires_grad
    mean = guide.linearized_outputs(x)["obs"].mean
    net.eval()
    assert_close(mean, net(x).log_softmax(-1).detach(), rtol=1e-12)


def test_frozen_parameters_of_every_layer_are_kept_and_no_others() -> None:
    """A token, the weight of a layer, a layer as a whole, and one tensor of an attention layer, which renames its own."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, 4))
            self.embed, self.first, self.head = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.mix = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.cat([self.token.expand(len(x), -1, -1), self.first(self.embed(x))], 1)
            return self.head(self.mix(h, h, h)[0][:, 0])

    net, x, y = Encoder(), torch.randn(12, 5, 2), torch.arange(12) % 3
    kept = {"token": net.token, "embed.weight": net.embed.weight, "embed.bias": net.embed.bias}
    kept |= {"first.weight": net.first.weight, "mix.in_proj_bias": net.mix.in_proj_bias}
    for parameter in kept.values():
        parameter.requires_grad_(False)
    guide = pyro_bnn.laplace(net, (x, y), likelihood="classification", structure="diagonal", tune=None, **FAR)
    random = {
        "first.bias",
        "head.weight",
        "head.bias",
        "mix.in_proj_weight",
        "mix.out_proj_weight",
        "mix.out_proj_bias",
    }
    assert set(guide.median()) == {f"net.{name}" for name in random}
    assert len(guide.loc) == sum(p.numel() for p in net.parameters() if p.requires_grad)
    found = dict(guide.model.net.named_parameters())
    for name, value in kept.items():
        assert_close(found[name], value, rtol=0)
        assert not found[name].requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_contexts_without_gradients(context: Any) -> None:
    x, y = data()
    net = network()
    reference = pyro_bnn.laplace(net, (x, y), likelihood="regression", **FAR)
    with context():
        guide = pyro_bnn.laplace(net, (x.clone(), y), likelihood="regression", **FAR)
        assert_close(guide.predictive(x)["obs"].stddev, reference.predictive(x)["obs"].stddev)


def test_loaders_of_every_form_are_the_same_data() -> None:
    x, y = torch.randn(23, 2), torch.arange(23) % 3
    net = network(3)
    rows = TensorDataset(x, y)
    forms = [
        (x, y), {"x": x, "y": y}, DataLoader(rows, 5, shuffle=True), [(x[:20], y[:20, None]), (x[20:], y[20:, None])],
        [{"input": x[:9], "labels": y[:9]}, {"input": x[9:], "labels": y[9:]}],
    ]  # fmt: skip
    guides = [pyro_bnn.laplace(net, form, likelihood="classification", **FAR) for form in forms]
    for guide in guides:
        assert guide.model.num_data == 23
        assert_close(guide.log_evidence(), guides[0].log_evidence(), rtol=1e-9)
        assert_close(guide.tau, guides[0].tau, rtol=1e-6)
    by_name = guides[-1].predictive(input=x[:4])["obs"]
    assert_close(by_name.probs, guides[0].predictive(x[:4])["obs"].probs, rtol=1e-9)


def test_tied_weights_are_one_site() -> None:
    """The diagonal curvature of a weight that two layers use is the square of the sum of both derivatives."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))[:, :1]

    net, (x, y) = Tied(), data()
    options: Any = {
        "structure": "diagonal",
        "noise": 0.5,
        "prior": dist.Normal(0.0, 1.0),
        "tune": None,
        **FAR,
    }
    guide = pyro_bnn.laplace(net, (x, y), likelihood="regression", **options)
    values = {"first.weight": net.first.weight.detach(), "first.bias": net.first.bias.detach()}

    def outputs(p: dict[str, Tensor]) -> Tensor:
        return functional_call(net, {**p, "second.weight": p["first.weight"]}, (x,), tie_weights=False)[:, 0]

    J = torch.cat([value.flatten(1) for value in jacrev(outputs)(values).values()], -1)
    assert list(guide.median()) == ["net.first.weight", "net.first.bias"]
    assert_close(guide.precision, J.square().sum(0) / 0.25 + 1)


def test_polish_goes_to_the_mode_and_its_absence_warns() -> None:
    x, y = data()
    net = trained(network(), x, y, steps=20)
    options: Any = {
        "likelihood": "regression",
        "structure": "full",
        "noise": 0.5,
        "prior": dist.Normal(0.0, 1.0),
    }
    with pytest.warns(
        UnconvergedMAPWarning, match="were left as they are: tune='evidence'.*validation=.*polish=True"
    ):
        guide = pyro_bnn.laplace(net, (x, y), **options)
    assert guide.tau is None
    with pytest.warns(UnconvergedMAPWarning, match="that it chose may be far off"):
        told = pyro_bnn.laplace(net, (x, y), tune="evidence", **options)
    assert told.tau is not None
    J, residual = rows(net, x)[:, 0], y - net(x).detach()[:, 0]
    gradient = weights(net) - J.mT @ residual / 0.25
    precision = J.mT @ J / 0.25 + torch.eye(len(gradient))
    assert guide.map_report is not None
    assert_close(
        guide.map_report.newton_decrement,
        (gradient @ torch.linalg.solve(precision, gradient)).sqrt(),
        rtol=1e-6,
    )
    assert_close(guide.loc.detach(), weights(net))
    polished = pyro_bnn.laplace(net, (x, y), polish=True, **options)
    assert polished.tau is not None
    u = polished.loc.detach().clone().requires_grad_(True)
    shapes = {name: p.shape for name, p in net.named_parameters()}
    parts = u.split([shape.numel() for shape in shapes.values()])
    f = functional_call(net, {n: p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}, (x,))[
        :, 0
    ]
    loss = 0.5 * (y - f).square().sum() / 0.25 + 0.5 * u.square().sum()
    (slope,) = torch.autograd.grad(loss, u)
    assert float(slope.norm()) < 1e-4 * float(gradient.norm())
    assert float(loss.detach()) < 0.5 * float(residual.square().sum() / 0.25 + weights(net).square().sum())


def test_latent_noise_starts_at_the_residuals() -> None:
    x, y = data()
    net = trained(network(), x, y)
    guide = pyro_bnn.laplace(
        net,
        (x, y),
        likelihood="regression",
        structure="full",
        noise=dist.LogNormal(0.0, 2.0),
        tune=None,
        **FAR,
    )
    residual = (y - net(x).detach()[:, 0]).square().mean().sqrt()
    assert_close(guide.median()["noise"], residual)
    # the Fisher information of a logarithmic scale is 2 per row, its prior precision 1 / 4
    where = guide.packed.space.slices["noise"]
    assert_close(guide.precision[where, where], torch.tensor([[2.0 * len(y) + 0.25]]))


def test_without_tuning_the_noise_is_that_of_the_residuals() -> None:
    x, y = data()
    net = network()
    guide = pyro_bnn.laplace(net, (x, y), likelihood="regression", tune=None, **FAR)
    assert_close(guide.model.noise.detach(), (y - net(x).detach()[:, 0]).square().mean().sqrt())
    assert guide.tau is None


def test_labels_of_pixels_find_their_classes() -> None:
    net = nn.Conv2d(2, 3, 3, padding=1)
    x, y = torch.randn(6, 2, 4, 5), torch.randint(3, (6, 4, 5))
    guide = pyro_bnn.laplace(net, (x, y), likelihood="classification", tune=None, **FAR)
    assert (guide.model.event_dim, guide.model.class_dim) == (2, 1)
    log_likelihood = guide.log_joint - guide.log_prior if guide.log_joint is not None else torch.nan
    assert_close(log_likelihood, -F.cross_entropy(net(x), y, reduction="sum"))
    with pytest.raises(ValueError, match="may be its dimension 1 or its last; pass class_dim"):
        pyro_bnn.laplace(nn.Conv2d(2, 4, 3, padding=1), (x[..., :4], y[..., :4]), likelihood="classification")


SERVE = """
import torch, pyro_bnn
from torch import nn
torch.set_default_dtype(torch.float64)
class Served(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.body(x))))
guide = pyro_bnn.laplace(Served(), likelihood="regression").load("posterior.pt")
d = guide.predictive(torch.load("x.pt"))["obs"]
torch.save({"mean": d.mean, "sd": d.stddev}, "served.pt")
"""


def test_a_second_process_serves_the_same(tmp_path: Path) -> None:
    """The class of the network is another one there, and has other weights; nothing is pickled."""
    scope: dict[str, Any] = {}
    exec(SERVE.partition("guide =")[0], scope)
    x, y = data()
    net = scope["Served"]()
    net(x)
    guide = pyro_bnn.laplace(net, [(x[:20], y[:20]), (x[20:], y[20:])], likelihood="regression", **FAR)
    guide.save(tmp_path / "posterior.pt")
    torch.save(x, tmp_path / "x.pt")
    run = [sys.executable, "-W", "error", "-c", SERVE]
    subprocess.run(run, check=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    served, here = torch.load(tmp_path / "served.pt"), guide.predictive(x)["obs"]
    assert_close(served["mean"], here.mean, rtol=1e-12)
    assert_close(served["sd"], here.stddev, rtol=1e-12)
    other = pyro_bnn.laplace(scope["Served"](), likelihood="poisson")
    with pytest.raises(
        ValueError, match=r"model\.likelihood='regression'; this one has model\.likelihood='poisson'"
    ):
        load_guide(other, tmp_path / "posterior.pt")


def test_export_holds_the_model() -> None:
    x, y = data()
    guide = pyro_bnn.laplace(network(), (x, y), likelihood="regression", noise=0.5, tune=None, **FAR)
    tree = guide.to_datatree((x, y), num_samples=8)
    found = torch.as_tensor(tree["log_likelihood"]["obs"].values)
    assert found.shape == (1, 8, 30)
    assert {"net.0.weight", "net.2.bias"} <= set(tree["posterior"].data_vars)


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
def test_data_that_differ_between_passes_are_named(likelihood: Any) -> None:
    x, y = data()
    labels = (y > 0).long() if likelihood == "classification" else y

    class Augmented(Dataset[Any]):
        scale = 0.1

        def __len__(self) -> int:
            return len(x)

        def __getitem__(self, i: int) -> Any:
            return x[i] + self.scale * torch.randn(2), labels[i]

    rows, net = Augmented(), network(2 if likelihood == "classification" else 1)
    with pytest.warns(UserWarning, match="the data differ between passes"):
        pyro_bnn.laplace(net, DataLoader(rows, 7), likelihood=likelihood, **FAR)
    rows.scale = 0.0
    for kind in (torch.float64, torch.float32):
        x, labels = x.to(kind), labels.to(kind) if likelihood == "regression" else labels
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.set_default_dtype(kind)
            try:
                pyro_bnn.laplace(
                    net.to(kind), DataLoader(rows, 7, shuffle=True), likelihood=likelihood, **FAR
                )
            finally:
                torch.set_default_dtype(torch.float64)


def test_two_networks_of_a_process_keep_their_noise(tmp_path: Path) -> None:
    x, y = data()
    guides, expected = [], []
    for i, factor in enumerate((1.0, 10.0)):
        guides.append(pyro_bnn.laplace(network(), (x, factor * y), likelihood="regression", **FAR))
        expected.append(guides[i].predictive(x)["obs"].stddev)
        save_guide(guides[i], tmp_path / f"{i}.pt")
    assert not dict(pyro.get_param_store())
    for i, (guide, wanted) in enumerate(zip(guides, expected, strict=True)):
        assert_close(guide.predictive(x)["obs"].stddev, wanted)
        fresh = pyro_bnn.laplace(network(), likelihood="regression", event_dim=0)
        assert_close(load_guide(fresh, tmp_path / f"{i}.pt").predictive(x)["obs"].stddev, wanted)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda o, x, y: o.update(data=DataLoader(TensorDataset(x, y), 7, drop_last=True)), "leaves out 2 of 30 rows"),
        (
            lambda o, x, y: o.update(
                data=DataLoader(TensorDataset(x, y), 7, sampler=RandomSampler(TensorDataset(x), replacement=True))
            ),
            "draws rows with replacement",
        ),
        (
            lambda o, x, y: o.update(
                data=DataLoader(TensorDataset(x, y), batch_sampler=BatchSampler(RandomSampler(x), 7, drop_last=True))
            ),
            "leaves out 2 of 30 rows",
        ),
        (lambda o, x, y: o.update(data=DataLoader(Stream(x, y), 15, drop_last=True)), "leaves out what is left of a stream"),
        (
            lambda o, x, y: o.update(data=DataLoader(TensorDataset(x, y), 7, sampler=RandomSampler(x, num_samples=20))),
            "draws 20 of 30 rows, other ones in every pass",
        ),
        (lambda o, x, y: o.update(data=(x, y.sign()), likelihood="binary", **FAR), "Labels are 0 and 1; for -1 and 1"),
        (lambda o, x, y: o.update(data=(x, y), likelihood="poisson", **FAR), "Counts are the integers from 0"),
        (lambda o, x, y: o.update(net=torch.compile(o["net"])), "convert the network before torch.compile"),
        (lambda o, x, y: o.update(noise=torch.ones(30)), r"noise has shape \(30,\), expected .* the shape \(\) of one target"),
        (
            lambda o, x, y: o.update(net=network(2), data=(x, torch.stack([y, y], -1)), noise=torch.ones(3)),
            r"noise has shape \(3,\), expected .* the shape \(2,\)",
        ),
        (lambda o, x, y: o.update(data=iter([(x, y)])), "an iterator, which can be run through once only"),
        (lambda o, x, y: o.update(data=(x,)), "the data have no targets: a batch holds inputs alone"),
        (lambda o, x, y: o.update(data=[{"input": x, "t": y}]), r"the keys \['input', 't'\], and target='labels'"),
        (lambda o, x, y: o.update(prior={"0.wieght": dist.Normal(0.0, 1.0)}), "0.wieght.*name no parameter"),
        (lambda o, x, y: o.update(tune="validation"), "held-out data, validation=, go with"),
        (lambda o, x, y: o.update(tune="evidence", validation=(x, y)), "held-out data, validation=, go with"),
        (lambda o, x, y: o.update(tune="marglik"), "tune must be 'auto', 'evidence' or 'validation'"),
        (lambda o, x, y: o["net"].requires_grad_(False), "all 4 parameters of the network are frozen"),
        (lambda o, x, y: o.update(net=pyro_bnn.bayesian_(o["net"])), "has been converted already"),
        (
            lambda o, x, y: o.update(data=(x, o["net"](x).detach())),
            "the residuals of the network are all zero",
        ),
        (
            lambda o, x, y: o.update(validation=(x, o["net"](x).detach())),
            "the held-out targets are predicted exactly",
        ),
        (
            lambda o, x, y: o.update(curvature="hessian", structure="full", polish=True, **FAR),
            "tune='evidence' does not find the noise from one decomposition",
        ),
        (
            lambda o, x, y: o.update(curvature="empirical_fisher", validation=(x, y)),
            "tune='validation' does not find the noise from one decomposition",
        ),
    ],
)  # fmt: skip
def test_refused(change: Any, says: str) -> None:
    x, y = data()
    options: Any = {"net": network(), "data": (x, y), "likelihood": "regression"}
    change(options, x, y)
    with pytest.raises(ValueError, match=says):
        pyro_bnn.laplace(**options)


def test_a_network_that_fails_is_shown_its_arguments() -> None:
    x, y = data()
    with pytest.raises(TypeError, match=r"argument 0 of the model is a numpy array of shape \(30, 2\)"):
        pyro_bnn.laplace(network(), (x.numpy(), y), likelihood="regression")
    with pytest.raises(RuntimeError) as caught:
        pyro_bnn.laplace(network(), (x[:, :1], y), likelihood="regression")
    assert "argument 0 of shape (30, 1), argument 1 of shape (30,)" in caught.value.__notes__[0]
