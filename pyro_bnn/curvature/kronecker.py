# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Kronecker factors of a precision: their sums over data, damped, and the normal distribution they give."""

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.curvature.dense import DENSE_LIMIT, DensePart
from pyro_bnn.curvature.diagonal import DiagonalPart
from pyro_bnn.curvature.jacobian import DenseBlock, LinearBlock
from pyro_bnn.curvature.linear_maps import Sharing, eigh_factor, rank_one
from pyro_bnn.curvature.parts import Part
from pyro_bnn.curvature.stream import SiteExamples
from pyro_bnn.curvature.sums import CurvatureSum
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
        self,
        loc: Tensor,
        scales: tuple[Tensor, Tensor],
        vectors: tuple[Tensor, Tensor],
        eigenvalues: Tensor,
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

    def half_solve(self, x: Tensor) -> Tensor:
        """See :meth:`PrecisionNormal.half_solve`."""
        ro, ri = self.rotations
        return (ro @ (self._matrix(x) * self.eigenvalues.rsqrt()) @ ri.mT).flatten(-2)

    def half_solve_transposed(self, x: Tensor) -> Tensor:
        """See :meth:`PrecisionNormal.half_solve_transposed`."""
        ro, ri = self.rotations
        return ((ro.mT @ self._matrix(x) @ ri) * self.eigenvalues.rsqrt()).flatten(-2)

    def multiply(self, x: Tensor) -> Tensor:
        """See :meth:`PrecisionNormal.multiply`."""
        (so, si), (qo, qi) = self.scales, self.vectors
        wo, wi = qo * so.unsqueeze(-1), qi * si.unsqueeze(-1)
        return (wo @ ((wo.mT @ self._matrix(x) @ wi) * self.eigenvalues) @ wi.mT).flatten(-2)

    @property
    def log_det_precision(self) -> Tensor:
        """See :attr:`PrecisionNormal.log_det_precision`."""
        out, into = self.eigenvalues.shape
        so, si = self.scales
        wide = torch.float64
        scales = into * so.log().sum(dtype=wide) + out * si.log().sum(dtype=wide)
        return self.eigenvalues.log().sum(dtype=wide) + 2 * scales

    @property
    def smallest_precision(self) -> Tensor:
        """See :attr:`PrecisionNormal.smallest_precision`; known where the scales are constant."""
        so, si = self.scales
        if bool((so == so[0]).all()) and bool((si == si[0]).all()):
            return self.eigenvalues.min() * (so[0] * si[0]).square()
        return super().smallest_precision

    @property
    def variance(self) -> Tensor:
        """Marginal variances, shape ``(out * in,)``."""
        ro, ri = self.rotations
        return (ro.square() @ self.eigenvalues.reciprocal() @ ri.square().mT).flatten()


class KroneckerPart(Part):
    r"""
    A Kronecker product :math:`G \otimes A` of ``outputs`` (out, out) and ``inputs`` (in, in), the latter a sum to be
    divided by ``count``; the prior is :math:`s_o s_i` elementwise, so that damping by it is exact.
    """

    kind = "kronecker"

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__(**tensors)
        self._decomposition: Any = None

    def _decompose(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
        if self._decomposition is None:
            self._check_positive("the Kronecker structure")
            G, A = self.tensors["outputs"], self.tensors["inputs"] / self.tensors["count"].clamp(min=1)
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
            self._decomposition = ((so, si), (qo, qi), lo.unsqueeze(-1) * li)
        return self._decomposition

    def posterior(self, loc: Tensor, tau: Tensor | None = None) -> PrecisionNormal:
        """See :meth:`Part.posterior`; ``tau`` must be a scalar."""
        scales, vectors, values = self._decompose()
        (so, si), (qo, qi) = (tuple(x.to(loc.dtype) for x in pair) for pair in (scales, vectors))
        values = values + (1.0 if tau is None else tau)
        return KroneckerNormal(loc[self.index], (so, si), (qo, qi), values.to(loc.dtype))

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """See :meth:`Part.spectrum`."""
        return self._decompose()[2].reshape(-1), self.prior.log().sum()


class KroneckerSum(CurvatureSum):
    r"""
    Kronecker factors for the weights of linear maps, and for all other entries a dense block for each elementwise
    use (scales, offsets) and one for what enters in any other way; blocks larger than ``DENSE_LIMIT`` are diagonal.

    :param index: the entries.
    :param latent: the packed vector.
    :param sharing: see :data:`~pyro_bnn.curvature.linear_maps.Sharing`.
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
