# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Curvatures of low rank relative to the prior: leading eigenpairs, Nyström features, the function-space form."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bnn.curvature.jacobian import Pulled
from pyro_bnn.curvature.parts import CurvatureSum, Part, Prior, indefinite, places, require_finite
from pyro_bnn.curvature.stream import SiteExamples
from pyro_bnn.distributions.precision_normal import PrecisionNormal
from pyro_bnn.ops.distributed import all_reduce_sum, shared_generator, world_size
from pyro_bnn.ops.distributed import rank as process_rank
from pyro_bnn.ops.jacobian import LinearMap
from pyro_bnn.ops.krylov import leading_eigenpairs
from pyro_bnn.ops.memory import require_memory

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
    The rows R, shape ``(K * B, q)``, of a site's curvature :math:`R^\top R` on one chunk of data in the entries ``index``;
    ``reserve`` is called before they are allocated.
    """
    jac = site.jacobian
    place = places(index, len(jac.latent))
    for chunk in cotangents:
        reserve(chunk.shape[0] * chunk.shape[1], jac.B if jac.dim >= 0 else None)
        yield Pulled(jac, chunk).placed_rows(place, len(index))


def curvature_rows(
    chunks: Iterable[tuple[Any, list[SiteExamples]]],
    cotangents: Callable[[SiteExamples], Iterable[Tensor]],
    index: Tensor,
    reserve: Reserve,
    weight: float,
) -> Iterator[Tensor]:
    """The rows of all sites on all chunks of data, whose curvature counts ``weight`` times."""
    for _, sites in chunks:
        for site in sites:
            for rows in placed_rows(site, cotangents(site), index, reserve):
                yield rows.detach() * weight**0.5


class LowRankSum(CurvatureSum):
    r"""
    A curvature :math:`R^\top R`, whose ``rows`` R come in chunks from ``num_examples`` if that is known, or one given by products
    (``operator``, from ``(S, q)`` to ``(S, q)``), on entries ``index``, shape ``(q,)``, reduced to ``rank`` eigenpairs or features
    relative to the prior.
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
        super().__init__([])
        self.index, self.latent = index, latent
        self.method = method
        self.rank = rank
        self._rows = rows
        self._operator = operator
        self._num_examples = num_examples
        self._generator = generator
        self._limit = memory_limit
        self._earlier: list[Tensor] = []

    @override
    def add(self, examples: Any, cotangents: Iterable[Tensor]) -> None:
        """Nothing: rows are read in passes of their own."""

    @override
    def resume(self, parts: Sequence[Part]) -> None:
        for part in parts:
            assert isinstance(part, LowRankPart)
            root = part.values.clamp(min=0).sqrt()
            self._earlier.append((part.vectors * root).mT * part.prior.sqrt())

    def _all_rows(self, reserve: Reserve = _reserve_nothing) -> Iterator[Tensor]:
        if process_rank() == 0:  # the processes of a data-parallel run share what was there before
            yield from (rows.to(self.latent.dtype) for rows in self._earlier)
        if self._rows is not None:
            yield from (rows.to(self.latent.dtype) for rows in self._rows(reserve))

    @override
    def parts(self, prior: Prior) -> list[Part]:
        if self.method != "low_rank" and world_size() > 1:
            raise ValueError(
                f"structure={self.method!r} does not add up over processes; with torch.distributed use structure='full', "
                "'block', 'kronecker', 'diagonal' or 'low_rank'."
            )
        diagonal = prior(self.index)
        if diagonal.dim() != 1 or not bool((diagonal > 0).all()):
            raise ValueError(
                f"structure={self.method!r} needs a prior whose curvature is diagonal and positive at the point "
                "estimate; priors that are coupled (hierarchical scales) need structure='full', 'block' or 'diagonal', "
                "or sites= without the coupled ones."
            )
        reduce = {"low_rank": self._leading, "function_space": self._all, "nystrom": self._features}
        values, vectors = reduce[self.method](diagonal.rsqrt())
        return [LowRankPart(index=self.index, prior=diagonal, values=values, vectors=vectors)]

    def _leading(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenpairs by products, which are summed over processes one by one."""

        def multiply(v: Tensor) -> Tensor:
            scaled = v * scale
            total = torch.zeros_like(v) if self._operator is None else self._operator(scaled)
            for rows in self._all_rows():
                total = total + (scaled @ rows.mT) @ rows
            all_reduce_sum([total])
            require_finite(total)
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
        what = f"structure={self.method!r} with {rows} rows"
        require_memory(needed, what, self.latent.device, advice, self._limit)

    def _all(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """All eigenpairs, from all rows."""
        count = sum(len(rows) for rows in self._earlier)
        first = True

        def reserve(rows: int, examples: int | None) -> None:
            nonlocal count, first
            expected = rows
            if first and examples and self._num_examples:  # fail at once rather than after most of the data
                expected = rows * self._num_examples // examples
            self._require(count + max(rows, expected))
            count, first = count + rows, False

        return _from_rows(torch.cat([rows * scale for rows in self._all_rows(reserve)]))

    def _features(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The projection on features of landmarks: a uniform sample of the rows, by the largest of random keys."""
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
        features = _from_rows(landmarks * scale)[1][:, : self.rank]
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


class LowRankNormal(PrecisionNormal):
    r"""
    A Gaussian with the precision :math:`P = S(I + Q\operatorname{diag}(e)Q^\top)S`, S diagonal, Q orthonormal:
    a prior plus a curvature of rank r. Nothing of size p × p is formed.

    :param Tensor loc: mean, shape ``(p,)``.
    :param Tensor scale: the diagonal of S, positive, shape ``(p,)``.
    :param Tensor vectors: Q, shape ``(p, r)``, orthonormal columns. Where e is large, :math:`I - QQ^\top` needs more digits
        than ``loc`` may have: products are formed in the precision of Q.
    :param Tensor eigenvalues: e > -1, shape ``(r,)``, in the same precision.
    """

    def __init__(self, loc: Tensor, scale: Tensor, vectors: Tensor, eigenvalues: Tensor) -> None:
        super().__init__(loc)
        self.scale = scale
        self.vectors = vectors
        self.eigenvalues = eigenvalues

    def _apply(self, x: Tensor, power: float) -> Tensor:
        factor = (1 + self.eigenvalues).pow(power) - 1
        wide = x.to(self.vectors.dtype)
        return (wide + ((wide @ self.vectors) * factor) @ self.vectors.mT).to(x.dtype)

    @override
    def half_solve(self, x: Tensor) -> Tensor:
        return self._apply(x, -0.5) / self.scale

    @override
    def half_solve_transposed(self, x: Tensor) -> Tensor:
        return self._apply(x / self.scale, -0.5)

    @override
    def multiply(self, x: Tensor) -> Tensor:
        return self._apply(x * self.scale, 1.0) * self.scale

    @property
    @override
    def log_det_precision(self) -> Tensor:
        terms = torch.log1p(self.eigenvalues), 2 * self.scale.log()
        return terms[0].sum(dtype=torch.float64) + terms[1].sum(dtype=torch.float64)

    @property
    @override
    def variance(self) -> Tensor:
        shrink = self.eigenvalues / (1 + self.eigenvalues)
        return (1 - self.vectors.square() @ shrink).to(self.scale.dtype) / self.scale.square()

    @override
    def condition_number(self, *, to_prior: bool = False) -> float:
        if not self.eigenvalues.numel():
            return 1.0
        values = 1 + self.eigenvalues.detach()
        rest = 1.0 if to_prior or len(values) < len(self.loc) else float("inf")
        return float(values.max()) / min(rest, float(values.min()))


class LowRankPart(Part):
    r"""
    :math:`S Q \operatorname{diag}(e) Q^\top S` with S the square root of the prior's curvature: ``vectors`` (q, r)
    and ``values`` (r,).
    """

    kind = "low_rank"
    vectors: Tensor
    values: Tensor

    @override
    def posterior(self, loc: Tensor, tau: Tensor | None = None) -> PrecisionNormal:
        self._check_positive("the low-rank structure")
        values, vectors, prior = self.values, self.vectors, self.prior
        if tau is not None:
            prior = tau * prior
            if tau.dim() == 0:
                values = values / tau
            else:
                factor = vectors * values.clamp(min=0).sqrt() / tau.sqrt().unsqueeze(-1)
                vectors, singular, _ = torch.linalg.svd(factor, full_matrices=False)
                values = singular.square()
        if not bool((values > -1).all()):
            raise indefinite(1 + values, "leading eigenvalues")
        return LowRankNormal(loc[self.index], prior.sqrt().to(loc.dtype), vectors, values)

    @override
    def spectrum(self) -> tuple[Tensor, Tensor]:
        self._check_positive("the low-rank structure")
        values = self.prior.new_zeros(len(self.index))
        values[: len(self.values)] = self.values
        return values, self.prior.log().sum()
