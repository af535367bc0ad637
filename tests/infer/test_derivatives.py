# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Where autograd's derivatives are not those of the function a warning says so, and nowhere else."""

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bnn.curvature.parts import NotAMinimumError
from pyro_bnn.infer import NonFiniteLossError, fit, hfl, posterior_predictive
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.model.derivatives import mismatch
from pyro_bnn.nn import bayesian_
from pyro_bnn.ops.notice import CurvatureWarning
from tests.common import assert_close

GRADIENT = "autograd's gradient of the likelihood"
SECOND = "autograd's second derivatives"


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(8, generator=generator, dtype=torch.float64).to(dtype)


def regression(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., None]:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        mean = f(x, w)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    return model


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return -0.3 * g


def hooked(x: Tensor, w: Tensor) -> Tensor:
    h = x @ w
    if h.requires_grad:
        h.register_hook(lambda g: 0.5 * g)
    return h


def quantized(x: Tensor, w: Tensor) -> Tensor:
    return x @ (w + ((w * 4).round() / 4 - w).detach())


#: A function, and by how much autograd is off: 1 - ratio of the slopes, where it is the same in all directions.
WRONG: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float | None]] = {
    "detached part": (lambda x, w: 0.5 * (x @ w) + 0.5 * (x @ w.detach()), 50),
    "hook": (hooked, 50),
    "reversed": (lambda x, w: Reversed.apply(x @ w), 130),
    "straight through": (quantized, 100),
    "half detached": (lambda x, w: x @ w + (x @ w.detach()).tanh(), None),
}
RIGHT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: x @ w,
    "relu": lambda x, w: F.relu(x @ w),
    "kinks at the point": lambda x, w: F.relu(x[:, :1] * w).sum(-1) + (x @ w).abs(),
    "steps": lambda x, w: x @ w + (x @ w > 0.1).to(x),
    "wild": lambda x, w: (1e3 * (x @ w)).sin(),
    "wilder": lambda x, w: (1e7 * (x @ w)).sin(),
    "far off": lambda x, w: x @ w + 1e4,
    "bounded": lambda x, w: (x @ w).clamp(-0.5, 0.5),
    "norm": lambda x, w: x @ (w / w.norm().clamp(min=1e-9)),
}


def told(run: Callable[[], Any]) -> list[str]:
    """What a run says about derivatives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [
        str(w.message) for w in caught if w.category is CurvatureWarning and "autograd's" in str(w.message)
    ]


def guide_at(f: Callable[[Tensor, Tensor], Tensor], at: float, dtype: Any, curvature: Any = "ggn") -> Any:
    x, y = data(dtype)
    guide = AutoLaplace(regression(f), curvature=curvature).initialize(x, y)
    with torch.no_grad():
        guide.loc.copy_(torch.tensor([at, -2 * at / 3]))
    return guide


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", WRONG)
def test_a_gradient_that_is_no_derivative_is_named(name: str, dtype: torch.dtype) -> None:
    f, percent = WRONG[name]
    if name == "straight through" and dtype == torch.float32:
        pytest.skip("its steps are not far wider than those of single precision")
    guide = guide_at(f, 0.3, dtype)
    (text,) = told(lambda: guide.laplace_approximation(data(dtype), map_tolerance=1e9))
    assert text.startswith(f"{GRADIENT} in 'w' differs by ")
    if percent is not None:
        # the error relative to the larger of the two slopes
        found = float(text.split(" differs by ")[1].split(" %")[0])
        assert abs(found - percent) < 1


@pytest.mark.parametrize("at", [0.0, 0.3, 1e-7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", RIGHT)
def test_there_are_no_false_alarms(name: str, dtype: torch.dtype, at: float) -> None:
    guide = guide_at(RIGHT[name], at, dtype)
    has_hessian = (name, at) != ("norm", 0.0)  # a norm bends without limit at zero
    assert not told(lambda: guide.packed.require_function(guide.loc, data(dtype), hessian=has_hessian))


def test_a_slope_that_is_right_or_not_certain() -> None:
    eps = 2.0**-52
    assert mismatch(lambda t: 3 * t + t**3, 3.0, eps) == 0
    assert abs(mismatch(lambda t: 3 * t + t**3, 2.0, eps) - 1 / 3) < 1e-6
    assert mismatch(lambda t: abs(t), 1.0, eps) == 0  # a kink
    assert mismatch(lambda t: float(t > 0), 0.0, eps) == 0  # a jump
    assert mismatch(lambda t: 1e9 + t, 2.0, eps) == 0 or mismatch(lambda t: 1e9 + t, 2.0, eps) > 0.3
    assert mismatch(lambda t: float("nan"), 2.0, eps) == 0


def test_a_hook_of_a_module_is_found_and_its_absence_is_not() -> None:
    x, y = data()
    net = bayesian_(
        nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double(), prior=dist.Normal(0.0, 1.0)
    )

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    def run() -> None:
        AutoLaplace(model).initialize(x, y).laplace_approximation((x, y), map_tolerance=1e9)

    assert not told(run)
    net[1].register_full_backward_hook(lambda module, gi, go: (gi[0] * 0.2,))
    (text,) = told(run)
    assert text.startswith(f"{GRADIENT} in '0.weight', '0.bias' differs by ")


@pytest.mark.parametrize("bag", [False, True])
def test_gradients_by_frequency_are_refused(bag: bool) -> None:
    index, (_, y) = torch.tensor([0, 0, 0, 1, 1, 2, 2, 1]), data()

    def model(index: Tensor, y: Tensor | None = None) -> None:
        table = pyro.sample("table", dist.Normal(torch.zeros(3, 1, dtype=torch.float64), 1.0).to_event(2))
        if bag:
            f = F.embedding_bag(index[:, None], table, scale_grad_by_freq=True).squeeze(-1)
        else:
            f = F.embedding(index, table, scale_grad_by_freq=True).squeeze(-1)
        with pyro.plate("data", len(index)):
            pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

    guide = AutoLaplace(model).initialize(index, y)
    for call in (guide.polish, guide.laplace_approximation):
        with pytest.raises(ValueError, match="scale_grad_by_freq=True divides the gradients"):
            call(index, y)
    with pytest.raises(ValueError, match="has scale_grad_by_freq=True"):
        bayesian_(nn.Sequential(nn.Embedding(3, 1, scale_grad_by_freq=True)))


def weight_normed(norm: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        v = pyro.sample("v", dist.Normal(x.new_full((2, 2), 0.5), 0.3).to_event(2))
        mean = torch.tanh(x @ norm(v).mT).sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    return model


_g = torch.tensor([[1.0], [0.7]], dtype=torch.float64)
by_torch = weight_normed(lambda v: torch._weight_norm(v, _g, 0))
written_out = weight_normed(lambda v: _g * v / v.norm(dim=1, keepdim=True))


def _second_derivative_is_wrong() -> bool:
    v = torch.tensor([[0.6, -0.2], [0.4, 0.5]], dtype=torch.float64, requires_grad=True)
    values = []
    for norm in (lambda v: torch._weight_norm(v, _g, 0), lambda v: _g * v / v.norm(dim=1, keepdim=True)):
        (g,) = torch.autograd.grad(norm(v).tanh().sum(), v, create_graph=True)
        values.append(torch.autograd.grad(g[0, 0] + 2 * g[0, 1], v)[0])
    return not torch.allclose(*values)


@pytest.mark.parametrize("way", ["laplace", "hfl"])
def test_a_wrong_second_derivative_is_named(way: str) -> None:
    if not _second_derivative_is_wrong():
        pytest.skip("torch has mended its weight_norm")
    x, y = data()
    guides = {}
    for name, model in (("by_torch", by_torch), ("written_out", written_out)):
        guides[name] = AutoLaplace(model, curvature="hessian").initialize(x, y)
        with torch.no_grad():
            guides[name].loc.copy_(torch.tensor([0.6, -0.2, 0.4, 0.5]))

    def run(name: str) -> None:
        if way == "hfl":
            hfl.solve(guides[name], (x, y), functional=lambda z: z["v"].flatten(), curvature="hessian", proximal=100.0)  # fmt: skip
        else:
            guides[name].packed.require_function(guides[name].loc, (x, y), hessian=True)

    (text,) = told(lambda: run("by_torch"))
    assert text.startswith(f"{SECOND} of the likelihood differ by")
    assert not told(lambda: run("written_out"))
    assert not told(lambda: guides["by_torch"].packed.require_function(guides["by_torch"].loc, (x, y)))


def test_the_hessian_of_right_derivatives_is_silent_and_right() -> None:
    guide = guide_at(lambda x, w: x @ w, 0.3, torch.float64, "hessian")
    x, y = data()
    assert not told(lambda: guide.laplace_approximation((x, y), map_tolerance=1e9))
    assert_close(torch.linalg.inv(guide.posterior.covariance_matrix), torch.eye(2) + x.mT @ x / 0.25)


def _distances(x: Tensor, w: Tensor) -> Tensor:
    return (x * w).square().sum(-1).sqrt()


@pytest.mark.parametrize(
    ("way", "row"),
    [
        *((way, 3) for way in ("polish", "ggn", "hessian", "hfl")),
        *((way, 150) for way in ("polish", "ggn", "hfl")),
    ],
)
def test_a_gradient_that_is_not_finite_is_named(way: str, row: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    x[row] = 0  # the root of zero has no slope
    guide = AutoLaplace(regression(_distances), curvature="hessian" if way == "hessian" else "ggn")
    guide.initialize(x, x[:, 0])
    run: dict[str, Callable[[], Any]] = {
        "polish": lambda: guide.polish((x, x[:, 0])),
        "hfl": lambda: hfl.solve(guide, (x, x[:, 0]), (x,)),
    }
    with pytest.raises(ValueError, match="2 of 2 entries of the gradient of the"):
        run.get(way, lambda: guide.laplace_approximation((x, x[:, 0])))()


def test_a_second_derivative_that_is_not_finite_is_named() -> None:
    x, y = data()
    guide = guide_at(lambda x, w: x @ w.abs() ** 1.5, 0.0, torch.float64, "hessian")
    with pytest.raises(ValueError, match=r"2 of 2 entries of the second derivative .* 'w'"):
        guide.laplace_approximation((x, y))


@pytest.mark.parametrize("structure", ["full", "diagonal", "low_rank"])
def test_a_hessian_that_is_not_finite_far_into_the_data_is_no_minimum(structure: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    x[150] = 0
    guide = AutoLaplace(regression(_distances), structure=structure, curvature="hessian").initialize(
        x, x[:, 0]
    )
    with pytest.raises(NotAMinimumError, match="non-finite entries"):
        guide.laplace_approximation((x, x[:, 0]))


@pytest.mark.parametrize("way", ["predictive", "functional_samples", "posterior_predictive"])
def test_a_prediction_without_a_finite_derivative_is_refused(way: str) -> None:
    x, y = data()
    guide = guide_at(_distances, 0.3, torch.float64)
    guide.laplace_approximation((x, y), map_tolerance=1e9)
    new = torch.cat([x, x.new_zeros(1, 2)])
    ask: dict[str, Callable[[], Any]] = {
        "predictive": lambda: guide.predictive(new),
        "functional_samples": lambda: guide.functional_samples(2, new),
        "posterior_predictive": lambda: posterior_predictive(guide.model, guide, (new,), num_samples=3),
    }
    with pytest.raises(ValueError, match="site 'obs': its parameters have no finite derivative"):
        ask[way]()


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_training_names_a_gradient_that_is_not_finite() -> None:
    x, y = data()
    x[3] = 0
    with pytest.raises(
        NonFiniteLossError, match=r"at step 2: parameters .* its gradient was not, although its loss was"
    ):
        fit(
            regression(_distances),
            AutoLaplace(regression(_distances)),
            (x, y),
            num_steps=3,
            progress_bar=False,
        )
