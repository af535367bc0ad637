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
    :ivar count: the number of directions kept.

    Source: conjugate directions of Hestenes and Stiefel (1952), "Methods of conjugate gradients for solving linear
    systems", section 4, kept for further right-hand sides.

    Example::

        >>> P = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> Q = torch.tensor([[1.0, 0.0]]) / 2**0.5  # of unit P-norm
        >>> basis = ConjugateBasis(2)
        >>> basis.append(Q, Q @ P)
        >>> (basis.conjugate(torch.tensor([[0.0, 1.0]])) @ P @ Q.mT).abs().item() < 1e-6  # conjugate to Q
        True
    """

    def __init__(self, p: int, limit: int = 2**23) -> None:
        self.capacity = min(p, limit // p)
        self.count = 0
        self._directions = self._images = self._norms = torch.empty(0)
        self._latest: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def directions(self) -> Tensor:
        """What is kept, shape (count, p)."""
        return self._directions[: self.count]

    @property
    def images(self) -> Tensor:
        """Its products with P, shape (count, p)."""
        return self._images[: self.count]

    def append(self, directions: Tensor, images: Tensor) -> None:
        """
        Keeps a block, or remembers it as the latest if there is no room.

        :param directions: conjugate to what is kept and to each other, of unit P-norm, shape (S, p).
        :param images: their products with P, shape (S, p).
        """
        norms = directions.norm(dim=-1)
        end = self.count + len(directions)
        if end > self.capacity:
            self._latest = directions, images, norms
            return
        if end > len(self._norms):
            room = min(max(2 * end, 64), self.capacity)
            self._directions = _grown(self.directions, directions, room)
            self._images = _grown(self.images, images, room)
            self._norms = _grown(self._norms[: self.count], norms, room)
        self._directions[self.count : end] = directions
        self._images[self.count : end] = images
        self._norms[self.count : end] = norms
        self.count = end

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """
        The solution in the span of what is kept.

        :param rhs: shape (S, p).
        :return: the solution and the residual, of shape (S, p) both.
        """
        if not self.count:
            return torch.zeros_like(rhs), rhs.clone()
        coefficients = rhs @ self.directions.mT
        return coefficients @ self.directions, torch.addmm(rhs, coefficients, self.images, alpha=-1)

    def conjugate(self, vectors: Tensor) -> Tensor:
        """
        The parts of vectors that are conjugate to what is kept and to the latest block.

        :param vectors: shape (S, p).
        :return: shape (S, p); zero where nothing but rounding is left.
        """
        blocks = [(self.directions, self.images, self._norms[: self.count])] if self.count else []
        if self._latest:
            blocks.append(self._latest)
        found, size = vectors, vectors.norm(dim=-1)
        for repeat in range(2):
            for directions, images, norms in blocks:
                coefficients = found @ images.mT
                found = torch.addmm(found, coefficients, directions, alpha=-1)
                if not repeat:
                    size = size + coefficients.abs() @ norms
        noise = 10 * torch.finfo(found.dtype).eps * size
        return found * (found.norm(dim=-1) > noise)[:, None]


def _grown(kept: Tensor, like: Tensor, rows: int) -> Tensor:
    """A buffer of more rows that begins with those that are kept."""
    buffer = like.new_empty(rows, *like.shape[1:])
    if len(kept):
        buffer[: len(kept)] = kept
    return buffer
