# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
The programs of docs/source/from_laplace_torch.rst, which shows what stands between the marks. What they compute is compared
with dense Jacobians of plain torch.
"""

import math
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bnn
from tests.common import assert_close

# what the pages say of the weights is not what these examples are about
pytestmark = pytest.mark.filterwarnings("ignore:the weights are:UserWarning")


def loader(x: Tensor, y: Tensor, size: int = 16) -> Any:
    return DataLoader(TensorDataset(x, y), batch_size=size, shuffle=True)


def jacobian(net: nn.Module, x: Tensor, parameters: list[Tensor] | None = None) -> Tensor:
    """Derivatives of all outputs of all rows, one after the other, shape (N * outputs, p)."""
    wanted = list(net.parameters()) if parameters is None else parameters
    outputs = net(x).flatten()
    return torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(f, wanted, retain_graph=True)]) for f in outputs]
    )


def fan_in_precision(net: nn.Module, parameters: list[Tensor] | None = None) -> Tensor:
    """The precision of the default prior, shape (p,): the number of inputs of a weight, 1 for a bias."""
    wanted = list(net.parameters()) if parameters is None else parameters
    return torch.cat([torch.full((p.numel(),), float(p[0].numel()) if p.dim() > 1 else 1.0) for p in wanted])


def multiplier(guide: Any) -> Tensor:
    return torch.ones(()) if guide.tau is None else guide.tau


def small_data(outputs: int = 1) -> tuple[nn.Sequential, Tensor, Tensor]:
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, outputs))
    x = torch.randn(24, 2)
    return net, x, torch.sin(2 * x[:, 0]) + 0.2 * torch.randn(24)


# ------------------------------------------------------------------ the three scripts


def trained_classifier() -> tuple[nn.Sequential, Any, Any, Tensor, Tensor]:
    """A network that is sure of labels of which a tenth are wrong."""
    x = torch.randn(200, 2)
    y = ((x[:, 0] * x[:, 1] > 0) ^ (torch.rand(200) < 0.1)).long()
    net = nn.Sequential(nn.Linear(2, 30), nn.Tanh(), nn.Linear(30, 2))
    optimizer = torch.optim.Adam(net.parameters(), 0.03)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[:80]), y[:80]).backward()
        optimizer.step()
    return net, loader(x[:80], y[:80]), loader(x[80:140], y[80:140]), x[140:], y[140:]


def test_script_1_probabilities() -> None:
    net, train_loader, val_loader, x_test, y_test = trained_classifier()
    # [script 1]
    guide = pyro_bnn.laplace(net, train_loader, likelihood="classification", validation=val_loader)
    probabilities = guide.predictive(x_test)["obs"].probs
    # [end script 1]
    logits = net(x_test).detach()
    assert_close(guide.linearized_outputs(x_test)["obs"].mean, logits.log_softmax(-1), rtol=1e-9, atol=1e-12)
    # two classes: MacKay's formula for the difference of the logits
    covariance = guide.linearized_outputs(x_test)["obs"].covariance
    gap = logits[:, 1] - logits[:, 0]
    variance = covariance[:, 0, 0] + covariance[:, 1, 1] - 2 * covariance[:, 0, 1]
    expected = torch.sigmoid(gap / (1 + math.pi / 8 * variance).sqrt())
    assert_close(probabilities[:, 1], expected, rtol=1e-9)
    before = nn.functional.cross_entropy(logits, y_test)
    after = nn.functional.nll_loss(probabilities.log(), y_test)
    assert float(after) < 0.8 * float(before)


def test_script_2_error_bars_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x, x_test = torch.randn(60, 2), torch.randn(7, 2)
    y = torch.sin(2 * x[:, 0]) + 0.2 * torch.randn(60)
    train_loader, val_loader = loader(x[:16], y[:16]), loader(x[16:], y[16:])

    def Regressor() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

    net = Regressor()
    optimizer = torch.optim.Adam(net.parameters(), 0.03)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x[:16])[:, 0], y[:16]).backward()
        optimizer.step()
    # [script 2, training]
    guide = pyro_bnn.laplace(net, train_loader, likelihood="regression", validation=val_loader)
    guide.save("posterior.pt")
    # [end script 2, training]
    trained = guide
    # [script 2, serving]
    guide = pyro_bnn.laplace(Regressor(), likelihood="regression").load("posterior.pt")
    predictive = guide.predictive(x_test)["obs"]  # a Normal with .mean, .stddev, .icdf
    # [end script 2, serving]
    assert_close(predictive.mean, net(x_test).detach()[:, 0], rtol=1e-12)
    noise = trained.model.noise.detach()
    epistemic = trained.linearized_outputs(x_test)["obs"].variance[:, 0]
    assert_close(predictive.variance, epistemic + noise**2, rtol=1e-9)


def test_script_3_last_layer() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    x, y, x_test = torch.randn(40, 1, 8, 8), torch.arange(40) % 3, torch.randn(5, 1, 8, 8)
    train_loader = loader(x, y)
    # [script 3]
    guide = pyro_bnn.laplace(
        net, train_loader, likelihood="classification", sites="last_layer", structure="full"
    )
    probabilities = guide.predictive(x_test)["obs"].probs
    # [end script 3]
    net.eval()
    head = [net[-1].weight, net[-1].bias]
    J = jacobian(net, x, head).reshape(40, 3, -1)
    p = net(x).detach().softmax(-1)
    fisher = p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2)
    precision = torch.einsum("nci,ncd,ndj->ij", J, fisher, J)
    precision += (multiplier(guide).max() * fan_in_precision(net, head)).diag()
    new = jacobian(net, x_test, head).reshape(5, 3, -1)
    covariance = new @ torch.linalg.inv(precision) @ new.mT
    center = torch.eye(3) - 1 / 3  # a Categorical normalises its logits
    found = guide.linearized_outputs(x_test)["obs"].covariance
    assert_close(center @ found @ center, center @ covariance @ center, rtol=1e-7, atol=1e-12)
    assert_close(probabilities.sum(-1), torch.ones(5))


# ------------------------------------------------------------------ open wishes


def test_heteroscedastic() -> None:
    net, x, y = small_data(2)
    # [153]
    guide = pyro_bnn.laplace(net, (x, y), likelihood="heteroscedastic", structure="full")  # net: (N, 2)
    predictive = guide.predictive(x)["obs"]  # a mixture over draws of both outputs
    outputs = guide.linearized_outputs(x)["obs"]
    mean, log_sd = outputs.mean.unbind(-1)  # covariance of the two at each point: outputs.covariance
    # [end 153]
    J = jacobian(net, x).reshape(24, 2, -1)
    fisher = torch.stack([(-2 * net(x).detach()[:, 1]).exp(), torch.full((24,), 2.0)], -1).diag_embed()
    precision = (
        torch.einsum("nci,ncd,ndj->ij", J, fisher, J) + (multiplier(guide) * fan_in_precision(net)).diag()
    )
    assert_close(outputs.covariance, J @ torch.linalg.inv(precision) @ J.mT, rtol=1e-7, atol=1e-12)
    assert_close(torch.stack([mean, log_sd], -1), net(x).detach(), rtol=1e-12)
    # the law of total variance, with the mean of a lognormal variable
    spread = outputs.variance
    variance = spread[:, 0] + (2 * log_sd + 2 * spread[:, 1]).exp()
    exact = guide.predictive(x, num_samples=50_000)["obs"]
    assert_close(exact.variance.mean(), variance.mean(), rtol=0.02)
    assert predictive.mean.shape == (24,)


def test_low_rank() -> None:
    net, x, y = small_data()
    # [284]
    guide = pyro_bnn.laplace(net, (x, y), likelihood="regression", structure="low_rank", rank=4)
    sd = guide.predictive(x)["obs"].stddev
    # [end 284]
    J, noise = jacobian(net, x), guide.model.noise.detach()
    root = fan_in_precision(net).sqrt()  # the leading eigenpairs relative to the prior
    values, vectors = torch.linalg.eigh((J / root).mT @ (J / root) / noise**2)
    kept = (vectors[:, -4:] * values[-4:]) @ vectors[:, -4:].mT
    covariance = torch.linalg.inv(kept + multiplier(guide) * torch.eye(len(root)))
    variance = ((J / root) @ covariance * (J / root)).sum(-1) + noise**2
    assert_close(sd, variance.sqrt(), rtol=1e-6)


def test_a_diagonal_of_a_million() -> None:
    torch.set_default_dtype(torch.float32)
    net = nn.Sequential(nn.Linear(800, 1200), nn.ReLU(), nn.Linear(1200, 50))
    x, y = torch.randn(16, 800), torch.randn(16, 50)
    # [281]
    guide = pyro_bnn.laplace(net, loader(x, y), likelihood="regression", structure="diagonal")
    sd = guide.predictive(x)["obs"].stddev  # 50 outputs, 1,021,250 weights
    # [end 281]
    assert len(guide.loc) == 1_021_250
    hidden = net[:2](x).detach()
    noise = guide.model.noise.detach()
    active = (hidden > 0).float()  # the squared derivatives of all outputs in a weight, in closed form
    first = torch.einsum("nh,ni,oh->hi", active, x.square(), net[2].weight.detach().square())
    last = hidden.square().sum(0).expand(50, -1)
    expected = torch.cat([first.flatten(), last.flatten()]) / noise**2 + torch.cat(
        [torch.full((800 * 1200,), 800.0), torch.full((1200 * 50,), 1200.0)]
    ) * multiplier(guide)
    slices = guide.packed.space.slices
    found = torch.cat([guide.precision[slices[f"net.{i}.weight"]] for i in (0, 2)])
    assert_close(found, expected, rtol=1e-3)
    assert sd.shape == (16, 50)


def test_image_to_image() -> None:
    images = torch.randn(6, 1, 5, 5)
    # [118]
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=1))
    guide = pyro_bnn.laplace(
        net, (images, images), likelihood="regression", sites="last_layer", structure="full"
    )
    predictive = guide.predictive(images)["obs"]  # one joint Gaussian for the pixels of an image
    mean, variance = predictive.mean, predictive.variance  # (6, 1, 5, 5)
    # [end 118]
    J = jacobian(net, images, [net[2].weight, net[2].bias])
    noise = guide.model.noise.detach()
    prior = fan_in_precision(net, [net[2].weight, net[2].bias])
    tau = multiplier(guide).max()
    covariance = torch.linalg.inv(J.mT @ J / noise**2 + (tau * prior).diag())
    rows = J.reshape(6, 25, -1)
    assert_close(
        predictive.covariance_matrix,
        rows @ covariance @ rows.mT + noise**2 * torch.eye(25),
        rtol=1e-7,
        atol=1e-12,
    )
    assert_close(mean, net(images).detach(), rtol=1e-12)
    assert variance.shape == images.shape


def test_a_last_layer_whose_outputs_are_reshaped() -> None:
    x, y = torch.randn(20, 10, 6), torch.randn(20, 50)
    # [265]
    net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Flatten())  # (N, 10, 6) -> (N, 10, 5) -> (N, 50)
    guide = pyro_bnn.laplace(net, loader(x, y), likelihood="regression", sites="last_layer")
    outputs = guide.linearized_outputs(x)["obs"]  # outputs.event_covariance: (N, 50, 50)
    # [end 265]
    noise, rows = guide.model.noise.detach(), x.reshape(-1, 6)
    inner = torch.linalg.inv(rows.mT @ rows / noise**2 + 6 * multiplier(guide).max() * torch.eye(6))
    expected = torch.einsum("nti,ij,nsj,ab->ntasb", x, inner, x, torch.eye(5)).reshape(20, 50, 50)
    assert_close(outputs.event_covariance, expected, rtol=1e-7, atol=1e-12)


def test_lstm() -> None:
    x = torch.randn(12, 7, 2)
    y = x[:, :, 0].sum(1)

    # [143]
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    net = Sequence()
    guide = pyro_bnn.laplace(net, loader(x, y), likelihood="regression", structure="full")
    sd = guide.predictive(x)["obs"].stddev
    # [end 143]
    order = dict(net.named_parameters())
    wanted = [order[name.removeprefix("net.")] for name in guide.median()]
    fan_in = {"lstm.weight_ih_l0": 2, "lstm.weight_hh_l0": 4, "head.weight": 4}
    prior = torch.cat(
        [
            torch.full((order[n.removeprefix("net.")].numel(),), float(fan_in.get(n.removeprefix("net."), 1)))
            for n in guide.median()
        ]
    )
    J, noise = jacobian(net, x, wanted), guide.model.noise.detach()
    covariance = torch.linalg.inv(J.mT @ J / noise**2 + (multiplier(guide) * prior).diag())
    assert_close(sd, ((J @ covariance * J).sum(-1) + noise**2).sqrt(), rtol=1e-6)


def test_joint_predictive() -> None:
    x, y = torch.randn(30, 3), torch.randn(30, 2)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2, bias=False))
    # [175]
    guide = pyro_bnn.laplace(net, (x, y), likelihood="regression", sites="last_layer", structure="kronecker")
    covariance = guide.joint_covariance(x)["obs"]  # between all points and outputs
    draws = guide.functional_samples(1000, x)["obs"]  # functions: one draw of the weights at all points
    # [end 175]
    features = net[:2](x).detach()
    inner = features.mT @ features / guide.model.noise.detach() ** 2 + 6 * multiplier(
        guide
    ).max() * torch.eye(6)
    kernel = features @ torch.linalg.solve(inner, features.mT)
    assert_close(
        covariance.reshape(30, 2, 30, 2),
        torch.einsum("nm,ab->namb", kernel, torch.eye(2)),
        rtol=1e-7,
        atol=1e-10,
    )
    first = draws.reshape(1000, 30, 2)[..., 0]
    spread = torch.cov(first.mT) - kernel
    assert float(spread.abs().max()) < 5 * float(kernel.diagonal().max()) * math.sqrt(2 / 1000)


def test_gradients_in_the_inputs() -> None:
    net, x_train, y = small_data()
    x = torch.randn(3, 2, requires_grad=True)
    # [120]
    guide = pyro_bnn.laplace(net, (x_train, y), likelihood="regression", structure="full")
    predictive = guide.predictive(x, differentiable=True)["obs"]
    (predictive.mean + predictive.stddev).sum().backward()  # an upper confidence bound; x.grad
    # [end 120]
    J, noise = jacobian(net, x_train), guide.model.noise.detach()
    covariance = torch.linalg.inv(J.mT @ J / noise**2 + (multiplier(guide) * fan_in_precision(net)).diag())

    def bound(x: Tensor) -> Tensor:
        rows = jacobian(net, x)
        return net(x).detach()[:, 0] + ((rows @ covariance * rows).sum(-1) + noise**2).sqrt()

    assert x.grad is not None
    for i in range(2):
        step = torch.zeros(2)
        step[i] = 1e-5
        slope = (bound(x.detach() + step) - bound(x.detach() - step)) / 2e-5
        assert_close(x.grad[:, i], slope, rtol=1e-5, atol=1e-8)


# ------------------------------------------------------------------ options that have other names


def test_other_options() -> None:
    net, x, y = small_data()
    counts = y.round().abs()
    # [options]
    decay = 1e-3  # of the mean negative log likelihood that the network was trained with
    prior = dist.Normal(0.0, (decay * len(x)) ** -0.5)  # then its weights are the mode
    guide = pyro_bnn.laplace(net, (x, counts), likelihood="poisson", prior=prior, tune=None)
    own = pyro_bnn.laplace(net, (x, y), likelihood=lambda f: dist.StudentT(4.0, f.squeeze(-1), 0.3))
    # [end options]
    J = jacobian(net, x)
    diagonal = pyro_bnn.laplace(
        net, (x, counts), likelihood="poisson", prior=prior, tune=None, structure="diagonal"
    )
    rate = net(x).detach().exp()
    assert_close(diagonal.precision, (rate * J.square()).sum(0) + decay * 24, rtol=1e-9)
    assert own.model.settings["likelihood"] == "<lambda>"
    assert len(guide.loc) == J.shape[1]
