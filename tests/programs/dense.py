# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
References by plain torch and plain Pyro handlers: densities by loops, curvature by dense autograd, Fisher matrices by
enumeration or quadrature over observations.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine import messenger as messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to

from tests.programs.program import Case


class NoReference(Exception):
    """Something that this module cannot compute."""


class Undefined(Exception):
    """There is no right answer: the operation must refuse."""


def is_observation(site: Any) -> bool:
    """Whether a site of a trace is data with a density that depends on parameters."""
    return (
        site["type"] == "sample"
        and site["is_observed"]
        and not isinstance(site["fn"], (_Subsample, dist.Delta))
        and not site["infer"].get("is_auxiliary")
        and not site["infer"].get("_deterministic")
    )


def is_latent(site: Any) -> bool:
    return site["type"] == "sample" and not site["is_observed"] and not isinstance(site["fn"], _Subsample)


def trace_at(case: Case, values: dict[str, Tensor], args: tuple[Any, ...] | None = None) -> Any:
    """One run of the model with its latents at given values."""
    model = poutine.condition(case.model, data=values)
    with poutine.block():
        return poutine.trace(model).get_trace(*(case.data if args is None else args))


def joint(case: Case, values: dict[str, Tensor]) -> Tensor:
    """The log joint density of all data."""
    return torch.as_tensor(trace_at(case, values).log_prob_sum())


class StartFlat(poutine.messenger.Messenger):
    """Sites without a density to draw from start at zero in unconstrained space."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if isinstance(fn, dist.ImproperUniform) and not msg["is_observed"] and not msg["done"]:
            shape = fn.batch_shape + fn.event_shape
            msg["value"], msg["done"] = biject_to(fn.support)(torch.zeros(shape)), True


def prototype(case: Case) -> Any:
    """One run of the model, with latents from their priors."""
    with poutine.block(), case.evaluation(), StartFlat():
        return poutine.trace(case.model).get_trace(*case.data)


def to_support(support: Any) -> Any:
    """The map from real numbers; discrete latents have none."""
    return td.transforms.identity_transform if support.is_discrete else biject_to(support)


class Space:
    """Latents of a model as one real vector, in the order of the trace."""

    def __init__(self, case: Case) -> None:
        trace = prototype(case)
        self.sites = {n: s for n, s in trace.nodes.items() if is_latent(s)}
        self.transforms = {n: to_support(s["fn"].support) for n, s in self.sites.items()}
        self.shapes = {n: self.transforms[n].inv(s["value"]).shape for n, s in self.sites.items()}
        self.dim = sum(s.numel() for s in self.shapes.values())
        self.observed = [n for n, s in trace.nodes.items() if is_observation(s)]

    def values(self, u: Tensor) -> dict[str, Tensor]:
        parts = u.split([s.numel() for s in self.shapes.values()])
        return {
            n: self.transforms[n](p.reshape(s)) for (n, s), p in zip(self.shapes.items(), parts, strict=True)
        }

    def jacobian(self, u: Tensor) -> Tensor:
        """Log determinant of the map to values."""
        parts = u.split([s.numel() for s in self.shapes.values()])
        total = u.new_zeros(())
        for (n, s), p in zip(self.shapes.items(), parts, strict=True):
            v = p.reshape(s)
            total = total + self.transforms[n].log_abs_det_jacobian(v, self.transforms[n](v)).sum()
        return total

    def places(self) -> dict[str, Tensor]:
        parts = torch.arange(self.dim).split([s.numel() for s in self.shapes.values()])
        return dict(zip(self.shapes, parts, strict=True))

    def start(self, spread: float) -> Tensor:
        """A point away from any special one."""
        generator = torch.Generator().manual_seed(5)
        u = torch.randn(self.dim, generator=generator, dtype=torch.float64) * spread
        return u.to(next(iter(self.sites.values()))["value"].dtype)


def negative_joint(case: Case, space: Space, u: Tensor) -> Tensor:
    trace = trace_at(case, space.values(u))
    return -(trace.log_prob_sum() + space.jacobian(u))


def hessian(fn: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """Row by row."""
    u = u.detach().clone().requires_grad_(True)
    value = fn(u)
    if not value.requires_grad:
        return torch.zeros(len(u), len(u), dtype=u.dtype)
    (gradient,) = torch.autograd.grad(value, u, create_graph=True, allow_unused=True)
    return jacobian(gradient, u) if gradient is not None else torch.zeros(len(u), len(u), dtype=u.dtype)


def jacobian(outputs: Tensor, u: Tensor) -> Tensor:
    """One backward pass per output."""
    rows = []
    for f in outputs.reshape(-1):
        row = torch.autograd.grad(f, u, retain_graph=True, allow_unused=True)[0] if f.requires_grad else None
        rows.append(torch.zeros_like(u) if row is None else row)
    return torch.stack(rows).detach() if rows else u.new_zeros(0, len(u))


def jacobian_wrt(outputs: Tensor, shift: Tensor) -> Tensor:
    """One backward pass per output, with respect to any tensor."""
    rows = []
    for f in outputs.reshape(-1):
        row = (
            torch.autograd.grad(f, shift, retain_graph=True, allow_unused=True)[0]
            if f.requires_grad
            else None
        )
        rows.append(torch.zeros_like(shift) if row is None else row)
    return torch.stack(rows).detach()


def log_prior(case: Case, space: Space, u: Tensor) -> Tensor:
    """Log density of the latents alone, in unconstrained space."""
    trace = trace_at(case, space.values(u))
    trace.compute_log_prob()
    total = space.jacobian(u)
    for name in space.sites:
        total = total + trace.nodes[name]["log_prob_sum"]
    return total


# ---------------------------------------------------------------- Fisher information

#: the parameters of a distribution that stand for it
PARAMETERS: dict[type, tuple[str, ...]] = {
    td.Normal: ("loc", "scale"),
    td.LogNormal: ("loc", "scale"),
    td.Laplace: ("loc", "scale"),
    td.StudentT: ("df", "loc", "scale"),
    td.Poisson: ("rate",),
    td.Gamma: ("concentration", "rate"),
    td.Beta: ("concentration1", "concentration0"),
    td.Bernoulli: ("logits",),
    td.Binomial: ("total_count", "logits"),
    td.NegativeBinomial: ("total_count", "logits"),
    td.Categorical: ("logits",),
    td.OneHotCategorical: ("logits",),
    td.MultivariateNormal: ("loc", "scale_tril"),
}


def plain(fn: Any, weight: Tensor) -> tuple[Any, Tensor]:
    """A distribution without its wrappers, and the weight of each of its elements."""
    while True:
        if isinstance(fn, MaskedDistribution):
            weight = weight * torch.as_tensor(fn._mask).to(weight)
            fn = fn.base_dist
        elif isinstance(fn, td.Independent):
            weight = weight.expand(torch.broadcast_shapes(weight.shape, fn.batch_shape))
            weight = weight.reshape(weight.shape + (1,) * fn.reinterpreted_batch_ndims)
            fn = fn.base_dist
        else:
            return fn, weight.expand(torch.broadcast_shapes(weight.shape, fn.batch_shape))


def family(fn: Any) -> tuple[type, tuple[str, ...]]:
    for cls, names in PARAMETERS.items():
        if isinstance(fn, cls):
            return cls, names
    raise NoReference(type(fn).__name__)


def quadrature(cls: type, d: Any) -> tuple[Tensor, Tensor]:
    """Observations and their weights, so that sums are expectations under d; shape (Q,) + batch (+ event)."""
    dtype = torch.float64
    if cls in (td.Bernoulli, td.Categorical, td.OneHotCategorical):
        y = d.enumerate_support()
        return y, d.log_prob(y).exp()
    if cls in (td.Poisson, td.NegativeBinomial, td.Binomial):
        top = 400 if cls is td.NegativeBinomial else 120
        if cls is td.Binomial:
            y = torch.arange(1.0 + float(d.total_count.max())).to(d.logits)
            y = y.reshape(-1, *[1] * len(d.batch_shape)).expand(-1, *d.batch_shape)
            inside = y <= d.total_count
            return torch.minimum(y, d.total_count), torch.where(
                inside, d.log_prob(torch.minimum(y, d.total_count)).exp(), 0
            )
        y = (
            torch.arange(float(top))
            .to(d.mean)
            .reshape(-1, *[1] * len(d.batch_shape))
            .expand(-1, *d.batch_shape)
        )
        return y, d.log_prob(y).exp()
    if cls in (td.Normal, td.LogNormal):
        t, w = (torch.as_tensor(a, dtype=dtype) for a in np.polynomial.hermite_e.hermegauss(8))
        t = t.reshape(-1, *[1] * len(d.batch_shape)).expand(-1, *d.batch_shape)
        w = (w / math.sqrt(2 * math.pi)).reshape(t.shape[:1] + (1,) * len(d.batch_shape)).expand_as(t)
        y = d.loc + d.scale * t
        return (y.exp() if cls is td.LogNormal else y), w
    if cls is td.MultivariateNormal:
        t, w = (torch.as_tensor(a, dtype=dtype) for a in np.polynomial.hermite_e.hermegauss(5))
        D = d.event_shape[0]
        grid = torch.cartesian_prod(*[t] * D).reshape(-1, D)
        weights = torch.cartesian_prod(*[w / w.sum()] * D).reshape(-1, D).prod(-1)
        lead = [1] * len(d.batch_shape)
        y = d.loc + (d.scale_tril @ grid.reshape(-1, *lead, D, 1)).squeeze(-1)
        return y, weights.reshape(-1, *lead).expand(y.shape[:-1])
    if cls is td.Laplace:
        t, w = (torch.as_tensor(a, dtype=dtype) for a in np.polynomial.laguerre.laggauss(12))
        t, w = torch.cat([t, -t]), torch.cat([w, w]) / 2
        t = t.reshape(-1, *[1] * len(d.batch_shape))
        return d.loc + d.scale * t, w.reshape(t.shape).expand(-1, *d.batch_shape)
    # by the trapezoidal rule on the real line, which converges exponentially for these
    t = torch.linspace(-36.0, 36.0, 1441, dtype=dtype).reshape(-1, *[1] * len(d.batch_shape))
    h = 0.05
    if cls is td.StudentT:
        y, slope = d.loc + d.scale * t.sinh(), d.scale * t.cosh()
    elif cls is td.Gamma:
        y = t.exp() * d.mean
        slope = y
    else:  # Beta
        y = t.sigmoid().clamp(1e-15, 1 - 1e-15)
        slope = y * (1 - y)
    weight = (d.log_prob(y) + slope.log()).exp() * h
    return y.expand(weight.shape), torch.nan_to_num(weight)


def information(cls: type, names: tuple[str, ...], d: Any) -> Tensor:
    """Fisher information in the parameters of one family by its definition, shape batch + (C, C)."""
    batch = d.batch_shape
    detached = {n: getattr(d, n).detach() for n in names}
    detached = {n: v.double() if v.is_floating_point() else v for n, v in detached.items()}
    detached = {n: v.expand(batch + v.shape[v.dim() - _event(cls, n) :]) for n, v in detached.items()}
    fixed = cls(**detached, **({"validate_args": False} if cls is not td.OneHotCategorical else {}))
    y, w = quadrature(cls, fixed)
    leaves = {
        n: v.expand(y.shape[:1] + v.shape).clone().requires_grad_(n != "total_count")
        for n, v in detached.items()
    }
    moved = cls(**leaves, validate_args=False)
    live = [n for n in names if leaves[n].requires_grad]
    grads = torch.autograd.grad(moved.log_prob(y).sum(), [leaves[n] for n in live], allow_unused=True)
    columns = []
    for n in names:
        g = dict(zip(live, grads, strict=True)).get(n)
        g = torch.zeros_like(leaves[n]) if g is None else g
        columns.append(g.reshape(y.shape[:1] + batch + (-1,)))
    score = torch.nan_to_num(torch.cat(columns, -1))
    return torch.einsum("q...i,q...j,q...->...ij", score, score, w)


def _event(cls: type, name: str) -> int:
    if cls in (td.Categorical, td.OneHotCategorical):
        return 1
    if cls is td.MultivariateNormal:
        return 1 if name == "loc" else 2
    return 0


def site_parameters(site: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters (elements, C) with their graph, Fisher information (elements, C, C), and weights (elements,)."""
    weight = torch.ones((), dtype=torch.get_default_dtype()) * torch.as_tensor(site["scale"])
    if site["mask"] is not None:
        weight = weight * torch.as_tensor(site["mask"]).to(weight)
    weight = weight.expand(torch.broadcast_shapes(weight.shape, site["fn"].batch_shape))
    fn, weight = plain(site["fn"], weight)
    cls, names = family(fn)
    batch = fn.batch_shape
    flat = []
    for n in names:
        v = getattr(fn, n)
        event = _event(cls, n)
        flat.append(v.expand(batch + v.shape[v.dim() - event :]).reshape(batch + (-1,)))
    F = information(cls, names, fn)
    C = F.shape[-1]
    phi = torch.cat([f.to(F.dtype) for f in flat], -1).reshape(-1, C)
    return phi, F.reshape(-1, C, C), weight.expand(batch).reshape(-1)


def factors(trace: Any) -> list[Any]:
    return [s for s in trace.nodes.values() if s["type"] == "sample" and isinstance(s["fn"], dist.Unit)]


def refuse_factors(trace: Any) -> None:
    """A factor that depends on latents has a Hessian, and no Fisher information."""
    trace.compute_log_prob()
    if any(torch.as_tensor(site["log_prob_sum"]).requires_grad for site in factors(trace)):
        raise Undefined("a factor has no Fisher information")


def ggn(case: Case, space: Space, u: Tensor) -> Tensor:
    """Gauss-Newton matrix of the likelihood, from Fisher matrices by definition."""
    u = u.detach().clone().requires_grad_(True)
    trace = trace_at(case, space.values(u))
    refuse_factors(trace)
    total = torch.zeros(space.dim, space.dim)
    for name in space.observed:
        site = trace.nodes[name]
        phi, F, weight = site_parameters(site)
        J = jacobian(phi, u).reshape(*phi.shape, -1).double()
        total += torch.einsum("nci,ncd,ndj,n->ij", J, F, J, weight.double().detach())
    return total


def empirical(case: Case, space: Space, u: Tensor) -> Tensor:
    """Sum over examples of outer products of gradients of their log density."""
    u = u.detach().clone().requires_grad_(True)
    trace = trace_at(case, space.values(u))
    refuse_factors(trace)
    total = torch.zeros(space.dim, space.dim)
    for name in space.observed:
        site = trace.nodes[name]
        log_prob = site["fn"].log_prob(site["value"])
        weight = torch.ones(log_prob.shape) * torch.as_tensor(site["scale"])
        if site["mask"] is not None:
            weight = weight * site["mask"]
        J = jacobian(log_prob, u).double()
        total += J.mT @ (J * weight.reshape(-1, 1))
    return total


def elements(site: Any) -> Tensor:
    """Which elements of an observation count, in its shape."""
    shape = site["value"].shape
    mask = torch.ones(shape, dtype=torch.bool)
    if site["mask"] is not None:
        mask = mask & spread(torch.as_tensor(site["mask"]), site["fn"], shape)
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        if isinstance(fn, MaskedDistribution):
            mask = mask & spread(torch.as_tensor(fn._mask), fn, shape)
        fn = fn.base_dist
    return mask


def spread(mask: Tensor, fn: Any, shape: torch.Size) -> Tensor:
    """A mask over the batch of a distribution, over the whole of its values."""
    mask = mask.expand(torch.broadcast_shapes(mask.shape, fn.batch_shape))
    return mask.reshape(mask.shape + (1,) * len(fn.event_shape)).expand(shape)


def pointwise(site: Any) -> tuple[Tensor, Tensor]:
    """Log density of each observation without scales, and which of them count."""
    value = site["fn"].log_prob(site["value"])
    mask = elements(site)
    return value.detach(), mask.flatten(value.dim()).any(-1) if mask.dim() > value.dim() else mask


def moments(fn: Any) -> tuple[Tensor | None, Tensor | None]:
    """Mean and variance of an observation; probabilities of classes for labels."""
    base = fn
    while isinstance(base, (td.Independent, MaskedDistribution)):
        base = base.base_dist
    if isinstance(base, td.Categorical):
        probs = base.logits.softmax(-1)
        return probs, probs * (1 - probs)
    try:
        return fn.mean.detach(), fn.variance.detach()
    except (NotImplementedError, AttributeError):
        return None, None


def newton(case: Case, space: Space, steps: int = 100) -> Tensor:
    """A minimum of the negative log joint, by damped Newton steps with the dense Hessian."""

    def fn(v: Tensor) -> Tensor:
        return negative_joint(case, space, v)

    def value_and_gradient(v: Tensor) -> tuple[float, Tensor]:
        v = v.detach().clone().requires_grad_(True)
        try:
            f = fn(v)
        except ValueError:  # a parameter has overflowed
            return math.inf, v.detach()
        g = torch.autograd.grad(f, v)[0]
        return float(f), g.detach()

    u, damping = space.start(case.spread), 1e-2
    value, gradient = value_and_gradient(u)
    H = hessian(fn, u)
    for _ in range(steps):
        if not bool(torch.isfinite(H).all()):
            raise NoReference("Newton steps find no maximum of the log joint density")
        values, vectors = torch.linalg.eigh(H)
        step = -vectors @ ((vectors.mT @ gradient) / (values.abs() + damping))
        new, new_gradient = value_and_gradient(u + step)
        if math.isfinite(new) and new <= value + 1e-12 * abs(value):
            u, value, gradient = u + step, new, new_gradient
            damping = damping * 0.2 if damping > 1e-8 else 0.0
            if float(gradient.norm()) < 1e-9 * (1 + abs(value)):
                break
            H = hessian(fn, u)
        else:
            damping = max(damping, 1e-6) * 5
            if damping > 1e8:
                break
    return u.detach()


def components(case: Case, draws: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Values of each draw."""
    for s in range(len(next(iter(draws.values())))):
        yield {n: v[s] for n, v in draws.items()}


__all__ = [n for n in dir() if not n.startswith("_")]
