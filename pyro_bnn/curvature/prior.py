# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The curvature of the prior."""

import torch
from torch import Tensor

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
        self.eps = eps
        self._everywhere = diagonal_of_diagonal(operator, self.latent, eps)

    def __call__(self, index: Tensor) -> Tensor:
        """The diagonal at some positions, shape ``(q,)``, if these entries are not coupled, else shape ``(q, q)``."""
        if self._everywhere is not None:
            return self._everywhere[index]
        diagonal = diagonal_of_diagonal(self.restricted(index), self.latent[index], self.eps)
        return self.matrix(index) if diagonal is None else diagonal

    def restricted(self, index: Tensor) -> LinearMap:
        """Products with the block at some positions, from ``(S, q)`` to ``(S, q)``."""

        def multiply(v: Tensor) -> Tensor:
            full = v.new_zeros(v.shape[0], len(self.latent))
            full[:, index] = v
            return self.operator(full)[:, index]

        return multiply

    def diagonal(self, index: Tensor) -> Tensor:
        """The diagonal at some positions, shape ``(q,)``."""
        if self._everywhere is not None:
            return self._everywhere[index]
        return operator_diagonal(self.restricted(index), self.latent[index], self.chunk_size)

    def matrix(self, index: Tensor) -> Tensor:
        """The block at some positions, shape ``(q, q)``."""
        if self._everywhere is not None:
            return torch.diag(self._everywhere[index])
        block = dense(self.restricted(index), self.latent[index], chunk_size=self.chunk_size)
        return 0.5 * (block + block.mT)


def prior_curvature(value: Tensor, latent: Tensor, *, chunk_size: int = 256) -> PriorCurvature:
    """The curvature of a negative log prior, a scalar, at the packed vector that it depends on, which requires a gradient."""
    gradient = torch.zeros_like(latent)
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value, latent, retain_graph=True, materialize_grads=True)
    operator = hvp_operator(value, latent)
    return PriorCurvature(
        lambda v: wide(operator(v)),
        wide(latent),
        wide(gradient.detach()),
        chunk_size=chunk_size,
        eps=torch.finfo(latent.dtype).eps,
    )


def operator_diagonal(operator: LinearMap, like: Tensor, chunk_size: int) -> Tensor:
    """
    The diagonal, shape ``(p,)``, of a symmetric map from ``(S, p)`` to ``(S, p)``. If two products show that it is diagonal,
    they are all it takes.
    """
    diagonal = diagonal_of_diagonal(operator, like)
    if diagonal is not None:
        return diagonal
    parts = []
    for rows in torch.arange(len(like), device=like.device).split(chunk_size):
        basis = like.new_zeros(len(rows), len(like))
        basis[rows - rows[0], rows] = 1.0
        parts.append(operator(basis)[:, rows].diagonal())
    return torch.cat(parts)


def diagonal_of_diagonal(
    operator: LinearMap, like: Tensor, eps: float | None = None, *, by_row: bool = False
) -> Tensor | None:
    """
    The diagonal, shape ``(p,)``, of a map from ``(S, p)`` to ``(S, p)`` that is diagonal, which holds for the Hessian of any
    factorised prior; ``None`` if it is not. Its products have the relative precision ``eps``, by default that of ``like``.

    A map D is diagonal if and only if D r = (D 1) * r for every r; one Gaussian probe r decides it with
    probability one, up to the rounding of the largest row, or, ``by_row``, up to that of each: a coupling of wide latents is
    small beside the precision of narrow ones.
    """
    generator = torch.Generator(device=like.device).manual_seed(0)
    probe = torch.randn(like.shape[0], dtype=like.dtype, device=like.device, generator=generator)
    images = operator(torch.stack([torch.ones_like(probe), probe]))
    eps = torch.finfo(like.dtype).eps if eps is None else eps
    # entries of a diagonal map are products of few numbers; a weak coupling differs by more than their rounding
    tolerance = min(64 * eps, 0.02) * images.abs().max()
    if not torch.allclose(images[0] * probe, images[1], rtol=min(256 * eps, 0.02), atol=float(tolerance)):
        return None
    return None if by_row and _couples_rows(operator, probe, images, eps) else images[0]


def _couples_rows(operator: LinearMap, probe: Tensor, images: Tensor, eps: float) -> bool:
    """Whether images, shape (2, p), of ones and a probe are not of a diagonal map by what each row is rounded."""
    size = images.abs().amax(0)
    # terms that cancel in a row round by more than its size: by what images of sums differ from sums of images
    rounding = torch.ones_like(size[:1])
    for a, b in ((1.0, 1.0), (1.0, -1.0), (3.0, 1.0), (1.0, 3.0)):
        defect = (operator((a + b * probe)[None])[0] - a * images[0] - b * images[1]).abs()
        rounding = torch.maximum(rounding, (defect / (eps * size)).nan_to_num(0.0, posinf=torch.inf).max())
    gap = (images[0] * probe - images[1]).abs()
    return bool((gap > 64 * eps * rounding * size * (1 + probe.abs())).any())
