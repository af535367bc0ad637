# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Sums the likelihood's curvature over data in one of several structures."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.infer.examples import SiteExamples
from pyro_bnn.infer.parts import DensePart, DiagonalPart, KroneckerPart, Part
from pyro_bnn.ops.distributed import is_same
from pyro_bnn.ops.examples import DenseBlock, ExampleJacobian, LinearBlock
from pyro_bnn.ops.jacobian import LinearMap
from pyro_bnn.ops.kronecker import MapBlock, Sharing, pair_block, squared_rows

#: Entries up to which a part that has no Kronecker form is dense rather than diagonal.
DENSE_LIMIT = 1024


class CurvatureSum:
    """
    A sum of likelihood curvatures in one structure.

    :param index: the entries it covers, shape ``(q,)``.
    :param latent: the packed vector, shape ``(p,)``, for its dtype and device.
    """

    def __init__(self, index: Tensor, latent: Tensor) -> None:
        self.index = index
        self.latent = latent
        self.place = torch.full((len(latent),), -1, dtype=torch.long, device=latent.device)
        self.place[index] = torch.arange(len(index), device=latent.device)

    def add(self, examples: SiteExamples, cotangents: Iterable[Tensor]) -> None:
        """
        Adds one site's curvature on one chunk of data.

        :param examples: the site.
        :param cotangents: see :meth:`~pyro_bnn.infer.examples.SiteExamples.cotangents`.
        """
        raise NotImplementedError

    def add_operator(self, operator: LinearMap, chunk_size: int) -> None:
        """
        Adds a curvature given by its products, such as an exact Hessian.

        :param operator: a map from ``(S, p)`` to ``(S, p)``.
        :param chunk_size: how many products run at once.
        """
        raise NotImplementedError

    def resume(self, parts: Sequence[Part]) -> None:
        """
        Starts from curvature that is there already.

        :param parts: what :meth:`parts` returned for an earlier sum of the same structure and entries.
        """
        raise NotImplementedError

    def parts(self, prior: Callable[[Tensor], Tensor]) -> list[Part]:
        """
        :param prior: gives the curvature of the prior on some positions, ``(q,)`` or ``(q, q)``.
        :return: the parts; together they cover all entries.
        """
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """
        What adds up over the processes of a data-parallel run.

        :return: tensors to be summed in place.
        :raises ValueError: if the sums of this structure do not add up.
        """
        raise ValueError(
            f"{type(self).__name__} does not add up over processes; with torch.distributed use structure='full', "
            "'block', 'kronecker', 'diagonal' or 'low_rank'."
        )

    def _columns(self, operator: LinearMap, chunk_size: int) -> Iterator[tuple[slice, Tensor]]:
        """Images of basis vectors, restricted to the entries: slices of rows and shape (s, q)."""
        q = len(self.index)
        for start in range(0, q, chunk_size):
            rows = slice(start, min(start + chunk_size, q))
            basis = self.latent.new_zeros(rows.stop - rows.start, len(self.latent))
            basis[torch.arange(len(basis)), self.index[rows]] = 1.0
            yield rows, operator(basis)[:, self.index]


class DenseSum(CurvatureSum):
    """A dense matrix over all the entries."""

    def __init__(self, index: Tensor, latent: Tensor) -> None:
        super().__init__(index, latent)
        self.matrix = latent.new_zeros(len(index), len(index))
        self._maps: dict[Any, tuple[Tensor, MapBlock]] = {}

    def tensors(self) -> list[Tensor]:
        """The matrix."""
        for key in list(self._maps):
            self._settle(key)
        return [self.matrix]

    def add(self, examples: SiteExamples, cotangents: Iterable[Tensor]) -> None:
        """See :meth:`CurvatureSum.add`."""
        jac = examples.jacobian
        for chunk in cotangents:
            if len(chunk) > 2 and self._add_pairs(jac, chunk):
                continue
            # rows are formed for a few cotangents at a time
            step = max(1, 2**25 // max(1, jac.B * len(self.index)))
            for some in chunk.split(step):
                rows = self.latent.new_zeros(len(some) * jac.B, len(self.index))
                for index, part in jac.rows(some):
                    place = self.place[index]
                    keep = place >= 0
                    rows[:, place[keep]] = part.reshape(len(rows), -1)[:, keep].to(rows.dtype)
                self.matrix.addmm_(rows.mT, rows)

    def _add_pairs(self, jac: ExampleJacobian, cotangents: Tensor) -> bool:
        """Pairs of maps with one row per example: K times fewer operations than a product of Jacobians."""
        maps: list[tuple[Tensor, Tensor, Tensor]] = []
        passes = [jac.gradients(c) for c in cotangents]
        joined = {id(offset) for offset in jac.offsets.values()}
        for block in jac.blocks:
            if isinstance(block, LinearBlock):
                x, index = block.inputs(), block.index
                if x.shape[1] != 1:
                    return False
                x = x[:, 0]
                if (offset := jac.offsets.get(id(block))) is not None:
                    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
                    index = torch.cat([index, offset.index.unsqueeze(-1)], 1)
                g = torch.stack([block.gradients(gs)[:, 0] for gs in passes])
                maps.append((index, g, x))
            elif id(block) not in joined:
                g = torch.stack([block.rows(gs) for gs in passes])
                maps.append((block.index.unsqueeze(-1), g, g.new_ones(jac.B, 1)))
        if len(jac.generic):
            g = torch.einsum("qbm,kbm->kbq", jac.columns, cotangents)
            maps.append((jac.generic.unsqueeze(-1), g, g.new_ones(jac.B, 1)))
        if any(bool((self.place[index] < 0).any()) for index, _, _ in maps):
            return False
        maps = [(index, g.to(self.matrix.dtype), x.to(self.matrix.dtype)) for index, g, x in maps]
        for i, (iu, gu, xu) in enumerate(maps):
            self._map_block(iu).add(gu, xu)
            for iv, gv, xv in maps[i + 1 :]:
                block_ = pair_block(gu, xu, gv, xv).reshape(iu.numel(), iv.numel())
                rows, columns = self.place[iu].reshape(-1), self.place[iv].reshape(-1)
                self.matrix[rows.unsqueeze(-1), columns] += block_
                self.matrix[columns.unsqueeze(-1), rows] += block_.mT
        return True

    def _map_block(self, index: Tensor) -> MapBlock:
        key = (*index.shape, int(index[0, 0]), int(index[0, -1]), int(index[-1, -1]))
        found = self._maps.get(key)
        if found is None or not torch.equal(found[0], index):
            self._settle(key)
            found = self._maps[key] = (index, MapBlock(index.shape[0], index.shape[1], self.latent))
        return found[1]

    def _settle(self, key: Any) -> None:
        """Adds a map's block, which was summed in a form of its own, to the matrix."""
        if key in self._maps:
            index, block = self._maps.pop(key)
            place = self.place[index].reshape(-1)
            self.matrix[place.unsqueeze(-1), place] += block.matrix().reshape(len(place), -1)

    def add_operator(self, operator: LinearMap, chunk_size: int) -> None:
        """See :meth:`CurvatureSum.add_operator`."""
        for rows, images in self._columns(operator, chunk_size):
            self.matrix[rows] += images.to(self.matrix.dtype)

    def resume(self, parts: Sequence[Part]) -> None:
        """See :meth:`CurvatureSum.resume`."""
        (part,) = parts
        self.matrix += part.tensors["curvature"]

    def parts(self, prior: Callable[[Tensor], Tensor]) -> list[Part]:
        """See :meth:`CurvatureSum.parts`."""
        (matrix,) = self.tensors()
        matrix = 0.5 * (matrix + matrix.mT)
        return [DensePart(index=self.index, prior=prior(self.index), curvature=matrix)]


class DiagonalSum(CurvatureSum):
    """The diagonal."""

    def __init__(self, index: Tensor, latent: Tensor) -> None:
        super().__init__(index, latent)
        self.diagonal = torch.zeros_like(latent)

    def tensors(self) -> list[Tensor]:
        """The diagonal."""
        return [self.diagonal]

    def add(self, examples: SiteExamples, cotangents: Iterable[Tensor]) -> None:
        """See :meth:`CurvatureSum.add`."""
        add_diagonal(self.diagonal, examples.jacobian, cotangents)

    def add_operator(self, operator: LinearMap, chunk_size: int) -> None:
        """See :meth:`CurvatureSum.add_operator`."""
        for rows, images in self._columns(operator, chunk_size):
            self.diagonal[self.index[rows]] += images[:, rows].diagonal()

    def resume(self, parts: Sequence[Part]) -> None:
        """See :meth:`CurvatureSum.resume`."""
        (part,) = parts
        self.diagonal[part.index] += part.tensors["curvature"]

    def parts(self, prior: Callable[[Tensor], Tensor]) -> list[Part]:
        """See :meth:`CurvatureSum.parts`."""
        value = prior(self.index)
        value = value if value.dim() == 1 else value.diagonal()
        return [DiagonalPart(index=self.index, prior=value, curvature=self.diagonal[self.index])]


def add_diagonal(total: Tensor, jac: ExampleJacobian, cotangents: Iterable[Tensor]) -> None:
    """
    Adds the diagonal of a site's curvature.

    :param total: shape ``(p,)``, changed in place.
    :param jac: the site's Jacobian.
    :param cotangents: chunks of shape ``(K, B, M)``.
    """
    for chunk in cotangents:
        passes = [jac.gradients(c) for c in chunk]
        done: set[int] = set()
        for block in jac.blocks:
            if isinstance(block, LinearBlock):
                squares, offset_squares = squared_rows([block.gradients(gs) for gs in passes], block.inputs())
                total[block.index] += squares
                offset = jac.offsets.get(id(block))
                if offset is not None and offset_squares is not None:
                    total[offset.index] += offset_squares
                    done.add(id(offset))
        for block in jac.blocks:
            if isinstance(block, DenseBlock) and id(block) not in done:
                for gs in passes:
                    total[block.index] += block.rows(gs).square().sum(0)
        if len(jac.generic):
            rows = torch.einsum("qbm,kbm->kbq", jac.columns, chunk)
            total[jac.generic] += rows.square().sum((0, 1))


class BlockSum(CurvatureSum):
    """
    A dense matrix over each of several disjoint groups of entries.

    :param groups: positions of each group.
    :param latent: the packed vector.
    """

    def __init__(self, groups: list[Tensor], latent: Tensor) -> None:
        super().__init__(torch.cat(groups), latent)
        self.sums = [DenseSum(index, latent) for index in groups]

    def tensors(self) -> list[Tensor]:
        """The blocks."""
        return [part.matrix for part in self.sums]

    def add(self, examples: SiteExamples, cotangents: Iterable[Tensor]) -> None:
        """See :meth:`CurvatureSum.add`."""
        jac = examples.jacobian
        for chunk in cotangents:
            step = max(1, 2**25 // max(1, jac.B * len(self.index)))
            for some in chunk.split(step):
                rows = self.latent.new_zeros(len(some) * jac.B, len(self.latent))
                for index, part in jac.rows(some):
                    rows[:, index] = part.reshape(len(rows), -1).to(rows.dtype)
                for block in self.sums:
                    mine = rows[:, block.index]
                    block.matrix.addmm_(mine.mT, mine)

    def add_operator(self, operator: LinearMap, chunk_size: int) -> None:
        """See :meth:`CurvatureSum.add_operator`."""
        for block in self.sums:
            block.add_operator(operator, chunk_size)

    def resume(self, parts: Sequence[Part]) -> None:
        """See :meth:`CurvatureSum.resume`."""
        for block, part in zip(self.sums, parts, strict=True):
            block.resume([part])

    def parts(self, prior: Callable[[Tensor], Tensor]) -> list[Part]:
        """See :meth:`CurvatureSum.parts`."""
        return [part for block in self.sums for part in block.parts(prior)]


class KroneckerSum(CurvatureSum):
    r"""
    Kronecker factors for the weights of linear maps, and for all other entries a dense block for each elementwise
    use (scales, offsets) and one for what enters in any other way; blocks larger than ``DENSE_LIMIT`` are diagonal.

    :param index: the entries.
    :param latent: the packed vector.
    :param sharing: see :data:`~pyro_bnn.ops.kronecker.Sharing`.
    """

    def __init__(self, index: Tensor, latent: Tensor, sharing: Sharing = "expand") -> None:
        super().__init__(index, latent)
        self.sharing = sharing
        self._linear: dict[Any, dict[str, Tensor]] = {}
        self._other: dict[Any, dict[str, Tensor]] = {}

    def add(self, examples: SiteExamples, cotangents: Iterable[Tensor]) -> None:
        """See :meth:`CurvatureSum.add`."""
        jac = examples.jacobian
        linear = [block for block in jac.blocks if isinstance(block, LinearBlock)]
        dense = [block for block in jac.blocks if isinstance(block, DenseBlock)]
        # an offset that is added to the outputs of a map has its output factor for curvature
        with_offset = {key: block for key, block in jac.offsets.items() if len(block.index) <= DENSE_LIMIT}
        dense = [block for block in dense if all(block is not other for other in with_offset.values())]
        active = torch.zeros(jac.B, dtype=torch.bool, device=self.latent.device)
        for chunk in cotangents:
            active |= (chunk != 0).any(-1).any(0)
            rows = {id(block): [] for block in dense}  # type: dict[int, list[Tensor]]
            for cotangent in chunk:
                gradients = jac.gradients(cotangent)
                gradients = tuple(g.to(self.latent.dtype) for g in gradients)
                for block in linear:
                    entry = self._linear_entry(block)
                    G = block.output_factor(gradients, self.sharing)
                    entry["outputs"] += G
                    if id(block) in with_offset:
                        if any(present is not None for present in block.present):
                            G = block.output_factor(gradients, self.sharing, everywhere=True)
                        self._add_matrix(with_offset[id(block)].index, G)
                for other in dense:
                    rows[id(other)].append(other.rows(gradients))
            for other in dense:
                self._add_rows(other.index, torch.stack(rows[id(other)]))
            if len(jac.generic):
                self._add_rows(jac.generic, torch.einsum("qbm,kbm->kbq", jac.columns, chunk))
        for block in linear:
            A, count = block.input_factor(self.sharing, active, self.latent.dtype)
            entry = self._linear_entry(block)
            entry["inputs"] += A
            entry["count"] += count

    def tensors(self) -> list[Tensor]:
        """
        The factors, the numbers of rows behind them, and the other blocks.

        :raises ValueError: if processes met different maps.
        """
        entries = sorted([*self._linear.items(), *self._other.items()], key=lambda item: str(item[0]))
        if not is_same(zlib.crc32(str([key for key, _ in entries]).encode())):
            raise ValueError(
                "the processes met different linear maps, so that their Kronecker factors do not add up: give every "
                "process batches of the same kind, or use structure='block'."
            )
        names = ("outputs", "inputs", "count", "curvature")
        return [entry[name] for _, entry in entries for name in names if name in entry]

    def _linear_entry(self, block: LinearBlock) -> dict[str, Tensor]:
        key = (tuple(block.index.shape), int(block.index[0, 0]), int(block.index[-1, -1]))
        if key not in self._linear:
            out, into = block.index.shape
            zeros = self.latent.new_zeros
            index = block.index.reshape(-1)
            if bool((self.place[index] < 0).any()):
                raise ValueError(
                    f"the weight at positions {int(index.min())} to {int(index.max())} is selected in part, which "
                    "the Kronecker structure cannot express: select whole sites, or use another structure."
                )
            self._linear[key] = {
                "index": index,
                "outputs": zeros(out, out),
                "inputs": zeros(into, into),
                "count": zeros(()),
            }
        return self._linear[key]

    def _add_matrix(self, index: Tensor, matrix: Tensor) -> None:
        keep = self.place[index] >= 0
        if not bool(keep.all()):
            index, matrix = index[keep], matrix[keep][:, keep]
        if len(index):
            self._other_entry(index)["curvature"] += matrix

    def _other_entry(self, index: Tensor) -> dict[str, Tensor]:
        key = (len(index), int(index[0]), int(index[-1]))
        if key not in self._other:
            q = len(index)
            shape = (q, q) if q <= DENSE_LIMIT else (q,)
            self._other[key] = {"index": index, "curvature": self.latent.new_zeros(shape)}
        return self._other[key]

    def _add_rows(self, index: Tensor, rows: Tensor) -> None:
        keep = self.place[index] >= 0
        index, rows = index[keep], rows[..., keep].reshape(-1, int(keep.sum()))
        if not len(index):
            return
        total = self._other_entry(index)["curvature"]
        rows = rows.to(total.dtype)
        if total.dim() == 2:
            total.addmm_(rows.mT, rows)
        else:
            total += rows.square().sum(0)

    def add_operator(self, operator: LinearMap, chunk_size: int) -> None:
        """Kronecker factors exist for Fisher-type curvatures only."""
        raise ValueError(
            "structure='kronecker' needs the factors of a Gauss-Newton or Fisher matrix; for the exact Hessian use "
            "structure='full', 'block', 'diagonal' or 'low_rank'."
        )

    def resume(self, parts: Sequence[Part]) -> None:
        """See :meth:`CurvatureSum.resume`."""
        for part in parts:
            entry = {name: value.clone() for name, value in part.tensors.items() if name != "prior"}
            index = part.index
            if isinstance(part, KroneckerPart):
                shape = (len(entry["outputs"]), len(entry["inputs"]))
                self._linear[(shape, int(index[0]), int(index[-1]))] = entry
            elif bool((entry["curvature"] != 0).any()):
                self._other[(len(index), int(index[0]), int(index[-1]))] = entry

    def parts(self, prior: Callable[[Tensor], Tensor]) -> list[Part]:
        """See :meth:`CurvatureSum.parts`."""
        found: list[Part] = []
        # a map that is used in different ways by two observed sites shares its entries between keys
        count = torch.zeros_like(self.place)
        for entry in (*self._linear.values(), *self._other.values()):
            count[entry["index"]] += 1
        if bool((count > 1).any()):
            raise ValueError(
                "some weights enter the observed sites, or different batches, in different ways, so that they have no "
                "common Kronecker factors: use structure='block', 'diagonal', 'full' or 'low_rank'."
            )
        for entry in self._linear.values():
            value = prior(entry["index"])
            if value.dim() == 2:
                raise ValueError(
                    "the prior couples the entries of a weight with each other, which the Kronecker structure cannot "
                    "express: use structure='full' or 'block'."
                )
            found.append(KroneckerPart(prior=value, **entry))
        for entry in self._other.values():
            value = prior(entry["index"])
            if entry["curvature"].dim() == 2:
                found.append(DensePart(prior=value, **entry))
            else:
                value = value if value.dim() == 1 else value.diagonal()
                found.append(DiagonalPart(prior=value, **entry))
        rest = self.index[count[self.index] == 0]
        if len(rest):
            value = prior(rest)
            value = value if value.dim() == 1 else value.diagonal()
            found.append(DiagonalPart(index=rest, prior=value, curvature=torch.zeros_like(value)))
        return found
