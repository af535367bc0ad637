# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Conjugate directions that are kept: no product with a matrix is spent twice on the same direction."""

import torch
from torch import Tensor


class ConjugateBasis:
    r"""
    Directions Q with :math:`Q P Q^\top = 1`, for a positive definite P of shape (p, p), and their images :math:`QP`.

    The Galerkin solution in their span is :math:`x = Q^\top Q b`. New directions are made conjugate to all that are
    kept, twice, so that p of them are a basis whatever the condition of P, and further right-hand sides need no more
    products; the three-term recursion of conjugate gradients keeps the last block only and loses conjugacy to
    rounding.

    :param int p: the number of unknowns.
    :param int limit: largest number of elements of Q. Blocks beyond it are conjugate to what is kept and to the block
        before.
    """

    def __init__(self, p: int, limit: int = 2**23) -> None:
        self.capacity = min(p, limit // p)
        self.blocks: list[tuple[Tensor, Tensor]] = []
        self.count = 0
        self.latest: tuple[Tensor, Tensor] | None = None

    def append(self, directions: Tensor, images: Tensor) -> None:
        """
        Keeps a block, or remembers it as the latest if there is no room.

        :param directions: conjugate to what is kept and to each other, of unit P-norm, shape (S, p).
        :param images: their products with P, shape (S, p).
        """
        if self.count + len(directions) > self.capacity:
            self.latest = directions, images
            return
        self.count += len(directions)
        if self.blocks and len(self.blocks[-1][0]) < 256:  # few matrix products rather than many small ones
            last = self.blocks.pop()
            directions, images = torch.cat([last[0], directions]), torch.cat([last[1], images])
        self.blocks.append((directions, images))

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """
        The solution in the span of what is kept.

        :param rhs: shape (S, p).
        :return: the solution and the residual, of shape (S, p) both.
        """
        solution, residual = torch.zeros_like(rhs), rhs
        for directions, images in self.blocks:
            coefficients = residual @ directions.mT
            solution = torch.addmm(solution, coefficients, directions)
            residual = torch.addmm(residual, coefficients, images, alpha=-1)
        return solution, residual

    def conjugate(self, vectors: Tensor) -> Tensor:
        """
        The parts of vectors that are conjugate to what is kept and to the latest block.

        :param vectors: shape (S, p).
        :return: shape (S, p); zero where nothing but rounding is left.
        """
        found, size = vectors, vectors.norm(dim=-1)
        for _ in range(2):
            for directions, images in [*self.blocks, *([self.latest] if self.latest else [])]:
                coefficients = found @ images.mT
                size = size + coefficients.abs() @ directions.norm(dim=-1)
                found = torch.addmm(found, coefficients, directions, alpha=-1)
        noise = 10 * torch.finfo(found.dtype).eps * size
        return found * (found.norm(dim=-1) > noise)[:, None]
