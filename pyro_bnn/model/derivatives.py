# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Whether autograd's derivatives of a model are those of the function that it computes.

They are not where a part of a path is detached, where hooks or straight-through estimators change gradients, and where a
derivative in torch is wrong. A scalar :math:`\phi(t)` along a random direction is compared with its slope at zero. A
difference counts only where central differences at two step sizes, and the differences to the left and to the right,
agree much better with each other than with the slope: at kinks, jumps and within rounding errors nothing is said.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
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
    """A random combination of a model's log densities on one batch, near a packed vector of shape ``(p,)``."""

    def __init__(self, model: Any, latent: Tensor, batch: Batch) -> None:
        self.model, self.latent, self.batch = model, latent.detach(), batch
        self.eps = torch.finfo(latent.dtype).eps
        self.generator = torch.Generator().manual_seed(0)
        self._noise: dict[str, Tensor] = {}

    def random(self, like: Tensor) -> Tensor:
        """Gaussian noise of the shape, type and device of a tensor."""
        return torch.randn(like.shape, generator=self.generator, dtype=torch.float64).to(like)

    def value(self, u: Tensor) -> Tensor:
        """The combination at a packed vector, a scalar."""
        with torch.random.fork_rng(devices=()):
            trace = self.model.trace(u, self.batch)
        total = torch.zeros((), dtype=torch.float64, device=u.device)
        for name in self.model.likelihood_names(trace):
            site = trace.nodes[name]
            log_prob = wide(unscaled_log_prob(site)) * (site["scale"] / subsample_scale(site))
            if name not in self._noise:
                self._noise[name] = self.random(log_prob.detach())
            total = total + (self._noise[name] * log_prob).sum(dtype=torch.float64)
        return total

    @torch.enable_grad()
    def gradient(self, u: Tensor, *, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """A packed vector as a leaf, and the gradient there, which can be differentiated again with ``create_graph``."""
        leaf = u.detach().clone().requires_grad_(True)
        value = self.value(leaf)
        if not value.requires_grad:
            return leaf, torch.zeros_like(leaf)
        (found,) = torch.autograd.grad(value, leaf, create_graph=create_graph, materialize_grads=True)
        return leaf, found

    def directions(self) -> Iterator[Tensor]:
        """Random directions, steps in proportion to the latents' sizes."""
        while True:
            yield self.random(self.latent) * (1 + self.latent.abs()) * len(self.latent) ** -0.5

    def slopes(self, direction: Tensor, gradient: Tensor) -> float:
        """The relative error of autograd's gradient along a direction ``(p,)``, see :func:`mismatch`."""

        @torch.enable_grad()  # some models take derivatives themselves
        def phi(t: float) -> float:
            return float(self.value(self.latent + t * direction).detach())

        return mismatch(phi, float(gradient.double() @ direction.double()), self.eps)

    def differs_in(self, part: slice, gradient: Tensor) -> bool:
        """Whether autograd's gradient is wrong in a part of the packed vector."""
        only = torch.zeros_like(self.latent)
        only[part] = next(self.directions())[part]
        return self.slopes(only, gradient) > 0


def check_gradient(model: Any, latent: Tensor, batch: Batch) -> None:
    """
    Warns where the gradient of the likelihood at a packed vector ``(p,)`` is not its derivative; refuses embeddings with
    ``scale_grad_by_freq``, and gradients that are not finite.
    """
    if wide(latent) is not latent:  # half precision does not resolve it
        return
    probe = Probe(model, latent, batch)
    with _Embeddings():
        _, gradient = probe.gradient(probe.latent)
    require_finite(model, gradient)
    directions = probe.directions()
    found = [probe.slopes(next(directions), gradient)]
    if not found[0]:
        return
    found += [probe.slopes(next(directions), gradient) for _ in range(_DIRECTIONS - 1)]
    if not all(found):
        return
    names = [name for name, part in model.space.slices.items() if probe.differs_in(part, gradient)]
    sites = f" in {', '.join(map(repr, names))}" if names else ""
    warn_user(
        f"autograd's gradient of the likelihood{sites} differs by {100 * max(found):.3g} % from the "
        "function's derivative, by finite differences: something on the way detaches a part of it (as padding_idx does with a "
        "row of a table), changes gradients in a hook, or is a straight-through estimator. Point estimate, curvature and evidence are those of autograd's derivative, and not "
        "of the function.",
        CurvatureWarning,
    )


def check_hessian(model: Any, latent: Tensor, batch: Batch) -> None:
    """Warns where second derivatives of the likelihood at a packed vector ``(p,)`` are not derivatives of its gradient, raises if not finite."""
    if wide(latent) is not latent:
        return
    probe = Probe(model, latent, batch)
    leaf, gradient = probe.gradient(probe.latent, create_graph=True)
    found, directions = [], probe.directions()
    for _ in range(_DIRECTIONS):
        u, v = next(directions), next(directions)
        slope = 0.0
        if gradient.requires_grad:
            (image,) = torch.autograd.grad(gradient @ u, leaf, retain_graph=True, materialize_grads=True)
            require_finite(model, image, "second derivative", "Move the point, or use curvature='ggn'.")
            slope = float(image.double() @ v.double())

        def phi(t: float, u: Tensor = u, v: Tensor = v) -> float:
            return float(probe.gradient(probe.latent + t * v)[1].double() @ u.double())

        found.append(mismatch(phi, slope, probe.eps))
        if not found[-1]:
            return
    warn_user(
        f"autograd's second derivatives of the likelihood differ by {100 * max(found):.3g} % from finite differences of its "
        "gradient: an operation in the model has a second derivative that is wrong in torch (torch's own weight_norm is "
        "one), or is differentiated by hand. The exact Hessian, and all that follows from it, is wrong as much: use curvature='ggn', or "
        "write the operation out, v * g / v.norm(...).",
        CurvatureWarning,
    )


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
