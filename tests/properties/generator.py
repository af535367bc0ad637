# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Random programs: models assembled from plates, priors, predictors, likelihoods, masks, scales, factors and containers."""

import random
from collections import namedtuple
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, TypeVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_bnn.nn import bayesian_
from tests.programs.program import Case, Program

T = TypeVar("T")
#: chooses one of several options
Choose = Callable[[str, Sequence[Any]], Any]

Pair = namedtuple("Pair", "x rest")

#: what may be chosen; the first option is the plainest, options that stand twice are more likely
OPTIONS: dict[str, Sequence[Any]] = {
    "rows": (4, 5, 6, 7, 9, 3, 2, 70),
    "features": (2, 3, 1),
    "predictor": ("sum", "sum", "network", "network", "product", "in place", "nonlinear"),
    "prior": ("normal", "normal", "correlated", "gamma", "hierarchical", "laplace", "plate"),
    "intercept": (True, False),
    "effects": (False, False, False, True),
    "likelihood": (
        "normal", "normal", "vector", "latent scale", "bernoulli", "poisson", "categorical", "gamma", "student", "multivariate",
    ),
    "plate": ("length", "length", "length", "full", "index", "none"),
    "other_plate": ("none", "none", "none", "left", "right"),
    "mask": ("none", "none", "none", "rows", "distribution", "elements", "latents"),
    "scale": ("none", "none", "none", "constant", "rows", "model", "latents"),
    "factor": ("none", "none", "none", "none", "constant", "penalty", "rows"),
    "container": ("none", "none", "dictionary", "list", "tuple", "named tuple"),
    "table": ("none", "none", "none", "other rows", "same rows", "level", "covariates"),
    "constant": ("none", "none", "vector", "matrix"),
    "local": (False, False, False, False, False, True),
    "deterministic": (False, False, True),
    "dtype": ("float64", "float64", "float64", "float32"),
    "missing": (False, False, False, False, False, False, True),
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """The choices that make a program."""

    rows: int
    features: int
    predictor: str
    prior: str
    intercept: bool
    effects: bool
    likelihood: str
    plate: str
    other_plate: str
    mask: str
    scale: str
    factor: str
    container: str
    table: str
    constant: str
    local: bool
    deterministic: bool
    dtype: str
    missing: bool
    cuts: tuple[int, ...]
    seed: int

    def __str__(self) -> str:
        """The choices that are not the plainest ones."""
        odd = {k: getattr(self, k) for k in OPTIONS if getattr(self, k) != OPTIONS[k][0]}
        return ", ".join(f"{k}={v}" for k, v in (odd | {"cuts": self.cuts}).items())


def draw_spec(choose: Choose) -> Spec:
    """One set of choices."""
    found = {name: choose(name, options) for name, options in OPTIONS.items()}
    rows = found["rows"]
    if found["likelihood"] in ("bernoulli", "poisson", "categorical"):
        found["missing"] = False  # missing values would be discrete latents
    cuts = [choose(f"cut {i}", range(1, rows + 1)) for i in range(3)]
    return Spec(**found, cuts=tuple(cuts), seed=choose("seed", range(10_000)))


def spec_of_seed(seed: int) -> Spec:
    """The random program of a number."""
    generator = random.Random(seed)
    return draw_spec(lambda name, options: generator.choice(options))


def program_of(spec: Spec) -> Program:
    return Program(f"random {spec.seed}", "random", lambda: build(spec))


# ---------------------------------------------------------------- building


class Model:
    """The model of a set of choices: called with its arguments by position, in the order of ``names``."""

    def __init__(self, spec: Spec, names: list[str], net: nn.Module | None) -> None:
        self.spec, self.names, self.net = spec, names, net

    def __call__(self, *args: Any) -> Any:
        s = self.spec
        held = self.unpacked(args)
        with ExitStack() as stack:
            if s.scale == "model":
                stack.enter_context(poutine.scale(scale=0.7))
            return self.run(held)

    def unpacked(self, args: tuple[Any, ...]) -> dict[str, Any]:
        held: dict[str, Any] = dict.fromkeys(("y", "other_y", "level"))
        held |= dict(zip(self.names, args, strict=False))
        box = held.pop("box", None)
        if box is not None:
            if isinstance(box, dict):
                held |= box
            else:
                x, rest = box
                held |= {"x": x} | dict(zip(box_names(self.spec)[1:], rest, strict=True))
        return held

    # ------------------------------------------------------------ latents

    def weights(self) -> Tensor:
        s, D = self.spec, self.spec.features
        zeros = torch.zeros(D, dtype=kind(s))
        if s.prior == "normal":
            return pyro.sample("w", dist.Normal(zeros, 1.0).to_event(1))
        if s.prior == "laplace":
            return pyro.sample("w", dist.StudentT(5.0, zeros, 1.0).to_event(1))
        if s.prior == "correlated":
            L = torch.eye(D, dtype=kind(s)) + 0.4 * torch.ones(D, D, dtype=kind(s)).tril(-1)
            return pyro.sample("w", dist.MultivariateNormal(zeros, scale_tril=L))
        if s.prior == "gamma":
            return pyro.sample("w", dist.Gamma(zeros + 2.0, 2.0).to_event(1))
        if s.prior == "hierarchical":
            tau = pyro.sample("tau", dist.LogNormal(zeros[0], 0.3))
            return pyro.sample("w", dist.Normal(zeros, tau.unsqueeze(-1)).to_event(1))
        with pyro.plate("features", D, dim=-1):
            return pyro.sample("w", dist.Normal(zeros[0], 1.0))

    def predict(self, held: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The linear predictor, with the rows in the last dimension, or in the last but one."""
        s, x = self.spec, held["x"]
        if s.constant != "none":
            x = (
                x * held["constant"]
                if s.constant == "vector"
                else x + (held["constant"] @ x) * 0.0 + held["constant"].mean()
            )
        right = s.other_plate == "right" and s.plate != "none"
        w = None
        if s.predictor == "network":
            assert self.net is not None
            f = self.net(x).squeeze(-1)
            f = f.unsqueeze(-1) if right else f
        else:
            w = self.weights()
            x = x.unsqueeze(-2) if right else x
            if s.predictor == "product":
                f = x @ w
            else:
                f = (x * (w.unsqueeze(-2) if s.prior == "plate" and w.dim() > 1 else w)).sum(-1)
        if s.predictor == "in place":
            f *= 1.5
            f += 0.2
        if s.predictor == "nonlinear":
            f = f.tanh() * 1.5
        return f, w

    # ------------------------------------------------------------ the whole

    def run(self, held: dict[str, Any]) -> Any:
        s = self.spec
        right = s.other_plate == "right" and s.plate != "none"
        with ExitStack() as stack:
            if s.scale == "latents":
                stack.enter_context(poutine.scale(scale=0.4))
            if s.mask == "latents" and s.intercept:
                stack.enter_context(poutine.mask(mask=torch.tensor(True)))
            f, w = self.predict(held)
            if s.intercept:
                f = f + pyro.sample("b", dist.Normal(torch.zeros((), dtype=kind(s)), 0.5))
        if s.effects or s.table == "covariates":
            mean = torch.zeros((), dtype=kind(s))
            if s.table == "covariates":
                mean = held["covariates"] * 0.5
            with pyro.plate("groups", 3, dim=-1):
                effect = pyro.sample("effect", dist.Normal(mean, 0.7))
            effect = effect[..., held["group"]]
            f = f + (effect.unsqueeze(-1) if right else effect)
        sigma: Any = 0.6
        if s.likelihood == "latent scale":
            sigma = pyro.sample("sigma", dist.LogNormal(torch.full((), -0.5, dtype=kind(s)), 0.4))
        if s.factor == "constant":
            pyro.factor("constant", torch.tensor(1.5, dtype=kind(s)))
        if s.factor == "penalty" and w is not None:
            pyro.factor("penalty", -0.7 * w.square().sum(-1))
        if s.table == "level":
            pyro.sample(
                "level",
                dist.Normal(torch.zeros((), dtype=kind(s)) if w is None else w[..., 0], 1.0),
                obs=held["level"],
            )
        self.second_table(held, w)
        return self.observe(held, f, sigma)

    def second_table(self, held: dict[str, Any], w: Tensor | None) -> None:
        if self.spec.table in ("other rows", "same rows"):
            z = held["z"]
            slope = pyro.sample("slope", dist.Normal(torch.zeros((), dtype=kind(self.spec)), 0.5))
            with pyro.plate("others", len(z), dim=-1):
                pyro.sample("other", dist.Poisson((slope * z).exp()), obs=held["other_y"])

    def observe(self, held: dict[str, Any], f: Tensor, sigma: Any) -> Any:
        s, y = self.spec, held["y"]
        N = len(held["x"])
        if s.plate == "none":
            return pyro.sample("obs", self.likelihood(f, sigma, held).to_event(1), obs=y)
        right = s.other_plate == "right"
        dim = -2 if right else -1
        if s.plate == "length":
            data = pyro.plate("data", N, dim=dim)
        elif s.plate == "full":
            data = pyro.plate("data", s.rows, subsample_size=N, dim=dim)
        else:
            data = pyro.plate("data", s.rows, subsample=held["index"], dim=dim)
        with ExitStack() as stack:
            if s.other_plate != "none":
                other = pyro.plate("sensors", 2, dim=-1 if right else -2)
                stack.enter_context(other)
            stack.enter_context(data)
            if s.local:
                f = f + pyro.sample("local", dist.Normal(torch.zeros((), dtype=kind(s)), 0.4))
            if s.deterministic:
                f = pyro.deterministic("f", f)
            if s.factor == "rows":
                pyro.factor("smooth", -0.2 * f.square())
            if s.scale == "constant":
                stack.enter_context(poutine.scale(scale=2.5))
            if s.scale == "rows":
                weight = held["weight"]
                stack.enter_context(poutine.scale(scale=weight.unsqueeze(-1) if right else weight))
            if s.mask == "rows":
                seen = held["seen"]
                stack.enter_context(poutine.mask(mask=seen.unsqueeze(-1) if right else seen))
            options = {}
            if s.missing:
                seen = held["seen"]
                options = {"obs_mask": (seen.unsqueeze(-1) if right else seen).expand(self.batch_shape(N))}
            return pyro.sample("obs", self.likelihood(f, sigma, held), obs=y, **options)

    def batch_shape(self, N: int) -> tuple[int, ...]:
        return {"none": (N,), "left": (2, N), "right": (N, 2)}[self.spec.other_plate]

    def likelihood(self, f: Tensor, sigma: Any, held: dict[str, Any]) -> Any:
        s = self.spec
        right = s.other_plate == "right" and s.plate != "none"
        seen = held.get("seen")
        if seen is not None and right:
            seen = seen.unsqueeze(-1)
        two = torch.tensor([1.0, -0.5], dtype=f.dtype)
        d: Any
        if s.likelihood == "vector":
            d = dist.Normal(f.unsqueeze(-1) * two, 0.6)
            if s.mask == "elements" and seen is not None:
                d = d.mask(torch.stack([seen, ~seen], -1))
            return d.to_event(1)
        if s.likelihood == "multivariate":
            L = torch.tensor([[0.6, 0.0], [0.2, 0.5]], dtype=f.dtype)
            d = dist.MultivariateNormal(f.unsqueeze(-1) * two, scale_tril=L)
        elif s.likelihood == "bernoulli":
            d = dist.Bernoulli(logits=f)
        elif s.likelihood == "poisson":
            d = dist.Poisson((0.5 * f).exp())
        elif s.likelihood == "categorical":
            d = dist.Categorical(logits=f.unsqueeze(-1) * torch.tensor([0.0, 1.0, -1.0], dtype=f.dtype))
        elif s.likelihood == "gamma":
            d = dist.Gamma(torch.tensor(2.0, dtype=f.dtype), (0.5 * f).exp())
        elif s.likelihood == "student":
            d = dist.StudentT(torch.tensor(4.0, dtype=f.dtype), f, 0.6)
        else:
            d = dist.Normal(f, sigma)
        return d.mask(seen) if s.mask == "distribution" and seen is not None else d


def kind(spec: Spec) -> torch.dtype:
    return getattr(torch, spec.dtype)


def box_names(spec: Spec) -> list[str]:
    """Arguments that a container holds."""
    names = ["x"]
    if spec.effects or spec.table == "covariates":
        names.append("group")
    if spec.scale == "rows":
        names.append("weight")
    if spec.mask in ("rows", "distribution", "elements") or spec.missing:
        names.append("seen")
    return names


def observations(spec: Spec, shape: tuple[int, ...]) -> Tensor:
    if spec.likelihood in ("vector", "multivariate"):
        return torch.randn(*shape, 2)
    if spec.likelihood == "bernoulli":
        return torch.randint(0, 2, shape).double()
    if spec.likelihood == "poisson":
        return torch.randint(0, 4, shape).double()
    if spec.likelihood == "categorical":
        return torch.randint(0, 3, shape)
    if spec.likelihood == "gamma":
        return torch.rand(shape) + 0.2
    return torch.randn(shape)


def build(spec: Spec) -> Case:
    """The program of a set of choices."""
    s = spec
    torch.manual_seed(s.seed)
    N, D = s.rows, s.features
    held: dict[str, tuple[Any, int | None]] = {}
    if s.constant == "vector":
        held["constant"] = torch.rand(D) + 0.5, None
    if s.constant == "matrix":
        held["constant"] = 0.1 * torch.randn(N, N), None
    if s.table == "covariates":
        held["covariates"] = torch.randn(3), None
    box = {
        "x": torch.randn(N, D),
        "group": torch.arange(N) % 3,
        "weight": torch.rand(N) + 0.5,
        "seen": torch.arange(N) % 3 > 0,
    }
    chosen = {name: box[name] for name in box_names(s)}
    if s.container == "none":
        held |= {name: (value, 0) for name, value in chosen.items()}
    if s.plate == "index":
        held["index"] = torch.arange(N), 0
    second = s.table in ("other rows", "same rows")
    M = N if s.table == "same rows" else N + 2
    if second:
        held["z"] = torch.randn(M), 0 if s.table == "same rows" else None
    shape = (N,) if s.plate == "none" else {"none": (N,), "left": (2, N), "right": (N, 2)}[s.other_plate]
    after: dict[str, tuple[Any, int | None]] = {
        "y": (
            observations(s, shape),
            1 if (len(shape) > 1 and shape[0] != N) or (s.other_plate == "left" and s.plate != "none") else 0,
        )
    }
    if second:
        after["other_y"] = torch.randint(0, 3, (M,)).double(), 0 if s.table == "same rows" else None
    if s.table == "level":
        after["level"] = torch.tensor(0.4), None
    everything = {
        n: (v.to(kind(s)) if v.is_floating_point() else v, d) for n, (v, d) in (held | after).items()
    }
    chosen = {n: v.to(kind(s)) if v.is_floating_point() else v for n, v in chosen.items()}
    net = None
    if s.predictor == "network":
        net = bayesian_(nn.Sequential(nn.Linear(D, 2), nn.Tanh(), nn.Linear(2, 1)).to(kind(s)))
    boxed = s.container != "none"
    names = [*(["box"] if boxed else []), *everything]

    def arguments(at: Tensor | None) -> tuple[Any, ...]:
        def cut(v: Any, d: int | None) -> Any:
            return v if at is None or d is None else v.index_select(d, at)

        args = [cut(v, d) for v, d in everything.values()]
        return (wrap(s, {n: cut(v, 0) for n, v in chosen.items()}), *args) if boxed else tuple(args)

    splits = s.table != "other rows" and s.constant != "matrix" and s.plate != "none"
    case = Case(
        Model(s, names, net), arguments(None), len(names) - len(after), size=N, net=net,
        take=arguments if splits else None, separate=splits, guide_rows=(s.local and s.plate != "none") or s.missing,
        digits=1e-8 if s.dtype == "float64" else 1e-4,
        split=split(s),
    )  # fmt: skip
    return case


def wrap(spec: Spec, values: dict[str, Tensor]) -> Any:
    """Arguments in a container."""
    x, *rest = values.values()
    if spec.container == "dictionary":
        return dict(values)
    if spec.container == "list":
        return [x, rest]
    if spec.container == "named tuple":
        return Pair(x, tuple(rest))
    return (x, tuple(rest))


def split(spec: Spec) -> list[Tensor]:
    """A partition of the rows into batches."""
    ends = sorted({0, *spec.cuts, spec.rows})
    return [torch.arange(start, end) for start, end in pairwise(ends)]


__all__ = ["OPTIONS", "Spec", "build", "draw_spec", "fields", "program_of", "spec_of_seed"]
