# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
The log joint density of one batch at unconstrained values, by a run of the model.

:math:`\log p(\theta(u)) + \log|\det\partial\theta/\partial u| + c \log p(D\mid\theta(u))`, with a factor :math:`c` for batches
that stand for more data than they hold.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint
from torch.overrides import TorchFunctionMode

from pyro_bnn.model.data import Batch, map_tensors
from pyro_bnn.model.handlers import base_distribution, sample_sites
from pyro_bnn.model.observations import outside_support
from pyro_bnn.model.packed import PackedModel

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Share:
    """
    What a batch contributes to a log density.

    :ivar batch: the arguments of the model.
    :ivar left_out: observed sites and factors that count with another batch.
    :ivar prior: whether the prior counts with this one.
    :ivar scaled: whether the likelihood is multiplied by a factor, but for the sites ``once``.
    """

    batch: Batch
    left_out: frozenset[str] = frozenset()
    prior: bool = True
    scaled: bool = False
    once: frozenset[str] = frozenset()

    @property
    def tensors(self) -> Tensors:
        """The dense tensors of the batch."""
        found: list[Tensor] = []
        map_tensors(self.batch, lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
        return tuple(found)

    def with_tensors(self, tensors: Tensors) -> Batch:
        """The batch with others in their places."""
        others = iter(tensors)
        batch: Batch = map_tensors(self.batch, lambda _: next(others))
        return batch


class Joint:
    """
    The log joint density of a model, batch by batch.

    :param PackedModel packed: the model.
    :param moving: the observed sites whose support depends on latents; a value outside of it has density zero.
    """

    def __init__(self, packed: PackedModel, moving: frozenset[str] = frozenset()) -> None:
        self.packed, self.moving = packed, moving
        #: of the vectors at which it is evaluated
        self.space = packed.space

    def restrict(self, u: Tensor) -> Tensor:
        """The vectors at which it is evaluated, ``(..., q)``, of those of all latents, ``(..., p)``."""
        return u

    def complete(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """
        Vectors of all latents, ``(..., p)``, of those at which it is evaluated, ``(..., q)``, those that are integrated out drawn from
        their distribution given the others, and the log density of what was drawn, shape ``(...)``.
        """
        return u, u.new_zeros(u.shape[:-1], dtype=torch.float64)

    def log_prob(
        self, parts: Mapping[str, Tensor], share: Share, batch: Batch, factor: Tensor | None
    ) -> Tensor:
        """The log density at unconstrained values by site, a float64 scalar."""
        packed, space = self.packed, self.packed.space
        with pyro.validation_enabled(False):
            trace = packed.run(space.constrain(parts), batch)
            for site in sample_sites(trace).values():
                site["fn"] = unvalidated(site["fn"])
            total = self._log_likelihood(trace, share.left_out | share.once)
            if factor is not None:
                others = frozenset(packed.likelihood_names(trace)) - share.once
                total = factor * total + self._log_likelihood(trace, share.left_out | others)
            if share.prior:
                total = total + space.log_det(parts) + packed.latent_log_prob(trace)
        return total

    def _log_likelihood(self, trace: Trace, left_out: frozenset[str]) -> Tensor:
        self.packed.leave_out(trace, left_out)
        total = self.packed.log_likelihood(trace, require_finite=False)
        for name in self.moving & trace.nodes.keys() - left_out:
            total = torch.where(outside_support(trace.nodes[name]).any(), -torch.inf, total)
        return total

    @torch.inference_mode(False)
    @torch.enable_grad()
    def value_and_gradient(
        self, u: Tensor, share: Share, tensors: Tensors, factor: Tensor | None = None
    ) -> Tensors:
        """
        The log density and its gradient at packed vectors, ``(p,)`` or ``(C, p)``.

        :return: float64, shape ``()`` or ``(C,)``, and the shape of the vectors.
        """
        batch = share.with_tensors(tensors)
        u = u.clone() if u.is_inference() else u.detach()  # those cannot take part in a graph
        parts = {n: x.detach().requires_grad_() for n, x in self.space.split(u).items()}

        def log_prob(parts: Mapping[str, Tensor]) -> Tensor:
            return self.log_prob(parts, share, batch, factor)

        if u.dim() == 1:
            values = log_prob(parts)
        else:
            with Leaves():  # random numbers that are used make a recording impossible
                values = torch.func.vmap(log_prob, randomness="different")(parts)
        gradient = [torch.zeros_like(x) for x in parts.values()]
        if values.requires_grad:
            gradient = torch.autograd.grad(values.sum(), [*parts.values()], materialize_grads=True)  # type: ignore[assignment]
        rows = [slope.reshape((*u.shape[:-1], -1)) for slope in gradient]
        return values.detach(), torch.cat(rows, -1)

    def evaluate(self, u: Tensor, share: Share, factor: Tensor | None = None) -> Tensors:
        """The same for one vector and the share as it is; NaN where the linear algebra of the model fails."""
        try:
            return self.value_and_gradient(u, share, share.tensors, factor)
        except torch.linalg.LinAlgError:
            return u.new_full((), torch.nan, dtype=torch.float64), torch.full_like(u, torch.nan)


class Leaves(TorchFunctionMode):
    """Lets parameters, frozen ones too, be asked to require gradients or not to, which batching refuses; they stay as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.requires_grad_ and not kwargs:
            frozen = isinstance(args[0], torch.nn.Parameter) and not args[0].requires_grad
            asked = args[1:] in ((), (True,))
            if (asked and args[0].requires_grad) or frozen:
                return args[0]
        return func(*args, **(kwargs or {}))


def unvalidated(fn: Any) -> Any:
    """A copy of a distribution that does not look at the values of its arguments."""
    new = copy.copy(fn)
    for name, value in vars(fn).items():
        if isinstance(value, Distribution):
            setattr(new, name, unvalidated(value))
    # what was made with validation keeps it whatever the default is, and torch has no public way to switch it off
    new._validate_args = False
    return new


def moving_supports(sites: Mapping[str, Any]) -> Iterator[str]:
    """Those of some sites whose support holds tensors with a graph."""
    for name, site in sites.items():
        try:
            support = base_distribution(site["fn"]).support
        except NotImplementedError:
            continue
        if any(x.requires_grad for x in _bounds(support)):
            yield name


def _bounds(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Constraint):
        for part in vars(value).values():
            yield from _bounds(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _bounds(part)
