# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Curvatures of low rank relative to the prior: leading eigenpairs, Nyström features, the function-space form."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_bnn.infer.examples import SiteExamples
from pyro_bnn.infer.memory import require_memory
from pyro_bnn.infer.parts import LowRankPart, Part
from pyro_bnn.infer.structures import CurvatureSum
from pyro_bnn.ops.distributed import all_reduce_sum, shared_generator
from pyro_bnn.ops.distributed import rank as process_rank
from pyro_bnn.ops.eigen import leading_eigenpairs
from pyro_bnn.ops.jacobian import LinearMap

LowRankMethod = Literal["low_rank", "nystrom", "function_space"]

#: Told, before rows are formed, how many come and from how many separate examples (None if they are coupled).
Reserve = Callable[[int, int | None], None]

#: Yields rows R of shape (n, q) with curvature R^T R, the same ones in every pass.
RowStream = Callable[[Reserve], Iterator[Tensor]]


def _reserve_nothing(rows: int, examples: int | None) -> None:
    """For passes that keep no rows."""


def placed_rows(
    site: SiteExamples, cotangents: Iterable[Tensor], index: Tensor, reserve: Reserve = _reserve_nothing
) -> Iterator[Tensor]:
    r"""
    The rows R of a site's curvature :math:`R^\top R` on one chunk of data.

    :param site: the site.
    :param cotangents: see :meth:`~pyro_bnn.infer.examples.SiteExamples.cotangents`.
    :param index: the entries that are wanted, shape ``(q,)``.
    :param reserve: called before rows are allocated.
    :return: an iterator over tensors of shape ``(K * B, q)``, all rows of one cotangent together.
    """
    latent = site.jacobian.latent
    place = torch.full((len(latent),), -1, dtype=torch.long, device=index.device)
    place[index] = torch.arange(len(index), device=index.device)
    for chunk in cotangents:
        reserve(chunk.shape[0] * chunk.shape[1], site.jacobian.B if site.jacobian.dim >= 0 else None)
        rows = chunk.new_zeros(chunk.shape[0] * chunk.shape[1], len(index))
        for positions, part in site.jacobian.rows(chunk):
            keep = place[positions] >= 0
            rows[:, place[positions][keep]] = part.reshape(len(rows), -1)[:, keep]
        yield rows


def curvature_rows(
    chunks: Iterable[tuple[Any, list[SiteExamples]]],
    cotangents: Callable[[SiteExamples], Iterable[Tensor]],
    index: Tensor,
    reserve: Reserve,
    weight: float,
) -> Iterator[Tensor]:
    """
    The rows of all sites on all chunks of data.

    :param chunks: see :meth:`~pyro_bnn.infer.examples.ExampleStream.run`.
    :param cotangents: see :meth:`~pyro_bnn.infer.examples.SiteExamples.cotangents`.
    :param index: the entries that are wanted, shape ``(q,)``.
    :param reserve: called before rows are allocated.
    :param weight: how many times the curvature counts.
    :return: an iterator over tensors of shape ``(n, q)``.
    """
    for _, sites in chunks:
        for site in sites:
            for rows in placed_rows(site, cotangents(site), index, reserve):
                yield rows.detach() * weight**0.5


class LowRankSum(CurvatureSum):
    r"""
    A curvature :math:`R^\top R`, or one given by products, reduced to low rank relative to the prior.

    :param index: the entries.
    :param latent: the packed vector.
    :param method: ``"low_rank"``, ``"nystrom"`` or ``"function_space"``.
    :param rank: how many eigenpairs or features.
    :param rows: yields R in chunks; ``None`` if ``operator`` is given.
    :param operator: products with the curvature on the entries, from ``(S, q)`` to ``(S, q)``.
    :param num_examples: how many examples ``rows`` comes from, if that is known.
    :param generator: source of random numbers.
    :param memory_limit: bytes that may be used.
    """

    def __init__(
        self,
        index: Tensor,
        latent: Tensor,
        *,
        method: LowRankMethod,
        rank: int,
        rows: RowStream | None = None,
        operator: LinearMap | None = None,
        num_examples: int | None = None,
        generator: torch.Generator | None = None,
        memory_limit: float | None = None,
    ) -> None:
        super().__init__(index, latent)
        self.method = method
        self.rank = rank
        self._rows = rows
        self._operator = operator
        self._num_examples = num_examples
        self._generator = generator
        self._limit = memory_limit
        self._earlier: list[Tensor] = []

    def resume(self, parts: Sequence[Part]) -> None:
        """See :meth:`CurvatureSum.resume`."""
        for part in parts:
            scale = part.prior.sqrt()
            root = part.tensors["values"].clamp(min=0).sqrt()
            self._earlier.append((part.tensors["vectors"] * root).mT * scale)

    def tensors(self) -> list[Tensor]:
        """Nothing: eigenpairs come from products, which are summed over processes one by one."""
        return [] if self.method == "low_rank" else super().tensors()

    def _all_rows(self, reserve: Reserve = _reserve_nothing) -> Iterator[Tensor]:
        if process_rank() == 0:  # the processes of a data-parallel run share what was there before
            yield from (rows.to(self.latent.dtype) for rows in self._earlier)
        if self._rows is not None:
            yield from (rows.to(self.latent.dtype) for rows in self._rows(reserve))

    def parts(self, prior: Callable[[Tensor], Tensor]) -> list[Part]:
        """See :meth:`CurvatureSum.parts`."""
        diagonal = prior(self.index)
        if diagonal.dim() != 1 or not bool((diagonal > 0).all()):
            raise ValueError(
                f"structure={self.method!r} needs a prior whose curvature is diagonal and positive at the point "
                "estimate; priors that are coupled (hierarchical scales) need structure='full', 'block' or 'diagonal', "
                "or sites= without the coupled ones."
            )
        scale = diagonal.rsqrt()
        if self.method == "low_rank":
            values, vectors = self._leading(scale)
        elif self.method == "function_space":
            values, vectors = self._all(scale)
        else:
            values, vectors = self._features(scale)
        return [LowRankPart(index=self.index, prior=diagonal, values=values, vectors=vectors)]

    def _leading(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        def multiply(v: Tensor) -> Tensor:
            scaled = v * scale
            total = torch.zeros_like(v) if self._operator is None else self._operator(scaled)
            for rows in self._all_rows():
                total = total + (scaled @ rows.mT) @ rows
            all_reduce_sum([total])
            return total * scale

        generator = self._generator or shared_generator(self.latent.device)
        return leading_eigenpairs(multiply, self.latent[self.index], self.rank, generator=generator)

    def _require(self, rows: int) -> None:
        q = len(self.index)
        # the rows, and their decomposition in float64
        needed = rows * q * self.latent.element_size() + 8 * (2 * rows * q + 3 * min(rows, q) ** 2)
        advice = "Use structure='nystrom' or 'low_rank' with a smaller rank, or 'kronecker'."
        if self.method == "function_space":
            advice = f"Pass a smaller subset_size. {advice}"
        require_memory(
            needed, f"structure={self.method!r} with {rows} rows", self.latent.device, advice, self._limit
        )

    def _all(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        collected: list[Tensor] = []
        count = sum(len(rows) for rows in self._earlier)
        first = True

        def reserve(rows: int, examples: int | None) -> None:
            nonlocal count, first
            expected = rows
            if first and examples and self._num_examples:  # fail at once rather than after most of the data
                expected = rows * self._num_examples // examples
            self._require(count + max(rows, expected))
            count, first = count + rows, False

        for rows in self._all_rows(reserve):
            collected.append(rows * scale)
        values, vectors = _from_rows(torch.cat(collected))
        return values, vectors

    def _features(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        # landmarks: a uniform sample of the rows, by the largest of random keys
        landmarks = self.latent.new_zeros(0, len(self.index))
        keys = self.latent.new_zeros(0)
        number = 4 * self.rank
        self._require(number)
        for rows in self._all_rows():
            rows = rows[(rows != 0).any(-1)]
            new = torch.rand(len(rows), generator=self._generator).to(keys)
            keys, landmarks = torch.cat([keys, new]), torch.cat([landmarks, rows])
            if len(keys) > number:
                keys, best = keys.topk(number)
                landmarks = landmarks[best]
        _, features = _from_rows(landmarks * scale)
        features = features[:, : self.rank]
        projected = self.latent.new_zeros(features.shape[1], features.shape[1])
        for rows in self._all_rows():
            images = (rows * scale) @ features
            projected.addmm_(images.mT, images)
        values, rotation = torch.linalg.eigh(projected)
        return values.clamp(min=0), features @ rotation


def _from_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """
    Non-zero eigenvalues, descending, and orthonormal eigenvectors of R^T R, by the smaller Gram matrix; in float64,
    since an eigenvalue matters beside the prior's one, however small it is beside the largest.
    """
    n, q = rows.shape
    wide = rows.double()
    if n >= q:
        values, vectors = torch.linalg.eigh(wide.mT @ wide)
        values, vectors = values.flip(-1), vectors.flip(-1)
    else:
        vectors, singular, _ = torch.linalg.svd(wide.mT, full_matrices=False)
        values = singular.square()
    keep = values > values[:1].sum() * torch.finfo(wide.dtype).eps * max(n, q)
    return values[keep].to(rows.dtype), vectors[:, keep].to(rows.dtype)
