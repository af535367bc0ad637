# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Parts of a structured curvature: each covers some entries of the packed vector, holds the curvature of the likelihood
and that of the prior there, and says what Gaussian follows when the prior's is multiplied by :math:`\tau`.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_bnn.distributions.precision_normal import DiagonalNormal, FullNormal, PrecisionNormal
from pyro_bnn.distributions.structured_normal import KroneckerNormal, LowRankNormal
from pyro_bnn.ops.kronecker import eigh_factor, rank_one


class NotAMinimumError(RuntimeError):
    """The point estimate is not a minimum of the negative log joint density: its curvature is indefinite."""


class CurvatureWarning(UserWarning):
    """A curvature takes another way than the fast one, or its numbers are less precise than they look."""


class Part:
    """
    Curvature over some entries.

    :param tensors: what the part consists of, by name: ``index`` (positions, shape ``(q,)``), ``prior`` (shape
        ``(q,)`` or, where priors are coupled, ``(q, q)``) and the likelihood's.
    """

    kind: ClassVar[str]

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    @property
    def index(self) -> Tensor:
        """Positions, shape ``(q,)``."""
        return self.tensors["index"]

    @property
    def prior(self) -> Tensor:
        """Curvature of the prior, shape ``(q,)`` or ``(q, q)``."""
        return self.tensors["prior"]

    def posterior(self, loc: Tensor, tau: Tensor | None = None) -> PrecisionNormal:
        """
        :param loc: the packed point estimate, shape ``(p,)``.
        :param tau: multiplier of the prior's curvature: a scalar or shape ``(q,)``; ``None`` for 1.
        :return: the Gaussian over the part's entries.
        """
        raise NotImplementedError

    def spectrum(self) -> tuple[Tensor, Tensor]:
        r"""
        Eigenvalues :math:`e` of the likelihood's curvature relative to the prior's, such that
        :math:`\log\det P = \sum_i \log(\tau + e_i) + c` for every scalar :math:`\tau`.

        :return: the eigenvalues, shape ``(q,)``, and the scalar c, the log determinant of the prior's curvature.
        """
        raise NotImplementedError

    def _check_positive(self, what: str) -> None:
        prior = self.prior
        smallest = prior.min() if prior.dim() == 1 else torch.linalg.eigvalsh(prior)[0]
        if not smallest > 0:
            raise NotAMinimumError(
                f"the curvature of the prior is not positive (smallest {float(smallest):.3g}), which {what} needs: "
                "use structure='full' or 'diagonal', or a prior with positive curvature at the point estimate."
            )


def _whiten(matrix: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    if prior.dim() == 1:
        scale = prior.rsqrt()
        return matrix * scale * scale.unsqueeze(-1), prior.log().sum()
    factor = torch.linalg.cholesky(prior)
    half = torch.linalg.solve_triangular(factor, matrix, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    return whitened, 2 * factor.diagonal().log().sum()


class DensePart(Part):
    """A dense matrix ``curvature`` of shape ``(q, q)``."""

    kind = "dense"

    def matrix(self, tau: Tensor | None = None) -> Tensor:
        """
        :param tau: see :meth:`Part.posterior`.
        :return: the precision, shape ``(q, q)``.
        """
        prior = self.prior
        if prior.dim() == 1:
            return self.tensors["curvature"] + torch.diag(prior if tau is None else tau * prior)
        if tau is not None:
            root = tau.sqrt()
            prior = prior * (tau if tau.dim() == 0 else root * root.unsqueeze(-1))
        return self.tensors["curvature"] + prior

    def posterior(self, loc: Tensor, tau: Tensor | None = None) -> PrecisionNormal:
        """See :meth:`Part.posterior`."""
        matrix = self.matrix(tau)
        if not torch.isfinite(matrix).all():
            raise NotAMinimumError(
                "the curvature has non-finite entries: check the data and the point estimate"
            )
        factor, info = torch.linalg.cholesky_ex(matrix)
        if info != 0:
            raise indefinite(torch.linalg.eigvalsh(matrix.detach()), "eigenvalues")
        return FullNormal(loc[self.index], matrix.to(loc.dtype), cholesky=factor.to(loc.dtype))

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """See :meth:`Part.spectrum`."""
        self._check_positive("a decomposition relative to the prior")
        whitened, log_det = _whiten(self.tensors["curvature"], self.prior)
        return torch.linalg.eigvalsh(whitened), log_det


class DiagonalPart(Part):
    """A diagonal ``curvature`` of shape ``(q,)``."""

    kind = "diagonal"

    def posterior(self, loc: Tensor, tau: Tensor | None = None) -> PrecisionNormal:
        """See :meth:`Part.posterior`."""
        precision = self.tensors["curvature"] + (self.prior if tau is None else tau * self.prior)
        if not torch.isfinite(precision).all():
            raise NotAMinimumError(
                "the curvature has non-finite entries: check the data and the point estimate"
            )
        if not bool((precision > 0).all()):
            raise indefinite(precision.detach(), "diagonal entries")
        return DiagonalNormal(loc[self.index], precision.to(loc.dtype))

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """See :meth:`Part.spectrum`."""
        self._check_positive("a decomposition relative to the prior")
        return self.tensors["curvature"] / self.prior, self.prior.log().sum()


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


class LowRankPart(Part):
    r"""
    :math:`S Q \operatorname{diag}(e) Q^\top S` with S the square root of the prior's curvature: ``vectors`` (q, r)
    and ``values`` (r,).
    """

    kind = "low_rank"

    def posterior(self, loc: Tensor, tau: Tensor | None = None) -> PrecisionNormal:
        """See :meth:`Part.posterior`."""
        self._check_positive("the low-rank structure")
        values, vectors = self.tensors["values"], self.tensors["vectors"]
        prior = self.prior
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

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """See :meth:`Part.spectrum`."""
        self._check_positive("the low-rank structure")
        values = self.prior.new_zeros(len(self.index))
        values[: len(self.tensors["values"])] = self.tensors["values"]
        return values, self.prior.log().sum()


PART_KINDS: tuple[type[Part], ...] = (DensePart, DiagonalPart, KroneckerPart, LowRankPart)


def indefinite(values: Tensor, what: str) -> NotAMinimumError:
    """
    :param values: eigenvalues, or diagonal entries, of a precision.
    :param what: what they are.
    :return: the error that says so.
    """
    return NotAMinimumError(
        f"the curvature at the point estimate is not positive definite: {int((values <= 0).sum())} of "
        f"{values.shape[0]} {what} are not positive, the smallest is {float(values.min()):.3g}. The point is "
        "not a minimum, or not one that the numbers resolve. Call guide.polish(data) in float64, train longer, or use "
        "curvature='ggn'."
    )
