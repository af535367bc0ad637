# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
What the evidence is made of at a point estimate, where no matrix of the latents fits: the diagonal prior precision T, products
with the GGN H and its exact diagonal, the log joint density and its gradient.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_bnn.curvature.accumulate import Accumulated, CurvatureAccumulator, accumulate_examples
from pyro_bnn.curvature.diagonal import DiagonalPart
from pyro_bnn.curvature.parts import CurvatureSum
from pyro_bnn.curvature.prior import PriorCurvature, diagonal_of_diagonal
from pyro_bnn.curvature.stream import DEFAULT_BUDGET, ExampleStream, SiteExamples
from pyro_bnn.infer.evidence import prior_change
from pyro_bnn.infer.hfl.loss import by_chunks
from pyro_bnn.infer.hfl.setup import point_estimate
from pyro_bnn.model.data import repeatable_batches
from pyro_bnn.model.packed import PackedModel
from pyro_bnn.ops.distributed import all_reduce_sum, rank
from pyro_bnn.ops.graph import FirstOrderSum
from pyro_bnn.ops.jacobian import LinearMap, jvp_operator, wide
from pyro_bnn.ops.lanczos import lanczos
from pyro_bnn.ops.log_det import Probes, Split


class EvidenceTerms:
    """
    The terms of the evidence over the random entries of a guide's latents.

    :param guide: a point estimate.
    :param data: one batch or an iterable of batches, with observations.
    :param chunk_size: how many vectors are multiplied at once.
    :ivar index: positions of the random entries, shape ``(q,)``.
    :ivar part: the prior's precision and the diagonal of H there.
    :ivar found: log densities and gradients, of the prior and the likelihood.
    :raises ValueError: where the prior has no positive diagonal precision at the point estimate.
    """

    def __init__(self, guide: Any, data: Any, *, chunk_size: int = 256) -> None:
        self.data = repeatable_batches(data)
        self.model, latent = point_estimate(guide, self.data)
        self.active = _active(guide)
        self.latent = latent.detach().clone()
        self.index = torch.arange(len(latent), device=latent.device)
        if self.active is not None:
            self.index = self.active.nonzero().squeeze(-1)
        self.chunk_size = chunk_size
        self.budget: int = getattr(guide, "budget", DEFAULT_BUDGET)
        self.model.require_function(self.latent, self.data)
        total = CurvatureSum([DiagonalPart.zero(self.index, wide(self.latent))])
        self.found: Accumulated = accumulate_examples(
            total, self.stream(), self.data, lambda site: site.cotangents("ggn")
        )
        prior = prior_diagonal(self.found.prior, self.index, self.model)
        (part,) = total.parts(lambda _: prior)
        assert isinstance(part, DiagonalPart)
        self.part = part

    def stream(self, *, differentiable: bool = False) -> ExampleStream:
        """The data example by example."""
        return ExampleStream(
            self.model, self.latent, self.active, budget=self.budget, differentiable=differentiable
        )

    @cached_property
    def curvature(self) -> LinearMap:
        """Products with H on the random entries, from ``(S, q)`` to ``(S, q)``."""
        accumulator = CurvatureAccumulator(self.model, self.latent, "ggn")
        product = by_chunks(accumulator.operator(self.data, prior=False), self.chunk_size)

        def multiply(v: Tensor) -> Tensor:
            image = product(self.embedded(v))
            if not torch.isfinite(image).all():
                raise ValueError("products with the GGN are not finite at the point estimate: check the data")
            return wide(image[:, self.index])

        return multiply

    def embedded(self, v: Tensor) -> Tensor:
        """Rows of shape ``(S, q)`` among zeros for the entries that are not random, shape ``(S, p)``."""
        full = self.latent.new_zeros(len(v), len(self.latent))
        full[:, self.index] = v.to(full)
        return full

    def scale(self, tau: Tensor | None = None) -> Tensor:
        r""":math:`(\tau T)^{-1/2}`, shape ``(q,)``, for multipliers of shape ``(p,)`` or a scalar."""
        prior = self.part.prior if tau is None else self.part.prior * self._of(tau)
        return prior.rsqrt()

    def _of(self, tau: Tensor) -> Tensor:
        tau = tau.detach().to(self.part.prior)
        return tau if tau.dim() == 0 else tau[self.index]

    def whitened(self, scale: Tensor) -> LinearMap:
        """Products with A, which is H between two factors of the scale, from ``(S, q)`` to ``(S, q)``."""
        return lambda v: self.curvature(v * scale) * scale

    def constant(self, tau: Tensor | None = None) -> float:
        r"""The evidence but for :math:`-\tfrac12\log\det(1 + A)`: the log joint density, the volume, the prior's determinant."""
        value = self.log_joint(tau) + 0.5 * len(self.index) * math.log(2 * math.pi)
        return value + float(self.scale(tau).double().log().sum())

    def log_joint(self, tau: Tensor | None = None) -> float:
        """The log joint density at the point estimate."""
        value = (self.found.log_likelihood + self.found.log_prior).double()
        if tau is not None:
            value = value + prior_change(self.part, self._slope.double(), self._of(tau).double())
        return float(value)

    @property
    def _slope(self) -> Tensor:
        """The gradient of the negative log prior in the random entries, shape ``(q,)``."""
        return self.found.prior.gradient[self.index]

    @cached_property
    def distances(self) -> Tensor:
        """The terms of the squared distance from the prior mean in prior standard deviations, shape ``(q,)``, float64."""
        return self._slope.double().square() / self.part.prior.double()

    def decrement(self, split: Split, scale: Tensor, tau: Tensor | None = None) -> float:
        r""":math:`\sqrt{g^\top P^{-1} g}` for the gradient g of the negative log joint density."""
        prior = self._slope if tau is None else self._slope * self._of(tau)
        gradient = self.found.gradient[self.index] + prior
        krylov = lanczos(split.remainder, split.half((gradient * scale)[None]), max_steps=20)
        return float(krylov.gauss(lambda x: 1 / (1 + x)).clamp(min=0).sqrt())


def _active(guide: Any) -> Tensor | None:
    """Which entries are random; all if ``None``."""
    active = getattr(guide, "active", None)
    chosen = getattr(guide, "sites", None) is not None or getattr(guide, "subnetwork", None) is not None
    if chosen and active is None:
        raise ValueError(
            "the guide has not chosen its random latents yet, which sites= and subnetwork= ask for: call "
            "laplace_approximation(data) first (structure='diagonal' is cheap), or use a guide over all latents."
        )
    return active


def prior_diagonal(prior: PriorCurvature, index: Tensor, model: PackedModel) -> Tensor:
    """The prior's precision at some positions, shape ``(q,)``; raises, naming the sites, where that is not all there is."""
    diagonal = diagonal_of_diagonal(prior.restricted(index), prior.latent[index], prior.eps, by_row=True)
    if diagonal is None:
        raise ValueError(
            f"the prior couples latents with each other ({_sites(model, _coupled(prior, index))}: a covariance, or a scale that is a "
            "latent itself), and the evidence without matrices needs one that is diagonal at the point estimate: make scales "
            "parameters of the model, or use AutoLaplace(structure='full' or 'low_rank').log_evidence()."
        )
    wrong = torch.zeros(len(prior.latent), dtype=torch.bool, device=index.device)
    wrong[index] = ~(diagonal > 0)
    if bool(wrong.any()):
        raise ValueError(
            f"the prior has no positive curvature at the point estimate ({_sites(model, wrong)}): an improper prior has no evidence, "
            "and another may be too flat there. Give these latents a Gaussian prior."
        )
    return diagonal


def _coupled(prior: PriorCurvature, index: Tensor) -> Tensor:
    """The entries whose row of the prior's curvature is not that of a diagonal matrix, bool, shape ``(p,)``."""
    like = prior.latent
    generator = torch.Generator(device=like.device).manual_seed(0)
    probe = torch.zeros_like(like)
    probe[index] = torch.randn(len(index), dtype=like.dtype, device=like.device, generator=generator)
    ones = torch.zeros_like(like)
    ones[index] = 1.0
    images = prior.operator(torch.stack([ones, probe]))
    gap = (images[0] * probe - images[1]).abs()
    return (gap > 1e-3 * gap.max()) & (ones > 0)


def _sites(model: PackedModel, entries: Tensor) -> str:
    found = [repr(name) for name, where in model.space.slices.items() if bool(entries[where].any())]
    return "site " + ", ".join(found)


@dataclass
class EvidenceGradient:
    r"""
    The gradient of the evidence in the parameters of the model, at a fixed point estimate:
    :math:`\partial\log p(D, \hat u) - \tfrac12\operatorname{tr}(P^{-1}\,\partial P)`, with
    :math:`P^{-1} = T^{-1} + T^{-1/2}((1 + A)^{-1} - 1)T^{-1/2}`: the first term exactly, from the diagonal of H, and the second from the
    probes of the value.
    """

    terms: EvidenceTerms
    probes: Probes

    def attach(self, value: Tensor) -> Tensor:
        """The value, once differentiable in the parameters of the model."""
        terms = self.terms
        scale = terms.scale()
        left, right = (terms.embedded(x * scale) for x in self.probes.pairs())
        stream = terms.stream(differentiable=True)
        total = FirstOrderSum(stream.latent)
        for i, (trace, sites) in enumerate(stream.run(terms.data)):
            for site in sites:
                for a, b in zip(left.split(terms.chunk_size), right.split(terms.chunk_size), strict=True):
                    total.add(-0.5 * _product(site, stream.latent, a, b), retain_graph=True)
            term = terms.model.log_likelihood(trace)
            for site in sites:
                term = term - 0.5 * self._diagonal(site, scale)
            if i == 0:
                # one prior for all processes, which differentiate in the same parameters
                share = 1.0 if rank() == 0 else 0.0
                term = term + share * self._prior(trace, stream.latent, (left * right).sum(0))
            total.add(term)
        all_reduce_sum(total.gradients())
        return total.attach(value)

    def _diagonal(self, site: SiteExamples, scale: Tensor) -> Tensor:
        r""":math:`\operatorname{tr}(T^{-1} H)` of one site on one chunk of data."""
        chunk = CurvatureSum([DiagonalPart.zero(self.terms.index, wide(self.terms.latent))])
        chunk.add(site, site.cotangents("ggn", differentiable=True))
        (part,) = chunk.parts(torch.zeros_like)
        return (part.tensors["curvature"] * scale.square()).sum()

    def _prior(self, trace: Trace, latent: Tensor, pairs: Tensor) -> Tensor:
        r"""The log prior density less :math:`\tfrac12\operatorname{tr}(P^{-1} T)` with P held fixed."""
        log_prior = self.terms.model.log_prior(latent, trace)
        if not log_prior.requires_grad:
            return log_prior
        how: dict[str, Any] = {"create_graph": True, "materialize_grads": True}
        (gradient,) = torch.autograd.grad(-log_prior, latent, **how)
        if not gradient.requires_grad:
            return log_prior
        (diagonal,) = torch.autograd.grad(gradient, latent, torch.ones_like(latent), **how)
        variance = torch.zeros_like(pairs)
        variance[self.terms.index] = self.terms.scale().square().to(pairs)
        return log_prior - 0.5 * (diagonal * (variance + pairs)).sum()


def _product(site: SiteExamples, latent: Tensor, left: Tensor, right: Tensor) -> Tensor:
    r""":math:`\sum_i x_i^\top H y_i` of one site on one chunk of data, for x and y of shape ``(S, p)``."""
    outputs = site.site.outputs
    push = jvp_operator(outputs.reshape(-1), latent, create_graph=True)
    root = site.site.differentiable_root()
    images = [
        (push(v).reshape(len(v), *outputs.shape).unsqueeze(-2) @ root).squeeze(-2) for v in (left, right)
    ]
    return (images[0] * images[1]).sum()
