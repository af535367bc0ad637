# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Whether autograd's derivatives of a model are those of the function that it computes.

They are not where a part of a path is detached, where hooks or straight-through estimators change gradients, and where a
derivative in torch is wrong. A scalar :math:`\phi(t)` along a random direction is compared with its slope at zero. A
difference counts only where central differences at two step sizes, and the differences to the left and to the right,
agree much better with each other than with the slope: at kinks, jumps and within rounding errors nothing is said.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_bnn.model.data import Batch
from pyro_bnn.model.handlers import subsample_scale, unscaled_log_prob
from pyro_bnn.ops.jacobian import wide
from pyro_bnn.ops.notice import CurvatureWarning, warn_user

#: How many directions must tell of the same mismatch.
_DIRECTIONS = 3


def mismatch(phi: Callable[[float], float], slope: float, eps: float) -> float:
    """
    The relative error of the alleged slope of a function at zero, zero where it is not certain; ``eps`` is the relative
    precision of its values.
    """
    step = eps ** (1 / 3)
    up, down = phi(step), phi(-step)
    coarse = (up - down) / (2 * step)
    size = max(abs(coarse), abs(slope))
    apart = abs(coarse - slope)
    rounding = 30 * eps * max(abs(up), abs(down)) / step
    if not apart > max(30 * step**2, 1e-3) * size + rounding:  # also where something is not finite
        return 0.0
    here, high, low = phi(0.0), phi(step / 4), phi(-step / 4)
    fine = 2 * (high - low) / step
    sides = 4 * (high + low - 2 * here) / step
    apart = min(apart, abs(fine - slope))
    # a function that varies within a step has differences that are far from its slope, and from each other
    resolved = min(apart, max(abs(coarse), abs(fine)) + rounding)
    certain = max(abs(coarse - fine), abs(sides)) < 0.1 * resolved
    return apart / size if certain else 0.0


class _Embeddings(TorchFunctionMode):
    """Refuses look-ups whose gradients are divided by counts."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("embedding", "embedding_bag") and _by_frequency(func, args, kwargs):
            tables = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.requires_grad]
            if tables:
                raise ValueError(
                    f"{name} with scale_grad_by_freq=True divides the gradients of the table by counts in the batch, so that "
                    "they are derivatives of no function: leave it out."
                )
        return func(*args, **kwargs)


def _by_frequency(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a look-up has that option, by name or in its place."""
    at = 5 if func.__module__ == "torch.nn.functional" else 3
    return bool(kwargs.get("scale_grad_by_freq", len(args) > at and args[at]))


class Probe:
    """
    A random combination of a model's log densities on one batch, at a packed vector of shape ``(p,)`` and near it. The run at
    the vector itself, which this makes, serves all that is asked there.

    :ivar log_likelihood: the log likelihood.
    :ivar leaf: the vector, in which ``gradient`` can be differentiated again if ``hessian``.
    :ivar gradient: that of the combination, shape ``(p,)``.
    :ivar unreached: the latent sites from which no path leads to the likelihood.
    """

    def __init__(self, model: Any, latent: Tensor, batch: Batch, *, hessian: bool = False) -> None:
        self.model, self.latent, self.batch, self.hessian = model, latent.detach(), batch, hessian
        self.eps = torch.finfo(latent.dtype).eps
        self.generator = torch.Generator().manual_seed(0)
        self._noise: dict[str, Tensor] = {}
        self.leaf = self.latent.clone().requires_grad_(True)
        sites = model.space.unpack(self.leaf)
        with _Embeddings():
            trace = model.trace(self.leaf, batch, sites)
        self.log_likelihood = float(model.log_likelihood(trace, require_finite=False).detach())
        value = self._combine(trace)
        found: Sequence[Tensor | None] = [None] * (len(sites) + 1)
        if value.requires_grad:
            places = [*sites.values(), self.leaf]
            found = torch.autograd.grad(value, places, create_graph=hessian, allow_unused=True)
        self.unreached = [name for name, slope in zip(sites, found, strict=False) if slope is None]
        self.gradient: Tensor = torch.zeros_like(self.latent) if found[-1] is None else found[-1]

    def random(self, like: Tensor) -> Tensor:
        """Gaussian noise of the shape, type and device of a tensor."""
        return torch.randn(like.shape, generator=self.generator, dtype=wide(like).dtype).to(like)

    def _combine(self, trace: Trace) -> Tensor:
        """The combination for a trace, a scalar."""
        total = torch.zeros((), dtype=torch.float64, device=self.latent.device)
        for name in self.model.likelihood_names(trace):
            site = trace.nodes[name]
            log_prob = wide(unscaled_log_prob(site)) * (site["scale"] / subsample_scale(site))
            if name not in self._noise:
                self._noise[name] = self.random(log_prob.detach())
            total = total + (self._noise[name] * log_prob).sum(dtype=torch.float64)
        return total

    @torch.enable_grad()  # some models take derivatives themselves
    def at(self, u: Tensor) -> tuple[float, Tensor]:
        """The combination at a packed vector, and if ``hessian`` its gradient, else zero."""
        leaf = u.detach().clone().requires_grad_(self.hessian)
        with torch.random.fork_rng(devices=()):
            value = self._combine(self.model.trace(leaf, self.batch))
        gradient = torch.zeros_like(leaf)
        if self.hessian and value.requires_grad:
            (gradient,) = torch.autograd.grad(value, leaf, materialize_grads=True)
        return float(value.detach()), gradient

    def direction(self) -> Tensor:
        """A random direction, steps in proportion to the latents' sizes."""
        return self.random(self.latent) * (1 + self.latent.abs()) * len(self.latent) ** -0.5

    def differs_in(self, part: slice) -> bool:
        """Whether autograd's gradient is wrong in a part of the packed vector."""
        line, only = Line(self), torch.zeros_like(self.latent)
        only[part] = line.direction[part]
        line.direction = only
        return line.mismatch() > 0


class Line:
    """A probe along a random direction, of shape ``(p,)``; every point is run once."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self._found: dict[float, tuple[float, Tensor]] = {}

    @cached_property
    def direction(self) -> Tensor:
        """Drawn when it is needed."""
        return self.probe.direction()

    def at(self, t: float) -> tuple[float, Tensor]:
        """See :meth:`Probe.at`."""
        if t not in self._found:
            self._found[t] = self.probe.at(self.probe.latent + t * self.direction)
        return self._found[t]

    def mismatch(self) -> float:
        """The relative error of autograd's gradient along the direction, see :func:`mismatch`."""
        slope = float(self.probe.gradient.detach().double() @ self.direction.double())
        return mismatch(lambda t: self.at(t)[0], slope, self.probe.eps)

    def second_mismatch(self) -> float:
        """That of the second derivatives, between the direction and another one."""
        probe, u, slope = self.probe, self.probe.direction(), 0.0
        if probe.gradient.requires_grad:
            image = torch.autograd.grad(
                probe.gradient @ u, probe.leaf, retain_graph=True, materialize_grads=True
            )[0]
            require_finite(probe.model, image, "second derivative", "Move the point, or use curvature='ggn'.")
            slope = float(image.double() @ self.direction.double())
        return mismatch(lambda t: float(self.at(t)[1].double() @ u.double()), slope, probe.eps)


def check_derivatives(probe: Probe) -> None:
    """
    Warns where the gradient of the likelihood, and if the probe has ``hessian`` its second derivatives, are not derivatives;
    raises if they are not finite. Both are looked at along the same lines, of which the first mostly suffices.
    """
    if wide(probe.latent) is not probe.latent:  # half precision does not resolve it
        return
    require_finite(probe.model, probe.gradient)
    lines = [Line(probe) for _ in range(_DIRECTIONS)]
    found = _all_of(line.mismatch() for line in lines)
    if found:
        names = [name for name, part in probe.model.space.slices.items() if probe.differs_in(part)]
        sites = f" in {', '.join(map(repr, names))}" if names else ""
        warn_user(
            f"autograd's gradient of the likelihood{sites} differs by {100 * found:.3g} % from the "
            "function's derivative, by finite differences: something on the way detaches a part of it (as padding_idx does with a "
            "row of a table), changes gradients in a hook, or is a straight-through estimator. Point estimate, curvature and evidence are those of autograd's derivative, and not "
            "of the function.",
            CurvatureWarning,
        )
    found = _all_of(line.second_mismatch() for line in lines) if probe.hessian else 0.0
    if found:
        warn_user(
            f"autograd's second derivatives of the likelihood differ by {100 * found:.3g} % from finite differences of its "
            "gradient: an operation in the model has a second derivative that is wrong in torch (torch's own weight_norm is "
            "one), or is differentiated by hand. The exact Hessian, and all that follows from it, is wrong as much: use curvature='ggn', or "
            "write the operation out, v * g / v.norm(...).",
            CurvatureWarning,
        )


def _all_of(errors: Iterable[float]) -> float:
    """The largest of relative errors, zero if one is; the first that is zero is the last that is computed."""
    largest = 0.0
    for error in errors:
        if not error:
            return 0.0
        largest = max(largest, error)
    return largest


def require_finite(
    model: Any,
    found: Tensor,
    what: str = "gradient",
    advice: str = "Move the point, or write the function so that it has one there.",
) -> None:
    """Raises where a derivative at a point with a finite density is not finite, as that of a root is at zero."""
    bad = ~found.isfinite()
    if bool(bad.any()):
        names = [name for name, part in model.space.slices.items() if bool(bad[part].any())]
        raise ValueError(
            f"{int(bad.sum())} of {len(bad)} entries of the {what} of the log density, those of {', '.join(map(repr, names))}, "
            f"are not finite at the point estimate, where the density is: a root or norm at zero has no finite slope. {advice}"
        )
