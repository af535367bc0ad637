# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Eigenvalues of symmetric maps that are known by their products, and a preconditioner that is made of them."""

import torch
from torch import Tensor

from pyro_bnn.ops.block_cg import orthonormal_rows
from pyro_bnn.ops.jacobian import LinearMap


def largest_eigenvalue(
    operator: LinearMap, like: Tensor, *, tolerance: float = 1e-3, max_iter: int = 200
) -> Tensor:
    """
    The largest eigenvalue of a symmetric positive semi-definite map by power iteration.

    :param operator: a map from ``(1, p)`` to ``(1, p)``.
    :param like: a vector of shape ``(p,)`` that gives size, dtype and device.
    :param tolerance: relative change at which to stop.
    :param max_iter: largest number of products.
    :return: a scalar, a lower bound that is tight when the iteration has converged.
    """
    generator = torch.Generator(device=like.device).manual_seed(0)
    v = torch.randn(1, like.shape[0], dtype=like.dtype, device=like.device, generator=generator)
    v = v / v.norm()
    value = v.new_zeros(())
    for _ in range(max_iter):
        image = operator(v)
        new_value = (v * image).sum()
        norm = image.norm()
        if norm == 0:
            return norm
        v = image / norm
        if (new_value - value).abs() <= tolerance * new_value.abs():
            return new_value
        value = new_value
    return value


def smallest_eigenvalue(operator: LinearMap, like: Tensor, *, steps: int = 100) -> float:
    """
    An upper bound of the smallest eigenvalue of a symmetric map by Lanczos with full reorthogonalisation.

    :param operator: a map from ``(1, p)`` to ``(1, p)``.
    :param like: a vector of shape ``(p,)`` that gives size, dtype and device.
    :param steps: largest number of products; memory is ``steps * p``.
    :return: the smallest Ritz value.

    Example::

        >>> round(smallest_eigenvalue(lambda v: v * torch.tensor([3.0, -1.0, 2.0]), torch.zeros(3)), 4)
        -1.0
    """
    return float(ritz_pairs(operator, like, steps=steps)[0][0])


def ritz_pairs(operator: LinearMap, like: Tensor, *, steps: int = 100) -> tuple[Tensor, Tensor]:
    """
    Ritz values and vectors of a symmetric map by Lanczos with full reorthogonalisation: eigenpairs where p is at most
    ``steps``, approximations of the extreme ones from within otherwise.

    :param operator: a map from ``(1, p)`` to ``(1, p)``.
    :param like: a vector of shape ``(p,)`` that gives size, dtype and device.
    :param steps: largest number of products; memory is ``steps * p``.
    :return: n values, ascending, and unit vectors of shape ``(n, p)``.
    """
    generator = torch.Generator(device=like.device).manual_seed(0)
    p = like.shape[0]
    q = torch.randn(p, dtype=like.dtype, device=like.device, generator=generator)
    basis = (q / q.norm()).unsqueeze(0)
    diagonal: list[Tensor] = []
    off_diagonal: list[Tensor] = []
    for step in range(min(steps, p)):
        image = operator(basis[-1:])[0]
        diagonal.append(image @ basis[-1])
        for _ in range(2):
            image = image - (basis @ image) @ basis
        norm = image.norm()
        # what rounding leaves of the image is no direction
        nothing = max(1e-10, 100 * len(basis) * torch.finfo(like.dtype).eps)
        if step + 1 == min(steps, p) or norm <= nothing * torch.stack(diagonal).abs().max():
            break
        off_diagonal.append(norm)
        basis = torch.cat([basis, (image / norm).unsqueeze(0)])
    tridiagonal = torch.diag(torch.stack(diagonal))
    if off_diagonal:
        beta = torch.diag(torch.stack(off_diagonal), 1)
        tridiagonal = tridiagonal + beta + beta.mT
    values, vectors = torch.linalg.eigh(tridiagonal)
    return values, vectors.mT @ basis[: len(values)]


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


def nystrom_preconditioner(
    operator: LinearMap, like: Tensor, rank: int, *, passes: int = 2, diagonal: Tensor | None = None
) -> LinearMap:
    r"""
    The randomised Nyström preconditioner of a positive definite map whose spectrum decays.

    Ritz pairs :math:`(\mu_i, u_i)` of P on a random subspace, sharpened by power iteration, give

    .. math:: M^{-1} = I - U (I - \mu_{\min}\,\mathrm{diag}(\mu)^{-1}) U^\top,

    which maps the largest eigenvalues of P to about the smallest of those that were captured. It costs
    ``rank * passes`` products once, for any number of right-hand sides. With a diagonal S, such as the prior precision
    of weights of different scales, the same is done for :math:`S^{-1/2} P S^{-1/2}`.

    :param operator: the map :math:`v \mapsto P v` from ``(S, p)`` to ``(S, p)``.
    :param like: a vector of shape ``(p,)`` that gives size, dtype and device.
    :param rank: how many directions; memory is ``rank * p``.
    :param passes: products per direction; 2 sharpens the subspace by one power iteration.
    :param diagonal: S, positive, shape ``(p,)``; the identity by default.
    :return: the map :math:`r \mapsto M^{-1} r`.

    Source: Frangella, Tropp and Udell (2023), "Randomized Nyström preconditioning", with Ritz values in place of
    the shifted Nyström values because here the damping is part of P.
    """
    scale = torch.ones_like(like) if diagonal is None else diagonal.rsqrt()
    generator = torch.Generator(device=like.device).manual_seed(0)
    shape = (min(rank, like.shape[0]), like.shape[0])
    basis = torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
    basis = orthonormal_rows(basis)
    for _ in range(passes - 1):
        basis = orthonormal_rows(operator(basis * scale) * scale)
    image = operator(basis * scale) * scale
    values, vectors = torch.linalg.eigh(0.5 * (basis @ image.mT + image @ basis.mT))
    keep = values > 0
    directions = vectors[:, keep].mT @ basis
    shrink = 1 - values[keep].min() / values[keep]

    def solve(r: Tensor) -> Tensor:
        white = r * scale
        return (white - ((white @ directions.mT) * shrink) @ directions) * scale

    return solve


def nystrom_below(operator: LinearMap, diagonal: Tensor, rank: int, *, passes: int = 2) -> LinearMap:
    r"""
    The inverse of a matrix M between a positive diagonal T and P, which exceeds it: a preconditioner, and a bound.

    With :math:`A = T^{-1/2} P T^{-1/2} - 1`, positive semi-definite, and random orthonormal rows :math:`\Omega`, the Nyström
    approximation :math:`\hat A = A\Omega^\top(\Omega A\Omega^\top)^+\Omega A` never exceeds A, so that
    :math:`M = T^{1/2}(1 + \hat A)T^{1/2}` never exceeds P. M is reduced by what rounding may have added, and eigenvalues that
    the precision of the numbers does not resolve beside 1 are cut off. It costs ``rank * passes`` products.

    :param operator: the map :math:`v \mapsto P v` from ``(S, p)`` to ``(S, p)``.
    :param diagonal: T, shape ``(p,)``.
    :param rank: how many directions; memory is ``rank * p``.
    :param passes: products per direction; 2 sharpens the subspace by one power iteration.
    :return: the map :math:`r \mapsto M^{-1} r`.

    Source: Frangella, Tropp and Udell (2023), "Randomized Nyström preconditioning".

    Example::

        >>> P = torch.diag(torch.tensor([1.0, 1.0, 101.0]))
        >>> inverse = nystrom_below(lambda v: v @ P, torch.ones(3), 1)
        >>> (inverse(torch.eye(3)).diagonal() * 101).round()
        tensor([101., 101.,   1.])
    """
    scale = diagonal.rsqrt()

    def added(v: Tensor) -> Tensor:
        return operator(v * scale) * scale - v

    generator = torch.Generator(device=diagonal.device).manual_seed(0)
    shape = (min(rank, len(diagonal)), len(diagonal))
    basis = torch.randn(shape, dtype=diagonal.dtype, device=diagonal.device, generator=generator)
    basis = orthonormal_rows(basis)
    for _ in range(passes - 1):
        basis = orthonormal_rows(added(basis))
    image = added(basis)
    values, vectors = torch.linalg.eigh(0.5 * (basis @ image.mT + image @ basis.mT))
    eps = torch.finfo(diagonal.dtype).eps
    keep = values > eps**0.5 * values.clamp(min=0).max() if len(values) else values > 0
    half = (vectors[:, keep] / values[keep].sqrt()).mT @ image  # its square is the approximation
    sizes, vectors = torch.linalg.eigh(half @ half.mT)
    directions = (vectors / sizes.sqrt()).mT @ half
    # the difference below loses an inverse that is smaller than its rounding; a smaller M stays below P
    sizes = sizes.clamp(max=eps**-0.75)
    shrink = sizes / (1 + sizes)
    # images are rounded by eps, over values above its root
    reduced = 1 + eps**0.75 * float(sizes.max() if len(sizes) else 0.0)

    def solve(r: Tensor) -> Tensor:
        white = r * scale
        return reduced * (white - ((white @ directions.mT) * shrink) @ directions) * scale

    return solve
