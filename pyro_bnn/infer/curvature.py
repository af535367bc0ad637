# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Curvature of a model at a packed latent vector, accumulated batch by batch.

The posterior precision is :math:`P = H_{\text{lik}} + H_{\text{prior}}`. The likelihood part is either the exact
Hessian of the negative log likelihood or the GGN :math:`\sum_n J_n^\top F_n J_n`; the prior part is always the
exact Hessian of the negative log prior in unconstrained space.
"""

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyro_bnn.infer.data import is_single_batch, iter_batches
from pyro_bnn.infer.packed import PackedModel, PlateCoverage, SiteOutputs
from pyro_bnn.ops.jacobian import LinearMap, dense, hvp_operator, jacobian, jvp_operator, vjp
from pyro_bnn.ops.newton import sum_images

Curvature = Literal["ggn", "hessian"]


class NotAMinimumError(RuntimeError):
    """The point estimate is not a minimum of the negative log joint density: its curvature is indefinite."""


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


def site_jacobians(site: SiteOutputs, latent: Tensor, chunk_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """
    Jacobians of one site's parameters, a chunk of elements at a time.

    :param site: outputs with a graph to ``latent``.
    :param latent: the packed vector, shape ``(p,)``.
    :param chunk_size: how many rows of the Jacobian are formed at once.
    :return: pairs ``(J, F)`` of shapes ``(n, C, p)`` and ``(n, C, C)``.
    """
    C = site.outputs.shape[-1]
    if C == 0:
        return
    outputs = site.outputs.reshape(-1, C)
    information = site.information.reshape(-1, C, C)
    step = max(1, chunk_size // C)
    for start in range(0, outputs.shape[0], step):
        part = outputs[start : start + step]
        rows = jacobian(part.reshape(-1), latent, chunk_size=chunk_size)
        yield rows.reshape(part.shape[0], C, -1), information[start : start + step]


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
        p = self.latent.shape[0]
        total = self.latent.new_zeros(p, p)
        for operator_or_sites, is_prior in self._terms(data):
            if is_prior or self.curvature == "hessian":
                total += dense(operator_or_sites, self.latent, chunk_size=self.chunk_size)
            else:
                for site in operator_or_sites:
                    for J, F in site_jacobians(site, self.latent, self.chunk_size):
                        total += J.reshape(-1, p).mT @ (F @ J).reshape(-1, p)
        return 0.5 * (total + total.mT)

    def diagonal(self, data: Any) -> Tensor:
        """
        :param data: one batch or an iterable of batches, with observations.
        :return: the diagonal of the precision, shape ``(p,)``.
        """
        total = torch.zeros_like(self.latent)
        for operator_or_sites, is_prior in self._terms(data):
            if is_prior or self.curvature == "hessian":
                total += operator_diagonal(operator_or_sites, self.latent, self.chunk_size)
            else:
                for site in operator_or_sites:
                    for J, F in site_jacobians(site, self.latent, self.chunk_size):
                        total += (J * (F @ J)).sum((0, 1))
        return total

    def operator(self, data: Any) -> LinearMap:
        """
        Products with the precision, without forming it.

        :param data: one batch or an iterable of batches, with observations. One batch is traced once and its
            graph is kept; several batches are traced again in every product, so memory stays that of one.
        :return: a map from ``(S, p)`` to ``(S, p)``.
        """
        if is_single_batch(data):
            kept = list(self.operators(data))
            return lambda v: sum_images(kept, v)
        return lambda v: sum_images(self.operators(data), v)

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

    def _terms(self, data: Any) -> Iterator[tuple[Any, bool]]:
        coverage = PlateCoverage()
        for i, batch in enumerate(iter_batches(data)):
            trace = self.model.trace(self.latent, batch)
            if i == 0:
                yield hvp_operator(-self.model.log_prior(self.latent, trace), self.latent), True
            coverage.add(trace, self.model.observed)
            negative_log_likelihood = -self.model.log_likelihood(trace)
            if self.curvature == "hessian":
                yield hvp_operator(negative_log_likelihood, self.latent), False
            else:
                self.model.check_factors(trace)
                yield self.model.site_outputs(trace), False
        coverage.check()


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


def operator_diagonal(operator: LinearMap, like: Tensor, chunk_size: int) -> Tensor:
    """
    The diagonal of a symmetric map. If two products show that it is diagonal, they are all it takes.

    :param operator: a map from ``(S, p)`` to ``(S, p)``.
    :param like: a vector of shape ``(p,)``.
    :param chunk_size: how many products run at once.
    :return: shape ``(p,)``.
    """
    diagonal = diagonal_of_diagonal(operator, like)
    if diagonal is not None:
        return diagonal
    p = like.shape[0]
    parts = []
    for start in range(0, p, chunk_size):
        stop = min(start + chunk_size, p)
        basis = torch.zeros(stop - start, p, dtype=like.dtype, device=like.device)
        basis[:, start:stop].fill_diagonal_(1.0)
        parts.append(operator(basis)[:, start:stop].diagonal())
    return torch.cat(parts)


def diagonal_of_diagonal(operator: LinearMap, like: Tensor) -> Tensor | None:
    """
    The diagonal of a map that is diagonal, which holds for the Hessian of any factorised prior.

    A map D is diagonal if and only if D r = (D 1) * r for every r; one Gaussian probe r decides it with
    probability one.

    :param operator: a map from ``(S, p)`` to ``(S, p)``.
    :param like: a vector of shape ``(p,)``.
    :return: the diagonal, shape ``(p,)``, or ``None`` if the map is not diagonal.
    """
    generator = torch.Generator(device=like.device).manual_seed(0)
    probe = torch.randn(like.shape[0], dtype=like.dtype, device=like.device, generator=generator)
    images = operator(torch.stack([torch.ones_like(probe), probe]))
    tolerance = 1e3 * torch.finfo(like.dtype).eps * images.abs().max()
    if torch.allclose(images[0] * probe, images[1], rtol=1e-5, atol=float(tolerance)):
        return images[0]
    return None
