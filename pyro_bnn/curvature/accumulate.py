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
from pyro_bnn.curvature.parts import CurvatureSum, NotAMinimumError
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
    """
    :param name: the argument's name.
    :param value: its value.
    :param options: a ``Literal`` type of the allowed values.
    :raises ValueError: if ``value`` is none of them.
    """
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
        index = torch.arange(len(self.latent), device=self.latent.device)
        total = CurvatureSum([DensePart.zero(index, self.latent.detach())])
        prior = self._accumulate(total, data)
        (part,) = total.parts(prior.diagonal)
        return part.tensors["curvature"] + prior.matrix(index)

    def diagonal(self, data: Any) -> Tensor:
        """
        :param data: one batch or an iterable of batches, with observations.
        :return: the diagonal of the precision, shape ``(p,)``.
        """
        index = torch.arange(len(self.latent), device=self.latent.device)
        total = CurvatureSum([DiagonalPart.zero(index, self.latent.detach())])
        prior = self._accumulate(total, data)
        (part,) = total.parts(prior.diagonal)
        return part.tensors["curvature"] + part.prior

    def _accumulate(self, total: CurvatureSum, data: Any) -> "PriorCurvature":
        if self.curvature == "ggn":
            return accumulate_examples(
                total, ExampleStream(self.model, self.latent), data, lambda site: site.cotangents("ggn")
            ).prior
        return accumulate_operators(total, self, data)

    def operator(self, data: Any) -> LinearMap:
        """
        Products with the precision, without forming it.

        :param data: one batch or an iterable of batches, with observations. One batch is traced once and its
            graph is kept; several batches are traced again in every product, so memory stays that of one.
        :return: a map from ``(S, p)`` to ``(S, p)``.
        """
        kept = list(self.operators(data)) if is_single_batch(data) else None

        def multiply(v: Tensor) -> Tensor:
            image = sum_images(self.operators(data) if kept is None else kept, v)
            all_reduce_sum([image])
            return image

        return multiply

    def operators(self, data: Any) -> Iterator[LinearMap]:
        """
        The terms of the precision as linear maps: the prior's, then one per batch.

        :param data: one batch or an iterable of batches, with observations.
        :return: an iterator over maps from ``(S, p)`` to ``(S, p)``; each keeps its batch's graph alive.
        """
        for operator_or_sites, is_prior in self._terms(data):
            if is_prior or self.curvature == "hessian":
                yield operator_or_sites
            else:
                for site in operator_or_sites:
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

    def _terms(self, data: Any) -> Iterator[tuple[Any, bool]]:
        for i, trace in enumerate(self.model.traces(self.latent, data)):
            if i == 0 and rank() == 0:  # the processes of a data-parallel run share one prior
                yield hvp_operator(-self.model.log_prior(self.latent, trace), self.latent), True
            self.model.check_observations(trace)
            negative_log_likelihood = -self.model.log_likelihood(trace)
            if self.curvature == "hessian":
                yield hvp_operator(negative_log_likelihood, self.latent), False
            else:
                require_fixed_values(self.model, trace, self.latent)
                yield self.model.site_outputs(trace), False


def ggn_operator(site: SiteOutputs, latent: Tensor) -> LinearMap:
    r"""
    GGN-vector products :math:`v \mapsto J^\top F J v` of one site.

    :param site: outputs with a graph to ``latent``.
    :param latent: the packed vector, shape ``(p,)``.
    :return: a map from ``(S, p)`` to ``(S, p)``.
    """
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
    """
    Adds the Fisher-type curvature of the likelihood over data to a sum.

    :param total: the sum.
    :param stream: runs the model.
    :param data: one batch or an iterable of batches, with observations.
    :param cotangents: see :meth:`~pyro_bnn.curvature.stream.SiteExamples.cotangents`.
    :return: the curvature of the prior, and value and gradient of the log joint density.
    """
    prior, log_prior = None, stream.latent.new_zeros((), dtype=torch.float64)
    log_likelihood = torch.zeros_like(log_prior)
    gradient = torch.zeros_like(wide(stream.latent.detach()))
    for trace, sites in stream.run(data):
        log_likelihood += stream.model.log_likelihood(trace).detach()
        require_fixed_values(stream.model, trace, stream.latent)
        if prior is None:
            require_scores(stream.model, trace, stream.latent)
            prior = prior_curvature(stream.model, stream.latent, trace)
            log_prior = stream.model.log_prior(stream.latent, trace).detach()
        for site in sites:
            gradient -= site.jacobian.gradient
            total.add(site, cotangents(site))
    if world_size() > 1:
        all_reduce_sum([*total.tensors(), log_likelihood, gradient])
    assert prior is not None
    return Accumulated(prior, log_prior, log_likelihood, gradient)


def accumulate_operators(total: CurvatureSum, accumulator: CurvatureAccumulator, data: Any) -> PriorCurvature:
    """
    Adds the exact Hessian of the negative log likelihood over data to a sum.

    :param total: the sum.
    :param accumulator: gives the terms.
    :param data: one batch or an iterable of batches, with observations.
    :return: the curvature of the prior.
    """
    prior = None
    for trace, negative_log_likelihood in accumulator.likelihood_terms(data):
        if prior is None:
            prior = prior_curvature(
                accumulator.model, accumulator.latent, trace, chunk_size=accumulator.chunk_size
            )
        if negative_log_likelihood.requires_grad:
            total.add_operator(
                hvp_operator(negative_log_likelihood, accumulator.latent), accumulator.chunk_size
            )
    if world_size() > 1:
        all_reduce_sum(total.tensors())
    assert prior is not None
    return prior
