# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The curvature of a Laplace approximation: what is random, what is summed over the data, how much memory that takes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.curvature.accumulate import (
    Accumulated,
    CurvatureAccumulator,
    accumulate_examples,
    accumulate_operators,
)
from pyro_bnn.curvature.capture import Capture
from pyro_bnn.curvature.definite import TOLERANCE, blame, describe, expected_error, require_resolved
from pyro_bnn.curvature.dense import DENSE_LIMIT, DensePart
from pyro_bnn.curvature.diagonal import DiagonalPart
from pyro_bnn.curvature.kronecker import KroneckerSum
from pyro_bnn.curvature.linear_maps import Sharing
from pyro_bnn.curvature.low_rank import LowRankSum, Reserve, curvature_rows
from pyro_bnn.curvature.parts import CurvatureSum, NotAMinimumError, Part
from pyro_bnn.curvature.prior import PriorCurvature
from pyro_bnn.curvature.selection import largest
from pyro_bnn.curvature.stream import ExampleStream, count_examples, random_subset
from pyro_bnn.curvature.uses import LinearUse
from pyro_bnn.distributions.precision_normal import BlockNormal, PrecisionNormal
from pyro_bnn.infer.evidence import tau_of
from pyro_bnn.model.data import as_batches
from pyro_bnn.model.packed import PackedModel
from pyro_bnn.ops.distributed import all_reduce_sum, broadcast
from pyro_bnn.ops.jacobian import LinearMap, hvp_operator, wide
from pyro_bnn.ops.memory import available_bytes, readable, require_memory
from pyro_bnn.ops.notice import CurvatureWarning, logger, warn_user

#: Structures whose sums have a fixed size.
_FIXED = ("full", "diagonal", "kronecker", "block")


@dataclass(frozen=True)
class LaplaceCurvature:
    """
    The curvature of the negative log joint density at a point.

    :ivar packed: the model.
    :ivar loc: the point, shape ``(p,)``.
    :ivar active: which entries are random, shape ``(p,)``; all if ``None``.

    The other attributes are those of :class:`~pyro_bnn.infer.autoguide.AutoLaplace`.
    """

    packed: PackedModel
    loc: Tensor
    active: Tensor | None
    structure: str
    curvature: Any
    rank: int
    subset_size: int | None
    sharing: Sharing
    num_samples: int
    chunk_size: int
    budget: int
    memory_limit: float | None

    # ------------------------------------------------------------------ what is random

    @cached_property
    def index(self) -> Tensor:
        """Positions of the random entries, shape ``(q,)``."""
        if self.active is None:
            return torch.arange(len(self.loc), device=self.loc.device)
        return self.active.nonzero().squeeze(-1)

    @cached_property
    def groups(self) -> list[Tensor]:
        """The positions of the random entries of each site."""
        mask = torch.zeros(len(self.loc), dtype=torch.bool, device=self.index.device)
        mask[self.index] = True
        places = torch.arange(len(self.loc), device=self.index.device)
        groups = [places[s][mask[s]] for s in self.packed.space.slices.values()]
        return [group for group in groups if len(group)]

    def subnetwork(self, how: str, size: int, data: Any, generator: torch.Generator | None) -> Tensor:
        """A mask of the random entries with the largest scores, of a kind of :class:`AutoLaplace`'s ``subnetwork``."""
        if how == "largest_magnitude":
            values = self.loc.detach().abs()
        elif how == "random":
            values = torch.rand(len(self.loc), generator=generator).to(self.loc)
        else:
            of_ggn = replace(self, structure="diagonal", curvature="ggn")
            total = of_ggn.empty_sum()
            (part,) = total.parts(of_ggn._accumulate(total, data, None).prior)
            values = torch.zeros_like(self.loc)
            values[part.index] = (part.tensors["curvature"] + part.prior).reciprocal()
        values = values.detach()
        broadcast([values])  # every process takes the same entries
        return largest(values, size, self.active)

    # ------------------------------------------------------------------ sums over the data

    def stream(self, *, differentiable: bool = False) -> ExampleStream:
        """The data example by example."""
        return ExampleStream(
            self.packed, self.loc, self.active, budget=self.budget, differentiable=differentiable
        )

    def parts(
        self,
        data: Any,
        generator: torch.Generator | None = None,
        before: Sequence[Part] | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Accumulated, list[Part]]:
        """
        Values and gradients of log prior and log likelihood, and the parts of the curvature, in sums of a dtype (by default
        the guide's) that go on from the curvature of earlier data.
        """
        self._require_memory(data)
        total = self.empty_sum(dtype) if self.structure in _FIXED else self._rows(data, generator, dtype)
        if before is not None:
            total.resume(before)
        found = self._accumulate(total, data, generator)
        return found, total.parts(found.prior)

    def empty_sum(self, dtype: torch.dtype | None = None) -> CurvatureSum:
        """A sum of curvatures over data, still zero, in a structure of fixed size."""
        latent = wide(self.loc.detach()).to(dtype)
        if self.structure == "kronecker":
            return KroneckerSum(self.index, latent, self.sharing)
        if self.structure == "diagonal":
            return CurvatureSum([DiagonalPart.zero(self.index, latent)])
        groups = [self.index] if self.structure == "full" else self.groups
        return CurvatureSum([DensePart.zero(group, latent) for group in groups])

    def _rows(self, data: Any, generator: torch.Generator | None, dtype: torch.dtype | None) -> CurvatureSum:
        """A sum of low rank, which reads the data itself."""
        options: dict[str, Any] = {
            "method": self.structure,
            "rank": self.rank,
            "generator": generator,
            "memory_limit": self.memory_limit,
        }
        latent = wide(self.loc.detach()).to(dtype)
        if self.curvature == "hessian":
            return LowRankSum(self.index, latent, operator=self.hessian(data), **options)
        subset = None
        if self.subset_size is not None:
            subset = random_subset(self.stream(), data, self.subset_size, generator)
        elif self.structure == "function_space":
            options["num_examples"] = count_examples(self.stream(), data)
        # every pass over the data must give the same rows
        seed = int(torch.randint(2**62, (), generator=generator))

        def rows(reserve: Reserve) -> Iterator[Tensor]:
            stream = self.stream()
            chunks = stream.run(data) if subset is None else subset.run(stream)
            cotangents = self._cotangents(torch.Generator().manual_seed(seed))
            return curvature_rows(chunks, cotangents, self.index, reserve, subset.weight if subset else 1.0)

        return LowRankSum(self.index, latent, rows=rows, **options)

    def _cotangents(self, generator: torch.Generator | None) -> Callable[[Any], Any]:
        return lambda site: site.cotangents(self.curvature, num_samples=self.num_samples, generator=generator)

    def _accumulate(self, total: CurvatureSum, data: Any, generator: torch.Generator | None) -> Accumulated:
        if self.curvature == "hessian":
            return accumulate_operators(total, self._exact(), data)
        return accumulate_examples(total, self.stream(), data, self._cotangents(generator))

    def _exact(self) -> CurvatureAccumulator:
        return CurvatureAccumulator(self.packed, self.loc, "hessian", chunk_size=self.chunk_size)

    def hessian(self, data: Any) -> LinearMap:
        """The exact Hessian of the likelihood on the random entries."""
        accumulator = self._exact()

        def multiply(v: Tensor) -> Tensor:
            full = v.new_zeros(v.shape[0], len(self.loc))
            full[:, self.index] = v
            total = torch.zeros_like(v)
            for _, value in accumulator.likelihood_terms(data):
                if value.requires_grad:
                    total = total + hvp_operator(value, accumulator.latent)(full)[:, self.index]
            return total

        return multiply

    def joint_hessian(self, data: Any, prior: PriorCurvature) -> LinearMap:
        """That of the negative log joint density, over all processes."""
        likelihood, own = self.hessian(data), prior.restricted(self.index)

        def multiply(v: Tensor) -> Tensor:
            image = likelihood(v.to(self.loc))
            all_reduce_sum([image])
            return image + own(v)

        return multiply

    # ------------------------------------------------------------------ the Gaussian

    def gaussian(self, parts: Sequence[Part], tau: Tensor | None = None) -> PrecisionNormal:
        """The Gaussian of parts whose prior is multiplied by ``tau``, a scalar or shape ``(p,)``."""
        loc = wide(self.loc.detach()).clone()
        try:
            pieces = [
                (part.index, part.posterior(loc, None if tau is None else tau_of(part, tau)))
                for part in parts
            ]
        except NotAMinimumError as error:
            where = blame(self.packed.space, list(parts), len(loc))
            if self.curvature == "hessian":
                raise NotAMinimumError(f"curvature={self.curvature!r}: {error}{where}") from None
            raise NotAMinimumError(
                f"curvature={self.curvature!r} is positive semi-definite, but together with the prior it is not "
                f"positive definite in {loc.dtype}: the prior's curvature is not positive, or too small for the "
                f"precision. Use float64 or a narrower prior.{where} ({str(error).partition('. ')[0]})"
            ) from None
        for part, (index, piece) in zip(parts, pieces, strict=True):
            sums = part.tensors.get("curvature", part.prior).dtype
            require_resolved(piece, index, self.packed.space, len(loc), sums)
        if len(pieces) == 1 and torch.equal(pieces[0][0], torch.arange(len(loc), device=loc.device)):
            return pieces[0][1]
        return BlockNormal(loc, pieces)

    def resolved(
        self, data: Any, generator: torch.Generator | None, before: Sequence[Part] | None
    ) -> tuple[Accumulated, list[Part], PrecisionNormal]:
        """Curvature and Gaussian, summed in float64 where the guide's own precision does not suffice."""
        dtype = wide(self.loc).dtype
        found, parts = self.parts(data, generator, before)
        if dtype == torch.float32 and self.curvature != "hessian" and self.structure != "diagonal":
            try:
                posterior = self.gaussian(parts)
                if expected_error(posterior, dtype) <= TOLERANCE:
                    return found, parts, posterior
            except NotAMinimumError:  # by rounding, perhaps
                pass
            logger.info(
                "laplace_approximation: sums over the data in float64, because float32 does not resolve them"
            )
            dtype = torch.float64
            found, parts = self.parts(data, generator, before, dtype)
        posterior = self.gaussian(parts)
        error = expected_error(posterior, dtype)
        if error > TOLERANCE:
            warn_user(describe(posterior, error), CurvatureWarning)
        return found, parts, posterior

    # ------------------------------------------------------------------ memory

    def _require_memory(self, data: Any) -> None:
        """Raises before anything is allocated, and names the structures that would fit."""
        limit = available_bytes(self.loc.device) if self.memory_limit is None else self.memory_limit
        dense = 5.0 * len(self.index) ** 2 * wide(self.loc.detach()).element_size()
        if self.structure in ("full", "block", "kronecker", "diagonal") and dense <= limit:
            return  # none of them takes more, and nobody needs to run the model to know
        sizes = self._memory(data)
        if sizes[self.structure] <= limit:
            return
        order = ("full", "block", "kronecker", "low_rank", "diagonal")
        fitting = [f"structure={name!r} ({readable(sizes[name])})" for name in order if sizes[name] <= limit]
        advice = (
            f"These would fit: {', '.join(fitting)}; or take fewer latents: sites='last_layer', a subnetwork."
            if fitting
            else "No structure over all of these fits: take fewer latents with sites='last_layer' or a subnetwork."
        )
        what = f"structure={self.structure!r} over {len(self.index):,} entries"
        require_memory(sizes[self.structure], what, self.loc.device, advice, limit)

    def _memory(self, data: Any) -> dict[str, float]:
        """Peak bytes of each structure: the sum, its decomposition, and what both need to be computed."""
        q = len(self.index)
        factors = q
        if self.structure in ("kronecker", "full", "block"):
            kept = self._linear_shapes(data)
            # offsets and the like are dense blocks of at most DENSE_LIMIT entries
            rest = q - sum(out * into for out, into in kept)
            factors = sum(out**2 + into**2 for out, into in kept) + rest * min(rest, DENSE_LIMIT)
        numbers = {
            "full": 4 * q**2,
            "block": 4 * sum(len(group) ** 2 for group in self.groups),
            "kronecker": 3 * factors + 2 * q,
            "diagonal": 3 * q,
            "low_rank": 6 * q * (self.rank + 10),
            "nystrom": 10 * q * self.rank,
            "function_space": 3 * q,  # what follows is checked row by row
        }
        itemsize = wide(self.loc.detach()).element_size()
        return {name: float(number * itemsize) for name, number in numbers.items()}

    def _linear_shapes(self, data: Any) -> list[tuple[int, int]]:
        """Shapes of the weights of linear maps, by one pass over two data points."""
        batch = as_batches(data).first
        rows = self.packed.rows(self.loc, batch, 1)
        latent = self.loc.detach().clone().requires_grad_(True)
        with Capture(latent, self.active) as capture:
            few = rows[0].take((*batch, {}), slice(0, 2))[:2] if rows and rows[0].separate else batch
            self.packed.trace(latent, few)
        uses = [use for use in capture.uses if isinstance(use, LinearUse)]
        return list(
            {int(use.index.reshape(-1)[0]): (use.index.shape[0], use.index.shape[1]) for use in uses}.values()
        )
