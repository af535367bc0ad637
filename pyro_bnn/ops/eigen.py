# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Leading eigenpairs of a symmetric map that is known by its products."""

import torch
from torch import Tensor

from pyro_bnn.ops.jacobian import LinearMap


def leading_eigenpairs(
    operator: LinearMap,
    like: Tensor,
    rank: int,
    *,
    oversampling: int = 10,
    max_rounds: int = 20,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""
    The eigenpairs of the largest eigenvalues of a positive semi-definite map by a block Krylov method.

    The Krylov basis is orthogonalised in full and restarted with the Ritz vectors until their residuals
    :math:`|Hq - \lambda q|` fall below the tolerance.

    :param operator: a map from ``(S, p)`` to ``(S, p)``.
    :param like: a vector of shape ``(p,)`` that gives size, dtype and device.
    :param rank: how many eigenpairs.
    :param oversampling: further vectors in the block, which speed up convergence.
    :param max_rounds: largest number of restarts.
    :param tolerance: residual relative to the largest eigenvalue; by default the square root of the precision.
    :param generator: source of random numbers for the start.
    :return: eigenvalues in descending order, shape ``(rank,)``, and orthonormal vectors, shape ``(p, rank)``.

    Example::

        >>> d = torch.tensor([5.0, 1.0, 3.0])
        >>> leading_eigenpairs(lambda v: v * d, d, 2)[0].round()
        tensor([5., 3.])
    """
    p = like.shape[0]
    rank = min(rank, p)
    width = min(p, rank + oversampling)
    tolerance = torch.finfo(like.dtype).eps ** 0.5 if tolerance is None else tolerance
    block = torch.randn(p, width, dtype=like.dtype, device=like.device, generator=generator)
    basis, _ = torch.linalg.qr(block)
    values, vectors = like.new_zeros(rank), basis[:, :rank]
    for _ in range(max_rounds):
        images = operator(basis.mT).mT
        # the block and its images: a Rayleigh-Ritz step in twice the dimension
        grown = basis
        if width < p:
            rest = images - basis @ (basis.mT @ images)
            extra, _ = torch.linalg.qr(rest - basis @ (basis.mT @ rest))
            extra = extra[:, : p - width]
            grown, _ = torch.linalg.qr(torch.cat([basis, extra], 1))
            images = operator(grown.mT).mT
        small = grown.mT @ images
        found, rotation = torch.linalg.eigh(0.5 * (small + small.mT))
        rotation = rotation.flip(-1)[:, :width]
        values = found.flip(-1)[:rank]
        basis = grown @ rotation
        vectors = basis[:, :rank]
        residual = (images @ rotation[:, :rank] - vectors * values).norm(dim=0)
        if bool((residual <= tolerance * values.abs().max().clamp(min=1e-300)).all()):
            break
    return values, vectors
