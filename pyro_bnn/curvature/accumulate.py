# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Curvature of a model at a packed latent vector, accumulated batch by batch.

The posterior precision is :math:`P = H_{\text{lik}} + H_{\text{prior}}`. The likelihood part is either the exact
Hessian of the negative log likelihood or the GGN :math:`\sum_n J_n^\top F_n J_n`; the prior part is always the
exact Hessian of the negative log prior in unconstrained space.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_bnn.curvature.dense import DensePart
from pyro_bnn.curvature.diagonal import DiagonalPart
from pyro_bnn.curvature.fisher_checks import require_fixed_values, require_scores
from pyro_bnn.curvature.parts import CurvatureSum, NotAMinimumError, Part
from pyro_bnn.curvature.prior import PriorCurvature, prior_curvature
from pyro_bnn.curvature.stream import ExampleStream, SiteExamples
from pyro_bnn.model.data import is_single_batch
from pyro_bnn.model.packed import PackedModel, SiteOutputs
from pyro_bnn.ops.distributed import all_reduce_sum, rank, world_size
from pyro_bnn.ops.jacobian import LinearMap, hvp_operator, jvp_operator, vjp, wide
from pyro_bnn.ops.newton import sum_images

Curvature = Literal["ggn", "hessian"]

__all__ = ["Curvature", "CurvatureAccumulator", "NotAMinimumError", "PriorCurvature", "check_option"]


def check_option(name: str, value: str, options: Any) -> None:
    """Raises :exc:`ValueError` if the value of an argument is none of those of a ``Literal`` type."""
    if value not in get_args(options):
        raise ValueError(
            f"unknown {name} {value!r}, expected one of {', '.join(map(repr, get_args(options)))}"
        )


class CurvatureAccumulator:
    """
    The posterior precision at a packed latent vector.

    :param model: the packed model.
    :param latent: the packed vector, shape ``(p,)``.
    :param curvature: ``"ggn"`` or ``"hessian"``, for the likelihood.
    :param chunk_size: how many reverse passes run at once.
    """

    def __init__(
        self, model: PackedModel, latent: Tensor, curvature: Curvature, *, chunk_size: int = 256
    ) -> None:
        check_option("curvature", curvature, Curvature)
        self.model = model
        self.latent = latent.detach().clone().requires_grad_(True)
        self.curvature = curvature
        self.chunk_size = chunk_size

    def matrix(self, data: Any) -> Tensor:
        """
        :param data: one batch or an iterable of batches, with observations.
        :return: the precision, shape ``(p, p)``.
        """
        return self._part(DensePart, data).matrix()

    def diagonal(self, data: Any) -> Tensor:
        """
        :param data: one batch or an iterable of batches, with observations.
        :return: the diagonal of the precision, shape ``(p,)``.
        """
        part = self._part(DiagonalPart, data)
        return part.curvature + part.prior

    def _part(self, kind: type[Part], data: Any) -> Any:
        """Prior and likelihood on all entries in one part."""
        index = torch.arange(len(self.latent), device=self.latent.device)
        total = CurvatureSum([kind.zero(index, self.latent.detach())])
        if self.curvature == "ggn":
            stream = ExampleStream(self.model, self.latent)
            found = accumulate_examples(total, stream, data, lambda site: site.cotangents("ggn"))
        else:
            found = accumulate_operators(total, self, data)
        prior = found.prior
        (part,) = total.parts(prior.matrix if kind is DensePart else prior.diagonal)
        return part

    def operator(self, data: Any, *, prior: bool = True) -> LinearMap:
        """
        Products with the precision, without forming it.

        :param data: one batch or an iterable of batches, with observations. One batch is traced once and its
            graph is kept; several batches are traced again in every product, so memory stays that of one.
        :param prior: whether the prior's curvature is a part of it.
        :return: a map from ``(S, p)`` to ``(S, p)``.
        """
        kept = list(self.operators(data, prior=prior)) if is_single_batch(data) else None

        def multiply(v: Tensor) -> Tensor:
            image = sum_images(self.operators(data, prior=prior) if kept is None else kept, v)
            all_reduce_sum([image])
            return image

        return multiply

    def operators(self, data: Any, *, prior: bool = True) -> Iterator[LinearMap]:
        """
        The terms of the precision as linear maps: the prior's, then one per batch.

        :param data: one batch or an iterable of batches, with observations.
        :param prior: whether the prior's is among them.
        :return: an iterator over maps from ``(S, p)`` to ``(S, p)``; each keeps its batch's graph alive.
        """
        for i, trace in enumerate(self.model.traces(self.latent, data)):
            if prior and i == 0 and rank() == 0:  # the processes of a data-parallel run share one prior
                yield hvp_operator(-self.model.log_prior(self.latent, trace), self.latent)
            self.model.check_observations(trace)
            log_likelihood = self.model.log_likelihood(trace)
            if self.curvature == "hessian":
                yield hvp_operator(-log_likelihood, self.latent)
                continue
            require_fixed_values(self.model, trace, self.latent)
            for site in self.model.site_outputs(trace):
                if site.outputs.shape[-1]:
                    yield ggn_operator(site, self.latent)

    def likelihood_terms(self, data: Any) -> Iterator[tuple[Trace, Tensor]]:
        """
        :param data: one batch or an iterable of batches, with observations.
        :return: for each batch its trace and its negative log likelihood.
        """
        for trace in self.model.traces(self.latent, data):
            self.model.check_observations(trace)
            yield trace, -self.model.log_likelihood(trace)


def ggn_operator(site: SiteOutputs, latent: Tensor) -> LinearMap:
    r"""GGN-vector products :math:`v \mapsto J^\top F J v` of one site's outputs, a map from ``(S, p)`` to ``(S, p)``."""
    flat = site.outputs.reshape(-1)
    jvp = jvp_operator(flat, latent)
    C = site.outputs.shape[-1]
    information = site.information.reshape(-1, C, C)

    def multiply(v: Tensor) -> Tensor:
        tangents = jvp(v).reshape(v.shape[0], -1, C)
        cotangents = torch.einsum("nij,snj->sni", information, tangents)
        return vjp(flat, latent, cotangents.reshape(v.shape[0], -1)).detach()

    return multiply


@dataclass
class Accumulated:
    """
    What a pass over the data found beside the likelihood's curvature.

    :ivar prior: the curvature of the prior.
    :ivar log_prior: the log density of the prior in unconstrained space, a scalar.
    :ivar log_likelihood: a scalar.
    :ivar gradient: of the negative log likelihood in the active entries, shape ``(p,)``; zero elsewhere.
    """

    prior: PriorCurvature
    log_prior: Tensor
    log_likelihood: Tensor
    gradient: Tensor


def accumulate_examples(
    total: CurvatureSum,
    stream: ExampleStream,
    data: Any,
    cotangents: Callable[[SiteExamples], Iterator[Tensor]],
) -> Accumulated:
    """Adds the Fisher-type curvature of the likelihood over data, made of a site's ``cotangents``, to a sum."""
    model, latent = stream.model, stream.latent
    found: Accumulated | None = None
    for trace, sites in stream.run(data):
        log_likelihood = model.log_likelihood(trace).detach()
        require_fixed_values(model, trace, latent)
        if found is None:
            require_scores(model, trace, latent)
            found = _start(model, latent, trace)
        found.log_likelihood += log_likelihood
        for site in sites:
            found.gradient -= site.jacobian.gradient
            total.add(site, cotangents(site))
    return _over_processes(found, total)


def accumulate_operators(total: CurvatureSum, accumulator: CurvatureAccumulator, data: Any) -> Accumulated:
    """Adds the exact Hessian of the negative log likelihood over data to a sum."""
    latent, chunk_size = accumulator.latent, accumulator.chunk_size
    found: Accumulated | None = None
    for trace, value in accumulator.likelihood_terms(data):
        if found is None:
            found = _start(accumulator.model, latent, trace, chunk_size)
        found.log_likelihood -= value.detach()
        if value.requires_grad:
            found.gradient += torch.autograd.grad(value, latent, retain_graph=True, materialize_grads=True)[0]
            total.add_operator(hvp_operator(value, latent), chunk_size)
    return _over_processes(found, total)


def _start(model: PackedModel, latent: Tensor, trace: Trace, chunk_size: int = 256) -> Accumulated:
    """What the first trace tells of the prior, before the likelihood is summed."""
    log_prior = model.log_prior(latent, trace)
    prior = prior_curvature(-log_prior, latent, chunk_size=chunk_size)
    log_likelihood = latent.new_zeros((), dtype=torch.float64)
    gradient = torch.zeros_like(wide(latent.detach()))
    return Accumulated(prior, log_prior.detach(), log_likelihood, gradient)


def _over_processes(found: Accumulated | None, total: CurvatureSum) -> Accumulated:
    assert found is not None
    if world_size() > 1:
        all_reduce_sum([*total.tensors(), found.log_likelihood, found.gradient])
    return found
