# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The curvature of the prior."""

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_bnn.model.packed import PackedModel
from pyro_bnn.ops.jacobian import LinearMap, dense, hvp_operator, wide


class PriorCurvature:
    """
    The Hessian of the negative log prior at a point, on any of its entries.

    :param operator: products with it.
    :param latent: the packed vector, shape ``(p,)``.
    :param gradient: the gradient of the negative log prior there, shape ``(p,)``.
    :param chunk_size: how many products run at once.
    :param eps: the relative precision of the products; that of ``latent`` by default.
    """

    def __init__(
        self,
        operator: LinearMap,
        latent: Tensor,
        gradient: Tensor,
        *,
        chunk_size: int = 256,
        eps: float | None = None,
    ) -> None:
        self.operator = operator
        self.latent = latent.detach()
        self.gradient = gradient
        self.chunk_size = chunk_size
        self._eps = eps
        self._everywhere = diagonal_of_diagonal(operator, self.latent, eps)

    def __call__(self, index: Tensor) -> Tensor:
        """
        :param index: positions, shape ``(q,)``.
        :return: the diagonal there, shape ``(q,)``, if these entries are not coupled, else shape ``(q, q)``.
        """
        if self._everywhere is not None:
            return self._everywhere[index]
        diagonal = diagonal_of_diagonal(self.restricted(index), self.latent[index], self._eps)
        return self.matrix(index) if diagonal is None else diagonal

    def restricted(self, index: Tensor) -> LinearMap:
        """
        :param index: positions, shape ``(q,)``.
        :return: products with the block there, from ``(S, q)`` to ``(S, q)``.
        """

        def multiply(v: Tensor) -> Tensor:
            full = v.new_zeros(v.shape[0], len(self.latent))
            full[:, index] = v
            return self.operator(full)[:, index]

        return multiply

    def diagonal(self, index: Tensor) -> Tensor:
        """
        :param index: positions, shape ``(q,)``.
        :return: the diagonal there, shape ``(q,)``.
        """
        if self._everywhere is not None:
            return self._everywhere[index]
        return operator_diagonal(self.restricted(index), self.latent[index], self.chunk_size)

    def matrix(self, index: Tensor) -> Tensor:
        """
        :param index: positions, shape ``(q,)``.
        :return: the block there, shape ``(q, q)``.
        """
        if self._everywhere is not None:
            return torch.diag(self._everywhere[index])
        block = dense(self.restricted(index), self.latent[index], chunk_size=self.chunk_size)
        return 0.5 * (block + block.mT)


def prior_curvature(
    model: PackedModel, latent: Tensor, trace: Trace, *, chunk_size: int = 256
) -> PriorCurvature:
    """
    :param model: the packed model.
    :param latent: the packed vector that ``trace`` was made at, requiring a gradient.
    :param trace: a trace of the model.
    :param chunk_size: how many products run at once.
    :return: the curvature of the prior.
    """
    value = -model.log_prior(latent, trace)
    gradient = (
        torch.autograd.grad(value, latent, retain_graph=True, materialize_grads=True)[0]
        if value.requires_grad
        else torch.zeros_like(latent)
    )
    operator: LinearMap = hvp_operator(value, latent) if value.requires_grad else torch.zeros_like
    return PriorCurvature(
        lambda v: wide(operator(v)),
        wide(latent),
        wide(gradient.detach()),
        chunk_size=chunk_size,
        eps=torch.finfo(latent.dtype).eps,
    )


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


def diagonal_of_diagonal(operator: LinearMap, like: Tensor, eps: float | None = None) -> Tensor | None:
    """
    The diagonal of a map that is diagonal, which holds for the Hessian of any factorised prior.

    A map D is diagonal if and only if D r = (D 1) * r for every r; one Gaussian probe r decides it with
    probability one.

    :param operator: a map from ``(S, p)`` to ``(S, p)``.
    :param like: a vector of shape ``(p,)``.
    :param eps: the relative precision of the products; that of ``like`` by default.
    :return: the diagonal, shape ``(p,)``, or ``None`` if the map is not diagonal.
    """
    generator = torch.Generator(device=like.device).manual_seed(0)
    probe = torch.randn(like.shape[0], dtype=like.dtype, device=like.device, generator=generator)
    images = operator(torch.stack([torch.ones_like(probe), probe]))
    eps = torch.finfo(like.dtype).eps if eps is None else eps
    # entries of a diagonal map are products of few numbers; a weak coupling differs by more than their rounding
    tolerance = min(64 * eps, 0.02) * images.abs().max()
    if torch.allclose(images[0] * probe, images[1], rtol=min(256 * eps, 0.02), atol=float(tolerance)):
        return images[0]
    return None
