# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Kronecker factors of a precision: their sums over data, damped, and the normal distribution they give."""

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bnn.curvature.blocks import DenseBlock, LinearBlock
from pyro_bnn.curvature.dense import DENSE_LIMIT, DensePart
from pyro_bnn.curvature.diagonal import DiagonalPart
from pyro_bnn.curvature.jacobian import ExampleJacobian
from pyro_bnn.curvature.linear_maps import Sharing, eigh_factor, kronecker_covariance, rank_one
from pyro_bnn.curvature.parts import CurvatureSum, Part, Prior, places
from pyro_bnn.distributions.precision_normal import PrecisionNormal
from pyro_bnn.ops.distributed import is_same
from pyro_bnn.ops.jacobian import LinearMap


class KroneckerNormal(PrecisionNormal):
    r"""
    A Gaussian over an (out, in) matrix, flattened row by row, with the precision

    .. math:: P = S\,(Q_G \otimes Q_A)\,\operatorname{diag}(\Lambda)\,(Q_G \otimes Q_A)^\top S,
              \qquad S = \operatorname{diag}(s_{out} \otimes s_{in}).

    With :math:`\Lambda_{oi} = l_{G,o} l_{A,i} + \tau` this is a Kronecker product plus :math:`\tau S^2`, exactly.

    :param Tensor loc: mean, shape ``(out * in,)``.
    :param tuple scales: ``(s_out, s_in)``, shapes ``(out,)`` and ``(in,)``.
    :param tuple vectors: orthogonal ``(Q_G, Q_A)``, shapes ``(out, out)`` and ``(in, in)``.
    :param Tensor eigenvalues: :math:`\Lambda > 0`, shape ``(out, in)``.

    Example::

        >>> d = KroneckerNormal(torch.zeros(2), (torch.ones(1), torch.ones(2)),
        ...                     (torch.eye(1), torch.eye(2)), torch.tensor([[4.0, 2.0]]))
        >>> d.variance
        tensor([0.2500, 0.5000])
    """

    def __init__(
        self, loc: Tensor, scales: tuple[Tensor, Tensor], vectors: tuple[Tensor, Tensor], eigenvalues: Tensor
    ) -> None:
        super().__init__(loc)
        self.scales = scales
        self.vectors = vectors
        self.eigenvalues = eigenvalues

    @property
    def rotations(self) -> tuple[Tensor, Tensor]:
        r""":math:`S^{-1} Q` for outputs and inputs: gradients and inputs times these have independent coordinates."""
        (so, si), (qo, qi) = self.scales, self.vectors
        return qo / so.unsqueeze(-1), qi / si.unsqueeze(-1)

    def _matrix(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, self.eigenvalues.shape)

    @override
    def half_solve(self, x: Tensor) -> Tensor:
        ro, ri = self.rotations
        return (ro @ (self._matrix(x) * self.eigenvalues.rsqrt()) @ ri.mT).flatten(-2)

    @override
    def half_solve_transposed(self, x: Tensor) -> Tensor:
        ro, ri = self.rotations
        return ((ro.mT @ self._matrix(x) @ ri) * self.eigenvalues.rsqrt()).flatten(-2)

    @override
    def multiply(self, x: Tensor) -> Tensor:
        (so, si), (qo, qi) = self.scales, self.vectors
        wo, wi = qo * so.unsqueeze(-1), qi * si.unsqueeze(-1)
        return (wo @ ((wo.mT @ self._matrix(x) @ wi) * self.eigenvalues) @ wi.mT).flatten(-2)

    @property
    @override
    def log_det_precision(self) -> Tensor:
        (out, into), (so, si) = self.eigenvalues.shape, self.scales
        wide = torch.float64
        scales = into * so.log().sum(dtype=wide) + out * si.log().sum(dtype=wide)
        return self.eigenvalues.log().sum(dtype=wide) + 2 * scales

    @property
    @override
    def smallest_precision(self) -> Tensor:
        so, si = self.scales
        if bool((so == so[0]).all()) and bool((si == si[0]).all()):
            return self.eigenvalues.min() * (so[0] * si[0]).square()
        return super().smallest_precision

    @property
    @override
    def variance(self) -> Tensor:
        ro, ri = self.rotations
        return (ro.square() @ self.eigenvalues.reciprocal() @ ri.square().mT).flatten()

    @override
    def map_covariance(self, g: Sequence[Tensor], x: Tensor, places: Tensor, alone: bool) -> Tensor | None:
        everything = torch.arange(self.loc.shape[0], device=places.device)
        if not torch.equal(places.reshape(-1), everything):
            return None
        return kronecker_covariance(g, x, self.rotations, self.eigenvalues.reciprocal())

    @override
    def condition_number(self, *, to_prior: bool = False) -> float:
        return float(self.eigenvalues.detach().max() / self.eigenvalues.detach().min())


class KroneckerPart(Part):
    r"""
    A Kronecker product :math:`G \otimes A` of ``outputs`` (out, out) and ``inputs`` (in, in), the latter a sum to be
    divided by ``count``; the prior is :math:`s_o s_i` elementwise, so that damping by it is exact.
    """

    kind = "kronecker"
    outputs: Tensor
    inputs: Tensor
    count: Tensor

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__(**tensors)
        self._decomposition: Any = None

    @override
    def sums(self) -> list[Tensor]:
        return [self.outputs, self.inputs, self.count]

    @override
    def resume(self, earlier: Any) -> None:
        for mine, before in zip(self.sums(), earlier.sums(), strict=True):
            mine += before

    @override
    def finish(self, prior: Prior) -> "KroneckerPart":
        value = prior(self.index)
        if value.dim() == 2:
            raise ValueError(
                "the prior couples the entries of a weight with each other, which the Kronecker structure cannot "
                "express: use structure='full' or 'block'."
            )
        return KroneckerPart(prior=value, **self.tensors)

    def _decompose(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
        """Scales, vectors and eigenvalues relative to the prior; kept as long as the buffers stay what they are."""
        if self._decomposition is None or self._decomposition[0] is not self.outputs:
            self._decomposition = self.outputs, self._decomposed()
        return self._decomposition[1]

    def _decomposed(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
        self._check_positive("the Kronecker structure")
        G, A = self.outputs, self.inputs / self.count.clamp(min=1)
        factors = rank_one(self.prior.reshape(G.shape[0], A.shape[0]))
        if factors is None:
            raise ValueError(
                f"the prior of the {G.shape[0]} x {A.shape[0]} weight at positions {int(self.index.min())} to "
                f"{int(self.index.max())} of the packed vector has a precision that is no outer product of one "
                "number per output and one per input, so a Kronecker curvature cannot be damped by it exactly: "
                "use such a prior (one scale per weight, row or column), or structure='diagonal', 'block' or "
                "'low_rank'."
            )
        so, si = factors[0].sqrt(), factors[1].sqrt()
        lo, qo = eigh_factor(G / (so * so.unsqueeze(-1)))
        li, qi = eigh_factor(A / (si * si.unsqueeze(-1)))
        return (so, si), (qo, qi), lo.unsqueeze(-1) * li

    @override
    def posterior(self, loc: Tensor, tau: Tensor | None = None) -> PrecisionNormal:
        scales, vectors, values = self._decompose()
        (so, si), (qo, qi) = (tuple(x.to(loc.dtype) for x in pair) for pair in (scales, vectors))
        values = values + (1.0 if tau is None else tau)
        return KroneckerNormal(loc[self.index], (so, si), (qo, qi), values.to(loc.dtype))

    @override
    def spectrum(self) -> tuple[Tensor, Tensor]:
        return self._decompose()[2].reshape(-1), self.prior.log().sum()


class KroneckerSum(CurvatureSum):
    r"""
    Kronecker factors for the weights of linear maps, and for all other entries a dense block for each elementwise
    use (scales, offsets) and one for what enters in any other way; blocks larger than ``DENSE_LIMIT`` are diagonal.
    """

    def __init__(self, index: Tensor, latent: Tensor, sharing: Sharing = "expand") -> None:
        super().__init__([])
        self.index, self.latent, self.sharing = index, latent, sharing
        self._place = places(index, len(latent))
        #: parts by the number and the ends of their entries; for maps by shape and ends
        self._found: dict[Any, Part] = {}

    @override
    def add(self, examples: Any, cotangents: Iterable[Tensor]) -> None:
        jac: ExampleJacobian = examples.jacobian
        linear = [block for block in jac.blocks if isinstance(block, LinearBlock)]
        # an offset that is added to the outputs of a map has its output factor for curvature
        offsets = {key: block for key, block in jac.offsets.items() if len(block.index) <= DENSE_LIMIT}
        joined = set(map(id, offsets.values()))
        others = [block for block in jac.blocks if isinstance(block, DenseBlock) and id(block) not in joined]
        active = torch.zeros(jac.B, dtype=torch.bool, device=self.latent.device)
        for chunk in cotangents:
            active |= (chunk != 0).any(-1).any(0)
            rows: dict[int, list[Tensor]] = {id(block): [] for block in others}
            for cotangent in chunk:
                gradients = tuple(g.to(self.latent.dtype) for g in jac.gradients(cotangent))
                for block in linear:
                    self._add_outputs(block, gradients, offsets.get(id(block)))
                for other in others:
                    rows[id(other)].append(other.rows(gradients))
            for other in others:
                self._add_rows(other.index, torch.stack(rows[id(other)]))
            if len(jac.generic):
                self._add_rows(jac.generic, torch.einsum("qbm,kbm->kbq", jac.columns, chunk))
        for block in linear:
            A, count = block.input_factor(self.sharing, active, self.latent.dtype)
            part = self._map_part(block.index)
            part.inputs += A
            part.count += count

    def _add_outputs(
        self, block: LinearBlock, gradients: Sequence[Tensor], offset: DenseBlock | None
    ) -> None:
        G = block.output_factor(gradients, self.sharing)
        part = self._map_part(block.index)
        part.outputs += G
        if offset is None:
            return
        if any(present is not None for present in block.present):
            G = block.output_factor(gradients, self.sharing, everywhere=True)
        index, keep = self._selected(offset.index)
        if len(index):
            matrix: Any = self._other_part(index)
            matrix.curvature += G if keep is None else G[keep][:, keep]

    def _add_rows(self, index: Tensor, rows: Tensor) -> None:
        index, keep = self._selected(index)
        if len(index):
            rows = rows if keep is None else rows[..., keep]
            self._other_part(index).add_rows(rows.reshape(-1, len(index)).to(self.latent.dtype))

    def _selected(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Those of some positions that are covered, and which they are unless all."""
        keep = self._place[index] >= 0
        return (index, None) if bool(keep.all()) else (index[keep], keep)

    def _map_part(self, index: Tensor) -> KroneckerPart:
        key = (tuple(index.shape), int(index[0, 0]), int(index[-1, -1]))
        found = self._found.get(key)
        if found is None:
            (out, into), zeros = index.shape, self.latent.new_zeros
            index = index.reshape(-1)
            if bool((self._place[index] < 0).any()):
                raise ValueError(
                    f"the weight at positions {int(index.min())} to {int(index.max())} is selected in part, which "
                    "the Kronecker structure cannot express: select whole sites, or use another structure."
                )
            found = self._found[key] = KroneckerPart(
                index=index, outputs=zeros(out, out), inputs=zeros(into, into), count=zeros(())
            )
        assert isinstance(found, KroneckerPart)
        return found

    def _other_part(self, index: Tensor) -> Part:
        key = (len(index), int(index[0]), int(index[-1]))
        if key not in self._found:
            kind = DensePart if len(index) <= DENSE_LIMIT else DiagonalPart
            self._found[key] = kind.zero(index, self.latent)
        return self._found[key]

    @override
    def add_operator(self, operator: LinearMap, chunk_size: int) -> None:
        raise ValueError(
            "structure='kronecker' needs the factors of a Gauss-Newton or Fisher matrix; for the exact Hessian use "
            "structure='full', 'block', 'diagonal' or 'low_rank'."
        )

    @override
    def resume(self, parts: Sequence[Part]) -> None:
        for part in parts:
            if isinstance(part, KroneckerPart):
                self._map_part(part.index.reshape(len(part.outputs), -1)).resume(part)
            elif bool((part.tensors["curvature"] != 0).any()):
                self._other_part(part.index).resume(part)

    @override
    def tensors(self) -> list[Tensor]:
        entries = sorted(self._found.items(), key=lambda item: str(item[0]))
        if not is_same(zlib.crc32(str([key for key, _ in entries]).encode())):
            raise ValueError(
                "the processes met different linear maps, so that their Kronecker factors do not add up: give every "
                "process batches of the same kind, or use structure='block'."
            )
        return [tensor for _, part in entries for tensor in part.sums()]

    @override
    def parts(self, prior: Prior) -> list[Part]:
        # a map that is used in different ways by two observed sites shares its entries between keys
        count = torch.zeros_like(self._place)
        for part in self._found.values():
            count[part.index] += 1
        if bool((count > 1).any()):
            raise ValueError(
                "some weights enter the observed sites, or different batches, in different ways, so that they have no "
                "common Kronecker factors: use structure='block', 'diagonal', 'full' or 'low_rank'."
            )
        found = sorted(self._found.values(), key=lambda part: not isinstance(part, KroneckerPart))
        rest = self.index[count[self.index] == 0]
        if len(rest):
            found.append(DiagonalPart.zero(rest, self.latent))
        return [part.finish(prior) for part in found]
