# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Covariances :math:`J P^{-1} J^\top` of a linearised model's outputs: over one batch, of the parameters of each element, and of
those of each observation, whose elements (its event dimensions) share the latents; over several batches, of all points.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.curvature.blocks import LinearBlock
from pyro_bnn.curvature.jacobian import ExampleJacobian, Pulled
from pyro_bnn.curvature.stream import ExampleStream, SiteExamples
from pyro_bnn.distributions.precision_normal import BlockNormal, PrecisionNormal
from pyro_bnn.model.data import Batch, iter_batches
from pyro_bnn.model.packed import SiteOutputs

#: parameters of one observation up to which their covariances are formed together with their variances
JOINT_LIMIT = 64

#: The owner of entries that are fixed, and of those that several parts share.
_FIXED, _SEVERAL = -1, -2


@dataclass
class SiteCovariances:
    """
    Covariances of one site, chunk by chunk.

    :ivar elements: of the parameters of each element, shape ``shape + (C, C)``.
    :ivar events: of those of each observation of E elements, shape ``batch_shape + (E C, E C)``; empty where there are no
        event dimensions, or where they were not wanted.
    """

    elements: list[Tensor] = field(default_factory=list)
    events: list[Tensor] = field(default_factory=list)


def output_covariances(
    posterior: Any,
    stream: ExampleStream,
    batch: Batch,
    *,
    joint: bool = False,
    whole: Callable[[], list[SiteOutputs]] | None = None,
) -> tuple[dict[str, SiteCovariances], list[SiteOutputs]]:
    """
    Covariances by site under a Gaussian over the packed vector, and the outputs if the batch ran in one piece; of whole
    observations, however large, if ``joint``. ``whole`` gives the outputs of the whole batch, where they are needed if it does
    not run in one piece.
    """
    found: dict[str, SiteCovariances] = {}
    covariance = LinearCovariance(posterior)
    outputs: list[list[SiteOutputs]] = []
    for _, sites in stream.run_batch(batch, whole=whole):
        outputs.append([examples.site for examples in sites])
        for examples in sites:
            with torch.set_grad_enabled(stream.differentiable):
                _add(found.setdefault(examples.site.name, SiteCovariances()), covariance, examples, joint)
    return found, outputs[0] if len(outputs) == 1 else []


def _add(mine: SiteCovariances, covariance: "LinearCovariance", examples: SiteExamples, joint: bool) -> None:
    site, jac = examples.site, examples.jacobian
    shape, C = site.outputs.shape[:-1], site.outputs.shape[-1]
    batch = len(shape) - site.event_dim
    E = shape[batch:].numel()
    # examples are batch dimensions of the site, never elements of its events
    if E > 1 and (joint or E * C <= JOINT_LIMIT):
        blocks = covariance.elements(jac, jac.M // (E * C))
        blocks = _placed(blocks, jac.B, jac.dim, shape[:batch])
        mine.events.append(blocks)
        apart = blocks.unflatten(-1, (E, C)).unflatten(-3, (E, C)).diagonal(dim1=-4, dim2=-2)
        mine.elements.append(apart.movedim(-1, -3).reshape(shape + (C, C)))
    else:
        blocks = covariance.elements(jac, jac.M // C)
        mine.elements.append(_placed(blocks, jac.B, jac.dim, shape))


def _placed(blocks: Tensor, size: int, dim: int, shape: torch.Size) -> Tensor:
    """Blocks by example and its parts, in the shape of the site: from (B, R, n, n) to shape + (n, n)."""
    if dim < 0:
        return blocks.reshape(shape + blocks.shape[-2:])
    rest = shape[:dim] + shape[dim + 1 :]
    return blocks.reshape((size,) + rest + blocks.shape[-2:]).movedim(0, dim)


@torch.inference_mode(False)
@torch.enable_grad()
def event_covariance(posterior: Any, stream: ExampleStream, batch: Batch, name: str) -> Tensor:
    """The covariance of all parameters of each observation of one site: its batch shape + ``(E C, E C)``."""
    found, _ = output_covariances(posterior, stream, batch, joint=True)
    return stream.joined(name, found[name].events)


def basis_functions(posterior: Any, stream: ExampleStream, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    r"""
    By site, its outputs, shape ``shape + (C,)``, and W with :math:`W W^\top = J P^{-1} J^\top`, shape ``shape + (C, r)``; with
    their graph if the stream is differentiable.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for trace, sites in stream.run_batch(batch):
        dependent = {examples.site.name: examples for examples in sites}
        for site in stream.model.site_outputs(trace):
            with torch.set_grad_enabled(stream.differentiable):
                examples = dependent.get(site.name)
                outputs = site.outputs if stream.differentiable else site.outputs.detach()
                basis = outputs.new_zeros(outputs.shape + (1,))  # of a site without latents
                if examples is not None:
                    basis = posterior.half_solve_transposed(_rows(examples))
                found.setdefault(site.name, []).append((outputs, basis))
    return {
        name: (
            stream.joined(name, [part[0] for part in parts]),
            stream.joined(name, [part[1] for part in parts]),
        )
        for name, parts in found.items()
    }


def _rows(examples: SiteExamples) -> Tensor:
    """The Jacobian of a site's outputs, shape + (C, p)."""
    jac, shape = examples.jacobian, examples.site.outputs.shape
    rows = jac.dense(jac.basis()).movedim(0, 1)  # (B, M, p)
    return _placed(rows.unflatten(1, (-1, shape[-1])), jac.B, jac.dim, shape[:-1])


def joint_covariance(basis: Tensor, batch_dims: int = 0) -> Tensor:
    """The covariance, ``batch + rest + rest``, of outputs with basis functions ``batch + rest + (r,)``."""
    batch, rest = basis.shape[:batch_dims], basis.shape[batch_dims:-1]
    flat = basis.reshape(batch + (rest.numel(), basis.shape[-1]))
    return (flat @ flat.mT).reshape(batch + rest + rest)


class LinearCovariance:
    """
    Covariances of the outputs of a linearised model under a Gaussian over the packed vector, without the Jacobian where its
    parts are the weights of linear maps. One that is no :class:`PrecisionNormal` needs a method ``quadratic_form``.
    """

    def __init__(self, posterior: Any) -> None:
        self.posterior = posterior
        if not isinstance(posterior, PrecisionNormal):
            return
        everything = torch.arange(posterior.loc.shape[0], device=posterior.loc.device)
        #: independent parts: positions, and the Gaussian over them
        self.parts = posterior.parts if isinstance(posterior, BlockNormal) else [(everything, posterior)]
        #: by entry, the number of its part and its place there
        self.owner, self.place = torch.full_like(everything, _FIXED), torch.zeros_like(everything)
        for i, (index, _) in enumerate(self.parts):
            self.owner[index], self.place[index] = i, everything[: len(index)]

    def elements(self, jac: ExampleJacobian, elements: int, *, limit: int = 64) -> Tensor:
        """
        Covariances of the C parameters of each of a site's ``elements`` per example, shape ``(B, elements, C, C)``; all those
        of an example are formed at once up to ``limit`` outputs.
        """
        B, M = jac.B, jac.M
        C = M // elements
        basis = jac.basis()
        if limit >= M:
            joint = self.combinations(jac, basis).reshape(B, elements, C, elements, C)
            return joint.diagonal(dim1=1, dim2=3).movedim(-1, 1)
        return torch.stack([self.combinations(jac, some) for some in basis.split(C)], 1)

    def combinations(self, jac: ExampleJacobian, cotangents: Tensor) -> Tensor:
        """Covariances of K linear combinations, shape ``(K, B, M)``, of each example's outputs: ``(B, K, K)``."""
        K, B, _ = cotangents.shape
        if not isinstance(self.posterior, PrecisionNormal):
            return self.posterior.quadratic_form(jac.dense(cotangents).movedim(0, 1))
        pulled = Pulled(jac, cotangents)
        total = cotangents.new_zeros(B, K, K)
        rows: dict[int, Tensor] = {}  # by part, shape (B, K, q)
        done: set[int] = set()
        for block in jac.blocks:
            owner = self._owner(block.index)
            if id(block) in done or owner == _FIXED:
                continue
            if isinstance(block, LinearBlock) and owner != _SEVERAL:
                found = self._of_map(pulled, block, owner, done)
                if found is not None:
                    total += found
                    continue
            total += self._of_rows(rows, block.index.reshape(-1), pulled.rows(block).movedim(0, 1), owner)
        if len(jac.generic):
            self._add_rows(rows, jac.generic, pulled.generic_rows().movedim(0, 1))
        for i, values in rows.items():
            total += self.parts[i][1].quadratic_form(values)
        return total

    def _owner(self, index: Tensor) -> int:
        """The part that all of some entries belong to."""
        owners = self.owner[index]
        first = int(owners.reshape(-1)[0])
        return first if bool((owners == first).all()) else _SEVERAL

    def _of_map(self, pulled: Pulled, block: LinearBlock, owner: int, done: set[int]) -> Tensor | None:
        """The covariance that the weight of a linear map, and an offset of its outputs, give where that is known."""
        jac = pulled.jacobian
        offset = jac.offsets.get(id(block))
        if offset is not None and (self._owner(offset.index) != owner or id(offset) in done):
            offset = None
        index, x = block.with_offset(offset)
        others = [b.index for b in jac.blocks if b is not block and b is not offset]
        alone = not any(bool((self.owner[other] == owner).any()) for other in (*others, jac.generic))
        found = self.parts[owner][1].map_covariance(pulled.outputs(block), x, self.place[index], alone)
        if found is not None and offset is not None:
            done.add(id(offset))
        return found

    def _of_rows(self, rows: dict[int, Tensor], index: Tensor, values: Tensor, owner: int) -> Tensor | float:
        """The covariance that the Jacobian of some entries, shape (B, K, q), gives; or adds it to that of their part."""
        if owner != _SEVERAL:
            found = self.parts[owner][1].partial_form(values, self.place[index])
            if found is not None:
                return found
        self._add_rows(rows, index, values)
        return 0.0

    def _add_rows(self, rows: dict[int, Tensor], index: Tensor, values: Tensor) -> None:
        """Adds the Jacobian of some entries, shape (B, K, q), to those of the parts that they belong to."""
        owners = self.owner[index]
        for i in owners.unique().tolist():
            if i == _FIXED:
                continue
            positions = self.parts[i][0]
            if i not in rows and torch.equal(index, positions):
                rows[i] = values
                continue
            if i not in rows:
                rows[i] = values.new_zeros(values.shape[:2] + positions.shape)
            mine = owners == i
            rows[i][..., self.place[index[mine]]] += values[..., mine]


def joint_covariance_blocks(guide: Any, data: Any) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    r"""
    The blocks :math:`J_i P^{-1} J_j^\top`, :math:`j \le i`, of the covariance over all points and outputs of batches in a fixed
    order, for a fitted guide: i, j and the block by observed site, shape ``shape_i + (C,) + shape_j + (C,)``.
    """
    for i, (args, kwargs) in enumerate(iter_batches(data)):
        mine = guide.basis_functions(*args, **kwargs)
        for j, (others, options) in enumerate(iter_batches(data)):
            theirs = mine if j == i else guide.basis_functions(*others, **options)
            yield (
                i,
                j,
                {name: torch.tensordot(a, theirs[name][1], ([-1], [-1])) for name, (_, a) in mine.items()},
            )
            if j == i:
                break
