# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
The loss around a point estimate: its gradient, its curvature, and the loss perturbed by a functional.

With ``curvature="hessian"`` the loss is :math:`L(u)` itself. With ``curvature="ggn"`` it is the loss of the
linearised model :math:`L(\phi(\hat u) + J(u - \hat u))`, which is convex and whose Hessian at :math:`\hat u` is
the GGN; for a Gaussian likelihood and prior it is quadratic, so that perturbations of any size give the same
variance. Either loss may carry a gradient correction :math:`-g_0^\top(u - \hat u)`, which makes the point estimate
stationary, and a proximal term :math:`\frac\delta2 |u - \hat u|^2`; and the prior's precision may be multiplied.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_bnn.curvature.accumulate import Curvature, CurvatureAccumulator, NotAMinimumError
from pyro_bnn.curvature.fisher_checks import require_scores
from pyro_bnn.infer.hfl.multipliers import prior_shift
from pyro_bnn.model.data import Batch, iter_batches
from pyro_bnn.model.handlers import Site
from pyro_bnn.model.packed import PackedModel
from pyro_bnn.ops.distributed import all_reduce_sum, rank
from pyro_bnn.ops.jacobian import LinearMap, jvp_operator, vjp
from pyro_bnn.ops.newton import Terms, value_and_gradient


def by_chunks(operator: LinearMap, chunk_size: int) -> LinearMap:
    """A linear map that gives another at most ``chunk_size`` vectors at once."""

    def multiply(v: Tensor) -> Tensor:
        first = operator(v[:chunk_size])
        if len(v) <= chunk_size:
            return first
        found = first.new_empty(len(v), *first.shape[1:])
        found[:chunk_size] = first
        for part, rows in zip(v.split(chunk_size)[1:], found.split(chunk_size)[1:], strict=True):
            rows.copy_(operator(part))
        return found

    return multiply


class Problem:
    """
    The loss of a model around a point estimate.

    :param latent: the point estimate, shape ``(p,)``.
    :param proximal: δ.
    :param tau: multipliers of the prior precision, a scalar or shape ``(p,)``; none by default.
    :param correct_gradient: whether the point estimate is made stationary.
    :param chunk_size: how many vectors are multiplied at once.
    :ivar gradient: of the uncorrected loss at the point estimate, shape ``(p,)``.
    :ivar gradient_evaluations: gradients over all the data so far.
    :raises ValueError: if the loss is not a function of the latents, or its gradient is not finite.
    """

    def __init__(
        self,
        model: PackedModel,
        latent: Tensor,
        data: Any,
        curvature: Curvature,
        *,
        proximal: float = 0.0,
        correct_gradient: bool = True,
        chunk_size: int = 256,
        tau: Tensor | None = None,
    ) -> None:
        self.model = model
        self.latent = latent.detach().clone()
        self.data = data
        self.curvature: Curvature = curvature
        self.proximal = proximal
        self.correct_gradient = correct_gradient
        self.chunk_size = chunk_size
        model.require_function(self.latent, data, hessian=curvature == "hessian")
        self.value, self.gradient = value_and_gradient(
            lambda u: model.losses(u, data, require_finite=True), self.latent
        )
        self.gradient_evaluations = 1
        if curvature == "ggn":
            leaf = self.latent.clone().requires_grad_(True)
            require_scores(model, model.trace(leaf, next(iter_batches(data))), leaf)
        if not torch.isfinite(self.gradient).all():
            raise ValueError(
                f"{int((~torch.isfinite(self.gradient)).sum())} of {len(self.latent)} entries of the gradient of the loss "
                f"are not finite at the point estimate (the loss is {float(self.value):.3g}): check the data, and whether "
                "the model can be differentiated there."
            )
        shift = torch.zeros_like(self.gradient)
        self._ridge: Tensor | float = 0.0
        if tau is not None:
            self._ridge, shift = prior_shift(model, self.latent, data, tau)
            self.gradient = self.gradient + shift
        #: a gradient that is added to that of the model's loss
        self._linear = shift - self.gradient if correct_gradient else shift
        self._base = by_chunks(CurvatureAccumulator(model, self.latent, curvature).operator(data), chunk_size)

    @property
    def ridge(self) -> Tensor | float:
        """What the proximal term and multipliers of the prior add to the diagonal of the curvature, shape ``(p,)`` or a number."""
        return self._ridge + self.proximal

    def operator(self, v: Tensor) -> Tensor:
        """Products with the curvature at the point estimate, :attr:`ridge` included, of shape ``(S, p)`` both."""
        product = self._base(v)
        if not torch.isfinite(product).all():
            raise NotAMinimumError(
                f"products with the {self.curvature} are not finite: the model has no second derivative at the point "
                "estimate, or the data are not finite"
            )
        ridge = self.ridge
        return product if isinstance(ridge, float) and not ridge else product + ridge * v

    def gradients(self, offsets: Tensor) -> Tensor:
        r"""Gradients of the loss, corrected and with the proximal term, at :math:`\hat u` + offsets, shape ``(S, p)``."""
        self.gradient_evaluations += offsets.shape[0]
        if self.curvature == "hessian":
            rows = [value_and_gradient(self._terms, self.latent + offset)[1] for offset in offsets]
            gradients = torch.stack(rows)
        else:
            leaf = self.latent.clone().requires_grad_(True)
            gradients = self._linearized_gradients(offsets, leaf, self.model.traces(leaf, self.data))
            gradients = gradients + self._prior_gradients(offsets, next(iter_batches(self.data)))
        return gradients + self._extra(offsets)

    def batch_gradients(self, offsets: Tensor, batch: Batch, scale: float) -> Tensor:
        """Stochastic gradients of the loss, shape ``(S, p)``: the likelihood of one batch counts ``scale`` times."""
        if self.curvature == "ggn":
            leaf = self.latent.clone().requires_grad_(True)
            likelihood = self._linearized_gradients(offsets, leaf, [self.model.trace(leaf, batch)])
            gradients = scale * likelihood + self._prior_gradients(offsets, batch)
        else:

            def terms(u: Tensor) -> Iterator[Tensor]:
                trace = self.model.trace(u, batch)
                loss = -scale * self.model.log_likelihood(trace, require_finite=False)
                yield loss - self.model.log_prior(u, trace) if rank() == 0 else loss

            gradients = torch.stack([value_and_gradient(terms, self.latent + o)[1] for o in offsets])
        return gradients + self._extra(offsets)

    def perturbed(self, functional: Callable[[Tensor], Tensor], shift: float) -> Terms:
        """The loss minus ``shift`` times a scalar functional, in terms of the offset from the point estimate."""

        def terms(offset: Tensor) -> Iterator[Tensor]:
            u = self.latent + offset
            yield from self._terms(u)
            if rank() == 0:  # what is added counts once in all processes
                extra = 0.5 * (self.ridge * offset.square()).sum() - shift * functional(u)
                yield extra + self._linear @ offset

        return terms

    def _terms(self, u: Tensor) -> Iterator[Tensor]:
        return self.model.losses(u, self.data)

    def _extra(self, offsets: Tensor) -> Tensor:
        return self.ridge * offsets + self._linear

    def _linearized_gradients(self, offsets: Tensor, leaf: Tensor, traces: Iterable[Trace]) -> Tensor:
        """Gradients of the linearised likelihood, from traces that were made at ``leaf``."""
        total = torch.zeros_like(offsets)
        for trace in traces:
            for site in self.model.site_outputs(trace):
                if not site.outputs.shape[-1]:
                    continue
                flat = site.outputs.reshape(-1)
                moves = by_chunks(jvp_operator(flat, leaf), self.chunk_size)(offsets)
                outputs = (flat.detach() + moves).reshape(offsets.shape[:1] + site.outputs.shape)
                outputs.requires_grad_(True)
                parts = dict(zip(site.names, outputs.split(site.sizes, -1), strict=True))
                node: Site = trace.nodes[site.name]
                log_prob = site.rule.build(site.base, parts).log_prob(node["value"])
                (slopes,) = torch.autograd.grad(-(log_prob * site.weight).sum(), outputs)
                for rows, part in zip(
                    total.split(self.chunk_size),
                    slopes.reshape(len(offsets), -1).split(self.chunk_size),
                    strict=True,
                ):
                    rows += vjp(flat, leaf, part).detach()
        all_reduce_sum([total])
        return total

    def _prior_gradients(self, offsets: Tensor, batch: Batch) -> Tensor:
        def terms(u: Tensor) -> Iterator[Tensor]:
            if rank() == 0:  # the processes of a data-parallel run share one prior
                yield -self.model.log_prior(u, self.model.trace(u, batch))

        return torch.stack([value_and_gradient(terms, self.latent + offset)[1] for offset in offsets])
